"""OTBR, optimal-transport backdoor repair: prune what unlearning of noise moves, fuse with the network as it was.

Lin, Liu, Li, Xiong, "Fusing Pruned and Backdoored Models: Optimal Transport-based Data-free Backdoor Mitigation", AAAI 2025
(arXiv:2408.15861).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from copy import deepcopy

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import linprog
from scipy.sparse import eye_array, kron, vstack
from torch import Tensor, nn

from .. import state
from ..errors import MethodError, check_range
from ..forward import Incremental
from ..models import core
from ..models.channels import trace_channels
from ..prune.grammar import first_crossing
from ..train import OnStep
from ..types import Candidate, ImageSet, Repaired, WeightMask
from .student import student_of
from .tsbd import reset_mask, resettable
from .unlearning import check_finite

SHARES = (0.01, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3)
LEAST = 1e-6


def otbr(
    model: nn.Module,
    clean: ImageSet,
    *,
    iterations: int = 20,
    lr: float = 1e-4,
    fusion: float = 0.5,
    drop: float = 0.05,
    batch_size: int = 256,
    on_step: OnStep | None = None,
    generator: torch.Generator,
) -> Repaired:
    """Zero the filters that unlearning of noise changes most; mix with the original network, filters matched by transport.

    Images of noise with random labels are unlearned; filter ``k`` changed by ``v_k``, the l1 norm. With the share of filters
    that changed most zeroed, ``P``, and the original, ``W``, a layer becomes ``l * D^-1 T' P A + (1 - l) * W``: ``T`` is the
    cheapest transport (Euclidean distance of filters) from the filters of ``P``, each of mass ``1/n``, to those of ``W``, of
    mass ``v_k / sum v``, the diagonal of ``D``; ``A`` carries the matching of the layer before over to the inputs. Layers
    before the first that lost a filter, and convolutions that are on a shortcut or grouped, stay.

    Args:
        model: Takes images in [0, 1]; not changed.
        clean: Labelled clean images choose the share; nothing is fitted to them.
        iterations: Batches of noise, >= 1.
        lr: Learning rate of the unlearning (SGD with momentum 0.9), > 0.
        fusion: ``l``, the share of the pruned network in the mixture, in [0, 1].
        drop: Clean accuracy that the repair may cost, in [0, 1]: the share is the largest of 1, 5, 10, ..., 30 % before the
            first that costs more.
        batch_size: Images of noise per batch, >= 1.
        on_step: Progress of the unlearning.
        generator: Source of all randomness.

    Returns:
        No mask, since the fused network has no zeros; the path has what was zeroed before the fusion.

    Raises:
        MethodError: An argument is out of range, or there is no convolution.
        ModelError: The network cannot be traced, or the unlearning diverged.

    Differs from the authors' code, which measures every share on test images and chooses none, in that the share follows from
    ``drop``; in that noise is uniform in [0, 1] before the normalisation (theirs after it) with labels of all classes (theirs
    never the last); in that changes are not rounded to four decimals; in that a layer takes over the matching of the last layer
    that writes what it reads (the same as theirs, the layer before, in plain residual networks); and in that transport is
    solved as a linear program, whose time grows quickly beyond 256 filters a layer.
    """
    for name, value in (("fusion", fusion), ("drop", drop)):
        check_range(name, value, 0, 1)
    check_range("iterations", iterations, 1, 2**31)
    check_range("lr", lr, 1e-12, 1e6)
    check_range("batch_size", batch_size, 1, 2**31)
    before = fusible(model, clean.shape)
    unlearned = unlearn_noise(
        model, clean, iterations=iterations, lr=lr, batch_size=batch_size, on_step=on_step, generator=generator
    )
    weights, after = (dict(core(net).named_parameters()) for net in (model, unlearned))
    changes = {name: (after[name] - weights[name]).detach().abs().cpu() for name in before}
    own = {name: weights[name].detach().cpu() for name in before}
    masks = {share: reset_mask(changes, filters=share, weights=1.0) for share in (0.0, *SHARES)}
    evaluator, fused = Incremental(model, clean), []

    def answers() -> Iterator[Tensor]:
        for mask in masks.values():
            fused.append(fuse(own, mask, changes, before, fusion=fusion))
            yield evaluator.correct(fused[-1])

    crossing = first_crossing(answers(), drop)
    tried = zip(masks.items(), crossing.rates, strict=False)
    path = tuple(Candidate(share, _filters(mask), mask, rate) for (share, mask), rate in tried)
    repaired = deepcopy(model).eval()
    with torch.no_grad():
        for name, value in fused[crossing.chosen].items():
            core(repaired).get_parameter(name).copy_(value)
    log = {"filters_zeroed": float(path[crossing.chosen].removed), "share": path[crossing.chosen].amount}
    return Repaired(repaired, None, path, log, (crossing.note,) * bool(crossing.note))


def fusible(model: nn.Module, input_shape: tuple[int, int, int]) -> dict[str, str | None]:
    """Return the weights to fuse, in the order of the layers, each with the last before it that writes what it reads."""
    graph, modules = trace_channels(model, input_shape), dict(core(model).named_modules())
    before: dict[str, str | None] = {}
    for name in resettable(model, input_shape):
        layer = name.removesuffix(".weight")
        if getattr(modules[layer], "groups", 1) != 1 or layer not in graph.inputs:
            continue
        reads = graph.inputs[layer].tolist()
        writers = [other for other in before if graph.outputs[other.removesuffix(".weight")].tolist() == reads]
        before[name] = writers[-1] if writers else None
    if not before:
        raise MethodError("otbr needs convolutions that can be followed, got none; use another method")
    return before


def unlearn_noise(
    model: nn.Module,
    clean: ImageSet,
    *,
    iterations: int,
    lr: float,
    batch_size: int,
    on_step: OnStep | None,
    generator: torch.Generator,
) -> nn.Module:
    """Return a copy trained to *raise* the cross-entropy on noise with random labels; of ``clean`` only the shape is used."""
    student = student_of(model).train()
    optimizer = torch.optim.SGD(student.parameters(), lr=lr, momentum=0.9)
    device = next(student.parameters()).device
    size = state.batch_size(batch_size)
    with state.seeded(generator):
        for step in range(iterations):
            x = torch.rand(size, *clean.shape, generator=generator).contiguous(memory_format=torch.channels_last)
            y = torch.randint(len(clean.classes), (size,), generator=generator)
            optimizer.zero_grad()
            (-F.cross_entropy(student(x.to(device)), y.to(device))).backward()
            optimizer.step()
            if on_step is not None:
                on_step(step + 1, iterations)
    check_finite(student, lr)
    return student


def fuse(
    own: Mapping[str, Tensor],
    mask: WeightMask,
    changes: Mapping[str, Tensor],
    before: Mapping[str, str | None],
    *,
    fusion: float,
) -> dict[str, Tensor]:
    """Return the fused weights by name, from the first layer that lost a filter on; see `otbr`.

    Args:
        own: Weights of the network, in the order of the layers.
        mask: What is zeroed.
        changes: How much each weight changed, >= 0.
        before: Layer -> the layer whose matching its inputs take over.
        fusion: ``l``.
    """
    matchings: dict[str, Tensor] = {}
    fused = {}
    for name, weight in own.items():
        if not matchings and bool(mask.keep[name].all()):
            continue
        pruned = weight * mask.keep[name]
        matching = matched(pruned, weight, changes[name].flatten(1).sum(dim=1))
        source = matchings.get(before[name] or "")
        aligned = pruned if source is None else torch.einsum("oi...,ji->oj...", pruned, source)
        fused[name] = fusion * torch.einsum("po,o...->p...", matching, aligned) + (1 - fusion) * weight
        matchings[name] = matching
    return fused


def matched(pruned: Tensor, weight: Tensor, change: Tensor) -> Tensor:
    """Return ``D^-1 T'``: row ``k`` says of which filters of ``pruned`` filter ``k`` of ``weight`` is the mean."""
    mass = change.double().clamp_min(LEAST * float(change.mean()) + 1e-30)
    cost = torch.cdist(pruned.flatten(1).double(), weight.flatten(1).double())
    plan = torch.from_numpy(transport(cost.numpy(), np.full(len(weight), 1 / len(weight)), (mass / mass.sum()).numpy())).T
    total = plan.sum(dim=1, keepdim=True)
    rows = torch.where(total > LEAST / len(weight), plan / total.clamp_min(1e-30), torch.eye(len(weight), dtype=torch.float64))
    return rows.to(weight.dtype)


def transport(cost: np.ndarray, given: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Return the cheapest plan, ``(n, m)`` >= 0, whose rows sum to ``given`` and whose columns sum to ``wanted``."""
    rows, columns = cost.shape
    sums = vstack([kron(eye_array(rows), np.ones((1, columns))), kron(np.ones((1, rows)), eye_array(columns))], format="csr")
    found = linprog(cost.ravel(), A_eq=sums, b_eq=np.concatenate([given, wanted]), method="highs")
    assert found.status == 0, found.message
    return np.maximum(found.x, 0).reshape(rows, columns)


def _filters(mask: WeightMask) -> int:
    return sum(int((~keep).flatten(1).all(dim=1).sum()) for keep in mask.keep.values())
