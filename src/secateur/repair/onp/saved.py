"""Policies as files: ``policy.json`` says what one looks at, ``policy.safetensors`` has its weights. Nothing in them runs."""

from __future__ import annotations

import json
from pathlib import Path

import safetensors.torch

from ...errors import ModelError
from ...models.files import one_line, read_bytes
from ...models.weights import assign, read_safetensors
from .env import CONTEXT
from .features import NAMES
from .policy import Policy

FORMAT = 1
PRETRAINED = Path(__file__).parent / "pretrained"  # by scripts/train_onp_policy.py
WIDEST = 4096


def save_policy(policy: Policy, folder: str | Path) -> None:
    """Write a policy into ``folder``, made if need be, replacing one that is there."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    record = {"format": FORMAT, "width": policy.width, "nodes": NAMES, "game": CONTEXT}
    (folder / "policy.json").write_text(json.dumps(record, indent=1) + "\n", "utf-8")
    state = {name: value.detach().cpu().contiguous() for name, value in policy.state_dict().items()}
    (folder / "policy.safetensors").write_bytes(safetensors.torch.save(state))


def load_policy(folder: str | Path) -> Policy:
    """Read the policy in ``folder``.

    Raises:
        ModelError: There is none, it is damaged, or it looks at other features than this version has.
    """
    folder = Path(folder)
    try:
        record = json.loads(read_bytes(folder / "policy.json").decode("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"no readable policy in {folder} ({one_line(error)}); name a folder with policy.json") from None
    wanted = {"format": FORMAT, "nodes": list(NAMES), "game": list(CONTEXT)}
    if not isinstance(record, dict) or {name: record.get(name) for name in wanted} != wanted:
        raise ModelError(f"the policy in {folder} looks at other features than this version of secateur; train it anew")
    width = record.get("width")
    if not isinstance(width, int) or not 1 <= width <= WIDEST:
        raise ModelError(f"the policy in {folder} must have a width of 1 to {WIDEST}")
    policy = Policy(width=width)
    assign(policy, read_safetensors(folder / "policy.safetensors"), f"the policy in {folder}")
    return policy.requires_grad_(True)
