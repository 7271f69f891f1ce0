"""FSDP (`torch.distributed.fsdp.fully_shard`) around the blocks of a program.

`fully_shard(module)` keeps a part of each parameter in every process and registers hooks on the module that gather the
whole before its forward and let go of it behind; the blocks of a program run between the hooks of their modules.
Nothing here imports torch.distributed: what was never imported shards nothing.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from simba_fx.errors import InputError

__all__ = [
    "MET",
    "as_captured",
    "dense_class",
    "dtype_in_forward",
    "is_hook",
    "is_sharded",
    "own_class",
    "refuse_sharded",
    "state_of",
    "whole_shape",
    "without_memory",
]


def state_of(module: nn.Module) -> Any:
    """What `fully_shard` noted at a module, or None."""
    return module._get_fsdp_state() if hasattr(type(module), "_get_fsdp_state") else None  # type: ignore[operator]


def own_class(module: nn.Module) -> type[nn.Module]:
    """A module's class without what `fully_shard` mixed in."""
    cls: Any = type(module)
    found: type[nn.Module] = cls.__mro__[cls._orig_cls_mro_index] if hasattr(cls, "_orig_cls_mro_index") else cls
    return found


def dense_class(module: nn.Module) -> type[nn.Module]:
    """A module's class in the dense model, without what `fully_shard` mixed in and this package added."""
    return next(cls for cls in own_class(module).__mro__ if not cls.__dict__.get("_simba_class"))


def is_sharded(tensor: Any) -> bool:
    """Whether a tensor is a `DTensor`, of which each process holds a part."""
    module = sys.modules.get("torch.distributed.tensor")
    found = module is not None and isinstance(tensor, module.DTensor)
    if found:
        MET.add("a DTensor")
    return found


MET: set[str] = set()
"""Not empty once this process has met a sharded tensor; until then nobody has to look for one."""


def dtype_in_forward(tensor: Tensor, state: Any) -> torch.dtype:
    """The dtype in which a sharded parameter is gathered (`MixedPrecisionPolicy`)."""
    dtype: torch.dtype | None = getattr(getattr(state, "_mp_policy", None), "param_dtype", None)
    return tensor.dtype if dtype is None else dtype


def as_captured(tensors: Any, dtypes: Any) -> Any:
    """A graph has fixed dtypes: what a mixed precision policy rounded, in the dtype that the graph has there."""
    if isinstance(dtypes, tuple):
        return tuple(map(as_captured, tensors, dtypes))
    return tensors if dtypes is None or tensors.dtype is dtypes else tensors.to(dtypes)


def is_hook(hook: Any) -> bool:
    """Whether a forward hook is one of FSDP's."""
    return (getattr(hook, "__module__", None) or "").startswith("torch.distributed.fsdp.")


def refuse_sharded(paths: Iterable[tuple[str, Any]], where: str) -> None:
    """Raises: InputError: a program is about to compute with a part of a parameter."""
    for path, tensor in paths:
        if is_sharded(tensor):
            raise InputError(
                f"{path} is a DTensor while {where} runs: each process holds a part of it. Expected fully_shard on the "
                "blocks and on the model around them, after simba_fx.transform with compile='blocks'; shards of "
                "anything inside a block, and tensor parallel, cannot be run. Shard the blocks or the whole model."
            )


def whole_shape(shard: Tensor, state: Any) -> nn.Parameter:
    """What a forward sees of a sharded parameter, without memory behind it."""
    with torch.no_grad():
        whole = torch.empty(shard.shape, dtype=dtype_in_forward(shard, state), device=shard.device)
    return nn.Parameter(without_memory(whole), shard.requires_grad)


def without_memory(tensor: Tensor) -> Tensor:
    """A tensor that looks like this one, without memory behind it; a subclass's as it is."""
    if type(tensor) not in (Tensor, nn.Parameter):
        return tensor
    with torch.no_grad():
        look = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)
        look.untyped_storage().resize_(0)
    return nn.Parameter(look, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else look
