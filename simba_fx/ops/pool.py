"""What becomes of scores: spans instead of single tokens, and ranks, by which criteria of different sizes combine.

What a convolution, a state that decays within a few tokens, or a copied phrase needs is a token *and* its neighbours: a
token is worth as much as the best of these. Prefill compression of transformers pools its scores for the same reason
(SnapKV, Li et al. 2024).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from simba_fx.errors import OperandError
from simba_fx.ops import checks
from simba_fx.ops.inline import inline_on_gpu
from simba_fx.ops.score import query_position, until
from simba_fx.ops.select import ranking

MOST = 1023
"""Tokens that can be pooled: of more, a score says nothing of the token that has it."""


@torch.library.custom_op("simba_fx::pool_scores", mutates_args=())
def pool_scores(score: Tensor, real: Tensor | None, tail: int, span: int) -> Tensor:
    """The largest score among the `span` slots around each, `(B, m)` float32; zero after the query, and of padding.

    Neighbours are slots of the region, tokens that are still there. Those after the query and padding are none, so that
    a row's scores depend neither on its answer nor on its batch. NaN is the least of all.

    Args:
        score: `(B, m)` float32, higher = keep.
        real: `(B, m)` bool, False for padding; None when every token is real.
        tail: as in `selective_token_score`.
        span: odd, at most `MOST`; 1 pools nothing.

    Raises:
        OperandError: another span.
    """
    _check(score, real, tail, span)
    counted = _counted(score, real, tail)
    score = torch.where(counted, score.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf), -torch.inf)
    around = F.pad(score, (span // 2, span // 2), value=-torch.inf)
    return torch.where(counted, around.unfold(1, span, 1).amax(2), 0.0)


@pool_scores.register_fake
def _(score: Tensor, real: Tensor | None, tail: int, span: int) -> Tensor:
    _check(score, real, tail, span)
    return torch.empty_like(score, memory_format=torch.contiguous_format)


def _check(score: Tensor, real: Tensor | None, tail: int, span: int) -> None:
    checks.fit("pool_scores", checks.SLOTS, score=score, real=real)
    checks.at_least("pool_scores", {"tail": (tail, 1), "span": (span, 1)})
    if span % 2 == 0 or span > MOST:
        raise OperandError(f"simba_fx::pool_scores expected span to be odd and at most {MOST}; found {span}.")


inline_on_gpu(pool_scores, lambda *_: True)


@torch.library.custom_op("simba_fx::rank_scores", mutates_args=())
def rank_scores(score: Tensor, real: Tensor | None, tail: int) -> Tensor:
    """Minus the number of tokens of the row that are better, `(B, m)` float32: 0 for the best; zero after the query.

    Ranks of several criteria can be compared: the larger of two says which token is among the best of either. Of equal
    scores the later token is the better one; tokens after the query and padding do not count. Arguments as in
    `pool_scores`.
    """
    checks.fit("rank_scores", checks.SLOTS, score=score, real=real)
    checks.at_least("rank_scores", {"tail": (tail, 1)})
    rows, slots = score.shape
    counted = _counted(score, real, tail)
    least = torch.finfo(score.dtype).min  # worse than any token that counts are only those that do not
    order = ranking(score.nan_to_num(nan=least, neginf=least).masked_fill(~counted, -torch.inf))
    place = torch.arange(slots, device=score.device, dtype=torch.float32).expand(rows, slots)
    rank = torch.empty_like(score, memory_format=torch.contiguous_format).scatter_(1, order, -place)
    return torch.where(counted, rank, 0.0)


@rank_scores.register_fake
def _(score: Tensor, real: Tensor | None, tail: int) -> Tensor:
    checks.fit("rank_scores", checks.SLOTS, score=score, real=real)
    checks.at_least("rank_scores", {"tail": (tail, 1)})
    return torch.empty_like(score, memory_format=torch.contiguous_format)


def _counted(score: Tensor, real: Tensor | None, tail: int) -> Tensor:
    """Real tokens up to the query, `(B, m)` bool."""
    rows, slots = score.shape
    counted = until(query_position(real, tail, rows=rows, length=slots, device=score.device), slots)
    return counted if real is None else counted & real
