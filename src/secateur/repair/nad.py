"""NAD, neural attention distillation: fine-tune a teacher, then let it show the network where to look.

Li, Lyu, Koren, Lyu, Li, Ma, "Neural Attention Distillation: Erasing Backdoor Triggers from Deep Neural Networks", ICLR 2021
(arXiv:2101.05930).
"""

from __future__ import annotations

import math
from copy import deepcopy

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp

from ..errors import MethodError, check_range
from ..models.channels import trace_channels
from ..recipe import Recipe
from ..state import batch_size, seeded
from ..train import OnStep, train
from ..types import ImageSet, Repaired

BATCH = 64
TINY = 1e-6
SMALLEST = 2  # places; the attention of a map of one place is always 1


def nad(
    model: nn.Module,
    clean: ImageSet,
    *,
    teacher_epochs: int = 10,
    epochs: int = 10,
    lr: float = 0.1,
    beta: float = 1000.0,
    power: float = 2.0,
    on_step: OnStep | None = None,
    generator: torch.Generator,
) -> Repaired:
    """Fine-tune a copy as teacher; then train the network on the images and on the teacher's attention.

    The attention of a feature map ``A`` is ``sum over channels of |A_c|^power``, divided by its length over the places. The
    loss is ``CE(f(x), y) + sum over maps of beta * MSE(attention, teacher's attention)``, where the maps are the last value of
    each resolution on the way of the data (the ends of a residual network's stages); the first counts half. Both train with SGD
    (momentum 0.9, weight decay 1e-4, batches of 64, crops and flips); the rate falls to a tenth after each fifth of the epochs.

    Args:
        model: Takes images in [0, 1]; not changed.
        clean: Labelled clean images.
        teacher_epochs: Passes over them for the teacher, >= 0; for 0 it is the network as it came.
        epochs: Passes over them for the repaired network, >= 0.
        lr: First learning rate of both, > 0.
        beta: Weight of the attention at each map but the first, >= 0.
        power: Exponent, >= 1; larger looks at the strongest channels only.
        on_step: Progress, the teacher's training first.
        generator: Source of all randomness.

    Raises:
        MethodError: An argument is out of range, or the network has no feature maps.
        ModelError: The network cannot be traced, or training diverged.

    Differs from the authors' code in that the maps are found by following the data and not named in each network's own code;
    where they are three, their weights are 500, 1000, 1000 as there. As there, the squared distance is averaged over the
    places, so that a map of few places weighs more.
    """
    check_range("teacher_epochs", teacher_epochs, 0, 100_000)
    check_range("beta", beta, 0, 1e9)
    check_range("power", power, 1, 100)
    check_range("epochs", epochs, 0, 100_000)
    each = math.ceil(len(clean) / batch_size(BATCH))
    first, second = _progress(on_step, teacher_epochs * each, (teacher_epochs + epochs) * each)
    teacher = train(model, clean, _recipe(teacher_epochs, lr), on_step=first, generator=generator)
    recipe = _recipe(epochs, lr)
    repaired = distil(model, teacher, clean, recipe, beta=beta, power=power, on_step=second, generator=generator)
    return Repaired(repaired, None)


def distil(
    model: nn.Module,
    teacher: nn.Module,
    clean: ImageSet,
    recipe: Recipe,
    *,
    beta: float,
    power: float,
    on_step: OnStep | None = None,
    generator: torch.Generator,
) -> nn.Module:
    """Return a copy of ``model`` trained on the images and on the attention of ``teacher``."""
    with seeded(generator):
        student = Watched(deepcopy(model).train(), clean.shape)
        guide = Watched(deepcopy(teacher).requires_grad_(False).eval(), clean.shape)

    def apart(network: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        assert isinstance(network, Watched)
        with torch.no_grad():
            guide(x)
        return distance(network.maps, guide.maps, beta=beta, power=power)

    trained = train(student, clean, recipe, penalty=apart if beta > 0 else None, on_step=on_step, generator=generator)
    repaired = deepcopy(model).eval()
    values = trained.get_submodule("network").state_dict()
    repaired.load_state_dict({name: values.get(name, value) for name, value in repaired.state_dict().items()})
    return repaired


def attention(values: Tensor, power: float) -> Tensor:
    """Return the attention of a feature map ``(b, c, h, w)``, ``(b, h, w)``."""
    summed = values.abs().pow(power).sum(dim=1)
    return summed / (summed.flatten(1).norm(dim=1)[:, None, None] + TINY)


def distance(maps: tuple[Tensor, ...], wanted: tuple[Tensor, ...], *, beta: float, power: float) -> Tensor:
    """Return the weighted distance between the attentions of two networks, the first map at half weight."""
    return torch.stack(
        [
            (beta if i else beta / 2) * F.mse_loss(attention(mine, power), attention(other, power))
            for i, (mine, other) in enumerate(zip(maps, wanted, strict=True))
        ]
    ).sum()


class Watched(nn.Module):
    """A network that keeps the last feature map of each resolution of the last images it saw.

    Attributes:
        network: The traced network, which shares the parameters of the one it was made from.
        count: How many maps there are.
        maps: They, in the order of the data; empty before the first images.
    """

    def __init__(self, model: nn.Module, input_shape: tuple[int, int, int]) -> None:
        """Trace ``model`` in the mode that it is in.

        Raises:
            MethodError: It has no feature maps.
            ModelError: It cannot be traced.
        """
        super().__init__()
        trace_channels(model, input_shape)
        traced = fx.symbolic_trace(model)
        nodes = _last_of_each_resolution(traced, input_shape)
        if not nodes:
            raise MethodError("nad needs a network with feature maps (b, c, h, w), got one without; use another method")
        output = next(node for node in traced.graph.nodes if node.op == "output")
        output.args = ((output.args[0], *nodes),)
        traced.recompile()
        self.network, self.count = traced, len(nodes)
        self.maps: tuple[Tensor, ...] = ()

    def forward(self, x: Tensor) -> Tensor:
        """Return logits."""
        logits, *maps = self.network(x)
        self.maps = tuple(maps)
        return logits


def _last_of_each_resolution(traced: fx.GraphModule, input_shape: tuple[int, int, int]) -> list[fx.Node]:
    probe = deepcopy(traced).eval()
    parameter = next(probe.parameters())
    with torch.no_grad():
        ShapeProp(probe).propagate(torch.zeros(2, *input_shape, device=parameter.device, dtype=parameter.dtype))
    last: dict[tuple[int, int], fx.Node] = {}
    learned: set[str] = set()
    for node, measured in zip(traced.graph.nodes, probe.graph.nodes, strict=True):
        own = node.op == "call_module" and any(True for _ in traced.get_submodule(str(node.target)).parameters())
        if not own and learned.isdisjoint(n.name for n in node.all_input_nodes):
            continue
        learned.add(node.name)
        shape = getattr(measured.meta.get("tensor_meta"), "shape", ())
        if len(shape) == 4 and shape[2] * shape[3] >= SMALLEST:
            last[shape[2], shape[3]] = node
    return list(last.values())


def _recipe(epochs: int, lr: float) -> Recipe:
    return Recipe(
        epochs=epochs, lr=lr, batch_size=BATCH, weight_decay=1e-4,
        schedule="multistep", milestones=(0.2, 0.4, 0.6, 0.8), augment=("crop", "flip"),
    )  # fmt: skip


def _progress(on_step: OnStep | None, middle: int, end: int) -> tuple[OnStep | None, OnStep | None]:
    if on_step is None:
        return None, None
    return lambda step, _: on_step(step, end), lambda step, _: on_step(middle + step, end)
