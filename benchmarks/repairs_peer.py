"""The rows of `repairs.py` that run BackdoorBench's own functions, from its own folder."""

from __future__ import annotations

import contextlib
import importlib
import logging
import math
import os
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable
from copy import deepcopy
from typing import Any

from poisoning import MEAN, STD, declare_operators
from repairs_common import KEPT, REPEATS, Result, U, arrays, compare, counted, norms, timed


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


def fp(given: Result) -> Result:
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


def clp(given: Result) -> Result:
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


def anp(given: Result) -> Result:
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


def rnp(given: Result) -> Result:
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
