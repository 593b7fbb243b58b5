"""The budget holds exactly, in float32 and in float64, for awkward eps and images; what comes out lies in [0, 1]."""

import math

import pytest
import torch
from attacked_models import distance
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur.attack.ball import Ball, unit
from secateur.state import generator


@settings(max_examples=60, deadline=None)
@given(eps=st.floats(0, 1), seed=st.integers(0, 1000), norm=st.sampled_from(["linf", "l2"]))
def test_no_rounding_overshoots(eps, seed, norm):
    draw = generator(seed)
    x = torch.rand(6, 2, 5, 4, generator=draw)
    x[0], x[1], x[2] = 0, 1, x[2] * 1e-6
    ball = Ball(x, eps, norm)
    for points in (ball.project(x + 4 * torch.randn(x.shape, generator=draw)), ball.draw(draw)):
        assert points.dtype == torch.float32
        assert 0 <= float(points.min()) <= float(points.max()) <= 1
        assert float(distance(points, x, norm).max()) <= eps
        change = (points - x).flatten(1)
        assert float((change.abs().amax(dim=1) if norm == "linf" else change.norm(dim=1)).max()) <= eps


@pytest.mark.parametrize("eps", [k / 255 for k in (1, 2, 4, 8, 16)])
def test_the_plain_clip_overshoots_and_this_does_not(eps):
    """What libraries do, so that the test above could fail."""
    x = torch.rand(50, 1, 9, 9, generator=generator(0))
    plain = torch.clamp(x + 1, x - eps, x + eps).clamp(0, 1)
    assert float(distance(plain, x, "linf").max()) > eps
    exact = Ball(x, eps, "linf").project(x + 1)
    assert float(distance(exact, x, "linf").max()) <= eps
    assert float((plain - exact).abs().max()) < 1e-7


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_projection_reaches_the_border_and_keeps_what_is_inside(norm):
    x = torch.full((4, 1, 6, 6), 0.5)
    ball = Ball(x, 0.2, norm)
    far = ball.project(x + torch.randn(x.shape, generator=generator(0)))
    assert distance(far, x, norm) == pytest.approx(torch.full((4,), 0.2).double(), rel=1e-5)
    assert torch.equal(ball.project(far), far)
    near = x + 0.01 * torch.randn(x.shape, generator=generator(1))
    assert torch.equal(ball.project(near), near)


def test_l2_projection_is_the_nearest_point_where_nothing_is_clipped():
    x = torch.full((3, 1, 4, 4), 0.5)
    change = torch.randn(x.shape, generator=generator(0))
    expected = x + 0.2 * change / change.flatten(1).norm(dim=1)[:, None, None, None]
    assert torch.allclose(Ball(x, 0.2, "l2").project(x + change), expected, atol=1e-6)


def test_draws_fill_the_ball_uniformly():
    """The share of points within half the radius is 2^-d; for a cube each coordinate is uniform."""
    x = torch.full((20_000, 1, 1, 2), 0.5)
    radii = distance(Ball(x, 0.2, "l2").draw(generator(0)), x, "l2")
    assert float((radii < 0.1).double().mean()) == pytest.approx(0.25, abs=0.015)
    drawn = (Ball(x, 0.2, "linf").draw(generator(0)) - x).flatten()
    assert float((drawn < 0.1).double().mean()) == pytest.approx(0.75, abs=0.015)


def test_a_part_of_a_ball_projects_as_the_whole_does():
    x, rows = torch.rand(8, 1, 3, 3, generator=generator(0)), torch.tensor([5, 2])
    far = x + torch.randn(x.shape, generator=generator(1))
    for norm in ("linf", "l2"):
        ball = Ball(x, 0.1, norm)
        assert torch.equal(ball.subset(rows).project(far[rows]), ball.project(far)[rows])


def test_tiny_slopes_still_have_a_direction_and_none_has_none():
    slope = torch.randn(3, 1, 4, 4, generator=generator(0))
    tiny = slope * 1e-30
    tiny[2] = 0
    found = unit(tiny)
    assert torch.allclose(found[:2], unit(slope)[:2], atol=1e-5)
    assert float(found[2].abs().max()) == 0
    assert math.isclose(float(found[0].norm()), 1, rel_tol=1e-5)
