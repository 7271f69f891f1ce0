"""What the front ends share in writing and reading a model's own files."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

__all__ = ["CORRECT", "DTYPES", "FILE", "dtype_to_ask_for", "dtypes_of", "in_saved_dtypes", "name_of"]

FILE = "simba_fx.json"
CORRECT = "Correct it, or transform the dense model."
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in vars(torch).values() if isinstance(dtype, torch.dtype)}


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def dtypes_of(model: nn.Module) -> dict[str, Any]:
    """The dtype of most weights, and which have another; `from_pretrained` knows one for all."""
    names = {name: name_of(held.dtype) for name, held in model.state_dict().items() if held.is_floating_point()}
    usual = max(sorted(set(names.values())), key=list(names.values()).count)
    others = {name: dtype for name, dtype in names.items() if dtype != usual}
    return {"dtype": usual, "other_dtypes": others} if others else {"dtype": usual}


def dtype_to_ask_for(written: Mapping[str, Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """What `from_pretrained` is told, so that no weight loses precision; nothing where the caller tells it."""
    if {"dtype", "torch_dtype"} & set(kwargs):
        return {}
    others = (DTYPES[name] for name in written.get("other_dtypes", {}).values())
    return {"dtype": functools.reduce(torch.promote_types, others, DTYPES[written["dtype"]])}


def in_saved_dtypes(model: nn.Module, written: Mapping[str, Any], kwargs: Mapping[str, Any]) -> nn.Module:
    """Each weight in the dtype that it had, unless the caller asked for one."""
    others = written.get("other_dtypes", {})
    for name, held in model.state_dict(keep_vars=True).items() if dtype_to_ask_for(written, kwargs) else ():
        if held.is_floating_point() and held.dtype is not (dtype := DTYPES[others.get(name, written["dtype"])]):
            held.data = held.data.to(dtype)
    return model
