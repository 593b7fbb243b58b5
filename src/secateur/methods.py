"""THE tables: every method by kind and name.

To add one, write one function in one file and one row here; the contract tests then demand test settings for it.
Nothing here imports torch: targets are strings, and signatures are read from the source without running it.
"""

from __future__ import annotations

import ast
import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import entry_points
from typing import Any, Literal

from .errors import MethodError, unknown
from .signatures import Parameter, check_type, first_sentence, signature

Access = Literal["images", "images and labels", "training"]
Visibility = Literal["visible", "faint", "invisible"]
Kind = Literal["backdoor", "evasion", "detector", "score", "repair", "compressor"]
KINDS: tuple[Kind, ...] = ("backdoor", "evasion", "detector", "score", "repair", "compressor")
ENTRY_POINTS = "secateur.methods"
NOT_SETTINGS = frozenset({"generator", "on_step", "on_note", "granularity", "suspect", "forward"})


@dataclass(frozen=True)
class Method:
    """One row.

    Attributes:
        kind: What it returns decides (see ``docs/architecture.md``).
        name: What users type.
        target: ``module:function``.
        version: Goes up whenever the same arguments give another result.
        paper: Where it comes from.
        quick: Settings with which the contract tests run it in a moment.
        needs: ``suspect`` when it wants possibly poisoned data; such a method is never part of ``auto``.
        files: Settings that may name a file or a folder: a plan tells results apart by what is in it.
        access: Of a backdoor: what the attacker must control.
        visibility: Of a backdoor with its default settings, on photographs: ``visible`` when SSIM is below 0.95 or a pixel
            changes by more than 0.3 of the range (Linf), ``invisible`` from SSIM 0.99 on if none changes by more than 8/255.
    """

    kind: Kind
    name: str
    target: str
    version: int
    paper: str
    quick: Mapping[str, Any] = field(default_factory=dict)
    needs: frozenset[str] = frozenset()
    files: frozenset[str] = frozenset()
    access: Access | None = None
    visibility: Visibility | None = None

    def load(self) -> Callable[..., Any]:
        """Import and return the function."""
        module, _, function = self.target.partition(":")
        return getattr(importlib.import_module(module), function)


TABLE: tuple[Method, ...] = (
    Method(
        "backdoor", "badnets", "secateur.poison.badnets:badnets", 2, "arXiv:1708.06733", {"rate": 0.2},
        files=frozenset({"pattern"}), access="images and labels", visibility="visible",
    ),
    Method(
        "backdoor", "blended", "secateur.poison.blended:blended", 2, "arXiv:1712.05526", {"rate": 0.2},
        access="images and labels", visibility="visible",
    ),
    Method(
        "backdoor", "sig", "secateur.poison.sig:sig", 1, "arXiv:1902.11237", {"rate": 0.6},
        access="images", visibility="visible",
    ),
    Method(
        "backdoor", "label-consistent", "secateur.poison.label_consistent:label_consistent", 1, "arXiv:1912.02771",
        {"rate": 0.6, "surrogate_images": 64, "surrogate_epochs": 1}, access="images", visibility="visible",
    ),
    Method(
        "backdoor", "low-frequency", "secateur.poison.low_frequency:low_frequency", 1, "ICCV 2021, arXiv:2104.03413",
        {"rate": 0.2, "steps": 5, "surrogate_images": 64, "surrogate_epochs": 1},
        access="images and labels", visibility="faint",
    ),
    Method(
        "backdoor", "ssba", "secateur.poison.ssba:ssba", 1, "ICCV 2021, arXiv:2012.03816", {"rate": 0.2},
        access="images and labels", visibility="faint",
    ),
    Method(
        "backdoor", "trojannn", "secateur.poison.trojannn:trojannn", 1, "NDSS 2018, doi:10.14722/ndss.2018.23291",
        {"rate": 0.2, "steps": 5, "surrogate_images": 64, "surrogate_epochs": 1},
        access="images and labels", visibility="visible",
    ),
    Method(
        "backdoor", "bpp", "secateur.poison.bpp:bpp", 1, "arXiv:2205.13383", {"rate": 0.2},
        access="images and labels", visibility="visible",
    ),
    Method(
        "backdoor", "adaptive-blend", "secateur.poison.adaptive:adaptive_blend", 1, "ICLR 2023, arXiv:2205.13613",
        {"rate": 0.2, "cover_rate": 0.1}, access="images and labels", visibility="visible",
    ),
    Method(
        "backdoor", "adaptive-patch", "secateur.poison.adaptive:adaptive_patch", 1, "ICLR 2023, arXiv:2205.13613",
        {"rate": 0.2, "cover_rate": 0.1}, access="images and labels", visibility="visible",
    ),
    Method(
        "backdoor", "wanet", "secateur.poison.wanet:wanet", 1, "ICLR 2021, arXiv:2102.10369", {"rate": 0.2},
        access="training", visibility="faint",
    ),
    Method(
        "backdoor", "input-aware", "secateur.poison.input_aware:input_aware", 1, "NeurIPS 2020, arXiv:2010.08138",
        {"rate": 0.2, "mask_steps": 20, "width": 2}, access="training", visibility="visible",
    ),
    Method(
        "backdoor", "lira", "secateur.poison.lira:lira", 1, "ICCV 2021, doi:10.1109/ICCV48922.2021.01175",
        {"rate": 0.2, "width": 2}, access="training", visibility="faint",
    ),
    Method(
        "backdoor", "pruning-aware", "secateur.poison.pruning_aware:pruning_aware", 1, "RAID 2018, arXiv:1805.12185",
        {"rate": 0.2}, access="training", visibility="visible",
    ),
    Method(
        "backdoor", "clp-aware", "secateur.poison.clp_aware:clp_aware", 1, "ours, against ECCV 2022, arXiv:2208.03111",
        {"rate": 0.2}, access="training", visibility="visible",
    ),
    Method(
        "backdoor", "anp-aware", "secateur.poison.anp_aware:anp_aware", 1, "ours, against NeurIPS 2021, arXiv:2110.14430",
        {"rate": 0.2}, access="training", visibility="visible",
    ),
    Method(
        "backdoor", "repair-aware", "secateur.poison.repair_aware:repair_aware", 1, "ours, after arXiv:2002.08347",
        {"rate": 0.2, "rounds": 1}, access="training", visibility="visible",
    ),
    Method(
        "evasion", "apgd", "secateur.attack.ensemble:apgd", 1, "ICML 2020, arXiv:2003.01690, the authors' code",
        {"eps": 0.2, "steps": 5},
    ),
    Method(
        "evasion", "autoattack", "secateur.attack.ensemble:autoattack", 1, "ICML 2020, arXiv:2003.01690, the authors' code",
        {"eps": 0.2, "steps": 3, "queries": 10},
    ),
    Method(
        "evasion", "di-fgsm", "secateur.attack.transfer:di_fgsm", 1, "CVPR 2019, arXiv:1803.06978",
        {"eps": 0.2, "steps": 5},
    ),
    Method("evasion", "fgsm", "secateur.attack.fgsm:fgsm", 1, "ICLR 2015, arXiv:1412.6572", {"eps": 0.2}),
    Method(
        "evasion", "mi-fgsm", "secateur.attack.transfer:mi_fgsm", 1, "CVPR 2018, arXiv:1710.06081",
        {"eps": 0.2, "steps": 5},
    ),
    Method("evasion", "pgd", "secateur.attack.pgd:pgd", 1, "ICLR 2018, arXiv:1706.06083", {"eps": 0.2, "steps": 5}),
    Method("evasion", "random-noise", "secateur.attack.noise:random_noise", 1, "control", {"eps": 0.2, "tries": 3}),
    Method(
        "evasion", "square", "secateur.attack.square:square", 1, "ECCV 2020, arXiv:1912.00049",
        {"eps": 0.2, "queries": 150},
    ),
    Method(
        "evasion", "ti-fgsm", "secateur.attack.transfer:ti_fgsm", 1, "CVPR 2019, arXiv:1904.02884",
        {"eps": 0.2, "steps": 5, "kernel": 3},
    ),
    Method("score", "activation", "secateur.prune.activity:activation", 1, "arXiv:1611.06440, 2306.11695"),
    Method(
        "score", "gap", "secateur.prune.gap:gap", 1, "AICAS 2022, arXiv:2206.07406",
        {"protocol": "published", "steps": 3, "batch_size": 64},
    ),
    Method("score", "gradient", "secateur.prune.gradients:gradient", 1, "baseline"),
    Method("score", "gradient-weight", "secateur.prune.gradients:gradient_weight", 1, "arXiv:2206.07406 (its comparator)"),
    Method(
        "score", "hydra", "secateur.prune.hydra:hydra", 1, "NeurIPS 2020, arXiv:2002.10509",
        {"epochs": 1, "steps": 2, "fraction": 0.5},
    ),
    Method("score", "l1", "secateur.prune.magnitude:l1", 1, "ICLR 2017, arXiv:1608.08710"),
    Method("score", "l2", "secateur.prune.magnitude:l2", 1, "ICLR 2017, arXiv:1608.08710"),
    Method("score", "movement", "secateur.prune.movement:movement", 1, "NeurIPS 2020, arXiv:2005.07683", {"epochs": 1}),
    Method("score", "obd", "secateur.prune.gradients:obd", 1, "NIPS 1989, arXiv:1801.05787", {"images": 20, "draws": 2}),
    Method("score", "random", "secateur.prune.magnitude:random", 1, "control"),
    Method("score", "snip", "secateur.prune.gradients:snip", 1, "ICLR 2019, arXiv:1810.02340", {"images": 32}),
    Method("score", "taylor", "secateur.prune.gradients:taylor", 1, "CVPR 2019, arXiv:1906.10771"),
    Method("repair", "anp", "secateur.repair.anp:anp", 1, "NeurIPS 2021, arXiv:2110.14430", {"iterations": 8}),
    Method(
        "repair", "auto", "secateur.repair.auto:auto", 3,
        "ours, from arXiv:2110.14430, 2305.14876, 1606.09282, 2109.01903 and others",
        {"steps": 4, "iterations": 4, "epochs": 1},
    ),
    Method("repair", "awm", "secateur.repair.awm:awm", 1, "NeurIPS 2022, arXiv:2207.04497", {"rounds": 1, "iterations": 2}),
    Method("repair", "bnp", "secateur.repair.bnp:bnp", 1, "NeurIPS 2022, OpenReview wwW-1k1ljIg"),
    Method("repair", "clp", "secateur.repair.clp:clp", 1, "ECCV 2022, arXiv:2208.03111", {"u": 1.0}),
    Method(
        "repair", "cnp", "secateur.repair.cnp:cnp", 1, "IEEE TIP 2025, doi:10.1109/TIP.2025.3539466",
        {"inversion_steps": 4, "iterations": 4},
    ),
    Method(
        "repair", "ep", "secateur.repair.ep:ep", 1, "NeurIPS 2022, OpenReview wwW-1k1ljIg", {"k": 0.5},
        needs=frozenset({"suspect"}),
    ),
    Method(
        "repair", "fine-pruning", "secateur.repair.fine_pruning:fine_pruning", 1, "RAID 2018, arXiv:1805.12185", {"epochs": 1},
    ),
    Method("repair", "fine-tuning", "secateur.repair.fine_tuning:fine_tuning", 1, "baseline", {"epochs": 1}),
    Method("repair", "fmp", "secateur.repair.fmp:fmp", 1, "ICLR 2024, arXiv:2307.11565", {"images": 8, "epochs": 1}),
    Method("repair", "ft-sam", "secateur.repair.ft_sam:ft_sam", 1, "ICCV 2023, arXiv:2304.11823", {"epochs": 2}),
    Method(
        "repair", "i-bau", "secateur.repair.i_bau:i_bau", 2, "ICLR 2022, arXiv:2110.03735", {"rounds": 1, "fixed_points": 2},
    ),
    Method(
        "repair", "ims", "secateur.repair.ims:ims", 1, "NeurIPS 2025, arXiv:2509.15497",
        {"initial_rounds": 3, "rounds": 3, "inner_steps": 2, "batch_size": 32},
    ),
    Method(
        "repair", "nad", "secateur.repair.nad:nad", 1, "ICLR 2021, arXiv:2101.05930",
        {"teacher_epochs": 1, "epochs": 1, "lr": 0.01},
    ),
    Method(
        "repair", "neural-cleanse", "secateur.repair.neural_cleanse:neural_cleanse", 1, "IEEE S&P 2019",
        {"kinds": "sparse", "steps": 20, "batch_size": 8, "sizes": 1, "epochs": 1, "shortcut": 1.0, "anomaly": 0.0,
         "unflagged": "tune"},
    ),
    Method(
        "repair", "norm-pruning", "secateur.repair.norm_pruning:norm_pruning", 1, "IC3 2023, doi:10.1145/3607947.3608057",
        {"fraction": 0.25, "epochs": 1},
    ),
    Method("repair", "npd", "secateur.repair.npd:npd", 1, "NeurIPS 2023, arXiv:2306.16697", {"epochs": 1}),
    Method(
        "repair", "onp", "secateur.repair.onp.onp:onp", 7, "arXiv:2405.17746",
        {"proxies": "unlearned", "games": 8, "images": 64, "epochs": 1}, files=frozenset({"policy"}),
    ),
    Method(
        "repair", "otbr", "secateur.repair.otbr:otbr", 1, "AAAI 2025, arXiv:2408.15861",
        {"iterations": 3, "lr": 0.02, "batch_size": 32},
    ),
    Method(
        "repair", "rnp", "secateur.repair.rnp:rnp", 1, "ICML 2023, arXiv:2305.14876", {"unlearn_epochs": 2, "epochs": 2},
    ),
    Method("repair", "sau", "secateur.repair.sau:sau", 1, "NeurIPS 2023, arXiv:2307.10562", {"epochs": 1, "steps": 2}),
    Method(
        "repair", "tsbd", "secateur.repair.tsbd:tsbd", 1, "NeurIPS 2024, arXiv:2405.20291",
        {"unlearn_lr": 0.02, "unlearn_epochs": 2, "epochs": 1, "batch_size": 64},
    ),
    Method(
        "compressor", "gap", "secateur.compress.pruning:gap", 1, "AICAS 2022, arXiv:2206.07406",
        {"steps": 2, "epochs": 1, "bits": 8},
    ),
    Method(
        "compressor", "harp", "secateur.prune.harp:harp", 1, "ICLR 2023, arXiv:2412.14714",
        {"fraction": 0.5, "score_epochs": 1, "epochs": 1, "steps": 2, "lr": 0.01},
    ),
    Method(
        "compressor", "hydra", "secateur.prune.hydra:hydra_pruning", 1, "NeurIPS 2020, arXiv:2002.10509",
        {"fraction": 0.5, "score_epochs": 1, "epochs": 1, "steps": 2},
    ),
    Method(
        "compressor", "pruning", "secateur.compress.pruning:pruning", 1, "arXiv:1506.02626, 2206.07406",
        {"score": "taylor", "rounds": 2, "epochs": 1},
    ),
    Method(
        "compressor", "quantisation", "secateur.compress.pruning:quantisation", 1, "CVPR 2018, arXiv:1712.05877",
        {"epochs": 1, "lr": 0.0001},
    ),
    Method(
        "compressor", "redraw", "secateur.compress.redraw:redraw", 1, "ours; after arXiv:2007.14249",
        {"target": 4.0, "epochs": 1, "bits": 8},
    ),
)  # fmt: skip


@cache
def table(kind: Kind | None = None) -> tuple[Method, ...]:
    """Return the rows of one kind, or all, with those that installed packages add under the entry point ``secateur.methods``.

    Raises:
        MethodError: Two rows of one kind have the same name.
    """
    rows = [*TABLE, *(point.load() for point in entry_points(group=ENTRY_POINTS))]
    seen: dict[tuple[str, str], Method] = {}
    for row in rows:
        if (row.kind, row.name) in seen:
            first = seen[row.kind, row.name]
            raise MethodError(f"two {row.kind} methods are called '{row.name}': {first.target} and {row.target}; uninstall one")
        seen[row.kind, row.name] = row
    return tuple(row for row in seen.values() if kind is None or row.kind == kind)


def get(kind: Kind, name: str) -> Method:
    """Return the row of that kind and name.

    Raises:
        MethodError: There is none.
    """
    rows = {row.name: row for row in table(kind)}
    if name not in rows:
        raise MethodError(unknown(f"{kind} method", name, rows))
    return rows[name]


def parameters(method: Method) -> tuple[Parameter, ...]:
    """Return a method's settings (its keyword-only parameters) from its source, without importing it."""
    hidden = NOT_SETTINGS - ({"granularity"} if method.kind == "repair" else set())
    return tuple(parameter for parameter in signature(method.target) if parameter.name not in hidden)


def summary(method: Method) -> str:
    """Return the first sentence of a method's docstring."""
    return first_sentence(method.target)


def settings(method: Method, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return all settings of a method with their values: those given, and every default.

    Raises:
        MethodError: A name is not a setting of the method.
    """
    known = parameters(method)
    annotations = {parameter.name: parameter.annotation for parameter in known}
    for name, value in given.items():
        if name not in annotations:
            raise MethodError(unknown(f"setting of '{method.name}'", name, annotations))
        check_type(name, value, annotations[name])
    defaults = {p.name: ast.literal_eval(p.default) for p in known if p.default is not None}
    return {**defaults, **given}


def check_suspect(method: Method, *, given: bool) -> None:
    """Raise `MethodError` unless possibly poisoned images are given exactly when the method needs some."""
    if ("suspect" in method.needs) and not given:
        raise MethodError(f"'{method.name}' needs possibly poisoned images, such as a part of the training set; give --suspect")
    if given and "suspect" not in method.needs:
        raise MethodError(f"'{method.name}' reads no possibly poisoned images; leave --suspect out")
