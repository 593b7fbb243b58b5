"""Adversarial training: the loss of a batch at perturbed images in place of, or beside, the images as they are.

* ``pgd``: Madry, Makelov, Schmidt, Tsipras, Vladu, ICLR 2018, arXiv:1706.06083.
* ``trades``: Zhang, Yu, Jiao, Xing, El Ghaoui, Jordan, ICML 2019, arXiv:1901.08573.
* ``fast``: Wong, Rice, Kolter, "Fast is better than free", ICLR 2020, arXiv:2001.03994.
* ``free``: Shafahi, Najibi, Ghiasi, Xu, Dickerson, Studer, Davis, Taylor, Goldstein, NeurIPS 2019, arXiv:1904.12843.

`secateur.train.train` calls this for recipes that say so; there is no second training loop.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attack import pgd
from .attack.ball import Ball, check_budget, unit
from .recipe import Recipe
from .state import evaluating
from .types import ImageSet, to_float

Answer = Callable[[Tensor], Tensor]  # images in [0, 1] -> logits, float32
SMALL = 1e-3  # standard deviation of the noise that TRADES starts from
WATCHED = 128  # training images whose accuracy under PGD is watched
WATCH_STEPS = 5
FALL = 0.2  # of that accuracy, from which on it counts as catastrophic overfitting


class Adversary:
    """What adversarial training does to each batch. With ``adversarial="none"`` or ``eps=0`` it is the clean loss.

    | kind | loss of a batch | points | batch-norm while the points are sought |
    |---|---|---|---|
    | ``pgd`` | ``CE(f(x'), y)`` | steps along the gradient's sign from a random start | eval mode |
    | ``trades`` | ``CE(f(x), y) + beta * KL(f(x) || f(x'))`` | steps up the KL, from ``x + 0.001 * N(0, 1)`` | eval mode |
    | ``fast`` | ``CE(f(x'), y)`` | one step from a random start | train mode |
    | ``free`` | ``CE(f(x + d), y)``, ``replays`` times | ``d`` moves along each replay's gradient and is kept | train mode |

    Every point stays within ``eps`` of its image and in [0, 1]. The last points are taken, whether or not others fooled the
    network. For L2, a step goes along the gradient at length 1. Label smoothing is for the network, not for the attack.

    *Batch-norm.* ``trades``, ``fast`` and ``free`` follow their authors. In ``fast`` and ``free`` the running statistics see
    the forward passes of the attack too; ``free`` has no others. For ``pgd`` the authors' code attacks in train mode, later
    codes (TRADES, HARP) in eval mode: so do we, because it leaves the statistics alone and attacks the network that will be
    used.

    Differs from the authors' code: ``trades`` sends the clean batch through the network once for both of its terms (theirs
    twice, so that running statistics count it double). An epoch of ``free`` is a pass over the data in which each batch is used
    ``replays`` times, at one learning rate; theirs divide the number of epochs by ``replays``.
    """

    def __init__(self, recipe: Recipe, shape: tuple[int, int, int]) -> None:
        """Check the budget for images of this shape.

        Raises:
            MethodError: ``eps`` is larger than the largest distance of two images.
        """
        self._recipe = recipe
        self.kind = recipe.adversarial if recipe.eps > 0 else "none"
        self.replays = recipe.replays if recipe.adversarial == "free" else 1
        self._noise = torch.zeros(0, *shape) if self.kind == "free" else None
        self._shown: Tensor | None = None
        if recipe.adversarial != "none":
            check_budget(recipe.eps, recipe.norm, torch.Size(shape).numel())

    @property
    def step_size(self) -> float:
        """Length of a step."""
        given, eps = self._recipe.adversarial_step_size, self._recipe.eps
        if given is not None:
            return given
        return {"fast": 1.25 * eps, "free": eps}.get(self.kind, 2.5 * eps / self._recipe.adversarial_steps)

    def loss(self, network: nn.Module, answer: Answer, x: Tensor, y: Tensor, generator: torch.Generator) -> Tensor:
        """Return the loss of a batch, a scalar.

        Args:
            network: The network in train mode; its flags are put back.
            answer: Calls it.
            x: Images, float in [0, 1], ``(b, c, h, w)``; where they depend on something that learns, so does the loss.
            y: Labels, ``(b,)``.
            generator: Source of the starts.
        """
        smoothing = self._recipe.label_smoothing
        if self.kind == "trades":
            points = _through(x, self._divergent(network, answer, x, generator))
            clean = answer(x)
            return F.cross_entropy(clean, y, label_smoothing=smoothing) + self._recipe.beta * divergence(clean, answer(points))
        if self.kind == "pgd":
            with evaluating(network):
                points = self._climb(answer, x, y, self._recipe.adversarial_steps, generator)
            x = _through(x, points)
        elif self.kind == "fast":
            x = _through(x, self._climb(answer, x, y, 1, generator))
        elif self.kind == "free":
            x = self._show(x)
        return F.cross_entropy(answer(x), y, label_smoothing=smoothing)

    def learn(self) -> None:
        """Move the kept perturbation of ``free`` along the gradient that the backward pass of the loss has left on it."""
        if self._noise is None or self._shown is None or self._shown.grad is None:
            return
        moved = self._shown.detach() + self.step_size * self._direction(self._shown.grad)
        if self._recipe.norm == "linf":
            moved = moved.clamp(-self._recipe.eps, self._recipe.eps)
        else:
            length = moved.flatten(1).norm(dim=1).clamp_min(1e-30)
            moved = moved * (self._recipe.eps / length).clamp_max(1)[:, None, None, None]
        self._noise[: len(moved)] = moved
        self._shown = None

    def state_dict(self) -> dict[str, Tensor]:
        """Return what outlives a batch."""
        return {} if self._noise is None else {"noise": self._noise.cpu()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take up what `state_dict` returned."""
        if self._noise is not None:
            self._noise = state["noise"].clone()

    def _climb(self, answer: Answer, x: Tensor, y: Tensor, steps: int, generator: torch.Generator) -> Tensor:
        ball = Ball(x.detach(), self._recipe.eps, self._recipe.norm)
        return ascend(
            lambda points: F.cross_entropy(answer(points), y, reduction="sum"),
            ball,
            ball.draw(generator),
            steps,
            self.step_size,
        )

    def _divergent(self, network: nn.Module, answer: Answer, x: Tensor, generator: torch.Generator) -> Tensor:
        ball = Ball(x.detach(), self._recipe.eps, self._recipe.norm)
        noise = torch.randn(x.shape, generator=generator, device=generator.device).to(ball.x)
        with evaluating(network):
            with torch.no_grad():
                clean = answer(ball.x)
            return ascend(
                lambda points: divergence(clean, answer(points)) * len(clean),
                ball, ball.project(ball.x + SMALL * noise), self._recipe.adversarial_steps, self.step_size,
            )  # fmt: skip

    def _show(self, x: Tensor) -> Tensor:
        assert self._noise is not None
        missing = len(x) - len(self._noise)
        noise = self._noise.to(x.device)
        if missing > 0:  # a batch hook may return more images than came
            noise = torch.cat([noise, noise.new_zeros(missing, *x.shape[1:])])
        self._noise = noise
        self._shown = noise[: len(x)].clone().requires_grad_()
        return (x + self._shown).clamp(0, 1)

    def _direction(self, slope: Tensor) -> Tensor:
        return slope.sign() if self._recipe.norm == "linf" else unit(slope)


def divergence(clean: Tensor, perturbed: Tensor) -> Tensor:
    """Return the mean over the batch of ``KL(p || q)``, where ``p`` and ``q`` are what clean and perturbed logits stand for."""
    return F.kl_div(perturbed.log_softmax(dim=1), clean.log_softmax(dim=1), reduction="batchmean", log_target=True)


def ascend(loss: Callable[[Tensor], Tensor], ball: Ball, points: Tensor, steps: int, size: float) -> Tensor:
    """Return the points after some steps along the gradient of ``loss``, each projected into the ball."""
    for _ in range(steps):
        points = points.detach().requires_grad_()
        [slope] = torch.autograd.grad(loss(points), [points])
        points = ball.step(points.detach(), slope, size)
    return points.detach()


def _through(x: Tensor, points: Tensor) -> Tensor:
    """Return the points; what ``x`` was made by gets the gradient that they get."""
    return x + (points - x).detach() if x.requires_grad else points


class Watch:
    """Tells when ``fast`` overfits catastrophically: the network learns to beat one step and loses to several.

    After each epoch it counts the accuracy on some training images, evenly spaced over the set, under PGD of 5 steps from a
    random start, in eval mode. An accuracy of more than 0.2 below the best so far is catastrophic overfitting.

    Differs from the authors' code in that always the same 128 images are watched (theirs: the epoch's first batch, in train
    mode), and that the best epoch so far is compared, not the one before: a slow fall counts, too.
    """

    def __init__(self, data: ImageSet, recipe: Recipe) -> None:
        """Choose the images."""
        index = torch.linspace(0, len(data) - 1, min(WATCHED, len(data))).round().long()
        self._x, self._y, self._recipe = data.x[index.to(data.x.device)], data.y[index.to(data.y.device)], recipe
        self.best = 0.0

    def fallen(self, network: nn.Module, generator: torch.Generator) -> str:
        """Return a sentence when the accuracy under PGD has fallen, else an empty text; the network is left as it was."""
        x = to_float(self._x)
        found = pgd(
            network, x, self._y, eps=self._recipe.eps, norm=self._recipe.norm, steps=WATCH_STEPS, generator=generator
        )  # fmt: skip
        with evaluating(network), torch.no_grad():
            accuracy = float((network(found).argmax(dim=1) == self._y).float().mean())
        if accuracy < self.best - FALL:
            return f"accuracy under PGD on {len(x)} training images fell from {self.best:.0%} to {accuracy:.0%}"
        self.best = max(self.best, accuracy)
        return ""
