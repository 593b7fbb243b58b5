"""Factors on a network's neurons that can be learned: what ANP, RNP and their kin train and cut by.

A *neuron* is a channel at its site (see ``models/channels.py``): a batch-norm's, or that of a layer without one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from functools import partial

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..errors import MethodError, check_range
from ..models import core
from ..models.channels import WRITERS, trace_channels
from ..state import seeded
from ..types import ImageSet, Repaired, Scores
from .grammar import follow
from .mask import Edit, apply_mask, collapsed, edited
from .select import Count, rank


class Neurons:
    """A frozen copy of a network whose neurons' weights and biases are multiplied by factors on the way.

    Attributes:
        network: The copy; put it in train or eval mode as the method wants. In train mode its running statistics move.
        sizes: Site -> how many neurons it has, in the order of the data; the network's answers are not among them.
        answering: The layers that write the answers.
    """

    def __init__(self, model: nn.Module, input_shape: tuple[int, int, int]) -> None:
        """Copy ``model`` and find its neurons.

        Raises:
            MethodError: It has none besides its answers.
            ModelError: It cannot be traced.
        """
        graph = trace_channels(model, input_shape)
        # GroupNorm's backward pass for its weights alone crashes the process in channels-last memory (torch 2.13, CPU).
        grouped = any(isinstance(module, nn.GroupNorm) for module in model.modules())
        self._memory = torch.contiguous_format if grouped else torch.channels_last
        self.network = deepcopy(model).requires_grad_(False).to(memory_format=self._memory)  # type: ignore[call-overload]
        self.sizes = {site.name: site.channels for site in graph.sites if not graph.is_output(site.name)}
        writers = {site.writer for site in graph.sites if graph.is_output(site.name) and site.writer is not None}
        self.answering = [core(self.network).get_submodule(name) for name in sorted(writers)]
        if not self.sizes:
            raise MethodError("this network has no neurons besides its answers; nothing can be learned about them")
        self._prefix = "" if core(model) is model else "net."
        self._parameters = dict(self.network.named_parameters())
        self._weight: Mapping[str, Tensor] = {}
        self._bias: Mapping[str, Tensor] = {}
        modules = {site: core(self.network).get_submodule(site) for site in self.sizes}
        self._layers = {site: layer for site, layer in modules.items() if isinstance(layer, WRITERS)}
        for site, layer in self._layers.items():
            layer.register_forward_hook(partial(self._scaled, site))

    @property
    def device(self) -> torch.device:
        """Where the network lies."""
        return next(iter(self._parameters.values())).device

    @property
    def biased(self) -> tuple[str, ...]:
        """The sites that have a bias."""
        return tuple(site for site in self.sizes if f"{self._prefix}{site}.bias" in self._parameters)

    def filled(self, value: float) -> dict[str, Tensor]:
        """Return a factor of this value for every neuron, site -> ``(channels,)``, on the network's device."""
        return {site: torch.full((size,), value, device=self.device) for site, size in self.sizes.items()}

    def __call__(self, x: Tensor, weight: Mapping[str, Tensor], bias: Mapping[str, Tensor] | None = None) -> Tensor:
        """Return the logits of images, float in [0, 1], with neurons' weights and biases times their factors."""
        changed = {}
        for kind, factors in (("weight", weight), ("bias", bias or {})):
            for site, factor in factors.items():
                if site in self._layers:
                    continue
                name = f"{self._prefix}{site}.{kind}"
                own = self._parameters[name]
                changed[name] = own * factor.reshape(-1, *[1] * (own.ndim - 1))
        self._weight, self._bias = weight, bias or {}
        try:
            return functional_call(self.network, changed, (x.contiguous(memory_format=self._memory),))
        finally:
            self._weight, self._bias = {}, {}

    def _scaled(self, site: str, layer: nn.Module, _: object, out: Tensor) -> Tensor:
        """Scale what a layer without a norm answers: the same as scaling its weight and bias, and much less work backwards."""
        weight, bias, own = self._weight.get(site), self._bias.get(site), layer.bias
        shape = (-1,) if isinstance(layer, nn.Linear) else (-1, *[1] * (out.ndim - 2))
        if weight is not None:
            out = out * weight.reshape(shape)
        if isinstance(own, Tensor) and (weight is not None or bias is not None):
            change = (1.0 if bias is None else bias) - (1.0 if weight is None else weight)
            out = out + (own * change).reshape(shape)
        return out


def learn(
    factors: Mapping[str, Tensor],
    loss: Callable[[Tensor, Tensor], Tensor],
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    lr: float,
    on_step: Callable[[int], None] | None = None,
    generator: torch.Generator,
) -> Scores:
    """Minimise ``loss(x, y)`` over factors in [0, 1], in place: SGD with momentum 0.9, clamped after each step.

    Args:
        factors: Site -> ``(channels,)``; afterwards without gradients.
        loss: A scalar that depends on them.
        batches: The images and labels, at least one batch.
        lr: Learning rate, > 0.
        on_step: Called with the number of steps done.
        generator: Source of what the network draws (dropout).

    Returns:
        The mean of each factor over all steps. It ranks as the last values do, and also those that have reached 0: what fell
        first comes first.

    Raises:
        MethodError: ``lr`` is out of range.
    """
    check_range("lr", lr, 1e-12, 1e6)
    leaves = [factor.requires_grad_() for factor in factors.values()]
    sums = [torch.zeros_like(leaf, dtype=torch.float64) for leaf in leaves]
    optimizer = torch.optim.SGD(leaves, lr=lr, momentum=0.9)
    step = 0
    with seeded(generator):
        for step, (x, y) in enumerate(batches, 1):
            optimizer.zero_grad()
            loss(x, y).backward()
            optimizer.step()
            with torch.no_grad():
                for leaf, total in zip(leaves, sums, strict=True):
                    total += leaf.clamp_(0, 1)
            if on_step is not None:
                on_step(step)
    for leaf in leaves:
        leaf.requires_grad_(False)
    return Scores({site: (total / step).cpu() for site, total in zip(factors, sums, strict=True)}, "channel")


def cut_lowest(model: nn.Module, judged: ImageSet, scores: Scores, *, drop: float, edit: Edit = "weight") -> Repaired:
    """Cut ever more neurons, the lowest score first, until accuracy falls by more than ``drop``; take the cut before that.

    The cuts tried grow by one neuron or a tenth. Neurons whose score is 1 are never cut: nothing speaks against them.

    Args:
        model: The network; not changed.
        judged: Clean images that the scores were not learned from.
        scores: Of channels, in [0, 1].
        drop: Clean accuracy that the cut may cost, in [0, 1].
        edit: What goes to 0: the ``weight`` alone (as most authors of such methods do; what is left of the neuron is a
            constant), or ``weight+bias`` (it is silent, and can be removed).

    Raises:
        MethodError: ``drop`` is out of range.
    """
    ranking = rank(scores, scope="global")
    values = torch.cat([value.flatten() for value in scores.values.values()])[ranking.pools[0]]
    counts = growing(int((values < 1).sum()))
    cuts = {count / ranking.size: edited(model, ranking.cut(Count(count)), edit) for count in counts}
    path, mask, note = follow(model, judged, cuts, drop)
    cut = next(count for count, each in zip(counts, cuts.values(), strict=True) if each is mask)
    log = {"removed": float(cut), "removed_share": cut / ranking.size, "largest_cut": float(values[cut - 1]) if cut else 0.0}
    notes = tuple(f"layer collapse: nothing is left of '{name}'" for name in collapsed(mask)) + (note,) * bool(note)
    return Repaired(apply_mask(model, mask).eval(), mask, path, log, notes)


def growing(most: int) -> list[int]:
    """Return the numbers of neurons to try: from 0 to ``most``, each larger by one or a tenth."""
    counts = [0]
    while counts[-1] < most:
        counts.append(min(most, max(counts[-1] + 1, round(1.1 * counts[-1]))))
    return counts
