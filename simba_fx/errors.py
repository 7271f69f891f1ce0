"""Every error a caller can cause. One base class, so that `except SimbaError` catches them all. And `warn`."""

from __future__ import annotations

import sys
import warnings


class SimbaError(Exception):
    """Base class of the errors that simba_fx raises for what a caller can cause."""


class ScheduleError(SimbaError, ValueError):
    """A schedule, share, tail or floor that cannot be used."""


class CriterionError(SimbaError, ValueError):
    """An unknown criterion, or a user's criterion whose result has the wrong shape."""


class CaptureError(SimbaError, RuntimeError):
    """The model could not be captured as one graph with a symbolic sequence length."""


class ScanNotFoundError(CaptureError):
    """No registered scan function was called while the model was captured."""


class CacheError(CaptureError):
    """What a prompt leaves behind cannot be kept for decoding; the same call with `use_cache=False` runs."""


class GraphError(SimbaError, RuntimeError):
    """A pass met a graph that it must not rewrite, or left one that breaks its contract."""


class InputError(SimbaError, ValueError):
    """A call of a transformed model with inputs it cannot prune correctly."""


class OperandError(SimbaError, ValueError):
    """An operator was given operands that do not fit together, or indices of tokens that are not there."""


def warn(message: str) -> None:
    """A `UserWarning` at the line of the caller's own code, however deep inside of torch this package was called."""
    level, frame = 2, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in _ON_THE_WAY:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, UserWarning, stacklevel=level)


_ON_THE_WAY = {"contextlib", "functools", "simba_fx", "torch", "transformers"}
