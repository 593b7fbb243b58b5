"""Folders as Hugging Face keeps them: which files count, what the settings say, and every lie told in one line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from secateur.errors import ModelError
from secateur.intake.checkpoint import load
from secateur.intake.folder import HubFolder, read_folder
from secateur.models import build

TIMM = {
    "architecture": "test_resnet",
    "num_classes": 3,
    "label_names": ["cat", "dog", "hat"],
    "pretrained_cfg": {"input_size": [3, 64, 48], "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.2, 0.1], "first_conv": "conv1"},
}


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., HubFolder]:
    """(names of empty files, JSON files by keyword) -> what `read_folder` says of them."""

    def write(*names: str, **contents: Any) -> HubFolder:
        for name in names or ("model.safetensors",):
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).touch()
        for name, content in contents.items():
            text = content if isinstance(content, str) else json.dumps(content)
            (tmp_path / f"{name.replace('__', '.')}.json").write_text(text)
        return read_folder(tmp_path)

    return write


def test_nothing_but_weights(make, tmp_path):
    found = make("model.safetensors", "README.md", ".gitattributes")
    assert found.weights == (tmp_path / "model.safetensors",)
    assert (found.arch, found.kwargs, found.classes, found.mean, found.std, found.input_size) == (None, {}, *[None] * 4)
    assert (found.findings, found.note) == ((), "")


@pytest.mark.parametrize(
    ("names", "wanted"),
    [
        (["pytorch_model.bin", "model.safetensors", "other.safetensors"], "model.safetensors"),
        (["pytorch_model.bin", "flax_model.msgpack", "tf_model.h5"], "pytorch_model.bin"),
        (["pytorch_model.bin", "b.safetensors"], "pytorch_model.bin"),
        (["b.safetensors", "c.bin", "d.pth"], "b.safetensors"),
        (["c.bin", "d.pth", "training_args.bin"], "c.bin"),
        (["d.pth", "optimizer.pt", "scheduler.pt", "rng_state_0.pth"], "d.pth"),
        (["d.pt"], "d.pt"),
    ],
)
def test_which_weights_count(names, wanted, make, tmp_path):
    assert make(*names).weights == (tmp_path / wanted,)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["a.safetensors", "b.safetensors"], r"must hold one file of weights, found 2 \(a.safetensors, b.safetensors\)"),
        (["a.pt", "b.pth", "c.pt", "d.pt"], r"found 4 \(a.pt, b.pth, c.pt, ...\): name the file itself"),
        (["README.md"], "it has neither"),
        (["optimizer.pt"], "it has neither"),
        (["sub/model.safetensors"], "it has neither"),
    ],
)
def test_unclear_weights_are_told(names, message, make):
    with pytest.raises(ModelError, match=message):
        make(*names)


def test_shards(make, tmp_path):
    placed = {"a": "model-2.safetensors", "b": "model-1.safetensors", "c": "model-2.safetensors"}
    found = make("model-1.safetensors", "model-2.safetensors", model__safetensors__index={"weight_map": placed})
    assert found.weights == (tmp_path / "model-1.safetensors", tmp_path / "model-2.safetensors")


@pytest.mark.parametrize(
    ("placed", "message"),
    [
        ({"a": "../a.safetensors"}, "plain name that ends in .safetensors, got ../a.safetensors"),
        ({"a": "/etc/passwd.safetensors"}, "plain name"),
        ({"a": "sub/a.safetensors"}, "plain name"),
        ({"a": "..\\a.safetensors"}, "plain name"),
        ({"a": "a.bin"}, "plain name"),
        ({"a": "a\n.safetensors"}, r"got a\\n.safetensors"),
        ({"a": 3}, "plain name"),
        ({"a": ["x"]}, "got list"),
        ({"a": "gone.safetensors"}, "must hold gone.safetensors, which is missing"),
        ({"a": "sub.safetensors"}, "must hold sub.safetensors, which is missing"),
        ({str(i): f"{i}.safetensors" for i in range(1001)}, "at most 1000 files, got 1001"),
        ({}, "weight_map"),
        ([], "weight_map"),
        (None, "weight_map"),
    ],
)
def test_wrong_shards_are_told(placed, message, make, tmp_path):
    (tmp_path / "sub.safetensors").mkdir()
    with pytest.raises(ModelError, match=message) as told:
        make("other.safetensors", model__safetensors__index={"weight_map": placed})
    assert "\n" not in str(told.value)


def test_links_into_the_cache_are_followed(tmp_path):
    """The hub's cache keeps ``snapshots/REV/FILE`` as links to ``blobs/HASH``."""
    blobs, folder = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    blobs.mkdir()
    folder.mkdir(parents=True)
    for name, content in (("model.safetensors", ""), ("config.json", json.dumps(TIMM))):
        (blobs / f"hash-{name}").write_text(content)
        (folder / name).symlink_to(f"../../blobs/hash-{name}")
    found = read_folder(folder)
    assert (found.weights, found.arch) == ((folder / "model.safetensors",), "timm:test_resnet")


def test_only_regular_files_count(tmp_path):
    os.mkfifo(tmp_path / "model.safetensors")
    (tmp_path / "pytorch_model.bin").symlink_to("/dev/zero")
    (tmp_path / "a.safetensors").symlink_to("nowhere")
    with pytest.raises(ModelError, match="it has neither"):
        read_folder(tmp_path)


def test_timm(make):
    found = make(config=TIMM)
    assert (found.arch, found.kwargs, found.classes) == ("timm:test_resnet", {"classes": 3}, ("cat", "dog", "hat"))
    assert (found.mean, found.std, found.input_size) == ((0.5, 0.4, 0.3), (0.2, 0.2, 0.1), (64, 48))


@pytest.mark.parametrize(
    ("config", "arch", "kwargs"),
    [
        ({"architecture": "vit.augreg", "pretrained_cfg": {"num_classes": 7}}, "timm:vit", {"classes": 7}),
        ({"architecture": "vit", "num_classes": 7, "input_size": [1, 8, 8]}, "timm:vit", {"classes": 7, "in_channels": 1}),
        (
            {**TIMM, "model_args": {"in_chans": 3, "num_classes": 3, "global_pool": "avg", "drop_path_rate": 0.1, "act": None}},
            "timm:test_resnet",
            {"classes": 3, "global_pool": "avg"},
        ),
        ({**TIMM, "model_args": {"img_size": [96, 96]}}, "timm:test_resnet", {"classes": 3, "img_size": 96}),
        (
            {**TIMM, "model_args": {"img_size": 96, "in_chans": 1}},
            "timm:test_resnet",
            {"classes": 3, "in_channels": 1, "img_size": 96},
        ),
    ],
)
def test_settings_of_timm(config, arch, kwargs, make):
    found = make(config=config)
    assert (found.arch, found.kwargs, found.note) == (arch, kwargs, "")
    assert found.input_size == ((96, 96) if "img_size" in kwargs else found.input_size)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"model_args": {"patch_size": 8}}, "timm:test_resnet with its own patch_size"),
        ({"model_args": {"img_size": [96, 48]}}, "with its own img_size"),
        ({"model_args": {"img_size": 2000}}, "with its own img_size"),
        ({"num_classes": 0}, "with no classifier"),
    ],
)
def test_what_a_name_cannot_say_is_noted(more, words, make):
    found = make(config={**TIMM, **more})
    assert (found.arch, found.kwargs) == (None, {})
    assert words in found.note


def test_labels_of_older_timm(make):
    assert make(config={"architecture": "x", "labels": ["a", "b"]}).classes == ("a", "b")


def test_transformers(make):
    labels = {str(i): f"class {i}" for i in range(12)}
    images = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.25] * 3, "size": {"height": 32, "width": 24}}
    shuffled = dict(sorted(labels.items()))
    config = {"architectures": ["ViTForImageClassification"], "image_size": 224, "id2label": shuffled}
    found = make(config=config, preprocessor_config=images)
    assert found.classes == tuple(f"class {i}" for i in range(12))
    assert (found.mean, found.std, found.input_size) == ((0.5,) * 3, (0.25,) * 3, (32, 24))
    assert found.arch is None
    assert "ViTForImageClassification of transformers" in found.note


@pytest.mark.parametrize(
    ("images", "size"),
    [
        ({"size": 64}, (64, 64)),
        ({"size": {"shortest_edge": 64}}, (64, 64)),
        ({"size": {"shortest_edge": 64}, "crop_size": 48}, (48, 48)),
        ({"size": 64, "crop_size": {"height": 48, "width": 40}}, (48, 40)),
        ({"size": 64, "crop_size": 48, "do_center_crop": False}, (64, 64)),
        ({"size": [64, 32]}, (64, 32)),
        ({"size": {"longest_edge": 64}}, None),
        ({}, None),
    ],
)
def test_sizes(images, size, make):
    assert make(preprocessor_config=images).input_size == size


@pytest.mark.parametrize(
    "images",
    [
        {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.2, 0.1]},
        {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.2, 0.1], "rescale_factor": 1 / 127.5},
        {"image_mean": [100, 110, 120], "image_std": [50, 60, 70], "do_rescale": False},
        {"image_mean": 0.5, "image_std": 0.5},
        {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.2, 0.1], "do_normalize": False},
        {"do_rescale": False},
    ],
)
def test_mean_and_std_are_those_of_images_in_0_to_1(images, make):
    found = make(preprocessor_config=images)
    pixels = torch.tensor([0.0, 100.0, 255.0])
    wanted = pixels * images.get("rescale_factor", 1 / 255) if images.get("do_rescale", True) else pixels
    if images.get("do_normalize", True) and "image_mean" in images:
        wanted = (wanted - torch.tensor(images["image_mean"])) / torch.tensor(images["image_std"])
    assert torch.allclose((pixels / 255 - torch.tensor(found.mean)) / torch.tensor(found.std), wanted, atol=1e-5)


def test_sizes_of_the_preprocessor_win(make):
    found = make(config=TIMM, preprocessor_config={"size": 20, "image_mean": 0.5, "image_std": 0.5})
    assert (found.input_size, found.mean, found.arch) == ((20, 20), (0.5,) * 3, "timm:test_resnet")


def test_code_is_told_and_not_run(make, tmp_path):
    (tmp_path / "modeling.py").write_text("raise SystemExit('run')")
    found = make(
        *("model.safetensors", "sub/more.py", "native.so"),
        config={**TIMM, "auto_map": {"AutoModel": "modeling.Net"}, "custom_pipelines": {"a": {}}},
        preprocessor_config={"auto_map": {"AutoImageProcessor": "x.Y"}},
    )
    assert {finding.rule for finding in found.findings} == {"LOD-006"}
    assert [finding.where for finding in found.findings] == [
        *("modeling.py", "native.so", "sub/more.py", "config.json", "config.json", "preprocessor_config.json"),
    ]


def test_much_code_is_told_briefly(make):
    found = make("model.safetensors", *(f"{i}.py" for i in range(30)))
    assert len(found.findings) == 21
    assert found.findings[-1].message == "holds 10 more files of code"


@pytest.mark.parametrize("file", ["config", "preprocessor_config", "model__safetensors__index"])
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is not valid JSON"),
        ("{", "is not valid JSON"),
        ("[]", "must hold an object"),
        ("3", "must hold an object"),
        ('{"a": NaN}', "is not valid JSON"),
        ('{"a": ' + "9" * 5000 + "}", "is not valid JSON"),
        ("[" * 100_000, "is not valid JSON"),
        ('{"a":' * 40 + "1" + "}" * 40, "nested at most 32 deep"),
        ('{"a": "' + "x" * (16 * 2**20) + '"}', "must have at most 16777216 bytes"),
    ],
)
def test_broken_json_is_told(file, text, message, make):
    with pytest.raises(ModelError, match=message) as told:
        make("other.safetensors", **{file: text})
    assert "\n" not in str(told.value)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({**TIMM, "architecture": "a/b"}, "architecture must be a word, got a/b"),
        ({**TIMM, "architecture": "hf-hub:a"}, "architecture must be a word"),
        ({**TIMM, "architecture": 3}, "architecture must be a word"),
        ({**TIMM, "architecture": "a\nb"}, r"got a\\nb"),
        ({**TIMM, "pretrained_cfg": 3}, "must be objects"),
        ({**TIMM, "model_args": [1]}, "must be objects"),
        ({**TIMM, "model_args": {"global_pool": 3}}, "global_pool must be a word"),
        ({**TIMM, "model_args": {"img_size": "big"}}, "img_size must be one or two numbers"),
        ({**TIMM, "model_args": {"in_chans": -1}}, "number of in_channels must lie in"),
        ({**TIMM, "num_classes": "3"}, r"number of classes must lie in \[1, 65536\], got 3"),
        ({**TIMM, "num_classes": True}, "number of classes"),
        ({**TIMM, "num_classes": 10**9}, "number of classes"),
        ({**TIMM, "label_names": "cat"}, "label_names must be 1 to 65536 names"),
        ({**TIMM, "label_names": ["a\nb"]}, "printable"),
        ({**TIMM, "label_names": [3]}, "printable"),
        ({"architecture": "x", "input_size": [3, 0, 8]}, "input_size must be three numbers from 1 to 4096"),
        ({"architecture": "x", "input_size": 8}, "input_size must be"),
        ({"architecture": "x", "mean": [0.5], "std": [0.5, 0.5]}, "for the same channels"),
        ({"architecture": "x", "mean": [0.5]}, "for the same channels"),
        ({"architecture": "x", "mean": ["a"], "std": [1]}, "mean must be numbers"),
        ({"architecture": "x", "mean": [10**400], "std": [1]}, "mean must be numbers"),
        ({"architecture": "x", "mean": [True], "std": [1]}, "mean must be numbers"),
        ({"architecture": "x", "mean": [0.5], "std": [0]}, "must be above 0"),
        ({"id2label": ["a"]}, "id2label must give names by whole numbers"),
        ({"id2label": {"x": "a"}}, "id2label must give names by whole numbers"),
        ({"id2label": {"01": "a"}}, "id2label must give names by whole numbers"),
        ({"id2label": {"1": "a", "2": "b"}}, "must number its 2 names from 0 up without a gap"),
        ({"id2label": {"0": 3}}, "printable"),
        ({"id2label": {}}, "id2label must be 1 to 65536 names"),
        ({"image_size": "x"}, "image_size must be one or two numbers"),
    ],
)
def test_wrong_settings_are_told(config, message, make):
    with pytest.raises(ModelError, match=message) as told:
        make(config=config)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ({"rescale_factor": 0}, "rescale_factor must lie in"),
        ({"rescale_factor": "a"}, "rescale_factor must lie in"),
        ({"image_std": [0.0], "image_mean": [0.0]}, "must be above 0"),
        ({"image_mean": {}}, "image_mean must be numbers"),
        ({"size": {"height": 4}}, "size must be one or two numbers"),
        ({"crop_size": 5000}, "crop_size must be one or two numbers from 1 to 4096"),
    ],
)
def test_wrong_image_settings_are_told(images, message, make):
    with pytest.raises(ModelError, match=message):
        make(preprocessor_config=images)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
KEYS = st.sampled_from(
    [*TIMM, "model_args", "id2label", "architectures", "mean", "std", "input_size", "labels", "image_size", "auto_map"]
)


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(changes=st.dictionaries(KEYS, JSON, max_size=3), start=st.sampled_from([TIMM, {}]))
def test_any_settings_give_an_answer_or_one_line(changes, start, tmp_path):
    (tmp_path / "model.safetensors").touch()
    (tmp_path / "config.json").write_text(json.dumps({**start, **changes}))
    try:
        told = repr(read_folder(tmp_path))
    except ModelError as error:
        told = str(error)
    assert "\n" not in told


def test_missing_folders_and_files(tmp_path):
    (tmp_path / "file").touch()
    for name in ("none", "file"):
        with pytest.raises(ModelError, match="must be a folder"):
            read_folder(tmp_path / name)


@pytest.mark.usefixtures("vision")
def test_a_folder_as_timm_writes_it_loads_bit_for_bit(tmp_path):
    from timm.models import save_for_hf

    net = build("timm:test_vit", classes=3, img_size=64, global_pool="avg").eval()
    save_for_hf(net, str(tmp_path), model_config={"label_names": ["cat", "dog", "hat"]})
    model = load(tmp_path)
    assert (model.classes, model.input_shape) == (("cat", "dog", "hat"), (3, 64, 64))
    x = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(model(x), net((x - model.mean) / model.std))


def test_no_torch(tmp_path):
    (tmp_path / "model.safetensors").touch()
    (tmp_path / "config.json").write_text(json.dumps(TIMM))
    code = (
        "import sys\nfrom secateur.intake.folder import read_folder\n"
        f"read_folder({str(tmp_path)!r})\nsys.exit('torch' in sys.modules or 'timm' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
