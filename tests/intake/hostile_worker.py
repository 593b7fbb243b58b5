"""Runs the command line on a corpus of hostile files and says what came of it, one JSON line per file and verb.

hostile_worker.py inside FOLDER CANARY   all in this process, under an audit hook that sees whatever runs or is opened
hostile_worker.py apart FOLDER CANARY    each in a process of its own, measured; this one stays small on purpose:
                                         a child's peak memory begins at its parent's
hostile_worker.py fire FOLDER CANARY     loads what is said to be live as its author wants it: each must make CANARY
"""

from __future__ import annotations

import io
import json
import os
import re
import resource
import signal
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

VERBS = ("info", "convert", "repair")
FORMATS = ("json", "sarif")  # of info; tried where there is something in a file to print
PRINTED = "good|print|bundle|hub|unlisted|torch"
EVERY = int(os.environ.get("SECATEUR_CORPUS_EVERY", "1"))  # of the files, each in a process of its own
SECONDS = 120  # after which a command counts as hanging
MEMORY = 12 * 2**30  # address space: enough for every command, not enough to hurt the machine
RUNS = frozenset(
    {
        *("os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "os.forkpty", "os.startfile", "pty.spawn"),
        *("subprocess.Popen", "socket.connect", "socket.bind", "socket.getaddrinfo", "socket.sendto", "urllib.Request"),
        *("ctypes.dlopen", "ctypes.dlsym", "pickle.find_class", "webbrowser.open", "sys.settrace", "sys.setprofile"),
    }
)
WRITES = frozenset({"os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.link", "os.symlink", "os.truncate", "shutil.rmtree"})
SECRETS = ("/etc/passwd", "secret.bin", "secret-link", "root-link/")
MODULES = frozenset(
    {
        *("secateur_canary", "pty", "idlelib", "lib2to3", "webbrowser", "pdb", "bdb", "profile", "cProfile", "trace", "code"),
        *("runpy", "pip", "ensurepip", "venv", "smtplib", "ftplib", "poplib", "imaplib", "telnetlib", "xmlrpc", "shelve"),
        *(
            "mailcap",
            "imp",
            "numpy.f2py",
            "numpy.testing",
            "torch.hub",
            "torch.utils.cpp_extension",
            "torch.package",
            "doctest",
        ),
    }
)


class Late(BaseException):
    """A command took too long."""


class Watch:
    """An audit hook that notes what no reader of weights does; ``seen`` is emptied between commands."""

    def __init__(self, canary: str, out: Path) -> None:
        self.canary, self.out = canary, str(out)
        self.seen: list[str] = []
        self.on = False
        self.loaded: frozenset[str] = frozenset()

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.on and self.odd(event, arguments):
            self.seen.append(f"{event}{arguments!r}"[:300])

    def odd(self, event: str, arguments: tuple[Any, ...]) -> bool:
        """Return whether an event is worth noting."""
        if event in RUNS:
            return True
        if event == "import":
            return arguments[0] in MODULES and arguments[0] not in self.loaded
        if event == "open":
            path, _, flags = arguments
            writing = isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            return isinstance(path, str | bytes) and (
                (bool(writing) and not os.fsdecode(path).startswith((self.out, "/dev/null")))
                or any(word in os.fsdecode(path) for word in SECRETS)
            )
        if event in WRITES:
            return not str(arguments[0]).startswith(self.out)
        return event in ("exec", "compile") and self.canary in repr(arguments[0])


def arguments_of(verb: str, folder: Path, case: str, out: Path) -> list[str]:
    """Return the command line."""
    path = str(folder / case)
    if verb in ("info", *FORMATS):
        return ["info", path, "--format", "text" if verb == "info" else verb]
    if verb == "convert":
        return ["convert", path, "-o", str(out)]
    return ["repair", path, "--data", str(folder / "data.npz"), "-o", str(out), "--quiet"]


def listed(folder: Path, pattern: str) -> list[dict[str, Any]]:
    """Return the cases, as the manifest has them."""
    manifest = json.loads((folder / "manifest.json").read_text("utf-8"))
    return [case for case in (*manifest["good"], *manifest["hostile"]) if re.match(pattern, case["file"])]


def tell(**record: Any) -> None:
    """Write one line, in one go: two threads may be telling."""
    assert sys.__stdout__ is not None
    sys.__stdout__.write(json.dumps(record) + "\n")
    sys.__stdout__.flush()


def inside(folder: Path, canary: Path, out: Path, pattern: str) -> None:
    """Run every command in this process, but for the files that take long."""
    from secateur.cli import run

    sys.path.append(str(folder / "modules"))
    watch = Watch(str(canary), out)
    sys.addaudithook(watch)
    signal.signal(signal.SIGALRM, late)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    for verb in VERBS:  # whatever is imported on first use is imported now
        command(run, arguments_of(verb, folder, "good-hand.pt", out / f"first-{verb}"))
    watch.loaded = frozenset(sys.modules)
    light = [case["file"] for case in listed(folder, pattern) if not case["heavy"]]
    plan = [(file, verb) for file in light for verb in (*VERBS, *(FORMATS if re.match(PRINTED, file) else ()))]
    for number, (case, verb) in enumerate(plan):
        watch.seen.clear()
        watch.on = True
        start = time.monotonic()
        code, printed, complained = command(run, arguments_of(verb, folder, case, out / str(number)))
        seconds = time.monotonic() - start
        watch.on = False
        ran = canary.exists()
        canary.unlink(missing_ok=True)
        tell(case=case, verb=verb, code=code, out=printed, err=complained, seconds=seconds, ran=ran, seen=watch.seen)


def late(*_: Any) -> None:
    raise Late


def command(run: Callable[[list[str]], int], arguments: list[str]) -> tuple[int, str, str]:
    """Run one command; its code is -1 when it hangs and -2 when it raises."""
    printed, complained = io.StringIO(), io.StringIO()
    with redirect_stdout(printed), redirect_stderr(complained):
        signal.alarm(SECONDS)
        try:
            code = run(arguments)
        except Late:
            code = -1
        except BaseException as error:  # noqa: BLE001
            code = -2
            complained.write(f"{type(error).__name__}: {error}")
        finally:
            signal.alarm(0)
    return code, printed.getvalue(), complained.getvalue()


def apart(folder: Path, canary: Path, out: Path, pattern: str) -> None:
    """Run every command as its own process, two at a time."""

    def one(number: int, case: str, verb: str) -> None:
        printed, complained = out / f"{number}.out", out / f"{number}.err"
        cost = measured(arguments_of(verb, folder, case, out / str(number)), printed, complained)
        texts = [path.read_text("utf-8", "replace") for path in (printed, complained)]
        tell(case=case, verb=verb, out=texts[0], err=texts[1], ran=canary.exists(), seen=[], **cost)

    os.environ["PYTHONPATH"] = str(folder / "modules")
    for number in range(3 * len(VERBS)):  # the time that a verb takes anyway, three times
        one(-1 - number, "good-hand.pt", VERBS[number % len(VERBS)])
    with ThreadPoolExecutor(2) as pool:
        cases = [case for number, case in enumerate(listed(folder, pattern)) if case["heavy"] or number % EVERY == 0]
        plan = [(case["file"], verb) for case in cases for verb in VERBS]
        list(pool.map(lambda item: one(item[0], *item[1]), enumerate(plan)))


def measured(arguments: list[str], printed: Path, complained: Path) -> dict[str, float]:
    """Run one command.

    Returns:
        Exit ``code`` (-1 when it hangs), ``seconds`` of the processor, seconds ``waited``, ``peak`` memory in bytes.
    """
    writing = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    files = [(os.POSIX_SPAWN_OPEN, fd, str(path), writing, 0o600) for fd, path in ((1, printed), (2, complained))]
    main = "import sys; from secateur.cli import main; sys.argv[0] = 'secateur'; main()"
    start = time.monotonic()
    pid = os.posix_spawn(sys.executable, [sys.executable, "-c", main, *arguments], os.environ, file_actions=files)
    done, status, usage = os.wait4(pid, os.WNOHANG)
    while not done and time.monotonic() - start < SECONDS:
        time.sleep(0.01)
        done, status, usage = os.wait4(pid, os.WNOHANG)
    if not done:
        os.kill(pid, signal.SIGKILL)
        usage = os.wait4(pid, 0)[2]
    code = os.waitstatus_to_exitcode(status) if done else -1
    seconds, waited = usage.ru_utime + usage.ru_stime, time.monotonic() - start
    return {"code": code, "seconds": seconds, "waited": waited, "peak": usage.ru_maxrss * 1024}


def fire(folder: Path, canary: Path, out: Path, pattern: str) -> None:
    """Load live files in the way that runs them, each in a child of its own."""
    import torch

    sys.path.append(str(folder / "modules"))
    os.chdir(out)
    for case in listed(folder, pattern):
        if case["live"]:
            child = os.fork()
            if child == 0:
                unguarded(folder / case["file"], case["live"], torch)
            os.waitpid(child, 0)
            for _ in range(50):
                if canary.exists():
                    break
                time.sleep(0.02)  # Popen does not wait for what it starts
            tell(case=case["file"], ran=canary.exists())
            canary.unlink(missing_ok=True)


def unguarded(path: Path, how: str, torch: Any) -> None:
    """Load one file without any care, and leave."""
    import pickle

    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    signal.alarm(20)
    try:
        if how == "pickle":
            with path.open("rb") as file:
                pickle.load(file)
        elif how == "export":
            torch.export.load(path)
        else:
            torch.load(path, weights_only=False)
    finally:
        os._exit(0)


if __name__ == "__main__":
    mode, folder, canary, *patterns = sys.argv[1:]
    home = Path(folder).absolute()
    out = home.parent / f"out-{mode}"
    out.mkdir()
    {"inside": inside, "apart": apart, "fire": fire}[mode](home, Path(canary).absolute(), out, "".join(patterns))
