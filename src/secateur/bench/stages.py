"""What the nodes of a plan do. Each stage writes files into its own folder and returns numbers for its ``result.json``.

A repair reads the victim's bundle and the clean images; test images and trigger reach the measuring stage alone.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from .. import runs
from ..architectures import is_reference
from ..data import count_shared, load_data, load_trigger, save_npz, save_trigger, split_clean, stratified
from ..errors import DataError, InconclusiveError, ModelError
from ..intake import load, read
from ..measure import correct, cost, evaluate, wilson
from ..measure.adversarial import ThreatModel, craft
from ..methods import Kind, get
from ..models import Classifier, load_bundle, read_arch, save
from ..poison import train_victim
from ..poison.common import poison, unpoisoned
from ..poison.retuning import retuned_success
from ..prune import apply_mask
from ..prune.mask import hard
from ..recipe import read_recipe
from ..runs.evading import adaptive_attack
from ..state import batch_size, generator
from ..types import ImageSet, Poisoning, Rate
from .choices import CHECKPOINT, NONE
from .nodes import Node
from .oracle import choose, load_path, save_path
from .plan import RETUNED
from .source import content
from .store import read_config, read_result

ATTACKED = 250  # images at once
MOST_SHARED = 0.01  # share of the test images that may be seen before: real data sets have a few duplicates


@dataclass(frozen=True)
class Work:
    """What a stage is given.

    Attributes:
        node: What to do.
        folder: Where to write; becomes the node's folder when the stage returns.
        parents: Role -> folder of the node that plays it.
        source: ``train`` and ``test`` -> what `load_data` reads; sha256 -> where that file lies, or ``file.py:make`` with that
            code of the user's own.
        checkpoint: A file that outlives a killed attempt, to resume long training from; its folder is the node's own.
    """

    node: Node
    folder: Path
    parents: Mapping[str, Path]
    source: Mapping[str, str]
    checkpoint: Path

    @property
    def settings(self) -> dict[str, Any]:
        """The method's settings, files by where they lie."""
        files = {digest: where for digest, where in self.source.items() if digest not in ("train", "test")}
        return {
            name: files.get(value, value) if isinstance(value, str) else value
            for name, value in self.node.args["settings"].items()
        }

    @property
    def generator(self) -> torch.Generator:
        """A generator of this stage's own at the node's seed: the same for every method, so that comparisons are paired."""
        return generator_of(self.node)


def generator_of(node: Node) -> torch.Generator:
    """Return the generator that a node's randomness comes from."""
    digest = hashlib.sha256(f"{node.stage} {node.seed}".encode()).digest()
    return generator(int.from_bytes(digest[:7], "big"))


def data(work: Work) -> dict[str, Any]:
    """Share the images out: clean ones for the defender, the rest for the victim, test images for measuring."""
    clean, rest = _split(work.source["train"], work.node.args, work.generator)
    test = load_data(work.source["test"], limit=work.node.args["test_limit"])
    shared = count_shared(test, clean, rest)
    if shared > MOST_SHARED * len(test):
        raise DataError(f"{shared} of {len(test)} test images are also training or clean images; give others in [data]")
    save_npz(clean, work.folder / "clean.npz")
    save_npz(test, work.folder / "test.npz")
    parts = {"clean": clean, "train": rest, "test": test}
    facts = {name: {"n": len(part), "per_class": list(part.per_class()), "sha256": part.sha256} for name, part in parts.items()}
    return {**facts, "test_images_seen_before": shared}


def victim(work: Work) -> dict[str, Any]:
    """Poison the training images and train a network on them, or let an attacker who controls training do it."""
    if work.node.args["model"] == CHECKPOINT:
        return _checkpoint(work)
    args, random = work.node.args, work.generator
    images = _training_images(work)
    if work.node.method == NONE:
        poisoning = Poisoning(None, images, unpoisoned(images))
    else:
        poisoning = get("backdoor", work.node.method).load()(images, **work.settings, generator=random)
    kwargs = dict(args["kwargs"])
    arch = work.source[kwargs.pop("sha256")] if is_reference(args["model"]) else args["model"]
    network = runs.new_network(poisoning.data, arch, kwargs=kwargs, generator=random).to(work.node.device)
    recipe = read_recipe(args["recipe"])
    state, notes = random.get_state(), []
    given: dict[str, Any] = {"generator": random, "checkpoint": work.checkpoint, "on_note": notes.append}
    try:
        model, trigger = train_victim(poisoning, network, recipe, **given)
    except ModelError as error:
        if "cannot resume" not in str(error):
            raise
        shutil.rmtree(work.checkpoint.parent)  # damaged when a machine went down: nothing but time is lost
        random.set_state(state)
        model, trigger = train_victim(poisoning, network, recipe, **given)
    assert isinstance(model, Classifier)
    save(model.cpu(), work.folder / "model")
    facts: dict[str, Any] = {"images": len(images), "poisoned": int(poisoning.poisoned.sum())}
    if notes:
        facts["notes"] = notes
    if trigger is not None:
        save_trigger(trigger, work.folder / "trigger")
        facts["trigger"] = asdict(runs.how_visible(trigger, images))
    return facts


def _checkpoint(work: Work) -> dict[str, Any]:
    """Take somebody's finished network; nothing of its file is run."""
    said = dict(work.node.args["kwargs"])
    images = load_data(work.parents["data"] / "test.npz")
    digest = said.pop("sha256")
    path = Path(work.source[digest])
    if not path.exists():
        raise DataError(f"there is no checkpoint at {path}; put the file with sha256 {digest} there")
    if content(path) != digest:
        raise DataError(f"the checkpoint at {path} changed after the plan was read; run the plan again")
    reading = read(path)
    if reading.format != "bundle":  # which says its own
        said["classes"] = images.classes
    model = load(reading, **said)
    runs.check_fit(model, images)
    save(model, work.folder / "model")
    return {"origin": model.origin}


def repair(work: Work) -> dict[str, Any]:
    """Repair a network with the clean images."""
    return _defend(work, "repair")


def compress(work: Work) -> dict[str, Any]:
    """Compress a network with the clean images."""
    return _defend(work, "compressor")


def evade(work: Work) -> dict[str, Any]:
    """Make adversarial images on a network, with every gradient that it has to be attacked with, and keep them in 8 bit."""
    test, count = load_data(work.parents["data"] / "test.npz"), work.node.args["images"]
    if count is not None and count < len(test):
        test = test.subset(stratified(test.y, [count], generator=work.generator)[0])
    model, settings = _model(work), work.settings
    attack, random = adaptive_attack(get("evasion", work.node.method), settings), work.generator
    threat = ThreatModel(eps=settings["eps"], norm=settings["norm"])
    size, stored, refused = batch_size(ATTACKED), [], 0
    for x, y in zip(test.x.split(size), test.y.split(size), strict=True):
        made = craft(attack, model, x, y, threat, random)
        stored.append(made.stored)
        refused += int((~made.admissible).sum())
    save_npz(replace(test, x=torch.cat(stored)), work.folder / "adversarial.npz")
    return {"n": len(test), "refused": refused, "threat": str(threat)}


def measure(work: Work) -> dict[str, Any]:
    """Measure a network on the test images, with the trigger if there is one, and on adversarial images if there are any."""
    model = _model(work)
    test = load_data(work.parents["data"] / "test.npz")
    trigger = load_trigger(work.parents["trigger"]) if "trigger" in work.parents else None
    rates = {name: asdict(rate) for name, rate in vars(evaluate(model, test, trigger=trigger)).items() if rate is not None}
    if work.node.args.get("retuned") and trigger is not None:
        clean = load_data(work.parents["data"] / "clean.npz")
        rates[RETUNED] = asdict(retuned_success(model, clean, test, trigger, generator=work.generator))
    rates |= {name: asdict(rate) for name, rate in _under_attack(work, model).items()}
    size = {name: value for name, value in asdict(cost(model, test.shape)).items() if value is not None}
    return {"rates": rates, "cost": size}


def _under_attack(work: Work, model: Classifier) -> dict[str, Rate]:
    """Return accuracy on the images made on each network, and on the worst of those made on others."""
    attacked = {
        metric: load_data(folder / "adversarial.npz")
        for metric, folder in work.parents.items()
        if metric not in ("model", "data", "trigger", "parent")
    }
    if "transfer_twin" in attacked and torch.equal(attacked["transfer_twin"].x, attacked["white_box"].x):
        del attacked["transfer_twin"]  # what was done draws nothing: the twin is the network itself
    right = {metric: correct(model, images) for metric, images in attacked.items()}
    others = [answers for metric, answers in right.items() if metric != "white_box"]
    if "transfer_parent" in right:
        right["worst_transfer"] = torch.stack(others).all(dim=0)
        right["to_parent"] = correct(_model(work, "parent"), attacked["white_box"])
    return {metric: wilson(int(answers.sum()), len(answers)) for metric, answers in right.items()}


def oracle(work: Work) -> dict[str, Any]:
    """Measure the cut that somebody who knows the trigger would choose among those that a repair considered."""
    model = _model(work, "victim")
    test = load_data(work.parents["data"] / "test.npz")
    masks = load_path(work.parents["repair"])
    trigger = load_trigger(work.parents["trigger"])
    chosen, found = choose(model, masks, test, trigger, drop=work.node.args["drop"], generator=work.generator)
    rates = {name: asdict(rate) for name, rate in vars(found).items() if rate is not None}
    size = {
        name: value for name, value in asdict(cost(apply_mask(model, masks[chosen]), test.shape)).items() if value is not None
    }
    return {"rates": rates, "cost": size}


def _defend(work: Work, kind: Kind) -> dict[str, Any]:
    args = work.node.args
    model = _model(work)
    clean = _clean(work, args["clean"])
    method = get(kind, work.node.method)
    given = {"suspect": _suspect(work, len(clean))} if "suspect" in method.needs else {}
    done = method.load()(model, clean, **given, **work.settings, generator=work.generator)
    step = {"method": method.name, "version": method.version, "args": dict(args["settings"])}
    save(done.model.cpu(), work.folder / "model", masks=hard(done.mask), steps=[step])
    if args.get("path"):
        save_path(model, done, work.folder)
    return {"clean": len(clean), "log": dict(done.log), "notes": list(done.notes)}


def _suspect(work: Work, size: int) -> ImageSet:
    """Return training images of a victim of which as many carry its trigger as of those that it was trained on."""
    images = _training_images(work)
    [index] = stratified(images.y, [size], generator=work.generator)
    images = images.subset(index, "suspect images")
    victim = read_config(work.parents["model"])
    if victim.method == NONE:
        return images
    chosen, trigger = victim.args["settings"], load_trigger(work.parents["model"] / "trigger")
    clean_label = chosen.get("clean_label", get("backdoor", victim.method).access == "images")
    return poison(images, trigger, chosen["rate"], work.generator, clean_label=clean_label).data


def _model(work: Work, role: str = "model") -> Classifier:
    """Load the network that this node works on; a user's own code runs only if the plan names it."""
    folder = work.parents[role] / "model"
    factory = read_arch(folder)["arch"]["factory"]
    code = work.source.get(factory["sha256"]) if factory else None
    return load_bundle(folder, factory=code).to(work.node.device)


def _split(path: str, args: Mapping[str, Any], random: torch.Generator) -> tuple[ImageSet, ImageSet]:
    images = load_data(path, limit=args["train_limit"])
    return split_clean(images, args["reserve"], generator=random)


def _training_images(work: Work) -> ImageSet:
    """Draw the victim's images again from the source and check that they are those the data node saw."""
    folder = work.parents["data"]
    node = read_config(folder)
    wanted = read_result(folder)["values"]["train"]["sha256"]
    _, rest = _split(work.source["train"], node.args, generator_of(node))
    if rest.sha256 != wanted:
        raise DataError(f"the images at {work.source['train']} changed after the data node ran; use a new store")
    return rest


def _clean(work: Work, share: float) -> ImageSet:
    """Return the defender's share of the images held out for it."""
    folder = work.parents["data"]
    images = load_data(folder / "clean.npz")
    node, sizes = read_config(folder), read_result(folder)["values"]
    if share == node.args["reserve"]:
        return images
    size = round(share * (sizes["clean"]["n"] + sizes["train"]["n"]))
    if size < 1:
        raise InconclusiveError(f"a clean share of {share:g} is no image at all; raise it")
    [index] = stratified(images.y, [size], generator=generator_of(node))
    return images.subset(index)
