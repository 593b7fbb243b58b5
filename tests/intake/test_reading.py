"""The door itself: what a file is taken for, whatever its name and its first bytes look like."""

from __future__ import annotations

import json
import os
import struct
import tarfile
from pathlib import Path

import pytest
import safetensors.torch
import torch

from secateur.errors import ModelError
from secateur.intake import view
from secateur.intake.reading import read, read_one
from secateur.intake.sniff import contradicts, known_elsewhere
from secateur.intake.view import View


def padded(size: int, start: bytes = b"{") -> bytes:
    """A safetensors file whose header has this many bytes, and so begins with any byte one likes."""
    text = json.dumps({"w": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}}).encode()
    return struct.pack("<Q", size) + text + b" " * (size - len(text)) + b"1234"


@pytest.mark.parametrize("size", [0x80, 0x180, 0x280, 0x480, 0x580, 0x428, 0x563, 0x4080])
def test_safetensors_may_begin_like_a_pickle(size, tmp_path):
    (tmp_path / "a.safetensors").write_bytes(padded(size))
    found = read(tmp_path / "a.safetensors")
    assert found.format == "safetensors"
    assert found.contents is not None
    assert list(found.contents.tensors) == ["w"]


def test_safetensors_that_are_also_a_pickle_are_refused(tmp_path):
    module, name = b"torch.utils.bottleneck.__main__.x", b"run_a_function_with_a_very_long_name"
    inside = b'"x' + b"U" + bytes([len(module)]) + module + b"U" + bytes([len(name)]) + name + b"q\xc2\x93)R."
    size = 0x470280
    text = b"{" + inside + b'":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}}'
    content = struct.pack("<Q", size) + text + b" " * (size - len(text)) + b"1234"
    assert content.startswith(b"\x80\x02G\x00\x00\x00\x00\x00{")  # protocol 2, then a float of eight bytes
    assert set(safetensors.torch.load(content)) == {inside[1:].decode()}
    (tmp_path / "a.safetensors").write_bytes(content)
    with pytest.raises(ModelError, match="as safetensors and as a pickle"):
        read(tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    ("head", "word"),
    [
        (b"\x1f\x8b\x08", "gzip"),
        (b"\x89HDF\r\n", "HDF5"),
        (b"version https://git-lfs.github.com/spec/v1", "git lfs pull"),
        (b"<!DOCTYPE html>", "web page"),
    ],
)
def test_what_is_no_checkpoint_is_named(head, word, tmp_path):
    assert word in str(known_elsewhere(head))
    (tmp_path / "a.pt").write_bytes(head + bytes(100))
    with pytest.raises(ModelError, match=word):
        read(tmp_path / "a.pt")


@pytest.mark.parametrize(
    ("name", "format", "wrong"),
    [
        ("a.pt", "torch-zip", False),
        ("a.pth.tar", "torch-legacy", False),
        ("a.safetensors", "torch-zip", True),
        ("a.pt", "safetensors", True),
        ("a.bin", "safetensors", True),
        ("a.onnx", "onnx", False),
        ("a.onnx", "torch-zip", True),
        ("a.png", "pickle", True),
        ("a", "pickle", False),
        ("a.epoch7", "safetensors", False),
        ("A.PT", "safetensors", True),
    ],
)
def test_names_that_contradict_the_content(name, format, wrong):
    assert contradicts(Path(name), format) == wrong


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_whatever_is_also_a_tar_archive_is_refused(format, tmp_path):
    with tarfile.open(tmp_path / "a.pt", "w:", format=format) as file:
        file.addfile(tarfile.TarInfo("pickle"))
    with pytest.raises(ModelError, match="as a tar archive"):
        read(tmp_path / "a.pt")
    whole = bytearray((tmp_path / "a.pt").read_bytes())
    whole[257:265] = bytes(8)  # as before 1988: nothing but the checksum says what it is
    whole[:4] = b"\x80\x02N."
    whole[148:156] = b" " * 8
    whole[148:156] = b"%06o\0 " % sum(whole[:512])
    (tmp_path / "b.pt").write_bytes(whole)
    with pytest.raises(ModelError, match="as a tar archive"):
        read(tmp_path / "b.pt")


def test_special_files_are_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zero").symlink_to("/dev/zero")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for name, message in (
        ("pipe", "found a device"),
        ("zero", "found a device"),
        ("loop", "cannot read"),
        ("no", "found none"),
    ):
        with pytest.raises(ModelError, match=message):
            read(tmp_path / name)
    with pytest.raises(ModelError, match="found a folder"):
        read_one(tmp_path)


def test_names_of_files_are_shown_on_one_line(tmp_path):
    path = tmp_path / "a\nb\x1b[31m"
    path.write_text("hello")
    with pytest.raises(ModelError) as caught:
        read(path)
    assert str(caught.value).isprintable()


def test_what_was_read_stays_when_the_file_goes(tmp_path):
    torch.save({"w": torch.arange(4.0)}, tmp_path / "a.pt")
    found = read(tmp_path / "a.pt")
    (tmp_path / "a.pt").unlink()
    assert found.contents is not None
    tensor = found.contents.tensors["w"]
    assert bytes(tensor.bytes()) == torch.arange(4.0).numpy().tobytes()  # type: ignore[union-attr]


def test_a_memory_as_a_file(monkeypatch):
    file = View(memoryview(bytes(range(100)) * 2000))
    assert file.read(3) == b"\x00\x01\x02"
    assert len(file.read(10**15)) == 199_997
    assert file.read(10**15) == b""
    file.seek(10)
    assert file.readline() == bytes([10])
    assert file.seek(-5, 2) == 199_995
    assert len(file.read()) == 5
    with pytest.raises(OSError, match="before the start"):
        file.seek(-1)
    monkeypatch.setattr(view, "MAX_READ", 2**17)
    file.seek(0)
    assert len(file.read(190_000)) == 2**17
    short = View(memoryview(bytes(range(100))), max_line=20)
    short.seek(11)
    assert len(short.readline()) == 20
