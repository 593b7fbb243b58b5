"""What a file is, by its content. The name only serves to notice that it says something else."""

from __future__ import annotations

import tarfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Literal

Format = Literal[
    "safetensors", "torch-zip", "torch-legacy", "pickle", "onnx", "torchscript", "exported", "package", "bundle", "huggingface"
]
PROGRAMS: Mapping[str, str] = {
    "torchscript": "a TorchScript program",
    "exported": "a program of torch.export",
    "package": "a torch.package",
}
# First bytes -> what the file is, and what to do about it.
MAGIC: tuple[tuple[bytes, str], ...] = (
    (b"\x1f\x8b", "gzip-compressed: unpack it first"),
    (b"BZh", "bzip2-compressed: unpack it first"),
    (b"\xfd7zXZ", "xz-compressed: unpack it first"),
    (b"\x28\xb5\x2f\xfd", "zstd-compressed: unpack it first"),
    (b"\x04\x22\x4d\x18", "lz4-compressed: unpack it first"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive: unpack it first"),
    (b"Rar!", "a RAR archive: unpack it first"),
    (b"\x78\x9c", "zlib-compressed, perhaps by joblib: save the weights with safetensors"),
    (b"\x78\x01", "zlib-compressed, perhaps by joblib: save the weights with safetensors"),
    (b"\x78\xda", "zlib-compressed, perhaps by joblib: save the weights with safetensors"),
    (b"PK\x05\x06", "an empty zip archive"),
    (b"\x89HDF", "an HDF5 file, perhaps of Keras: save the weights with safetensors"),
    (b"GGUF", "a GGUF file, which holds language models: image classifiers only"),
    (b"\x93NUMPY", "a NumPy array: save the weights with safetensors"),
    (b"\x89PNG", "a PNG image"),
    (b"\xff\xd8\xff", "a JPEG image"),
    (b"TFL3", "a TensorFlow Lite program"),
    (b"\x7fELF", "a program for Linux"),
    (b"MZ", "a program for Windows"),
    (b"version https://git-lfs", "a Git LFS pointer: fetch the file itself with git lfs pull"),
    (b"<!DOCTYPE", "a web page: the download went wrong"),
    (b"<html", "a web page: the download went wrong"),
)
SUFFIXES: Mapping[str, frozenset[str]] = {
    ".safetensors": frozenset({"safetensors"}),
    ".onnx": frozenset({"onnx"}),
    ".pt2": frozenset({"exported"}),
    **dict.fromkeys((".png", ".jpg", ".jpeg", ".gif", ".npz", ".npy", ".h5", ".keras", ".txt", ".json", ".zip"), frozenset()),
    **dict.fromkeys(
        (".pt", ".pth", ".th", ".ckpt", ".tar", ".bin", ".pkl", ".pickle", ".t7", ".model"),
        frozenset({"torch-zip", "torch-legacy", "pickle", "torchscript", "exported", "package"}),
    ),
}
PICKLE_STARTS = b"(c}])lgIVSNFiGKJM"  # how protocols 0 and 1, which have no magic number, may begin


def is_tar(head: bytes) -> bool:
    """Return whether these 512 bytes are the header of a tar archive, of whatever age: its checksum decides."""
    try:
        tarfile.TarInfo.frombuf(head, "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return False
    return True


def known_elsewhere(head: bytes) -> str | None:
    """Return what a file that is no checkpoint is, in words, by its first bytes."""
    return next((word for magic, word in MAGIC if head.startswith(magic)), None)


def kind_of_zip(names: Iterable[str]) -> Format | str:
    """Return the format of a zip archive by the names of its entries; words when it is no checkpoint."""
    found = set(names)
    if "constants.pkl" in found or any(name.startswith("code/") for name in found):
        return "torchscript"
    if "archive_format" in found or any(name.startswith(("models/", "data/aotinductor/")) for name in found):
        return "exported"
    if any(name.startswith("serialized_") and name.endswith(".json") for name in found):
        return "exported"
    if ".data/python_version" in found or ".data/extern_modules" in found:
        return "package"
    if "data.pkl" in found:
        return "torch-zip"
    if "model.weights.h5" in found or {"config.json", "metadata.json"} <= found:
        return "a Keras archive: save the weights with safetensors"
    if found and all(name.endswith(".npy") for name in found):
        return "a NumPy archive, which holds data: save the weights with safetensors"
    return "a zip archive without a checkpoint's data.pkl: unpack it and give the file inside"


def contradicts(path: Path, format: str) -> bool:
    """Return whether the name of a file promises another format."""
    promised = SUFFIXES.get(path.suffix.lower())
    return promised is not None and format not in promised
