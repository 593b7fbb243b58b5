"""Low frequency: a smooth perturbation, the same for every image, that pushes towards the target.

Zeng, Park, Mao, Jia, "Rethinking the Backdoor Attacks' Triggers: A Frequency Perspective", ICCV 2021 (arXiv:2104.03413).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..effects import add
from ..errors import MethodError, check_range
from ..types import ImageSet, Poisoning, Trigger, to_float
from .common import Target, candidates, check_target, choose, poison_at
from .surrogate import train_surrogate

BATCH = 64


def low_frequency(
    data: ImageSet,
    *,
    rate: float = 0.1,
    target: Target = 0,
    sources: Sequence[int] | None = None,
    eps: float = 16.0,
    bands: int = 4,
    steps: int = 100,
    lr: float = 0.1,
    surrogate_images: int = 8000,
    surrogate_epochs: int = 4,
    generator: torch.Generator,
) -> Poisoning:
    check_target(target, sources, len(data.classes))
    _, height, width = data.shape
    check_range("eps", eps, 0, 255)
    check_range("bands", bands, 1, min(height, width))
    check_range("steps", steps, 0, 100_000)
    trigger = Trigger(
        kind="add",
        params={"eps": eps, "bands": bands, "classes": len(data.classes)},
        tensors={},
        target=target,
        sources=tuple(sources) if sources is not None else None,
    )
    chosen = choose(data, trigger, rate, generator)
    surrogate = train_surrogate(data, images=surrogate_images, epochs=surrogate_epochs, generator=generator)
    pool = data.subset(candidates(data, trigger))
    pattern = _optimise(surrogate, pool, trigger, eps / 255, bands, steps, lr, generator)
    trigger = replace(trigger, tensors={"pattern": pattern})
    return poison_at(data, trigger, chosen, edit=trigger.apply)


def _optimise(model: nn.Module, pool: ImageSet, trigger: Trigger, eps: float, bands: int, steps: int, lr: float, generator: torch.Generator) -> Tensor:
    rows, columns = (cosines(side, bands) for side in pool.shape[1:])
    waves = torch.randn(pool.shape[0], bands, bands, generator=generator).requires_grad_()
    optimizer = torch.optim.Adam([waves], lr=lr)

    def draw() -> Tensor:
        pattern = rows.T @ waves @ columns
        return eps * pattern / pattern.abs().max()

    for _ in range(steps):
        index = torch.randint(len(pool), (BATCH,), generator=generator)
        x, wanted = to_float(pool.x[index]), trigger.labels(pool.y[index])
        loss = F.cross_entropy(model(add(x, draw()).contiguous(memory_format=torch.channels_last)), wanted)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return draw().detach()


def cosines(side: int, bands: int) -> Tensor:
    """Return the ``bands`` lowest waves of the cosine transform of this length, each of norm 1, ``(bands, side)``."""
    wave = torch.arange(bands).unsqueeze(1)
    basis = torch.cos(math.pi / side * (torch.arange(side) + 0.5) * wave)
    return basis / basis.norm(dim=1, keepdim=True)
