"""Which networks fall to images that were made on another: the transfer matrix, and two networks before the same images."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from .. import state
from ..errors import InconclusiveError, MethodError, check_range, unknown
from ..types import ImageSet, Rate
from .adversarial import Attack, ThreatModel, answers_of, check_images, craft, described, logits_of
from .intervals import paired_p, wilson


@dataclass(frozen=True)
class Comparison:
    """Two rates counted on the same images.

    Attributes:
        first: The one.
        second: The other.
        p: Two-sided p-value that they differ by chance (exact McNemar test).
    """

    first: Rate
    second: Rate
    p: float


@dataclass(frozen=True, eq=False)
class TransferMatrix:
    """How often images made on one network fool another.

    Attributes:
        threat: What the attacker could do.
        budget: The attack's settings in words.
        success: (source, target) -> of the images that *both* answer rightly when clean, the share that the target answers
            wrongly under the source's images as 8-bit files keep them; None when there is no such image.
        white_box: Source -> the same of the source itself: an attack that fails here says nothing by failing elsewhere.
        right: Network -> which images it answers rightly when clean, bool ``(n,)``.
        wrong: (source, network) -> which it answers wrongly under the source's images, bool ``(n,)``.
        refused: Source -> number of images that were beyond the threat model; the originals stand for them.
        seed: Where each source's random numbers began.
    """

    threat: ThreatModel
    budget: str
    success: Mapping[tuple[str, str], Rate | None]
    white_box: Mapping[str, Rate | None]
    right: Mapping[str, Tensor]
    wrong: Mapping[tuple[str, str], Tensor]
    refused: Mapping[str, int]
    seed: int

    def compare(self, source: str, first: str, second: str) -> Comparison:
        """Compare how often two networks fall to the same images, over those that they and the source answer rightly.

        Raises:
            InconclusiveError: There is no such image.
            MethodError: There is no such network.
        """
        for name in (first, second):
            if (source, name) not in self.wrong:
                raise MethodError(unknown("pair of networks", f"{source} -> {name}", (f"{a} -> {b}" for a, b in self.wrong)))
        both = self.right[source] & self.right[first] & self.right[second]
        return compare(self.wrong[source, first][both], self.wrong[source, second][both])


def compare(first: Tensor, second: Tensor) -> Comparison:
    """Compare two outcomes of the same images, bool ``(n,)`` each.

    Raises:
        InconclusiveError: There are no images.
        MethodError: They are not equally many.
    """
    if first.shape != second.shape:
        raise MethodError(f"outcomes must belong to the same images, got {tuple(first.shape)} and {tuple(second.shape)}")
    if not len(first):
        raise InconclusiveError("a comparison needs at least one image, got 0")
    ahead, behind = int((first & ~second).sum()), int((~first & second).sum())
    p = min(1.0, 2 * min(paired_p(ahead, behind), paired_p(behind, ahead)))
    return Comparison(wilson(int(first.sum()), len(first)), wilson(int(second.sum()), len(second)), p)


def transfer_matrix(
    sources: Mapping[str, nn.Module],
    targets: Mapping[str, nn.Module],
    data: ImageSet,
    attack: Attack,
    threat: ThreatModel,
    *,
    batch_size: int = 256,
    on_step: Callable[[int, int], None] | None = None,
    generator: torch.Generator,
) -> TransferMatrix:
    """Make images on each source and show them to it and to every target.

    Args:
        sources: Name -> surrogate; left as it was.
        targets: Name -> network attacked; left as it was. One that is also a source has the same name in both.
        data: Images that no network was trained on.
        attack: Function of ``(model, x, y, generator)``; ``bind(mi_fgsm, eps=8 / 255)``.
        threat: The threat model; the attacker knows the source.
        batch_size: Images at once, >= 1.
        on_step: Called with ``(step, steps)``, a step being one source on one batch.
        generator: Source of all randomness.

    Raises:
        MethodError: No images or networks; two networks share a name; the threat model is targeted.
        ModelError: A network does not take the images.
    """
    check_images(data)
    check_range("batch_size", batch_size, 1, 2**31)
    _check(sources, targets, threat)
    seed = int(torch.randint(2**62, (), generator=generator, device=generator.device))
    draws, size, classes = {name: state.generator(seed) for name in sources}, state.batch_size(batch_size), len(data.classes)
    right: dict[str, list[Tensor]] = {name: [] for name in (*sources, *targets)}
    wrong: dict[tuple[str, str], list[Tensor]] = {(s, t): [] for s in sources for t in (s, *targets)}
    refused, starts = dict.fromkeys(sources, 0), range(0, len(data), size)
    with state.seeded(state.generator(seed)):
        for batch, start in enumerate(starts):
            x, y = data.x[start : start + size], data.y[start : start + size]
            for name, model in {**sources, **targets}.items():
                right[name].append(answers_of(logits_of(model, x, classes)) == y)
            for i, (source, model) in enumerate(sources.items(), start=1):
                made = craft(attack, model, x, y, threat, draws[source])
                refused[source] += int((~made.admissible).sum())
                for name, other in {source: model, **targets}.items():
                    wrong[source, name].append(answers_of(logits_of(other, made.stored, classes)) != y)
                if on_step is not None:
                    on_step(batch * len(sources) + i, len(sources) * len(starts))
    known = {name: torch.cat(parts) for name, parts in right.items()}
    fooled = {pair: torch.cat(parts) for pair, parts in wrong.items()}
    success = {pair: _success(known[pair[0]] & known[pair[1]], found) for pair, found in fooled.items()}
    return TransferMatrix(
        threat=replace(threat, knowledge="transfer"),
        budget=described(attack),
        success={(s, t): success[s, t] for s in sources for t in targets},
        white_box={s: success[s, s] for s in sources},
        right=known,
        wrong=fooled,
        refused=refused,
        seed=seed,
    )


def _success(both: Tensor, wrong: Tensor) -> Rate | None:
    return wilson(int((both & wrong).sum()), int(both.sum())) if bool(both.any()) else None


def _check(sources: Mapping[str, nn.Module], targets: Mapping[str, nn.Module], threat: ThreatModel) -> None:
    if not sources or not targets:
        raise MethodError(f"transfer needs sources and targets, got {len(sources)} and {len(targets)}")
    if threat.targeted:
        raise MethodError("the transfer matrix is untargeted, got a targeted threat model; use robustness on each target")
    for name in sources.keys() & targets.keys():
        if sources[name] is not targets[name]:
            raise MethodError(f"'{name}' names one network as source and another as target; give each its own name")
