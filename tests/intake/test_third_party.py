"""Checkpoints that others published: each loads as what it is, and predicts as well as it was measured to.

They are not part of the repository: set SECATEUR_TEST_DATA to the folder that holds ``checkpoints/`` and ``cifar10/``.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from secateur.intake import load
from secateur.models import Classifier, load_bundle, save

DATA = os.environ.get("SECATEUR_TEST_DATA")
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
MEASURED = {
    "resnet20-12fca82f.th": 0.9173,
    "nad_backdoored_WRN-16-1_grid_t5.pth.tar": 0.8480,
    "zlatasm_resnet20.pth": 0.9292,
    "resnet32-d509ac18.th": 0.9263,
    "resnet56-4bfd9763.th": 0.9339,
    "ibau_badnets_8_02_ckpt.pth": 0.8446,
    "ibau_l0_inv_0_02_ckpt.pth": 0.8495,
    "ibau_trojan_sq_2_02_ckpt.pth": 0.8461,
    "nad_teacher_WRN-16-1.pth.tar": 0.8439,
    "verazuo_badnet-CIFAR10.pth": 0.507,
}
QUICK = {"verazuo_badnet-CIFAR10.pth"}


def read(file: str) -> Classifier:
    return load(Path(DATA or "") / "checkpoints" / file, **CHECKPOINTS[file][1])


@pytest.fixture(scope="module")
def cifar10() -> torch.Tensor:
    """The test images class by class, uint8 ``(10000, 3, 32, 32)``; each file is one mosaic of 25 rows and 40 columns."""
    folder = Path(DATA or "") / "cifar10"
    if not folder.is_dir():
        pytest.skip(f"{folder} is missing")
    sheets = []
    for label, name in enumerate(CLASSES):
        with Image.open(folder / f"test_{label}_{name}.webp") as image:
            sheets.append(np.array(image.convert("RGB")).reshape(25, 32, 40, 32, 3).transpose(0, 2, 4, 1, 3))
    return torch.from_numpy(np.stack(sheets).reshape(10_000, 3, 32, 32))


def accuracy(model: Classifier, images: torch.Tensor) -> float:
    model = model.to(memory_format=torch.channels_last)
    labels = torch.arange(10).repeat_interleave(1000)
    correct = 0
    with torch.inference_mode():
        for x, y in zip(images.split(500), labels.split(500), strict=True):
            x = x.to(memory_format=torch.channels_last).float() / 255
            correct += int((model(x).argmax(1) == y).sum())
    return correct / len(labels)


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


@pytest.mark.parametrize("file", [f if f in QUICK else pytest.param(f, marks=pytest.mark.slow) for f in MEASURED])
def test_accuracy_as_measured(file, cifar10):
    assert accuracy(read(file), cifar10) == pytest.approx(MEASURED[file], abs=0.003)
