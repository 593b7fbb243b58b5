"""Programs give their weights in the sandbox, and whatever else they try fails."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.package.package_exporter import PackageExporter

from secateur.errors import MethodError, ModelError, RefusedError
from secateur.intake import sandbox, sandbox_worker
from secateur.models import build

needs_x86 = pytest.mark.skipif(os.uname().machine != "x86_64", reason="calls are numbered as on x86_64")


@pytest.fixture(params=["bubblewrap", "landlock"])
def fence(request) -> str:
    if not sandbox._works(request.param):
        pytest.skip(f"{request.param} does not work here")
    return request.param


@pytest.fixture
def any_fence() -> str:
    """The fence that would be taken; `fence` is for what must be seen with each."""
    found = sandbox.available()
    if found is None:
        pytest.skip("no sandbox works here")
    return found


@pytest.fixture(autouse=True)
def nothing_left(tmp_path, monkeypatch) -> Iterator[None]:
    """After each test no process of a sandbox is left; they are known by the secret file's path in their arguments."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    yield
    assert not processes(tmp_path)


def processes(folder: Path) -> list[str]:
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline") if sys.platform == "linux" else ():
        try:
            line = entry.read_bytes().decode(errors="replace")
        except OSError:
            continue
        if "sandbox_worker" in line and str(folder) in line:
            found.append(line)
    return found


@pytest.fixture
def net() -> torch.nn.Module:
    torch.manual_seed(0)
    return build("convnet", width=4, classes=3, in_channels=1).eval()


@pytest.fixture
def into(tmp_path) -> Path:
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


class Runs:
    """An object whose pickle runs code when it is read, and becomes ``answer`` of that code."""

    def __init__(self, code: str) -> None:
        self.code = code

    def __reduce__(self) -> tuple[Any, ...]:
        return eval, (f"[space := {{}}, exec({self.code!r}, space)] and space['answer']",)


def hostile(folder: Path, code: str) -> Path:
    """A checkpoint that holds weights, and runs ``code`` on the way to them."""
    path = folder / "hostile.pt"
    torch.save(Runs(f"import os, sys, torch\nanswer = {{'weight': torch.ones(2)}}\n{code}"), path)
    return path


def honest(program: str, net: torch.nn.Module, path: Path) -> Path:
    example = torch.rand(1, 1, 12, 12)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if program == "torchscript":
            torch.jit.save(torch.jit.trace(net, example), path)
        elif program == "exported":
            torch.export.save(torch.export.export(net, (example,)), path)
        elif program == "package":
            with PackageExporter(str(path)) as exporter:
                exporter.intern("secateur.**")
                exporter.extern("**")
                exporter.save_pickle("models", "net.pkl", net)
                exporter.save_pickle("models", "labels.pkl", ["a", "b"])
        else:
            torch.save({"epoch": 3, "model": net}, path)
    return path


PROGRAMS = ["torchscript", "exported", "package", "pickle"]
SAYS = {"torchscript": "TorchScript of", "exported": "exported", "package": "models/net.pkl", "pickle": "under 'model'"}


def extract(path: Path, into: Path, **kwargs: Any) -> sandbox.Extracted:
    return sandbox.extract(path, kwargs.pop("program", "pickle"), into, **kwargs)


def same(got: dict[str, torch.Tensor], net: torch.nn.Module) -> bool:
    wanted = net.state_dict()
    return got.keys() == wanted.keys() and all(
        got[k].dtype == wanted[k].dtype and torch.equal(got[k], wanted[k]) for k in wanted
    )


def refusal(caught: pytest.ExceptionInfo[Exception]) -> str:
    message = str(caught.value)
    assert message.isprintable()
    assert len(message) < 600
    return message


def quick(*cases: tuple[str, Any]) -> list[Any]:
    """Parameters for a fence and something else, those left out marked as slow: each run imports torch."""
    others = list(dict.fromkeys(case[1] for case in cases))
    every = [(fence, other) for fence in sandbox.FENCES for other in others]
    return [case if case in cases else pytest.param(*case, marks=pytest.mark.slow) for case in every]


@pytest.mark.parametrize(
    ("fence", "program"),
    quick(*(("bubblewrap", program) for program in PROGRAMS), ("landlock", "exported"), ("landlock", "pickle")),
    indirect=["fence"],
)
def test_weights_come_out_bit_for_bit(program, fence, net, tmp_path, into):
    path = honest(program, net, tmp_path / f"given.{'pt2' if program == 'exported' else 'pt'}")
    before = path.read_bytes()
    result = extract(path, into, program=program, fence=fence)
    assert result.fence == fence
    assert result.weights == into / "weights.safetensors"
    assert same(load_file(result.weights), net)
    assert SAYS[program] in result.notes[0]
    assert os.listdir(into) == ["weights.safetensors"]
    assert path.read_bytes() == before


@pytest.mark.parametrize("program", PROGRAMS)
def test_trusted_code_is_read_in_this_process(program, net, tmp_path):
    state, notes = sandbox_worker.read_program(honest(program, net, tmp_path / "given.pt2"), program)
    assert same(state, net)
    assert SAYS[program] in notes[0]


# What a program may try. Each line is an expression that ends well where it succeeds; none may.
ATTEMPTS = """
read a file: open(SECRET).read()
read the system's users: open('/etc/passwd').read()
read another process: open(f'/proc/{PARENT}/environ').read()
list the folder: os.listdir(FOLDER)
list the home: os.listdir(HOME) and 1 / (set(os.listdir(HOME)) > {os.path.basename(SECRET)})
write a file: open(CANARY, 'w')
write beside the file: open(os.path.dirname(GIVEN) + '/CANARY', 'w')
write into the output's folder: open(OUT + '/CANARY', 'w')
write into /tmp: open('/tmp/CANARY', 'w')
write into /dev/shm: open('/dev/shm/CANARY', 'w')
write to a package: open(torch.__file__, 'a')
write to itself: open(GIVEN, 'r+b')
write to the process's memory: open('/proc/self/mem', 'wb')
open the output by name: open('/proc/self/fd/' + str(WEIGHTS), 'r+b')
make a folder: os.mkdir(CANARY)
make a link: os.symlink(SECRET, CANARY)
make a hard link: os.link(SECRET, CANARY)
make a link in place of the output: os.symlink(SECRET, OUT + '/weights.safetensors')
make a pipe: os.mkfifo(CANARY)
delete the file: os.unlink(GIVEN)
rename the secret: os.rename(SECRET, CANARY)
truncate the file: os.truncate(GIVEN, 0)
truncate the secret: os.truncate(SECRET, 0)
change a mode: os.chmod(SECRET, 0o777)
change the file's mode: os.chmod(GIVEN, 0o777)
make the output a program of its owner: os.fchmod(WEIGHTS, 0o6755)
change an owner: os.chown(GIVEN, -1, -1)
change times: os.utime(GIVEN)
set an attribute: os.setxattr(GIVEN, 'user.x', b'x')
run a command: os.system('touch ' + CANARY) and 1 / 0
become a program: os.execv('/usr/bin/touch', ['touch', CANARY])
start a command: subprocess.run(['touch', CANARY])
start a process: os.fork()
start a thread: threading.Thread(target=int).start()
connect to a port: socket.create_connection(('127.0.0.1', PORT), 2)
connect to a path: socket.socket(socket.AF_UNIX).connect(PATH)
open a pair of sockets: socket.socketpair()
look up a name: socket.create_connection(('localhost', PORT), 2)
kill the parent: os.kill(PARENT, 9)
kill the group: os.killpg(0, 9)
kill everything: os.kill(-1, 9)
kill process 1: os.kill(1, 9)
signal the parent: signal.pidfd_send_signal(os.pidfd_open(PARENT), 9)
leave the group: os.setpgid(0, 0)
leave the session: os.setsid()
outlive the parent: call(157, 1, 0, 0, 0, 0)
become root: os.setuid(0) or os.setgroups([0])
raise a limit: resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY,) * 2)
raise the limit of output: resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
memory without end: mmap.mmap(-1, 10 * 2**30)
trace: call(101, 0, 0, 0, 0)
read a process's memory: call(310, PARENT, 0, 0, 0, 0, 0)
memory that is a file: os.memfd_create('x')
shared memory: call(29, 0, 2**30, 0o1600)
new namespaces: call(272, 0x10000000)
enter a namespace: call(308, WEIGHTS, 0)
mount: call(165, 0, b'/tmp', b'tmpfs', 0, 0)
unmount: call(166, b'/tmp', 2)
change the root: os.chroot('/')
pivot the root: call(155, b'/', b'/')
new ways to mount: call(430, b'tmpfs', 0)
clone: call(56, 0x11, 0, 0, 0, 0)
clone anew: call(435, bytes([0] * 88), 88)
open anew: call(437, -100, GIVEN.encode(), bytes([2] + [0] * 23), 24)
keys: call(248, b'user', b'x', b'y', 1, -3)
ring of calls: call(425, 4, bytes(120))
kernel programs: call(321, 0, bytes(120), 120)
performance events: call(298, bytes(120), 0, -1, -1, 0)
faults by hand: call(323, 0)
open by handle: call(304, -100, bytes(120), 0)
a call of the old kind: call(0x40000000 + 39)
terminal input: fcntl.ioctl(0, 0x5412, b'x')
"""

HELD_BY_THE_FILTER_ALONE = {
    *("change a mode", "change the file's mode", "make the output a program of its owner", "change an owner", "change times"),
    *("set an attribute", "start a thread", "start a command", "open a pair of sockets", "kill process 1", "leave the group"),
    *("outlive the parent", "trace", "read a process's memory", "memory that is a file", "shared memory", "new namespaces"),
    *("change the root", "keys", "write to the process's memory", "list the folder"),  # the weaker worker's is shown
}
TRIES = """
import ctypes, fcntl, glob, mmap, resource, signal, socket, subprocess, threading
libc = ctypes.CDLL(None, use_errno=True)
def call(number, *arguments):
    if libc.syscall(number, *arguments) < 0:
        raise OSError(ctypes.get_errno(), 'refused')
WEIGHTS = max(n for n in range(3, 64) if n in [int(os.path.basename(p)) for p in glob.glob('/proc/self/fd/*')] or tried(n))
for line in ATTEMPTS.strip().splitlines():
    name, _, expression = line.partition(': ')
    try:
        eval(expression)
        answer['succeeded: ' + name] = torch.ones(1)
    except (OSError, RuntimeError, ValueError, ZeroDivisionError):
        pass
    except Exception as error:
        answer[f'misspelt: {name}: {error}'] = torch.ones(1)
answer['tried'] = torch.tensor(len(ATTEMPTS.strip().splitlines()))
answer['variables'] = torch.tensor([ord(c) for c in ','.join(sorted(os.environ))])
"""
TRIED = """
def tried(number):
    try:
        return bool(os.fstat(number))
    except OSError:
        return False
"""


def trying(folder: Path, fence: str, **names: object) -> Path:
    """A file that tries everything, and tells what succeeded by the names of its tensors."""
    path = folder / "hostile.pt"
    given = sandbox.INSIDE if fence == "bubblewrap" else str(path)
    names |= {"CANARY": str(folder / "CANARY"), "FOLDER": str(folder), "HOME": str(Path.home()), "OUT": str(folder / "out")}
    names = {"GIVEN": given, "PARENT": os.getpid(), "ATTEMPTS": ATTEMPTS, **names}
    return hostile(folder, f"{TRIED}\nglobals().update({names!r})\n{TRIES}")


def states(*paths: Path) -> list[tuple[int, int, int, bytes]]:
    return [(p.stat().st_mode, p.stat().st_nlink, p.stat().st_mtime_ns, p.read_bytes()) for p in paths]


@needs_x86
def test_whatever_a_program_tries_fails(fence, tmp_path, into, monkeypatch):
    monkeypatch.setenv("TOKEN", "of the user")
    secret = tmp_path / "a secret"
    secret.write_text("of the user")
    with socket.create_server(("127.0.0.1", 0)) as by_port, socket.socket(socket.AF_UNIX) as by_path:
        by_path.bind(str(tmp_path / "socket"))
        by_path.listen()
        by_path.setblocking(False)
        by_port.setblocking(False)
        port = by_port.getsockname()[1]
        path = trying(tmp_path, fence, SECRET=str(secret), PORT=port, PATH=str(tmp_path / "socket"))
        before = states(secret, path)
        got = load_file(extract(path, into, fence=fence).weights)
        for listening in (by_port, by_path):
            with pytest.raises(BlockingIOError):
                listening.accept()
    assert not [name for name in got if name.startswith(("succeeded", "misspelt"))]
    assert got["tried"] == len(ATTEMPTS.strip().splitlines())
    variables = "".join(map(chr, got["variables"].tolist()))
    assert "PATH" in variables
    assert "TOKEN" not in variables
    assert states(secret, path) == before
    assert not list(tmp_path.rglob("CANARY"))
    assert Path(torch.__file__).stat().st_mtime < time.time() - 1


@needs_x86
@pytest.mark.slow
def test_without_the_filter_of_calls_the_other_fence_still_holds(fence, tmp_path, into, monkeypatch):
    suicides = ("kill the group", "kill everything", "become a program", "start a process", "clone")
    held = [line for line in ATTEMPTS.strip().splitlines() if not line.startswith(suicides)]
    weaker(monkeypatch, tmp_path, *UNFILTERED)
    secret = tmp_path / "a secret"
    secret.write_text("of the user")
    with socket.create_server(("127.0.0.1", 0)) as by_port:
        path = trying(
            tmp_path,
            fence,
            SECRET=str(secret),
            PORT=by_port.getsockname()[1],
            PATH=str(tmp_path / "none"),
            ATTEMPTS="\n".join(held),
        )
        got = load_file(extract(path, into, fence=fence).weights)
    succeeded = {name.removeprefix("succeeded: ") for name in got if name.startswith("succeeded")}
    assert succeeded, "without the filter some attempts must succeed, or they try nothing"
    assert succeeded <= HELD_BY_THE_FILTER_ALONE
    assert secret.read_text() == "of the user"
    assert not list(tmp_path.rglob("CANARY"))


ENDS = {
    "spins": ("while True: pass", {"seconds": 3}, "within 3 seconds"),
    "sleeps with its outputs closed": (
        "os.closerange(0, 64)\nimport time\ntime.sleep(600)",
        {"seconds": 4},
        "within 4 seconds",
    ),
    "prints": ("while True: print('x' * 999)", {}, "printed more than"),
    "reports": ("while True: [os.write(n, b'x' * 999) for n in range(3, 20) if n == REPORT]", {"seconds": 20}, "printed more"),
    "takes memory": ("answer['x'] = torch.ones(10 * 2**30 // 4)", {"memory": 2**29}, "memory"),
    "takes memory in pieces": ("x = [bytes(2**20) for _ in range(9999)]", {"memory": 2**29}, "MemoryError"),
    "writes": ("answer['x'] = torch.ones(1).expand(2**20)", {"output": 2**16}, "File too large"),
    "raises": ("raise ValueError('\\x1b[31m\\nred \\u202e' + 'x' * 9999)", {}, "ValueError: "),
    "exits": ("os._exit(3)", {}, "exit code 3"),
    "ends well": ("os._exit(0)", {}, "without a word"),
    "crashes": ("import ctypes; ctypes.string_at(0)", {}, "SIGSEGV"),
    "aborts": ("os.abort()", {}, "SIGABRT"),
    "calls as a 32-bit program": (
        "import ctypes, mmap\ncode = mmap.mmap(-1, 4096, prot=7)\ncode[:8] = bytes.fromhex('b814000000cd80c3')\n"
        "ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(code)))()",
        {},
        "SIGSYS" if os.uname().machine == "x86_64" else "SIG",
    ),
    "imports": ("import not_a_module", {}, "ModuleNotFoundError"),
    "holds nothing": ("answer = {'epoch': 3}", {}, "no state dict: builtins.dict"),
    "forges": (
        "os.write(WEIGHTS, b'not weights'); os.write(REPORT, b'{\"done\": true}\\n'); os._exit(0)",
        {},
        "no safetensors file",
    ),
    "forges a length": (
        "os.write(WEIGHTS, b'\\xff' * 8 + b'{'); os.write(REPORT, b'{\"done\": true}\\n'); os._exit(0)",
        {},
        "no safe",
    ),
    "forges nothing": ("os.write(REPORT, b'{\"done\": true}\\n'); os._exit(0)", {}, "but 0 bytes"),
    "forges a report": (
        "os.write(REPORT, b'[]\\n{\"error\": {\"a\": [1]}}\\n{]\\n' + b'[' * 9999); os._exit(0)",
        {},
        r"\{'a': \[1\]\}",
    ),
}
QUICK = ["spins", "prints", "takes memory", "writes", "raises", "forges"]
FIND = """
import stat
WEIGHTS = next(n for n in range(3, 64) if FIND_MODE(n, stat.S_ISREG) and n > 2 and os.get_blocking(n) and fcntl.fcntl(n, 3) & 1)
REPORT = next(n for n in range(3, 64) if FIND_MODE(n, stat.S_ISFIFO) and fcntl.fcntl(n, 3) & 1)
"""
FIND_MODE = """
import fcntl
def FIND_MODE(n, kind):
    try:
        return kind(os.fstat(n).st_mode)
    except OSError:
        return False
"""


@pytest.mark.parametrize("how", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in ENDS])
def test_programs_that_end_badly_are_told(how, any_fence, tmp_path, into):
    check_end(how, any_fence, tmp_path, into)


@pytest.mark.slow
@pytest.mark.parametrize("how", ENDS)
def test_programs_end_as_badly_behind_the_other_fence(how, any_fence, tmp_path, into):
    if any_fence == "landlock":
        pytest.skip("it was seen behind Landlock")
    check_end(how, "landlock", tmp_path, into)


def check_end(how: str, fence: str, tmp_path: Path, into: Path) -> None:
    code, limits, message = ENDS[how]
    path = hostile(tmp_path, FIND_MODE + FIND + code)
    started = time.monotonic()
    with pytest.raises(ModelError, match=message) as caught:
        extract(path, into, fence=fence, **limits)
    assert str(path) in refusal(caught)
    assert time.monotonic() - started < 30
    assert os.listdir(into) == []


# With one fence gone, the others must still hold: here a worker that filters no calls, so that processes can be started.
BOMB = """
import signal, time
for n in range(20):
    if os.fork() == 0:
        os.setsid()
        signal.pthread_sigmask(signal.SIG_BLOCK, range(1, 65))
        __import__('ctypes').CDLL(None).prctl(1, 0, 0, 0, 0)
        time.sleep(600)
        os._exit(0)
"""


UNFILTERED = ("_allow_few_calls()", '_check_calls(settings["secret"], settings["input"])')


def weaker(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, *lines: str) -> None:
    """Let sandboxes run a worker without these lines."""
    text = sandbox.WORKER.read_text("utf-8").splitlines()
    for line in lines:
        [at] = [at for at, own in enumerate(text) if own.strip() == line]
        text[at] = text[at].replace(line, "pass")
    (tmp_path / "weaker").mkdir()
    (tmp_path / "weaker" / "sandbox_worker.py").write_text("\n".join(text))
    monkeypatch.setattr(sandbox, "WORKER", tmp_path / "weaker" / "sandbox_worker.py")
    readable = sandbox._readable()
    monkeypatch.setattr(sandbox, "_readable", lambda: [*readable, str(tmp_path / "weaker")])


@pytest.mark.parametrize(("fence", "stays"), quick(("bubblewrap", False), ("landlock", True)), indirect=["fence"])
def test_children_do_not_outlive_the_call(stays, fence, tmp_path, into, monkeypatch):
    weaker(monkeypatch, tmp_path, *UNFILTERED)
    path = hostile(tmp_path, BOMB + ("time.sleep(600)" if stays else ""))
    if stays:
        with pytest.raises(ModelError, match="within 3 seconds"):
            extract(path, into, fence=fence, seconds=3)
    else:
        assert load_file(extract(path, into, fence=fence).weights)["weight"].tolist() == [1, 1]
    assert not processes(tmp_path)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("_allow_few_calls()", "opening a socket works"),
        ('_landlock([*settings["readable"], settings["input"]])', "reading a file elsewhere works"),
        ('_call("unshare", sum(NAMESPACES.values()))', "no namespaces here"),
    ],
)
def test_a_fence_that_does_not_hold_is_noticed(line, message, tmp_path, into, monkeypatch, net):
    if not sandbox._works("landlock"):
        pytest.skip("landlock does not work here")
    weaker(monkeypatch, tmp_path, line)
    with pytest.raises(RefusedError, match=message) as caught:
        extract(hostile(tmp_path, ""), into, fence="landlock")
    refusal(caught)
    assert os.listdir(into) == []


@pytest.mark.parametrize(
    ("option", "message"),
    [("--unshare-all", "the user namespace is the one outside|the .* namespace"), ("--remount-ro", "writing a file works")],
)
def test_a_bubblewrap_that_does_not_hold_is_noticed(option, message, tmp_path, into, monkeypatch):
    if not sandbox._works("bubblewrap"):
        pytest.skip("bubblewrap does not work here")
    whole = sandbox._bubblewrap

    def less(settings: dict[str, Any]) -> list[str]:
        command = whole(settings)
        while option in command:
            at = command.index(option)
            del command[at : at + (2 if option == "--remount-ro" else 1)]
        return command

    monkeypatch.setattr(sandbox, "_bubblewrap", less)
    with pytest.raises(RefusedError, match=message) as caught:
        extract(hostile(tmp_path, ""), into, fence="bubblewrap")
    refusal(caught)


def test_without_a_fence_nothing_runs(tmp_path, into, monkeypatch):
    path = hostile(tmp_path, f"open({str(tmp_path / 'CANARY')!r}, 'w')")
    monkeypatch.setattr(sandbox, "_works", lambda fence: False)
    assert sandbox.available() is None
    for fence in (None, "landlock"):
        with pytest.raises(RefusedError, match=r"needs a sandbox: install bubblewrap, or use Linux >= 5\.13") as caught:
            extract(path, into, fence=fence)
        assert refusal(caught).endswith("user namespaces")
    assert not (tmp_path / "CANARY").exists()


def test_without_bubblewrap_landlock_is_taken(monkeypatch):
    monkeypatch.setattr(sandbox, "_works", lambda fence: fence == "landlock")
    assert sandbox.available() == "landlock"


def test_the_other_fence_is_not_taken_for_the_one_asked_for(tmp_path, into, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr(sandbox, "_works", sandbox._works.__wrapped__)
    with pytest.raises(RefusedError, match="needs a sandbox"):
        extract(hostile(tmp_path, ""), into, fence="bubblewrap")


def test_python_in_the_home_folder_itself_is_refused(any_fence, tmp_path, into, monkeypatch):
    monkeypatch.setenv("HOME", sys.prefix + "/home")
    monkeypatch.setattr(sandbox, "_works", sandbox._works.__wrapped__)
    with pytest.raises(RefusedError, match="must keep the home folder out"):
        extract(hostile(tmp_path, ""), into)


@pytest.mark.parametrize("fence", ["landlock", pytest.param("bubblewrap", marks=pytest.mark.slow)], indirect=True)
def test_ctrl_c_leaves_nothing(fence, tmp_path, into, monkeypatch):
    path = hostile(tmp_path, "while True: pass")
    go = sandbox._Sandbox.go

    def going(self: sandbox._Sandbox) -> None:
        go(self)
        assert processes(tmp_path)
        threading.Timer(0.1, signal.pthread_kill, [threading.get_ident(), signal.SIGINT]).start()

    monkeypatch.setattr(sandbox._Sandbox, "go", going)
    with pytest.raises(KeyboardInterrupt):
        extract(path, into, fence=fence)
    assert not processes(tmp_path)
    assert os.listdir(into) == []


@pytest.mark.slow
def test_a_killed_parent_leaves_nothing(fence, tmp_path, into):
    path = hostile(tmp_path, "print('going', flush=True)\nwhile True: pass")
    code = f"""
import tempfile
from pathlib import Path
from secateur.intake import sandbox
tempfile.tempdir = {str(tmp_path)!r}
go = sandbox._Sandbox.go
sandbox._Sandbox.go = lambda self: (go(self), print("going", flush=True))
sandbox.extract(Path({str(path)!r}), "pickle", Path({str(into)!r}), fence={fence!r})
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == b"going\n"
        assert processes(tmp_path)
        parent.kill()
    ends = time.monotonic() + 5
    while processes(tmp_path) and time.monotonic() < ends:
        time.sleep(0.05)
    assert not processes(tmp_path)
    shutil.rmtree(tmp_path, ignore_errors=True)


def test_wrong_usage(tmp_path, into):
    path = tmp_path / "given.pt"
    path.write_bytes(b"x")
    with pytest.raises(MethodError, match="unknown program 'keras'"):
        extract(path, into, program="keras")
    with pytest.raises(MethodError, match="unknown fence 'chroot'"):
        extract(path, into, fence="chroot")
    with pytest.raises(ModelError, match="must be a file, found a folder"):
        extract(tmp_path, into)
    with pytest.raises(ModelError, match="must be a file, found none"):
        extract(tmp_path / "none", into)


@pytest.mark.parametrize(
    ("content", "keys"),
    [
        ({"a": torch.ones(2), "epoch": 3}, ["a"]),
        ({"state_dict": {"a": torch.ones(2)}, "b": torch.ones(1)}, ["a"]),
        ({"model": torch.nn.Linear(2, 1)}, ["weight", "bias"]),
        ({"net": {"ema": {"model": torch.nn.Linear(2, 1)}}}, ["weight", "bias"]),
        (torch.nn.ModuleDict({"x": torch.nn.Linear(2, 1)}), ["x.weight", "x.bias"]),
        ({"model": {"model": {"model": {"model": {"model": {"a": torch.ones(1)}}}}}}, []),
        ([torch.ones(2)], []),
        (3, []),
    ],
)
def test_where_weights_are_found(content, keys):
    state, _ = sandbox_worker._state(content)
    assert list(state) == keys
    assert not any(value.requires_grad for value in state.values())


def test_packages_of_several_networks_are_ambiguous(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with PackageExporter(str(tmp_path / "two.pt")) as exporter:
            exporter.extern("**")
            for name in ("a.pkl", "b.pkl"):
                exporter.save_pickle("models", name, torch.nn.Linear(2, 1))
    with pytest.raises(ValueError, match=r"must hold one network, found 2: models/a\.pkl, models/b\.pkl"):
        sandbox_worker.read_program(tmp_path / "two.pt", "package")


def test_weights_are_written_as_safetensors_reads_them(tmp_path):
    base = torch.arange(12.0).reshape(3, 4)
    state = {
        **{
            "whole": base,
            "view": base.T,
            "part": base[1:, ::2],
            "same": base,
            "empty": torch.zeros(0, 3),
            "one": torch.tensor(5),
        },
        **{"wide": torch.ones(1).expand(7), "yes": torch.tensor([True, False]), "half": base.half(), "brain": base.bfloat16()},
        **{"small": base.to(torch.float8_e4m3fn), "byte": base.to(torch.uint8), "\n\u00e9\ud800": base.double()},
    }
    odd = {"sparse": base.to_sparse(), "complex": base.to(torch.complex64), "meta": base.to("meta")}
    with (tmp_path / "out").open("wb") as file:
        notes = sandbox_worker.write_weights(file.fileno(), {**odd, **state})
    assert notes == ("left out 3 tensors of unusual kinds, such as sparse",)
    del state["\n\u00e9\ud800"]  # no text that safetensors accepts: written, for the reader to refuse
    with pytest.raises(Exception, match="header"):
        load_file(tmp_path / "out")
    with (tmp_path / "out").open("wb") as file:
        assert sandbox_worker.write_weights(file.fileno(), state) == ()
    got = load_file(tmp_path / "out")
    assert got.keys() == state.keys()
    for key, value in state.items():
        assert got[key].dtype == value.dtype
        assert got[key].shape == value.shape
        assert torch.equal(got[key].reshape(-1).view(torch.uint8), value.reshape(-1).contiguous().view(torch.uint8)), key
    with pytest.raises(ValueError, match="no tensors"):
        sandbox_worker.write_weights(-1, odd)


@pytest.mark.skipif(not Path("/usr/include/asm-generic/unistd.h").exists(), reason="needs the kernel's headers")
def test_calls_have_the_kernels_numbers():
    found = []
    for header in ("x86_64-linux-gnu/asm/unistd_64.h", "asm-generic/unistd.h"):
        path = Path("/usr/include", header)
        text = path.read_text() if path.exists() else ""
        found.append({m[1]: m[2] for m in re.finditer(r"#define __NR(?:3264)?_(\w+)\s+(\d+)", text)})
    x86, generic = found
    generic["newfstatat"] = generic["fstatat"]
    for entry in f"{sandbox_worker._CALLS},{sandbox_worker._OPEN},{sandbox_worker._IOCTL}".split(","):
        name, first, second = entry.split()
        assert not x86 or first == x86.get(name, "-")
        assert second in (generic.get(name), "-")


def test_importing_it_imports_no_torch():
    code = "import sys; from secateur.intake import sandbox; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
