"""The channels of the last convolution, as the layer that reads them sees them: where Fine-Pruning cuts."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..errors import MethodError
from ..models import core
from ..models.channels import trace_channels
from ..state import batch_size, evaluating
from ..types import ImageSet, WeightMask
from .layers import choose_layers


@dataclass(frozen=True, eq=False)
class LastChannels:
    """The channels of the last convolution on their way to the layer that reads them.

    Attributes:
        site: The last affine module on them: its bias shifts them.
        reader: The layer that reads them last.
        channels: For each input of the reader its channel, ``(inputs,)``.
    """

    site: str
    reader: str
    channels: Tensor

    def mask(self, model: nn.Module, keep: Tensor) -> WeightMask:
        """Return the mask that takes channels from their reader; ``keep`` bool ``(channels,)``.

        It is a view of one row, so that many masks of a large layer cost little.
        """
        weight = core(model).get_parameter(f"{self.reader}.weight")
        columns = keep[self.channels].reshape(1, -1, *[1] * (weight.ndim - 2))
        return WeightMask({f"{self.reader}.weight": columns.expand(weight.shape)})

    def activations(self, model: nn.Module, images: ImageSet) -> Tensor:
        """Return each channel's mean absolute value as its reader sees it, float64 ``(channels,)``."""
        total = torch.zeros(len(self.channels), dtype=torch.float64)

        def add(module: nn.Module, given: tuple[Tensor, ...]) -> None:
            values = given[0].detach().abs().double()
            total.add_(values.reshape(*values.shape[:2], -1).mean(2).sum(0).cpu())

        handle = core(model).get_submodule(self.reader).register_forward_pre_hook(add)
        show(model, images, handle)
        sizes = self.channels.bincount()
        return torch.zeros(len(sizes), dtype=torch.float64).index_add_(0, self.channels, total / len(images)) / sizes


def last_channels(model: nn.Module, input_shape: tuple[int, int, int]) -> LastChannels:
    """Find the channels of the last convolution, the last layer that reads them and the last affine module on them.

    Raises:
        MethodError: They are the network's answer, or no layer reads these channels and no others.
        ModelError: The network cannot be traced.
    """
    (layer,) = choose_layers(model, "last-conv")
    graph = trace_channels(model, input_shape)
    roots = graph.outputs[layer].tolist()
    readers = [name for name, read in graph.inputs.items() if set(read.tolist()) == set(roots)]
    sites = [site.name for site in graph.sites if graph.groups[site.name].tolist() == roots]
    if not graph.answers.isdisjoint(roots) or not readers or not sites:
        raise MethodError(
            f"no layer reads the channels of the last convolution, '{layer}', and no others; use another method or network"
        )
    number = {root: channel for channel, root in enumerate(roots)}
    return LastChannels(sites[-1], readers[-1], torch.tensor([number[root] for root in graph.inputs[readers[-1]].tolist()]))


def show(model: nn.Module, images: ImageSet, *handles: RemovableHandle) -> None:
    """Show all images to the network, in eval mode, then take its hooks away."""
    device = next(model.parameters()).device
    try:
        with evaluating(model), torch.no_grad():
            for x, _ in images.batches(batch_size(512)):
                model(x.to(device))
    finally:
        for handle in handles:
            handle.remove()
