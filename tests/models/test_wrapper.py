from __future__ import annotations

from copy import deepcopy

import pytest
import torch

from secateur.errors import ModelError
from secateur.models import Classifier, build, core


def wrap(**kwargs) -> Classifier:
    return Classifier(build("convnet", width=2), classes=("a", "b"), input_shape=(3, 32, 32), **kwargs).eval()


def test_forward_normalises():
    model = wrap(mean=[0.1, 0.2, 0.3], std=[0.5, 0.25, 2.0])
    x = torch.rand(2, 3, 32, 32)
    mean, std = torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1), torch.tensor([0.5, 0.25, 2.0]).view(3, 1, 1)
    assert torch.equal(model(x), model.net((x - mean) / std))


def test_normalisation_is_not_part_of_the_state_dict():
    assert all(key.startswith("net.") for key in wrap().state_dict())


def test_core_is_the_inner_network():
    model = wrap()
    assert core(model) is model.net
    assert core(model.net) is model.net


def test_deepcopy_shares_nothing():
    model = wrap(arch={"name": "convnet", "kwargs": {"width": 2}})
    twin = deepcopy(model)
    twin.arch["kwargs"]["width"] = 3
    with torch.no_grad():
        twin.net.linear.weight.zero_()
    assert model.arch["kwargs"] == {"width": 2}
    assert bool(model.net.linear.weight.any())
    assert twin.classes == model.classes


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"mean": [0.5]}, "mean must have one value per channel"),
        ({"std": [1.0, 0.0, 1.0]}, "std must be above 0"),
        ({"mean": [0.0, float("nan"), 0.0]}, "mean must be finite"),
    ],
)
def test_wrong_normalisation_is_told(kwargs, message):
    with pytest.raises(ModelError, match=message):
        wrap(**kwargs)
