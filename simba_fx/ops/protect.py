"""Tokens that a caller names by position: where they stand in each row, and scores that let none of them go.

A position counts a row's *real* tokens, 0 the first and -1 the last, so that it means the same token whatever padding
the row travels with. Letters: see `simba_fx.ops`; m slots of a region, n named tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from simba_fx.errors import OperandError
from simba_fx.ops import checks


@torch.library.custom_op("simba_fx::row_positions", mutates_args=())
def row_positions(positions: Tensor, real: Tensor | None, wanted: list[int]) -> Tensor:
    """Where the wanted real tokens of each row stand in the input, `(B, n)` int64.

    Args:
        positions: `(B, L)` int64, of the input's slots, ascending.
        real: `(B, L)` bool, False for padding; None when every token is real.
        wanted: n counts of real tokens, from the row's first (0, 1, …) or from its last (-1, -2, …). Each row has that
            many tokens: `simba_fx.runtime.inputs` checks it.
    """
    checks.fit("row_positions", checks.SLOTS, positions=positions, real=real)
    length = positions.shape[1]
    for count in wanted:
        checks.at_least(
            "row_positions", {f"the number of tokens, for position {count},": (length, max(count + 1, -count))}
        )
    if real is None:
        columns = [positions[:, count] for count in wanted]
    else:
        from_first, from_last = real.cumsum(1), real.flip(1).cumsum(1).flip(1)
        hits = [real & (from_first == count + 1 if count >= 0 else from_last == -count) for count in wanted]
        if real.device.type == "cpu" and not all(bool(hit.any(1).all()) for hit in hits):
            raise OperandError(
                f"simba_fx::row_positions expected rows that have the positions {list(wanted)}; found a row of "
                f"{int(real.sum(1).min())} real tokens. Name positions that every row has."
            )
        columns = [positions.gather(1, hit.long().argmax(1, keepdim=True)).squeeze(1) for hit in hits]
    return torch.stack(columns, 1)


@row_positions.register_fake
def _(positions: Tensor, real: Tensor | None, wanted: list[int]) -> Tensor:
    checks.fit("row_positions", checks.SLOTS, positions=positions, real=real)
    return positions.new_empty(positions.shape[0], len(wanted))


@torch.library.custom_op("simba_fx::protect_tokens", mutates_args=())
def protect_tokens(score: Tensor, positions: Tensor, protected: Tensor) -> Tensor:
    """Scores `(B, m)` float32 with +inf where a slot holds a protected token, and nowhere else.

    Args:
        score: `(B, m)` float32, higher = keep; an infinite one becomes the largest finite number, so that it cannot
            push a protected token out.
        positions: `(B, m)` int64, where each slot's token stood in the input.
        protected: `(B, n)` int64, positions in the input.
    """
    checks.fit("protect_tokens", checks.SLOTS, score=score, positions=positions, protected=protected)
    hit = (positions.unsqueeze(2) == protected.unsqueeze(1)).any(2)
    return torch.where(hit, torch.inf, score.clamp(max=torch.finfo(score.dtype).max))


@protect_tokens.register_fake
def _(score: Tensor, positions: Tensor, protected: Tensor) -> Tensor:
    checks.fit("protect_tokens", checks.SLOTS, score=score, positions=positions, protected=protected)
    return torch.empty_like(score, memory_format=torch.contiguous_format)
