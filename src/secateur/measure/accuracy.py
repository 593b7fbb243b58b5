"""Clean accuracy, attack success and accuracy on triggered images."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .. import state
from ..errors import DataError, InconclusiveError
from ..state import evaluating
from ..types import ImageSet, Rate, Trigger
from .adversarial import answers_of, logits_of
from .intervals import wilson


@dataclass(frozen=True)
class Evaluation:
    """What a network does with clean and with triggered images.

    Attributes:
        accuracy: Share of all images answered rightly.
        attack_success: Share of the eligible triggered images that get the label the attacker wants (ASR).
        triggered_accuracy: Share of the same images that still get their true label.
    """

    accuracy: Rate
    attack_success: Rate | None = None
    triggered_accuracy: Rate | None = None


def predict(model: nn.Module, data: ImageSet, *, trigger: Trigger | None = None, batch_size: int = 512) -> Tensor:
    """Return the predicted class of each image, int64 ``(n,)``, with the trigger put on first if one is given.

    The network runs in eval mode and is left as it was. An answer that is not finite is -1, which is never right.

    Raises:
        ModelError: The network does not accept images of this shape or answers with too few classes.
    """
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    found = []
    with evaluating(model):
        for x, _ in data.batches(state.batch_size(batch_size)):
            shown = x if trigger is None else trigger.apply(x.to(device))
            found.append(answers_of(logits_of(model, shown, len(data.classes), batch_size=batch_size)).cpu())
    return torch.cat(found) if found else torch.empty(0, dtype=torch.int64)


def correct(model: nn.Module, data: ImageSet) -> Tensor:
    """Return which images are answered rightly, bool ``(n,)``."""
    return predict(model, data) == data.y


def evaluate(model: nn.Module, data: ImageSet, *, trigger: Trigger | None = None) -> Evaluation:
    """Measure a network on test images: one forward for the clean rates, one more for both triggered rates.

    The attack success rate and the triggered accuracy count the same images: those of a source class whose true label is
    not the one the attacker wants.

    Args:
        model: Takes images in [0, 1]; left as it was.
        data: Labelled test images.
        trigger: Without one the triggered rates are None.

    Raises:
        DataError: The trigger does not fit the images.
        InconclusiveError: No image is eligible for the trigger.
        ModelError: The network does not accept the images.
    """
    if trigger is not None and isinstance(trigger.target, int) and not 0 <= trigger.target < len(data.classes):
        raise DataError(f"the trigger's target must lie in [0, {len(data.classes) - 1}], got {trigger.target}")
    known = trigger.params.get("classes", len(data.classes)) if trigger is not None and trigger.target == "next" else None
    if known not in (None, len(data.classes)):
        raise DataError(f"the trigger's 'next' is for {known} classes, the images have {len(data.classes)}")
    hits = correct(model, data)
    accuracy = wilson(int(hits.sum()), len(data))
    if trigger is None:
        return Evaluation(accuracy)
    eligible = trigger.eligible(data.y)
    shown = data.subset(eligible)
    if len(shown) == 0:
        raise InconclusiveError("no test image is eligible for the trigger: all belong to its target or to no source class")
    answers = predict(model, shown, trigger=trigger)
    return Evaluation(
        accuracy,
        attack_success=wilson(int((answers == trigger.labels(shown.y)).sum()), len(shown)),
        triggered_accuracy=wilson(int((answers == shown.y).sum()), len(shown)),
    )
