"""A scan that a model runs as a Python loop over its tokens is found while it is traced, not after minutes of it."""

from __future__ import annotations

import collections
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from torch.overrides import TorchFunctionMode

from simba_fx.errors import ScanNotFoundError
from simba_fx.guards import is_foreign
from simba_fx.lift import CallSite

_CAPTURE = str(Path(__file__).with_name("capture.py"))
_ROUNDS, _CALLS = 20, 60
"""A line that ran so often, in one call of a function with so many operators, loops. The example that is traced has 24
tokens. Loops over heads, groups or taps are shorter, and a loop over blocks calls modules in between."""


class RefuseLoops(TorchFunctionMode):
    """While a model is traced: raises where a function loops before any scan was met.

    Args:
        sites: grows as the trace meets registered functions; whoever has a scan may loop over what is left.
        name: of the model, for the message.

    Raises:
        ScanNotFoundError: naming the function and its line.
    """

    def __init__(self, sites: Sequence[CallSite], name: str) -> None:
        super().__init__()
        self.sites, self.name = sites, name
        self.met = False
        self.frame: int | None = None
        self.lines: collections.Counter[int] = collections.Counter()

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.met = self.met or any(site.scans for site in self.sites)
        if not self.met:
            frame: FrameType | None = sys._getframe(1)
            while frame is not None and is_foreign(frame):
                frame = None if frame.f_code.co_filename == _CAPTURE else frame.f_back
            if frame is not None:
                self._count(frame)
        return function(*args, **(kwargs or {}))

    def _count(self, frame: FrameType) -> None:
        if id(frame) != self.frame:
            self.frame = id(frame)
            self.lines.clear()
        self.lines[frame.f_lineno] += 1
        if self.lines[frame.f_lineno] < _ROUNDS or self.lines.total() < _CALLS:
            return
        module, line = frame.f_globals.get("__name__", "?"), frame.f_lineno
        raise ScanNotFoundError(
            f"{self.name} calls {module}.{frame.f_code.co_qualname}, which loops over tokens in Python (line {line}); "
            "expected a registered scan function, found none before it. If it computes the recurrence of Mamba or "
            "Mamba-2, register it: simba_fx.register_scan(function, adapter). Other recurrences cannot be pruned."
        )
