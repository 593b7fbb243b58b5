"""Redraw: chance where it says so, size elsewhere, and exactly as much as asked for."""

from __future__ import annotations

import math
from copy import deepcopy

import pytest
import torch

from secateur.compress.redraw import redraw
from secateur.errors import MethodError
from secateur.models import core
from secateur.prune import choose_layers, prunable_layers
from secateur.prune.mask import compression, zeros
from secateur.state import generator


def kept(model, images, seed=0, **settings):
    """Return which weights stay, by layer."""
    done = redraw(model, images, epochs=0, generator=generator(seed), **settings)
    return {name.removesuffix(".weight"): keep for name, keep in done.mask.keep.items()}


def test_early_layers_keep_a_random_share_and_the_others_their_largest(trained, images):
    weights = {name: weight.detach() for name, weight in core(trained).named_parameters()}
    early, body = choose_layers(trained, "early"), prunable_layers(trained)[:-1]
    first, second = kept(trained, images, target=2.0), kept(trained, images, 1, target=2.0)
    for layer in early:
        size = weights[f"{layer}.weight"].numel()
        assert int((~first[layer]).sum()) == math.floor(0.9 * size)
        assert not torch.equal(first[layer], second[layer])
    later = [layer for layer in body if layer not in early]
    cut = torch.cat([weights[f"{layer}.weight"][~first[layer]].abs() for layer in later])
    stay = torch.cat([weights[f"{layer}.weight"][first[layer]].abs() for layer in later])
    assert len(cut) > 0
    assert float(cut.max()) <= float(stay.min())
    assert all(torch.equal(first[layer], second[layer]) for layer in later)


@pytest.mark.parametrize("target", [2.0, 8.0])
def test_compression_is_what_was_asked(trained, images, target):
    done = redraw(trained, images, target=target, epochs=1, generator=generator(0))
    total = sum(parameter.numel() for parameter in core(trained).parameters())
    own = dict(core(done.model).named_parameters())
    cut = sum(int((~keep).sum()) for keep in done.mask.keep.values())
    assert total - cut == round(total / target)
    assert all(bool((own[name][~keep] == 0).all()) for name, keep in done.mask.keep.items())


def test_weights_cut_before_are_among_those_drawn(trained, images):
    model, [layer, *_] = deepcopy(trained), prunable_layers(trained)
    weight = dict(core(model).named_parameters())[f"{layer}.weight"]
    other = prunable_layers(model)[1]
    with torch.no_grad():
        weight.view(-1)[: weight.numel() // 2] = 0
        dict(core(model).named_parameters())[f"{other}.weight"].view(-1)[::4] = 0
    masks = kept(model, images, target=2.5, layers=layer, share=0.75)
    assert int((~masks[layer]).sum()) == math.floor(0.75 * weight.numel())
    assert not bool(masks[layer].flatten()[: weight.numel() // 2].any())
    with pytest.raises(MethodError, match=r"is [\d,]+ weights and [\d,]+ weights of others were cut before, and target="):
        kept(model, images, target=compression(model, zeros(model)) + 1e-3, layers=layer, share=0.75)


def test_layers_can_be_named(trained, images):
    layer = prunable_layers(trained)[0]
    masks = kept(trained, images, target=2.0, layers=layer, share=0.5)
    assert int(masks[layer].sum()) == math.ceil(masks[layer].numel() / 2)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"share": 1.0}, r"share must lie in"),
        ({"target": 0.5}, r"target must lie in"),
        ({"target": 1.001}, r"share=0\.9 of the layers drawn anew is [\d,]+ weights, and target=1\.001 cuts [\d,]+ in all"),
        ({"layers": "last-layer"}, r"layers='last-layer' are none before the classifier"),
        ({"layers": "first"}, r"unknown layer 'first'"),
        ({"target": 1e6}, r"target compression must lie in"),
    ],
)
def test_mistakes_are_told(trained, images, settings, said):
    with pytest.raises(MethodError, match=said):
        redraw(trained, images, epochs=0, generator=generator(0), **settings)
