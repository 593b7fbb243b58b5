"""The context managers put everything back, also after errors."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from secateur.state import evaluating, frozen, generator, seeded, threads


def mixed() -> nn.Sequential:
    net = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.BatchNorm1d(2), nn.Dropout()), nn.ReLU()).train()
    net[1][0].eval()
    net[0].weight.requires_grad_(False)
    return net


def flags(net: nn.Module) -> list[bool]:
    return [module.training for module in net.modules()]


class Stop(Exception):
    pass


def test_evaluating_restores_each_submodule():
    net = mixed()
    before = flags(net)
    assert set(before) == {True, False}
    with evaluating(net) as same:
        assert same is net
        assert not any(flags(net))
    assert flags(net) == before


def test_evaluating_restores_after_an_error():
    net = mixed()
    before = flags(net)
    with pytest.raises(Stop), evaluating(net):
        raise Stop
    assert flags(net) == before


def test_evaluating_nests():
    net = mixed()
    before = flags(net)
    with evaluating(net):
        with evaluating(net):
            net.train()
        assert not any(flags(net))
    assert flags(net) == before


def test_frozen_restores_each_parameter():
    net = mixed()
    before = [p.requires_grad for p in net.parameters()]
    assert set(before) == {True, False}
    with frozen(net) as same:
        assert same is net
        assert not any(p.requires_grad for p in net.parameters())
        assert not net(torch.ones(3, 2)).requires_grad
    assert [p.requires_grad for p in net.parameters()] == before
    with pytest.raises(Stop), frozen(net):
        raise Stop
    assert [p.requires_grad for p in net.parameters()] == before


def test_seeded_is_reproducible_and_restores_the_global_state():
    state = torch.get_rng_state()
    draws = []
    for seed in (0, 0, 1):
        with seeded(generator(seed)):
            draws.append(torch.rand(5).tolist())
        assert torch.equal(torch.get_rng_state(), state)
    assert draws[0] == draws[1] != draws[2]


def test_seeded_restores_after_an_error():
    state = torch.get_rng_state()
    with pytest.raises(RuntimeError), seeded(generator(0)):
        torch.rand(3).reshape(2)
    assert torch.equal(torch.get_rng_state(), state)


def test_seeded_draws_a_new_seed_each_time():
    source = generator(0)
    draws = []
    for _ in range(2):
        with seeded(source):
            draws.append(torch.rand(5).tolist())
    assert draws[0] != draws[1]


def test_seeded_does_not_depend_on_the_global_state():
    draws = []
    for start in (1, 2):
        with torch.random.fork_rng():
            torch.manual_seed(start)
            with seeded(generator(0)):
                draws.append(torch.rand(5).tolist())
    assert draws[0] == draws[1]


def test_threads_come_back():
    before = torch.get_num_threads()
    with threads(before + 1):
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before
    with pytest.raises(Stop), threads(before + 1):
        raise Stop
    assert torch.get_num_threads() == before


def test_generator_is_at_its_seed():
    assert torch.equal(torch.rand(3, generator=generator(7)), torch.rand(3, generator=generator(7)))
    assert not torch.equal(torch.rand(3, generator=generator(7)), torch.rand(3, generator=generator(8)))
