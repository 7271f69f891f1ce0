"""Scores: how much each token contributes to the output at the query position, as operators that give `(B, L)`.

Song et al. 2025 (Simba), section 3, exactly as the recurrence has it: with `R_t` the sum of the steps after t up to
the query q, token t's share of `y_q` is `dt_t u_t sum_n C_q[n] B_t[n] exp(A[n] R_t)`, and its score is the largest
share over the channels, or the l2 norm of all. `R_t` is a suffix sum walked backwards from q, never `total - prefix`,
which loses digits where they matter. Scores are float32 and never differentiable. Higher = keep. Letters: see
`simba_fx.ops`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from simba_fx.errors import CriterionError
from simba_fx.ops import backends, checks
from simba_fx.ops.chunked import split_groups
from simba_fx.ops.contributions import CONTRIBUTIONS, norm, over_channels, written
from simba_fx.ops.inline import inline_on_gpu
from simba_fx.ops.operands import SelectiveScan, SSDScan

CRITERIA = (*CONTRIBUTIONS, "write", "no-decay", "delta-norm", "clip")
"""What a scan's operands can be scored by: its contributions; the norm of what the token writes into the state, whoever
reads it; the largest contribution without the decay; the l2 norm of the step sizes (DeciMamba, Ben-Kish et al. 2024);
the clipped output (UTRC, Zhan et al. 2024)."""


def query_position(
    real: Tensor | None, tail: int, *, rows: int, length: int, device: torch.device | None = None
) -> Tensor:
    """The token each row is scored at: the first of its last `tail` real tokens, `(B,)` int64.

    Without a mask that is `length - tail` in every row. With `real` `(B, L)` bool it is the last real token's slot
    minus `tail - 1`, negative for a row of fewer than `tail` tokens (all its tokens are in the tail then).
    """
    if real is None:
        return torch.full((rows,), 0, dtype=torch.int64, device=device) + (length - tail)
    slots = torch.arange(1, length + 1, device=real.device)
    return (slots * real).amax(1) - tail


def checked(operator: str, tail: int, criterion: str, known: Sequence[str] = CRITERIA) -> None:
    if criterion not in known:
        raise CriterionError(f"unknown criterion {criterion!r}; this scan can be scored by {', '.join(known)}")
    checks.at_least(operator, {"tail": (tail, 1)})


def never_differentiable(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.mark_non_differentiable(output)
    ctx.operands = len(inputs)


def no_gradients(ctx: Any, _: Tensor) -> tuple[None, ...]:
    return (None,) * int(ctx.operands)


def until(query: Tensor, length: int) -> Tensor:
    """`(B, L)` bool: the tokens up to and including the query."""
    return torch.arange(length, device=query.device) <= query.unsqueeze(1)


@torch.library.custom_op("simba_fx::selective_token_score", mutates_args=())
def selective_token_score(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    real: Tensor | None,
    tail: int,
    criterion: str,
) -> Tensor:
    """Scores the tokens of a `selective_scan` with the same operands: `(B, L)` float32, zero after the query.

    Args:
        real: `(B, L)` bool, False for padding; None when every token is real.
        tail: real tokens, counted from the end of each row, of which the first is the query; at least 1.
        criterion: one of `CRITERIA`.

    Raises:
        CriterionError: for an unknown criterion.
    """
    checked("selective_token_score", tail, criterion)
    scan = SelectiveScan(u, delta, A, B, C, None, None, delta_bias, delta_softplus)
    scan = scan.checked("selective_token_score", real=real)
    if (kernels := backends.triton_scan(scan)) is not None and criterion in CONTRIBUTIONS:
        fused: Tensor = kernels.score.selective_token_score(scan, real, tail, criterion)
        return fused
    rows, _, length, groups, _ = scan.sizes
    query = query_position(real, tail, rows=rows, length=length, device=u.device)
    if criterion == "clip":
        score = backends.selective_scan(scan)[0].float().clamp_(min=0).mean(1)
    elif criterion == "delta-norm":
        score = scan.steps().norm(dim=2)
    elif criterion == "write":
        value = split_groups(scan.steps() * u.transpose(1, 2).float(), 2, groups)
        score = written(norm(value), norm(scan.B.permute(0, 3, 1, 2)))
    elif criterion == "no-decay":
        response = (at_query(scan.C, query, 3).float() * scan.B.float()).sum(2)
        value = scan.steps() * u.transpose(1, 2).float()
        score = over_channels(response.transpose(1, 2), split_groups(value, 2, groups), criterion)
    else:
        C_query = at_query(scan.C, query, 3).squeeze(3).float()
        score = backends.selective_score(scan, C_query, query, criterion)
    return torch.where(until(query, length), score, 0.0)


def at_query(tokens: Tensor, query: Tensor, dim: int) -> Tensor:
    """The slice of `tokens` at each row's query along `dim`, which stays with size 1."""
    shape = [1] * tokens.dim()
    shape[0] = -1
    index_shape = list(tokens.shape)
    index_shape[dim] = 1
    return tokens.gather(dim, query.clamp(min=0).view(shape).expand(index_shape))


@selective_token_score.register_fake
def _(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, delta_bias: Tensor | None, delta_softplus: bool,
    real: Tensor | None, tail: int, criterion: str,
) -> Tensor:  # fmt: skip
    checked("selective_token_score", tail, criterion)
    SelectiveScan(u, delta, A, B, C, delta_bias=delta_bias).checked("selective_token_score", real=real)
    return u.new_empty(u.shape[0], u.shape[2], dtype=torch.float32)


selective_token_score.register_autograd(no_gradients, setup_context=never_differentiable)


@torch.library.custom_op("simba_fx::ssd_token_score", mutates_args=())
def ssd_token_score(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    dt_min: float,
    dt_max: float,
    real: Tensor | None,
    tail: int,
    criterion: str,
) -> Tensor:
    """Scores the tokens of an `ssd_scan` with the same operands: `(B, L)` float32, zero after the query.

    A head has one decay, hence one weight for all of its channels: x is read once, no contribution is
    materialised. `real`, `tail`, `criterion` as in `selective_token_score`.

    Raises:
        CriterionError: for an unknown criterion.
    """
    checked("ssd_token_score", tail, criterion)
    scan = SSDScan(x, dt, A, B, C, None, None, dt_bias, dt_softplus, dt_min, dt_max)
    scan = scan.checked("ssd_token_score", real=real)
    rows, length, _, _, groups, _ = scan.sizes
    query = query_position(real, tail, rows=rows, length=length, device=x.device)
    if (kernels := backends.triton_for(x)) is not None and criterion in (*CONTRIBUTIONS, "no-decay"):
        response = (at_query(C, query, 1).float() * B.float()).sum(3)
        fused: Tensor = kernels.score.ssd_token_score(scan, response, real, tail, criterion)
        return fused
    counted = until(query, length)
    if criterion == "clip":
        score = backends.ssd_scan(scan)[0].float().clamp_(min=0).mean((2, 3))
    elif criterion == "delta-norm":
        score = scan.steps().norm(dim=2)
    elif criterion == "write":
        score = written(split_groups(scan.steps() * norm(x), 2, groups), norm(scan.B).unsqueeze(3))
    else:
        step = scan.steps()
        weight = split_groups(step, 2, groups) * (at_query(C, query, 1).float() * B.float()).sum(3, keepdim=True)
        if criterion != "no-decay":
            weight = weight * split_groups(torch.exp(remaining_steps(step, counted) * A.float()), 2, groups)
        score = over_channels(weight.flatten(2), x, criterion)
    return torch.where(counted, score, 0.0)


def remaining_steps(step: Tensor, counted: Tensor) -> Tensor:
    """`R_t = sum_{t < i <= q} dt_i` `(B, L, ·)`: the suffix sum of `step` `(B, L, ·)`, zero from the query on."""
    backwards = torch.where(counted.unsqueeze(2), step, 0.0).flip(1)
    return torch.cat((torch.zeros_like(backwards[:, :1]), backwards[:, :-1].cumsum(1)), 1).flip(1)


@ssd_token_score.register_fake
def _(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, dt_bias: Tensor | None, dt_softplus: bool,
    dt_min: float, dt_max: float, real: Tensor | None, tail: int, criterion: str,
) -> Tensor:  # fmt: skip
    checked("ssd_token_score", tail, criterion)
    SSDScan(x, dt, A, B, C, dt_bias=dt_bias).checked("ssd_token_score", real=real)
    return x.new_empty(x.shape[0], x.shape[1], dtype=torch.float32)


ssd_token_score.register_autograd(no_gradients, setup_context=never_differentiable)


def _selective_as_triton(*args: Any) -> bool:
    """Whether a score with these arguments, of which the criterion is the last, is made of Triton kernels."""
    return args[-1] in CONTRIBUTIONS and backends.triton_scan(SelectiveScan(*args[:5])) is not None


def _ssd_as_triton(*args: Any) -> bool:
    return args[-1] in (*CONTRIBUTIONS, "no-decay") and backends.has_triton()


inline_on_gpu(selective_token_score, _selective_as_triton)
inline_on_gpu(ssd_token_score, _ssd_as_triton)
