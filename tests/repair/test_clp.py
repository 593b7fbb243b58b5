"""CLP cuts exactly the channels whose bound, computed by hand, stands out."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from conftest import make_images, randomise_norms
from secateur.errors import MethodError
from secateur.models import build
from secateur.repair import clp
from secateur.state import generator, seeded


def bound(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> np.ndarray:
    filters = conv.weight.detach().double().numpy()
    largest = np.array([np.linalg.norm(kernel.reshape(kernel.shape[0], -1), 2) for kernel in filters])
    return largest * np.abs(norm.weight.detach().double().numpy()) / np.sqrt(norm.running_var.double().numpy() + norm.eps)


@pytest.mark.parametrize("u", [0.5, 1.0, 2.0])
def test_the_bounds_by_singular_values(u, tiny, images):
    model = tiny()
    repaired = clp(model, images, u=u, generator=generator(0))
    for i in (1, 2, 3, 4):
        conv, norm = (model.net.get_submodule(f"{kind}{i}") for kind in ("conv", "bn"))
        expected = bound(conv, norm)
        cut = expected > expected.mean() + u * expected.std(ddof=1)
        assert (~repaired.mask.keep[f"bn{i}"]).tolist() == cut.tolist()
        after = repaired.model.net.get_submodule(f"bn{i}")
        assert not after.weight[torch.tensor(cut)].any()
        assert not after.bias[torch.tensor(cut)].any()
        assert torch.equal(after.weight[torch.tensor(~cut)], norm.weight[torch.tensor(~cut)])
    assert repaired.log["removed"] == sum(int((~keep).sum()) for keep in repaired.mask.keep.values()) > 0


def test_a_planted_channel_is_cut_and_nothing_else(tiny, images):
    model = tiny(width=16)
    with torch.no_grad():
        for i in (1, 2, 3, 4):
            conv, norm = (model.net.get_submodule(f"{kind}{i}") for kind in ("conv", "bn"))
            norm.weight.mul_(torch.from_numpy(1 / bound(conv, norm)).float())  # every channel has the bound 1
        model.net.bn3.weight[5] *= -7
    repaired = clp(model, images, generator=generator(0))
    assert [(site, (~keep).nonzero().flatten().tolist()) for site, keep in repaired.mask.keep.items() if not keep.all()] == [
        ("bn3", [5])
    ]


def test_norms_are_paired_by_the_data_and_not_by_order():
    """In a pre-activation block the norm before a convolution reads the stream; the one behind it judges its filters."""
    with seeded(generator(0)):
        net = build("preact_resnet18", width=8, classes=3, in_channels=1)
        randomise_norms(net)
    with torch.no_grad():
        net.get_parameter("layer1.0.bn2.weight")[1] = 60.0
    repaired = clp(net, make_images(6, 0), u=2.2, generator=generator(0))
    cut = {site: (~keep).nonzero().flatten().tolist() for site, keep in repaired.mask.keep.items() if not keep.all()}
    assert cut["layer1.0.bn2"] == [1]
    assert "layer2.0.bn1" not in repaired.mask.keep
    (note,) = [note for note in repaired.notes if "not judged" in note]
    assert "layer2.0.bn1" in note
    assert "layer1.0.bn2" not in note


@pytest.mark.parametrize("u", [-0.1, float("nan")])
def test_u_out_of_range(u, tiny, images):
    with pytest.raises(MethodError, match=r"^u must lie in \[0, 1000000"):
        clp(tiny(), images, u=u, generator=generator(0))


def test_a_network_without_convolutions_is_refused(images):
    net = nn.Sequential(nn.Flatten(), nn.Linear(144, 8), nn.ReLU(), nn.Linear(8, 3))
    with pytest.raises(MethodError, match=r"^clp needs a network with convolutions, got one without; use another method$"):
        clp(net, images, generator=generator(0))
