"""Scores as Triton kernels. Letters: `simba_fx.ops`.

Time is cut into chunks, walked backwards from every row's query. Two small launches find the steps that lie between a
chunk's end and the query; then all chunks of all channels are scored at once. Mamba-1: a thread owns whole channels
and reads `B_t` once for all of them; states that have decayed to nothing in all channels of a program are left out;
what its channels hold largest is merged by an atomic maximum, whose result does not depend on the order; their sums of
squares are written apart, and added up in one order. Mamba-2: a
program sees all heads of its tokens, so that nothing is merged.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from simba_fx.ops.cuda.triton.common import GONE, LOG2E, last_real, launch, step_size, vanishing_exp2
from simba_fx.ops.cuda.triton.scan import TILE, tile
from simba_fx.ops.operands import SelectiveScan, SSDScan

CHUNK = 64
"""Tokens of a chunk of the selective score."""
FEW = 4
"""States that are left out together where all have decayed to nothing."""
SSD_CHUNK = 16
"""Tokens of a chunk of the SSD score."""
SSD_HEADS = 2
"""Heads that a program of the SSD score reads at once: of more, registers spill for some GPUs."""


@triton.jit
def _query(real, row, length, tail, REAL: tl.constexpr):
    """The slot that a row is scored at, negative if its tail holds all of its tokens (`ops.query_position`)."""
    if REAL:
        return last_real(real + row * length, length, 1024) + 1 - tail
    else:
        return length - tail


@triton.jit(do_not_specialize=["dt_min", "dt_max", "tail", "length"])
def step_sums_kernel(
    dt, bias, real, sums, score, dt_min, dt_max, tail, length, channels, dt_row, dt_token, dt_channel,
    SOFTPLUS: tl.constexpr, BIAS: tl.constexpr, CLAMP: tl.constexpr, REAL: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """`sums` `(B, chunks, D)`: the steps of each chunk up to the query. `score` starts at -inf up to there, then 0."""
    row = tl.program_id(2).to(tl.int64)
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    exists = d < channels
    t = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
    query = _query(real, row, length, tail, REAL)
    counts = t <= query
    if tl.program_id(0) == 0:
        tl.store(score + row * length + t, tl.where(counts, float("-inf"), 0.0), mask=t < length)
    shift = tl.zeros((BLOCK_D,), tl.float32)
    if BIAS:
        shift = tl.load(bias + d, mask=exists, other=0.0).to(tl.float32)
    dt += row * dt_row + d.to(tl.int64) * dt_channel
    at = dt[None, :] + t.to(tl.int64)[:, None] * dt_token
    step = tl.load(at, mask=counts[:, None] & exists[None, :], other=0.0).to(tl.float32)
    step = step_size(step, shift[None, :], SOFTPLUS)
    if CLAMP:
        low, high = tl.cast(dt_min, tl.float32), tl.cast(dt_max, tl.float32)  # a compiled graph hands over float64
        step = tl.minimum(tl.maximum(step, low), high)
    total = tl.sum(tl.where(counts[:, None], step, 0.0), axis=0)
    tl.store(sums + (row * tl.num_programs(1) + tl.program_id(1)) * channels + d, total, mask=exists)


@triton.jit(do_not_specialize=["chunks"])
def suffix_kernel(sums, chunks, channels, AHEAD: tl.constexpr, BLOCK_D: tl.constexpr):
    """`sums` `(B, chunks, D)` in place: what lies behind each chunk."""
    row = tl.program_id(1).to(tl.int64)
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    exists = d < channels
    sums += row * chunks * channels + d
    index = tl.zeros((BLOCK_D,), tl.int64)
    behind = tl.zeros((BLOCK_D,), tl.float32)
    for start in range(0, chunks, AHEAD):
        found = ()
        for i in tl.static_range(AHEAD):  # what is read does not depend on what is written: read it first
            at = index + (chunks - 1 - start - i)
            found = found + (tl.load(sums + at * channels, mask=exists & (at >= 0), other=0.0),)
        for i in tl.static_range(AHEAD):
            at = index + (chunks - 1 - start - i)
            tl.store(sums + at * channels, behind, mask=exists & (at >= 0))
            behind += found[i]


def _steps_behind(
    dt: Tensor,
    bias: Tensor | None,
    softplus: bool,
    limits: tuple[float, float] | None,
    real: Tensor | None,
    tail: int,
    chunk: int,
) -> tuple[Tensor, Tensor]:
    """Of a raw step `(B, L, D)`: the steps between each chunk's end and the query `(B, chunks * D)`; and a score
    `(B, L)` that is -inf up to the query and 0 behind it."""
    rows, length, channels = dt.shape
    chunks = triton.cdiv(length, chunk)
    sums = dt.new_empty(rows, chunks * channels, dtype=torch.float32)
    score = dt.new_empty(rows, length, dtype=torch.float32)
    low, high = limits or (0.0, 0.0)
    launch(step_sums_kernel, dt)[triton.cdiv(channels, 64), chunks, rows](
        dt, dt if bias is None else bias, dt if real is None else real, sums, score, low, high, tail, length,
        channels, *dt.stride(), SOFTPLUS=softplus, BIAS=bias is not None, CLAMP=limits is not None,
        REAL=real is not None, CHUNK=chunk, BLOCK_D=64,
    )  # fmt: skip
    launch(suffix_kernel, dt)[triton.cdiv(channels, 32), rows](
        sums, chunks, channels, AHEAD=16, BLOCK_D=32, num_warps=1
    )
    return sums, score


@triton.jit(do_not_specialize=["tail", "length", "chunk"])
def selective_score_kernel(
    u, delta, A, B, C, bias, real, behind, score, tail, length, chunk, channels, groups,
    u_row, u_channel, u_token, delta_row, delta_channel, delta_token, A_channel, A_state,
    B_row, B_group, B_state, B_token, C_row, C_group, C_state, C_token,
    states: tl.constexpr, SOFTPLUS: tl.constexpr, BIAS: tl.constexpr, REAL: tl.constexpr, ABSOLUTE: tl.constexpr,
    SQUARES: tl.constexpr, FEW: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """`score` `(B, L)`, which is raised; of SQUARES `(tiles, B, L)` zeros, of which each tile writes its own."""
    row = tl.program_id(2).to(tl.int64)
    group, d, exists = tile(channels, groups, BLOCK_D)
    wide = d.to(tl.int64)
    query = _query(real, row, length, tail, REAL)
    first = tl.program_id(1) * chunk
    last = tl.minimum(tl.minimum(first + chunk, length) - 1, query)
    u += row * u_row + wide * u_channel
    delta += row * delta_row + wide * delta_channel
    B += row * B_row + group * B_group
    C += row * C_row + group * C_group + tl.maximum(query, 0).to(tl.int64) * C_token
    if SQUARES:
        score += tl.program_id(0).to(tl.int64) * tl.num_programs(2) * length
    score += row * length
    shift = tl.zeros((BLOCK_D,), tl.float32)
    if BIAS:
        shift = tl.load(bias + d, mask=exists, other=0.0).to(tl.float32)
    at = row * tl.num_programs(1) + tl.program_id(1)
    remaining = tl.load(behind + at * channels + d, mask=exists, other=0.0)  # R of the token that is next
    rates = ()
    outputs = ()
    alive = ()  # of each few states: whether any has not decayed behind the chunk, where all have decayed least
    any_alive = 0
    some = 0
    for n in tl.static_range(states):
        rate = tl.load(A + d * A_channel + n * A_state, mask=exists, other=0.0).to(tl.float32) * LOG2E
        rates = rates + (rate,)
        outputs = outputs + (tl.load(C + n * C_state).to(tl.float32),)
        holds = tl.max(tl.where(exists & (rate * remaining >= GONE), 1, 0), axis=0)
        any_alive = tl.maximum(any_alive, holds)
        some = holds if n % FEW == 0 else tl.maximum(some, holds)
        if (n % FEW == FEW - 1) or (n == states - 1):
            alive = alive + (some,)
    if (any_alive > 0) & (last >= first):
        # a token's channels are read while the token behind it is worked on
        from_last = tl.cast(last, tl.int64)
        next_raw = tl.load(delta + from_last * delta_token, mask=exists, other=0.0)
        next_value = tl.load(u + from_last * u_token, mask=exists, other=0.0)
        for i in range(0, last - first + 1):
            t = from_last - i
            raw = next_raw.to(tl.float32)
            value = next_value.to(tl.float32)
            ahead = tl.maximum(t - 1, first)
            next_raw = tl.load(delta + ahead * delta_token, mask=exists, other=0.0)
            next_value = tl.load(u + ahead * u_token, mask=exists, other=0.0)
            dt = step_size(raw, shift, SOFTPLUS)
            response = tl.zeros((BLOCK_D,), tl.float32)
            for few in tl.static_range(0, states, FEW):
                if alive[few // FEW] > 0:
                    for n in tl.static_range(few, few + FEW):
                        if n < states:
                            weight = tl.load(B + t * B_token + n * B_state).to(tl.float32) * outputs[n]
                            response += vanishing_exp2(rates[n] * remaining) * weight
            remaining += dt
            share = dt * value * response
            if SQUARES:
                tl.store(score + t, tl.sum(tl.where(exists, share * share, 0.0), axis=0))
            else:
                if ABSOLUTE:
                    share = tl.abs(share)
                best = tl.max(tl.where(exists, share, float("-inf")), axis=0)
                # the maximum compares bits: a zero must have no sign
                tl.atomic_max(score + t, tl.where(best == 0.0, 0.0, best), sem="relaxed")
    elif not SQUARES:
        for start in range(first, last + 1, 64):
            slot = start + tl.arange(0, 64)
            tl.atomic_max(score + slot, tl.zeros((64,), tl.float32), mask=slot <= last, sem="relaxed")


def selective_token_score(scan: SelectiveScan, real: Tensor | None, tail: int, criterion: str) -> Tensor:
    """`ops.selective_token_score` by the contributions, with B and C `(B, G, N, L)`: `(B, L)` float32."""
    u, delta, A, B, C, bias = scan.u, scan.delta, scan.A, scan.B, scan.C, scan.delta_bias
    rows, channels, length, groups, states = scan.sizes
    real = None if real is None else real.contiguous()
    behind, score = _steps_behind(delta.transpose(1, 2), bias, scan.delta_softplus, None, real, tail, CHUNK)
    tiles = groups * triton.cdiv(channels // groups, TILE)
    squares = criterion == "simba-l2"
    if squares:
        score = u.new_zeros(tiles, rows, length, dtype=torch.float32)
    launch(selective_score_kernel, u)[tiles, triton.cdiv(length, CHUNK), rows](
        u, delta, A, B, C, A if bias is None else bias, A if real is None else real, behind, score,
        tail, length, CHUNK, channels, groups, *u.stride(), *delta.stride(), *A.stride(), *B.stride(), *C.stride(),
        states=states, SOFTPLUS=scan.delta_softplus, BIAS=bias is not None, REAL=real is not None,
        ABSOLUTE=criterion == "simba-abs", SQUARES=squares, FEW=FEW, BLOCK_D=TILE, num_warps=1,
    )  # fmt: skip
    return score.sum(0).sqrt() if squares else score


@triton.jit(do_not_specialize=["dt_min", "dt_max", "tail", "length"])
def ssd_score_kernel(
    x, dt, A, bias, weights, real, behind, score, dt_min, dt_max, tail, length, heads, width, groups,
    x_row, x_token, x_head, x_channel, dt_row, dt_token, dt_head, A_head,
    BLOCK_T: tl.constexpr, BLOCK_P: tl.constexpr, SOFTPLUS: tl.constexpr, BIAS: tl.constexpr, REAL: tl.constexpr,
    ABSOLUTE: tl.constexpr, SQUARES: tl.constexpr, DECAY: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """A program scores a chunk of BLOCK_T tokens; `weights` `(B, L, G)` float32 hold `C_q . B_t`."""
    row = tl.program_id(1).to(tl.int64)
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    query = _query(real, row, length, tail, REAL)
    counts = t <= query
    follows = t < query
    in_chunk = tl.arange(0, BLOCK_T) < BLOCK_T - 1
    low, high = tl.cast(dt_min, tl.float32), tl.cast(dt_max, tl.float32)  # a compiled graph hands over float64
    far = t.to(tl.int64)
    p = tl.arange(0, BLOCK_P)
    x += row * x_row
    dt += row * dt_row
    weights += (row * length + far) * groups
    behind += (row * tl.num_programs(0) + tl.program_id(0)) * heads
    best = tl.full((BLOCK_T,), 0.0 if SQUARES else float("-inf"), tl.float32)
    for head in range(0, heads, BLOCK_H):
        h = head + tl.arange(0, BLOCK_H)
        exists = h < heads
        both = counts[:, None] & exists[None, :]
        shift = tl.zeros((BLOCK_H,), tl.float32)
        if BIAS:
            shift = tl.load(bias + h, mask=exists, other=0.0).to(tl.float32)
        at = dt + far[:, None] * dt_token + h[None, :] * dt_head
        step = step_size(tl.load(at, mask=both, other=0.0).to(tl.float32), shift[None, :], SOFTPLUS)
        step = tl.minimum(tl.maximum(step, low), high)
        weight = step * tl.load(weights[:, None] + (h // (heads // groups))[None, :], mask=both, other=0.0)
        if DECAY:
            rate = tl.load(A + h * A_head, mask=exists, other=0.0).to(tl.float32) * LOG2E
            inside = (follows & in_chunk)[:, None] & exists[None, :]
            after = step_size(tl.load(at + dt_token, mask=inside, other=0.0).to(tl.float32), shift[None, :], SOFTPLUS)
            after = tl.where(inside, tl.minimum(tl.maximum(after, low), high), 0.0)
            R = tl.cumsum(after, axis=0, reverse=True) + tl.load(behind + h, mask=exists, other=0.0)[None, :]
            weight *= vanishing_exp2(R * rate[None, :])
        mask = both[:, :, None] & (p < width)[None, None, :]
        at = x + (far[:, None] * x_token + h.to(tl.int64)[None, :] * x_head)[:, :, None] + p[None, None, :] * x_channel
        value = tl.load(at, mask=mask, other=0.0).to(tl.float32)
        if SQUARES:
            share = weight * weight * tl.sum(value * value, axis=2)
        elif ABSOLUTE:
            share = tl.abs(weight) * tl.max(tl.abs(value), axis=2)
        else:
            in_width = (p < width)[None, None, :]  # what is masked otherwise counts as 0: no infinity is multiplied
            high_value = tl.max(tl.where(in_width, value, float("-inf")), axis=2)
            low_value = tl.min(tl.where(in_width, value, float("inf")), axis=2)
            share = weight * tl.where(weight >= 0.0, high_value, low_value)
        if SQUARES:
            best += tl.sum(tl.where(both, share, 0.0), axis=1)
        else:
            best = tl.maximum(best, tl.max(tl.where(both, share, float("-inf")), axis=1))
    if SQUARES:
        best = tl.sqrt(best)
    tl.store(score + row * length + t, tl.where(counts, best, 0.0), mask=t < length)


def ssd_token_score(scan: SSDScan, weights: Tensor, real: Tensor | None, tail: int, criterion: str) -> Tensor:
    """`ops.ssd_token_score` by the contributions, or by "no-decay": `(B, L)` float32.

    `weights` `(B, L, G)` float32: the dot product of each token's `B_t` with C at the row's query.
    """
    x, dt, A, bias = scan.x, scan.dt, scan.A, scan.dt_bias
    rows, length, heads, width, groups, _ = scan.sizes
    real = None if real is None else real.contiguous()
    decay, limits = criterion != "no-decay", (scan.dt_min, scan.dt_max)
    if decay:
        behind, score = _steps_behind(dt, bias, scan.dt_softplus, limits, real, tail, SSD_CHUNK)
    else:
        behind = score = x.new_empty(rows, length, dtype=torch.float32)
    launch(ssd_score_kernel, x)[triton.cdiv(length, SSD_CHUNK), rows](
        x, dt, A, A if bias is None else bias, weights.contiguous(), A if real is None else real, behind, score,
        *limits, tail, length, heads, width, groups, *x.stride(), *dt.stride(), *A.stride(),
        BLOCK_T=SSD_CHUNK, BLOCK_P=triton.next_power_of_2(width), SOFTPLUS=scan.dt_softplus, BIAS=bias is not None,
        REAL=real is not None, ABSOLUTE=criterion == "simba-abs", SQUARES=criterion == "simba-l2",
        DECAY=decay, BLOCK_H=SSD_HEADS,
    )  # fmt: skip
    return score
