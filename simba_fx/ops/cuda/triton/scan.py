"""The selective scan (Mamba-1) as Triton kernels. Letters: see `simba_fx.ops`.

Time is cut into chunks, so that a short prompt fills a GPU as well. Three launches: the state that each chunk ends
with when it starts from zero; those chained into the states that the chunks start from (`D * N` numbers a chunk, not a
token's work); the outputs. A thread owns whole channels: their N states stay in its registers from token to token, and
B_t and C_t are read once for all channels of a thread, so that an exponential, of which each state and token takes one
in each of two launches, is most of the work. Operands are read channel-last at full width, in any other layout slowly.

The backward pass starts every block of tokens from a state that was saved and walks backwards with the gradient of the
state. The state before a token is scanned for, never `h_t - b_t` nor a quotient, so decay of any strength leaves no
rounding residue. Gradients of B and C are summed over channels by tile, then over the tiles by PyTorch: no atomics, so
that runs repeat bit for bit.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from simba_fx.ops.cuda.triton.common import LOG2E, launch, sigmoid, step_size, vanishing_exp2
from simba_fx.ops.operands import SelectiveScan

CHUNK = 64
"""Tokens of a chunk of the forward pass."""
TILE = 64
"""Channels of a program of the forward pass, which is one warp: two to a thread, as an H200 likes best."""
BLOCK_T = 16
"""Tokens of a block of the backward pass: it starts from a saved state in each."""
BLOCK_D = 8
"""Channels of a tile in the backward pass: gradients of B and C come in so many parts per group."""


@triton.jit
def _advance(a1, b1, a2, b2):
    """`h -> a h + b`, the first step and then the second."""
    return a1 * a2, a2 * b1 + b2


@triton.jit
def _tokens(channels, start, i, token, mask):
    """`(T, D)` float32 of an operand at tokens start + i, zero outside the mask; `channels` points at its token 0."""
    at = channels + start.to(tl.int64) * token
    return tl.load(at[None, :] + i[:, None] * token, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _states(base, start, i, n, state, token, mask):
    """`(T, N)` float32 of a projection at tokens start + i, zero outside the mask."""
    at = base + start.to(tl.int64) * token
    return tl.load(at + i[:, None] * token + n[None, :] * state, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def tile(channels, groups, BLOCK_D: tl.constexpr):
    """This program's group, its channels, and which of them exist: a tile stays inside of a group."""
    width = channels // groups
    tiles = tl.cdiv(width, BLOCK_D)
    in_group = tl.program_id(0) % tiles * BLOCK_D + tl.arange(0, BLOCK_D)
    group = tl.program_id(0) // tiles
    return group, group * width + in_group, in_group < width


@triton.jit(do_not_specialize=["length", "chunk"])
def selective_scan_kernel(
    u, delta, A, B, C, D, z, bias, y, boundaries, steps, length, chunk, channels, groups,
    u_row, u_channel, u_token, delta_row, delta_channel, delta_token, z_row, z_channel, z_token,
    A_channel, A_state, B_row, B_group, B_state, B_token, C_row, C_group, C_state, C_token,
    states: tl.constexpr, SOFTPLUS: tl.constexpr, BIAS: tl.constexpr, SKIP: tl.constexpr, GATE: tl.constexpr,
    OUTPUT: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """OUTPUT: y, from the states in `boundaries` `(B, chunks, N, D)`. Else the chunks' last states go there, each from
    zero, and the sums of their steps into `steps` `(B, chunks, D)`."""
    row = tl.program_id(2).to(tl.int64)
    group, d, exists = tile(channels, groups, BLOCK_D)
    wide = d.to(tl.int64)
    u += row * u_row + wide * u_channel
    delta += row * delta_row + wide * delta_channel
    z += row * z_row + wide * z_channel
    y += row * length * channels + d
    B += row * B_row + group * B_group
    C += row * C_row + group * C_group
    at = row * tl.num_programs(1) + tl.program_id(1)
    boundaries += at * states * channels + d
    shift = tl.zeros((BLOCK_D,), tl.float32)
    skip = tl.zeros((BLOCK_D,), tl.float32)
    if BIAS:
        shift = tl.load(bias + d, mask=exists, other=0.0).to(tl.float32)
    if SKIP:
        skip = tl.load(D + d, mask=exists, other=0.0).to(tl.float32)
    rates = ()
    h = ()
    for n in tl.static_range(states):
        rate = tl.load(A + d * A_channel + n * A_state, mask=exists, other=0.0).to(tl.float32)
        rates = rates + (rate * LOG2E,)
        if OUTPUT:
            h = h + (tl.load(boundaries + n * channels, mask=exists, other=0.0),)
        else:
            h = h + (tl.zeros((BLOCK_D,), tl.float32),)

    total = tl.zeros((BLOCK_D,), tl.float32)
    first = tl.program_id(1) * chunk
    end = tl.minimum(first + chunk, length)
    # a token's channels are read while the token before is worked on
    from_first = tl.cast(first, tl.int64)
    next_raw = tl.load(delta + from_first * delta_token, mask=exists, other=0.0)
    next_value = tl.load(u + from_first * u_token, mask=exists, other=0.0)
    for t in range(first, end):
        now = from_first + (t - first)
        raw = next_raw.to(tl.float32)
        value = next_value.to(tl.float32)
        ahead = tl.minimum(now + 1, end - 1)
        next_raw = tl.load(delta + ahead * delta_token, mask=exists, other=0.0)
        next_value = tl.load(u + ahead * u_token, mask=exists, other=0.0)
        gate = tl.zeros((BLOCK_D,), tl.float32)
        if OUTPUT and GATE:
            gate = tl.load(z + now * z_token, mask=exists, other=0.0).to(tl.float32)
        dt = step_size(raw, shift, SOFTPLUS)
        total += dt
        entering = dt * value
        out = skip * value
        reached = ()
        for n in tl.static_range(states):
            Bt = tl.load(B + now * B_token + n * B_state).to(tl.float32)
            state = vanishing_exp2(rates[n] * dt) * h[n] + entering * Bt
            if OUTPUT:
                out += state * tl.load(C + now * C_token + n * C_state).to(tl.float32)
            reached = reached + (state,)
        h = reached
        if OUTPUT:
            if GATE:
                out *= gate * sigmoid(gate)
            tl.store(y + now * channels, out, mask=exists)
    if not OUTPUT:
        tl.store(steps + at * channels + d, total, mask=exists)
        for n in tl.static_range(states):
            tl.store(boundaries + n * channels, h[n], mask=exists)


@triton.jit(do_not_specialize=["chunks"])
def chain_kernel(boundaries, steps, A, last, chunks, channels, A_channel, A_state, states: tl.constexpr,
                 AHEAD: tl.constexpr, BLOCK_D: tl.constexpr):  # fmt: skip
    """`boundaries` `(B, chunks, N, D)`: from the chunks' own last states to the states that they start from."""
    row = tl.program_id(2).to(tl.int64)
    n = tl.program_id(1)
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    exists = d < channels
    rate = tl.load(A + d * A_channel + n * A_state, mask=exists, other=0.0).to(tl.float32) * LOG2E
    boundaries += (row * chunks * states + n) * channels + d
    steps += row * chunks * channels + d
    h = tl.zeros((BLOCK_D,), tl.float32)
    zero = tl.zeros((), tl.int64)
    index = tl.zeros((BLOCK_D,), tl.int32)  # a block and a scalar condition do not combine in Triton 3.9's interpreter
    for start in range(0, chunks, AHEAD):
        kept = ()
        added = ()
        for i in tl.static_range(AHEAD):  # what is read does not depend on what is written: read it first
            there = exists & (index + (start + i) < chunks)
            at = (zero + start + i) * channels
            kept = kept + (tl.load(steps + at, mask=there, other=0.0),)
            added = added + (tl.load(boundaries + at * states, mask=there, other=0.0),)
        for i in tl.static_range(AHEAD):
            at = (zero + start + i) * channels
            tl.store(boundaries + at * states, h, mask=exists & (index + (start + i) < chunks))
            h = vanishing_exp2(rate * kept[i]) * h + added[i]
    tl.store(last + (row * channels + d) * states + n, h, mask=exists)


@triton.jit(do_not_specialize=["length"])
def selective_scan_backward_kernel(
    u, delta, A, B, C, D, z, bias, dy, dlast, starts, du, ddelta, dz, dA, dB, dC, dD, length, channels, states, groups,
    u_row, u_channel, u_token, delta_row, delta_channel, delta_token, z_row, z_channel, z_token, dy_row,
    dy_channel, dy_token, A_channel, A_state, B_row, B_group, B_state, B_token, C_row, C_group, C_state, C_token,
    BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr, SOFTPLUS: tl.constexpr, BIAS: tl.constexpr, SKIP: tl.constexpr,
    GATE: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(1).to(tl.int64)
    group, d, exists = tile(channels, groups, BLOCK_D)
    wide = d.to(tl.int64)
    u += row * u_row + wide * u_channel
    delta += row * delta_row + wide * delta_channel
    z += row * z_row + wide * z_channel
    dy += row * dy_row + wide * dy_channel
    on_channels = row * channels * length + wide * length
    du += on_channels
    ddelta += on_channels
    dz += on_channels
    B += row * B_row + group * B_group
    C += row * C_row + group * C_group
    part = (row * tl.num_programs(0) + tl.program_id(0)) * length * states
    dB += part
    dC += part
    n = tl.arange(0, BLOCK_N)
    i = tl.arange(0, BLOCK_T)
    there = exists[:, None] & (n < states)[None, :]
    on_states = row * channels * states + d[:, None] * states + n[None, :]
    rate = tl.load(A + d[:, None] * A_channel + n[None, :] * A_state, mask=there, other=0.0).to(tl.float32)
    rate2 = rate * LOG2E
    shift = tl.zeros((BLOCK_D,), tl.float32)
    skip = tl.zeros((BLOCK_D,), tl.float32)
    if BIAS:
        shift = tl.load(bias + d, mask=exists, other=0.0).to(tl.float32)
    if SKIP:
        skip = tl.load(D + d, mask=exists, other=0.0).to(tl.float32)

    carry = tl.load(dlast + on_states, mask=there, other=0.0)  # the gradient of the state behind the block
    drate = tl.zeros((BLOCK_D, BLOCK_N), tl.float32)
    dskip = tl.zeros((BLOCK_D,), tl.float32)
    block = tl.cdiv(length, BLOCK_T) - 1
    while block >= 0:
        first = block * BLOCK_T
        t = first + i
        mask = (t < length)[:, None] & exists[None, :]
        projected = (t < length)[:, None] & (n < states)[None, :]
        raw = _tokens(delta, first, i, delta_token, mask) + shift[None, :]
        dt = tl.where(mask, step_size(raw, 0.0, SOFTPLUS), 0.0)
        value = _tokens(u, first, i, u_token, mask)
        Bt = _states(B, first, i, n, B_state, B_token, projected)
        Ct = _states(C, first, i, n, C_state, C_token, projected)

        # the states before each token: a scan over the tokens before, the first of which is the saved state itself
        inside = mask & (i > 0)[:, None]
        before = _tokens(delta, first, i - 1, delta_token, inside)
        before = tl.where(inside, step_size(before, shift[None, :], SOFTPLUS), 0.0)
        entering = before * _tokens(u, first, i - 1, u_token, inside)
        B_before = _states(B, first, i - 1, n, B_state, B_token, projected & (i > 0)[:, None])
        at = (row * tl.cdiv(length, BLOCK_T) + block) * channels * states
        h = tl.load(starts + at + d[:, None] + n[None, :] * channels, mask=there, other=0.0)
        decay = vanishing_exp2(before[:, :, None] * rate2[None, :, :])
        kept, reached = tl.associative_scan((decay, entering[:, :, None] * B_before[:, None, :]), 0, _advance)
        reached += kept * h[None, :, :]
        reached *= vanishing_exp2(dt[:, :, None] * rate2[None, :, :])  # what of it each token keeps
        state = reached + (dt * value)[:, :, None] * Bt[:, None, :]

        dout = _tokens(dy, first, i, dy_token, mask)
        if GATE:
            gate = _tokens(z, first, i, z_token, mask)
            open = sigmoid(gate)
            out = tl.sum(state * Ct[:, None, :], axis=2) + skip[None, :] * value
            tl.store(dz[None, :] + t[:, None], dout * out * open * (1.0 + gate * (1.0 - open)), mask=mask)
            dout *= gate * open
        dskip += tl.sum(dout * value, axis=0)

        # the gradient of each state: what its output asks for, and what the next token keeps of the next state's
        following = mask & (t + 1 < length)[:, None]
        after = _tokens(delta, first, i + 1, delta_token, following)
        after = tl.where(following, step_size(after, shift[None, :], SOFTPLUS), 0.0)
        decay = vanishing_exp2(after[:, :, None] * rate2[None, :, :])
        kept, g = tl.associative_scan((decay, dout[:, :, None] * Ct[:, None, :]), 0, _advance, reverse=True)
        g += kept * carry[None, :, :]
        carry = tl.sum(tl.where((i == 0)[:, None, None], g, 0.0), axis=0)

        on_tokens = t[:, None] * states + n[None, :]
        tl.store(dC + on_tokens, tl.sum(dout[:, :, None] * state, axis=1), mask=projected)
        tl.store(dB + on_tokens, tl.sum(g * (dt * value)[:, :, None], axis=1), mask=projected)
        response = tl.sum(g * Bt[:, None, :], axis=2)
        g *= reached
        drate += tl.sum(g * dt[:, :, None], axis=0)
        dstep = value * response + tl.sum(g * rate[None, :, :], axis=2)
        if SOFTPLUS:
            dstep *= sigmoid(raw)
        tl.store(du[None, :] + t[:, None], dt * response + skip[None, :] * dout, mask=mask)
        tl.store(ddelta[None, :] + t[:, None], dstep, mask=mask)
        block -= 1
    tl.store(dA + on_states, drate, mask=there)
    tl.store(dD + row * channels + d, dskip, mask=exists)


def _options(scan: SelectiveScan) -> dict[str, Any]:
    return {"SOFTPLUS": scan.delta_softplus, "SKIP": scan.D is not None, "GATE": scan.z is not None,
            "BIAS": scan.delta_bias is not None}  # fmt: skip


def _boundaries(scan: SelectiveScan, chunk: int) -> tuple[Tensor, Tensor]:
    """The state that each chunk of so many tokens starts from, `(B, chunks * N * D)`, and the last state `(B, D, N)`.

    Chunks are no dimension of their own: a size that some lengths make 1 would be guarded on, and compiled twice.
    """
    scan = scan.ungated()
    u, delta, A, B = scan.u, scan.delta, scan.A, scan.B
    rows, channels, length, groups, states = scan.sizes
    chunks = triton.cdiv(length, chunk)
    boundaries = u.new_empty(rows, chunks * states * channels, dtype=torch.float32)
    steps = u.new_empty(rows, chunks * channels, dtype=torch.float32)
    last = u.new_empty(rows, channels, states, dtype=torch.float32)
    bias = u if scan.delta_bias is None else scan.delta_bias
    launch(selective_scan_kernel, u)[groups * triton.cdiv(channels // groups, TILE), chunks, rows](
        u, delta, A, B, B, u, u, bias, u, boundaries, steps, length, chunk, channels, groups,
        *u.stride(), *delta.stride(), *u.stride(), *A.stride(), *B.stride(), *B.stride(),
        states=states, OUTPUT=False, **_options(scan), BLOCK_D=TILE, num_warps=1,
    )  # fmt: skip
    launch(chain_kernel, u)[triton.cdiv(channels, 128), states, rows](
        boundaries, steps, A, last, chunks, channels, *A.stride(), states=states, AHEAD=8, BLOCK_D=128
    )
    return boundaries, last


def selective_scan(scan: SelectiveScan) -> tuple[Tensor, Tensor]:
    """`simba_fx::selective_scan` with `B`, `C` `(B, G, N, L)`: y `(B, D, L)` channel-last, last state `(B, D, N)`."""
    u, delta, A, B, C = scan.u, scan.delta, scan.A, scan.B, scan.C
    rows, channels, length, groups, states = scan.sizes
    y = u.new_empty(rows, length, channels)
    boundaries, last = _boundaries(scan, CHUNK)
    D, z, bias = (u if t is None else t for t in (scan.D, scan.z, scan.delta_bias))
    tiles = groups * triton.cdiv(channels // groups, TILE)
    launch(selective_scan_kernel, u)[tiles, triton.cdiv(length, CHUNK), rows](
        u, delta, A, B, C, D, z, bias, y, boundaries, boundaries, length, CHUNK, channels, groups,
        *u.stride(), *delta.stride(), *z.stride(), *A.stride(), *B.stride(), *C.stride(),
        states=states, OUTPUT=True, **_options(scan), BLOCK_D=TILE, num_warps=1,
    )  # fmt: skip
    return y.transpose(1, 2), last


def selective_scan_backward(
    dy: Tensor, dlast: Tensor, scan: SelectiveScan
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Float32 gradients of u, delta, A, B, C, D, z and delta_bias (zeros for an absent D, none for an absent z)."""
    u, delta, A, B, C = scan.u, scan.delta, scan.A, scan.B, scan.C
    rows, channels, length, groups, states = scan.sizes
    starts, _ = _boundaries(scan, BLOCK_T)
    tiles = triton.cdiv(channels // groups, BLOCK_D)
    du, ddelta = (u.new_empty(u.shape, dtype=torch.float32) for _ in range(2))
    dz = u.new_zeros(u.shape if scan.z is not None else (0,), dtype=torch.float32)
    dA, dD = u.new_empty(rows, channels, states, dtype=torch.float32), u.new_empty(rows, channels, dtype=torch.float32)
    dB, dC = (u.new_empty(rows, groups * tiles, length, states, dtype=torch.float32) for _ in range(2))
    D, z, bias = (u if t is None else t for t in (scan.D, scan.z, scan.delta_bias))
    launch(selective_scan_backward_kernel, u)[(groups * tiles, rows)](
        u, delta, A, B, C, D, z, bias, dy, dlast.contiguous(), starts, du, ddelta, dz, dA, dB, dC, dD,
        length, channels, states, groups, *u.stride(), *delta.stride(), *z.stride(), *dy.stride(), *A.stride(),
        *B.stride(), *C.stride(), BLOCK_N=triton.next_power_of_2(states), BLOCK_T=BLOCK_T, BLOCK_D=BLOCK_D,
        **_options(scan),
    )  # fmt: skip
    dB, dC = (part.view(rows, groups, tiles, length, states).sum(2).transpose(2, 3) for part in (dB, dC))
    return du, ddelta, dA.sum(0), dB, dC, dD.sum(0), dz, ddelta.sum((0, 2))
