"""FT-SAM steps as the paper's formula says, worked out by hand on a small network."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from torch import nn

from secateur.errors import MethodError, ModelError
from secateur.measure import evaluate
from secateur.repair.ft_sam import ft_sam, sharp_gradients, smoothed_loss
from secateur.state import generator
from secateur.types import to_float


def smoothed(logits: torch.Tensor, y: torch.Tensor, smoothing: float) -> torch.Tensor:
    """Cross-entropy against 1 - s for the true class and s / (classes - 1) for each other, image by image."""
    total = torch.zeros((), dtype=logits.dtype)
    for row, label in zip(logits, y, strict=True):
        for k, log_p in enumerate(row.log_softmax(0)):
            total = total - log_p * (1 - smoothing if k == label else smoothing / (len(row) - 1))
    return total / len(y)


def gradients(net: nn.Module, x: torch.Tensor, y: torch.Tensor, smoothing: float) -> list[torch.Tensor]:
    return list(torch.autograd.grad(smoothed(net(x), y, smoothing), list(net.parameters())))


@pytest.mark.parametrize(("rho", "smoothing"), [(2.0, 0.1), (0.5, 0.0), (0.0, 0.2)])
def test_the_gradient_is_that_at_the_worst_weights_of_the_adaptive_ball(rho, smoothing, tiny, images):
    net = tiny().double().train()
    x, y = to_float(images.x[:20]).double(), images.y[:20]
    by_hand = copy.deepcopy(net)
    first = gradients(by_hand, x, y, smoothing)
    length = sum(float((p.detach() * g).square().sum()) for p, g in zip(by_hand.parameters(), first, strict=True)) ** 0.5
    with torch.no_grad():
        for p, g in zip(by_hand.parameters(), first, strict=True):
            p += rho * p**2 * g / length
    expected = gradients(by_hand, x, y, smoothing)
    weights = [p.detach().clone() for p in net.parameters()]
    once = copy.deepcopy(net)
    loss = smoothed(once(x), y, smoothing)
    assert float(sharp_gradients(net, partial(smoothed_loss, net, x, y, smoothing), rho=rho)) == pytest.approx(
        float(loss.detach())
    )
    for p, wanted, value in zip(net.parameters(), expected, weights, strict=True):
        assert p.grad is not None
        assert torch.allclose(p.grad, wanted, rtol=1e-6, atol=1e-9)
        assert torch.equal(p, value)
    for (name, buffer), wanted in zip(net.named_buffers(), once.buffers(), strict=True):
        assert torch.equal(buffer, wanted), f"{name}: only the first pass moves the running statistics"


def test_running_statistics_come_from_the_first_pass_alone(trained, images):
    few = images.subset(torch.arange(16))
    repaired = ft_sam(trained, few, epochs=1, batch_size=16, lr=0.05, generator=generator(4))
    names = [name for name, _ in trained.named_parameters()]
    moved = {name: repaired.model.get_parameter(name) - trained.get_parameter(name) for name in names}
    assert all(bool(change.any()) for change in moved.values())
    plain = ft_sam(trained, few, epochs=1, batch_size=16, lr=0.05, rho=0, generator=generator(4))
    assert any(not torch.equal(plain.model.get_parameter(name), repaired.model.get_parameter(name)) for name in names)
    for name, buffer in plain.model.named_buffers():
        assert torch.equal(buffer, repaired.model.get_buffer(name)), f"{name} must come from the first pass"


def test_it_weakens_a_backdoor(victim):
    before = evaluate(victim.model, victim.test, trigger=victim.trigger)
    repaired = ft_sam(victim.model, victim.clean, epochs=20, lr=0.05, batch_size=20, generator=generator(0))
    after = evaluate(repaired.model, victim.test, trigger=victim.trigger)
    assert before.attack_success is not None
    assert after.attack_success is not None
    assert after.attack_success.value < before.attack_success.value - 0.3
    assert after.accuracy.value > before.accuracy.value - 0.05


def test_no_epochs_change_nothing(trained, images):
    repaired = ft_sam(trained, images, epochs=0, generator=generator(0))
    assert all(torch.equal(value, trained.state_dict()[name]) for name, value in repaired.model.state_dict().items())
    assert repaired.mask is None


def test_divergence_is_said(trained, images):
    with pytest.raises(ModelError, match=r"^training diverged: the loss is nan in step \d+; use a smaller lr than 1e\+06"):
        ft_sam(trained, images, epochs=50, lr=1e6, generator=generator(0))


@pytest.mark.parametrize(("name", "value"), [("rho", -1.0), ("smoothing", 0.6), ("lr", 0.0), ("epochs", -1), ("batch_size", 0)])
def test_settings_out_of_range(name, value, trained, images):
    with pytest.raises(MethodError, match=rf"^{name} must lie in \["):
        ft_sam(trained, images, generator=generator(0), **{name: value})
