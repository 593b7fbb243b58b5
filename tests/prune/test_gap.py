"""GAP as published and corrected: what each sees, what each sums, and what its mask does to a network."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from secateur.errors import DataError, MethodError, ModelError
from secateur.measure import cost
from secateur.models import Classifier, build, load_bundle, save
from secateur.models.bundle import load_masks
from secateur.prune import Compression, Sentence, prune, select
from secateur.prune.gap import gap
from secateur.state import generator, seeded
from secateur.train import Recipe
from secateur.types import ImageSet, WeightMask, to_float

RECIPE = Recipe(epochs=1, lr=0.02, batch_size=64)


def linear(*, mean: float = 0.0, std: float = 1.0) -> Classifier:
    """Two linear layers without a nonlinearity between them: gradients have closed forms."""
    with seeded(generator(4)):
        net = nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.Linear(3, 2))
    return Classifier(net, classes=("a", "b"), input_shape=(1, 2, 2), mean=[mean], std=[std]).eval()


def pixels(n: int = 6) -> ImageSet:
    x = torch.randint(0, 256, (n, 1, 2, 2), generator=generator(2), dtype=torch.uint8)
    return ImageSet(x, torch.arange(n) % 2, ("a", "b"))


def slope(net: nn.Sequential, z: torch.Tensor, y: torch.Tensor) -> dict[str, torch.Tensor]:
    """The gradient of the mean loss in the first layer: ``mean of V^T (p - onehot) x^T``."""
    z, head = z.flatten(1), net[2].weight.detach()
    p = net(z).softmax(dim=1).detach()
    back = (p - F.one_hot(y, 2)) @ head / len(z)
    return {"1.weight": back.T @ z, "1.bias": back.sum(dim=0)}


def close(found: dict, wanted: dict) -> bool:
    return found.keys() == wanted.keys() and all(torch.allclose(found[n], wanted[n], atol=1e-6) for n in wanted)


class Watch:
    """What a network, or copies of it, are given, and in which mode."""

    def __init__(self, net: nn.Module) -> None:
        self.seen: list[torch.Tensor] = []
        self.modes: set[bool] = set()
        net.register_forward_pre_hook(self)

    def __call__(self, module: nn.Module, given: tuple[torch.Tensor]) -> None:
        self.seen.append(given[0].detach().clone())
        self.modes.add(module.training)

    def __deepcopy__(self, memo: dict) -> Watch:
        return self


def test_without_a_budget_the_published_score_is_the_clean_gradient_and_a_stray_one_per_step(gen):
    model, clean = linear(), pixels()
    x = to_float(clean.x)
    true, predicted = slope(model.net, x, clean.y), slope(model.net, x, model(x).argmax(dim=1))
    assert not torch.equal(model(x).argmax(dim=1), clean.y)
    assert close(gap(model, clean, eps=0.0, generator=gen).values, true)
    for steps in (1, 10):
        published = gap(model, clean, protocol="published", eps=0.0, steps=steps, generator=gen).values
        assert close(published, {name: true[name] + steps * predicted[name] for name in true})


def test_batches_are_summed_as_published_and_averaged_when_corrected(gen):
    model, clean = linear(), pixels()
    settings = {"eps": 0.0, "steps": 1, "generator": gen}
    whole = gap(model, clean, protocol="published", **settings).values
    halves = gap(model, clean, protocol="published", batch_size=3, **settings).values
    assert close(halves, {name: 2 * value for name, value in whole.items()})
    assert close(gap(model, clean, batch_size=3, **settings).values, gap(model, clean, **settings).values)


def test_published_moves_normalised_inputs_away_from_the_prediction_and_out_of_the_range_of_pixels(gen):
    model, clean, eps = linear(mean=0.5, std=0.2), pixels(), 0.4
    clean.x[0], clean.x[1] = 0, 255
    watch = Watch(model.net)
    z = (to_float(clean.x) - 0.5) / 0.2
    # A step of twice the budget ends on its border, and with two classes the gradient's sign is the same everywhere.
    found = gap(model, clean, protocol="published", eps=eps, steps=1, step_size=1.0, batch_size=6, generator=gen).values
    assert len(watch.seen) == 3  # the prediction, the one step, the adversarial images
    order = torch.tensor([int((watch.seen[0][i] - z).abs().flatten(1).amax(1).argmin()) for i in range(6)])
    z, y = z[order], clean.y[order]
    with torch.no_grad():
        predicted = model.net(z).argmax(dim=1)
    across = (model.net[2].weight @ model.net[1].weight).detach()
    away = (across[1 - predicted] - across[predicted]).sign().reshape(z.shape)
    assert torch.allclose(watch.seen[0], z)
    assert torch.allclose(watch.seen[2], z + eps * away, atol=1e-6)
    shown = watch.seen[2] * 0.2 + 0.5
    assert max(float(shown.max()) - 1, -float(shown.min())) > 0.01
    assert float((watch.seen[2] - z).abs().max() * 0.2) == pytest.approx(0.08, rel=1e-3)  # 0.4 are 0.08 in pixels
    stray, last = slope(model.net, watch.seen[1], predicted), slope(model.net, watch.seen[2], y)
    assert close(found, {name: stray[name] + last[name] for name in last})


def test_corrected_moves_pixels_away_from_the_true_label_and_counts_the_adversarial_images_alone(gen):
    model, clean, eps = linear(mean=0.5, std=0.2), pixels(), 0.1
    watch = Watch(model.net)
    found = gap(model, clean, eps=eps, steps=1, step_size=1.0, batch_size=6, generator=gen).values
    shown = watch.seen[-1]
    images = shown * 0.2 + 0.5
    assert -1e-6 <= float(images.min()) <= float(images.max()) <= 1 + 1e-6
    x = to_float(clean.x)
    order = torch.tensor([int((images[i] - x).abs().flatten(1).amax(1).argmin()) for i in range(6)])
    x, y = x[order], clean.y[order]
    across = (model.net[2].weight @ model.net[1].weight).detach()
    away = (across[1 - y] - across[y]).sign().reshape(x.shape)
    ends = (x + eps * away).clamp(0, 1)
    logits = model(images).detach()
    start_broke = ~torch.isclose(images, ends, atol=1e-5).flatten(1).all(dim=1)  # its random start had broken the image
    assert bool((logits.argmax(dim=1) != y)[start_broke].all())
    assert not bool(start_broke.all())
    assert close(found, slope(model.net, shown, y))


def test_published_is_scored_in_train_mode_and_corrected_in_eval_mode(tiny, images, gen):
    for protocol, wanted in (("published", {True}), ("corrected", {False})):
        model = tiny()
        watch = Watch(model.net)
        gap(model, images, protocol=protocol, steps=2, generator=gen)
        assert watch.modes == wanted
        assert not model.net.training


def test_published_sees_batch_statistics(tiny, images, gen):
    model, other = tiny(), tiny()
    other.net.bn2.running_mean += 5
    for protocol, same in (("published", True), ("corrected", False)):
        one, two = (gap(m, images, protocol=protocol, steps=2, generator=generator(0)).values for m in (model, other))
        assert torch.allclose(one["conv1.weight"], two["conv1.weight"], atol=1e-5) is same


def test_variants_are_functions_of_one_gradient(tiny, images):
    model = tiny()
    signed, weighted, absolute = (
        gap(model, images, variant=variant, steps=2, generator=generator(0)).values
        for variant in ("signed", "weighted", "absolute")
    )
    assert list(signed) == [f"conv{i}.weight" for i in (1, 2, 3, 4)]
    for name, value in signed.items():
        assert bool((value < 0).any())
        assert torch.equal(absolute[name], value.abs())
        assert torch.allclose(weighted[name], value * model.net.get_parameter(name).detach())


def test_channels_sum_over_the_filter(tiny, images):
    model = tiny()
    for variant in ("signed", "weighted", "absolute"):
        weights, channels = (
            gap(model, images, granularity=granularity, variant=variant, steps=2, generator=generator(0)).values
            for granularity in ("weight", "channel")
        )
        assert torch.allclose(channels["bn2"], weights["conv2.weight"].flatten(1).sum(dim=1), atol=1e-6)


def lenet() -> Classifier:
    kwargs = {"width": 3, "classes": 3, "in_channels": 1, "input_size": 28}
    with seeded(generator(1)):
        net = build("lenet5", **kwargs)
    arch = {"name": "lenet5", "kwargs": kwargs}
    return Classifier(net, classes=("a", "b", "c"), input_shape=(1, 28, 28), arch=arch).eval()


def wide_images() -> ImageSet:
    x = torch.randint(0, 256, (48, 1, 28, 28), generator=generator(0), dtype=torch.uint8)
    return ImageSet(x, torch.arange(48) % 3, ("a", "b", "c"))


def test_biases_are_scored_and_the_classifier_is_not(gen):
    found = gap(lenet(), wide_images(), steps=1, generator=gen).values
    assert list(found) == [f"{layer}.{kind}" for layer in ("conv1", "conv2", "fc1", "fc2") for kind in ("weight", "bias")]


@pytest.mark.parametrize("protocol", ["corrected", "published"])
@pytest.mark.parametrize(("variant", "scope"), [("signed", "global"), ("weighted", "global"), ("absolute", "layer")])
def test_a_mask_scored_applied_tuned_saved_and_loaded_keeps_exactly_its_zeros(tmp_path, protocol, variant, scope):
    model, clean = lenet(), wide_images()
    total = cost(model, clean.shape).parameters
    score = partial(gap, variant=variant, protocol=protocol, steps=2)
    sentence = Sentence(score, Compression(4, total), scope=scope, order="largest")
    repaired = prune(model, clean, sentence, heal=RECIPE, generator=generator(0))
    wanted = select(
        score(model, clean, granularity="weight", generator=generator(0)), sentence.amount, order="largest", scope=scope
    )
    assert all(torch.equal(repaired.mask.keep[name], keep) for name, keep in wanted.keep.items())
    assert any(name.endswith(".bias") and not bool(keep.all()) for name, keep in wanted.keep.items())
    assert repaired.log["removed"] == total - round(total / 4)
    save(repaired.model, tmp_path / "b", masks=repaired.mask)
    loaded, mask = load_bundle(tmp_path / "b"), load_masks(tmp_path / "b")
    assert isinstance(mask, WeightMask)
    for name, parameter in loaded.net.named_parameters():
        keep = mask.keep.get(name, torch.ones_like(parameter, dtype=torch.bool))
        assert torch.equal(parameter != 0, keep)
        assert not torch.equal(parameter, model.net.get_parameter(name))
    assert cost(loaded, clean.shape).nonzero == round(total / 4)


def test_what_cannot_be_scored_is_refused(tiny, images, gen):
    for settings, match in (
        ({"variant": "sign"}, "unknown variant 'sign'; did you mean 'signed'"),
        ({"protocol": "correct"}, "unknown protocol 'correct'; did you mean 'corrected'"),
        ({"granularity": "weights"}, "unknown granularity"),
        ({"eps": 8.0}, r"eps must lie in \[0, 1\], got 8"),
        ({"steps": 0}, "steps must lie in"),
        ({"step_size": -1.0}, "step_size must lie in"),
        ({"batch_size": 0}, "batch_size must lie in"),
    ):
        with pytest.raises(MethodError, match=match):
            gap(tiny(), images, generator=gen, **settings)
    with pytest.raises(DataError, match="at least one image"):
        gap(tiny(), images.subset(torch.arange(0)), generator=gen)
    with pytest.raises(MethodError, match="before the classifier; this network has none"):
        gap(nn.Sequential(nn.Flatten(), nn.Linear(144, 3)), images, generator=gen)
    net = nn.Sequential(nn.Flatten(), nn.Linear(144, 5), nn.BatchNorm1d(5), nn.Linear(5, 3))
    with pytest.raises(ModelError, match=r"train mode on a batch of 1: .*; raise batch_size"):
        gap(net, images, protocol="published", batch_size=1, generator=gen)
