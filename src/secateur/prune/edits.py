"""Edits of whole tensors: zero what is small, clamp what is large, add noise, once or at each forward.

After Kahsolt/adversarial-prune (github, 2022): its E, S and R, said to hinder PGD without any training. Each function returns
an `Edited`: a new network, the share of entries changed and what an attack made against this very edit calls in its place:

==========================================  ======================================================================
what the network has                        `adaptive`
==========================================  ======================================================================
other weights (`sparsify clamp noise`)      None: its own gradient is true, an attack on it is adaptive as it stands
rounded feature maps (``activations``)      `attack.through_wrappers`: exact values, gradient of the identity (BPDA)
clamped feature maps                        the same, and the true gradient, 0 beyond the bounds: None (`through_rounding`)
quantised feature maps (``compress``)       `attack.through_quantisation`: exact values, gradient of the identity in range
noise drawn at each forward (`Resampled`)   `attack.eot`: the mean over `DRAWS` draws
several of these                            all of them, one within the other
==========================================  ======================================================================

Where several gradients are known none is always the best: `adaptives` has them all, of a quantised network three.

Other edits of the grammar are masks: ``zero`` is `mask.apply_mask`, ``scale`` is a `SoftMask`, ``remove`` is in ``compress``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..attack import eot, through_quantisation, through_rounding, through_wrappers
from ..attack.network import Forward
from ..errors import MethodError, check_choice, check_range, unknown
from ..models import core, quantisation_of, wrappers_of
from ..models.quantised import Backward
from ..types import WeightMask
from .mask import apply_mask

Which = Literal["all", "normal", "not-normal"]
DRAWS = 10
TESTABLE = 20  # entries from which on the normality test is valid


@dataclass(frozen=True, eq=False)
class Edited:
    """An edited network.

    Attributes:
        model: A new network.
        changed: Entries changed / all entries, of all parameters.
        forward: What an adaptive attack calls in place of the network (setting ``forward`` of the attacks); None for itself.
    """

    model: nn.Module
    changed: float
    forward: Forward | None


def adaptive(model: nn.Module) -> Forward | None:
    """Return the setting ``forward`` with which attacks on an edited network are adaptive (the table above).

    Where there are several it is the first that `adaptives` returns; attack with each.
    """
    return next(iter(adaptives(model).values()))


def adaptives(model: nn.Module) -> Mapping[str, Forward | None]:
    """Return all settings ``forward`` that attacks on an edited network have to be run with; the worst over them counts.

    Returns:
        Name -> forward; None stands for the network itself. One without a name where one is all. Otherwise named after how
        gradients go through clamps of feature maps, ``passed`` (as if there were none) or ``clamped`` (the true one), and
        through quantisation, ``clipped``, ``pass-through`` and ``float``; after both: ``float, clamped``.
    """
    kinds = {fields["kind"] for fields in wrappers_of(model)}
    found: dict[str, Forward | None] = {"": through_wrappers if kinds else None}
    if "clamp" in kinds:
        found = {"passed": through_wrappers, "clamped": through_rounding if "round" in kinds else None}
    if any(quantisation_of(module) is not None for module in model.modules()):
        found = {
            ", ".join(filter(None, (name, inner))): through_quantisation(name, forward=forward)
            for name in get_args(Backward)
            for inner, forward in found.items()
        }
    if any(isinstance(module, Resampled) for module in model.modules()):
        return {name: eot(DRAWS, forward=forward) for name, forward in found.items()}
    return found


def small_entries(model: nn.Module, *, below: float, names: Iterable[str] | None = None) -> WeightMask:
    """Return the mask that cuts every entry with ``|w| < E``: a sentence of the grammar that `apply_and_heal` can heal.

    Args:
        model: The network.
        below: E, >= 0.
        names: Parameters, or modules whose weights and biases are meant; by default all weights and biases, also of norms.
    """
    check_range("below", below, 0, 1e6)
    return WeightMask({name: p.detach().abs() >= below for name, p in _chosen(model, names).items()})


def sparsify(model: nn.Module, *, below: float, names: Iterable[str] | None = None) -> Edited:
    """Zero where ``|w| < E``, in weights and biases, also of norms (Kahsolt's E).

    Args:
        model: Left as it was.
        below: E, >= 0.
        names: Parameters, or modules whose weights and biases are meant; by default all weights and biases.

    Raises:
        MethodError: ``below`` is out of range, or there is no such parameter or module.
    """
    return _compared(model, apply_mask(model, small_entries(model, below=below, names=names)))


def clamp(
    model: nn.Module,
    *,
    deviations: float,
    which: Which = "all",
    significance: float = 1e-5,
    names: Iterable[str] | None = None,
) -> Edited:
    """Clamp each tensor to ``mean +- S*std`` of its own entries (Kahsolt's S).

    The authors mean to clamp tensors that look normal, and say so in a comment, but their code clamps where D'Agostino's and
    Pearson's test *rejects* normality at p < 1e-5: ``which="not-normal"`` is what they did, ``"normal"`` what they say. Tensors
    of fewer than 20 entries, which the test cannot judge, and constant ones count as normal.

    Args:
        model: Left as it was.
        deviations: S, >= 0; the standard deviation is that of a whole population, as the authors compute it.
        which: ``all`` tensors, or only those that the test finds ``normal`` or ``not-normal``.
        significance: p below which a tensor is not normal, in [0, 1].
        names: Parameters, or modules whose weights and biases are meant; by default all weights and biases, also of norms.

    Raises:
        MethodError: An argument is out of range, or there is no such parameter or module.
    """
    check_range("deviations", deviations, 0, 1e6)
    check_choice("which", which, get_args(Which))
    check_range("significance", significance, 0, 1)
    copy = deepcopy(model)
    with torch.no_grad():
        for parameter in _chosen(copy, names).values():
            if which == "all" or is_normal(parameter, significance) == (which == "normal"):
                wide = parameter.double()
                mean, spread = wide.mean(), deviations * wide.std(correction=0)
                parameter.copy_(wide.clamp(mean - spread, mean + spread))
    return _compared(model, copy)


def is_normal(values: Tensor, significance: float = 1e-5) -> bool:
    """Return whether D'Agostino's and Pearson's test fails to reject that the entries are normal (Biometrika 60, 1973)."""
    entries = values.detach().flatten().double().cpu()
    if len(entries) < TESTABLE or bool((entries == entries[0]).all()):
        return True
    from scipy.stats import normaltest  # a second's work

    return not float(normaltest(entries.numpy()).pvalue) < significance


def noise(
    model: nn.Module,
    *,
    radius: float,
    resampled: bool = False,
    names: Iterable[str] | None = None,
    generator: torch.Generator,
) -> Edited:
    """Add noise from U[-R, R] to every entry (Kahsolt's R, who adds it once).

    Args:
        model: Left as it was.
        radius: R, >= 0.
        resampled: Draw anew at each forward, from torch's own generator, which attacks seed: see `Resampled`.
        names: Parameters, or modules whose weights and biases are meant; by default all weights and biases, also of norms.
        generator: Draws the noise that is added once.

    Raises:
        MethodError: ``radius`` is out of range, or there is no such parameter or module.
    """
    check_range("radius", radius, 0, 1e6)
    if resampled:
        chosen = _chosen(model, names)
        network = Resampled(deepcopy(model), radius, tuple(chosen))
        changed = sum(parameter.numel() for parameter in chosen.values()) if radius else 0
        return Edited(network, changed / max(1, _entries(model)), adaptive(network))
    copy = deepcopy(model)
    with torch.no_grad():
        for parameter in _chosen(copy, names).values():
            drawn = torch.rand(parameter.shape, generator=generator).mul_(2).sub_(1)
            parameter.add_(radius * drawn.to(parameter))
    return _compared(model, copy)


class Resampled(nn.Module):
    """A network whose weights get other noise from U[-R, R] at each forward; between forwards it has none.

    Attributes:
        network: The network without noise.
        radius: R.
        names: The parameters that get noise, relative to ``core(network)``.
    """

    def __init__(self, network: nn.Module, radius: float, names: tuple[str, ...]) -> None:
        super().__init__()
        self.network, self.radius, self.names = network, radius, names
        self.training = network.training

    def forward(self, x: Tensor) -> Tensor:
        """Return logits ``(batch, classes)`` of one draw, the same for all images of the batch."""
        inner = core(self.network)
        prefix = "" if inner is self.network else "net."
        own = dict(inner.named_parameters())
        drawn = {f"{prefix}{name}": own[name] + self.radius * (2 * torch.rand_like(own[name]) - 1) for name in self.names}
        return functional_call(self.network, drawn, (x,))


def _chosen(model: nn.Module, names: Iterable[str] | None) -> dict[str, nn.Parameter]:
    parameters = dict(core(model).named_parameters())
    if names is None:
        return {name: p for name, p in parameters.items() if name.rpartition(".")[2] in ("weight", "bias")}
    chosen: dict[str, nn.Parameter] = {}
    for wanted in names:
        found = {name: p for name, p in parameters.items() if name == wanted or name.startswith(f"{wanted}.")}
        if not found:
            layers = {name.rpartition(".")[0] for name in parameters} - {""}
            raise MethodError(unknown("parameter or layer", wanted, {*parameters, *layers}))
        chosen |= found
    return chosen


def _compared(before: nn.Module, after: nn.Module) -> Edited:
    old = dict(core(before).named_parameters())
    changed = sum(int((old[name] != value).sum()) for name, value in core(after).named_parameters())
    return Edited(after, changed / max(1, _entries(before)), adaptive(after))


def _entries(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in core(model).parameters())
