"""How many tokens enter each block: the count rule (`kept_count`) and the schedules that feed it."""

from __future__ import annotations

from fractions import Fraction
from typing import Any, overload

import torch
from torch import Tensor


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
