"""PTQ and QAT: ranges, masks that hold, gradients for attacks, and the network that comes in stays as it was."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from secateur import runs
from secateur.attack import eot, pgd, through_quantisation
from secateur.attack.network import quick_copy
from secateur.compress import encode, qat, quantise
from secateur.compress.quantise import grid
from secateur.errors import InconclusiveError, MethodError, ModelError
from secateur.measure import evaluate
from secateur.models import Classifier, dequantised, load_bundle, load_masks, quantisation_of, save
from secateur.models.quantised import backward_of
from secateur.prune import Fraction, adaptive, adaptives, apply_mask, magnitude, noise, select
from secateur.recipe import Recipe
from secateur.state import generator, seeded
from secateur.train import train
from secateur.types import to_float
from test_contracts import mixed, same, snapshot

GENTLE = Recipe(epochs=2, lr=0.01, batch_size=40)


@pytest.fixture(scope="module")
def twin(trained, images):
    return quantise(trained, images)


@pytest.fixture(scope="module")
def cut(trained, images):
    return select(magnitude.l1(trained, images, generator=generator(0)), Fraction(0.5), scope="global")


@pytest.mark.parametrize(
    ("low", "high", "bits", "wanted"),
    [
        (0.0, 25.5, 8, (0.1, 0)),
        (-12.8, 12.7, 8, (0.1, 128)),
        (1.0, 15.0, 4, (1.0, 0)),
        (-15.0, -1.0, 4, (1.0, 15)),
        (0.0, 0.0, 8, (1.0, 0)),
    ],
)
def test_grids_contain_zero(low, high, bits, wanted):
    scale, zero = grid(low, high, bits)
    assert (scale, zero) == (pytest.approx(wanted[0]), wanted[1])
    value = torch.fake_quantize_per_tensor_affine(torch.zeros(1), scale, zero, 0, 2**bits - 1)
    assert float(value) == 0


def test_ranges_are_those_of_the_images(trained, images):
    seen = (to_float(images.x) - trained.mean) / trained.std
    found = quantisation_of(quantise(trained, images))
    scale, zero = found.activations["input"]
    assert -zero * scale == pytest.approx(float(seen.min()), abs=scale)
    assert (255 - zero) * scale == pytest.approx(float(seen.max()), abs=scale)
    narrow = quantisation_of(quantise(trained, images, observer="percentile", percentile=99.0)).activations["input"]
    share = (seen <= (255 - narrow[1]) * narrow[0] + narrow[0]).double().mean()
    assert narrow[0] < scale
    assert float(share) == pytest.approx(0.99, abs=0.005)
    whole = quantisation_of(quantise(trained, images, observer="percentile", percentile=100.0)).activations
    assert whole["input"][0] == pytest.approx(scale, rel=1e-3)


def test_biases_lie_on_the_steps_of_the_runtime_and_those_of_0_stay_0(trained, images):
    model = copy.deepcopy(trained)
    with torch.no_grad():
        model.net.bn2.bias[1] = 0
    net, found = quantise(model, images).net, quantisation_of(quantise(model, images))
    factor = net.bn2.weight / (net.bn2.running_var + net.bn2.eps).sqrt()
    added = net.bn2.bias - net.bn2.running_mean * factor
    steps = found.activations["/relu"][0] * found.weights["conv2"] * factor.abs()
    near = ((added / steps) - (added / steps).round()).abs()
    assert float(near[[0, *range(2, 8)]].detach().amax()) < 0.02
    assert float(near[1].detach()) > 0.02
    assert float(net.bn2.bias[1].detach()) == 0
    assert float((net.bn2.bias - model.net.bn2.bias).detach().abs().amax()) <= 0.51 * float(steps.detach().amax())


def test_a_norm_of_two_convolutions_keeps_its_bias(images):
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Conv2d(1, 3, 3, bias=False), nn.Conv2d(1, 3, 5, padding=1, bias=False)
            self.norm, self.last, self.linear = nn.BatchNorm2d(3), nn.BatchNorm2d(3), nn.Linear(3, 3)

        def forward(self, x):
            x = torch.relu(self.norm(self.one(x)) + self.norm(self.two(x)) + self.last(self.one(x)))
            return self.linear(x.mean((2, 3)))

    with seeded(generator(0)):
        model = Classifier(Shared(), classes=images.classes, input_shape=images.shape).eval()
    with torch.no_grad():
        for norm in (model.net.norm, model.net.last):
            norm.bias.copy_(torch.tensor([0.123, 0.456, 0.789]))
    found = quantise(model, images).net
    assert torch.equal(found.norm.bias, model.net.norm.bias)
    assert not torch.equal(found.last.bias, model.net.last.bias)
    assert torch.allclose(found.last.bias, model.net.last.bias, atol=1e-3)


@pytest.mark.parametrize("method", ["ptq", "qat"])
def test_the_network_and_the_random_state_are_left_alone(method, trained, images):
    model = mixed(trained)
    before, rng, found = snapshot(model), torch.get_rng_state(), []
    for _ in range(2):
        ptq = method == "ptq"
        found.append(quantise(model, images) if ptq else qat(model, images, GENTLE, generator=generator(0)))
    assert encode(found[0]) == encode(found[1])
    assert same(before, snapshot(model))
    assert quantisation_of(model) is None
    assert not any(module.training for module in found[0].modules())
    assert torch.equal(rng, torch.get_rng_state())
    assert not {p.data_ptr() for p in found[0].parameters()} & {p.data_ptr() for p in model.parameters()}


def test_a_mask_put_on_healed_saved_loaded_and_quantised_keeps_exactly_its_zeros(trained, images, cut, tmp_path):
    healed = train(apply_mask(trained, cut), images, GENTLE, hold=cut.keep, generator=generator(0))
    save(healed, tmp_path / "a", masks=cut)
    loaded = load_bundle(tmp_path / "a")
    mask = load_masks(tmp_path / "a")
    rounded = quantise(loaded, images)
    for found in (rounded, qat(loaded, images, GENTLE, mask=mask, generator=generator(0))):
        save(found, tmp_path / "b", masks=mask, overwrite=True)
        back = load_bundle(tmp_path / "b")
        for name, keep in cut.keep.items():
            weight = back.net.get_parameter(name)
            assert bool((weight[~keep] == 0).all()), name
            if found is rounded:  # of what the mask keeps only that becomes 0 which is nearer to 0 than to the first level
                scale = quantisation_of(back).weights[name.removesuffix(".weight")].reshape(-1, *[1] * (weight.ndim - 1))
                near = loaded.net.get_parameter(name).abs() / scale <= 0.5
                assert torch.equal(weight == 0, near), name
        assert evaluate(back, images).accuracy.value > 0.8


def test_qat_trains_what_rounding_costs(trained, images, bars):
    test = bars(120, 7)
    rough = quantise(trained, images, bits=2)
    taught = qat(trained, images, Recipe(epochs=6, lr=0.02, batch_size=40), bits=2, generator=generator(0))
    with torch.no_grad():
        rest = [float(F.cross_entropy(model(to_float(test.x)), test.y)) for model in (rough, taught)]
    assert rest[1] < 0.5 * rest[0]
    assert quantisation_of(taught).activations == quantisation_of(rough).activations
    assert not torch.equal(taught.net.conv2.weight, rough.net.conv2.weight)


def test_qat_holds_masks_while_it_trains(trained, images, cut):
    pruned = apply_mask(trained, cut)
    bold = Recipe(epochs=3, lr=0.1, batch_size=40, label_smoothing=0.3)
    held = qat(pruned, images, bold, mask=cut, generator=generator(0))
    free = qat(pruned, images, bold, generator=generator(0))
    lost = [bool((held.net.get_parameter(name)[~keep] != 0).any()) for name, keep in cut.keep.items()]
    back = [bool((free.net.get_parameter(name)[~keep] != 0).any()) for name, keep in cut.keep.items()]
    assert not any(lost)
    assert any(back)


def slope(model, x, forward=None):
    x = x.clone().requires_grad_()
    logits = model(x) if forward is None else forward(model, x)
    [found] = torch.autograd.grad(logits[:, 0].sum(), [x])
    return logits.detach(), found


def test_gradients_are_those_that_they_say(trained, images):
    # The range ends at 0, the grey level 0.4 before normalisation, so that many values of the input lie beyond it.
    dark = images.__class__(images.x // 4, images.y, images.classes)
    model, x = quantise(trained, dark), to_float(images.x[:8])
    exact, own = slope(model, x)
    logits, clipped = slope(model, x, through_quantisation("clipped"))
    assert torch.equal(exact, logits)
    assert torch.equal(own, clipped)
    beyond = x > 0.41
    assert bool(beyond.any())
    assert not bool(own[beyond].any())
    logits, passed = slope(model, x, through_quantisation("pass-through"))
    assert torch.equal(exact, logits)
    assert bool(passed[beyond].any())
    logits, smooth = slope(model, x, through_quantisation("float"))
    assert torch.equal(exact, logits)
    assert torch.equal(smooth, slope(dequantised(model), x)[1])
    assert not torch.allclose(smooth, passed)
    with pytest.raises(MethodError, match="unknown backward 'none'"), backward_of("none"):
        pass


def test_attacks_on_quantised_networks_are_adaptive(twin, trained, images):
    assert list(adaptives(twin)) == ["clipped", "pass-through", "float"]
    assert adaptives(trained) == {"": None}
    assert adaptive(twin) is not None
    drawing = noise(twin, radius=0.01, resampled=True, generator=generator(0))
    assert drawing.forward(drawing.model, torch.rand(2, 1, 12, 12)).shape == (10, 2, 3)
    assert list(adaptives(drawing.model)) == ["clipped", "pass-through", "float"]
    assert eot(2, forward=adaptive(twin))(twin, torch.rand(2, 1, 12, 12)).shape == (2, 2, 3)
    assert quick_copy(twin, torch.rand(2, 1, 12, 12)) is None
    x, y = to_float(images.x[:60]), images.y[:60]
    for forward in adaptives(twin).values():
        broken = pgd(twin, x, y, eps=0.2, steps=5, forward=forward, generator=generator(0))
        assert float((twin(broken).argmax(dim=1) == y).double().mean()) < 0.7


def test_a_measurement_attacks_with_every_gradient(twin, bars):
    few = {"steps": 2, "queries": 2}
    run = runs.attack(twin, bars(30, 2), eps=0.1, arguments=few, sweep=(0.1,), images=20)
    names = set(run.robustness.by_attack)
    assert {f"pgd ({loss}, {way})" for loss in ("cross-entropy", "margin") for way in adaptives(twin)} | {"square"} == names
    assert len(run.result.details["robustness"]["curve"]["attacks"]) == 6
    assert run.sanity["ADV-012"].status == "PASS" or run.sanity["ADV-012"].status == "WARN"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"bits": 9}, "bits must be a whole number in .2, 8., got 9"),
        ({"weight_bits": 1}, "weight_bits must be"),
        ({"observer": "mean"}, "unknown observer 'mean'"),
        ({"percentile": 40.0}, "percentile must lie in"),
        ({"batch_size": 0}, "batch_size must lie in"),
    ],
)
def test_wrong_arguments(given, message, trained, images):
    with pytest.raises(MethodError, match=message):
        quantise(trained, images, **given)


def test_what_cannot_be_quantised(twin, trained, images):
    with pytest.raises(ModelError, match="quantised already"):
        quantise(twin, images)
    assert quantisation_of(quantise(dequantised(twin), images)) is not None
    with pytest.raises(InconclusiveError, match="at least one clean image"):
        quantise(trained, images.subset(torch.arange(0)))
    with pytest.raises(MethodError, match="precision must be float32"):
        qat(trained, images, Recipe(precision="bfloat16"), generator=generator(0))
    broken = copy.deepcopy(trained)
    with torch.no_grad():
        broken.net.bn1.bias[0] = torch.inf
    with pytest.raises(ModelError, match="'/relu' is not on the images given"):
        quantise(broken, images)
