"""Triggers come back as they were written; whatever lies on disk, nothing but a `SecateurError` comes out."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from secateur.data import load_trigger, save_trigger
from secateur.effects import build_net
from secateur.errors import DataError, SecateurError
from secateur.types import Trigger

PATTERN = torch.linspace(0, 1, 27).view(3, 3, 3)
BLEND = Trigger("blend", {"alpha": 0.5, "classes": 4}, {"mask": torch.ones(1, 3, 3), "pattern": PATTERN}, "next", (0, 2))
ADD = Trigger("add", {"name": "sig"}, {"pattern": PATTERN - 0.5}, 3)
WARP = Trigger("warp", {}, {"grid": torch.rand(5, 4, 2, generator=torch.Generator().manual_seed(0)) * 2 - 1}, 1)
QUANTISE = Trigger("quantise", {"levels": 4, "dither": 1}, {}, 1)


def drawn(**params: float | int | str) -> Trigger:
    draw = torch.Generator().manual_seed(1)
    weights = build_net(params).state_dict().items()
    return Trigger("generator", params, {name: torch.randn(tuple(w.shape), generator=draw) for name, w in weights}, 2, (0,))


RESIDUAL = drawn(net="residual", channels=3, width=2, eps=0.1, bits=4)
STAMP = drawn(net="stamp", channels=3, width=2)
KINDS = {"blend": BLEND, "add": ADD, "warp": WARP, "quantise": QUANTISE, "residual": RESIDUAL, "stamp": STAMP}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_trigger(BLEND, tmp_path / "trigger")
    return tmp_path / "trigger"


def edit(folder: Path, **changes: object) -> None:
    record = json.loads((folder / "trigger.json").read_text())
    (folder / "trigger.json").write_text(json.dumps(record | changes))


def trigger_or_error(folder: Path) -> None:
    try:
        outcome = load_trigger(folder)
    except SecateurError as error:
        outcome = str(error)
    assert isinstance(outcome, Trigger) or "\n" not in outcome


@pytest.mark.parametrize("trigger", KINDS.values(), ids=KINDS)
def test_round_trip(tmp_path, trigger):
    save_trigger(trigger, tmp_path)
    back = load_trigger(tmp_path)
    assert (back.kind, back.params, back.target, back.sources) == (
        trigger.kind,
        trigger.params,
        trigger.target,
        trigger.sources,
    )
    assert back.tensors.keys() == trigger.tensors.keys()
    assert all(torch.equal(back.tensors[name], value) for name, value in trigger.tensors.items())
    c, h, w = (side or free for side, free in zip(trigger.shape, (3, 6, 7), strict=True))
    x = torch.rand(2, c, h, w)
    assert torch.equal(back.apply(x), trigger.apply(x))
    with pytest.raises(DataError, match="this trigger is for images of shape") if any(trigger.shape) else nullcontext():
        trigger.apply(torch.rand(2, 2, h + 1, w))


def test_equal_triggers_make_equal_files(tmp_path):
    for name in ("a", "b"):
        save_trigger(ADD, tmp_path / name)
    for file in ("trigger.json", "trigger.safetensors"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_parent_folder_is_accepted(folder):
    assert load_trigger(str(folder.parent)).target == "next"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"format": 2}, "format 2, newer than 1; update secateur"),
        ({"format": 0}, "no readable trigger"),
        ({"format": "1"}, "no format number"),
        ({"extra": 1}, "exactly"),
        ({"kind": "blund"}, "unknown trigger kind 'blund'; did you mean 'blend'"),
        ({"kind": ["blend"]}, "unknown trigger kind"),
        ({"params": []}, "params must be an object"),
        ({"params": {"alpha": 0.5, "classes": 4, "x": [1]}}, "parameter 'x' must be a finite number or a word"),
        ({"params": {"alpha": float("nan"), "classes": 4}}, "'alpha' must be a finite number"),
        ({"params": {"alpha": 1.5, "classes": 4}}, r"alpha .* must lie in \[0, 1\], got 1.5"),
        ({"params": {"classes": 4}}, "alpha .* got None"),
        ({"params": {"alpha": 0.5}}, "classes must be .* given for the target 'next', got None"),
        ({"params": {"alpha": 0.5, "classes": 1}}, "classes must be a whole number from 2 to"),
        ({"target": -1}, "whole numbers >= 0 and <= 3, got -1"),
        ({"target": 4}, "whole numbers >= 0 and <= 3, got 4"),
        ({"target": True}, "got True"),
        ({"target": "last"}, "got last"),
        ({"target": None}, "got None"),
        ({"sources": "all"}, "sources a list or null"),
        ({"sources": []}, "at least one"),
        ({"sources": [1, 1]}, "different classes"),
        ({"sources": [1, "2"]}, "got 2"),
        ({"sources": [9]}, "got 9"),
    ],
)
def test_bad_records(folder, changes, words):
    edit(folder, **changes)
    with pytest.raises(DataError, match=words) as caught:
        load_trigger(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({"pattern": PATTERN}, "holds mask, pattern, got pattern"),
        ({}, "got none"),
        ({"mask": torch.ones(1, 3, 3), "pattern": PATTERN * 2}, r"pattern must .* \[0, 1\], got 0..2"),
        ({"mask": torch.ones(1, 3, 3), "pattern": PATTERN / 0}, "pattern must be finite"),
        ({"mask": -torch.ones(1, 3, 3), "pattern": PATTERN}, "mask must be finite and lie"),
        ({"mask": torch.ones(1, 3, 4), "pattern": PATTERN}, r"mask must be \(1 or c, h, w\)"),
        ({"mask": torch.ones(2, 3, 3), "pattern": PATTERN}, r"mask must be float \(1 or 3"),
        ({"mask": torch.ones(1, 3, 3), "pattern": PATTERN.int()}, "tensors must be of 16, 32 or 64 bit floats"),
        ({"mask": torch.ones(1, 3, 3), "pattern": PATTERN[0]}, "pattern must be float"),
    ],
)
def test_bad_tensors(folder, tensors, words):
    save_file(tensors, folder / "trigger.safetensors")
    with pytest.raises(DataError, match=words):
        load_trigger(folder)


@pytest.mark.parametrize(("trigger", "changes", "words"), [
    (QUANTISE, {"params": {"levels": 1, "dither": 0}}, r"levels .* whole number in \[2, 256\], got 1"),
    (QUANTISE, {"params": {"levels": 4.0, "dither": 0}}, "levels .* got 4.0"),
    (QUANTISE, {"params": {"levels": 4, "dither": 2}}, "dither .* must be 0 or 1, got 2"),
    (QUANTISE, {"kind": "warp", "params": {}}, "a warp trigger holds grid, got none"),
    (WARP, {"kind": "add"}, "an? add trigger holds pattern, got grid"),
    (STAMP, {"params": {"net": "stamp", "channels": 3, "width": 10**9}}, r"width must lie in \[1, 256\]"),
    (STAMP, {"params": {"net": "stamp", "channels": 3}}, "width of a generator must be a number, got None"),
    (STAMP, {"params": {"net": "stamp", "channels": 3, "width": 3}}, "weights of a generator trigger do not fit its network"),
    (STAMP, {"params": {"net": "os.system", "channels": 3, "width": 2}}, "unknown generator net 'os.system'"),
    (STAMP, {"params": {}}, "unknown generator net"),
    (STAMP, {"params": {"net": "\x1b[31mevil\nerror"}}, r"unknown generator net '\\x1b\[31mevil\\nerror'"),
    (STAMP, {"params": {"net": 201 * "x"}}, "at most 64 parameters, with names and values of at most 200 characters"),
    (QUANTISE, {"params": {str(i): i for i in range(65)}}, "at most 64 parameters"),
    (QUANTISE, {"params": {"levels": 4, "dither": 0, "classes": 2**70}}, r"classes must be a whole number from 2 to 2\*\*31"),
    (RESIDUAL, {"params": {"net": "residual", "channels": 3, "width": 2, "eps": 2.0, "bits": 4}}, r"eps must lie in \[0, 1\]"),
    (RESIDUAL, {"params": {"net": "residual", "channels": 3, "width": 2, "eps": 0.1, "bits": 5}}, "do not fit"),
])  # fmt: skip
def test_bad_kinds(tmp_path, trigger, changes, words):
    save_trigger(trigger, tmp_path)
    edit(tmp_path, **changes)
    with pytest.raises(DataError, match=words) as caught:
        load_trigger(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("trigger", "tensors", "words"), [
    (WARP, {"grid": torch.zeros(4, 4, 3)}, r"grid must be float \(h, w, 2\)"),
    (WARP, {"grid": torch.full((4, 4, 2), 1.5)}, r"grid must be finite and lie in \[-1, 1\]"),
    (STAMP, {name: w / 0 for name, w in STAMP.tensors.items()}, r"must hold numbers in \[-10000, 10000\]"),
    (STAMP, {name: w + 3e38 for name, w in STAMP.tensors.items()}, r"must hold numbers in \[-10000, 10000\]"),
    (STAMP, {name: w.int() for name, w in STAMP.tensors.items()}, "must be of 16, 32 or 64 bit floats, got torch.int32"),
    (STAMP, {name: w.to(torch.float8_e5m2) for name, w in STAMP.tensors.items()}, "64 bit floats, got torch.float8"),
    (STAMP, {**STAMP.tensors, "more": torch.zeros(1)}, "do not fit its network: more"),
])  # fmt: skip
def test_bad_tensors_of_kinds(tmp_path, trigger, tensors, words):
    save_trigger(trigger, tmp_path)
    save_file({name: value.contiguous() for name, value in tensors.items()}, tmp_path / "trigger.safetensors")
    with pytest.raises(DataError, match=words):
        load_trigger(tmp_path)


def test_missing_files(folder, tmp_path):
    with pytest.raises(DataError, match=r"no readable trigger .*trigger.json is missing"):
        load_trigger(tmp_path / "nowhere")
    (folder / "trigger.safetensors").unlink()
    with pytest.raises(DataError, match=r"trigger.safetensors is missing"):
        load_trigger(folder)


def test_a_bad_trigger_is_not_written(tmp_path):
    with pytest.raises(DataError, match="alpha"):
        save_trigger(Trigger("blend", {"alpha": 2}, BLEND.tensors, 0), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_folders_give_a_trigger_or_an_error(tmp_path, data):
    save_trigger(data.draw(st.sampled_from(list(KINDS.values()))), tmp_path)
    file = tmp_path / data.draw(st.sampled_from(["trigger.json", "trigger.safetensors"]))
    raw = bytearray(file.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    file.write_bytes(data.draw(st.sampled_from([bytes(raw), bytes(raw[: len(raw) // 2])])))
    trigger_or_error(tmp_path)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    name=st.sampled_from(list(KINDS)),
    key=st.sampled_from(["format", "kind", "params", "target", "sources"]),
    value=json_values,
)
def test_any_json_value_gives_a_trigger_or_an_error(tmp_path, name, key, value):
    save_trigger(KINDS[name], tmp_path)
    edit(tmp_path, **{key: value})
    trigger_or_error(tmp_path)
