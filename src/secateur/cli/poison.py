"""``secateur poison``: put a backdoor trigger into a training set."""

from __future__ import annotations

import json
from pathlib import Path

from ..methods import get, settings
from .console import out, say
from .options import Output, RunFlags, Settings, assignments, fresh

NO_RUN_FLAGS = RunFlags()


def poison(
    data: str,
    /,
    *,
    output: Output = None,
    method: str = "badnets",
    set: Settings = None,
    limit: int | None = None,
    run_flags: RunFlags = NO_RUN_FLAGS,
) -> int:
    """Put a backdoor trigger into a training set: writes data.npz, trigger/ and card.json, never image files.

    Args:
        data: Training images: FILE.npz, FILE.npz:train, a folder of class folders, CIFAR files, Parquet.
        output: Folder to write to (default: poisoned).
        method: Name of a backdoor; see "secateur list backdoors".
        set: A setting of the method, name=value (rate, target ...); may be repeated.
        limit: Use at most this many images.
    """
    folder = fresh(output or Path("poisoned"), overwrite=run_flags.overwrite)
    row = get("backdoor", method)
    chosen = settings(row, assignments(set))
    from ..data import load_data, save_npz, save_trigger
    from ..state import generator

    images = load_data(data, limit=limit)
    result = row.load()(images, **chosen, generator=generator(run_flags.seed))
    folder.mkdir(parents=True, exist_ok=True)
    save_npz(result.data, folder / "data.npz")
    save_trigger(result.trigger, folder / "trigger")
    card = {
        "format": 1,
        "method": row.name,
        "version": row.version,
        "args": chosen,
        "seed": run_flags.seed,
        "n": len(images),
        "poisoned": int(result.poisoned.sum()),
        "source_sha256": images.sha256,
        "sha256": result.data.sha256,
    }
    text = json.dumps(card, indent=2)
    (folder / "card.json").write_text(text + "\n", "utf-8")
    if run_flags.json:
        out(text)
    if not run_flags.quiet:
        say(f"{card['poisoned']} of {card['n']} images poisoned with {row.name}; written to {folder}")
    return 0
