"""Evaluations of a policy per second, with the incremental evaluator and by full forwards.

    OMP_NUM_THREADS=1 python benchmarks/policy.py [--images 500] [--games 20]

A new policy of `onp` plays whole games on a ResNet-20 of width 16 with drawn weights, from the last layer to the first. After
each move that cuts something, and at the start, clean accuracy and two signs of 128 images each are told for the whole mask so
far. The same games are played twice, once with `Incremental` and once with a full forward for each mask; every reward must be
the same. Seconds are those of the processor, medians of three runs.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from torch import Tensor, nn

from secateur.forward import Incremental
from secateur.measure import predict
from secateur.models.registry import build
from secateur.repair.onp.env import Pruning
from secateur.repair.onp.features import features
from secateur.repair.onp.layers import layers
from secateur.repair.onp.policy import Policy
from secateur.repair.onp.ppo import play
from secateur.repair.onp.signs import Sign
from secateur.state import generator
from secateur.types import ImageSet

CLASSES = tuple("abcdefghij")
SHOWN = 128


class Full:
    """Answers of variants by a full forward each."""

    def __init__(self, base: nn.Module, images: ImageSet) -> None:
        self.base, self.images = base, images

    def predict(self, values: dict[str, Tensor]) -> Tensor:
        """Return the answers with some parameters replaced."""
        parameters = dict(self.base.named_parameters())
        kept = {name: parameters[name].detach().clone() for name in values}
        with torch.no_grad():
            for name, value in values.items():
                parameters[name].copy_(value)
            answers = predict(self.base, self.images)
            for name, value in kept.items():
                parameters[name].copy_(value)
        return answers


def images(number: int, seed: int) -> ImageSet:
    """Return images and labels that are drawn."""
    random = generator(seed)
    x = torch.randint(256, (number, 3, 32, 32), dtype=torch.uint8, generator=random)
    return ImageSet(x, torch.randint(10, (number,), generator=random), CLASSES)


def games(net: nn.Module, number: int, shown: int, *, full: bool) -> tuple[float, int, list[float]]:
    """Return seconds, evaluations and rewards of some games."""
    signs = [Sign("error", net, images(shown, 0))]
    signs += [
        Sign(name, net, images(SHOWN, seed), torch.zeros(SHOWN).long()) for seed, name in enumerate(("unlearned", "noise"), 1)
    ]
    found = layers(net, (3, 32, 32))
    nodes = features(net, images(SHOWN, 3), found, signs, {})
    for sign in signs:
        kind = Full if full else Incremental
        sign._evaluator = kind(net, sign.images)  # type: ignore[assignment]
    env = Pruning(net, found, nodes, signs[0], signs[1:])
    torch.manual_seed(0)
    policy, random, rewards = Policy(), generator(0), []
    start, before = time.process_time(), env.evaluations
    for _ in range(number):
        rewards += play(env, policy, generator=random).rewards
    return time.process_time() - start, env.evaluations - before, rewards


def main() -> None:
    """Play the same games both ways and print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--games", type=int, default=20)
    given = parser.parse_args()
    torch.manual_seed(0)
    net = build("resnet20", classes=10, width=16).eval()
    rates: dict[bool, list[float]] = {False: [], True: []}
    for _ in range(3):
        played = {full: games(net, given.games, given.images, full=full) for full in rates}
        assert played[False][2] == played[True][2], "the rewards differ"
        for full, (seconds, evaluations, _) in played.items():
            rates[full].append(evaluations / seconds)
    quick, slow = (statistics.median(rates[full]) for full in (False, True))
    print(f"| incremental | full forwards | ratio |\n|---|---|---|\n| {quick:.1f}/s | {slow:.1f}/s | {quick / slow:.1f}x |")


if __name__ == "__main__":
    main()
