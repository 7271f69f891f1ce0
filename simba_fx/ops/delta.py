"""Gated delta rules as operators: their scan, and the contribution of each token to the scan's output at a query.

    S_t = e^{g_t} S_{t-1} + k_t beta_t (v_t - (e^{g_t} S_{t-1})^T k_t)^T,    y_t = S_t^T q_t,    S (K, V) for each head

Yang et al. 2024 (Gated DeltaNet), section 3, as transformers' `torch_chunk_gated_delta_rule` and fla's
`chunk_gated_delta_rule` compute it; with a decay for each key channel, g `(K,)`, it is Kimi delta attention (Kimi Team
2025), `chunk_kimi_delta_attention` and `chunk_kda`. Keys and queries come normalised and scaled. y is linear in v, so a
token's contribution to y_q is `c_t v_t` with one number for each head: `c_t = beta_t k_t . r_t`, where r is the query
carried backwards in time, `r_{t-1} = e^{g_t} (r_t - k_t c_t)`.

Both in chunks of C tokens (Yang et al. 2024, WY form): with b the sum of g inside a chunk and
`T_ij = beta_i (k_i . k_j) e^{b_i - b_j}` for j < i, everything inside a chunk is one triangular system `I + T`.
Letters: see `simba_fx.ops`; here K, V are the sizes of a head's keys and values, G heads of keys share H heads of
values evenly.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

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


class _Chunks:
    """Float32 operands by chunk, `(B, H, c, C, ·)`, and the triangular system of each."""

    def __init__(self, v: Tensor, q: Tensor, k: Tensor, g: Tensor, beta: Tensor, size: int) -> None:
        self.rows, self.length, self.heads, self.width = v.shape
        most = 64 if g.dim() == 3 else 16  # with decays by channel each pair of a chunk's tokens has K numbers
        size = max(1, min(size, most, self.length))
        missing = -self.length % size

        def chunked(operand: Tensor) -> Tensor:
            """`(B, L, heads, ...)`; what is added at the end neither decays nor writes."""
            operand = operand.float().repeat_interleave(self.heads // operand.shape[2], 2).transpose(1, 2)
            rest = operand.shape[3:]
            operand = F.pad(operand, (0, 0) * len(rest) + (0, missing))
            return operand.reshape(*operand.shape[:2], (self.length + missing) // size, size, *rest)

        self.v, self.q, self.k, self.beta = map(chunked, (v, q, k, beta))
        prefix = chunked(g if g.dim() == 4 else g.unsqueeze(3)).double().cumsum(3)  # (B, H, c, C, K or 1)
        self.from_start = prefix.float().exp()
        self.to_end = (prefix[..., -1:, :] - prefix).float().exp()
        self.whole = self.from_start[..., -1, :, None]
        between = (prefix.unsqueeze(4) - prefix.unsqueeze(3)).float()
        later = torch.ones(size, size, dtype=torch.bool, device=v.device).triu(1).unsqueeze(2)
        self.between = between.masked_fill(later, -torch.inf).exp()
        self.system = self.beta.unsqueeze(4) * self.products(self.k)  # its diagonal is not read

    def products(self, left: Tensor) -> Tensor:
        """What is left of each key when a later token of its chunk reads it with `left`: `(B, H, c, C, C)`."""
        if self.between.shape[5] == 1:
            return left @ self.k.mT * self.between.squeeze(5)
        return (left.unsqueeze(4) * self.k.unsqueeze(3) * self.between).sum(5)

    def solve(self, right: Tensor, transposed: bool = False) -> Tensor:
        """`(I + T)^-1 right`, or the same of its transpose."""
        system = self.system.mT if transposed else self.system
        solved: Tensor = torch.linalg.solve_triangular(system, right, upper=transposed, unitriangular=True)
        return solved

    def corrections(self) -> Tensor:
        """What each token's write takes from the state that enters its chunk: `(B, H, c, C, K)`."""
        return self.solve(self.beta.unsqueeze(4) * self.from_start * self.k)


def _scan(v: Tensor, q: Tensor, k: Tensor, g: Tensor, beta: Tensor, chunk_size: int) -> tuple[Tensor, Tensor]:
    """y `(B, L, H, V)`, the last state `(B, H, K, V)`, float32."""
    y, state, _ = _run(v, q, k, g, beta, chunk_size)
    return y, state


def _run(v: Tensor, q: Tensor, k: Tensor, g: Tensor, beta: Tensor, chunk_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """The same, and what each token writes at its key, `beta_t (v_t - S^T k_t)` `(B, L, H, V)`."""
    chunks = _Chunks(v, q, k, g, beta, chunk_size)
    written, corrections = chunks.solve(chunks.beta.unsqueeze(4) * chunks.v), chunks.corrections()
    inside = chunks.products(chunks.q)
    reads, keys = chunks.q * chunks.from_start, (chunks.k * chunks.to_end).mT
    state = chunks.v.new_zeros(chunks.rows, chunks.heads, chunks.k.shape[4], chunks.width)
    outputs, writes = [], []
    for at in range(chunks.v.shape[2]):
        new = written[:, :, at] - corrections[:, :, at] @ state
        writes.append(new)
        outputs.append(reads[:, :, at] @ state + inside[:, :, at] @ new)
        state = state * chunks.whole[:, :, at] + keys[:, :, at] @ new
    none = [chunks.v.new_empty(chunks.rows, chunks.heads, 0, chunks.width)]
    y, new = (torch.cat(found or none, 2)[:, :, : chunks.length].transpose(1, 2) for found in (outputs, writes))
    return y, state, new


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
    y, last = _scan(*scan.arguments)
    return y.to(v.dtype).contiguous(), last.contiguous()


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
        return _scan(v, q, k, g, beta, chunk_size)

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
        y, _ = _scan(*scan.arguments)
        return torch.where(counted, y.clamp(min=0).mean((2, 3)), 0.0)
    if criterion == "delta-norm":
        return torch.where(counted, beta.float().norm(dim=2), 0.0)
    if criterion == "write":
        keys = norm(k).repeat_interleave(v.shape[2] // k.shape[2], 2)
        return torch.where(counted, written(beta.float() * norm(v), keys), 0.0)
    weight = _reads(scan, query, counted, decays=criterion != "no-decay")
    if criterion == "removal":
        v = _run(*scan.arguments)[2]
    else:
        weight = weight * beta.float()
    return torch.where(counted, over_channels(weight, v, criterion), 0.0)


def _reads(scan: DeltaScan, query: Tensor, counted: Tensor, decays: bool) -> Tensor:
    """`k_t . r_t` `(B, L, H)`: the query is carried backwards, a chunk at a time."""
    heads, counts = scan.v.shape[2], counted.unsqueeze(2)
    g = scan.g.float() if decays else torch.zeros_like(scan.g, dtype=torch.float32)
    g = torch.where(counts if g.dim() == 3 else counts.unsqueeze(3), g, 0.0)
    beta = torch.where(counts, scan.beta.float(), 0.0)  # behind the query nothing decays and nothing is written
    chunks = _Chunks(scan.v, scan.q, scan.k, g, beta, scan.chunk_size)
    corrections, keys = chunks.corrections(), chunks.k * chunks.to_end
    r = at_query(scan.q, query, 1).squeeze(1).float().repeat_interleave(heads // scan.q.shape[2], 1).unsqueeze(3)
    found = []
    for at in reversed(range(chunks.v.shape[2])):
        met = keys[:, :, at] @ r
        found.append(met)
        r = chunks.whole[:, :, at] * r - corrections[:, :, at].mT @ met
    met = torch.stack(found[::-1], 2) if found else chunks.beta.unsqueeze(4)
    reads = chunks.solve(met, transposed=True).squeeze(4)
    return reads.flatten(2, 3)[:, :, : chunks.length].transpose(1, 2)


@delta_token_score.register_fake
def _(
    v: Tensor, q: Tensor, k: Tensor, g: Tensor, beta: Tensor, chunk_size: int, real: Tensor | None, tail: int,
    criterion: str,
) -> Tensor:  # fmt: skip
    checked("delta_token_score", tail, criterion, DELTA_CRITERIA)
    DeltaScan(v, q, k, g, beta, chunk_size).checked("delta_token_score", real=real)
    return v.new_empty(v.shape[0], v.shape[1], dtype=torch.float32)


delta_token_score.register_autograd(no_gradients, setup_context=never_differentiable)


for _operator in (delta_scan, delta_scan_backward, delta_token_score):
    inline_on_gpu(_operator, never)
