"""Edits of feature maps between the stages of a network: rounded to decimals, or clamped to bounds.

They are data, `{"after": "layer3", "kind": "clamp", "low": -1.0, "high": 1.0}`, put on as forward hooks: names and weights of
the network stay as they are, a copy has them too, and `unwrap` takes them off again.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..errors import ModelError, unknown
from ..state import evaluating
from .wrapper import Classifier, core
from .wrappers import KINDS, check_wrappers

_THROUGH: ContextVar[Collection[str]] = ContextVar("kinds of edits of feature maps that gradients pass through", default=())


class ActivationEdit:
    """The hook that edits what a module returns.

    Attributes:
        fields: What it does, as a bundle keeps it.
    """

    def __init__(self, fields: Mapping[str, Any]) -> None:
        self.fields = dict(fields)

    def __call__(self, module: nn.Module, given: object, output: Any) -> Any:
        """Return the edited output."""
        if not isinstance(output, (Tensor, fx.Proxy)):
            after = self.fields["after"]
            raise ModelError(f"wrappers edit feature maps, but '{after}' returns a {type(output).__name__}; name another layer")
        if self.fields["kind"] == "round":
            edited = output.round(decimals=self.fields["decimals"])
        else:
            edited = output.clamp(self.fields["low"], self.fields["high"])
        return through(output, edited) if self.fields["kind"] in _THROUGH.get() else edited


class _Through(torch.autograd.Function):
    """The edited value with the gradient of the unedited one."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, edited: Tensor) -> Tensor:
        """Return the edited value."""
        return edited.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        """Hand the gradient to what was edited."""
        return grads[0], None


def through(value: Any, edited: Any) -> Any:
    """Return the edited value with the gradient of the unedited one (a straight-through estimator)."""
    return _Through.apply(value, edited)


@contextmanager
def passing_through(kinds: Collection[str] = tuple(KINDS)) -> Iterator[None]:
    """Let gradients pass edits of feature maps of these kinds as if there were none; values stay exact."""
    token = _THROUGH.set(kinds)
    try:
        yield
    finally:
        _THROUGH.reset(token)


def wrap(model: nn.Module, wrappers: Iterable[Mapping[str, Any]]) -> nn.Module:
    """Return a copy of ``model`` that edits its feature maps, after the edits it has already.

    Args:
        model: Left as it was.
        wrappers: Each ``{"after": LAYER, "kind": "clamp", "low": ..., "high": ...}`` or ``{"after": LAYER, "kind": "round",
            "decimals": ...}``; layers are named relative to ``core(model)``.

    Raises:
        ModelError: One of them is not such, or names a layer that does not return one tensor when the network runs.
    """
    copy = deepcopy(model)
    attach(copy, list(wrappers))
    return copy


def attach(model: nn.Module, wrappers: Any) -> None:
    """Put edits of feature maps on ``model`` itself; see `wrap`."""
    checked = check_wrappers(wrappers)
    modules = dict(core(model).named_modules())
    for fields in checked:
        if fields["after"] not in modules:
            raise ModelError(f"wrappers: {unknown('layer', ascii(fields['after'])[1:-1][:60], filter(None, modules))}")
    for fields in checked:
        modules[fields["after"]].register_forward_hook(ActivationEdit(fields))
    if checked and isinstance(model, Classifier):
        _try(model, {fields["after"]: modules[fields["after"]] for fields in checked})


def _try(model: Classifier, layers: Mapping[str, nn.Module]) -> None:
    """Run the network once; raise `ModelError` if a layer that is to be edited takes no part."""
    seen: set[nn.Module] = set()
    handles = [layer.register_forward_hook(lambda module, *_: seen.add(module)) for layer in layers.values()]
    try:
        with evaluating(model), torch.no_grad():
            model(torch.zeros(1, *model.input_shape, device=model.mean.device))
    finally:
        for handle in handles:
            handle.remove()
    for name, layer in layers.items():
        if layer not in seen:
            raise ModelError(f"wrappers: '{name}' does not run when the network answers; name another layer")


def wrappers_of(model: nn.Module) -> tuple[dict[str, Any], ...]:
    """Return the edits of feature maps that are on ``model``, as `wrap` takes them."""
    hooks = (hook for module in core(model).modules() for hook in module._forward_hooks.values())
    return tuple(dict(hook.fields) for hook in hooks if isinstance(hook, ActivationEdit))


def unwrap(model: nn.Module) -> nn.Module:
    """Return a copy of ``model`` without edits of feature maps."""
    copy = deepcopy(model)
    for module in core(copy).modules():
        for key, hook in list(module._forward_hooks.items()):
            if isinstance(hook, ActivationEdit):
                del module._forward_hooks[key]
    return copy
