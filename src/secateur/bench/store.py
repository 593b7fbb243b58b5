"""The store: one folder per finished node, written whole or not at all. The files are the truth; the index is not.

store/{lock, index.sqlite, tmp/, queue/, failed/, nodes/<k[:2]>/<k>/{config.json, result.json, model/, trigger/}}
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import shutil
import socket
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ..errors import SecateurError
from .nodes import Node, canonical_json, from_config

CONFIG, RESULT, OWNER = "config.json", "result.json", "owner.json"
CHECKPOINTS = "checkpoints"
A_WEEK = 7 * 86400.0


class Store:
    """A folder of results; any number of processes may read it, one driver writes its index."""

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root).absolute()
        self.tmp = self.root / "tmp"
        self.queue = self.root / "queue"
        self.checkpoints = self.root / CHECKPOINTS

    def make(self) -> None:
        """Make the folder.

        Raises:
            SecateurError: It cannot be made or written to.
        """
        try:
            for folder in (self.root / "nodes", self.root / "failed", self.tmp, self.queue, self.checkpoints):
                folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SecateurError(f"cannot write the store {self.root}: {error.strerror}; name another with --store") from None

    def folder(self, key: str) -> Path:
        """Return where a node's results are, or will be."""
        return self.root / "nodes" / key[:2] / key

    def done(self, key: str) -> bool:
        """Whether a node has its result."""
        return os.path.exists(f"{self.root}/nodes/{key[:2]}/{key}/{RESULT}")

    def finished(self) -> Iterator[str]:
        """Yield the keys of all finished nodes."""
        for path in sorted((self.root / "nodes").glob(f"*/*/{RESULT}")):
            yield path.parent.name

    def begin(self, key: str) -> Path:
        """Return a new folder to work in; what it holds counts for nothing until `commit`."""
        folder = self.tmp / f"{key[:16]}-{secrets.token_hex(4)}"
        folder.mkdir(parents=True)
        (folder / OWNER).write_text(canonical_json({"host": socket.gethostname(), "pid": os.getpid()}), "utf-8")
        return folder

    def commit(self, folder: Path, node: Node, result: Mapping[str, Any]) -> bool:
        """Make ``folder`` the node's results, in one step that survives a crash; False when another was first."""
        (folder / OWNER).unlink()
        (folder / CONFIG).write_text(json.dumps(node.config, indent=1, sort_keys=True) + "\n", "utf-8")
        (folder / RESULT).write_text(json.dumps(result, indent=1, allow_nan=False) + "\n", "utf-8")
        for path in [*folder.rglob("*"), folder]:
            _sync(path)
        home = self.folder(node.key)
        home.parent.mkdir(parents=True, exist_ok=True)
        try:
            folder.rename(home)
        except OSError:
            shutil.rmtree(folder, ignore_errors=True)
            if not self.done(node.key):
                raise
            return False
        _sync(home.parent)
        self.forget_failure(node.key)
        return True

    def record_failure(self, key: str, failure: Mapping[str, Any]) -> None:
        """Write down why a node failed; a later success removes it."""
        path = self.root / "failed" / f"{key}.json"
        temporary = self.tmp / f"{key[:16]}-{secrets.token_hex(4)}.json"
        temporary.write_text(json.dumps(failure, indent=1) + "\n", "utf-8")
        temporary.replace(path)

    def forget_failure(self, key: str) -> None:
        """Remove the note of a failure, if there is one."""
        (self.root / "failed" / f"{key}.json").unlink(missing_ok=True)

    def failures(self) -> dict[str, dict[str, Any]]:
        """Return key -> failure of every node that failed and was not done since."""
        found = {}
        for path in sorted((self.root / "failed").glob("*.json")):
            with suppress(OSError, ValueError):
                if not self.done(path.stem):
                    found[path.stem] = json.loads(path.read_text("utf-8"))
        return found

    def sweep(self) -> None:
        """Remove what dead processes left behind.

        A folder is renamed before it is emptied, so that an owner who is alive after all cannot commit half of it.
        """
        for path in self.tmp.iterdir():
            if path.is_dir() and not path.name.startswith("swept") and _alive(path / OWNER):
                continue
            doomed = self.tmp / f"swept-{secrets.token_hex(8)}"
            with suppress(FileNotFoundError):
                path.rename(doomed)
                shutil.rmtree(doomed, ignore_errors=True) if doomed.is_dir() else doomed.unlink()

    @contextmanager
    def driving(self) -> Iterator[None]:
        """Hold the store as its only driver.

        Raises:
            SecateurError: Another driver holds it.
        """
        with (self.root / "lock").open("a+", encoding="utf-8") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                file.seek(0)
                owner = file.read().strip() or "another process"
                raise SecateurError(f"the store {self.root} is in use by {owner}; wait, or use another --store") from None
            with suppress(OSError):  # the name is a courtesy: a full disk must not stop a run before it starts
                file.truncate(0)
                file.write(f"process {os.getpid()} on {socket.gethostname()}")
                file.flush()
            yield

    def driven(self) -> bool:
        """Whether a driver holds the store now."""
        try:
            with (self.root / "lock").open("a", encoding="utf-8") as file:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except FileNotFoundError:
            return False
        except OSError:
            return True
        return False


def read_result(folder: Path) -> dict[str, Any]:
    """Return the result in a finished node's folder."""
    return json.loads((folder / RESULT).read_text("utf-8"))


def read_config(folder: Path) -> Node:
    """Return the node whose folder this is."""
    return from_config(json.loads((folder / CONFIG).read_text("utf-8")))


def missing(store: Store, keys: Iterable[str]) -> list[str]:
    """Return those keys that have no result."""
    return [key for key in keys if not store.done(key)]


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _alive(owner: Path) -> bool:
    """Whether the process that works here still runs; on another machine nobody can tell, so a week counts as yes."""
    try:
        record = json.loads(owner.read_text("utf-8"))
        if record["host"] != socket.gethostname():
            return time.time() - owner.stat().st_mtime < A_WEEK
        os.kill(int(record["pid"]), 0)
        return not _zombie(int(record["pid"]))
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _zombie(pid: int) -> bool:
    """Whether a process is dead and only waits for its parent to notice (told where there is a /proc)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text("utf-8").rpartition(")")[2].split()[0] in "ZX"
    except FileNotFoundError:
        return False
