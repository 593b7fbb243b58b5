"""Removal on a classifier: what left, what stays masked, and why."""

from __future__ import annotations

import pytest
import torch

from secateur.compress import remove_channels
from secateur.errors import ModelError
from secateur.measure import cost
from secateur.models import Classifier, build
from secateur.prune import Fraction, apply_mask, select
from secateur.prune.magnitude import l1
from secateur.types import ChannelMask

SHAPE = (1, 12, 12)


def bits(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.bool)


def test_masked_is_removed_on_a_classifier(tiny, images, gen):
    model = tiny()
    mask = select(l1(model, images, granularity="channel", generator=gen), Fraction(0.5))
    masked = apply_mask(model, mask)
    removal = remove_channels(masked, mask, SHAPE)
    assert isinstance(removal.model, Classifier)
    x, _ = next(images.batches(64))
    assert torch.allclose(removal.model(x), masked(x), atol=1e-5)
    assert not torch.allclose(removal.model(x), model(x), atol=1e-2)
    assert removal.notes == ()
    assert dict(removal.mask.keep) == {}
    assert {name: kept.tolist() for name, kept in removal.kept.items()} == {
        name: keep.nonzero().flatten().tolist() for name, keep in mask.keep.items()
    }


def test_parameters_and_work_fall_as_computed(tiny):
    model = tiny()
    mask = ChannelMask({"bn1": bits(1, 0, 1, 0)})
    before, after = cost(model, SHAPE), cost(remove_channels(apply_mask(model, mask), mask, SHAPE).model, SHAPE)
    # two filters of 1x3x3, two norm channels of two numbers, two input planes of conv2's eight filters
    assert before.parameters - after.parameters == 2 * 9 + 2 * 2 + 8 * 2 * 9
    assert before.macs - after.macs == 2 * 9 * 144 + 8 * 2 * 9 * 36


def test_normalisation_and_names_come_along(tiny):
    model = tiny()
    mask = ChannelMask({"bn1": bits(1, 0, 1, 0)})
    small = remove_channels(apply_mask(model, mask), mask, SHAPE).model
    assert torch.equal(small.mean, model.mean)
    assert torch.equal(small.std, model.std)
    assert (small.classes, small.input_shape, small.arch) == (model.classes, model.input_shape, model.arch)


def test_what_cannot_leave_stays_masked_and_is_explained():
    net = build("resnet20", width=4)
    mask = ChannelMask({"layer1.0.bn2": bits(1, 0, 0, 1), "layer1.0.bn1": bits(1, 1, 1, 0)})
    removal = remove_channels(apply_mask(net, mask), mask, (3, 16, 16))
    assert {name: kept.tolist() for name, kept in removal.kept.items()} == {"layer1.0.bn1": [0, 1, 2]}
    assert {name: keep.tolist() for name, keep in removal.mask.keep.items()} == {"layer1.0.bn2": [True, False, False, True]}
    [note] = removal.notes
    assert note.startswith("2 channels of 'layer1.0.bn2' stay in the file, masked: ")
    assert "not followed" in note


def test_partly_masked_streams_are_explained():
    net = build("resnet_cifar", depth=8, width=4, option="B")
    mask = ChannelMask({"bn1": bits(1, 0, 1, 1)})
    removal = remove_channels(apply_mask(net, mask), mask, (3, 16, 16))
    assert removal.kept == {}
    assert removal.notes == (
        "1 channels of 'bn1' stay in the file, masked: other layers write or read the same channels and are not masked there",
    )


def test_mask_left_over_has_the_smaller_networks_numbers():
    net = build("resnet_cifar", depth=8, width=4, option="B").eval()
    mask = ChannelMask({"bn1": bits(0, 0, 1, 1), "layer1.0.bn2": bits(0, 1, 1, 1)})
    masked = apply_mask(net, mask)
    removal = remove_channels(masked, mask, (3, 16, 16))
    assert {name: kept.tolist() for name, kept in removal.kept.items()} == {"bn1": [1, 2, 3], "layer1.0.bn2": [1, 2, 3]}
    assert {name: keep.tolist() for name, keep in removal.mask.keep.items()} == {"bn1": [False, True, True]}
    again = apply_mask(removal.model, removal.mask)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), removal.model.parameters(), strict=True))


def test_an_empty_mask_removes_nothing(tiny):
    model = tiny()
    removal = remove_channels(model, ChannelMask({}), SHAPE)
    assert (removal.kept, removal.notes) == ({}, ())
    state = removal.model.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert removal.model is not model


def test_unknown_site_is_refused(tiny):
    with pytest.raises(ModelError, match="'conv1' is not a site where channels can be masked; sites: bn1"):
        remove_channels(tiny(), ChannelMask({"conv1": bits(1, 1, 0, 1)}), SHAPE)
