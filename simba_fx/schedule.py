"""How many tokens enter each block: the count rule (`kept_count`) and the schedules that feed it.

A schedule answers one question: which share `r_i` of the input's tokens enters block i of n (method.md section 4).
`r_0 = 1` and shares never increase, because a token that left does not come back. Shares are `fractions.Fraction`, so
counts are exact integers for plain, symbolic and per-row lengths alike.

Words: *block* counts from 0; *share* is dimensionless, in (0, 1], 1 meaning dense; *drop* is `g_i` in [0, 1], how far
block i has come from 1 to `final`: `r_i = 1 - (1 - final) * g_i`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from numbers import Rational, Real
from types import MappingProxyType
from typing import Any, Protocol, overload, runtime_checkable

import torch
from torch import Tensor

from simba_fx.errors import ScheduleError

__all__ = [
    "Budget",
    "Constant",
    "Cosine",
    "Custom",
    "Dense",
    "Explicit",
    "Linear",
    "Schedule",
    "Share",
    "Stages",
    "as_schedule",
    "kept_count",
    "resolve_shares",
]

Share = int | float | Fraction
"""What a caller may write for a share; 0.1 means 1/10 (`_fraction`)."""

Shares = tuple[Fraction, ...]
"""One share per block."""

Cost = Callable[[Shares], float]
"""FLOPs of a forward pass with these shares over those of the dense one, LM head included, in (0, 1]."""


@overload
def kept_count(length: int, share: Fraction, tail: int = 1, floor: int = 4) -> int: ...
@overload
def kept_count(length: torch.SymInt, share: Fraction, tail: int | torch.SymInt = 1, floor: int = 4) -> torch.SymInt: ...
@overload
def kept_count(length: Tensor, share: Fraction, tail: int | Tensor = 1, floor: int = 4) -> Tensor: ...


def kept_count(length: Any, share: Fraction, tail: Any = 1, floor: int = 4) -> Any:
    """Tokens that enter a block: `min(length, tail + max(ceil(share * (length - tail)), floor))`.

    The only place where a count is computed (method.md section 4). The tail is kept whole, the share applies to the
    tokens before it and **rounds up**: with `share = p / q` and `m = length - tail`, `ceil(p*m/q) = -(-p*m // q)`.
    That is integer arithmetic throughout, so the rule gives the same count for a Python int, for a `torch.SymInt` (or
    an `fx.Proxy`), and row by row for an int64 tensor `(B,)` of real tokens. At least `floor` tokens before the tail
    stay; a length of at most `tail + floor` keeps everything, and so does a share of 1.

    The paper's rule takes the minimum with the previous block's count as well. That minimum is redundant here: for
    fixed `length`, `tail` and `floor` the count is non-decreasing in `share`, and `resolve_shares` admits only
    non-increasing shares, so every count is written directly from the input's length.

    Args:
        length: tokens in the model's input (real tokens, where rows are padded).
        share: share of the input's tokens entering the block, in (0, 1].
        tail: trailing tokens that are always kept, at least 1.
        floor: least number of tokens kept before the tail.
    """
    if share == 1:
        return length
    earlier = -(-share.numerator * (length - tail) // share.denominator)
    if isinstance(length, Tensor):
        return torch.minimum(length, tail + earlier.clamp(min=floor))
    if isinstance(length, int):
        return min(length, tail + max(earlier, floor))
    at_least = torch.sym_max(earlier, floor)  # type: ignore[no-untyped-call]  # torch leaves these two untyped
    return torch.sym_min(length, tail + at_least)  # type: ignore[no-untyped-call]


@runtime_checkable
class Schedule(Protocol):
    """Anything that says which share of the tokens enters each block."""

    def shares(self, n_blocks: int) -> Shares:
        """One share per block of a model with `n_blocks` blocks, `r_0 = 1`, non-increasing."""
        ...


@dataclass(frozen=True)
class _Ramp:
    """Shares `r_i = 1 - (1 - final) * g_i` over the blocks from `start` on; a subclass says how the drop g_i goes."""

    final: Share = 0.1
    every: int = 1
    start: int = 0

    def __post_init__(self) -> None:
        _in_unit(self, "final", self.final)
        _at_least(self, "every", self.every, 1)
        _at_least(self, "start", self.start, 0)

    def shares(self, n_blocks: int) -> Shares:
        """One share per block of a model with `n_blocks` blocks."""
        if n_blocks == 1:
            return (Fraction(1),)
        if self.start + self.every >= n_blocks:
            raise ScheduleError(
                f"{self}: expected start + every below the model's {n_blocks} blocks, found {self.start + self.every};"
                " nothing would be pruned, so lower them."
            )
        depth = 1 - _fraction(self.final)
        drops = _stage_drops(self._drop, n_blocks - self.start, self.every)
        return (Fraction(1),) * self.start + tuple(1 - depth * drop for drop in drops)

    @staticmethod
    def _drop(position: Fraction) -> Fraction:
        """Drop in [0, 1] at `position` in [0, 1] of the ramp, rising, with `_drop(p) + _drop(1 - p) == 1`."""
        raise NotImplementedError


@dataclass(frozen=True)
class Linear(_Ramp):
    """A ramp from 1 to `final`: `r_i = 1 - (1 - final) * i / (n - 1)`, mean `(1 + final) / 2` (method.md section 4).

    1. `start` blocks stay dense and the ramp spans the m blocks from `start` on; like any ramp it begins at 1, so
       block `start + 1` is the first to see fewer tokens.
    2. `every=k` changes the share at every k-th block of the ramp only: the stages are a ramp of their own, from 1 to
       `final`. Where k divides m, their mean share is the mean of `every=1`.
    3. Where k does not divide m the last stage is short, so the ramp is made steeper, and stops at `final`, by just
       what brings the mean back. This is exact whenever `2 * k <= m`. Beyond that no schedule with a first stage of
       share 1 and no share below `final` has that mean; the nearest one, every later stage at `final`, is used.

    Raises: ScheduleError if `final` is outside (0, 1], `every < 1`, `start < 0`, or if nothing would be pruned because
    `start + every` reaches the number of blocks (a model of one block is dense and no error).
    """

    @staticmethod
    def _drop(position: Fraction) -> Fraction:
        return position


@dataclass(frozen=True)
class Cosine(_Ramp):
    """Half a cosine from 1 to `final`: `r_i = final + (1 - final) * (1 + cos(pi * i / (n - 1))) / 2`.

    Slow at both ends, steep in the middle, with the mean of `Linear`, exactly: cosines are rounded to 1e-6,
    symmetrically. `every`, `start` and errors: as in `Linear`.
    """

    @staticmethod
    def _drop(position: Fraction) -> Fraction:
        if position > Fraction(1, 2):
            return 1 - Cosine._drop(1 - position)
        return Fraction(round((1 - math.cos(math.pi * position)) / 2 * _COSINE_STEPS), _COSINE_STEPS)


@dataclass(frozen=True)
class Constant:
    """One share from block `max(start, 1)` on: all pruning happens at a single cut.

    The default is the mean share of the default `Linear`. Raises: ScheduleError as `Linear` does.
    """

    share: Share = 0.55
    start: int = 1

    def __post_init__(self) -> None:
        _in_unit(self, "share", self.share)
        _at_least(self, "start", self.start, 0)

    def shares(self, n_blocks: int) -> Shares:
        first = max(self.start, 1)
        if n_blocks > 1 and first >= n_blocks:
            raise ScheduleError(
                f"{self}: expected start below the model's {n_blocks} blocks, found {self.start}; nothing would be"
                " pruned, so lower start."
            )
        return (Fraction(1),) * min(first, n_blocks) + (_fraction(self.share),) * (n_blocks - first)


@dataclass(frozen=True)
class Dense:
    """Every token enters every block."""

    def shares(self, n_blocks: int) -> Shares:
        return (Fraction(1),) * n_blocks


@dataclass(frozen=True)
class Stages:
    """A mapping block -> share, each share holding from its block to the next one named; dense before the first.

    Raises: ScheduleError if a block is not an int of 0 or more, or the model has no such block.
    """

    stages: Mapping[int, Share]

    def __post_init__(self) -> None:
        for block in self.stages:
            _at_least(self, "each block", block, 0)
        object.__setattr__(self, "stages", MappingProxyType(dict(sorted(self.stages.items()))))

    def __repr__(self) -> str:
        return f"Stages({dict(self.stages)!r})"

    def __hash__(self) -> int:
        return hash(tuple(self.stages.items()))

    def shares(self, n_blocks: int) -> Shares:
        last = max(self.stages, default=0)
        if last >= n_blocks:
            raise ScheduleError(
                f"{self}: expected blocks 0 to {n_blocks - 1}, found block {last}; the model has {n_blocks} blocks."
            )
        shares, share = [], Fraction(1)
        for block in range(n_blocks):
            share = _fraction(self.stages.get(block, share))
            shares.append(share)
        return tuple(shares)


@dataclass(frozen=True)
class Explicit:
    """One share per block, as written; `resolve_shares` checks them against the model."""

    values: Sequence[Share]

    def __post_init__(self) -> None:
        object.__setattr__(self, "values", tuple(self.values))

    def shares(self, n_blocks: int) -> Shares:
        return tuple(_fraction(value) for value in self.values)


@dataclass(frozen=True)
class Custom:
    """A caller's function `n_blocks -> shares`. Raises: ScheduleError if it returns no sequence of numbers."""

    function: Callable[[int], Iterable[Share]]

    def __repr__(self) -> str:
        return f"Custom({getattr(self.function, '__name__', self.function)})"

    def shares(self, n_blocks: int) -> Shares:
        found = self.function(n_blocks)
        if isinstance(found, str) or not isinstance(found, Iterable):
            raise ScheduleError(
                f"{self}: expected the function to return {n_blocks} shares, one per block, found {found!r}."
            )
        return tuple(_fraction(value) for value in found)


@dataclass(frozen=True)
class Budget:
    """The schedule whose forward pass, LM head included, costs at most the share `flops` of the dense one.

    It knows no FLOPs itself: `solve` is given the cost of a schedule for an input of `length` tokens, and looks for the
    largest final share, in steps of 1/10000, that stays within the budget. `shape` is "linear" or "cosine" (ramps with
    `every` and `start`) or "constant" (one cut, at block `max(start, 1)`; `every` stays 1). A ramp down to the last
    block alone costs about half of dense; for less, it is made steeper and stays at its lowest share (1/10000) from
    where it gets there, so that `Budget(0.5)` and below can be met.

    1. The cost at `length` tokens is never above `flops`. It is within 1 % of it wherever a final share of this shape
       costs that: tokens are whole, so that the costs of neighbouring final shares lie up to about 0.7 / `length` apart
       (at 37 tokens 2 %, at 100 less than 1 %), and the dense forward, which scores nothing, is one of them.
    2. That is with the default tail. Inputs of other lengths get the same shares, not the same cost: shorter ones cost
       more (counts are rounded up, `floor` and tail stay), longer ones less, much less where there is attention. Solve
       for the `length` that matters.

    Raises: ScheduleError if a field is out of range or `shape` unknown, and from `solve` if the budget is out of reach.
    """

    flops: Share = 0.5
    shape: str = "linear"
    every: int = 1
    start: int = 0
    length: int = 2048

    def __post_init__(self) -> None:
        _in_unit(self, "flops", self.flops)
        _at_least(self, "every", self.every, 1)
        _at_least(self, "start", self.start, 0)
        _at_least(self, "length", self.length, 1)
        if self.shape not in ("linear", "cosine", "constant"):
            raise ScheduleError(f"{self}: expected shape 'linear', 'cosine' or 'constant', found {self.shape!r}.")
        if self.shape == "constant" and self.every != 1:
            raise ScheduleError(f"{self}: expected every=1 with shape='constant', found {self.every}.")

    def shares(self, n_blocks: int) -> Shares:
        """Refused: without a model's cost there is no answer. Raises: ScheduleError, always."""
        raise ScheduleError(f"{self}: expected the model's cost, found none; call solve(cost, {n_blocks}) instead.")

    def solve(self, cost: Cost, n_blocks: int) -> Shares:
        """Shares of the largest final share with `cost(shares) <= flops`; below 1 `cost` must not fall as shares grow.

        Dense is looked at first: without cuts nothing is scored, so it may cost less than a share just below 1. Then
        bisection, at most 17 calls of `cost` in all. Raises: ScheduleError if the cheapest schedule of this shape costs
        more.
        """
        if cost(dense := self._shares(_BUDGET_STEPS, n_blocks)) <= self.flops:
            return dense
        met = 1 if self.shape == "constant" else -_BUDGET_STEPS
        cheapest = cost(self._shares(met, n_blocks))
        if cheapest > self.flops:
            reachable = math.ceil(cheapest * 1000) / 1000
            raise ScheduleError(
                f"{self} cannot be met: even with share 0.0001 from the first cut on the forward costs {reachable:.3g}"
                f" of dense; ask for a budget from {reachable:.3g} to 1, or prune earlier (smaller start or every)."
            )
        missed = _BUDGET_STEPS
        while missed - met > 1:
            middle = (met + missed) // 2
            if cost(self._shares(middle, n_blocks)) <= self.flops:
                met = middle
            else:
                missed = middle
        return self._shares(met, n_blocks)

    def _shares(self, steps: int, n_blocks: int) -> Shares:
        """1 … 10000: final = steps / 10000. Below: final 1/10000, and a ramp up to n times as steep."""
        final = Fraction(max(steps, 1), _BUDGET_STEPS)
        if self.shape == "constant":
            return Constant(final, self.start).shares(n_blocks)
        ramp = Linear if self.shape == "linear" else Cosine
        shares = ramp(final, self.every, self.start).shares(n_blocks)
        steeper = 1 + Fraction(n_blocks * (1 - min(steps, 1)), _BUDGET_STEPS)
        return tuple(max(final, 1 - steeper * (1 - share)) for share in shares)


_NAMES: Mapping[str, Callable[[], Schedule]] = MappingProxyType(
    {"linear": Linear, "constant": Constant, "cosine": Cosine, "dense": Dense}
)


def as_schedule(value: object) -> Schedule:
    """Turn every natural spelling of a schedule into a schedule object.

    1. a name: "linear", "constant", "cosine", "dense";
    2. a number in (0, 1]: `Constant` of that share (so 1 is dense);
    3. a mapping block -> share: `Stages`;
    4. a function `n_blocks -> shares`: `Custom`;
    5. a sequence of shares: `Explicit`;
    6. an object with a method `shares(n_blocks)`: itself.

    Raises: ScheduleError for anything else, with the known names if it is a string.
    """
    if isinstance(value, str):
        if value not in _NAMES:
            raise ScheduleError(f"expected a schedule name, one of {', '.join(_NAMES)}; found {value!r}.")
        return _NAMES[value]()
    if not isinstance(value, type | bool):  # `Linear` for `Linear()`; True for 1
        if isinstance(value, Schedule):
            return value
        if isinstance(value, Real):
            return Constant(value if isinstance(value, int | float | Fraction) else float(value))
        if isinstance(value, Mapping):
            return Stages(value)
        if callable(value):
            return Custom(value)
        if isinstance(value, Iterable):
            return Explicit(tuple(value))
    raise ScheduleError(
        f"expected a schedule (a name, share, mapping, function, sequence or object), found {value!r};"
        " write for example schedule='linear' or schedule=Linear(final=0.1)."
    )


def resolve_shares(schedule: Schedule, n_blocks: int, cost: Cost | None = None) -> Shares:
    """The checked shares of a model with `n_blocks` blocks, fit for `kept_count`.

    Denominators are at most 1e9 (nearest such fraction), so that `share * length` stays inside int64 for any length
    below 2**33 and rows can be counted on a device. `cost` is needed by `Budget` alone, which is solved here.

    Raises: ScheduleError if there is not one share per block, a share is outside (0, 1], the first is not 1, or a
    share increases; the message names the block.
    """
    solved = schedule.solve(cost, n_blocks) if isinstance(schedule, Budget) and cost else schedule.shares(n_blocks)
    shares = tuple(_fraction(share) for share in solved)
    if len(shares) != n_blocks:
        raise ScheduleError(
            f"{schedule}: expected {n_blocks} shares, one per block, found {len(shares)}; write {n_blocks} shares or a"
            " mapping block -> share."
        )
    for block, share in enumerate(shares):
        if not 0 < share <= 1:
            raise ScheduleError(
                f"{schedule}: expected shares in (0, 1], found {_text(share)} at block {block}; a share is the part of"
                " the input's tokens that enters the block."
            )
        if block == 0 and share != 1:
            raise ScheduleError(
                f"{schedule}: expected share 1 at block 0, found {_text(share)}; every token enters the first block, so"
                " begin with 1."
            )
        if share > shares[max(block - 1, 0)]:
            raise ScheduleError(
                f"{schedule}: expected shares that never increase, found {_text(share)} at block {block} after"
                f" {_text(shares[block - 1])}; a token that left cannot come back, so lower this share or raise those"
                " before it."
            )
    return shares


_BUDGET_STEPS = 10_000
_FLOAT_DENOMINATOR = 10**6  # reads 0.1 as 1/10, 1/3 as 1/3, and a float32 0.1 as 1/10 too
_DENOMINATOR = 10**9
_COSINE_STEPS = 10**6


def _fraction(value: object) -> Fraction:
    """The nearest fraction with a denominator that keeps counts inside int64; a positive share stays positive.

    Raises: ScheduleError if `value` is not a finite number.
    """
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(float(value)):
        raise ScheduleError(f"expected a number for a share, found {value!r}.")
    exact, limit = (
        (Fraction(value), _DENOMINATOR) if isinstance(value, Rational) else (Fraction(float(value)), _FLOAT_DENOMINATOR)
    )
    near = exact.limit_denominator(limit)
    return near if near or exact <= 0 else Fraction(1, limit)


def _text(share: Fraction) -> str:
    return f"{float(share):.6g}"


def _in_unit(schedule: object, field: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, Real) or not 0 < float(value) <= 1:
        raise ScheduleError(f"{schedule}: expected {field} in (0, 1], found {value!r}.")


def _at_least(schedule: object, field: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ScheduleError(f"{schedule}: expected {field} to be an int of at least {least}, found {value!r}.")


def _stage_drops(drop: Callable[[Fraction], Fraction], n_blocks: int, every: int) -> list[Fraction]:
    """Drops `g_i` that change every `every` blocks, from 0 to 1, with mean 1/2 wherever `2 * every <= n_blocks`.

    1. Stage s of S has the drop `u = drop(s / (S - 1))`. `drop` is symmetric about 1/2, so stages of equal length have
       the mean 1/2 and `g = u`.
    2. A short last stage lowers the mean of u. Then `g = min(1, slope * u)`, with the one slope above 1 whose mean is
       1/2; found by supposing that the last `capped` blocks have reached 1, for `capped` = 0, 1, ...
    3. No such slope: every stage but the first has the drop 1.
    """
    last_stage = (n_blocks - 1) // every
    drops = [drop(Fraction(block // every, last_stage)) for block in range(n_blocks)]
    for capped in range(n_blocks - every):
        free = drops[: n_blocks - capped]
        slope = (Fraction(n_blocks, 2) - capped) / sum(free)
        if slope * free[-1] <= 1:
            return [min(Fraction(1), slope * g) for g in drops]
    return [Fraction(g > 0) for g in drops]
