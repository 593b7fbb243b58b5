"""Edits of feature maps: what they do, on disk and in copies, traced, off again; and attacks that see through them."""

from __future__ import annotations

from copy import deepcopy

import pytest
import safetensors.torch
import torch
from test_architectures import THIN
from test_channels import randomise
from torch import nn

from secateur.attack import bpda, eot, pgd, square, through_wrappers
from secateur.errors import ModelError
from secateur.forward import Incremental
from secateur.models import Classifier, build, load_bundle, read_arch, save, unwrap, wrap, wrappers_of
from secateur.models.channels import trace_channels
from secateur.models.shrink import shrink
from secateur.state import generator, seeded
from secateur.types import ImageSet

ROUND = {"after": "bn2", "kind": "round", "decimals": 1}
CLAMP = {"after": "bn3", "kind": "clamp", "low": -0.5, "high": 1.0}


def outputs(model: nn.Module, layer: str, x: torch.Tensor) -> torch.Tensor:
    seen = []
    handle = model.get_submodule(layer).register_forward_hook(lambda *args: seen.append(args[2]))
    with torch.no_grad():
        model(x)
    handle.remove()
    return seen[0]


def test_feature_maps_by_hand():
    net = nn.Sequential(nn.Identity(), nn.Identity())
    x = torch.tensor([[-2.0, 0.14, 0.25, 0.36, 3.0]])
    rounded = wrap(net, [{"after": "0", "kind": "round", "decimals": 1}])
    assert torch.allclose(rounded(x), torch.tensor([[-2.0, 0.1, 0.2, 0.4, 3.0]]))
    clamped = wrap(net, [{"after": "1", "kind": "clamp", "low": -1, "high": 0.3}])
    assert torch.allclose(clamped(x), torch.tensor([[-1.0, 0.14, 0.25, 0.3, 0.3]]))
    both = wrap(rounded, [{"after": "0", "kind": "clamp", "low": 0.18, "high": 9}])
    assert torch.allclose(both(x), torch.tensor([[0.18, 0.18, 0.2, 0.4, 3.0]]))
    assert [w["kind"] for w in wrappers_of(both)] == ["round", "clamp"]


def test_in_a_network_and_off_again(tiny):
    model, x = tiny(), torch.rand(4, 1, 12, 12)
    edited = wrap(model, [ROUND, CLAMP])
    plain, maps = outputs(model, "net.bn2", x), outputs(edited, "net.bn2", x)
    assert torch.equal(maps, plain.round(decimals=1))
    assert -0.5 <= float(outputs(edited, "net.bn3", x).min()) < float(outputs(edited, "net.bn3", x).max()) <= 1
    assert edited.state_dict().keys() == model.state_dict().keys()
    assert not torch.equal(edited(x), model(x))
    assert torch.equal(deepcopy(edited)(x), edited(x))
    assert wrappers_of(deepcopy(edited)) == (ROUND, CLAMP)
    bare = unwrap(edited)
    assert torch.equal(bare(x), model(x))
    assert not any(module._forward_hooks for module in bare.modules())
    assert wrappers_of(model) == wrappers_of(bare) == ()
    assert wrappers_of(edited) == (ROUND, CLAMP)


def test_round_trip_through_a_bundle(tiny, tmp_path):
    edited, x = wrap(tiny(), [CLAMP, ROUND]), torch.rand(4, 1, 12, 12)
    save(edited, tmp_path / "a")
    assert read_arch(tmp_path / "a")["wrappers"] == [ROUND, CLAMP]
    assert set(safetensors.torch.load_file(tmp_path / "a" / "model.safetensors")) == set(tiny().net.state_dict())
    back = load_bundle(tmp_path / "a")
    assert torch.equal(back(x), edited(x))
    save(back, tmp_path / "b")
    assert (tmp_path / "b" / "arch.json").read_bytes() == (tmp_path / "a" / "arch.json").read_bytes()
    save(unwrap(back), tmp_path / "c")
    assert read_arch(tmp_path / "c")["wrappers"] == []


@pytest.mark.parametrize(
    ("wrapper", "message"),
    [
        ({"after": "bn2"}, r"kind is one of clamp, round, got a value of type dict"),
        ({"after": "bn2", "kind": "exec"}, r"kind is one of clamp, round"),
        ({"after": "bn2", "kind": []}, r"kind is one of clamp, round"),
        ("round", r"kind is one of clamp, round, got 'round'"),
        ({**ROUND, "low": 1}, r"must have after, kind, decimals and nothing else, got 'after, kind, decimals, low'"),
        ({**ROUND, "decimals": -1}, r"decimals must be a whole number in \[0, 8\], got -1"),
        ({**ROUND, "decimals": 9}, r"decimals must be a whole number in \[0, 8\], got 9"),
        ({**ROUND, "decimals": True}, r"decimals must be a whole number in \[0, 8\], got True"),
        ({**ROUND, "after": ""}, r"after must name a layer, got ''"),
        ({**ROUND, "after": "bn2\n"}, r"after must name a layer, got 'bn2\\n'"),
        ({**ROUND, "after": "bn"}, r"unknown layer 'bn'; did you mean 'bn"),
        ({**CLAMP, "low": 2.0}, r"with low <= high, got 2.0 and 1.0"),
        ({**CLAMP, "high": float("nan")}, r"low and high must be numbers in \[-1e\+09, 1e\+09\]"),
        ({**CLAMP, "high": "1"}, r"low and high must be numbers"),
    ],
)
def test_what_is_no_edit_is_told(wrapper, message, tiny):
    with pytest.raises(ModelError, match=message) as caught:
        wrap(tiny(), [wrapper])
    assert "\n" not in str(caught.value)


def test_layers_that_cannot_be_edited_are_told():
    class Pair(nn.Module):
        def forward(self, x):
            return x, x

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.pair, self.idle, self.linear = Pair(), nn.Identity(), nn.Linear(4, 2)

        def forward(self, x):
            return self.linear(self.pair(x)[0].flatten(1))

    model = Classifier(Net(), classes=("a", "b"), input_shape=(1, 2, 2))
    with pytest.raises(ModelError, match=r"'idle' does not run when the network answers; name another layer"):
        wrap(model, [{**ROUND, "after": "idle"}])
    with pytest.raises(ModelError, match=r"'pair' returns a tuple; name another layer"):
        wrap(model, [{**ROUND, "after": "pair"}])
    assert wrappers_of(model) == ()


def images_of(shape: tuple[int, int, int]) -> ImageSet:
    x = torch.randint(256, (6, *shape), generator=generator(0), dtype=torch.uint8)
    return ImageSet(x, torch.arange(6), tuple(map(str, range(10))), "noise")


@pytest.mark.parametrize(
    ("name", "after"), [("convnet", "bn2"), ("resnet20", "layer2"), ("vit", "blocks.0"), ("convnet", "conv2")]
)
def test_the_incremental_evaluator_sees_them(name, after):
    with seeded(generator(0)):
        net = randomise(build(name, **{**THIN[name], "classes": 10})).float()
    model = Classifier(net, classes=tuple(map(str, range(10))), input_shape=(3, 32, 32)).eval()
    edited = wrap(model, [{"after": after, "kind": "clamp", "low": -0.02, "high": 0.03}])
    data = images_of((3, 32, 32))
    evaluator = Incremental(edited, data, batch_size=4)
    assert evaluator.note == ""
    first = next(key for key, p in net.named_parameters() if key.endswith("weight") and p.ndim >= 2)
    later = [key for key, p in net.named_parameters() if key.endswith("weight") and p.ndim >= 2][2]
    for key in (first, later):
        change = dict(net.named_parameters())[key].detach().clone()
        change[0] = 0
        other = deepcopy(edited)
        other.get_submodule("net").get_parameter(key).data.copy_(change)
        with torch.no_grad():
            expected = torch.cat([other(x) for x in (data.x.float() / 255).split(4)])
        assert torch.allclose(evaluator.logits({key: change}), expected, atol=1e-5)
        assert torch.equal(evaluator.predict({key: change}), expected.argmax(dim=1))
        changed = evaluator._changed({key: change})
        few = torch.cat(list(evaluator._stream(changed, evaluator._way(changed))))  # what predictions come from
        assert torch.allclose(few, expected, atol=1e-5)
    assert not torch.equal(evaluator.logits({}), Incremental(model, data).logits({}))


def test_channels_whose_maps_are_edited_stay(tiny):
    """A silenced channel that is clamped to at least 0.5 speaks: taking it out would change the answers."""
    model = tiny()
    edited = wrap(model, [{"after": "bn2", "kind": "clamp", "low": 0.5, "high": 1.0}])
    keep = torch.ones(8, dtype=torch.bool)
    keep[3] = False
    assert trace_channels(model, (1, 12, 12)).plan({"bn2": keep})
    graph = trace_channels(edited, (1, 12, 12))
    assert graph.plan({"bn2": keep}) == {}
    assert graph.why_kept("bn2") == "what 'bn2' returns is edited"
    elsewhere = torch.tensor([True, True, False, True])
    plan = graph.plan({"bn1": elsewhere})
    small = shrink(edited, plan, (1, 12, 12))
    assert small.net.conv1.weight.shape[0] == 3
    assert wrappers_of(small) == wrappers_of(edited)


def rounding(hardened) -> nn.Module:
    return wrap(hardened.model, [{"after": name, "kind": "round", "decimals": 0} for name in ("bn1", "bn2")])


def test_pgd_fails_where_rounding_hides_the_gradient_and_succeeds_with_its_twin(hardened):
    model, x, y = rounding(hardened), hardened.x[:100], hardened.y[:100]
    probe = x[:8].clone().requires_grad_()
    [blind] = torch.autograd.grad(model(probe).sum(), [probe])
    logits = through_wrappers(model, probe)
    [seeing] = torch.autograd.grad(logits.sum(), [probe])
    assert not blind.any()
    assert bool((seeing.flatten(1).abs().amax(dim=1) > 0).all())
    assert torch.equal(logits, model(probe))

    def right(forward):
        adversarial = pgd(model, x, y, eps=0.12, forward=forward, generator=generator(0))
        with torch.no_grad():
            return int((model(adversarial).argmax(dim=1) == y).sum())

    with torch.no_grad():
        clean = int((model(x).argmax(dim=1) == y).sum())
    assert right(None) > clean - 15
    assert right(through_wrappers) < right(None) - 15
    assert right(bpda(hardened.model)) < right(None) - 10
    assert wrappers_of(model)[0]["after"] == "bn1"


def test_clamps_pass_gradients_beyond_their_bounds():
    net = wrap(nn.Sequential(nn.Identity()), [{"after": "0", "kind": "clamp", "low": 0, "high": 1}])
    x = torch.tensor([[-1.0, 0.5, 2.0]], requires_grad=True)
    [plain] = torch.autograd.grad(net(x).sum(), [x])
    values = through_wrappers(net, x)
    [through] = torch.autograd.grad(values.sum(), [x])
    assert values.tolist() == [[0.0, 0.5, 1.0]]
    assert plain.tolist() == [[0.0, 1.0, 0.0]]
    assert through.tolist() == [[1.0, 1.0, 1.0]]


def test_twins_combine_and_nothing_stays(hardened):
    model, x, y = rounding(hardened), hardened.x[:10], hardened.y[:10]
    before = torch.get_rng_state()
    pgd(model, x, y, steps=2, forward=eot(2, forward=through_wrappers), generator=generator(0))
    square(model, x, y, queries=5, forward=through_wrappers, generator=generator(0))
    probe = x.clone().requires_grad_()
    [blind] = torch.autograd.grad(model(probe).sum(), [probe])
    assert not blind.any()
    assert torch.equal(before, torch.get_rng_state())
    assert sum(len(module._forward_hooks) for module in model.modules()) == 2
