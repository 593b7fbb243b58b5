"""TrojanNN: a patch that excites a few neurons of a network.

Liu, Ma, Aafer, Lee, Zhai, Wang, Zhang, "Trojaning Attack on Neural Networks", NDSS 2018, doi:10.14722/ndss.2018.23291.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from ..effects import blend
from ..errors import check_range
from ..models import core
from ..types import ImageSet, Poisoning, Trigger, to_float
from .common import Place, Target, box, check_target, choose, poison_at
from .surrogate import WIDTH, train_surrogate

NEURONS = 4 * WIDTH
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
    surrogate_images: int = 8000,
    surrogate_epochs: int = 4,
    generator: torch.Generator,
) -> Poisoning:
    """Stamp a patch that excites chosen neurons of a surrogate on a share of the images and relabel them.

    ``x' = (1 - alpha*m)*x + alpha*m*p`` with ``m`` = 1 on the patch and 0 elsewhere; ``p`` minimises the mean of
    ``(f_j(x') - value)**2`` over images and the chosen neurons ``j``: features before the last layer, those whose weights from
    the layer below have the largest sum of absolute values.

    Args:
        data: Training images.
        rate: Share of the whole set to poison, in [0, 1].
        target: The label wanted (all-to-one), or ``next`` for each class's successor (all-to-all).
        sources: Classes to poison; all but the target by default.
        size: Side of the square patch in pixels, in [1, image side - margin]; the default covers 5 % of 32x32 pixels.
        margin: Distance from the two nearest borders in pixels, >= 0.
        place: The corner, or ``center``.
        alpha: Opacity of the patch, in [0, 1].
        neurons: How many neurons to excite, in [1, 96].
        value: What they are to reach, far above what images give, >= 0.
        steps: Steps of Adam on the pixels of the patch, each on a batch of images, >= 0; with 0 the patch is random.
        surrogate_images: Images to train the surrogate on, >= 2.
        surrogate_epochs: Passes over them, >= 0.
        generator: Draws the images, the first patch and the batches, and trains the surrogate.

    Raises:
        DataError: There are fewer than two images.
        MethodError: An argument is out of range, or the images are smaller than 8x8 pixels.

    Differs from the paper, where the attacker has a trained network and no data, retrains it on images reconstructed from it
    and so ties the excited neurons to the target: here, as in the benchmark ports, the patch is made on a surrogate and poisons
    the training set of a network that starts anew. Batch-norm counts among the weights, and the patch is optimised on images
    instead of a grey one.
    """
    check_target(target, sources, len(data.classes))
    rows, columns = box(data.shape, size, margin, place)
    check_range("alpha", alpha, 0, 1)
    check_range("neurons", neurons, 1, NEURONS)
    check_range("value", value, 0, 1e6)
    check_range("steps", steps, 0, 100_000)
    mask = torch.zeros(1, *data.shape[1:])
    mask[:, rows, columns] = 1
    trigger = Trigger(
        kind="blend",
        params={"alpha": alpha, "classes": len(data.classes)},
        tensors={"mask": mask, "pattern": torch.zeros(data.shape)},
        target=target,
        sources=tuple(sources) if sources is not None else None,
    )
    chosen = choose(data, trigger, rate, generator)
    surrogate = train_surrogate(data, images=surrogate_images, epochs=surrogate_epochs, generator=generator)
    pattern = torch.rand(data.shape, generator=generator).requires_grad_()
    index = _connected(surrogate).topk(neurons).indices
    optimizer = torch.optim.Adam([pattern], lr=0.1)
    for _ in range(steps):
        x = to_float(data.x[torch.randint(len(data), (BATCH,), generator=generator)])
        reached = _features(surrogate, blend(x, alpha, mask, pattern))[:, index]
        optimizer.zero_grad()
        (reached - value).square().mean().backward()
        optimizer.step()
        with torch.no_grad():
            pattern.clamp_(0, 1)
    trigger = replace(trigger, tensors={"mask": mask, "pattern": pattern.detach() * mask})
    return poison_at(data, trigger, chosen, edit=trigger.apply)


def _connected(model: nn.Module) -> Tensor:
    """Return for each feature of the surrogate the sum of its absolute weights from the layer below, batch-norm included."""
    net = core(model)
    scale = net.get_parameter("bn4.weight") / (net.get_buffer("bn4.running_var") + 1e-5).sqrt()
    return net.get_parameter("conv4.weight").abs().flatten(1).sum(dim=1) * scale.abs()


def _features(model: nn.Module, x: Tensor) -> Tensor:
    """Return what the surrogate's last layer sees of the images, ``(n, NEURONS)``."""
    seen: list[Tensor] = []
    handle = core(model).get_submodule("linear").register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    try:
        model(x.contiguous(memory_format=torch.channels_last))
    finally:
        handle.remove()
    return seen[0]
