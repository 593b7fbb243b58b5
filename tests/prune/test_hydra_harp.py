"""HYDRA and HARP: exactly the number asked for is cut, weights stand still, the loss falls, the budget is met."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from secateur.adversarial_training import Watch
from secateur.errors import MethodError
from secateur.models import build
from secateur.prune import Fraction, apply_mask, magnitude, removed, select
from secateur.prune.harp import Pressure, Rated, harp, share_out
from secateur.prune.hydra import Subnet, hydra, hydra_pruning
from secateur.prune.learned import largest, learn_scores, robust_recipe
from secateur.state import generator
from secateur.types import ImageSet

CLEAN = {"eps": 0.0, "batch_size": 40}
FEW = {"eps": 0.05, "steps": 2, "batch_size": 120}


def clean_recipe(epochs: int, lr: float = 0.1):
    return robust_recipe(
        adversarial="pgd", eps=0.0, norm="linf", steps=1, beta=6.0, epochs=epochs, lr=lr, weight_decay=0.0, batch_size=40
    )  # fmt: skip


def layer_sizes(model) -> dict[str, int]:
    names = (f"{layer}.weight" for layer in ("conv1", "conv2", "conv3", "conv4", "linear"))
    return {name: model.net.get_parameter(name).numel() for name in names}


def flat(scores) -> Tensor:
    return torch.cat([values.flatten() for values in scores.values.values()])


# --- what both share ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("values", [torch.rand(50, generator=generator(0)), torch.zeros(50), torch.arange(50) // 7 * 1.0])
@pytest.mark.parametrize("cut", [0, 1, 20, 49, 50])
def test_the_largest_stay_and_the_first_of_equals_go(values, cut):
    order = sorted(range(50), key=lambda i: (float(values[i]), i))
    keep = largest(values.reshape(5, 10), cut)
    assert keep.shape == (5, 10)
    assert [i for i, kept in enumerate(keep.flatten().tolist()) if not kept] == sorted(order[:cut])


@pytest.mark.parametrize("granularity", ["weight", "channel"])
def test_nothing_cut_is_the_network_itself(tiny, images, granularity):
    model = tiny()
    x = torch.rand(4, 1, 12, 12, generator=generator(0))
    masked = Subnet(model, images.shape, granularity, 0.0, "layer").eval()
    assert torch.equal(masked(x), model(x))
    assert len(list(masked.parameters())) == len(masked.names) == (5 if granularity == "weight" else 4)


@pytest.mark.parametrize("granularity", ["weight", "channel"])
def test_the_masked_network_is_the_pruned_one(tiny, images, granularity):
    from secateur.prune import apply_mask

    model = tiny()
    x = torch.rand(4, 1, 12, 12, generator=generator(0))
    masked = Subnet(model, images.shape, granularity, 0.5, "layer").eval()
    scores = hydra(model, images, granularity=granularity, fraction=0.5, epochs=0, generator=generator(0))
    pruned = apply_mask(model, select(scores, Fraction(0.5)))
    assert torch.allclose(masked(x), pruned(x), atol=1e-6)
    assert not torch.allclose(masked(x), model(x), atol=1e-2)


def test_a_score_gets_the_gradient_of_its_mask_entry(tiny, images):
    """dL/ds = dL/dm * sign(s), for the weights that are cut as well."""
    model = tiny()
    masked = Subnet(model, images.shape, "weight", 0.5, "layer").eval()
    x = torch.rand(8, 1, 12, 12, generator=generator(0))
    masked(x).logsumexp(dim=1).sum().backward()
    masks = [mask.detach().requires_grad_() for mask in masked.masks()]
    twin = Subnet(model, images.shape, "weight", 0.5, "layer").eval()
    twin.masks = lambda: masks
    twin(x).logsumexp(dim=1).sum().backward()
    for score, mask in zip(masked.scores, masks, strict=True):
        assert torch.allclose(score.grad, mask.grad * score.detach().sign(), atol=1e-5)
        assert bool((score.grad[mask.detach() == 0] != 0).any())


def test_weights_stand_still_while_scores_move(tiny, images):
    model = tiny()
    start = Subnet(model, images.shape, "weight", 0.5, "layer")
    trained = learn_scores(start, images, clean_recipe(1), generator=generator(0))
    parameters = {name for name, _ in model.named_parameters()}
    before, after = model.state_dict(), dict(trained.network.named_buffers())
    assert all(torch.equal(after[name], before[name]) for name in parameters)
    assert not torch.equal(after["net.bn1.running_mean"], before["net.bn1.running_mean"])
    assert all(not torch.equal(a, b) for a, b in zip(start.scores, trained.scores, strict=True))


# --- HYDRA --------------------------------------------------------------------------------------------------------------------


def test_scores_start_in_proportion_to_weights(tiny, images):
    model = tiny()
    scores = hydra(model, images, epochs=0, generator=generator(0))
    for name, values in scores.values.items():
        weight = model.net.get_parameter(name).detach()
        wanted = math.sqrt(6 / weight[0].numel()) * weight.abs() / weight.abs().max()
        assert torch.allclose(values, wanted, atol=1e-6)


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_exactly_the_number_asked_for_is_cut_and_is_that_of_training(tiny, images, scope):
    model = tiny()
    start = Subnet(model, images.shape, "weight", 0.77, scope)
    trained = learn_scores(start, images, clean_recipe(1), generator=generator(0))
    scores = hydra(
        model, images, fraction=0.77, scope=scope, eps=0.0, epochs=1, weight_decay=0.0, batch_size=40, generator=generator(0)
    )  # fmt: skip
    mask = select(scores, Fraction(0.77), scope=scope)
    for keep, wanted in zip(mask.keep.values(), trained.masks(), strict=True):
        assert torch.equal(keep.float(), wanted.detach())
    sizes = layer_sizes(model)
    if scope == "layer":
        assert removed(mask) == {name: int(0.77 * size) for name, size in sizes.items()}
    else:
        assert sum(removed(mask).values()) == int(0.77 * sum(sizes.values()))
        assert removed(mask) != {name: int(0.77 * size) for name, size in sizes.items()}


def test_learning_lowers_the_loss_below_that_of_magnitudes(trained, images):
    losses = []
    start = Subnet(trained, images.shape, "weight", 0.9, "layer")
    given = {"on_epoch": lambda epoch, loss, model: losses.append(loss), "generator": generator(0)}
    learned = learn_scores(start, images, clean_recipe(6), **given)
    assert losses[-1] < 0.6 * losses[0]
    x, y = next(images.batches(240))
    with torch.no_grad():
        rates = [float((network.eval()(x).argmax(dim=1) == y).float().mean()) for network in (start, learned)]
    assert rates[1] > rates[0] + 0.1


def test_the_budget_of_the_attack_is_in_force(trained, images):
    clean, robust = (
        hydra(trained, images, epochs=1, eps=eps, steps=2, batch_size=120, generator=generator(0)) for eps in (0.0, 0.1)
    )
    assert not torch.equal(flat(clean), flat(robust))


@pytest.mark.parametrize("granularity", ["weight", "channel"])
def test_hydra_pruning_holds_its_mask_and_reports_it(trained, images, granularity):
    settings = {"fraction": 0.5, "score_epochs": 1, "epochs": 1, **FEW, "adversarial": "pgd", "granularity": granularity}
    done = hydra_pruning(trained, images, **settings, generator=generator(0))
    shares = [int((~keep).sum()) / keep.numel() for keep in done.mask.keep.values()]
    assert all(share == 0.5 or granularity == "weight" for share in shares)
    assert sum(removed(done.mask).values()) == done.log["removed"]
    if granularity == "weight":
        for name, keep in done.mask.keep.items():
            assert int((done.model.net.get_parameter(name) == 0).sum()) == int((~keep).sum()) == int(0.5 * keep.numel())


def test_statistics_are_those_of_the_masked_network(trained, images):
    start = Subnet(trained, images.shape, "weight", 0.5, "layer")
    recipe = robust_recipe(
        adversarial="trades", eps=0.0, norm="linf", steps=1, beta=6.0, epochs=1, lr=0.1, weight_decay=1e-4, batch_size=40
    )  # fmt: skip
    learned = learn_scores(start, images, recipe, generator=generator(0))
    done = hydra_pruning(trained, images, fraction=0.5, score_epochs=1, epochs=0, steps=1, **CLEAN, generator=generator(0))
    assert torch.equal(done.model.net.bn2.running_mean, learned.network.net.bn2.running_mean)
    assert not torch.equal(done.model.net.bn2.running_mean, trained.net.bn2.running_mean)


def test_networks_with_residual_streams_have_channels(gen):
    net = build("resnet20", width=2, classes=3)
    data = ImageSet(torch.randint(0, 256, (6, 3, 32, 32), generator=gen).to(torch.uint8), torch.arange(6) % 3, ("a", "b", "c"))
    scores = hydra(net, data, granularity="channel", epochs=1, eps=0.0, generator=gen)
    assert set(scores.values) <= {name for name, module in net.named_modules() if isinstance(module, nn.BatchNorm2d)}
    assert all(bool(values.isfinite().all()) for values in scores.values.values())


@pytest.mark.parametrize(("given", "message"), [
    ({"fraction": 1.5}, r"fraction must lie in \[0, 1\], got 1.5"),
    ({"scope": "all"}, "unknown scope 'all'"),
    ({"adversarial": "pdg"}, "unknown adversarial 'pdg'; did you mean 'pgd'"),
    ({"granularity": "filter"}, "unknown granularity 'filter'"),
    ({"adversarial": "pgd", "beta": 1.0}, "beta has no effect with adversarial=pgd"),
])  # fmt: skip
def test_settings_of_hydra_out_of_range(tiny, images, gen, given, message):
    with pytest.raises(MethodError, match=message):
        hydra(tiny(), images, **given, generator=gen)


# --- HARP ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fraction", [0.0, 0.5, 0.9, 0.99])
def test_the_budget_is_met_to_the_weight(trained, images, fraction):
    done = harp(trained, images, fraction=fraction, score_epochs=1, epochs=0, **CLEAN, generator=generator(0))
    sizes = layer_sizes(trained)
    total = sum(sizes.values())
    cut = sum(removed(done.mask).values())
    assert cut == int(fraction * total)
    assert abs(cut / total - fraction) < 1e-3
    kept = {name: done.log[f"kept/{name}"] for name in sizes}
    assert kept == {name: float(keep.sum()) for name, keep in done.mask.keep.items()}
    assert min(kept.values()) >= 1


def test_layers_keep_different_shares_once_learned(trained, images):
    done = harp(
        trained, images, fraction=0.9, score_epochs=4, epochs=1, gamma=1.0, lr=0.01, **CLEAN, generator=generator(0)
    )  # fmt: skip
    shares = [float(keep.float().mean()) for keep in done.mask.keep.values()]
    assert max(shares) > 2 * min(shares)
    for name, keep in done.mask.keep.items():
        assert bool((done.model.net.get_parameter(name)[~keep] == 0).all())
    assert min(shares) >= 0.009


def test_a_layers_rate_gets_the_sum_of_the_gradients_of_its_mask(tiny, images):
    rated = Rated(tiny(), images.shape, 0.3, 0.1, 0.3).eval()
    masks = rated.masks()
    for mask in masks:
        mask.retain_grad()
    weights = [torch.randn(mask.shape, generator=generator(i)) for i, mask in enumerate(masks)]
    sum((mask * weight).sum() for mask, weight in zip(masks, weights, strict=True)).backward()
    slope = torch.sigmoid(rated.rates.detach()) * (1 - torch.sigmoid(rated.rates.detach())) * (1 - 0.03)
    assert torch.allclose(rated.rates.grad, slope * torch.stack([weight.sum() for weight in weights]), rtol=1e-4)
    assert torch.allclose(rated.scores[1].grad, weights[1] * rated.scores[1].detach().sign())


def test_shares_start_where_they_are_told_and_have_a_floor(tiny, images):
    rated = Rated(tiny(), images.shape, 0.01, 0.1, 0.1)
    assert torch.allclose(rated.shares(), torch.full((5,), 0.1), atol=1e-6)
    assert torch.allclose(rated.shares(-60.0), torch.full((5,), 0.001), atol=1e-6)
    assert float(rated.kept().detach()) == pytest.approx(0.1, abs=1e-6)
    assert float(rated.excess().detach()) == pytest.approx(9, rel=1e-5)
    assert float(Rated(tiny(), images.shape, 0.5, 0.1, 0.2).excess().detach()) == 0


def test_the_penalty_grows_until_the_budget_is_met(tiny, images):
    above, within = (Rated(tiny(), images.shape, target, 0.1, 0.3) for target in (0.1, 0.4))
    pressure, seen = Pressure(0.5), []
    for epoch, network in enumerate((above, above, within, above, above), 1):
        seen.append(pressure.weight)
        assert float(pressure(network, torch.zeros(1), torch.zeros(1)).detach()) == pytest.approx(
            pressure.weight * float(network.excess().detach())
        )
        pressure.after(epoch, 0.0, network)
    assert seen == [0.5, 1.0, 1.5, 1.5, 1.5]


def test_the_penalty_pulls_the_shares_to_the_budget(trained, images):
    given = {"fraction": 0.95, "score_epochs": 5, "epochs": 0, **CLEAN}
    free, pulled = (harp(trained, images, gamma=gamma, **given, generator=generator(0)) for gamma in (0.0, 5.0))
    assert pulled.log["learned_share"] < 0.06 < free.log["learned_share"]
    assert any("they were lowered together" in note for note in free.notes)


def test_shares_out_by_largest_remainders():
    assert share_out([10, 10, 10], [0.25, 0.34, 0.11], 7) == [3, 3, 1]
    assert share_out([1, 100], [0.01, 0.05], 6) == [1, 5]
    assert share_out([4, 4], [1.0, 1.0], 5) == [2, 3]
    assert share_out([2, 50], [0.9, 0.9], 52) == [2, 50]


@pytest.mark.parametrize(("given", "message"), [
    ({"fraction": 1.0}, r"fraction must lie in \[0, 0.999999999\], got 1"),
    ({"minimum": 1.5}, r"minimum must lie in \[0, 1\], got 1.5"),
    ({"initial": 0.0}, r"initial must lie in \[1e-09, 1\], got 0"),
    ({"gamma": -1.0}, r"gamma must lie in .*, got -1"),
    ({"fraction": 0.9999}, "fraction leaves 1 weights for 5 layers; each needs one: lower it to at most 0.99"),
])  # fmt: skip
def test_settings_of_harp_out_of_range(tiny, images, gen, given, message):
    with pytest.raises(MethodError, match=message):
        harp(tiny(), images, **given, generator=gen)


def test_everything_may_be_kept(tiny, images):
    done = harp(tiny(), images, fraction=0.0, minimum=1.0, score_epochs=1, epochs=0, **CLEAN, generator=generator(0))
    assert sum(removed(done.mask).values()) == 0


@pytest.mark.parametrize("method", [hydra_pruning, harp])
def test_catastrophic_overfitting_is_told(tiny, images, monkeypatch, method):
    """Of the scores and of the fine-tuning: both end with the epoch before."""
    monkeypatch.setattr(Watch, "fallen", lambda *_: "overfitted")
    done = method(tiny(), images, score_epochs=2, epochs=2, adversarial="fast", batch_size=60, generator=generator(0))
    assert [note for note in done.notes if "overfitted" in note] == [
        "overfitted in epoch 1: training ended with the weights of the epoch before"
    ] * 2


@pytest.mark.parametrize("method", [hydra_pruning, harp])
def test_what_was_cut_before_stays_cut(trained, images, method):
    cut = apply_mask(
        trained, select(magnitude.random(trained, images, granularity="weight", generator=generator(0)), Fraction(0.5))
    )
    done = method(cut, images, fraction=0.3, score_epochs=1, epochs=1, lr=0.05, **CLEAN, generator=generator(0))
    before, after = dict(cut.named_parameters()), dict(done.model.named_parameters())
    gone = {name: value == 0 for name, value in before.items()}
    assert sum(int(where.sum()) for where in gone.values()) > 1000
    assert all(bool((after[name][where] == 0).all()) for name, where in gone.items())
