"""Gradient scores against closed forms on linear networks and against differences of the loss itself."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from secateur.errors import DataError, MethodError, ModelError
from secateur.prune import Fraction, Sentence, Until, prune
from secateur.prune.factors import Factors, units
from secateur.prune.gradients import gradient, gradient_weight, obd, snip, taylor
from secateur.state import generator
from secateur.types import ImageSet, to_float

ALL = {"gradient": gradient, "gradient_weight": gradient_weight, "snip": snip, "taylor": taylor, "obd": obd}


def softmax_regression(inputs: int = 4, classes: int = 3) -> nn.Sequential:
    net = nn.Sequential(nn.Flatten(), nn.Linear(inputs, classes)).double()
    with torch.no_grad():
        net[1].weight.copy_(torch.randn(classes, inputs, generator=generator(1), dtype=torch.float64))
    return net


def pixels(n: int = 7, seed: int = 2) -> ImageSet:
    x = torch.randint(0, 256, (n, 1, 2, 2), generator=generator(seed), dtype=torch.uint8)
    return ImageSet(x, torch.arange(n) % 3, ("a", "b", "c"))


def by_image(net: nn.Sequential, clean: ImageSet) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Inputs, probabilities, and each image's gradient in the weights, ``(p - onehot) x^T``."""
    x = to_float(clean.x).double().flatten(1)
    p = (x @ net[1].weight.T + net[1].bias).softmax(dim=1).detach()
    return x, p, (p - F.one_hot(clean.y, 3)).unsqueeze(2) * x.unsqueeze(1)


def test_first_order_scores_by_closed_form(gen):
    net, clean = softmax_regression(), pixels()
    _, _, slopes = by_image(net, clean)
    weight, mean = net[1].weight.detach(), slopes.mean(dim=0)
    one = gradient(net, clean, batch_size=3, generator=gen).values["1.weight"]
    two = gradient_weight(net, clean, batch_size=3, generator=gen).values["1.weight"]
    assert torch.allclose(one, mean.abs(), atol=1e-7)
    assert torch.allclose(two, (weight * mean).abs(), atol=1e-7)
    share = snip(net, clean, generator=gen).values["1.weight"]
    assert torch.allclose(share, (weight * mean).abs() / (weight * mean).abs().sum(), atol=1e-7)
    assert float(share.sum()) == pytest.approx(1)


def test_images_that_disagree_cancel_in_the_gradient_and_not_in_taylor_or_fisher(gen):
    net, clean = softmax_regression(), pixels()
    _, _, slopes = by_image(net, clean)
    each = (net[1].weight.detach() * slopes).square().mean(dim=0)
    assert torch.allclose(taylor(net, clean, batch_size=1, generator=gen).values["1.weight"], each, atol=1e-7)
    assert torch.allclose(obd(net, clean, generator=gen).values["1.weight"], each / 2, atol=1e-7)
    together = (net[1].weight.detach() * slopes.mean(dim=0)).square()
    assert torch.allclose(taylor(net, clean, batch_size=99, generator=gen).values["1.weight"], together, atol=1e-7)
    assert float((each - together).abs().max()) > 1e-3


def test_hutchinson_finds_the_diagonal_of_the_hessian(gen):
    net, clean = softmax_regression(), pixels()
    x, p, _ = by_image(net, clean)
    diagonal = torch.einsum("nc,nk->nck", p * (1 - p), x.square()).mean(dim=0)
    exact = diagonal * net[1].weight.detach().square() / 2
    found = obd(net, clean, curvature="hutchinson", draws=3000, generator=gen).values["1.weight"]
    assert torch.allclose(found, exact, rtol=0.1, atol=0.02 * float(exact.max()))
    fisher = obd(net, clean, generator=gen).values["1.weight"]
    assert not torch.allclose(fisher, exact, rtol=0.1, atol=0.02 * float(exact.max()))


class Smooth(nn.Module):
    """Two layers of channels with batch-norms and a smooth nonlinearity: derivatives exist everywhere."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 3, 2, bias=False)
        self.bn = nn.BatchNorm2d(3)
        self.tanh = nn.Tanh()
        self.flatten = nn.Flatten()
        self.head = nn.Linear(3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.flatten(self.tanh(self.bn(self.conv(x)))))


@pytest.fixture
def smooth() -> Smooth:
    draw = generator(5)
    net = Smooth().double().eval()
    with torch.no_grad():
        for value in (*net.parameters(), net.bn.running_mean):
            value.copy_(torch.randn(value.shape, generator=draw, dtype=torch.float64))
        net.bn.running_var.uniform_(0.5, 1.5, generator=draw)
    return net


def losses(net: nn.Module, clean: ImageSet, names: tuple[str, ...], index: object, factor: float) -> torch.Tensor:
    """The loss of each image with one unit's entries times a factor."""
    changed = copy.deepcopy(net)
    with torch.no_grad():
        for name in names:
            changed.get_parameter(name)[index] *= factor
        return F.cross_entropy(changed(to_float(clean.x).double()), clean.y, reduction="none")


@pytest.mark.parametrize("granularity", ["weight", "channel"])
def test_derivatives_are_those_of_the_loss_itself(smooth, gen, granularity):
    clean, step = pixels(), 1e-4
    found = {
        name: score(smooth, clean, granularity=granularity, generator=gen).values
        for name, score in (("first", gradient_weight), ("fisher", obd), ("share", snip))
    }
    bend = obd(smooth, clean, granularity=granularity, curvature="hutchinson", draws=2000, generator=gen).values
    taylors = taylor(smooth, clean, granularity=granularity, batch_size=99, generator=gen).values
    chosen = units(smooth, clean.shape, granularity)
    assert list(chosen) == (["conv.weight", "head.weight"] if granularity == "weight" else ["bn"])
    total = sum(float(value.sum()) for value in found["first"].values())
    largest = max(float(value.abs().max()) for value in bend.values())
    for unit, names in chosen.items():
        for flat, index in enumerate(torch.ones_like(found["first"][unit]).nonzero().unbind()):
            place = tuple(index.tolist())
            up, at, down = (losses(smooth, clean, names, place, factor) for factor in (1 + step, 1.0, 1 - step))
            slope = (up - down) / (2 * step)
            value = {key: float(scores[unit].flatten()[flat]) for key, scores in found.items()}
            assert value["first"] == pytest.approx(abs(float(slope.mean())), rel=1e-4, abs=1e-7)
            assert value["share"] == pytest.approx(value["first"] / total, rel=1e-5)
            assert float(taylors[unit].flatten()[flat]) == pytest.approx(float(slope.mean()) ** 2, rel=1e-4, abs=1e-9)
            assert value["fisher"] == pytest.approx(float(slope.square().mean()) / 2, rel=1e-4, abs=1e-9)
            second = float(((up + down - 2 * at) / step**2).mean()) / 2
            assert float(bend[unit].flatten()[flat]) == pytest.approx(second, rel=0.15, abs=0.06 * largest)


def test_a_filter_s_gradient_is_the_sum_over_its_weights(smooth, gen):
    clean = pixels()
    leaf = F.cross_entropy(smooth(to_float(clean.x).double()), clean.y)
    [slope] = torch.autograd.grad(leaf, [smooth.conv.weight])
    found = gradient(smooth, clean, granularity="channel", generator=gen).values
    assert list(found) == ["bn"]
    assert torch.allclose(found["bn"], slope.abs().flatten(1).sum(dim=1), atol=1e-7)


def test_masked_channels_have_no_derivative_left(smooth, gen):
    with torch.no_grad():
        smooth.bn.weight[1] = smooth.bn.bias[1] = 0
    for score in (gradient_weight, taylor, obd, snip):
        values = score(smooth, pixels(), granularity="channel", generator=gen).values["bn"]
        assert float(values[1]) == 0
        assert float(values[[0, 2]].min()) > 0


def test_the_cheapest_cut_by_first_order_costs_less_than_the_dearest(trained, images, gen):
    def loss(order):
        sentence = Sentence(taylor, Fraction(0.3), "channel", scope="global", order=order)
        repaired = prune(trained, images, sentence, generator=gen)
        with torch.inference_mode():
            return float(F.cross_entropy(repaired.model(to_float(images.x)), images.y))

    assert loss("smallest") < 0.5 * loss("largest")


@pytest.mark.parametrize("name", ["snip", "obd"])
def test_as_many_images_as_asked_for_are_read(tiny, images, monkeypatch, name):
    seen = []
    plain = Factors.loss
    monkeypatch.setattr(Factors, "loss", lambda self, x, y, classes: seen.append(len(x)) or plain(self, x, y, classes))
    ALL[name](tiny(), images, images=24, generator=generator(0))
    assert sum(seen) == 24
    seen.clear()
    ALL[name](tiny(), images.subset(torch.arange(10)), images=24, generator=generator(0))
    assert sum(seen) == 10


@pytest.mark.parametrize("score", ALL.values(), ids=ALL)
def test_what_cannot_be_scored_is_refused(tiny, images, gen, score):
    with pytest.raises(MethodError, match="unknown granularity 'channels'; did you mean 'channel'"):
        score(tiny(), images, granularity="channels", generator=gen)
    with pytest.raises(DataError, match="at least one image, got 0"):
        score(tiny(), images.subset(torch.arange(0)), generator=gen)
    with pytest.raises(ModelError, match=r"cannot take .* images of shape"):
        score(tiny(), ImageSet(torch.zeros(4, 3, 12, 12, dtype=torch.uint8), images.y[:4], images.classes), generator=gen)
    broken = tiny()
    with torch.no_grad():
        broken.net.conv1.weight[0, 0, 0, 0] = float("inf")
    with pytest.raises(ModelError, match="must be finite, got NaN or infinity"):
        score(broken, images, generator=gen)


@pytest.mark.parametrize(("setting", "value"), [("images", 0), ("draws", 0), ("curvature", "fishers")])
def test_settings_out_of_range(tiny, images, gen, setting, value):
    with pytest.raises(MethodError, match=setting):
        obd(tiny(), images, generator=gen, **{setting: value})


def test_until_is_judged_on_images_that_the_score_has_not_read(trained, images):
    read = []

    def reading(model, clean, *, granularity, generator):
        read.append(clean)
        return gradient_weight(model, clean, granularity=granularity, generator=generator)

    repaired = prune(trained, images, Sentence(reading, Until(0.3)), generator=generator(0))
    assert len(read[0]) == 180
    assert {candidate.holdout.n for candidate in repaired.path} == {60}
