"""Neural Cleanse's unlearning stamps the share asked for, keeps labels, and takes a backdoor out."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from torch import nn

from conftest import make_images
from secateur.detect import invert, strengthen, suspected
from secateur.errors import MethodError
from secateur.measure import evaluate
from secateur.repair.fine_tuning import healing
from secateur.repair.neural_cleanse import neural_cleanse, stamping
from secateur.state import generator
from secateur.train import train
from secateur.types import Trigger

ANY = {"shortcut": 1.0, "anomaly": 0.0}


def corner(value):
    pattern = torch.zeros(1, 12, 12)
    pattern[0, 0, 0] = value
    return pattern


def test_a_share_is_stamped_and_every_trigger_gets_its_turn(gen):
    x, y = torch.zeros(50, 1, 12, 12), torch.arange(50) % 3
    hook = stamping([Trigger("add", {}, {"pattern": corner(value)}, 0) for value in (0.25, 0.75)], 0.2)
    seen = torch.zeros(50)
    for step in range(40):
        shown, labels = hook(x, y, step, gen)
        assert torch.equal(labels, y)
        assert sorted(set(shown.unique().tolist()) - {0.0, 0.25, 0.75}) == []
        assert int((shown != 0).sum()) == 10
        seen += shown[:, 0, 0, 0]
    assert not x.any()
    assert bool((seen > 0).all())
    assert float(seen.sum()) / 400 == pytest.approx(0.5, abs=0.05)


def test_it_is_inversion_growth_and_training(victim):
    """The same calls in plain sight give the same weights."""
    random, clean = generator(2), make_images(90, 9)
    settings = {"kinds": "sparse", "steps": 30, "batch_size": 8, "epochs": 1, "sizes": 2, **ANY}
    first = neural_cleanse(victim.model, clean, **settings, generator=generator(2))
    several = invert(victim.model, clean, kind="sparse", steps=30, batch_size=8, generator=random)
    flagged = suspected(several, **ANY).flagged
    assert first.log["flagged"] == len(flagged) > 0
    several = [each for each in several if each.target in flagged]
    for kind in ("patch", "dense", "smooth"):
        several += invert(victim.model, clean, flagged, kind=kind, steps=30, batch_size=8, generator=random)
    triggers = []
    for each in several:
        grown = strengthen(victim.model, clean, each, 1.0, batch_size=8, generator=random)
        more = strengthen(victim.model, clean, grown, 2.0, batch_size=8, generator=random)
        triggers += [grown.trigger, more.trigger]
    expected = train(victim.model, clean, healing(1, 0.01), generator=random, batch_hook=stamping(triggers, 0.3))
    for name, value in expected.state_dict().items():
        assert torch.equal(value, first.model.state_dict()[name])


class Planted(nn.Module):
    """A network with one more term: a bright corner means class 2, which no clean image shows."""

    def __init__(self, net):
        super().__init__()
        self.net = deepcopy(net)
        self.door = nn.Parameter(torch.tensor(20.0))

    def forward(self, x):
        return self.net(x) + self.door * x[:, :, 0, 0] ** 3 * torch.tensor([0.0, 0, 1])


def test_a_backdoor_goes_and_accuracy_stays(trained):
    model, test, white = Planted(trained), make_images(120, 5), Trigger("add", {}, {"pattern": corner(1.0)}, 2)
    before = evaluate(model, test, trigger=white)
    assert before.attack_success.value == 1
    steps = []
    repaired = neural_cleanse(
        model,
        make_images(240, 9),
        kinds="sparse",
        steps=90,
        batch_size=16,
        anomaly=0.0,
        sizes=2,
        epochs=10,
        lr=0.02,
        on_step=lambda step, total: steps.append((step, total)),
        generator=generator(0),
    )
    assert repaired.notes[0].startswith("flagged as targets: 2; for class 2, a leap of ")
    assert repaired.log["inverted_success"] > 0.8
    after = evaluate(repaired.model, test, trigger=white)
    assert after.attack_success.value < 0.1
    assert after.accuracy.value > 0.9
    assert steps == [(step, len(steps)) for step in range(1, len(steps) + 1)]


@pytest.mark.parametrize("unflagged", ["leave", "tune"])
def test_without_a_flag(unflagged, trained, images):
    repaired = neural_cleanse(
        trained, images, kinds="patch", steps=3, epochs=1, shortcut=1e6, unflagged=unflagged, generator=generator(0)
    )
    assert repaired.log["flagged"] == 0
    assert repaired.notes[0].startswith("no class was flagged; the most suspect is ")
    before, after = trained.state_dict(), repaired.model.state_dict()
    same = all(torch.equal(before[name], after[name]) for name in before)
    assert same == (unflagged == "leave")
    assert repaired.model is not trained


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kinds": "stickers"}, r"^unknown kinds 'stickers'"),
        ({"unflagged": "pray"}, r"^unknown unflagged 'pray'"),
        ({"sizes": 0}, r"^sizes must lie in \[1, "),
        ({"share": 1.1}, r"^share must lie in \[0, 1\]"),
        ({"shortcut": 0.5}, r"^shortcut must lie in \[1, "),
        ({"anomaly": -1}, r"^anomaly must lie in \[0, "),
        ({"steps": 0}, r"^steps must lie in \[1, "),
    ],
)
def test_out_of_range(settings, message, trained, images):
    quick = {"kinds": "patch", "steps": 1, "epochs": 0}
    with pytest.raises(MethodError, match=message):
        neural_cleanse(trained, images, **{**quick, **settings}, generator=generator(0))
