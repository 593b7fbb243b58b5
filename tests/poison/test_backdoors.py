"""Poisoned sets pixel by pixel."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from secateur.errors import DataError, MethodError
from secateur.poison import badnets, blended
from secateur.poison.common import edited
from secateur.state import generator
from secateur.types import ImageSet, Poisoning, Trigger, to_float

ATTACKS = {"badnets": badnets, "blended": blended}


def noise(n: int = 100, classes: int = 4, shape: tuple[int, int, int] = (3, 8, 10)) -> ImageSet:
    x = torch.randint(1, 255, (n, *shape), generator=generator(9)).to(torch.uint8)  # neither black nor white
    return ImageSet(x, torch.arange(n) % classes, tuple("abcdef"[:classes]), "noise")


def differs(data: ImageSet, poisoning: Poisoning) -> torch.Tensor:
    return (data.x != poisoning.data.x).flatten(1).any(dim=1)


@pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS)
@pytest.mark.parametrize(("rate", "count"), [(0.0, 0), (0.01, 1), (0.1, 10), (0.333, 33), (0.75, 75)])
def test_exactly_the_share_asked_for(attack, rate, count):
    data = noise()
    poisoning = attack(data, rate=rate, target=1, generator=generator(0))
    assert int(poisoning.poisoned.sum()) == count
    assert torch.equal(differs(data, poisoning), poisoning.poisoned)
    assert torch.equal(poisoning.data.y != data.y, poisoning.poisoned)
    assert bool((poisoning.data.y[poisoning.poisoned] == 1).all())
    assert bool((data.y[poisoning.poisoned] != 1).all())
    assert poisoning.data.name == "noise, poisoned"


@pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS)
def test_the_clean_set_is_left_alone(attack):
    data = noise()
    x, y, state = data.x.clone(), data.y.clone(), torch.get_rng_state()
    attack(data, rate=0.5, generator=generator(0))
    assert torch.equal(data.x, x)
    assert torch.equal(data.y, y)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS)
def test_same_generator_same_set(attack):
    data = noise()
    one, two, other = (attack(data, rate=0.3, generator=generator(seed)) for seed in (0, 0, 1))
    assert one.data.sha256 == two.data.sha256 != other.data.sha256
    assert not torch.equal(one.poisoned, other.poisoned)
    assert all(torch.equal(value, two.trigger.tensors[name]) for name, value in one.trigger.tensors.items())


@pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS)
def test_all_to_all_moves_each_class_on(attack):
    data = noise()
    poisoning = attack(data, rate=1.0, target="next", generator=generator(0))
    assert bool(poisoning.poisoned.all())
    assert torch.equal(poisoning.data.y, (data.y + 1) % 4)


@pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS)
def test_only_sources_are_poisoned(attack):
    data = noise()
    poisoning = attack(data, rate=0.3, target=0, sources=[2, 3, 0], generator=generator(0))
    assert set(data.y[poisoning.poisoned].tolist()) == {2, 3}
    assert poisoning.trigger.sources == (2, 3, 0)
    assert poisoning.trigger.eligible(torch.tensor([0, 1, 2, 3])).tolist() == [False, False, True, True]


@pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS)
def test_the_trigger_reproduces_the_poisoned_pixels(attack):
    data = noise()
    poisoning = attack(data, rate=0.2, generator=generator(0))
    chosen = poisoning.poisoned
    assert torch.equal(edited(data.x[chosen], poisoning.trigger.apply), poisoning.data.x[chosen])


WHITE = [[255] * 3] * 3
CHECKER = [[255, 0, 255], [0, 255, 0], [255, 0, 255]]
GRID = [[0, 0, 255], [0, 255, 0], [255, 0, 255]]


@pytest.mark.parametrize(("pattern", "patch"), [("white", WHITE), ("checker", CHECKER), ("grid", GRID)])
@pytest.mark.parametrize(("place", "row", "column"), [
    ("bottom-right", 4, 6), ("bottom-left", 4, 1), ("top-right", 1, 6), ("top-left", 1, 1),
])  # fmt: skip
def test_patch_lies_exactly_where_said(pattern, patch, place, row, column):
    data = noise()  # 8 x 10 pixels
    poisoning = badnets(data, rate=0.2, pattern=pattern, place=place, generator=generator(0))
    expected = data.x[poisoning.poisoned].clone()
    expected[:, :, row : row + 3, column : column + 3] = torch.tensor(patch, dtype=torch.uint8)
    assert torch.equal(poisoning.data.x[poisoning.poisoned], expected)


@pytest.mark.parametrize(("size", "margin"), [(1, 0), (8, 0), (1, 7), (2, 3)])
def test_patch_size_and_margin(size, margin):
    data = noise()
    poisoning = badnets(data, rate=0.1, size=size, margin=margin, generator=generator(0))
    changed = (poisoning.data.x != data.x)[poisoning.poisoned].all(dim=0)
    assert int(changed[0].sum()) == size * size
    assert changed[0].nonzero().amax(dim=0).tolist() == [7 - margin, 9 - margin]


@pytest.mark.parametrize(("shape", "rows", "columns"), [((3, 8, 10), (2, 5), (3, 6)), ((1, 9, 9), (3, 6), (3, 6))])
def test_a_patch_in_the_center(shape, rows, columns):
    mask = badnets(noise(shape=shape), rate=0, place="center", generator=generator(0)).trigger.tensors["mask"]
    expected = torch.zeros_like(mask)
    expected[:, slice(*rows), slice(*columns)] = 1
    assert torch.equal(mask, expected)


def test_a_patch_of_random_colours():
    one, two = (badnets(noise(), rate=0, pattern="random", generator=generator(seed)).trigger for seed in (0, 1))
    patch = one.tensors["pattern"][:, 4:7, 6:9]
    assert len(patch.unique()) > 20
    assert torch.equal((255 * patch).round() / 255, patch)
    assert not torch.equal(patch, two.tensors["pattern"][:, 4:7, 6:9])


@pytest.mark.parametrize(("mode", "channels"), [("RGB", 3), ("L", 3), ("RGB", 1), ("L", 1)])
def test_a_picture_as_patch(mode, channels, tmp_path):
    pixels = torch.randint(256, (4, 4, 3) if mode == "RGB" else (4, 4), generator=generator(2), dtype=torch.uint8)
    Image.fromarray(pixels.numpy()).save(tmp_path / "patch.png")
    data = noise(shape=(channels, 8, 10))
    patch = badnets(data, rate=0, pattern=str(tmp_path / "patch.png"), size=4, generator=generator(0)).trigger.tensors[
        "pattern"
    ]
    wanted = (pixels.permute(2, 0, 1) if mode == "RGB" else pixels.unsqueeze(0)).float() / 255
    wanted = wanted.mean(0, keepdim=True) if channels == 1 else wanted.expand(3, -1, -1)
    assert torch.allclose(patch[:, 3:7, 5:9], wanted, atol=1e-6)


def test_a_picture_that_is_none(tmp_path):
    (tmp_path / "patch.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match="1 of 1 images cannot be read"):
        badnets(noise(), pattern=str(tmp_path / "patch.png"), generator=generator(0))


def test_only_floats_get_a_trigger():
    trigger = badnets(noise(), generator=generator(0)).trigger
    for x in (noise().x, torch.zeros(3, 8, 10)):
        with pytest.raises(DataError, match=r"^images must be float \(n, c, h, w\) in \[0, 1\], got .*; use to_float$"):
            trigger.apply(x)


def test_patch_on_one_channel():
    data = noise(shape=(1, 6, 6))
    poisoning = badnets(data, rate=0.1, size=2, margin=0, generator=generator(0))
    assert bool((poisoning.data.x[poisoning.poisoned][:, 0, 4:, 4:] == 255).all())


@pytest.mark.parametrize("alpha", [0.0, 0.1, 0.5, 1.0])
def test_blended_by_formula_within_rounding(alpha):
    data = noise()
    poisoning = blended(data, rate=0.2, alpha=alpha, generator=generator(0))
    picture = poisoning.trigger.tensors["pattern"].double()
    before, after = (d.x[poisoning.poisoned].double() for d in (data, poisoning.data))
    assert float((after - (1 - alpha) * before - alpha * 255 * picture).abs().max()) <= 0.5 + 1e-3
    assert float(picture.mean()) == pytest.approx(0.5, abs=4 * math.sqrt(1 / 12 / picture.numel()))
    assert float(picture.min()) >= 0
    assert float(picture.max()) <= 1


@pytest.mark.parametrize(("attack", "arguments", "message"), [
    (badnets, {"rate": 1.1}, r"rate must lie in \[0, 1\], got 1.1"),
    (badnets, {"rate": -0.1}, r"rate must lie in \[0, 1\], got -0.1"),
    (badnets, {"rate": math.nan}, r"rate must lie in \[0, 1\], got nan"),
    (badnets, {"rate": 0.8}, r"rate must be at most 0.750 \(the eligible share\), got 0.8"),
    (badnets, {"rate": 0.3, "sources": [1]}, r"rate must be at most 0.250"),
    (badnets, {"sources": []}, r"sources must be different classes, at least one, got \[\]; leave it out for all"),
    (badnets, {"sources": [1, 1]}, r"sources must be different classes, at least one, got \[1, 1\]"),
    (badnets, {"sources": ["1"]}, r"sources must be whole numbers, got '1'"),
    (badnets, {"target": 1.5}, r"target must be whole numbers, got 1.5"),
    (badnets, {"rate": 0.001}, r"rate 0.001 is less than one image of 100; give more images, or 0 to poison none"),
    (badnets, {"rate": 0.01, "clean_label": True}, r"rate 0.01 is less than one image of 25"),
    (badnets, {"target": 4}, r"target must lie in \[0, 3\], got 4"),
    (badnets, {"target": -1}, r"target must lie in \[0, 3\], got -1"),
    (badnets, {"sources": [1, 4]}, r"sources must lie in \[0, 3\], got 4"),
    (badnets, {"size": 0}, r"size must lie in \[1, 7\], got 0"),
    (badnets, {"size": 8}, r"size must lie in \[1, 7\], got 8"),
    (badnets, {"margin": -1}, r"margin must lie in \[0, 7\], got -1"),
    (badnets, {"margin": 8, "size": 1}, r"margin must lie in \[0, 7\], got 8"),
    (badnets, {"place": "bottomright"}, r"unknown place 'bottomright'; did you mean 'bottom-right'"),
    (badnets, {"pattern": "whit"}, r"pattern must be white, checker, grid, random or an image file, got whit"),
    (blended, {"alpha": 1.5}, r"alpha must lie in \[0, 1\], got 1.5"),
    (blended, {"target": 9}, r"target must lie in \[0, 3\], got 9"),
])  # fmt: skip
def test_out_of_range(attack, arguments, message):
    with pytest.raises(MethodError, match=f"^{message}"):
        attack(noise(), generator=generator(0), **arguments)


@pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS)
def test_an_empty_set_stays_empty(attack):
    data = noise().subset(torch.zeros(0, dtype=torch.int64))
    assert len(attack(data, generator=generator(0)).data) == 0


def test_trigger_of_another_shape_is_refused():
    trigger = badnets(noise(), generator=generator(0)).trigger
    with pytest.raises(DataError, match=r"for images of shape \(3, 8, 10\), got \(3, 8, 8\)"):
        trigger.apply(torch.zeros(2, 3, 8, 8))


PIXELS = st.lists(st.floats(0, 1, width=32), min_size=4, max_size=4)


def square(values: list[float]) -> torch.Tensor:
    return torch.tensor(values).reshape(1, 2, 2)


@settings(max_examples=150, deadline=None)
@given(PIXELS, PIXELS, PIXELS, st.floats(0, 1))
def test_blending_stays_in_range_and_between_its_ends(x, mask, pattern, alpha):
    trigger = Trigger("blend", {"alpha": alpha}, {"mask": square(mask), "pattern": square(pattern)}, 0)
    images = square(x)[None]
    before = images.clone()
    result = trigger.apply(images)
    assert torch.equal(images, before)
    assert float(result.min()) >= 0
    assert float(result.max()) <= 1
    assert bool((result >= images.minimum(square(pattern)) - 1e-6).all())
    assert bool((result <= images.maximum(square(pattern)) + 1e-6).all())


@settings(max_examples=60, deadline=None)
@given(PIXELS, st.lists(st.floats(-1, 1, width=32), min_size=4, max_size=4))
def test_adding_clips(x, pattern):
    trigger = Trigger("add", {}, {"pattern": square(pattern)}, 0)
    images = square(x)[None]
    before = images.clone()
    expected = [min(1.0, max(0.0, a + b)) for a, b in zip(x, pattern, strict=True)]
    assert trigger.apply(images).flatten().tolist() == pytest.approx(expected, abs=1e-6)
    assert torch.equal(images, before)


def test_whole_pixels_survive_a_trigger_that_does_nothing():
    every = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    nothing = Trigger("blend", {"alpha": 0.0}, {"mask": torch.ones(1, 16, 16), "pattern": torch.ones(1, 16, 16)}, 0)
    assert torch.equal(edited(every, nothing.apply), every)
    assert float(to_float(every).max()) == 1.0
