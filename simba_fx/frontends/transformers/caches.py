"""What transformers' caches hold after a prompt: recorded while a graph is captured, filled in after it has run.

A layer's state is named by an entry `(layer, kind, index)`; kind is "conv" `(B, D, W)`, "recurrent" (as the scan leaves
it; "linear" in MiniMax's cache, "rnn" in xLSTM's), "keys" or "values" `(B, heads, k, width)`. transformers is imported
inside, when a model of its kind is at hand.
"""

from __future__ import annotations

import functools
import sys
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from simba_fx.capture.kinds import Notes
from simba_fx.errors import CacheError, InputError
from simba_fx.frontends.transformers.decoding import describe
from simba_fx.runtime.stack import Entry


class NotInCache(CacheError, AttributeError):
    """A model asks its cache for what only a class of its own has."""


def own_cache(cls: type) -> Any:
    """The class of caches that stands beside the class of a model; None: the usual one serves."""
    from transformers.cache_utils import DynamicCache

    for base in cls.__mro__:
        for own in vars(sys.modules[base.__module__]).values():
            if isinstance(own, type) and issubclass(own, DynamicCache) and hasattr(own, "set_linear_cache"):  # MiniMax
                return own
            if isinstance(own, type) and own.__name__ == _TABLE:
                return own
    return None


_TABLE = "xLSTMCache"
"""No Cache: a table of states that a model writes into, with room for so many rows."""


def _class_of(stack: Any) -> Any:
    """The class of a model's caches. (Of a sparse model it is known: Dynamo of torch 2.11 cannot look for it, nor
    import from the lazy package.)"""
    from transformers.cache_utils import DynamicCache

    own = stack.simba_cache_class if hasattr(stack, "simba_cache_class") else own_cache(type(stack))
    return DynamicCache if own is None else own


def new_cache(stack: Any, like: Tensor | None = None) -> Any:
    """Of the model's class; `like` `(B, ...)`: rows, dtype and device of a table of states."""
    cls = _class_of(stack)
    if cls.__name__ == _TABLE and like is not None:
        return cls(stack.config, like.shape[0], dtype=like.dtype, device=like.device)
    return cls() if hasattr(cls, "set_linear_cache") else cls(config=stack.config)


class RecordingTable:
    """An empty table of states that notes what a model would write into it (xLSTM)."""

    def __init__(self) -> None:
        self.rnn_state, self.seqlen_offset = _Rows(), 0

    def entries(self) -> dict[Entry, Tensor]:
        return dict(sorted(self.rnn_state.stored.items()))


class _Rows:
    """A block is given the states of its layer (cell, normalizer, maximum of the gates), of which there are none; what
    it returns is then copied to where they would stand."""

    def __init__(self) -> None:
        self.read: set[int] = set()
        self.stored: dict[Entry, Tensor] = {}

    def __getitem__(self, layer: int) -> Any:
        if layer not in self.read:
            self.read.add(layer)
            return None, None, None
        entries = [(layer, "rnn", index) for index in range(3)]
        return [SimpleNamespace(copy_=functools.partial(self.stored.__setitem__, entry)) for entry in entries]


def recording_cache(stack: Any) -> Any:
    """An empty cache of the model's class that notes what each layer would store, and changes nothing."""
    cls, owner = _class_of(stack), type(stack).__name__
    if cls.__name__ == _TABLE:
        return RecordingTable()

    class RecordingCache(Notes, cls):  # type: ignore[misc, valid-type]  # a class of transformers, known when the model is
        def __getattr__(self, name: str) -> Any:
            raise NotInCache(
                f"{owner} asks its cache for {name}, which transformers' {cls.__name__} has not; expected states that "
                "a prompt leaves there. Pass use_cache=False, or generate with the dense model."
            )

        def entries(self) -> dict[Entry, Tensor]:
            return dict(sorted(self.stored.items()))

        def ask(self, method: str, layer: Any, *more: Any) -> Any:
            return getattr(cls, method)(self, layer, *more)

        def update_conv_state(self, conv_states: Tensor, layer_idx: int, state_idx: int = 0,
                              conv_kernel_size: int | None = None, **_: Any) -> Tensor:  # fmt: skip
            width = conv_states.shape[-1] if conv_kernel_size is None else conv_kernel_size
            padded = torch.nn.functional.pad(conv_states, (width, 0))
            self.store(layer_idx, ("conv", state_idx), padded[..., -width:])
            return conv_states

        def update_recurrent_state(self, recurrent_states: Tensor, layer_idx: int, state_idx: int = 0,
                                   **_: Any) -> Tensor:  # fmt: skip
            self.store(layer_idx, ("recurrent", state_idx), recurrent_states)
            return recurrent_states

        def set_linear_cache(self, layer_idx: int, linear_cache: Tensor) -> None:
            self.store(layer_idx, ("linear", 0), linear_cache)

        def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any) -> Any:
            self.store(layer_idx, ("keys", 0), key_states)
            self.store(layer_idx, ("values", 0), value_states)
            return key_states, value_states

    for name, default in _QUESTIONS.items():
        if hasattr(cls, name):
            setattr(RecordingCache, name, _question(name, default))
    cache: Any = RecordingCache() if hasattr(cls, "set_linear_cache") else RecordingCache(config=stack.config)
    cache.start()
    return cache


_QUESTIONS = {"has_previous_state": None, "get_conv_state": None, "get_recurrent_state": None, "get_seq_length": 0}
"""What a layer asks its cache, and the layer that is meant where none is said."""


def _question(name: str, default: Any) -> Any:
    def question(self: Any, layer_idx: Any = default, state_idx: Any = None) -> Any:
        return self.asked(name, layer_idx, *(() if state_idx is None else (state_idx,)))

    return question


def fill(cache: Any, entries: tuple[Entry, ...], tensors: Any, length: int) -> None:
    """Give a real cache, through its own methods, what each layer saw of `length` tokens."""
    if hasattr(cache, "seqlen_offset"):  # a table
        cache.seqlen_offset += length
        cache.rnn_state_initial = False  # as the model leaves it
    stored = dict(zip(entries, tensors))
    for (layer, kind, index), tensor in stored.items():
        if kind == "conv":
            cache.update_conv_state(tensor, layer, state_idx=index, conv_kernel_size=tensor.shape[-1])
        elif kind == "recurrent":
            cache.update_recurrent_state(tensor, layer, state_idx=index)
        elif kind == "linear":
            cache.set_linear_cache(layer, tensor)
        elif kind == "rnn":
            cache.rnn_state[layer][index].copy_(tensor)
        elif kind == "keys":
            cache.update(tensor, stored[layer, "values", 0], layer)


def past_of(cache: Any, entries: tuple[Entry, ...]) -> list[Tensor]:
    """What a warm cache holds, as the pass `continue-states` orders it; that which autograd may keep is copied.

    Raises:
        InputError: keys and values of a size that was allocated beforehand; a cache that can be taken back.
    """
    found, real = [], []
    for layer, kind, index in entries:
        if kind in ("linear", "rnn"):
            raise InputError(
                f"Several new tokens on a warm {type(cache).__name__}, whose states this package does not continue; "
                "expected one token at a time, or the whole text on an empty cache. Pass the tokens one by one."
            )
        held = cache.layers[layer]
        if getattr(held, "record_past", False):
            raise InputError(
                "Several new tokens on a warm cache that records its past, as assisted decoding asks for, which may "
                "take states back; expected a cache that only goes on. Generate without an assistant."
            )
        if kind in ("conv", "recurrent"):
            states = getattr(held, f"{kind}_states")
            found.append(states[index] if isinstance(states, dict) else states)
            continue
        if getattr(held, "max_cache_len", None) is not None:
            raise InputError(
                f"Several new tokens on a warm cache whose layer {layer} has a static size; expected a DynamicCache. "
                "Pass the tokens one at a time, or generate with cache_implementation='dynamic'."
            )
        found.append(getattr(held, kind))
        if kind == "keys":
            known = describe(held)[1]
            rows, _, length, _ = held.keys.shape
            real.append(torch.ones(rows, length, dtype=torch.bool, device=held.keys.device) if known is None else known)
    # a cache changes its states in place
    return [held.clone() if torch.is_grad_enabled() else held for held in found] + real


def past_length(cache: Any) -> int:
    """Tokens of the calls before, of a cache with attention layers; of one without, 0: nothing there asks for it."""
    layers = [layer for layer in cache.layers if isinstance(getattr(layer, "keys", None), Tensor)]
    return int(layers[0].get_seq_length()) if layers else 0


def is_warm(cache: Any) -> bool:
    """Whether a cache already holds tokens. Room that was allocated beforehand, or is left of a reset, holds none.

    Layers with recurrent states are asked first, who know it in Python: what a static layer of keys holds is read on
    its device, which a decoding step must not wait for.
    """
    layers = getattr(cache, "layers", ())
    started = [getattr(layer, "has_previous_state", None) for layer in layers]
    if any(isinstance(states, dict) and any(states.values()) for states in started):
        return True
    if any(isinstance(state, Tensor) for state in getattr(cache, "linear_cache", ())):  # MiniMax's
        return True
    if not getattr(cache, "rnn_state_initial", True):  # xLSTM's
        return True
    rooms = [(layer, getattr(layer, "keys", None)) for layer in layers]
    return any(isinstance(keys, Tensor) and keys.numel() and bool(layer.get_seq_length() > 0) for layer, keys in rooms)
