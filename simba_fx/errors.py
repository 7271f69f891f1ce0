"""Every error a caller can cause. One base class, so that `except SimbaError` catches them all."""

from __future__ import annotations


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
