"""Repair a backdoored network: CPU seconds, beside BackdoorBench's own code on the same weights and images.

    python benchmarks/repairs.py --peer BACKDOORBENCH --data cifar10.npz:train [--peer-python PYTHON]
        [--only fp clp anp rnp sweep] [--weights FILE] [--train 4000] [--clean 2500] [--batch 64] [--steps 2]
        [--tested 192]

``BACKDOORBENCH`` is a checkout of SCLBD/BackdoorBench whose own functions run from its own folder, on the CPU; ``PYTHON``
is as for `poisoning.py`, with pandas besides. Both sides have the same PreAct-ResNet18 and the same images, and their answers
are compared before anything is timed. The network is read from ``FILE``, a state dict. Where there is no such file it is
trained in one epoch on ``--train`` images, a tenth of them with the BadNets patch, and written there: enough for times, not for
a victim. CLP also gets a plain ResNet-18 with drawn weights, where the peer pairs convolutions and norms rightly.

Every row is a fresh process with one thread. Seconds are CPU seconds of that process without its imports, so that a busy
machine matters less. The peer is too slow to run whole: a part of it runs, and the rest follows from the number of images that
it puts through the network (`PASSES`, read off its code and configuration).

    fp     `FinePrune.defense` up to its fine-tuning, with three cut points on few test images, against
           `fine_pruning(epochs=0)`. Both must rank and answer alike; rankings are compared by the peer's rule, a signed mean.
    clp    `CLP_prune` with one u, against `lipschitz` once and the cuts; the fastest of three. Its sweep is 22 times that.
    anp    `mask_train` and `test`, against `anp`. Ours tries every cut that there is, which no real run does.
    rnp    an epoch of each trainer, and `test`, against `rnp`; every cut likewise.
    sweep  ours alone: masks of single channels of the last block's norms, by `Incremental` and by full forwards.

The peer's reading of images is not compared (`poisoning.py` does that): it gets tensors or, in fp, whose method wants data sets
of its own kind, PIL images in memory. Its plots and log files are left out of the times.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import logging
import math
import os
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

from poisoning import MEAN, STD, declare_operators

os.environ |= {"OMP_NUM_THREADS": "1", "MALLOC_TRIM_THRESHOLD_": "1000000000", "MALLOC_MMAP_THRESHOLD_": "1000000000"}
TEST, TRIGGERED = 10_000, 9_000  # the peer's test images of CIFAR-10, without and with the trigger
PASSES = {
    "fp, a cut": TEST + 2 * TRIGGERED,  # accuracy, attack success, robust accuracy
    "anp": 4 + 1 + 19 + 1,  # while training, before the cuts, one for each threshold, at the end
    "rnp, without epochs": 1 + 19 + 2 + 1,  # before the cuts, thresholds, default threshold (two cuts), at the end
}
ITERATIONS, EPOCHS, UNLEARNED, JUDGED = 2000, 20, 500, 0.25
REPEATS = 3  # of what takes less than a second; the fastest counts
U, ALL_U = 3.0, [i / 2 for i in range(21)]
Result = dict[str, Any]
KEPT: list[Any] = []  # declarations that must outlive the function that makes them


# ---------------------------------------------------------------- both sides


@contextlib.contextmanager
def counted() -> Iterator[Callable[[], int]]:
    """Count the images that enter a network: what its first convolution is given."""
    from torch import nn
    from torch.nn.modules.module import register_module_forward_pre_hook

    seen = 0

    def add(module: nn.Module, given: Any) -> None:
        nonlocal seen
        if isinstance(module, nn.Conv2d) and module.in_channels == 3:
            seen += len(given[0])

    handle = register_module_forward_pre_hook(add)
    try:
        yield lambda: seen
    finally:
        handle.remove()


def timed(work: Callable[[], object]) -> float:
    """Return the CPU seconds of a piece of work."""
    start = time.process_time()
    work()
    return time.process_time() - start


def arrays(given: Result, part: str) -> tuple[Any, Any]:
    """Return a part of the images as the uint8 array ``(n, h, w, c)`` and labels."""
    import numpy as np

    data = np.load(given["data"])
    which = slice(*given[part])
    return data["x"][which], data["y"][which]


def compare(logits: Any, given: Result) -> float:
    """Return how far the logits of the first clean images are from those of our network in the file."""
    import torch

    return float((logits - torch.load(given["logits"], weights_only=True)).abs().max())


# ---------------------------------------------------------------- the peer


def peer_modules(*names: str) -> list[Any]:
    """Import modules of the peer, whose folder is the current one."""
    import numpy as np

    if not hasattr(np, "float"):
        np.float = float  # type: ignore[attr-defined]  # which the peer uses and numpy no longer has
    KEPT.append(declare_operators())
    sys.path.insert(0, os.getcwd())
    logging.disable(logging.CRITICAL)
    return [importlib.import_module(name) for name in names]


def peer_network(name: str, weights: str) -> Any:
    """Return the peer's network with these weights, in eval mode."""
    import torch

    [generate] = peer_modules("utils.aggregate_block.model_trainer_generate")
    net = generate.generate_cls_model(name, 10)
    net.load_state_dict(torch.load(weights, weights_only=True))
    return net.eval()


def peer_tensors(given: Result, part: str) -> tuple[Any, Any]:
    """Return normalised images as the peer's transform makes them, and labels."""
    import torch

    x, y = arrays(given, part)
    mean, std = (torch.tensor(values).reshape(3, 1, 1) for values in (MEAN, STD))
    return (torch.from_numpy(x).permute(0, 3, 1, 2).float() / 255 - mean) / std, torch.from_numpy(y)


def peer_distance(given: Result, net: Any) -> float:
    """Return how far the peer's answers are from ours."""
    import torch

    with torch.no_grad():
        return compare(net(peer_tensors(given, "clean")[0][:16]), given)


class Pictures:
    """What the peer takes for a data set: PIL images and labels."""

    def __init__(self, x: Any, y: Any) -> None:
        from PIL import Image

        self.images, self.labels = [Image.fromarray(image) for image in x], y.tolist()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self.images[index], self.labels[index]


class EnoughError(Exception):
    """The part of the peer that is measured is over."""


def peer_fp(given: Result) -> Result:
    """Prune with the peer's `FinePrune.defense`, three cut points on a few test images."""
    import torch

    fp, transforms, dataset = peer_modules(
        "defense.fp", "utils.aggregate_block.dataset_and_transform_generate", "utils.bd_dataset_v2"
    )
    net = peer_network("preactresnet18", given["weights"]).requires_grad_(False)
    change = transforms.get_transform("cifar10", 32, 32, train=False)
    clean, tested = Pictures(*arrays(given, "clean")), Pictures(*arrays(given, "tested"))
    wrap = dataset.dataset_wrapper_with_transform
    defender = fp.FinePrune()
    defender.netC = net
    defender.attack_result = {
        "clean_train": wrap(clean, change),
        "clean_test": wrap(tested, change),
        "bd_test": wrap(dataset.prepro_cls_DatasetBD_v2(tested), change),
    }
    sort, marks, accuracies = torch.argsort, [], []

    def noted_sort(values: Any) -> Any:
        marks.append((time.process_time(), seen(), sort(values)))
        return marks[0][2]

    def over(*_: Any) -> None:
        raise EnoughError

    recorder = fp.Metric_Aggregator

    class Recorder(recorder):  # type: ignore[misc, valid-type]
        def __call__(self, row: Result) -> None:
            accuracies.append((row["num_pruned"], row["test_acc"]))
            super().__call__(row)

    torch.argsort, fp.argparser_opt_scheduler, fp.Metric_Aggregator = noted_sort, over, Recorder  # type: ignore[assignment]
    fp.general_plot_for_epoch = lambda *_, **__: None
    distance = peer_distance(given, net)
    with tempfile.TemporaryDirectory() as folder, counted() as seen:
        defender.args = Namespace(
            device="cpu", model="preactresnet18", batch_size=256, num_workers=0, pin_memory=False, non_blocking=False,
            ratio=1.0, index=None, once_prune_ratio=1 / 3, acc_ratio=math.inf, defense_save_path=folder,
        )  # fmt: skip
        start = time.process_time()
        with contextlib.suppress(EnoughError):
            defender.defense()
        end, images = time.process_time(), seen()
    [(ranked, first, order)] = marks
    return {
        "distance": distance,
        "rank": ranked - start,
        "ranked images": first,
        "test": end - ranked,
        "tested images": images - first,
        "order": order.tolist(),
        "accuracies": accuracies,
    }


def peer_clp(given: Result) -> Result:
    """Prune with the peer's `CLP_prune`, one u, on both networks."""
    from torch import nn

    [clp] = peer_modules("defense.clp")
    clp.CLP_prune(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)), U)  # what is loaded at the first use is an import
    found: Result = {}
    for name, weights in (("preactresnet18", given["weights"]), ("resnet18", given["plain"])):
        net = peer_network(name, weights)
        if name == "preactresnet18":
            found["distance"] = peer_distance(given, net)
        copies = [deepcopy(net) for _ in range(REPEATS - 1)]
        seconds = min(timed(lambda each=each: clp.CLP_prune(each, U)) for each in (net, *copies))
        pruned = {site: (norm.weight == 0).nonzero().flatten().tolist() for site, norm in norms(net).items()}
        found[name] = {"seconds": seconds, "pruned": pruned}
    return found


def norms(net: Any) -> dict[str, Any]:
    """Return the batch-norms of a network."""
    from torch import nn

    return {name: module for name, module in net.named_modules() if isinstance(module, nn.BatchNorm2d)}


def batches(given: Result, count: int) -> list[tuple[Any, Any]]:
    """Return batches of clean images, as the peer's loaders make them."""
    x, y = peer_tensors(given, "clean")
    size = given["batch"]
    assert len(x) >= count * size
    return [(x[i * size : (i + 1) * size], y[i * size : (i + 1) * size]) for i in range(count)]


def evaluated(given: Result, net: Any, test: Callable[..., Any]) -> float:
    """Return what the peer's test costs, seconds an image."""
    import torch

    class Loader(list):  # type: ignore[type-arg]
        dataset = range(given["tested"][1] - given["tested"][0])

    x, y = peer_tensors(given, "tested")
    loader = Loader(zip(x.split(256), y.split(256), strict=True))
    start = time.process_time()
    test(Namespace(device="cpu"), model=net, criterion=torch.nn.CrossEntropyLoss(), data_loader=loader)
    return (time.process_time() - start) / len(x)


def peer_anp(given: Result) -> Result:
    """Train masks with the peer's `mask_train` and test with its `test`."""
    import torch

    [anp] = peer_modules("defense.anp")
    plain = peer_network("preactresnet18", given["weights"])
    state = plain.state_dict()
    net = anp.get_anp_network("preactresnet18", num_classes=10, norm_layer=anp.anp_model.NoisyBatchNorm2d)
    anp.load_state_dict(net, orig_state_dict=state)
    distance = peer_distance(given, net.eval())
    anp.args = args = Namespace(device="cpu", anp_eps=0.4, anp_steps=1, anp_alpha=0.2)
    named = dict(net.named_parameters())
    masks = torch.optim.SGD([p for name, p in named.items() if "neuron_mask" in name], lr=0.2, momentum=0.9)
    noise = torch.optim.SGD([p for name, p in named.items() if "neuron_noise" in name], lr=0.4)
    train = lambda loader: anp.mask_train(args, net, torch.nn.CrossEntropyLoss(), masks, noise, loader)  # noqa: E731
    given_batches = batches(given, given["steps"] + 1)
    train(given_batches[:1])
    with counted() as seen:
        start = time.process_time()
        train(given_batches[1:])
        step = (time.process_time() - start) / given["steps"]
    return {
        "distance": distance,
        "step": step,
        "forwards a step": seen() / given["steps"] / given["batch"],
        "neurons": sum(group.numel() for group in masks.param_groups[0]["params"]),
        "test": evaluated(given, plain, anp.test),
    }


def peer_rnp(given: Result) -> Result:
    """Train one epoch with each of the peer's trainers, and test."""
    import torch

    [rnp] = peer_modules("defense.rnp")
    plain = peer_network("preactresnet18", given["weights"])
    state = {name: value.clone() for name, value in plain.state_dict().items()}
    found: Result = {"distance": peer_distance(given, plain)}
    loader = [(x, y, y, torch.zeros_like(y), y) for x, y in batches(given, given["steps"])]
    for phase, trainer, norm in (
        ("unlearn", lambda net: rnp.UnlearnModelTrainer(net, 0.2), None),
        ("recover", lambda net: rnp.RecoverModelTrainer(net, 0.2), rnp.rnp_model.MaskBatchNorm2d),
    ):
        net = rnp.get_rnp_network("preactresnet18", num_classes=10, norm_layer=norm)
        rnp.load_state_dict(net, orig_state_dict=state)
        learned = [p for name, p in net.named_parameters() if phase == "unlearn" or "neuron_mask" in name]
        decay = 5e-4 if phase == "unlearn" else 0.0
        optimizer = torch.optim.SGD(learned, lr=0.01 if phase == "unlearn" else 0.2, momentum=0.9, weight_decay=decay)
        worker = trainer(net)
        worker.set_with_dataloader(
            loader, {}, torch.nn.CrossEntropyLoss(), optimizer, None, torch.device("cpu"), False, 0, "", "rnp"
        )
        start = time.process_time()
        worker.train_one_epoch_on_mix(verbose=1)
        found[phase] = (time.process_time() - start) / (len(loader) * given["batch"])
    return found | {"test": evaluated(given, plain, rnp.test)}


# ---------------------------------------------------------------- ours


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


def ours_fp(given: Result) -> Result:
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


def ours_clp(given: Result) -> Result:
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


def ours_anp(given: Result) -> Result:
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


def ours_rnp(given: Result) -> Result:
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


def ours_sweep(given: Result) -> Result:
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


# ---------------------------------------------------------------- preparing, measuring, printing


def ours_prepare(given: Result) -> Result:
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


def measure(python: str, name: str, folder: str, given: Result) -> Result:
    """Run one row in a process of its own."""
    here = str(Path(__file__).parent.resolve())
    code = (
        f"import sys; sys.path.insert(0, {here!r}); import json, repairs; import torch; torch.set_num_threads(1); "
        f"print(); print(json.dumps(repairs.{name}(json.loads(sys.stdin.read()))))"
    )
    done = subprocess.run(
        [python, "-c", code], cwd=folder, input=json.dumps(given), capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"{name} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


class Bench:
    """Runs rows of both sides and prints what follows from them."""

    def __init__(self, options: Namespace, given: Result) -> None:
        self.options, self.given = options, given

    def ours(self, name: str, **more: Any) -> Result:
        """Run a row of ours."""
        return measure(sys.executable, f"ours_{name}", ".", self.given | more)

    def peer(self, name: str) -> Result:
        """Run a row of the peer's; its network must answer as ours does."""
        found = measure(self.options.peer_python, f"peer_{name}", self.options.peer, self.given)
        assert found["distance"] < 1e-3, f"the networks' answers differ by {found['distance']}"
        return found

    def fp(self) -> None:
        """Compare the prune phase of Fine-Pruning."""
        peer = self.peer("fp")
        ours = self.ours("fp", order=peer["order"])
        order, shares = peer["order"], ours["own"]
        own = sorted(range(len(order)), key=ours["means"].__getitem__)
        cuts = [max(pruned - 1, 0) for pruned in range(0, len(order), math.ceil(len(order) * 0.01))]  # it cuts one less
        same = sum(set(own[:cut]) == set(order[:cut]) for cut in cuts)
        assert same == len(cuts), f"the channels cut are equal at {same} of {len(cuts)} cut points only"
        for pruned, accuracy in peer["accuracies"]:
            assert abs(accuracy - ours["accuracies"][max(pruned - 1, 0)]) < 1e-9, f"the accuracies at {pruned} differ"
        stops = next((i + 1 for i, cut in enumerate(cuts) if abs(shares[cut] - shares[0]) >= 0.1 * shares[0]), len(cuts))
        clean, each = self.options.clean, ours["seconds"] / ours["images"]
        ran = peer["ranked images"], peer["tested images"], peer["rank"] + peer["test"]
        print("fp: the peer ran {} + {} images in {:.1f} s, ours all of its {} ".format(*ran, ours["images"]), end="")
        print(f"({ours['cut']:.0f} channels cut); by one rule the same channels go at all {len(cuts)} cut points")
        for label, count in (("up to where the peer's rule stops", stops), ("all cut points", len(cuts))):
            images = clean + count * PASSES["fp, a cut"]
            whole = peer["rank"] + (images - clean) * peer["test"] / peer["tested images"]
            row(f"fp prune phase, {count} cut points: {label}", whole, ours["seconds"], 50)
            print(f"  images {images:,} : {ours['images']:,} = {images / ours['images']:.0f}x; ", end="")
            print(f"an image {1e3 * whole / images:.1f} : {1e3 * each:.1f} ms = {whole / images / each:.2f}x")

    def clp(self) -> None:
        """Compare the scores of CLP."""
        peer, ours = self.peer("clp"), self.ours("clp")
        for theirs, name in (("preactresnet18", "preact_resnet18"), ("resnet18", "resnet18_imagenet")):
            one, own = peer[theirs], ours[name]
            pairs = [{(site, channel) for site, cut in side["pruned"].items() for channel in cut} for side in (one, own)]
            apart = len(pairs[0] ^ pairs[1])
            print(f"clp, {name}: u = {U:g} cuts {len(pairs[0])} : {len(pairs[1])} channels, {apart} of them on one side only")
            assert name == "preact_resnet18" or (pairs[0] and not apart), "where the peer pairs rightly the channels are equal"
            row(f"clp scores, {name}, one u", one["seconds"], own["one"])
            row(f"clp scores, {name}, {len(ALL_U)} u and the default", (len(ALL_U) + 1) * one["seconds"], own["all"], 50)

    def anp(self) -> None:
        """Compare ANP end to end."""
        peer, ours = self.peer("anp"), self.ours("anp")
        tests, choice = self.choices("anp", peer, ours, PASSES["anp"])
        print(
            f"  {self.options.steps} steps after a first, {peer['forwards a step']:.0f} forwards each at the peer's, ", end=""
        )
        print(f"{peer['neurons']} : {ours['neurons']} neurons")
        row(f"anp, a step of {self.options.batch} images", peer["step"], ours["step"])
        for batch in (128, 256):
            steps = ITERATIONS * batch / self.options.batch
            row(f"anp, {ITERATIONS} steps of {batch} images", steps * peer["step"] + tests, steps * ours["step"] + choice, 2)

    def rnp(self) -> None:
        """Compare RNP end to end."""
        peer, ours = self.peer("rnp"), self.ours("rnp")
        for phase in ("unlearn", "recover"):
            row(f"rnp, {phase} 1000 images", 1e3 * peer[phase], 1e3 * ours[phase])
        for epochs in (EPOCHS, 1):
            tests, choice = self.choices("rnp", peer, ours, epochs + EPOCHS + PASSES["rnp, without epochs"])
            work = [UNLEARNED * (epochs * side["unlearn"] + EPOCHS * side["recover"]) for side in (peer, ours)]
            row(f"rnp, {epochs} + {EPOCHS} epochs", work[0] + tests, work[1] + choice, 10)

    def choices(self, name: str, peer: Result, ours: Result, passes: int) -> tuple[float, float]:
        """Print and return what the peer's tests and our choice of the number cost."""
        judged = round(self.options.clean * JUDGED)
        tests, choice = passes * (TEST + TRIGGERED) * peer["test"], ours["tried"] * judged * ours["mask"]
        print(f"{name}: ours tried {ours['tried']} cuts, all there are, on {ours['judged']} images")
        row(
            f"{name}, tests ({passes} x {TEST + TRIGGERED} images) : choice (at most {ours['tried']} x {judged})", tests, choice
        )
        return tests, choice

    def sweep(self) -> None:
        """Compare masks in the last stage with full forwards."""
        found = self.ours("sweep")
        for net in ("resnet20", "preact_resnet18"):
            sites = {name: one for name, one in found.items() if name.startswith(net)}
            for name, one in sites.items():
                row(f"a mask, {name}, {self.options.tested} images", one["full"], one["quick"])
            full, quick = (sum(one["channels"] * one[kind] for one in sites.values()) for kind in ("full", "quick"))
            masks, first = sum(one["channels"] for one in sites.values()), max(one["full"] for one in sites.values())
            print(f"  masks a second, with the pass that fills the memory: {masks / full:.2f} : {masks / (quick + first):.2f}")
            row(f"sweep, {net}, all {masks} channels", full, quick + first, 20)


def row(what: str, peer: float, ours: float, wanted: float = 0) -> None:
    """Print a row of the table."""
    least = f"at least {wanted:g}x" if wanted else ""
    print(f"| {what} | {peer:,.2f} s | {ours:,.2f} s | {peer / ours:.1f}x | {least} |", flush=True)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--peer-python", default=sys.executable)
    work = ["fp", "clp", "anp", "rnp", "sweep"]
    parser.add_argument("--only", nargs="+", default=work, choices=work)
    parser.add_argument("--weights")
    parser.add_argument("--train", type=int, default=4000)
    parser.add_argument("--clean", type=int, default=2500)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--tested", type=int, default=192)
    options = parser.parse_args()
    from secateur.data import load_data, save_npz, stratified
    from secateur.state import generator

    with tempfile.TemporaryDirectory() as folder:
        images = load_data(options.data)
        parts = {"clean": options.clean, "tested": options.tested, "train": options.train}
        drawn = stratified(images.y, list(parts.values()), generator=generator(0))
        import torch

        data = Path(folder) / "images.npz"
        save_npz(images.subset(torch.cat(drawn)), data)
        given: Result = {"data": str(data), "batch": options.batch, "steps": options.steps}
        end = 0
        for part, size in parts.items():
            given[part], end = (end, end + size), end + size
        for name in ("weights", "plain", "logits"):
            given[name] = str(Path(folder) / f"{name}.pt")
        if options.weights:
            given["weights"] = str(Path(options.weights).resolve())
        bench = Bench(options, given)
        made = bench.ours("prepare")
        print(f"victim: {100 * made['accuracy']:.0f} % of {options.tested} images right; {made['seconds']:.0f} s of training")
        print("| what | peer | ours | ratio | wanted |\n|---|---|---|---|---|", flush=True)
        for name in options.only:
            getattr(bench, name)()


if __name__ == "__main__":
    main()
