"""Neural Cleanse's unlearning: find the trigger of a suspect class, then train on images that bear it and keep their labels.

Wang, Yao, Shan, Li, Viswanath, Zheng, Zhao, "Neural Cleanse: Identifying and Mitigating Backdoor Attacks in Neural Networks",
IEEE S&P 2019.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from functools import partial
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from ..detect import Inverted, Kind, Precision, Suspicion, invert, strengthen, suspected
from ..errors import check_choice, check_range
from ..train import BatchHook, OnStep, train
from ..types import ImageSet, Repaired, Trigger
from .fine_tuning import healing

Kinds = Literal[
    "patch", "sparse", "dense", "smooth", "patch+smooth", "sparse+dense", "sparse+smooth", "patch+sparse+dense+smooth"
]


def neural_cleanse(
    model: nn.Module,
    clean: ImageSet,
    *,
    kinds: Kinds = "sparse+smooth",
    steps: int = 80,
    batch_size: int = 32,
    shortcut: float = 1.4,
    anomaly: float = 1.5,
    sizes: int = 3,
    epochs: int = 8,
    lr: float = 0.01,
    share: float = 0.3,
    unflagged: Literal["leave", "tune"] = "leave",
    precision: Precision = "float32",
    on_step: OnStep | None = None,
    generator: torch.Generator,
) -> Repaired:
    """Invert a trigger for every class; fine-tune with triggers of the flagged classes on a share of the images.

    For each flagged class there are triggers of all kinds, each at its smallest size, at twice that,
    at four times, and so on. An image that is chosen gets one of them, drawn at random, and keeps its label.

    Args:
        model: Takes images in [0, 1]; not changed.
        clean: Labelled clean images.
        kinds: Kinds of trigger by which classes are judged (see `secateur.detect.invert`).
        steps: Batches per inversion, >= 1.
        batch_size: Images per batch and class, >= 1.
        shortcut: Smallest leap in size between flagged and other classes (see `secateur.detect.suspected`), >= 1.
        anomaly: Smallest anomaly index of a flagged class, >= 0.
        sizes: Sizes of each trigger, in [1, 8].
        epochs: Epochs of fine-tuning, >= 0.
        lr: Largest learning rate of the fine-tuning, > 0.
        share: Share of each batch that gets a trigger, in [0, 1].
        unflagged: What to do when no class is flagged: ``leave`` the network as it is, or ``tune`` it on clean images.
        precision: Of the inversion; ``bfloat16`` is faster on processors that have it.
        on_step: Progress of the fine-tuning.
        generator: Source of all randomness.

    Raises:
        DataError: ``clean`` is too small to hold a fifth out.
        MethodError: An argument is out of range, or there are fewer than three classes.
        ModelError: Training diverged.

    Differs from the authors' code, which inverts one patch and trains for one epoch with it on a fifth of the images, in what
    is inverted (see `secateur.detect.invert`), in the rule that flags (see `secateur.detect.suspected`) and in the larger
    triggers: a network that has unlearned only the smallest still follows the attacker's, which is larger.
    """
    check_choice("kinds", kinds, get_args(Kinds))
    check_choice("unflagged", unflagged, ("leave", "tune"))
    check_range("sizes", sizes, 1, 8)
    check_range("share", share, 0, 1)
    check_range("shortcut", shortcut, 1, 1e6)
    check_range("anomaly", anomaly, 0, 1e6)
    recipe = healing(epochs, lr)
    look = partial(invert, steps=steps, batch_size=batch_size, precision=precision, generator=generator)
    found = [each for kind in read_kinds(kinds) for each in look(model, clean, kind=kind)]
    suspicion = suspected(found, shortcut=shortcut, anomaly=anomaly)
    log, note = told(found, suspicion)
    hook = None
    if suspicion.flagged and epochs > 0:
        smallest = [each for each in found if each.target in suspicion.flagged]
        for kind in get_args(Kind):
            if kind not in kinds.split("+"):
                smallest += look(model, clean, suspicion.flagged, kind=kind)
        grow = partial(strengthen, model, clean, batch_size=batch_size, precision=precision, generator=generator)
        hook = stamping([trigger for each in smallest for trigger in ladder(grow, each, sizes)], share)
    if not suspicion.flagged and unflagged == "leave":
        return Repaired(deepcopy(model).eval(), None, log=log, notes=(note,))
    healed = train(model, clean, recipe, generator=generator, batch_hook=hook, on_step=on_step)
    return Repaired(healed, None, log=log, notes=(note,))


def read_kinds(kinds: str) -> list[Kind]:
    """Return the kinds that a setting names, joined by ``+``."""
    return [kind for kind in get_args(Kind) if kind in kinds.split("+")]


def ladder(grow: Callable[[Inverted, float], Inverted], smallest: Inverted, sizes: int) -> Iterator[Trigger]:
    """Yield a trigger at its own size, at twice that, at four times, ..., each grown from the one before."""
    now = smallest
    for step in range(sizes):
        now = grow(now, 1.0 if step == 0 else 2.0)
        yield now.trigger


def stamping(triggers: Sequence[Trigger], share: float) -> BatchHook:
    """Return a batch hook that puts one of the triggers, drawn at random, on a share of the images; labels stay."""

    def hook(x: Tensor, y: Tensor, step: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        chosen = torch.randperm(len(x), generator=generator)[: round(share * len(x))]
        which = torch.randint(len(triggers), (len(chosen),), generator=generator)
        x = x.clone()
        for number, trigger in enumerate(triggers):
            rows = chosen[which == number].to(x.device)
            if len(rows):
                x[rows] = trigger.apply(x[rows])
        return x, y

    return hook


def told(found: Sequence[Inverted], suspicion: Suspicion) -> tuple[dict[str, float], str]:
    """Return the log and a sentence about the most suspect class."""
    first = suspicion.ranking[0]
    kind, times, index = suspicion.kind[first], suspicion.shortcut[first], suspicion.anomaly[first]
    success = next(each.success.value for each in found if each.target == first and each.kind == kind)
    log = {
        "flagged": float(len(suspicion.flagged)),
        "suspect": float(first),
        "shortcut": times,
        "anomaly": index,
        "inverted_success": success,
    }
    what = f"a leap of {times:.2f} times lies above the size of its {kind} trigger (anomaly index {index:.1f})"
    if not suspicion.flagged:
        return log, f"no class was flagged; the most suspect is {first}: {what}"
    return log, f"flagged as targets: {', '.join(map(str, suspicion.flagged))}; for class {first}, {what}"
