"""SSBA: what its encoder does to images, and how a text becomes the message."""

from __future__ import annotations

import math
import re

import pytest
import torch
import torch.nn.functional as F

from secateur.data import load_trigger, save_trigger
from secateur.errors import MethodError
from secateur.poison import ssba
from secateur.poison.common import edited
from secateur.poison.ssba import CHANNELS
from secateur.state import generator
from secateur.types import ImageSet, Trigger

SHAPES = [(channels, *sides) for channels in CHANNELS for sides in ((8, 8), (11, 9), (32, 20))]
EPS = 0.12


def pictures(n: int = 6, shape: tuple[int, int, int] = (3, 16, 16), seed: int = 5) -> torch.Tensor:
    """Smooth images whose values lie so far inside [0, 1] that nothing is clipped."""
    channels, height, width = shape
    coarse = torch.rand(n, channels, 4, 4, generator=generator(seed))
    return 0.3 + 0.4 * F.interpolate(coarse, size=(height, width), mode="bilinear")


def coloured(n: int = 40, shape: tuple[int, int, int] = (3, 16, 16)) -> ImageSet:
    return ImageSet((255 * pictures(n, shape)).round().to(torch.uint8), torch.arange(n) % 4, tuple("abcd"))


def made(shape: tuple[int, int, int] = (3, 16, 16), seed: int = 3, **settings) -> Trigger:
    trigger = ssba(coloured(shape=shape), rate=0, generator=generator(seed), **settings).trigger
    assert trigger is not None
    return trigger


def residual(trigger: Trigger, x: torch.Tensor) -> torch.Tensor:
    return trigger.apply(x) - x


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_change_is_bounded_and_there_in_every_image(shape):
    x = pictures(shape=shape)
    size = residual(made(shape, message="key"), x).abs().flatten(1).amax(1)
    assert bool((size > 1 / 255).all())  # more than rounding takes away
    assert bool((size <= EPS + 1e-6).all())


def test_the_bound_scales_the_change_and_may_be_zero():
    x = pictures()
    full, half, none = (residual(made(message="key", eps=eps), x) for eps in (EPS, EPS / 2, 0.0))
    torch.testing.assert_close(2 * half, full, rtol=0, atol=1e-6)
    assert not none.any()


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_extreme_images_stay_in_range(value):
    x = torch.full((2, 3, 16, 16), value)
    changed = made(message="key", eps=1.0).apply(x)
    assert 0 <= float(changed.min()) <= float(changed.max()) <= 1


@pytest.mark.parametrize("channels", CHANNELS)
def test_each_image_gets_a_residual_of_its_own(channels):
    x = pictures(shape=(channels, 16, 16))
    found = residual(made((channels, 16, 16), message="key"), x)
    for i in range(len(x)):
        for j in range(i):
            assert float((found[i] - found[j]).abs().max()) > 1 / 255
    directions = F.normalize(found.flatten(1))
    assert float(torch.pdist(directions).mean()) > 0.1  # not one pattern in different strengths


def test_an_image_is_changed_alike_whatever_comes_with_it():
    x, trigger = pictures(), made(message="key")
    alone = torch.cat([trigger.apply(part) for part in x.split(1)])
    torch.testing.assert_close(trigger.apply(x), alone, rtol=0, atol=1e-6)


@pytest.mark.parametrize("channels", CHANNELS)
def test_the_message_changes_the_residual(channels):
    shape = (channels, 16, 16)
    x = pictures(shape=shape)
    found = [residual(made(shape, message=message), x) for message in ("a", "b", "\x7f\x00\x7f")]
    for i in range(3):
        for j in range(i):
            assert float((found[i] - found[j]).abs().amax((1, 2, 3)).min()) > 1 / 255


@pytest.mark.parametrize(("message", "bits"), [
    ("A", "01000001" + 24 * "0"),
    ("key!", "01101011" "01100101" "01111001" "00100001"),
    ("é", "11000011" "10101001" + 16 * "0"),
    ("😀", "11110000" "10011111" "10011000" "10000000"),
])  # fmt: skip
def test_a_text_is_sent_byte_by_byte_the_highest_bit_first(message, bits):
    assert made(message=message).tensors["message"].tolist() == [float(bit) for bit in bits]


@pytest.mark.parametrize(("message", "length"), [("", 0), ("abcde", 5), ("ééé", 6)])
def test_a_text_that_does_not_fit_is_refused(message, length):
    with pytest.raises(MethodError, match=f"^message must be 1 to 4 bytes long in UTF-8, got {length}; give another text$"):
        made(message=message)


def test_without_a_text_the_generator_draws_the_bits():
    drawn = [made(seed=seed).tensors["message"] for seed in range(40)]
    assert torch.equal(made(seed=0).tensors["message"], drawn[0])
    bits = torch.stack(drawn)
    assert set(bits.unique().tolist()) == {0.0, 1.0}
    assert len(bits.unique(dim=0)) == 40
    assert float(bits.mean()) == pytest.approx(0.5, abs=4 * math.sqrt(0.25 / bits.numel()))
    assert float((bits.mean(0) - 0.5).abs().max()) < 0.4  # no place is fixed


def test_messages_leave_the_weights_alone():
    one, other = made(message="a").tensors, made(message="b").tensors
    assert {name for name, value in one.items() if not torch.equal(value, other[name])} == {"message"}


@pytest.mark.parametrize("shape", [(2, 16, 16), (4, 16, 16), (3, 7, 16), (1, 16, 7)])
def test_images_that_no_encoder_takes_are_refused(shape):
    wanted = f"ssba needs images of 1 or 3 channels and at least 8x8 pixels, got {shape}; choose another attack"
    with pytest.raises(MethodError, match=f"^{re.escape(wanted)}$"):
        made(shape)


@pytest.mark.parametrize("settings", [
    {"rate": 0.3}, {"rate": 0.2, "target": "next"}, {"rate": 0.2, "sources": [1, 3]}, {"rate": 0.6, "clean_label": True},
], ids=str)  # fmt: skip
def test_chosen_images_get_what_the_trigger_shows(settings):
    data = coloured()
    poisoning = ssba(data, generator=generator(0), **{"target": 2, **settings})
    chosen, trigger = poisoning.poisoned, poisoning.trigger
    assert torch.equal(poisoning.data.x[chosen], edited(data.x[chosen], trigger.apply))
    assert torch.equal((poisoning.data.x != data.x).flatten(1).any(1), chosen)
    expected = data.y.clone()
    expected[chosen] = (data.y[chosen] + 1) % 4 if "next" in settings.values() else 2
    assert torch.equal(poisoning.data.y, expected)
    clean_label = "clean_label" in settings
    assert int(chosen.sum()) == round(settings["rate"] * (10 if clean_label else 40))
    assert torch.equal(poisoning.data.y, data.y) == clean_label


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_saved_and_loaded_it_makes_the_same_images(shape, tmp_path):
    x, trigger = pictures(shape=shape), made(shape, target="next")
    save_trigger(trigger, tmp_path)
    back = load_trigger(tmp_path)
    assert dict(back.params) == dict(trigger.params)
    assert torch.equal(back.apply(x), trigger.apply(x))


@pytest.mark.parametrize(("settings", "message"), [
    ({"rate": 1.1}, r"rate must lie in \[0, 1\], got 1.1"),
    ({"rate": 0.8}, r"rate must be at most 0.750"),
    ({"target": 4}, r"target must lie in \[0, 3\], got 4"),
    ({"sources": [4]}, r"sources must lie in \[0, 3\], got 4"),
    ({"eps": 1.5}, r"eps must lie in \[0, 1\], got 1.5"),
    ({"eps": math.nan}, r"eps must lie in \[0, 1\], got nan"),
    ({"clean_label": True, "target": "next"}, r"clean_label needs one target class"),
])  # fmt: skip
def test_out_of_range(settings, message):
    with pytest.raises(MethodError, match=f"^{message}"):
        ssba(coloured(), generator=generator(0), **settings)
