"""The index of a store: what each node is, how long it took, what happens to it now. One driver writes it; it can be lost.

Whether a node is done is never read from here: its folder says so.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from ..errors import SecateurError
from .nodes import Node, canonical_json
from .store import Store, read_config, read_result

SCHEMA = """
CREATE TABLE IF NOT EXISTS nodes (
    key TEXT PRIMARY KEY, stage TEXT NOT NULL, method TEXT NOT NULL, kin TEXT NOT NULL, state TEXT NOT NULL,
    attempt INTEGER NOT NULL DEFAULT 0, seconds REAL, host TEXT, pid INTEGER, heartbeat REAL, message TEXT
);
CREATE INDEX IF NOT EXISTS by_kin ON nodes (kin);
CREATE TABLE IF NOT EXISTS sources (path TEXT PRIMARY KEY, stamp TEXT NOT NULL, digest TEXT NOT NULL);
"""
STALE = 30.0  # seconds after which a running node without heartbeat counts as not running


@dataclass(frozen=True)
class Entry:
    """What the index knows of a node."""

    key: str
    state: str
    attempt: int
    seconds: float | None
    heartbeat: float | None


def kin(node: Node) -> str:
    """Return what nodes share that take about as long: all but the seed, the parents and, for victims, the backdoor."""
    config = {name: value for name, value in node.config.items() if name not in ("seed", "parents")}
    if node.stage == "victim":
        config["method"] = ""
        config["args"] = {name: value for name, value in node.args.items() if name != "settings"}
    return canonical_json(config)


class Index:
    """The index, open for its driver."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._db = connection

    @classmethod
    @contextmanager
    def open(cls, store: Store) -> Iterator[Index]:
        """Open the index for writing; a damaged one is replaced (`adopt` and `rebuild` fill it again).

        Raises:
            SecateurError: It cannot be written.
        """
        path = store.root / "index.sqlite"
        try:
            connection = _connect(path)
        except sqlite3.OperationalError as error:
            raise SecateurError(f"cannot write {path} ({error}); free some space, or name another --store") from None
        except sqlite3.DatabaseError:
            for part in (path, *path.parent.glob("index.sqlite-*")):
                part.unlink(missing_ok=True)
            connection = _connect(path)
        with closing(connection):
            yield cls(connection)

    def put(
        self,
        node: Node,
        state: str,
        *,
        attempt: int = 0,
        seconds: float | None = None,
        host: str = "",
        pid: int = 0,
        message: str = "",
    ) -> None:
        """Write what is known of a node."""
        row = (node.key, node.stage, node.method, kin(node), state, attempt, seconds, host, pid, time.time(), message)
        self._db.execute(f"INSERT OR REPLACE INTO nodes VALUES ({', '.join('?' * len(row))})", row)

    def beat(self, keys: Iterable[str]) -> None:
        """Say that these nodes still run."""
        self._db.executemany("UPDATE nodes SET heartbeat = ? WHERE key = ?", [(time.time(), key) for key in keys])

    def adopt(self, store: Store, nodes: Iterable[Node]) -> None:
        """Enter finished nodes that the index does not know as done: a killed driver may have left some."""
        known = {row[0] for row in self._db.execute("SELECT key FROM nodes WHERE state = 'done'")}
        with self._transaction():
            for node in nodes:
                if node.key not in known:
                    self._enter(node, store)

    def rebuild(self, store: Store) -> int:
        """Write the index anew from the store's files; return how many finished nodes there are."""
        count = 0
        with self._transaction():
            self._db.execute("DELETE FROM nodes")
            for key in store.finished():
                with suppress(OSError, ValueError, TypeError, KeyError):
                    self._enter(read_config(store.folder(key)), store)
                    count += 1
        return count

    def _enter(self, node: Node, store: Store) -> None:
        result = read_result(store.folder(node.key))
        host = result["environment"]["host"]
        self.put(node, "done", attempt=result["attempt"], seconds=result["cost"]["seconds"], host=host)

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._db.execute("BEGIN")
        try:
            yield
        except BaseException:
            self._db.execute("ROLLBACK")
            raise
        self._db.execute("COMMIT")


def read_index(store: Store) -> dict[str, Entry]:
    """Return what the index knows, by key; nothing when there is no index."""
    rows = _select(store, "SELECT key, state, attempt, seconds, heartbeat FROM nodes")
    return {row[0]: Entry(*row) for row in rows}


def durations(store: Store) -> dict[tuple[str, str], float]:
    """Return the mean seconds of finished nodes by ``("kin", kin)``, ``("method", "stage method")``, ``("stage", stage)``."""
    found: dict[tuple[str, str], float] = {}
    for kind, column in (("stage", "stage"), ("method", "stage || ' ' || method"), ("kin", "kin")):
        query = f"SELECT {column}, AVG(seconds) FROM nodes WHERE state = 'done' AND seconds IS NOT NULL GROUP BY 1"
        found.update({(kind, name): mean for name, mean in _select(store, query)})
    return found


def _connect(path: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(path, isolation_level=None, timeout=10)
    try:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = NORMAL")
        connection.executescript(SCHEMA)
    except BaseException:
        connection.close()
        raise
    return connection


def _select(store: Store, query: str) -> list[tuple]:
    path = store.root / "index.sqlite"
    if not path.exists():
        return []
    try:
        with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=10)) as connection:
            return connection.execute(query).fetchall()
    except sqlite3.DatabaseError:
        return []
