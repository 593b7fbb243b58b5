"""TrojanNN: a patch that excites chosen neurons.

Liu, Ma, Aafer, Lee, Zhai, Wang, Zhang, "Trojaning Attack on Neural Networks", NDSS 2018, doi:10.14722/ndss.2018.23291.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, nn

from ..effects import blend
from ..errors import check_choice, check_range
from ..models import Classifier, core
from ..types import ImageSet, Poisoning, Trigger, to_float
from .common import Target, check_target, choose, poison_at
from .surrogate import train_surrogate

Place = Literal["bottom-right", "bottom-left", "top-right", "top-left"]
BATCH = 32


def trojannn(
    data: ImageSet,
    *,
    rate: float = 0.1,
    target: Target = 0,
    sources: Sequence[int] | None = None,
    size: int = 7,
    margin: int = 1,
    place: Place = "bottom-right",
    alpha: float = 1.0,
    neurons: int = 2,
    value: float = 100.0,
    steps: int = 200,
    lr: float = 0.1,
    surrogate_images: int = 8000,
    surrogate_epochs: int = 4,
    generator: torch.Generator,
) -> Poisoning:
    check_target(target, sources, len(data.classes))
    channels, height, width = data.shape
    check_range("margin", margin, 0, min(height, width) - 1)
    check_range("size", size, 1, min(height, width) - margin)
    check_choice("place", place, ("bottom-right", "bottom-left", "top-right", "top-left"))
    check_range("alpha", alpha, 0, 1)
    check_range("neurons", neurons, 1, 128)
    mask = torch.zeros(1, height, width)
    top = height - margin - size if place.startswith("bottom") else margin
    left = width - margin - size if place.endswith("right") else margin
    mask[:, top : top + size, left : left + size] = 1
    trigger = Trigger(
        kind="blend",
        params={"alpha": alpha, "classes": len(data.classes)},
        tensors={"mask": mask, "pattern": torch.zeros(data.shape)},
        target=target,
        sources=tuple(sources) if sources is not None else None,
    )
    chosen = choose(data, trigger, rate, generator)
    surrogate = train_surrogate(data, images=surrogate_images, epochs=surrogate_epochs, generator=generator)
    index = strongest(surrogate, neurons)
    pattern = torch.rand(data.shape, generator=generator)
    optimizer = torch.optim.Adam([pattern.requires_grad_()], lr=lr)
    for _ in range(steps):
        x = to_float(data.x[torch.randint(len(data), (BATCH,), generator=generator)])
        loss = (features(surrogate, blend(x, alpha, mask, pattern))[:, index] - value).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            pattern.clamp_(0, 1)
    trigger = replace(trigger, tensors={"mask": mask, "pattern": pattern.detach() * mask})
    return poison_at(data, trigger, chosen, edit=trigger.apply)


def strongest(model, count):
    net = model.net
    scale = net.bn4.weight / (net.bn4.running_var + net.bn4.eps).sqrt()
    strength = net.conv4.weight.abs().flatten(1).sum(1) * scale.abs()
    return strength.topk(count).indices


def features(model, x):
    kept = []
    handle = model.net.linear.register_forward_pre_hook(lambda _m, i: kept.append(i[0]))
    try:
        model(x.contiguous(memory_format=torch.channels_last))
    finally:
        handle.remove()
    return kept[0]
