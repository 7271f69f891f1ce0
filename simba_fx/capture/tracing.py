"""Who is tracing: torch's own flags are the whole process's, and captures in other threads must not be seen."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ["capturing", "exported", "one_at_a_time", "traced"]

one_at_a_time = threading.RLock()
"""Held while a model is captured and rewritten: names are patched, and torch's tracing modes are the process's."""
_capturing: int | None = None
"""The thread that captures a model right now."""


@contextmanager
def capturing() -> Iterator[None]:
    """Around a capture, which is this thread's: what the others do meanwhile is not traced."""
    global _capturing
    with one_at_a_time:
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
