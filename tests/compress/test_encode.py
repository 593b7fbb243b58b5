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
    both = quantise(pruned, images)
    sizes = []
    for model in (trained, pruned, both):
        content = encode(model)
        state = model.net.state_dict()
        back = decode(content)
        assert back.keys() == state.keys()
        for key, value in state.items():
            assert back[key].dtype == value.dtype
            assert torch.equal(back[key], value), key
            assert torch.equal(back[key].signbit(), value.signbit()) or value.ndim > 1
        sizes.append(len(content))
    assert sizes[0] > 1.5 * sizes[1] > 1.5 * sizes[2]


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
