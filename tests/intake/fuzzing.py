"""What every fuzzer of the door does with one file: read it, take what can be taken, and watch that nothing is run."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from secateur.errors import SecateurError
from secateur.intake.checkpoint import tensors
from secateur.intake.inspect import inspect
from secateur.intake.reading import admit, read

FORBIDDEN = {
    *("pickle.find_class", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "os.forkpty", "subprocess.Popen"),
    *(
        "socket.__new__",
        "socket.connect",
        "urllib.Request",
        "webbrowser.open",
        "ctypes.dlopen",
        "marshal.loads",
        "shutil.rmtree",
    ),
    *("os.remove", "os.rename", "os.mkdir", "os.chmod", "os.symlink", "code.__new__", "exec", "import"),
}
for encoding in (
    "cp437",
    "utf_8",
    "utf_16",
    "utf_16_le",
    "utf_16_be",
    "utf_32",
    "utf_32_le",
    "utf_32_be",
    "raw_unicode_escape",
):
    importlib.import_module(f"encodings.{encoding}")  # the standard library does so on first use
armed = False
seen: list[str] = []


def _watch(event: str, arguments: tuple[Any, ...]) -> None:
    if armed and event in FORBIDDEN:
        seen.append(f"{event} {arguments!r:.200}")


sys.addaudithook(_watch)


@contextmanager
def watched() -> Iterator[None]:
    """Fail when anything is run, imported or written meanwhile."""
    global armed
    seen.clear()
    armed = True
    try:
        yield
    finally:
        armed = False
    assert not seen, seen[:5]


def use(path: Path) -> str:
    """Do with a file what the verbs do, and return what came of it in a word."""
    try:
        inspect(path, match=False)
        found = read(path)
        with suppress(SecateurError):
            admit(found)
        tensors(admit(found, force=True), found.size)
    except SecateurError as error:
        text = str(error)
        assert text.isprintable(), text
        assert len(text) < 1000, text
        return type(error).__name__
    return "read"
