"""From a file or folder to a `Classifier`, sniffing by content and never running code that came with it.

A bundle, a safetensors file and what ``torch.load(weights_only=True)`` accepts can be read; everything else is refused.
"""

from __future__ import annotations

import pickle
import re
import warnings
import zipfile
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..architectures import architecture, resolve
from ..errors import ModelError, RefusedError
from ..models.bundle import load_bundle
from ..models.factory import call_factory, import_factory, is_reference
from ..models.registry import COUNTERS, fit, nearest, recognise, shapes_of, skeleton
from ..models.weights import MAX_BYTES, assign, count_outputs, one_line, read_safetensors
from ..models.wrapper import Classifier

CONTAINERS = ("state_dict", "model", "net", "model_state_dict", "ema")
PREFIXES = ("module.", "_orig_mod.")
MAX_ENTRIES = 100_000


def load(
    path: str | Path,
    *,
    arch: str | None = None,
    arch_kwargs: Mapping[str, Any] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    input_size: tuple[int, int] | int | None = None,
    classes: Sequence[str] | None = None,
) -> Classifier:
    """Read a network and return it in eval mode.

    Args:
        path: A bundle, a safetensors file or a torch checkpoint.
        arch: Name of the architecture, or ``file.py:make`` of the user's own code; None recognises it by its shapes.
        arch_kwargs: Arguments of the architecture that shapes cannot tell, such as the heads of a ViT.
        mean: Mean per channel that the network was trained with, for images in [0, 1]; 0 when not given.
        std: Standard deviation per channel; 1 when not given.
        input_size: Height and width of the images; the architecture's usual size when not given.
        classes: Class names; numbers when not given.

    Raises:
        ModelError: The file is damaged, or its network is unknown or does not fit ``arch``.
        RefusedError: The file could only be read by running code from it.
    """
    path = Path(path)
    if path.is_dir():
        own_code = arch if arch is not None and is_reference(arch) else None
        given = {"mean": mean, "std": std, "input_size": input_size, "classes": classes, "arch_kwargs": arch_kwargs}
        said = [name for name, value in {**given, "arch": arch if own_code is None else None}.items() if value is not None]
        if said:
            raise ModelError(f"a bundle says its own {said[0]}: leave it out")
        return load_bundle(path, factory=own_code)
    state = own_copies(unwrap(read_tensors(path)), path.stat().st_size)
    net, description, size = _network(state, arch, dict(arch_kwargs or {}))
    height, width = input_size if isinstance(input_size, tuple) else (input_size or size,) * 2
    input_shape = (_in_channels(net), height, width)
    outputs = count_outputs(net, input_shape)
    if classes is not None and len(classes) != outputs:
        raise ModelError(f"classes must have one name per output ({outputs}), got {len(classes)}")
    assign(net, state, description.get("name") or "the factory's network")
    names = classes or [str(label) for label in range(outputs)]
    return Classifier(net, classes=names, input_shape=input_shape, mean=mean, std=std, arch=description).eval()


def read_tensors(path: Path) -> Any:
    """Return what a weights file holds, without running code from it."""
    if not path.is_file():
        raise ModelError(f"{path} must be a file or a bundle, found none")
    size = path.stat().st_size
    if size > MAX_BYTES:
        raise ModelError(f"{path} must have at most {MAX_BYTES} bytes, got {size}")
    with path.open("rb") as file:
        head = file.read(9)
    if head.startswith(b"PK\x03\x04"):
        _check_archive(path)
        return _torch_load(path)
    if head.startswith(b"\x80"):
        return _torch_load(path)
    if head[8:] == b"{" and int.from_bytes(head[:8], "little") < size:
        return read_safetensors(path)
    raise ModelError(f"{path} must be a bundle, a safetensors file or a torch checkpoint; its first bytes are of neither")


def unwrap(content: Any) -> dict[str, Tensor]:
    """Return the state dict inside a checkpoint: containers opened, wrappers' prefixes and other values dropped."""
    while isinstance(content, Mapping):
        inner = next((content[key] for key in CONTAINERS if isinstance(content.get(key), Mapping)), None)
        if inner is None:
            break
        content = inner
    pairs = content.items() if isinstance(content, Mapping) else ()
    state = {key: value.detach() for key, value in pairs if isinstance(key, str) and isinstance(value, Tensor)}
    if not state:
        raise ModelError("the file must hold a state dict: named tensors, also under " + ", ".join(CONTAINERS))
    while prefix := next((p for p in PREFIXES if all(key.startswith(p) for key in state)), None):
        state = {key.removeprefix(prefix): value for key, value in state.items()}
    counters = (key for key in state if key.endswith(COUNTERS))
    for key in [key for key in counters if state[key].shape != () or state[key].dtype != torch.int64]:
        del state[key]
    return state


def own_copies(state: Mapping[str, Tensor], size: int) -> dict[str, Tensor]:
    """Return copies of plain tensors in memory of their own; ``size`` is the file's, which their sum may not dwarf.

    A view with stride 0 claims any number of elements in a few bytes, so everything is checked before it is copied.
    """
    for key, value in state.items():
        if value.layout != torch.strided or value.is_quantized or value.device.type != "cpu":
            raise ModelError(f"weights must be plain dense tensors, but {key[:100]!a} is not")
        if value.numel() * value.element_size() > value.untyped_storage().nbytes():
            raise ModelError(f"{key[:100]!a} claims more values than the file holds")
    if sum(value.numel() * value.element_size() for value in state.values()) > 4 * size:
        raise ModelError("the weights together claim more values than the file holds")
    return {key: value.clone(memory_format=torch.contiguous_format) for key, value in state.items()}


def _torch_load(path: Path) -> Any:
    """Hand torch the open file, not its path: by a path it would choose a reader from the extension."""
    try:
        with path.open("rb") as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        text = str(error)  # torch's own first line advises to load without weights_only: not repeated
        found = re.search(r"GLOBAL ([\w.]+)", text)
        if found or "Unsupported operand" in text or "persistent id" in text:
            what = found[1] if found else "a pickle beyond plain weights"
            raise RefusedError(f"{path} holds {what}, which needs code: this version reads plain state dicts only") from error
        raise ModelError(f"{path} is a damaged torch checkpoint") from error
    except Exception as error:
        raise ModelError(f"{path} cannot be read as a torch checkpoint: {one_line(error)}") from error


def _check_archive(path: Path) -> None:
    """Refuse archives that are programs, and those that unpack to more than their size."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise ModelError(f"{path} is a damaged zip archive: {one_line(error)}") from error
    names = [entry.filename for entry in entries]
    if len(names) > MAX_ENTRIES or max(Counter(names).values(), default=0) > 1:
        raise ModelError(f"{path} must have at most {MAX_ENTRIES} entries, each name once")
    files = {name.partition("/")[2] for name in names}
    if "constants.pkl" in files or "data.pkl" not in files:
        kind = "a TorchScript program" if "constants.pkl" in files else "no torch checkpoint but perhaps a program"
        raise RefusedError(f"{path} is {kind}: this version reads plain state dicts only")
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise ModelError(f"{path} must hold its entries uncompressed, as torch writes them")


def _network(state: Mapping[str, Tensor], arch: str | None, kwargs: dict[str, Any]) -> tuple[nn.Module, dict[str, Any], int]:
    """Return a network for ``state``, the description that rebuilds it and its usual input size."""
    shapes = shapes_of(state)
    if arch is not None and is_reference(arch):
        make, digest = import_factory(arch)
        return call_factory(make), {"factory": {"ref": arch, "sha256": digest}}, 32
    if arch is None:
        found = recognise(shapes)
        if not found:
            near = nearest(shapes)
            raise ModelError(f"no known architecture has these weights (nearest: {near}): name it, --arch NAME or file.py:make")
        if len(found) > 1:
            raise ModelError(f"these weights fit {' and '.join(name for name, _ in found)}: choose with --arch NAME")
        arch = found[0][0]
    kwargs = resolve(arch, fit(arch, shapes, kwargs))
    return (
        skeleton(arch, kwargs),
        {"name": arch, "kwargs": kwargs},
        kwargs.get("input_size", architecture(arch).input_size),
    )


def _in_channels(net: nn.Module) -> int:
    """Return the input channels of the first convolution; 3 when there is none."""
    return next((module.in_channels for module in net.modules() if isinstance(module, nn.Conv2d)), 3)
