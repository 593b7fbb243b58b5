"""Networks of timm and torchvision by name: the same logits, from disk and back, and plain words where that cannot be."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch

from secateur.architectures import architecture, is_external, resolve
from secateur.errors import ModelError
from secateur.intake.checkpoint import load
from secateur.models import Classifier, build, load_bundle, read_arch, save
from secateur.models.external import build_external, infer_external, skeleton_external, usual_input
from secateur.models.registry import fit, shapes_of, skeleton
from secateur.models.shrink import shrink
from secateur.state import generator, seeded

NETS = {  # with the size of the images, and what makes each worth a test
    "timm:resnet18": 48,
    "timm:mobilenetv3_small_050": 48,
    "timm:test_efficientnet": 48,
    "timm:vit_tiny_patch16_224": 224,
    "timm:test_vit_relpos": 160,  # position indices outside the state dict
    "timm:vit_tiny_r_s16_p8_224": 224,  # computes with its parameters while it is built
    "torchvision:resnet18": 48,
    "torchvision:mobilenet_v3_small": 48,
    "torchvision:regnet_y_400mf": 48,  # cannot be built on the meta device
}


@pytest.mark.usefixtures("vision")
@pytest.mark.parametrize("name", NETS)
def test_the_same_logits_from_disk_and_back(name, tmp_path):
    with seeded(generator(0)):
        net = build(name, classes=5).eval()
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.running_var, 0.5, 1.5, generator=generator(1))
    x = torch.rand(2, 3, NETS[name], NETS[name], generator=generator(2))
    with torch.no_grad():
        wanted = net(x)
    safetensors.torch.save_file(net.state_dict(), tmp_path / "weights.safetensors")
    before = torch.get_rng_state()
    given = {"mean": [0.0] * 3, "std": [1.0] * 3, "input_size": NETS[name]}
    model = load(tmp_path / "weights.safetensors", arch=name, **given)
    assert torch.equal(torch.get_rng_state(), before)
    save(model, tmp_path / "bundle")
    back = load(tmp_path / "bundle")
    with torch.no_grad():
        assert torch.equal(model(x), wanted)
        assert torch.equal(back(x), wanted)
    assert read_arch(tmp_path / "bundle")["arch"] == {"name": name, "kwargs": resolve(name, {"classes": 5}), "factory": None}


@pytest.mark.usefixtures("vision")
@pytest.mark.parametrize("name", ["timm:test_resnet", "timm:test_vit", "torchvision:mobilenet_v2"])
def test_skeletons_take_no_memory(name):
    net = skeleton(name, {"classes": 7})
    assert all(value.is_meta for value in net.state_dict().values())
    assert shapes_of(net.state_dict()) == shapes_of(build(name, classes=7).state_dict())


@pytest.mark.usefixtures("vision")
def test_constants_are_there_after_loading():
    net = skeleton_external("timm:test_vit_relpos", {"classes": 3})
    assert all(buffer.is_meta for buffer in net.buffers())
    whole = build_external("timm:test_vit_relpos", {"classes": 3})
    net.load_state_dict(whole.state_dict(), assign=True)
    assert all(torch.equal(a, b) for a, b in zip(net.buffers(), whole.buffers(), strict=True))


@pytest.mark.usefixtures("vision")
def test_fewer_channels_survive_the_disk(tmp_path):
    with seeded(generator(0)):
        net = build("timm:resnet18", classes=3).eval()
    kept = {"layer1.0.bn1": torch.arange(0, 64, 2)}
    small = shrink(net, kept, (3, 48, 48))
    arch = {"name": "timm:resnet18", "kwargs": {"classes": 3}}
    model = Classifier(
        small, classes="abc", input_shape=(3, 48, 48), arch=arch, channels={"layer1.0.bn1": range(0, 64, 2)}
    ).eval()
    save(model, tmp_path)
    back = load_bundle(tmp_path)
    x = torch.rand(2, 3, 48, 48, generator=generator(1))
    with torch.no_grad():
        assert torch.equal(back(x), model(x))
    assert back.net.state_dict()["layer1.0.conv1.weight"].shape == (32, 64, 3, 3)


@pytest.mark.usefixtures("vision")
def test_shapes_tell_classes_and_channels():
    grey = skeleton("timm:test_resnet", {"classes": 3, "in_channels": 1}).state_dict()
    assert infer_external("timm:test_resnet", shapes_of(grey)) == {"classes": 3, "in_channels": 1}
    assert fit("timm:test_resnet", shapes_of(grey), {"classes": 4}) == {"classes": 4, "in_channels": 1}
    ten = skeleton("torchvision:mobilenet_v2", {"classes": 10}).state_dict()
    assert infer_external("torchvision:mobilenet_v2", shapes_of(ten)) == {"classes": 10}
    for shapes in ({}, {"fc.weight": ()}, {"fc.weight": (0, 3), "conv1.0.weight": (1,)}, {"fc.weight": (2**40, 3)}):
        assert infer_external("timm:test_resnet", shapes) == {}


@pytest.mark.usefixtures("vision")
def test_pooling_and_size_of_the_images():
    settings = {"classes": 3, "global_pool": "avg", "img_size": 32}
    shapes = shapes_of(skeleton("timm:test_vit", settings).state_dict())
    assert shapes["pos_embed"] == (1, 5, 64)
    assert "fc_norm.weight" in shapes
    with pytest.raises(ModelError, match="img_size must be at most 1024, got 2000"):
        skeleton("timm:test_vit", {"img_size": 2000})
    with pytest.raises(ModelError, match=r"timm:test_resnet cannot be built with .*'img_size': 32"):
        skeleton("timm:test_resnet", {"img_size": 32})


@pytest.mark.usefixtures("vision")
def test_usual_inputs():
    imagenet = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    assert usual_input("torchvision:resnet18") == ((224, 224), *imagenet)
    assert usual_input("torchvision:vit_h_14") == ((224, 224), *imagenet)
    assert usual_input("timm:test_efficientnet") == ((160, 160), *imagenet)
    half = (0.5, 0.5, 0.5)
    assert usual_input("timm:test_vit", {"img_size": 96}) == ((96, 96), half, half)


@pytest.mark.usefixtures("vision")
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("timm:resnet18.a1_in1k", "unknown architecture 'timm:resnet18.a1_in1k'; did you mean 'timm:resnet18'"),
        ("timm:resnt18", "did you mean 'timm:resnet18'"),
        ("timm:0000", "timm's own list_models"),
        ("torchvision:resnet17", "did you mean 'torchvision:resnet1"),
        ("torchvision:fcn_resnet50", "unknown architecture 'torchvision:fcn_resnet50'"),
        ("torchvision:googlenet", "its weights do not tell all about it"),
        ("torchvision:mnasnet1_0", "its weights do not tell all about it"),
        ("timm:hf-hub:some/one", "unknown architecture 'timm:hf-hub:some/one'"),
        ("timm:local-dir:/tmp", "unknown architecture"),
        ("keras:resnet", "unknown architecture 'keras:resnet'"),
    ],
)
def test_other_names_are_told(name, message):
    for make in (lambda: build(name), lambda: skeleton(name, {})):
        with pytest.raises(ModelError, match=message) as told:
            make()
        assert "\n" not in str(told.value)


def test_arguments_are_checked_without_the_packages():
    assert resolve("timm:anything", {"classes": 7}) == {"classes": 7, "in_channels": 3}
    assert resolve("torchvision:anything", {}) == {"classes": 1000}
    assert architecture("timm:anything").input_size == 224
    for name, kwargs, message in (
        ("torchvision:resnet18", {"in_channels": 1}, "unknown argument of torchvision:resnet18 'in_channels'"),
        ("timm:resnet18", {"pretrained": True}, "unknown argument of timm:resnet18 'pretrained'"),
        ("timm:resnet18", {"classes": "7"}, "classes must be of type int, got str"),
        ("timm:resnet18", {"classes": 0}, "must lie in"),
        ("timm:resnet18", {"img_size": 0}, "must lie in"),
    ):
        with pytest.raises(ModelError, match=message):
            resolve(name, kwargs)


@pytest.mark.parametrize(
    "name", ["timm:", "timm:a/b", "timm:a:b", "timm:é", "timm:a\n", "TIMM:a", "resnet18", f"timm:{'a' * 101}"]
)
def test_what_is_no_external_name(name):
    assert not is_external(name)


@pytest.mark.parametrize("name", ["timm:a/b", "timm:x y", "http:x", "timm:a\n", 3])
def test_bundles_with_other_names_are_refused(name, tmp_path, tiny):
    save(tiny(), tmp_path)
    file = tmp_path / "arch.json"
    content = json.loads(file.read_text())
    file.write_text(json.dumps({**content, "arch": {"name": name, "kwargs": {}, "factory": None}}))
    with pytest.raises(ModelError, match=r"arch\.name must be a word"):
        load_bundle(tmp_path)


def fresh(code: str) -> str:
    """Run code where no test has helped the packages to load."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


TELL = """
from secateur.errors import ModelError
from secateur.models.registry import skeleton
for name in ("timm:resnet18", "torchvision:resnet18"):
    try:
        skeleton(name, {})
    except ModelError as error:
        print(error)
"""


def test_missing_packages_are_told():
    assert fresh("import sys\nsys.modules['timm'] = sys.modules['torchvision'] = None\n" + TELL).splitlines() == [
        "timm networks need the extra: pip install 'secateur[timm]'",
        "torchvision networks need the extra: pip install 'secateur[torchvision]'",
    ]


def test_packages_that_do_not_load_are_told(tmp_path: Path):
    (tmp_path / "torchvision.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    told = fresh(f"import sys\nsys.path.insert(0, {str(tmp_path)!r})\n" + TELL).splitlines()
    assert len(told) == 2
    assert all("is installed but does not load (operator torchvision::nms does not exist)" in line for line in told)


def test_nothing_heavy_before_a_name_asks_for_it():
    assert fresh("import sys, secateur.models.registry; print({'timm', 'torchvision'} & set(sys.modules))") == "set()"
