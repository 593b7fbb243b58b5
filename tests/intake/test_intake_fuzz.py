"""Fuzzing of the door: whatever the bytes are, the answer is weights or one error, nothing is run, and no name escapes.

`EXAMPLES` cases of each kind run with the slow tests, a few hundred always.
"""

from __future__ import annotations

import importlib.util
import io
import pickle
import pickletools
import struct
import subprocess
import sys
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from fuzzing import use, watched
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from secateur.errors import ModelError
from secateur.intake.pickles import HIDDEN, read_pickle
from secateur.models import Classifier, build, save

QUICK, SLOW = 150, 3000
SIZES = [pytest.param(QUICK, id="quick"), pytest.param(SLOW, id="long", marks=pytest.mark.slow)]
CHECKS = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]


def many(examples: int) -> settings:
    return settings(max_examples=examples, deadline=None, suppress_health_check=CHECKS, database=None)


# Opcode streams: every opcode, with arguments that make sense and such that do not

INDEX = st.integers(0, 6)
TEXTS = st.sampled_from(
    ["os", "system", "posix", "builtins", "exec", "torch._utils", "_rebuild_tensor_v2", "collections", "x", ""]
)
BYTES = st.binary(max_size=8)


def _line(text: str) -> bytes:
    return text.encode() + b"\n"


def argument(kind: str | None) -> st.SearchStrategy[bytes]:
    """Bytes of an opcode's argument, by the name that ``pickletools`` has for its kind."""
    numbers = st.integers(-3, 70_000)
    table: dict[str | None, st.SearchStrategy[bytes]] = {
        None: st.just(b""),
        "uint1": INDEX.map(lambda n: bytes([n])),
        "uint2": numbers.map(lambda n: struct.pack("<H", n % 2**16)),
        "int4": numbers.map(lambda n: struct.pack("<i", n)),
        "uint4": INDEX.map(lambda n: struct.pack("<I", n)),
        "uint8": numbers.map(lambda n: struct.pack("<Q", n % 2**64)),
        "float8": st.floats().map(lambda x: struct.pack(">d", x)),
        "decimalnl_short": st.one_of(INDEX.map(lambda n: _line(str(n))), st.just(b"00\n"), st.just(b"01\n"), st.just(b"x\n")),
        "decimalnl_long": numbers.map(lambda n: _line(f"{n}L")),
        "floatnl": st.floats().map(lambda x: _line(repr(x))),
        "stringnl": TEXTS.map(lambda t: _line(repr(t))),
        "stringnl_noescape": TEXTS.map(_line),
        "stringnl_noescape_pair": st.tuples(TEXTS, TEXTS).map(lambda pair: _line(pair[0]) + _line(pair[1])),
        "unicodestringnl": TEXTS.map(_line),
        "string1": BYTES.map(lambda b: bytes([len(b)]) + b),
        "string4": BYTES.map(lambda b: struct.pack("<i", len(b)) + b),
        "bytes1": BYTES.map(lambda b: bytes([len(b)]) + b),
        "bytes4": BYTES.map(lambda b: struct.pack("<I", len(b)) + b),
        "bytes8": BYTES.map(lambda b: struct.pack("<Q", len(b)) + b),
        "bytearray8": BYTES.map(lambda b: struct.pack("<Q", len(b)) + b),
        "unicodestring1": TEXTS.map(lambda t: bytes([len(t)]) + t.encode()),
        "unicodestring4": TEXTS.map(lambda t: struct.pack("<I", len(t)) + t.encode()),
        "unicodestring8": TEXTS.map(lambda t: struct.pack("<Q", len(t)) + t.encode()),
        "long1": BYTES.map(lambda b: bytes([len(b)]) + b),
        "long4": BYTES.map(lambda b: struct.pack("<i", len(b)) + b),
    }
    return table[kind]


def _opcode(code: pickletools.OpcodeInfo) -> st.SearchStrategy[bytes]:
    kind = code.arg.name if code.arg else None
    return argument(kind).map(lambda tail: code.code.encode("latin-1") + tail)


LIKELY_NAMES = (
    "MARK STACK_GLOBAL SHORT_BINUNICODE GLOBAL INST OBJ REDUCE NEWOBJ BUILD TUPLE TUPLE1 TUPLE2 EMPTY_TUPLE EMPTY_DICT "
    "EMPTY_LIST SETITEM SETITEMS APPEND APPENDS MEMOIZE BINGET BINPUT DUP"
)
LIKELY = [code for code in pickletools.opcodes if code.name in LIKELY_NAMES.split()]
OPCODES = st.one_of(st.sampled_from(LIKELY).flatmap(_opcode), st.sampled_from(pickletools.opcodes).flatmap(_opcode))
STREAMS = st.lists(OPCODES, max_size=40).map(lambda parts: b"\x80\x04" + b"".join(parts) + b".")


class Inert:
    """Stands for whatever a pickle names, and takes whatever is done to it."""

    def __new__(cls, *_: Any, **__: Any) -> Any:
        return object.__new__(cls)

    def __init__(self, *_: Any, **__: Any) -> None: ...
    def __setstate__(self, _: Any) -> None: ...
    def append(self, _: Any) -> None: ...
    def extend(self, _: Any) -> None: ...
    def add(self, _: Any) -> None: ...
    def __setitem__(self, _: Any, __: Any) -> None: ...


class Recorder(pickle.Unpickler):
    """Python's own unpickler, which notes what it is asked to import and imports nothing."""

    def __init__(self, content: bytes) -> None:
        super().__init__(io.BytesIO(content))
        self.asked: set[tuple[str, str]] = set()

    def find_class(self, module: str, name: str) -> Any:
        self.asked.add((module, name))
        return Inert

    def persistent_load(self, pid: Any) -> Any:
        return Inert()


@pytest.mark.parametrize("examples", SIZES)
def test_accepted_pickles_name_all_that_python_would_import(examples):
    accepted: list[bytes] = []

    @many(examples)
    @given(STREAMS)
    def check(content: bytes) -> None:
        try:
            with watched():
                names = read_pickle(content, persistent=lambda pid: None).names
        except ModelError:
            return  # such a file is used by no verb
        accepted.append(content)
        recorder = Recorder(content)
        with suppress(Exception):
            recorder.load()
        assert HIDDEN in names or recorder.asked <= {(name.module, name.name) for name in names}

    check()
    assert len(accepted) > examples // 50


# Files of every format, damaged


@pytest.fixture(scope="module")
def originals(tmp_path_factory) -> dict[str, bytes]:
    net = build("convnet", width=1, classes=2, in_channels=1)
    files: dict[str, Callable[[Any], None]] = {
        "zip": lambda f: torch.save({"state_dict": net.state_dict(), "epoch": 3}, f),
        "legacy": lambda f: torch.save(net.state_dict(), f, _use_new_zipfile_serialization=False),
        "module": lambda f: torch.save(net, f),
        "plain": lambda f: pickle.dump(net.state_dict(), f),
        "protocol 0": lambda f: pickle.dump({"a": [1, 2.0, "x"], "b": (None, True)}, f, protocol=0),
    }
    found = {"safetensors": safetensors.torch.save(net.state_dict())}
    for name, write in files.items():
        buffer = io.BytesIO()
        write(buffer)
        found[name] = buffer.getvalue()
    return found


@st.composite
def damaged(draw: Any, originals: dict[str, bytes]) -> bytes:
    content = bytearray(originals[draw(st.sampled_from(sorted(originals)))])
    for _ in range(draw(st.integers(1, 6))):
        place = draw(st.one_of(st.integers(0, len(content) - 1), st.integers(0, min(600, len(content) - 1))))
        what = draw(st.sampled_from(["byte", "bit", "insert", "delete", "copy", "huge"]))
        if what == "byte":
            content[place] = draw(st.integers(0, 255))
        elif what == "bit":
            content[place] ^= 1 << draw(st.integers(0, 7))
        elif what == "insert":
            content[place:place] = draw(st.binary(max_size=12))
        elif what == "delete":
            del content[place : place + draw(st.integers(1, 40))]
        elif what == "copy":
            start = draw(st.integers(0, len(content)))
            content[place:place] = content[start : start + draw(st.integers(1, 100))]
        else:
            content[place : place + 8] = draw(st.sampled_from([b"\xff" * 8, b"\xff" * 4, b"\x00" * 8, b"\x7f" + b"\xff" * 7]))
        if not content:
            content = bytearray(b"\x00")
    if draw(st.integers(0, 4)) == 0:
        del content[draw(st.integers(0, len(content) - 1)) :]
    return bytes(content)


def repaired_zip(content: bytes, change: Callable[[bytes], bytes]) -> bytes:
    """Change the pickle inside an archive and write a valid archive around it, so that the damage is met further in."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as new:
        for info in old.infolist():
            entry = old.read(info)
            new.writestr(info.filename, change(entry) if info.filename.endswith("data.pkl") else entry)
    return out.getvalue()


@pytest.mark.parametrize("examples", SIZES)
def test_damaged_files_give_weights_or_one_error(examples, originals, tmp_path):
    outcomes: Counter[str] = Counter()
    path = tmp_path / "a.pt"

    @many(examples)
    @given(damaged(originals))
    def check(content: bytes) -> None:
        path.write_bytes(content)
        with watched():
            outcomes[use(path)] += 1

    use_once(originals, path)
    check()
    assert outcomes["ModelError"] > examples // 10


@pytest.mark.parametrize("examples", SIZES)
def test_damaged_pickles_in_sound_archives(examples, originals, tmp_path):
    outcomes: Counter[str] = Counter()
    path = tmp_path / "a.pt"
    pickles = {name: zipfile.ZipFile(io.BytesIO(originals[name])).read("archive/data.pkl") for name in ("zip", "module")}

    @many(examples)
    @given(st.one_of(damaged(pickles), STREAMS))
    def check(content: bytes) -> None:
        path.write_bytes(repaired_zip(originals["zip"], lambda _: content))
        with watched():
            outcomes[use(path)] += 1

    use_once(originals, path)
    check()
    assert examples == QUICK or outcomes["read"], outcomes
    assert outcomes["ModelError"] > examples // 10


@pytest.mark.parametrize("examples", SIZES)
def test_damaged_bundles(examples, tmp_path):
    net = build("convnet", width=1, classes=2, in_channels=1)
    arch = {"name": "convnet", "kwargs": {"width": 1, "classes": 2, "in_channels": 1}}
    save(Classifier(net, classes=("a", "b"), input_shape=(1, 12, 12), arch=arch), tmp_path / "b")
    whole = (tmp_path / "b" / "arch.json").read_bytes()

    @many(examples)
    @given(damaged({"arch": whole}))
    def check(content: bytes) -> None:
        (tmp_path / "b" / "arch.json").write_bytes(content)
        with watched():
            use(tmp_path / "b")

    use(tmp_path / "b")
    check()


def use_once(originals: dict[str, bytes], path: Path) -> None:
    """Import what reading imports on first use, before anything is watched."""
    for content in originals.values():
        path.write_bytes(content)
        use(path)
    path.write_bytes(b"\x08\x07")
    use(path)


def test_checksums_are_those_of_zlib(originals):
    with zipfile.ZipFile(io.BytesIO(originals["zip"])) as file:
        assert all(zlib.crc32(file.read(info)) == info.CRC for info in file.infolist())


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("atheris") is None, reason="atheris is not installed")
def test_coverage_guided(tmp_path, originals):
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for name, content in originals.items():
        (corpus / name).write_bytes(content)
    script = Path(__file__).with_name("fuzz_door.py")
    run = subprocess.run(
        [sys.executable, str(script), "-runs=4000", "-max_total_time=40", "-timeout=10", "-rss_limit_mb=1500", str(corpus)],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    assert "DONE" in run.stderr or "Done" in run.stderr, run.stderr[-1000:]
