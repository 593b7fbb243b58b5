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
import json
import math
import subprocess
import sys
import tempfile
from argparse import Namespace
from pathlib import Path
from typing import Any

from repairs_common import ALL_U, EPOCHS, ITERATIONS, JUDGED, PASSES, TEST, TRIGGERED, UNLEARNED, Result, U


def measure(python: str, side: str, name: str, folder: str, given: Result) -> Result:
    """Run one row of a side, ``ours`` or ``peer``, in a process of its own."""
    here = str(Path(__file__).parent.resolve())
    code = (
        f"import sys; sys.path.insert(0, {here!r}); import json, repairs_{side}; import torch; torch.set_num_threads(1); "
        f"print(); print(json.dumps(repairs_{side}.{name}(json.loads(sys.stdin.read()))))"
    )
    done = subprocess.run(
        [python, "-c", code], cwd=folder, input=json.dumps(given), capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"{name} of {side} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


class Bench:
    """Runs rows of both sides and prints what follows from them."""

    def __init__(self, options: Namespace, given: Result) -> None:
        self.options, self.given = options, given

    def ours(self, name: str, **more: Any) -> Result:
        """Run a row of ours."""
        return measure(sys.executable, "ours", name, ".", self.given | more)

    def peer(self, name: str) -> Result:
        """Run a row of the peer's; its network must answer as ours does."""
        found = measure(self.options.peer_python, "peer", name, self.options.peer, self.given)
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
