"""BNP, pruning by batch-norm statistics: cut the channels whose running statistics clean images contradict.

Zheng, Tang, Li, Liu, "Pre-activation Distributions Expose Backdoor Neurons", NeurIPS 2022 (OpenReview wwW-1k1ljIg).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..errors import DataError, MethodError, check_range
from ..models import core
from ..models.channels import NORMS, trace_channels
from ..prune import Outliers, apply_and_heal, rank
from ..prune.mask import Edit, edited
from ..state import batch_size, evaluating
from ..types import ImageSet, Repaired, Scores


def bnp(model: nn.Module, clean: ImageSet, *, k: float = 3.0, edit: Edit = "weight", generator: torch.Generator) -> Repaired:
    """Cut each channel whose statistics on clean images are further from the stored ones than its layer's are on average.

    ``KL = log(s/t) + (t^2 + (m - n)^2) / (2*s^2) - 1/2 > mean + k*std`` over the channels of the layer, where ``n``, ``t`` are
    mean and standard deviation of what enters the batch-norm on clean images and ``m``, ``s`` those that it stored in training,
    when the poisoned images took part.

    Args:
        model: Takes images in [0, 1]; not changed. Its batch-norms must hold the statistics of the poisoned training.
        clean: Clean images, two or more; the labels do not matter.
        k: How far above the mean, >= 0; smaller cuts more.
        edit: Set the ``weight`` of a cut channel's norm to 0, or ``weight+bias``.
        generator: Not used.

    Raises:
        DataError: There are fewer than two images.
        MethodError: ``k`` is out of range, or the network has no batch-norm with running statistics.
        ModelError: The network cannot be traced.

    Differs from the authors' code in that all clean images are read and not one batch of 500 (all they have), in that both
    variances get the norm's own ``eps``, so that a dead channel has a divergence, and in that a channel with two batch-norms
    (around a depthwise convolution) is judged once, at the last.
    """
    check_range("k", k, 0, 1e6)
    if len(clean) < 2:
        raise DataError(f"bnp needs at least two clean images for a variance, got {len(clean)}")
    norms = judged_norms(model, clean.shape, "bnp")
    moments = {name: Moments() for name in norms}
    watch(model, clean, {name: moments[name].add for name in norms})
    scores = Scores({name: divergence(moments[name], norm) for name, norm in norms.items()}, "channel")
    cut = rank(scores, order="largest").cut(Outliers(k))
    return apply_and_heal(model, clean, edited(model, cut, edit), heal=None, generator=generator)


def judged_norms(model: nn.Module, input_shape: tuple[int, int, int], method: str) -> dict[str, nn.BatchNorm2d]:
    """Return the batch-norms at which a method judges channels, by name, in the order of the data.

    Raises:
        MethodError: There is none.
        ModelError: The network cannot be traced.
    """
    modules = dict(core(model).named_modules())
    sites = {site.name: modules[site.name] for site in trace_channels(model, input_shape).sites}
    norms = {name: norm for name, norm in sites.items() if isinstance(norm, NORMS) and norm.running_var is not None}
    if not norms:
        raise MethodError(f"{method} needs batch-norms with running statistics, got a network without; use another method")
    return norms  # type: ignore[return-value]


def watch(
    model: nn.Module, images: ImageSet, watchers: Mapping[str, Callable[[Tensor], None]], *, leaving: bool = False
) -> None:
    """Show images to a network in eval mode; each watcher gets what enters its module, or leaves it, batch by batch."""
    net, device = core(model), next(model.parameters()).device

    def hook(tell: Callable[[Tensor], None]) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        return lambda module, given, out: tell(out if leaving else given[0])

    handles = [net.get_submodule(name).register_forward_hook(hook(tell)) for name, tell in watchers.items()]
    try:
        with evaluating(model), torch.inference_mode():
            for x, _ in images.batches(batch_size(512)):
                model(x.to(device).contiguous(memory_format=torch.channels_last))
    finally:
        for handle in handles:
            handle.remove()


@dataclass
class Moments:
    """Mean and sum of squared deviations of each channel, float64 ``(channels,)``, over batches (Chan's rule)."""

    count: int = 0
    mean: Tensor | float = 0.0
    squares: Tensor | float = 0.0

    def add(self, x: Tensor) -> None:
        """Take in ``x``, ``(batch, channels, ...)``."""
        places = [dim for dim in range(x.ndim) if dim != 1]
        count = x.numel() // x.shape[1]
        variance, mean = (value.double().cpu() for value in torch.var_mean(x, dim=places, correction=0))
        apart, total = mean - self.mean, self.count + count
        self.squares = self.squares + variance * count + apart.square() * (self.count * count / total)
        self.mean = self.mean + apart * (count / total)
        self.count = total

    @property
    def variance(self) -> Tensor:
        """The unbiased variance."""
        return torch.as_tensor(self.squares) / (self.count - 1)


def divergence(moments: Moments, norm: nn.BatchNorm2d) -> Tensor:
    """Return the Kullback-Leibler divergence of the images' Gaussian from the stored one, float64 ``(channels,)``."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    stored = norm.running_var.detach().double().cpu() + norm.eps
    seen = moments.variance + norm.eps
    apart = torch.as_tensor(moments.mean) - norm.running_mean.detach().double().cpu()
    return (stored / seen).log() / 2 + (seen + apart.square()) / (2 * stored) - 0.5
