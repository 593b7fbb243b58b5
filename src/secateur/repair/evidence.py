"""What a network tells about its backdoor to somebody who knows neither trigger nor target: the evidence `auto` goes by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import get_args

import torch
from torch import Tensor, nn

from ..data import sample
from ..detect import Inverted, Kind, Precision, Suspicion, invert, strengthen, suspected
from ..errors import ModelError
from ..measure import predict
from ..prune.neurons import Neurons
from ..types import ImageSet, Trigger
from .anp import adversarial_noise
from .neural_cleanse import ladder, told
from .student import undropped
from .unlearning import unlearn

SUSPECTS = 3  # at most
NOISE = 0.4  # ANP's
NOISY = 4, 256  # batches, images in each
UNLEARNED = 512  # images that the unlearned network is asked about
REGROWN = 15  # steps


@dataclass(frozen=True, eq=False)
class Evidence:
    """What is known of a network before it is repaired.

    Attributes:
        suspects: Classes that may be targets, the most suspect first; one to three.
        flagged: Whether inversion flagged them; if not, there is one, which unlearning named.
        smallest: The smallest trigger of each kind for each of them.
        log: Numbers for the record.
        notes: Sentences for the report.
    """

    suspects: tuple[int, ...]
    flagged: bool
    smallest: tuple[Inverted, ...]
    log: dict[str, float]
    notes: tuple[str, ...]


def examine(
    model: nn.Module,
    clean: ImageSet,
    *,
    steps: int = 80,
    batch_size: int = 32,
    precision: Precision = "float32",
    generator: torch.Generator,
) -> Evidence:
    """Find the classes that may be a backdoor's target, and triggers for them.

    Triggers of all classes are inverted, sparse and smooth, and a class whose trigger is small by a leap is flagged (see
    `secateur.detect.suspected`). When none is, the suspect is the class to which a copy that has unlearned the clean images
    sends the most of them: RNP's observation (arXiv:2305.14876). It names a class for every network, so it is no evidence of
    a backdoor.

    Args:
        model: Takes images in [0, 1]; not changed.
        clean: Labelled clean images.
        steps: Batches per inversion, >= 1.
        batch_size: Images per batch and class, >= 1.
        precision: Of the inversion.
        generator: Source of all randomness.

    Raises:
        DataError: ``clean`` is too small to hold a fifth out.
        MethodError: An argument is out of range, or there are fewer than three classes.
    """
    look = partial(invert, model, clean, steps=steps, batch_size=batch_size, precision=precision, generator=generator)
    found = [each for kind in ("sparse", "smooth") for each in look(kind=kind)]
    suspicion = suspected(found)
    log, note = told(found, suspicion)
    suspects, notes = suspicion.flagged[:SUSPECTS], (note,)
    if not suspects:
        suspects, said = _guess(model, clean, suspicion, generator)
        notes = (note, said)
    log["healed_class"] = float(suspects[0])
    smallest = [each for each in found if each.target in suspects]
    smallest += [each for kind in get_args(Kind) if kind not in ("sparse", "smooth") for each in look(suspects, kind=kind)]
    return Evidence(suspects, bool(suspicion.flagged), tuple(smallest), log, notes)


def _guess(model: nn.Module, clean: ImageSet, suspicion: Suspicion, generator: torch.Generator) -> tuple[tuple[int], str]:
    """Return the class to heal in a network in which none was flagged, and a sentence about it."""
    try:
        suspect = unlearned_class(model, clean, generator=generator)
    except ModelError as error:
        first = suspicion.ranking[0]
        return (first,), f"unlearning failed ({error}), so class {first}, the most suspect of inversion, was healed"
    return (suspect,), f"unlearning names class {suspect} as the most suspect, as it names one for any network"


def unlearned_class(model: nn.Module, clean: ImageSet, *, generator: torch.Generator) -> int:
    """Return the class to which a copy that has unlearned the clean images sends most of those of other classes.

    Raises:
        ModelError: Unlearning diverged.
    """
    unlearned, _ = unlearn(model, clean, lr=0.01, until=0.1, epochs=20, generator=generator)
    chosen = clean.subset(torch.randperm(len(clean), generator=generator)[:UNLEARNED])
    batches = sample(chosen, min(256, len(chosen)), 2, device=next(model.parameters()).device, generator=generator)
    undropped(unlearned)  # in train mode, as it was trained: its running statistics lag behind
    with torch.no_grad():
        answers = [(unlearned(x).argmax(1), y) for x, y in batches]
    return int(_moved(answers, len(clean.classes)).argmax())


def moved_by_noise(model: nn.Module, clean: ImageSet, *, generator: torch.Generator) -> Tensor:
    """Return for each class the share of images of other classes sent there under adversarial noise on the neurons.

    Under the noise of ANP (arXiv:2110.14430), a network with a backdoor tends to answer its target. Batch-norms use the
    batch's statistics; the noise has size 0.4.
    """
    neurons = Neurons(model, clean.shape)
    undropped(neurons.network)
    factors = neurons.filled(1.0)
    answers = []
    batches, size = NOISY
    for x, y in sample(clean, size, batches, device=neurons.device, generator=generator):
        noise = adversarial_noise(neurons, factors, x, y, eps=NOISE, generator=generator)
        with torch.no_grad():
            answers.append((noise.logits(neurons, factors, x).argmax(1), y))
    return _moved(answers, len(clean.classes))


def _moved(batches: Sequence[tuple[Tensor, Tensor]], classes: int) -> Tensor:
    """Return for each class the share of images of other classes that got its answer, from answers and labels by batch."""
    answers, labels = (torch.cat(parts).cpu() for parts in zip(*batches, strict=True))
    numbers = torch.arange(classes)
    others = labels[:, None] != numbers
    return ((answers[:, None] == numbers) & others).sum(0) / others.sum(0).clamp(min=1)


def grown(
    model: nn.Module,
    clean: ImageSet,
    smallest: Sequence[Inverted],
    *,
    sizes: int = 3,
    batch_size: int = 32,
    precision: Precision = "float32",
    generator: torch.Generator,
) -> list[Trigger]:
    """Return triggers adapted to a network, each at its own size, at twice that, at four times, and so on."""
    grow = partial(strengthen, model, clean, batch_size=batch_size, precision=precision, generator=generator)
    return [trigger for each in smallest for trigger in ladder(grow, each, sizes)]


def regrown(
    model: nn.Module,
    fitted: ImageSet,
    judged: ImageSet,
    found: Inverted,
    *,
    batch_size: int = 32,
    precision: Precision = "float32",
    generator: torch.Generator,
) -> float:
    """Return how often a trigger inverted on another network succeeds here, after it was adapted to this one at its size.

    Args:
        model: Takes images in [0, 1]; not changed.
        fitted: Images to adapt it on.
        judged: Images to measure it on.
        found: From `secateur.detect.invert`.
        batch_size: Images per batch, >= 1.
        precision: Of the adapting.
        generator: Source of all randomness.
    """
    again = strengthen(
        model, fitted, found, 1.0, steps=REGROWN, batch_size=batch_size, precision=precision, generator=generator
    )
    others = judged.subset(judged.y != found.target)
    return float((predict(model, others, trigger=again.trigger) == found.target).double().mean())
