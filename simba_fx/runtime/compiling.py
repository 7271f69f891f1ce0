"""How `torch.compile` is told what to compile: frames it leaves to Python, functions it stays out of, dynamic sizes.

Importing Dynamo takes a second, so nothing here does it before a model is transformed.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor

__all__ = ["disable_compile", "dynamic_marker", "skip_frame", "skip_frame_unless_inlined"]

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
def dynamic_marker() -> Callable[[Iterable[Any], Iterable[tuple[int, ...]]], None]:
    """A function that lets the first compilation serve every size of the given dimensions of the given tensors."""
    import torch._dynamo

    def mark(values: Iterable[Any], dims: Iterable[tuple[int, ...]]) -> None:
        for tensor, dynamic in zip(values, dims):
            if isinstance(tensor, Tensor):
                for dim in dynamic[: tensor.dim()]:
                    torch._dynamo.maybe_mark_dynamic(tensor, dim)

    marker: Callable[[Iterable[Any], Iterable[tuple[int, ...]]], None] = skip_frame(mark)
    return marker
