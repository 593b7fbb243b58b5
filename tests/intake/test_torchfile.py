"""Torch files: what our reader finds is what ``torch.load`` finds, and claims that the file cannot back are refused."""

from __future__ import annotations

import io
import pickle
import re
import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from secateur.errors import ModelError
from secateur.intake.checkpoint import to_torch
from secateur.intake.reading import admit, read
from secateur.intake.tensors import DTYPES, MAX_DIMENSIONS, Storage, Stored, contiguous
from secateur.intake.torchfile import read_pickled

DTYPE_NAMES = sorted(name for name in DTYPES if name != "complex32")


def saved(content: Any, path: Path, *, zipped: bool = True, protocol: int = 2) -> Path:
    torch.save(content, path, _use_new_zipfile_serialization=zipped, pickle_protocol=protocol)
    return path


def loaded(path: Path) -> dict[str, torch.Tensor]:
    return {name: to_torch(tensor) for name, tensor in admit(read(path)).tensors.items() if isinstance(tensor, Stored)}


def equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    return (
        a.dtype == b.dtype
        and a.shape == b.shape
        and a.untyped_storage().tolist() == b.contiguous().clone().untyped_storage().tolist()
    )


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("zipped", [True, False])
def test_as_torch_reads_it(zipped, protocol, tmp_path):
    base = torch.arange(60, dtype=torch.float32).reshape(3, 4, 5)
    state = {
        "plain": base,
        "transposed": base.transpose(0, 2),
        "part": base[1:, ::2, 3],
        "scalar": torch.tensor(3.5),
        "empty": torch.zeros(0, 4),
        "parameter": torch.nn.Parameter(base.clone()),
        "frozen": torch.nn.Parameter(base.clone(), requires_grad=False),
        "expanded": torch.arange(40.0)[:8].view(1, 8),
        "flags": torch.tensor([True, False, True]),
    }
    path = saved(state, tmp_path / "a.pt", zipped=zipped, protocol=protocol)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about protocols above 2
        ours, theirs = loaded(path), torch.load(path, weights_only=protocol < 4)
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("name", DTYPE_NAMES)
@pytest.mark.parametrize("zipped", [True, False])
def test_every_type(name, zipped, tmp_path):
    dtype = getattr(torch, name)
    content = torch.arange(48, dtype=torch.uint8).view(dtype) if name != "bool" else torch.tensor([True, False] * 3)
    path = saved({"w": content}, tmp_path / "a.pt", zipped=zipped)
    if not zipped and name in ("uint16", "uint32", "uint64", *(n for n in DTYPES if n.startswith("float8"))):
        pytest.skip("such a storage has no legacy form of its own")
    assert equal(loaded(path)["w"], torch.load(path, weights_only=True)["w"])


@given(st.lists(st.integers(0, 4), max_size=4), st.permutations(range(4)), st.booleans())
def test_any_layout(shape, order, zipped):
    tensor = torch.arange(int(np.prod(shape)), dtype=torch.int64).reshape(shape).permute([i for i in order if i < len(shape)])
    buffer = io.BytesIO()
    torch.save({"w": tensor}, buffer, _use_new_zipfile_serialization=zipped)
    path = Path("/dev/shm" if Path("/dev/shm").is_dir() else "/tmp") / f"secateur-layout-{zipped}.pt"
    path.write_bytes(buffer.getvalue())
    try:
        assert torch.equal(loaded(path)["w"], tensor)
    finally:
        path.unlink()


@pytest.mark.parametrize("protocol", [0, 1, 2, 4])
def test_pickled_without_torch_save(protocol, tmp_path):
    state = {"a": torch.rand(3, 2), "b": torch.arange(4)}
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(state, protocol))
    ours = loaded(tmp_path / "a.pkl")
    assert all(torch.equal(ours[name], state[name]) for name in state)


class Inner:
    def __reduce__(self) -> Any:
        return eval, ("1",)


def test_names_inside_nested_storages_are_seen(tmp_path):
    buffer = io.BytesIO()
    torch.save({"x": Inner()}, buffer, _use_new_zipfile_serialization=False)

    class Outer:
        def __reduce__(self) -> Any:
            return torch.storage._load_from_bytes, (buffer.getvalue(),)  # type: ignore[attr-defined]

    (tmp_path / "a.pkl").write_bytes(pickle.dumps(Outer(), 2))
    found = read(tmp_path / "a.pkl")
    assert "__builtin__.eval" in found.names
    assert found.refusal == "calls builtins.eval('1')"


def test_shared_storages_become_own_memory(tmp_path):
    base = torch.arange(6.0)
    path = saved({"a": base, "b": base[2:4]}, tmp_path / "a.pt")
    ours = loaded(path)
    ours["a"].zero_()
    assert ours["b"].tolist() == [2.0, 3.0]


def storage(count: int, dtype: str | None = "float32") -> Storage:
    size = count * (DTYPES[dtype] if dtype else 1)
    found = Storage(size, dtype)
    found.fill(memoryview(bytes(size)))
    return found


@pytest.mark.parametrize(
    ("shape", "stride", "offset"),
    [
        ((5,), (1,), 0),
        ((2, 2), (3, 1), 0),
        ((2,), (1,), 3),
        ((10**9,), (0,), 0),
        ((2**47, 2**47), (0, 0), 0),
        ((-1,), (1,), 0),
        ((2,), (-1,), 1),
        ((2,), (1,), -1),
        ((2,), (2**62,), 0),
        ((2,), (1, 1), 0),
        ((1,) * (MAX_DIMENSIONS + 1), (1,) * (MAX_DIMENSIONS + 1), 0),
        ((True,), (1,), 0),
        ((2.0,), (1,), 0),
        (("2",), (1,), 0),
        ((0,), (1,), 2**40),
    ],
)
def test_claims_beyond_the_storage_are_refused(shape, stride, offset):
    with pytest.raises(ModelError):
        Stored("float32", shape, stride, offset, storage(4))


def test_lies_about_types_and_sizes_are_refused():
    with pytest.raises(ModelError, match="known one"):
        Stored("qint8", (1,), (1,), 0, storage(4))
    with pytest.raises(ModelError, match="must have 16 bytes, got 15"):
        Storage(16).fill(memoryview(bytes(15)))


@pytest.mark.parametrize("name", ["float32", "float16", "bfloat16", "float64", "complex64", "float8_e5m2", "float8_e4m3fn"])
def test_values_that_are_no_numbers_are_counted(name):
    dtype = getattr(torch, name)
    values = torch.tensor([0.0, 1.0, float("nan"), -2.0, float("nan")]).to(dtype)
    if name not in ("float8_e4m3fn", "complex64"):
        values = torch.cat([values.float(), torch.tensor([float("inf"), -float("inf")])]).to(dtype)
    raw = bytes(values.untyped_storage().tolist())
    place = Storage(len(raw))
    place.fill(memoryview(raw))
    wanted = 2 if name in ("float8_e4m3fn", "complex64") else 4
    assert Stored(name, tuple(values.shape), (1,), 0, place).count_nonfinite() == wanted
    if len(raw) >= 2 * DTYPES[name]:
        skipping = Stored(name, (2,), (2,), 0, place)
        assert skipping.count_nonfinite() == 1


def test_strides():
    assert contiguous((2, 3, 4)) == (12, 4, 1)
    assert contiguous(()) == ()
    assert contiguous((2, 0, 4)) == torch.empty(2, 0, 4).stride()


def rewritten(path: Path, change: Any) -> Path:
    """Write an archive anew with other entries."""
    out = path.with_suffix(".new.pt")
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as new:
        for name, content in change({info.filename: old.read(info) for info in old.infolist()}).items():
            new.writestr(name, content)
    return out


def dropped(name: str) -> Any:
    return lambda entries: {key: value for key, value in entries.items() if not key.endswith(name)}


def replaced(name: str, content: bytes) -> Any:
    return lambda entries: {key: content if key.endswith(name) else value for key, value in entries.items()}


def inside(change: Any) -> Any:
    return lambda entries: {key: change(value) if key.endswith("data.pkl") else value for key, value in entries.items()}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dropped("data/0"), "has no entry 'data/0'"),
        (replaced("data/0", b"1234"), "must have 24 bytes, got 4"),
        (replaced("byteorder", b"big"), "little-endian"),
        (inside(lambda b: b + b"cos\nsystem\n."), "something follows the pickle"),
        (inside(lambda b: b[:-5]), "the pickle is damaged"),
        (inside(lambda b: b.replace(b"FloatStorage", b"WloatStorage")), "known type"),
        (inside(lambda b: b.replace(b"cpu", b"xyz")), ""),
    ],
)  # fmt: skip
def test_damaged_zipped_files(change, message, tmp_path):
    path = rewritten(saved({"w": torch.rand(2, 3)}, tmp_path / "a.pt"), change)
    if not message:
        assert loaded(path)["w"].shape == (2, 3)
        return
    with pytest.raises(ModelError, match=message):
        loaded(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda b: b + b"x", "something follows the weights"),
        (lambda b: b[:-1], "bytes, got"),
        (lambda b: b[:-24], "must have 24 bytes, got 0"),
        (lambda b: b[:-32] + bytes([7]) + b[-31:], "not as long as it says"),
        (lambda b: b[:40], "damaged"),
    ],
)
def test_damaged_legacy_files(change, message, tmp_path):
    path = saved({"w": torch.rand(2, 3)}, tmp_path / "a.pt", zipped=False)
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(ModelError, match=message):
        loaded(path)


@pytest.mark.parametrize("zipped", [True, False])
def test_tensors_of_other_kinds_are_told(zipped, tmp_path):
    state = {
        "w": torch.rand(3),
        "sparse": torch.eye(3).to_sparse(),
        "meta": torch.empty(3, device="meta"),
    }
    found = read(saved(state, tmp_path / "a.pt", zipped=zipped))
    told = {finding.where for finding in found.findings if finding.rule == "LOD-010"}
    assert told == {"sparse", "meta"}


def test_files_written_without_checksums_are_read(tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        path = saved({"w": torch.rand(3)}, tmp_path / "a.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    assert not read(path).findings
    assert loaded(path)["w"].shape == (3,)


def text(value: str) -> bytes:
    return b"X" + len(value.encode()).to_bytes(4, "little") + value.encode()


def raw(content: bytes) -> bytes:
    return b"B" + len(content).to_bytes(4, "little") + content


LOAD = b"ctorch.storage\n_load_from_bytes\n"
REBUILD = b"ctorch._utils\n_rebuild_tensor_v2\n"
AGAIN = b"h\x01h\x00R"  # the same call once more
PAIR = b"X\x01\x00\x00\x00aN\x86"
NESTED = pickle.dumps(list(range(1000)), 2)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (text("x" * 10**6) + text("latin1") + b"\x86q\x00c_codecs\nencode\nq\x01(" + AGAIN * 200 + b"l.", "out of little"),
        (b"](" + PAIR * 5000 + b"e\x85q\x00ccollections\nOrderedDict\nq\x01(" + AGAIN * 500 + b"l.", "out of little"),
        (raw(NESTED) + b"\x85q\x00" + LOAD + b"q\x010(" + AGAIN * 1100 + b"l.", "opcodes, got more"),
        (b"c_codecs\nencode\n" + text("\u20ac") + text("latin1") + b"\x86R.", "Latin-1"),
        (LOAD + b"K\x01\x85R.", "must be given as bytes"),
        (LOAD + raw(b"\x80\x02cos\nsystem\n(") + b"\x85R.", "the pickle is damaged"),
        (REBUILD + b"K\x01\x85R.", "must be made of at least 4 values, got 1"),
        (REBUILD + b"(NNNNtR.", "must be made of a storage"),
        (b"ctorch._tensor\n_rebuild_from_type_v2\n(cos\nsystem\nN)NtR.", "rebuilt by a function of torch"),
        (b"ccollections\nOrderedDict\n](K\x01e\x85R.", "made of pairs"),
        (b"K\x01Q.", "must describe a tensor's storage"),
        (b"(" + text("storage") + b"cos\nsystem\n" + text("0") + text("cpu") + b"K\x01tQ.", "known type, got 'os.system'"),
        (b"(" + text("storage") + b"]" + text("0") + text("cpu") + b"K\x01tQ.", "known type, got 'something else'"),
    ],
)  # fmt: skip
def test_pickles_that_ask_too_much(content, message):
    assert re.search(message, str(read_pickled(memoryview(b"\x80\x02" + content)).problem))


def test_bytes_of_old_protocols():
    assert read_pickled(memoryview(pickle.dumps([b"", b"\xff\x00"], 2))).value == [b"", b"\xff\x00"]
