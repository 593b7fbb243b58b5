"""EP cuts exactly the channels whose entropy, computed by hand, is far below their layer's."""

from __future__ import annotations

from collections import Counter
from math import log

import numpy as np
import pytest
import torch
from torch import nn

from conftest import make_images
from secateur.errors import DataError, MethodError
from secateur.repair.ep import entropies, ep
from secateur.state import generator
from secateur.types import ChannelMask, to_float

NORMS = ("bn1", "bn2", "bn3", "bn4")


def entropy_by_hand(values: np.ndarray, start: float, width: float) -> float:
    counts = Counter(int((value - start) / width) for value in values)
    return -sum(count / len(values) * log(count / len(values)) for count in counts.values())


def cut_by_hand(model, images, k: float, width: float) -> dict[str, list[bool]]:
    cut = {}
    for name in NORMS:
        seen = []
        handle = model.net.get_submodule(name).register_forward_pre_hook(lambda module, given, seen=seen: seen.append(given[0]))
        with torch.no_grad():
            model(to_float(images.x))
        handle.remove()
        values = seen[0].double().numpy().max((2, 3))
        values = (values - values.mean(0)) / values.std(0, ddof=1)
        found = np.array([entropy_by_hand(values[:, c], values.min(), width) for c in range(values.shape[1])])
        cut[name] = (found < found.mean() - k * found.std(ddof=1)).tolist()
    return cut


@pytest.mark.parametrize(("k", "width"), [(0.0, 0.2), (1.0, 0.2), (0.5, 1.0)])
def test_the_entropies_by_hand(k, width, tiny, images):
    model = tiny(width=8)
    expected = cut_by_hand(model, images, k, width)
    repaired = ep(model, images, suspect=images, k=k, bin_width=width, images=1000, edit="weight+bias", generator=generator(0))
    assert sum(map(sum, expected.values())) > 0
    assert isinstance(repaired.mask, ChannelMask)
    for name, cut in expected.items():
        assert (~repaired.mask.keep[name]).tolist() == cut
        assert torch.equal(repaired.model.net.get_submodule(name).weight == 0, torch.tensor(cut))


def test_a_histogram_of_known_shares():
    """1/2 and 1/2: log 2. All apart: log n. All alike: 0."""
    values = torch.tensor([[0.0, 0, 1, 1], [0, 1, 2, 3], [5, 5, 5, 5]])
    assert entropies(values, 0.1).tolist() == pytest.approx([log(2), log(4), 0.0])


def test_only_as_many_images_as_asked_are_looked_at(tiny, images):
    """Beyond the ones drawn the suspects do not matter, and another seed draws others."""
    model = tiny(width=8)
    masks = []
    for seed, count in ((0, 20), (0, 20), (1, 20), (0, 240)):
        repaired = ep(model, images, suspect=images, k=0.5, images=count, generator=generator(seed))
        masks.append(torch.cat(list(repaired.mask.keep.values())))
    assert torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[0], masks[2])
    assert not torch.equal(masks[0], masks[3])


def test_a_backdoored_channel_shows_among_poisoned_images(tiny, images):
    """A channel whose largest values form two groups on images half of which are poisoned, and one on clean ones."""
    model = tiny(width=16)
    with torch.no_grad():
        model.net.conv1.weight[3] = torch.linspace(0.5, 1.5, 9).reshape(1, 3, 3)
    poisoned = images.x.clone()
    poisoned[:120, :, 4:7, 4:7] = 255
    poisoned[120:, :, 4:7, 4:7] = 200
    suspect = type(images)(poisoned, images.y, images.classes)
    found, missed = (
        ep(model, images, suspect=given, k=2.0, edit="weight+bias", generator=generator(0)).mask.keep["bn1"]
        for given in (suspect, images)
    )
    assert (~found).nonzero().flatten().tolist() == [3]
    assert missed.all()


@pytest.mark.parametrize(("setting", "value"), [("k", -0.1), ("bin_width", 0.0), ("images", 1)])
def test_settings_out_of_range(setting, value, tiny, images):
    with pytest.raises(MethodError, match=rf"^{setting} must lie in"):
        ep(tiny(), images, suspect=images, **{setting: value}, generator=generator(0))


def test_refusals(tiny, images):
    with pytest.raises(DataError, match=r"^ep needs two suspect images or more of shape \(1, 12, 12\), got 1 of \(1"):
        ep(tiny(), images, suspect=make_images(1, 0), generator=generator(0))
    other = type(images)(torch.zeros(4, 3, 12, 12, dtype=torch.uint8), images.y[:4], images.classes)
    with pytest.raises(DataError, match=r"^ep needs two suspect images or more of shape \(1, 12, 12\), got 4 of \(3"):
        ep(tiny(), images, suspect=other, generator=generator(0))
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    with pytest.raises(MethodError, match=r"^ep needs batch-norms with running statistics, got a network without"):
        ep(net, images, suspect=images, generator=generator(0))
