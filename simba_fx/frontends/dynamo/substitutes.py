"""While Dynamo traces for the backend "simba_fx", and only then, each scan is one call in its graph.

A scan function is a Python loop over tokens, or an extension: Dynamo would unroll the one and stop at the other. So
each function that has a row in the lift table gets a handler (`torch.compiler.substitute_in_graph`), which Dynamo
traces instead of the function. The handler asks for whom: for another backend it runs a copy of the function, so that
the graph is the model's own; for ours it makes one call of a function that Dynamo puts into its graph as it is, and
that becomes the canonical operator when the backend traces that graph to ATen. No name is replaced in any module, and
eager calls never come here.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from simba_fx.capture import lift
from simba_fx.capture.adapters import say_not_compared
from simba_fx.capture.rows import Linear, Row, StandIn
from simba_fx.errors import CaptureError
from simba_fx.frontends.dynamo.internals import before_each_frame, constant_when_traced, output_graph

__all__ = ["is_lifted_call", "keep_fresh", "tracing_for"]

_rows: dict[Callable[..., Any], Row | None] = {}
"""Every function that has been looked at; its row in the lift table if it has a handler. Dynamo knows functions by id:
they are kept."""
_watches: dict[Any, Callable[..., Any]] = {}
_calls: set[Any] = set()
"""What stands for a lifted call in Dynamo's graph."""


def tracing_for(backend: Any) -> bool:
    """Whether the graph that Dynamo is tracing now, in this thread, goes to `backend`, however it was wrapped."""
    try:
        compiler = output_graph().compiler_fn
    except AttributeError:  # nothing is being traced
        return False
    wraps = ("_torchdynamo_orig_backend", "compiler_fn", "func")
    while inner := next((found for name in wraps if (found := getattr(compiler, name, None)) is not None), None):
        compiler = inner
    return compiler is backend


def is_lifted_call(node: fx.Node) -> bool:
    return node.target in _calls


def keep_fresh(backend: Any) -> bool:
    """From now on, functions that get a row have a handler before the next frame is traced; whether one was new."""
    watch = _watches.setdefault(backend, lambda *_: _refresh(backend))
    before_each_frame(watch)
    lift.when_registered(watch)
    return _refresh(backend)


def _refresh(backend: Any) -> bool:
    added = False
    for function, row in lift.known_functions():
        if isinstance(function, types.FunctionType) and function not in _rows:
            _rows[function] = row
            added |= _substitute(function, row, backend)
    return added


def _substitute(function: types.FunctionType, row: Row, backend: Any) -> bool:
    if isinstance(row, Linear) or (isinstance(row, StandIn) and not row.dynamo):
        return False
    stand_in = row.stand_in(function) if isinstance(row, StandIn) else _call_in_graph(function)
    own = _copy(function)

    @constant_when_traced
    def ours() -> bool:
        return tracing_for(backend)

    def handler(*args: Any, **kwargs: Any) -> Any:
        return stand_in(*args, **kwargs) if ours() else own(*args, **kwargs)

    try:
        torch.compiler.substitute_in_graph(function, skip_signature_check=True)(handler)
    except ValueError:  # Dynamo has a rule of its own for this function
        return False
    return True


def _call_in_graph(function: types.FunctionType) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        adapter: Any = lift.registered(function) or _rows[function]  # a later registration counts
        if getattr(adapter, "runs_the_function", False):
            raise CaptureError(
                f"{function.__qualname__} is a registered recurrence, which has to run on values before it is traced; "
                "expected a model without one for the backend 'simba_fx'. Use simba_fx.transform(model)."
            )
        adapted = lift.named_operands(function, adapter, args, kwargs)
        if adapted is None:
            return function(*args, **kwargs)
        say_not_compared([function], "torch.compile traces it without values; simba_fx.transform(model) compares")
        operands, finish = adapted
        return finish(*operands.run())

    call.__name__ = call.__qualname__ = function.__name__
    _calls.add(call)
    compiler: Any = torch.compiler  # untyped there
    lifted: Callable[..., Any] = compiler.allow_in_graph(call)
    return lifted


def _copy(function: types.FunctionType) -> Callable[..., Any]:
    """The same code under another identity: Dynamo runs the handler for `function` itself."""
    code, space, name = function.__code__, function.__globals__, function.__name__
    copy = types.FunctionType(code, space, name, function.__defaults__, function.__closure__)
    copy.__kwdefaults__ = function.__kwdefaults__
    copy.__dict__.update(function.__dict__)
    copy.__qualname__, copy.__module__ = function.__qualname__, function.__module__
    return copy
