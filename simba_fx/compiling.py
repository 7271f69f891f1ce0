"""How this package talks to torch's compiler. Every private name of torch stands here, but for those of the Dynamo
backend (`simba_fx.frontends.dynamo.internals`) and of operators in CUDA graphs (`simba_fx.ops.inline`).

1. What is traced, and by whom. 2. What `torch.compile` is told: frames it leaves to Python, functions it stays out
of, dynamic sizes. Importing Dynamo takes a second, so nothing here does it before a model is transformed.
"""

from __future__ import annotations

import functools
import gc
import threading
import types
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import fake_tensor
from torch.fx.graph_module import _loader as source_texts
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._sympy.printers import PythonPrinter

__all__ = [
    "FakeTensorMode",
    "PythonPrinter",
    "TorchDispatchMode",
    "assert_on_device",
    "capturing",
    "disable_compile",
    "dynamic_marker",
    "enter_autocast",
    "exit_autocast",
    "exported",
    "is_compiled_method",
    "one_at_a_time",
    "questions_about_compiling",
    "recorded",
    "sets_grad_enabled",
    "skip_frame",
    "skip_frame_unless_inlined",
    "source_texts",
    "traced",
    "vary",
]

# --- what is traced, and by whom: torch's own flags are the whole process's ------------------------------------------


class FakeTensorMode(fake_tensor.FakeTensorMode):  # type: ignore[no-untyped-call]  # untyped in torch
    """Torch's, which remembers no results: the process would keep those of every size that was ever counted."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.cache_enabled = False


_lock = threading.RLock()
_capturing: int | None = None
"""The thread that captures a model right now."""


@contextmanager
def one_at_a_time() -> Iterator[None]:
    """While a model is captured and rewritten: names are patched, and torch's tracing modes are the process's.

    Python's collector rests meanwhile. Graphs are large heaps of objects that live, which it would look through again
    and again.
    """
    with _lock:
        collects = gc.isenabled()
        gc.disable()
        try:
            yield
        finally:
            if collects:
                gc.enable()


@contextmanager
def capturing() -> Iterator[None]:
    """Around a capture, which is this thread's: what the others do meanwhile is not traced.

    Fake tensors are made anew: to look one of symbolic sizes up in torch's cache, and to copy it, takes longer.
    """
    import torch._dynamo.config

    global _capturing
    with one_at_a_time(), torch._dynamo.config.patch(fake_tensor_cache_enabled=False):
        before, _capturing = _capturing, threading.get_ident()
        try:
            yield
        finally:
            _capturing = before


def traced() -> bool:
    """Whether this call is being traced into a graph. torch's own flag is the whole process's: a capture in another
    thread does not count."""
    if torch.compiler.is_dynamo_compiling():
        return True
    return torch.compiler.is_compiling() and (_capturing is None or _capturing == threading.get_ident())


def exported() -> bool:
    """Whether torch.export is tracing this call: likewise, not a capture in another thread.

    Torch's flag itself, which Dynamo reads and guards. Of `torch.compiler.is_exporting()` it makes a constant: torch
    2.11's makes it True in every frame that it compiles, export or none.
    """
    return torch.compiler._is_exporting_flag and (_capturing is None or _capturing == threading.get_ident())


sets_grad_enabled = torch._C._set_grad_enabled
"""What `no_grad` and its like end in, as a function mode is told."""

enter_autocast, exit_autocast = (vars(torch.amp)[name] for name in ("_enter_autocast", "_exit_autocast"))
"""What `torch.autocast` becomes in a graph."""


def recorded() -> bool:
    """Whether this call is traced, or recorded by `torch.jit.trace`."""
    return traced() or bool(torch._C._get_tracing_state())


def questions_about_compiling() -> tuple[tuple[Any, str], ...]:
    """Torch's functions that say whether a call is compiled or exported, by owner and name."""
    import torch._dynamo

    owners: tuple[Any, ...] = (torch.compiler, torch._dynamo, torch._utils)
    return (*((owner, "is_compiling") for owner in owners), (torch.compiler, "is_exporting"))


def assert_on_device(condition: Tensor, message: str) -> None:
    """Fail there, some time later, where `condition` does not hold; the host does not wait."""
    torch._assert_async(condition, message)


# --- what torch.compile is told --------------------------------------------------------------------------------------

_BLOCKS = (
    "compile='blocks' compiles block by block; fullgraph=True and torch.export.export(strict=True) need "
    "simba_fx.transform(..., compile='whole')"
)


def _own_code(function: Any) -> Any:
    """A copy with a code object of its own: Dynamo remembers code objects."""
    code = function.__code__.replace()
    own: Any = types.FunctionType(code, function.__globals__, function.__name__, None, function.__closure__)
    own.__defaults__, own.__kwdefaults__ = function.__defaults__, function.__kwdefaults__
    return functools.update_wrapper(own, function)


def skip_frame(function: Any) -> Any:
    """Dynamo runs this frame as it is, and goes on compiling the frames that it calls.

    `torch._dynamo.disable(recursive=False)` promises the same, but its wrapper raises wherever torch.export is at work
    in the process, be it in another thread.
    """
    import torch._dynamo.decorators

    skipped: Any = torch._dynamo.decorators.skip(_own_code(function))
    skipped._torchdynamo_disable_msg = _BLOCKS
    return skipped


def skip_frame_unless_inlined(function: Any) -> Any:
    """As `skip_frame`, but a frame that Dynamo compiles may inline this one."""
    import torch._dynamo.eval_frame

    inlined = _own_code(function)
    torch._dynamo.eval_frame.skip_code(inlined.__code__)
    return inlined


def disable_compile(function: Any) -> Any:
    """Dynamo compiles neither this frame nor those that it calls."""
    import torch._dynamo

    return torch._dynamo.disable(function)  # type: ignore[no-untyped-call]  # untyped in torch


@functools.cache
def dynamic_marker() -> Callable[..., None]:
    """A function that lets the first compilation serve every size of the given dimensions of the given tensors, where
    one may come: inside of a compiled call, or, if told `always`, in a call that is to follow."""
    import torch._dynamo

    compiler = torch._C._dynamo.eval_frame.get_eval_frame_callback

    def mark(values: Iterable[Any], dims: Iterable[tuple[int, ...]], always: bool = False) -> None:
        if compiler() is None and not always:  # eager: nobody reads marks
            return
        for tensor, dynamic in zip(values, dims):
            if isinstance(tensor, Tensor):
                for dim in dynamic[: tensor.dim()]:
                    torch._dynamo.maybe_mark_dynamic(tensor, dim)

    marker: Callable[..., None] = skip_frame(mark)
    return marker


def is_compiled_method(held: Any) -> bool:
    """Whether `torch.compile` made this of a module's method: it goes on running that module, whoever holds it."""
    if not isinstance(held, types.FunctionType):
        return False
    method = getattr(held, "_torchdynamo_orig_callable", None)
    return isinstance(getattr(method, "__self__", None), torch.nn.Module)


def vary(tensor: Tensor, *dims: int) -> None:
    """Let the first compilation serve every size of these dimensions."""
    torch._dynamo.maybe_mark_dynamic(tensor, dims)
