"""Encoded networks: nothing is lost, zeros cost little, damage is refused."""

import zlib

import pytest
import safetensors.torch
import torch

from secateur.compress import decode, encode, quantise
from secateur.errors import ModelError
from secateur.prune import Fraction, apply_mask, magnitude, select
from secateur.state import generator


def test_nothing_is_lost_and_zeros_cost_little(trained, images):
    mask = select(magnitude.l1(trained, images, generator=generator(0)), Fraction(0.9), scope="global")
    pruned = apply_mask(trained, mask)
    with torch.no_grad():
        pruned.net.bn1.bias[0] = -0.0
    both, few = quantise(pruned, images), quantise(trained, images, weight_bits=3)
    near = [bool(((w.detach() == 0) & (trained.net.get_parameter(name) < 0)).any()) for name, w in few.net.named_parameters()]
    assert any(near)  # small negative weights that became 0
    sizes = []
    for model in (few, trained, pruned, both):
        content = encode(model)
        state = model.net.state_dict()
        back = decode(content)
        assert back.keys() == state.keys()
        for key, value in state.items():
            assert back[key].dtype == value.dtype
            assert back[key].shape == value.shape
            assert back[key].numpy().tobytes() == value.numpy().tobytes(), key
        sizes.append(len(content))
    assert sizes[1] > 1.5 * sizes[2] > 1.5 * sizes[3]


def test_damage_is_refused(trained):
    content = encode(trained)
    with pytest.raises(ModelError, match="no encoded network"):
        decode(b"x" + content)
    with pytest.raises(ModelError, match="must be whole"):
        decode(content[:-10])
    parts = {"values/a": torch.ones(2), "bitmap/a": torch.tensor([255], dtype=torch.uint8), "shape/a": torch.tensor([8])}
    with pytest.raises(ModelError, match="must mark 2 values, got 8"):
        decode(zlib.compress(safetensors.torch.save(parts)))
    parts["shape/a"] = torch.tensor([2**40])
    with pytest.raises(ModelError, match="too short"):
        decode(zlib.compress(safetensors.torch.save(parts)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bitmap/a": torch.ones(1)}, "bitmap of 'a' must be uint8, and its shape int64"),
        ({"bitmap/a": torch.ones(1, dtype=torch.bfloat16)}, "bitmap of 'a' must be uint8, and its shape int64"),
        ({"shape/a": torch.tensor([8.0])}, "bitmap of 'a' must be uint8, and its shape int64"),
        ({"shape/a": torch.tensor([-8])}, "bitmap of 'a' must mark 8 values, got 0"),
        ({"steps/a": torch.ones(1)}, "'a' of shape .8,. must have a step for each row, got .1,."),
        ({"steps/a": torch.ones(10**6), "shape/a": torch.tensor([1, 8])}, "must have a step for each row, got .1000000,."),
    ],
)
def test_hostile_parts_are_refused(change, message):
    good = {"values/a": torch.ones(8), "bitmap/a": torch.tensor([255], dtype=torch.uint8), "shape/a": torch.tensor([8])}
    assert torch.equal(decode(zlib.compress(safetensors.torch.save(good)))["a"], torch.ones(8))
    with pytest.raises(ModelError, match=message):
        decode(zlib.compress(safetensors.torch.save(good | change)))
