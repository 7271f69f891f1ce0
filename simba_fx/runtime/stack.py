"""The runtime of a model whose block stack is captured, whichever library's it is: its programs, and the class of the
stack, which runs them.

The result of a transform is a copy of the model's module tree over the same parameters, in which the block stack has a
subclass of its own class. Its `forward` chooses between a captured graph (prefill) and the class's own (decode).
"""

from __future__ import annotations

import copy
import functools
import inspect
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from simba_fx.compiling import disable_compile, dynamic_marker, one_at_a_time, skip_frame, traced
from simba_fx.errors import InputError, warn
from simba_fx.options import Options
from simba_fx.runtime import exporting
from simba_fx.runtime.build import Built
from simba_fx.runtime.captures import share
from simba_fx.runtime.clone import copy_to_trace, dense_again, subclass
from simba_fx.runtime.fingerprint import Fingerprint, Snapshot
from simba_fx.runtime.last_call import Memory

__all__ = ["Call", "Entry", "Signature", "StackRuntime", "Variant", "stack_class"]

Entry = tuple[int, str, int]
"""A state that blocks leave behind: the layer, what it is, and which of several."""
_EAGERLY_FIRST = (
    "Call the model once with such arguments before it is traced, by torch.compile with compile='whole' or by "
    "torch.export."
)
_KEPT_GRAPHS = 8
"""Of one kind of call: a model with and without its adapter has two."""


@dataclass(frozen=True)
class Signature:
    """What a captured graph is specialised to. Sizes are not part of it."""

    dtype: torch.dtype
    device: torch.device
    mask: torch.dtype | None
    cache: bool
    training: bool
    hidden_states: bool
    ids: bool = True
    """Whether the call gave token ids: some models scale embeddings that they looked up themselves."""
    extra: tuple[tuple[str, Any], ...] = ()
    """Tensors beside embeddings and mask, as (name, (dtype, sizes)), a size "B", "L" or a number."""
    constants: tuple[tuple[str, Any], ...] = ()
    """Numbers, flags and words among the arguments, which are part of the graph."""
    autocast: torch.dtype | None = None
    """What `torch.autocast` casts to around the call; the graph is captured, and runs, inside of it."""
    trailing: bool = False
    """Whether the program is told the rows' lengths. The model's part of the graph knows nothing of them."""
    warm: bool = False
    """Whether it goes on from the states of an earlier call; what is captured is the same."""


@dataclass
class Variant:
    """One captured graph of the stack, as a program."""

    built: Built
    states: tuple[Entry, ...]
    """What the graph returns behind the model's values."""
    seen: Snapshot
    """The stack that it was captured from."""


class Call(Protocol):
    """One call of a sparse stack that runs a program."""

    signature: Signature

    @property
    def sizes(self) -> tuple[Any, Any, int]:
        """Rows and tokens that the program is given, and the tail."""
        ...

    def inputs(self, variant: Any) -> list[Any]:
        """What the program of a variant is given."""
        ...


@dataclass(eq=False)
class StackRuntime(Memory):
    """The runtime of one transformed model: its options, its programs, and what its last call kept."""

    stack: Any
    options: Options
    cost: Any
    variants: dict[Signature, list[Any]] = field(default_factory=dict)
    """For each kind of call the graphs of the stack as it was then, the last one used last."""
    capturing: Any = field(default_factory=threading.RLock)
    store: Any = field(default_factory=dict)
    """Captures that serve whatever the options; those of the model that this one came from."""

    def __deepcopy__(self, memo: dict[int, Any]) -> StackRuntime:
        """Programs hold the original's parameters: a copy captures its own."""
        clone = type(self)(copy.deepcopy(self.stack, memo), self.options, self.cost)
        memo[id(self)] = clone
        return clone

    # What a front end adds.

    def stack_of(self, model: nn.Module) -> nn.Module:
        """The block stack of a model."""
        raise NotImplementedError

    def outside(self) -> set[nn.Module]:
        """Modules of the stack that are called while no graph runs."""
        return set()

    def used(self, signature: Signature) -> Signature:
        """The signature without what is known to change nothing."""
        return signature

    def capture(self, signature: Signature, now: Snapshot) -> Variant:
        """The program for calls of this signature."""
        raise NotImplementedError

    def finish(self, variant: Any, call: Any, flat: Any) -> Any:
        """What the stack returns, made of the program's outputs; states are filled, what was kept is remembered."""
        raise NotImplementedError

    # What all have.

    def dense(self, sparse: nn.Module) -> nn.Module:
        """The dense model that a sparse one of this runtime came from: a copy over the same parameters."""
        model = dense_again(sparse)
        share(self.stack_of(model), self.store)
        return model

    def arguments(self, example_inputs: Any, mask: Any, mask_marks: Any) -> tuple[Any, Any, Any]:
        """Of another transform, as they are: such models are captured without."""
        return example_inputs, mask, mask_marks

    def any_built(self) -> Built:
        """Of the last call, or of the first capture before any call."""
        ran: Built | None = self.last.built if self.last is not None else None
        return ran or next(iter(self.variants.values()))[-1].built

    @functools.cached_property
    def fingerprint(self) -> Fingerprint:
        return Fingerprint(self.stack, self.options.compile == "blocks", self.outside)

    def to_trace(self) -> nn.Module:
        """A copy of the stack to capture from."""
        return copy_to_trace(self.stack, self.fingerprint.live())

    def variant(self, signature: Signature) -> Any:
        """The program for calls of this signature to the stack as it is now; captured on first use."""
        signature = self.used(signature)
        known = self.variants.get(signature, [])
        if traced():
            if not known:
                raise InputError(f"{type(self.stack).__name__} has no graph yet for {signature}. {_EAGERLY_FIRST}")
            return known[-1]
        with self.capturing:
            now = self.fingerprint.snapshot()
            found = next((variant for variant in known if variant.seen == now), None)
            if found is None:
                found = self._captured_anew(signature, known, now)
            elif found is not known[-1]:  # the last one used comes last
                known.remove(found)
                known.append(found)
        found.seen = now  # the same object, which is compared at once
        found.built.program.refuse_sharded()
        return found

    def _captured_anew(self, signature: Signature, known: list[Variant], now: Snapshot) -> Variant:
        with one_at_a_time():
            variant = self.capture(signature, now)
        if (used := self.used(signature)) != signature:  # the capture has told more
            signature, known = used, self.variants.get(used, [])
            if (same := next((other for other in known if other.seen == now), None)) is not None:
                return same
        variant.built.program.read_from(self.stack)
        self.fingerprint.captured(variant.built.program.called())
        if len(known) == _KEPT_GRAPHS:
            changed = known[-1].seen.difference(variant.seen)
            warn(
                f"{type(self.stack).__name__} was captured {_KEPT_GRAPHS + 1} times for calls of one kind, because its "
                f"modules changed in between (the last time: {changed}). Each capture takes seconds; keep what changes "
                "at every call out of the modules' attributes."
            )
            del known[0]
        self.variants[signature] = [*known, variant]
        return variant


def stack_class(cls: type[nn.Module], blocks: bool, prepare: Callable[[Any, dict[str, Any]], Any],
                decode: Callable[[Any, dict[str, Any]], Any] | None = None,
                renamed: Callable[[dict[str, Any]], dict[str, Any]] = dict) -> type:  # fmt: skip
    """The class of a sparse stack: a prompt runs its program, a decoding step the class's own forward.

    Args:
        prepare: the `Call` of a stack with arguments by name; None: the class's own forward runs.
        decode: runs that; None: it is called as it is.
        renamed: arguments by the names that this version of the library has for them.
    """
    own = cls.forward
    names = tuple(inspect.signature(own).parameters)[1:]
    python: Callable[[Any], Any] = disable_compile if blocks else lambda function: function
    ready, lookup, checked = python(prepare), python(StackRuntime.variant), python(Built.check_sizes)
    refuse, finish, mark = python(exporting.refuse_onnx), python(_finish), dynamic_marker()
    given_to = python(_inputs)

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = renamed(dict(zip(names, args)) | kwargs)
        call = ready(self, given)
        if call is None:
            return own(self, **given) if decode is None else decode(self, given)
        runtime = self._simba
        variant = lookup(runtime, call.signature)
        checked(variant.built, cls.__name__, *call.sizes)
        program = variant.built.program
        inputs = given_to(call, variant)
        refuse()
        output = finish(runtime, variant, call, program.forward(*inputs))
        if blocks:
            mark((output if isinstance(output, Tensor) else output[0],), ((0, 1),))
        return output

    return subclass(cls, "blocks" if blocks else "whole", skip_frame(forward) if blocks else forward)


def _inputs(call: Call, variant: Variant) -> list[Any]:
    return call.inputs(variant)


def _finish(runtime: StackRuntime, variant: Variant, call: Call, flat: Any) -> Any:
    return runtime.finish(variant, call, flat)
