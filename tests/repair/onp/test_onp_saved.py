"""Policies as files."""

from __future__ import annotations

import hashlib
import json
import sys

import pytest
import torch

from conftest import make_images
from secateur.errors import ModelError
from secateur.methods import get
from secateur.repair.onp import onp
from secateur.repair.onp.policy import Policy
from secateur.repair.onp.ppo import chances
from secateur.repair.onp.saved import PRETRAINED, load_policy, save_policy
from secateur.state import generator


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(0)
    save_policy(Policy(width=8), tmp_path / "p")
    return tmp_path / "p"


def test_what_is_saved_comes_back(folder):
    torch.manual_seed(0)
    made, found = Policy(width=8), load_policy(folder)
    assert found.width == 8
    for name, value in made.state_dict().items():
        assert torch.equal(found.state_dict()[name], value)
    assert all(parameter.requires_grad for parameter in found.parameters())


def test_a_policy_from_a_file_is_used_as_it_is(victim, folder, monkeypatch):
    """This one prefers what a new one would not."""
    policy = load_policy(folder)
    with torch.no_grad():
        policy.rules.fill_(-5.0)
    save_policy(policy, folder)
    seen = []
    module = sys.modules["secateur.repair.onp.onp"]
    real = module.choose
    monkeypatch.setattr(module, "choose", lambda model, judged, env, chances, **more: seen.append((env, chances)) or real(
        model, judged, env, chances, **more
    ))  # fmt: skip
    clean = make_images(60, 9)
    result = onp(victim.model, clean, proxies="unlearned", policy=str(folder), games=0, images=32, generator=generator(0))
    assert result.history == ()
    [(env, found)] = seen
    for mine, wanted in zip(found, chances(env, policy), strict=True):
        torch.testing.assert_close(mine, wanted)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, "other features"),
        ({"nodes": ["depth"]}, "other features"),
        ({"width": 0}, "a width of 1 to 4096"),
        ({"width": "8"}, "a width of 1 to 4096"),
        ({"width": 10**9}, "a width of 1 to 4096"),
        ({"width": 16}, "must have shape"),
    ],
)
def test_what_does_not_fit_is_refused(folder, change, message):
    record = json.loads((folder / "policy.json").read_text("utf-8"))
    (folder / "policy.json").write_text(json.dumps(record | change), "utf-8")
    with pytest.raises(ModelError, match=message):
        load_policy(folder)


@pytest.mark.parametrize("text", ["", "[]", "{", "[" * 10_000])
def test_a_damaged_record_is_refused(folder, text):
    (folder / "policy.json").write_text(text, "utf-8")
    with pytest.raises(ModelError, match="policy"):
        load_policy(folder)


def test_damaged_or_missing_weights_are_refused(folder, tmp_path):
    (folder / "policy.safetensors").write_bytes(b"nothing")
    with pytest.raises(ModelError, match="not a valid safetensors file"):
        load_policy(folder)
    with pytest.raises(ModelError, match="must be a file, found none"):
        load_policy(tmp_path / "nowhere")


def test_the_policy_that_comes_with_the_package_is_used_and_says_what_it_was_trained_on(victim, monkeypatch):
    record = json.loads((PRETRAINED / "provenance.json").read_text("utf-8"))
    assert record["settings"]["width"] == load_policy(PRETRAINED).width
    assert len(record["victims"]) == 5
    assert record["history"]["games"][-1] == record["settings"]["games"]
    seen, module = [], sys.modules["secateur.repair.onp.onp"]
    real = module.choose
    monkeypatch.setattr(module, "choose", lambda model, judged, env, chances, **more: seen.append((env, chances)) or real(
        model, judged, env, chances, **more
    ))  # fmt: skip
    used = {"proxies": "unlearned", "ablate": False, "games": 0, "images": 32, "epochs": 0}
    onp(victim.model, make_images(60, 9), policy="pretrained", **used, generator=generator(0))
    [(env, found)] = seen
    for mine, wanted in zip(found, chances(env, load_policy(PRETRAINED)), strict=True):
        torch.testing.assert_close(mine, wanted)


def test_another_policy_in_the_package_is_another_version_of_the_method():
    """Plans tell results apart by the version: raise it in methods.py, then change both numbers here."""
    digest = hashlib.sha256((PRETRAINED / "policy.safetensors").read_bytes()).hexdigest()
    assert (get("repair", "onp").version, digest[:16]) == (7, "cef94212758da845")
