"""The embedded set is what its script makes, and is whole."""

from __future__ import annotations

import hashlib
import runpy
import time
from importlib.resources import files
from pathlib import Path

import pytest
import torch

from secateur.data import load_data
from secateur.errors import DataError

DIGESTS = {
    "train": "cddf09849f4a70779788d86d47bce69d955e7a78ea915e18162d204b334f5857",
    "test": "837e70411f3c69a5f324d7a238ec918be491a5da3bd6a4e7599f3a6a174323f0",
}
SCRIPT = Path(__file__).parents[2] / "scripts" / "make_fashion_mini.py"


@pytest.mark.parametrize(("split", "count"), [("train", 5950), ("test", 2000)])
def test_contents(split, count):
    data = load_data(f"fashion-mini:{split}")
    assert data.name == f"fashion-mini:{split}"
    assert (len(data), data.shape) == (count, (1, 28, 28))
    assert data.per_class() == (count // 10,) * 10
    assert (data.classes[0], data.classes[9]) == ("T-shirt/top", "Ankle boot")
    assert data.y[:200].bincount().min() > 10
    assert data.x.flatten(1).max(dim=1).values.min() > 50
    assert len(torch.unique(data.x.flatten(1), dim=0)) == count


def test_both_splits_and_loading_time():
    start = time.process_time()
    data = load_data("fashion-mini")
    assert time.process_time() - start < 1.5  # 0.3 s on an idle machine
    assert len(data) == 7950
    assert torch.equal(data.x[5950:], load_data("fashion-mini:test").x)


def test_asset_is_small_and_documented():
    assets = [entry for entry in files("secateur.data").joinpath("assets").iterdir() if not entry.name.startswith(".")]
    assert sum(len(entry.read_bytes()) for entry in assets) <= 2_800_000
    text = files("secateur.data").joinpath("assets", "README.md").read_text(encoding="utf-8")
    assert all(words in text for words in ("Zalando SE", "MIT", "1708.07747", *DIGESTS.values()))


@pytest.mark.parametrize("split", ["train", "test"])
def test_decoded_bytes(split):
    data = load_data(f"fashion-mini:{split}")
    step = {"train": 3677, "test": 1237}[split]
    raw = torch.empty_like(data.x)
    raw[torch.arange(len(data)) * step % len(data)] = data.x
    assert hashlib.sha256(raw.transpose(2, 3).contiguous().numpy().tobytes()).hexdigest() == DIGESTS[split]


@pytest.mark.parametrize("split", ["train", "test"])
def test_script_makes_the_same_images(split):
    script = runpy.run_path(str(SCRIPT)) if SCRIPT.exists() else {}
    if not script or not script["SOURCE"].is_dir():
        pytest.skip("needs the source tree and Debian's package dataset-fashion-mnist")
    assert hashlib.sha256(script["sample"](script["SOURCE"], split)).hexdigest() == DIGESTS[split]


def test_unknown_split():
    with pytest.raises(DataError, match="holds the splits: test, train; got 'val'"):
        load_data("fashion-mini:val")
