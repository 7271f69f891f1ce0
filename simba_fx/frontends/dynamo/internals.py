"""Every private name of torch that the backend needs; nothing else in this folder knows one.

Dynamo promises none of them, so the backend is experimental: `tests/unit/test_canary.py` says by name which is gone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
import torch._dynamo
from torch import fx
from torch._dynamo.callback import callback_handler
from torch._dynamo.exc import TensorifyScalarRestartAnalysis
from torch._dynamo.source import AttrSource, LocalSource, NNModuleSource
from torch._dynamo.symbolic_convert import InstructionTranslator, TensorifyState
from torch._functorch.aot_autograd import aot_export_module
from torch._guards import CompileContext, TracingContext, tracing
from torch.utils._sympy.symbol import SymT, symbol_is_type

__all__ = ["AttrSource", "CompileContext", "LocalSource", "NNModuleSource", "TracingContext", "aot_export_module",
           "as_from_dynamo", "before_each_frame", "constant_when_traced", "inner_backend", "is_float", "output_graph",
           "restart", "specialize", "tracing"]  # fmt: skip


def output_graph() -> Any:
    """What Dynamo knows of the frame that it traces in this thread. Raises: AttributeError: it traces none."""
    return InstructionTranslator.current_tx().output


def restart(reason: str) -> NoReturn:
    """Have Dynamo trace the frame again. Its own exception for constants that it learns of late: the one that it takes
    from a backend."""
    raise TensorifyScalarRestartAnalysis(restart_reason=f"simba_fx: {reason}")


def specialize(floats: set[str]) -> None:
    """Numbers that Dynamo made inputs of the graph are constants of the model: the next trace takes them so."""
    if new := {name for name in floats if not TensorifyState.should_specialize(name)}:
        for name in new:
            TensorifyState.specialize(name)
        restart("floats are constants")  # the inner backend would ask for the same later


def is_float(symbol: Any) -> bool:
    return symbol_is_type(symbol, SymT.FLOAT)


def before_each_frame(watch: Callable[..., Any]) -> None:
    """Call `watch` before Dynamo traces a frame; again after `torch._dynamo.reset()`, which forgets it."""
    if watch not in callback_handler.start_callbacks:
        callback_handler.register_start_callback(watch)


def constant_when_traced(function: Callable[[], bool]) -> Callable[[], bool]:
    """Dynamo calls it, and takes what it says for a constant."""
    constant: Callable[[], bool] = torch._dynamo.assume_constant_result(function)  # type: ignore[no-untyped-call]
    return constant


def inner_backend(name: Any, mode: str | None, options: Any) -> Any:
    """What `torch.compile` itself makes of these arguments: a function of a graph and its example inputs."""
    of_torch: Any = torch  # untyped there
    if name == "inductor":
        return of_torch._TorchCompileInductorWrapper(mode, options, None)
    return of_torch._TorchCompileWrapper(name, mode, options, None)


def as_from_dynamo(node: Any, original: fx.Node) -> None:
    """A placeholder in the place of Dynamo's."""
    node._dynamo_source = original._dynamo_source  # type: ignore[attr-defined]
