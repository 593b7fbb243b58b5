"""``secateur repair`` on networks that others trained, one of them with a backdoor of theirs."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from secateur.cli import run
from secateur.data import save_npz, save_trigger, stratified
from secateur.poison import badnets
from secateur.state import generator
from secateur.types import ImageSet

DATA = os.environ.get("SECATEUR_TEST_DATA")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not DATA, reason="SECATEUR_TEST_DATA is not set")]
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
CHECKPOINTS = Path(DATA or "") / "checkpoints"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """1000 clean and 3000 test images, disjoint, both from CIFAR-10's test split, and NAD's grid trigger."""
    sheets = []
    for label, name in enumerate(CLASSES):
        with Image.open(Path(DATA or "") / "cifar10" / f"test_{label}_{name}.webp") as image:
            sheets.append(np.array(image.convert("RGB")).reshape(25, 32, 40, 32, 3).transpose(0, 2, 4, 1, 3))
    x = torch.from_numpy(np.stack(sheets).reshape(10_000, 3, 32, 32).copy())
    images = ImageSet(x, torch.arange(10).repeat_interleave(1000), CLASSES, "cifar10")
    clean, test = stratified(images.y, [1000, 3000], generator=generator(0))
    path = tmp_path_factory.mktemp("cifar10")
    save_npz(images.subset(clean), path / "clean.npz")
    save_npz(images.subset(test), path / "test.npz")
    grid = badnets(images.subset(test), target=5, margin=0, pattern="grid", generator=generator(0)).trigger
    save_trigger(grid, path / "trigger")
    return path


def repaired(folder, checkpoint, *flags):
    out = folder / checkpoint
    common = ["--data", str(folder / "clean.npz"), "--test", str(folder / "test.npz"), "-o", str(out), "-q"]
    assert run(["repair", str(CHECKPOINTS / checkpoint), *common, *flags]) == 0
    return json.loads((out / "result.json").read_text("utf-8"))


def test_a_benign_resnet20_keeps_its_accuracy(folder):
    imagenet = ["--mean", "0.485,0.456,0.406", "--std", "0.229,0.224,0.225"]
    result = repaired(folder, "resnet20-12fca82f.th", *imagenet, "--set", "drop=0.05", "--set", "lr=0.01", "--set", "epochs=5")
    before, after = result["before"], result["after"]
    assert before["accuracy"]["value"] == pytest.approx(0.9173, abs=0.012)  # 3000 of the 10 000 images
    assert after["accuracy"]["value"] > before["accuracy"]["value"] - 0.06
    assert after["nonzero"] < before["nonzero"]
    assert after["attack_success"] is None


def test_a_backdoored_wrn_loses_its_backdoor(folder):
    flags = ["--trigger", str(folder / "trigger"), "--set", "epochs=5"]
    result = repaired(folder, "nad_backdoored_WRN-16-1_grid_t5.pth.tar", *flags)
    before, after = result["before"], result["after"]
    assert before["accuracy"]["value"] == pytest.approx(0.848, abs=0.015)
    assert before["attack_success"]["value"] > 0.99
    assert after["attack_success"]["value"] < 0.5
    assert after["accuracy"]["value"] > before["accuracy"]["value"] - 0.08
