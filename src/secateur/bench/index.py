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
from urllib.parse import quote

from ..errors import DataError, SecateurError
from .nodes import Node
from .store import Store, read_config, read_result

SCHEMA = """
CREATE TABLE IF NOT EXISTS nodes (
    key TEXT PRIMARY KEY, stage TEXT NOT NULL, method TEXT NOT NULL, kin TEXT NOT NULL, state TEXT NOT NULL,
    attempt INTEGER NOT NULL DEFAULT 0, seconds REAL, host TEXT, pid INTEGER, heartbeat REAL, message TEXT
);
CREATE INDEX IF NOT EXISTS by_kin ON nodes (kin);
"""
VERSION = 1
STALE = 30.0  # seconds after which a running node without heartbeat counts as not running


@dataclass(frozen=True)
class Entry:
    """What the index knows of a node."""

    key: str
    state: str
    attempt: int
    seconds: float | None
    heartbeat: float | None


class Index:
    """The index, open for its driver."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._db = connection

    @classmethod
    @contextmanager
    def open(cls, store: Store, *, anew: bool = False) -> Iterator[Index]:
        """Open the index for writing; a damaged one is replaced (`adopt` and `rebuild` fill it again).

        Raises:
            SecateurError: It cannot be written.
        """
        path = store.root / "index.sqlite"
        try:
            try:
                connection = _connect(path, anew=anew)
            except _Unusable:
                connection = _connect(path, anew=True)
        except (sqlite3.Error, OSError) as error:
            raise SecateurError(f"cannot write {path} ({error}); free some space, or name another --store") from None
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
        row = (node.key, node.stage, node.method, node.kin, state, attempt, seconds, host, pid, time.time(), message)
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
                    with suppress(DataError):  # whoever needs a damaged result will name it
                        self._enter(node, store)

    def rebuild(self, store: Store) -> int:
        """Write the index anew from the store's files; return how many finished nodes there are."""
        count = 0
        with self._transaction():
            self._db.execute("DELETE FROM nodes")
            for key in store.finished():
                with suppress(DataError):
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


def _connect(path: Path, *, anew: bool = False) -> sqlite3.Connection:
    for part in (path, *path.parent.glob("index.sqlite-*")) if anew else ():
        part.unlink(missing_ok=True)
    connection = sqlite3.connect(path, isolation_level=None, timeout=10)
    try:
        [version] = connection.execute("PRAGMA user_version").fetchone()
        if version not in (0, VERSION) or connection.execute("PRAGMA quick_check").fetchone() != ("ok",):
            raise _Unusable
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = NORMAL")
        connection.executescript(SCHEMA)
        connection.execute(f"PRAGMA user_version = {VERSION}")
        connection.execute("SELECT key, kin FROM nodes LIMIT 1")
    except sqlite3.OperationalError as error:
        connection.close()
        if "no such column" in str(error):
            raise _Unusable from None
        raise
    except (sqlite3.DatabaseError, _Unusable):
        connection.close()
        raise _Unusable from None
    return connection


class _Unusable(Exception):
    """The index is damaged or of another version."""


def _select(store: Store, query: str) -> list[tuple]:
    path = store.root / "index.sqlite"
    if not path.exists():
        return []
    try:
        with closing(sqlite3.connect(f"file:{quote(str(path))}?mode=ro", uri=True, timeout=10)) as connection:
            return connection.execute(query).fetchall()
    except sqlite3.DatabaseError:
        return []
