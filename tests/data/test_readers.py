"""Every format comes back as it was written, every bad input gets one clear line, and no bytes run or crash anything."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import struct
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.numpy import save_file
from safetensors.torch import save_file as save_torch

from secateur.data import ImageSet, load_data, save_npz
from secateur.data import source as bounds
from secateur.errors import DataError, RefusedError, SecateurError

RNG = np.random.RandomState(0)
X = RNG.randint(0, 256, (6, 3, 8, 10)).astype(np.uint8)
GRAY = X[:, :1]
Y = np.array([0, 1, 2, 0, 1, 2])
CIFAR_X = RNG.randint(0, 256, (6, 3072)).astype(np.uint8)
CIFAR_Y = [3, 0, 9, 3, 1, 2]


def same(data: ImageSet, x: np.ndarray, y: np.ndarray | list[int]) -> bool:
    return np.array_equal(data.x.numpy(), x) and data.y.tolist() == list(y)


def npz(folder: Path, **arrays: object) -> Path:
    np.savez(folder / "d.npz", **arrays)  # type: ignore[arg-type]
    return folder / "d.npz"


def png(array: np.ndarray, **options: object) -> bytes:
    file = io.BytesIO()
    Image.fromarray(array[0] if len(array) == 1 else np.ascontiguousarray(array.transpose(1, 2, 0))).save(
        file, "PNG", **options
    )
    return file.getvalue()


def image_folder(root: Path, x: np.ndarray = X, names: tuple[str, ...] = ("ant", "bee", "cow")) -> Path:
    for i, (image, label) in enumerate(zip(x, Y, strict=True)):
        (root / names[label]).mkdir(parents=True, exist_ok=True)
        (root / names[label] / f"{i}.png").write_bytes(png(image))
    return root


def parquet(path: Path, column: str = "image", names: list[str] | None = None, x: np.ndarray = X) -> Path:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    table = pa.table({column: [{"bytes": png(image), "path": None} for image in x], "label": Y.tolist()})
    if names:
        features = {"label": {"names": names, "_type": "ClassLabel"}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path)
    return path


def cifar_pickle(path: Path, protocol: int = 2, **changes: object) -> Path:
    batch = {b"batch_label": b"one", b"data": CIFAR_X, b"labels": CIFAR_Y} | {k.encode(): v for k, v in changes.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pickle.dumps({k: v for k, v in batch.items() if v is not None}, protocol))
    return path


def cifar_binary(path: Path, fine: bool = False) -> Path:
    rows = [bytes([7, y] if fine else [y]) + x.tobytes() for x, y in zip(CIFAR_X, CIFAR_Y, strict=True)]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"".join(rows))
    return path


def fails(path: object, words: str, **options: object) -> None:
    with pytest.raises(DataError, match=words) as caught:
        load_data(path, **options)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


# Arrays ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stored", "expected"),
    [
        (X, X),
        (X.transpose(0, 2, 3, 1), X),
        (GRAY, GRAY),
        (GRAY[:, 0], GRAY),
        (np.asfortranarray(X), X),
        ((X / 255).astype(np.float32), X),
        ((X / 255).astype(np.float16), X),
        ((X / 255).astype(">f8"), X),
    ],
    ids=["nchw", "nhwc", "gray", "nhw", "fortran", "float32", "float16", "big-endian float64"],
)
@pytest.mark.parametrize("dtype", ["int64", "uint8", ">i4"])
def test_npz(tmp_path, stored, expected, dtype):
    data = load_data(npz(tmp_path, x=stored, y=Y.astype(dtype)))
    assert same(data, expected, Y)
    assert data.classes == ("0", "1", "2")
    assert data.name == "d"


def test_npz_split_and_safetensors(tmp_path):
    path = npz(tmp_path, train_x=X, train_y=Y, test_x=X[:2], test_y=Y[:2])
    assert same(load_data(f"{path}:train"), X, Y)
    assert load_data(f"{path}:test", name="mine").name == "mine"
    assert load_data(f"{path}:test").name == "d:test"
    save_file({"x": X, "y": Y, "test_x": X[3:], "test_y": Y[3:]}, tmp_path / "d.safetensors")
    assert same(load_data(tmp_path / "d.safetensors"), X, Y)
    assert same(load_data(f"{tmp_path}/d.safetensors:test"), X[3:], Y[3:])


def test_a_colon_in_a_file_name(tmp_path):
    path = npz(tmp_path, x=X, y=Y)
    shutil.copy(path, tmp_path / "a:b.npz")
    os.symlink(tmp_path / "a:b.npz", tmp_path / "link.npz")
    assert same(load_data(tmp_path / "a:b.npz"), X, Y)
    assert same(load_data(tmp_path / "link.npz"), X, Y)


@pytest.mark.parametrize("compressed", [False, True])
def test_save_npz(tmp_path, compressed):
    data = ImageSet(torch.from_numpy(X), torch.from_numpy(Y), ("é", "b<c>", "unused", "d"), "first")
    for file in ("a.npz", "b.npz"):
        save_npz(data, tmp_path / file, compressed=compressed)
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    back = load_data(tmp_path / "a.npz")
    assert same(back, X, Y)
    assert back.classes == data.classes
    assert back.sha256 == data.sha256
    with np.load(tmp_path / "a.npz", allow_pickle=False) as archive:
        assert archive["x"].shape == (6, 8, 10, 3)


def test_floats_between_levels_are_rounded(tmp_path):
    x = np.full((2, 1, 2, 2), 0.4999 / 255)
    x[1] = 0.5001 / 255
    assert load_data(npz(tmp_path, x=x, y=[0, 1])).x[:, 0, 0, 0].tolist() == [0, 1]


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"images": X, "y": Y}, "must hold 'x' and 'y', but has images, y; add or rename"),
        ({"train_x": X, "train_y": Y}, r"has train_x, train_y; write .*d.npz:train"),
        ({"x": X, "y": Y[:5]}, "equally many, but .* has 6 and 5"),
        ({"x": X, "y": Y.astype(float)}, r"labels must be whole numbers \(n,\), but .* float64"),
        ({"x": X, "y": np.eye(6, 3, dtype=int)}, r"labels must be whole numbers .*\(6, 3\); store class indices"),
        ({"x": X, "y": Y > 0}, "has bool"),
        ({"x": X, "y": Y - 1}, r"labels must lie in \[0, 99999\], but .* -1..1"),
        ({"x": X, "y": Y + 2**40}, "labels must lie in"),
        ({"x": X, "y": Y.astype(np.uint64) + np.uint64(2**63)}, "labels must lie in"),
        ({"x": X, "y": Y, "classes": np.array(["a", "b"])}, r"labels must lie in \[0, 1\], but .* 0..2"),
        ({"x": X, "y": Y, "classes": np.array(["a", "b", "a"])}, "class names must differ"),
        ({"x": X, "y": Y, "classes": np.arange(3)}, "'classes' .* must be a list of names"),
        ({"x": X, "y": Y * 0 + 1}, "at least two classes .* only class 1"),
        ({"x": X.astype(np.int16), "y": Y}, "uint8, or float .* has int16"),
        ({"x": X[:, :2], "y": Y}, r"1 or 3 channels.* has \(6, 2, 8, 10\)"),
        ({"x": X.reshape(6, -1), "y": Y}, r"1 or 3 channels.* has \(6, 240\)"),
        ({"x": X[:, :, :0], "y": Y}, "1 or 3 channels"),
        ({"x": X[:0], "y": Y[:0]}, "holds no images"),
        ({"x": X / 1.0, "y": Y}, r"must lie in \[0, 1\], but .* spans \[0, 255\]; undo the normalisation"),
        ({"x": np.where(X > 200, np.nan, X / 255), "y": Y}, "must be finite"),
        ({"x": np.array([None, 1]), "y": Y}, "holds Python objects"),
        ({"x": X.astype("V1"), "y": Y}, "unusual dtype"),
    ],
)
def test_bad_arrays(tmp_path, arrays, words):
    fails(npz(tmp_path, **arrays), words)


def test_objects_in_npz_never_run(tmp_path):
    canary = tmp_path / "canary"
    fails(npz(tmp_path, x=np.array([Canary(canary)], dtype=object), y=Y), "Python objects; only plain arrays")
    assert not canary.exists()


def test_declared_sizes_are_checked_before_allocation(tmp_path, monkeypatch):
    header = b"{'descr': '|u1', 'fortran_order': False, 'shape': (%d, 3, 32, 32), }" % 10**12
    raw = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header
    with zipfile.ZipFile(tmp_path / "bomb.npz", "w") as archive:
        archive.writestr("x.npy", raw)
        archive.writestr("y.npy", raw)
    fails(tmp_path / "bomb.npz", "declares the shape .* but is shorter")
    monkeypatch.setattr("secateur.data.source.MAX_BYTES", 1000)
    fails(npz(tmp_path, x=X, y=Y), "data must fit in .* GiB")
    assert bounds.MAX_BYTES == 1000


def test_bad_safetensors(tmp_path):
    file = tmp_path / "d.safetensors"
    save_torch({"x": torch.zeros(2, 1, 2, 2, dtype=torch.bfloat16), "y": torch.arange(2)}, file)
    fails(file, "'x' .* dtype BF16; store images as uint8")
    save_file({"a": X}, file)
    fails(file, "must hold 'x' and 'y', but has a")
    file.write_bytes(b"\xff" * 100)
    fails(file, "not a readable safetensors file")


# Image folders --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("x", [X, GRAY], ids=["rgb", "gray"])
def test_image_folder(tmp_path, x):
    data = load_data(image_folder(tmp_path / "set", x))
    order = [0, 3, 1, 4, 2, 5]
    assert same(data, x[order], Y[order])
    assert (data.classes, data.name) == (("ant", "bee", "cow"), "set")


def test_mixed_modes_become_rgb_without_warnings(tmp_path):
    root = image_folder(tmp_path, GRAY)
    image = Image.fromarray(X[0].transpose(1, 2, 0)).convert("P")
    image.save(root / "ant" / "0.png", transparency=bytes(range(256)))
    Image.fromarray(X[1].transpose(1, 2, 0)).convert("RGBA").save(root / "bee" / "1.png")
    Image.fromarray(GRAY[2, 0]).convert("1").save(root / "cow" / "2.png")
    data = load_data(root)
    assert data.shape == (3, 8, 10)
    assert same(data.subset(torch.tensor([1, 2])), np.stack([np.repeat(GRAY[3], 3, axis=0), X[1]]), [0, 1])


@pytest.mark.parametrize(
    ("suffix", "options"), [("webp", {"lossless": True}), ("bmp", {}), ("tif", {}), ("ppm", {}), ("JPG", {})]
)
def test_other_formats(tmp_path, suffix, options):
    for label in range(2):
        (tmp_path / str(label)).mkdir()
        image = Image.fromarray(X[label].transpose(1, 2, 0))
        image.save(tmp_path / str(label) / f"a.{suffix}", **options)
    data = load_data(tmp_path)
    assert data.shape == (3, 8, 10)
    assert suffix == "JPG" or same(data, X[:2], [0, 1])


def test_size_resizes_with_pillow(tmp_path):
    image_folder(tmp_path / "f")
    Image.fromarray(X[5].transpose(1, 2, 0)).resize((17, 5)).save(tmp_path / "f" / "cow" / "5.png")
    data = load_data(tmp_path / "f", size=(4, 6))
    expected = Image.fromarray(X[0].transpose(1, 2, 0)).resize((6, 4), Image.Resampling.BILINEAR)
    assert data.shape == (3, 4, 6)
    assert np.array_equal(data.x[0].numpy(), np.asarray(expected).transpose(2, 0, 1))
    assert torch.equal(load_data(npz(tmp_path, x=X, y=Y), size=(4, 6)).x[0], data.x[0])


def test_hidden_files_links_and_deeper_folders(tmp_path):
    root = image_folder(tmp_path / "set")
    (root / ".cache").mkdir()
    (root / "ant" / ".0.png").write_bytes(b"no image")
    (root / "ant" / "Thumbs.db").write_bytes(b"no image")
    (root / "bee" / "images").mkdir()
    (root / "bee" / "4.png").rename(root / "bee" / "images" / "4.png")
    (root / "cow").rename(tmp_path / "elsewhere")
    os.symlink(tmp_path / "elsewhere", root / "cow")
    os.symlink(root / "cow" / "2.png", root / "ant" / "link.png")
    assert load_data(root).per_class() == (3, 2, 2)


def test_an_empty_class_keeps_its_label(tmp_path):
    image_folder(tmp_path)
    (tmp_path / "ape").mkdir()
    data = load_data(tmp_path)
    assert data.classes == ("ant", "ape", "bee", "cow")
    assert data.per_class() == (2, 0, 2, 2)


def test_folder_with_splits(tmp_path):
    image_folder(tmp_path / "train")
    image_folder(tmp_path / "test")
    assert len(load_data(f"{tmp_path}:train")) == 6
    fails(tmp_path, "holds the splits: test, train; got none was named; write .*:test")
    fails(f"{tmp_path}:val", "holds the splits: test, train; got 'val'")


def test_every_bad_image_is_listed(tmp_path):
    root = image_folder(tmp_path)
    raw = (root / "ant" / "0.png").read_bytes()
    (root / "ant" / "0.png").write_bytes(raw[: len(raw) // 2])
    (root / "bee" / "1.png").write_bytes(b"hello")
    os.symlink(tmp_path / "nowhere.png", root / "cow" / "9.png")
    fails(
        root, r"3 of 7 images cannot be read: ant/0.png \(.*runcated.*\), bee/1.png \(not an image\), cow/9.png \(not a file\)"
    )
    for i in range(9):
        (root / "ant" / f"{i}.png").write_bytes(b"")
    fails(root, r"11 of 14 images .*, \.\.\.; replace or remove them")


def test_sixteen_bits_and_programs_are_refused(tmp_path):
    root = image_folder(tmp_path)
    Image.fromarray(np.full((8, 10), 40000, np.uint16)).save(root / "ant" / "0.png")
    (root / "bee" / "1.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 10\n")
    fails(root, r"ant/0.png \(I;16 pixels; convert to 8 bits\), bee/1.png \(not an image\)")


def test_mixed_sizes(tmp_path):
    image_folder(tmp_path)
    Image.new("RGB", (12, 7)).save(tmp_path / "ant" / "0.png")
    fails(tmp_path, r"must have one size \(height x width\), got 8x10 \(5\), 7x12 \(1\); resize with --input-size")


@pytest.mark.parametrize("pixels", [50, 30])
def test_decompression_bombs(tmp_path, monkeypatch, pixels):
    image_folder(tmp_path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", pixels)
    fails(tmp_path, rf"6 of 6 images .*more than {pixels} pixels")


def test_bad_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fails(tmp_path / "nowhere", "no such file or folder: .*nowhere")
    fails("", "one folder per class|no such file|is empty|class folders")
    fails(tmp_path, "is empty; check the path")
    (tmp_path / "a.png").write_bytes(png(X[0]))
    fails(tmp_path, "one folder per class, but has none")
    (tmp_path / "ant").mkdir()
    fails(tmp_path, "hold no images")
    (tmp_path / "ant" / "a.png").write_bytes(png(X[0]))
    fails(tmp_path, r"at least two classes .* only class 0 \('ant'\)")
    fails(tmp_path / "a.png", "none of .npz")
    fails("x" * 5000, "cannot read|no such file")
    fails("nul\0byte", r"nul\\x00byte")
    fails("line\nbreak", r"line\\nbreak")


def test_unreadable_names_are_escaped(tmp_path):
    root = image_folder(tmp_path / "set")
    name = os.fsdecode(b"bad\xff\x1b[31m")
    try:
        (root / "ant").rename(root / name)
    except OSError:
        pytest.skip("this file system holds only valid names")
    assert load_data(root).classes[0].isprintable()


# CIFAR ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", [0, 1, 2, 4])
def test_cifar10_pickle(tmp_path, protocol):
    data = load_data(cifar_pickle(tmp_path / "data_batch_1", protocol))
    assert same(data, CIFAR_X.reshape(-1, 3, 32, 32), CIFAR_Y)
    assert data.classes[3] == "cat"


def test_cifar10_python_folder(tmp_path):
    for name in ("data_batch_1", "data_batch_2", "test_batch"):
        cifar_pickle(tmp_path / name)
    (tmp_path / "batches.meta").write_bytes(pickle.dumps({b"label_names": [b"airplane"]}))
    data = load_data(f"{tmp_path}:train")
    assert len(data) == 12
    assert len(load_data(f"{tmp_path}:test")) == 6
    fails(tmp_path, "holds the splits: test, train; got none was named")
    (tmp_path / "test_batch").unlink()
    assert len(load_data(tmp_path)) == 12


def test_cifar10_binary(tmp_path):
    for name in ("data_batch_1.bin", "data_batch_2.bin", "test_batch.bin"):
        cifar_binary(tmp_path / name)
    assert same(load_data(f"{tmp_path}:test"), CIFAR_X.reshape(-1, 3, 32, 32), CIFAR_Y)
    assert len(load_data(f"{tmp_path}:train")) == 12
    assert load_data(tmp_path / "test_batch.bin").classes[9] == "truck"


def test_cifar100(tmp_path):
    binary = load_data(cifar_binary(tmp_path / "train.bin", fine=True), classes=100)
    python = load_data(cifar_pickle(tmp_path / "train", labels=None, fine_labels=CIFAR_Y, coarse_labels=CIFAR_Y), classes=100)
    assert len(binary.classes) == len(python.classes) == 100
    assert binary.sha256 == python.sha256


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"labels": None}, "lacks 'labels'"),
        ({"data": None}, "lacks 'data'"),
        ({"labels": [10] * 6}, r"CIFAR labels must lie in \[0, 9\], but .* 10..10"),
        ({"labels": [0, 1]}, "6 images need as many whole labels"),
        ({"labels": [0.5] * 6}, "whole labels"),
        ({"labels": 3}, "not a readable CIFAR batch"),
        ({"data": CIFAR_X.astype(np.int64)}, "not uint8"),
        ({"data": CIFAR_X[:, :5]}, "not a readable CIFAR batch"),
        ({"data": [1, 2]}, "not a readable CIFAR batch"),
    ],
)
def test_bad_cifar_pickles(tmp_path, changes, words):
    fails(cifar_pickle(tmp_path / "test_batch", **changes), words)


def test_bad_cifar_binary(tmp_path):
    file = cifar_binary(tmp_path / "test_batch.bin")
    file.write_bytes(file.read_bytes()[:-1])
    fails(file, "CIFAR records take 3073 or 3074 bytes, but .* has 18437 bytes")
    file.write_bytes(b"")
    fails(file, "has 0 bytes")
    fails(f"{file}:train", "holds one split; write the path without ':train'")


class Canary:
    """Unpickling it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_hostile_pickle_never_runs(tmp_path, protocol):
    canary = tmp_path / "canary"
    path = cifar_pickle(tmp_path / "data_batch_1", protocol, extra=Canary(canary))
    with pytest.raises(RefusedError, match=r"asks for (posix|nt|os)\.system; refused without running it") as caught:
        load_data(path)
    assert caught.value.exit_code == 4
    assert not canary.exists()


@pytest.mark.parametrize(
    "name", ["builtins\neval", "numpy\nload", "numpy.core.multiarray\nscalar", "_codecs\ndecode", "os\nsystem"]
)
def test_only_what_arrays_need_is_found(tmp_path, name):
    path = tmp_path / "test_batch"
    path.write_bytes(b"\x80\x02c" + name.encode() + b"\n.")
    with pytest.raises(RefusedError, match="refused"):
        load_data(path)


def test_stand_ins_cannot_be_spoiled_for_the_next_file(tmp_path):
    path = tmp_path / "test_batch"
    path.write_bytes(b"\x80\x02cnumpy.core.multiarray\n_reconstruct\nN}U\x08__call__K\x01s\x86b.")
    fails(path, "no dictionary|not a readable")
    assert len(load_data(cifar_pickle(path))) == 6


# Parquet --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("column", ["image", "img"])
def test_parquet(tmp_path, column):
    data = load_data(parquet(tmp_path / "d.parquet", column, ["ant", "bee", "cow", "dog"]))
    assert same(data, X, Y)
    assert data.classes == ("ant", "bee", "cow", "dog")
    assert load_data(parquet(tmp_path / "e.parquet", x=GRAY)).shape == (1, 8, 10)


def test_parquet_folder(tmp_path):
    for name in ("train-00000-of-00002", "train-00001-of-00002", "test-00000-of-00001"):
        parquet(tmp_path / f"{name}.parquet")
    assert same(load_data(f"{tmp_path}:train"), np.concatenate([X, X]), [*Y, *Y])
    fails(tmp_path, "holds the splits: test, train")
    parquet(tmp_path / "plain" / "0.parquet")
    parquet(tmp_path / "plain" / "1.parquet")
    assert len(load_data(tmp_path / "plain", limit=7)) == 7
    parquet(tmp_path / "plain" / "2.parquet", names=["a", "b", "c"])
    fails(tmp_path / "plain", "name different classes")


def test_bad_parquet(tmp_path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    file = tmp_path / "d.parquet"
    cells = [{"bytes": png(X[0])}, {"bytes": b"no image"}]
    for table, words in [
        ({"pixels": cells, "label": [0, 1]}, "must hold a column 'image' or 'img', but has pixels, label"),
        ({"image": cells, "label": ["a", "b"]}, "'label' .* whole numbers"),
        ({"image": cells, "label": [0, None]}, "'label' .* whole numbers"),
        ({"image": [{"bytes": None}] * 2, "label": [0, 1]}, "an image has no bytes"),
        ({"image": [3, 4], "label": [0, 1]}, "an image has no bytes"),
        ({"image": cells, "label": [0, 1]}, r"1 of 2 images cannot be read: d.parquet row 1 \(not an image\)"),
    ]:
        pq.write_table(pa.table(table), file)
        fails(file, words)
    file.write_bytes(b"PAR1" * 8)
    fails(file, "not a readable Parquet")


def test_parquet_needs_its_extra(tmp_path, monkeypatch):
    (tmp_path / "d.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    fails(tmp_path / "d.parquet", r"needs pyarrow; run: pip install secateur\[parquet\]")


# Classes and limit ----------------------------------------------------------------------------------------------------


def test_classes_are_matched_by_name_then_by_order(tmp_path):
    root = image_folder(tmp_path / "a")
    data = load_data(root, classes=["cow", "dog", "ant", "bee"])
    assert data.classes == ("cow", "dog", "ant", "bee")
    assert data.per_class() == (2, 0, 2, 2)
    assert load_data(root, classes=["x", "y", "z"]).y.tolist() == load_data(root).y.tolist()
    assert load_data(root, classes=3).classes == ("ant", "bee", "cow")
    fails(root, "unknown class 'ant'", classes=["x", "y", "bee", "z"])
    fails(root, "have 3 classes, but 4 are wanted", classes=4)
    numbers = image_folder(tmp_path / "b", names=("2", "10", "007"))
    assert load_data(numbers, classes=11).per_class() == (0, 0, 2, 0, 0, 0, 0, 2, 0, 0, 2)


def test_classes_of_nameless_data(tmp_path):
    path = npz(tmp_path, x=X, y=Y)
    assert load_data(path, classes=5).classes == ("0", "1", "2", "3", "4")
    assert load_data(path, classes=["a", "b", "c"]).classes == ("a", "b", "c")
    fails(path, r"labels must lie in \[0, 1\], but .* 0..2; number the classes from 0, or correct --classes", classes=2)
    fails(path, "class names must differ", classes=["a", "b", "a"])
    fails(path, "classes must be 2 to", classes=1)


def test_limit_keeps_class_shares_and_decodes_no_more(tmp_path):
    root = image_folder(tmp_path)
    data = load_data(root, limit=3)
    assert data.per_class() == (1, 1, 1)
    assert torch.equal(load_data(root, limit=3).x, data.x)
    assert len(load_data(root, limit=99)) == 6
    fails(root, "limit must be at least 1", limit=0)
    fails(root, r"size must be two whole numbers .*\(0, 4\)", size=(0, 4))


def test_real_cifar10_mosaic(tmp_path):
    home = os.environ.get("SECATEUR_TEST_DATA")
    if not home or not (Path(home) / "cifar10").is_dir():
        pytest.skip("SECATEUR_TEST_DATA names no folder with cifar10")
    sheet = np.asarray(Image.open(Path(home) / "cifar10" / "test_3_cat.webp").convert("RGB"))
    cats = sheet.reshape(25, 32, 40, 32, 3).transpose(0, 2, 1, 3, 4).reshape(1000, 32, 32, 3)
    data = load_data(npz(tmp_path, x=cats, y=np.arange(1000) % 2))
    assert data.shape == (3, 32, 32)
    assert np.array_equal(data.x.numpy().transpose(0, 2, 3, 1), cats)


# Fuzzing --------------------------------------------------------------------------------------------------------------

fuzz = settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))


def image_set_or_error(path: object) -> None:
    try:
        outcome = load_data(path)  # type: ignore[arg-type]
    except SecateurError as error:
        outcome = str(error)
    assert isinstance(outcome, ImageSet) or "\n" not in outcome


def mutate(raw: bytes, data: st.DataObject) -> bytes:
    """Change, cut or repeat some bytes, near either end as often as anywhere, where the headers are."""
    out = bytearray(raw)
    for _ in range(data.draw(st.integers(1, 5))):
        place = data.draw(st.integers(0, len(out) - 1) | st.integers(0, min(200, len(out) - 1)))
        out[-1 - place if data.draw(st.booleans()) else place] = data.draw(st.integers(0, 255))
    return bytes(out[: data.draw(st.just(len(out)) | st.integers(0, len(out)))])


@pytest.mark.parametrize("name", ["d.npz", "d.safetensors", "d.parquet", "d.bin", "test_batch", "any", "a/0.png"])
@fuzz
@given(raw=st.binary(max_size=400), magic=st.sampled_from([b"", b"PK\x03\x04", b"PAR1", b"\x80\x02", b"\x89PNG\r\n\x1a\n"]))
def test_random_bytes(tmp_path, name, raw, magic):
    (tmp_path / "a").mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(magic + raw)
    image_set_or_error(tmp_path if "/" in name else tmp_path / name)


@pytest.fixture(scope="module")
def originals(tmp_path_factory) -> dict[str, bytes]:
    """Valid files by name."""
    folder = tmp_path_factory.mktemp("valid")
    np.savez(folder / "d.npz", x=X, y=Y, classes=np.array(["a", "b", "c"]))
    np.savez_compressed(folder / "z.npz", x=X, y=Y)
    save_file({"x": X, "y": Y}, folder / "d.safetensors")
    cifar_pickle(folder / "test_batch")
    cifar_pickle(folder / "data_batch_1", 4)
    cifar_binary(folder / "d.bin")
    parquet(folder / "d.parquet", names=["a", "b", "c"])
    for suffix in ("png", "jpg", "webp", "tif", "gif", "bmp", "ppm"):
        Image.fromarray(X[0].transpose(1, 2, 0)).save(folder / f"0.{suffix}")
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("name", ["d.npz", "z.npz", "d.safetensors", "test_batch", "data_batch_1", "d.bin", "d.parquet"])
@fuzz
@given(data=st.data())
def test_mutated_files(tmp_path, originals, name, data):
    (tmp_path / name).write_bytes(mutate(originals[name], data))
    image_set_or_error(tmp_path / name)


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "tif", "gif", "bmp", "ppm"])
@fuzz
@given(data=st.data())
def test_mutated_images(tmp_path, originals, suffix, data):
    for label in "ab":
        (tmp_path / label).mkdir(exist_ok=True)
        (tmp_path / label / f"0.{suffix}").write_bytes(originals[f"0.{suffix}"])
    (tmp_path / "a" / f"0.{suffix}").write_bytes(mutate(originals[f"0.{suffix}"], data))
    image_set_or_error(tmp_path)


@fuzz
@given(
    header=st.text(st.sampled_from("{}'descr:|u1fortan_oeFls,hp()0123456789TruL \n-+[]\"#\\"), max_size=60)
    | st.text(max_size=40)
)
def test_any_npy_header(tmp_path, header):
    raw = header.encode("latin1", "replace")
    with zipfile.ZipFile(tmp_path / "d.npz", "w") as archive:
        for key in "xy":
            archive.writestr(f"{key}.npy", b"\x93NUMPY\x01\x00" + struct.pack("<H", len(raw)) + raw + b"\0" * 64)
    image_set_or_error(tmp_path / "d.npz")
