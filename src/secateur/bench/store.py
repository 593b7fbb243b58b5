"""The store: one folder per finished node, written whole or not at all. The files are the truth; the index is not.

store/{store.json, lock, index.sqlite, tmp/, queue/, failed/, checkpoints/}
store/nodes/<k[:2]>/<k>/{config.json, result.json, model/, trigger/}
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import shutil
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from ..errors import DataError, SecateurError
from .nodes import Node, canonical_json, from_config

CONFIG, RESULT, OWNER, MARK = "config.json", "result.json", "owner.json", "store.json"
FORMAT = 1
CHECKPOINTS = "checkpoints"
LOCK_TRIES = 10
A_WEEK = 7 * 86400.0


class Store:
    """A folder of results; any number of processes may read it, one driver writes its index."""

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root).absolute()
        self.tmp = self.root / "tmp"
        self.queue = self.root / "queue"
        self.checkpoints = self.root / CHECKPOINTS

    def make(self) -> None:
        """Make the folder, unless it is a store already.

        Raises:
            SecateurError: It cannot be made or written to, holds other things, or is of a newer version.
        """
        try:
            self._mark()
            for folder in (self.root / "nodes", self.root / "failed", self.tmp, self.queue, self.checkpoints):
                folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SecateurError(f"cannot write the store {self.root}: {error.strerror}; name another with --store") from None

    def _mark(self) -> None:
        mark = self.root / MARK
        if not mark.exists():
            if self.root.is_dir() and any(self.root.iterdir()):
                raise SecateurError(f"{self.root} is no store and not empty; name a new or empty folder with --store")
            self.root.mkdir(parents=True, exist_ok=True)
            mark.write_text(canonical_json({"format": FORMAT}) + "\n", "utf-8")
        self.check()

    def check(self) -> None:
        """Make sure that this is a store which this version can read.

        Raises:
            DataError: It is not.
        """
        try:
            form = json.loads((self.root / MARK).read_text("utf-8"))["format"]
        except (OSError, ValueError, KeyError, TypeError):
            raise DataError(f"there is no store at {self.root}; run the plan first, or name another with --store") from None
        if form != FORMAT:
            raise DataError(f"the store {self.root} has format {form}, and this version reads {FORMAT}; update secateur")

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
        _sync(home.parent.parent)
        try:
            folder.rename(home)
        except OSError:
            if self.done(node.key):
                shutil.rmtree(folder, ignore_errors=True)
                return False
            self._discard(home)  # half a node, which only a hand or a broken disk can have left
            folder.rename(home)
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
            if self.done(path.stem):
                continue
            try:
                record = json.loads(path.read_text("utf-8"))
            except (OSError, ValueError):
                record = None
            found[path.stem] = record if isinstance(record, dict) else {"message": f"unreadable record {path}"}
        return found

    def sweep(self) -> None:
        """Remove what dead processes left behind.

        A folder is renamed before it is emptied, so that an owner who is alive after all cannot commit half of it.
        """
        for path in self.tmp.iterdir():
            if path.is_dir() and not path.name.startswith("swept") and _alive(path / OWNER):
                continue
            self._discard(path)

    def _discard(self, path: Path) -> None:
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
                _lock(file)
            except BlockingIOError:
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
            with (self.root / "lock").open("r", encoding="utf-8") as file:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:
            return False
        return False


def find_result(folder: str | Path) -> dict[str, Any] | None:
    """Return the result in a node's folder; None when there is none.

    Raises:
        DataError: It is damaged.
    """
    path = f"{folder}/{RESULT}"
    try:
        with open(path, "rb") as file:
            result = json.loads(file.read())
        if _is_result(result):
            return result
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass
    raise DataError(f"the result {path} is damaged; delete its folder and run the plan again")


def read_result(folder: Path) -> dict[str, Any]:
    """Return the result in a finished node's folder.

    Raises:
        DataError: There is none, or it is damaged.
    """
    result = find_result(folder)
    if result is None:
        raise DataError(f"there is no result in {folder}; run the plan again")
    return result


def _is_result(result: dict[str, Any]) -> bool:
    texts = result["created"], result["environment"]["host"], result["tool"]["version"]
    numbers = result["attempt"], result["batch_scale"], result["cost"]["seconds"]
    values = result["values"]
    tables = values, *(values.get(name, {}) for name in ("rates", "cost", "log"))
    return (
        all(isinstance(text, str) for text in texts)
        and all(isinstance(number, int | float) for number in numbers)
        and all(isinstance(table, dict) for table in tables)
    )


def read_config(folder: Path) -> Node:
    """Return the node whose folder this is.

    Raises:
        DataError: Its configuration is damaged.
    """
    try:
        return from_config(json.loads((folder / CONFIG).read_bytes()))
    except (OSError, ValueError, TypeError):
        raise DataError(f"the node {folder / CONFIG} is damaged; delete its folder and run the plan again") from None


def _lock(file: IO[str]) -> None:
    """Take the driver's lock; one who only looks may hold it for a moment."""
    for left in range(LOCK_TRIES, -1, -1):
        try:
            return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if not left:
                raise
            time.sleep(0.1)


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
