"""Adversarial images, judged by somebody who does not trust the attack: the threat model, the budget, and 8-bit files.

What an attack returns is measured against the threat model before anything is rounded. Images beyond it never count. What is
left is looked at twice: as returned, and as a file would keep it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .. import state
from ..attack.ball import NORMS, Norm
from ..errors import MethodError, ModelError, check_choice, check_range, unknown
from ..forward import check_logits
from ..state import evaluating, frozen
from ..types import ImageSet, to_float

Attack = Callable[[nn.Module, Tensor, Tensor, torch.Generator], Tensor]  # network, images in [0, 1], labels; returns images
Knowledge = Literal["white-box", "black-box", "transfer", "none"]
KNOWLEDGE = ("white-box", "black-box", "transfer", "none")
TOLERANCE = 1e-6  # libraries overshoot eps by 2e-8; normalised-space mistakes overshoot by a multiple of it
LEVEL = 3e-5  # grey levels by which float32 misses a whole one, at most: x/255, plus eps, times 255


@dataclass(frozen=True)
class ThreatModel:
    """What the attacker may do, knows and wants; printed beside every number.

    Attributes:
        eps: Budget in units of pixels that go from 0 to 1 (8/255).
        norm: Distance that the budget bounds.
        targeted: Attacks get wanted labels, not true ones.
        knowledge: All (``white-box``), answers (``black-box``), another network (``transfer``) or nothing (``none``).
    """

    eps: float
    norm: Norm = "linf"
    targeted: bool = False
    knowledge: Knowledge = "white-box"

    def __post_init__(self) -> None:
        check_choice("norm", self.norm, NORMS)
        check_choice("knowledge", self.knowledge, KNOWLEDGE)
        check_range("eps", self.eps, 0, 1 if self.norm == "linf" else 1e6)

    def __str__(self) -> str:
        levels = self.eps * 255
        whole = f" ({round(levels)}/255)" if self.norm == "linf" and abs(levels - round(levels)) < 1e-6 else ""
        aim = "targeted" if self.targeted else "untargeted"
        knows = "blind" if self.knowledge == "none" else self.knowledge
        return f"{self.norm} eps={self.eps:.4g}{whole} of pixels in [0, 1], {aim}, {knows}"


@dataclass(frozen=True)
class Bound:
    """An attack with its settings: what `bind` returns, and what a report prints as the budget.

    Attributes:
        attack: A function such as `secateur.attack.pgd`.
        settings: All its settings but the generator, defaults too.
    """

    attack: Callable[..., Tensor]
    settings: Mapping[str, Any]

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, generator: torch.Generator) -> Tensor:
        """Attack."""
        return self.attack(model, x, y, **self.settings, generator=generator)

    def __str__(self) -> str:
        settings = {name: "yes" if callable(value) else value for name, value in self.settings.items() if value is not None}
        told = (f"{name}={value:.4g}" if isinstance(value, float) else f"{name}={value}" for name, value in settings.items())
        return f"{self.attack.__name__}({', '.join(told)})"


def bind(attack: Callable[..., Tensor], **settings: Any) -> Bound:
    """Return an attack of ``(model, x, y, generator)`` with these settings and, for the rest, its defaults.

    Raises:
        MethodError: The attack has no such setting.
    """
    known = {
        parameter.name: parameter.default
        for parameter in inspect.signature(attack).parameters.values()
        if parameter.kind is parameter.KEYWORD_ONLY and parameter.name != "generator"
    }
    for name in settings:
        if name not in known:
            raise MethodError(unknown(f"setting of {attack.__name__}", name, known))
    return Bound(attack, {name: value for name, value in (known | settings).items() if value is not inspect.Parameter.empty})


def described(attack: Attack) -> str:
    """Return an attack with its settings in words, or its name where it does not tell them."""
    return str(attack) if isinstance(attack, Bound) else getattr(attack, "__name__", type(attack).__name__)


@dataclass(frozen=True, eq=False)
class Crafted:
    """One attack's images, audited.

    Attributes:
        returned: Images as returned, float32 in [0, 1]; the original where the returned one is beyond the threat model.
        stored: The same, uint8, rounded towards the original.
        distance: How far each returned image was from its original, before rounding, float64 ``(n,)``; infinite for NaN.
        outside: How far each reached beyond [0, 1], float64 ``(n,)``.
        admissible: Which were within the threat model, bool ``(n,)``.
    """

    returned: Tensor
    stored: Tensor
    distance: Tensor
    outside: Tensor
    admissible: Tensor


def craft(
    attack: Attack, model: nn.Module, x: Tensor, y: Tensor, threat: ThreatModel, generator: torch.Generator
) -> Crafted:  # fmt: skip
    """Attack uint8 images ``(n, c, h, w)`` and audit what comes back; the network is in eval mode and frozen meanwhile.

    Raises:
        MethodError: The attack does not return float images like those given.
    """
    clean = to_float(x)
    with _untouched(model):
        found = attack(model, clean.clone(), y.clone(), generator)
    if not isinstance(found, Tensor) or found.shape != clean.shape or not found.is_floating_point():
        got = f"{found.dtype} {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
        raise MethodError(f"an attack must return float images of shape {tuple(clean.shape)}, got {got}")
    found = found.detach().to(clean)
    change = (found.double() - clean.double()).flatten(1)
    distance = change.abs().amax(dim=1) if threat.norm == "linf" else change.norm(dim=1)
    outside = torch.maximum(-found, found - 1).flatten(1).amax(dim=1).double().clamp_min(0)
    lost = ~found.isfinite().flatten(1).all(dim=1)
    distance, outside = distance.masked_fill(lost, torch.inf), outside.masked_fill(lost, torch.inf)
    fits = (distance <= threat.eps + TOLERANCE) & (outside <= TOLERANCE)
    returned = torch.where(fits[:, None, None, None], found, clean).clamp(0, 1)
    return Crafted(returned, store(x, returned), distance, outside, fits)


@contextmanager
def _untouched(model: nn.Module) -> Iterator[None]:
    """Put back flags and statistics: an attack that switches to training mode leaves batch norms with those of its images."""
    before = {buffer: buffer.clone() for buffer in model.buffers()}
    try:
        with evaluating(model), frozen(model):
            yield
    finally:
        with torch.no_grad():
            for buffer, value in before.items():
                buffer.copy_(value)


def store(x: Tensor, adversarial: Tensor) -> Tensor:
    """Return adversarial images as uint8, each value rounded towards the original's, so that no distance grows.

    A value within rounding of a whole grey level becomes that level: ``x + 8/255`` in float32 lies just below it.

    Args:
        x: Originals, uint8 ``(n, c, h, w)``.
        adversarial: Images, float32 in [0, 1], of the same shape.
    """
    change = adversarial.double() * 255 - x
    return (x + change.sign() * (change.abs() + LEVEL).floor()).clamp(0, 255).to(torch.uint8)


def logits_of(model: nn.Module, x: Tensor, classes: int, *, batch_size: int = 256) -> Tensor:
    """Return logits ``(n, classes or more)`` for images, uint8 or float in [0, 1], on the images' device, in eval mode.

    Raises:
        ModelError: The network does not take the images or answers with too few classes.
    """
    device = next((parameter.device for parameter in model.parameters()), x.device)
    found = []
    with evaluating(model), torch.inference_mode():
        for part in x.split(state.batch_size(batch_size)):
            part = (to_float(part) if part.dtype == torch.uint8 else part).to(device)
            try:
                answer = model(part.contiguous(memory_format=torch.channels_last))
            except torch.OutOfMemoryError:
                raise
            except (RuntimeError, ValueError) as error:
                reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
                raise ModelError(f"the network cannot take images of shape {tuple(x.shape[1:])}: {reason}") from error
            found.append(check_logits(answer, len(part), classes).to(x.device))
    return torch.cat(found) if found else torch.empty(0, classes)


def answers_of(logits: Tensor) -> Tensor:
    """Return the predicted class of each image, int64 ``(n,)``; -1, never right, where the largest logit is not finite.

    A NaN counts as the largest; -inf is the logit of a class that is ruled out.
    """
    largest, found = logits.max(dim=1)
    return found.masked_fill(~largest.isfinite(), -1)


def check_images(data: ImageSet, attacks: Mapping[str, object] | None = None) -> None:
    """Raise unless there is something to measure."""
    if not len(data):
        raise MethodError("robustness needs at least one image, got 0")
    if attacks is not None and not attacks:
        raise MethodError("robustness needs at least one attack, got 0; the strongest are pgd with two losses, and autoattack")
