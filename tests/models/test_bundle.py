"""Bundles: what is written can be read, and whatever else is read gives one clear error."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from secateur.errors import ModelError, RefusedError, SecateurError
from secateur.models import Classifier, build, load_bundle, load_masks, read_arch, save
from secateur.models.shrink import shrink
from secateur.types import ChannelMask, WeightMask

SHAPE = (1, 8, 8)
KWARGS = {"width": 2, "classes": 3, "in_channels": 1}
FACTORY = "from secateur.models import build\ndef make():\n    return build('convnet', width=2, classes=3, in_channels=1)\n"


def make(**kwargs: Any) -> Classifier:
    arch = kwargs.pop("arch", {"name": "convnet", "kwargs": KWARGS})
    net = kwargs.pop("net", None) or build("convnet", **KWARGS)
    return Classifier(net, classes=("a", "b", "c"), input_shape=SHAPE, arch=arch, **kwargs).eval()


@pytest.fixture
def folder(tmp_path) -> Path:
    save(make(), tmp_path / "bundle")
    return tmp_path / "bundle"


def edit(folder: Path, **fields: Any) -> None:
    file = folder / "arch.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


def test_description_on_disk(tmp_path):
    steps = [{"method": "clp", "version": 1, "args": {"u": 3.0}}]
    save(make(mean=[0.4914], std=[0.2023]), tmp_path, steps=steps, ancestor_sha256="ab" * 32)
    assert json.loads((tmp_path / "arch.json").read_text()) == {
        "format": 1,
        "arch": {"name": "convnet", "kwargs": KWARGS, "factory": None},
        "input": {"shape": [1, 8, 8], "mean": [0.4914], "std": [0.2023]},
        "classes": ["a", "b", "c"],
        "channels": {},
        "masks": None,
        "wrappers": [],
        "quant": None,
        "steps": steps,
        "ancestor_sha256": "ab" * 32,
    }
    assert read_arch(tmp_path)["steps"] == steps
    assert {file.name for file in tmp_path.iterdir()} == {"model.safetensors", "arch.json", "README.md"}
    card = (tmp_path / "README.md").read_text()
    assert re.match(r"---\nlicense: other\n(.*\n)*library_name: secateur\n(.*\n)*---\n", card)
    assert set(safetensors.torch.load_file(tmp_path / "model.safetensors")) == set(make().net.state_dict())


def test_normalisation_is_bit_exact(tmp_path):
    model = make(mean=[1 / 3], std=[0.1])
    save(model, tmp_path)
    back = load_bundle(tmp_path)
    assert torch.equal(back.mean, model.mean)
    assert torch.equal(back.std, model.std)


def test_channels_last_weights_are_saved(tmp_path):
    model = make().to(memory_format=torch.channels_last)
    save(model, tmp_path)
    assert torch.equal(load_bundle(tmp_path).net.conv2.weight, model.net.conv2.weight)


def test_loading_leaves_the_generator_alone(folder):
    before = torch.get_rng_state()
    load_bundle(folder)
    assert torch.equal(torch.get_rng_state(), before)


def test_smaller_network(tmp_path):
    model = make()
    kept = {"bn1": [1], "bn3": [0, 2, 3, 7]}
    small = shrink(model.net, {site: torch.tensor(index) for site, index in kept.items()}, SHAPE)
    cut = make(net=small, channels=kept)
    x = torch.rand(2, *SHAPE)
    save(cut, tmp_path / "a")
    back = load_bundle(tmp_path / "a")
    assert torch.equal(back(x), cut(x))
    assert back.net.conv1.weight.shape == (1, 1, 3, 3)
    save(back, tmp_path / "b")
    assert load_bundle(tmp_path / "b").channels == kept
    with pytest.raises(ModelError, match="do not fit convnet"):
        save(cut, tmp_path / "c", channels={})
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize(
    "masks",
    [
        WeightMask({"conv1.weight": torch.tensor([True, False]).view(2, 1, 1, 1).expand(2, 1, 3, 3)}),
        ChannelMask({"bn2": torch.tensor([True, False, True, False])}),
    ],
)
def test_masks_round_trip(masks, tmp_path):
    save(make(), tmp_path, masks=masks)
    back = load_masks(tmp_path)
    assert type(back) is type(masks)
    assert back.keep.keys() == masks.keep.keys()
    assert all(torch.equal(back.keep[name], masks.keep[name]) for name in masks.keep)


def test_overwriting_drops_old_masks_and_keeps_other_files(tmp_path):
    save(make(), tmp_path, masks=ChannelMask({"bn1": torch.tensor([True, False])}))
    (tmp_path / "result.json").write_text("{}")
    with pytest.raises(ModelError, match="must be empty or missing"):
        save(make(), tmp_path)
    save(make(), tmp_path, overwrite=True)
    assert load_masks(tmp_path) is None
    assert {f.name for f in tmp_path.iterdir()} == {"model.safetensors", "arch.json", "README.md", "result.json"}


@pytest.mark.parametrize(
    ("model", "extra", "message"),
    [
        (lambda: make().double(), {}, "holds float32 weights"),
        (lambda: make(arch={}), {}, "either a name or a factory"),
        (lambda: make(arch={"name": "convnet", "kwargs": {}}), {}, "do not fit convnet"),
        (make, {"steps": [{"method": "clp"}]}, "steps must be"),
        (make, {"steps": [{"method": "clp", "version": 1, "args": {"u": torch.zeros(1)}}]}, "steps must hold plain"),
        (make, {"steps": [{"method": "clp", "version": 1, "args": {"u": float("nan")}}]}, "steps must hold plain"),
        (make, {"ancestor_sha256": "xyz"}, "64 hexadecimal digits"),
        (make, {"masks": ChannelMask({"bn9": torch.ones(2, dtype=torch.bool)})}, "does not fit the weights"),
    ],
)
def test_nothing_unreadable_is_written(model, extra, message, tmp_path):
    with pytest.raises(ModelError, match=message):
        save(model(), tmp_path / "out", **extra)
    assert not (tmp_path / "out").exists()


def test_weights_that_are_not_finite_are_named(folder, tmp_path):
    model = make()
    with torch.no_grad():
        model.net.bn3.weight[2] = float("nan")
    with pytest.raises(ModelError, match="weight' holds NaN"):
        save(model, tmp_path / "out")
    safetensors.torch.save_file(model.net.state_dict(), folder / "model.safetensors")
    with pytest.raises(ModelError, match="weight' holds NaN"):
        load_bundle(folder)


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ModelError, match="cannot write"):
        save(make(), tmp_path / "file" / "out")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"format": 2}, r"format 2 is newer than this version of secateur reads \(1\)"),
        ({"format": "1"}, "format must be a number"),
        ({"colour": 1}, "unknown field 'colour'"),
        ({"clases": []}, "did you mean 'classes'"),
        ({"arch": {"name": "convnet"}}, "arch must be an object with name, kwargs and factory"),
        ({"arch": {"name": "convnot", "kwargs": {}, "factory": None}}, "did you mean 'convnet'"),
        ({"arch": {"name": "__import__('os')", "kwargs": {}, "factory": None}}, "arch.name must be a word"),
        ({"arch": {"name": "convnet", "kwargs": {"width": [1]}, "factory": None}}, "numbers and words"),
        ({"arch": {"name": "convnet", "kwargs": {"width": 65536}, "factory": None}}, "do not fit convnet"),
        ({"arch": {"name": "resnet20", "kwargs": KWARGS, "factory": None}}, "do not fit resnet20"),
        ({"input": {"shape": [1, 8], "mean": [0], "std": [1]}}, "input.shape must be three numbers"),
        ({"input": {"shape": [3, 8, 8], "mean": [0, 0, 0], "std": [1, 1, 1]}}, "does not take images of shape"),
        ({"input": {"shape": [1, 4, 4], "mean": [0], "std": [1]}}, "does not take images of shape"),
        ({"input": {"shape": [1, 8, 8], "mean": [0, 0], "std": [1]}}, "input.mean must be 1 numbers"),
        ({"input": {"shape": [1, 8, 8], "mean": [0], "std": [0]}}, "input.std must be 1 numbers"),
        ({"input": {"shape": [1, 8, 8], "mean": [float("inf")], "std": [1]}}, "input.mean"),
        ({"classes": ["a", "b"]}, r"one name per output \(3\), got 2"),
        ({"classes": ["a", "b", "\x1b[31m"]}, "printable"),
        ({"classes": "abc"}, "classes must be a list"),
        ({"channels": {"bn1": [1, 1]}}, "each index above the last"),
        ({"channels": {"bn1": [-1]}}, "each index above the last"),
        ({"channels": {"bn1": [5]}}, "bn1"),
        ({"channels": {"nowhere": [0]}}, "nowhere"),
        ({"masks": "../../secret"}, "masks must be null or"),
        ({"masks": "masks.safetensors"}, None),
        ({"wrappers": {}}, "arch.json: wrappers must be a list"),
        ({"wrappers": [{"kind": "exec"}]}, "kind is one of clamp, round, got a value of type dict"),
        ({"wrappers": [{"after": "bn1", "kind": "clamp"}]}, "must have after, kind, low, high and nothing else"),
        ({"wrappers": [{"after": "bn9", "kind": "round", "decimals": 1}]}, "wrappers: unknown layer 'bn9'"),
        ({"quant": {"bits": 8}}, "quant must have weight_bits, activation_bits, weights, activations and nothing else"),
        ({"steps": [1]}, "steps must be an object"),
        ({"ancestor_sha256": 3}, "ancestor_sha256"),
    ],
)
def test_wrong_descriptions_are_told(fields, message, folder):
    edit(folder, **fields)
    if message is None:
        with pytest.raises(ModelError, match="must be a file, found none"):
            load_masks(folder)
        return
    with pytest.raises(ModelError, match=message) as caught:
        load_bundle(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "1" * 5000, "[" * 100_000, '"\\ud800"', "{'a': 1}"])
def test_descriptions_that_are_no_description(text, folder):
    (folder / "arch.json").write_text(text)
    with pytest.raises(ModelError):
        load_bundle(folder)


def test_missing_files_are_told(folder, tmp_path):
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"model\.safetensors must be a file, found none"):
        load_bundle(folder)
    with pytest.raises(ModelError, match=r"arch\.json must be a file"):
        load_bundle(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("conv1.weight"), "'conv1.weight' is missing"),
        (lambda state: state.update(extra=torch.zeros(1)), "'extra' is not part of it"),
        (lambda state: state.update({"a\nb": torch.zeros(1)}), r"'a\\nb' is not part"),
        (lambda state: state.update({"bn1.bias": torch.zeros(3)}), r"'bn1.bias' must have shape \(2,\), got \(3,\)"),
        (lambda state: state.update({"bn1.bias": torch.zeros(2, dtype=torch.int32)}), "must be of type torch.float32"),
    ],
)
def test_weights_that_do_not_fit_are_told(change, message, folder):
    state = safetensors.torch.load_file(folder / "model.safetensors")
    change(state)
    safetensors.torch.save_file(state, folder / "model.safetensors")
    with pytest.raises(ModelError, match=message):
        load_bundle(folder)


@pytest.mark.parametrize(
    "tensors",
    [
        {"weight/conv1.weight": torch.ones(2, dtype=torch.uint8)},
        {"channel/bn1": torch.ones(2)},
        {"channel/nowhere": torch.ones(2, dtype=torch.uint8)},
        {"bn1": torch.ones(2, dtype=torch.uint8)},
        {"channel/bn1": torch.ones(2, dtype=torch.uint8), "weight/bn1.bias": torch.ones(2, dtype=torch.uint8)},
    ],
)
def test_masks_that_do_not_fit_are_told(tensors, tmp_path):
    save(make(), tmp_path, masks=ChannelMask({}))
    safetensors.torch.save_file(tensors, tmp_path / "masks.safetensors")
    with pytest.raises(ModelError, match="mask"):
        load_masks(tmp_path)


def test_a_users_own_network(tmp_path):
    file = tmp_path / "net.py"
    file.write_text(FACTORY)
    reference = f"{file}:make"
    arch = {"factory": {"ref": "net.py:make", "sha256": None}}
    save(make(arch=arch), tmp_path / "b")
    with pytest.raises(RefusedError, match="needs its author's code 'net"):
        load_bundle(tmp_path / "b")
    x = torch.rand(1, *SHAPE)
    by_name = load_bundle(tmp_path / "b", factory=reference)
    by_hand = load_bundle(tmp_path / "b", factory=lambda: build("convnet", **KWARGS))
    assert torch.equal(by_name(x), by_hand(x))
    edit(tmp_path / "b", arch={"name": None, "kwargs": {}, "factory": {"ref": "net.py:make", "sha256": "0" * 64}})
    with pytest.raises(ModelError, match="must be the file this bundle was saved with"):
        load_bundle(tmp_path / "b", factory=reference)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 70_000) | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


def places(value: Any) -> list[tuple[Any, Any]]:
    """Return every (container, key) inside a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place for key, inner in items for place in [(value, key), *places(inner)]]


@pytest.fixture(scope="module")
def shared(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("fuzz") / "bundle"
    save(make(), folder, steps=[{"method": "clp", "version": 1, "args": {"u": 3.0}}], channels={})
    return folder


def error_of(folder: Path) -> str:
    """Return what loading complains of; an error that is not ours ends the test."""
    try:
        load_bundle(folder)
    except SecateurError as error:
        return str(error)
    return ""


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_mutated_descriptions_give_a_network_or_an_error(shared, data):
    original = (shared / "arch.json").read_text()
    description = json.loads(original)
    for _ in range(data.draw(st.integers(1, 2))):
        container, key = data.draw(st.sampled_from(places(description)))
        container[key] = data.draw(JSON)
    (shared / "arch.json").write_text(json.dumps(description))
    message = error_of(shared)
    (shared / "arch.json").write_text(original)
    assert "\n" not in message


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_mutated_weights_give_a_network_or_an_error(shared, data):
    file = shared / "model.safetensors"
    original = file.read_bytes()
    content = bytearray(original)
    if data.draw(st.booleans()):
        del content[data.draw(st.integers(0, len(content) - 1)) :]
    else:
        content[data.draw(st.integers(0, 2500))] = data.draw(st.integers(0, 255))
    file.write_bytes(content)
    message = error_of(shared)
    file.write_bytes(original)
    assert "\n" not in message
