"""In the driver's own process, one node at a time: for debugging, and where nothing else is allowed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..nodes import Node
from ..work import Job, Outcome, run_job


class Inline:
    """Runs each job inside `poll`, one at a time whatever ``workers`` says.

    A crash takes the driver along, nothing can be timed out, and while a node runs nobody says that it is alive.
    """

    def __init__(self, **options: Any) -> None:
        del options
        self._job: Job | None = None

    def room(self, node: Node) -> bool:
        """Return whether no job waits."""
        del node
        return self._job is None

    def submit(self, job: Job) -> None:
        """Keep the job for the next `poll`."""
        self._job = job

    def poll(self, seconds: float) -> Sequence[Outcome]:
        """Run the waiting job to its end."""
        del seconds
        job, self._job = self._job, None
        return [] if job is None else [run_job(job)]

    def close(self) -> None:
        """Forget the waiting job."""
        self._job = None
