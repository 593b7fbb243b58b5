"""Small networks and images that every test may use; together they take a few seconds."""

from __future__ import annotations

import importlib
import json
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.resources import files

import pytest
import torch
import torch.nn.functional as F
from jsonschema import Draft202012Validator
from torch import Tensor, nn

from secateur.attack import pgd
from secateur.data import load_data
from secateur.measure import evaluate
from secateur.models import Classifier, build
from secateur.poison import badnets
from secateur.state import generator, seeded
from secateur.train import Recipe, train
from secateur.types import ImageSet, Trigger, to_float

CLASSES = ("top", "middle", "bottom")
SHAPE = (1, 12, 12)
RECIPE = Recipe(epochs=8, lr=0.1, batch_size=40, schedule="triangle", milestones=(0.3,))


@dataclass(frozen=True, eq=False)
class Victim:
    """A network with a backdoor, and what made it."""

    model: Classifier
    trigger: Trigger
    clean: ImageSet
    test: ImageSet


@dataclass(frozen=True, eq=False)
class Hardened:
    """A network trained against PGD, test images in [0, 1] and the budget: an attack breaks some of them and not others."""

    model: Classifier
    x: Tensor
    y: Tensor
    eps: float


def make_tiny(seed: int = 0, *, width: int = 4, randomise: bool = True) -> Classifier:
    with seeded(generator(seed)):
        net = build("convnet", width=width, classes=3, in_channels=1)
        if randomise:
            randomise_norms(net)
    arch = {"name": "convnet", "kwargs": {"width": width, "classes": 3, "in_channels": 1}}
    return Classifier(net, classes=CLASSES, input_shape=SHAPE, mean=[0.4], std=[0.3], arch=arch).eval()


def randomise_norms(net: nn.Module) -> None:
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.5)
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)


def make_images(n: int, seed: int) -> ImageSet:
    """A bright bar whose height in the image is its class, under noise; every class comes equally often."""
    draw = generator(seed)
    y = torch.arange(n) % len(CLASSES)
    x = 0.3 * torch.rand(n, *SHAPE, generator=draw)
    rows = 1 + 4 * y + torch.randint(0, 2, (n,), generator=draw)
    x[torch.arange(n), 0, rows] += 0.5
    x[torch.arange(n), 0, rows, 9:] = 0.15
    return ImageSet((255 * x).round().to(torch.uint8), y, CLASSES, "bars")


@pytest.fixture(autouse=True, scope="session")
def interruptible() -> None:
    """Let processes that tests start hear Ctrl-C, also where the tests themselves run in the background of a shell."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def vision() -> Iterator[None]:
    """Let timm and torchvision load where the registry's torchvision does not fit a torch without CUDA.

    Two operators that no classifier uses are declared; the product never does this.
    """
    library = None
    try:
        importlib.import_module("torchvision")
    except RuntimeError:
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        importlib.import_module("torchvision")
    yield
    del library


@pytest.fixture
def gen() -> torch.Generator:
    return generator(0)


@pytest.fixture
def tiny() -> Callable[..., Classifier]:
    """`make_tiny`: (seed) -> a small network with random weights and batch-norm statistics."""
    return make_tiny


@pytest.fixture(scope="session")
def bars() -> Callable[[int, int], ImageSet]:
    """`make_images`: (n, seed) -> images."""
    return make_images


@pytest.fixture(scope="session")
def images() -> ImageSet:
    return make_images(240, seed=1)


@pytest.fixture(scope="session")
def trained(images: ImageSet) -> Iterator[Classifier]:
    model = train(make_tiny(randomise=False), images, RECIPE, generator=generator(0))
    assert evaluate(model, make_images(120, seed=2)).accuracy.value > 0.9
    before = {name: value.clone() for name, value in model.state_dict().items()}
    yield model
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items()), "a test changed `trained`"


@pytest.fixture(scope="session")
def victim(images: ImageSet) -> Iterator[Victim]:
    poisoning = badnets(images, rate=0.2, target=0, generator=generator(3))
    model = train(make_tiny(1, randomise=False), poisoning.data, RECIPE, generator=generator(0))
    test = make_images(120, seed=5)
    measured = evaluate(model, test, trigger=poisoning.trigger)
    assert measured.accuracy.value > 0.9
    assert measured.attack_success is not None
    assert measured.attack_success.value > 0.9
    before = {name: value.clone() for name, value in model.state_dict().items()}
    yield Victim(model, poisoning.trigger, make_images(60, seed=4), test)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items()), "a test changed `victim`"


@pytest.fixture(scope="session")
def hardened() -> Iterator[Hardened]:
    data, test, eps = load_data("fashion-mini:train"), load_data("fashion-mini:test"), 0.1
    with seeded(generator(0)):
        net = build("convnet", width=8, classes=10, in_channels=1)
    model = Classifier(net, classes=data.classes, input_shape=(1, 28, 28)).train()
    x, y, steps, draw = to_float(data.x), data.y, 90, generator(1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=steps)
    for _ in range(steps):
        rows = torch.randint(len(x), (50,), generator=draw)
        harder = pgd(model, x[rows], y[rows], eps=eps, steps=3, generator=draw)
        optimizer.zero_grad()
        F.cross_entropy(model(harder), y[rows]).backward()
        optimizer.step()
        schedule.step()
    model.zero_grad()
    model.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    yield Hardened(model, to_float(test.x[:400]), test.y[:400], eps)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items()), "a test changed `hardened`"
    assert not any(parameter.grad is not None for parameter in model.parameters())


@pytest.fixture(scope="session")
def schema() -> Draft202012Validator:
    """The JSON Schema that every record must obey."""
    text = files("secateur.report").joinpath("result.schema.json").read_text("utf-8")
    return Draft202012Validator(json.loads(text))
