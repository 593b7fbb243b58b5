"""Variants that differ in a few channels are computed from these channels, and answer as a full forward does."""

from __future__ import annotations

import pytest
import torch
from test_architectures import THIN
from test_forward import built, images_of, in_full, wrapped
from torch import Tensor, nn

from secateur import forward
from secateur.forward import Incremental
from secateur.models.channelwise import Channelwise, Few
from secateur.models.graph import Graph
from secateur.state import generator, seeded
from secateur.types import ImageSet, to_float

KINDS = (nn.BatchNorm2d, nn.Conv2d)


def rows_cut(layer: nn.Module, prefix: str, rows: Tensor, value: float = 0.0) -> dict[str, Tensor]:
    """Return a layer's parameters with some of its rows set."""
    changes = {name: parameter.detach().clone() for name, parameter in layer.named_parameters()}
    for tensor in changes.values():
        tensor[rows] = value
    return {f"{prefix}.{name}": tensor for name, tensor in changes.items()}


def guarded(model: nn.Module, data: ImageSet) -> tuple[Graph, dict]:
    graph = Graph(model)
    x = to_float(data.x)
    with torch.no_grad():
        values = graph.run(graph.order, {graph.start: x}, {}, graph.order, step=graph.guarded_step)
    return graph, values


def near(model: nn.Module, data: ImageSet, changes: dict[str, Tensor]) -> tuple[Tensor, Channelwise]:
    """Compute a variant channel by channel, without the evaluator."""
    graph, values = guarded(model, data)
    changed = {f"net.{name}": value for name, value in changes.items()}
    reached, border = graph.reach(changed)
    way = Channelwise(graph, reached, changed)
    step = way.step({node: values[node] for node in way.olds})
    with torch.inference_mode():
        return graph.run(reached, {node: values[node] for node in border}, changed, step=step)[graph.end], way


@pytest.mark.parametrize("name", THIN)
def test_a_few_channels_of_any_layer_answer_like_a_full_forward(name):
    model, data, draw = built(name), images_of(6), generator(3)
    evaluator, planned = Incremental(model, data, batch_size=4), 0
    layers = [(prefix, layer) for prefix, layer in model.net.named_modules() if isinstance(layer, KINDS)]
    for prefix, layer in layers[:: max(1, len(layers) // 6)]:
        size = len(layer.weight)
        changes = rows_cut(layer, prefix, torch.randperm(size, generator=draw)[: max(1, size // 8)])
        expected = in_full(model, data, changes, 4)
        logits, way = near(model, data, changes)
        planned += way.saves
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
        assert torch.equal(evaluator.predict(changes), expected.argmax(1))
    assert planned or name == "vit"


class Net(nn.Module):
    """A convolution, a norm and a convolution, with something between."""

    def __init__(self, between: nn.Module, *, mode: str = "zeros", groups: int = 1) -> None:
        super().__init__()
        self.first, self.norm, self.between = nn.Conv2d(3, 8, 3, padding=1, padding_mode=mode), nn.BatchNorm2d(8), between
        self.second = nn.Conv2d(8, 8, 3, padding=1, padding_mode=mode, groups=groups)
        self.last = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.between(self.norm(self.first(x)))
        return self.last((x + self.second(x)).mean((2, 3)))


class Shuffle(nn.Module):
    """Mixes channels without a layer."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x).flip(1)


class Twice(nn.Module):
    """Adds what changes to what does not, and to itself."""

    def forward(self, x: Tensor) -> Tensor:
        y = torch.sigmoid(x)
        return y + y + x.mean(1, keepdim=True)


def made(between: nn.Module, **kind) -> nn.Module:
    with seeded(generator(1)):
        return wrapped(Net(between, **kind))


@pytest.mark.parametrize(
    ("between", "kind", "saves"),
    [
        (nn.ReLU(inplace=True), {}, True),
        (nn.Sequential(nn.GELU(), nn.Dropout(0.5), nn.AvgPool2d(2)), {}, True),
        (nn.Identity(), {"groups": 8}, True),
        (nn.Identity(), {"groups": 2}, False),
        (nn.Identity(), {"mode": "reflect"}, False),
        (Shuffle(), {}, False),
        (nn.Softmax(dim=1), {}, False),
        (Twice(), {}, False),
    ],
)
def test_what_mixes_channels_is_computed_whole(between, kind, saves):
    model, data = made(between, **kind), images_of(5)
    changes = rows_cut(model.net.norm, "norm", torch.tensor([1, 4]), 0.3)
    logits, way = near(model, data, changes)
    assert way.saves == saves
    torch.testing.assert_close(logits, in_full(model, data, changes, 5), rtol=1e-4, atol=1e-5)
    assert torch.equal(Incremental(model, data).predict(changes), in_full(model, data, changes, 5).argmax(1))


@pytest.mark.parametrize("parts", [("first", "norm"), ("first", "second"), ("norm", "second"), ("first", "norm", "second")])
@pytest.mark.parametrize("rows", [[0], [2, 5, 6], [0, 1, 2, 3, 4, 5]])
def test_several_layers_may_change(parts, rows):
    model, data = made(nn.ReLU()), images_of(5)
    for apart in (0, 1):  # the same channels in each layer, or others
        changes: dict[str, Tensor] = {}
        for number, part in enumerate(parts):
            changes |= rows_cut(getattr(model.net, part), part, (torch.tensor(rows) + apart * number) % 8, 0.3)
        logits, _ = near(model, data, changes)
        torch.testing.assert_close(logits, in_full(model, data, changes, 5), rtol=1e-4, atol=1e-5)


def test_running_statistics_may_change_and_a_norm_may_have_no_scale():
    model, data = made(nn.ReLU()), images_of(5)
    model.net.norm = nn.BatchNorm2d(8, affine=False).eval()
    shifted = model.net.norm.running_mean.clone()
    shifted[3] += 0.7
    logits, way = near(model, data, {"norm.running_mean": shifted})
    assert way.saves
    torch.testing.assert_close(logits, in_full(model, data, {"norm.running_mean": shifted}, 5), rtol=1e-4, atol=1e-5)


def test_only_the_channels_are_computed():
    """Between the norm and the second convolution flow two channels, and the convolution's old output is all that is asked."""
    model, data, seen = made(nn.ReLU()), images_of(5), []
    graph, values = guarded(model, data)
    changed = {f"net.{name}": value for name, value in rows_cut(model.net.norm, "norm", torch.tensor([1, 4])).items()}
    reached, border = graph.reach(changed)
    way = Channelwise(graph, reached, changed)
    assert [node.name for node in way.olds] == ["net_between", "net_second"]  # the sum reads both
    assert [node.name for node in border] == ["net_first"]
    step = way.step({node: values[node] for node in way.olds})

    def spy(node, environment, new):
        result = step(node, environment, new)
        seen.append((node.name, result.new.shape[1] if isinstance(result, Few) else None))
        return result

    graph.run(reached, {node: values[node] for node in border}, changed, step=spy)
    assert seen[:3] == [("net_norm", 2), ("net_between", 2), ("net_second", None)]


def test_answers_that_rounding_may_decide_are_computed_whole(monkeypatch):
    """Two classes with the same weights tie in every image: the order of the full forward counts."""
    model, data = made(nn.ReLU()), images_of(30)
    with torch.no_grad():
        model.net.last.weight[1:] = model.net.last.weight[0]
        model.net.last.bias.fill_(0.0)
    changes = rows_cut(model.net.norm, "norm", torch.tensor([1]))
    whole = []
    real = Incremental._logits
    monkeypatch.setattr(Incremental, "_logits", lambda self, *given: whole.append(1) or real(self, *given))
    evaluator = Incremental(model, data, batch_size=10)
    assert torch.equal(evaluator.predict(changes), in_full(model, data, changes, 10).argmax(1))
    assert len(whole) == 3
    monkeypatch.setattr(forward, "NEAR", -1.0)
    Incremental(model, data, batch_size=10).predict(changes)
    assert len(whole) == 3


def test_without_memory_nothing_is_kept_for_it(monkeypatch):
    model, data = made(nn.ReLU()), images_of(30)
    changes = rows_cut(model.net.norm, "norm", torch.tensor([1]))
    monkeypatch.setattr(Incremental, "_nearly", lambda *given: pytest.fail("there is no memory for it"))
    assert torch.equal(Incremental(model, data, memory=1000).predict(changes), in_full(model, data, changes, 30).argmax(1))


def test_logits_stay_bit_for_bit_those_of_a_full_forward():
    model, data = made(nn.ReLU()), images_of(9)
    changes = rows_cut(model.net.norm, "norm", torch.tensor([1]), 0.3)
    evaluator = Incremental(model, data, batch_size=4)
    evaluator.predict(changes)
    assert torch.equal(evaluator.logits(changes), in_full(model, data, changes, 4))
