"""`mamba_ssm`'s own models: `MambaLMHeadModel`, and the `MixerModel` inside it, with Mamba-1 and Mamba-2 blocks.

As for a transformers model, the result is a copy of the module tree over the same parameters in which the block stack
(the MixerModel) has a subclass of its own class; see `simba_fx.frontends.transformers`. What differs: a graph starts
from token ids `(B, L)`; there is no padding mask; and the states of a prompt go through the caller's
`inference_params`, whose slots are written in place. `mamba_ssm` is not imported: its classes are known by name.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from simba_fx.capture.examples import EXAMPLE, autocast_dtype
from simba_fx.capture.export import capture_graph
from simba_fx.capture.kinds import Notes
from simba_fx.capture.normalise import Captured
from simba_fx.errors import CaptureError, InputError, SimbaError
from simba_fx.flops import budget_cost
from simba_fx.frontends.files import dtype_to_ask_for, dtypes_of, in_saved_dtypes
from simba_fx.options import Options
from simba_fx.runtime.build import build_program
from simba_fx.runtime.captures import captured, stored_with
from simba_fx.runtime.clone import clone_around, own_forward
from simba_fx.runtime.fingerprint import Snapshot
from simba_fx.runtime.inputs import check_mask
from simba_fx.runtime.last_call import LastCall
from simba_fx.runtime.rows import refuse_ragged
from simba_fx.runtime.stack import Entry, Signature, StackRuntime, Variant, stack_class

__all__ = ["KEYS", "LIBRARY", "TAKES", "SparseMixer", "describe", "install", "owns", "read", "stack_of", "write"]

LIBRARY = "mamba_ssm"
TAKES: frozenset[str] = frozenset()
KEYS = frozenset({"dtype"})
_MODULE = "mamba_ssm.models.mixer_seq_simple"
_KINDS = ("conv", "recurrent")
"""Of the two slots of a layer's states, in their order: `(B, D, W)`; `(B, D, N)` or `(B, H, P, N)`."""


def _is(module: nn.Module, *names: str, owner: str = _MODULE) -> bool:
    return any(cls.__module__ == owner and cls.__name__ in names for cls in type(module).__mro__)


def owns(model: nn.Module) -> bool:
    """Whether `model` is a `MambaLMHeadModel` or a `MixerModel` of `mamba_ssm`, which is not imported to find out."""
    return _is(model, "MambaLMHeadModel", "MixerModel")


def stack_of(model: nn.Module) -> nn.Module:
    """The `MixerModel` of a `MambaLMHeadModel`; a `MixerModel` itself."""
    return model if _is(model, "MixerModel") else model.get_submodule("backbone")


def install(model: nn.Module, options: Options, example_inputs: Any = None) -> nn.Module:
    """A sparse copy of `model` over the same parameters; `model` is untouched.

    Raises:
        CaptureError, ScheduleError, GraphError: from the first captures, which happen here.
    """
    stack = stack_of(model)
    _refuse_rotary(stack)
    blocks = options.compile == "blocks"
    runtime = SparseMixer(stack, options, budget_cost(model, stack, options), store=stored_with(stack))
    clone = clone_around(model, runtime, stack_class(type(stack), blocks, _prepare), blocks)
    runtime.variant(_signature(stack, torch.int64, cache=False))
    if not blocks and not runtime.stateless:  # a graph that is traced whole cannot stop to capture another
        runtime.variant(_signature(stack, torch.int64, cache=True))
    return clone


def _attention(stack: nn.Module) -> tuple[str, ...]:
    """Paths of the attention layers."""
    return tuple(path for path, module in stack.named_modules() if _is(module, "MHA", owner="mamba_ssm.modules.mha"))


def _stateless(stack: nn.Module) -> dict[str, str]:
    """Layers whose states this package does not fill, by path, and what is the matter with them."""
    three = [path for path, module in stack.named_modules() if _is(module, "Mamba3", owner="mamba_ssm.modules.mamba3")]
    return dict.fromkeys(
        _attention(stack),
        "is an attention layer, whose keys and values mamba_ssm keeps at one length for all layers",
    ) | dict.fromkeys(three, "is a Mamba-3 layer, whose states this package does not fill")


def _refuse_rotary(stack: nn.Module) -> None:
    for path in _attention(stack):
        if getattr(stack.get_submodule(path), "rotary_emb_dim", 0) > 0:
            raise CaptureError(
                f"{path} (MHA) turns keys by their place in the sequence that it sees; expected attention without "
                "rotary_emb_dim, because survivors of a pruned sequence would get new places. Leave this model dense."
            )


def _signature(stack: Any, ids: torch.dtype, *, cache: bool) -> Signature:
    weight = stack.embedding.weight
    return Signature(weight.dtype, weight.device, None, cache, stack.training, False, extra=(("input_ids", ids),),
                     autocast=autocast_dtype(weight.device))  # fmt: skip


class SparseMixer(StackRuntime):
    """The runtime of one transformed model of `mamba_ssm`."""

    def stack_of(self, model: nn.Module) -> nn.Module:
        return stack_of(model)

    @functools.cached_property
    def stateless(self) -> dict[str, str]:
        """Why prompts cannot be decoded from. (Late: a deep copy's stack is not whole yet when its runtime is made.)"""
        return _stateless(self.stack)

    def capture(self, signature: Signature, now: Snapshot) -> Variant:
        rest = (signature, self.options.kernels, self.options.compile == "blocks")
        with torch.inference_mode(False):  # `generate` of mamba_ssm runs in it; a graph outlives the call
            graph, entries = captured(self.store, self.stack, now, rest, lambda: self._trace(signature))
            built = build_program(graph, self.options, self.cost)
        return Variant(built, entries, now)

    def _trace(self, signature: Signature) -> tuple[Captured, tuple[Entry, ...]]:
        stack = self.to_trace()
        ((_, ids),) = signature.extra
        inputs = {"input_ids": torch.zeros(*EXAMPLE.values(), dtype=ids, device=signature.device)}
        shell = _Shell(stack, signature.cache)
        graph = capture_graph(shell, stack, inputs, primary="input_ids", prefix="stack", values=lambda: 1,
                              kernels=self.options.kernels)  # fmt: skip
        return graph, shell.stored.entries

    def finish(self, variant: Variant, call: MixerCall, flat: Any) -> Any:
        """Fill the states; return the stack's output `(B, L, M)`."""
        first = 1 + len(variant.states)
        rows, length = call.ids.shape
        self.last = LastCall(rows, length, variant.built, flat[first:], None, None)
        if call.states is not None:
            _fill(self.stack, call.states, dict(zip(variant.states, flat[1:first])), rows)
        return flat[0]


# --- states ----------------------------------------------------------------------------------------------------------


def _mixers(stack: Any) -> list[Any]:
    return [layer.mixer for layer in stack.layers]


class _Slot:
    """Stands for a state tensor while the stack is captured: notes what a block would write into it."""

    def __init__(self, notes: Notes, layer: Any, kind: str) -> None:
        self.notes, self.layer, self.kind = notes, layer, kind

    def copy_(self, state: Tensor) -> None:
        self.notes.store(self.layer, (self.kind, 0), state)


class _RecordingStates(Notes):
    """What a block asks of `inference_params` for a prompt: slots for the layer that it names."""

    seqlen_offset = 0

    def __init__(self) -> None:
        self.start()

    @property
    def key_value_memory_dict(self) -> Any:
        return self

    def __contains__(self, layer: Any) -> bool:
        return True

    def __getitem__(self, layer: Any) -> tuple[_Slot, ...]:
        return tuple(_Slot(self, layer, kind) for kind in _KINDS)


def _fill(stack: Any, states: Any, found: dict[Entry, Tensor], rows: int) -> None:
    """Write what each block saw into the caller's states, allocated by the block where there are none yet."""
    for mixer in _mixers(stack):
        for kind, slot in zip(_KINDS, mixer._get_states_from_cache(states, rows)):
            slot.copy_(found[mixer.layer_idx, kind, 0])


class _Shell(nn.Module):
    """The stack as a function of ids `(B, L)`: returns its output `(B, L, M)` and what its blocks would store."""

    def __init__(self, stack: nn.Module, cache: bool) -> None:
        super().__init__()
        self.stack = stack
        self.training = stack.training
        self.cache = cache
        self.stored = SimpleNamespace(entries=())  # no container: export puts those back as they were

    def forward(self, input_ids: Tensor) -> Any:
        states = _RecordingStates() if self.cache else None
        output = own_forward(self.stack)(input_ids, inference_params=states)
        stored = {} if states is None else states.stored
        self.stored.entries = tuple(stored)
        return output, list(stored.values())


# --- the sparse class ------------------------------------------------------------------------------------------------


@dataclass
class MixerCall:
    """One call of a sparse stack that runs a program."""

    signature: Signature
    ids: Tensor
    tail: int
    states: Any
    """The caller's `inference_params`, or None."""

    @property
    def sizes(self) -> tuple[Any, Any, int]:
        return *self.ids.shape, self.tail

    def inputs(self, variant: Any) -> list[Any]:
        return [self.ids, self.tail]


def _prepare(stack: Any, given: dict[str, Any]) -> MixerCall | None:
    """What to run for a call; None: the class's own forward (a decoding step, a prompt of one token)."""
    runtime: SparseMixer = stack._simba
    name = type(stack).__name__
    ids, states = given.get("input_ids"), given.get("inference_params")
    more = [key for key, held in given.items() if key not in ("input_ids", "inference_params") and held is not None]
    if ids is None:
        return None  # the model's own message
    if more:
        raise InputError(
            f"{name} was called with {more[0]}; only whole sequences, one per row, can be pruned: expected input_ids "
            "and inference_params. Pass each sequence in a row of its own, all rows of one length."
        )
    rows, length = ids.shape
    if states is not None and runtime.stateless:
        raise InputError(
            f"{name} was called with inference_params, but {' '.join(next(iter(runtime.stateless.items())))}; expected "
            "layers of Mamba and Mamba-2 only. Generate with the dense model; calls without inference_params are "
            "pruned."
        )
    if states is not None and states.seqlen_offset > 0:
        if length == 1:
            return None
        raise InputError(
            f"{name} was called with {length} new tokens at seqlen_offset={states.seqlen_offset}; expected a whole "
            "prompt at offset 0, or one new token. Pass the tokens one at a time, or start with new inference_params."
        )
    refuse_ragged(name, runtime.asked)
    check_mask(None, rows, length, runtime.shortest_row, runtime.options.named)
    if length == 1:
        runtime.last = LastCall(rows, length, None, (), None, None)
        return None
    return MixerCall(_signature(stack, ids.dtype, cache=states is not None), ids, runtime.tail, states)


# --- files -----------------------------------------------------------------------------------------------------------


def describe(model: nn.Module) -> dict[str, Any]:
    if not hasattr(model, "save_pretrained"):
        raise SimbaError(
            f"A {type(model).__name__} alone cannot be saved by mamba_ssm; expected the MambaLMHeadModel around it. "
            "Use torch.save on its state_dict(), and simba_fx.transform after loading."
        )
    return dtypes_of(model)


def write(model: Any, folder: Path) -> None:
    model.save_pretrained(str(folder))


def read(folder: Path, written: Mapping[str, Any], model: Any, kwargs: Mapping[str, Any]) -> tuple[Any, Any]:
    models: Any = importlib.import_module(_MODULE)
    given = dtype_to_ask_for(written, kwargs) | dict(kwargs)
    found = models.MambaLMHeadModel.from_pretrained(str(folder), **given).eval()  # as transformers has it
    return in_saved_dtypes(found, written, kwargs), None
