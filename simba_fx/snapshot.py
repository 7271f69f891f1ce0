"""What a captured graph depends on: the tensors of a module tree by shape, and the plain values of its modules.

A graph stays right as long as the tree that it was captured from looks the same. Tensors may be replaced by others of
their shape (`load_state_dict(assign=True)`, `torch.func.functional_call`, FSDP): a program reads them anew at each
call. A module that was exchanged (LoRA, quantised weights), an adapter that was switched off, a dropout that went to
eval mode change what the model computes, and ask for another graph.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from simba_fx.sharding import dtype_in_forward, is_sharded, own_class, state_of

__all__ = ["Snapshot", "snapshot"]

_PLAIN = frozenset({bool, int, float, complex, str, type(None), torch.dtype, torch.device})
_CONTAINERS = frozenset({list, tuple, set, dict})
_INTERNAL = frozenset({*nn.Module().__dict__, "gradient_checkpointing"} - {"training"})
"""Attributes that say nothing about what a forward computes."""
_BY_CALL = frozenset({"use_cache", "return_dict", "output_hidden_states", "output_attentions"})
"""Settings of a configuration that are part of each call's signature."""


class _Seen(NamedTuple):
    """One module of a tree. (A tuple: made once per module and prompt, sooner than a frozen dataclass.)"""

    name: str
    parent: int
    """Of the parent, its place in the list."""
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
                return f"{what} of {other._path(theirs) or 'the stack'} ({theirs.cls.__name__})"
        return "config" if self.config != other.config else "the list of modules"

    def _path(self, module: _Seen) -> str:
        parent = self._path(self.modules[module.parent]) if module.parent >= 0 else ""
        return f"{parent}.{module.name}" if parent else module.name


def snapshot(root: nn.Module) -> Snapshot:
    """Look at every module of a tree: once per prompt, so this is written to be quick. Reads no tensor's values."""
    seen: list[_Seen] = []
    held: list[nn.Module] = []
    left: list[tuple[str, int, nn.Module, Any]] = [("", -1, root, None)]
    while left:
        name, parent, module, state = left.pop()
        attributes = module.__dict__
        state = state_of(module) or state
        tensors = [(key, *_described(t, state)) for key, t in attributes["_parameters"].items() if t is not None]
        if attributes["_buffers"]:
            tensors += [(key, *_described(t, state)) for key, t in attributes["_buffers"].items() if t is not None]
        seen.append(_Seen(name, parent, own_class(module), tuple(tensors), _values(attributes)))
        held.append(module)
        place = len(held) - 1
        left += [(key, place, child, state) for key, child in attributes["_modules"].items() if child is not None]
    config = getattr(root, "config", None)
    settings = {} if config is None else {k: v for k, v in vars(config).items() if k not in _BY_CALL}
    return Snapshot(tuple(seen), _values(settings), tuple(held))


def _described(tensor: Tensor, state: Any) -> tuple[Any, ...]:
    """Shape, dtype and device that a forward sees, and a subclass's type."""
    kind = type(tensor)
    if kind is nn.Parameter or kind is Tensor:
        return tensor.shape, tensor.dtype, tensor.device, None
    if is_sharded(tensor):
        return tensor.shape, dtype_in_forward(tensor, state), tensor.device, None
    return tensor.shape, tensor.dtype, tensor.device, kind


def _values(attributes: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
    found = []
    for name in attributes:
        if name in _INTERNAL:  # most are
            continue
        value = attributes[name]
        kind = type(value)
        if kind in _PLAIN:
            if "fsdp" not in name:  # FSDP's own notes
                found.append((name, value))
        elif kind in _CONTAINERS:
            found.append((name, _frozen(value)))
        elif name == "_hf_hook":  # of accelerate: weights may be elsewhere
            found.append((name, kind))
    return tuple(found)


def _frozen(value: Any) -> Any:
    """Containers as tuples; of anything that is not a plain value only its type."""
    kind = type(value)
    if kind is dict:
        return tuple((key if type(key) in _PLAIN else type(key), _frozen(held)) for key, held in value.items())
    if kind is list or kind is tuple:
        return tuple(map(_frozen, value))
    if kind is set:
        return tuple(sorted(map(repr, value)))
    return value if kind in _PLAIN else kind
