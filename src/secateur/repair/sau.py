"""SAU, shared adversarial unlearning: unlearn the adversarial examples that the backdoored network and its copy share.

Wei, Zhang, Zha, Wu, "Shared Adversarial Unlearning: Backdoor Mitigation by Unlearning Shared Adversarial Examples",
NeurIPS 2023 (arXiv:2307.10562).
"""

from __future__ import annotations

from copy import deepcopy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data import count_steps, passes
from ..errors import check_range
from ..train import OnStep
from ..types import ImageSet, Repaired
from .student import check_loss, graduate, student_of

ADVERSARIAL = 0.01  # weight of fooling both networks, against 1 for fooling them alike
SMALLEST = 1e-8  # probability


def sau(
    model: nn.Module,
    clean: ImageSet,
    *,
    epochs: int = 100,
    lr: float = 1e-4,
    eps: float = 0.2,
    steps: int = 5,
    shared: float = 1.0,
    batch_size: int = 256,
    on_step: OnStep | None = None,
    generator: torch.Generator,
) -> Repaired:
    """Find examples that fool the network and its frozen copy into the same class; train the network not to follow the copy.

    For each batch, noise of at most ``eps`` per pixel minimises ``JS(p, q) - 0.01 * (CE(p, y) + CE(q, y)) / 2``, where ``p``
    and ``q`` are the answers of network and copy to the noisy image: signed steps of size ``eps`` from the upper corner,
    without the images and terms that have reached their aim. Then a step of Adam descends
    ``CE(f(x), y) - shared * log(1 - p_t)``, the second term over the images on which the noise fools the copy; ``t`` is the
    class that the copy answers.

    Args:
        model: Takes images in [0, 1]; not changed. Batch-norms keep their statistics.
        clean: Labelled clean images.
        epochs: Passes over them, >= 0.
        lr: Learning rate, > 0.
        eps: Largest change of a pixel, in [0, 1].
        steps: Of the noise, >= 1; each goes through both networks and back.
        shared: Weight of the unlearning, >= 0.
        batch_size: Images per batch, >= 1.
        on_step: Progress.
        generator: Source of all randomness.

    Raises:
        DataError: There are no clean images.
        MethodError: An argument is out of range.
        ModelError: Training diverged.

    Differs from the authors' code in that noisy images are clipped to [0, 1] and the copy's answers to the images, which do not
    change, are computed once per batch.
    """
    for name, value, low, high in (("lr", lr, 1e-12, 1e6), ("eps", eps, 0, 1), ("shared", shared, 0, 1e6)):
        check_range(name, value, low, high)
    for name, count, low in (("epochs", epochs, 0), ("steps", steps, 1), ("batch_size", batch_size, 1)):
        check_range(name, count, low, 2**31)
    student = student_of(model).eval()
    copy = deepcopy(student).requires_grad_(False)
    optimizer = torch.optim.Adam(student.parameters(), lr=lr)
    total = epochs * count_steps(len(clean), batch_size)
    device = next(student.parameters()).device
    log: dict[str, float] = {}
    batches = passes(clean, batch_size, epochs, device=device, generator=generator)
    for step, (x, y) in enumerate(batches):
        with torch.no_grad():
            answers = copy(x).argmax(dim=1)
        noisy = shared_noise(student, copy, x, y, answers, eps=eps, steps=steps)
        loss, fooled = unlearning_loss(student, copy, x, noisy, y, answers, shared=shared)
        check_loss(float(loss.detach()), step + 1, lr)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        log = {"loss": float(loss.detach()), "copy_fooled": fooled}
        if on_step is not None:
            on_step(step + 1, total)
    return Repaired(graduate(model, student), None, log=log)


def shared_noise(
    network: nn.Module, copy: nn.Module, x: Tensor, y: Tensor, others: Tensor, *, eps: float, steps: int
) -> Tensor:
    """Return noisy versions of ``x``, in [0, 1], that fool both networks into the same class where such are found.

    ``others`` are the copy's answers to ``x``.
    """
    with torch.no_grad():
        own = network(x).argmax(dim=1)
    noise = torch.full_like(x, eps)
    for _ in range(steps):
        noise.requires_grad_()
        noisy = (x + noise).clamp(0, 1)
        mine, theirs = network(noisy), copy(noisy)
        loss, done = adversarial_loss(mine, theirs, own, others, y)
        if done:
            break
        [slope] = torch.autograd.grad(loss, [noise])
        with torch.no_grad():
            noise = (noise - eps * slope.sign()).clamp(-eps, eps)
    return (x + noise.detach()).clamp(0, 1)


def adversarial_loss(mine: Tensor, theirs: Tensor, own: Tensor, others: Tensor, y: Tensor) -> tuple[Tensor, bool]:
    """Return what the noise minimises, and whether every image already fools both networks alike.

    Args:
        mine: Logits of the network for noisy images, ``(b, classes)``.
        theirs: Those of its copy.
        own: The network's answers to the images without noise, ``(b,)``.
        others: Those of its copy.
        y: Labels.
    """
    first, second = mine.argmax(dim=1), theirs.argmax(dim=1)
    fooled, copy_fooled = first != own, second != others
    alike = fooled & copy_fooled & (first == second)
    entropy = F.cross_entropy(mine, y, reduction="none") * ~fooled + F.cross_entropy(theirs, y, reduction="none") * ~copy_fooled
    p, q = (logits.softmax(dim=1).clamp(min=SMALLEST) for logits in (mine, theirs))
    middle = ((p + q) / 2).log()
    divergence = (p * (p.log() - middle) + q * (q.log() - middle)).sum(dim=1) / 2
    return (divergence * ~alike).mean() - ADVERSARIAL * entropy.mean() / 2, bool(alike.all())


def unlearning_loss(
    network: nn.Module, copy: nn.Module, x: Tensor, noisy: Tensor, y: Tensor, others: Tensor, *, shared: float
) -> tuple[Tensor, float]:
    """Return the loss of the network, and the share of images on which the noise fools its copy."""
    with torch.no_grad():
        after = copy(noisy).argmax(dim=1)
    fooled = (after != y) & (after != others)
    logits, noisy_logits = network(torch.cat([x, noisy])).split(len(x))
    followed = noisy_logits.softmax(dim=1).gather(1, after[:, None]).squeeze(1)
    escape = -(1 + 1e-6 - followed.clamp(min=0.001)).log()
    return F.cross_entropy(logits, y) + shared * (escape * fooled).mean(), float(fooled.float().mean())
