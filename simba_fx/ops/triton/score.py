"""Scores as Triton kernels: one launch each, time walked backwards from every row's query. Letters: `simba_fx.ops`.

A program takes a tile of channels (Mamba-1) or one head (Mamba-2) of one row and carries `R_t` of its channels. What
it finds largest is merged by an atomic maximum, whose result does not depend on the order. The exponentials are most of
the work, so a program leaves out the states that have decayed to nothing in all of its channels, and the tokens
before which all have.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from simba_fx.ops.triton.common import (
    GONE,
    LOG2E,
    last_real,
    launch,
    step_size,
    tuned,
    vanishing_exp2,
)


@triton.jit
def _query(real, row, length, tail, REAL: tl.constexpr):
    """The slot that a row is scored at, negative if its tail holds all of its tokens (`ops.query_position`)."""
    if REAL:
        return last_real(real + row * length, length, 1024) + 1 - tail
    else:
        return length - tail


@triton.jit
def _merge(score, t, best, inside):
    """`score[t] = max(score[t], best)`. (The maximum compares bits: a zero must have no sign.)"""
    tl.atomic_max(score + t, tl.where(best == 0.0, 0.0, best), mask=inside, sem="relaxed")


@triton.jit
def _nothing_before(score, end, BLOCK_T: tl.constexpr):
    """Tokens before `end` contribute 0 here."""
    while end > 0:
        t = end - BLOCK_T + tl.arange(0, BLOCK_T)
        _merge(score, t, tl.zeros((BLOCK_T,), tl.float32), t >= 0)
        end -= BLOCK_T


@triton.jit
def _zero_after(score, query, length, BLOCK_T: tl.constexpr):
    """Tokens after the query have no score."""
    start = tl.maximum(query + 1, 0)
    while start < length:
        t = start + tl.arange(0, BLOCK_T)
        tl.store(score + t, tl.zeros((BLOCK_T,), tl.float32), mask=t < length)
        start += BLOCK_T


@tuned([({"BLOCK_T": 64, "BLOCK_D": 16}, 8), ({"BLOCK_T": 32, "BLOCK_D": 16}, 4), ({"BLOCK_T": 32, "BLOCK_D": 32}, 8),
        ({"BLOCK_T": 64, "BLOCK_D": 8}, 4)], key=["channels", "states"])  # fmt: skip
@triton.jit(do_not_specialize=["tail", "length"])
def selective_score_kernel(
    u, delta, A, B, C, bias, real, score, tail, length, channels, states, groups,
    u_row, u_channel, u_token, delta_row, delta_channel, delta_token, A_channel, A_state,
    B_row, B_group, B_state, B_token, C_row, C_group, C_state, C_token,
    BLOCK_N: tl.constexpr, SOFTPLUS: tl.constexpr, BIAS: tl.constexpr, REAL: tl.constexpr, ABSOLUTE: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(1).to(tl.int64)
    width = channels // groups
    tiles = tl.cdiv(width, BLOCK_D)
    group = tl.program_id(0) // tiles
    in_group = tl.program_id(0) % tiles * BLOCK_D + tl.arange(0, BLOCK_D)
    d = group * width + in_group
    exists = in_group < width

    score += row * length
    query = _query(real, row, length, tail, REAL)
    if tl.program_id(0) == 0:
        _zero_after(score, query, length, BLOCK_T)
    u += row * u_row + d.to(tl.int64) * u_channel
    delta += row * delta_row + d.to(tl.int64) * delta_channel
    B += row * B_row + group * B_group
    C += row * C_row + group * C_group + tl.maximum(query, 0).to(tl.int64) * C_token
    shift = tl.zeros((BLOCK_D,), tl.float32)
    if BIAS:
        shift = tl.load(bias + d, mask=exists, other=0.0).to(tl.float32)
    i = tl.arange(0, BLOCK_T)
    n = tl.arange(0, BLOCK_N)
    there = (n[:, None] < states) & exists[None, :]
    rates = LOG2E * tl.load(A + n[:, None] * A_state + d[None, :] * A_channel, mask=there, other=0.0).to(tl.float32)

    remaining = tl.zeros((BLOCK_D,), tl.float32)  # R of the first token behind the tile
    end = query + 1
    alive = states
    while (end > 0) & (alive > 0):
        first = end - BLOCK_T
        t = first + i
        mask = (t >= 0)[:, None] & exists[None, :]
        at = (delta + first.to(tl.int64) * delta_token)[None, :] + i[:, None] * delta_token
        dt = step_size(tl.load(at, mask=mask, other=0.0).to(tl.float32), shift[None, :], SOFTPLUS)
        behind = mask & (t < query)[:, None]
        after = tl.load(at + delta_token, mask=behind, other=0.0).to(tl.float32)
        after = tl.where(behind, step_size(after, shift[None, :], SOFTPLUS), 0.0)
        at = (u + first.to(tl.int64) * u_token)[None, :] + i[:, None] * u_token
        gain = dt * tl.load(at, mask=mask, other=0.0).to(tl.float32)
        R = tl.cumsum(after, axis=0, reverse=True) + remaining[None, :]
        remaining += tl.sum(after, axis=0)
        response = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
        projection = B + first.to(tl.int64) * B_token
        for state in range(alive):
            rate = LOG2E * tl.load(A + state * A_state + d * A_channel, mask=exists, other=0.0).to(tl.float32)
            weight = tl.load(projection + state * B_state + i * B_token, mask=t >= 0, other=0.0).to(tl.float32)
            weight *= tl.load(C + state * C_state).to(tl.float32)
            response += vanishing_exp2(R * rate[None, :]) * weight[:, None]
        share = gain * response
        if ABSOLUTE:
            share = tl.abs(share)
        _merge(score, t, tl.max(tl.where(mask, share, float("-inf")), axis=1), t >= 0)
        end -= BLOCK_T
        holds = there & (remaining[None, :] * rates >= GONE)
        alive = tl.max(tl.max(tl.where(holds, n[:, None] + 1, 0), axis=1), axis=0)
    _nothing_before(score, end, BLOCK_T)


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
    absolute: bool,
) -> Tensor:
    """`ops.selective_token_score` by "simba" or "simba-abs", with B and C `(B, G, N, L)`: `(B, L)` float32."""
    rows, channels, length = u.shape
    groups, states = B.shape[1], A.shape[1]
    score = torch.full((rows, length), -torch.inf, dtype=torch.float32, device=u.device)

    def grid(meta: dict[str, int]) -> tuple[int, int]:
        return groups * triton.cdiv(channels // groups, meta["BLOCK_D"]), rows

    launch(selective_score_kernel)[grid](
        u, delta, A, B, C, A if delta_bias is None else delta_bias, A if real is None else real.contiguous(), score,
        tail, length, channels, states, groups, *u.stride(), *delta.stride(), *A.stride(), *B.stride(), *C.stride(),
        BLOCK_N=triton.next_power_of_2(states), SOFTPLUS=delta_softplus, BIAS=delta_bias is not None,
        REAL=real is not None, ABSOLUTE=absolute,
    )  # fmt: skip
    return score


@tuned([({"BLOCK_T": 32}, 8), ({"BLOCK_T": 16}, 8), ({"BLOCK_T": 32}, 16)], key=["heads", "width", "states"])
@triton.jit(do_not_specialize=["tail", "length"])
def ssd_score_kernel(
    x, dt, A, B, C, bias, real, score, dt_min, dt_max, tail, length, heads, width, states, groups,
    x_row, x_token, x_head, x_channel, dt_row, dt_token, dt_head, A_head,
    B_row, B_token, B_group, B_state, C_row, C_token, C_group, C_state,
    BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, SOFTPLUS: tl.constexpr, BIAS: tl.constexpr, REAL: tl.constexpr,
    ABSOLUTE: tl.constexpr, DECAY: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(1).to(tl.int64)
    head = tl.program_id(0)
    group = head // (heads // groups)
    score += row * length
    query = _query(real, row, length, tail, REAL)
    if head == 0:
        _zero_after(score, query, length, BLOCK_T)
    x += row * x_row + head * x_head
    dt += row * dt_row + head * dt_head
    B += row * B_row + group * B_group
    C += row * C_row + group * C_group + tl.maximum(query, 0).to(tl.int64) * C_token
    rate = LOG2E * tl.load(A + head * A_head).to(tl.float32)
    shift = 0.0
    if BIAS:
        shift = tl.load(bias + head).to(tl.float32)
    i = tl.arange(0, BLOCK_T)
    n = tl.arange(0, BLOCK_N)
    p = tl.arange(0, BLOCK_P)
    at_query = tl.load(C + n * C_state, mask=n < states, other=0.0).to(tl.float32)

    remaining = 0.0
    end = query + 1
    alive = True
    while (end > 0) & alive:
        first = end - BLOCK_T
        t = first + i
        inside = t >= 0
        far = first.to(tl.int64)
        projection = tl.load(B + far * B_token + i[:, None] * B_token + n[None, :] * B_state,
                             mask=inside[:, None] & (n < states)[None, :], other=0.0).to(tl.float32)  # fmt: skip
        weight = tl.sum(projection * at_query[None, :], axis=1)
        step = step_size(
            tl.load(dt + far * dt_token + i * dt_token, mask=inside, other=0.0).to(tl.float32), shift, SOFTPLUS
        )
        weight *= tl.minimum(tl.maximum(step, dt_min), dt_max)
        if DECAY:
            behind = inside & (t < query)
            after = tl.load(dt + far * dt_token + (i + 1) * dt_token, mask=behind, other=0.0).to(tl.float32)
            after = tl.minimum(tl.maximum(step_size(after, shift, SOFTPLUS), dt_min), dt_max)
            after = tl.where(behind, after, 0.0)
            weight *= vanishing_exp2((tl.cumsum(after, axis=0, reverse=True) + remaining) * rate)
            remaining += tl.sum(after, axis=0)
            alive = remaining * rate >= GONE
        mask = inside[:, None] & (p < width)[None, :]
        value = tl.load(x + far * x_token + i[:, None] * x_token + p[None, :] * x_channel, mask=mask, other=0.0).to(
            tl.float32
        )
        share = weight[:, None] * value
        if ABSOLUTE:
            share = tl.abs(share)
        _merge(score, t, tl.max(tl.where(mask, share, float("-inf")), axis=1), inside)
        end -= BLOCK_T
    _nothing_before(score, end, BLOCK_T)


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
    """`ops.ssd_token_score` by "simba", "simba-abs" or "no-decay": `(B, L)` float32."""
    rows, length, heads, width = x.shape
    groups, states = B.shape[2], B.shape[3]
    score = torch.full((rows, length), -torch.inf, dtype=torch.float32, device=x.device)
    launch(ssd_score_kernel)[(heads, rows)](
        x, dt, A, B, C, A if dt_bias is None else dt_bias, A if real is None else real.contiguous(), score,
        dt_min, dt_max, tail, length, heads, width, states, groups,
        *x.stride(), *dt.stride(), *A.stride(), *B.stride(), *C.stride(),
        BLOCK_P=triton.next_power_of_2(width), BLOCK_N=triton.next_power_of_2(states), SOFTPLUS=dt_softplus,
        BIAS=dt_bias is not None, REAL=real is not None, ABSOLUTE=criterion == "simba-abs",
        DECAY=criterion != "no-decay",
    )  # fmt: skip
    return score
