"""A sandbox in which a file that is a program is read once, to take its weights out.

A fence (bubblewrap, or namespaces with Landlock) keeps the user's files, the network and other processes out of reach; inside
it, a filter leaves the few system calls that reading takes: no socket, no new process or thread, nothing can be opened for
writing. The weights leave through one file that was opened beforehand, so what comes out is a plain file of bounded size,
whatever the program does. Its content is the program's word: read it as strictly as any other file.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import json
import math
import os
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal, cast

from ..errors import ModelError, RefusedError, check_choice
from .sandbox_worker import NAMESPACES

Program = Literal["torchscript", "exported", "package", "pickle"]
PROGRAMS = ("torchscript", "exported", "package", "pickle")
FENCES = ("bubblewrap", "landlock")
NEEDED = "needs a sandbox: install bubblewrap, or use Linux >= 5.13 with Landlock and user namespaces"

WORKER = Path(__file__).resolve().with_name("sandbox_worker.py")
PACKAGE = WORKER.parents[1]
SYSTEM = ("/usr", "/bin", "/lib", "/lib32", "/lib64", "/etc/ld.so.cache", "/etc/alternatives", "/sys/devices/system/cpu")
KERNEL = ("/dev/null", "/dev/zero", "/dev/urandom", "/dev/random", "/proc/cpuinfo")  # bubblewrap makes its own
ENVIRONMENT = {
    **{"HOME": "/tmp", "USER": "nobody", "LOGNAME": "nobody", "LANG": "C.UTF-8", "PATH": "/usr/bin:/bin"},
    **{"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    "TORCHINDUCTOR_CACHE_DIR": "/tmp",  # torch makes this folder when it imports its exporter; this one is there
}
INSIDE = "/input/file"  # where bubblewrap shows the file
TALK = 16 * 2**20  # bytes that the program may print before it is stopped
KEPT = 2**16


@dataclass(frozen=True)
class Extracted:
    """What came out of the sandbox; all of it is the program's word.

    Attributes:
        weights: A safetensors file.
        fence: ``bubblewrap`` or ``landlock``.
        notes: What the program held, in printable lines of at most 200 characters.
    """

    weights: Path
    fence: str
    notes: tuple[str, ...]


@dataclass
class _Heard:
    """What a worker said: its report (the beginning) and what it printed (the end, with the count of all)."""

    report: bytes = b""
    printed: bytes = b""
    count: int = 0

    @property
    def ready(self) -> bool:
        """Whether the worker said so."""
        return any(entry.get("ready") is True for entry in self.lines()[:1])

    @property
    def last_line(self) -> str:
        """The end of what it printed."""
        return self.printed.decode(errors="replace").strip().rpartition("\n")[2]

    def lines(self) -> list[dict[str, Any]]:
        """Return the whole lines of the report that are JSON objects."""
        found = []
        for line in self.report.split(b"\n")[:-1]:
            with contextlib.suppress(ValueError, RecursionError):
                found.append(json.loads(line))
        return [entry for entry in found if isinstance(entry, dict)]


def available() -> str | None:
    """Return the fence that works here, found by trying: ``bubblewrap``, ``landlock`` or None."""
    return next((fence for fence in FENCES if _works(fence)), None)


def extract(
    path: Path,
    program: Program,
    into: Path,
    *,
    fence: str | None = None,
    seconds: float = 120,
    memory: int = 4 * 2**30,
    output: int = 8 * 2**30,
) -> Extracted:
    """Run a file that is a program inside a sandbox, and take its weights out.

    Args:
        path: The file.
        program: What kind of program it is.
        into: An existing folder; ``weights.safetensors`` appears in it once it is complete.
        fence: ``bubblewrap`` or ``landlock``; None takes what works here.
        seconds: How long it may take, including the start of Python and torch.
        memory: Bytes of memory beyond what torch itself takes.
        output: Bytes of weights.

    Raises:
        ModelError: The program failed, took too long or too much memory, or left nothing that could be weights.
        RefusedError: No fence works here; nothing of the file was run.
    """
    check_choice("program", program, PROGRAMS)
    path = path.resolve()
    if not path.is_file():
        raise ModelError(f"{path} must be a file, found {'a folder' if path.is_dir() else 'none'}")
    if fence is not None:
        check_choice("fence", fence, FENCES)
        fence = fence if _works(fence) else None
    else:
        fence = available()
    if fence is None:
        _readable()  # may know better why
        raise RefusedError(f"{path} {NEEDED}")
    target = into / "weights.safetensors"
    with tempfile.TemporaryDirectory(dir=into, prefix=".sandbox-") as private:
        part = Path(private) / "weights"
        heard = _run(path, program, part, fence, seconds, memory, output)
        notes = _judge(path, heard)
        _check_frame(path, part)
        os.replace(part, target)
    return Extracted(target, fence, notes)


def _judge(path: Path, heard: _Heard) -> tuple[str, ...]:
    """Return the notes of a worker that said it is done."""
    last = heard.lines()[-1]
    if last.get("done") is not True:
        why = last.get("error") or heard.last_line or "it ended without a word"
        raise ModelError(f"{path} could not be read in the sandbox: {_line(why)}")
    notes = last.get("notes")
    return tuple(_line(note) for note in notes[:8]) if isinstance(notes, list) else ()


def _check_frame(path: Path, weights: Path) -> None:
    """Raise `ModelError` unless a file has a safetensors header's length and beginning."""
    size = weights.stat().st_size
    with weights.open("rb") as file:
        head = file.read(9)
    if head[8:] != b"{" or int.from_bytes(head[:8], "little") > size - 8:
        raise ModelError(f"{path} left no safetensors file in the sandbox, but {size} bytes of something else")


def _line(text: object) -> str:
    """Return a text as one printable line of at most 200 ASCII characters."""
    shown = ascii(str(text)[:400])[1:-1].replace("\\'", "'").replace("\\n", " ")
    return shown if len(shown) <= 200 else shown[:197] + "..."


@functools.cache
def _works(fence: str) -> bool:
    """Return whether a worker can fence itself in here, by letting one try."""
    if sys.platform != "linux" or (fence == "bubblewrap" and shutil.which("bwrap") is None):
        return False
    try:
        with tempfile.TemporaryDirectory() as private:
            _run(WORKER, "probe", Path(private) / "weights", fence, 20, 2**30, 2**20)
    except (RefusedError, ModelError, OSError):
        return False
    return True


def _run(path: Path, program: str, weights: Path, fence: str, seconds: float, memory: int, output: int) -> _Heard:
    """Run a worker to its end or to its limits; when this returns or raises, none of its processes is left.

    Raises:
        ModelError: A limit was met, or the worker ended badly after it had opened the file.
        RefusedError: The worker did not get ready, because a fence did not hold; the file was not opened.
    """
    ends = time.monotonic() + seconds
    with contextlib.ExitStack() as stack:
        secret = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="secateur-"))) / "secret"
        secret.write_text("out of reach")
        descriptor = os.open(weights, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
        stack.callback(os.close, descriptor)
        report, report_end = _pipe(stack)
        info, info_end = _pipe(stack)
        settings = {
            **{"program": program, "fence": fence, "input": str(path), "secret": str(secret), "outside": _namespaces()},
            **{"memory": memory, "output": output, "seconds": math.ceil(seconds), "parent": os.getpid()},
            **{"report": report_end.fileno(), "info": info_end.fileno(), "weights": descriptor},
            **{"path": _import_path(), "package": str(PACKAGE), "readable": _readable()},
        }
        command = _bubblewrap(settings) if fence == "bubblewrap" else _python(settings)
        sandbox = stack.enter_context(_started(command, [report_end, info_end, descriptor], info))
        report_end.close()
        info_end.close()
        heard, code = _listen(sandbox, report, ends)
    return _verdict(path, heard, code, seconds)


def _verdict(path: Path, heard: _Heard, code: int | None, seconds: float) -> _Heard:
    """Return what was heard of a worker that ended well or said what went wrong."""
    if code is not None and not heard.ready:
        said = heard.lines()
        why = said[0].get("error") if said else heard.last_line or f"exit code {code}"
        raise RefusedError(f"{path} {NEEDED}; the one here did not hold ({_line(why)})")
    if heard.count > TALK:
        raise ModelError(f"{path} printed more than {TALK} bytes in the sandbox and was stopped")
    if code is None:
        raise ModelError(f"{path} must be read within {seconds:g} seconds in the sandbox, it was stopped")
    if code not in (0, 1):
        raise ModelError(f"{path} broke off in the sandbox: {_ending(code)}")
    return heard


def _ending(code: int) -> str:
    with contextlib.suppress(ValueError):
        return f"{signal.Signals(-code if code < 0 else code - 128).name}, as when memory or time run out"
    return f"exit code {code}"


def _pipe(stack: contextlib.ExitStack) -> tuple[IO[bytes], IO[bytes]]:
    """Return the ends of a pipe for reading, which never blocks, and for writing; both are closed with ``stack``."""
    out, into = os.pipe()
    os.set_blocking(out, False)
    return stack.enter_context(open(out, "rb", buffering=0)), stack.enter_context(open(into, "wb", buffering=0))


class _Sandbox:
    """A started sandbox: the process outside, and once it is known, process 1 inside, by a descriptor."""

    def __init__(self, process: subprocess.Popen[bytes], info: IO[bytes]) -> None:
        self.process = process
        self.first: int | None = None
        self._info = info

    def find_first(self) -> None:
        """Get hold of process 1 of the sandbox, if it was announced and can only be that one."""
        if self.first is not None:
            return
        with contextlib.suppress(ValueError, KeyError, OSError):
            self.first = os.pidfd_open(json.loads(self._info.read(4096) or b"")["child-pid"])
        if self.first is not None and self.process.poll() is not None:
            os.close(self.first)  # it may have gone, and its number be another's by now
            self.first = None

    def go(self) -> None:
        """Let the worker open the file: from here on, the end of everything in the sandbox can be enforced."""
        self.find_first()
        if self.first is None:
            raise RefusedError(f"this {NEEDED}; the one here does not tell its processes")
        with contextlib.suppress(BrokenPipeError):
            os.write(cast("IO[bytes]", self.process.stdin).fileno(), b"g")

    def end(self) -> None:
        """Kill everything and wait for it; the end of process 1 inside comes after that of all others in there."""
        self.find_first()
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        if self.first is not None:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self.first, signal.SIGKILL)
            with selectors.DefaultSelector() as selector:
                selector.register(self.first, selectors.EVENT_READ)
                selector.select(10)
            os.close(self.first)
        for stream in (self.process.stdin, self.process.stdout):
            cast("IO[bytes]", stream).close()
        self.process.wait()


@contextlib.contextmanager
def _started(command: list[str], descriptors: list[IO[bytes] | int], info: IO[bytes]) -> Iterator[_Sandbox]:
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        bufsize=0,
        pass_fds=[d if isinstance(d, int) else d.fileno() for d in descriptors],
        env=ENVIRONMENT,
        cwd="/",
        start_new_session=True,
    )
    sandbox = _Sandbox(process, info)
    try:
        yield sandbox
    finally:
        sandbox.end()


def _listen(sandbox: _Sandbox, report: IO[bytes], ends: float) -> tuple[_Heard, int | None]:
    """Hear a worker out, and give it its go when it is ready; the exit code is None when it has to be stopped."""
    heard, process = _Heard(), sandbox.process
    printed = cast("IO[bytes]", process.stdout)
    os.set_blocking(printed.fileno(), False)
    went = False
    with selectors.DefaultSelector() as selector:
        selector.register(report, selectors.EVENT_READ)
        selector.register(printed, selectors.EVENT_READ)
        while selector.get_map() and heard.count <= TALK and time.monotonic() < ends:
            for key, _ in selector.select(ends - time.monotonic()):
                content = os.read(key.fd, KEPT)
                if not content:
                    selector.unregister(key.fileobj)
                elif key.fileobj is report:
                    heard.report += content[: KEPT - len(heard.report)]
                else:
                    heard.printed = (heard.printed + content)[-KEPT:]
                heard.count += len(content)
            if not went and heard.ready:
                went = True
                sandbox.go()
    if heard.count > TALK or time.monotonic() >= ends:
        return heard, None
    try:
        return heard, process.wait(max(ends - time.monotonic(), 0))
    except subprocess.TimeoutExpired:
        return heard, None


def _namespaces() -> dict[str, int]:
    return {name: os.stat(f"/proc/self/ns/{name}").st_ino for name in NAMESPACES}


def _python(settings: dict[str, Any]) -> list[str]:
    """Return the command that runs the worker by path, with no imports from the environment, the user or the current folder."""
    return [os.path.realpath(sys.executable), "-I", "-S", "-B", str(WORKER), json.dumps(settings)]


def _bubblewrap(settings: dict[str, Any]) -> list[str]:
    """Return the command that runs the worker where only what it imports and the file exist, all of it read-only."""
    command = [shutil.which("bwrap") or "bwrap", "--unshare-all", "--die-with-parent", "--new-session", "--clearenv"]
    command += ["--cap-drop", "ALL", "--proc", "/proc", "--dev", "/dev", "--tmpfs", "/tmp"]  # first: Python may be in /tmp
    for name, value in ENVIRONMENT.items():
        command += ["--setenv", name, value]
    for path in settings["readable"]:
        command += [] if path in KERNEL else ["--ro-bind", path, path]
    command += ["--ro-bind", settings["input"], INSIDE]
    for folder in ("/dev", "/tmp", "/"):
        command += ["--remount-ro", folder]
    command += ["--chdir", "/tmp", "--info-fd", str(settings["info"]), "--"]
    return command + _python({**settings, "input": INSIDE})


def _import_path() -> list[str]:
    """Return the folders that packages are imported from: of those that reading takes, and of all that are made for it."""
    specs = [importlib.util.find_spec(name) for name in ("torch", "numpy")]
    homes = [Path(spec.origin).parents[1] for spec in specs if spec is not None and spec.origin]
    folders = [Path(entry) for entry in sys.path if Path(entry).name in ("site-packages", "dist-packages")]
    return list(dict.fromkeys(str(folder) for folder in [*homes, *folders] if folder.is_dir()))


def _readable() -> list[str]:
    """Return what a worker may read besides the file: the system's programs, Python, and the packages.

    Raises:
        RefusedError: Python or a package lies in a folder that holds the user's home.
    """
    own = [str(PACKAGE), sys.prefix, sys.base_prefix, *_import_path()]
    home = Path(os.path.expanduser("~"))
    for folder in own:
        if home.is_absolute() and home.resolve().is_relative_to(Path(folder).resolve()):
            raise RefusedError(
                f"a sandbox must keep the home folder out, but {folder} holds it and Python: use another environment"
            )
    return [path for path in dict.fromkeys([*SYSTEM, *KERNEL, *own]) if os.path.exists(path)]
