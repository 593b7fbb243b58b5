"""FMP scores each feature map as one attack after the other would, and cuts the share that is worst."""

from __future__ import annotations

import math
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from conftest import make_images
from secateur.errors import MethodError
from secateur.measure import evaluate
from secateur.models import build
from secateur.repair.fmp import endurance, fmp
from secateur.state import generator, seeded, smaller_batches
from secateur.types import ChannelMask, WeightMask, to_float

LAYERS = {f"bn{i}": f"conv{i}" for i in (1, 2, 3, 4)}


def feature_map(model, conv: nn.Module, x: torch.Tensor, channel: int) -> torch.Tensor:
    seen = []
    handle = conv.register_forward_hook(lambda module, given, result: seen.append(result[:, channel]))
    model(x)
    handle.remove()
    return seen[0]


def endured_by_hand(model, conv: nn.Module, channel: int, x, y, start, eps: float) -> float:
    start = start.clone().requires_grad_()
    with torch.no_grad():
        clean = feature_map(model, conv, x, channel)
    loss = F.mse_loss(feature_map(model, conv, start, channel), clean)
    attacked = (start + eps * torch.autograd.grad(loss, start)[0].sign()).clamp(0, 1).detach()
    with torch.no_grad():
        logits = model(attacked)
    return float((logits.argmax(1) == y).sum() + 1 / (1 + F.cross_entropy(logits, y)))


@pytest.mark.parametrize("eps", [1 / 255, 0.1])
def test_the_scores_by_one_attack_after_the_other(eps, trained, images):
    x, y = to_float(images.x[:20]), images.y[:20]
    signs = 2.0 * torch.randint(2, x.shape, generator=generator(5)) - 1
    start = (x + eps * signs).clamp(0, 1)
    with smaller_batches(0.1):  # two maps at a time
        found = endurance(trained, LAYERS, x, y, eps=eps, generator=generator(5))
    for site, layer in LAYERS.items():
        conv = trained.net.get_submodule(layer)
        expected = [endured_by_hand(trained, conv, channel, x, y, start, eps) for channel in range(conv.out_channels)]
        assert found[site].tolist() == pytest.approx(expected, abs=1e-4)
    assert len({score for scores in found.values() for score in scores.tolist()}) > 10


@pytest.mark.parametrize("share", [0.0, 1 / 64, 0.25, 0.3, 1.0])
def test_the_share_is_cut_from_the_weakest_and_rounded_up(share, trained, images):
    repaired = fmp(trained, images, share=share, eps=0.1, images=20, epochs=0, edit="weight+bias", generator=generator(2))
    assert isinstance(repaired.mask, ChannelMask)
    for site, keep in repaired.mask.keep.items():
        assert int((~keep).sum()) == math.ceil(share * len(keep))
        assert torch.equal(repaired.model.net.get_submodule(site).weight == 0, ~keep)


def test_the_maps_whose_attack_hurts_most_go(trained, images, monkeypatch):
    scores = {site: torch.arange(trained.net.get_submodule(site).num_features).flip(0).double() for site in LAYERS}
    monkeypatch.setattr(sys.modules["secateur.repair.fmp"], "endurance", lambda *given, **named: scores)
    repaired = fmp(trained, images, share=0.5, epochs=0, edit="weight+bias", generator=generator(2))
    for site, keep in repaired.mask.keep.items():
        half = trained.net.get_submodule(site).num_features // 2
        assert keep.tolist() == [True] * half + [False] * half


def test_healing_holds_the_cut(trained, images):
    steps = []
    repaired = fmp(
        trained, images, epochs=1, lr=0.02, on_step=lambda step, of: steps.append((step, of)), generator=generator(0)
    )
    assert steps[-1] == (4, 4)
    assert isinstance(repaired.mask, WeightMask)
    for name, keep in repaired.mask.keep.items():
        assert int((~keep).sum()) == 1
        assert not repaired.model.net.get_parameter(name)[~keep].any()
    assert not torch.equal(repaired.model.net.conv1.weight, trained.net.conv1.weight)


def test_a_residual_network(images):
    with seeded(generator(0)):
        net = build("resnet20", width=4, classes=3, in_channels=1)
    repaired = fmp(net.eval(), images, images=4, epochs=0, generator=generator(0))
    assert repaired.log["removed"] == len(repaired.mask.keep) == 19


@pytest.mark.parametrize(("setting", "value"), [("share", 1.5), ("eps", -0.1), ("images", 0), ("epochs", -1), ("lr", 0.0)])
def test_settings_out_of_range(setting, value, tiny, images):
    with pytest.raises(MethodError, match=rf"^{setting} must lie in"):
        fmp(tiny(), images, **{setting: value}, generator=generator(0))


def test_a_network_without_convolutions_is_refused(images):
    net = nn.Sequential(nn.Flatten(), nn.Linear(144, 8), nn.ReLU(), nn.Linear(8, 3))
    with pytest.raises(
        MethodError, match=r"^fmp needs convolutions with batch-norm or no norm behind them, got none; use another method$"
    ):
        fmp(net, images, generator=generator(0))


def test_it_takes_a_backdoor_out(victim):
    repaired = fmp(victim.model, make_images(150, 9), images=32, epochs=10, share=0.25, generator=generator(0))
    after = evaluate(repaired.model, victim.test, trigger=victim.trigger)
    assert after.accuracy.value > 0.9
    assert after.attack_success is not None
    assert after.attack_success.value < 0.3
