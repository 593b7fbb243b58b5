"""``secateur train``: train a network of the zoo or of one's own, for instance a victim on poisoned images."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from ..errors import MethodError
from ..methods import get, settings
from ..recipe import Recipe, read_recipe
from .console import progress, say
from .files import run_folder, write_result
from .options import NetworkFlags, Output, RunFlags, Settings, assignments, fresh, numbers, sides
from .repair import show

NO_NETWORK_FLAGS = NetworkFlags()
NO_RUN_FLAGS = RunFlags()
Poison = Annotated[list[str] | None, Parameter(name="--poison", negative=())]
NOT_A_RECIPE = "width", "depth", "option"


def train(
    data: str,
    /,
    *,
    output: Output = None,
    set: Settings = None,
    test: str | None = None,
    trigger: Path | None = None,
    backdoor: str | None = None,
    poison: Poison = None,
    checkpoint: Path | None = None,
    limit: int | None = None,
    network: NetworkFlags = NO_NETWORK_FLAGS,
    run_flags: RunFlags = NO_RUN_FLAGS,
) -> int:
    """Train a network of the zoo, or one that file.py:make builds, and write it as a bundle.

    Args:
        data: Training images: FILE.npz, FILE.npz:train, a folder of class folders, CIFAR files, Parquet.
        output: Folder to write to (default: secateur-runs/...).
        set: Part of the recipe (epochs=15, lr=0.1, schedule=cosine, augment=crop+flip, adversarial=pgd, eps=8/255 ...) or of
            the architecture (width=8).
        test: Labelled images to measure on; without them the training images are used, and the record says so.
        trigger: Folder of the trigger of images that are poisoned already: attack success is then measured as well.
        backdoor: Name of a backdoor to put in while training; see "secateur list backdoors".
        poison: A setting of the backdoor, name=value (rate, target ...); may be repeated.
        checkpoint: File to resume from after a kill; written after every epoch.
        limit: Use at most this many images.
    """
    folder = fresh(output, overwrite=run_flags.overwrite) if output else None
    if backdoor:
        settings(get("backdoor", backdoor), assignments(poison, "--poison"))
    elif poison:
        raise MethodError("--poison sets a backdoor; name one with --backdoor")
    recipe, kwargs = _split(assignments(set))
    if network.arch is None:
        raise MethodError("train needs --arch with a name of the zoo, e.g. --arch resnet20, or with file.py:make")
    from .. import runs
    from ..data import load_data, load_trigger, save_trigger
    from ..models import save

    device = run_flags.set_up()
    size = sides(network.input_size)
    images = load_data(data, size=size, limit=limit)
    with progress("training", show=run_flags.progress) as on_step:
        run = runs.train(
            images,
            arch=network.arch,
            kwargs=kwargs,
            recipe=recipe,
            mean=numbers("mean", network.mean),
            std=numbers("std", network.std),
            test=load_data(test, size=size) if test else None,
            trigger=load_trigger(trigger) if trigger else None,
            backdoor=backdoor,
            backdoor_settings=assignments(poison, "--poison"),
            seed=run_flags.seed,
            device=device,
            checkpoint=checkpoint,
            command=["secateur", *sys.argv[1:]],
            on_step=on_step,
        )
    home = folder or run_folder("train", sys.argv[1:])
    save(run.model, home if folder else home / "model", overwrite=True)
    write_result(run.result, home)
    for name in ("trigger.json", "trigger.safetensors"):  # with --overwrite: those of another network
        (home / "trigger" / name).unlink(missing_ok=True)
    if backdoor and run.trigger is not None:
        save_trigger(run.trigger, home / "trigger")
    show(run.result, json=run_flags.json)
    if not run_flags.quiet:
        say(f"written to {home}")
    return 0


def _split(given: dict[str, Any]) -> tuple[Recipe, dict[str, Any]]:
    """Tell the recipe's settings from the architecture's."""
    kwargs = {name: given[name] for name in NOT_A_RECIPE if name in given}
    return read_recipe({name: value for name, value in given.items() if name not in kwargs}), kwargs
