"""I-BAU's hypergradient against the paper's formula with every derivative worked out as a matrix."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from secateur.errors import MethodError, ModelError
from secateur.measure import evaluate
from secateur.repair.i_bau import hypergradient, i_bau, learn_pattern
from secateur.state import generator, seeded


def smooth_net() -> nn.Module:
    """A network with curvature everywhere, small enough for full matrices of second derivatives."""
    with seeded(generator(5)):
        layers = nn.Linear(9, 5), nn.Linear(5, 3)
    for layer in layers:
        layer.weight.data.mul_(3)
    return nn.Sequential(nn.Flatten(), layers[0], nn.Tanh(), layers[1]).double().eval()


def flat(tensors) -> torch.Tensor:
    return torch.cat([t.reshape(-1) for t in tensors])


def split(vector: torch.Tensor, net: nn.Module) -> dict[str, torch.Tensor]:
    sizes = [p.numel() for p in net.parameters()]
    parts = zip(net.named_parameters(), vector.split(sizes), strict=True)
    return {name: part.view(p.shape) for (name, p), part in parts}


@pytest.mark.parametrize("terms", [0, 1, 2, 5])
def test_the_hypergradient(terms):
    net, draw = smooth_net(), generator(1)
    x1, x2 = (0.3 + 0.4 * torch.rand(6, 1, 3, 3, generator=draw, dtype=torch.float64) for _ in range(2))
    y1, y2 = (torch.randint(3, (6,), generator=draw) for _ in range(2))
    pattern = 0.1 * torch.rand(1, 1, 3, 3, generator=draw, dtype=torch.float64)
    chosen = torch.tensor([1.0, 0, 0, 1, 1, 0], dtype=torch.float64).view(-1, 1, 1, 1)
    weights = flat(p.detach() for p in net.parameters())

    def outer(d: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(functional_call(net, split(w, net), (x2 + chosen * d.view(1, 1, 3, 3),)), y2)

    def mapped(d: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        """One step of gradient descent of size 0.1 on the adversary's loss."""

        def adversary(d: torch.Tensor) -> torch.Tensor:
            logits = functional_call(net, split(w, net), (x1 + d.view(1, 1, 3, 3),))
            return -F.cross_entropy(logits, y1) + 0.001 * (d**2).sum()

        return d - 0.1 * torch.func.grad(adversary)(d)

    d = pattern.flatten()
    by_pattern, by_weights = torch.func.jacrev(mapped, argnums=(0, 1))(d, weights)
    pull, direct = torch.func.grad(outer, argnums=(0, 1))(d, weights)
    series = torch.zeros_like(pull)
    for _ in range(terms):
        series = by_pattern.T @ series + pull
    expected = direct + by_weights.T @ series
    loss, got = hypergradient(net, pattern, (x1, y1), (x2, y2), chosen, fixed_points=terms)
    assert float(loss) == pytest.approx(float(outer(d, weights)))
    assert torch.allclose(flat(got), expected, rtol=1e-8, atol=1e-12)
    assert terms == 0 or not torch.allclose(expected, direct, rtol=1e-3)


def test_attention_has_second_derivatives():
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(6, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = x.view(len(x), 1, 6, 6)
            return self.linear(F.scaled_dot_product_attention(x, x, x).mean((1, 2)))

    batch = torch.rand(5, 1, 6, 6, generator=generator(0)), torch.arange(5) % 3
    with seeded(generator(0)):
        net = Attention()
    chosen, pattern = torch.ones(5, 1, 1, 1), torch.zeros(1, 1, 6, 6)
    (_, direct), (_, got) = (hypergradient(net, pattern, batch, batch, chosen, fixed_points=k) for k in (0, 3))
    assert not torch.equal(flat(direct), flat(got))


def test_the_pattern_is_one_for_all_and_fools_the_network():
    net = smooth_net()
    x = 0.3 + 0.4 * torch.rand(60, 1, 3, 3, generator=generator(2), dtype=torch.float64)
    pattern = learn_pattern(net, [(part, torch.zeros(20, dtype=torch.int64)) for part in x.split(20)])
    assert pattern.shape == (1, 1, 3, 3)
    same = net(x).argmax(1) == net(x + pattern).argmax(1)
    assert float(same.double().mean()) < 0.5


def test_the_pattern_takes_steps_of_size_10_and_is_held_back_by_its_length(tiny, images):
    net = tiny()
    batches = [(0.25 + 0.5 * x, y) for x, y in list(images.batches(40))[:2]]
    d = torch.zeros(1, *images.shape)
    for x, _ in batches:
        d.requires_grad_()
        picked = net(x + d).log_softmax(1)[torch.arange(len(x)), net(x).argmax(1)]
        [slope] = torch.autograd.grad(0.001 * (d**2).sum() + picked.mean(), [d])
        d = (d - 10 * slope).detach()
    assert torch.allclose(learn_pattern(net, batches), d, rtol=1e-4, atol=1e-6)


def test_it_removes_a_backdoor(victim):
    before = evaluate(victim.model, victim.test, trigger=victim.trigger)
    repaired = i_bau(victim.model, victim.clean, rounds=5, lr=0.01, share=0.2, batch_size=30, generator=generator(0))
    after = evaluate(repaired.model, victim.test, trigger=victim.trigger)
    assert before.attack_success is not None
    assert after.attack_success is not None
    assert after.attack_success.value < before.attack_success.value - 0.3
    assert after.accuracy.value > before.accuracy.value - 0.05


def test_norms_keep_their_statistics(trained, images):
    repaired = i_bau(trained, images, rounds=1, fixed_points=1, generator=generator(0))
    assert all(torch.equal(buffer, trained.get_buffer(name)) for name, buffer in repaired.model.named_buffers())
    assert repaired.log["perturbation"] > 0


def test_no_rounds_change_nothing(trained, images):
    repaired = i_bau(trained, images, rounds=0, generator=generator(0))
    assert all(torch.equal(value, trained.state_dict()[name]) for name, value in repaired.model.state_dict().items())


def test_divergence_is_said(trained, images):
    with pytest.raises(ModelError, match=r"^training diverged: the loss is nan in step \d+; use a smaller lr than 1e\+06"):
        i_bau(trained, images, rounds=50, fixed_points=0, lr=1e6, generator=generator(0))


@pytest.mark.parametrize(
    ("name", "value"), [("rounds", -1), ("fixed_points", -1), ("lr", 0.0), ("share", 1.1), ("batch_size", 0)]
)
def test_settings_out_of_range(name, value, trained, images):
    with pytest.raises(MethodError, match=rf"^{name} must lie in \["):
        i_bau(trained, images, generator=generator(0), **{name: value})


def test_perturbed_images_are_not_clipped():
    """A pattern far outside [0, 1] keeps its gradient."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 2, bias=False))
    x, y, pattern = torch.full((6, 1, 2, 2), 0.5), torch.tensor([0, 1, 0, 1, 0, 1]), torch.full((1, 1, 2, 2), 7.0)
    loss, _ = hypergradient(net, pattern, (x, y), (x, y), torch.ones(6, 1, 1, 1), fixed_points=0)
    assert float(loss) == pytest.approx(float(F.cross_entropy(net(x + 7), y).detach()))
