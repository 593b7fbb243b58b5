"""Train a policy for the method ``onp`` on the victims of a plan.

    secateur bench run plans/onp-policy.cpu.toml --data cifar10.npz
    OMP_NUM_THREADS=1 python scripts/train_onp_policy.py plans/onp-policy.cpu.toml --data cifar10.npz --games 1500

plays on all victims of the plan in turn, with every set of proxies in turn, so that the policy learns to use what it is given,
and writes ``policy.json``, ``policy.safetensors`` and ``provenance.json`` (victims, settings, the learning). Killed, the same
command goes on after the last update (``--progress``). The victims are one's own, and their triggers known: the reward counts
attack success itself (on clean images with the trigger; no test image is used), so that the policy learns which signs of a
backdoor to believe. It is shown the signs alone.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path

import torch

import secateur
from secateur.bench.nodes import Node, expand
from secateur.bench.plan import read_plan
from secateur.bench.source import digest
from secateur.bench.store import Store
from secateur.data import load_data, load_trigger
from secateur.models import load_bundle
from secateur.repair.onp.env import Pruning
from secateur.repair.onp.features import ablations
from secateur.repair.onp.layers import layers
from secateur.repair.onp.onp import ACCURATE, board, seek
from secateur.repair.onp.policy import Policy
from secateur.repair.onp.ppo import Learner, train
from secateur.repair.onp.saved import PRETRAINED, save_policy
from secateur.repair.onp.signs import clean_errors, triggered
from secateur.state import generator, seeded

SETS = (  # signs, and whether ablations are told
    (("trigger", "unlearned"), True), (("trigger", "unlearned", "noise"), True), (("unlearned", "noise"), True),
    (("unlearned", "noise"), False), (("unlearned",), True), (("trigger",), False),
)  # fmt: skip


def main() -> None:
    """Train and write a policy."""
    given = arguments()
    plan = read_plan(given.plan).with_data(given.data)
    graph, store = expand(plan, digest), Store(given.store)
    victims = [node for node in graph.nodes.values() if node.stage == "victim"]
    envs = [env for victim in victims for env in boards(victim, store, given)]
    random = generator(given.seed)
    with seeded(random):
        learner = Learner(Policy(width=given.width), lr=given.lr)
    start, settings = time.monotonic(), {name: value for name, value in vars(given).items() if name in SETTINGS}

    def tell(done: int, means: dict[str, float]) -> None:
        shown = ", ".join(f"{name} {value:.3f}" for name, value in means.items() if name not in ("games", "evaluations"))
        print(f"{done} games, {time.monotonic() - start:.0f} s: {shown}", flush=True)

    history = train(
        learner, envs, games=given.games, at_once=len(SETS) * 2, on_update=tell, progress=given.progress,
        run=repr(settings | {"games": None}), generator=random,
    )  # fmt: skip
    save_policy(learner.policy, given.output)
    record = {
        "secateur": secateur.__version__,
        "torch": torch.__version__,
        "plan": plan.name,
        "victims": {victim.key: f"{victim.args['model']} {victim.args['kwargs']}, {victim.label}" for victim in victims},
        "settings": settings,
        "proxies": ["+".join(names) + (" ablated" if single else "") for names, single in SETS],
        "history": {name: [round(entry[name], 4) for entry in history] for name in history[0]},
    }
    lines = (f" {json.dumps(name)}: {json.dumps(value)}" for name, value in record.items())
    (given.output / "provenance.json").write_text("{\n" + ",\n".join(lines) + "\n}\n", "utf-8")


SETTINGS = "games", "images", "drop", "bonus", "lr", "width", "degree", "seed"


def arguments() -> argparse.Namespace:
    """Return what the command line says."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("plan", type=Path)
    parser.add_argument("--data", help="images instead of the plan's")
    parser.add_argument("--store", type=Path, default=Path("secateur-store"))
    parser.add_argument("--progress", type=Path, default=Path("onp-policy.progress"))
    parser.add_argument("-o", "--output", type=Path, default=PRETRAINED)
    parser.add_argument("--games", type=int, default=1500)
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--drop", type=float, default=0.1)
    parser.add_argument("--bonus", type=float, default=1.0)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--degree", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def boards(victim: Node, store: Store, given: argparse.Namespace) -> Iterator[Pruning]:
    """Yield the games of a victim, one for each of `SETS`."""
    folder, data = store.folder(victim.key), store.folder(victim.parents["data"])
    model, clean = load_bundle(folder / "model"), load_data(data / "clean.npz")
    random = generator(given.seed)
    drawn = torch.randperm(len(clean), generator=random)
    few, more = clean.subset(drawn[: given.images]), clean.subset(drawn[: ACCURATE * given.images])
    found = layers(model, clean.shape, degree=given.degree)
    wanted = sorted({name for names, _ in SETS for name in names})
    signs = dict(zip(wanted, seek(model, clean, few, wanted, precision="bfloat16", generator=random)[0], strict=True))
    ablated = {sign.name: ablations(sign, found, "weight") for sign in (clean_errors(model, few), *signs.values())}
    goal = (lambda mask: 0.0) if victim.method == "none" else triggered(model, few, [load_trigger(folder / "trigger")])
    error, rules = clean_errors(model, more), {"drop": given.drop, "bonus": given.bonus, "goal": goal}
    for names, single in SETS:
        own = [signs[name] for name in names]
        yield board(error, found, own, ablated=ablated if single else None, **rules)
    print(f"{victim.label} is ready", flush=True)


if __name__ == "__main__":
    main()
