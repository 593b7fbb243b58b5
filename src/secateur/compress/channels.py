"""Physical removal: channels that a mask silences leave the network for good.

Masked = removed, exactly: the smaller network gives the same answers as the masked one, because only channels that are zero for
every reader leave (see ``models/channels.py``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from ..errors import ModelError
from ..models.channels import trace_channels
from ..models.shrink import shrink
from ..prune.mask import carry_over
from ..types import ChannelMask


@dataclass(frozen=True, eq=False)
class Removal:
    """What removal gave.

    Attributes:
        model: The smaller network.
        kept: Site -> original indices that stayed: the bundle's channel plan.
        mask: What could not leave and stays masked, in the smaller network's indices.
        notes: Why channels stayed.
    """

    model: nn.Module
    kept: Mapping[str, Tensor]
    mask: ChannelMask
    notes: tuple[str, ...]


def remove_channels(model: nn.Module, mask: ChannelMask, input_shape: tuple[int, int, int]) -> Removal:
    """Take the masked channels out of an already masked network, where that leaves its answers the same.

    A channel of a residual stream leaves only when every layer that writes it is masked there. Each layer keeps one channel.

    Args:
        model: A network to which ``mask`` was applied with weight *and* bias; not changed.
        mask: The channel mask.
        input_shape: Shape of one image, ``(c, h, w)``.

    Raises:
        ModelError: The network cannot be traced, or the mask does not fit its sites.
    """
    graph = trace_channels(model, input_shape)
    for name, keep in mask.keep.items():
        if len(keep) != graph.site(name).channels:
            raise ModelError(f"the mask of '{name}' must have {graph.site(name).channels} entries, got {len(keep)}")
    kept = graph.plan(mask.keep)
    small = shrink(model, kept, input_shape)
    left = carry_over(mask, kept)
    return Removal(small, kept, left, _notes(left, {site: graph.why_kept(site) for site in left.keep}))


def _notes(left: ChannelMask, reasons: Mapping[str, str]) -> tuple[str, ...]:
    return tuple(
        f"{int((~keep).sum())} channels of '{name}' stay in the file, masked: {reasons[name]}"
        for name, keep in left.keep.items()
    )
