"""Quantise a network: accuracy at 8, 6 and 4 bits, the integer runtime beside its twin, bytes, and latency beside float32.

    python benchmarks/int8.py MODEL --data cifar10.npz:test --calibrate cifar10.npz:train [--arch resnet20 --mean ... --std ...]
        [--images 2000] [--calibration 512] [--repeats 200] [--prune 0.5] [--parts accuracy runtime latency]

``MODEL`` is a bundle or a checkpoint. Images are drawn by class with seed 0; those to calibrate on are not among those measured
(the script draws both from ``--data`` where ``--calibrate`` is not given). Latency is the median over ``--repeats`` batches,
float32 and int8 in turn so that both see the same machine, one thread, after ten batches that do not count; beside it the
quartiles. With ``--prune`` all of it is done again with the smallest share of all weights (l1, over the whole network) set to
0, without fine-tuning.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"

import torch

from secateur.compress import Runtime, agreement, encode, export_onnx, kernels, quantise, safe_weight_bits
from secateur.data import load_data
from secateur.data.splits import stratified
from secateur.intake import load
from secateur.measure import evaluate
from secateur.models import Classifier
from secateur.prune import Fraction, apply_mask, prunable_layers, select
from secateur.state import generator
from secateur.types import ImageSet, Scores

BATCHES = (1, 64)
WARM_UP = 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--data", required=True)
    parser.add_argument("--calibrate")
    parser.add_argument("--arch")
    parser.add_argument("--mean", type=float, nargs="+")
    parser.add_argument("--std", type=float, nargs="+")
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--calibration", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=200)
    parser.add_argument("--prune", type=float)
    parser.add_argument("--parts", nargs="+", default=["accuracy", "runtime", "latency"])
    options = parser.parse_args()
    torch.set_num_threads(1)
    known = {name: getattr(options, name) for name in ("arch", "mean", "std") if getattr(options, name)}
    model = load(options.model, **known)
    test, clean = _images(options, model)
    print(f"torch {torch.__version__}; {safe_weight_bits()[1]}; {len(clean)} images to calibrate, {len(test)} to measure")
    report(model, clean, test, options, "dense")
    if options.prune:
        report(pruned(model, options.prune), clean, test, options, f"{options.prune:.0%} of the weights cut")


def _images(options: argparse.Namespace, model: Classifier) -> tuple[ImageSet, ImageSet]:
    size = model.input_shape[1:]
    data = load_data(options.data, size=size)
    if options.calibrate is None:
        rows = stratified(data.y, [options.images, options.calibration], generator=generator(0))
        return data.subset(rows[0]), data.subset(rows[1])
    other = load_data(options.calibrate, size=size)
    [first] = stratified(data.y, [options.images], generator=generator(0))
    [second] = stratified(other.y, [options.calibration], generator=generator(0))
    return data.subset(first), other.subset(second)


def pruned(model: Classifier, share: float) -> Classifier:
    weights = {f"{name}.weight": model.net.get_submodule(name).weight for name in prunable_layers(model)}
    scores = Scores({name: value.detach().abs() for name, value in weights.items()}, "weight")
    return apply_mask(model, select(scores, Fraction(share), scope="global"))


def report(model: Classifier, clean: ImageSet, test: ImageSet, options: argparse.Namespace, name: str) -> None:
    print(f"\n## {name}")
    if "accuracy" in options.parts:
        print(f"float32: accuracy {evaluate(model, test).accuracy}")
        for bits in (8, 6, 4):
            for observer in ("minmax", "percentile"):
                twin = quantise(model, clean, bits=bits, observer=observer)
                print(f"{bits} bits, {observer}: accuracy {evaluate(twin, test).accuracy}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        files = {"float32": model, "int8": quantise(model, clean, weight_bits=safe_weight_bits()[0])}
        made = {kind: export_onnx(network, Path(folder) / f"{kind}.onnx") for kind, network in files.items()}
        sizes = ", ".join(f"{kind} ONNX {found.size_bytes:,}" for kind, found in made.items())
        print(f"bytes: dense float32 {dense(model):,}, {sizes}, encoded {len(encode(model)):,}, "
              f"encoded int8 {len(encode(files['int8'])):,}")  # fmt: skip
        print(f"int8 operations: {', '.join(f'{count} {kind}' for kind, count in kernels(made['int8'].path).items())}")
        runtimes = {kind: Runtime(found.path) for kind, found in made.items()}
        if "runtime" in options.parts:
            for kind, network in files.items():
                print(f"{kind}: {agreement(network, runtimes[kind], test)}", flush=True)
        if "latency" in options.parts:
            for batch in BATCHES:
                print(latency(runtimes, test, batch, options.repeats), flush=True)


def dense(model: Classifier) -> int:
    return sum(value.numel() * value.element_size() for value in model.net.state_dict().values())


def latency(runtimes: dict[str, Runtime], test: ImageSet, batch: int, repeats: int) -> str:
    x = test.x[:batch].float() / 255
    times: dict[str, list[float]] = {kind: [] for kind in runtimes}
    for i in range(repeats + WARM_UP):
        for kind, runtime in runtimes.items():
            start = time.perf_counter()
            runtime(x)
            if i >= WARM_UP:
                times[kind].append(1000 * (time.perf_counter() - start))
    told, medians = [], []
    for kind, values in times.items():
        low, middle, high = statistics.quantiles(values, n=4)
        medians.append(middle)
        told.append(f"{kind} {middle:.2f} ms [{low:.2f}, {high:.2f}]")
    return f"batch {len(x)}: {', '.join(told)}; ratio {medians[0] / medians[1]:.2f}"


if __name__ == "__main__":
    main()
