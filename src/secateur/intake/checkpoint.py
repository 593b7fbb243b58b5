"""From a file or folder to a `Classifier`, without running what came with it.

`read` looks, this module builds: the network of the weights found, with copies of them in it.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..architectures import architecture, is_external, is_reference, resolve
from ..errors import ModelError, RefusedError
from ..models.bundle import load_bundle
from ..models.factory import call_factory, import_factory
from ..models.registry import COUNTERS, Shapes, fit, nearest, recognise, shapes_of, skeleton
from ..models.weights import assign, count_outputs
from ..models.wrapper import Classifier
from .contents import Contents, candidates
from .findings import Finding
from .reading import Reading, admit, read, read_one, show
from .sniff import PROGRAMS
from .tensors import Stored, check_total

MAX_SIDE = 4096  # of an image, as in arch.json
T = TypeVar("T")


def load(
    path: str | Path | Reading,
    *,
    arch: str | None = None,
    arch_kwargs: Mapping[str, Any] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    input_size: tuple[int, int] | int | None = None,
    classes: Sequence[str] | None = None,
    force: bool = False,
    sandbox: bool = False,
    trust_code: bool = False,
) -> Classifier:
    """Read a network and return it in eval mode; its ``origin`` says from what, and what was noticed.

    Args:
        path: A bundle, a folder as Hugging Face keeps it, a safetensors file, a torch checkpoint or a pickle; or what `read`
            made of it.
        arch: Name of the architecture, also ``timm:NAME`` or ``torchvision:NAME``, or ``file.py:make`` of the user's own code;
            None recognises it by its shapes.
        arch_kwargs: Arguments of the architecture that shapes cannot tell, such as the heads of a ViT.
        mean: Mean per channel that the network was trained with, for images in [0, 1]; 0 when nobody says.
        std: Standard deviation per channel; 1 when nobody says.
        input_size: Height and width of the images; what the file says or the architecture's usual size when not given.
        classes: Class names; numbers when nobody says.
        force: Take the weights of a file that names dangerous objects or has wrong checksums. Nothing of it is run.
        sandbox: Run a file that is a program in a sandbox, once, to take its weights.
        trust_code: Run such a file here, without a fence.

    Raises:
        ModelError: The file is damaged, or its network is unknown or does not fit ``arch``.
        RefusedError: The file could only be read by running code from it, or is made to run some.
    """
    reading = path if isinstance(path, Reading) else read(path)
    path = reading.path
    if reading.format == "bundle":
        own_code = arch if arch is not None and is_reference(arch) else None
        given = {"mean": mean, "std": std, "input_size": input_size, "classes": classes, "arch_kwargs": arch_kwargs}
        said = [name for name, value in {**given, "arch": arch if own_code is None else None}.items() if value is not None]
        if own_code is not None and reading.facts["arch"]["factory"] is None:
            said.append("arch")
        if said:
            raise ModelError(f"a bundle says its own {said[0]}: leave it out")
        admit(reading)
        model = load_bundle(path, factory=own_code)
        model.origin = _origin(reading, "data")
        return model
    weights = _weights(reading, force=force, sandbox=sandbox, trust_code=trust_code)
    facts = {**_beside(weights.reading), **weights.reading.facts}
    own = facts.get("kwargs", {}) if arch is None else {}
    try:
        net, state, description = _network(weights.state, arch or facts.get("arch"), {**own, **(arch_kwargs or {})})
    except ModelError as error:
        raise ModelError(f"{error}{hint(weights.reading)}") from error
    usual = _usual(description)
    height, width = _sides(input_size) or facts.get("input_size") or usual["input_size"]
    if not 1 <= min(height, width) <= max(height, width) <= MAX_SIDE:
        raise ModelError(f"input_size must lie in [1, {MAX_SIDE}], got {height}x{width}")
    input_shape = (_in_channels(net), height, width)
    outputs = count_outputs(net, input_shape)
    names = classes or facts.get("classes") or [str(label) for label in range(outputs)]
    if len(names) != outputs:
        raise ModelError(f"classes must have one name per output ({outputs}), got {len(names)}")
    assign(net, state, description.get("name") or "the factory's network")
    model = Classifier(
        net,
        classes=names,
        input_shape=input_shape,
        mean=mean or facts.get("mean") or usual["mean"],
        std=std or facts.get("std") or usual["std"],
        arch=description,
    ).eval()
    softmax = description.get("name") is None and _answers_probabilities(model)  # no network of the zoo ends in one
    noticed = [Finding("LOD-011", "gives probabilities, not logits")] if softmax else []
    model.origin = _origin(replace(weights.reading, findings=(*weights.reading.findings, *noticed)), weights.loader)
    return model


@dataclass(frozen=True, eq=False)
class _Weights:
    reading: Reading
    state: Mapping[str, Tensor]
    loader: str


def _weights(reading: Reading, *, force: bool, sandbox: bool, trust_code: bool) -> _Weights:
    """Return the weights of a reading as tensors in memory of their own."""
    if not (sandbox or trust_code):
        return _Weights(reading, tensors(admit(reading, force=force), reading.size), "data")
    try:
        return _Weights(reading, tensors(admit(reading), reading.size), "data")  # nothing needs to run
    except (ModelError, RefusedError):
        if reading.format not in (*PROGRAMS, "torch-zip", "torch-legacy", "pickle"):
            raise
    program: Any = reading.format if reading.format in PROGRAMS else "pickle"
    if trust_code:
        from .sandbox_worker import read_program

        state, _ = read_program(reading.path, program)
        return _Weights(reading, _tidy(state), "trusted code")
    from .sandbox import extract

    folder = Path(tempfile.mkdtemp(prefix="secateur-"))
    try:
        extracted = extract(reading.path, program, folder, memory=max(4 * 2**30, 3 * reading.size))
        found = read_one(extracted.weights)
        return _Weights(reading, tensors(admit(found), found.size), f"sandbox ({extracted.fence})")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def tensors(contents: Contents, size: int) -> dict[str, Tensor]:
    """Return the weights of a file as dense tensors in memory of their own.

    Args:
        contents: What the file holds.
        size: Bytes of the file, which the copies may not dwarf.

    Raises:
        ModelError: A tensor is of a kind that is not read, or together they claim more than the file holds.
    """
    found: dict[str, Stored] = {}
    for name, tensor in contents.tensors.items():
        if not isinstance(tensor, Stored):
            raise ModelError(f"weights must be plain dense tensors, but {name[:100]!a} is not")
        found[name] = tensor
    check_total(found.values(), size)
    return {name: to_torch(tensor) for name, tensor in found.items()}


def to_torch(stored: Stored) -> Tensor:
    """Return a tensor of a file, copied."""
    dtype = getattr(torch, stored.dtype)
    if 0 in stored.shape:
        return torch.empty(stored.shape, dtype=dtype)
    content = torch.frombuffer(bytearray(stored.bytes()), dtype=torch.uint8)
    flat = content != 0 if dtype == torch.bool else content.view(dtype)
    return flat.as_strided(stored.shape, stored.stride).contiguous()


def _network(
    state: Mapping[str, Tensor], arch: str | None, kwargs: dict[str, Any]
) -> tuple[nn.Module, dict[str, Tensor], dict[str, Any]]:
    """Return a network for ``state``, the state under the network's names, and the description that rebuilds it."""
    renamings = list(candidates(state))
    if arch is not None and is_reference(arch):
        make, digest = import_factory(arch)
        net = call_factory(make)
        own = set(shapes_of(net.state_dict()))
        fitting = (new for new in renamings if {n for n in new.values() if not n.endswith(COUNTERS)} == own)
        return net, _renamed(state, next(fitting, renamings[-1])), {"factory": {"ref": arch, "sha256": digest}}
    if arch is None:
        arch, found, renaming = recognised(state)
        kwargs = {**found, **kwargs}
    else:
        renaming = next((new for new in renamings if _fits(arch, shapes_of(_renamed(state, new)), kwargs)), renamings[-1])
    state = _renamed(state, renaming)
    kwargs = resolve(arch, fit(arch, shapes_of(state), kwargs))
    return skeleton(arch, kwargs), state, {"name": arch, "kwargs": kwargs}


def fitting(tensors: Mapping[str, Any], arch: str, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments with which the architecture ``arch`` has weights of these names and shapes.

    Raises:
        ModelError: There are none.
    """
    for renaming in candidates(tensors):
        shapes = shapes_of(_renamed(tensors, renaming))
        if _fits(arch, shapes, kwargs):
            return resolve(arch, fit(arch, shapes, kwargs))
    raise ModelError(f"the weights are not those of {arch}, which the folder names")


def recognised(tensors: Mapping[str, Any]) -> tuple[str, dict[str, Any], dict[str, str]]:
    """Return the architecture that has weights of these names and shapes.

    Args:
        tensors: Name -> anything with a ``shape``.

    Returns:
        Its name, its arguments, and its own names by those of the file.

    Raises:
        ModelError: There is none, or more than one.
    """
    renamings = list(candidates(tensors))
    for renaming in renamings:
        found = recognise(shapes_of(_renamed(tensors, renaming)))
        if len(found) > 1:
            raise ModelError(f"these weights fit {' and '.join(name for name, _ in found)}: choose with --arch NAME")
        if found:
            return *found[0], renaming
    near = nearest(shapes_of(_renamed(tensors, renamings[-1])))
    raise ModelError(
        f"no known architecture has these weights (nearest: {near}): name it, --arch NAME, timm:NAME, torchvision:NAME "
        "or file.py:make"
    )


def _fits(arch: str, shapes: Shapes, kwargs: Mapping[str, Any]) -> bool:
    return shapes_of(skeleton(arch, resolve(arch, fit(arch, shapes, kwargs))).state_dict()) == shapes


def _renamed(state: Mapping[str, T], renaming: Mapping[str, str]) -> dict[str, T]:
    return {renaming[name]: tensor for name, tensor in state.items()}


def _usual(description: Mapping[str, Any]) -> dict[str, Any]:
    """Return what images an architecture is usually given, where nobody says."""
    name = description.get("name")
    if name is None:
        return {"input_size": (32, 32), "mean": None, "std": None}
    if is_external(name):
        from ..models.external import usual_input

        size, mean, std = usual_input(name, description["kwargs"]) or ((224, 224), None, None)
        fits = mean is not None and len(mean) == description["kwargs"].get("in_channels", 3)
        return {"input_size": size, "mean": mean if fits else None, "std": std if fits else None}
    size = description["kwargs"].get("input_size", architecture(name).input_size)
    return {"input_size": (size, size), "mean": None, "std": None}


def hint(reading: Reading) -> str:
    """Return what the file itself says its network is, for the end of a message; empty when it says nothing."""
    if "note" in reading.facts:
        return f"; {reading.facts['note']}"
    said = reading.contents.facts if reading.contents else {}
    name = next((said[key] for key in ("arch", "architecture", "model_name", "model") if isinstance(said.get(key), str)), None)
    return "" if name is None else f"; the file itself says {str(name)[:60]!a}"


def _beside(reading: Reading) -> dict[str, Any]:
    """Return what stands beside the weights and matters here: the size of the images."""
    facts = reading.contents.facts if reading.contents else {}
    return {"input_size": facts["input_size"]} if "input_size" in facts else {}


def _sides(size: tuple[int, int] | int | None) -> tuple[int, int] | None:
    return (size, size) if isinstance(size, int) else size


def _in_channels(net: nn.Module) -> int:
    """Return the input channels of the first convolution; 3 when there is none."""
    return next((module.in_channels for module in net.modules() if isinstance(module, nn.Conv2d)), 3)


def _answers_probabilities(model: Classifier) -> bool:
    """Whether the network ends in a softmax, by its answers to two images of noise."""
    x = torch.rand(2, *model.input_shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        answers = model(x)
    return bool((answers >= 0).all() and ((answers.sum(1) - 1).abs() < 1e-4).all()) and answers.shape[1] > 1


def _tidy(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}


def _origin(reading: Reading, loader: str) -> dict[str, Any]:
    """Return what a record says of the file that a network came from."""
    dangerous = [finding for finding in reading.findings if finding.rule in ("LOD-001", "LOD-002")]
    return {
        "path": show(reading.path),
        "sha256": reading.sha256,
        "format": reading.format,
        "loader": loader,
        "suspicious_globals": [finding.message.partition(" ")[2] for finding in dangerous],
        "findings": [finding.record() for finding in reading.findings],
    }
