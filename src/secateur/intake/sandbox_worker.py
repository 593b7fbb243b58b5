"""The inside of the sandbox: one process that fences itself in, proves it, and only then reads a file that is a program.

Run by path as a script (``python -I -S sandbox_worker.py SETTINGS``), it uses nothing of this package. It says ``ready`` once
all fences hold, waits for the parent's go, reads the file, writes the weights to a file that was opened for it and says what it
read. Nothing it says or writes after the go can be trusted: by then, the file's own code may be speaking.

`read_program` is also what ``--trust-code`` runs, in the user's own process and without any fence.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import json
import os
import signal
import stat
import struct
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from torch import Tensor

CONTAINERS = ("state_dict", "model", "net", "model_state_dict", "ema")

NAMESPACES = {
    "user": 0x10000000,
    "mnt": 0x00020000,
    "pid": 0x20000000,
    "net": 0x40000000,
    "ipc": 0x08000000,
    "uts": 0x04000000,
}
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_CAPBSET_DROP, _PR_SET_NO_NEW_PRIVS, _PR_CAP_AMBIENT = 1, 4, 24, 38, 47

# Landlock: all rights on files that the versions of its interface know, and which of them are granted for reading.
_LANDLOCK_CREATE, _LANDLOCK_ADD, _LANDLOCK_RESTRICT = 444, 445, 446  # the same numbers on both machines
_FILE_RIGHTS = {1: 13, 2: 14, 3: 15, 4: 15}  # version: number of rights; 16 from version 5 on
_READ_FILE, _READ_DIR = 1 << 2, 1 << 3

# Seccomp: the calls that reading a file takes, as "name x86_64 aarch64". Whatever is not here cannot be called: no socket, no
# process or thread, no other program, no change of a file's name, mode or owner, no mount, none of the kernel's rarer features.
_CALLS = """
read 0 63, readv 19 65, pread64 17 67, preadv 295 69, write 1 64, writev 20 66, pwrite64 18 68, close 3 57, close_range 436 436,
lseek 8 62, fstat 5 80, stat 4 -, lstat 6 -, newfstatat 262 79, statx 332 291, statfs 137 43, fstatfs 138 44, access 21 -,
faccessat 269 48, faccessat2 439 439, readlink 89 -, readlinkat 267 78, getdents 78 -, getdents64 217 61, getcwd 79 17,
dup 32 23, dup2 33 -, dup3 292 24, pipe 22 -, pipe2 293 59, fcntl 72 25, fsync 74 82, fdatasync 75 83, ftruncate 77 46,
fadvise64 221 223, poll 7 -, ppoll 271 73, select 23 -, pselect6 270 72, mmap 9 222, munmap 11 215, mprotect 10 226,
mremap 25 216, madvise 28 233, mincore 27 232, msync 26 227, brk 12 214, membarrier 324 283, get_mempolicy 239 236,
rt_sigaction 13 134, rt_sigprocmask 14 135, rt_sigreturn 15 139, sigaltstack 131 132, tgkill 234 131, restart_syscall 219 128,
futex 202 98, get_robust_list 274 100, set_robust_list 273 99, set_tid_address 218 96, rseq 334 293, arch_prctl 158 -,
clock_gettime 228 113, clock_getres 229 114, clock_nanosleep 230 115, nanosleep 35 101, gettimeofday 96 169, time 201 -,
times 100 153, getpid 39 172, getppid 110 173, gettid 186 178, getuid 102 174, geteuid 107 175, getgid 104 176, getegid 108 177,
getpgrp 111 -, getrlimit 97 163, prlimit64 302 261, getrusage 98 165, getcpu 309 168, sched_yield 24 124,
sched_getaffinity 204 123, sysinfo 99 179, uname 63 160, getrandom 318 278, exit 60 93, exit_group 231 94
"""
_OPEN = "open 2 -, openat 257 56"  # only for reading
_IOCTL = "ioctl 16 29"  # "not a terminal" is all it may say
_MACHINES = {"x86_64": (0, 0xC000003E, 317, 126), "aarch64": (1, 0xC00000B7, 277, 91)}  # column, audit arch, seccomp, capset
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
_EPERM, _ENOTTY, _ENOSYS = 1, 25, 38

DTYPES = {
    **{"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "bool": "BOOL"},
    **{"int64": "I64", "int32": "I32", "int16": "I16", "int8": "I8", "uint8": "U8"},
    **{"uint64": "U64", "uint32": "U32", "uint16": "U16", "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2"},
}


class BrokenFence(Exception):
    """A fence could not be set, or what it should forbid works."""


def read_program(path: str | os.PathLike[str], program: str) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Run a file that is a program, in this process, and return its tensors by name and notes on what it held.

    Args:
        path: The file. Its code runs with every right that this process has.
        program: ``torchscript``, ``exported``, ``package`` or ``pickle``.

    Raises:
        ValueError: The file holds no tensors, or more than one network.
        Exception: Whatever torch or the file's own code raises.
    """
    readers = {"torchscript": _torchscript, "exported": _exported, "package": _package, "pickle": _pickled}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return readers[program](os.fspath(path))


def _torchscript(path: str) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    import torch

    module = torch.jit.load(path, map_location="cpu")
    return _tensors(module.state_dict()), (f"TorchScript of {getattr(module, 'original_name', 'a module')}",)


def _exported(path: str) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Add to the state dict what was stored beside it: buffers that are not part of it, but no unnamed constants."""
    import torch.export

    program = torch.export.load(path)
    beside = {name: value for name, value in program.constants.items() if name not in program.state_dict}
    unnamed = [name for name in beside if name.rpartition(".")[2].startswith("lifted_tensor_")]
    named = {name: value for name, value in beside.items() if name not in unnamed}
    left_out = (f"left out {len(unnamed)} unnamed constants",) if unnamed else ()
    return _tensors({**program.state_dict, **named}), ("an exported program", *left_out)


def _package(path: str) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    from torch import nn
    from torch.package.package_importer import PackageImporter

    importer = PackageImporter(path)
    names = sorted(n for n in importer.zip_reader.get_all_records() if n.endswith(".pkl") and not n.startswith(".data/"))
    modules, mappings = {}, {}
    for name in names:
        package, _, resource_name = name.rpartition("/")
        content = importer.load_pickle(package.replace("/", "."), resource_name, map_location="cpu")
        state, kind = _state(content)
        if state:
            (modules if isinstance(content, nn.Module) else mappings)[name] = state, kind
    found = modules or mappings
    if len(found) != 1:
        raise ValueError(f"a package must hold one network, found {len(found)}: {', '.join(found) or 'none'}")
    [(name, (state, kind))] = found.items()
    return state, (f"{name} of a package: {kind}",)


def _pickled(path: str) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    import torch

    with open(path, "rb") as file:  # by its path, torch would look at the extension
        content = torch.load(file, map_location="cpu", weights_only=False)
    state, kind = _state(content)
    if not state:
        raise ValueError(f"found no module and no state dict: {kind}")
    return state, (f"a pickle: {kind}",)


def _state(content: Any, depth: int = 4) -> tuple[dict[str, Tensor], str]:
    """Return the tensors of a module or mapping, or of one under the usual keys, and what it is; none when there are none."""
    from torch import nn

    kind = f"{type(content).__module__}.{type(content).__qualname__}"
    if isinstance(content, nn.Module):
        return _tensors(content.state_dict()), kind
    if not isinstance(content, Mapping):
        return {}, kind
    key = next((key for key in CONTAINERS if isinstance(content.get(key), Mapping | nn.Module)), None)
    if key is None or not depth:
        return _tensors(content), kind
    state, inner = _state(content[key], depth - 1)
    return state, f"{inner} under '{key}'"


def _tensors(content: Mapping[Any, Any]) -> dict[str, Tensor]:
    from torch import Tensor

    return {key: value.detach() for key, value in content.items() if isinstance(key, str) and isinstance(value, Tensor)}


def write_weights(descriptor: int, state: Mapping[str, Tensor]) -> tuple[str, ...]:
    """Write dense tensors to an open file in safetensors' format, one after another, and return notes on those left out.

    The format is written here because the library opens its file by name, and in here nothing can be opened for writing.
    """
    import torch

    dense = {
        key: value
        for key, value in state.items()
        if value.layout == torch.strided and not value.is_quantized and value.device.type == "cpu" and _dtype(value) in DTYPES
    }
    if not dense:
        raise ValueError("found no tensors that can be written as weights")
    order = sorted(dense, key=lambda key: (-dense[key].element_size(), key))
    header, end = {}, 0
    for key in order:
        start, end = end, end + dense[key].numel() * dense[key].element_size()
        header[key] = {"dtype": DTYPES[_dtype(dense[key])], "shape": list(dense[key].shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    _write(descriptor, struct.pack("<Q", len(text)) + text)
    for key in order:
        if dense[key].numel():
            _write(descriptor, dense[key].contiguous().reshape(-1).view(torch.uint8).numpy().data)
    left_out = [key for key in state if key not in dense]
    return (f"left out {len(left_out)} tensors of unusual kinds, such as {left_out[0]}",) if left_out else ()


def _dtype(value: Tensor) -> str:
    return str(value.dtype).removeprefix("torch.")


def _write(descriptor: int, content: bytes | memoryview) -> None:
    rest = memoryview(content)
    while rest:
        rest = rest[os.write(descriptor, rest[: 1 << 26]) :]


def main(settings: Mapping[str, Any]) -> None:
    """Fence this process in, say ready, wait for the go, read the file and write its weights.

    Args:
        settings: ``program`` (or ``probe``: stop before the go), ``fence``, ``input``, ``secret`` (a file that must be out of
            reach), ``outside`` (ids of the parent's namespaces), ``readable`` (what Landlock leaves open), ``path`` (for
            imports), ``package`` (this package's folder), ``memory``, ``output`` (bytes), ``seconds``, ``parent`` (its process
            id) and the descriptors ``report``, ``info`` and ``weights``.
    """
    report = settings["report"]
    sys.excepthook = lambda kind, error, trace: _say(report, error=f"{kind.__name__}: {error}"[:1000])
    try:
        if settings["fence"] == "landlock":
            _isolate(settings["parent"], settings["info"])
        size = os.open("/proc/self/statm", os.O_RDONLY)
        _check_namespaces(settings["outside"])
        _drop_capabilities()
        if settings["fence"] == "landlock":
            _landlock([*settings["readable"], settings["input"]])
        _check_files(settings["secret"], settings["input"])
        sys.path += settings["path"]
        if settings["program"] != "probe":
            _import_all(settings["package"])
        _limit(settings, size)
        _allow_few_calls()
        _check_calls(settings["secret"], settings["input"])
    except BrokenFence as error:
        _say(report, error=str(error))
        sys.exit(1)
    _say(report, ready=True)
    if settings["program"] == "probe" or os.read(0, 1) != b"g":
        return
    state, notes = read_program(settings["input"], settings["program"])
    notes += write_weights(settings["weights"], state)
    _say(report, done=True, notes=[note[:400] for note in notes])


def _say(descriptor: int, **content: Any) -> None:
    os.write(descriptor, json.dumps(content).encode() + b"\n")


def _import_all(package: str) -> None:
    """Import, before the last fences, what reading takes; this package by its folder, because its parent cannot be listed."""
    tempfile.tempdir = "/tmp"  # some modules ask for its name; the search would try to write
    import torch

    torch.set_num_threads(1)
    spec = importlib.util.spec_from_file_location("secateur", f"{package}/__init__.py", submodule_search_locations=[package])
    if spec is not None and spec.loader is not None:
        sys.modules["secateur"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules["secateur"])


def _call(name: str, *arguments: Any) -> int:
    """Call a function of the C library, raising OSError with its errno."""
    result = getattr(ctypes.CDLL(None, use_errno=True), name)(*arguments)
    if result < 0:
        error = ctypes.get_errno()
        raise OSError(error, f"{name}: {os.strerror(error)}")
    return result


def _isolate(parent: int, info: int) -> None:
    """Go on as a grandchild in namespaces of its own; the two processes left behind only wait, and take it along when they die.

    The first to wait stays outside; the second is process 1 inside, with whose end the kernel kills whatever is left in there.
    """
    user, group = os.getuid(), os.getgid()
    try:
        _call("unshare", sum(NAMESPACES.values()))
        for name, content in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(content)
    except OSError as error:
        raise BrokenFence(f"no namespaces here: {error}") from error
    _die_with(lambda: os.getppid() == parent)  # after the change of rights, which may clear it
    lives, ends = os.pipe()
    if child := os.fork():
        os.write(info, json.dumps({"child-pid": child}).encode())
        os.close(info)
        _wait_for(child)
    os.close(ends)
    os.close(info)
    os.set_blocking(lives, False)
    _die_with(lambda: not _closed(lives))
    if child := os.fork():
        _wait_for(child)
    os.close(lives)


def _die_with(alive: Callable[[], bool]) -> None:
    """Be killed when the parent dies; ``alive`` tells whether it already did before that was arranged."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    _call("prctl", _PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if not alive():
        os._exit(1)


def _closed(pipe: int) -> bool:
    try:
        return os.read(pipe, 1) == b""
    except BlockingIOError:
        return False


def _wait_for(child: int) -> NoReturn:
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    os._exit(code if code >= 0 else 128 - code)


def _check_namespaces(outside: Mapping[str, int]) -> None:
    for name, number in outside.items():
        if os.stat(f"/proc/self/ns/{name}").st_ino == number:
            raise BrokenFence(f"the {name} namespace is the one outside")


def _drop_capabilities() -> None:
    """Give up all capabilities for good, and with them what a user namespace grants."""
    try:
        _call("prctl", _PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
        with contextlib.suppress(OSError):  # EINVAL after the last one; EPERM where none are left to drop
            for capability in range(64):
                _call("prctl", _PR_CAPBSET_DROP, capability, 0, 0, 0)
        _call("prctl", _PR_CAP_AMBIENT, 4, 0, 0, 0)
        _call(
            "syscall", _machine()[3], ctypes.byref((ctypes.c_uint32 * 2)(0x20080522, 0)), ctypes.byref((ctypes.c_uint32 * 6)())
        )
        _call("prctl", _PR_SET_DUMPABLE, 0, 0, 0, 0)
    except OSError as error:
        raise BrokenFence(f"capabilities cannot be dropped: {error}") from error


def _landlock(readable: Sequence[str]) -> None:
    """Forbid every use of files but reading ``readable``, and where the kernel can, TCP, abstract sockets and signals."""
    try:
        version = _call("syscall", _LANDLOCK_CREATE, None, 0, 1)
        rights = (1 << _FILE_RIGHTS.get(version, 16)) - 1
        rules = struct.pack("<QQQ", rights, 3 if version >= 4 else 0, 3 if version >= 6 else 0)
        ruleset = _call("syscall", _LANDLOCK_CREATE, rules, len(rules), 0)
        for path in readable:
            _landlock_allow(ruleset, path)
        _call("syscall", _LANDLOCK_RESTRICT, ruleset, 0)
        os.close(ruleset)
    except OSError as error:
        raise BrokenFence(f"Landlock does not work here: {error}") from error


def _landlock_allow(ruleset: int, path: str) -> None:
    beneath = os.open(path, os.O_PATH | os.O_CLOEXEC)
    folder = stat.S_ISDIR(os.fstat(beneath).st_mode)
    rule = struct.pack("<Qi", _READ_FILE | (_READ_DIR if folder else 0), beneath)
    _call("syscall", _LANDLOCK_ADD, ruleset, 1, rule, 0)
    os.close(beneath)


def _limit(settings: Mapping[str, Any], size: int) -> None:
    """Bound memory (beyond what is in use now), processor time, the size of the output and open files; no core dumps."""
    import resource  # not on every system that imports this module

    used = int(os.read(size, 100).split()[0]) * resource.getpagesize()
    os.close(size)
    seconds = int(settings["seconds"]) + 2
    limits = {
        resource.RLIMIT_AS: used + settings["memory"],
        resource.RLIMIT_CPU: seconds,
        resource.RLIMIT_FSIZE: settings["output"],
        resource.RLIMIT_NOFILE: 256,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_MEMLOCK: 0,
    }
    for kind, value in limits.items():
        _, hard = resource.getrlimit(kind)
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (value, value))


def _machine() -> tuple[int, int, int, int]:
    machine = os.uname().machine
    if machine not in _MACHINES or sys.maxsize < 2**32:
        raise BrokenFence(f"the sandbox knows the calls of 64-bit {' and '.join(_MACHINES)} only, this is {machine}")
    return _MACHINES[machine]


def _numbers(table: str) -> Iterator[int]:
    column = _machine()[0]
    numbers = (entry.split()[1 + column] for entry in table.split(","))
    return (int(number) for number in numbers if number != "-")


def _filter() -> bytes:
    """Return the program that judges each call: ``(code, jump if true, jump if false, value)`` by instruction."""
    load, equal, at_least, any_bit, give = 0x20, 0x15, 0x35, 0x45, 0x06
    allow, kill, refuse = 0x7FFF0000, 0x80000000, 0x00050000
    program = [(load, 0, 0, 4), (equal, 1, 0, _machine()[1]), (give, 0, 0, kill), (load, 0, 0, 0)]
    for number in _numbers(_CALLS):
        program += [(equal, 0, 1, number), (give, 0, 0, allow)]
    for number in _numbers(_IOCTL):
        program += [(equal, 0, 1, number), (give, 0, 0, refuse | _ENOTTY)]
    for number in _numbers(_OPEN):
        flags = 16 + 8 * (1 if number == 2 else 2)  # the second argument of open, the third of openat
        program += [(equal, 0, 4, number), (load, 0, 0, flags), (any_bit, 1, 0, _WRITING), (give, 0, 0, allow)]
        program += [(give, 0, 0, refuse | _EPERM)]
    program += [(at_least, 0, 1, 424), (give, 0, 0, refuse | _ENOSYS), (give, 0, 0, refuse | _EPERM)]
    return b"".join(struct.pack("<HBBI", *instruction) for instruction in program)


def _allow_few_calls() -> None:
    """Install the filter of calls on all threads of this process, for good."""
    program = ctypes.create_string_buffer(_filter())
    head = struct.pack("<HxxxxxxQ", (len(program) - 1) // 8, ctypes.addressof(program))
    try:
        if _call("syscall", _machine()[2], 1, 1, head):
            raise BrokenFence("a thread cannot be fenced in")
    except OSError as error:
        raise BrokenFence(f"seccomp does not work here: {error}") from error


def _check_files(secret: str, given: str) -> None:
    """Try, before calls are filtered, what the other fence must forbid: reading elsewhere, and writing anywhere."""
    beside = os.path.join(os.path.dirname(given), f".secateur-{os.getpid()}")
    _must_fail("reading a file elsewhere", lambda: os.open(secret, os.O_RDONLY))
    for path in (beside, f"{secret}.written", "/tmp/.secateur", "/usr/.secateur"):
        _must_fail("writing a file", lambda path=path: _make(path))
    _must_fail("changing the file", lambda: os.open(given, os.O_WRONLY))


def _make(path: str) -> None:
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT, 0o600))
    os.unlink(path)


def _check_calls(secret: str, given: str) -> None:
    """Try what the filter of calls must forbid: a socket, a process, a change of mode; and the files once more."""
    _check_files(secret, given)
    socket = 41 if _machine()[0] == 0 else 198
    _must_fail("opening a socket", lambda: _call("syscall", socket, 1, 1, 0))
    _must_fail("starting a process", _fork)
    _must_fail("changing a file's mode", lambda: os.chmod(given, stat.S_IMODE(os.stat(given).st_mode)))


def _fork() -> None:
    if os.fork() == 0:
        os._exit(0)


def _must_fail(what: str, act: Callable[[], object]) -> None:
    try:
        act()
    except OSError:
        return
    raise BrokenFence(f"{what} works in the sandbox, it must not")


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
