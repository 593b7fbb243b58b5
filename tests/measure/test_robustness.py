"""Rates under attack by hand, on a network that looks its answers up; curves in closed form; the budget and 8-bit files."""

import pytest
import torch
from torch import Tensor, nn

from secateur.attack import fgsm, pgd, random_noise
from secateur.errors import InconclusiveError, MethodError, ModelError
from secateur.measure import ThreatModel, bind, compare, craft, paired_p, robustness, robustness_curve, transfer_matrix
from secateur.measure.adversarial import answers_of, logits_of, store
from secateur.state import generator
from secateur.types import ImageSet, to_float

CLASSES = ("a", "b", "c")
EPS = 8 / 255
THREAT = ThreatModel(EPS)
ROBUSTNESS = "robustness needs at least one"


class Table(nn.Module):
    """Answers by the grey level of the first pixel: level -> class."""

    def __init__(self, answers: dict[int, int]) -> None:
        super().__init__()
        self.answers = answers

    def forward(self, x: Tensor) -> Tensor:
        levels = (x[:, 0, 0, 0] * 255).round().long().tolist()
        found = torch.tensor([self.answers.get(level, 0) for level in levels])
        return nn.functional.one_hot(found, 3).float()


def dots(levels: list[int], y: list[int]) -> ImageSet:
    x = torch.full((len(levels), 1, 2, 2), 100, dtype=torch.uint8)
    x[:, 0, 0, 0] = torch.tensor(levels, dtype=torch.uint8)
    return ImageSet(x, torch.tensor(y, dtype=torch.int64), CLASSES, "dots")


def moving(by: float):
    """Moves the first pixel of every image by so many grey levels."""

    def attack(model: nn.Module, x: Tensor, y: Tensor, generator: torch.Generator) -> Tensor:
        x = x.clone()
        x[:, 0, 0, 0] += by / 255
        return x

    return attack


# level:        10     20    30    40    50
# truth:        0      1     2     0     1
# clean:        0      1     2     2     1      four of five are right
# five up:      0 (15) 2(25) 0(35) 1(45) 1(55)  10 and 50 stay right; 20, 30 and 40 change
# five down:    1 (5)  1(15) 2(25) 0(35) 1(45)  10 changes, 40 becomes right
NET = Table({10: 0, 20: 1, 30: 2, 40: 2, 50: 1, 15: 0, 25: 2, 35: 0, 45: 1, 55: 1, 5: 1})
NET_DATA = dots([10, 20, 30, 40, 50], [0, 1, 2, 0, 1])
UP = {15: 0, 25: 2, 35: 0, 45: 1, 55: 1}
DOWN = {5: 1, 15: 1, 25: 2, 35: 0, 45: 1}


class Signed(nn.Module):
    """`NET`, but levels that both attacks reach depend on the second pixel, which `down` sets."""

    def forward(self, x: Tensor) -> Tensor:
        went_down = (x[:, 0, 1, 1] * 255).round() == 101
        up, down = Table(NET.answers | UP)(x), Table(NET.answers | DOWN)(x)
        return torch.where(went_down[:, None], down, up)


def down(model: nn.Module, x: Tensor, y: Tensor, generator: torch.Generator) -> Tensor:
    x = moving(-5)(model, x, y, generator)
    x[:, 0, 1, 1] += 1 / 255
    return x


def shares(rates) -> tuple[float, ...]:
    found = rates.clean_accuracy, rates.remnant_accuracy, rates.prediction_change_rate, rates.strict_attack_success
    return tuple(rate.value for rate in found)


def test_the_four_rates_by_hand():
    found = robustness(Signed(), NET_DATA, {"up": moving(5), "down": down}, THREAT, generator=generator(0))
    assert found.outcomes.clean.tolist() == [0, 1, 2, 2, 1]
    assert found.outcomes.returned["up"].tolist() == [0, 2, 0, 1, 1]
    assert found.outcomes.returned["down"].tolist() == [1, 1, 2, 0, 1]
    assert shares(found.by_attack["up"]) == pytest.approx((4 / 5, 2 / 5, 3 / 5, 2 / 4))
    assert shares(found.by_attack["down"]) == pytest.approx((4 / 5, 4 / 5, 2 / 5, 1 / 4))
    assert found.by_attack["up"].strict_attack_success.n == 4
    assert found.by_attack["up"].prediction_change_rate.n == 5


def test_the_worst_case_is_taken_image_by_image():
    found = robustness(Signed(), NET_DATA, {"up": moving(5), "down": down}, THREAT, generator=generator(0))
    assert shares(found.worst) == pytest.approx((4 / 5, 1 / 5, 4 / 5, 3 / 4))
    assert found.robust_accuracy == found.worst.remnant_accuracy
    assert shares(found.worst_stored) == shares(found.worst)


def test_an_attacker_may_leave_an_image_alone():
    """Image 40 is wrong when clean; an attack that happens to right it makes nothing more robust."""
    found = robustness(Signed(), NET_DATA, {"down": down}, THREAT, generator=generator(0))
    assert found.by_attack["down"].remnant_accuracy.value == pytest.approx(4 / 5)
    assert found.robust_accuracy.value == pytest.approx(3 / 5)


def test_success_between_grey_levels_is_lost_in_a_file():
    data = dots([10, 20], [0, 0])
    net = Table({13: 1})  # 10 + 2.6 rounds to 13 for the network, to 12 for a file
    found = robustness(net, data, {"up": moving(2.6)}, THREAT, keep_images=True, generator=generator(0))
    assert found.worst.remnant_accuracy.value == 0.5
    assert found.worst_stored.remnant_accuracy.value == 1
    assert found.stored_by_attack["up"].strict_attack_success.value == 0
    assert found.outcomes.images["up"][:, 0, 0, 0].tolist() == [12, 22]
    assert not robustness(net, data, {"up": moving(2.6)}, THREAT, generator=generator(0)).outcomes.images


@pytest.mark.parametrize("by", [8.01, -8.01, 100.0, float("nan"), float("inf")])
def test_images_beyond_the_budget_do_not_count(by):
    net = Table({10: 0, 20: 0})
    net.forward = lambda x: torch.eye(3)[(x[:, 0, 0, 0] * 255).round().long().sub(10).ne(0).long()]
    data = dots([10, 10], [0, 0])
    found = robustness(net, data, {"far": moving(by), "near": moving(8)}, THREAT, generator=generator(0))
    assert found.outcomes.refused["far"].tolist() == [True, True]
    assert found.by_attack["far"].remnant_accuracy.value == 1
    assert not found.outcomes.refused["near"].any()
    assert found.robust_accuracy.value == 0


def test_images_outside_of_zero_to_one_do_not_count():
    data = dots([250, 100, 3], [0, 0, 0])
    made = craft(moving(6), NET, data.x, data.y, THREAT, generator(0))
    assert made.admissible.tolist() == [False, True, True]
    assert made.outside.tolist() == pytest.approx([1 / 255, 0, 0], abs=1e-6)
    assert torch.equal(made.returned[0], to_float(data.x)[0])
    made = craft(moving(-6), NET, data.x, data.y, THREAT, generator(0))
    assert made.admissible.tolist() == [True, True, False]


def test_rounding_goes_towards_the_original():
    x = torch.tensor([100, 100, 100, 100, 0, 255], dtype=torch.uint8).view(1, 1, 1, 6)
    adversarial = torch.tensor([107.9, 92.1, 100.99, 108.0, 0.4, 254.6]).view(1, 1, 1, 6) / 255
    assert store(x, adversarial).flatten().tolist() == [107, 93, 100, 108, 0, 255]


def test_whole_levels_stay_whatever_float32_makes_of_them():
    x = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    for levels in range(-16, 17):
        wanted = (x.int() + levels).clamp(0, 255).to(torch.uint8)
        assert torch.equal(store(x, (to_float(x) + levels / 255).clamp(0, 1)), wanted)
        assert torch.equal(store(x, to_float(wanted)), wanted)


@pytest.mark.parametrize(("norm", "eps"), [("linf", EPS), ("linf", 0.05), ("l2", 0.7)])
def test_a_stored_image_is_within_the_budget(norm, eps, hardened):
    x = (hardened.x[:50] * 255).round().to(torch.uint8)
    threat = ThreatModel(eps, norm)
    made = craft(bind(pgd, eps=eps, norm=norm, steps=3), hardened.model, x, hardened.y[:50], threat, generator(0))
    change = (made.stored.double() / 255 - x.double() / 255).flatten(1)
    distance = change.abs().amax(dim=1) if norm == "linf" else change.norm(dim=1)
    assert bool(made.admissible.all())
    assert float(distance.max()) <= eps + 1e-6
    assert float(distance.max()) > 0.8 * eps


class Brightness(nn.Module):
    """Two classes by the mean grey value: the distance to the border is known for every image."""

    def forward(self, x: Tensor) -> Tensor:
        mean = x.flatten(1).mean(dim=1) - 0.5
        return torch.stack([-mean, mean], dim=1)


def flat(levels: Tensor) -> ImageSet:
    x = levels.to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 4, 4).contiguous()
    return ImageSet(x, (levels > 127).long(), ("dark", "bright"))


def test_the_curve_of_a_linear_network_is_its_closed_form():
    data = flat(torch.arange(28, 228))
    eps = [0.0, 0.11, 0.22, 0.31]  # none of them reaches from a whole grey level to the border exactly
    seen = []
    curve = robustness_curve(
        Brightness(), data, lambda e: {"fgsm": bind(fgsm, eps=e), "pgd": bind(pgd, eps=e)}, eps, THREAT,
        on_step=lambda *step: seen.append(step), generator=generator(0),
    )  # fmt: skip
    for point, e in zip(curve, eps, strict=True):
        away = (data.x[:, 0, 0, 0].double() / 255 - 0.5).abs()
        assert point.threat == ThreatModel(e)
        assert point.robust_accuracy.value == pytest.approx(float((away > e).double().mean()))
        assert point.by_attack["fgsm"].remnant_accuracy == point.by_attack["pgd"].remnant_accuracy
    assert [point.robust_accuracy.value for point in curve] == sorted((p.robust_accuracy.value for p in curve), reverse=True)
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_one_attack_is_not_changed_by_another(hardened):
    data = ImageSet((hardened.x[:60] * 255).round().to(torch.uint8), hardened.y[:60], tuple("0123456789"))
    noise, steps = bind(random_noise, eps=0.1, tries=1), bind(pgd, eps=0.1, steps=2)
    threat, seen = ThreatModel(0.1), []
    alone = robustness(hardened.model, data, {"noise": noise}, threat, batch_size=25, generator=generator(1))
    both = robustness(
        hardened.model, data, {"pgd": steps, "noise": noise}, threat, batch_size=25,
        on_step=lambda *step: seen.append(step), generator=generator(1),
    )  # fmt: skip
    assert torch.equal(alone.outcomes.returned["noise"], both.outcomes.returned["noise"])
    assert alone.seed == both.seed
    assert seen == [(i, 6) for i in range(1, 7)]


def test_the_network_and_the_random_state_stay_as_they_were(tiny, bars):
    model, data = tiny(3), bars(20, 1)
    norm = next(module for module in model.modules() if isinstance(module, nn.BatchNorm2d))
    norm.training = True
    before, drawn = {name: value.clone() for name, value in model.state_dict().items()}, torch.get_rng_state()

    def careless(model: nn.Module, x: Tensor, y: Tensor, generator: torch.Generator) -> Tensor:
        model.train()
        torch.rand(3)
        x = x.requires_grad_()
        model(x).sum().backward()
        return (x + 0.01 * x.grad.sign()).clamp(0, 1)

    attacks = {"careless": careless, "pgd": bind(pgd, eps=0.1, steps=2)}
    found = robustness(model, data, attacks, ThreatModel(0.1), generator=generator(0))
    assert not found.outcomes.refused["careless"].any()
    assert [module for module in model.modules() if module.training] == [norm]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), drawn)
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


def test_targeted_attacks_get_the_wanted_labels():
    data, targets = flat(torch.tensor([100, 120, 140, 200])), torch.tensor([1, 1, 0, 1])
    attack = bind(pgd, eps=0.1, targeted=True)
    threat = ThreatModel(0.1, targeted=True)
    found = robustness(Brightness(), data, {"pgd": attack}, threat, targets=targets, generator=generator(0))
    assert found.outcomes.returned["pgd"].tolist() == [0, 1, 0, 1]
    assert found.worst.target_reached.value == pytest.approx(2 / 3)
    assert found.worst.target_reached.n == 3
    assert "targeted" in str(found)
    with pytest.raises(MethodError, match="exactly if the threat model is targeted"):
        robustness(Brightness(), data, {"pgd": attack}, threat, generator=generator(0))
    with pytest.raises(MethodError, match="exactly if the threat model is targeted"):
        robustness(Brightness(), data, {"pgd": attack}, THREAT, targets=targets, generator=generator(0))


def test_no_image_right_when_clean_has_no_strict_success():
    found = robustness(Table({}), dots([10], [1]), {"up": moving(1)}, THREAT, generator=generator(0))
    assert found.worst.strict_attack_success is None
    assert found.worst.prediction_change_rate.value == 0


def test_an_answer_that_is_not_finite_is_never_right():
    logits = torch.tensor([[1.0, 0.0], [float("nan"), 0.0], [float("inf"), 0.0]])
    assert answers_of(logits).tolist() == [0, -1, -1]


def test_a_number_is_printed_with_its_threat_model():
    attack = bind(pgd, eps=EPS, steps=3)
    assert str(attack).startswith("pgd(eps=0.03137, norm=linf, steps=3, restarts=1, loss=cross-entropy, random_start=True")
    assert str(THREAT) == "linf eps=0.03137 (8/255) of pixels in [0, 1], untargeted, white-box"
    assert str(ThreatModel(0.5, "l2", knowledge="black-box")) == "l2 eps=0.5 of pixels in [0, 1], untargeted, black-box"
    found = robustness(Brightness(), flat(torch.tensor([100, 200])), {"pgd": attack}, THREAT, generator=generator(0))
    assert found.budgets == {"pgd": str(attack)}
    assert str(found).startswith("robust accuracy 100.00 % [34.2, 100.0], n=2; linf eps=0.03137 (8/255)")


def test_what_cannot_be_measured():
    data = dots([10], [0])
    with pytest.raises(MethodError, match=f"{ROBUSTNESS} image, got 0"):
        robustness(NET, dots([], []), {"up": moving(1)}, THREAT, generator=generator(0))
    with pytest.raises(MethodError, match=f"{ROBUSTNESS} attack, got 0"):
        robustness(NET, data, {}, THREAT, generator=generator(0))
    with pytest.raises(MethodError, match=r"unknown setting of pgd 'step'; did you mean 'steps'\?"):
        bind(pgd, step=3)
    with pytest.raises(MethodError, match=r"must return float images of shape \(1, 1, 2, 2\), got NoneType"):
        robustness(NET, data, {"none": lambda *_: None}, THREAT, generator=generator(0))
    with pytest.raises(MethodError, match=r"got torch.float32 \(0, 1, 2, 2\)"):
        robustness(NET, data, {"few": lambda model, x, y, g: x[:0]}, THREAT, generator=generator(0))
    with pytest.raises(MethodError, match=r"eps must lie in \[0, 1\], got 8"):
        ThreatModel(8)
    with pytest.raises(MethodError, match=r"unknown norm 'l1'; choose from: l2, linf"):
        ThreatModel(0.1, "l1")
    with pytest.raises(MethodError, match="a curve needs at least one eps, got 0"):
        robustness_curve(NET, data, lambda e: {}, [], THREAT, generator=generator(0))
    with pytest.raises(ModelError, match="cannot take images"):
        logits_of(nn.Conv2d(3, 2, 1), data.x, 2)
    with pytest.raises(ModelError, match=r"logits of shape \(1, 3 or more\), got \(1, 2\)"):
        robustness(Brightness(), dots([10], [2]), {"pgd": bind(pgd)}, THREAT, generator=generator(0))


# Transfer by hand. Levels 10, 20, 30, 40, all of class 0; the attack moves them five up.
NETS = {
    "s": Table({15: 1, 25: 1, 35: 0, 40: 1}),  # right on 10, 20, 30; its images fool it on 15 and 25
    "t": Table({10: 1, 25: 2, 35: 1}),  # right on 20, 30, 40; fooled on 25 and 35, not on 45
}
FOUR = dots([10, 20, 30, 40], [0, 0, 0, 0])


def test_the_transfer_matrix_by_hand():
    seen = []
    found = transfer_matrix(
        NETS, NETS, FOUR, moving(5), THREAT, batch_size=3, on_step=lambda *step: seen.append(step), generator=generator(0)
    )
    assert found.success["s", "t"].n == 2  # images 20 and 30 are right on both
    assert found.success["s", "t"].value == 1
    assert found.success["t", "s"].value == 0.5  # of 20 and 30 only 25 fools s
    assert found.success["s", "s"].value == pytest.approx(2 / 3)
    assert found.success["t", "t"].value == pytest.approx(2 / 3)
    assert found.white_box == {"s": found.success["s", "s"], "t": found.success["t", "t"]}
    assert found.threat == ThreatModel(EPS, knowledge="transfer")
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_transfer_counts_images_as_stored():
    net = Table({13: 1})  # 10 + 2.6 is 12.6: 13 as returned, 12 in a file
    found = transfer_matrix({"s": net}, {"t": net}, dots([10], [0]), moving(2.6), THREAT, generator=generator(0))
    assert found.success["s", "t"].value == 0
    assert found.white_box["s"].value == 0
    assert ("s", "s") not in found.success


def test_two_networks_before_the_same_images():
    nets = {"weak": Table(dict.fromkeys(range(6, 256), 1)), "strong": Table({})}
    levels = list(range(0, 6)) * 5
    found = transfer_matrix({"surrogate": Table({})}, nets, dots(levels, [0] * 30), moving(6), THREAT, generator=generator(0))
    compared = found.compare("surrogate", "weak", "strong")
    assert (compared.first.value, compared.second.value, compared.first.n) == (1, 0, 30)
    assert compared.p == pytest.approx(2 * paired_p(30, 0))
    assert found.compare("surrogate", "strong", "weak").p == compared.p
    assert found.compare("surrogate", "weak", "weak").p == 1
    with pytest.raises(MethodError, match="unknown pair of networks 'surrogate -> week'"):
        found.compare("surrogate", "week", "strong")


def test_a_comparison_is_of_the_same_images():
    first, second = torch.tensor([True, True, False, True]), torch.tensor([True, False, False, False])
    assert compare(first, second).p == pytest.approx(0.5)
    with pytest.raises(MethodError, match=r"the same images, got \(4,\) and \(3,\)"):
        compare(first, second[:3])
    with pytest.raises(InconclusiveError, match="at least one image"):
        compare(first[:0], second[:0])


def test_networks_that_share_no_image_have_no_rate():
    nets = {"a": Table({10: 1}), "b": Table({20: 1})}
    found = transfer_matrix(nets, nets, dots([10, 20], [0, 0]), moving(1), THREAT, generator=generator(0))
    assert found.success["a", "b"] is None
    assert found.success["a", "a"].n == 1
    with pytest.raises(InconclusiveError, match="at least one image"):
        found.compare("a", "a", "b")


def test_what_no_matrix_can_be_made_of():
    with pytest.raises(MethodError, match="transfer needs sources and targets, got 1 and 0"):
        transfer_matrix({"s": NET}, {}, FOUR, moving(5), THREAT, generator=generator(0))
    with pytest.raises(MethodError, match="'s' names one network as source and another as target"):
        transfer_matrix({"s": NET}, {"s": Table({})}, FOUR, moving(5), THREAT, generator=generator(0))
    with pytest.raises(MethodError, match="the transfer matrix is untargeted"):
        transfer_matrix(NETS, NETS, FOUR, moving(5), ThreatModel(EPS, targeted=True), generator=generator(0))
