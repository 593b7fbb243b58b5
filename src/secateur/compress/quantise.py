"""Quantisation: a network that computes on whole numbers of few bits, after training (PTQ) or with training (QAT).

Uniform, as in Jacob et al., CVPR 2018 (arXiv:1712.05877), and Krishnamoorthi (arXiv:1806.08342): weights symmetric with one
step for each output channel, feature maps affine with one step for each tensor (`models.quantised` has the formulas,
`models.flow` the places). What comes out is a *twin*: a network in floating point that gives, up to rounding, the answers of
the integer runtime that `export_onnx` writes for. It can be attacked by its gradient, which a runtime has not.

**Differs** from Jacob et al.: a batch-norm is not folded while training. With a step for each output channel its scale can be
multiplied into the steps afterwards, so that rounding before and after folding is the same; and ranges of feature maps are
observed once, before training, not as a moving average. Biases are rounded to the steps that a runtime has for them (those of
the input times those of the weights), in the norm where one is folded.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from copy import deepcopy
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from .. import state
from ..errors import InconclusiveError, MethodError, ModelError, check_choice, check_range
from ..measure.layer_study import count, widened
from ..models import Classifier, Quantisation, quantisation_of
from ..models.flow import Flow, affine, folded, is_layer, origin, trace
from ..models.quant import LARGEST, SMALLEST, check_bits
from ..models.quantised import attach, flow_of, on_grid, steps
from ..prune.activations import BINS, between
from ..prune.mask import parameter_masks
from ..recipe import Recipe
from ..state import evaluating
from ..train import OnStep, train
from ..types import HardMask, ImageSet, to_float
from .export import BIAS

Observer = Literal["minmax", "percentile"]


def quantise(
    model: Classifier,
    clean: ImageSet,
    *,
    bits: int = 8,
    weight_bits: int | None = None,
    observer: Observer = "minmax",
    percentile: float = 99.99,
    batch_size: int = 128,
) -> Classifier:
    """Return a quantised copy, without training (PTQ).

    Weights and biases are rounded to their grid, once; what was 0 stays 0, and small weights may join it. Feature maps are
    rounded at each forward, to ranges that clean images need. Both ranges contain 0.

    Args:
        model: A float network; left as it was.
        clean: Clean images to observe ranges on, some hundreds; labels are not used.
        bits: Of feature maps, and of weights unless ``weight_bits`` says otherwise; in [2, 8].
        weight_bits: Of weights, in [2, 8]. For 8-bit feature maps on CPUs that saturate (`compress.saturates`) 7 is safe.
        observer: ``minmax``: the least and the largest value seen; ``percentile``: what lies between two percentiles.
        percentile: Percent of a site's values that are not above its upper bound and, likewise, not below its lower one, in
            [50, 100]; told to within 1/10 000 of the range.
        batch_size: Images at once, >= 1.

    Raises:
        InconclusiveError: There are no images.
        MethodError: An argument is out of range.
        ModelError: The network is quantised already, cannot be followed (`models.flow`), does not take the images, or its
            feature maps are not finite.
    """
    copy = deepcopy(model).eval()
    found = _observed(copy, clean, bits, weight_bits, observer, percentile, batch_size)
    _round(copy, found)
    attach(copy, found)
    _round_biases(copy, found)
    return copy


def qat(
    model: Classifier,
    data: ImageSet,
    recipe: Recipe,
    *,
    calibration: ImageSet | None = None,
    bits: int = 8,
    weight_bits: int | None = None,
    observer: Observer = "minmax",
    percentile: float = 99.99,
    mask: HardMask | None = None,
    batch_size: int = 128,
    on_step: OnStep | None = None,
    generator: torch.Generator,
) -> Classifier:
    """Return a quantised copy, trained as such (QAT).

    Weights and feature maps are rounded at each forward, and gradients pass rounding (a straight-through estimator, 0 beyond
    the range). The steps of weights follow their largest values; the ranges of feature maps are those of `quantise`, observed
    before training, and then stay. At the end weights are rounded for good.

    Args:
        model: A float network; left as it was.
        data: Training images.
        recipe: How to train, in float32: some epochs at a hundredth of the usual learning rate.
        calibration: Images to observe ranges on; by default ``data``.
        bits: See `quantise`.
        weight_bits: See `quantise`.
        observer: See `quantise`.
        percentile: See `quantise`.
        mask: What was cut; it stays 0 throughout.
        batch_size: Images at once while observing, >= 1.
        on_step: Called with ``(step, steps)`` after each step.
        generator: Source of all randomness.

    Raises:
        InconclusiveError: There are no images to observe.
        MethodError: An argument is out of range.
        ModelError: See `quantise`; or training diverged.
    """
    if recipe.precision != "float32":
        raise MethodError(f"precision must be float32 while quantising, got {recipe.precision}")
    held = None if mask is None else parameter_masks(model, mask)
    live = deepcopy(model).eval()
    seen = data if calibration is None else calibration
    found = _observed(live, seen, bits, weight_bits, observer, percentile, batch_size)
    attach(live, found, live=True)
    trained = train(live, data, recipe, hold=held, on_step=on_step, generator=generator)
    assert isinstance(trained, Classifier)
    del vars(trained.net)["forward"]
    scales = _steps(trained.net, tuple(found.weights), found.weight_bits)
    final = Quantisation(found.weight_bits, found.activation_bits, scales, found.activations)
    _round(trained, final)
    attach(trained, final)
    _round_biases(trained, final)
    return trained


def _observed(
    model: Classifier,
    clean: ImageSet,
    bits: int,
    weight_bits: int | None,
    observer: Observer,
    percentile: float,
    batch_size: int,
) -> Quantisation:
    weight_bits = bits if weight_bits is None else weight_bits
    for name, value in (("bits", bits), ("weight_bits", weight_bits)):
        try:
            check_bits(name, value)
        except ModelError as error:
            raise MethodError(str(error)) from error
    check_choice("observer", observer, get_args(Observer))
    check_range("percentile", percentile, 50, 100)
    check_range("batch_size", batch_size, 1, 2**31)
    if not len(clean):
        raise InconclusiveError("ranges of feature maps need at least one clean image, got 0")
    if quantisation_of(model) is not None:
        raise ModelError("the network is quantised already; take it off first (dequantised)")
    flow = trace(model.net, model.input_shape)
    if not flow.layers:
        raise ModelError("the network has no convolution or linear layer to quantise")
    share = percentile / 100 if observer == "percentile" else 1.0
    ranges = _ranges(model, flow, clean, share, state.batch_size(batch_size))
    grids = {site: grid(*ranges[site], bits) for site in flow.sites}
    return Quantisation(weight_bits, bits, _steps(model.net, flow.layers, weight_bits), grids)


def _steps(net: nn.Module, layers: tuple[str, ...], bits: int) -> dict[str, Tensor]:
    found = {}
    for name in layers:
        weight = net.get_submodule(name).weight
        assert isinstance(weight, Tensor)
        if not bool(weight.isfinite().all()):
            raise ModelError(f"weights must be finite, but those of '{name}' hold NaN or infinite values")
        found[name] = steps(weight, bits)
    return found


@torch.no_grad()
def _round(model: Classifier, quantisation: Quantisation) -> None:
    for name, scale in quantisation.weights.items():
        weight = model.net.get_submodule(name).weight
        assert isinstance(weight, Tensor)
        weight.copy_(on_grid(weight, scale, quantisation.weight_bits))


@torch.no_grad()
def _round_biases(model: Classifier, quantisation: Quantisation) -> None:
    """Move what is added behind each layer to the steps that a runtime adds it in; biases of 0 stay 0.

    So does what is added behind a row of zeros: its step is free, and the export makes it as fine as the bias needs. A bias
    that several steps read has no step of its own and is left, as is that of a layer that reads no site.
    """
    flow, modules = flow_of(model), dict(model.net.named_modules())
    names = {node: site for site, node in flow.sites.items()}
    called = [modules[str(node.target)] for node, _ in flow.steps if node.op == "call_module"]
    readers = Counter(id(getattr(module, "bias", None)) for module in called)
    for node in (node for node, _ in flow.steps if is_layer(node, modules)):
        layer: Any = modules[str(node.target)]
        source = origin(node.all_input_nodes[0], modules)
        norm = folded(node, modules, names)
        place: Any = modules[str(norm.target)] if norm else layer
        if place.bias is None or readers[id(place.bias)] > 1 or source not in names:
            continue
        factor, shift = affine(place if norm else None, layer)
        step = quantisation.activations[names[source]][0] * quantisation.weights[str(node.target)].double().cpu() * factor.abs()
        alive = layer.weight.flatten(1).ne(0).any(dim=1).cpu()
        usable = alive & (step > 0) & (shift.abs() < BIAS * step)
        change = torch.where(usable, (shift / step).round() * step - shift, torch.zeros_like(shift)).to(place.bias)
        place.bias.copy_(torch.where(place.bias == 0, place.bias, place.bias + change))


def grid(low: float, high: float, bits: int) -> tuple[float, int]:
    """Return step and zero point of a range, which is widened to contain 0: ``x = s * (q - z)``, ``0 <= q <= 2^b - 1``.

    The step is a float32; a range of 0 alone gets 1.
    """
    low, high, top = min(low, 0.0), max(high, 0.0), 2**bits - 1
    if low == high:
        return 1.0, 0
    scale = float(torch.tensor((high - low) / top, dtype=torch.float32).clamp(SMALLEST, LARGEST))
    return scale, min(top, max(0, round(-low / scale)))


def _ranges(
    model: Classifier, flow: Flow, clean: ImageSet, share: float, size: int
) -> Mapping[str, tuple[float, float]]:  # fmt: skip
    """Return what each site needs: all values seen, or those between two quantiles, for which the images go through twice."""
    ends: dict[str, tuple[float, float]] = {}

    def look(site: str, value: Tensor) -> None:
        low, high = (float(end) for end in value.aminmax())
        old = ends.get(site, (low, high))
        ends[site] = min(low, old[0]), max(high, old[1])

    _watch(model, flow, clean, size, look)
    for site, (low, high) in ends.items():
        if not -LARGEST <= low <= high <= LARGEST:
            raise ModelError(f"feature maps must be finite to be quantised, but '{site}' is not on the images given")
    if share == 1:
        return ends
    wide = {site: widened(*range_) for site, range_ in ends.items()}
    counts = {site: torch.zeros(BINS, dtype=torch.int64) for site in ends}

    def add(site: str, value: Tensor) -> None:
        counts[site] += count(value, *wide[site], BINS)

    _watch(model, flow, clean, size, add)
    return {site: between(counts[site], *wide[site], share) for site in ends}


def _watch(model: Classifier, flow: Flow, clean: ImageSet, size: int, look: Callable[[str, Tensor], None]) -> None:
    def edit(site: str, value: Tensor) -> Tensor:
        look(site, value)
        return value

    with evaluating(model), torch.inference_mode():
        for x in clean.x.split(size):
            x = to_float(x).to(model.mean.device)
            try:
                flow.run(model.net, (x - model.mean) / model.std, edit=edit)
            except RuntimeError as error:
                reason = str(error).strip().splitlines()[0]
                raise ModelError(f"the network cannot take images of shape {clean.shape}: {reason}") from error
