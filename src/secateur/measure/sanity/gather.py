"""Gathering the evidence: forwards, gradients and attacks, each computed once."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from ... import state
from ...attack import fgsm, mi_fgsm, random_noise, square
from ...attack.losses import Aim, Loss, margin
from ...attack.network import Network, opened
from ...data.splits import count_shared
from ...errors import ModelError
from ...types import ImageSet, to_float
from ..adversarial import Attack, ThreatModel, answers_of, bind, craft, described, logits_of
from .evidence import WHITE, Evidence, Run, Settings, Slopes

FORWARDS = 5
PROBED = 64  # images for the checks that repeat forwards
STEP = 2.5e-4  # of the finite difference, in pixel units: a sixteenth of a grey level


def gather(
    model: nn.Module,
    data: ImageSet,
    rows: Tensor,
    settings: Settings,
    *,
    attacks: Mapping[str, Attack],
    surrogate: nn.Module | None,
    train: ImageSet | None,
    on_step: Callable[[int, int], None] | None,
) -> Evidence:
    """Compute everything that the checks judge; ``rows`` are the places of the images among those given."""
    training, classes = sum(module.training for module in model.modules()), len(data.classes)
    steps = len(WHITE) + 2 + (surrogate is not None) + len(attacks) + len(sweep_of(settings))
    with state.seeded(state.generator(settings.seed)):
        logits = logits_of(model, data.x, classes, batch_size=settings.batch_size)
        spread, together = spreads(model, data.x[:PROBED], classes)
        runner = Runner(model, data, logits, settings, steps, on_step)
        slopes = gradients(model, data.subset(runner.right) if bool(runner.right.any()) else data, settings)
        runs, sweep = attacked(runner, attacks, surrogate)
        return Evidence(
            settings=settings,
            data=data,
            rows=rows,
            training=training,
            logits=logits,
            margin=runner.margin,
            spread=spread,
            together=together,
            draws=draws(model, data, settings),
            slopes=slopes,
            runs=runs,
            sweep=sweep,
            given=tuple(attacks),
            budgets=runner.budgets,
            shared=None if train is None else count_shared(data, train),
        )


def spreads(model: nn.Module, x: Tensor, classes: int) -> tuple[float, float]:
    """Return how much answers differ over five forwards, and between images in a batch and one by one."""
    first = logits_of(model, x, classes)
    scale = max(1e-12, float(first.abs().nan_to_num(0, 0, 0).amax()))
    again = [logits_of(model, x, classes) for _ in range(FORWARDS - 1)]
    few, spread = slice(0, 8), max(_off(other, first) for other in again) / scale
    try:
        alone = torch.cat([logits_of(model, image[None], classes) for image in x[few]])
    except ModelError:  # batch norm in training mode takes no image alone
        return spread, math.inf
    return spread, _off(alone, first[few]) / scale


def _off(other: Tensor, first: Tensor) -> float:
    return float((other - first).abs().nan_to_num(0, 0, 0).amax())


def slopes_of(network: Network, x: Tensor, y: Tensor, loss: Loss, generator: torch.Generator) -> Slopes:
    """Return the gradient's usefulness on one batch, and what a finite difference along its sign says."""
    aim, inputs = Aim(loss), x.clone().requires_grad_()
    value = aim.value(network(inputs), y)
    try:
        [found] = torch.autograd.grad(value.sum(), [inputs], allow_unused=True) if value.requires_grad else [None]
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:  # an operation without a derivative
        found = None
    slope = torch.zeros_like(x) if found is None else found
    unusable = ~(slope.isfinite().flatten(1).all(dim=1) & (slope != 0).flatten(1).any(dim=1))
    chance = torch.rand(x.shape, generator=generator, device=generator.device).sub_(0.5).to(x)
    slope = slope.nan_to_num(0, 0, 0)
    direction = torch.where(unusable[:, None, None, None], chance, slope).sign()
    ends = [(x + sign * STEP * direction).clamp(0, 1) for sign in (1, -1)]  # networks may clip: a step from the border is half
    rises = (slope.double() * (ends[0].double() - ends[1].double())).flatten(1).sum(dim=1) / (2 * STEP)
    ahead, behind = (aim.value(network.answers(end), y).double() for end in ends)
    return Slopes(found is None, unusable, rises, (ahead - behind) / (2 * STEP))


def gradients(model: nn.Module, data: ImageSet, settings: Settings) -> dict[Loss, Slopes]:
    """Return the gradients under cross-entropy and under the margin."""
    device = next((parameter.device for parameter in model.parameters()), data.x.device)
    found: dict[Loss, list[Slopes]] = {"cross-entropy": [], "margin": []}
    draw = state.generator(settings.seed)
    with opened(model, to_float(data.x[:1]).to(device), forward=settings.forward, passes=1, generator=draw) as network:
        for x, y in data.batches(state.batch_size(settings.batch_size)):
            for loss, parts in found.items():
                parts.append(slopes_of(network, x.to(device), y.to(device), loss, draw))
    return {loss: _joined(parts) for loss, parts in found.items()}


def _joined(parts: list[Slopes]) -> Slopes:
    columns = (torch.cat([getattr(part, name) for part in parts]).cpu() for name in ("unusable", "rises", "measured"))
    return Slopes(any(part.missing for part in parts), *columns)


class Runner:
    """Runs attacks on the images that are right when clean, or on others, and counts progress."""

    def __init__(
        self,
        model: nn.Module,
        data: ImageSet,
        logits: Tensor,
        settings: Settings,
        steps: int,
        on_step: Callable[[int, int], None] | None,
    ) -> None:
        self.model, self.data, self.settings, self.steps, self.on_step = model, data, settings, steps, on_step
        self.clean = answers_of(logits)
        self.right = self.clean == data.y
        self.margin = margin(logits, data.y).nan_to_num(torch.inf)
        self.budgets: dict[str, str] = {}

    def run(self, name: str, attack: Attack, *, on: Tensor | None = None, eps: float | None = None,
            surrogate: nn.Module | None = None) -> Run:  # fmt: skip
        """Run one attack, made on a surrogate if one is given; one that gets no gradient or no answers says so."""
        tried = self.right if on is None else on
        threat = self.settings.threat if eps is None else ThreatModel(eps, self.settings.threat.norm)
        self.budgets[name] = described(attack)
        broken, stored, righted, reached = (torch.zeros(len(self.data), dtype=torch.bool) for _ in range(4))
        margins, far, outside, error = self.margin.clone(), 0.0, 0.0, ""
        draw = state.generator(self.settings.seed)
        try:
            for rows in tried.nonzero()[:, 0].split(state.batch_size(self.settings.batch_size)):
                if not len(rows):
                    continue
                x, y = self.data.x[rows], self.data.y[rows]
                made = craft(attack, self.model if surrogate is None else surrogate, x, y, threat, draw)
                logits = logits_of(self.model, made.returned, len(self.data.classes))
                reached[rows] = answers_of(logits) != y
                stored[rows] = answers_of(logits_of(self.model, made.stored, len(self.data.classes))) != y
                margins[rows] = margin(logits, y).nan_to_num(torch.inf)
                far, outside = max(far, float(made.distance.max())), max(outside, float(made.outside.max()))
        except ModelError as problem:
            error = str(problem)
        broken, stored, righted = self.right & reached, self.right & stored, ~self.right & tried & ~reached
        margins = margins.masked_fill(broken, torch.inf)
        settings = getattr(attack, "settings", {})
        if self.on_step is not None:
            self.on_step(len(self.budgets), self.steps)
        return Run(name, tried, broken, stored, margins, righted & (not error), far, outside, settings, error)


def attacked(
    runner: Runner, attacks: Mapping[str, Attack], surrogate: nn.Module | None
) -> tuple[dict[str, Run], dict[float, Run]]:
    """Run our attacks at the budget, those given, and PGD at other budgets."""
    s, right = runner.settings, runner.right
    eps, common = s.threat.eps, {"eps": s.threat.eps, "norm": s.threat.norm, "batch_size": s.batch_size}
    plan = (
        bind(fgsm, **common, forward=s.forward),
        s.pgd(eps, steps=1, step_size=eps),
        s.pgd(eps, drop_broken=False),
        s.pgd(eps, loss="margin"),
        s.pgd(eps, steps=2 * s.steps),
    )
    runs = {name: runner.run(name, attack) for name, attack in zip(WHITE, plan, strict=True)}
    left = right & ~torch.stack([run.broken for run in runs.values()]).any(dim=0)
    runs["random noise"] = runner.run("random noise", bind(random_noise, **common))
    runs["square"] = runner.run("square", bind(square, **common, queries=s.queries), on=left)
    if surrogate is not None:
        runs["transfer"] = runner.run("transfer", bind(mi_fgsm, **common, steps=s.steps), on=left, surrogate=surrogate)
    everything = torch.ones_like(right)
    runs |= {name: runner.run(name, attack, on=everything) for name, attack in attacks.items()}
    budgets = sweep_of(s)
    return runs, {value: runner.run(f"pgd, eps={value:.4g}", s.pgd(value), eps=value) for value in budgets}


def sweep_of(settings: Settings) -> tuple[float, ...]:
    """Return the other budgets that PGD is run at: half, twice, and all that is needed."""
    eps, far = settings.threat.eps, settings.far
    return tuple(value for value in sorted({eps / 2, min(2 * eps, far), far}) if value != eps)


def draws(model: nn.Module, data: ImageSet, settings: Settings) -> bool:
    """Return whether the forward given answers with several draws, as `eot` does."""
    if settings.forward is None:
        return False
    device = next((parameter.device for parameter in model.parameters()), data.x.device)
    few = to_float(data.x[:2]).to(device)  # two: some networks take no image alone
    with state.evaluating(model), torch.no_grad():
        return Network(model, settings.forward, torch.contiguous_format)(few).ndim == 3
