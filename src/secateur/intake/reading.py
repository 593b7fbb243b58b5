"""The door: one reading of a file or folder, which every verb uses. It needs no torch and runs nothing."""

from __future__ import annotations

import hashlib
import mmap
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from ..errors import ModelError, RefusedError
from .archive import Archive, open_archive
from .contents import Contents, find_weights
from .findings import Finding
from .names import findings as judge_all
from .pickles import Record, also_a_pickle
from .safetensorsfile import looks_like_safetensors, read_safetensors
from .sniff import PICKLE_STARTS, PROGRAMS, Format, contradicts, is_tar, kind_of_zip, known_elsewhere
from .tensors import Stored, TensorInfo, check_total
from .torchfile import TorchFile, read_pickled, read_zipped
from .view import sha256

MAX_FILE = 8 * 2**30


@dataclass(frozen=True, eq=False)
class Reading:
    """What was found in a file.

    Attributes:
        path: The file, or the folder.
        format: By its content.
        files: Its weights file or files, by name: their content.
        findings: What is worth telling.
        contents: The weights; None when there are none to be read here.
        names: Globals that a pickle names.
        problem: Why it could not be read to the end, if so.
        facts: What else it says.
        described: Tensors of a graph, which is described but not read.
    """

    path: Path
    format: Format
    files: Mapping[str, memoryview]
    findings: tuple[Finding, ...] = ()
    contents: Contents | None = None
    names: tuple[str, ...] = ()
    problem: str | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)
    described: tuple[TensorInfo, ...] = ()

    @property
    def size(self) -> int:
        """Bytes of its weights file or files."""
        return sum(map(len, self.files.values()))

    @cached_property
    def sha256(self) -> str:
        """Digest of its weights file; when there are several, of a line with name and digest for each."""
        digests = {name: sha256(data) for name, data in self.files.items()}
        if len(digests) == 1:
            return next(iter(digests.values()))
        return hashlib.sha256("".join(f"{name} {digest}\n" for name, digest in digests.items()).encode()).hexdigest()

    @property
    def refusal(self) -> str | None:
        """Why nobody should load this file; None when there is no such reason."""
        critical = [finding for finding in self.findings if finding.severity == "critical"]
        if not critical:
            return None
        more = f" (and {len(critical) - 1} more)" if len(critical) > 1 else ""
        return f"{critical[0].message}{more}"


def read(path: str | Path) -> Reading:
    """Read a file, a bundle or a Hugging Face folder as far as that is possible without running anything from it.

    Raises:
        ModelError: There is nothing there, it is no checkpoint, or it is too damaged to say anything about.
    """
    path = Path(path)
    if not path.is_dir():
        return read_one(path)
    return _bundle(path) if (path / "arch.json").exists() else _hub_folder(path)


def read_one(path: Path) -> Reading:
    """Read one file; see `read`."""
    data = map_file(path)
    reading = _by_content(path, data, bytes(data[:512]))
    if contradicts(path, reading.format):
        told = Finding("LOD-005", f"the name ends in {path.suffix.lower()}, the content is {reading.format}")
        reading = replace(reading, findings=(*reading.findings, told))
    return reading


def _bundle(path: Path) -> Reading:
    from ..models.description import read_arch

    fields = read_arch(path)
    reading = read_one(path / "model.safetensors")
    told = [] if fields["arch"]["factory"] is None else [Finding("LOD-006", "needs code of its author to be rebuilt")]
    if reading.format != "safetensors" and not reading.problem:
        reading = replace(reading, problem=f"a bundle's weights must be safetensors, got {reading.format}")
    facts = {key: fields[key] for key in ("arch", "input", "classes", "steps", "ancestor_sha256", "wrappers", "masks")}
    facts["bits"] = {key: fields["quant"][f"{key}_bits"] for key in ("weight", "activation")} if fields["quant"] else None
    return replace(reading, path=path, format="bundle", findings=(*reading.findings, *told), facts=facts)


def _hub_folder(path: Path) -> Reading:
    from .folder import read_folder

    folder = _told(path, lambda: read_folder(path))
    parts = [read_one(file) for file in folder.weights]
    findings = [*folder.findings, *(finding for part in parts for finding in part.findings)]
    facts = {"arch": folder.arch, "kwargs": dict(folder.kwargs), "classes": folder.classes, "mean": folder.mean}
    facts |= {
        "note": folder.note,
        "std": folder.std,
        "input_size": folder.input_size,
        "files": [part.path.name for part in parts],
    }
    first = next((part for part in parts if part.problem or part.contents is None), parts[0])
    if first.format in PROGRAMS or first.format == "onnx":  # a matter of that file alone
        return replace(first, findings=tuple(findings))
    merged = replace(
        first,
        path=path,
        format="huggingface",
        files={name: data for part in parts for name, data in part.files.items()},
        findings=tuple(findings),
        names=tuple(name for part in parts for name in part.names),
        facts={key: value for key, value in facts.items() if value},
    )
    if len(parts) > 1 and not first.problem and first.contents is not None:
        pairs = [pair for part in parts if part.contents for pair in part.contents.tensors.items()]
        tensors = dict(pairs)
        if len(tensors) < len(pairs):
            raise ModelError(f"{show(path)} must hold each tensor in one of its files, but some are in two")
        merged = replace(merged, contents=replace(first.contents, tensors=tensors))
    return merged


def map_file(path: Path) -> memoryview:
    """Return the content of a regular file, mapped and not copied.

    Raises:
        ModelError: There is no such file, it is no regular file, or it is too large.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except FileNotFoundError as error:
        raise ModelError(f"{show(path)} must be a file or a bundle, found none") from error
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot read {show(path)}: {getattr(error, 'strerror', None) or error}") from error
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise ModelError(f"{show(path)} must be a file, found {'a folder' if stat.S_ISDIR(status.st_mode) else 'a device'}")
        if status.st_size > MAX_FILE:
            raise ModelError(f"{show(path)} must have at most {MAX_FILE} bytes, got {status.st_size}")
        if status.st_size == 0:
            raise ModelError(f"{show(path)} is empty")
        return memoryview(mmap.mmap(descriptor, status.st_size, access=mmap.ACCESS_READ))
    finally:
        os.close(descriptor)


def show(path: Path) -> str:
    """Return a path as one printable text."""
    text = str(path)
    return text if text.isprintable() and len(text) <= 300 else ascii(text[:300])[1:-1]


def admit(reading: Reading, *, force: bool = False) -> Contents:
    """Return the weights of a reading that may be used.

    Args:
        reading: The file.
        force: Whether weights are taken from a file that names dangerous objects, or whose checksums do not match.

    Raises:
        RefusedError: The file is a program, or names dangerous objects and ``force`` was not given.
        ModelError: The file is damaged or holds no weights.
    """
    where = show(reading.path)
    if reading.format in PROGRAMS:
        raise RefusedError(
            f"{where} is {PROGRAMS[reading.format]}: reading it means running it; "
            "--sandbox takes its weights in a sandbox, --trust-code runs it here"
        )
    if reading.refusal and not force:
        raise RefusedError(f"{where} {reading.refusal}: it may run code where it is unpickled; --force takes its weights alone")
    if reading.problem:
        raise ModelError(f"{where}: {reading.problem}")
    wrong = next((finding for finding in reading.findings if finding.rule == "LOD-007"), None)
    if wrong and not force:
        raise ModelError(f"{where}: {wrong.message}; fetch it again, or read it as it is with --force")
    if reading.format == "onnx" or reading.contents is None:
        raise ModelError(f"{where} is an ONNX graph, which cannot be repaired: give the PyTorch weights it was exported from")
    if not reading.contents.tensors:
        raise ModelError(f"{where} must hold a state dict: named tensors, also under state_dict, model, net and the like")
    return reading.contents


def _by_content(path: Path, data: memoryview, head: bytes) -> Reading:
    if head.startswith(b"PK\x03\x04"):
        return _zip(path, data)
    if is_tar(head):  # torch.load looks for these first, whatever else the file is
        raise ModelError(
            f"{show(path)} can be read as a tar archive: unpack it, or save the checkpoint with torch 1.6 or later"
        )
    if looks_like_safetensors(head, len(data)):
        if also_a_pickle(data):
            raise ModelError(f"{show(path)} can be read as safetensors and as a pickle; such a file is made to deceive")
        tensors = _told(path, lambda: read_safetensors(path, data))
        return _complete(Reading(path, "safetensors", {path.name: data}), tensors)
    if head.startswith(b"\x80"):
        return _pickle(path, data)
    if word := known_elsewhere(head):
        raise ModelError(f"{show(path)} is no checkpoint but {word}")
    from .onnxfile import looks_like_onnx

    if looks_like_onnx(head):
        return _onnx(path, data)
    if head[0] in PICKLE_STARTS:
        reading = _pickle(path, data)
        if reading.names or not reading.problem:
            return reading
    raise ModelError(f"{show(path)} must be a bundle, a safetensors file or a torch checkpoint; its first bytes are of neither")


def _told(path: Path, read: Any) -> Any:
    try:
        return read()
    except ModelError as error:
        raise ModelError(f"{show(path)}: {error}") from error


def _zip(path: Path, data: memoryview) -> Reading:
    archive: Archive = _told(path, lambda: open_archive(data))
    kind = kind_of_zip(archive.entries)
    reading = Reading(path, "torch-zip", {path.name: data}, facts={"entries": len(archive.entries)})
    if kind in PROGRAMS:
        told = Finding("LOD-004", f"is {PROGRAMS[kind]}")
        return replace(reading, format=kind, findings=(told,))  # type: ignore[arg-type]
    if kind != "torch-zip":
        raise ModelError(f"{show(path)} is {kind}")
    if not archive.rooted:
        raise ModelError(f"{show(path)} must have all its entries in one folder, as torch writes them")
    reading = _torch(reading, read_zipped(archive))
    damaged = [] if all(entry.crc == 0 for entry in archive.entries.values()) else archive.damaged()
    if damaged:
        more = f" and {len(damaged) - 1} more" if len(damaged) > 1 else ""
        told = Finding("LOD-007", f"the checksum of {damaged[0][:60]!a}{more} does not match", damaged[0][:60])
        reading = replace(reading, findings=(*reading.findings, told))
    return reading


def _pickle(path: Path, data: memoryview) -> Reading:
    file = read_pickled(data)
    return _torch(Reading(path, "torch-legacy" if file.legacy else "pickle", {path.name: data}), file)


def _torch(reading: Reading, file: TorchFile) -> Reading:
    names = tuple(map(str, file.names))
    reading = replace(reading, findings=tuple(judge_all(file.names)), names=names, problem=file.problem)
    return reading if file.problem else _complete(reading, file.value)


def _complete(reading: Reading, value: Any) -> Reading:
    """Add the weights to a reading, with what is worth telling about them."""
    try:
        contents = find_weights(value)
        check_total((tensor for tensor in contents.tensors.values() if isinstance(tensor, Stored)), reading.size)
    except ModelError as error:
        return replace(reading, problem=str(error))
    foreign = [name for name, tensor in contents.tensors.items() if isinstance(tensor, Record)]
    told = [Finding("LOD-010", f"{name[:60]!a} is a quantised, sparse or foreign tensor", name[:60]) for name in foreign[:20]]
    return replace(reading, contents=contents, findings=(*reading.findings, *told))


def _onnx(path: Path, data: memoryview) -> Reading:
    from .onnxfile import read_onnx

    found = read_onnx(path)
    return Reading(path, "onnx", {path.name: data}, findings=found.findings, facts=found.facts, described=found.tensors)
