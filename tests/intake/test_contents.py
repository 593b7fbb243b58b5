"""Where weights are found: in containers, in modules pickled whole, under wrappers' names."""

from __future__ import annotations

import argparse
from typing import Any

import pytest
import torch
from torch import nn

from secateur.errors import ModelError
from secateur.intake.contents import CONTAINERS, candidates, find_weights
from secateur.intake.pickles import Record
from secateur.intake.reading import read
from secateur.intake.tensors import Storage, Stored
from secateur.models import build


def tensor(*shape: int, dtype: str = "float32") -> Stored:
    return Stored(dtype, shape, tuple(0 for _ in shape), 0, Storage(8 * max(1, *shape, 1) ** max(1, len(shape)), dtype))


W = {"w": tensor(3)}


@pytest.mark.parametrize(
    ("content", "container"),
    [
        (W, ()),
        ({"state_dict": W, "epoch": 3}, ("state_dict",)),
        ({"model": {"state_dict": W}}, ("model", "state_dict")),
        ({"netC": W, "optimizer": {"state": {}}}, ("netC",)),
        ({"checkpoint": W, "epoch": 3}, ("checkpoint",)),
        ({"a": {"b": {"state_dict": W}}}, ("a", "b", "state_dict")),
        ({"model": {"args": {"lr": 1}}, "net": W}, ("net",)),
        ({"params": {"lr": {"base": 1}}, "weights": W}, ("weights",)),
        ({"mean": tensor(3), "my_resnet": {**W, "v": tensor(3)}}, ("my_resnet",)),
        ({"mean": tensor(3), "optimizer": {**W, "v": tensor(3)}}, ()),
        ({**W, "epoch": {"n": 3}}, ()),
        ({"student": W, "loss": 0.1}, ("student",)),
        ({"model": "resnet20", "weights": W}, ("weights",)),
        ({"model": W, "optimizer": {"w": tensor(3)}}, ("model",)),
        ({"x": W, "y": W}, ()),
        ([W], ()),
        (None, ()),
        (7, ()),
    ],
)
def test_containers(content, container):
    found = find_weights(content)
    assert found.container == container
    assert bool(found.tensors) == (
        bool(container) or (isinstance(content, dict) and any(isinstance(v, Stored) for v in content.values()))
    )


def test_what_stands_beside_the_weights():
    found = find_weights({"model": W, "model_name": "preactresnet18", "num_classes": 10, "img_size": (32, 48, 3), "x": [1]})
    assert found.facts == {"model_name": "preactresnet18", "num_classes": 10, "input_size": (32, 48)}
    assert not find_weights({"model": W, "img_size": (32, "a", 3), "y" * 100: 1, "big": 10**30}).facts


def test_containers_within_containers_are_bounded():
    cycle: dict[str, Any] = {}
    for key in CONTAINERS:
        cycle[key] = cycle
    assert not find_weights(cycle).tensors
    wide: dict[str, Any] = {}
    for _ in range(60):
        wide = dict.fromkeys(CONTAINERS, wide)
    assert not find_weights(wide).tensors
    deep: dict[str, Any] = W
    for _ in range(6):
        deep = {"model": deep}
    assert find_weights(deep).tensors


def test_leftovers_are_dropped():
    state = {
        "a.weight": tensor(3),
        "a.total_ops": tensor(1),
        "total_params": tensor(1),
        "n_averaged": tensor(1),
        "bn.num_batches_tracked": tensor(dtype="int64"),
        "bn2.num_batches_tracked": tensor(4, dtype="int64"),
    }
    assert set(find_weights(state).tensors) == {"a.weight", "bn.num_batches_tracked"}


def test_prefixes_are_tried_one_after_another():
    renamings = list(candidates({"_orig_mod.module.net.a": 1, "_orig_mod.module.net.b": 2}))
    assert [sorted(renaming.values()) for renaming in renamings] == [
        ["_orig_mod.module.net.a", "_orig_mod.module.net.b"],
        ["module.net.a", "module.net.b"],
        ["net.a", "net.b"],
        ["a", "b"],
    ]
    assert list(candidates({"module.a": 1, "b": 2})) == [{"module.a": "module.a", "b": "b"}]
    assert len(list(candidates({}))) == 1


class Own(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, stride=2)
        self.twice = nn.ModuleList([self.conv, nn.BatchNorm2d(4)])
        self.register_buffer("hidden", torch.zeros(3), persistent=False)
        self.register_buffer("kept", torch.zeros(3))
        self.register_parameter("none", None)
        self.scale = nn.Parameter(torch.ones(1))
        self.settings = argparse.Namespace(lr=0.1)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("wrap", [lambda m: m, lambda m: {"model": m, "epoch": 2}, nn.DataParallel])
def test_modules_pickled_whole(wrap, zipped, tmp_path):
    net = Own()
    torch.save(wrap(net), tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
    found = read(tmp_path / "a.pt").contents
    assert found is not None
    whole = wrap(net)
    wanted = {name: tuple(value.shape) for name, value in (net if isinstance(whole, dict) else whole).state_dict().items()}
    assert {name: value.shape for name, value in found.tensors.items() if isinstance(value, Stored)} == wanted
    conv = next(layer for name, layer in found.layers.items() if name.endswith("conv"))
    assert conv.kind == "torch.nn.modules.conv.Conv2d"
    assert conv.settings["stride"] == (2, 2)
    assert conv.settings["out_channels"] == 4


@pytest.mark.parametrize("name", ["resnet20", "preact_resnet18", "vgg11_bn", "mobilenet_v2", "vit", "wrn"])
def test_whole_networks_of_the_zoo(name, tmp_path):
    small = {"width": 4} if name in ("resnet20", "preact_resnet18", "vgg11_bn") else {}
    net = build(name, **small)
    torch.save(net, tmp_path / "a.pt")
    found = read(tmp_path / "a.pt").contents
    assert found is not None
    assert list(found.tensors) == list(net.state_dict())


def module(**inner: Any) -> Record:
    return Record(None, state={"_parameters": {"w": tensor(1)}, "_buffers": {}, "_modules": inner})


def test_modules_that_contain_themselves_are_refused():
    outer = module()
    outer.state["_modules"]["again"] = outer
    with pytest.raises(ModelError, match="must not contain itself"):
        find_weights(outer)
    deep = module()
    for _ in range(100):
        deep = module(inner=deep)
    with pytest.raises(ModelError, match="deeper than 64"):
        find_weights(deep)


def test_modules_shared_many_times_are_bounded():
    shared = module()
    for _ in range(40):
        shared = module(left=shared, right=shared)
    with pytest.raises(ModelError):
        find_weights(shared)
