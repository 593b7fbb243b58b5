"""What a policy is told of each neuron: numbers that mean the same in every network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from ...models import core
from ...models.channels import NORMS, trace_channels
from ...prune.lipschitz import lipschitz
from ...prune.mask import Edit
from ...state import generator
from ...types import ChannelMask, ImageSet
from ..bnp import Moments, divergence, watch
from .layers import Feeding, Layer, mask_of
from .signs import Sign

SIGNS = "noise", "unlearned", "trigger"
SLOPES = "error", *SIGNS
OWN = "fed", "feeds", "scale", "shift", "mean", "variance", "activation", "spread", "lipschitz", "divergence"
PLACE = "depth", "size", "tied"
NAMES = (
    *(f"{name} in its layer" for name in (*OWN, *SLOPES)),
    *(f"{name} in the network" for name in SLOPES),
    *(f"{name} without it" for name in (*SLOPES, "signs")),
    *PLACE,
)
UNIT = {"error": 0.01, **dict.fromkeys((*SIGNS, "signs"), 0.1)}  # a point of accuracy is as much as ten of a sign
FAR = 5.0  # standard deviations, or units, beyond which a number tells no more


def features(
    model: nn.Module,
    clean: ImageSet,
    layers: Sequence[Layer],
    signs: Sequence[Sign],
    ablated: Mapping[str, Sequence[Tensor]],
) -> list[Tensor]:
    """Return the features of each layer's neurons, float32 ``(size, len(NAMES))``; one column per name of `NAMES`.

    * Its own: l1 norms of what feeds it and of what it feeds; scale, shift and running statistics of its batch-norm; mean and
      standard deviation of what leaves it on clean images; CLP's Lipschitz bound; BNP's divergence.
    * Slopes: how each sign's loss rises with a factor on the neuron (`Sign.slopes`); 0 for a sign that is not there.
    * Without it: by how much each sign, and their mean, rises when this neuron alone is cut, as `ablations` tells; 0 where that
      is not given.
    * Where it is: depth, the logarithm of the layer's size, whether it is one of a residual stream.

    The numbers of the first two are in standard deviations from the mean of the layer, slopes also from that of the network;
    those of the third in `UNIT`; all at most 5. In a residual stream numbers of all sites are averaged, slopes summed.

    Args:
        model: Not changed.
        clean: Images for its own numbers.
        layers: Of the network.
        signs: Whose slopes are told.
        ablated: Sign -> for each layer ``(size,)``: how its share rises without each neuron; may be empty.
    """
    own, told = _own(model, clean), dict(ablated)
    if seen := [rises for name, rises in told.items() if name in SIGNS]:
        told["signs"] = [torch.stack(rises).mean(0) for rises in zip(*seen, strict=True)]
    slopes = {sign.name: sign.slopes for sign in signs}
    columns: dict[str, list[Tensor]] = {}
    for name in (*OWN, *SLOPES):
        by_site = own[name] if name in OWN else slopes.get(name, {})
        columns[name] = [_of(layer, by_site, name in SLOPES) for layer in layers]
    everywhere = {name: _standard(torch.cat(columns[name])).split([layer.size for layer in layers]) for name in SLOPES}
    found = []
    for number, layer in enumerate(layers):
        parts = [_standard(columns[name][number]) for name in (*OWN, *SLOPES)]
        parts += [everywhere[name][number] for name in SLOPES]
        parts += [_ablated(told, name, number, layer.size) for name in (*SLOPES, "signs")]
        place = torch.tensor([layer.depth, torch.tensor(layer.size).log10(), float(len(layer.sites) > 1)])
        found.append(torch.cat([torch.stack(parts, 1), place.expand(layer.size, -1)], dim=1).float())
    return found


def ablations(sign: Sign, layers: Sequence[Layer], edit: Edit) -> list[Tensor]:
    """Return for each layer ``(size,)``: by how much a sign's share rises when a neuron alone is cut; an evaluation each."""
    before, found = sign(ChannelMask({})), []
    for layer in reversed(layers):  # what lies before the layer stays computed
        keeps = ~torch.eye(layer.size, dtype=torch.bool)
        found.append(torch.tensor([sign(mask_of(sign.base, [layer], [keep], edit)) - before for keep in keeps]))
    return found[::-1]


def _ablated(told: Mapping[str, Sequence[Tensor]], name: str, number: int, size: int) -> Tensor:
    return (told[name][number].double() / UNIT[name]).clamp(-FAR, FAR) if name in told else torch.zeros(size).double()


def _of(layer: Layer, by_site: Mapping[str, Tensor], summed: bool) -> Tensor:
    known = [by_site[site].double().cpu() for site in layer.sites if site in by_site]
    if not known:
        return torch.zeros(layer.size, dtype=torch.float64)
    return torch.stack(known).sum(0) if summed else torch.stack(known).mean(0)


def _standard(values: Tensor) -> Tensor:
    """Return values in standard deviations from their mean; 0 where all are alike."""
    apart = values - values.mean()
    spread = apart.square().mean().sqrt()
    return (apart / spread).clamp(-FAR, FAR) if float(spread) > 1e-12 else torch.zeros_like(values)


def _own(model: nn.Module, clean: ImageSet) -> dict[str, dict[str, Tensor]]:
    graph = trace_channels(model, clean.shape)
    sites = [site for site in graph.sites if not graph.is_output(site.name)]
    feeding, modules = Feeding(model, graph), dict(core(model).named_modules())
    found: dict[str, dict[str, Tensor]] = {name: {} for name in OWN}
    found["lipschitz"] = dict(lipschitz(model, clean, generator=generator(0)).values)  # draws nothing
    norms = {site.name: norm for site in sites if isinstance(norm := modules[site.name], NORMS)}
    entering = {name: Moments() for name, norm in norms.items() if norm.running_var is not None}
    watch(model, clean, {name: moments.add for name, moments in entering.items()})
    found["divergence"] = {name: divergence(moments, norms[name]) for name, moments in entering.items()}  # type: ignore[arg-type]
    leaving = _leaving(model, clean, [site.name for site in sites])
    for site in sites:
        name = site.name
        found["fed"][name], found["feeds"][name] = feeding.strengths(site)
        found["activation"][name], found["spread"][name] = leaving[name]
        if name in norms:
            norm = norms[name]
            for column, value in (
                ("scale", norm.weight), ("shift", norm.bias), ("mean", norm.running_mean), ("variance", norm.running_var),
            ):  # fmt: skip
                if value is not None:
                    found[column][name] = value.detach()
    return found


def _leaving(model: nn.Module, clean: ImageSet, names: Sequence[str]) -> dict[str, tuple[Tensor, Tensor]]:
    """Return mean and standard deviation of what leaves each site on clean images, ``(channels,)`` each."""
    moments, net = {name: Moments() for name in names}, core(model)

    def tell(name: str, out: Tensor) -> None:
        last = isinstance(net.get_submodule(name), nn.Linear | nn.LayerNorm)
        moments[name].add(out.movedim(-1, 1) if last and out.dim() > 2 else out)

    watch(model, clean, {name: partial(tell, name) for name in names}, leaving=True)
    return {name: (torch.as_tensor(each.mean), each.variance.sqrt()) for name, each in moments.items()}
