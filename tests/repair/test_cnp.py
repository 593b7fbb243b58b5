"""CNP: the suspect class, the contrast of features, and a backdoor that goes."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from secateur.errors import MethodError
from secateur.measure import evaluate
from secateur.prune.neurons import Neurons
from secateur.repair import cnp
from secateur.repair.anp import adversarial_noise
from secateur.repair.cnp import Features, contrast, gaining_class
from secateur.state import generator
from secateur.types import to_float


def test_features_are_what_the_last_layer_reads(trained, images):
    neurons = Neurons(trained, images.shape)
    neurons.network.eval()
    features, x = Features(neurons), to_float(images.x[:20])
    with torch.no_grad():
        found = features(x, neurons.filled(1.0))
        assert torch.allclose(trained.net.linear(found), trained(x), atol=1e-5)
    assert not trained.net.linear._forward_pre_hooks


def test_the_contrast_by_hand(victim):
    """Positive pairs come first; each image's six cosines share one softmax."""
    neurons, draw = Neurons(victim.model, (1, 12, 12)), generator(3)
    features, ones = Features(neurons), neurons.filled(1.0)
    factors = {site: 0.5 + torch.rand(size, generator=draw) / 2 for site, size in neurons.sizes.items()}
    x = to_float(victim.clean.x[:10])
    neurons.network.eval()
    found = contrast(features, ones, factors, x, victim.trigger, eps=0.3, temperature=0.5, generator=generator(7))
    with torch.no_grad():
        own, shown = neurons(x, factors).argmax(1), victim.trigger.apply(x)
    noise = adversarial_noise(neurons, factors, x, own, eps=0.3, generator=generator(7))
    with torch.no_grad():
        clean, poisoned = features(x, ones), features(shown, ones)
        driven, calm, triggered = features(x, *noise.factors(factors)), features(x, factors), features(shown, factors)
    total = 0.0
    for i in range(10):
        cosine = [
            math.exp(2 * float((a[i] @ b[i]) / (a[i].norm() * b[i].norm())))
            for b in (clean, poisoned)
            for a in (calm, triggered, driven)
        ]
        total -= sum(math.log(c / sum(cosine)) for c in cosine[:3]) / 3
    assert float(found.detach()) == pytest.approx(total / 10, rel=1e-4)


def test_neurons_driven_astray_gain_a_class(trained, images):
    neurons = Neurons(trained, images.shape)
    found = gaining_class(neurons, images.subset(torch.arange(128)), eps=0.4, generator=generator(5))
    ones, x = neurons.filled(1.0), to_float(images.x[:128])
    own = trained(x).argmax(1)
    noise = adversarial_noise(neurons, ones, x, own, eps=0.4, generator=generator(5))
    with torch.no_grad():
        driven = noise.logits(neurons, ones, x).argmax(1)
    gains = [int((driven == c).sum()) - int((own == c).sum()) for c in range(3)]
    assert found == gains.index(max(gains))


def test_the_backdoor_goes(victim):
    before = evaluate(victim.model, victim.test, trigger=victim.trigger)
    repaired = cnp(victim.model, victim.clean, inversion_steps=60, iterations=60, drop=0.1, generator=generator(0))
    after = evaluate(repaired.model, victim.test, trigger=victim.trigger)
    assert after.attack_success.value < 0.5 * before.attack_success.value


def test_a_network_that_ends_otherwise_is_refused(images):
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 3, 10), nn.Flatten()).eval()
    with pytest.raises(MethodError, match=r"^cnp compares what a last linear layer reads; this network ends in Conv2d$"):
        cnp(net, images, generator=generator(0))


@pytest.mark.parametrize(("name", "value"), [("eps", -1), ("temperature", 0), ("iterations", 0), ("inversion_steps", 0)])
def test_settings_out_of_range(name, value, trained, images):
    with pytest.raises(MethodError, match=r" must lie in "):
        cnp(trained, images, **{"iterations": 1, "inversion_steps": 1, name: value}, generator=generator(0))
