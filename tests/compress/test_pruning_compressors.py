"""Compressors by weights: what was asked is what is left, zeros stay through fine-tuning, rounding, saving and loading."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch

from secateur.compress.pruning import SCORES, gap, pruning, quantisation
from secateur.errors import MethodError
from secateur.methods import table
from secateur.models import core, load_bundle, quantisation_of, save
from secateur.prune import Compression, prunable_layers, select
from secateur.prune.gap import gap as gap_scores
from secateur.prune.mask import hard
from secateur.prune.mask import zeros as before
from secateur.state import generator


def parameters_of(model):
    return dict(core(model).named_parameters())


def zeros(done):
    """Return how many parameters the mask cuts, and how many of those are 0."""
    keep, own = hard(done.mask).keep, parameters_of(done.model)
    return sum(int((~k).sum()) for k in keep.values()), sum(int((own[n][~k] == 0).sum()) for n, k in keep.items())


@pytest.mark.parametrize("target", [2.0, 4.0])
@pytest.mark.parametrize("scope", ["global", "layer"])
def test_whole_model_compression_is_what_was_asked(trained, images, target, scope):
    done = pruning(trained, images, target=target, scope=scope, epochs=1, lr=0.01, generator=generator(0))
    total = sum(parameter.numel() for parameter in parameters_of(trained).values())
    cut, silent = zeros(done)
    assert cut == silent
    assert abs(total / (total - cut) / target - 1) < 1e-3 + 1 / total
    assert done.log["compression"] == total / (total - cut)
    assert f"{prunable_layers(trained)[-1]}.weight" not in hard(done.mask).keep


def test_gap_cuts_what_has_the_largest_score(trained, images):
    """This network's layers before the classifier have no bias, so that GAP's parameters are weights."""
    random = generator(0)
    seen = images.subset(torch.randperm(len(images), generator=random)[:1024])
    scores = gap_scores(trained, seen, generator=random)
    total = sum(parameter.numel() for parameter in parameters_of(trained).values())
    masks = {order: select(scores, Compression(2.0, total), order=order, scope="global") for order in ("largest", "smallest")}
    done = gap(trained, images, target=2.0, epochs=0, generator=generator(0))
    assert masks["largest"].keep.keys() == done.mask.keep.keys()
    assert all(torch.equal(done.mask.keep[name], keep) for name, keep in masks["largest"].keep.items())
    assert not all(torch.equal(done.mask.keep[name], keep) for name, keep in masks["smallest"].keep.items())


def test_zeros_stay_through_rounding_saving_and_loading(trained, images, tmp_path):
    done = pruning(trained, images, target=4.0, epochs=1, bits=8, generator=generator(0))
    cut, silent = zeros(done)
    assert cut == silent > 0
    assert quantisation_of(done.model).weight_bits == 8
    save(done.model, tmp_path / "net", masks=hard(done.mask))
    again = load_bundle(tmp_path / "net")
    assert quantisation_of(again) is not None
    keep, own = hard(done.mask).keep, parameters_of(again)
    assert all(bool((own[name][~k] == 0).all()) for name, k in keep.items())
    x = torch.rand(4, *images.shape)
    assert torch.equal(again(x), done.model(x))


def test_a_network_can_be_rounded_with_and_without_training(trained, images):
    rounded = quantisation(trained, images, bits=4, generator=generator(0)).model
    taught = quantisation(trained, images, bits=4, epochs=1, lr=1e-4, generator=generator(0)).model
    for model in (rounded, taught):
        assert quantisation_of(model).activation_bits == 4
    weight = prunable_layers(trained)[0] + ".weight"
    assert not torch.equal(parameters_of(rounded)[weight], parameters_of(taught)[weight])
    assert len(parameters_of(rounded)[weight][0].unique()) <= 15


def test_a_quantised_network_is_refused_at_once(trained, images):
    rounded = quantisation(trained, images, generator=generator(0)).model
    with pytest.raises(MethodError, match=r"quantised already"):
        pruning(rounded, images, bits=8, generator=generator(0))


@pytest.fixture(scope="module")
def sparse(trained, images):
    """The trained network, a quarter of its parameters left."""
    return pruning(trained, images, target=4.0, epochs=1, score="random", generator=generator(0))


def gone(done, sparse):
    """Return whether all that a first compression cut is still 0."""
    own = parameters_of(done.model)
    return all(bool((own[name][~keep] == 0).all()) for name, keep in sparse.mask.keep.items())


@pytest.mark.parametrize("settings", [{}, {"score": "random"}, {"scope": "layer"}, {"rounds": 2}, {"bits": 8}])
def test_what_was_cut_before_stays_cut_and_counts(sparse, images, settings):
    done = pruning(sparse.model, images, target=8.0, epochs=1, lr=0.05, **settings, generator=generator(1))
    assert gone(done, sparse)
    cut, silent = zeros(done)
    assert cut == silent
    total = sum(parameter.numel() for parameter in parameters_of(sparse.model).values())
    assert done.log["compression"] == pytest.approx(8, rel=1e-3 + 1 / total)
    kept = done.mask.keep
    assert all(not bool((kept[name] & ~keep).any()) for name, keep in sparse.mask.keep.items())


@pytest.mark.parametrize("scope", ["global", "layer"])
def test_zeros_that_no_score_ranks_count_and_a_layer_with_more_than_its_share_keeps_them(trained, images, scope):
    model = deepcopy(trained)
    with torch.no_grad():
        for weight, part in ((core(model).linear.weight, 0.5), (core(model).conv1.weight, 0.95)):
            weight.view(-1)[: int(part * weight.numel())] = 0
    total, cut_before = sum(p.numel() for p in parameters_of(model).values()), before(model)
    done = pruning(model, images, target=2.0, scope=scope, epochs=1, generator=generator(0))
    assert cut_before.keep["linear.weight"].sum() < done.mask.keep["linear.weight"].numel()
    assert zeros(done) == (total - round(total / 2),) * 2
    assert torch.equal(done.mask.keep["linear.weight"], cut_before.keep["linear.weight"])
    assert torch.equal(done.mask.keep["conv1.weight"], cut_before.keep["conv1.weight"]) == (scope == "layer")


def test_a_few_stray_zeros_forbid_nothing(trained, images):
    model = deepcopy(trained)
    with torch.no_grad():
        core(model).conv1.weight.view(-1)[0] = 0
    done = pruning(model, images, target=1.0, bits=8, epochs=0, generator=generator(0))
    assert quantisation_of(done.model) is not None
    assert zeros(done) == (1, 1)


def test_gap_too_leaves_zeros_alone(sparse, images):
    done = gap(sparse.model, images, target=8.0, epochs=1, lr=0.05, generator=generator(1))
    assert gone(done, sparse)
    assert done.log["compression"] == pytest.approx(8, rel=0.01)


def test_training_while_rounding_leaves_zeros_alone(sparse, images):
    done = quantisation(sparse.model, images, epochs=3, lr=0.02, generator=generator(1))
    assert gone(done, sparse)
    assert not torch.equal(core(done.model).conv1.weight, core(sparse.model).conv1.weight)


def test_a_target_that_the_network_has_already_is_refused(sparse, images):
    with pytest.raises(MethodError, match=r"target must be above 3\.999, which the network has already, got 2"):
        pruning(sparse.model, images, target=2.0, generator=generator(0))


def test_every_score_of_weights_can_be_named():
    assert set(SCORES) == {row.name for row in table("score")} - {"gap", "hydra"}  # these have compressors of their own


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"score": "l3"}, r"unknown score 'l3'"),
        ({"bits": 16}, r"bits must lie in \[2, 8\], or be 32 for floating point, got 16"),
        ({"target": 0.5}, r"target compression must lie in"),
        ({"target": 1e6}, r"target compression must lie in"),
    ],
)
def test_mistakes_are_told(trained, images, settings, said):
    with pytest.raises(MethodError, match=said):
        pruning(trained, images, **{"epochs": 0, **settings}, generator=generator(0))
