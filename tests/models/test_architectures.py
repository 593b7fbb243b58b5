"""Every architecture builds thin, runs, can be traced, is recognised by its own weights and survives the disk."""

from __future__ import annotations

import pytest
import torch

from secateur.architectures import resolve
from secateur.errors import ModelError
from secateur.models import ARCHITECTURES, Classifier, build, load_bundle, names, recognise, save
from secateur.models.registry import shapes_of, skeleton

THIN = {
    "convnet": {"width": 4},
    "lenet5": {"width": 3},
    "badnet": {"width": 2},
    "resnet_cifar": {"depth": 8, "width": 4, "option": "B"},
    "resnet20": {"width": 4},
    "resnet32": {"width": 4},
    "resnet44": {"width": 2},
    "resnet56": {"width": 2},
    "resnet110": {"width": 2},
    "resnet": {"width": 2},
    "resnet18": {"width": 2},
    "resnet34": {"width": 2},
    "resnet18_imagenet": {"width": 2},
    "resnet34_imagenet": {"width": 2},
    "preact_resnet": {"width": 2, "final_bn": True},
    "preact_resnet18": {"width": 2},
    "preact_resnet34": {"width": 2},
    "vgg": {"depth": 11, "width": 2},
    **{f"vgg{depth}_bn": {"width": 2} for depth in (11, 13, 16, 19)},
    **{f"vgg{depth}_bn_imagenet": {"width": 1} for depth in (11, 13, 16, 19)},
    "small_vgg": {"width": 4},
    "wrn": {"depth": 10, "width": 2},
    "mobilenet_v1": {"width": 0.25, "classes": 10},
    "mobilenet_v2": {"width": 0.25, "classes": 10},
    "squeezenet": {"width": 0.25, "classes": 10},
    "vit": {"dim": 32, "depth": 2, "heads": 1, "hidden": 64, "patch": 8},
}
# Two names for the same network: the specific one is told.
GENERAL = {"resnet": "resnet18", "preact_resnet": "preact_resnet18", "vgg": "vgg11_bn"}


@pytest.fixture(scope="module", params=THIN)
def classifier(request: pytest.FixtureRequest) -> Classifier:
    name = request.param
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = build(name, **THIN[name])
        for module in net.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                torch.nn.init.uniform_(module.weight, 0.5, 1.5)
                torch.nn.init.normal_(module.running_mean, std=0.1)
    arch = {"name": name, "kwargs": THIN[name]}
    mean, std = [0.4914, 0.4822, 0.4465], [0.2023, 0.1994, 0.2010]
    digits = tuple(map(str, range(10)))
    return Classifier(net, classes=digits, input_shape=(3, 32, 32), mean=mean, std=std, arch=arch).eval()


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def test_table_is_covered():
    assert set(THIN) == set(names())


def test_each_builder_has_one_general_row():
    general = [row.target for row in ARCHITECTURES.values() if not row.fixed]
    assert sorted(general) == sorted({row.target for row in ARCHITECTURES.values()})


def test_forward_and_trace(classifier, images):
    logits = classifier(images)
    traced = torch.fx.symbolic_trace(classifier)
    assert logits.shape == (2, 10)
    assert logits.isfinite().all()
    assert torch.equal(traced(images), logits)


def test_trains(classifier, images):
    net = build(classifier.arch["name"], **classifier.arch["kwargs"])
    torch.nn.functional.cross_entropy(net(images), torch.tensor([1, 2])).backward()
    assert all(parameter.grad is not None for parameter in net.parameters())


def test_recognised_by_its_own_weights(classifier):
    name = classifier.arch["name"]
    kwargs = resolve(name, classifier.arch["kwargs"])
    [(found, arguments)] = recognise(shapes_of(classifier.net.state_dict()))
    assert found == GENERAL.get(name, name)
    assert {**ARCHITECTURES[found].fixed, **arguments} == {**ARCHITECTURES[name].fixed, **kwargs}


def test_bundle_is_bit_exact(classifier, images, tmp_path):
    save(classifier, tmp_path / "a")
    save(classifier, tmp_path / "b")
    back = load_bundle(tmp_path / "a")
    state = back.net.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in classifier.net.state_dict().items())
    assert torch.equal(back(images), classifier(images))
    assert (back.classes, back.input_shape) == (classifier.classes, classifier.input_shape)
    assert not any(module.training for module in back.modules())
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()


@pytest.mark.parametrize(("name", "size"), [("convnet", 28), ("lenet5", 28), ("resnet20", 28), ("wrn", 64)])
def test_other_channels_classes_and_sizes(name, size):
    extra = {"input_size": size} if name == "lenet5" else {}
    net = build(name, **THIN[name], **extra, in_channels=1, classes=7)
    assert net(torch.rand(2, 1, size, size)).shape == (2, 7)
    [(_, kwargs)] = recognise(shapes_of(net.state_dict()))
    assert kwargs.items() >= {"in_channels": 1, "classes": 7, **extra}.items()


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("lenet5", 62006), ("resnet20", 269722), ("resnet56", 853018), ("resnet18", 11173962),
        ("resnet18_imagenet", 11181642), ("preact_resnet18", 11171146), ("vgg16_bn", 14728266), ("wrn", 175066),
        ("mobilenet_v1", 4231976), ("mobilenet_v2", 3504872), ("squeezenet", 1248424), ("small_vgg", 308394),
    ],
)  # fmt: skip
def test_published_sizes(name, parameters):
    assert sum(parameter.numel() for parameter in skeleton(name, {}).parameters()) == parameters


def test_what_shapes_cannot_tell_is_the_documented_default():
    [(name, kwargs)] = recognise(shapes_of(skeleton("vit", {"heads": 6}).state_dict()))
    assert (name, kwargs["heads"]) == ("vit", 3)


def test_skeletons_draw_no_random_numbers():
    before = torch.get_rng_state()
    recognise(shapes_of(skeleton("squeezenet", {}).state_dict()))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("name", "kwargs", "message"),
    [
        ("resnet21", {}, "unknown architecture 'resnet21'; did you mean 'resnet"),
        ("convnet", {"widht": 8}, "unknown argument of convnet 'widht'; did you mean 'width'"),
        ("resnet20", {"depth": 32}, "unknown argument of resnet20 'depth'"),
        ("convnet", {"width": 8.0}, "convnet: width must be of type int, got float"),
        ("convnet", {"width": True}, "of type int, got bool"),
        ("convnet", {"classes": 0}, r"classes must lie in \(0, 65536\], got 0"),
        ("mobilenet_v1", {"width": float("nan")}, "width must lie in"),
        ("resnet_cifar", {"depth": 21}, "depth must be 6n \\+ 2"),
        ("resnet_cifar", {"option": "C"}, "unknown option 'C'"),
        ("resnet", {"depth": 50}, "depth must be one of 18, 34, got 50"),
        ("resnet", {"stem": "imagnet"}, "did you mean 'imagenet'"),
        ("wrn", {"depth": 12}, "depth must be 6n \\+ 4"),
        ("vgg", {"depth": 12}, "depth must be one of 11, 13, 16, 19"),
        ("vgg", {"head": "none"}, "unknown head"),
        ("small_vgg", {"input_size": 4}, "input_size must be at least 8"),
        ("lenet5", {"input_size": 12}, "input_size must be at least 16"),
        ("vit", {"heads": 5}, "heads must divide dim"),
        ("vit", {"patch": 5}, "patch must divide input_size"),
        ("vit", {"depth": 101}, "depth must lie in"),
    ],
)
def test_wrong_arguments_are_told(name, kwargs, message):
    with pytest.raises(ModelError, match=message):
        build(name, **kwargs)


@pytest.mark.parametrize(
    "shapes",
    [{}, {"conv1.weight": ()}, {"weight": (3,)}, {"conv1.weight": (16,), "linear.weight": ()}],
)
def test_foreign_shapes_fit_nothing(shapes):
    assert recognise(shapes) == []


def test_almost_right_shapes_fit_nothing():
    shapes = shapes_of(skeleton("resnet20", {}).state_dict())
    assert recognise({**shapes, "extra": (1,)}) == []
    assert recognise({**shapes, "layer3.2.bn2.bias": (65,)}) == []
    assert recognise({key: shape for key, shape in shapes.items() if key != "linear.bias"}) == []


def test_a_cut_network_is_not_taken_for_a_whole_one():
    """Every family reads hostile variants of its own shapes without failing."""
    for name in THIN:
        shapes = shapes_of(skeleton(name, THIN[name]).state_dict())
        for key in list(shapes)[:: max(1, len(shapes) // 8)]:
            assert recognise({**shapes, key: (0,)}) == []
