"""What masks mean for parameters."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from secateur.errors import MethodError, ModelError
from secateur.prune import apply_mask, carry_over, collapsed, parameter_masks, removed
from secateur.prune.mask import compression, edited, joined, still, zeros
from secateur.types import ChannelMask, SoftMask, WeightMask

HALF = torch.tensor([True, False, True, False])


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 3)
        self.bn = nn.BatchNorm2d(3)


@pytest.fixture
def pair() -> Pair:
    model = Pair()
    nn.init.uniform_(model.bn.bias, 0.1, 1.0)
    return model


def parameters(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def test_weight_mask_is_its_own_parameter_mask(tiny):
    keep = torch.rand(4, 1, 3, 3) > 0.5
    assert parameter_masks(tiny(), WeightMask({"conv1.weight": keep})) == {"conv1.weight": keep}


def test_channel_mask_reaches_weight_and_bias_of_its_site(tiny):
    masks = parameter_masks(tiny(), ChannelMask({"bn1": HALF}))
    assert {name: keep.tolist() for name, keep in masks.items()} == {"bn1.weight": HALF.tolist(), "bn1.bias": HALF.tolist()}


def test_the_published_edit_leaves_the_bias(tiny):
    assert set(parameter_masks(tiny(), ChannelMask({"bn1": HALF}), edit="weight")) == {"bn1.weight"}


def test_channel_mask_covers_whole_filters(pair):
    masks = parameter_masks(pair, ChannelMask({"conv": torch.tensor([True, False, True])}))
    assert masks["conv.weight"].shape == (3, 2, 3, 3)
    assert [int(row.sum()) for row in masks["conv.weight"]] == [18, 0, 18]
    assert masks["conv.bias"].tolist() == [True, False, True]


def test_site_without_bias_has_only_a_weight_to_cut(tiny):
    assert set(parameter_masks(tiny(), ChannelMask({"conv1": HALF}))) == {"conv1.weight"}


def test_unknown_edit(tiny):
    with pytest.raises(MethodError, match="unknown edit 'weights'; did you mean 'weight'"):
        parameter_masks(tiny(), ChannelMask({"bn1": HALF}), edit="weights")


@pytest.mark.parametrize("mask", [
    WeightMask({"conv9.weight": HALF}),
    ChannelMask({"conv9": HALF}),
    ChannelMask({"": HALF}),
    SoftMask({"conv9": torch.ones(4)}),
    SoftMask({"conv9.weight": torch.ones(4)}),
])  # fmt: skip
def test_unknown_name(tiny, mask):
    with pytest.raises(ModelError, match=r"names '.*weight', which is not a parameter of this network"):
        apply_mask(tiny(), mask)


@pytest.mark.parametrize("mask", [
    WeightMask({"bn1.weight": HALF[:3]}),
    ChannelMask({"bn1": HALF[:3]}),
    ChannelMask({"conv1": HALF[:3]}),
    SoftMask({"bn1": torch.ones(3)}),
    SoftMask({"bn1.weight": torch.ones(3)}),
])  # fmt: skip
def test_wrong_shape(tiny, mask):
    with pytest.raises(ModelError, match=r"the mask of '.*weight' must have shape \(4,.*\), got \(3"):
        apply_mask(tiny(), mask)


def test_apply_zeroes_exactly_what_is_cut(tiny):
    model = tiny()
    keep = torch.rand(model.net.conv2.weight.shape, generator=torch.Generator().manual_seed(1)) > 0.3
    before = parameters(model.net)
    after = parameters(apply_mask(model, WeightMask({"conv2.weight": keep})).net)
    for name in before:
        kept = keep if name == "conv2.weight" else torch.ones_like(before[name], dtype=torch.bool)
        assert torch.equal(after[name][kept], before[name][kept])
        assert bool((after[name][~kept] == 0).all())
    assert int((~keep).sum()) > 0


def test_apply_silences_a_channel_only_with_the_bias(tiny, images):
    model = tiny()
    seen: dict[str, torch.Tensor] = {}
    x, _ = next(images.batches(8))
    for edit in ("weight+bias", "weight"):
        masked = apply_mask(model, edited(model, ChannelMask({"bn1": HALF}), edit))
        masked.net.bn1.register_forward_hook(lambda *args, edit=edit: seen.__setitem__(edit, args[2]))
        masked(x)
    assert bool((seen["weight+bias"][:, ~HALF] == 0).all())
    assert bool((seen["weight"][:, ~HALF] != 0).any())
    assert bool((seen["weight"][:, HALF] == seen["weight+bias"][:, HALF]).all())


def test_apply_leaves_the_model_alone(tiny):
    model = tiny()
    model.net.bn2.train()
    model.net.conv1.weight.requires_grad_(False)
    before = parameters(model)
    for mask in (ChannelMask({"bn1": HALF}), SoftMask({"bn1": 0.5 * HALF})):
        masked = apply_mask(model, mask)
        assert not {p.data_ptr() for p in masked.parameters()} & {p.data_ptr() for p in model.parameters()}
        assert [m.training for m in masked.modules()] == [m.training for m in model.modules()]
        assert not masked.net.conv1.weight.requires_grad
    assert model.net.bn2.training
    assert not model.net.bn1.training
    assert all(torch.equal(value, before[name]) for name, value in model.named_parameters())


def test_nan_weights_are_cut_to_zero(tiny):
    model = tiny()
    with torch.no_grad():
        model.net.bn1.weight[1] = float("nan")
    assert apply_mask(model, ChannelMask({"bn1": HALF})).net.bn1.weight[1] == 0


def test_soft_mask_scales_a_parameter_or_a_whole_site(tiny):
    model = tiny()
    before = parameters(model.net)
    factor = torch.tensor([0.0, 0.25, 0.5, 1.0])
    whole = torch.rand(4, 1, 3, 3)
    after = parameters(apply_mask(model, SoftMask({"bn1": factor, "conv1.weight": whole})).net)
    assert torch.equal(after["bn1.weight"], before["bn1.weight"] * factor)
    assert torch.equal(after["bn1.bias"], before["bn1.bias"] * factor)
    assert torch.equal(after["conv1.weight"], before["conv1.weight"] * whole)
    assert torch.equal(after["bn2.weight"], before["bn2.weight"])


def test_soft_mask_on_filters(pair):
    factor = torch.tensor([0.0, 0.5, 1.0])
    scaled = apply_mask(pair, SoftMask({"conv": factor}))
    assert torch.equal(scaled.conv.weight, pair.conv.weight * factor.reshape(3, 1, 1, 1))
    assert torch.equal(scaled.conv.bias, pair.conv.bias * factor)


def test_removed_and_collapsed():
    mask = ChannelMask({"a": HALF, "b": torch.zeros(3, dtype=torch.bool), "c": torch.ones(2, dtype=torch.bool)})
    assert removed(mask) == {"a": 2, "b": 3, "c": 0}
    assert collapsed(mask) == ("b",)


def test_carry_over_renumbers_what_is_left():
    mask = ChannelMask(
        {
            "a": torch.tensor([False, True, False, True]),
            "b": torch.tensor([False, True]),
            "c": torch.tensor([True, True, False]),
        }
    )
    left = carry_over(mask, {"a": torch.tensor([0, 1, 3]), "c": torch.tensor([0, 1])})
    assert {name: keep.tolist() for name, keep in left.keep.items()} == {"a": [False, True, True], "b": [False, True]}


BITS = st.lists(st.booleans(), min_size=4, max_size=4).map(torch.tensor)


@settings(max_examples=25, deadline=None)
@given(BITS, BITS)
def test_masks_compose_as_and(one, two):
    model = nn.BatchNorm2d(4)
    net = nn.Sequential(model)
    nn.init.uniform_(model.weight, 0.1, 1.0)
    nn.init.uniform_(model.bias, 0.1, 1.0)
    twice = apply_mask(apply_mask(net, ChannelMask({"0": one})), ChannelMask({"0": two}))
    once = apply_mask(net, ChannelMask({"0": one & two}))
    swapped = apply_mask(apply_mask(net, ChannelMask({"0": two})), ChannelMask({"0": one}))
    assert all(torch.equal(a, b) for a, b in zip(twice.parameters(), once.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(twice.parameters(), swapped.parameters(), strict=True))
    assert int(once[0].weight.count_nonzero()) == int((one & two).sum())


@settings(max_examples=25, deadline=None)
@given(st.lists(st.booleans(), min_size=2, max_size=12).map(torch.tensor), st.data())
def test_removed_never_grows_when_carried_over(keep, data):
    stays = torch.tensor(sorted(data.draw(st.sets(st.integers(0, len(keep) - 1), min_size=1))))
    left = carry_over(ChannelMask({"a": keep}), {"a": stays})
    assert sum(removed(left).values()) == int((~keep[stays]).sum())


def test_what_is_zero_was_cut_but_for_what_was_initialised_so(tiny):
    model = tiny()
    assert zeros(model).keep == {}
    with torch.no_grad():
        model.net.conv1.weight[1, 0, 0, 0] = 0
        model.net.bn1.weight[2] = 0
        model.net.bn1.bias[2] = 0
        model.net.bn2.bias.zero_()
        model.net.bn3.weight.zero_()
        model.net.linear.weight.zero_()
        model.net.conv3.weight.zero_()
    found = zeros(model)
    assert removed(found) == {"conv1.weight": 1, "bn1.weight": 1, "bn1.bias": 1, "conv3.weight": 1152}
    assert not bool(found.keep["conv1.weight"][1, 0, 0, 0])


def test_of_what_was_cut_before_that_counts_which_is_still_zero(tiny):
    model, after = tiny(), tiny()
    with torch.no_grad():
        model.net.conv1.weight[:2] = 0
        after.net.conv1.weight[0] = 0
    assert torch.equal(still(zeros(model), after).keep["conv1.weight"], zeros(after).keep["conv1.weight"])
    assert still(zeros(model), tiny(width=8)).keep == {}


def test_two_cuts_are_joined_and_counted(tiny):
    model = tiny()
    before = zeros(model)
    mask = ChannelMask({"bn1": torch.tensor([True, False, True, True])})
    assert joined(model, mask, before) is mask
    assert joined(model, None, before) is None
    with torch.no_grad():
        model.net.bn1.weight[:2] = 0
    both = joined(model, mask, zeros(model))
    assert removed(both) == {"bn1.weight": 2, "bn1.bias": 1}
    total = sum(parameter.numel() for parameter in model.parameters())
    assert compression(model, both) == total / (total - 3)
    assert compression(model, mask) == total / (total - 2)
    assert compression(model, None) == 1
