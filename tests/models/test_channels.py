"""Masked = removed, on every architecture and on networks made to trip the tracing."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from test_architectures import THIN
from torch import Tensor, nn

from secateur.architectures import ARCHITECTURES
from secateur.compress import remove_channels
from secateur.errors import ModelError
from secateur.models import build, names
from secateur.models.channels import ChannelGraph, trace_channels
from secateur.models.shrink import shrink
from secateur.prune import apply_mask
from secateur.state import generator, seeded
from secateur.types import ChannelMask

SHAPE = (3, 8, 8)
SIZES = {"vit": 32, "vgg": 32, "small_vgg": 32, "lenet5": 32, "badnet": 32, "squeezenet": 48}


def randomise(net: nn.Module) -> nn.Module:
    """Make float64 with batch-norm statistics and affine parameters far from their defaults, and live filters."""
    for module in net.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            if module.affine:
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias)
            if module.track_running_stats:
                nn.init.normal_(module.running_mean)
                nn.init.uniform_(module.running_var, 0.5, 2)
        elif isinstance(module, nn.Conv2d | nn.Linear) and module.bias is not None:
            nn.init.normal_(module.bias)
    return net.double().eval()


def make(net: Callable[[], nn.Module] | nn.Module) -> nn.Module:
    with seeded(generator(0)):
        return randomise(net if isinstance(net, nn.Module) else net())


def tied_mask(graph: ChannelGraph, share: float, seed: int = 0) -> ChannelMask:
    """Mask a random share of all channels, each at every site that it has."""
    roots = torch.cat([roots for name, roots in graph.groups.items() if not graph.is_output(name)]).unique()
    gone = roots[torch.rand(len(roots), generator=generator(seed)) < share]
    return ChannelMask({name: ~torch.isin(roots, gone) for name, roots in graph.groups.items() if not graph.is_output(name)})


def difference(a: nn.Module, b: nn.Module, shape: tuple[int, int, int], n: int = 2) -> float:
    x = torch.randn(n, *shape, generator=generator(1), dtype=torch.float64)
    with torch.no_grad():
        return float((a(x) - b(x)).abs().max())


def size(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


def check(net: nn.Module, mask: ChannelMask, shape: tuple[int, int, int] = SHAPE) -> nn.Module:
    """Assert masked = removed and return the smaller network."""
    masked = apply_mask(net, mask)
    small = remove_channels(masked, mask, shape).model
    assert difference(masked, small, shape) < 1e-9
    assert difference(masked, net, shape) > 1e-6, "the mask changes nothing: the test proves nothing"
    return small


@pytest.fixture(scope="module", params=names())
def traced(request: pytest.FixtureRequest) -> tuple[nn.Module, tuple[int, int, int], ChannelGraph]:
    name = request.param
    kwargs = {**THIN[name], **({"classes": 4} if name in ("mobilenet_v1", "mobilenet_v2", "squeezenet") else {})}
    family = ARCHITECTURES[name].target.partition(":")[2]
    side = SIZES.get(family, 16)
    net = make(lambda: build(name, **kwargs))
    return net, (3, side, side), trace_channels(net, (3, side, side))


def test_masked_is_removed_on_every_architecture(traced):
    net, shape, graph = traced
    small = check(net, tied_mask(graph, 0.5), shape)
    assert size(small) < size(net)


def test_outputs_are_never_removable(traced):
    net, shape, graph = traced
    everything = {name: torch.zeros(len(roots), dtype=torch.bool) for name, roots in graph.groups.items()}
    assert not graph.removable(everything) & graph.answers
    assert len(graph.answers) == net(torch.zeros(2, *shape, dtype=torch.float64)).shape[1]
    small = shrink(net, graph.plan(everything), shape)
    outputs = small(torch.randn(2, *shape, dtype=torch.float64))
    assert outputs.shape[1] == len(graph.answers)


# --- sites and reasons --------------------------------------------------------------------------------------------------------


def graph_of(net: nn.Module, shape: tuple[int, int, int] = SHAPE) -> ChannelGraph:
    return trace_channels(net, shape)


def why(graph: ChannelGraph, name: str) -> str | None:
    """Why the first channel of a site stays, or None when it may leave."""
    return graph.kept.get(int(graph.groups[name][0]))


def test_the_norm_after_a_convolution_is_the_site(tiny):
    graph = graph_of(tiny(), (1, 12, 12))
    assert [(s.name, s.channels, s.writer) for s in graph.sites] == [
        ("bn1", 4, "conv1"), ("bn2", 8, "conv2"), ("bn3", 16, "conv3"), ("bn4", 16, "conv4"), ("linear", 3, "linear"),
    ]  # fmt: skip
    assert graph.is_output("linear")
    assert not graph.is_output("bn4")


def test_zeroing_the_filter_before_a_norm_does_not_silence(tiny):
    net = make(tiny().net)
    mask = ChannelMask({"conv1": torch.tensor([False, True, True, True])})
    masked = apply_mask(net, mask)
    with pytest.raises(ModelError, match="'conv1' is not a site where channels can be masked; sites: bn1, bn2"):
        remove_channels(masked, mask, (1, 12, 12))


def test_norms_of_preact_read_and_have_no_writer():
    graph = graph_of(build("preact_resnet18", width=2), (3, 16, 16))
    writers = {site.name: site.writer for site in graph.sites}
    assert writers["layer1.0.bn1"] is None
    assert writers["layer1.0.bn2"] == "layer1.0.conv1"
    assert writers["conv1"] == "conv1"
    assert writers["layer1.0.conv2"] == "layer1.0.conv2"


def test_depthwise_chain_has_its_last_norm_as_the_site():
    net = nn.Sequential(
        nn.Conv2d(3, 6, 1), nn.BatchNorm2d(6), nn.ReLU6(), nn.Conv2d(6, 6, 3, groups=6), nn.BatchNorm2d(6), nn.ReLU6(),
        nn.Conv2d(6, 4, 1), nn.Flatten(), nn.Linear(144, 2),
    )  # fmt: skip
    graph = graph_of(net)
    assert [(s.name, s.writer) for s in graph.sites] == [("4", "0"), ("6", "6"), ("8", "8")]
    small = check(make(net), tied_mask(graph, 0.5))
    assert small[0].out_channels == small[3].in_channels == small[3].groups == small[6].in_channels < 6


def test_depthwise_down_to_one_channel():
    net = make(lambda: nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 3, groups=4), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 6), nn.Flatten()
    ))  # fmt: skip
    small = check(net, ChannelMask({"2": torch.tensor([False, False, True, False])}))
    assert (small[0].out_channels, small[1].groups, small[3].in_channels) == (1, 1, 1)


def test_padded_shortcuts_keep_their_stream_and_say_why():
    net = build("resnet20", width=4)
    graph = graph_of(net, (3, 16, 16))
    assert "not followed" in why(graph, "layer1.0.bn2")
    assert why(graph, "layer1.0.bn1") is None
    assert "not followed" in graph.why_kept("layer1.0.bn2")


def test_projection_shortcuts_let_their_stream_go():
    graph = graph_of(build("resnet_cifar", depth=8, width=4, option="B"), (3, 16, 16))
    assert why(graph, "layer2.0.bn2") is None
    assert torch.equal(graph.groups["layer2.0.bn2"], graph.groups["layer2.0.shortcut.1"])
    assert torch.equal(graph.groups["layer1.0.bn2"], graph.groups["bn1"])
    assert not torch.equal(graph.groups["layer1.0.bn2"], graph.groups["layer1.0.bn1"])


class Head(nn.Module):
    """conv -> something -> conv -> linear."""

    def __init__(self, between: nn.Module | Callable[[Tensor], Tensor], channels: int = 4) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, channels, 3)
        self.between = between
        self.conv2 = nn.Conv2d(channels, 3, 3)
        self.linear = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv2(self.between(self.conv1(x)))
        return self.linear(x.mean(dim=(2, 3)))


def test_layer_norm_keeps_with_a_reason():
    graph = trace_channels(
        nn.Sequential(nn.Flatten(2), nn.Linear(64, 6), nn.LayerNorm(6), nn.Linear(6, 2), nn.Flatten()), SHAPE
    )
    assert why(graph, "2") == "'2' shares statistics across channels"


@pytest.mark.parametrize("norm", [nn.GroupNorm(2, 4), nn.GroupNorm(4, 4), nn.InstanceNorm2d(4, affine=True)])
def test_norms_over_the_image_keep_their_channels(norm):
    graph = graph_of(Head(norm))
    assert why(graph, "between") is not None
    assert "between" in why(graph, "between")
    check(make(Head(norm)), tied_mask(graph, 0.5))


def test_layer_norm_keeps_the_stream_of_a_transformer_but_not_its_hidden_units():
    graph = graph_of(build("vit", **THIN["vit"]), (3, 32, 32))
    assert why(graph, "norm") is not None
    assert why(graph, "blocks.0.mlp.fc2") is not None
    assert why(graph, "blocks.0.mlp.fc1") is None


@pytest.mark.parametrize("between", [
    nn.Sigmoid(),
    nn.Softplus(),
    nn.Hardsigmoid(),
    nn.Softmax(dim=1),
    nn.Hardtanh(0.5, 1.0),
    nn.Upsample(scale_factor=2),
    lambda x: x + 1.0,
    lambda x: x.sigmoid(),
    lambda x: x.clamp_min(0.5),
    lambda x: F.hardtanh(x, 0.25, 1.0),
    lambda x: x.clamp(0.1, 0.9),
    lambda x: x.exp(),
    lambda x: x * x.mean(dim=(2, 3), keepdim=True),
    lambda x: x[:, [1, 0, 3, 2]],
    lambda x: x.flip(1),
    lambda x: x + x.flip(1),
    lambda x: x - x.mean(dim=1, keepdim=True),
    lambda x: x.transpose(1, 2).transpose(1, 2),
])  # fmt: skip
def test_what_is_not_followed_keeps_its_channels(between):
    graph = graph_of(Head(between))
    assert "not followed" in why(graph, "conv1")
    net, mask = make(Head(between)), ChannelMask({"conv1": torch.tensor([True, False, False, True])})
    masked = apply_mask(net, mask)
    removal = remove_channels(masked, mask, SHAPE)
    assert removal.kept == {}
    assert difference(masked, removal.model, SHAPE) == 0


@pytest.mark.parametrize("between", [
    nn.ReLU(inplace=True),
    nn.Sequential(nn.ELU(), nn.Dropout2d(), nn.MaxPool2d(2)),
    nn.Hardtanh(),
    nn.Hardtanh(0.0, 1.0),
    nn.GELU(),
    lambda x: F.leaky_relu(x, 0.1),
    lambda x: F.silu(F.avg_pool2d(x, 2)),
    lambda x: x.relu().tanh(),
    lambda x: x.relu_().contiguous(),
    lambda x: F.dropout(x, training=False),
    nn.BatchNorm2d(4, track_running_stats=False),
])  # fmt: skip
def test_silent_channels_stay_silent_through_these(between):
    net = make(Head(between))
    graph = graph_of(net)
    small = check(net, tied_mask(graph, 0.5, seed=2))
    assert small.conv1.out_channels == small.conv2.in_channels < 4


def test_norm_without_affine_is_not_a_site_and_keeps():
    net = make(Head(nn.BatchNorm2d(4, affine=False)))
    graph = graph_of(net)
    assert [site.name for site in graph.sites][:1] == ["conv1"]
    assert "not followed" in why(graph, "conv1")


def test_grouped_convolution_keeps_both_sides():
    net = Head(nn.Conv2d(4, 4, 1, groups=2))
    graph = graph_of(net)
    assert why(graph, "conv1") == why(graph, "between") == "'between' is a grouped convolution"


def test_activation_before_the_norm():
    net = make(Head(nn.Sequential(nn.ReLU(), nn.BatchNorm2d(4))))
    graph = graph_of(net)
    assert [(s.name, s.writer) for s in graph.sites][:1] == [("between.1", "conv1")]
    assert check(net, tied_mask(graph, 0.5)).between[1].num_features < 4


def test_the_users_layer_is_put_in_a_graph_only_as_it_is(tiny):
    model = tiny()
    graph = graph_of(model, (1, 12, 12))
    assert graph.groups.keys() == graph_of(model.net, (1, 12, 12)).groups.keys()


# --- flattening and concatenation ---------------------------------------------------------------------------------------------


class Flat(nn.Module):
    def __init__(self, flatten: Callable[[Tensor], Tensor], norm: bool = False) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, stride=2)
        self.flatten = flatten
        self.norm = nn.BatchNorm1d(36) if norm else nn.Identity()
        self.linear = nn.Linear(36, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.norm(self.flatten(F.relu(self.conv(x)))))


@pytest.mark.parametrize("flatten", [
    nn.Flatten(),
    lambda x: torch.flatten(x, 1),
    lambda x: x.flatten(1),
    lambda x: x.view(x.size(0), -1),
    lambda x: x.view(x.shape[0], -1),
    lambda x: x.view((x.size(0), -1)),
    lambda x: x.reshape(len(x) if isinstance(x, Tensor) else x.size(0), -1),
])  # fmt: skip
def test_flatten_into_linear_with_places_left(flatten):
    net = make(Flat(flatten))
    small = check(net, ChannelMask({"conv": torch.tensor([True, False, True, False])}))
    assert (small.conv.out_channels, small.linear.in_features) == (2, 18)
    columns = net.linear.weight.reshape(2, 4, 9)[:, [0, 2]].reshape(2, 18)
    assert torch.equal(small.linear.weight, columns)


@pytest.mark.parametrize("flatten", [
    lambda x: x.view(-1, 36),
    lambda x: x.view(x.size(0), 36),
    lambda x: x.reshape(-1, 4 * 3 * 3),
])  # fmt: skip
def test_sizes_written_into_the_code_keep_the_channels(flatten):
    net = make(Flat(flatten))
    mask = ChannelMask({"conv": torch.tensor([True, False, True, False])})
    masked = apply_mask(net, mask)
    removal = remove_channels(masked, mask, SHAPE)
    assert difference(masked, removal.model, SHAPE, n=4) < 1e-9
    assert removal.kept == {}


def test_views_that_move_places_between_images_are_not_followed():
    class Moved(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 5)
            self.linear = nn.Linear(32, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(self.conv(x).view(2 * x.size(0), -1)).view(x.size(0), 4)

    net = make(Moved)
    mask = ChannelMask({"conv": torch.tensor([True, False, True, False])})
    assert remove_channels(apply_mask(net, mask), mask, SHAPE).kept == {}


def test_a_norm_over_flattened_places_needs_all_of_them():
    net = make(Flat(nn.Flatten(), norm=True))
    graph = graph_of(net)
    assert [(s.name, s.channels, s.writer) for s in graph.sites if s.name == "norm"] == [("norm", 36, None)]
    keep = {"conv": torch.tensor([False, True, True, True]), "norm": torch.ones(36, dtype=torch.bool)}
    keep["norm"][:5] = False
    some = ChannelMask(dict(keep))
    masked = apply_mask(net, some)
    assert difference(masked, remove_channels(masked, some, SHAPE).model, SHAPE) < 1e-9
    keep["norm"] = torch.arange(36) >= 9
    small = check(net, ChannelMask(keep))
    assert (small.conv.out_channels, small.norm.num_features, small.linear.in_features) == (3, 27, 27)


class Two(nn.Module):
    """Two branches that meet, then a convolution."""

    def __init__(self, meet: Callable[[Tensor, Tensor], Tensor], channels: int) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3)
        self.meet = meet
        self.c = nn.Conv2d(channels, 2, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.meet(self.a(x), self.b(x))).flatten(1)


@pytest.mark.parametrize("meet", [
    lambda a, b: torch.cat([a, b], 1),
    lambda a, b: torch.cat((a, b), dim=1),
    lambda a, b: torch.cat([a, b], dim=-3),
    lambda a, b: torch.cat([b.relu(), a], 1),
])  # fmt: skip
def test_concatenated_channels_leave_one_by_one(meet):
    net = make(Two(meet, 8))
    keep = {"a": torch.tensor([True, False, False, True]), "b": torch.tensor([False, True, True, True])}
    small = check(net, ChannelMask(keep))
    assert (small.a.out_channels, small.b.out_channels, small.c.in_channels) == (2, 3, 5)


def test_squeezenet_concatenates():
    graph = graph_of(build("squeezenet", **THIN["squeezenet"]), (3, 48, 48))
    one, three = graph.groups["features.3.expand1x1"], graph.groups["features.3.expand3x3"]
    assert not set(one.tolist()) & set(three.tolist())
    assert why(graph, "features.3.expand1x1") is None


@pytest.mark.parametrize(("meet", "channels"), [
    (lambda a, b: torch.cat([a, a], 1), 8),
    (lambda a, b: torch.cat([a, a, b], 1), 12),
    (lambda a, b: torch.cat([a, b], 2)[:, :, :6], 4),
    (lambda a, b: torch.stack([a, b]).sum(0), 4),
    (lambda a, b: a * b, 4),
    (lambda a, b: a - b, 4),
])  # fmt: skip
def test_other_meetings_stay_right(meet, channels):
    net = make(Two(meet, channels))
    mask = ChannelMask({"a": torch.tensor([True, False, False, True]), "b": torch.tensor([False, False, True, True])})
    check(net, mask)


# --- streams ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("meet", [
    lambda a, b: a + b,
    lambda a, b: a.add(b),
    lambda a, b: torch.add(a, b),
    lambda a, b: a.relu().add_(b),
    lambda a, b: (a + b).relu(),
])  # fmt: skip
def test_a_stream_needs_every_writer(meet):
    net = make(Two(meet, 4))
    one = torch.tensor([True, False, True, True])
    small = check(net, ChannelMask({"a": one, "b": one}))
    assert (small.a.out_channels, small.b.out_channels, small.c.in_channels) == (3, 3, 3)
    for partial in ({"a": one}, {"b": one}, {"a": one, "b": one.flip(0)}):
        masked = apply_mask(net, ChannelMask(partial))
        removal = remove_channels(masked, ChannelMask(partial), SHAPE)
        assert removal.kept == {}
        assert size(removal.model) == size(net)
        assert all("not masked there" in note for note in removal.notes)


def test_an_addition_in_place_is_seen_by_later_readers():
    def meet(a: Tensor, b: Tensor) -> Tensor:
        a.add_(b)
        return a

    net = make(Two(meet, 4))
    one = torch.tensor([True, False, True, True])
    for partial in (ChannelMask({"a": one}), ChannelMask({"a": one, "b": one})):
        check(net, partial)


def test_partial_masks_of_a_residual_network_remove_nothing_of_the_stream():
    net = make(lambda: build("resnet_cifar", depth=8, width=4, option="B"))
    keep = torch.tensor([True, False, True, False])
    masked = apply_mask(net, ChannelMask({"layer1.0.bn2": keep}))
    removal = remove_channels(masked, ChannelMask({"layer1.0.bn2": keep}), (3, 16, 16))
    assert removal.kept == {}
    assert size(removal.model) == size(net)
    both = check(net, ChannelMask({"layer1.0.bn2": keep, "bn1": keep}), (3, 16, 16))
    assert both.layer1[0].conv2.out_channels == both.conv1.out_channels == both.layer2[0].conv1.in_channels == 2


def test_a_branch_of_preact_leaves_the_stream_alone():
    net = make(lambda: build("preact_resnet18", width=4))
    keep = torch.tensor([True, False, True, False])
    masked = apply_mask(net, ChannelMask({"layer1.0.bn1": keep}))
    assert remove_channels(masked, ChannelMask({"layer1.0.bn1": keep}), (3, 16, 16)).kept == {}
    small = check(net, ChannelMask({"layer1.0.bn2": keep}), (3, 16, 16))
    assert small.layer1[0].conv1.out_channels == 2


# --- modules used twice, user code --------------------------------------------------------------------------------------------


def test_a_module_used_twice_keeps_its_channels():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.conv = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)
            self.act = nn.ReLU()
            self.out = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = self.act(self.stem(x))
            return self.out(self.conv(self.act(self.conv(x))).mean((2, 3)))

    net = make(Twice)
    graph = graph_of(net)
    assert why(graph, "conv") == "'conv' is used more than once"
    mask = tied_mask(graph, 0.5)
    masked = apply_mask(net, mask)
    assert difference(masked, remove_channels(masked, mask, SHAPE).model, SHAPE) < 1e-9


def test_a_norm_used_twice_keeps_its_channels():
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.norm = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
            self.out = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.norm(self.b(self.norm(self.a(x)))).mean((2, 3)))

    graph = graph_of(make(Shared))
    assert why(graph, "norm") == "'norm' is used more than once"


def test_one_activation_object_everywhere_is_fine():
    act = nn.ReLU()
    net = make(nn.Sequential(nn.Conv2d(3, 4, 1), act, nn.Conv2d(4, 4, 1), act, nn.Conv2d(4, 2, 8), nn.Flatten()))
    small = check(net, tied_mask(graph_of(net), 0.5))
    assert small[0].out_channels < 4


def test_a_convolution_with_two_readers_before_its_norm():
    class Early(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)
            self.a, self.b = nn.Conv2d(4, 2, 8), nn.Conv2d(4, 2, 8)

        def forward(self, x: Tensor) -> Tensor:
            x = self.conv(x)
            return (self.a(x) + self.b(self.norm(x))).flatten(1)

    net = make(Early)
    graph = graph_of(net)
    writers = {site.name: site.writer for site in graph.sites}
    assert (writers["conv"], writers["norm"]) == ("conv", None)
    one = torch.tensor([True, False, True, True])
    for partial in ("conv", "norm"):
        masked = apply_mask(net, ChannelMask({partial: one}))
        assert remove_channels(masked, ChannelMask({partial: one}), SHAPE).kept == {}
    assert check(net, ChannelMask({"conv": one, "norm": one})).conv.out_channels == 3


def test_control_flow_is_refused_with_the_reason():
    class Fork(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(192, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = x.flatten(1)
            if x.sum() > 0:
                return self.fc(x)
            return -self.fc(x)

    with pytest.raises(ModelError, match=r"^cannot follow the channels of Fork: .*control flow"):
        trace_channels(Fork(), SHAPE)


def test_images_that_do_not_fit_are_refused(tiny):
    with pytest.raises(ModelError, match="cannot follow the channels of ConvNet: "):
        trace_channels(tiny(), (3, 12, 12))


# --- shrink -------------------------------------------------------------------------------------------------------------------


def test_each_layer_keeps_one_channel(tiny):
    net = make(tiny().net)
    mask = ChannelMask({name: torch.zeros(n, dtype=torch.bool) for name, n in {"bn1": 4, "bn2": 8, "bn4": 16}.items()})
    masked = apply_mask(net, mask)
    removal = remove_channels(masked, mask, (1, 12, 12))
    assert {name: index.tolist() for name, index in removal.kept.items()} == {"bn1": [0], "bn2": [0], "bn4": [0]}
    assert {name: keep.tolist() for name, keep in removal.mask.keep.items()} == {n: [False] for n in mask.keep}
    assert difference(masked, removal.model, (1, 12, 12)) < 1e-9


def test_shrinking_twice_is_shrinking_once(tiny):
    net = make(tiny().net)
    twice = shrink(net, {"bn2": torch.tensor([0, 2, 3, 5, 7])}, (1, 12, 12))
    twice = shrink(twice, {"bn2": torch.tensor([1, 4]), "bn1": torch.tensor([3])}, (1, 12, 12))
    once = shrink(net, {"bn2": torch.tensor([2, 7]), "bn1": torch.tensor([3])}, (1, 12, 12))
    assert once.state_dict().keys() == twice.state_dict().keys()
    assert all(torch.equal(value, twice.state_dict()[name]) for name, value in once.state_dict().items())
    assert once.conv2.weight.shape == (2, 1, 3, 3)


def test_shrink_takes_the_rows_named(tiny):
    net = make(tiny().net)
    small = shrink(net, {"bn1": torch.tensor([1, 3])}, (1, 12, 12))
    assert torch.equal(small.conv1.weight, net.conv1.weight[[1, 3]])
    assert torch.equal(small.bn1.running_var, net.bn1.running_var[[1, 3]])
    assert torch.equal(small.conv2.weight, net.conv2.weight[:, [1, 3]])
    assert (small.conv1.out_channels, small.bn1.num_features, small.conv2.in_channels) == (2, 2, 2)
    assert all(isinstance(p, nn.Parameter) for p in small.parameters())
    assert isinstance(small.conv1.weight, nn.Parameter)


def test_shrink_refuses_unknown_sites(tiny):
    with pytest.raises(ModelError, match="'bn9' is not a site where channels can be masked; sites: bn1, bn2, bn3, bn4, linear"):
        shrink(tiny(), {"bn9": torch.tensor([0])}, (1, 12, 12))


@pytest.mark.parametrize("index", [[4], [-1], [], [0, 99]])
def test_shrink_refuses_indices_out_of_range(tiny, index):
    with pytest.raises(ModelError, match=r"channels kept at 'bn1' must be 1 to 4 indices in \[0, 3\], got"):
        shrink(tiny(), {"bn1": torch.tensor(index, dtype=torch.int64)}, (1, 12, 12))


def test_shrink_refuses_to_cut_classes(tiny):
    with pytest.raises(ModelError, match="must stay: the network's output"):
        shrink(tiny(), {"linear": torch.tensor([0, 1])}, (1, 12, 12))


@pytest.mark.parametrize("kept", [
    {"a": [0, 1]},
    {"a": [0, 1], "b": [0, 2]},
    {"a": [0, 1], "b": [0, 1, 2, 3]},
])  # fmt: skip
def test_shrink_refuses_tied_layers_that_keep_other_channels(kept):
    net = make(Two(lambda a, b: a + b, 4))
    with pytest.raises(ModelError, match=r"'[ab]' shares channels with other layers"):
        shrink(net, {name: torch.tensor(index) for name, index in kept.items()}, SHAPE)


def test_the_network_is_left_as_it_was(tiny):
    model = tiny()
    model.net.bn3.train()
    model.net.conv1.weight.requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    flags = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    small = shrink(model, {"bn1": torch.tensor([0]), "bn3": torch.tensor([5, 6])}, (1, 12, 12))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert (model.net.conv1.out_channels, model.net.bn3.num_features) == (4, 16)
    assert [module.training for module in model.modules()] == flags == [module.training for module in small.modules()]
    assert not small.net.conv1.weight.requires_grad
    assert small.net.conv2.weight.requires_grad
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_tracing_a_training_network_draws_no_random_numbers():
    class Dropping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.out = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(F.dropout(self.conv(x), 0.5, self.training)).flatten(1)

    dropping = Dropping().train()
    state = torch.get_rng_state()
    graph = trace_channels(dropping, SHAPE)
    assert torch.equal(torch.get_rng_state(), state)
    assert why(graph, "conv") is None
    assert dropping.training


def test_mask_of_a_wrong_length_is_refused(tiny):
    with pytest.raises(ModelError, match=r"the mask of 'bn1' must have 4 entries, got 3"):
        remove_channels(tiny(), ChannelMask({"bn1": torch.ones(3, dtype=torch.bool)}), (1, 12, 12))
