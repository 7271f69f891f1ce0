"""The kinds of recurrence that models are made of: what a scan of each is given, and which operators run and score it.

Whoever meets a scan in a graph looks it up here; nothing outside of `simba_fx.ops` knows a kind by name, but for the
rows of the lift table, which make operands of a library's calls.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from simba_fx.ops import delta, function_scan, scan, score  # noqa: F401  # they define the operators
from simba_fx.ops.delta import DELTA_CRITERIA
from simba_fx.ops.function_scan import FUNCTION_CRITERIA
from simba_fx.ops.operands import DeltaScan, FunctionScan, Operands, SelectiveScan, SSDScan
from simba_fx.ops.score import CRITERIA

__all__ = ["RECURRENCES", "SCANS", "Recurrence", "recurrence_of"]

_LAST = ("real", "tail", "criterion")
"""The last arguments of every score operator."""


@dataclass(frozen=True)
class Recurrence:
    """One kind: linear in the first operand of its scan, so that a token's contribution is an exact term of a sum."""

    title: str
    """In reports."""
    operands: type[Operands]
    """A record whose fields are the scan operator's arguments, in order."""
    scan: Any
    """Gives `y`, and states; y has the sizes of the first operand."""
    score: Any
    """Takes those of the operands that it reads, by the same names, and `real`, `tail`, `criterion`; gives `(B, L)`."""
    token_dim: int
    """Of the first operand; dimension 0 are the rows."""
    kernels: tuple[str, ...] = ("cpu", "cuda")
    """The types of devices on which kernels run it; elsewhere PyTorch does."""
    packages: tuple[str, ...] = ("mamba_ssm", "triton")
    """Whose kernels those are on a GPU, where they can be imported."""
    criteria: tuple[str, ...] = CRITERIA
    """What its tokens can be scored by."""

    @property
    def scored(self) -> tuple[str, ...]:
        """The operands that a score reads, by name."""
        names = tuple(argument.name for argument in self.score._schema.arguments)
        return names[: -len(_LAST)]

    def named(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments of a call of the scan by name, defaults filled in."""
        known = self.scan._schema.arguments
        given = {argument.name: held for argument, held in zip(known, args)} | dict(kwargs)
        return {argument.name: argument.default_value for argument in known} | given

    def sizes(self, lead: Tensor) -> tuple[Any, Any]:
        """B and L of the first operand."""
        return lead.shape[0], lead.shape[self.token_dim]


_OPS = torch.ops.simba_fx
RECURRENCES: tuple[Recurrence, ...] = (
    Recurrence("selective scan", SelectiveScan, _OPS.selective_scan.default, _OPS.selective_token_score.default, 2),
    Recurrence("ssd scan", SSDScan, _OPS.ssd_scan.default, _OPS.ssd_token_score.default, 1),
    Recurrence(
        "delta rule",
        DeltaScan,
        _OPS.delta_scan.default,
        _OPS.delta_token_score.default,
        1,
        kernels=("cuda",),
        packages=("fla",),
        criteria=DELTA_CRITERIA,
    ),
    Recurrence(
        "registered recurrence",
        FunctionScan,
        _OPS.recurrence.default,
        _OPS.recurrence_token_score.default,
        1,
        kernels=(),
        criteria=FUNCTION_CRITERIA,
    ),
)
SCANS: tuple[Any, ...] = tuple(recurrence.scan for recurrence in RECURRENCES)
_BY_SCAN = {recurrence.scan: recurrence for recurrence in RECURRENCES}
_BY_NAME = {str(recurrence.scan._opname): recurrence for recurrence in RECURRENCES}


def recurrence_of(operator: Any) -> Recurrence:
    """Of a scan operator, or of its name: `"selective_scan"`."""
    return _BY_NAME[operator] if isinstance(operator, str) else _BY_SCAN[operator]
