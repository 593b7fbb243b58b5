"""Each known way to fool oneself fails its check; sound networks fail none; thresholds on outcomes written by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from secateur.attack import bpda, eot, fgsm, pgd, random_noise
from secateur.data import load_data
from secateur.errors import MethodError
from secateur.measure import Outcomes, Sanity, ThreatModel, bind, robustness, sanity
from secateur.measure.sanity import RULES, attacks, judging, network
from secateur.measure.sanity.evidence import OURS, Evidence, Run, Settings, Slopes
from secateur.state import generator
from secateur.types import ImageSet, to_float

EPS = 0.15
CLASSES = tuple("0123456789")


def failures(found: Sanity) -> set[str]:
    return {check.id for check in found.failed()}


def audit(model: nn.Module, data: ImageSet, **changed) -> Sanity:
    settings = {"eps": EPS, "steps": 6, "queries": 30, "images": 90, "generator": generator(3)}
    return sanity(model, data, **(settings | changed))


@pytest.fixture(scope="module")
def shown(bars) -> ImageSet:
    return bars(120, 2)


@pytest.fixture(scope="module")
def fashion(hardened) -> ImageSet:
    return ImageSet((hardened.x * 255).round().to(torch.uint8), hardened.y, CLASSES)


def test_an_adversarially_trained_network_fails_nothing(hardened, fashion):
    seen, strong = [], {"pgd": bind(pgd, eps=hardened.eps), "margin": bind(pgd, eps=hardened.eps, loss="margin")}
    figure = robustness(hardened.model, fashion, strong, ThreatModel(hardened.eps), generator=generator(1))
    found = audit(
        hardened.model, fashion, eps=hardened.eps, steps=10, images=150, train=load_data("fashion-mini:train"),
        surrogate=nn.Sequential(nn.Identity(), hardened.model),
        attacks={"given": bind(fgsm, eps=hardened.eps)}, measured=figure,
        on_step=lambda *step: seen.append(step),
    )  # fmt: skip
    assert failures(found) == set()
    assert found.established
    assert all(check.status != "SKIPPED" for check in found.checks)
    assert 0.3 < found.upper_bound.value < found.clean_accuracy.value - 0.1
    assert found.upper_bound.n == 150
    assert [check.id for check in found.checks] == sorted({rule.id for rule in RULES})
    assert seen == [(i, 12) for i in range(1, 13)]
    assert set(found.budgets) == {*OURS, "given", "pgd, eps=0.05", "pgd, eps=0.2", "pgd, eps=0.5"}
    assert str(found).startswith("robust accuracy at most")


@pytest.mark.parametrize(("norm", "eps"), [("linf", 0.02), ("linf", 0.1), ("linf", 0.3), ("linf", 0.7), ("l2", 0.5), ("l2", 7)])
@pytest.mark.parametrize("seed", [0, 1])
def test_a_network_trained_normally_fails_nothing(norm, eps, seed, trained, shown):
    found = audit(trained, shown, eps=eps, norm=norm, steps=12, generator=generator(seed))
    assert failures(found) == set()


def test_the_same_generator_gives_the_same_audit(trained, shown):
    before, drawn = {name: value.clone() for name, value in trained.state_dict().items()}, torch.get_rng_state()
    first, second = (audit(trained, shown, images=40) for _ in range(2))
    assert first == second
    assert torch.equal(torch.get_rng_state(), drawn)
    assert all(torch.equal(value, before[name]) for name, value in trained.state_dict().items())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in trained.parameters())


class Around(nn.Module):
    """A network with something done to its images and its answers."""

    def __init__(self, net: nn.Module, given=lambda x: x, answer=lambda z: z) -> None:
        super().__init__()
        self.net, self.given, self.answer = net, given, answer
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.answer(self.net(self.given(x)))


def rounded(x: Tensor) -> Tensor:
    return (x * 31).round() / 31


class Twisted(torch.autograd.Function):
    """Nothing forward, the gradient backwards with its sign changed."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return -grad


def test_logits_a_thousand_times_too_large(trained, shown):
    found = audit(Around(trained, answer=lambda z: 1000 * z), shown)
    assert {"ADV-010", "ADV-033", "ADV-034"} <= failures(found)
    assert found["gradient of the margin"].status == "PASS"
    assert found["ADV-010"].value > 0.5
    assert not found.established
    assert str(found).startswith("robustness not established (ADV-010 gradient of cross-entropy")


def test_a_rounding_layer_hides_the_gradient_and_bpda_finds_it(trained, shown):
    class Round(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return rounded(x)

    net = nn.Sequential(Round(), trained).eval()
    found = audit(net, shown, eps=0.1)
    assert {"ADV-010", "ADV-011", "ADV-012", "ADV-034", "ADV-038"} <= failures(found)
    adaptive = audit(net, shown, eps=0.1, forward=bpda(lambda v: v, layer="0"))
    assert failures(adaptive) == set()
    assert adaptive["ADV-012"].status in ("PASS", "WARN")
    assert adaptive.upper_bound.value < found.upper_bound.value


def test_square_and_transfer_find_what_a_masked_gradient_hides(trained, shown):
    found = audit(Around(trained, given=rounded), shown, eps=0.2, surrogate=trained, queries=100)
    assert {"ADV-035", "ADV-036"} <= failures(found)
    assert len(found["ADV-036"].where) == round(found["ADV-036"].value * 90)
    places = torch.tensor(found["ADV-036"].where)
    assert found["ADV-036"].where == tuple(sorted({*places.tolist()}))
    assert int(places.max()) < len(shown)


def test_a_detached_network_lets_no_attack_run(trained, shown):
    found = audit(Around(trained, given=lambda x: x.detach()), shown)
    assert {"ADV-010", "ADV-011", "ADV-020"} <= failures(found)
    assert "no gradient comes back" in found["ADV-011"].message
    assert "passes no gradient back" in found["ADV-020"].message
    assert found["ADV-032"].status == "SKIPPED"


def test_a_network_that_draws(trained, shown):
    noisy = Around(trained, given=lambda x: x + 0.05 * torch.randn_like(x))
    found = audit(noisy, shown, images=45)
    assert "ADV-001" in failures(found)
    assert found["ADV-005"].status == "SKIPPED"
    assert audit(noisy, shown, images=45, forward=eot(4))["ADV-001"].status == "WARN"


def test_a_network_in_training_mode(trained, shown):
    norm = next(module for module in trained.modules() if isinstance(module, nn.BatchNorm2d))
    norm.training = True
    try:
        found = audit(trained, shown, images=30)
        assert norm.training
    finally:
        norm.training = False
    assert failures(found) == {"ADV-002"}
    assert found["eval mode"].value == 1


def test_batch_norm_without_running_statistics(trained, shown):
    found = audit(Around(trained, given=lambda x: x / x.mean().clamp_min(1e-3) * 0.2), shown, images=45)
    assert "ADV-005" in failures(found)


def test_eps_in_other_units_than_pixels(trained, shown):
    attack = bind(pgd, eps=EPS / 0.3, steps=3)  # normalised with std 0.3
    found = audit(trained, shown, images=45, attacks={"theirs": attack})
    assert failures(found) == {"ADV-021"}
    assert found["ADV-021"].value == pytest.approx(EPS / 0.3 - EPS, abs=1e-6)
    assert "by theirs" in found["ADV-021"].message
    assert found.upper_bound == audit(trained, shown, images=45).upper_bound


def test_images_outside_of_zero_to_one(trained, shown):
    def attack(model: nn.Module, x: Tensor, y: Tensor, generator: torch.Generator) -> Tensor:
        return x - 0.9 * EPS

    found = audit(trained, shown, images=45, attacks={"theirs": attack})
    assert failures(found) == {"ADV-022"}
    assert found["ADV-022"].value == pytest.approx(0.9 * EPS, abs=1e-3)


def test_probabilities_in_place_of_logits(trained, shown):
    found = audit(Around(trained, answer=lambda z: z.softmax(dim=1)), shown, images=45)
    assert "ADV-004" in failures(found)
    logarithms = audit(Around(trained, answer=lambda z: z.log_softmax(dim=1)), shown, images=45)
    assert failures(logarithms) == set()


def test_answers_that_are_not_numbers(trained, shown):
    found = audit(Around(trained, answer=lambda z: z / 0 * 0), shown, images=30)
    assert {"ADV-003", "ADV-006"} <= failures(found)
    assert found["ADV-003"].value == 1
    few = audit(Around(trained, answer=lambda z: torch.where(z[:, :1] > z[:, 1:2] + 4, torch.nan, z)), shown, images=60)
    assert "ADV-003" in failures(few)
    assert 0 < few["ADV-003"].value < 1
    assert few["ADV-034"].status == "PASS"  # attacks ran on the others
    assert len(few["ADV-003"].where) == round(60 * few["ADV-003"].value)


def test_steps_that_cannot_reach_the_border(trained, shown):
    found = audit(trained, shown, images=45, step_size=EPS / 60)
    assert "ADV-025" in failures(found)
    assert found["ADV-025"].value == pytest.approx(0.1)
    given = audit(trained, shown, images=45, attacks={"theirs": bind(pgd, eps=EPS, steps=10, step_size=EPS / 30)})
    assert failures(given) == {"ADV-025"}
    assert "in theirs" in given["ADV-025"].message


def test_a_gradient_that_leads_astray(trained, shown):
    found = audit(Around(trained, given=Twisted.apply), shown)
    assert {"ADV-012", "ADV-034"} <= failures(found)
    assert found["ADV-034"].value < 0.1


def test_labels_that_are_not_the_true_ones(trained, shown):
    wrong = ImageSet(shown.x, (shown.y + 1) % 3, shown.classes)
    found = audit(trained, wrong)
    assert failures(found) == {"ADV-006"} | (failures(found) & {"ADV-041"})

    def shifted(model: nn.Module, x: Tensor, y: Tensor, generator: torch.Generator) -> Tensor:
        return pgd(model, x, (y + 1) % 3, eps=EPS, generator=generator)

    assert failures(audit(trained, shown, attacks={"theirs": shifted})) == {"ADV-024"}


def test_an_attack_away_from_the_networks_own_answers(hardened, fashion):
    def away(model: nn.Module, x: Tensor, y: Tensor, generator: torch.Generator) -> Tensor:
        with torch.no_grad():
            return pgd(model, x, model(x).argmax(dim=1), eps=hardened.eps, generator=generator)

    found = audit(hardened.model, fashion, eps=hardened.eps, images=200, attacks={"theirs": away})
    assert failures(found) == {"ADV-024"}
    assert audit(hardened.model, fashion, eps=hardened.eps, images=60, attacks={"theirs": away})["ADV-024"].status != "PASS"
    honest = audit(hardened.model, fashion, eps=hardened.eps, attacks={"theirs": bind(pgd, eps=hardened.eps)})
    assert honest["ADV-024"].status == "PASS"


@pytest.mark.parametrize("attack", [random_noise, fgsm])
def test_weak_attacks_on_true_labels_pass(attack, trained, shown):
    assert audit(trained, shown, attacks={"theirs": bind(attack, eps=EPS)})["ADV-024"].status == "PASS"


def test_images_that_were_trained_on(trained, images, shown):
    found = audit(trained, images, images=30, train=images)
    assert failures(found) == {"ADV-040"}
    assert found["ADV-040"].value == 1
    assert audit(trained, shown, images=30, train=images)["ADV-040"].status == "PASS"
    assert "cannot be known" in audit(trained, shown, images=30)["ADV-040"].message


def test_few_images_say_little(trained, shown):
    assert audit(trained, shown, images=8)["ADV-041"].status == "FAIL"
    assert audit(trained, shown, images=30, eps=0.1)["ADV-041"].status == "WARN"


def test_what_cannot_be_audited(trained, shown):
    with pytest.raises(MethodError, match="eps must be above 0"):
        audit(trained, shown, eps=0)
    with pytest.raises(MethodError, match=r"eps must lie in \[0, 1\], got 8"):
        audit(trained, shown, eps=8)
    with pytest.raises(MethodError, match=r"steps must lie in \[2,"):
        audit(trained, shown, steps=1)
    with pytest.raises(MethodError, match=r"step_size must lie in"):
        audit(trained, shown, step_size=0)
    with pytest.raises(MethodError, match=r"attacks need names other than ours \(fgsm, .*\), got pgd"):
        audit(trained, shown, attacks={"pgd": bind(pgd)})
    with pytest.raises(MethodError, match="at least one image"):
        audit(trained, shown.subset(torch.tensor([], dtype=torch.int64)))


# Outcomes written by hand: 200 images, two classes, all right when clean.
N = 200


def run(name: str, broken: Tensor | range, **changed) -> Run:
    where = torch.zeros(N, dtype=torch.bool)
    where[torch.tensor(list(broken), dtype=torch.int64)] = True
    nothing, everything = torch.zeros(N, dtype=torch.bool), torch.ones(N, dtype=torch.bool)
    margin = torch.full((N,), -1.0).masked_fill(where, torch.inf)
    made = Run(name, everything, where, where, margin, nothing, settings={"steps": 10, "step_size": 0.025, "eps": 0.1})
    return replace(made, **changed)


def evidence(**runs: range) -> Evidence:
    """All attacks break the first 50 images, but for those named; ``sweep_`` names other budgets in hundredths."""
    broken = dict.fromkeys(OURS, range(50)) | {"square": range(0), "transfer": range(0), "random noise": range(0)}
    sweep = {0.05: range(20), 0.2: range(150), 0.5: range(N)}
    for name, where in runs.items():
        if name.startswith("sweep_"):
            sweep[int(name[6:]) / 100] = where
        else:
            broken[name.replace("_", " ").replace("pgd ", "pgd, ")] = where
    y = torch.arange(N) % 2
    logits = 2 * torch.nn.functional.one_hot(y, 2).float()
    slopes = Slopes(False, torch.zeros(N, dtype=torch.bool), torch.ones(N), torch.ones(N))
    return Evidence(
        settings=Settings(ThreatModel(0.1), 10, None, 100, None, 256, 3, 0),
        data=ImageSet(torch.zeros(N, 3, 1, 1, dtype=torch.uint8), y, ("a", "b")),
        rows=torch.arange(N).flip(0),
        training=0,
        logits=logits,
        margin=torch.full((N,), -1.0),
        spread=0.0,
        together=0.0,
        draws=False,
        slopes={"cross-entropy": slopes, "margin": slopes},
        runs={name: run(name, where) for name, where in broken.items()},
        sweep={eps: run(f"pgd, eps={eps}", where) for eps, where in sweep.items()},
        given=(),
        budgets={},
        shared=0,
        measured=outcomes(range(50)),
    )


def outcomes(broken: range) -> Outcomes:
    """A figure whose attack broke these of the images looked at, which are those given the other way round."""
    y = (torch.arange(N) % 2).flip(0)
    answers = y.clone()
    places = N - 1 - torch.tensor(list(broken), dtype=torch.int64)
    answers[places] = 1 - y[places]
    return Outcomes(y, y, {"theirs": answers}, {"theirs": answers}, {}, {})


def test_outcomes_without_a_fault_pass():
    assert [rule.check(evidence()).status for rule in RULES] == ["PASS"] * len(RULES)


@pytest.mark.parametrize(
    ("judge", "change", "status", "value"),
    [
        (attacks.one_step_no_better, {"fgsm": range(52)}, "PASS", 0.01),
        (attacks.one_step_no_better, {"fgsm": range(54)}, "WARN", 0.02),
        (attacks.one_step_no_better, {"fgsm": range(65)}, "FAIL", 0.075),
        (attacks.one_step_no_better, {"one_step": range(65)}, "FAIL", 0.075),
        (attacks.one_step_no_better, {"fgsm": range(45, 115)}, "WARN", 0.1),
        (attacks.twice_the_steps, {"pgd_twice_the_steps": range(61)}, "FAIL", 0.055),
        (attacks.twice_the_steps, {"pgd_twice_the_steps": range(60)}, "WARN", 0.05),
        (attacks.twice_the_steps, {"pgd_twice_the_steps": range(40)}, "PASS", -0.05),
        (attacks.losses_agree, {"pgd_margin": range(80)}, "FAIL", 0.15),
        (attacks.losses_agree, {"pgd_margin": range(20)}, "FAIL", 0.15),
        (attacks.losses_agree, {"pgd_margin": range(60)}, "WARN", 0.05),
        (attacks.sweep_is_monotone, {"sweep_5": range(80)}, "FAIL", 0.15),
        (attacks.sweep_is_monotone, {"sweep_20": range(20)}, "FAIL", 0.15),
        (attacks.sweep_is_monotone, {"sweep_20": range(47)}, "WARN", 0.015),
        (attacks.far_reaches_chance, {"sweep_50": range(100)}, "PASS", 0.5),
        (attacks.far_reaches_chance, {"sweep_50": range(90)}, "WARN", 0.55),
        (attacks.far_reaches_chance, {"sweep_50": range(70)}, "FAIL", 0.65),
        (attacks.square_no_better, {"square": range(60, 61)}, "WARN", 0.005),
        (attacks.square_no_better, {"square": range(60, 72)}, "FAIL", 0.06),
        (attacks.transfer_no_better, {"transfer": range(60, 72)}, "FAIL", 0.06),
        (attacks.union_adds_little, {"square": range(60, 63)}, "WARN", 0.015),
        (attacks.union_adds_little, {"sweep_5": range(60, 62)}, "PASS", 0.01),
        (attacks.better_than_noise, {"random_noise": range(40, 45)}, "PASS", 1.0),
        (attacks.better_than_noise, {"random_noise": range(60)}, "FAIL", 0.0),
        (attacks.better_than_noise, {"random_noise": range(1, N), "pgd": range(N - 1)}, "WARN", 0.5),
        (attacks.better_than_noise, {"random_noise": range(45)}, "WARN", 1.0),
        (attacks.better_than_noise, {"random_noise": range(N), "pgd": range(N)}, "PASS", 0.0),
    ],
)  # fmt: skip
def test_thresholds_by_hand(judge, change, status, value):
    found = judge(evidence(**change))
    assert found.status == status
    assert found.value == pytest.approx(value)


def test_images_are_named_by_their_place_among_those_given():
    found = attacks.square_no_better(evidence(square=range(60, 63)))
    assert found.where == (N - 63, N - 62, N - 61)


def test_success_between_grey_levels_is_a_warning():
    plain = evidence()
    lost = run("pgd", range(50), stored=torch.zeros(N, dtype=torch.bool))
    found = attacks.survives_files(replace(plain, runs=plain.runs | {"pgd": lost}))
    assert (found.status, found.value) == ("WARN", 0.25)


@pytest.mark.parametrize(("count", "status"), [(0, "PASS"), (10, "WARN"), (11, "FAIL")])
def test_shares_of_useless_gradients(count, status):
    plain = evidence()
    slopes = Slopes(False, torch.arange(N) < count, torch.ones(N), torch.ones(N))
    found = network.gradient_under_margin(replace(plain, slopes=plain.slopes | {"margin": slopes}))
    assert (found.status, found.value) == (status, count / N)


@pytest.mark.parametrize(("count", "status"), [(20, "PASS"), (21, "WARN"), (101, "FAIL")])
def test_shares_of_gradients_that_are_no_slope(count, status):
    plain = evidence()
    slopes = Slopes(
        False, torch.zeros(N, dtype=torch.bool), torch.ones(N), torch.ones(N).index_fill(0, torch.arange(count), 0.4)
    )
    found = network.gradient_is_the_slope(replace(plain, slopes=plain.slopes | {"margin": slopes}))
    assert (found.status, found.value) == (status, count / N)
    twin = replace(plain.settings, forward=bpda(lambda v: v))
    changed = replace(plain, settings=twin, slopes=plain.slopes | {"margin": slopes})
    assert network.gradient_is_the_slope(changed).status in ("PASS", "WARN")


def test_attacks_that_could_not_run_are_no_evidence():
    plain = evidence()
    found = replace(plain, runs=plain.runs | {"pgd": run("pgd", range(0), error="no gradient")})
    statuses = {rule.name: rule.check(found).status for rule in RULES}
    assert statuses["attacks ran"] == "FAIL"
    assert statuses["twice the steps"] == statuses["better than noise"] == "SKIPPED"


def test_equal_attacks_hardly_ever_fail_by_chance():
    """Two attacks that break 40 % of the images independently, the worst case of a paired test: 2000 pairs."""
    draw, failed, plain = generator(0), 0, evidence()
    for _ in range(2000):
        first, second = (torch.rand(N, generator=draw) < 0.4 for _ in range(2))
        pair = (run("a", first.nonzero()[:, 0].tolist()), run("b", second.nonzero()[:, 0].tolist()))
        failed += judging.not_stronger(plain, *pair).status == "FAIL"
    assert failed <= 4


@pytest.mark.parametrize(
    ("theirs", "status", "value"),
    [(50, "PASS", 0.0), (48, "PASS", 0.01), (40, "WARN", 0.05), (39, "FAIL", 0.055), (90, "PASS", -0.2)],
)
def test_a_figure_must_not_be_beaten_by_our_own_attacks(theirs, status, value):
    """Ours break 50 images, theirs fewer or more; images are named by their places among those given."""
    found = attacks.no_weaker_than_ours(replace(evidence(), measured=outcomes(range(theirs))))
    assert (found.status, found.value) == (status, pytest.approx(value))
    assert found.where == (tuple(range(N - 50, N - theirs)) if value > 0.01 else ())


def test_without_a_figure_there_is_nothing_to_beat():
    with pytest.raises(judging.Skip, match=r"no figure was given"):
        attacks.no_weaker_than_ours(replace(evidence(), measured=None))


def test_what_the_figures_attack_broke_is_no_longer_standing():
    assert judging.standing(evidence()).value == 0.75
    assert judging.standing(replace(evidence(), measured=outcomes(range(40, 60)))).value == 0.7


def test_an_image_without_an_answer_counts_though_it_was_not_looked_at():
    figure = outcomes(range(50))
    figure.clean[7] = -1
    found = network.finite(replace(evidence(), measured=figure))
    assert (found.status, found.where) == ("FAIL", (7,))


def test_a_figure_of_other_images_is_refused(trained, shown):
    with pytest.raises(MethodError, match=r"must be one on the same 120 images, got one on 100 others"):
        sanity(trained, shown, eps=0.1, measured=figure(trained, shown.subset(torch.arange(100))), generator=generator(0))


@pytest.mark.parametrize(
    ("changed", "said"),
    [({"eps": 0.3}, r"linf eps=0\.3"), ({"norm": "l2"}, r"l2 eps=0\.1"), ({"targeted": True}, r"linf eps=0\.1 .*, targeted")],
)
def test_a_figure_under_another_threat_is_refused(trained, shown, changed, said):
    other = figure(trained, shown, **changed)
    with pytest.raises(MethodError, match=rf"must be one under the same threat model \(linf eps=0\.1 .* got one under {said}"):
        sanity(trained, shown, eps=0.1, measured=other, generator=generator(0))


def figure(model, data, **threat):
    threat = ThreatModel(**({"eps": 0.1} | threat))
    noise = bind(random_noise, eps=threat.eps, norm=threat.norm, tries=1)
    targets = (data.y + 1) % 3 if threat.targeted else None
    return robustness(model, data, {"noise": noise}, threat, targets=targets, generator=generator(0))


class Noisy(torch.autograd.Function):
    """The identity with a gradient of its own."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, slope):
        return torch.randn(slope.shape, generator=generator(int(slope.abs().sum() * 1e6) % 1000))


class Misled(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(Noisy.apply(x))


@pytest.mark.parametrize("levels", [255, 1])
def test_a_gradient_is_compared_on_black_and_white_images_too(trained, shown, levels):
    x = (to_float(shown.x) * 2 * levels).round().clamp(0, levels) / levels
    images = replace(shown, x=(x * 255).round().to(torch.uint8))
    assert audit(Misled(trained), images)["ADV-012"].status == "FAIL"
    assert audit(trained, images)["ADV-012"].status == "PASS"


class Alone(nn.Module):
    """A network that takes no image alone, as batch norm without running statistics."""

    def __init__(self, model):
        super().__init__()
        self.model, self.norm = model, nn.BatchNorm1d(3, affine=False, track_running_stats=False)

    def forward(self, x):
        return self.norm(self.model(x))


def test_a_network_that_takes_no_image_alone_is_told(trained, shown):
    assert audit(Alone(trained), shown)["ADV-005"].status == "FAIL"


def test_too_little_memory_is_not_taken_for_a_gradient_that_is_missing(trained, shown, monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(torch.autograd, "grad", full)
    with pytest.raises(torch.OutOfMemoryError):
        audit(trained, shown)
