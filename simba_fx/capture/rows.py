"""The rows of the lift table: what stands for a scan function while a model is captured."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from simba_fx.ops.operands import Operands

__all__ = ["Adapter", "Finish", "Linear", "Row", "StandIn"]

Finish = Callable[[Any, Any], Any]
Adapter = Callable[..., Operands | tuple[Operands, Finish] | None]
"""Takes the arguments of the function it stands for. Returns the scan's operands, and, unless the function returns `y`
alone, a second function `(y, last_state) -> what the function returns`. None: this call is left as it is."""


@dataclass(frozen=True)
class StandIn:
    """A row of the lift table for a function that runs no scan: while a model is captured, `stand_in(original)` is
    called in its place."""

    stand_in: Callable[[Callable[..., Any]], Callable[..., Any]]
    dynamo: bool = True
    """Whether it is called in the function's place under `torch.compile(backend="simba_fx")` too."""


@dataclass(frozen=True)
class Linear:
    """A row of the lift table for a function that runs as it is, and is linear in the argument `value`: what
    `register_recurrence` is told."""

    value: str
    shared: bool = False


Row = Adapter | StandIn | Linear
