"""SAU's losses image by image, and what they do to a network."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from secateur.errors import MethodError, ModelError
from secateur.measure import evaluate
from secateur.repair.sau import adversarial_loss, sau, shared_noise, unlearning_loss
from secateur.state import generator, seeded


def softmax(row: list[float]) -> list[float]:
    powers = [math.exp(value) for value in row]
    return [power / sum(powers) for power in powers]


def best(row: list[float]) -> int:
    return row.index(max(row))


def divergence(p: list[float], q: list[float]) -> float:
    """Jensen-Shannon: the mean of both relative entropies to the mean distribution."""
    middle = [(a + b) / 2 for a, b in zip(p, q, strict=True)]
    return sum(sum(a * math.log(a / m) for a, m in zip(one, middle, strict=True)) for one in (p, q)) / 2


def test_the_noise_pulls_both_answers_together_and_away_from_the_label():
    draw = generator(0)
    mine, theirs = (3 * torch.randn(60, 4, generator=draw, dtype=torch.float64) for _ in range(2))
    own, others, y = (torch.randint(4, (60,), generator=draw) for _ in range(3))
    total, reached = 0.0, 0
    for i in range(60):
        a, b = mine[i].tolist(), theirs[i].tolist()
        p, q = softmax(a), softmax(b)
        fooled, copy_fooled = best(a) != own[i], best(b) != others[i]
        if fooled and copy_fooled and best(a) == best(b):
            reached += 1
        else:
            total += divergence(p, q)
        total += 0.0 if fooled else 0.01 / 2 * math.log(p[int(y[i])])
        total += 0.0 if copy_fooled else 0.01 / 2 * math.log(q[int(y[i])])
    loss, done = adversarial_loss(mine, theirs, own, others, y)
    assert 0 < reached < 60
    assert not done
    assert float(loss) == pytest.approx(total / 60)
    same = mine.argmax(1)
    assert adversarial_loss(mine, mine, (same + 1) % 4, (same + 1) % 4, y) == (0.0, True)


def linear(seed: int) -> nn.Module:
    with seeded(generator(seed)):
        layer = nn.Linear(16, 3)
    layer.weight.data.mul_(5)
    return nn.Sequential(nn.Flatten(), layer).double()


def test_the_network_leaves_the_class_into_which_the_noise_fools_the_copy():
    net, other, draw = linear(0), linear(3), generator(3)
    x, y = torch.rand(60, 1, 4, 4, generator=draw, dtype=torch.float64), torch.randint(3, (60,), generator=draw)
    noisy = torch.rand(x.shape, generator=draw, dtype=torch.float64)
    logits, after, answers, noisy_answers = (part.detach() for part in (net(x), net(noisy), other(x), other(noisy)))
    total, fooled = 0.0, 0
    for i in range(60):
        total += 0.0 - math.log(softmax(logits[i].tolist())[int(y[i])])
        target = best(noisy_answers[i].tolist())
        if target not in (int(y[i]), best(answers[i].tolist())):
            fooled += 1
            total -= 0.7 * math.log(1 - max(softmax(after[i].tolist())[target], 0.001))
    loss, share = unlearning_loss(net, other, x, noisy, y, answers.argmax(1), shared=0.7)
    assert fooled > 0
    assert share == pytest.approx(fooled / 60)
    assert float(loss.detach()) == pytest.approx(total / 60, rel=1e-4)


def test_the_noise_stays_in_its_ball_and_fools_both_alike():
    """At the start the copy is the network itself."""
    nets = linear(0), linear(0)
    x = torch.rand(60, 1, 4, 4, generator=generator(2), dtype=torch.float64)
    answers = [net(x).argmax(1) for net in nets]
    fooled = []
    for steps in (1, 8):
        noisy = shared_noise(*nets, x, answers[0], answers[1], eps=0.3, steps=steps)
        assert float((noisy - x).abs().max()) <= 0.3 + 1e-6
        assert 0 <= float(noisy.min()) <= float(noisy.max()) <= 1
        first, second = (net(noisy).argmax(1) for net in nets)
        fooled.append(int(((first != answers[0]) & (second != answers[1]) & (first == second)).sum()))
    assert fooled[1] > fooled[0] + 10


def test_the_noise_starts_in_the_corner_and_takes_signed_steps():
    net, other = linear(0), linear(1)
    x = 0.4 + 0.2 * torch.rand(5, 1, 4, 4, generator=generator(2), dtype=torch.float64)
    y = net(x).argmax(1)
    answers = other(x).argmax(1)
    noise = torch.full_like(x, 0.2).requires_grad_()
    loss, _ = adversarial_loss(net(x + noise), other(x + noise), y, answers, y)
    loss.backward()
    assert noise.grad is not None
    expected = x + (0.2 - 0.2 * noise.grad.sign()).clamp(-0.2, 0.2)
    assert torch.allclose(shared_noise(net, other, x, y, answers, eps=0.2, steps=1), expected)


def test_it_removes_a_backdoor(victim):
    before = evaluate(victim.model, victim.test, trigger=victim.trigger)
    repaired = sau(victim.model, victim.clean, epochs=10, steps=3, lr=0.01, eps=0.5, batch_size=30, generator=generator(0))
    after = evaluate(repaired.model, victim.test, trigger=victim.trigger)
    assert before.attack_success is not None
    assert after.attack_success is not None
    assert after.attack_success.value < before.attack_success.value - 0.3
    assert after.accuracy.value > before.accuracy.value - 0.05


def test_norms_keep_their_statistics(trained, images):
    repaired = sau(trained, images, epochs=1, lr=0.01, steps=1, generator=generator(0))
    assert all(torch.equal(buffer, trained.get_buffer(name)) for name, buffer in repaired.model.named_buffers())
    assert not torch.equal(repaired.model.get_parameter("net.linear.weight"), trained.get_parameter("net.linear.weight"))


def test_no_epochs_change_nothing(trained, images):
    repaired = sau(trained, images, epochs=0, generator=generator(0))
    assert all(torch.equal(value, trained.state_dict()[name]) for name, value in repaired.model.state_dict().items())


def test_divergence_is_said(trained, images):
    with pytest.raises(ModelError, match=r"^training diverged: the loss is nan in step \d+; use a smaller lr than 1e\+06"):
        sau(trained, images, epochs=50, steps=1, lr=1e6, generator=generator(0))


@pytest.mark.parametrize(
    ("name", "value"), [("epochs", -1), ("lr", 0.0), ("eps", 1.1), ("steps", 0), ("shared", -1.0), ("batch_size", 0)]
)
def test_settings_out_of_range(name, value, trained, images):
    with pytest.raises(MethodError, match=rf"^{name} must lie in \["):
        sau(trained, images, generator=generator(0), **{name: value})
