"""Quantised networks: what rounding does, that nothing else changes, bundles, and what is refused."""

from __future__ import annotations

import copy
import json

import pytest
import safetensors.torch
import torch
from test_architectures import THIN
from test_channels import randomise
from torch import nn

from secateur.compress import quantise
from secateur.errors import ModelError
from secateur.forward import Incremental
from secateur.measure import predict
from secateur.models import (
    Classifier,
    Quantisation,
    build,
    dequantised,
    load_bundle,
    quantisation_of,
    read_arch,
    save,
    unwrap,
    wrap,
)
from secateur.models.channels import trace_channels
from secateur.models.flow import trace
from secateur.models.quant import FILE
from secateur.models.quantised import attach, on_grid, steps
from secateur.models.shrink import shrink
from secateur.state import generator, seeded
from secateur.types import ImageSet

# The same blocks as in others, more of them.
DEEP = {"resnet32", "resnet44", "resnet56", "resnet110", "resnet34", "resnet34_imagenet", "preact_resnet34"} | {
    f"vgg{depth}_bn{kind}" for depth in (13, 16, 19) for kind in ("", "_imagenet")
}


@pytest.fixture(scope="module")
def twin(trained, images):
    return quantise(trained, images)


class Add(nn.Module):
    """A layer, an addition of its output to its input, and a classifier: every number can be followed by hand."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)

    def forward(self, x):
        x = x.flatten(1)
        return self.last(torch.relu(self.first(x) + x))


def test_rounding_by_hand():
    net = Add()
    with torch.no_grad():
        net.first.weight.copy_(torch.tensor([[3.0, -1.0], [0.0, 0.5]]))
        net.last.weight.copy_(torch.eye(2))
    model = Classifier(net, classes="ab", input_shape=(1, 1, 2)).eval()
    assert steps(net.first.weight, 3).tolist() == [1.0, pytest.approx(0.5 / 3)]
    with torch.no_grad():
        net.first.weight.copy_(on_grid(net.first.weight, steps(net.first.weight, 3), 3))
    grids = {"input": (0.25, 0), "first": (1.0, 2), "/relu": (0.5, 0)}
    attach(model, Quantisation(3, 3, {"first": steps(net.first.weight, 3), "last": torch.full((2,), 1 / 3)}, grids))
    # 0.6 and 0.4 become 0.5 and 0.5; 3 * 0.5 - 0.5 = 1 and 0.25 become 1 and 0; 1.5 and 0.5 stay; logits are not rounded.
    assert torch.allclose(model(torch.tensor([[[[0.6, 0.4]]]])).detach(), torch.tensor([[1.5, 0.5]]))


def test_values_lie_on_few_levels_and_the_answers_stay_near(twin, trained, images):
    assert torch.equal(predict(twin, images), predict(trained, images))
    found = quantisation_of(twin)
    assert found is not None
    for name, scale in found.weights.items():
        weight = twin.net.get_submodule(name).weight.detach()
        whole = weight / scale.reshape(-1, *[1] * (weight.ndim - 1))
        assert torch.allclose(whole, whole.round(), atol=1e-4)
        assert float(whole.abs().amax()) == pytest.approx(127)
    seen = {}
    flow = vars(twin.net)["forward"].flow
    with torch.no_grad():
        x = (images.x[:20].float() / 255 - twin.mean) / twin.std
        flow.run(twin.net, x, edit=lambda site, value: seen.setdefault(site, vars(twin.net)["forward"]._rounded(site, value)))
    assert list(seen) == ["input", "/relu", "/relu#2", "/relu#3", "/relu#4", "/adaptive_avg_pool2d"]
    assert all(len(value.unique()) <= 256 for value in seen.values())
    few = quantise(trained, images, bits=3)
    with torch.no_grad():
        assert not torch.allclose(few(images.x[:5] / 255), twin(images.x[:5] / 255), atol=0.01)


@pytest.mark.parametrize("name", sorted(THIN.keys() - DEEP))
def test_every_architecture_is_followed_and_nothing_else_changes(name):
    shape = (3, 32, 32)
    with seeded(generator(0)):
        net = randomise(build(name, **THIN[name])).float()
    flow, x = trace(net, shape), torch.rand(2, *shape, generator=generator(1))
    with torch.no_grad():
        assert torch.equal(flow.run(net, x), net(x))
    assert flow.layers
    assert len(set(flow.sites)) == len(flow.sites)
    assert next(iter(flow.sites)) == "input"
    model = Classifier(net, classes=[str(i) for i in range(net(x).shape[1])], input_shape=shape).eval()
    data = ImageSet((255 * x).to(torch.uint8), torch.zeros(2, dtype=torch.int64), model.classes)
    quantised = quantise(model, data)
    assert quantised.state_dict().keys() == model.state_dict().keys()
    assert [type(m) for m in quantised.modules()] == [type(m) for m in model.modules()]
    with torch.no_grad():
        wanted, found = model(x), quantised(x)
    assert 0 < float((found - wanted).abs().mean()) < 0.1 * float(wanted.amax() - wanted.amin())


def test_round_trip_through_a_bundle(twin, tmp_path):
    x = torch.rand(4, 1, 12, 12, generator=generator(0))
    save(twin, tmp_path / "a")
    back = load_bundle(tmp_path / "a")
    assert torch.equal(back(x), twin(x))
    assert set(safetensors.torch.load_file(tmp_path / "a" / "model.safetensors")) == set(twin.net.state_dict())
    save(back, tmp_path / "b")
    for name in ("arch.json", FILE, "model.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    save(dequantised(back), tmp_path / "b", overwrite=True)
    assert read_arch(tmp_path / "b")["quant"] is None
    assert not (tmp_path / "b" / FILE).exists()


def test_copies_and_edits_of_feature_maps(twin):
    x = torch.rand(4, 1, 12, 12, generator=generator(0))
    double = copy.deepcopy(twin)
    with torch.no_grad():
        double.net.linear.bias.add_(1)
        assert torch.allclose(double(x), twin(x) + 1)
    assert not torch.equal(dequantised(twin)(x), twin(x))
    edited = wrap(twin, [{"after": "bn3", "kind": "clamp", "low": 0.0, "high": 0.1}])
    assert not torch.equal(edited(x), twin(x))
    assert torch.equal(unwrap(edited)(x), twin(x))


def test_hooks_of_modules_that_hold_others_are_heard():
    net = build("resnet_cifar", depth=8, width=4, classes=3, in_channels=1)
    model = Classifier(net, classes="abc", input_shape=(1, 12, 12)).eval()
    x = torch.rand(2, 1, 12, 12, generator=generator(0))
    data = ImageSet((255 * x).to(torch.uint8), torch.zeros(2, dtype=torch.int64), model.classes)
    quantised = quantise(model, data)
    seen = []
    handle = quantised.net.get_submodule("layer2").register_forward_hook(lambda *args: seen.append(args[2]))
    with torch.no_grad():
        quantised(x)
    handle.remove()
    assert [tuple(value.shape) for value in seen] == [(2, 8, 6, 6)]
    edited = wrap(quantised, [{"after": "layer2", "kind": "clamp", "low": 0.0, "high": 0.0}])
    with torch.no_grad():
        assert not torch.equal(edited(x), quantised(x))


def test_evaluation_of_variants_sees_the_quantisation(twin, trained, images):
    few = quantise(trained, images, bits=3)
    changes = {"bn4.bias": few.net.bn4.bias.detach() + 0.5}
    changed = copy.deepcopy(few)
    with torch.no_grad():
        changed.net.bn4.bias.add_(0.5)
    assert torch.equal(Incremental(few, images).predict(changes), predict(changed, images))


def test_channels_leave_before_quantisation(twin):
    kept = {trace_channels(twin, (1, 12, 12)).sites[0].name: torch.tensor([0, 1])}
    with pytest.raises(ModelError, match="before a network is quantised"):
        shrink(twin, kept, (1, 12, 12))


def test_weights_that_left_the_grid_are_refused(twin, tmp_path):
    moved = copy.deepcopy(twin)
    with torch.no_grad():
        moved.net.conv2.weight[0, 0, 0, 0] += 1e-3
    with pytest.raises(ModelError, match="'conv2' do not lie on the grid"):
        save(moved, tmp_path / "a")
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q: q.update(weight_bits=9), "weight_bits must be a whole number in .2, 8., got 9"),
        (lambda q: q.update(activation_bits=True), "activation_bits must be a whole number"),
        (lambda q: q.update(weights="../x"), "weights must be 'quant.safetensors'"),
        (lambda q: q.update(extra=1), "and nothing else"),
        (lambda q: q.update(activations={}), "1 to 10000 sites"),
        (lambda q: q["activations"].pop("input"), "'input' is missing"),
        (lambda q: q["activations"].update({"/strange": q["activations"]["input"]}), "unknown name '/strange'"),
        (lambda q: q["activations"].update({"a\nb": q["activations"]["input"]}), "printable"),
        (lambda q: q["activations"]["input"].update(scale=0), "scale of 'input' must be a number in"),
        (lambda q: q["activations"]["input"].update(scale=1e31), "scale of 'input' must be a number in"),
        (
            lambda q: q["activations"]["input"].update(scale=10**400),
            "scale of 'input' must be a number in .*, got 1000.*[.][.][.]$",
        ),
        (lambda q: q["activations"]["input"].update(scale=-(10**400)), "scale of 'input' must be a number in"),
        (lambda q: q["activations"]["input"].update(scale="1"), "scale of 'input' must be a number in"),
        (lambda q: q["activations"]["input"].update(zero_point=256), "zero_point of 'input'"),
        (lambda q: q["activations"]["input"].update(zero_point=0.5), "zero_point of 'input'"),
        (lambda q: q["activations"].update(input=3), "must have scale and zero_point"),
    ],
)
def test_hostile_descriptions_are_refused(change, message, twin, tmp_path):
    save(twin, tmp_path / "a")
    path = tmp_path / "a" / "arch.json"
    fields = json.loads(path.read_text("utf-8"))
    change(fields["quant"])
    path.write_text(json.dumps(fields), "utf-8")
    with pytest.raises(ModelError, match=message):
        load_bundle(tmp_path / "a")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("conv1"), "'conv1' is missing"),
        (lambda s: s.update(strange=torch.ones(4)), "unknown name 'strange'"),
        (lambda s: s.update(conv1=torch.ones(5)), "steps of 'conv1' must be float32"),
        (lambda s: s.update(conv1=s["conv1"].double()), "steps of 'conv1' must be float32"),
        (lambda s: s["conv1"].fill_(0), "steps of 'conv1' must be float32"),
        (lambda s: s["conv1"].fill_(torch.nan), "steps of 'conv1' must be float32"),
        (lambda s: s["conv1"].mul_(1.01), "'conv1' do not lie on the grid"),
    ],
)
def test_hostile_steps_are_refused(change, message, twin, tmp_path):
    save(twin, tmp_path / "a")
    found = safetensors.torch.load_file(tmp_path / "a" / FILE)
    found = {name: value.clone() for name, value in found.items()}
    change(found)
    safetensors.torch.save_file(found, tmp_path / "a" / FILE)
    with pytest.raises(ModelError, match=message):
        load_bundle(tmp_path / "a")


def test_networks_that_cannot_be_followed_are_refused_with_the_reason(images):
    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.last = nn.Linear(144, 3)

        def forward(self, x):
            return self.last(x.flatten(1)) if x.sum() > 0 else self.last(-x.flatten(1))

    model = Classifier(Branching(), classes=images.classes, input_shape=(1, 12, 12))
    with pytest.raises(ModelError, match=r"Branching cannot be quantised: .*control flow"):
        quantise(model, images)
