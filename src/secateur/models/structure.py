"""The natural stages of a network, at whose ends feature maps are looked at or edited."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.pooling import _AdaptiveAvgPoolNd, _AdaptiveMaxPoolNd, _AvgPoolNd, _MaxPoolNd

from .wrapper import core

POOLS = (_AvgPoolNd, _MaxPoolNd, _AdaptiveAvgPoolNd, _AdaptiveMaxPoolNd)
Units = list[tuple[str, nn.Module]]


def stages(model: nn.Module) -> tuple[str, ...]:
    """Return the modules at which the stages of a network end, relative to ``core(model)``, in the order of their definition.

    They are the children that hold weights. Where one child is the network's body (a sequence with more than half of its
    layers, or all that holds weights), its own children take its place. A child with children of its own is a stage:
    ``layer3``, ``features.5``, ``blocks.0``. Layers that stand alone are taken together: a convolution with the norm behind it,
    or, in a sequence with poolings, all up to the next one. A linear layer begins a new stage; the last stage ends in the
    logits.
    """
    return tuple(name for units, chain in _groups("", core(model)) for name in _ends(units, chain))


def _groups(name: str, module: nn.Module) -> Iterator[tuple[Units, bool]]:
    """Yield the children before the body, those of the body, and those behind it, and whether they run in this order."""
    children = [(f"{name}.{key}" if name else key, child) for key, child in module.named_children()]
    holders = [child for _, child in children if _layers(child)]
    body = next((child for child in holders if _is_body(child, holders)), None)
    chain, units = isinstance(module, nn.Sequential), Units()
    for path, child in children:
        if child is body:
            yield units, chain
            yield from _groups(path, child)
            units = []
        else:
            units.append((path, child))
    yield units, chain


def _is_body(child: nn.Module, holders: list[nn.Module]) -> bool:
    if not any(True for _ in child.children()):
        return False
    if len(holders) == 1 or isinstance(child, nn.ModuleList):
        return True
    return isinstance(child, nn.Sequential) and 2 * _layers(child) > sum(map(_layers, holders))


def _ends(units: Units, chain: bool) -> Iterator[str]:
    pooled = chain and any(isinstance(child, POOLS) for _, child in units)
    end = ""
    for name, child in units:
        block = any(True for _ in child.children())
        starts = block or isinstance(child, nn.Linear) or (isinstance(child, _ConvNd) and not pooled)
        if end and (starts or (pooled and isinstance(child, POOLS))):
            yield end if starts else name
            end = ""
        if block and _layers(child):
            yield name
        elif _layers(child):
            end = name
    if end:
        yield end


def _layers(module: nn.Module) -> int:
    """Return how many modules in it hold parameters of their own."""
    return sum(any(True for _ in each.parameters(recurse=False)) for each in module.modules())
