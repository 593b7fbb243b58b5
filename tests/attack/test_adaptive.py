"""BPDA sees through rounding, EOT through noise; both leave the network as it was."""

import pytest
import torch
from attacked_models import Noisy, Round, accuracy, linear
from torch import nn

from secateur.attack import bpda, eot, mi_fgsm, pgd
from secateur.errors import MethodError
from secateur.state import generator, seeded


def rounded(net):
    return nn.Sequential(Round(), net).eval()


def test_rounding_hides_the_gradient_and_bpda_finds_it(hardened):
    model, x, y = rounded(hardened.model), hardened.x[:100], hardened.y[:100]
    blind = accuracy_under(model, x, y, None)
    layer = accuracy_under(model, x, y, bpda(lambda value: value, layer="0"))
    whole = accuracy_under(model, x, y, bpda(hardened.model))
    plain = accuracy(hardened.model, pgd(hardened.model, x, y, eps=0.12, generator=generator(0)), y)
    assert float(blind) > 0.6
    assert float(layer) < float(blind) - 0.2
    assert float(whole) < float(blind) - 0.2
    assert abs(float(layer) - plain) <= 0.05
    assert not any(module._forward_hooks for module in model.modules())


def accuracy_under(model, x, y, forward):
    return torch.tensor(accuracy(model, pgd(model, x, y, eps=0.12, forward=forward, generator=generator(0)), y))


def test_bpda_gives_exact_values_with_the_twins_gradient():
    model, x = linear(3, 16), torch.rand(2, 1, 4, 4, generator=generator(0)).requires_grad_()
    twin = linear(3, 16, seed=5)
    logits = bpda(twin)(model, x)
    assert torch.equal(logits, model(x))
    [slope] = torch.autograd.grad(logits[:, 1].sum(), [x])
    assert torch.allclose(slope[0].flatten(), twin.linear.weight[1])


def test_eot_follows_the_mean_gradient():
    """Over draws of a random mask the mean gradient is that of the mean mask."""

    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = linear(2, 16)

        def forward(self, x):
            return self.net(x * (torch.rand(x.shape[1:]) < 0.5) * 2)

    model, x = Masked(), torch.rand(3, 1, 4, 4, generator=generator(0)).requires_grad_()
    with seeded(generator(1)):
        logits = eot(4000)(model, x)
    assert logits.shape == (4000, 3, 2)
    [slope] = torch.autograd.grad(logits.mean(dim=0)[:, 1].sum(), [x])
    assert torch.allclose(slope[0].flatten(), model.net.linear.weight[1], atol=0.15)


def test_eot_is_stronger_on_a_network_that_draws(hardened):
    model, x, y = Noisy(hardened.model, 0.35).eval(), hardened.x[:100], hardened.y[:100]

    def robust(forward):
        adv = pgd(model, x, y, eps=0.12, steps=6, forward=forward, random_start=False, generator=generator(0))
        with torch.no_grad(), seeded(generator(9)):
            mean = torch.stack([model(adv).softmax(dim=1) for _ in range(40)]).mean(dim=0)
        return float((mean.argmax(dim=1) == y).float().mean())

    assert robust(eot(8)) < robust(None)


def test_they_combine_with_each_other_and_with_other_attacks(hardened):
    model = nn.Sequential(Round(), Noisy(hardened.model, 0.05)).eval()
    x, y = hardened.x[:60], hardened.y[:60]
    both = eot(3, forward=bpda(lambda value: value, layer="0"))
    for attack in (pgd, mi_fgsm):
        blind = attack(model, x, y, eps=0.15, steps=5, generator=generator(0))
        adv = attack(model, x, y, eps=0.15, steps=5, forward=both, generator=generator(0))
        assert accuracy(hardened.model, adv, y) < accuracy(hardened.model, blind, y) - 0.1


def test_a_network_that_draws_is_attacked_alike_with_the_same_generator(hardened):
    model, x, y = Noisy(hardened.model, 0.3).eval(), hardened.x[:20], hardened.y[:20]
    before = torch.get_rng_state()
    first, second, other = (pgd(model, x, y, forward=eot(2), generator=generator(seed)) for seed in (0, 0, 1))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)
    assert torch.equal(before, torch.get_rng_state())


def test_bad_twins_and_layers(hardened):
    x, y = hardened.x[:2], hardened.y[:2]
    with pytest.raises(MethodError, match=r"unknown layer 'nett'; did you mean 'net'\?"):
        pgd(hardened.model, x, y, forward=bpda(lambda value: value, layer="nett"), generator=generator(0))
    with pytest.raises(MethodError, match=r"a twin must return what it stands for: \(2, 10\), got \(2, 1, 28, 28\)"):
        pgd(hardened.model, x, y, forward=bpda(lambda value: value), generator=generator(0))
    with pytest.raises(MethodError, match=r"draws must lie in \[1, "):
        eot(0)


def test_a_twin_is_left_as_it_was(trained, images):
    twin = nn.Sequential(nn.BatchNorm2d(1), nn.Flatten(), nn.Linear(144, 3)).train()
    before = [value.clone() for value in twin.state_dict().values()]
    pgd(trained, images.x[:8], images.y[:8], eps=0.1, steps=2, forward=bpda(twin), generator=generator(0))
    assert all(torch.equal(value, old) for value, old in zip(twin.state_dict().values(), before, strict=True))
    assert twin.training
