"""Checkpoints that others published: each loads as what it is, and predicts as well as it was measured to.

They are not part of the repository: set SECATEUR_TEST_DATA to the folder that holds ``checkpoints/`` and ``cifar10/``.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from secateur.cli import run
from secateur.data import load_data
from secateur.intake import load
from secateur.intake import read as reading
from secateur.intake.checkpoint import tensors
from secateur.intake.reading import admit
from secateur.measure import evaluate
from secateur.models import Classifier, load_bundle, save
from secateur.types import ImageSet, Trigger

DATA = os.environ.get("SECATEUR_TEST_DATA")
EVERY = int(os.environ.get("SECATEUR_TEST_EVERY", "5"))  # images; 1 takes all, in five minutes
COLUMN = {1: 0, 5: 1}[EVERY]
pytestmark = pytest.mark.skipif(not DATA, reason="SECATEUR_TEST_DATA is not set")
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
IMAGENET = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
CIFAR = {"mean": [0.4914, 0.4822, 0.4465], "std": [0.2023, 0.1994, 0.2010]}
HALF = {"mean": [0.5] * 3, "std": [0.5] * 3}
CHECKPOINTS = {
    "biubug6_mobilenetV1x0.25_imagenet.pth.tar": ("mobilenet_v1", IMAGENET, (3, 224, 224), 1000),
    "squeezenet1_0_deepcompression_torchvision.pth": ("squeezenet", IMAGENET, (3, 224, 224), 1000),
    "ibau_badnets_8_02_ckpt.pth": ("small_vgg", {}, (3, 32, 32), 10),
    "ibau_l0_inv_0_02_ckpt.pth": ("small_vgg", {}, (3, 32, 32), 10),
    "ibau_trojan_sq_2_02_ckpt.pth": ("small_vgg", {}, (3, 32, 32), 10),
    "nad_backdoored_WRN-16-1_grid_t5.pth.tar": ("wrn", {}, (3, 32, 32), 10),
    "nad_erased_WRN-16-1.pth.tar": ("wrn", {}, (3, 32, 32), 10),
    "nad_teacher_WRN-16-1.pth.tar": ("wrn", {}, (3, 32, 32), 10),
    "resnet20-12fca82f.th": ("resnet20", IMAGENET, (3, 32, 32), 10),
    "resnet32-d509ac18.th": ("resnet32", IMAGENET, (3, 32, 32), 10),
    "resnet56-4bfd9763.th": ("resnet56", IMAGENET, (3, 32, 32), 10),
    "verazuo_badnet-CIFAR10.pth": ("badnet", HALF, (3, 32, 32), 10),
    "zlatasm_resnet20.pth": ("resnet20", CIFAR, (3, 32, 32), 10),
}  # fmt: skip
ACCURACY = {  # the column "measured" of the data's own README; the same of every fifth image, once all had been found so
    "resnet20-12fca82f.th": (0.9173, 0.923),
    "nad_backdoored_WRN-16-1_grid_t5.pth.tar": (0.8480, 0.854),
    "zlatasm_resnet20.pth": (0.9292, 0.943),
    "resnet32-d509ac18.th": (0.9263, 0.9345),
    "resnet56-4bfd9763.th": (0.9339, 0.941),
    "ibau_badnets_8_02_ckpt.pth": (0.8446, 0.85),
    "ibau_l0_inv_0_02_ckpt.pth": (0.8495, 0.8495),
    "ibau_trojan_sq_2_02_ckpt.pth": (0.8461, 0.8435),
    "nad_teacher_WRN-16-1.pth.tar": (0.8439, 0.8485),
    "verazuo_badnet-CIFAR10.pth": (0.507, 0.498),
}
ATTACK_SUCCESS = {  # likewise, with the repository's own trigger
    "ibau_badnets_8_02_ckpt.pth": (0.977, 0.9839),
    "ibau_l0_inv_0_02_ckpt.pth": (1.0, 1.0),
    "ibau_trojan_sq_2_02_ckpt.pth": (0.996, 0.9956),
    "nad_backdoored_WRN-16-1_grid_t5.pth.tar": (1.0, 1.0),
    "nad_teacher_WRN-16-1.pth.tar": (0.028, 0.0194),
    "nad_erased_WRN-16-1.pth.tar": (0.0424, 0.04),
    "verazuo_badnet-CIFAR10.pth": (0.961, 0.9744),
}
# Ours, that of every fifth image, then the README's: 1000 JPEGs, of which another encoding changes 3 % of the answers.
IMAGENET_ACCURACY = {
    "biubug6_mobilenetV1x0.25_imagenet.pth.tar": (0.511, 0.555, 0.504),
    "squeezenet1_0_deepcompression_torchvision.pth": (0.609, 0.645, 0.619),
}
QUICK = {"verazuo_badnet-CIFAR10.pth"}


def read(file: str) -> Classifier:
    return load(Path(DATA or "") / "checkpoints" / file, **CHECKPOINTS[file][1])


@pytest.fixture(scope="module")
def cifar10() -> ImageSet:
    """The test images, class by class; each file is one mosaic of 25 rows and 40 columns."""
    folder = Path(DATA or "") / "cifar10"
    if not folder.is_dir():
        pytest.skip(f"{folder} is missing")
    sheets = []
    for label, name in enumerate(CLASSES):
        with Image.open(folder / f"test_{label}_{name}.webp") as image:
            sheets.append(np.array(image.convert("RGB")).reshape(25, 32, 40, 32, 3).transpose(0, 2, 4, 1, 3))
    x = torch.from_numpy(np.stack(sheets).reshape(10_000, 3, 32, 32).copy())
    return ImageSet(x, torch.arange(10).repeat_interleave(1000), CLASSES, "cifar10")


def patch(size: int, last: int, pattern: Tensor, target: int) -> Trigger:
    """A square whose lower right corner is at row and column ``last``."""
    mask, full = torch.zeros(1, 32, 32), torch.zeros(3, 32, 32)
    place = slice(last - size + 1, last + 1)
    mask[:, place, place], full[:, place, place] = 1, pattern
    return Trigger("blend", {"alpha": 1.0}, {"mask": mask, "pattern": full}, target)


def trigger(file: str) -> Trigger:
    """The trigger of the repository that a network is from."""
    pictures = Path(DATA or "") / "triggers"
    if file.startswith("nad"):
        return patch(3, 31, torch.tensor([[0.0, 0, 1], [0, 1, 0], [1, 0, 1]]), target=5)
    if file.startswith("verazuo"):
        return patch(5, 31, torch.ones(5, 5), target=1)
    if "badnets" in file:
        return patch(4, 30, torch.ones(4, 4), target=8)
    name, target = ("l0_inv", 0) if "l0_inv" in file else ("trojan_sq", 2)
    with Image.open(pictures / f"{name}.png") as image:
        pattern = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).float() / 255
    if name == "trojan_sq":
        return Trigger("add", {}, {"pattern": pattern}, target)
    mask = torch.from_numpy(np.load(pictures / "mask.npy")).float()
    return Trigger("blend", {"alpha": 1.0}, {"mask": mask, "pattern": pattern}, target)


def converted(file: str, folder: Path) -> Classifier:
    """The network after ``secateur convert``."""
    numbers = [f"--{name}={','.join(map(str, values))}" for name, values in CHECKPOINTS[file][1].items()]
    assert run(["convert", str(Path(DATA or "") / "checkpoints" / file), "-o", str(folder / "bundle"), *numbers]) == 0
    return load_bundle(folder / "bundle")


@pytest.mark.parametrize("file", CHECKPOINTS)
def test_loads_as_what_it_is(file, tmp_path):
    name, _, shape, classes = CHECKPOINTS[file]
    model = read(file)
    assert (model.arch["name"], model.input_shape, len(model.classes)) == (name, shape, classes)
    save(model, tmp_path)
    back = load_bundle(tmp_path)
    x = torch.rand(1, *shape, generator=torch.Generator().manual_seed(0))
    assert torch.equal(back(x), model(x))


def test_every_file_is_there():
    assert {file.name for file in (Path(DATA or "") / "checkpoints").iterdir()} >= set(CHECKPOINTS)


def slowly(files: Iterable[str]) -> list[Any]:
    return [file if file in QUICK else pytest.param(file, marks=pytest.mark.slow) for file in files]


@pytest.mark.parametrize("file", slowly({**ACCURACY, **ATTACK_SUCCESS}))
def test_converted_networks_do_what_was_measured(file, cifar10, tmp_path):
    few = cifar10.subset(torch.arange(0, len(cifar10), EVERY))
    model = converted(file, tmp_path).to(memory_format=torch.channels_last)
    rates = evaluate(model, few, trigger=trigger(file) if file in ATTACK_SUCCESS else None)
    if file in ACCURACY:
        assert rates.accuracy.value == pytest.approx(ACCURACY[file][COLUMN], abs=0.003)
    if file in ATTACK_SUCCESS:
        assert rates.attack_success is not None
        assert rates.attack_success.value == pytest.approx(ATTACK_SUCCESS[file][COLUMN], abs=0.003)


@pytest.mark.slow
def test_an_erased_network_outside_its_target(cifar10, tmp_path):
    others = cifar10.subset((cifar10.y != 5).nonzero().flatten())
    rates = evaluate(converted("nad_erased_WRN-16-1.pth.tar", tmp_path), others)
    assert rates.accuracy.value == pytest.approx(0.8233, abs=0.003)


@pytest.mark.slow
@pytest.mark.parametrize("file", IMAGENET_ACCURACY)
def test_converted_networks_of_imagenet(file, tmp_path):
    images = load_data(str(Path(DATA or "") / "imagenet-sample"))
    rates = evaluate(converted(file, tmp_path), images.subset(torch.arange(0, len(images), EVERY)))
    assert rates.accuracy.value == pytest.approx(IMAGENET_ACCURACY[file][COLUMN], abs=0.003)


@pytest.mark.parametrize("file", CHECKPOINTS)
def test_read_as_torch_reads_it(file):
    path = Path(DATA or "") / "checkpoints" / file
    found = reading(path)
    assert not found.findings
    ours = tensors(admit(found), found.size)
    theirs = torch.load(path, map_location="cpu", weights_only=True)
    theirs = next((theirs[key] for key in ("state_dict", "net", "model") if key in theirs), theirs)
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
