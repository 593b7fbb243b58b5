"""BNP cuts exactly the channels whose divergence, computed by hand from one batch, stands out."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from conftest import make_images, randomise_norms
from secateur.errors import DataError, MethodError
from secateur.models import build
from secateur.repair.bnp import bnp
from secateur.state import generator, seeded, smaller_batches
from secateur.types import ChannelMask, WeightMask, to_float

NORMS = ("bn1", "bn2", "bn3", "bn4")


def inputs(model, images) -> dict[str, np.ndarray]:
    """What enters each batch-norm on all images at once, ``(images, channels, places)``."""
    seen = {}
    handles = [
        model.net.get_submodule(name).register_forward_pre_hook(
            lambda module, given, name=name: seen.update({name: given[0].double().flatten(2).numpy()})
        )
        for name in NORMS
    ]
    with torch.no_grad():
        model(to_float(images.x))
    for handle in handles:
        handle.remove()
    return seen


def cut_by_hand(model, images, k: float) -> dict[str, list[bool]]:
    cut = {}
    for name, values in inputs(model, images).items():
        norm = model.net.get_submodule(name)
        divergences = []
        for channel in range(values.shape[1]):
            seen = values[:, channel].ravel()
            s = np.sqrt(float(norm.running_var[channel]) + norm.eps)
            t = np.sqrt(seen.var(ddof=1) + norm.eps)
            apart = seen.mean() - float(norm.running_mean[channel])
            divergences.append(np.log(s / t) + (t**2 + apart**2) / (2 * s**2) - 0.5)
        divergences = np.array(divergences)
        cut[name] = (divergences > divergences.mean() + k * divergences.std(ddof=1)).tolist()
    return cut


@pytest.mark.parametrize("k", [0.0, 0.7, 1.4])
def test_the_divergences_by_hand(k, tiny, images):
    model = tiny(width=8)
    expected = cut_by_hand(model, images, k)
    with smaller_batches(0.1):  # five batches: their moments are put together
        repaired = bnp(model, images, k=k, generator=generator(0))
    assert sum(map(sum, expected.values())) > 0
    assert repaired.log["removed"] == sum(map(sum, expected.values()))
    assert isinstance(repaired.mask, WeightMask)
    for name, cut in expected.items():
        assert (~repaired.mask.keep[f"{name}.weight"]).tolist() == cut
        before, after = (net.net.get_submodule(name) for net in (model, repaired.model))
        assert torch.equal(after.weight == 0, torch.tensor(cut))
        assert torch.equal(after.bias, before.bias)


def test_a_channel_that_saw_other_images_in_training_is_cut(tiny, images):
    model = tiny(width=16)
    for name in NORMS:
        values = inputs(model, images)[name]
        norm = model.net.get_submodule(name)
        norm.running_mean.copy_(torch.from_numpy(values.mean((0, 2))))
        norm.running_var.copy_(torch.from_numpy(values.swapaxes(0, 1).reshape(values.shape[1], -1).var(1)))
    model.net.bn4.running_var[3] *= 9
    repaired = bnp(model, images, edit="weight+bias", generator=generator(0))
    assert isinstance(repaired.mask, ChannelMask)
    assert (~repaired.mask.keep["bn4"]).nonzero().flatten().tolist() == [3]
    assert not repaired.model.net.bn4.bias[3]


def test_dead_channels_have_a_divergence(tiny, images):
    model = tiny()
    with torch.no_grad():
        model.net.conv2.weight[1] = 0
        model.net.bn2.running_mean[1] = 0
        model.net.bn2.running_var[1] = 0
    repaired = bnp(model, images, k=1.0, generator=generator(0))
    assert repaired.mask.keep["bn2.weight"][1]


def test_norms_that_read_a_residual_stream_are_judged_too():
    with seeded(generator(0)):
        net = build("preact_resnet18", width=8, classes=3, in_channels=1)
        randomise_norms(net)
    repaired = bnp(net, make_images(6, 0), edit="weight+bias", generator=generator(0))
    assert {"layer1.0.bn2", "layer2.0.bn1"} <= repaired.mask.keep.keys()


@pytest.mark.parametrize("k", [-0.1, float("nan")])
def test_k_out_of_range(k, tiny, images):
    with pytest.raises(MethodError, match=r"^k must lie in \[0, 1000000"):
        bnp(tiny(), images, k=k, generator=generator(0))


def test_refusals(tiny, images):
    with pytest.raises(DataError, match=r"^bnp needs at least two clean images for a variance, got 1$"):
        bnp(tiny(), make_images(1, 0), generator=generator(0))
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    with pytest.raises(MethodError, match=r"^bnp needs batch-norms with running statistics, got a network without"):
        bnp(net, images, generator=generator(0))
