"""What a captured graph depends on: the tensors of a module tree by shape, and the plain values of its modules.

A graph stays right as long as the tree that it was captured from looks the same. Tensors may be replaced by others of
their shape (`load_state_dict(assign=True)`, `torch.func.functional_call`, FSDP): a program reads them anew at each
call. A module that was exchanged (LoRA, quantised weights), an adapter that was switched off, a dropout that went to
eval mode change what the model computes, and ask for another graph.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from simba_fx.sharding import dtype_in_forward, is_sharded, own_class, state_of

__all__ = ["Snapshot", "snapshot"]

_PLAIN = (bool, int, float, complex, str, type(None), torch.dtype, torch.device)
_INTERNAL = frozenset({*nn.Module().__dict__, "gradient_checkpointing"} - {"training"})
"""Attributes that say nothing about what a forward computes."""
_BY_CALL = frozenset({"use_cache", "return_dict", "output_hidden_states", "output_attentions"})
"""Settings of a configuration that are part of each call's signature."""


@dataclass(frozen=True)
class _Seen:
    """One module of a tree."""

    name: str
    cls: type
    tensors: tuple[Any, ...]
    values: tuple[Any, ...]


@dataclass(frozen=True)
class Snapshot:
    """A module tree at a moment. While snapshots are equal, one graph serves."""

    modules: tuple[_Seen, ...]
    config: tuple[Any, ...]
    held: tuple[nn.Module, ...] = field(compare=False, repr=False)
    """The modules themselves, in order."""

    def difference(self, other: Snapshot) -> str:
        """Where two snapshots first differ, in words."""
        for mine, theirs in zip(self.modules, other.modules):
            if mine != theirs:
                changed = dict(set(mine.values) ^ set(theirs.values))
                what = ", ".join(changed) or ("class" if mine.cls is not theirs.cls else "tensors")
                return f"{what} of {theirs.name or 'the stack'} ({theirs.cls.__name__})"
        return "config" if self.config != other.config else "the list of modules"


def snapshot(root: nn.Module) -> Snapshot:
    """Look at every module of a tree. Changes nothing, reads no tensor's values."""
    config = getattr(root, "config", None)
    settings = {} if config is None else {k: v for k, v in vars(config).items() if k not in _BY_CALL}
    values = tuple(_values(settings))
    held: list[nn.Module] = []
    return Snapshot(tuple(_visit(root, "", None, held)), values, tuple(held))


def _visit(module: nn.Module, path: str, state: Any, modules: list[nn.Module]) -> Iterator[_Seen]:
    modules.append(module)
    state = state_of(module) or state
    held = (*module._parameters.items(), *module._buffers.items())
    tensors = tuple((name, *_described(tensor, state)) for name, tensor in held if tensor is not None)
    yield _Seen(path, own_class(module), tensors, tuple(_values(module.__dict__)))
    for name, child in module._modules.items():
        if child is not None:
            yield from _visit(child, f"{path}.{name}" if path else name, state, modules)


def _described(tensor: Tensor, state: Any) -> tuple[Any, ...]:
    """Shape, dtype and device that a forward sees, and a subclass's type."""
    sharded = is_sharded(tensor)
    dtype = dtype_in_forward(tensor, state) if sharded else tensor.dtype
    kind = None if sharded or type(tensor) in (Tensor, nn.Parameter) else type(tensor)
    return tuple(tensor.shape), dtype, tensor.device, kind


def _values(attributes: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in attributes.items():
        if name not in _INTERNAL and "fsdp" not in name:  # FSDP's own notes
            if isinstance(value, _PLAIN):
                yield name, value
            elif isinstance(value, list | tuple | set | dict):
                yield name, _frozen(value)
    if "_hf_hook" in attributes:  # of accelerate: weights may be elsewhere
        yield "_hf_hook", type(attributes["_hf_hook"])


def _frozen(value: Any) -> Any:
    """Containers as tuples; of anything that is not a plain value only its type."""
    if isinstance(value, dict):
        return tuple((key if isinstance(key, _PLAIN) else type(key), _frozen(held)) for key, held in value.items())
    if isinstance(value, list | tuple):
        return tuple(map(_frozen, value))
    if isinstance(value, set):
        return tuple(sorted(map(repr, value)))
    return value if isinstance(value, _PLAIN) else type(value)
