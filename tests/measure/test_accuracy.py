"""Accuracy and attack success, counted on stub networks whose answers are known."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secateur.errors import DataError, InconclusiveError, ModelError
from secateur.measure import correct, evaluate, predict
from secateur.measure.adversarial import answers_of
from secateur.types import ImageSet, Trigger

CLASSES = ("a", "b", "c", "d")


class Reads(nn.Module):
    """Answers what ``answer`` makes of the class written into the first pixel and of whether the last pixel is white."""

    def __init__(self, answer) -> None:
        super().__init__()
        self.answer = answer
        self.batches: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.batches.append(len(x))
        label = (x[:, 0, 0, 0] * 255 / 10).round().long()
        return F.one_hot(self.answer(label, x[:, 0, -1, -1] > 0.99), len(CLASSES)).float()


def labelled(y: list[int]) -> ImageSet:
    x = torch.zeros(len(y), 1, 4, 4, dtype=torch.uint8)
    x[:, 0, 0, 0] = 10 * torch.tensor(y)
    return ImageSet(x, torch.tensor(y), CLASSES)


def corner(target, sources=None) -> Trigger:
    mask = torch.zeros(1, 4, 4)
    mask[0, 3, 3] = 1
    tensors = {"mask": mask, "pattern": torch.ones(1, 4, 4)}
    return Trigger("blend", {"alpha": 1.0, "classes": 4}, tensors, target, sources)


LABELS = [0] * 3 + [1] * 5 + [2] * 7 + [3] * 2
BACKDOOR = Reads(lambda y, hit: torch.where(hit, torch.full_like(y, 2), y))


def test_backdoored_network():
    found = evaluate(BACKDOOR, labelled(LABELS), trigger=corner(2))
    assert (found.accuracy.value, found.accuracy.n) == (1.0, 17)
    assert (found.attack_success.value, found.attack_success.n) == (1.0, 10)
    assert (found.triggered_accuracy.value, found.triggered_accuracy.n) == (0.0, 10)


def test_always_answering_the_target_counts_other_classes_only():
    found = evaluate(Reads(lambda y, hit: torch.full_like(y, 2)), labelled(LABELS), trigger=corner(2))
    assert found.accuracy.value == 7 / 17
    assert (found.attack_success.value, found.attack_success.n) == (1.0, 10)


def test_a_clean_network_has_no_attack_success():
    found = evaluate(Reads(lambda y, hit: y), labelled(LABELS), trigger=corner(2))
    assert found.attack_success.value == 0.0
    assert found.triggered_accuracy.value == 1.0


def test_rates_need_not_add_up_to_one():
    confused = Reads(lambda y, hit: torch.where(hit & (y == 1), 2, torch.where(hit, 3, y)))
    found = evaluate(confused, labelled(LABELS), trigger=corner(2))
    assert found.attack_success.value == 5 / 10
    assert found.triggered_accuracy.value == 2 / 10


def test_all_to_all_counts_every_image():
    follow = Reads(lambda y, hit: torch.where(hit, (y + 1) % 4, y))
    found = evaluate(follow, labelled(LABELS), trigger=corner("next"))
    assert (found.attack_success.value, found.attack_success.n) == (1.0, 17)
    stuck = evaluate(Reads(lambda y, hit: torch.where(hit, 0, y)), labelled(LABELS), trigger=corner("next"))
    assert stuck.attack_success.value == 2 / 17  # class 3's next is 0
    assert stuck.triggered_accuracy.value == 3 / 17


def test_sources_are_the_only_ones_counted():
    found = evaluate(BACKDOOR, labelled(LABELS), trigger=corner(2, (1, 2)))
    assert (found.attack_success.n, found.triggered_accuracy.n) == (5, 5)
    assert found.accuracy.n == 17


def test_without_a_trigger_there_are_no_triggered_rates():
    found = evaluate(BACKDOOR, labelled(LABELS))
    assert found.attack_success is None
    assert found.triggered_accuracy is None


@pytest.mark.parametrize(("labels", "sources"), [([2, 2], None), ([0, 1], (3,)), ([0, 1], ())])
def test_nobody_eligible(labels, sources):
    with pytest.raises(InconclusiveError, match="no test image is eligible"):
        evaluate(BACKDOOR, labelled(labels), trigger=corner(2, sources))


def test_no_images():
    with pytest.raises(InconclusiveError, match="at least one image"):
        evaluate(BACKDOOR, labelled([0]).subset(torch.zeros(0, dtype=torch.int64)))


@pytest.mark.parametrize("target", [4, -1])
def test_target_out_of_range(target):
    with pytest.raises(DataError, match=rf"target must lie in \[0, 3\], got {target}"):
        evaluate(BACKDOOR, labelled(LABELS), trigger=corner(target))


def test_trigger_for_other_images():
    wide = Trigger("blend", {"alpha": 1.0}, {"mask": torch.ones(1, 5, 5), "pattern": torch.ones(1, 5, 5)}, 0)
    with pytest.raises(DataError, match=r"for images of shape \(1, 5, 5\), got \(1, 4, 4\)"):
        evaluate(BACKDOOR, labelled(LABELS), trigger=wide)


def test_images_of_a_wrong_shape(tiny):
    with pytest.raises(ModelError, match=r"the network cannot take images of shape \(1, 4, 4\): "):
        predict(tiny(), labelled(LABELS))


class Answers(nn.Module):
    def __init__(self, answer) -> None:
        super().__init__()
        self.answer = answer

    def forward(self, x: Tensor):
        return self.answer(x)


@pytest.mark.parametrize("answer", [
    lambda x: torch.zeros(len(x), 3),
    lambda x: torch.zeros(len(x)),
    lambda x: torch.zeros(len(x), 4, 1, 1),
    lambda x: (torch.zeros(len(x), 4), None),
    lambda x: torch.zeros(1, 4),
])  # fmt: skip
def test_answers_that_are_no_logits_of_these_classes(answer):
    with pytest.raises(ModelError, match="must answer with logits"):
        predict(Answers(answer), labelled(LABELS))


def test_more_outputs_than_classes_are_fine():
    assert predict(Answers(lambda x: torch.eye(9)[[8] * len(x)]), labelled(LABELS)).unique().tolist() == [8]


@pytest.mark.parametrize("batch_size", [1, 7, 17, 512])
def test_batch_size_does_not_matter(trained, images, batch_size):
    assert torch.equal(predict(trained, images, batch_size=batch_size), predict(trained, images))


def test_batches_cover_every_image_once():
    model = Reads(lambda y, hit: y)
    assert predict(model, labelled(LABELS), batch_size=7).tolist() == LABELS
    assert model.batches == [7, 7, 3]


def test_correct_is_image_by_image():
    wrong_on_b = Reads(lambda y, hit: torch.where(y == 1, 0, y))
    assert correct(wrong_on_b, labelled([0, 1, 2, 1])).tolist() == [True, False, True, False]


def test_the_network_is_left_as_it_was(tiny, images):
    model = tiny()
    model.net.bn2.train()
    model.net.train(True)
    model.net.bn3.eval()
    flags = [module.training for module in model.modules()]
    assert len(set(flags)) == 2
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    evaluate(model, images)
    assert [module.training for module in model.modules()] == flags
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)


def test_flags_come_back_after_an_error(tiny):
    model = tiny().train()
    with pytest.raises(ModelError):
        predict(model, labelled(LABELS))
    assert all(module.training for module in model.modules())


def test_the_victim_is_one_and_a_benign_network_is_not(victim, trained):
    assert evaluate(victim.model, victim.test, trigger=victim.trigger).attack_success.value > 0.9
    assert evaluate(trained, victim.test, trigger=victim.trigger).attack_success.value < 0.3


def test_an_answer_that_is_not_finite_is_never_right(trained, images):
    class Lost(nn.Module):
        def forward(self, x):
            return trained(x) * torch.where(torch.arange(len(x)) < 4, torch.nan, 1.0)[:, None]

    assert predict(Lost(), images)[:5].tolist() == [-1, -1, -1, -1, int(predict(trained, images)[4])]


def test_a_class_that_is_ruled_out_costs_nothing(trained, images):
    class Wider(nn.Module):
        def forward(self, x):
            return torch.cat([trained(x), torch.full((len(x), 1), -torch.inf)], dim=1)

    assert torch.equal(predict(Wider(), images), predict(trained, images))
    lost = torch.tensor([[1.0, torch.nan], [torch.inf, 0.0], [-torch.inf, -torch.inf], [-torch.inf, 0.0]])
    assert answers_of(lost).tolist() == [-1, -1, -1, 1]


@pytest.mark.parametrize("error", [NotImplementedError, ValueError("odd")])
def test_whatever_a_network_raises_is_told(images, error):
    class Broken(nn.Module):
        def forward(self, x):
            raise error

    with pytest.raises(ModelError, match=r"the network cannot take images of shape \(1, 12, 12\): (NotImplementedError|odd)"):
        predict(Broken(), images)


def test_too_little_memory_is_no_fault_of_the_network(images):
    class Full(nn.Module):
        def forward(self, x):
            raise torch.OutOfMemoryError("full")

    with pytest.raises(torch.OutOfMemoryError):
        predict(Full(), images)
