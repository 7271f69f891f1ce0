"""The arguments of `transform`, checked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, cast

from torch import Tensor

from simba_fx import ops, schedule
from simba_fx.errors import CriterionError, SimbaError
from simba_fx.ops.delta import DELTA_CRITERIA
from simba_fx.ops.operands import Operands

__all__ = ["CRITERIA", "CRITERION", "SCHEDULE", "Criterion", "Options", "named_positions"]

Criterion = Callable[[Operands, Tensor], Tensor]
CRITERIA = (*DELTA_CRITERIA, *ops.POSITION_CRITERIA)
"""Not every scan can be scored by each (`simba_fx.ops.recurrences`)."""
SCHEDULE, CRITERION, SPAN = 0.5, "simba-l2+write", 15
"""What `transform` does unless it is told: the setting that won what was measured (docs/findings.md)."""


@dataclass(frozen=True)
class Options:
    """The arguments of `transform`, normalised."""

    schedule: schedule.Schedule
    criterion: str | Criterion = CRITERION
    output: Literal["full", "kept"] = "full"
    floor: int = 4
    kernels: Literal["auto", "model"] = "auto"
    compile: Literal["blocks", "whole"] = "blocks"
    seed: int = 0
    span: int | None = None
    query: int | None = None
    protect: tuple[int, ...] = ()
    labels: Literal["all", "kept"] = "all"
    tail: Literal["last", "labels"] = "last"
    pad_token_id: int | None = None
    mask: str | Literal[False] | None = None
    mask_marks: Literal["real", "padding"] = "real"

    @property
    def pooled(self) -> int:
        """The span, settled."""
        return cast(int, self.span)

    @property
    def named(self) -> tuple[int, ...]:
        """The positions that are kept in every block, each once."""
        return tuple(named_positions(self.query, self.protect))

    @property
    def least_kept(self) -> int:
        """The floor that selections have: room for every named position."""
        return max(self.floor, len(self.named))

    @property
    def least_tail(self) -> int:
        """Trailing tokens that are kept unless `simba_fx.tail` says more: with a query of its own, none."""
        return 1 if self.query is None else 0

    def __post_init__(self) -> None:
        names = self.criterion.split("+") if isinstance(self.criterion, str) else []
        if unknown := [name for name in names if name not in CRITERIA]:
            raise CriterionError(
                f"Unknown criterion {unknown[0]!r}: expected one of {', '.join(map(repr, CRITERIA))}, or a "
                "callable (scan operands, query) -> (B, L)."
            )
        if len(names) > 1 and (plain := [name for name in names if name in ops.POSITION_CRITERIA]):
            raise CriterionError(
                f"{self.criterion!r} combines scores of scans; {plain[0]!r} looks at positions only and has none. "
                "Leave it out."
            )
        if not isinstance(self.criterion, str) and not callable(self.criterion):
            raise CriterionError(
                "Expected a criterion's name or a callable (scan operands, query) -> (B, L), found "
                f"{type(self.criterion).__name__}. Write for example criterion='simba'."
            )
        choices = {"output": ("full", "kept"), "kernels": ("auto", "model"), "compile": ("blocks", "whole"),
                   "labels": ("all", "kept"), "tail": ("last", "labels"),
                   "mask_marks": ("real", "padding")}  # fmt: skip
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise SimbaError(
                    f"Unknown {name}={getattr(self, name)!r}: expected {' or '.join(map(repr, known))}. Write "
                    f"transform(model, {name}={known[0]!r})."
                )
        if self.mask is not None and self.mask is not False and not isinstance(self.mask, str):
            raise SimbaError(
                "transform expects mask to be the name of the argument that is a padding mask, or False where there is "
                f"none; found {self.mask!r}. Write for example mask='key_padding_mask'."
            )
        for name, least in (("floor", 0), ("seed", -(2**31))):
            number = getattr(self, name)
            if isinstance(number, bool) or not isinstance(number, int) or not least <= number < 2**31:
                kind = "an int of at least 0 (tokens kept before the tail)" if name == "floor" else "a 32-bit int"
                raise SimbaError(
                    f"transform expects {name} to be {kind}; found {number!r}. Write for example {name}=4."
                )
        if self.span is None:
            object.__setattr__(self, "span", SPAN if self.criterion == CRITERION else 1)
        if not _is_position(self.span) or not 1 <= self.pooled <= ops.pool.MOST or self.pooled % 2 == 0:
            raise SimbaError(
                "transform expects span to be an odd number of tokens whose best score each gets, from 1 (none) to "
                f"{ops.pool.MOST}; found {self.span!r}. Write for example span=31."
            )
        if self.pooled > 1 and self.criterion in ops.POSITION_CRITERIA:
            raise CriterionError(
                f"span={self.span} pools the scores of scans; criterion {self.criterion!r} looks at positions only and "
                "has none. Leave span out, or pass criterion='simba-l2'."
            )
        if self.query is not None and not _is_position(self.query):
            raise SimbaError(
                "transform expects query to be a position in the row, an int (0 the first token, -1 the last), or "
                f"None; found {self.query!r}. Write for example query=0."
            )
        sequence = isinstance(self.protect, Sequence) and not isinstance(self.protect, str)
        wrong = [position for position in self.protect if not _is_position(position)] if sequence else [self.protect]
        if wrong:
            raise SimbaError(
                "transform expects protect to be a sequence of positions in the row, ints (0 the first token, -1 the "
                f"last); found {wrong[0]!r}. Write for example protect=[0]."
            )
        object.__setattr__(self, "protect", tuple(self.protect))
        if self.pad_token_id is not None and (not _is_position(self.pad_token_id) or self.pad_token_id < 0):
            raise SimbaError(
                "transform expects pad_token_id to be the id of the tokens that pad rows at their end, an int of at "
                f"least 0, or None; found {self.pad_token_id!r}. Write for example pad_token_id=0."
            )
        if self.tail == "labels" and self.query is not None:
            raise SimbaError(
                f"tail='labels' scores each row at the token that predicts its first label, and query={self.query} at "
                "another; expected one of the two. Leave one out."
            )


def _is_position(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and -(2**31) <= value < 2**31


def named_positions(query: int | None, protect: tuple[int, ...]) -> list[int]:
    """What must be kept in every block, each position once, the query first."""
    return list(dict.fromkeys((*(() if query is None else (query,)), *protect)))
