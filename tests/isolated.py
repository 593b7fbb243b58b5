"""Runs tests in a fork of a process that has imported the libraries, but not Secateur: a mutant starts at once."""

import multiprocessing
import os
import sys
from pathlib import Path

import pytest

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["hypothesis", "jsonschema", "onnx", "pytest", "scipy.stats", "torch"])


def run_tests(source: Path, cwd: Path, args: list[str], log: Path) -> int:
    """Return the exit status of pytest on the package in ``source``; what it prints goes to ``log``."""
    run = FORKS.Process(target=_run, args=(source, cwd, args, log))
    run.start()
    run.join()
    assert run.exitcode is not None
    return run.exitcode


def _run(source: Path, cwd: Path, args: list[str], log: Path) -> None:
    assert "secateur" not in sys.modules
    with log.open("wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.chdir(cwd)
    os.environ["PYTHONPATH"] = str(source)  # for what the tests start
    sys.path.insert(0, str(source))
    loaded = "ignore::pytest.PytestAssertRewriteWarning"  # what is imported already has no asserts of ours
    sys.exit(int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", "-W", loaded, *args])))
