"""Which evasion attacks a robustness figure is measured with, and what is noted of each while it runs."""

from __future__ import annotations

import inspect
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn

from ..attack import diva, mi_fgsm
from ..attack.ball import Norm
from ..attack.network import Forward
from ..errors import MethodError, ModelError, unknown
from ..measure.adversarial import Bound, answers_of, bind, logits_of, store
from ..methods import Method, get, parameters, settings
from ..prune.edits import adaptives

# Two losses, because large logits blind cross-entropy, and Square, which needs no gradient. None drops broken images: points
# that only just break one rarely survive as 8-bit files, and rates as stored would say nothing.
DEFAULT: tuple[tuple[str, Mapping[str, Any]], ...] = (
    ("pgd", {"loss": "cross-entropy", "steps": 10, "restarts": 2}),
    ("pgd", {"loss": "margin", "steps": 20}),
    ("square", {"queries": 200}),
)
GRADIENT_FREE = ("square", "random-noise")
PLAIN: Mapping[str, Forward | None] = {"": None}
OURS = ("eps", "norm", "targeted")
TRANSFER = "transfer (mi-fgsm)"
PATIENCE = 24  # failures in a row; to find one bad image among 256 takes 9


@dataclass
class Entry:
    """One attack of the list, and what was noted of it.

    Attributes:
        name: What records call it.
        bound: The attack with its settings, watched.
        row: Its row in the table of methods; None of images made on the surrogate.
        seconds: How long it ran, all its calls together.
        reasons: Why it could not run -> on how many images.
        plain: The attack as it is, not watched: it raises.
    """

    name: str
    bound: Bound
    row: Method | None = None
    seconds: float = field(default=0.0, compare=False)
    reasons: Counter[str] = field(default_factory=Counter, compare=False)
    plain: Bound = field(init=False, compare=False)

    def __post_init__(self) -> None:
        self.plain = self.bound
        self.bound = Bound(self._watched(self.bound.attack), self.bound.settings)

    @property
    def lost(self) -> int:
        """On how many images it could not run."""
        return self.reasons.total()

    @property
    def error(self) -> str:
        """Why it could not run, on most of those images; empty if it could run on all."""
        return next((reason for reason, _ in self.reasons.most_common(1)), "")

    def _watched(self, attack: Any) -> Any:
        """Return the attack, timed; images that it cannot run on it leaves alone, so that all others are still attacked."""

        @wraps(attack)
        def run(model: nn.Module, x: Tensor, y: Tensor, **given: Any) -> Tensor:
            start = time.perf_counter()
            try:
                return self._in_parts(attack, model, x, y, **given)
            finally:
                self.seconds += time.perf_counter() - start

        return run

    def _in_parts(self, attack: Any, model: nn.Module, x: Tensor, y: Tensor, **given: Any) -> Tensor:
        """Attack; where that fails each half apart, so that a batch is not lost for one image without an answer.

        After `PATIENCE` failures in a row parts are no longer halved: then hardly any image has what the attack needs.
        """
        made, failures, parts = [], 0, [(x, y)]
        while parts:
            images, labels = parts.pop(0)
            try:
                made.append(attack(model, images, labels, **given))
                failures = 0
            except ModelError as problem:
                failures += 1
                if len(images) > 1 and failures < PATIENCE:
                    parts = [*zip(images.tensor_split(2), labels.tensor_split(2), strict=True), *parts]
                else:
                    self.reasons[str(problem)] += len(images)
                    made.append(images)
        return torch.cat(made)


def chosen(
    methods: Sequence[str],
    arguments: Mapping[str, Any],
    *,
    eps: float,
    norm: Norm,
    forwards: Mapping[str, Forward | None] = PLAIN,
) -> list[Entry]:
    """Return the attacks named, or the default ones, with these settings at this budget.

    Args:
        methods: Names of evasion attacks; none for `DEFAULT`.
        arguments: ``setting`` for every attack that has it, ``method.setting`` for one.
        eps: Budget.
        norm: Distance that it bounds.
        forwards: Name -> what gradient attacks call in place of the network (`prune.adaptives`); each runs with every one.

    Raises:
        MethodError: Unknown method or setting, or one that is not an attack's own here.
    """
    rows = [(get("evasion", name), {}) for name in dict.fromkeys(methods)]
    rows = rows or [(get("evasion", name), dict(given)) for name, given in DEFAULT]
    arguments = {_spelt(name): value for name, value in arguments.items()}
    _check_names(arguments, [row for row, _ in rows])
    entries: dict[str, Entry] = {}
    for row, given in rows:
        own = {parameter.name for parameter in parameters(row)}
        common = {name: value for name, value in arguments.items() if name in own}
        special = {
            name.partition(".")[2]: value for name, value in arguments.items() if name.startswith(f"{_spelt(row.name)}.")
        }
        full = settings(row, {**given, **common, **special, "eps": eps, "norm": norm})
        for backward, forward in _needed(row, forwards).items():
            words = ", ".join(filter(None, (full.get("loss"), backward)))
            name = f"{row.name} ({words})" if words else row.name
            extra = {} if forward is None else {"forward": forward}
            entries[name] = Entry(name, bind(row.load(), **full, **extra), row)
    return list(entries.values())


def _needed(row: Method, forwards: Mapping[str, Forward | None]) -> Mapping[str, Forward | None]:
    """Return the forwards that an attack is to be run with: one where no gradient is followed, none where it takes none."""
    if "forward" not in inspect.signature(row.load()).parameters:
        return PLAIN
    return {"": next(iter(forwards.values()))} if row.name in GRADIENT_FREE else forwards


def adaptive_attack(row: Method, given: Mapping[str, Any]) -> Bound:
    """Return an attack that follows every gradient known for the network it is given (`prune.adaptives`).

    Of an image the first points are kept that break it as 8-bit files keep them, else the last.

    Args:
        row: An evasion attack.
        given: Its settings; the rest are defaults.
    """
    attack = row.load()

    @wraps(attack)
    def run(model: nn.Module, x: Tensor, y: Tensor, *, generator: torch.Generator, **given: Any) -> Tensor:
        def made(forward: Forward | None) -> Tensor:
            extra = {} if forward is None else {"forward": forward}
            return attack(model, x, y, **given, **extra, generator=generator)

        return _first(x, _needed(row, adaptives(model)).values(), made, lambda points: _answers(model, points) != y)

    bound = bind(attack, **settings(row, given)).settings
    return Bound(run, {name: value for name, value in bound.items() if name != "forward"})


def divergence_attack(original: nn.Module, given: Mapping[str, Any]) -> Bound:
    """Return `attack.diva` against what was made of ``original``, with every gradient known for the network it is given.

    Args:
        original: The network that is to stay right.
        given: Settings of `attack.diva`; the rest are defaults, but that its steps reach any budget.
    """
    own = bind(diva).settings
    reach = 2.5 * given.get("eps", own["eps"]) / given.get("steps", own["steps"])
    given = {"step_size": max(own["step_size"], reach), **given}

    @wraps(diva)
    def run(model: nn.Module, x: Tensor, y: Tensor, *, generator: torch.Generator, **given: Any) -> Tensor:
        def made(forward: Forward | None) -> Tensor:
            return diva(model, x, y, original=original, **given, forward=forward, generator=generator)

        def apart(points: Tensor) -> Tensor:
            return (_answers(original, points) == y) & (_answers(model, points) != y)

        return _first(x, adaptives(model).values(), made, apart)

    hidden = ("forward", "original")
    return Bound(run, {name: value for name, value in bind(diva, **given).settings.items() if name not in hidden})


def _first(
    x: Tensor,
    forwards: Iterable[Forward | None],
    made: Callable[[Forward | None], Tensor],
    reached: Callable[[Tensor], Tensor],
) -> Tensor:
    """Return of each image the first points that reach an aim as 8-bit files keep them, else the last."""
    found, done, original = x, torch.zeros(len(x), dtype=torch.bool, device=x.device), (x * 255).round().to(torch.uint8)
    for forward in forwards:
        points = made(forward)
        found = torch.where(done[:, None, None, None], found, points)
        done |= reached(store(original, points))
        if bool(done.all()):
            break
    return found


def _answers(model: nn.Module, points: Tensor) -> Tensor:
    """Return the class that a network, on whatever device, gives each of the images, on theirs."""
    return answers_of(logits_of(model, points, 1))


def _spelt(name: str) -> str:
    """Return a name as settings are spelt, which never have a dash."""
    return name.replace("-", "_")


def _check_names(arguments: Mapping[str, Any], rows: Sequence[Method]) -> None:
    """Raise unless each argument is a setting of some attack and one that may differ between attacks."""
    known = {parameter.name for row in rows for parameter in parameters(row)}
    special = {f"{_spelt(row.name)}.{parameter.name}" for row in rows for parameter in parameters(row)}
    for name in arguments:
        if name.rpartition(".")[2] in OURS:
            raise MethodError(f"'{name}' is the same for all attacks and no setting of one; give --eps and --norm (untargeted)")
        if name not in known | special:
            raise MethodError(unknown("setting of these attacks", name, (known | special) - {*OURS}))


def across(surrogate: nn.Module, *, eps: float, norm: Norm) -> Entry:
    """Return the attack that makes its images on another network."""

    @wraps(mi_fgsm)
    def made(model: nn.Module, x: Tensor, y: Tensor, *, generator: torch.Generator, **given: Any) -> Tensor:
        return mi_fgsm(surrogate, x, y, **given, generator=generator)

    return Entry(TRANSFER, Bound(made, bind(mi_fgsm, eps=eps, norm=norm).settings))
