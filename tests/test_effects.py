"""The formulas of triggers against slow, independent arithmetic."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur import effects
from secateur.errors import MethodError
from secateur.state import generator

X = torch.rand(3, 2, 7, 5, generator=generator(0))


def dithered(image: list[list[float]], levels: int) -> list[list[float]]:
    """Floyd and Steinberg, pixel by pixel in reading order."""
    height, width = len(image), len(image[0])
    rest = [[value * (levels - 1) for value in row] for row in image]
    for i in range(height):
        for j in range(width):
            old = rest[i][j]
            new = min(max(float(round(old)), 0.0), levels - 1.0)
            rest[i][j] = new
            for di, dj, share in ((0, 1, 7), (1, -1, 3), (1, 0, 5), (1, 1, 1)):
                if i + di < height and 0 <= j + dj < width:
                    rest[i + di][j + dj] += (old - new) * share / 16
    return [[value / (levels - 1) for value in row] for row in rest]


@pytest.mark.parametrize("shape", [(1, 1), (1, 6), (6, 1), (2, 2), (7, 5), (5, 9)])
@pytest.mark.parametrize("levels", [2, 3, 8])
def test_dithering_is_that_of_floyd_and_steinberg(shape, levels):
    x = torch.rand(4, 2, *shape, generator=generator(1)).double()
    found = effects.quantise(x, levels, dither=True)
    wanted = [[dithered(plane.tolist(), levels) for plane in image] for image in x]
    assert torch.allclose(found, torch.tensor(wanted).double(), atol=1e-9)


def test_dithering_keeps_the_mean_of_a_grey_area():
    x = torch.full((1, 1, 64, 64), 0.3)
    assert float(effects.quantise(x, 2, dither=True).mean()) == pytest.approx(0.3, abs=0.02)
    assert float(effects.quantise(x, 2, dither=False).mean()) == 0.0


@pytest.mark.parametrize("dither", [False, True])
@pytest.mark.parametrize("levels", [2, 8, 256])
def test_only_the_levels_are_left(levels, dither):
    values = effects.quantise(X, levels, dither=dither) * (levels - 1)
    assert torch.allclose(values, values.round(), atol=1e-4)
    assert 0 <= float(values.min()) <= float(values.max()) <= levels - 1


def test_all_levels_change_nothing():
    whole = torch.arange(256).view(1, 1, 16, 16) / 255
    for dither in (False, True):
        assert torch.allclose(effects.quantise(whole, 256, dither=dither), whole, atol=1e-6)


def identity(h: int, w: int) -> torch.Tensor:
    y, x = torch.meshgrid(torch.linspace(-1, 1, h), torch.linspace(-1, 1, w), indexing="ij")
    return torch.stack([x, y], -1)


def test_the_identity_grid_warps_nothing():
    assert torch.allclose(effects.warp(X, identity(7, 5)), X, atol=1e-6)


def test_a_grid_reads_where_it_says():
    grid = identity(7, 5)
    grid[0, 0] = torch.tensor([1.0, -1.0])  # top right
    grid[6, 4] = torch.tensor([0.25, 0.0])  # the middle row, between columns 2 and 3
    grid[3, 3] = torch.tensor([9.0, 9.0])  # outside: the border repeats
    shown = effects.warp(X, grid)
    assert torch.allclose(shown[:, :, 0, 0], X[:, :, 0, 4], atol=1e-6)
    assert torch.allclose(shown[:, :, 6, 4], (X[:, :, 3, 2] + X[:, :, 3, 3]) / 2, atol=1e-6)
    assert torch.allclose(shown[:, :, 3, 3], X[:, :, 6, 4], atol=1e-6)


def test_every_image_may_have_its_own_grid():
    grids = torch.stack([identity(7, 5), identity(7, 5).flip(1), identity(7, 5).flip(0)])
    shown = effects.warp(X, grids)
    assert torch.allclose(shown[0], X[0], atol=1e-6)
    assert torch.allclose(shown[1], X[1].flip(-1), atol=1e-6)
    assert torch.allclose(shown[2], X[2].flip(-2), atol=1e-6)


RESIDUAL = {"net": "residual", "channels": 2, "width": 3, "eps": 0.1, "bits": 0}
STAMP = {"net": "stamp", "channels": 2, "width": 3}


def weights(params: dict) -> dict[str, torch.Tensor]:
    draw = generator(2)
    wanted = effects.build_net(params).state_dict()
    return {name: 0.2 * torch.randn(tuple(value.shape), generator=draw) for name, value in wanted.items()}


@pytest.mark.parametrize("params", [RESIDUAL, {**RESIDUAL, "bits": 4}, STAMP], ids=["residual", "bits", "stamp"])
@pytest.mark.parametrize("shape", [(4, 4), (7, 5), (32, 32)])
def test_generators_take_images_of_any_size_one_by_one(params, shape):
    x = torch.rand(3, 2, *shape, generator=generator(4))
    tensors = weights(params)
    together = effects.generate(x, params, tensors)
    alone = torch.cat([effects.generate(image[None], params, tensors) for image in x])
    assert together.shape == x.shape
    assert torch.allclose(together, alone, atol=1e-4)
    assert 0 <= float(together.min()) <= float(together.max()) <= 1
    if params["net"] == "residual":
        assert float((together - x).abs().max()) <= 0.1 + 1e-6


def test_generators_leave_the_random_state_and_the_gradients_alone():
    before = torch.get_rng_state()
    tensors = weights(STAMP)
    x = X.clone().requires_grad_(True)
    effects.generate(x, STAMP, tensors).sum().backward()
    assert torch.equal(before, torch.get_rng_state())
    assert x.grad is not None
    assert not any(value.requires_grad for value in tensors.values())


@pytest.mark.parametrize(("changes", "message"), [
    ({"net": "unet"}, "unknown generator net 'unet'"),
    ({"net": None}, "unknown generator net"),
    ({"width": 100_000}, r"width must lie in \[1, 256\], got 100000"),
    ({"channels": 0}, r"channels must lie in \[1, 64\]"),
    ({"bits": 10**9}, r"bits must lie in \[0, 256\]"),
    ({"eps": math.nan}, r"eps must lie in \[0, 1\]"),
    ({"width": "8"}, "width of a generator must be a number, got '8'"),
    ({"width": 8.5}, "width of a generator must be a number, got 8.5"),
])  # fmt: skip
def test_generators_out_of_range(changes, message):
    with pytest.raises(MethodError, match=message):
        effects.build_net({**RESIDUAL, **changes})


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 6), st.integers(1, 6), st.integers(2, 9), st.integers(0, 2**31))
def test_dithering_by_diagonals_of_any_shape(height, width, levels, seed):
    x = torch.rand(1, 1, height, width, generator=generator(seed)).double()
    wanted = torch.tensor(dithered(x[0, 0].tolist(), levels)).double()
    assert torch.allclose(effects.quantise(x, levels, dither=True)[0, 0], wanted, atol=1e-9)
