"""``secateur demo``: the main job, end to end, on real images, trained anew each time."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from shlex import quote
from typing import TYPE_CHECKING, Any

from .console import complain, progress, say
from .files import run_folder, write_result
from .options import Output, RunFlags, fresh
from .repair import show

if TYPE_CHECKING:
    from ..models import Classifier
    from ..runs import NetworkRun
    from ..types import Result, Task

NO_RUN_FLAGS = RunFlags()
CLEAN_SHARE = 0.25
VICTIM: Mapping[str, Any] = {"epochs": 6, "lr": 0.2, "schedule": "triangle", "milestones": (0.25,)}
RATE, TARGET = 0.1, 8
HEAL: Mapping[str, Any] = {"epochs": 15, "lr": 0.08}
# name, method, settings, note: the first is the repair, the others are what it is compared with
REPAIRS: tuple[tuple[str, str, Mapping[str, Any], str], ...] = (
    ("norm pruning", "norm-pruning", HEAL, "late filters of small l1 norm"),
    ("random pruning", "norm-pruning", {"norm": "random", **HEAL}, "control: late filters by chance"),
    ("fine-tuning alone", "fine-tuning", HEAL, "control: nothing cut"),
)
BEFORE_AT_LEAST, AFTER_AT_MOST, DROP_AT_MOST = 0.90, 0.05, 0.03


def demo(*, output: Output = None, run_flags: RunFlags = NO_RUN_FLAGS) -> int:
    """Train a network with a hidden backdoor on embedded images, measure it, cut the backdoor out and prove it.

    Exits with 0 only if attack success fell from at least 90 % to at most 5 % at no more than 3 points of accuracy.

    Args:
        output: Folder to write to (default: secateur-runs/...).
    """
    start = time.perf_counter()
    folder = fresh(output, overwrite=run_flags.overwrite) if output else None
    device = run_flags.set_up()
    task, victim, trained = _victim(run_flags, device)
    runs = {name: _repair(name, method, settings, victim, task, run_flags) for name, method, settings, _ in REPAIRS}
    chosen = next(iter(runs.values()))
    home = folder or run_folder("demo", sys.argv[1:])
    result = _record(chosen.result, runs, task, trained)
    _write(home, result, chosen, victim, task)
    show(result, json=run_flags.json)
    if not run_flags.quiet:
        say(f"{time.perf_counter() - start:.0f} s in all. Open {home / 'report.html'}, or repair the victim yourself:")
        settings = " ".join(f"--set {name}={value}" for name, value in HEAL.items())
        say(f"  cd {quote(str(home))}")
        say(f"  secateur repair victim --data clean.npz --test test.npz --trigger trigger -o mine {settings}")
    if result.checks[-1]["status"] == "ok":
        return 0
    complain(f"the demonstration missed its target: {result.checks[-1]['why']}")
    return 1


def _victim(flags: RunFlags, device: str) -> tuple[Task, Classifier, float]:
    from ..data import load_data, split_clean
    from ..poison import badnets
    from ..runs import new_network
    from ..state import generator
    from ..train import Recipe, train
    from ..types import Task

    random = generator(flags.seed)
    clean, rest = split_clean(load_data("fashion-mini:train"), CLEAN_SHARE, generator=random)
    poisoned = badnets(rest, rate=RATE, target=TARGET, generator=random)
    task = Task(clean=clean, train=poisoned.data, test=load_data("fashion-mini:test"), trigger=poisoned.trigger)
    if not flags.quiet:
        marked = int(poisoned.poisoned.sum())
        say(f"{len(rest)} images of clothes, {marked} of them with a white square and the label '{clean.classes[TARGET]}'")
    start = time.perf_counter()
    network = new_network(rest, "convnet", generator=random).to(device)
    with progress("training the victim", show=flags.progress) as on_step:
        victim = train(network, poisoned.data, Recipe(**VICTIM), generator=random, on_step=on_step)
    return task, victim, time.perf_counter() - start  # type: ignore[return-value]


def _repair(name: str, method: str, settings: Mapping[str, Any], victim: Classifier, task: Task, flags: RunFlags) -> NetworkRun:
    from .. import runs

    with progress(name, show=flags.progress) as on_step:
        return runs.repair(
            victim,
            task.clean,
            method=method,
            arguments=settings,
            test=task.test,
            trigger=task.trigger,
            seed=flags.seed,
            command=["secateur", *sys.argv[1:]],
            on_step=on_step,
        )


def _record(result: Result, runs: Mapping[str, NetworkRun], task: Task, trained: float) -> Result:
    from ..runs import picture

    compared = [
        {"name": name, "after": runs[name].result.after, "seconds": runs[name].result.cost["seconds"], "note": note}
        for name, _, _, note in REPAIRS
    ]
    assert task.test is not None
    assert task.trigger is not None
    details = {**result.details, "compared": compared, "trigger": picture(task.trigger, task.test)}
    limitations = ["The victim was trained for this demonstration, on a small set.", *result.limitations]
    cost = {**result.cost, "training_seconds": trained}
    checks = [*result.checks, _target(result)]
    return replace(result, kind="demo", checks=checks, details=details, limitations=limitations, cost=cost)


def _write(home: Any, result: Result, chosen: NetworkRun, victim: Classifier, task: Task) -> None:
    from ..data import save_npz, save_trigger
    from ..intake import read
    from ..models import save
    from .repair import write

    assert task.test is not None
    assert task.trigger is not None
    save(victim, home / "victim", overwrite=True)
    save_trigger(task.trigger, home / "trigger")
    save_npz(task.clean, home / "clean.npz")
    save_npz(task.test, home / "test.npz")
    write(chosen, home, home / "model", ancestor=read(home / "victim").sha256)
    write_result(result, home)


def _target(result: Result) -> dict[str, Any]:
    """Return the demonstration's own gate as a check of the record."""
    before, after = result.before, result.after
    drop = before["accuracy"]["value"] - after["accuracy"]["value"]
    asr = before["attack_success"]["value"], after["attack_success"]["value"]
    met = asr[0] >= BEFORE_AT_LEAST and asr[1] <= AFTER_AT_MOST and drop <= DROP_AT_MOST
    why = (
        f"attack success should fall from at least {100 * BEFORE_AT_LEAST:g} % to at most {100 * AFTER_AT_MOST:g} % "
        f"at no more than {100 * DROP_AT_MOST:g} points of accuracy"
    )
    metrics = {"attack_success_before": asr[0], "attack_success_after": asr[1], "accuracy_drop": drop}
    return {"id": "demo-target", "status": "ok" if met else "finding", "why": why, "metrics": metrics, "seconds": 0.0}
