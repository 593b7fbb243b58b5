"""The network under attack: left as it was, attacked in eval mode, and as a copy only where the copy answers the same."""

import copy
from collections import defaultdict

import pytest
import torch
import torch.nn.functional as F
from attacked_models import Noisy, accuracy, grey, linear
from torch import nn

from secateur.attack import fgsm, pgd, random_noise, square
from secateur.attack.network import _Reads, quick_copy
from secateur.errors import DataError, MethodError, ModelError
from secateur.models import build
from secateur.state import generator, seeded


def batch(model, n=6, channels=3, side=32):
    x = torch.rand(n, channels, side, side, generator=generator(0))
    return x, model.eval()(x).argmax(dim=1)


def randomised(name, **settings):
    with seeded(generator(0)):
        net = build(name, classes=10, **settings)
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, std=0.3)
                nn.init.normal_(module.running_mean, std=0.2)
                nn.init.uniform_(module.running_var, 0.5, 1.5)
    return net.eval()


@pytest.mark.parametrize(
    ("name", "settings", "norms_left"),
    [
        ("resnet20", {"width": 4}, 0),
        ("convnet", {"width": 4}, 0),
        ("preact_resnet18", {"width": 4}, 8),
        ("wrn", {"depth": 10, "width": 1}, 4),
    ],
)
def test_a_copy_answers_and_differentiates_as_the_network(name, settings, norms_left):
    model = randomised(name, **settings)
    x, y = batch(model, side=16)
    found = quick_copy(model, x)
    assert found is not None
    assert sum(isinstance(module, nn.BatchNorm2d) for module in found.modules()) == norms_left
    assert not any(p.requires_grad for p in found.parameters())
    slopes = []
    for network in (model, found):
        points = x.clone().requires_grad_()
        logits = network(points)
        slopes.append(torch.autograd.grad(F.cross_entropy(logits, y, reduction="sum"), [points])[0])
        answers = model(x).detach()
        assert float((logits.detach() - answers).abs().max()) <= 1e-5 * float(answers.abs().max())
    assert float((slopes[0] - slopes[1]).abs().max()) < 1e-4 * float(slopes[0].abs().max())


class TwoReaders(nn.Module):
    """Its convolution is read by a batch-norm and by the sum: folding would change the answers."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.linear = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 10)
        nn.init.constant_(self.norm.weight, 3.0)

    def forward(self, x):
        out = self.conv(x)
        return self.linear((self.norm(out) + out).mean(dim=(2, 3)))


class Twice(nn.Module):
    """One convolution, two norms: it cannot hold both."""

    def __init__(self):
        super().__init__()
        self.conv, self.linear = nn.Conv2d(3, 3, 3, padding=1), nn.Linear(3, 10)
        self.norms = nn.ModuleList(nn.BatchNorm2d(3) for _ in range(2))
        nn.init.constant_(self.norms[0].weight, 2.0)

    def forward(self, x):
        for norm in self.norms:
            x = norm(self.conv(x))
        return self.linear(x.mean(dim=(2, 3)))


class Uncopyable(nn.Module):
    """Keeps a tensor with a history, which deepcopy refuses."""

    def __init__(self):
        super().__init__()
        self.conv, self.linear = nn.Conv2d(3, 4, 3), nn.Linear(4, 10)
        self.kept = self.conv.weight * 2

    def forward(self, x):
        return self.linear(self.conv(x).mean(dim=(2, 3)))


class Viewing(nn.Module):
    """Views its input in a way that only contiguous images allow."""

    def __init__(self):
        super().__init__()
        self.conv, self.linear = nn.Conv2d(3, 4, 3), nn.Linear(3 * 64, 10)

    def forward(self, x):
        return self.linear(x.view(len(x), -1)) + self.conv(x).mean()


def test_a_copy_that_answers_differently_is_not_used(monkeypatch):
    """Also if a batch-norm were folded that must not be."""
    monkeypatch.setattr(
        _Reads, "__torch_function__", lambda self, func, types, args=(), kwargs=None: func(*args, **kwargs or {})
    )
    monkeypatch.setattr(_Reads, "count", property(lambda self: defaultdict(lambda: 1), lambda self, value: None), raising=False)
    with seeded(generator(0)):
        assert quick_copy(TwoReaders().eval(), torch.rand(4, 3, 8, 8)) is None


def test_no_copy_where_it_would_answer_differently_or_cannot_be_made():
    with seeded(generator(0)):
        x = torch.rand(4, 3, 8, 8)
        hooked = randomised("convnet", width=4)
        hooked.register_forward_hook(lambda *_: None)
        for model in (Uncopyable(), Viewing(), hooked, Noisy(randomised("convnet", width=4), 0.1)):
            assert quick_copy(model.eval(), x) is None
        for model in (TwoReaders().eval(), Twice().eval()):
            found = quick_copy(model, x)
            assert found is not None
            assert [type(module) for module in found.modules()] == [type(module) for module in model.modules()]
            assert torch.allclose(found(x), model(x), atol=1e-5)
        assert quick_copy(linear(3, 192), x) is None  # nothing to gain


@pytest.mark.parametrize("make", [TwoReaders, Twice, Uncopyable, Viewing])
def test_such_networks_are_attacked_all_the_same(make):
    with seeded(generator(0)):
        model = make().eval()
    x, y = batch(model, 60, side=8)
    adv = pgd(model, x, y, eps=0.3, loss="margin", generator=generator(0))
    assert accuracy(model, adv, y) < 0.9


def test_with_and_without_a_copy_the_same_images_break(hardened):
    x, y = hardened.x[:150], hardened.y[:150]
    hooked = copy.deepcopy(hardened.model)
    hooked.register_forward_hook(lambda *_: None)
    fast, plain = (pgd(model, x, y, eps=0.1, generator=generator(0)) for model in (hardened.model, hooked))
    assert float((fast - plain).abs().gt(1e-5).float().mean()) < 0.01
    assert abs(accuracy(hardened.model, fast, y) - accuracy(hardened.model, plain, y)) <= 0.01


@pytest.mark.parametrize("attack", [fgsm, pgd, square, random_noise])
def test_eval_mode_whatever_the_network_is_in(attack, hardened):
    """Dropout and batch statistics would show; so would statistics that were changed."""
    x, y = hardened.x[:40], hardened.y[:40]
    settings = {"queries": 20} if attack is square else {}
    found = []
    for training in (False, True):
        model = copy.deepcopy(hardened.model).train(training)
        found.append(attack(model, x, y, eps=0.1, **settings, generator=generator(0)))
        assert all(torch.equal(a, b) for a, b in zip(model.buffers(), hardened.model.buffers(), strict=True))
        assert all(module.training == training for module in model.modules())
    assert torch.equal(*found)


def test_the_network_is_put_back_after_an_error(hardened):
    model = copy.deepcopy(hardened.model).train()
    before = torch.get_rng_state()
    with pytest.raises(ModelError, match=r"the network cannot take images of shape \(3, 28, 28\)"):
        pgd(model, torch.rand(2, 3, 28, 28, generator=generator(0)), torch.zeros(2).long(), generator=generator(0))
    assert all(module.training for module in model.modules())
    assert all(p.requires_grad for p in model.parameters())
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_gradients_are_found_where_the_caller_has_them_off(mode, hardened):
    with mode():
        x, y = hardened.x[:20].clone(), hardened.y[:20].clone()
        adv = pgd(hardened.model, x, y, eps=0.1, generator=generator(0))
    expected = pgd(hardened.model, hardened.x[:20], hardened.y[:20], eps=0.1, generator=generator(0))
    assert torch.equal(adv, expected)


def test_uint8_is_converted_and_nothing_given_is_changed(hardened):
    x = (hardened.x[:10] * 255).round().to(torch.uint8)
    kept = x.clone()
    adv = pgd(hardened.model, x, hardened.y[:10], generator=generator(0))
    assert torch.equal(x, kept)
    assert torch.equal(adv, pgd(hardened.model, x.float() / 255, hardened.y[:10], generator=generator(0)))


def test_batches_do_not_change_what_is_found(hardened):
    x, y = hardened.x[:50], hardened.y[:50]
    whole, parts = (fgsm(hardened.model, x, y, eps=0.1, batch_size=size, generator=generator(0)) for size in (256, 7))
    assert float((whole - parts).abs().gt(1e-6).float().mean()) < 0.001
    strided = x.contiguous(memory_format=torch.channels_last)
    assert torch.equal(fgsm(hardened.model, strided, y, eps=0.1, generator=generator(0)), whole)


def test_no_images_give_none(hardened):
    empty = hardened.x[:0]
    for attack in (fgsm, pgd, square, random_noise):
        assert attack(hardened.model, empty, hardened.y[:0], generator=generator(0)).shape == empty.shape


X, Y = grey(3, (1, 4, 4)), torch.tensor([0, 1, 2])


@pytest.mark.parametrize(
    ("error", "message", "changed"),
    [
        (DataError, r"images must lie in \[0, 1\], got -0.1955..0.1962; the normalisation belongs into", {"x": X - 0.5}),
        (DataError, r"images must lie in \[0, 1\], got nan..nan", {"x": X * torch.nan}),
        (DataError, r"images must be float32 or uint8 \(n, c, h, w\), got torch.float64 \(3, 1, 4, 4\)", {"x": X.double()}),
        (DataError, r"images must be float32 or uint8 \(n, c, h, w\), got torch.float32 \(3, 16\)", {"x": X.flatten(1)}),
        (DataError, r"labels must be int64 \(3,\), got torch.float32 \(3,\)", {"y": Y.float()}),
        (DataError, r"labels must be int64 \(3,\), got torch.int64 \(2,\)", {"y": Y[:2]}),
        (DataError, r"labels must be at least 0, got -1", {"y": Y - 1}),
        (DataError, r"labels must lie in \[0, 3\] \(the network has 4 classes\), got 4", {"y": Y + 2}),
        (MethodError, r"eps must lie in \[0, 1\], got 8", {"eps": 8}),
        (MethodError, r"eps must lie in \[0, 1\], got -0.1", {"eps": -0.1}),
        (MethodError, r"eps must lie in \[0, 4\], got 5", {"eps": 5, "norm": "l2"}),
        (MethodError, r"unknown norm 'linff'; did you mean 'linf'\?", {"norm": "linff"}),
        (MethodError, r"batch_size must lie in \[1, ", {"batch_size": 0}),
    ],
)  # fmt: skip
@pytest.mark.parametrize("attack", [fgsm, pgd, square, random_noise])
def test_bad_input_is_one_line(attack, error, message, changed):
    given = {"x": X, "y": Y, "generator": generator(0), **changed}
    with pytest.raises(error, match=message) as caught:
        attack(linear(4, 16), given.pop("x"), given.pop("y"), **given)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("message", "settings"),
    [
        (r"steps must lie in \[1, ", {"steps": 0}),
        (r"step_size must lie in \[0, ", {"step_size": -1.0}),
        (r"restarts must lie in \[1, ", {"restarts": 0}),
        (r"restarts must lie in \[1, 1\], got 2", {"restarts": 2, "random_start": False}),
        (r"unknown loss 'dlrr'; did you mean 'dlr'\?", {"loss": "dlrr"}),
    ],
)
def test_bad_settings_of_pgd(message, settings):
    with pytest.raises(MethodError, match=message):
        pgd(linear(4, 16), X, Y, **settings, generator=generator(0))


def test_two_classes_have_no_dlr():
    with pytest.raises(MethodError, match="'dlr' needs at least 4 classes, got 3; use 'margin'"):
        pgd(linear(3, 16), X, Y, loss="dlr", generator=generator(0))


class Broken(nn.Module):
    """Answers wrongly in the way asked for."""

    def __init__(self, answer):
        super().__init__()
        self.answer, self.net = answer, linear(4, 16)

    def forward(self, x):
        return self.answer(self.net, x)


class OneWay(torch.autograd.Function):
    """The identity without a derivative."""

    @staticmethod
    def forward(ctx, logits):
        return logits.clone()


@pytest.mark.parametrize(
    ("message", "answer"),
    [
        ("the network passes no gradient back to the images; give a differentiable twin", lambda net, x: net(x).detach()),
        (r"back to the images \(You must implement .*\); give a differentiable twin", lambda net, x: OneWay.apply(net(x))),
        ("the network passes no gradient back", lambda net, x: net(torch.ones_like(x)) + net.linear.bias),
        ("the network's answers must be finite, got NaN", lambda net, x: net(x) * torch.nan),
        (r"the network must answer with logits of shape \(3, 2 or more\), got \(3, 1\)", lambda net, x: net(x)[:, :1]),
        (r"the network must answer with logits of shape \(3, 2 or more\), got tuple", lambda net, x: (net(x), x)),
        ("the network's gradient must be finite", lambda net, x: net(x) + (0 * x.flatten(1).sum(1, keepdim=True)).sqrt()),
    ],
)
def test_networks_that_cannot_be_attacked_say_why(message, answer):
    with pytest.raises(ModelError, match=message):
        pgd(Broken(answer), X, Y, generator=generator(0))
