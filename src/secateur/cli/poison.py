"""``secateur poison``: put a backdoor trigger into a training set, or show what triggers look like."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from ..errors import InconclusiveError, MethodError, SecateurError
from ..methods import Method, get, settings, table
from .console import out, progress, say
from .options import Output, RunFlags, Settings, assignments, fresh

if TYPE_CHECKING:
    from torch import Tensor

    from ..types import ImageSet, Poisoning, Trigger

NO_RUN_FLAGS = RunFlags()
Names = Annotated[list[str] | None, Parameter(name="--method", negative=())]
Folders = Annotated[list[Path] | None, Parameter(name="--trigger", negative=())]
USUAL = "badnets"
SHARES = ("rate", "cover_rate", "negatives")
SAMPLE = 2000  # images on which every attack of the table is tried, to show its trigger
SEEN = 500  # images of which the numbers beside the pictures are means
PART = 64  # images that get a trigger at once


def poison(
    data: str,
    /,
    *,
    output: Output = None,
    method: Names = None,
    set: Settings = None,
    preview: Path | None = None,
    trigger: Folders = None,
    limit: int | None = None,
    run_flags: RunFlags = NO_RUN_FLAGS,
) -> int:
    """Put a backdoor trigger into a training set: writes data.npz, trigger/ and card.json, never image files.

    Args:
        data: Training images: FILE.npz, FILE.npz:train, a folder of class folders, CIFAR files, Parquet.
        output: Folder to write to (default: poisoned).
        method: Name of a backdoor (default: badnets); see "secateur list backdoors". May be repeated for --preview alone.
        set: A setting of the method, name=value (rate, target ...); may be repeated.
        preview: PNG file for a picture of images without and with the trigger of the method, or, without --method and -o, of
            all methods that have one before training. Nothing else is written unless -o is given.
        trigger: Folder of a trigger to show as well, for instance of a trained victim; may be repeated.
        limit: Use at most this many images.
    """
    writes = output is not None or preview is None
    rows = [get("backdoor", name) for name in method or ([USUAL] if writes else [])]
    if writes and len(rows) > 1:
        raise MethodError(f"only one --method can be written, got {len(rows)}; leave out -o to see several with --preview")
    if set and len(rows) != 1:
        raise MethodError(f"--set needs exactly one --method, got {len(rows)}")
    if trigger and preview is None:
        raise MethodError("--trigger adds to a picture; name its file with --preview FILE.png")
    arguments = [settings(row, assignments(set)) for row in rows]
    if not writes:
        arguments = [_nobody(given) for given in arguments]
    folder = fresh(output or Path("poisoned"), overwrite=run_flags.overwrite) if writes else None
    if folder and rows[0].access == "training":
        raise _controls(rows[0])
    if preview:
        _check(preview, overwrite=run_flags.overwrite)
    from ..data import load_data, load_trigger

    images = load_data(data, limit=limit)
    given_ones = [(_name(place), load_trigger(place)) for place in trigger or ()]
    found = [(row, _run(row, given, images, run_flags.seed)) for row, given in zip(rows, arguments, strict=True)]
    text = ""
    if folder:
        text = _write(folder, rows[0], arguments[0], images, found[0][1], run_flags)
    if preview:
        shown = [(row.name, _before(row, result)) for row, result in found] if rows else _all(images, run_flags)
        shown += given_ones
        numbers = _draw(shown, images, preview)
        text = text or json.dumps(numbers, indent=2)
        if not run_flags.quiet:
            say(f"picture of {len(shown)} attack{'s' * (len(shown) > 1)} written to {preview}")
    if run_flags.json:
        out(text)
    return 0


def _nobody(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings that poison no image: all that a picture of the trigger needs, however few images there are."""
    return {**given, **{name: 0.0 for name in SHARES if name in given}}


def _run(row: Method, given: Mapping[str, Any], images: ImageSet, seed: int) -> Poisoning:
    from ..state import generator

    return row.load()(images, **given, generator=generator(seed))


def _write(
    folder: Path, row: Method, given: Mapping[str, Any], images: ImageSet, result: Poisoning, run_flags: RunFlags
) -> str:
    """Write the poisoned set, the trigger and the card; return the card's text."""
    from ..data import save_npz, save_trigger

    if result.trainer is not None or result.trigger is None:
        raise _controls(row)
    folder.mkdir(parents=True, exist_ok=True)
    save_npz(result.data, folder / "data.npz")
    save_trigger(result.trigger, folder / "trigger")
    card = {
        "format": 1,
        "method": row.name,
        "version": row.version,
        "args": given,
        "seed": run_flags.seed,
        "n": len(images),
        "poisoned": int(result.poisoned.sum()),
        "source_sha256": images.sha256,
        "sha256": result.data.sha256,
    }
    text = json.dumps(card, indent=2)
    (folder / "card.json").write_text(text + "\n", "utf-8")
    if not run_flags.quiet:
        say(f"{card['poisoned']} of {card['n']} images changed by {row.name}; written to {folder}")
    return text


def _controls(row: Method) -> MethodError:
    return MethodError(f"'{row.name}' controls training: there is no set to write; use secateur train --backdoor {row.name}")


def _before(row: Method, result: Poisoning) -> Trigger:
    """Return the trigger that an attack has before any training."""
    if result.trigger is None:
        how = f"secateur train --backdoor {row.name}, then show it with --trigger"
        raise MethodError(f"'{row.name}' learns its trigger in training: there is nothing to show yet; use {how}")
    return result.trigger


def _check(picture: Path, *, overwrite: bool) -> None:
    """Raise an error if the picture may not be written."""
    if picture.suffix.lower() != ".png":
        raise SecateurError(f"--preview must name a file that ends in .png, got '{picture}'")
    if picture.is_dir():
        raise SecateurError(f"the picture '{picture}' is a folder; name a file")
    if picture.exists() and not overwrite:
        raise SecateurError(f"the picture '{picture}' is there already; use --overwrite or another name")


def _all(images: ImageSet, run_flags: RunFlags) -> list[tuple[str, Trigger]]:
    """Return the triggers of all attacks that have one before training; what cannot attack such images is left out."""
    import torch

    sample = images.subset(torch.arange(0, len(images), max(1, len(images) // SAMPLE)))
    found = []
    rows = table("backdoor")
    with progress("attacks", show=run_flags.progress) as on_step:
        for i, row in enumerate(rows):
            on_step(i, len(rows))
            try:
                result = _run(row, _nobody(settings(row, {})), sample, run_flags.seed)
            except SecateurError as error:
                if not run_flags.quiet:
                    say(f"{row.name} is left out: {error}")
                continue
            if result.trigger is not None:
                found.append((row.name, result.trigger))
            elif not run_flags.quiet:
                say(f"{row.name} is left out: it learns its trigger in training; show it with --trigger")
    return found


def _name(folder: Path) -> str:
    """Return what to call the trigger in a folder: the folder's name, or that of the folder around ``trigger``."""
    folder = folder.resolve()
    return folder.parent.name if folder.name == "trigger" else folder.name


def _draw(shown: Sequence[tuple[str, Trigger]], images: ImageSet, picture: Path) -> list[dict[str, Any]]:
    """Write the picture, of the same images for all attacks if any suit all; return the numbers in it."""
    import torch

    from ..measure.visibility import compare
    from ..poison.preview import sheet
    from ..types import to_float

    if not shown:
        raise InconclusiveError("no attack has a trigger for these images before training; name one with --method to see why")
    eligible = [trigger.eligible(images.y) for _, trigger in shown]
    common = torch.stack(eligible).all(dim=0)
    rows = []
    for (name, trigger), own in zip(shown, eligible, strict=True):
        if not own.any():
            raise InconclusiveError(
                f"no image is eligible for the trigger of {name}: all belong to its target or to no source class"
            )
        clean = to_float(images.x[_in_turns(images.y, common if common.any() else own)])
        with torch.inference_mode():
            rows.append((name, clean, torch.cat([trigger.apply(part) for part in clean.split(PART)])))
    page = sheet(rows)
    picture.parent.mkdir(parents=True, exist_ok=True)
    page.save(picture, "PNG", optimize=True)
    return [{"name": name, **asdict(compare(clean, poisoned))} for name, clean, poisoned in rows]


def _in_turns(y: Tensor, eligible: Tensor) -> Tensor:
    """Return the indices of at most `SEEN` eligible images, one of each class in turn."""
    import torch

    index = eligible.nonzero().flatten()
    index = index[y[index].argsort(stable=True)]
    counts = y[index].bincount()
    place = torch.arange(len(index)) - (counts.cumsum(0) - counts)[y[index]]
    return index[place.argsort(stable=True)][:SEEN]
