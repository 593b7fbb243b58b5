"""Augmentation equals a slow loop over images, and is fair and repeatable."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import pad

from secateur.data import augment, random_crop, random_flip
from secateur.errors import DataError, MethodError
from secateur.state import generator


def images(n: int = 40, c: int = 3, h: int = 7, w: int = 9, dtype: torch.dtype = torch.uint8) -> torch.Tensor:
    return torch.randint(1, 256, (n, c, h, w), generator=generator(0)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize("channels", [1, 3, 5])
@pytest.mark.parametrize("padding", [0, 1, 4, 11])
def test_crop_equals_a_loop_over_images(dtype, channels, padding):
    x = images(c=channels, dtype=dtype)
    offsets = torch.randint(2 * padding + 1, (2, len(x)), generator=generator(5))
    padded = pad(x, [padding] * 4)
    expected = [padded[i, :, r : r + 7, c : c + 9] for i, (r, c) in enumerate(offsets.T.tolist())]
    assert torch.equal(random_crop(x, padding, generator=generator(5)), torch.stack(expected))


def test_crop_reaches_every_offset_and_differs_between_images():
    x = torch.zeros(2000, 1, 3, 3, dtype=torch.uint8)
    x[:, :, 1, 1] = 1
    where = random_crop(x, 1, generator=generator(0)).flatten(1).float().mean(0)
    assert where.sum() == pytest.approx(1)
    assert where.min() > 0.07
    assert where.max() < 0.16


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_memory_layout_does_not_matter(layout):
    x = images().contiguous(memory_format=layout)
    assert torch.equal(
        augment(x, ["crop", "flip"], generator=generator(1)), augment(images(), ["crop", "flip"], generator=generator(1))
    )


def test_flip_mirrors_about_half():
    x = images(n=2000, c=1, h=2, w=4)
    y = random_flip(x, generator=generator(3))
    mirrored = (y == x.flip(3)).flatten(1).all(1)
    same = (y == x).flatten(1).all(1)
    assert (mirrored | same).all()
    assert 0.45 < mirrored.float().mean() < 0.55


def test_same_generator_same_result_and_input_is_kept():
    x = images(h=16, w=16)
    before = x.clone()
    first, second = (augment(x, ["flip", "crop"], generator=generator(9)) for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(first, x)
    assert torch.equal(x, before)
    assert first.dtype == x.dtype


def test_no_names_no_change():
    x = images()
    assert augment(x, [], generator=generator(0)) is x


def test_empty_batches_pass():
    assert augment(images(h=16, w=16)[:0], ["crop", "flip"], generator=generator(0)).shape == (0, 3, 16, 16)


def test_errors():
    with pytest.raises(MethodError, match="did you mean 'flip'"):
        augment(images(), ["flop"], generator=generator(0))
    with pytest.raises(DataError, match=r"\(n, c, h, w\), got \(3, 7, 9\)"):
        random_flip(images()[0], generator=generator(0))
    with pytest.raises(DataError, match="at least 0 pixels, got -1"):
        random_crop(images(), -1, generator=generator(0))
