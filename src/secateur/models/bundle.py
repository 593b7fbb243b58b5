"""A network on disk: ``model.safetensors``, ``arch.json``, ``README.md``, perhaps masks and steps of quantisation; no pickle.

``arch.json`` is written last, so that a folder which has one is whole. The same network always gives the same bytes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from ..architectures import resolve
from ..errors import ModelError, RefusedError
from ..types import ChannelMask, HardMask, WeightMask
from .activations import attach, wrappers_of
from .description import FORMAT, check_arch, read_arch
from .factory import call_factory, import_factory
from .quant import FILE as STEPS
from .quantised import Quantisation, check_grid, quantisation_of
from .quantised import attach as attach_quantisation
from .registry import Shapes, shapes_of, skeleton
from .weights import assign, check_shapes, count_outputs, read_safetensors
from .wrapper import Classifier

WEIGHTS, MASKS, DESCRIPTION, CARD = "model.safetensors", "masks.safetensors", "arch.json", "README.md"
MODEL_CARD = """---
license: other
license_name: unknown
library_name: secateur
pipeline_tag: image-classification
tags:
- secateur
---

# {title}

An image classifier in the bundle format of secateur: the weights are in `model.safetensors`, what rebuilds the network
and what was done to it in `arch.json`.

    import secateur
    model = secateur.load("PATH OF THIS FOLDER")  # takes images (batch, {shape}) in [0, 1]
"""


def save(
    model: Classifier,
    folder: str | Path,
    *,
    masks: HardMask | None = None,
    channels: Mapping[str, Sequence[int]] | None = None,
    steps: Iterable[Mapping[str, Any]] = (),
    ancestor_sha256: str | None = None,
    overwrite: bool = False,
) -> None:
    """Write a bundle.

    Edits of feature maps (`wrap`) and a quantisation that are on the network are kept.

    Args:
        model: The classifier; its weights must be float32 and finite.
        folder: Where to; made when missing.
        masks: What was cut, kept beside the weights.
        channels: Site -> original indices kept, for a network smaller than ``arch`` says; None takes the model's own.
        steps: What was done to the network, each ``{"method", "version", "args"}``.
        ancestor_sha256: Digest of the file that the network came from.
        overwrite: Whether ``folder`` may hold files; those that are not part of the bundle stay.

    Raises:
        ModelError: The network could not be rebuilt from what would be written, or ``folder`` is in use.
    """
    quantisation = quantisation_of(model)
    if quantisation is not None:
        check_grid(model.net, quantisation)
    shape = model.input_shape
    kept = model.channels if channels is None else channels
    description: dict[str, Any] = {
        "format": FORMAT,
        "arch": _complete(model.arch),
        "input": {"shape": list(shape), "mean": _decimals(model.mean), "std": _decimals(model.std)},
        "classes": list(model.classes),
        "channels": {site: [int(i) for i in indices] for site, indices in kept.items()},
        "masks": None if masks is None else MASKS,
        "wrappers": list(wrappers_of(model)),
        "quant": None if quantisation is None else quantisation.fields(),
        "steps": [dict(step) for step in steps],
        "ancestor_sha256": ancestor_sha256,
    }
    check_arch(description)
    state = {key: value.detach().cpu().contiguous().clone() for key, value in model.net.state_dict().items()}
    _check_rebuilds(description, state)
    title = description["arch"]["name"] or "A network of the user's own"
    files = {
        WEIGHTS: safetensors.torch.save(state, {"format": "pt"}),
        CARD: MODEL_CARD.format(title=title, shape=", ".join(map(str, shape))).encode(),
    }
    if quantisation is not None:
        files[STEPS] = safetensors.torch.save({name: scale.cpu() for name, scale in quantisation.weights.items()})
    if masks is not None:
        packed = _pack(masks)
        _unpack(packed, shapes_of(state))
        files[MASKS] = safetensors.torch.save(packed)
    _write(Path(folder), files, _to_json(description), overwrite)


def load_bundle(folder: str | Path, *, factory: str | Callable[[], nn.Module] | None = None) -> Classifier:
    """Read a bundle and return the classifier in eval mode, bit for bit as it was saved.

    Args:
        folder: The bundle.
        factory: For a network that a user's own code builds: that function, or ``file.py:make``.

    Raises:
        ModelError: The bundle is damaged, contradicts itself or uses what this version does not know.
        RefusedError: The network needs code and ``factory`` was not given.
    """
    folder = Path(folder)
    fields = read_arch(folder)
    c, h, w = fields["input"]["shape"]
    net = _rebuild(fields, factory)
    name = fields["arch"]["name"] or "the factory's network"
    state = read_safetensors(folder / WEIGHTS)
    check_shapes(shapes_of(net.state_dict()), shapes_of(state), name)
    outputs = count_outputs(net, (c, h, w))
    if outputs != len(fields["classes"]):
        raise ModelError(f"arch.json: classes must have one name per output ({outputs}), got {len(fields['classes'])}")
    assign(net, state, name)
    model = Classifier(
        net,
        classes=fields["classes"],
        input_shape=(c, h, w),
        mean=fields["input"]["mean"],
        std=fields["input"]["std"],
        arch=fields["arch"],
        channels=fields["channels"],
    ).eval()
    if fields["quant"]:
        attach_quantisation(model, Quantisation.read(fields["quant"], read_safetensors(folder / STEPS)))
    attach(model, fields["wrappers"])
    return model


def load_masks(folder: str | Path) -> HardMask | None:
    """Return what was cut from the network of a bundle; None when it records nothing.

    Raises:
        ModelError: The masks are damaged or do not fit the weights beside them.
    """
    folder = Path(folder)
    if read_arch(folder)["masks"] is None:
        return None
    shapes = shapes_of(read_safetensors(folder / WEIGHTS))
    return _unpack(read_safetensors(folder / MASKS), shapes)


def _rebuild(fields: Mapping[str, Any], factory: str | Callable[[], nn.Module] | None) -> nn.Module:
    """Return the network that the description asks for; its weights are those of the factory, or none at all."""
    arch = fields["arch"]
    net = _from_factory(arch["factory"], factory) if arch["factory"] else skeleton(arch["name"], arch["kwargs"])
    if fields["channels"]:
        from .shrink import shrink

        kept = {site: torch.tensor(indices) for site, indices in fields["channels"].items()}
        c, h, w = fields["input"]["shape"]
        net = shrink(net, kept, (c, h, w))
    return net


def _from_factory(recorded: Mapping[str, Any], factory: str | Callable[[], nn.Module] | None) -> nn.Module:
    if factory is None:
        reference = ascii(recorded["ref"])
        raise RefusedError(f"this bundle needs its author's code {reference}: name the file with --arch if you trust it")
    if not isinstance(factory, str):
        return call_factory(factory)
    make, digest = import_factory(factory)
    if recorded["sha256"] not in (None, digest):
        raise ModelError(f"{factory} must be the file this bundle was saved with (sha256 {recorded['sha256'][:12]}...)")
    return call_factory(make)


def _complete(arch: Mapping[str, Any]) -> dict[str, Any]:
    """Write all arguments, so that a later version with other defaults builds the same network."""
    if arch["name"] is None:
        return dict(arch)
    return {**arch, "kwargs": resolve(arch["name"], arch["kwargs"])}


def _check_rebuilds(fields: Mapping[str, Any], state: Mapping[str, Tensor]) -> None:
    for key, value in state.items():
        if value.is_floating_point() and value.dtype != torch.float32:
            raise ModelError(f"a bundle holds float32 weights, but '{key}' is {value.dtype}")
        if value.is_floating_point() and not bool(value.isfinite().all()):
            raise ModelError(f"weights must be finite, but '{key}' holds NaN or infinite values")
    if fields["arch"]["name"] is not None:
        check_shapes(shapes_of(_rebuild(fields, None).state_dict()), shapes_of(state), fields["arch"]["name"])


def _decimals(values: Tensor) -> list[float]:
    """Return the shortest decimal of each float32, which reads back as the same float32."""
    return [float(str(value)) for value in values.detach().cpu().flatten().numpy()]


def _pack(masks: HardMask) -> dict[str, Tensor]:
    kind = "weight" if isinstance(masks, WeightMask) else "channel"
    return {f"{kind}/{name}": keep.cpu().to(torch.uint8).contiguous() for name, keep in masks.keep.items()}


def _unpack(tensors: Mapping[str, Tensor], shapes: Shapes) -> HardMask:
    keep: dict[str, Tensor] = {}
    kinds: set[str] = set()
    for key, value in tensors.items():
        kind, _, name = key.partition("/")
        wanted = shapes.get(name) if kind == "weight" else shapes.get(f"{name}.weight", ())[:1]
        if kind not in ("weight", "channel") or tuple(value.shape) != wanted or value.dtype != torch.uint8:
            raise ModelError(f"the mask {key[:100]!a} does not fit the weights of this bundle")
        kinds.add(kind)
        keep[name] = value.bool()
    if len(kinds) > 1:
        raise ModelError(f"{MASKS} must hold masks of weights or of channels, got both")
    return ChannelMask(keep) if kinds == {"channel"} else WeightMask(keep)


def _to_json(description: Mapping[str, Any]) -> bytes:
    try:
        return (json.dumps(description, indent=1, sort_keys=True, allow_nan=False) + "\n").encode()
    except (TypeError, ValueError) as error:
        raise ModelError(f"steps must hold plain numbers, strings, lists and objects: {error}") from error


def _write(folder: Path, files: Mapping[str, bytes], description: bytes, overwrite: bool) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not overwrite and any(folder.iterdir()):
            raise ModelError(f"{folder} must be empty or missing; overwrite it on purpose (--overwrite)")
        for name in (DESCRIPTION, MASKS, STEPS):
            (folder / name).unlink(missing_ok=True)
        for name, content in {**files, DESCRIPTION: description}.items():
            partial = folder / f".{name}.partial"
            partial.write_bytes(content)
            os.replace(partial, folder / name)
    except OSError as error:
        raise ModelError(f"cannot write {folder}: {error.strerror}") from error
