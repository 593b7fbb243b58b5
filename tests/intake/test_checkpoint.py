"""Checkpoints from strangers: plain weights are read, nothing is ever run, and every failure is one clear error."""

from __future__ import annotations

import argparse
import io
import os
import pickle
import warnings
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from secateur.errors import ModelError, RefusedError, SecateurError
from secateur.intake import load
from secateur.models import Classifier, build, load_bundle, save

FACTORY = "from torch import nn\ndef make():\n    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(144, 5))\n"


@pytest.fixture(scope="module")
def net() -> torch.nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return build("resnet20", width=4).eval()


def written(content: Any, path: Path, **kwargs: Any) -> Path:
    torch.save(content, path, **kwargs)
    return path


def same(model: Classifier, net: torch.nn.Module) -> bool:
    x = torch.rand(2, *model.input_shape, generator=torch.Generator().manual_seed(0))
    return torch.equal(model(x), net(x))


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"state_dict": state, "epoch": 3, "optimizer": {"state": {}}},
        lambda state: {"net": state, "acc": 91.2},
        lambda state: {"model": {"state_dict": state}},
        lambda state: {"module." + key: value for key, value in state.items()},
        lambda state: {"ema": {"_orig_mod.module." + key: value for key, value in state.items()}},
        lambda state: {key: value for key, value in state.items() if "num_batches" not in key},
        lambda state: {**state, "bn1.num_batches_tracked": torch.zeros(3), "note": "text"},
        lambda state: {key: value.double() if value.is_floating_point() else value for key, value in state.items()},
    ],
)
def test_containers(net, wrap, zipped, tmp_path):
    file = written(wrap(net.state_dict()), tmp_path / "any.name", _use_new_zipfile_serialization=zipped)
    model = load(file)
    assert same(model, net)
    assert not any(module.training for module in model.modules())
    assert model.arch["name"] == "resnet20"
    assert model.arch["kwargs"]["width"] == 4
    assert model.classes == tuple(map(str, range(10)))
    assert model.input_shape == (3, 32, 32)


def test_safetensors(net, tmp_path):
    safetensors.torch.save_file(net.state_dict(), tmp_path / "weights.bin")
    assert same(load(tmp_path / "weights.bin"), net)


def test_what_the_file_does_not_say(net, tmp_path):
    file = written(net.state_dict(), tmp_path / "a.pt")
    names = tuple("abcdefghij")
    model = load(file, mean=[0.5, 0.5, 0.5], std=[0.25, 0.25, 0.25], input_size=28, classes=names)
    assert model.mean.flatten().tolist() == [0.5] * 3
    assert model.std.flatten().tolist() == [0.25] * 3
    assert (model.input_shape, model.classes) == ((3, 28, 28), names)
    with pytest.raises(ModelError, match=r"one name per output \(10\), got 2"):
        load(file, classes=("cat", "dog"))
    with pytest.raises(ModelError, match="mean must have one value per channel"):
        load(file, mean=[0.5])


def test_weights_are_copies(net, tmp_path):
    file = written(net.state_dict(), tmp_path / "a.pt")
    model = load(file)
    file.write_bytes(bytes(file.stat().st_size))
    assert same(model, net)


def test_bundle(net, tmp_path):
    model = Classifier(
        net, classes=tuple("abcdefghij"), input_shape=(3, 32, 32), arch={"name": "resnet20", "kwargs": {"width": 4}}
    )
    save(model, tmp_path / "b")
    assert same(load(tmp_path / "b"), net)
    with pytest.raises(ModelError, match="a bundle says its own mean"):
        load(tmp_path / "b", mean=[0.5] * 3)
    with pytest.raises(ModelError, match="a bundle says its own arch"):
        load(tmp_path / "b", arch="resnet20")


def test_named_architectures(net, tmp_path):
    file = written(net.state_dict(), tmp_path / "a.pt")
    assert same(load(file, arch="resnet20"), net)
    assert load(file, arch="resnet_cifar").arch["kwargs"]["depth"] == 20
    with pytest.raises(ModelError, match=r"do not fit resnet32: 'layer1\.3\.conv1\.weight' is missing"):
        load(file, arch="resnet32")
    with pytest.raises(ModelError, match="must have shape"):
        load(file, arch="resnet20", arch_kwargs={"width": 8})
    with pytest.raises(ModelError, match="unknown architecture 'resnet2'"):
        load(file, arch="resnet2")


def test_arguments_that_shapes_cannot_tell(tmp_path):
    net = build("vit", dim=32, depth=1, heads=4, hidden=32).eval()
    file = written(net.state_dict(), tmp_path / "vit.pt")
    assert load(file).arch["kwargs"]["heads"] == 1
    assert same(load(file, arch_kwargs={"heads": 4}), net)


def test_unknown_networks_get_a_hint(net, tmp_path):
    state = {**net.state_dict(), "linear.weight": torch.zeros(10, 17)}
    with pytest.raises(ModelError, match=r"no known architecture has these weights \(nearest: resnet20\)"):
        load(written(state, tmp_path / "a.pt"))


def test_what_the_file_says_of_itself_is_told(net, tmp_path):
    state = {**net.state_dict(), "linear.weight": torch.zeros(10, 17)}
    with pytest.raises(ModelError, match="the file itself says 'preactresnet18'"):
        load(written({"model_name": "preactresnet18", "model": state, "num_classes": 10}, tmp_path / "a.pt"))


def test_backdoorbench_results(net, tmp_path):
    content = {
        "model_name": "resnet20", "num_classes": 10, "model": net.state_dict(), "data_path": "../data", "img_size": (40, 40, 3),
        "clean_data": "cifar10", "bd_train": {"bd_data_container": {"save_folder_path": "x"}}, "bd_test": {},
    }  # fmt: skip
    model = load(written(content, tmp_path / "attack_result.pt"))
    assert same(model, net)
    assert model.input_shape == (3, 40, 40)


def test_networks_that_answer_probabilities_are_told(tmp_path):
    (tmp_path / "own.py").write_text(FACTORY.replace("nn.Linear(144, 5))", "nn.Linear(144, 5), nn.Softmax(1))"))
    net = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.Flatten(), torch.nn.Linear(144, 5))
    model = load(written(net.state_dict(), tmp_path / "a.pt"), arch=f"{tmp_path / 'own.py'}:make", input_size=8)
    assert model.origin is not None
    assert [finding["rule"] for finding in model.origin["findings"]] == ["LOD-011"]


@pytest.mark.parametrize("kwargs", [{"sandbox": True}, {"trust_code": True}])
def test_flags_for_programs_change_nothing_for_plain_files(net, kwargs, tmp_path):
    model = load(written(net.state_dict(), tmp_path / "a.pt"), **kwargs)
    assert same(model, net)
    assert model.origin is not None
    assert model.origin["loader"] == "data"


def test_a_users_own_network(tmp_path):
    (tmp_path / "own.py").write_text(FACTORY)
    reference = f"{tmp_path / 'own.py'}:make"
    net = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.Flatten(), torch.nn.Linear(144, 5)).eval()
    file = written(net.state_dict(), tmp_path / "a.pt")
    model = load(file, arch=reference, input_size=8)
    assert same(model, net)
    assert model.input_shape == (1, 8, 8)
    assert model.arch["factory"]["ref"] == reference
    save(model, tmp_path / "b")
    with pytest.raises(RefusedError):
        load(tmp_path / "b")
    assert same(load(tmp_path / "b", arch=reference), net)


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("1 / 0", "failed while it was imported: division by zero"),
        ("make = 3", "must define a function 'make'"),
        ("def make(x): pass", "must build a network without arguments"),
        ("def make(): return 3", "must return a torch.nn.Module, got int"),
        ("from torch import nn\ndef make(): return nn.Conv2d(3, 4, 3)", "must return logits"),
        ("from torch import nn\ndef make(): return nn.Linear(7, 4)", "does not take images of shape"),
    ],
)
def test_factories_that_fail_are_told(net, code, message, tmp_path):
    (tmp_path / "own.py").write_text(code)
    with pytest.raises(ModelError, match=message):
        load(written(net.state_dict(), tmp_path / "a.pt"), arch=f"{tmp_path / 'own.py'}:make")


class Canary:
    """Touches a file when somebody unpickles it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("kind", ["zip", "legacy", "pickle", "beside weights"])
def test_code_is_refused_and_not_run(net, kind, protocol, tmp_path):
    canary, file = tmp_path / "canary", tmp_path / "evil.safetensors"
    content: Any = Canary(canary)
    if kind == "pickle":
        file.write_bytes(pickle.dumps(content, protocol=protocol))
    else:
        content = {"state_dict": net.state_dict(), "x": content} if kind == "beside weights" else content
        torch.save(content, file, pickle_protocol=protocol, _use_new_zipfile_serialization=kind != "legacy")
    with pytest.raises(
        RefusedError, match=r"calls posix\.system\('touch .*'\): it may run code where it is unpickled"
    ) as caught:
        load(file)
    assert caught.value.exit_code == 4
    assert "\n" not in str(caught.value)
    if kind == "beside weights":
        model = load(file, force=True)
        assert same(model, net)
        assert model.origin is not None
        assert model.origin["suspicious_globals"] == [f"posix.system('touch {canary}')"]
    else:
        with pytest.raises(ModelError, match="must hold a state dict"):
            load(file, force=True)
    assert not canary.exists()


@pytest.mark.parametrize("zipped", [True, False])
def test_whole_modules_are_read_as_data(net, zipped, tmp_path):
    model = load(written(net, tmp_path / "a.pt", _use_new_zipfile_serialization=zipped))
    assert same(model, net)
    assert model.origin is not None
    names = {finding["message"] for finding in model.origin["findings"] if finding["rule"] == "LOD-003"}
    assert "names torch.nn.modules.conv.Conv2d" in names
    assert not model.origin["suspicious_globals"]


@pytest.mark.parametrize("zipped", [True, False])
def test_other_objects_beside_the_weights_are_passed_over(net, zipped, tmp_path):
    content = {"args": argparse.Namespace(lr=0.1), "best": np.float64(0.9), "net": net.state_dict(), "where": Path("x")}
    model = load(written(content, tmp_path / "a.pt", _use_new_zipfile_serialization=zipped))
    assert same(model, net)
    assert model.origin is not None
    assert not model.origin["suspicious_globals"]


def test_programs_are_refused(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(torch.nn.Linear(2, 2)).save(str(tmp_path / "script.pt"))
        torch.export.save(torch.export.export(torch.nn.Linear(2, 2), (torch.zeros(1, 2),)), tmp_path / "program.pt2")
    with pytest.raises(RefusedError, match="TorchScript"):
        load(tmp_path / "script.pt")
    with pytest.raises(RefusedError, match=r"a program of torch\.export"):
        load(tmp_path / "program.pt2")


def huge(net: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {**net.state_dict(), "conv1.weight": torch.zeros(1).as_strided((10**6, 10**6), (0, 0))}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lambda net: {}, "must hold a state dict"),
        (lambda net: [1, 2], "must hold a state dict"),
        (lambda net: torch.zeros(3), "must hold a state dict"),
        (lambda net: {"state_dict": OrderedDict()}, "must hold a state dict"),
        (huge, "a tensor claims more values than its storage holds"),
        (lambda net: {f"w{i}": torch.zeros(64).expand(1, 64) for i in range(9)}, "no known architecture"),
        (lambda net: {**net.state_dict(), "bn1.bias": torch.zeros(4).to_sparse()}, "plain dense tensors, but 'bn1.bias'"),
        (lambda net: {**net.state_dict(), "bn1.bias": torch.zeros(4, device="meta")}, "plain dense tensors"),
        (lambda net: {**net.state_dict(), "bn1.bias": torch.full((4,), torch.inf)}, "'bn1.bias' holds NaN or infinite"),
        (lambda net: {**net.state_dict(), "bn1.bias": torch.zeros(4, dtype=torch.int64)}, "must be of type torch.float32"),
    ],
)  # fmt: skip
def test_contents_that_cannot_be_used_are_told(net, content, message, tmp_path):
    with pytest.raises(ModelError, match=message):
        load(written(content(net), tmp_path / "a.pt"))


def test_many_views_of_one_storage(net, tmp_path):
    storage = torch.zeros(10_000)
    file = written({f"w{i}": storage[:] for i in range(100)}, tmp_path / "a.pt")
    with pytest.raises(ModelError, match="together claim more values"):
        load(file)


def archive(**entries: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for name, content in entries.items():
            file.writestr(f"a/{name}", content)
    return buffer.getvalue()


def deflated() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("a/data.pkl", bytes(10**6))
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"hello, world", "first bytes"),
        (b"\x89PNG\r\n\x1a\n0000", "no checkpoint but a PNG image"),
        (b"GGUF\x03\x00\x00\x00\x00", "no checkpoint but a GGUF file"),
        (b"PK\x03\x04garbage", "must end where its directory ends"),
        (b"\x80\x02", "the pickle is damaged"),
        (b"\x80\x02.", "the pickle is damaged"),
        (archive(**{"data.pkl": b"\x80\x02"}), "the pickle is damaged"),
        (deflated(), "entries uncompressed"),
        ((9).to_bytes(8, "little") + b"{garbage}", "not a valid safetensors file"),
    ],
)
def test_files_that_are_no_checkpoint_are_told(content, message, tmp_path):
    (tmp_path / "a.pt").write_bytes(content)
    with pytest.raises(ModelError, match=message):
        load(tmp_path / "a.pt")


def test_missing_paths_are_told(tmp_path):
    with pytest.raises(ModelError, match="must be a file or a bundle, found none"):
        load(tmp_path / "nowhere")
    with pytest.raises(ModelError, match="must be a bundle"):
        load(tmp_path)


@pytest.fixture(scope="module")
def originals(tmp_path_factory) -> dict[str, bytes]:
    net = build("convnet", width=1, classes=2, in_channels=1)
    buffers = {"zip": io.BytesIO(), "legacy": io.BytesIO()}
    torch.save(net.state_dict(), buffers["zip"])
    torch.save(net.state_dict(), buffers["legacy"], _use_new_zipfile_serialization=False)
    return {
        **{name: buffer.getvalue() for name, buffer in buffers.items()},
        "safetensors": safetensors.torch.save(net.state_dict()),
    }


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_mutated_files_give_a_network_or_an_error(originals, tmp_path, data):
    content = bytearray(originals[data.draw(st.sampled_from(sorted(originals)))])
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    if data.draw(st.booleans()):
        del content[data.draw(st.integers(0, len(content) - 1)) :]
    (tmp_path / "a.pt").write_bytes(content)
    message = ""
    try:
        load(tmp_path / "a.pt")
    except SecateurError as error:
        message = str(error)
    assert "\n" not in message


def test_loading_again_from_a_bundle_is_bit_exact(net, tmp_path):
    model = load(written(net.state_dict(), tmp_path / "a.pt"), mean=[0.1, 0.2, 0.3], std=[0.3, 0.2, 0.1])
    save(model, tmp_path / "b")
    x = torch.rand(2, 3, 32, 32)
    assert torch.equal(load_bundle(tmp_path / "b")(x), model(x))
