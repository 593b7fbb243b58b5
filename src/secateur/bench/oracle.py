"""The cut that somebody who knows the trigger would choose: a bound for research tables, and no repair.

Much of this field's literature picks its thresholds so. Here it stands beside the honest choice, under its own label, to show
how much of a result is the choice. Nothing outside ``bench`` imports this module: no repair of the command line can reach it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import safetensors.torch
import torch
from torch import nn

from ..data import stratified
from ..errors import MethodError, check_range
from ..measure import Evaluation, evaluate
from ..prune import apply_mask
from ..prune.mask import hard
from ..types import ChannelMask, HardMask, ImageSet, Repaired, SoftMask, Trigger, WeightMask

AT_MOST = 20  # cuts kept of a path
IMAGES = 1000  # test images that choose
FILE = "path.safetensors"


def save_path(model: nn.Module, repaired: Repaired, folder: Path) -> None:
    """Write at most `AT_MOST` of the cuts that a repair of ``model`` considered, evenly spread, with the first and the last.

    Raises:
        MethodError: The repair considered no cuts, or did more than cut.
    """
    path, mask = [candidate.mask for candidate in repaired.path], hard(repaired.mask)
    if mask is None or not any(each is mask for each in path):
        raise MethodError("this repair considers no cuts: there is nothing to choose from; leave oracle out")
    state, cut = repaired.model.state_dict(), apply_mask(model, mask).state_dict()
    if not all(torch.equal(value, cut[name]) for name, value in state.items()):
        raise MethodError("this repair does more than cut (it may heal): its cuts alone are not its results; leave oracle out")
    packed = {}
    for place, i in enumerate(torch.linspace(0, len(path) - 1, min(AT_MOST, len(path))).round().long().tolist()):
        mask = path[i]
        assert not isinstance(mask, SoftMask)
        kind = "weight" if isinstance(mask, WeightMask) else "channel"
        packed |= {
            f"{place}/{kind}/{name}": keep.cpu().clone(memory_format=torch.contiguous_format)
            for name, keep in mask.keep.items()
        }
    safetensors.torch.save_file(packed, folder / FILE)


def load_path(folder: Path) -> list[HardMask]:
    """Read what `save_path` wrote."""
    kept: dict[int, dict[str, dict[str, torch.Tensor]]] = {}
    for key, keep in safetensors.torch.load_file(folder / FILE).items():
        place, kind, name = key.split("/", 2)
        kept.setdefault(int(place), {}).setdefault(kind, {})[name] = keep
    return [
        WeightMask(kinds["weight"]) if "weight" in kinds else ChannelMask(kinds["channel"]) for _, kinds in sorted(kept.items())
    ]


def choose(
    model: nn.Module, masks: Sequence[HardMask], test: ImageSet, trigger: Trigger, *, drop: float, generator: torch.Generator
) -> tuple[int, Evaluation]:
    """Return the cut of lowest attack success among those whose accuracy on *test* images is within ``drop``.

    They are judged on at most `IMAGES` of the test images; the one chosen is measured on all.

    Args:
        model: The network before any cut; left as it was.
        masks: What a repair considered, before any fine-tuning.
        test: Labelled test images.
        trigger: The attacker's own.
        drop: Accuracy that the cut may cost, in [0, 1].
        generator: Draws the images.

    Returns:
        Which one, and what the network does with it.

    Raises:
        MethodError: ``drop`` is out of range.
    """
    check_range("drop", drop, 0, 1)
    [index] = stratified(test.y, [min(IMAGES, len(test))], generator=generator)
    few = test.subset(index)
    least = evaluate(model, few).accuracy.value - drop - 1e-9
    best, lowest = 0, 2.0
    for i, mask in enumerate(masks):
        found = evaluate(apply_mask(model, mask), few, trigger=trigger)
        assert found.attack_success is not None
        if found.accuracy.value >= least and found.attack_success.value < lowest:
            best, lowest = i, found.attack_success.value
    return best, evaluate(apply_mask(model, masks[best]), test, trigger=trigger)
