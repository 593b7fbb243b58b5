"""Stages of every architecture: named once, in the order in which the data passes, the logits last."""

from __future__ import annotations

import pytest
import torch
from test_architectures import THIN
from torch import nn

from secateur.measure.layer_study import watching
from secateur.models import ARCHITECTURES, Classifier, build, stages
from secateur.models.registry import skeleton

EXPECTED = {
    "resnet20": ("bn1", "layer1", "layer2", "layer3", "linear"),
    "squeezenet": ("features.2", *(f"features.{i}" for i in (3, 4, 5, 7, 8, 9, 10, 12)), "classifier"),
    "mobilenet_v1": ("stage1", "stage2", "stage3", "fc"),
    "vgg16_bn": ("features.6", "features.13", "features.23", "features.33", "features.43", "classifier"),
    "vit": ("patch_embed", *(f"blocks.{i}" for i in range(6)), "norm", "head"),
    "wrn": ("conv1", "block1", "block2", "block3", "bn1", "fc"),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_stages_by_hand(name):
    assert stages(skeleton(name, {})) == EXPECTED[name]


@pytest.mark.parametrize("name", THIN)
def test_every_stage_runs_once_in_this_order_and_the_last_one_answers(name):
    size = ARCHITECTURES[name].input_size
    net = build(name, **THIN[name]).eval()
    model = Classifier(net, classes=("a",), input_shape=(3, size, size))
    order: list[str] = []
    handles = [
        module.register_forward_hook(lambda *_, stage=stage: order.append(stage))
        for stage, module in net.named_modules()
        if stage in stages(model)
    ]
    with watching(model) as watch:
        maps = watch(torch.rand(2, 3, size, size))
    for handle in handles:
        handle.remove()
    assert tuple(order) == tuple(maps) == stages(model)
    assert len(order) >= 4
    assert maps[order[-1]].flatten(1).shape[1] >= 10


def test_stages_of_somebodys_own_networks():
    plain = nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    assert stages(plain) == ("1", "3")
    inside = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.Conv2d(2, 2, 3), nn.ReLU())
    assert stages(nn.Sequential(nn.Sequential(inside), nn.Linear(2, 2))) == ("0.0.1", "0.0.3", "1")
    assert stages(nn.ReLU()) == ()
