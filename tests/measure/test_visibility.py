"""What a trigger changes, against a slow implementation of the formulas and against numbers known beforehand."""

from __future__ import annotations

import importlib
import math

import pytest
import torch

from secateur.errors import DataError, InconclusiveError
from secateur.measure import Visibility, visibility
from secateur.measure.visibility import compare, ssim
from secateur.state import generator
from secateur.types import ImageSet, Trigger

CLASSES = ("a", "b", "c")


def around(place: int, side: int) -> list[tuple[int, float]]:
    """The places that the window around one covers, those beyond the image mirrored, with their weights."""
    reach = min(5, side - 1)
    found = []
    for step in range(-reach, reach + 1):
        at = place + step
        at = -at if at < 0 else 2 * (side - 1) - at if at >= side else at
        found.append((at, math.exp(-step * step / (2 * 1.5**2))))
    return found


def slow_ssim(x: torch.Tensor, y: torch.Tensor) -> float:
    """Pixel by pixel, from means, variances and covariance of the window around it."""
    values = []
    for a, b in zip(x.double(), y.double(), strict=True):
        for i in range(x.shape[1]):
            for j in range(x.shape[2]):
                rows, columns = around(i, x.shape[1]), around(j, x.shape[2])
                weights = torch.tensor([[v * w for _, w in columns] for _, v in rows], dtype=torch.float64)
                weights /= weights.sum()
                p, q = (image[[at for at, _ in rows]][:, [at for at, _ in columns]] for image in (a, b))
                mean_p, mean_q = (weights * p).sum(), (weights * q).sum()
                var_p, var_q = (weights * (p - mean_p) ** 2).sum(), (weights * (q - mean_q) ** 2).sum()
                shared = (weights * (p - mean_p) * (q - mean_q)).sum()
                light = (2 * mean_p * mean_q + 1e-4) / (mean_p**2 + mean_q**2 + 1e-4)
                values.append(float(light * (2 * shared + 9e-4) / (var_p + var_q + 9e-4)))
    return sum(values) / len(values)


@pytest.mark.parametrize("shape", [(3, 14, 12), (1, 11, 7), (2, 8, 8), (1, 4, 13), (2, 1, 1)])
def test_ssim_is_the_formula_pixel_by_pixel(shape):
    draw = generator(1)
    x = torch.rand(3, *shape, generator=draw)
    y = (x + 0.4 * torch.rand(3, *shape, generator=draw) - 0.2).clamp(0, 1)
    y[2] = 1 - x[2]
    found = ssim(x, y)
    assert found.dtype == torch.float64
    assert found.tolist() == pytest.approx([slow_ssim(*pair) for pair in zip(x, y, strict=True)], abs=1e-12)
    assert torch.allclose(ssim(y, x), found, rtol=0, atol=1e-12)


def test_ssim_as_torchmetrics_computes_it():
    """structural_similarity_index_measure(x, y, data_range=1.0) of version 1.9.0."""
    c, i, j = torch.meshgrid(torch.arange(3), torch.arange(16), torch.arange(20), indexing="ij")
    x = ((7 * i + 13 * j + 5 * c) % 32).double() / 31
    y = (x + ((3 * i + j * j + c) % 5 - 2).double() / 20).clamp(0, 1)
    assert float(ssim(x.unsqueeze(0), y.unsqueeze(0))) == pytest.approx(0.9742954616023629, abs=1e-12)


def test_flat_images_differ_only_in_brightness():
    x, y = torch.full((1, 3, 16, 16), 0.2), torch.full((1, 3, 16, 16), 0.7)
    assert float(ssim(x, y)) == pytest.approx((2 * 0.2 * 0.7 + 1e-4) / (0.2**2 + 0.7**2 + 1e-4), abs=1e-6)


def test_nothing_changed_is_exactly_one():
    x = torch.rand(5, 3, 32, 32, generator=generator(0))
    assert compare(x, x) == Visibility(0.0, 0.0, 1.0, 5)


def test_a_change_in_a_corner_counts_like_one_inside():
    x = torch.full((2, 1, 32, 32), 0.5)
    y = x.clone()
    y[0, 0, 31, 31] = y[1, 0, 16, 16] = 1
    corner, inside = (1 - ssim(x, y)).tolist()
    assert 0.2 < corner / inside < 1


def test_norms_are_means_over_images():
    x = torch.full((2, 1, 12, 12), 0.5)
    y = x.clone()
    y[0, 0, 0, :4] += 0.25  # norm 0.5
    y[1, 0, 3, 3] -= 0.5
    found = compare(x, y)
    assert (found.l2, found.linf, found.n) == (0.5, (0.25 + 0.5) / 2, 2)


@pytest.mark.parametrize("size", [1, 200, 10**9])
def test_the_number_of_images_at_once_does_not_matter(monkeypatch, size):
    draw = generator(2)
    x, y = torch.rand(2, 9, 1, 12, 12, generator=draw)
    whole = [*((y - x).flatten(1).double().norm(dim=1)).tolist()]
    monkeypatch.setattr(importlib.import_module("secateur.measure.visibility"), "PIXELS", size)
    found = compare(x, y)
    assert found.l2 == pytest.approx(sum(whole) / 9, abs=1e-12)
    assert found.linf == pytest.approx(float((y - x).abs().flatten(1).amax(dim=1).mean()), abs=1e-7)
    assert found.ssim == pytest.approx(float(ssim(x, y).mean()), abs=1e-12)
    assert found.n == 9


def corner(target, sources=None) -> Trigger:
    mask = torch.zeros(1, 12, 12)
    mask[0, 11, 11] = 1
    return Trigger("blend", {"alpha": 1.0, "classes": 3}, {"mask": mask, "pattern": torch.ones(1, 12, 12)}, target, sources)


def grey(values: list[int], y: list[int]) -> ImageSet:
    x = torch.tensor(values, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 12, 12).contiguous()
    return ImageSet(x, torch.tensor(y, dtype=torch.int64), CLASSES)


def test_only_eligible_images_count():
    data = grey([0, 51, 102, 255], [0, 1, 2, 1])
    found = visibility(corner(1), data)
    assert found.n == 2
    assert (found.l2, found.linf) == (pytest.approx((1 + 0.6) / 2), pytest.approx((1 + 0.6) / 2))
    assert 0 < found.ssim < 1
    assert visibility(corner("next"), data).n == 4
    assert visibility(corner(0, (2,)), data).linf == pytest.approx(0.6)


def test_changes_below_a_whole_pixel_value_count():
    trigger = Trigger("add", {"classes": 3}, {"pattern": torch.full((1, 12, 12), 0.001)}, 0)
    assert visibility(trigger, grey([100, 100], [1, 2])).linf == pytest.approx(0.001, abs=1e-7)


def test_nobody_eligible():
    with pytest.raises(InconclusiveError, match="no image is eligible"):
        visibility(corner(1), grey([0, 0], [1, 1]))
    with pytest.raises(InconclusiveError, match="no image is eligible"):
        visibility(corner(0), grey([], []))
    with pytest.raises(InconclusiveError, match="at least one image, got 0"):
        compare(torch.zeros(0, 1, 12, 12), torch.zeros(0, 1, 12, 12))


def test_images_that_cannot_be_compared():
    with pytest.raises(DataError, match=r"must have the same shape, got \(2, 1, 4, 4\) and \(2, 1, 4, 5\)"):
        compare(torch.zeros(2, 1, 4, 4), torch.zeros(2, 1, 4, 5))
    with pytest.raises(DataError, match="this trigger is for images of shape"):
        visibility(corner(0), ImageSet(torch.zeros(2, 1, 8, 8, dtype=torch.uint8), torch.tensor([1, 2]), CLASSES))
