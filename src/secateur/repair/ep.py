"""EP, entropy-based pruning: cut the channels whose largest values fall apart into few groups, clean and poisoned.

Zheng, Tang, Li, Liu, "Pre-activation Distributions Expose Backdoor Neurons", NeurIPS 2022 (OpenReview wwW-1k1ljIg).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..data import stratified
from ..errors import DataError, check_range
from ..prune import Outliers, apply_and_heal, rank
from ..prune.mask import Edit, edited
from ..types import ImageSet, Repaired, Scores
from .bnp import judged_norms, watch


def ep(
    model: nn.Module,
    clean: ImageSet,
    *,
    suspect: ImageSet,
    k: float = 3.0,
    bin_width: float = 0.01,
    images: int = 500,
    edit: Edit = "weight",
    generator: torch.Generator,
) -> Repaired:
    """Cut each channel whose pre-activations have a far lower entropy on suspect images than its layer's have on average.

    A channel's values are the largest of each image at the input of its batch-norm, standardised over the images. With ``p_i``
    the share of them in bin ``i`` of a histogram that starts at the layer's smallest value,
    ``H = -sum_i p_i * log(p_i) < mean - k*std`` over the channels of the layer.

    Args:
        model: Takes images in [0, 1]; not changed.
        clean: Read for the record only.
        suspect: Images of the training set, some of which may be poisoned; their labels do not matter. Without poisoned images
            among them the method sees nothing.
        k: How far below the mean, >= 0; smaller cuts more.
        bin_width: Width of a bin in standard deviations of the channel, > 0.
        images: How many suspect images to look at, drawn at random, >= 2; all when there are fewer.
        edit: Set the ``weight`` of a cut channel's norm to 0, or ``weight+bias``.
        generator: Draws the images.

    Raises:
        DataError: There are fewer than two suspect images, or they have another shape than the clean ones.
        MethodError: An argument is out of range, or the network has no batch-norm with running statistics.
        ModelError: The network cannot be traced.

    Differs from the authors' code in that values on the edge of a bin and beyond the last full one are counted as well, in that
    a channel that never moves has entropy 0 (theirs stops), and in that a channel with two batch-norms (around a depthwise
    convolution) is judged once, at the last. Ports with bins of 0.1 find less.
    """
    check_range("k", k, 0, 1e6)
    check_range("bin_width", bin_width, 1e-6, 1e3)
    check_range("images", images, 2, 2**31)
    if len(suspect) < 2 or suspect.shape != clean.shape:
        raise DataError(f"ep needs two suspect images or more of shape {clean.shape}, got {len(suspect)} of {suspect.shape}")
    norms = judged_norms(model, clean.shape, "ep")
    (drawn,) = stratified(torch.zeros_like(suspect.y), [min(images, len(suspect))], generator=generator)
    maxima: dict[str, list[Tensor]] = {name: [] for name in norms}
    shown = suspect.subset(drawn)
    watch(model, shown, {name: lambda x, seen=seen: seen.append(largest(x)) for name, seen in maxima.items()})
    scores = {name: entropies(torch.cat(seen).T, bin_width) for name, seen in maxima.items()}
    cut = rank(Scores(scores, "channel")).cut(Outliers(k))
    return apply_and_heal(model, clean, edited(model, cut, edit), heal=None, generator=generator)


def largest(x: Tensor) -> Tensor:
    """Return the largest value of each channel of each image, ``(batch, channels)``, on the CPU."""
    return x.reshape(*x.shape[:2], -1).amax(dim=2).cpu()


def entropies(values: Tensor, bin_width: float) -> Tensor:
    """Return the entropy of each row's histogram in nats, float64 ``(rows,)``.

    Args:
        values: One row per channel, ``(rows, n)``; standardised here.
        bin_width: In standard deviations of the row; all rows' bins start at the smallest value of all.
    """
    wide = values.double()
    spread = wide.std(dim=1, keepdim=True)
    standard = (wide - wide.mean(dim=1, keepdim=True)) / torch.where(spread > 0, spread, 1.0)
    bins = ((standard - standard.min()) / bin_width).long()
    rows = torch.arange(len(bins)).unsqueeze(1)
    filled, counts = torch.unique(rows * (int(bins.max()) + 1) + bins, return_counts=True)
    share = counts.double() / values.shape[1]
    owner = filled // (int(bins.max()) + 1)
    return torch.zeros(len(bins), dtype=torch.float64).index_add_(0, owner, -share * share.log())
