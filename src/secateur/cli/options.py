"""Flags that several commands share, and how their text becomes values."""

from __future__ import annotations

import ast
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from ..errors import MethodError, SecateurError

if TYPE_CHECKING:
    from ..intake import Reading
    from ..models import Classifier

Output = Annotated[Path | None, Parameter(name=("--output", "-o"))]
Settings = Annotated[list[str] | None, Parameter(name="--set", negative=())]
Targets = Annotated[list[str] | None, Parameter(negative=())]
Flag = Annotated[bool, Parameter(negative=())]


@Parameter(name="*")
@dataclass(frozen=True)
class NetworkFlags:
    """What a network is.

    Attributes:
        arch: Architecture: a name of the zoo, timm:NAME, torchvision:NAME, or file.py:factory (runs that file).
        mean: Mean per channel that the network was trained with, e.g. 0.5,0.5,0.5.
        std: Standard deviation per channel, likewise.
        input_size: Size of the images it takes, e.g. 32 or 32x48 (height x width).
    """

    arch: str | None = None
    mean: str | None = None
    std: str | None = None
    input_size: str | None = None


@Parameter(name="*")
@dataclass(frozen=True)
class ModelFlags(NetworkFlags):
    """What a checkpoint may not say of itself, and what may be done to read it.

    Attributes:
        classes: Class names in label order: cat,dog,... or a text file with one per line.
        force: Take the weights of a file that names dangerous objects or has wrong checksums; nothing of it is run.
        sandbox: Run a file that is a program in a sandbox, once, to take its weights.
        trust_code: Run such a file here, without a fence.
    """

    classes: str | None = None
    force: Flag = False
    sandbox: Flag = False
    trust_code: Flag = False

    def look(self, path: Path) -> Reading:
        """Read the file at ``path`` and refuse it if it must be; torch is not needed for that."""
        from ..intake.reading import admit, read

        reading = read(path)
        if not (self.sandbox or self.trust_code):
            admit(reading, force=self.force)
        return reading

    def load(self, reading: Reading) -> Classifier:
        """Return the network that was read as these flags describe it."""
        from ..intake import load

        return load(
            reading,
            arch=self.arch,
            mean=numbers("mean", self.mean),
            std=numbers("std", self.std),
            input_size=sides(self.input_size),
            classes=class_names(self.classes),
            force=self.force,
            sandbox=self.sandbox,
            trust_code=self.trust_code,
        )


@Parameter(name="*")
@dataclass(frozen=True)
class RunFlags:
    """How to run.

    Attributes:
        seed: Seed of all randomness.
        device: auto, cpu or cuda:N.
        threads: CPU threads for torch (torch decides by default).
        overwrite: Write into an output folder that is not empty.
        json: Print the result as JSON on stdout.
        quiet: Say nothing while working.
        no_progress: Show no progress.
    """

    seed: int = 0
    device: str = "auto"
    threads: int | None = None
    overwrite: Flag = False
    json: Flag = False
    quiet: Annotated[bool, Parameter(name=("--quiet", "-q"), negative=())] = False
    no_progress: Flag = False

    @property
    def progress(self) -> bool:
        """Whether to show progress."""
        return not (self.quiet or self.no_progress)

    def set_up(self) -> str:
        """Set torch's threads and return the device to use."""
        import torch

        if not -(2**63) <= self.seed < 2**63:
            raise MethodError(f"--seed must lie in [-2^63, 2^63), got {self.seed}")
        if self.threads is not None:
            if self.threads < 1:
                raise MethodError(f"--threads must be at least 1, got {self.threads}")
            torch.set_num_threads(self.threads)
        if self.device == "auto":
            return "cuda:0" if torch.cuda.is_available() else "cpu"
        try:
            device = torch.device(self.device)
        except RuntimeError as error:
            raise MethodError(f"--device must be auto, cpu or cuda:N, got '{self.device}'") from error
        if device.type not in ("cpu", "cuda") or (device.type == "cuda" and not torch.cuda.is_available()):
            raise MethodError(f"--device must be auto, cpu or cuda:N with a CUDA device present, got '{self.device}'")
        return self.device


def numbers(name: str, text: str | None) -> tuple[float, ...] | None:
    """Read numbers or fractions separated by commas: ``0.5,0.5,0.5`` or ``125/255,123/255,114/255``."""
    if text is None:
        return None
    try:
        parts = [part.partition("/") for part in text.split(",")]
        return tuple(float(top) / float(bottom or 1) for top, _, bottom in parts)
    except (ValueError, ZeroDivisionError) as error:
        raise MethodError(f"--{name} must be numbers separated by commas, got '{text}'") from error


def budget(flag: str, text: str) -> float:
    """Read a number above 0, ``0.03`` or ``8/255``."""
    top, slash, bottom = text.partition("/")
    try:
        value = float(top) / float(bottom) if slash else float(top)
    except (ValueError, ZeroDivisionError):
        value = math.nan
    if not 0 < value < math.inf:
        raise MethodError(f"{flag} must be a number above 0, like 8/255 or 0.03, got '{text}'")
    return value


def class_names(text: str | None) -> tuple[str, ...] | None:
    """Read ``cat,dog``, or the lines of the text file that ``text`` names."""
    if text is None:
        return None
    try:
        lines = Path(text).read_text("utf-8").splitlines() if Path(text).is_file() else text.split(",")
    except (OSError, UnicodeDecodeError) as error:
        raise MethodError(f"--classes must be names separated by commas or a text file, and '{text}' cannot be read") from error
    return tuple(name.strip() for name in lines if name.strip())


def sides(text: str | None) -> tuple[int, int] | None:
    """Read ``32`` or ``32x48`` (height x width)."""
    if text is None:
        return None
    try:
        height, _, width = text.partition("x")
        size = int(height), int(width or height)
    except ValueError as error:
        raise MethodError(f"--input-size must be like 32 or 32x48, got '{text}'") from error
    if min(size) < 1:
        raise MethodError(f"--input-size must be at least 1, got '{text}'")
    return size


def assignments(texts: Sequence[str] | None, flag: str = "--set") -> dict[str, Any]:
    """Read ``name=value`` pairs; values are Python literals, or else plain words."""
    found: dict[str, Any] = {}
    for text in texts or ():
        name, equals, value = text.partition("=")
        if not equals or not name.strip():
            raise MethodError(f"{flag} must be name=value, got '{text}'")
        found[name.strip().replace("-", "_")] = literal(value.strip())
    return found


def literal(text: str) -> Any:
    """Return the Python literal that ``text`` spells (``true`` and ``false`` as in a plan, too), or the text itself."""
    try:
        return ast.literal_eval({"true": "True", "false": "False"}.get(text, text))
    except (ValueError, SyntaxError):
        return text


def fresh(folder: Path, *, overwrite: bool) -> Path:
    """Return ``folder`` if it may be written to: absent, empty, or ``overwrite``."""
    if folder.is_file():
        raise SecateurError(f"the output '{folder}' is a file; name a folder")
    if folder.exists() and any(folder.iterdir()) and not overwrite:
        raise SecateurError(f"the output folder '{folder}' is not empty; use --overwrite or another folder")
    return folder
