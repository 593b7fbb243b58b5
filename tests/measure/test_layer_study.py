"""The layer study by hand, on a linear network of two layers; and what edits do to weights, in numbers and pictures."""

from __future__ import annotations

import io
import math

import pytest
import torch
from PIL import Image
from torch import nn

from secateur.errors import DataError, InconclusiveError, MethodError, ModelError
from secateur.measure import image_grid, layer_study, stage_weights, weight_study
from secateur.models import wrappers_of
from secateur.prune import clamp_activations, clean_bounds, edit_activations, noise, round_activations, sparsify
from secateur.state import generator
from secateur.types import ImageSet


def two_layers() -> nn.Module:
    """``f1 = (2a, b)``, ``f2 = f1_0 + f1_1`` of an image of two pixels a, b."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(2, 2, bias=False), nn.Linear(2, 1, bias=False))
    with torch.no_grad():
        net[1].weight.copy_(torch.tensor([[2.0, 0.0], [0.0, 1.0]]))
        net[2].weight.copy_(torch.tensor([[1.0, 1.0]]))
    return net


CLEAN = torch.tensor([[1.0, 0.0], [0.0, 1.0]]).reshape(2, 1, 1, 2)
ATTACKED = torch.tensor([[0.5, 0.0], [0.25, 1.0]]).reshape(2, 1, 1, 2)


def test_shifts_by_hand():
    """f1: (2, 0), (0, 1) become (1, 0), (0.5, 1); f2: 2, 1 become 1, 1.5."""
    first, second = layer_study(two_layers(), CLEAN, ATTACKED, bins=4, batch_size=1)
    assert (first.stage, second.stage) == ("1", "2")
    assert first.l2.value == second.l2.value == 0.5
    assert first.l2.n == 2
    assert first.l2.low == first.l2.high == 0.5
    assert (first.low, first.high, first.largest) == (0.0, 2.0, 0.5)
    assert (second.low, second.high, second.largest) == (1.0, 2.0, 1.0)
    assert first.channels == (pytest.approx(math.sqrt(1.25) / 2), 0.0)
    assert second.channels == (pytest.approx(math.sqrt(1.25 / 5)),)
    assert first.clean.edges == first.adversarial.edges == (0.0, 0.5, 1.0, 1.5, 2.0)
    assert first.clean.counts == (2, 0, 1, 1)
    assert first.adversarial.counts == (1, 1, 2, 0)


def test_the_interval_of_the_mean():
    """Shifts of 0.5 and 0.1: mean 0.3, half the interval is t(0.975, 1) * std / sqrt(2) = 12.706 * 0.2."""
    attacked = torch.tensor([[0.5, 0.0], [0.05, 1.0]]).reshape(2, 1, 1, 2)
    [first] = layer_study(two_layers(), CLEAN, attacked, after=["1"])
    assert first.l2.value == pytest.approx(0.3)
    assert first.l2.high - first.l2.value == pytest.approx(12.7062 * 0.2, rel=1e-4)


def test_silent_stages_have_no_relative_shift():
    net = two_layers()
    with torch.no_grad():
        net[1].weight.zero_()
    first, _ = layer_study(net, CLEAN, ATTACKED)
    assert first.l2 is None
    assert first.largest is None
    assert first.channels == (None, None)
    assert sum(first.clean.counts) == 4


def test_batches_do_not_matter(hardened):
    x = hardened.x[:10]
    attacked = (x + 0.1 * torch.rand(x.shape, generator=generator(0))).clamp(0, 1)
    one, many = (layer_study(hardened.model, x, attacked, batch_size=size) for size in (3, 10))
    assert [s.stage for s in one] == ["bn1", "bn2", "bn3", "bn4", "linear"]
    for a, b in zip(one, many, strict=True):
        assert a.clean.counts == b.clean.counts
        assert a.l2.value == pytest.approx(b.l2.value, rel=1e-5)
        assert sum(a.adversarial.counts) == sum(a.clean.counts)
        assert len(a.channels) in (8, 16, 32, 10)


def test_nothing_is_left_on_the_network(tiny):
    model = tiny().train()
    model.net.bn2.eval()
    flags = [module.training for module in model.modules()]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    x = torch.rand(3, 1, 12, 12)
    layer_study(model, x, x)
    with pytest.raises(ModelError, match=r"unknown layer 'bn22'"):
        layer_study(model, x, x, after=["bn22"])
    with torch.no_grad():
        model.net.bn3.weight.fill_(float("nan"))
    with pytest.raises(ModelError, match=r"feature maps must be finite, but 'bn3' returned NaN or infinity"):
        layer_study(model, x, x)
    model.net.bn3.weight.data.copy_(before["net.bn3.weight"])
    assert not any(module._forward_hooks for module in model.modules())
    assert [module.training for module in model.modules()] == flags
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(parameter.grad is not None for parameter in model.parameters())


def test_edits_of_feature_maps_are_seen():
    net = edit_activations(two_layers(), [{"after": "1", "kind": "clamp", "low": 0, "high": 0.5}]).model
    [first] = layer_study(net, CLEAN, ATTACKED, after=["1"])
    assert first.high == 0.5
    assert len(wrappers_of(net)) == 1


def test_what_cannot_be_studied():
    net = two_layers()
    with pytest.raises(DataError, match=r"must match, got \(2, 1, 1, 2\) and \(1, 1, 1, 2\)"):
        layer_study(net, CLEAN, ATTACKED[:1])
    with pytest.raises(InconclusiveError, match="needs at least two images, got 1"):
        layer_study(net, CLEAN[:1], ATTACKED[:1])
    with pytest.raises(MethodError, match="bins must lie in"):
        layer_study(net, CLEAN, ATTACKED, bins=0)
    with pytest.raises(ModelError, match="no stages to look at"):
        layer_study(nn.ReLU(), CLEAN, ATTACKED)
    twice = nn.Sequential(nn.Flatten(), relu := nn.ReLU(), nn.Linear(2, 2), relu)
    flat = nn.Sequential(nn.Flatten(0), nn.Unflatten(0, (-1, 2)), nn.Linear(2, 2))
    with pytest.raises(ModelError, match=r"must return \(2, channels, ...\) of 2 images, but '0' returned \(4,\)"):
        layer_study(flat, CLEAN, ATTACKED, after=["0"])
    with pytest.raises(ModelError, match=r"one tensor each time, but '1' ran 2 times"):
        layer_study(twice, CLEAN, ATTACKED, after=["1"])


def test_weights_before_and_after(tiny):
    net = two_layers()
    edited = sparsify(net, below=1.5).model
    first, second = weight_study(net, edited, bins=2)
    assert (first.name, second.name) == ("1.weight", "2.weight")
    assert first.before.edges == first.after.edges == (0.0, 1.0, 2.0)
    assert first.before.counts == (2, 2)
    assert first.after.counts == (3, 1)
    assert first.changed == 0.25
    assert second.changed == 1
    assert first.mean == 0.75
    assert first.std == pytest.approx(math.sqrt(5 / 4 - 0.75**2))
    with pytest.raises(ModelError, match=r"must have the parameter 'conv1.weight' in one shape"):
        weight_study(tiny(), net)
    with pytest.raises(ModelError, match=r"must have the parameter 'nothing'"):
        weight_study(net, edited, names=["nothing"])


def test_weights_by_stage(tiny):
    """Weights up to the end of a stage are its own, those of norms and biases nobody's."""
    net = two_layers()
    first, second = stage_weights(net, bins=2)
    assert (first.stage, second.stage) == ("1", "2")
    assert (first.values.edges, first.values.counts) == ((0.0, 1.0, 2.0), (2, 2))
    assert (first.mean, first.zeros) == (0.75, 0.5)
    assert first.std == pytest.approx(math.sqrt(5 / 4 - 0.75**2))
    assert second.values.counts == (0, 2)
    found = {stage.stage: sum(stage.values.counts) for stage in stage_weights(tiny())}
    assert found == {
        f"bn{i}" if i < 5 else "linear": getattr(tiny().net, f"conv{i}" if i < 5 else "linear").weight.numel()
        for i in range(1, 6)
    }
    assert [stage.stage for stage in stage_weights(tiny(), after=["bn4", "bn2"])] == ["bn4", "bn2"]
    assert sum(stage_weights(tiny(), after=["bn2"])[0].values.counts) == found["bn1"] + found["bn2"]
    with pytest.raises(ModelError, match=r"unknown layer 'bn22'"):
        stage_weights(tiny(), after=["bn22"])
    with torch.no_grad():
        net[2].weight.fill_(float("nan"))
    with pytest.raises(ModelError, match=r"weights must be finite, but those of '2'"):
        stage_weights(net)


def test_pictures_show_images_attack_and_difference():
    grid = image_grid(CLEAN, ATTACKED, zoom=1)
    assert grid.scale == 1
    picture = Image.open(io.BytesIO(grid.png))
    assert picture.size == (2 * 4 + 2, 3 * 3 + 2)
    rows = [[picture.getpixel((x, y)) for x in (2, 3, 6, 7)] for y in (2, 5, 8)]
    assert rows == [[255, 0, 0, 255], [128, 0, 64, 255], [0, 128, 191, 128]]
    colour = image_grid(torch.zeros(1, 3, 4, 4, dtype=torch.uint8), torch.zeros(1, 3, 4, 4), zoom=3)
    assert Image.open(io.BytesIO(colour.png)).size == (24, 60)
    with pytest.raises(DataError, match="must go together and have 1 or 3 channels"):
        image_grid(torch.rand(1, 2, 4, 4), torch.rand(1, 2, 4, 4))


def bright(*values: float) -> ImageSet:
    x = torch.tensor(values).mul(255).round().to(torch.uint8).reshape(-1, 1, 1, 2)
    return ImageSet(x, torch.zeros(len(x), dtype=torch.int64), ("a", "b"))


def test_bounds_from_clean_images():
    """f1 is 0 seven times and 1 once: mean 1/8, standard deviation sqrt(7)/8."""
    net, clean = two_layers(), bright(0, 0, 0, 0, 0, 0, 0, 1)
    [bound] = clean_bounds(net, clean, deviations=1, batch_size=3)
    assert bound["after"] == "1"
    assert bound["low"] == 0
    assert bound["high"] == pytest.approx((1 + math.sqrt(7)) / 8)
    [most] = clean_bounds(net, clean, quantile=0.8)
    assert (most["low"], most["high"]) == (0, pytest.approx(0, abs=2e-4))
    [everything] = clean_bounds(net, clean, quantile=1)
    assert (everything["low"], everything["high"]) == (0, 1)
    edited = edit_activations(net, [bound])
    assert edited.changed == 0
    assert edited.forward is not None
    with pytest.raises(MethodError, match="give either deviations or quantile"):
        clean_bounds(net, clean)
    with pytest.raises(MethodError, match=r"quantile must lie in \[0.5, 1\]"):
        clean_bounds(net, clean, quantile=0.2)


def test_edits_between_all_stages(tiny):
    model = tiny()
    rounded = round_activations(model, decimals=2)
    assert [w["after"] for w in wrappers_of(rounded.model)] == ["bn1", "bn2", "bn3", "bn4"]
    clamped = clamp_activations(model, low=-1, high=1, after=["bn2"])
    assert wrappers_of(clamped.model) == ({"after": "bn2", "kind": "clamp", "low": -1.0, "high": 1.0},)
    drawn = noise(clamped.model, radius=0.1, resampled=True, generator=generator(0))
    x = torch.rand(2, 1, 12, 12, requires_grad=True)
    logits = drawn.forward(drawn.model, x)
    assert logits.shape == (10, 2, 3)
