"""ANP: the noise, the loss and the cut, by hand."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F

from secateur.errors import DataError, MethodError
from secateur.measure import evaluate
from secateur.prune.neurons import Neurons
from secateur.repair import anp
from secateur.repair.anp import adversarial_noise, loss_under_noise
from secateur.state import generator
from secateur.types import to_float


def test_the_noise_is_one_signed_step_from_a_uniform_draw(tiny, images):
    model = tiny()
    neurons = Neurons(model, images.shape)
    x, y, eps = to_float(images.x[:30]), images.y[:30], 0.3
    factors = {site: torch.rand(size) for site, size in neurons.sizes.items()}
    neurons.network.train()
    noise = adversarial_noise(neurons, factors, x, y, eps=eps, generator=generator(4))
    draw = generator(4)
    start = [{site: (2 * torch.rand(n, generator=draw) - 1) * eps for site, n in neurons.sizes.items()} for _ in range(2)]
    twin = deepcopy(model).to(memory_format=torch.channels_last).train()
    for site in neurons.sizes:
        norm = twin.net.get_submodule(site)
        norm.weight.data.mul_(factors[site] + start[0][site])
        norm.bias.data.mul_(1 + start[1][site])
    F.cross_entropy(twin(x), y).backward()
    for site in neurons.sizes:
        norm, old = twin.net.get_submodule(site), model.net.get_submodule(site)
        slope = (norm.weight.grad * old.weight).sign(), (norm.bias.grad * old.bias).sign()
        assert torch.allclose(noise.weight[site], start[0][site] + eps * slope[0])
        assert torch.allclose(noise.bias[site], start[1][site] + eps * slope[1])
        assert float(noise.weight[site].abs().max()) <= 2 * eps


def test_it_is_noise_that_hurts(trained, images):
    neurons = Neurons(trained, images.shape)
    ones, x, y = neurons.filled(1.0), to_float(images.x), images.y
    noise = adversarial_noise(neurons, ones, x, y, eps=0.4, generator=generator(0))
    with torch.no_grad():
        calm, noisy = F.cross_entropy(neurons(x, ones), y), F.cross_entropy(noise.logits(neurons, ones, x), y)
    assert noisy > calm + 0.5


@pytest.mark.parametrize(("eps", "trade_off"), [(0.3, 0.2), (0.3, 0.9), (0.3, 1.0), (0.0, 0.2)])
def test_the_loss_is_shared_out_between_calm_and_noise(eps, trade_off, trained, images):
    neurons = Neurons(trained, images.shape)
    neurons.network.eval()
    ones, x, y = neurons.filled(1.0), to_float(images.x[:40]), images.y[:40]
    found = loss_under_noise(neurons, ones, x, y, eps=eps, trade_off=trade_off, generator=generator(2))
    calm = F.cross_entropy(trained(x), y)
    noise = adversarial_noise(neurons, ones, x, y, eps=eps, generator=generator(2))
    noisy = F.cross_entropy(noise.logits(neurons, ones, x), y)
    assert float(found.detach()) == pytest.approx(float((trade_off * calm + (1 - trade_off) * noisy).detach()), rel=1e-4)
    assert eps == 0 or float(noisy.detach()) > float(calm.detach()) + 0.1


def test_the_backdoor_goes(victim):
    before = evaluate(victim.model, victim.test, trigger=victim.trigger)
    repaired = anp(victim.model, victim.clean, iterations=60, drop=0.1, generator=generator(0))
    after = evaluate(repaired.model, victim.test, trigger=victim.trigger)
    assert after.attack_success.value < 0.5 * before.attack_success.value
    assert repaired.log["removed"] > 0


@pytest.mark.parametrize(
    ("name", "value"),
    [("eps", -0.1), ("trade_off", 1.1), ("lr", float("nan")), ("iterations", 0), ("batch_size", 0), ("drop", 2)],
)
def test_settings_out_of_range(name, value, trained, images):
    with pytest.raises(MethodError, match=rf"^{name} must lie in"):
        anp(trained, images, **{"iterations": 1, name: value}, generator=generator(0))


def test_too_few_images(trained, images):
    with pytest.raises(DataError, match=r"^fit and hold-out need an image each"):
        anp(trained, images.subset(torch.arange(1)), iterations=1, generator=generator(0))
