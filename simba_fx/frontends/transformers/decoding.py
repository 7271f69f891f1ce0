"""Decoding a hybrid after a pruned prompt: positions and masks for attention layers that hold a part of the input.

transformers asks one attention layer how long the past is, and makes one mask for all of them. After a pruned prompt
every layer holds another number of keys and values, and in padded rows other pads. So each of these cache layers
becomes a *sparse layer*, which tells the length of the input instead of its own and knows which of its slots are real;
and each attention module is called with the mask of its own layer. Keys keep the positions that they were rotated to.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["attention_modules", "call_with_own_mask", "describe", "expect_token", "mark_pruned_kv", "sparse_layers"]

_classes: dict[type, type] = {}


def mark_pruned_kv(layer: Any, missing: int, real: Tensor | None) -> None:
    """Turn a cache layer that holds keys and values into a sparse layer, in place.

    Args:
        missing: tokens of the input that the layer does not hold.
        real: `(B, k)` bool, which of its k slots are real; None: all.
    """
    cls = type(layer)
    if cls not in _classes.values():
        if cls not in _classes:
            _classes[cls] = _sparse_class(cls)
        layer.__class__ = _classes[cls]
    layer.missing, layer.real = missing, real


def describe(layer: Any) -> tuple[int, Tensor | None, int]:
    """What a cache layer of a growing size is missing and which of its slots are real, as `mark_pruned_kv` has it, and
    how many slots it has."""
    keys = getattr(layer, "keys", None)
    slots = keys.shape[2] if isinstance(keys, Tensor) and keys.dim() == 4 else 0
    return (layer.missing, layer.real, slots) if type(layer) in _classes.values() else (0, None, slots)


def _sparse_class(cls: Any) -> type:
    class SparseLayer(cls):  # type: ignore[misc]  # a class of transformers, known when the model is
        missing: int
        real: Tensor | None

        def get_seq_length(self) -> Any:
            return super().get_seq_length() + self.missing

        def reorder_cache(self, beam_idx: Tensor) -> None:
            super().reorder_cache(beam_idx)
            self._move_rows(lambda real: real.index_select(0, beam_idx.to(real.device)))

        def batch_repeat_interleave(self, repeats: int) -> None:
            super().batch_repeat_interleave(repeats)
            self._move_rows(lambda real: real.repeat_interleave(repeats, dim=0))

        def batch_select_indices(self, indices: Tensor) -> None:
            super().batch_select_indices(indices)
            self._move_rows(lambda real: real[indices, ...])

        def reset(self) -> None:
            """An emptied layer is an ordinary one again."""
            self.__class__ = cls
            self.reset()

        def __reduce__(self) -> Any:
            return _sparse_again, (cls, self.__dict__)

        def _move_rows(self, move: Callable[[Tensor], Tensor]) -> None:
            self.real = None if self.real is None else move(self.real)

    SparseLayer.__name__, SparseLayer.__qualname__ = cls.__name__, cls.__qualname__
    return SparseLayer


def _sparse_again(cls: type, state: dict[str, Any]) -> Any:
    """A sparse layer from its parts, unpickled or copied."""
    layer: Any = object.__new__(cls)
    layer.__dict__.update(state)
    mark_pruned_kv(layer, layer.missing, layer.real)
    return layer


def sparse_layers(cache: Any) -> list[Any]:
    return [layer for layer in getattr(cache, "layers", ()) if type(layer) in _classes.values()]


def held(layer: Any) -> Any:
    """Tokens that a sparse layer holds: an int, or a tensor where the layer's size is static."""
    return layer.get_seq_length() - layer.missing


def expect_token(layers: Iterable[Any], mask: Tensor | None) -> None:
    """One new token is about to come; the last column of `mask` `(B, ·)` tells in which rows it is real. None: all."""
    real = None if mask is None else mask[:, -1:] != 0
    if real is not None and bool(real.all()):
        real = None
    for layer in layers:
        if real is None and layer.real is None:
            continue
        rows, before = layer.keys.shape[0], layer.real
        if before is None:
            before = torch.ones(rows, int(held(layer)), dtype=torch.bool, device=layer.keys.device)
        new = before.new_ones(rows, 1) if real is None else real.to(before.device)
        layer.real = torch.cat((before, new), 1)


def mask_for(layer: Any, dtype: torch.dtype, additive: bool) -> Tensor | None:
    """What one expected token may attend to in a sparse layer, itself included: `(B, 1, 1, slots)`; None: everything.

    Bool for `scaled_dot_product_attention`; `additive` floats for the attention that transformers calls eager.
    """
    attended: Tensor | None = layer.real
    if (slots := getattr(layer, "max_cache_len", None)) is not None:  # allocated beforehand, empty at the end
        filled = torch.arange(slots, device=layer.keys.device) <= held(layer)
        padded = filled[None] if attended is None else nn.functional.pad(attended, (0, slots - attended.shape[1]))
        attended = (padded & filled).expand(layer.keys.shape[0], slots)
    if attended is None:
        return None
    attended = attended[:, None, None, :]
    if not additive:
        return attended
    return torch.zeros_like(attended, dtype=dtype).masked_fill_(~attended, torch.finfo(dtype).min)


def attention_modules(stack: nn.Module, nodes: Iterable[Any]) -> list[str]:
    """The paths of the modules that made these keys: the innermost ones that are called with a mask."""
    found = {}
    for node in nodes:
        for path, _ in reversed((node.meta.get("nn_module_stack") or {}).values()):
            if path and "attention_mask" in inspect.signature(stack.get_submodule(path).forward).parameters:
                found[path] = True
                break
    return list(found)


def call_with_own_mask(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A forward pre-hook of an attention module: in decoding steps it gets the mask of its own cache layer."""
    cache = next((kwargs[name] for name in ("cache", "past_key_values") if kwargs.get(name) is not None), None)
    index = kwargs.get("layer_idx", getattr(module, "layer_idx", None))
    hidden: Any = kwargs.get("hidden_states", args[0] if args else None)
    layers = getattr(cache, "layers", ())
    if index is None or hidden.shape[1] != 1 or index >= len(layers):  # MiniMax's cache has layers as they are filled
        return None
    layer = layers[index]
    if type(layer) not in _classes.values():
        return None
    additive = module.config._attn_implementation == "eager"
    return args, kwargs | {"attention_mask": mask_for(layer, hidden.dtype, additive)}
