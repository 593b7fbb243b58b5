"""Fine-Pruning cuts as many dormant channels as a scan with full forwards says."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from conftest import make_images
from secateur.errors import InconclusiveError, MethodError
from secateur.measure import correct
from secateur.models import Classifier, build
from secateur.prune import apply_mask
from secateur.repair import fine_pruning
from secateur.state import generator, seeded
from secateur.types import WeightMask


def scan(model: nn.Module, reader: str, order: list[torch.Tensor], images, drop: float) -> tuple[int, list[float]]:
    """Cut one channel after the other until more than ``drop`` is lost: how many may go, and the accuracies on the way."""
    net = model.net if isinstance(model, Classifier) else model
    keep = torch.ones_like(net.get_parameter(f"{reader}.weight"), dtype=torch.bool)
    rates = [float(correct(model, images).double().mean())]
    for count, columns in enumerate(order, 1):
        keep[:, columns] = False
        cut = apply_mask(model, WeightMask({f"{reader}.weight": keep.clone()}))
        rates.append(float(correct(cut, images).double().mean()))
        if rates[0] - rates[-1] > drop + 1e-9:
            return count - 1, rates
    return len(order), rates


@pytest.mark.parametrize("drop", [0.02, 0.1, 0.4, 1.0])
def test_the_cut_of_a_linear_tail(drop, trained, images):
    seen = []
    handle = trained.net.linear.register_forward_pre_hook(lambda module, given: seen.append(given[0].detach()))
    correct(trained, images)
    handle.remove()
    order = torch.cat(seen).abs().double().mean(0).argsort(stable=True)
    expected, rates = scan(trained, "linear", list(order.split(1)), images, drop)
    repaired = fine_pruning(trained, images, drop=drop, epochs=0, generator=generator(0))
    assert repaired.log["channels_cut"] == expected
    assert [candidate.holdout.value for candidate in repaired.path] == pytest.approx(rates)
    gone = ~repaired.mask.keep["linear.weight"]
    assert bool((gone == gone[0]).all())
    assert sorted(gone[0].nonzero().flatten().tolist()) == sorted(order[:expected].tolist())
    assert not repaired.model.net.linear.weight[gone].any()


def test_the_cut_before_a_hidden_layer(images):
    """The reader is not the last layer, and each channel is read in several places."""
    with seeded(generator(1)):
        net = build("lenet5", width=6, classes=3, in_channels=1)
    padded = type(images)(torch.nn.functional.pad(images.x, (10, 10, 10, 10)), images.y, images.classes)
    seen = []
    handle = net.fc1.register_forward_pre_hook(lambda module, given: seen.append(given[0].detach()))
    correct(net, padded)
    handle.remove()
    channels = next(m for m in reversed(list(net.modules())) if isinstance(m, nn.Conv2d)).out_channels
    each = net.fc1.in_features // channels
    order = torch.cat(seen).abs().double().mean(0).view(channels, each).mean(1).argsort(stable=True)
    columns = [torch.arange(each) + each * int(channel) for channel in order]
    drop = 0.05
    expected, rates = scan(net.eval(), "fc1", columns, padded, drop)
    try:
        repaired = fine_pruning(net, padded, drop=drop, epochs=0, generator=generator(0))
    except InconclusiveError:
        pytest.fail("the fixture must lose enough images for a verdict")
    assert repaired.log["channels_cut"] == expected
    assert [candidate.holdout.value for candidate in repaired.path] == pytest.approx(rates)


def test_healing_holds_the_cut(trained, images):
    repaired = fine_pruning(trained, images, drop=0.3, epochs=1, generator=generator(0))
    gone = ~repaired.mask.keep["linear.weight"]
    assert gone.any()
    assert not repaired.model.net.linear.weight[gone].any()
    assert not torch.equal(repaired.model.net.conv1.weight, trained.net.conv1.weight)


def test_too_few_images_cannot_resolve_the_drop(trained):
    with pytest.raises(InconclusiveError, match=r"^a drop of 0.01 cannot be resolved on 9 clean images"):
        fine_pruning(trained, make_images(9, 3), drop=0.01, epochs=0, generator=generator(0))


@pytest.mark.parametrize("drop", [-0.1, 1.1])
def test_drop_out_of_range(drop, trained, images):
    with pytest.raises(MethodError, match=r"^drop must lie in \[0, 1\]"):
        fine_pruning(trained, images, drop=drop, generator=generator(0))
