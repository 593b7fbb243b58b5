"""FMP, adversarial feature map pruning: cut the feature maps whose attack costs most, then fine-tune.

Huang, Bu, "Adversarial Feature Map Pruning for Backdoor", ICLR 2024 (arXiv:2307.11565).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from copy import deepcopy

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from ..data import sample
from ..errors import MethodError, check_range
from ..models import core
from ..models.graph import Graph
from ..prune import Count, apply_and_heal, rank
from ..prune.lipschitz import bounded_layers
from ..prune.mask import Edit, edited
from ..state import batch_size, frozen
from ..train import OnStep
from ..types import ChannelMask, ImageSet, Repaired, Scores
from .fine_tuning import healing

AT_ONCE = 128


def fmp(
    model: nn.Module,
    clean: ImageSet,
    *,
    share: float = 0.015625,
    eps: float = 0.00392157,
    images: int = 32,
    epochs: int = 10,
    lr: float = 0.01,
    edit: Edit = "weight",
    on_step: OnStep | None = None,
    generator: torch.Generator,
) -> Repaired:
    """Attack each feature map by itself, cut in each layer the share whose attack hurts accuracy most, fine-tune.

    For map ``f_k`` of a convolution the images ``x`` become ``x_0 + eps * sign(grad ||f_k(x) - f_k(x_0)||^2)``, where ``x_0``
    is ``x`` plus ``eps`` of random sign in each pixel, in [0, 1] (at ``x`` itself the gradient is 0). Map ``k`` scores the
    number of attacked images that the network still answers rightly; among equals the larger loss is cut first.

    Args:
        model: Takes images in [0, 1]; not changed.
        clean: Labelled clean images: some are attacked, all of them heal.
        share: Share of a layer's maps to cut (1/64), in [0, 1], rounded up; benign networks lose it as well.
        eps: Size of a step in a pixel (1/255), in [0, 1].
        images: Images that are attacked, drawn at random, >= 1; the cost is one pass back and forth for each and map.
        epochs: Epochs of fine-tuning with the cut held; 0 leaves it out.
        lr: Learning rate of the fine-tuning.
        edit: Set the ``weight`` at a cut map's site to 0, or ``weight+bias``.
        on_step: Progress of the fine-tuning.
        generator: Source of all randomness.

    Raises:
        MethodError: An argument is out of range, or the network has no convolution.
        ModelError: The network cannot be traced.

    Differs from the authors' code in that the number of maps is rounded up, and so at least one: theirs is rounded down, which
    cuts nothing from layers of fewer than 64 maps; in that maps and batch-norms are paired by following the data and not by
    order; in that ties are broken by the loss; and in that all maps of a layer share one forward. The size of the random start
    and the epochs are in no public file; both are our reading.
    """
    for name, value in (("share", share), ("eps", eps)):
        check_range(name, value, 0, 1)
    check_range("images", images, 1, 2**31)
    recipe = healing(epochs, lr)
    layers = bounded_layers(model, clean.shape)
    if not layers:
        raise MethodError("fmp needs convolutions with batch-norm or no norm behind them, got none; use another method")
    [(x, y)] = sample(clean, images, 1, generator=generator)
    scores = endurance(model, layers, x, y, eps=eps, generator=generator)
    keep: dict[str, Tensor] = {}
    for site, score in scores.items():
        cut = rank(Scores({site: score}, "channel")).cut(Count(math.ceil(share * len(score) - 1e-9)))
        assert isinstance(cut, ChannelMask)
        keep.update(cut.keep)
    mask = ChannelMask(keep)
    return apply_and_heal(model, clean, edited(model, mask, edit), heal=recipe, on_step=on_step, generator=generator)


def endurance(
    model: nn.Module, layers: dict[str, str], x: Tensor, y: Tensor, *, eps: float, generator: torch.Generator
) -> dict[str, Tensor]:
    """Return how well the network endures the attack of each feature map, site -> float64 ``(channels,)``.

    The whole part is the number of attacked images answered rightly; the fraction is ``1 / (1 + loss)``.

    Args:
        model: Not changed.
        layers: Site -> convolution whose feature maps are attacked.
        x: Images, float ``(n, c, h, w)`` in [0, 1].
        y: Labels.
        eps: Size of a step.
        generator: Draws the start.
    """
    network = deepcopy(model).eval().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    prefix = "" if core(model) is model else "net."
    device = next(network.parameters()).device
    signs = torch.randint(2, x.shape, generator=generator).mul_(2).sub_(1)
    x, y, start = x.to(device), y.to(device), (x + eps * signs).clamp_(0, 1).to(device)
    with frozen(network):
        graph = Graph(network)
        places = {str(node.target): node for node in graph.order if node.op == "call_module"}
        return {
            site: torch.cat(
                [endured(network, attacked, y) for attacked in attacks(graph, places[prefix + layer], x, start, eps=eps)]
            )
            for site, layer in layers.items()
        }


def attacks(graph: Graph, node: fx.Node, x: Tensor, start: Tensor, *, eps: float) -> Iterator[Tensor]:
    """Yield the images attacked through each feature map of a node, some maps at a time, ``(maps, n, c, h, w)``.

    All maps share the way to the node; only the way back is gone for each (batched, it took longer on a CPU).
    """
    nodes = graph.needed([node], lambda other: other is graph.start)
    moved = start.clone(memory_format=torch.channels_last).requires_grad_()
    with torch.no_grad():
        clean = graph.run(nodes, {graph.start: x}, {}, wanted=[node])[node]
    found = graph.run(nodes, {graph.start: moved}, {}, wanted=[node])[node]
    losses = [own.square().sum() for own in (found - clean).unbind(dim=1)]
    together = max(1, batch_size(AT_ONCE) // len(x))
    for maps in (losses[i : i + together] for i in range(0, len(losses), together)):
        slopes = torch.stack([torch.autograd.grad(loss, moved, retain_graph=True)[0] for loss in maps])
        yield (start + eps * slopes.sign()).clamp_(0, 1)


@torch.inference_mode()
def endured(network: nn.Module, attacked: Tensor, y: Tensor) -> Tensor:
    """Return the score of each group of attacked images, ``(maps, n, c, h, w)`` -> float64 ``(maps,)``."""
    logits = network(attacked.flatten(0, 1).contiguous(memory_format=torch.channels_last))
    labels = y.repeat(len(attacked))
    right = (logits.argmax(dim=1) == labels).unflatten(0, (len(attacked), -1)).sum(dim=1).double()
    loss = F.cross_entropy(logits.double(), labels, reduction="none").unflatten(0, (len(attacked), -1)).mean(dim=1)
    return (right + 1 / (1 + loss)).cpu()
