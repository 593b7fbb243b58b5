"""The sentence as a whole: cutting until a drop, healing with the mask held, and the edits that are not masks."""

from __future__ import annotations

import inspect
import math
from itertools import pairwise

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from secateur import methods
from secateur.errors import InconclusiveError, MethodError
from secateur.prune import Count, Fraction, Sentence, Until, apply_and_heal, apply_mask, cut_until, prune, rank
from secateur.prune.edits import clamp, noise
from secateur.prune.magnitude import l1
from secateur.train import Recipe, train
from secateur.types import ChannelMask, ImageSet, Scores, WeightMask


class Gates(nn.Module):
    """Answers 1 while the gate of the image's one bright pixel is open, else 0."""

    def __init__(self, gates: int) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.ones(gates))

    def forward(self, x: Tensor) -> Tensor:
        bright = (x.flatten(1) * self.gate).sum(dim=1)
        return torch.stack([torch.full_like(bright, 0.5), bright], dim=1)


def gated(right: list[int], wrong: list[int]) -> tuple[Gates, ImageSet]:
    """Closing gate ``j`` loses ``right[j]`` images and gains ``wrong[j]``."""
    pixels, labels = [], []
    for j, (lost, gained) in enumerate(zip(right, wrong, strict=True)):
        pixels += [j] * (lost + gained)
        labels += [1] * lost + [0] * gained
    x = torch.zeros(len(pixels), 1, 1, len(right), dtype=torch.uint8)
    x[torch.arange(len(pixels)), 0, 0, pixels] = 255
    return Gates(len(right)), ImageSet(x, torch.tensor(labels, dtype=torch.int64), ("0", "1"))


def ranking_of(model: Gates):
    return rank(Scores({"gate": torch.arange(len(model.gate)).float()}, "weight"))


def scan(right: list[int], wrong: list[int], drop: float) -> tuple[int, float]:
    """The plain scan: (gates closed before the first crossing, exact one-sided McNemar p of the crossing)."""
    n = sum(right) + sum(wrong)
    for k in range(1, len(right) + 1):
        lost, gained = sum(right[:k]), sum(wrong[:k])
        if (lost - gained) / n > drop + 1e-12:
            trials = lost + gained
            return k - 1, sum(math.comb(trials, i) for i in range(lost, trials + 1)) / 2**trials
    return len(right), 0.0


def closed(mask) -> list[int]:
    return (~mask.keep["gate"]).nonzero().flatten().tolist()


COUNTS = st.lists(st.integers(0, 6), min_size=10, max_size=10)


@settings(max_examples=60, deadline=None)
@given(COUNTS, COUNTS, st.sampled_from([0.0, 0.05, 0.1, 0.3]))
def test_cut_until_is_the_plain_scan(right, wrong, drop):
    assume(sum(right) + sum(wrong) > 0)
    model, clean = gated(right, wrong)
    expected, p = scan(right, wrong, drop)
    assume(abs(p - 0.05) > 1e-9)
    if p > 0.05:
        with pytest.raises(InconclusiveError, match="cannot be resolved"):
            cut_until(model, clean, ranking_of(model), Until(drop, step=0.1))
        return
    path, mask = cut_until(model, clean, ranking_of(model), Until(drop, step=0.1))
    assert closed(mask) == list(range(expected))
    assert [candidate.removed for candidate in path] == list(range(min(expected + 1, 10) + 1))
    for k, candidate in enumerate(path):
        n = len(clean)
        assert candidate.amount == pytest.approx(k / 10)
        assert candidate.holdout.value == pytest.approx((sum(right) - sum(right[:k]) + sum(wrong[:k])) / n)
        assert candidate.holdout.n == n


def test_the_first_crossing_counts_although_accuracy_recovers():
    # Drops of 0, 10 and 4 points, then gains: a search from the far end, or by bisection, would cut all ten gates.
    right, wrong = [0, 10, 0, 0, 0, 0, 0, 0, 0, 25], [0, 0, 6, 30, 0, 0, 0, 4, 0, 25]
    model, clean = gated(right, wrong)
    path, mask = cut_until(model, clean, ranking_of(model), Until(0.05, step=0.1))
    assert closed(mask) == [0]
    assert len(path) == 3
    recovered = cut_until(model, clean, ranking_of(model), Until(0.11, step=0.1))
    assert closed(recovered[1]) == list(range(10))


def test_unresolvable_drop_says_what_to_do_and_ends_in_3():
    model, clean = gated([3, 0, 30, 0, 0, 0, 0, 0, 0, 7], [0] * 10)
    with pytest.raises(InconclusiveError) as caught:
        cut_until(model, clean, ranking_of(model), Until(0.02, step=0.1))
    assert caught.value.exit_code == 3
    assert "a drop of 0.02 cannot be resolved on 40 clean images: 3 lost against 0 gained" in str(caught.value)
    assert "give more images, a larger drop, or a fixed amount" in str(caught.value)


def test_five_lost_and_none_gained_are_enough():
    for lost, enough in ((4, False), (5, True)):  # 2^-4 > 5 % > 2^-5
        model, clean = gated([lost, 35], [0, 0])
        if enough:
            assert closed(cut_until(model, clean, ranking_of(model), Until(0.02, step=0.5))[1]) == []
        else:
            with pytest.raises(InconclusiveError):
                cut_until(model, clean, ranking_of(model), Until(0.02, step=0.5))


def test_nothing_lost_cuts_everything():
    model, clean = gated([0] * 10, [3] * 10)
    assert closed(cut_until(model, clean, ranking_of(model), Until(0.0, step=0.1))[1]) == list(range(10))


@pytest.mark.parametrize("step", [0.0, -0.1, 1.1])
def test_step_out_of_range(step):
    model, clean = gated([5] * 10, [0] * 10)
    with pytest.raises(MethodError, match=r"step must lie in \(0, 1\]"):
        cut_until(model, clean, ranking_of(model), Until(0.1, step=step))


@pytest.mark.parametrize("drop", [-0.1, 1.5, math.nan])
def test_drop_out_of_range(drop):
    model, clean = gated([5] * 10, [0] * 10)
    with pytest.raises(MethodError, match=r"drop must lie in \[0, 1\]"):
        cut_until(model, clean, ranking_of(model), Until(drop, step=0.1))


def test_sentence_with_until_on_a_real_network(trained, images, gen):
    repaired = prune(trained, images, Sentence(l1, Until(0.1), "weight", scope="global"), generator=gen)
    before, after = repaired.path[-2], repaired.path[-1]
    assert after.holdout.value < 0.9 <= before.holdout.value
    assert repaired.log["clean_accuracy_at_cut"] == before.holdout.value
    assert repaired.log["removed"] == before.removed > 0


@pytest.mark.parametrize("granularity", ["weight", "channel"])
@pytest.mark.parametrize("edit", ["weight+bias", "weight"])
def test_fixed_amount_is_exactly_apply_of_select(trained, images, gen, granularity, edit):
    sentence = Sentence(l1, Fraction(0.5), granularity, layers="late", edit=edit)
    repaired = prune(trained, images, sentence, generator=gen)
    names = {"weight": "conv4.weight", "channel": "bn4" if edit == "weight+bias" else "bn4.weight"}
    assert set(repaired.mask.keep) == {names[granularity]}
    assert repaired.log["removed_share"] == 0.5
    wanted = apply_mask(trained, repaired.mask).state_dict()
    silent = (repaired.model.net.bn4.bias == 0).double().mean()
    assert silent == (0.5 if granularity == "channel" and edit == "weight+bias" else 0)
    assert all(torch.equal(value, wanted[name]) for name, value in repaired.model.state_dict().items())
    assert not repaired.model.training


def test_no_healing_and_zero_epochs_are_the_cut(trained, images, gen):
    mask = ChannelMask({"bn4": torch.arange(16) % 2 == 0})
    cut = apply_mask(trained, mask).state_dict()
    for heal in (None, Recipe(epochs=0)):
        healed = apply_and_heal(trained, images, mask, heal=heal, generator=gen).model
        assert all(torch.equal(value, cut[name]) for name, value in healed.state_dict().items())


def test_healing_holds_the_mask_and_moves_the_rest(trained, images, gen):
    sentence = Sentence(l1, Fraction(0.5), "channel", layers="all")
    repaired = prune(trained, images, sentence, heal=Recipe(epochs=1, lr=0.05, batch_size=64), generator=gen)
    for site, keep in repaired.mask.keep.items():
        norm = repaired.model.net.get_submodule(site)
        assert bool((norm.weight[~keep] == 0).all())
        assert bool((norm.bias[~keep] == 0).all())
        assert bool((norm.weight[keep] != trained.net.get_submodule(site).weight[keep]).any())
    assert not repaired.model.training
    assert repaired.log["clean_accuracy_at_cut"] <= 1


def test_healing_holds_single_weights(trained, images, gen):
    sentence = Sentence(l1, Fraction(0.5), "weight")
    repaired = prune(trained, images, sentence, heal=Recipe(epochs=1, lr=0.05, batch_size=64), generator=gen)
    for name, keep in repaired.mask.keep.items():
        assert bool((repaired.model.net.get_parameter(name)[~keep] == 0).all())
        assert bool((repaired.model.net.get_parameter(name)[keep] != 0).any())


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
def test_held_weights_and_their_averages_stay_zero(trained, images, gen, tmp_path, optimizer):
    keep = torch.rand(trained.net.conv3.weight.shape, generator=gen) > 0.5
    cut = apply_mask(trained, WeightMask({"conv3.weight": keep}))
    recipe = Recipe(epochs=2, lr=0.01, optimizer=optimizer, batch_size=64)
    file = tmp_path / "state"
    healed = train(cut, images, recipe, hold={"conv3.weight": keep}, generator=gen, checkpoint=file)
    index = [name for name, _ in healed.named_parameters()].index("net.conv3.weight")
    memory = torch.load(file, weights_only=True)["optimizer"]["state"][index]
    averages = {key: value for key, value in memory.items() if isinstance(value, Tensor) and value.shape == keep.shape}
    assert set(averages) == ({"momentum_buffer"} if optimizer == "sgd" else {"exp_avg", "exp_avg_sq"})
    for value in [healed.net.conv3.weight, *averages.values()]:
        assert bool((value[~keep] == 0).all())
        assert bool((value[keep] != 0).any())


def test_without_hold_cut_weights_grow_back(trained, images, gen):
    keep = torch.rand(trained.net.conv3.weight.shape, generator=gen) > 0.5
    cut = apply_mask(trained, WeightMask({"conv3.weight": keep}))
    healed = train(cut, images, Recipe(epochs=1, lr=0.01, batch_size=64), generator=gen)
    assert bool((healed.net.conv3.weight[~keep] != 0).any())


def test_layer_collapse_is_noted(tiny, images, gen):
    repaired = prune(tiny(), images, Sentence(l1, Count(4), "channel", layers="conv1"), generator=gen)
    assert repaired.notes == ("layer collapse: nothing is left of 'bn1'",)
    assert prune(tiny(), images, Sentence(l1, Count(3), "channel", layers="conv1"), generator=gen).notes == ()


def test_the_model_that_comes_in_is_not_changed(trained, images, gen):
    before = {name: value.clone() for name, value in trained.state_dict().items()}
    state = torch.get_rng_state()
    flags = [module.training for module in trained.modules()]
    prune(trained, images, Sentence(l1, Fraction(0.3), "channel"), heal=Recipe(epochs=1, lr=0.01), generator=gen)
    assert all(torch.equal(value, before[name]) for name, value in trained.state_dict().items())
    assert [module.training for module in trained.modules()] == flags
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in trained.parameters())


FORBIDDEN = {"test", "trigger", "task", "train", "poisoning", "victim"}


@pytest.mark.parametrize("row", [*methods.table("score"), *methods.table("repair")], ids=lambda row: f"{row.kind}-{row.name}")
def test_no_defence_can_be_given_the_test_set_or_the_trigger(row):
    parameters = inspect.signature(row.load()).parameters
    data = [name for name, p in parameters.items() if p.kind is not inspect.Parameter.KEYWORD_ONLY]
    assert data == ["model", "clean"]
    assert ("suspect" in parameters) == ("suspect" in row.needs)
    assert not FORBIDDEN & set(parameters)
    assert not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())


@pytest.mark.parametrize("function", [prune, cut_until, apply_and_heal])
def test_neither_can_the_grammar(function):
    assert not FORBIDDEN & set(inspect.signature(function).parameters)


def test_clamp_by_closed_form(tiny):
    model = tiny()
    clamped = clamp(model, deviations=1.5, names=["conv2.weight"]).model
    before, after = model.net.conv2.weight.detach(), clamped.net.conv2.weight.detach()
    mean, spread = before.mean(), 1.5 * math.sqrt(float(((before - before.mean()) ** 2).sum()) / before.numel())
    expected = before.minimum(mean + spread).maximum(mean - spread)
    assert torch.allclose(after, expected, atol=1e-7)
    assert 0 < int((after != before).sum()) < before.numel() / 2
    assert torch.equal(clamped.net.conv1.weight, model.net.conv1.weight)


def test_clamp_to_the_mean_and_to_nothing(tiny):
    model = tiny()
    flat = clamp(model, deviations=0).model
    assert all(torch.allclose(p, p.mean().expand_as(p), atol=1e-6) for p in flat.parameters())
    wide = clamp(model, deviations=1e3).model
    assert all(torch.equal(a, b) for a, b in zip(wide.parameters(), model.parameters(), strict=True))


def test_noise_is_uniform_within_its_radius(tiny):
    model = tiny()
    noisy = noise(model, radius=0.01, generator=torch.Generator().manual_seed(0)).model
    pairs = zip(noisy.parameters(), model.parameters(), strict=True)
    moved = torch.cat([(after - before).detach().flatten() for after, before in pairs])
    assert float(moved.abs().max()) <= 0.01 + 1e-6
    assert float(moved.abs().max()) > 0.0099
    assert abs(float(moved.mean())) < 3 * 0.01 / math.sqrt(3 * len(moved))
    assert float(moved.std()) == pytest.approx(0.01 / math.sqrt(3), rel=0.05)


def test_noise_is_reproducible_and_restricted_to_names(tiny):
    model = tiny()
    one, two, other = (
        noise(model, radius=0.1, names=["bn1.bias"], generator=torch.Generator().manual_seed(s)).model for s in (0, 0, 1)
    )
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    changed = [n for (n, a), b in zip(one.named_parameters(), model.parameters(), strict=True) if not torch.equal(a, b)]
    assert changed == ["net.bn1.bias"]
    assert not torch.equal(one.net.bn1.bias, other.net.bn1.bias)


def test_edits_out_of_range(tiny, gen):
    with pytest.raises(MethodError, match="deviations must lie in"):
        clamp(tiny(), deviations=-1)
    with pytest.raises(MethodError, match="radius must lie in"):
        noise(tiny(), radius=math.nan, generator=gen)


def test_shares_of_the_scan_are_even(trained, images):
    scores = Scores({"bn4": torch.arange(16.0)}, "channel")
    path, _ = cut_until(trained, images, rank(scores), Until(1.0, step=0.25))
    assert [candidate.amount for candidate in path] == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert all(a.removed < b.removed for a, b in pairwise(path))
