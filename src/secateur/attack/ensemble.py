"""APGD and AutoAttack, by the authors' own code (extra ``robust``), with its side effects kept in.

Croce, Hein, "Reliable evaluation of adversarial robustness with an ensemble of diverse parameter-free attacks", ICML 2020
(arXiv:2003.01690).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from .. import state
from ..errors import MethodError, check_choice, check_range
from .ball import Ball, Norm
from .common import attack, check_numbers
from .losses import DLR_CLASSES, Aim, Loss, together
from .network import Forward, Network, check_finite, no_gradient
from .square import search

Version = Literal["standard", "plus", "rand"]
Answers = Callable[[Tensor], Tensor]
Part = Callable[[Answers, Tensor, Tensor, int], Tensor]  # network, images, labels, seed; returns points
NORM_NAMES = {"linf": "Linf", "l2": "L2"}
TARGETS = 9
DRAWS = 20  # of a network that draws, for each gradient


def apgd(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    eps: float = 0.03137254901960784,
    norm: Norm = "linf",
    steps: int = 100,
    restarts: int = 1,
    loss: Loss = "cross-entropy",
    batch_size: int = 256,
    forward: Forward | None = None,
    generator: torch.Generator,
) -> Tensor:
    """PGD with momentum whose step size halves by itself wherever the loss stops growing.

    ``z = P(x_t + a_t * sign(g))``, ``x_{t+1} = P(x_t + 0.75 * (z - x_t) + 0.25 * (x_t - x_{t-1}))``, with ``a_0 = 2 eps``; at
    fixed checkpoints an image whose loss grew in fewer than 75 % of the steps, or not at all, goes back to its best points with
    half the step size.

    Args:
        model: Takes images in [0, 1]; left as it was.
        x: Images, float32 ``(n, c, h, w)`` in [0, 1], or uint8.
        y: True labels, int64 ``(n,)``.
        eps: Budget in units of pixels that go from 0 to 1 (8/255): in [0, 1] for linf, in [0, sqrt(c*h*w)] for l2.
        norm: Distance that the budget bounds, ``linf`` or ``l2``.
        steps: Steps from each start, >= 1.
        restarts: Random starts, >= 1; an image that is broken starts no more.
        loss: What to climb: ``cross-entropy`` or ``dlr`` (from 4 classes on).
        batch_size: Images at once, >= 1.
        forward: Called with network and images in place of the network (`bpda`).
        generator: Source of all randomness.

    Returns:
        Adversarial images, float32 in [0, 1], like ``x``, within ``eps`` of it exactly; those not broken come back as given.

    Raises:
        DataError: The images do not lie in [0, 1], or a label is not among the classes.
        MethodError: An argument is out of range, or the extra is missing.
        ModelError: The network does not take the images, answers with NaN or passes no gradient back.

    Differs from the authors' code, which it runs, in that torch's generators come back as they were, and in that the network
    is in eval mode meanwhile (there one in training mode learns the attacked images' statistics).
    """
    check_numbers(steps=steps, restarts=restarts)
    check_choice("loss", loss, ("cross-entropy", "dlr"))
    authors = _authors("apgd")
    part = _gradient(authors, eps, norm, steps=steps, restarts=restarts, loss="ce" if loss == "cross-entropy" else "dlr")

    def each(network: Network, ball: Ball, y: Tensor) -> Tensor:
        return _in_turn(network, ball, y, Aim(loss), lambda classes: [part], generator)

    passes = (steps + 1) * restarts
    return attack(
        model, x, y, each, eps=eps, norm=norm, passes=passes, batch_size=batch_size, forward=forward, generator=generator
    )  # fmt: skip


def autoattack(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    eps: float = 0.03137254901960784,
    norm: Norm = "linf",
    version: Version = "standard",
    steps: int = 100,
    queries: int = 5000,
    batch_size: int = 256,
    forward: Forward | None = None,
    generator: torch.Generator,
) -> Tensor:
    """Run the authors' attacks one after the other, each on the images that all before it have left.

    | version | attacks |
    |---|---|
    | ``standard`` | APGD on cross-entropy; APGD on the targeted DLR; targeted FAB; Square |
    | ``plus`` | with five starts APGD on cross-entropy, APGD on DLR and FAB; Square; then both targeted ones |
    | ``rand`` | APGD on cross-entropy and on DLR, each gradient the mean of 20 draws: for networks that draw |

    Targets are the ``min(9, classes - 1)`` likeliest other classes. With three classes or fewer the parts that need DLR are
    left out.

    Args:
        model: Takes images in [0, 1]; left as it was.
        x: Images, float32 ``(n, c, h, w)`` in [0, 1], or uint8.
        y: True labels, int64 ``(n,)``.
        eps: Budget in units of pixels that go from 0 to 1 (8/255): in [0, 1] for linf, in [0, sqrt(c*h*w)] for l2.
        norm: Distance that the budget bounds, ``linf`` or ``l2``.
        version: ``standard``, ``plus`` or ``rand``.
        steps: Steps of each gradient attack, >= 1; any other number than 100 is not AutoAttack as published.
        queries: Queries of Square, >= 1; any other number than 5000 is not AutoAttack as published.
        batch_size: Images at once, >= 1.
        forward: Called with network and images in place of the network (`bpda`).
        generator: Source of all randomness.

    Returns:
        Adversarial images, float32 in [0, 1], like ``x``, within ``eps`` of it exactly; those not broken come back as given.

    Raises:
        DataError: The images do not lie in [0, 1], or a label is not among the classes.
        MethodError: An argument is out of range, or the extra is missing.
        ModelError: The network does not take the images, answers with NaN or passes no gradient back.

    Differs from the authors' code, whose attacks it runs, in that torch's generators and Python's trace function stay as they
    were, in that the network is in eval mode, in that points beyond ``eps`` by a rounding are projected back before they count,
    and in that for L2 our own `square` searches images onto which theirs cannot lay its first grid (12 x 12: it crashes).
    """
    check_numbers(steps=steps)
    check_range("queries", queries, 1, 2**31)
    check_choice("version", version, ("standard", "plus", "rand"))
    authors = _authors("autoattack")

    def each(network: Network, ball: Ball, y: Tensor) -> Tensor:
        def parts(classes: int) -> list[Part]:
            return _parts(authors, version, classes, eps, norm, steps=steps, queries=queries)

        return _in_turn(network, ball, y, Aim("cross-entropy"), parts, generator)

    return attack(
        model, x, y, each, eps=eps, norm=norm, passes=steps + queries, batch_size=batch_size, forward=forward,
        generator=generator,
    )  # fmt: skip


def _in_turn(
    network: Network, ball: Ball, y: Tensor, aim: Aim, parts: Callable[[int], list[Part]], generator: torch.Generator
) -> Tensor:
    """Run attacks one after the other on what is left; only points that still break an image in the ball are taken."""
    found = ball.x.clone()
    logits = network.answers(found)
    aim.check(logits, y)
    check_finite(logits)
    rows = (~aim.reached(logits, y)).nonzero()[:, 0]
    for part in parts(logits.shape[1]):
        seed = int(torch.randint(2**62, (), generator=generator, device=generator.device))
        if not len(rows):
            break
        here = ball.subset(rows)
        try:
            made = part(lambda x: together(network(x)), here.x.clone(), y[rows], seed)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # nothing to differentiate
            raise no_gradient(error) from error
        points = here.project(made.detach())
        broken = aim.reached(network.answers(points), y[rows])
        found[rows[broken]], rows = points[broken], rows[~broken]
    return found


def _parts(
    authors: dict[str, Any], version: Version, classes: int, eps: float, norm: Norm, *, steps: int, queries: int
) -> list[Part]:
    targets, starts, draws = min(TARGETS, classes - 1), 5 if version == "plus" else 1, DRAWS if version == "rand" else 1
    common = {"eps": eps, "norm": norm, "steps": steps}
    on_entropy = _gradient(authors, **common, restarts=starts, draws=draws, loss="ce")
    on_dlr = [_gradient(authors, **common, restarts=starts, draws=draws, loss="dlr")] if classes >= DLR_CLASSES else []
    on_targets = [_targeted(authors, **common, targets=targets)] if classes >= DLR_CLASSES else []
    towards, searched = _fab(authors, **common, restarts=1, targets=targets), _square(authors, eps, norm, queries)
    match version:
        case "standard":
            return [on_entropy, *on_targets, towards, searched]
        case "plus":
            return [on_entropy, *on_dlr, _fab(authors, **common, restarts=5), searched, *on_targets, towards]
        case "rand":
            return [on_entropy, *on_dlr]


def _gradient(authors: dict[str, Any], eps: float, norm: Norm, *, steps: int, restarts: int, loss: str, draws: int = 1) -> Part:
    def run(network: Answers, x: Tensor, y: Tensor, seed: int) -> Tensor:
        part = authors["apgd"](
            network, n_iter=steps, norm=NORM_NAMES[norm], n_restarts=restarts, eps=eps, seed=seed, loss=loss, eot_iter=draws,
            device=x.device,
        )  # fmt: skip
        return cast(Tensor, part.perturb(x, y))

    return run


def _targeted(authors: dict[str, Any], *, eps: float, norm: Norm, steps: int, targets: int) -> Part:
    def run(network: Answers, x: Tensor, y: Tensor, seed: int) -> Tensor:
        part = authors["apgd-t"](
            network, n_iter=steps, norm=NORM_NAMES[norm], eps=eps, seed=seed, n_target_classes=targets, device=x.device
        )
        return cast(Tensor, part.perturb(x, y))

    return run


def _fab(authors: dict[str, Any], *, eps: float, norm: Norm, steps: int, restarts: int, targets: int | None = None) -> Part:
    def run(network: Answers, x: Tensor, y: Tensor, seed: int) -> Tensor:
        part = authors["fab"](
            network, norm=NORM_NAMES[norm], n_restarts=restarts, n_iter=steps, eps=eps, seed=seed,
            targeted=targets is not None, n_target_classes=targets, device=x.device,
        )  # fmt: skip
        return cast(Tensor, part.perturb(x, y))

    return run


def _square(authors: dict[str, Any], eps: float, norm: Norm, queries: int) -> Part:
    def run(network: Answers, x: Tensor, y: Tensor, seed: int) -> Tensor:
        if norm == "l2" and not _tiled(x.shape[2], x.shape[3]):
            draws = state.generator(seed)
            return search(network, Ball(x, eps, norm), y, Aim("margin"), queries=queries, share=0.8, generator=draws)
        part = authors["square"](
            network, norm=NORM_NAMES[norm], n_queries=queries, eps=eps, p_init=0.8, seed=seed, verbose=False, device=x.device,
            resc_schedule=False,
        )  # fmt: skip
        return cast(Tensor, part.perturb(x, y))

    return run


def _tiled(height: int, width: int) -> bool:
    """Return whether the authors' grid of tiles for L2, five to the height, lies within the images."""
    side = height // 5
    return side > 0 and (height - 5 * side) // 2 + side * max(height // side, width // side) <= min(height, width)


def _authors(method: str) -> dict[str, Any]:
    try:
        from pyautoattack.autopgd_base import APGDAttack, APGDAttack_targeted
        from pyautoattack.fab_pt import FABAttack_PT
        from pyautoattack.square import SquareAttack
    except ImportError:
        raise MethodError(f"{method} needs pyautoattack; run: pip install secateur[robust]") from None
    return {"apgd": APGDAttack, "apgd-t": APGDAttack_targeted, "fab": FABAttack_PT, "square": SquareAttack}
