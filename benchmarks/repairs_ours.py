"""The rows of `repairs.py` that run secateur."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from poisoning import MEAN, STD
from repairs_common import ALL_U, JUDGED, REPEATS, Result, U, arrays, counted, norms, timed


def victim(given: Result, name: str = "preact_resnet18") -> Any:
    """Return our network with the weights of the file, in eval mode."""
    import torch

    from secateur.data.cifar import CIFAR10
    from secateur.models import Classifier, build

    net = build(name, classes=10)
    if name != "resnet20":
        net.load_state_dict(torch.load(given["weights" if name == "preact_resnet18" else "plain"], weights_only=True))
    return Classifier(net, classes=CIFAR10, input_shape=(3, 32, 32), mean=MEAN, std=STD).eval()


def image_set(given: Result, part: str, limit: int | None = None) -> Any:
    """Return a part of the images, or its first ones, as ours."""
    import torch

    from secateur.data.cifar import CIFAR10
    from secateur.types import ImageSet

    x, y = (values[:limit] for values in arrays(given, part))
    return ImageSet(torch.from_numpy(x).permute(0, 3, 1, 2).contiguous(), torch.from_numpy(y), CIFAR10, part)


def fp(given: Result) -> Result:
    """Run Fine-Pruning without its fine-tuning; then rank by the peer's rule and test at its cut points."""
    import torch

    from secateur.forward import Incremental
    from secateur.prune.readers import last_channels
    from secateur.repair.fine_pruning import fine_pruning
    from secateur.state import generator

    model, clean = victim(given), image_set(given, "clean")
    with counted() as seen:
        start = time.process_time()
        repaired = fine_pruning(model, clean, epochs=0, generator=generator(0))
        seconds, images = time.process_time() - start, seen()
    signed, total = [], 0
    hook = model.net.linear.register_forward_pre_hook(lambda _, inputs: signed.append(inputs[0].double().sum(0)))
    with torch.inference_mode():
        for x, _ in clean.batches(512):
            model(x)
            total += len(x)
    hook.remove()
    means = torch.stack(signed).sum(0) / total
    order = torch.tensor(given["order"])
    place = last_channels(model, clean.shape)
    assert place.reader == "linear"
    sweep = Incremental(model, image_set(given, "tested"))
    answers = sweep.sweep("linear", [channel.reshape(1) for channel in order]) == sweep.data.y
    own = Incremental(model, clean).sweep("linear", [channel.reshape(1) for channel in order]) == clean.y
    return {
        "seconds": seconds,
        "images": images,
        "cut": repaired.log["channels_cut"],
        "means": means.tolist(),
        "accuracies": answers.double().mean(1).tolist(),
        "own": own.double().mean(1).tolist(),
    }


def clp(given: Result) -> Result:
    """Score channels once and cut for every u."""
    from secateur.prune import Outliers, rank
    from secateur.prune.lipschitz import lipschitz
    from secateur.state import generator

    clean = image_set(given, "tested")
    rank(lipschitz(victim(given, "resnet20"), clean, generator=generator(0)))  # what is loaded at the first use is an import
    found: Result = {}
    for name in ("preact_resnet18", "resnet18_imagenet"):
        model = victim(given, name)
        ranking = rank(lipschitz(model, clean, generator=generator(0)), order="largest")
        cut = ranking.cut(Outliers(U))
        pruned = {site: (~keep).nonzero().flatten().tolist() for site, keep in cut.keep.items()}

        def judge(values: Iterable[float], model: Any = model) -> None:
            ranking = rank(lipschitz(model, clean, generator=generator(0)), order="largest")
            for u in values:
                ranking.cut(Outliers(u))

        one, every = (min(timed(lambda u=u: judge(u)) for _ in range(REPEATS)) for u in ([U], ALL_U))
        found[name] = {"one": one, "all": every, "pruned": pruned}
    return found


def chosen(given: Result, ticks: list[float], repaired: Any, images: int) -> Result:
    """Return what the choice of the number cost: from the last step to the end."""
    judged = round(images * JUDGED)
    tried = len(repaired.path)
    return {"judged": judged, "tried": tried, "mask": (time.process_time() - ticks[-1]) / tried / judged}


def anp(given: Result) -> Result:
    """Run our ANP for a few steps, and all its cuts."""
    from secateur.repair.anp import anp
    from secateur.state import generator

    clean = image_set(given, "clean", 2 * given["batch"])
    ticks: list[float] = []
    repaired = anp(
        victim(given), clean, iterations=given["steps"] + 1, batch_size=given["batch"], drop=1.0, generator=generator(0),
        on_step=lambda *_: ticks.append(time.process_time()),
    )  # fmt: skip
    found = chosen(given, ticks, repaired, len(clean))
    return found | {"step": (ticks[-1] - ticks[0]) / given["steps"], "neurons": _ranked(repaired)}


def _ranked(repaired: Any) -> int:
    return sum(len(keep) for keep in repaired.path[-1].mask.keep.values())


def rnp(given: Result) -> Result:
    """Run our RNP with one epoch of each phase, and all its cuts."""
    from secateur.repair.rnp import rnp
    from secateur.state import generator

    size, steps = given["batch"], given["steps"]
    clean = image_set(given, "clean", math.ceil(size * steps / (1 - JUDGED)))
    ticks: list[float] = []
    repaired = rnp(
        victim(given), clean, images=size * steps, unlearn_epochs=1, epochs=1, batch_size=size, drop=1.0,
        generator=generator(0), on_step=lambda *_: ticks.append(time.process_time()),
    )  # fmt: skip
    found = chosen(given, ticks, repaired, len(clean))
    return found | {
        "unlearn": (ticks[steps - 1] - ticks[0]) / (steps - 1) / size,
        "recover": (ticks[-1] - ticks[steps]) / (steps - 1) / size,
        "neurons": _ranked(repaired),
    }


def sweep(given: Result) -> Result:
    """Mask single channels of the last block's norms, incrementally and in full."""
    import torch

    from secateur.forward import Incremental
    from secateur.models import core
    from secateur.prune.mask import apply_mask, masked_values
    from secateur.types import ChannelMask, to_float

    torch.manual_seed(0)
    found: Result = {}
    data = image_set(given, "tested")
    batch = to_float(data.x).contiguous(memory_format=torch.channels_last)
    for name, block in (("resnet20", "layer3.2"), ("preact_resnet18", "layer4.1")):
        model = victim(given, name)
        if name == "resnet20":
            settle(model, data)
        evaluator = Incremental(model, data, batch_size=len(data))
        for site in (f"{block}.bn1", f"{block}.bn2"):
            channels = len(core(model).get_parameter(f"{site}.weight"))
            masks = [ChannelMask({site: torch.arange(channels) != channel}) for channel in range(min(channels, 24))]
            values = [masked_values(model, mask) for mask in masks]
            evaluator.predict(values[0])
            start = time.process_time()
            quick = [evaluator.predict(value) for value in values[1:]]
            mask_seconds = (time.process_time() - start) / len(quick)
            full = []
            for mask in masks[1:4]:
                net = apply_mask(model, mask).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
                start = time.process_time()
                with torch.inference_mode():
                    answers = net(batch).argmax(1)
                full.append(time.process_time() - start)
                assert torch.equal(answers, quick[len(full) - 1]), f"{name}, {site}: the predictions differ"
            found[f"{name}, {site}"] = {"quick": mask_seconds, "full": sum(full) / len(full), "channels": channels}
    return found


def settle(model: Any, data: Any) -> None:
    """Give drawn weights running statistics, and scales that differ."""
    import torch

    from secateur.types import to_float

    with torch.no_grad():
        for norm in norms(model).values():
            norm.weight.copy_(torch.randn(len(norm.weight)).mul(0.3).exp())
            norm.bias.normal_(0, 0.1)
            norm.momentum = None  # the mean over what is shown
        model.train()(to_float(data.x[:128]))
    model.eval()


def prepare(given: Result) -> Result:
    """Write both state dicts and our answers; train the victim where there is none."""
    import torch

    from secateur.models import Classifier, build
    from secateur.types import to_float

    torch.manual_seed(0)
    seconds = 0.0
    if not Path(given["weights"]).exists():
        start = time.process_time()
        trained(given)
        seconds = time.process_time() - start
    data = image_set(given, "tested")
    plain = Classifier(build("resnet18_imagenet", classes=10), classes=data.classes, input_shape=data.shape, mean=MEAN, std=STD)
    settle(plain, data)
    torch.save(plain.net.state_dict(), given["plain"])
    with torch.inference_mode():
        model = victim(given)
        torch.save(model(to_float(image_set(given, "clean").x[:16])), given["logits"])
        right = float((model(to_float(data.x)).argmax(1) == data.y).float().mean())
    return {"seconds": seconds, "accuracy": right}


def trained(given: Result) -> None:
    """Train a victim for one epoch and write its weights."""
    import torch

    from secateur.methods import get
    from secateur.models import Classifier, build, core
    from secateur.state import generator
    from secateur.train import Recipe, train

    images = image_set(given, "train")
    poisoned = get("backdoor", "badnets").load()(images, rate=0.1, generator=generator(0)).data
    model = Classifier(build("preact_resnet18"), classes=images.classes, input_shape=images.shape, mean=MEAN, std=STD)
    recipe = Recipe(epochs=1, batch_size=64, lr=0.05, schedule="triangle", milestones=(0.3,), augment=("flip",))
    torch.save(core(train(model, poisoned, recipe, generator=generator(0))).state_dict(), given["weights"])
