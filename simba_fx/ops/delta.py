"""Gated delta rules as operators: their scan, and the contribution of each token to the scan's output at a query.

    S_t = e^{g_t} S_{t-1} + k_t beta_t (v_t - (e^{g_t} S_{t-1})^T k_t)^T,    y_t = S_t^T q_t,    S (K, V) for each head

Yang et al. 2024 (Gated DeltaNet), section 3, as transformers' `torch_chunk_gated_delta_rule` and fla's
`chunk_gated_delta_rule` compute it; with a decay for each key channel, g `(K,)`, it is Kimi delta attention (Kimi Team
2025), `chunk_kimi_delta_attention` and `chunk_kda`. Keys and queries come normalised and scaled. y is linear in v, so a
token's contribution to y_q is `c_t v_t` with one number for each head: `c_t = beta_t k_t . r_t`, where r is the query
carried backwards in time, `r_{t-1} = e^{g_t} (r_t - k_t c_t)`.

Letters: see `simba_fx.ops`; here K, V are the sizes of a head's keys and values, G heads of keys share H heads of
values evenly.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from simba_fx.ops import backends
from simba_fx.ops.chunked_delta import delta_writes
from simba_fx.ops.contributions import norm, over_channels, written
from simba_fx.ops.inline import differentiated, inline_on_gpu, never
from simba_fx.ops.operands import DeltaScan
from simba_fx.ops.score import (
    CRITERIA,
    at_query,
    checked,
    never_differentiable,
    no_gradients,
    query_position,
    until,
)

__all__ = ["DELTA_CRITERIA", "delta_scan", "delta_token_score"]

DELTA_CRITERIA = (*CRITERIA, "removal")
"""The last: what the output loses without a token's write and erase, `c_t (v_t - S^T k_t)`. A token that only erases
counts then; shares do not add up to the output."""


@torch.library.custom_op("simba_fx::delta_scan", mutates_args=())
def delta_scan(
    v: Tensor, q: Tensor, k: Tensor, g: Tensor, beta: Tensor, chunk_size: int = 64
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The scan of a gated delta rule.

    Args:
        v: values `(B, L, H, V)`.
        q, k: `(B, L, G, K)`, normalised and scaled; head h reads group `h // (H // G)`.
        g: log decay `(B, L, H)`, or `(B, L, H, K)` for each key channel; not positive.
        beta: how much of a token's value replaces what the state held at its key `(B, L, H)`.
        chunk_size: tokens per matrix product; the result does not depend on it.

    Returns:
        y `(B, L, H, V)` contiguous in v's dtype; the last state `(B, H, K, V)`, float32.
    """
    scan = DeltaScan(v, q, k, g, beta, chunk_size).checked("delta_scan")
    y, last = backends.delta_scan(scan)
    return y.to(v.dtype).contiguous().detach(), last.contiguous().detach()  # no views, which nobody may write into


@delta_scan.register_fake
def _(*arguments: Any) -> tuple[Tensor, Tensor]:
    scan = DeltaScan(*arguments).checked("delta_scan")
    rows, _, heads, width = scan.v.shape
    return scan.v.new_empty(scan.v.shape), scan.v.new_empty(rows, heads, scan.k.shape[3], width, dtype=torch.float32)


@torch.library.custom_op("simba_fx::delta_scan_backward", mutates_args=())
def delta_scan_backward(
    dy: Tensor, dlast: Tensor, v: Tensor, q: Tensor, k: Tensor, g: Tensor, beta: Tensor, chunk_size: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of v, q, k, g and beta from those of y and last_state: autograd's own, of the scan run once more."""
    operands = (v, q, k, g, beta)
    DeltaScan(*operands, chunk_size).checked("delta_scan_backward", dy=dy, dlast=dlast)

    def scan(v: Tensor, q: Tensor, k: Tensor, g: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
        return backends.delta_scan(DeltaScan(v, q, k, g, beta, chunk_size))

    gradients = differentiated(scan, operands, (dy.float(), dlast.float()))
    dv, dq, dk, dg, dbeta = (dx.to(x.dtype).contiguous() for dx, x in zip(gradients, operands))
    return dv, dq, dk, dg, dbeta


@delta_scan_backward.register_fake
def _(dy: Tensor, dlast: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in arguments[:5])


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *operands, ctx.chunk_size = inputs
    ctx.save_for_backward(*operands)


def _differentiate(ctx: Any, dy: Tensor, dlast: Tensor) -> tuple[Tensor | None, ...]:
    return *delta_scan_backward(dy, dlast, *ctx.saved_tensors, ctx.chunk_size), None


delta_scan.register_autograd(_differentiate, setup_context=_save)


@torch.library.custom_op("simba_fx::delta_token_score", mutates_args=())
def delta_token_score(
    v: Tensor, q: Tensor, k: Tensor, g: Tensor, beta: Tensor, chunk_size: int, real: Tensor | None, tail: int,
    criterion: str,
) -> Tensor:  # fmt: skip
    """Scores the tokens of a `delta_scan` with the same operands: `(B, L)` float32, zero after the query.

    A token's contribution is `c_t v_t` with one c for each head. `real`, `tail` as in `selective_token_score`;
    `criterion`: one of `DELTA_CRITERIA`. "delta-norm" is the norm of beta.

    Raises:
        CriterionError: for an unknown criterion.
    """
    checked("delta_token_score", tail, criterion, DELTA_CRITERIA)
    scan = DeltaScan(v, q, k, g, beta, chunk_size).checked("delta_token_score", real=real)
    rows, length = v.shape[:2]
    query = query_position(real, tail, rows=rows, length=length, device=v.device)
    counted = until(query, length)
    if criterion == "clip":
        y, _ = backends.delta_scan(scan)
        return torch.where(counted, y.float().clamp(min=0).mean((2, 3)), 0.0)
    if criterion == "delta-norm":
        return torch.where(counted, beta.float().norm(dim=2), 0.0)
    if criterion == "write":
        keys = norm(k).repeat_interleave(v.shape[2] // k.shape[2], 2)
        return torch.where(counted, written(beta.float() * norm(v), keys), 0.0)
    weight = backends.delta_reads(scan, at_query(q, query, 1).squeeze(1), query, decays=criterion != "no-decay")
    if criterion == "removal":
        _, _, v = delta_writes(scan)
    else:
        weight = weight * beta.float()
    return torch.where(counted, over_channels(weight, v, criterion), 0.0)


@delta_token_score.register_fake
def _(
    v: Tensor, q: Tensor, k: Tensor, g: Tensor, beta: Tensor, chunk_size: int, real: Tensor | None, tail: int,
    criterion: str,
) -> Tensor:  # fmt: skip
    checked("delta_token_score", tail, criterion, DELTA_CRITERIA)
    DeltaScan(v, q, k, g, beta, chunk_size).checked("delta_token_score", real=real)
    return v.new_empty(v.shape[0], v.shape[1], dtype=torch.float32)


delta_token_score.register_autograd(no_gradients, setup_context=never_differentiable)


def _one_walk(v: Tensor, q: Tensor, k: Tensor, *rest: Any) -> bool:
    """Whether a score has no scan in it, whose chunks a graph would count."""
    return backends.has_triton() and k.shape[3] <= backends.MOST_KEYS and rest[-1] not in ("clip", "removal")


inline_on_gpu(delta_scan, never)
inline_on_gpu(delta_scan_backward, never)
inline_on_gpu(delta_token_score, _one_walk)
