"""``secateur bench``: run a plan, see how far it is, print its table."""

from __future__ import annotations

import json as jsonlib
import signal
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter

from ..errors import DataError, InconclusiveError, MethodError, check_choice
from .console import human, out, say
from .options import Flag, Output

if TYPE_CHECKING:
    from ..bench.driver import Progress
    from ..bench.nodes import Graph, Node
    from ..bench.plan import Plan
    from ..bench.store import Store

STORE = Path("secateur-store")
SECONDS_BETWEEN_LINES = 10.0
SECONDS_BETWEEN_LOOKS = 0.5  # on a terminal
FORMATS = ("text", "csv", "json", "md", "parquet", "provenance")
SHOWN = 10  # failures listed before "and N more"
Format = Literal["text", "csv", "json", "md", "parquet", "provenance"]
Quiet = Annotated[bool, Parameter(name=("--quiet", "-q"), negative=())]


def run(
    plan: Path,
    /,
    *,
    store: Path = STORE,
    data: str | None = None,
    executor: str = "local",
    workers: int | None = None,
    gpus: int | None = None,
    address: str | None = None,
    slurm: Annotated[list[str] | None, Parameter(negative=())] = None,
    dry_run: Flag = False,
    quiet: Quiet = False,
    no_progress: Flag = False,
) -> int:
    """Run every node of a plan that has no result yet; the same command again resumes.

    Args:
        plan: A TOML file, e.g. plans/smoke.toml.
        store: Folder of the results.
        data: Images to use instead of the plan's: PATH:train and PATH:test are read.
        executor: inline, local, ray or slurm.
        workers: How many nodes at once (default: as the CPU cores allow).
        gpus: How many GPUs to share out among nodes that want one (default: all there are).
        address: Address of a running Ray cluster (default: one is started here).
        slurm: A line for sbatch, e.g. --slurm=--partition=gpu; may be given more than once.
        dry_run: Only say what would run, what is there already, and how long it may take.
        quiet: Say nothing while working.
        no_progress: Show no progress.
    """
    from ..bench import driver
    from ..bench.executors import make

    read, graph, where = _open(plan, store, data)
    options = _options(executor, {"workers": workers, "gpus": gpus, "address": address, "options": slurm})
    if dry_run:
        return _dry_run(read, graph, where, workers)
    where.make()
    with where.driving():  # before an executor is started in vain
        pass
    runner = make(executor, threads=read.threads, **options)
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # a batch system's notice ends a run as Ctrl-C does
    show = _Progress(graph, where, show=not (quiet or no_progress))
    try:
        with show:
            end = driver.run(graph, where, runner, read, on_event=show)
    finally:
        runner.close()
        signal.signal(signal.SIGTERM, before)
    if not quiet:
        say(_ending(end, where))
    if end.failed:
        first = next(iter(end.failed.values()))
        raise InconclusiveError(
            f"{_failed(len(end.failed), end.skipped)}, the first with {first.message}; see secateur bench status {plan}"
        )
    return 0


def status(plan: Path, /, *, store: Path = STORE, data: str | None = None, json: Flag = False) -> int:
    """Say how far a plan is; a driver may be at work meanwhile.

    Args:
        plan: A TOML file.
        store: Folder of the results.
        data: Images to use instead of the plan's.
        json: Print JSON.
    """
    from ..bench import progress

    read, graph, where = _open(plan, store, data)
    where.check()
    found = progress.status(graph, where)
    counts = {state: found.count(state) for state in progress.STATES}
    if json:
        failures = [{"node": graph.nodes[key].label, "key": key, "error": text} for key, text in found.failures.items()]
        out(jsonlib.dumps({"plan": read.name, "nodes": counts, "driven": found.driven, "failures": failures}, indent=2))
        return 0
    shown = ", ".join(f"{count} {state}" for state, count in counts.items() if count)
    out(f"{read.name}: {len(graph.nodes)} nodes, {shown}; {'a driver is at work' if found.driven else 'no driver is at work'}")
    if found.failures:
        out(_failures(found.failures, graph, counts["skipped"]))
    return 0


def report(
    plan: Path,
    /,
    *,
    store: Path = STORE,
    data: str | None = None,
    format: Format | None = None,
    output: Output = None,
    with_cost: Flag = False,
    cells: Path | None = None,
) -> int:
    """Print a plan's table from what is in the store, or in an earlier CSV.

    Args:
        plan: A TOML file.
        store: Folder of the results.
        data: Images to use instead of the plan's.
        format: text, csv (every cell), json, md, parquet, or provenance: versions, dates and work behind the table (default: by
            the name of the output, else text).
        output: File to write to.
        with_cost: Also seconds and hosts, which differ from run to run.
        cells: A CSV of an earlier report, to be read in place of a store.
    """
    from ..bench import export
    from ..bench.nodes import expand
    from ..bench.plan import read_plan
    from ..bench.provenance import provenance
    from ..bench.tables import rows

    chosen = format or _format_of(output)
    if chosen == "parquet" and output is None:
        raise MethodError("parquet is not for the terminal; name a file with --output")
    if cells is not None and (chosen == "provenance" or data is not None):
        raise MethodError("--cells needs no images, and provenance stands in the store alone; leave out one or the other")
    if cells is None:
        read, graph, where = _open(plan, store, data)
        where.check()
        if chosen == "provenance":
            return _write(provenance(read.name, graph, where), output)
        found = rows(graph, where)
    else:
        read = read_plan(plan)
        found = export.read_csv(cells, read, expand(read, digest=str))
    if chosen == "parquet":
        assert output is not None
        export.to_parquet(output, found, read, with_cost=with_cost)
        return 0
    return _write(export.render(found, read, chosen, with_cost=with_cost), output)


def _write(text: str, output: Path | None) -> int:
    if output is None:
        out(text)
        return 0
    try:
        output.write_text(text, "utf-8")
    except OSError as error:
        raise DataError(f"cannot write {output}: {error.strerror}; name another --output") from None
    return 0


def reindex(plan: Path | None = None, /, *, store: Path = STORE) -> int:
    """Write the index of a store anew from its results.

    Args:
        plan: A TOML file, to say how much of it is done; need not be given.
        store: Folder of the results.
    """
    from ..bench.index import Index
    from ..bench.store import Store

    where = Store(store)
    where.check()
    with where.driving(), Index.open(where, anew=True) as index:
        count = index.rebuild(where)
    out(f"{count} finished nodes in {store}")
    return status(plan, store=store) if plan is not None else 0


def _open(plan: Path, store: Path, data: str | None) -> tuple[Plan, Graph, Store]:
    from ..bench.nodes import expand
    from ..bench.plan import read_plan
    from ..bench.source import digest
    from ..bench.store import Store

    read = read_plan(plan).with_data(data)
    return read, expand(read, digest), Store(store)


def _options(executor: str, given: dict[str, Any]) -> dict[str, Any]:
    """Return the options that were given, if the executor takes them."""
    from ..bench.executors import EXECUTORS

    chosen = {name: value for name, value in given.items() if value is not None}
    if chosen.get("workers", 1) < 1:
        raise MethodError(f"--workers must be at least 1, got {chosen['workers']}")
    check_choice("executor", executor, EXECUTORS)
    for name, flag, owner in (("address", "--address", "ray"), ("options", "--slurm", "slurm")):
        if name in chosen and executor != owner:
            raise MethodError(f"{flag} is for --executor {owner}, got {executor}")
    return chosen


def _dry_run(plan: Plan, graph: Graph, store: Store, workers: int | None) -> int:
    import os

    from ..bench.progress import Estimate, duration

    slots = workers or max(1, len(os.sched_getaffinity(0)) // plan.threads)
    todo = [node for key, node in graph.nodes.items() if not store.done(key)]
    seconds, unknown = Estimate.of(store).left(todo, graph, slots)
    left = Counter(node.stage for node in todo)
    for stage, count in Counter(node.stage for node in graph.nodes.values()).items():
        out(f"{stage:10}{count:6} nodes {count - left[stage]:6} done {left[stage]:6} to run")
    time_text = f"about {duration(seconds)} on {slots} workers" if unknown < len(todo) or not todo else "time unknown"
    rest = f"; nothing like {unknown} of them has run in this store, so they are not counted" if unknown and todo else ""
    out(f"{plan.name}: {len(todo)} of {len(graph.nodes)} nodes to run, {time_text}{rest}")
    return 0


def _ending(end: Progress, store: Store) -> str:
    from ..bench.progress import duration

    fresh = end.done - end.cached
    text = (
        f"{end.done} of {end.total} nodes done ({fresh} now, {end.cached} before) in {duration(time.monotonic() - end.started)}"
    )
    return f"{text}; results in {store.root}"


def _failures(messages: dict[str, str] | Any, graph: Graph, skipped: int) -> str:
    lines = [f"{_failed(len(messages), skipped)}:"]
    for key, message in list(messages.items())[:SHOWN]:
        lines.append(f"  {graph.nodes[key].label} ({key[:12]}): {message}")
    if len(messages) > SHOWN:
        lines.append(f"  and {len(messages) - SHOWN} more (secateur bench status)")
    return "\n".join(lines)


def _failed(count: int, skipped: int) -> str:
    waiting = f" and {skipped} could not be run for want of them" if skipped else ""
    return f"{count} node{'s' if count > 1 else ''} failed{waiting}"


def _format_of(output: Path | None) -> str:
    suffix = output.suffix.removeprefix(".") if output else ""
    return suffix if suffix in FORMATS else "text"


class _Progress:
    """Shows a run: a line that renews itself on a terminal, elsewhere a plain line every few seconds; failures at once."""

    def __init__(self, graph: Graph, store: Store, *, show: bool) -> None:
        from ..bench.progress import Estimate

        self.graph, self.show = graph, show
        self.estimate = Estimate.of(store)
        self.left = {key: node for key, node in graph.nodes.items() if not store.done(key)}
        self.width = 1
        self.last = time.monotonic()
        self.live: Any = None

    def __enter__(self) -> _Progress:
        if self.show and human().is_terminal:
            from rich.live import Live

            self.live = Live(console=human(), auto_refresh=False, transient=True)
            self.live.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self.live is not None:
            self.live.stop()

    def __call__(self, event: str, node: Node | None, progress: Progress) -> None:
        self.width = max(self.width, len(progress.running))
        if event == "done" and node is not None:
            self.left.pop(node.key, None)
            self.estimate.observe(node, progress.last)
        if event == "failed" and node is not None and self.show:
            say(f"failed: {node.label}: {progress.failed[node.key].message}")
        if not self.show or (event == "start" and self.live is None):
            return
        if self.live is not None and time.monotonic() - self.last >= SECONDS_BETWEEN_LOOKS:
            self.last = time.monotonic()
            self.live.update(self._line(progress), refresh=True)
        elif self.live is None and time.monotonic() - self.last >= SECONDS_BETWEEN_LINES:
            self.last = time.monotonic()
            say(self._line(progress))

    def _line(self, progress: Progress) -> str:
        from ..bench.progress import duration

        seconds, unknown = self.estimate.left(self.left.values(), self.graph, self.width)
        eta = f"about {duration(seconds)} left" if unknown < len(self.left) else "time left unknown"
        more = " or more" if 0 < unknown < len(self.left) else ""
        counts = (
            f"{progress.done} of {progress.total} nodes done, {len(progress.running)} running, {len(progress.failed)} failed"
        )
        return f"{counts}; {eta}{more}"
