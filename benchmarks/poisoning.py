"""Poison a training set and load it once: images a second, beside BackdoorBench's own pipeline on the same images.

    python benchmarks/poisoning.py --peer BACKDOORBENCH --data cifar10.npz:train [--attacks badnets blended sig]
        [--images 50000] [--repeats 3] [--peer-python PYTHON]
    python benchmarks/poisoning.py --data cifar10.npz:train

The first form compares, the second only times our attacks that need no gradient.

``BACKDOORBENCH`` is a checkout of SCLBD/BackdoorBench. Its own code runs, from its own folder, with its own settings: PIL
images are poisoned one by one (`prepro_cls_DatasetBD_v2`), written as PNG files into a temporary folder and read back, then
come resize, random crop, flip, `ToTensor` and `Normalize` of torchvision and a torch `DataLoader` with the number of workers of
its configuration (4) or with none. On our side the attack gets the uint8 tensor, and batches are made as `secateur.train` makes
them: drawn, cropped, flipped, turned into floats, normalised by the `Classifier`. Both start with the same images in memory,
poison the same number of them, make batches of the same size and compute with one thread; the peer's workers are processes
besides. Every row is a fresh process, and imports are not in the times.

Seconds are wall time, and behind it the CPU seconds of the process and its workers: where a process alone takes much longer
than its CPU seconds, the machine was not idle, and only CPU seconds can be compared.

``PYTHON`` needs what the peer imports: torch, torchvision, imageio, tqdm, pyyaml, matplotlib, scipy, kornia, pytorch_wavelets,
opencv-python-headless, setuptools<81. This script installs nothing. Where torchvision was built for another torch than the one
installed its compiled operators are missing. Transforms of PIL images need none, so two are declared by name, which is enough
to import it.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

# Freed memory stays with the process, as it does while a real network trains, whose heap does not shrink between batches.
os.environ |= {"OMP_NUM_THREADS": "1", "MALLOC_TRIM_THRESHOLD_": "1000000000", "MALLOC_MMAP_THRESHOLD_": "1000000000"}
BATCH = 128
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.247, 0.243, 0.261)  # the peer's for CIFAR-10
PEERS = {"badnets": "badnet", "blended": "blended", "sig": "sig"}
SETTINGS: dict[str, dict[str, Any]] = {"sig": {"rate": 1.0}}  # the peer's rate is of the whole set: all of one class in ten
WITHOUT_GRADIENTS = "badnets", "blended", "sig", "bpp", "adaptive-blend", "adaptive-patch", "ssba"
Row = dict[str, float]


def ours(data: Path, attack: str, workers: int) -> Row:
    """Poison with our attack, then make the batches of one epoch as our training loop does."""
    import torch
    from torch import nn

    from secateur.data import augment, load_data
    from secateur.methods import get
    from secateur.models import Classifier
    from secateur.state import generator
    from secateur.types import ImageSet, to_float

    images, random = load_data(data), generator(0)
    method = get("backdoor", attack).load()
    net = Classifier(nn.Identity(), classes=images.classes, input_shape=images.shape, mean=MEAN, std=STD)

    def epoch(given: ImageSet) -> None:
        for index in torch.randperm(len(given), generator=random).tensor_split(math.ceil(len(given) / BATCH)):
            x, _ = given.x.index_select(0, index), given.y.index_select(0, index)
            net(to_float(augment(x, ("crop", "flip"), generator=random)))

    start = clocks()
    poisoning = method(images, **SETTINGS.get(attack, {}), generator=generator(0))
    between = clocks()
    epoch(poisoning.data)
    return row(start, between, clocks(), images=len(images), poisoned=int(poisoning.poisoned.sum()), memory=peak())


def peer(data: Path, attack: str, workers: int) -> Row:
    """Poison and load with the peer's code; the current folder is the peer's."""
    import numpy as np
    import torch
    import yaml

    if not hasattr(np, "float"):
        np.float = float  # type: ignore[attr-defined]  # which the peer uses and numpy no longer has
    library = declare_operators()
    sys.path.insert(0, os.getcwd())
    generate = importlib.import_module("utils.aggregate_block.bd_attack_generate")
    transforms = importlib.import_module("utils.aggregate_block.dataset_and_transform_generate")
    dataset = importlib.import_module("utils.bd_dataset_v2")
    index = importlib.import_module("utils.backdoor_generate_poison_index")
    from torch.utils.data import DataLoader
    from torchvision.datasets import CIFAR10

    settings: dict[str, Any] = {"img_size": (32, 32, 3), "num_classes": 10}
    for name in ("prototype/cifar10.yaml", f"{PEERS[attack]}/default.yaml"):
        settings |= yaml.safe_load(Path("config/attack", name).read_text("utf-8"))
    args = Namespace(**settings)
    arrays = np.load(data)
    clean = CIFAR10.__new__(CIFAR10)  # its own reading of files is not measured
    clean.data, clean.targets = arrays["x"], arrays["y"].tolist()
    clean.transform = clean.target_transform = None
    with tempfile.TemporaryDirectory() as folder:
        start = clocks()
        change, _ = generate.bd_attack_img_trans_generate(args)
        relabel = generate.bd_attack_label_trans_generate(args)
        chosen = index.generate_poison_index_from_label_transform(
            clean.targets, label_transform=relabel, train=True, pratio=args.pratio, clean_label=attack == "sig"
        )
        poisoned = dataset.prepro_cls_DatasetBD_v2(
            clean,
            poison_indicator=chosen,
            bd_image_pre_transform=change,
            bd_label_pre_transform=relabel,
            save_folder_path=f"{folder}/bd_train_dataset",
        )
        between = clocks()
        transform = transforms.get_transform(args.dataset, *args.img_size[:2], train=True)
        loader = DataLoader(
            dataset.dataset_wrapper_with_transform(poisoned, transform, None),
            batch_size=BATCH,
            shuffle=True,
            drop_last=True,
            num_workers=workers,
        )
        memory = 0.0
        for i, _ in enumerate(loader):
            if workers and i == len(loader) // 2:
                memory = shared()
        end = clocks()
    del library
    assert torch.get_num_threads() == 1
    return row(start, between, end, images=len(clean), poisoned=int(chosen.sum()), memory=memory or peak())


def declare_operators() -> Any:
    """Let torchvision be imported; return what keeps the declarations alive."""
    import torch

    try:
        importlib.import_module("torchvision")
    except RuntimeError:
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        importlib.import_module("torchvision")
        return library
    return None


def clocks() -> tuple[float, float]:
    """Return wall time, and CPU time of this process and of those that it started and that have ended, in seconds."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.perf_counter(), time.process_time() + children.ru_utime + children.ru_stime


def row(start: tuple[float, float], between: tuple[float, float], end: tuple[float, float], **more: float) -> Row:
    """Return one measurement."""
    return {
        "poison": between[0] - start[0],
        "poison, CPU": between[1] - start[1],
        "load": end[0] - between[0],
        "load, CPU": end[1] - between[1],
        **more,
    }


def peak() -> float:
    """Return the peak memory of this process, in MiB."""
    [line] = [line for line in Path("/proc/self/status").read_text("utf-8").splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) / 1024


def shared() -> float:
    """Return the memory that this process and its children have together now, in MiB, shared pages counted once."""
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text("utf-8").split()
    total = 0
    for process in (str(os.getpid()), *children):
        lines = Path("/proc", process, "smaps_rollup").read_text("utf-8").splitlines()
        total += sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return total / 1024


def measure(python: str, side: str, folder: str, data: Path, attack: str, workers: int) -> Row:
    """Run one side in a process of its own."""
    here = str(Path(__file__).parent.resolve())
    code = (
        f"import sys; sys.path.insert(0, {here!r}); import json, pathlib, poisoning; "
        f"print(json.dumps(poisoning.{side}(pathlib.Path({str(data)!r}), {attack!r}, {workers})))"
    )
    done = subprocess.run([python, "-c", code], cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{side} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def median(rows: list[Row]) -> Row:
    """Return the median of each number."""
    return {name: statistics.median(row[name] for row in rows) for name in rows[0]}


def compare(given: Namespace, data: Path) -> None:
    """Measure both sides by turns, and print them and their ratio."""
    for attack in given.attacks:
        sides = {
            "ours": (sys.executable, "ours", ".", 0),
            "peer, no workers": (given.peer_python, "peer", given.peer, 0),
            "peer, 4 workers": (given.peer_python, "peer", given.peer, 4),
        }
        rows: dict[str, list[Row]] = {name: [] for name in sides}
        for _ in range(given.repeats):
            for name, (python, side, folder, workers) in sides.items():
                rows[name].append(measure(python, side, folder, data, attack, workers))
        found = {name: median(each) for name, each in rows.items()}
        print(f"{attack}: {found['ours']['images']:.0f} images, median of {given.repeats}")
        for name, one in found.items():
            n, poison, load = one["images"], one["poison"], one["load"]
            print(f"  {name}: {one['poisoned']:.0f} images poisoned, {one['memory']:.0f} MiB")
            for part, seconds, busy in (
                ("poison", poison, one["poison, CPU"]),
                ("epoch", load, one["load, CPU"]),
                ("together", poison + load, one["poison, CPU"] + one["load, CPU"]),
            ):
                print(f"    {part:<8} {seconds:7.2f} s (CPU {busy:6.2f} s) {n / seconds:9,.0f} images/s")
        for clock, what in (("", "wall"), (", CPU", "CPU")):
            parts = {name: (one[f"poison{clock}"], one[f"load{clock}"]) for name, one in found.items()}
            poison, load = parts.pop("ours")
            faster = min(parts.values(), key=sum)
            ratios = faster[0] / poison, faster[1] / load, sum(faster) / (poison + load)
            print("  {}: peer over ours: poison {:.1f}, epoch {:.1f}, together {:.1f}".format(what, *ratios), flush=True)


def alone(data: Path, attack: str, workers: int) -> Row:
    """Poison with our attack's default settings, then put its trigger on every image."""
    from secateur.data import load_data
    from secateur.methods import get
    from secateur.poison.common import edited
    from secateur.state import generator

    images, method = load_data(data), get("backdoor", attack).load()
    start = clocks()
    poisoning = method(images, generator=generator(0))
    between = clocks()
    edited(images.x, poisoning.trigger.apply)
    return row(start, between, clocks(), images=len(images), poisoned=int(poisoning.poisoned.sum()), memory=peak())


def swift(given: Namespace, data: Path) -> None:
    """Time our attacks that need no gradient."""
    from secateur.methods import table

    known = {row.name for row in table("backdoor")}
    for attack in (name for name in WITHOUT_GRADIENTS if name in known):
        one = median([measure(sys.executable, "alone", ".", data, attack, 0) for _ in range(given.repeats)])
        print(
            f"{attack:<16} {one['poisoned']:5.0f} of {one['images']:.0f} images changed in {one['poison']:6.2f} s "
            f"(CPU {one['poison, CPU']:5.2f} s); its trigger on all {one['load']:6.2f} s (CPU {one['load, CPU']:5.2f} s); "
            f"{one['memory']:.0f} MiB",
            flush=True,
        )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--peer")
    parser.add_argument("--peer-python", default=sys.executable)
    parser.add_argument("--attacks", nargs="+", default=list(PEERS), choices=list(PEERS))
    parser.add_argument("--images", type=int)
    parser.add_argument("--repeats", type=int, default=3)
    given = parser.parse_args()
    from secateur.data import load_data, save_npz

    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "images.npz"
        save_npz(load_data(given.data, limit=given.images), data)
        if given.peer:
            compare(given, data)
        else:
            swift(given, data)


if __name__ == "__main__":
    main()
