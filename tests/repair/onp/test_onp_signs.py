"""What a mask is judged by, and slopes that say what each neuron has to do with it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from conftest import make_images
from secateur.errors import DataError, MethodError
from secateur.measure import evaluate, predict
from secateur.models import core
from secateur.prune.mask import apply_mask
from secateur.repair.onp import signs
from secateur.repair.onp.features import NAMES, OWN, SLOPES, ablations, features
from secateur.repair.onp.layers import layers
from secateur.state import generator
from secateur.types import ChannelMask, to_float

NOTHING = ChannelMask({})


def cut(model, site, *channels):
    keep = torch.ones(len(core(model).get_submodule(site).weight), dtype=torch.bool)
    keep[list(channels)] = False
    return ChannelMask({site: keep})


def sites(model):
    return [site for layer in layers(model, (1, 12, 12)) for site in layer.sites]


def test_clean_errors_are_what_accuracy_leaves(victim):
    sign, images = signs.clean_errors(victim.model, victim.test), victim.test
    for mask in (NOTHING, cut(victim.model, sites(victim.model)[0], 0, 1)):
        expected = evaluate(apply_mask(victim.model, mask), images).accuracy.value
        assert sign(mask) == pytest.approx(1 - expected)


def test_images_of_other_classes_are_dealt_out_to_the_triggers(victim):
    other = replace(victim.trigger, target=1)
    sign = signs.triggered(victim.model, victim.test, [victim.trigger, other])
    parts = [victim.test.subset(victim.test.y != target) for target in (0, 1)]
    hits = []
    for number, (part, trigger) in enumerate(zip(parts, (victim.trigger, other), strict=True)):
        shown = part.subset(torch.arange(number, len(part), 2))
        hits.append((predict(victim.model, shown, trigger=trigger) == trigger.target).double())
    assert sign(NOTHING) == pytest.approx(float(torch.cat(hits).mean()), abs=0.02)  # pixels are rounded
    assert sign.hits.tolist() == [0] * len(hits[0]) + [1] * len(hits[1])
    with pytest.raises(MethodError, match="at least one trigger"):
        signs.triggered(victim.model, victim.test, [])


@pytest.mark.parametrize("make", [signs.noisy, signs.unlearned])
def test_copies_are_asked_about_the_class_that_they_favour(make, victim):
    images = make_images(90, 9)
    sign = make(victim.model, images, generator=generator(0))
    [favourite] = set(sign.hits.tolist())
    assert not (sign.images.y == favourite).any()
    answers = predict(sign.base, images)
    wrong = answers[answers != images.y]
    assert favourite == int(wrong.bincount(minlength=3).argmax())
    assert sign(NOTHING) == pytest.approx(float((predict(sign.base, sign.images) == favourite).double().mean()))
    assert sign(NOTHING) > 0.2
    again = make(victim.model, images, generator=generator(0))
    assert again(NOTHING) == sign(NOTHING)


def test_an_unlearned_copy_names_the_target(victim):
    sign = signs.unlearned(victim.model, make_images(90, 9), generator=generator(0))
    assert set(sign.hits.tolist()) == {0}


def test_statistics_are_those_of_the_images_and_momentum_stays(victim):
    from copy import deepcopy

    images, copy = make_images(50, 9), deepcopy(victim.model)
    norm = next(module for module in copy.modules() if isinstance(module, torch.nn.BatchNorm2d))
    momentum, seen = norm.momentum, []
    signs.settled(copy, images)
    handle = norm.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    with torch.no_grad():
        copy(to_float(images.x))
    handle.remove()
    torch.testing.assert_close(norm.running_mean, seen[0].mean((0, 2, 3)), rtol=1e-4, atol=1e-5)
    assert norm.momentum == momentum
    assert not any(module.training for module in copy.modules())


def test_slopes_are_those_of_the_loss(victim):
    """Against a difference: scale one neuron's weight a little."""
    images = make_images(40, 9)
    sign = signs.clean_errors(victim.model, images)
    for site in sites(victim.model):
        losses = []
        for factor in (1.005, 0.995):
            scaled = apply_mask(victim.model, NOTHING).double()
            with torch.no_grad():
                core(scaled).get_submodule(site).weight[1] *= factor
                losses.append(float(F.cross_entropy(scaled(to_float(images.x).double()), images.y)))
        assert float(sign.slopes[site][1]) == pytest.approx((losses[0] - losses[1]) / 0.01, rel=0.05, abs=1e-4)


def test_features_have_a_column_per_name_in_standard_deviations(victim):
    images = make_images(60, 9)
    found = layers(victim.model, images.shape)
    given = [signs.clean_errors(victim.model, images), signs.triggered(victim.model, images, [victim.trigger])]
    nodes = features(victim.model, images, found, given, {})
    assert [each.shape for each in nodes] == [(layer.size, len(NAMES)) for layer in found]
    for each in nodes:
        assert bool(each.isfinite().all())
        own = each[:, : len(OWN) + len(SLOPES)]
        assert float(own.abs().max()) <= 5
        torch.testing.assert_close(own.mean(0), torch.zeros(own.shape[1]), atol=1e-5, rtol=0)
    columns = dict(zip(NAMES, torch.cat(nodes).T, strict=True))
    assert float(columns["noise in its layer"].abs().max()) == 0  # that sign was not given
    assert float(columns["trigger in the network"].abs().max()) > 0
    assert columns["depth"].tolist() == sorted(columns["depth"].tolist())


def test_what_happens_without_each_neuron_is_told(victim):
    images = make_images(60, 9)
    found = layers(victim.model, images.shape)
    error, sign = signs.clean_errors(victim.model, images), signs.triggered(victim.model, images, [victim.trigger])
    ablated = {each.name: ablations(each, found, "weight+bias") for each in (error, sign)}
    assert [len(rises) for rises in ablated["error"]] == [layer.size for layer in found]
    number, channel = len(found) - 1, 1
    mask = cut(victim.model, found[number].sites[0], channel)
    assert float(ablated["trigger"][number][channel]) == pytest.approx(sign(mask) - sign(NOTHING))
    columns = torch.cat(features(victim.model, images, found, [error, sign], ablated))
    trigger, both = (columns[:, NAMES.index(f"{name} without it")] for name in ("trigger", "signs"))
    expected = (torch.cat(ablated["trigger"]) / 0.1).clamp(-5, 5).float()
    torch.testing.assert_close(trigger, expected)
    torch.testing.assert_close(both, expected)  # the mean of one; the error is no sign
    assert float(columns[:, NAMES.index("noise without it")].abs().max()) == 0
    torch.testing.assert_close(
        columns[:, NAMES.index("error without it")], (torch.cat(ablated["error"]) * 100).clamp(-5, 5).float()
    )


def test_a_sign_counts_what_it_computed(victim):
    sign = signs.clean_errors(victim.model, make_images(40, 9))
    mask = cut(victim.model, sites(victim.model)[-1], 0)
    sign(mask)
    once = sign.forwards
    sign(mask)
    assert sign.forwards == once > 0


def test_a_sign_without_images_is_refused(victim):
    clean = make_images(30, 9)
    with pytest.raises(DataError, match="no image is left"):
        signs.triggered(victim.model, clean.subset(clean.y == 0), [victim.trigger])
