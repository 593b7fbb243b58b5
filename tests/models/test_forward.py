"""The incremental evaluator answers like a full forward, on every architecture, and computes only what it must."""

from __future__ import annotations

import operator

import pytest
import torch
import torch.nn.functional as F
from test_architectures import THIN
from test_channels import randomise
from torch import Tensor, nn
from torch.func import functional_call

from secateur.errors import MethodError, ModelError
from secateur.forward import Incremental
from secateur.models import Classifier, build
from secateur.state import generator, seeded
from secateur.types import ImageSet, to_float

DIGITS = tuple(map(str, range(10)))


def images_of(n: int, shape: tuple[int, int, int] = (3, 32, 32), seed: int = 0) -> ImageSet:
    draw = generator(seed)
    x = torch.randint(256, (n, *shape), generator=draw, dtype=torch.uint8)
    return ImageSet(x, torch.randint(len(DIGITS), (n,), generator=draw), DIGITS, "noise")


def wrapped(net: nn.Module) -> Classifier:
    with seeded(generator(0)):
        net = randomise(net).float()
    return Classifier(net, classes=DIGITS, input_shape=(3, 32, 32), mean=[0.5, 0.4, 0.3], std=[0.2, 0.3, 0.2]).eval()


def built(name: str) -> Classifier:
    with seeded(generator(0)):
        net = build(name, **{**THIN[name], "classes": 10})
    return wrapped(net)


def variant(model: nn.Module, seed: int, share: float = 0.5) -> dict[str, Tensor]:
    """Zero random entries of a random share of the parameters."""
    net, draw = model.net if isinstance(model, Classifier) else model, generator(seed)
    named = [pair for pair in net.named_parameters() if torch.rand((), generator=draw) < share]
    return {name: p.detach() * (torch.rand(p.shape, generator=draw) < 0.7) for name, p in named}


@torch.inference_mode()
def in_full(model: nn.Module, data: ImageSet, changes: dict[str, Tensor], batch_size: int) -> Tensor:
    names = {f"net.{name}" if isinstance(model, Classifier) else name: value for name, value in changes.items()}
    parts = to_float(data.x).split(batch_size)
    return torch.cat([functional_call(model, names, (x.contiguous(memory_format=torch.channels_last),)) for x in parts])


@pytest.mark.parametrize("name", THIN)
def test_a_variant_answers_like_a_full_forward(name):
    """Bit for bit: with no change, with changes of one layer, of some and of all, and again when things are remembered."""
    model, data = built(name), images_of(5)
    evaluator = Incremental(model, data, batch_size=3)
    assert not evaluator.note
    before = {key: value.clone() for key, value in model.state_dict().items()}
    last = list(dict(model.net.named_parameters()))[-2:]
    for changes in ({}, variant(model, 1, 1.0), *(variant(model, seed, 0.1) for seed in range(2, 6))):
        assert torch.equal(evaluator.logits(changes), in_full(model, data, changes, 3))
    for scale in (0.5, 0.0):
        tail = {key: scale * dict(model.net.named_parameters())[key].detach() for key in last}
        assert torch.equal(evaluator.predict(tail), in_full(model, data, tail, 3).argmax(1))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


class Mutating(nn.Module):
    """Writes into its inputs in every way, and reads them afterwards."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = (nn.Conv2d(3, 3, 1) for _ in range(3))
        self.act, self.last = nn.ReLU(inplace=True), nn.Linear(3, 10)
        self.scale = nn.Parameter(torch.full((3, 1, 1), 1.5))

    def forward(self, x: Tensor) -> Tensor:
        a = self.one(x)
        b = self.two(x)
        b += a
        b.mul_(self.scale)
        c = operator.iadd(self.three(b), b)
        F.leaky_relu(c, 0.2, inplace=True)
        d = self.act(c)
        a.add_(d)
        return self.last((a + b + c).mean((2, 3)))


def test_writing_into_inputs_is_followed():
    model, data = wrapped(Mutating()), images_of(4)
    evaluator = Incremental(model, data)
    for seed in range(8):
        changes = variant(model, seed, 0.4)
        for _ in range(2):
            assert torch.allclose(evaluator.logits(changes), in_full(model, data, changes, 4), rtol=1e-6, atol=1e-6)


class Derived(nn.Module):
    """Computes with a buffer before the data comes near it."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("shift", torch.tensor([0.1, 0.2, 0.3]))
        self.last = nn.Linear(3, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.last((x - self.shift.view(1, -1, 1, 1) * 2).mean((2, 3)))


def test_what_is_computed_from_a_buffer_changes_with_it():
    model, data = wrapped(Derived()), images_of(4)
    evaluator = Incremental(model, data)
    assert not evaluator.note
    changes = {"shift": torch.tensor([1.0, -1.0, 0.5])}
    assert torch.equal(evaluator.logits(changes), in_full(model, data, changes, 4))
    assert not torch.equal(evaluator.logits(changes), evaluator.logits({}))


def in_function(x: Tensor) -> Tensor:
    return torch.sigmoid_(x)


def into_a_view(x: Tensor) -> Tensor:
    x.narrow(1, 0, 2).mul_(1.0)
    return x


def into_out(x: Tensor) -> Tensor:
    return torch.clamp(x, -0.1, 0.1, out=x)


class Writing(nn.Module):
    """Writes into a value that another branch has read before, in a way that cannot be turned into a new tensor."""

    def __init__(self, write) -> None:
        super().__init__()
        self.one, self.two, self.last = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1), nn.Linear(3, 10)
        self.write = write

    def forward(self, x: Tensor) -> Tensor:
        x = self.one(x)
        y = self.two(x)
        return self.last((self.write(x) + y).mean((2, 3)))


@pytest.mark.parametrize(("write", "why"), [
    (in_function, "writes into its input"), (into_out, "writes into its input"), (into_a_view, "writes into a view"),
])  # fmt: skip
def test_other_writing_is_computed_in_full(write, why):
    model, data = wrapped(Writing(write)), images_of(4)
    evaluator = Incremental(model, data)
    assert evaluator.note.startswith("every variant is computed in full: ")
    assert why in evaluator.note
    for name in ("two.weight", "two.weight", "last.bias"):
        changes = {name: 0.5 * model.net.get_parameter(name).detach()}
        assert torch.equal(evaluator.logits(changes), in_full(model, data, changes, 4))


@pytest.mark.parametrize(("net", "got"), [
    (nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()), r"\(4, 3\)"), (nn.Identity(), r"\(4, 3, 32, 32\)"),
])  # fmt: skip
def test_answers_that_are_no_logits_are_refused(net, got):
    with pytest.raises(ModelError, match=rf"^the network must answer with logits of shape \(4, 10 or more\), got {got}$"):
        Incremental(wrapped(net), images_of(4))


def test_what_is_remembered_belongs_to_the_evaluator():
    evaluator = Incremental(built("convnet"), images_of(4))
    evaluator.predict({}).fill_(7)
    assert not bool((evaluator.predict({}) == 7).all())


class Tied(nn.Module):
    """One layer used twice, one weight under two names, a buffer and a branch beside the rest."""

    def __init__(self) -> None:
        super().__init__()
        self.twice, self.other = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1)
        self.other.weight = self.twice.weight
        self.register_buffer("shift", torch.tensor(0.25))
        self.side, self.last = nn.Conv2d(3, 3, 1), nn.Linear(6, 10)

    def forward(self, x: Tensor) -> Tensor:
        y = self.other(self.twice(self.twice(x)).relu() + self.shift)
        return self.last(torch.cat([y, self.side(x)], 1).mean((2, 3)))


def test_shared_layers_and_weights():
    model, data = wrapped(Tied()), images_of(4)
    evaluator = Incremental(model, data)
    assert not evaluator.note
    for name in ("twice.weight", "other.weight", "twice.bias", "other.bias", "side.weight", "shift", "last.weight"):
        value = 0.5 * model.net.get_parameter(name).detach() if name != "shift" else torch.tensor(-1.0)
        changed = {name: value}
        both = {"twice.weight": value, "other.weight": value} if name in ("twice.weight", "other.weight") else changed
        assert torch.allclose(evaluator.logits(changed), in_full(model, data, both, 4), rtol=1e-6, atol=1e-6)
        assert not torch.allclose(evaluator.logits(changed), evaluator.logits({}))


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(3, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(x.mean((2, 3)) if x.mean() > 0 else x.amax((2, 3)))


class Sizes(nn.Module):
    """Its trace holds what held for the tracer only: the attribute counts calls."""

    def __init__(self) -> None:
        super().__init__()
        self.calls, self.last = 0, nn.Linear(3, 10)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.last(x.mean((2, 3)) * self.calls)


@pytest.mark.parametrize(("net", "why"), [(Branching, "control flow"), (Sizes, "differently")])
def test_what_cannot_be_traced_is_computed_in_full(net, why):
    model, data = wrapped(net()), images_of(4)
    evaluator = Incremental(model, data, batch_size=2)
    assert why in evaluator.note
    assert evaluator.note.startswith("every variant is computed in full")
    if net is Branching:
        changes = variant(model, 3, 1.0)
        assert torch.equal(evaluator.logits(changes), in_full(model, data, changes, 2))
        assert torch.equal(evaluator.correct(changes), in_full(model, data, changes, 2).argmax(1) == data.y)
    with pytest.raises(MethodError, match="a sweep needs the linear layer in which the network ends"):
        evaluator.sweep("last", [torch.tensor([0])])


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The convolutions that ran, in order."""
    ran: list[str] = []
    forward = nn.Conv2d.forward
    monkeypatch.setattr(nn.Conv2d, "forward", lambda self, x: ran.append(str(tuple(self.weight.shape))) or forward(self, x))
    return ran


def test_only_what_a_change_reaches_is_computed(counted):
    model, data = built("resnet20"), images_of(6)
    evaluator = Incremental(model, data, batch_size=3)
    convolutions = sum(isinstance(module, nn.Conv2d) for module in model.modules())
    changes = {"layer3.2.bn1.weight": torch.zeros(16)}
    evaluator.logits(changes)
    counted.clear()
    evaluator.logits({"layer3.2.bn1.weight": torch.rand(16, generator=generator(0))})
    assert len(counted) == 2 * 1  # one convolution behind the norm, for each of two batches
    counted.clear()
    evaluator.logits({"linear.bias": torch.zeros(10)})
    evaluator.logits({"linear.weight": torch.zeros(10, 16)})
    assert len(counted) <= 2 * 2  # from what was kept for the norm
    counted.clear()
    evaluator.predict(changes)
    evaluator.predict({**changes, "linear.bias": model.net.get_parameter("linear.bias").clone()})  # the same variant
    assert len(counted) == 2 * 1
    counted.clear()
    evaluator.logits({"conv1.weight": torch.zeros_like(model.net.get_parameter("conv1.weight"))})
    assert len(counted) == 2 * convolutions


@pytest.mark.parametrize("memory", [0, 3 * 16 * 8 * 8 * 4, 2**30])
def test_memory_is_bounded_and_answers_do_not_depend_on_it(memory):
    model, data = built("resnet20"), images_of(9)
    evaluator = Incremental(model, data, memory=memory, batch_size=3)
    for name in ("layer3.2.bn1.weight", "layer3.0.bn1.weight", "layer1.0.bn1.weight", "layer3.2.bn1.weight"):
        changes = {name: torch.zeros_like(model.net.get_parameter(name))}
        assert torch.equal(evaluator.logits(changes), in_full(model, data, changes, 3))
        kept = evaluator._kept._values.values()
        assert sum(value.numel() * value.element_size() for value in kept) == evaluator._kept._used <= memory
    assert bool(evaluator._kept._values) == (memory > 0)


def test_a_stream_stops_when_nobody_listens():
    evaluator = Incremental(built("convnet"), images_of(8), batch_size=2)
    stream = evaluator.stream({})
    next(stream)
    assert evaluator.forwards == 1
    assert torch.is_inference_mode_enabled() is False
    stream.close()


def test_a_sweep_gives_every_cut_point():
    model, data = built("resnet20"), images_of(40)
    with torch.no_grad():  # a network that was never trained says the same to every image
        model.net.get_parameter("linear.bias").sub_(in_full(model, data, {}, 40).mean(0))
    evaluator = Incremental(model, data, batch_size=16)
    weight = model.net.get_parameter("linear.weight").detach()
    order = torch.randperm(16, generator=generator(4))
    groups = [order[:3], order[3:4], order[4:4], *order[4:].split(1)]
    answers = evaluator.sweep("linear", groups)
    keep = torch.ones(16)
    assert answers.shape == (len(groups) + 1, 40)
    for row, group in zip(answers, [order[:0], *groups], strict=True):
        keep[group] = 0
        assert torch.equal(row, in_full(model, data, {"linear.weight": weight * keep}, 16).argmax(1))
    assert len(answers.unique(dim=0)) >= 4
    assert evaluator.forwards == 3
    assert torch.equal(Incremental(model, data, memory=1, batch_size=16).sweep("linear", groups), answers)


def test_a_sweep_breaks_ties_like_the_network():
    """All logits equal once everything is cut: the first class, as argmax says; and one ulp apart before."""
    net = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 10, bias=False))
    with torch.no_grad():
        net[2].weight.copy_(torch.tensor([[1.0, 1.0, 1.0], [1.0, 1.0, 1.0 + 2**-23]] * 5))
    data = images_of(50)
    evaluator = Incremental(Classifier(net, classes=DIGITS, input_shape=(3, 32, 32)).eval(), data)
    answers = evaluator.sweep("2", [torch.tensor([i]) for i in range(3)])
    for cut in range(4):
        weight = net[2].weight.detach() * (torch.arange(3) >= cut)
        assert torch.equal(answers[cut], evaluator.predict({"2.weight": weight}))


@pytest.mark.parametrize("reader", ["layer3.2.conv2", "nothing", "bn1"])
def test_a_sweep_needs_the_last_layer(reader):
    with pytest.raises(MethodError, match=f"got '{reader}'; use predict"):
        Incremental(built("resnet20"), images_of(2)).sweep(reader, [torch.tensor([0])])


@pytest.mark.parametrize(("changes", "message"), [
    ({"conv9.weight": torch.zeros(1)}, "'conv9.weight' is not a parameter or buffer of this network"),
    ({"net.conv1.weight": torch.zeros(1)}, "'net.conv1.weight' is not a parameter"),
    ({"linear.bias": torch.zeros(11)}, r"'linear.bias' must have shape \(10,\), got \(11,\)"),
])  # fmt: skip
def test_wrong_changes_are_refused(changes, message):
    with pytest.raises(ModelError, match=message):
        Incremental(built("resnet20"), images_of(2)).predict(changes)


def test_images_of_another_shape_are_refused():
    with pytest.raises(ModelError, match=r"the network cannot take images of shape \(4, 32, 32\)"):
        Incremental(built("resnet20"), images_of(2, (4, 32, 32)))


def test_no_images():
    evaluator = Incremental(built("resnet20"), images_of(0))
    assert evaluator.predict({}).tolist() == []
    assert evaluator.sweep("linear", [torch.tensor([0])]).shape == (2, 0)
