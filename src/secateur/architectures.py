"""The table of architectures: name -> builder. Plain values: ``models/registry.py`` builds, infers and recognises.

A row with ``fixed`` arguments is a familiar name for one member of a family. Networks of other packages have names with a
prefix, ``timm:NAME`` or ``torchvision:NAME``; whether there is such a network only the package knows (`models/external.py`).
"""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .errors import ModelError, unknown
from .signatures import signature


@dataclass(frozen=True)
class Architecture:
    """One row of the table.

    Attributes:
        target: ``module:builder`` inside the package ``models``.
        fixed: Arguments that the name stands for.
        input_size: Height and width of the images the family is usually given.
    """

    target: str
    fixed: Mapping[str, Any] = field(default_factory=dict)
    input_size: int = 32


ARCHITECTURES: Mapping[str, Architecture] = {
    "convnet": Architecture("convnet:convnet"),
    "lenet5": Architecture("lenet:lenet5"),
    "badnet": Architecture("lenet:badnet"),
    "resnet_cifar": Architecture("resnet_cifar:resnet_cifar"),
    "resnet20": Architecture("resnet_cifar:resnet_cifar", {"depth": 20}),
    "resnet32": Architecture("resnet_cifar:resnet_cifar", {"depth": 32}),
    "resnet44": Architecture("resnet_cifar:resnet_cifar", {"depth": 44}),
    "resnet56": Architecture("resnet_cifar:resnet_cifar", {"depth": 56}),
    "resnet110": Architecture("resnet_cifar:resnet_cifar", {"depth": 110}),
    "resnet": Architecture("resnet:resnet"),
    "resnet18": Architecture("resnet:resnet", {"depth": 18, "stem": "cifar"}),
    "resnet34": Architecture("resnet:resnet", {"depth": 34, "stem": "cifar"}),
    "resnet18_imagenet": Architecture("resnet:resnet", {"depth": 18, "stem": "imagenet"}, 224),
    "resnet34_imagenet": Architecture("resnet:resnet", {"depth": 34, "stem": "imagenet"}, 224),
    "preact_resnet": Architecture("preact_resnet:preact_resnet"),
    "preact_resnet18": Architecture("preact_resnet:preact_resnet", {"depth": 18}),
    "preact_resnet34": Architecture("preact_resnet:preact_resnet", {"depth": 34}),
    "vgg": Architecture("vgg:vgg"),
    "vgg11_bn": Architecture("vgg:vgg", {"depth": 11, "head": "linear"}),
    "vgg13_bn": Architecture("vgg:vgg", {"depth": 13, "head": "linear"}),
    "vgg16_bn": Architecture("vgg:vgg", {"depth": 16, "head": "linear"}),
    "vgg19_bn": Architecture("vgg:vgg", {"depth": 19, "head": "linear"}),
    "vgg11_bn_imagenet": Architecture("vgg:vgg", {"depth": 11, "head": "mlp"}, 224),
    "vgg13_bn_imagenet": Architecture("vgg:vgg", {"depth": 13, "head": "mlp"}, 224),
    "vgg16_bn_imagenet": Architecture("vgg:vgg", {"depth": 16, "head": "mlp"}, 224),
    "vgg19_bn_imagenet": Architecture("vgg:vgg", {"depth": 19, "head": "mlp"}, 224),
    "small_vgg": Architecture("vgg:small_vgg"),
    "wrn": Architecture("wrn:wrn"),
    "mobilenet_v1": Architecture("mobilenet:mobilenet_v1", input_size=224),
    "mobilenet_v2": Architecture("mobilenet:mobilenet_v2", input_size=224),
    "squeezenet": Architecture("squeezenet:squeezenet", input_size=224),
    "vit": Architecture("vit:vit"),
}
EXTERNAL: Mapping[str, Mapping[str, Any]] = {
    "timm": {"classes": 1000, "in_channels": 3, "global_pool": "", "img_size": 0},  # nothing and 0: the package's own
    "torchvision": {"classes": 1000},
}


def names() -> tuple[str, ...]:
    """Return the names of all architectures, in table order."""
    return tuple(ARCHITECTURES)


def is_external(name: str) -> bool:
    """Return whether ``name`` has the form of a network of another package."""
    return re.fullmatch(rf"({'|'.join(EXTERNAL)}):[\w.-]{{1,100}}", name, re.ASCII) is not None


def is_reference(name: str) -> bool:
    """Return whether ``name`` has the form ``file.py:make`` of a user's own code."""
    return name.rpartition(":")[0].endswith(".py")


def architecture(name: str) -> Architecture:
    """Return one row of the table; `ModelError` when there is none of that name."""
    if is_external(name):
        return Architecture("external:build_external", input_size=224)
    if name not in ARCHITECTURES:
        raise ModelError(unknown("architecture", name, ARCHITECTURES))
    return ARCHITECTURES[name]


def resolve(name: str, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``kwargs`` with the defaults filled in, checked against the builder's signature.

    For networks of other packages, what is left to the package is left out.
    """
    free = _defaults(name)
    for key, value in kwargs.items():
        if key not in free:
            raise ModelError(unknown(f"argument of {name}", key, free))
        _check(f"{name}: {key}", value, free[key])
    settings = free | dict(kwargs)
    return {key: value for key, value in settings.items() if value} if is_external(name) else settings


def _defaults(name: str) -> dict[str, Any]:
    row = architecture(name)
    if is_external(name):
        return dict(EXTERNAL[name.partition(":")[0]])
    parameters = signature(f"{__package__}.models.{row.target}")
    return {p.name: ast.literal_eval(p.default or "None") for p in parameters if p.name not in row.fixed}


def _check(what: str, value: Any, default: Any) -> None:
    kind = type(default)
    accepted = (int, float) if kind is float else (kind,)
    if type(value) not in accepted:
        raise ModelError(f"{what} must be of type {kind.__name__}, got {type(value).__name__}")
    if kind in (int, float) and not 0 < value <= 65536:
        raise ModelError(f"{what} must lie in (0, 65536], got {value}")
