"""I-BAU, implicit backdoor adversarial unlearning: unlearn the one perturbation that misleads the network on all images.

Zeng, Chen, Park, Mao, Jin, Jia, "Adversarial Unlearning of Backdoors via Implicit Hypergradient", ICLR 2022
(arXiv:2110.03735).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..data import count_steps, passes
from ..errors import check_range
from ..train import OnStep
from ..types import ImageSet, Repaired
from .student import check_loss, graduate, student_of

ASCENT = 10.0  # step with which the perturbation is learned
INNER_STEP = 0.1  # step of the map whose fixed point the perturbation is taken for
PENALTY = 0.001  # on its squared length


def i_bau(
    model: nn.Module,
    clean: ImageSet,
    *,
    rounds: int = 5,
    fixed_points: int = 5,
    lr: float = 0.001,
    share: float = 0.01,
    batch_size: int = 100,
    on_step: OnStep | None = None,
    generator: torch.Generator,
) -> Repaired:
    """Learn a perturbation that fools the network on all images, then unlearn it with a gradient that knows it will answer.

    ``min over w of max over d of CE(f_w(x + d), y)``. A round goes over the images twice. First ``d`` starts at 0 and takes a
    step of size 10 along the gradient of ``CE(f(x + d), own answer) - 0.001 |d|^2`` per batch. Then for each batch the weights
    take a step of Adam along the hypergradient ``dL/dw - 0.1 * (d^2 g / dw dd) v``, where ``L`` is the loss with ``d`` on some
    of the batch's images, ``g`` is the negative of the first loss on the round's first batch with true labels, and ``v`` sums
    ``fixed_points`` terms of the Neumann series of ``(0.1 * d^2 g / dd^2)^-1 dL/dd``.

    Args:
        model: Takes images in [0, 1]; not changed. Batch-norms keep their statistics.
        clean: Labelled clean images.
        rounds: Rounds of both halves, >= 0.
        fixed_points: Terms of the series, >= 0; each costs about as much as a training step, 0 leaves out that ``d`` answers.
        lr: Learning rate of the weights, > 0.
        share: Share of each batch that gets the perturbation, in [0, 1]; at least one image.
        batch_size: Images per batch, >= 1.
        on_step: Progress.
        generator: Source of all randomness.

    Raises:
        DataError: There are no clean images.
        MethodError: An argument is out of range.
        ModelError: Training diverged.

    Differs from the authors' code in that the images are shuffled in each round, and in that batches of fewer than
    ``1 / share`` images get one perturbed image and not none. As there, perturbed images are *not* kept in [0, 1], and the
    perturbation is held back by the penalty alone and not projected onto a ball, as the paper says. It matters: with
    images kept in [0, 1] the repair leaves the backdoor in the authors' own BadNets checkpoint.
    """
    for name, value, low in (("rounds", rounds, 0), ("fixed_points", fixed_points, 0), ("lr", lr, 1e-12)):
        check_range(name, value, low, 1e6)
    check_range("share", share, 0, 1)
    check_range("batch_size", batch_size, 1, 2**31)
    student = student_of(model).eval()
    parameters = list(student.parameters())
    optimizer = torch.optim.Adam(parameters, lr=lr)
    count = count_steps(len(clean), batch_size)
    log: dict[str, float] = {}
    for done in range(rounds):
        learn, unlearn = (
            list(passes(clean, batch_size, 1, device=parameters[0].device, generator=generator)) for _ in range(2)
        )
        pattern = learn_pattern(student, learn)
        for step, (x, y) in enumerate(unlearn):
            chosen = torch.zeros(len(x), 1, 1, 1)
            chosen[torch.randperm(len(x), generator=generator)[: max(1, int(share * len(x)))]] = 1
            loss, gradients = hypergradient(student, pattern, unlearn[0], (x, y), chosen.to(x), fixed_points=fixed_points)
            check_loss(float(loss), done * count + step + 1, lr)
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient
            optimizer.step()
            log = {"loss": float(loss), "perturbation": float(pattern.norm())}
            if on_step is not None:
                on_step(done * count + step + 1, rounds * count)
    return Repaired(graduate(model, student), None, log=log)


def learn_pattern(network: nn.Module, batches: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Return the perturbation that one pass over the batches gives, ``(1, c, h, w)``."""
    pattern = torch.zeros_like(batches[0][0][:1]).requires_grad_()
    for x, _ in batches:
        with torch.no_grad():
            own = network(x).argmax(dim=1)
        [slope] = torch.autograd.grad(_adversary(network, pattern, x, own), [pattern])
        with torch.no_grad():
            pattern.sub_(ASCENT * slope)
    return pattern.detach()


def hypergradient(
    network: nn.Module,
    pattern: Tensor,
    inner: tuple[Tensor, Tensor],
    outer: tuple[Tensor, Tensor],
    chosen: Tensor,
    *,
    fixed_points: int,
) -> tuple[Tensor, Sequence[Tensor | None]]:
    """Return the loss on ``outer`` with the pattern on the chosen images, and its total gradient per parameter of ``network``.

    The pattern answers to the weights: it counts as the fixed point of gradient descent on the adversary's loss on ``inner``.
    """
    pattern = pattern.detach().requires_grad_()
    parameters = list(network.parameters())
    loss = F.cross_entropy(network(outer[0] + chosen * pattern), outer[1])
    pull, *gradients = torch.autograd.grad(loss, [pattern, *parameters], allow_unused=True)
    if fixed_points == 0:
        return loss.detach(), gradients
    with sdpa_kernel(SDPBackend.MATH):  # fused attention has no second derivative
        [slope] = torch.autograd.grad(_adversary(network, pattern, *inner), [pattern], create_graph=True)
    series = pull
    for _ in range(fixed_points - 1):
        [curved] = torch.autograd.grad(slope, [pattern], series, retain_graph=True)
        series = series - INNER_STEP * curved + pull
    answers = torch.autograd.grad(slope, parameters, series, allow_unused=True)
    return loss.detach(), [_add(g, None if a is None else -INNER_STEP * a) for g, a in zip(gradients, answers, strict=True)]


def _add(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return a + b if a is not None and b is not None else a if b is None else b


def _adversary(network: nn.Module, pattern: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Return what the perturbation minimises."""
    return PENALTY * pattern.square().sum() - F.cross_entropy(network(x + pattern), y)
