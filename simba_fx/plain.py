"""Plain modules: the whole module becomes one program with the module's own signature."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from simba_fx.build import Built, Options, build
from simba_fx.capture import capture
from simba_fx.errors import CaptureError, InputError
from simba_fx.inputs import check_mask, named_sizes
from simba_fx.program import Program, left_to_python

__all__ = ["PlainRuntime", "install"]

_ROWS, _LENGTH = 3, 24
_MASKS = ("attention_mask", "mask", "padding_mask")


@dataclass(eq=False)
class PlainRuntime:
    """The runtime of one transformed plain module."""

    built: Built
    options: Options
    names: tuple[str, ...]
    signature: inspect.Signature
    spec: pytree.TreeSpec
    tail: int = 1
    last: tuple[Any, ...] | None = None

    def any_built(self) -> Built:
        return self.built

    def call(self, forward: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        bound = self.signature.bind(*args, **kwargs).arguments
        facts = self.built.captured.facts
        extra = [name for name, value in bound.items() if name not in self.names and value is not None]
        missing = [name for name in self.names if bound.get(name) is None]
        if extra or missing:
            raise InputError(
                f"This program was captured with the arguments {', '.join(self.names)}; found also {extra}, without "
                f"{missing}. Transform the module again with example_inputs like this call's."
            )
        lead = bound[facts.primary]
        rows, length = lead.shape[:2]
        mask = bound[facts.mask] if facts.mask else None
        check_mask(mask, length, self.tail)
        flat = forward(*(bound[name] for name in self.names), self.tail)
        values, kept = flat[: facts.values], flat[facts.values :]
        real, step = (None, 1) if mask is None else (kept[1::2], 2)
        self.last = (rows, length, self.built, kept[::step], real, mask)
        return pytree.tree_unflatten(list(values), self.spec)


def install(model: nn.Module, options: Options, example: Any, cost: Any) -> fx.GraphModule:
    """Capture `model` and return its program, callable as the module was."""
    signature = inspect.signature(model.forward)
    inputs = _examples(model, signature, example)
    primary = next(name for name, value in inputs.items() if isinstance(value, Tensor) and value.dim() >= 2)
    mask = next((name for name in inputs if name in _MASKS), None)
    captured = capture(model, model, inputs, primary=primary, mask=mask)
    built = build(captured, options, cost)
    sparse = built.program
    runtime = PlainRuntime(built, options, captured.inputs, signature, captured.out_spec)
    sparse.__dict__["_simba_stack"] = runtime
    sparse.train(model.training)
    _wrap(sparse, runtime, options)
    return sparse


def _wrap(sparse: Program, runtime: PlainRuntime, options: Options) -> None:
    cls, run = type(sparse), type(sparse).forward

    def forward(self: Program, *args: Any, **kwargs: Any) -> Any:
        return runtime.call(run.__get__(self), args, kwargs)

    cls.forward = left_to_python(forward) if options.compile == "blocks" else forward


def _examples(model: nn.Module, signature: inspect.Signature, example: Any) -> dict[str, Any]:
    """Example tensors by argument name, resized so that B ≠ L."""
    if example is None:
        first = next(iter(signature.parameters))
        if not any(isinstance(module, nn.Embedding) for module in model.modules()):
            raise CaptureError(
                f"{type(model).__name__} is a plain module without an embedding; expected example_inputs=(tensor, ...) "
                "with the arguments of its forward, (B, L, ...) with B ≠ L. Pass them to transform."
            )
        device = next(model.parameters()).device
        return {first: torch.zeros(_ROWS, _LENGTH, dtype=torch.int64, device=device)}
    args, kwargs = ((), example) if isinstance(example, Mapping) else (tuple(example), {})
    bound = dict(signature.bind(*args, **kwargs).arguments)
    lead = next((v for v in bound.values() if isinstance(v, Tensor) and v.dim() >= 2), None)
    if lead is None:
        raise CaptureError(
            "example_inputs must hold at least one tensor (B, L, ...); found "
            f"{ {name: type(value).__name__ for name, value in bound.items()} }."
        )
    rows, length = lead.shape[:2]
    return {name: _resized(value, rows, length) for name, value in bound.items()}


def _resized(value: Any, rows: int, length: int) -> Any:
    if not isinstance(value, Tensor):
        return value
    sizes = [{"B": _ROWS, "L": _LENGTH}.get(size, size) for size in named_sizes(value, rows, length)]
    return torch.zeros(sizes, dtype=value.dtype, device=value.device)
