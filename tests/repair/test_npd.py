"""NPD's filter is part of the network it returns, and its losses are the paper's."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from secateur.errors import MethodError, ModelError
from secateur.measure import evaluate
from secateur.models import build
from secateur.repair.npd import Polarizer, npd, perturb, polarizing_loss
from secateur.state import generator, seeded
from secateur.types import to_float


def softmax(row: list[float]) -> list[float]:
    powers = [math.exp(value) for value in row]
    return [power / sum(powers) for power in powers]


@pytest.mark.parametrize("layer", ["conv1", "conv2", "linear"])
def test_the_folded_weight_is_the_network_with_the_matrix_before_the_layer(layer, tiny, images):
    """The filter as a hook that mixes what the layer reads, padding and strides untouched."""
    model = tiny().double()
    x = to_float(images.x[:9]).double()
    plugged = Polarizer(model, images.shape, layer)
    assert torch.allclose(plugged(x), model(x))
    plugged.matrix.data += 0.3 * torch.randn(plugged.matrix.shape, generator=generator(0), dtype=torch.float64)

    def mix(module, given):
        channels = given[0].unbind(1)
        mixed = torch.zeros_like(given[0])
        for i, row in enumerate(plugged.matrix.tolist()):
            for a, channel in zip(row, channels, strict=True):
                mixed[:, i] += a * channel
        return mixed

    handle = model.get_submodule(f"net.{layer}").register_forward_pre_hook(mix)
    assert torch.allclose(plugged(x), model(x))
    handle.remove()
    assert not torch.allclose(plugged(x), model(x))


def test_the_network_returned_is_the_one_that_was_trained(trained, images):
    repaired = npd(trained, images, epochs=1, lr=0.05, batch_size=120, generator=generator(0))
    [changed] = [n for n, p in repaired.model.named_parameters() if not torch.equal(p, trained.get_parameter(n))]
    assert repaired.notes == (f"the filter is part of '{changed.removeprefix('net.').removesuffix('.weight')}'",)
    assert all(torch.equal(buffer, trained.get_buffer(name)) for name, buffer in repaired.model.named_buffers())
    # W A has the rows of W mixed: solving for A gives the matrix back, and it moved as far as the log says.
    weight, own = repaired.model.get_parameter(changed), trained.get_parameter(changed)
    flat, before = (w.detach().transpose(0, 1).flatten(1).double() for w in (weight, own))
    matrix = torch.linalg.lstsq(before.T, flat.T).solution
    assert torch.allclose(before.T @ matrix, flat.T, atol=1e-5)
    assert repaired.log["matrix_moved"] > 0


def test_the_losses():
    draw = generator(0)
    logits, after = (2 * torch.randn(40, 4, generator=draw, dtype=torch.float64) for _ in range(2))
    y, own, target = (torch.randint(4, (40,), generator=draw) for _ in range(3))
    total = 0.0
    for i in range(40):
        p, q = softmax(logits[i].tolist()), softmax(after[i].tolist())
        wrong = max(k for k in range(4) if k != y[i] and q[k] == max(q[j] for j in range(4) if j != y[i]))
        stay, free, escape = math.log(q[int(own[i])]), math.log(1.0001 - q[wrong]), math.log(1.0001 - q[int(target[i])])
        total -= math.log(p[int(y[i])]) + 0.4 * (stay + free + escape)
    loss = polarizing_loss(logits, after, y, own, target, adversarial=0.4)
    assert float(loss) == pytest.approx(total / 40)


def test_the_perturbation_seeks_the_likeliest_wrong_class_within_its_ball(tiny, images):
    plugged = Polarizer(tiny(), images.shape)
    x = to_float(images.x[:60])
    with torch.no_grad():
        before = plugged(x)
    y = before.argmax(1)
    losses = []
    for steps in (0, 1, 5):
        perturbed, own, target = perturb(plugged, x, y, eps=0.7, steps=steps)
        assert torch.equal(own, before.argmax(1))
        for row, label, sought in zip(before.tolist(), y.tolist(), target.tolist(), strict=True):
            assert sought == max((k for k in range(3) if k != label), key=row.__getitem__)
        assert float((perturbed - x).flatten(1).norm(dim=1).max()) <= 0.7 + 1e-5
        assert 0 <= float(perturbed.min()) <= float(perturbed.max()) <= 1
        losses.append(float(nn.functional.cross_entropy(plugged(perturbed), target).detach()))
    assert losses[0] > losses[1] > losses[2]


def test_it_weakens_a_backdoor(victim):
    before = evaluate(victim.model, victim.test, trigger=victim.trigger)
    repaired = npd(victim.model, victim.clean, epochs=20, lr=0.05, batch_size=20, generator=generator(0))
    after = evaluate(repaired.model, victim.test, trigger=victim.trigger)
    assert before.attack_success is not None
    assert after.attack_success is not None
    assert after.attack_success.value < before.attack_success.value - 0.3
    assert after.accuracy.value > before.accuracy.value - 0.05


def test_the_default_place_is_the_last_convolution_but_one_and_never_the_first_layer():
    with seeded(generator(0)):
        residual = build("preact_resnet18", width=4, classes=3)
        perceptron = nn.Sequential(nn.Flatten(), nn.Linear(48, 6), nn.ReLU(), nn.Linear(6, 3))
        double = nn.Sequential(nn.Conv2d(3, 2, 2), nn.Conv2d(2, 2, 2), nn.Flatten(), nn.Linear(8, 3))
        single = nn.Sequential(nn.Conv2d(3, 2, 3), nn.Flatten(), nn.Linear(8, 3))
    assert Polarizer(residual, (3, 16, 16)).layer == "layer4.1.conv1"
    assert Polarizer(perceptron, (3, 4, 4)).layer == "3"
    assert Polarizer(double, (3, 4, 4)).layer == "1"
    assert Polarizer(single, (3, 4, 4)).layer == "2"


def test_no_epochs_change_nothing(trained, images):
    repaired = npd(trained, images, epochs=0, generator=generator(0))
    assert all(torch.equal(value, trained.state_dict()[name]) for name, value in repaired.model.state_dict().items())


def test_divergence_is_said(trained, images):
    with pytest.raises(
        ModelError, match=r"^training diverged: the loss is (nan|inf) in step \d+; use a smaller lr than 1e\+09"
    ):
        npd(trained, images, epochs=50, steps=0, lr=1e9, generator=generator(0))


def test_a_grouped_convolution_or_an_unknown_layer_is_refused(tiny, images):
    grouped = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3, groups=2), nn.Flatten(), nn.Linear(256, 3))
    with pytest.raises(MethodError, match=r"^unknown layer '1'; choose from: 0, 3$"):
        npd(grouped, images, layer="1", generator=generator(0))
    with pytest.raises(MethodError, match=r"^unknown layer 'conv9'; did you mean 'conv"):
        npd(tiny(), images, layer="conv9", generator=generator(0))
    with pytest.raises(MethodError, match=r"^npd needs a second layer, a convolution that is not grouped or a linear one"):
        npd(nn.Sequential(nn.Flatten(), nn.Linear(144, 3)), images, generator=generator(0))


@pytest.mark.parametrize(
    ("name", "value"),
    [("epochs", -1), ("lr", 0.0), ("eps", -1.0), ("steps", -1), ("adversarial", -0.1), ("batch_size", 0)],
)
def test_settings_out_of_range(name, value, trained, images):
    with pytest.raises(MethodError, match=rf"^{name} must lie in \["):
        npd(trained, images, generator=generator(0), **{name: value})
