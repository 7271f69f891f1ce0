"""The inputs that a model is captured with: which sizes they have, and in what surroundings."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from simba_fx.compiling import traced

__all__ = ["EXAMPLE", "autocast_dtype", "named_sizes"]

EXAMPLE = {"B": 3, "L": 24}
"""Sizes of the inputs that are traced: B ≠ L, both > 1. Which dimension is which is decided before, by position."""


def named_sizes(tensor: Tensor, rows: int, length: int) -> tuple[int | str, ...]:
    """A shape with its batch as "B" and its sequence as "L": `(B, L, ...)`, `(B, 1, L, L)` for a causal mask, or
    `(k, B, L)` for positions along several axes.

    A width that happens to equal the length stays a number.
    """
    sizes: list[int | str] = list(tensor.shape)
    leads = tensor.dim() > 1 and _is(tensor.shape[0], rows) and _is(tensor.shape[1], length)
    if tensor.dim() == 3 and not leads and _is(tensor.shape[1], rows) and _is(tensor.shape[2], length):
        return int(tensor.shape[0]), "B", "L"
    square = tensor.dim() == 4 and all(_is(size, length) for size in tensor.shape[2:])
    for dim in (2, 3) if square else (1,):
        if dim < len(sizes) and _is(tensor.shape[dim], length):
            sizes[dim] = "L"
    if sizes and _is(tensor.shape[0], rows):
        sizes[0] = "B"
    return tuple(sizes)


def _is(size: int, wanted: int) -> bool:
    """Whether two sizes are equal. Of symbolic ones that is asked without a guard, which would fix them."""
    return statically_known_true(size == wanted) if traced() else size == wanted


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype that `torch.autocast` gives matrix products on this device right now; None: it is off."""
    kind = device.type
    # Dynamo of torch 2.11 cannot trace is_autocast_available; what is compiled runs on a device that has it, or on none
    there = kind != "meta" if torch.compiler.is_dynamo_compiling() else torch.amp.is_autocast_available(kind)
    return torch.get_autocast_dtype(kind) if there and torch.is_autocast_enabled(kind) else None
