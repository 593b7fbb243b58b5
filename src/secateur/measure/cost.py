"""What a network costs: parameters, non-zeros, bytes, multiply-accumulates and time."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..models import core
from ..state import evaluating, threads


@dataclass(frozen=True)
class Cost:
    """The size of a network and the work of one image.

    Attributes:
        parameters: Number of parameters.
        nonzero: How many of them are not 0.
        size_bytes: Bytes of all tensors in the state dict, as a dense file stores them. A bundle keeps quantised weights as
            float32, so that this is the size before quantisation, too; `secateur.compress.encode` tells the smaller one.
        macs: Multiply-accumulates of the convolutions and linear layers for one image.
        latency_ms: Median time of a batch of one on one thread, in milliseconds; None when it was not measured, or when the
            network takes no image alone.
    """

    parameters: int
    nonzero: int
    size_bytes: int
    macs: int
    latency_ms: float | None = None


def cost(model: nn.Module, input_shape: tuple[int, int, int], *, repeats: int = 0) -> Cost:
    """Measure what ``model`` costs.

    Args:
        model: Left as it was.
        input_shape: Shape of one image, ``(c, h, w)``.
        repeats: How often to time a batch of one; 0 leaves the time out.
    """
    net = core(model)
    parameters = list(net.parameters())
    return Cost(
        parameters=sum(p.numel() for p in parameters),
        nonzero=sum(int(p.count_nonzero()) for p in parameters),
        size_bytes=sum(t.numel() * t.element_size() for t in net.state_dict().values()),
        macs=_macs(model, input_shape),
        latency_ms=latency_ms(model, input_shape, repeats=repeats) if repeats else None,
    )


def _images(model: nn.Module, input_shape: tuple[int, int, int], count: int = 1) -> Tensor:
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    return torch.full((count, *input_shape), 0.5, device=device)


def _takes_one(model: nn.Module, input_shape: tuple[int, int, int]) -> bool:
    """Return whether the network takes an image alone; a batch-norm without running statistics may not."""
    try:
        model(_images(model, input_shape))
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError):
        return False
    return True


def _macs(model: nn.Module, input_shape: tuple[int, int, int]) -> int:
    total = 0

    def count(module: nn.Module, _: object, output: Tensor) -> None:
        nonlocal total
        weight = module.weight
        assert isinstance(weight, Tensor)
        positions = output.numel() // weight.shape[0]
        total += positions * weight.numel()

    layers = [m for m in model.modules() if isinstance(m, nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Linear)]
    with evaluating(model), torch.inference_mode():
        images = 1 if _takes_one(model, input_shape) else 2
        handles = [layer.register_forward_hook(count) for layer in layers]
        try:
            model(_images(model, input_shape, images))
        finally:
            for handle in handles:
                handle.remove()
    return total // images


def latency_ms(model: nn.Module, input_shape: tuple[int, int, int], *, repeats: int = 10) -> float | None:
    """Return the median time of a batch of one, in milliseconds, on one thread; see `latencies_ms`."""
    [found] = latencies_ms([model], input_shape, repeats=repeats)
    return found


def latencies_ms(models: Sequence[nn.Module], input_shape: tuple[int, int, int], *, repeats: int = 10) -> list[float | None]:
    """Return the median time of a batch of one in each network, in milliseconds, after two rounds that are not counted.

    The networks take turns, on one thread, so that what else the machine does slows all of them alike. One that takes no
    image alone has None.

    Args:
        models: Networks, or `secateur.compress.Runtime`s; left as they were.
        input_shape: Shape of one image, ``(c, h, w)``.
        repeats: How often to time each, >= 1.
    """
    images = [_images(model, input_shape) for model in models]
    times: list[list[float]] = [[] for _ in models]
    with ExitStack() as stack:
        for model in models:
            stack.enter_context(evaluating(model))
        stack.enter_context(torch.inference_mode())
        stack.enter_context(threads(1))
        timed = [run for run in zip(models, images, times, strict=True) if _takes_one(run[0], input_shape)]
        for _ in range(repeats + 2):
            for model, image, own in timed:
                start = time.perf_counter()
                model(image)
                if image.is_cuda:
                    torch.cuda.synchronize()
                own.append(1000 * (time.perf_counter() - start))
    return [statistics.median(own[2:]) if own else None for own in times]
