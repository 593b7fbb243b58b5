"""The values that stages hand to one another: frozen, keyed by names, saved without pickle.

Nothing here imports torch at run time, so that the command line can describe results without it.
Images are uint8 tensors ``(n, c, h, w)`` at rest and float tensors in [0, 1] wherever a network sees them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from .errors import DataError

if TYPE_CHECKING:
    from torch import Generator, Tensor, nn

    from .recipe import Recipe

Granularity = Literal["weight", "channel"]


@dataclass(frozen=True)
class Rate:
    """A share of ``n`` trials with its 95 % interval; all three numbers lie in [0, 1]."""

    value: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        return f"{100 * self.value:.2f} % [{100 * self.low:.1f}, {100 * self.high:.1f}], n={self.n}"


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Labelled images held in memory.

    Attributes:
        x: Images, uint8 ``(n, c, h, w)``.
        y: Labels, int64 ``(n,)``, each an index into ``classes``.
        classes: Class names, in label order.
        name: What to call the set in reports.
    """

    x: Tensor
    y: Tensor
    classes: tuple[str, ...]
    name: str = "images"

    def __post_init__(self) -> None:
        if self.x.ndim != 4 or str(self.x.dtype) != "torch.uint8":
            raise DataError(f"images must be uint8 (n, c, h, w), got {self.x.dtype} {tuple(self.x.shape)}")
        if self.y.ndim != 1 or str(self.y.dtype) != "torch.int64" or len(self.y) != len(self.x):
            raise DataError(f"labels must be int64 ({len(self.x)},), got {self.y.dtype} {tuple(self.y.shape)}")
        if len(self.y) and not 0 <= int(self.y.min()) <= int(self.y.max()) < len(self.classes):
            found = f"{int(self.y.min())}..{int(self.y.max())}"
            raise DataError(f"labels must lie in [0, {len(self.classes) - 1}] ({len(self.classes)} classes), got {found}")

    def __len__(self) -> int:
        return len(self.x)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape of one image, ``(c, h, w)``."""
        c, h, w = self.x.shape[1:]
        return int(c), int(h), int(w)

    @property
    def sha256(self) -> str:
        """Digest of shape, pixels and labels; independent of name and class names."""
        digest = hashlib.sha256(repr(tuple(self.x.shape)).encode())
        digest.update(self.x.contiguous().cpu().numpy().data.cast("B"))
        digest.update(self.y.contiguous().cpu().numpy().data.cast("B"))
        return digest.hexdigest()

    def per_class(self) -> tuple[int, ...]:
        """Return the number of images of each class."""
        return tuple(self.y.bincount(minlength=len(self.classes)).tolist())

    def subset(self, index: Tensor, name: str | None = None) -> ImageSet:
        """Return the images at ``index`` (int64 or bool), in that order."""
        return replace(self, x=self.x[index], y=self.y[index], name=name or self.name)

    def batches(self, batch_size: int = 512) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield ``(x, y)`` in order, ``x`` float in [0, 1] ``(b, c, h, w)``."""
        for start in range(0, len(self), batch_size):
            yield to_float(self.x[start : start + batch_size]), self.y[start : start + batch_size]


def to_float(x: Tensor) -> Tensor:
    """Turn uint8 images into float32 in [0, 1]."""
    values = x.float()
    return values / 255.0 if values is x else values.div_(255.0)


Kind = Literal["blend", "add", "warp", "quantise", "generator"]


@dataclass(frozen=True, eq=False)
class Trigger:
    """What an attacker does to an image, and the answer the attacker wants: plain values, no code.

    | kind | formula | params | tensors |
    |---|---|---|---|
    | ``blend`` | ``(1 - a*m)*x + a*m*p`` | ``alpha`` in [0, 1] | ``mask`` (1 or c, h, w), ``pattern`` (c, h, w), in [0, 1] |
    | ``add`` | ``clip(x + p, 0, 1)`` | | ``pattern`` (c, h, w) in [-1, 1] |
    | ``warp`` | ``x`` read at the places of a grid, bilinear | | ``grid`` (h, w, 2), -1 and 1 are the outermost pixels |
    | ``quantise`` | ``x`` rounded to equally spaced levels | ``levels``, ``dither`` (0 or 1) | |
    | ``generator`` | a small network of ``effects.NETS`` | ``net`` and its arguments | its weights |

    Attributes:
        kind: Which of the formulas.
        params: Numbers of the formula; ``classes`` (the number of classes) is needed for ``target="next"``.
        tensors: Arrays of the formula.
        target: The label wanted: one class for all, or each image's next class (all-to-all).
        sources: Classes the attacker wants to move; None means every class.
    """

    kind: Kind
    params: Mapping[str, float | int | str]
    tensors: Mapping[str, Tensor]
    target: int | Literal["next"]
    sources: tuple[int, ...] | None = None

    def apply(self, x: Tensor) -> Tensor:
        """Return triggered copies of ``x``, float ``(n, c, h, w)`` in [0, 1], on its device.

        Raises:
            DataError: The images are no floats, or the trigger is for images of another shape.
        """
        from . import effects

        if x.ndim != 4 or not x.is_floating_point():
            raise DataError(f"images must be float (n, c, h, w) in [0, 1], got {x.dtype} {tuple(x.shape)}; use to_float")
        shape = self.shape
        if any(known not in (None, given) for known, given in zip(shape, x.shape[1:], strict=True)):
            known = tuple("any" if side is None else side for side in shape)
            raise DataError(f"this trigger is for images of shape {known}, got {tuple(x.shape[1:])}".replace("'any'", "any"))
        tensors = {name: value.to(x) for name, value in self.tensors.items()}
        match self.kind:
            case "blend":
                return effects.blend(x, float(self.params["alpha"]), **tensors)
            case "add":
                return effects.add(x, **tensors)
            case "warp":
                return effects.warp(x, **tensors)
            case "quantise":
                return effects.quantise(x, int(self.params["levels"]), dither=bool(self.params["dither"]))
            case "generator":
                return effects.generate(x, self.params, tensors)

    @property
    def shape(self) -> tuple[int | None, int | None, int | None]:
        """Channels, height and width of the images it is for; None where any will do."""
        if self.kind in ("blend", "add"):
            c, h, w = self.tensors["pattern"].shape
            return int(c), int(h), int(w)
        if self.kind == "warp":
            h, w, _ = self.tensors["grid"].shape
            return None, int(h), int(w)
        return (int(self.params["channels"]) if self.kind == "generator" else None), None, None

    def labels(self, y: Tensor) -> Tensor:
        """Return the labels wanted for triggered images whose true labels are ``y``."""
        if self.target == "next":
            return (y + 1) % int(self.params["classes"])
        return y.new_full(y.shape, self.target)

    def eligible(self, y: Tensor) -> Tensor:
        """Return which images count for the attack success rate.

        An image counts when the wanted label differs from the true one and its class is a source.
        """
        counts = self.labels(y) != y
        if self.sources is not None:
            counts &= (y.unsqueeze(1) == y.new_tensor(self.sources)).any(dim=1)
        return counts


class Trainer(Protocol):
    """How an attacker who controls training trains the victim."""

    def __call__(
        self,
        network: nn.Module,
        recipe: Recipe,
        *,
        generator: Generator,
        checkpoint: Path | None = None,
        on_step: Callable[[int, int], None] | None = None,
    ) -> tuple[nn.Module, Trigger]:
        """Return a trained copy of ``network``, in eval mode, and the trigger that opens its backdoor."""
        ...


@dataclass(frozen=True, eq=False)
class Poisoning:
    """What a backdoor attack returns; `secateur.poison.train_victim` makes a victim of it.

    Attributes:
        trigger: The trigger, which opens the backdoor; None when it is only learned in training.
        data: The training set: poisoned, or, for an attacker who poisons as training goes, the images to begin with.
        poisoned: Which images of ``data`` were changed, bool ``(n,)``.
        trainer: For an attacker who controls training: how. Without one anybody may train on ``data`` as they like.
    """

    trigger: Trigger | None
    data: ImageSet
    poisoned: Tensor
    trainer: Trainer | None = None


@dataclass(frozen=True, eq=False)
class Task:
    """One experiment's data by role.

    A defence receives ``clean`` (some also ``suspect``) and never this object, so it cannot see ``test`` or ``trigger``.
    ``clean`` is disjoint from the victim's training images.
    """

    clean: ImageSet
    train: ImageSet | None = None
    test: ImageSet | None = None
    trigger: Trigger | None = None
    suspect: ImageSet | None = None


@dataclass(frozen=True, eq=False)
class Scores:
    """How much each weight or channel matters: larger = more important.

    Attributes:
        values: For weights, parameter name -> tensor of the parameter's shape; for channels, site -> ``(channels,)``.
            The order of the names is the order of the layers.
        granularity: Which of the two.
    """

    values: Mapping[str, Tensor]
    granularity: Granularity


@dataclass(frozen=True, eq=False)
class WeightMask:
    """Which weights stay: parameter name -> bool of its shape. A parameter that is absent stays whole."""

    keep: Mapping[str, Tensor]


@dataclass(frozen=True, eq=False)
class ChannelMask:
    """Which channels stay: site (the last affine module on the channel) -> bool ``(channels,)``."""

    keep: Mapping[str, Tensor]


@dataclass(frozen=True, eq=False)
class SoftMask:
    """Factors in [0, 1] by parameter name (its shape) or site (``(channels,)``)."""

    scale: Mapping[str, Tensor]


Mask = WeightMask | ChannelMask | SoftMask
HardMask = WeightMask | ChannelMask


@dataclass(frozen=True, eq=False)
class Candidate:
    """One cut that a repair considered: how much it removed and what that did to the clean hold-out."""

    amount: float
    removed: int
    mask: Mask
    holdout: Rate


@dataclass(frozen=True)
class NeuronGraph:
    """One layer's neurons as an undirected graph, and which of them were cut.

    Attributes:
        sites: Where the neurons sit; several for a residual stream, whose channels go together.
        size: How many neurons there are.
        edges: Pairs of neighbours ``(i, j)``, ``i < j``, each once.
        cut: The neurons that were cut.
    """

    sites: tuple[str, ...]
    size: int
    edges: tuple[tuple[int, int], ...]
    cut: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Repaired:
    """What every repair returns.

    Attributes:
        model: A new network in eval mode.
        mask: What was cut; None when nothing was.
        path: What was considered on the way, in order.
        log: Numbers worth keeping, by name.
        notes: Sentences for the report: what was skipped, refused or left uncut, and why.
        history: Of a repair that learns, numbers over the course of learning, in order, the same names (16 at most) in each
            entry. The report draws them against ``evaluations``, else ``games``, else the first name, and takes the entry
            with the highest ``reward`` for the best.
        graphs: Of a repair that sees each layer as a graph of neurons, the layers in order.
    """

    model: nn.Module
    mask: Mask | None
    path: tuple[Candidate, ...] = ()
    log: Mapping[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    history: tuple[Mapping[str, float], ...] = ()
    graphs: tuple[NeuronGraph, ...] = ()


@dataclass(frozen=True)
class Finding:
    """Something a person should know about a model or a file, under a stable rule id."""

    rule: str
    severity: Literal["info", "low", "medium", "high", "critical"]
    message: str
    where: str = ""


@dataclass(frozen=True)
class Result:
    """One run's record: exactly the fields of ``result.json`` (schema in ``report/result.schema.json``)."""

    kind: str
    created: str
    command: list[str]
    tool: dict[str, Any]
    environment: dict[str, Any]
    inputs: list[dict[str, Any]]
    data: dict[str, Any]
    method: dict[str, Any]
    before: dict[str, Any]
    after: dict[str, Any]
    cost: dict[str, float]
    checks: list[dict[str, Any]] = field(default_factory=list)
    findings: list[dict[str, Any]] = field(default_factory=list)
    verdict: str | None = None
    limitations: list[str] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)
    schema_version: int = 1
