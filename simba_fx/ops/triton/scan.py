"""The selective scan (Mamba-1) as Triton kernels, for machines without mamba_ssm's. Letters: see `simba_fx.ops`.

A program takes a tile of channels of one row and walks through its tokens a block at a time; inside a block the
recurrence is an associative scan over `(T, D, N)`, between blocks the state is carried. The backward pass starts every
block from a state that was saved and walks backwards with the gradient of the state. The state before a token is
scanned for, never `h_t - b_t` nor a quotient, so decay of any strength leaves no rounding residue. Gradients of B and C
are summed over channels by tile, then over the tiles by PyTorch: no atomics, so that runs repeat bit for bit.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from simba_fx.ops.triton.common import LOG2E, launch, step_size, tuned, vanishing_exp2

BLOCK_T = 16
"""Tokens of a block: a state is saved for each in the backward pass."""
BLOCK_D = 8
"""Channels of a tile in the backward pass: gradients of B and C come in so many parts per group."""


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp2(-x * LOG2E))


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
def _tile(channels, groups, BLOCK_D: tl.constexpr):
    """This program's group, its channels, and which of them exist: a tile stays inside of a group."""
    width = channels // groups
    tiles = tl.cdiv(width, BLOCK_D)
    in_group = tl.program_id(0) % tiles * BLOCK_D + tl.arange(0, BLOCK_D)
    group = tl.program_id(0) // tiles
    return group, group * width + in_group, in_group < width


@tuned([({"BLOCK_D": 8}, 4), ({"BLOCK_D": 4}, 4)], key=["channels", "states"])
@triton.jit(do_not_specialize=["length"])
def selective_scan_kernel(
    u, delta, A, B, C, D, z, bias, y, last, starts, length, channels, states, groups,
    u_row, u_channel, u_token, delta_row, delta_channel, delta_token, z_row, z_channel, z_token,
    A_channel, A_state, B_row, B_group, B_state, B_token, C_row, C_group, C_state, C_token,
    BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr, SOFTPLUS: tl.constexpr, BIAS: tl.constexpr, SKIP: tl.constexpr,
    GATE: tl.constexpr, SAVE: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(1).to(tl.int64)
    group, d, exists = _tile(channels, groups, BLOCK_D)
    wide = d.to(tl.int64)
    u += row * u_row + wide * u_channel
    delta += row * delta_row + wide * delta_channel
    z += row * z_row + wide * z_channel
    y += row * channels * length + wide * length
    last += row * channels * states
    B += row * B_row + group * B_group
    C += row * C_row + group * C_group
    n = tl.arange(0, BLOCK_N)
    i = tl.arange(0, BLOCK_T)
    there = exists[:, None] & (n < states)[None, :]
    rate = LOG2E * tl.load(A + d[:, None] * A_channel + n[None, :] * A_state, mask=there, other=0.0).to(tl.float32)
    shift = tl.zeros((BLOCK_D,), tl.float32)
    skip = tl.zeros((BLOCK_D,), tl.float32)
    if BIAS:
        shift = tl.load(bias + d, mask=exists, other=0.0).to(tl.float32)
    if SKIP:
        skip = tl.load(D + d, mask=exists, other=0.0).to(tl.float32)

    h = tl.zeros((BLOCK_D, BLOCK_N), tl.float32)
    for start in range(0, length, BLOCK_T):
        if SAVE:
            at = (row * tl.cdiv(length, BLOCK_T) + start // BLOCK_T) * channels * states
            tl.store(starts + at + d[:, None] * states + n[None, :], h, mask=there)
        first = start + tl.zeros((), tl.int32)
        t = start + i
        mask = (t < length)[:, None] & exists[None, :]
        projected = (t < length)[:, None] & (n < states)[None, :]
        dt = step_size(_tokens(delta, first, i, delta_token, mask), shift[None, :], SOFTPLUS)
        dt = tl.where(mask, dt, 0.0)
        value = _tokens(u, first, i, u_token, mask)
        decay = vanishing_exp2(dt[:, :, None] * rate[None, :, :])
        entering = (dt * value)[:, :, None] * _states(B, first, i, n, B_state, B_token, projected)[:, None, :]
        kept, inner = tl.associative_scan((decay, entering), 0, _advance)
        inner += kept * h[None, :, :]
        h = tl.sum(tl.where((i == BLOCK_T - 1)[:, None, None], inner, 0.0), axis=0)
        if not SAVE:
            out = tl.sum(inner * _states(C, first, i, n, C_state, C_token, projected)[:, None, :], axis=2)
            out += skip[None, :] * value
            if GATE:
                gate = _tokens(z, first, i, z_token, mask)
                out *= gate * _sigmoid(gate)
            tl.store(y[None, :] + t[:, None], out, mask=mask)
    if not SAVE:
        tl.store(last + d[:, None] * states + n[None, :], h, mask=there)


@tuned([({}, 4)], key=["channels", "states"])
@triton.jit(do_not_specialize=["length"])
def selective_scan_backward_kernel(
    u, delta, A, B, C, D, z, bias, dy, dlast, starts, du, ddelta, dz, dA, dB, dC, dD, length, channels, states, groups,
    u_row, u_channel, u_token, delta_row, delta_channel, delta_token, z_row, z_channel, z_token, dy_row,
    dy_channel, dy_token, A_channel, A_state, B_row, B_group, B_state, B_token, C_row, C_group, C_state, C_token,
    BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr, SOFTPLUS: tl.constexpr, BIAS: tl.constexpr, SKIP: tl.constexpr,
    GATE: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(1).to(tl.int64)
    group, d, exists = _tile(channels, groups, BLOCK_D)
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
        h = tl.load(starts + at + d[:, None] * states + n[None, :], mask=there, other=0.0)
        decay = vanishing_exp2(before[:, :, None] * rate2[None, :, :])
        kept, reached = tl.associative_scan((decay, entering[:, :, None] * B_before[:, None, :]), 0, _advance)
        reached += kept * h[None, :, :]
        reached *= vanishing_exp2(dt[:, :, None] * rate2[None, :, :])  # what of it each token keeps
        state = reached + (dt * value)[:, :, None] * Bt[:, None, :]

        dout = _tokens(dy, first, i, dy_token, mask)
        if GATE:
            gate = _tokens(z, first, i, z_token, mask)
            open = _sigmoid(gate)
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
            dstep *= _sigmoid(raw)
        tl.store(du[None, :] + t[:, None], dt * response + skip[None, :] * dout, mask=mask)
        tl.store(ddelta[None, :] + t[:, None], dstep, mask=mask)
        block -= 1
    tl.store(dA + on_states, drate, mask=there)
    tl.store(dD + row * channels + d, dskip, mask=exists)


def _options(A: Tensor, D: Any, z: Any, bias: Any, softplus: bool) -> dict[str, Any]:
    absent = {"SKIP": D is not None, "GATE": z is not None, "BIAS": bias is not None}
    return {"BLOCK_N": triton.next_power_of_2(A.shape[1]), "BLOCK_T": BLOCK_T, "SOFTPLUS": softplus, **absent}


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    starts: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`simba_fx::selective_scan` with `B`, `C` `(B, G, N, L)`: y `(B, D, L)` contiguous, last state `(B, D, N)`.

    With `starts` `(B, ceil(L / BLOCK_T), D, N)` the state that every block of tokens starts from is written there, and
    nothing else.
    """
    rows, channels, length = u.shape
    groups, states = B.shape[1], A.shape[1]
    save = starts is not None
    y = u.new_empty(rows, channels, length) if not save else u
    last = u.new_empty(rows, channels, states, dtype=torch.float32) if not save else u
    D_, z_, bias = (u if t is None else t for t in (D, z, delta_bias))

    def grid(meta: dict[str, int]) -> tuple[int, int]:
        return groups * triton.cdiv(channels // groups, meta["BLOCK_D"]), rows

    launch(selective_scan_kernel)[grid](
        u, delta, A, B, C, D_, z_, bias, y, last, starts if save else u, length, channels, states, groups,
        *u.stride(), *delta.stride(), *z_.stride(), *A.stride(), *B.stride(), *C.stride(),
        **_options(A, D, z, delta_bias, delta_softplus), SAVE=save,
    )  # fmt: skip
    return y, last


def selective_scan_backward(
    dy: Tensor,
    dlast: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Float32 gradients of u, delta, A, B, C, D, z and delta_bias (zeros for an absent D, none for an absent z)."""
    rows, channels, length = u.shape
    groups, states = B.shape[1], A.shape[1]
    starts = u.new_empty(rows, triton.cdiv(length, BLOCK_T), channels, states, dtype=torch.float32)
    selective_scan(u, delta, A, B, C, None, None, delta_bias, delta_softplus, starts)
    tiles = triton.cdiv(channels // groups, BLOCK_D)
    du, ddelta = (u.new_empty(u.shape, dtype=torch.float32) for _ in range(2))
    dz = u.new_zeros(u.shape if z is not None else (0,), dtype=torch.float32)
    dA, dD = u.new_empty(rows, channels, states, dtype=torch.float32), u.new_empty(rows, channels, dtype=torch.float32)
    dB, dC = (u.new_empty(rows, groups * tiles, length, states, dtype=torch.float32) for _ in range(2))
    D_, z_, bias = (u if t is None else t for t in (D, z, delta_bias))
    launch(selective_scan_backward_kernel)[(groups * tiles, rows)](
        u, delta, A, B, C, D_, z_, bias, dy, dlast.contiguous(), starts, du, ddelta, dz, dA, dB, dC, dD,
        length, channels, states, groups, *u.stride(), *delta.stride(), *z_.stride(), *dy.stride(), *A.stride(),
        *B.stride(), *C.stride(), **_options(A, D, z, delta_bias, delta_softplus), BLOCK_D=BLOCK_D,
    )  # fmt: skip
    dB, dC = (part.view(rows, groups, tiles, length, states).sum(2).transpose(2, 3) for part in (dB, dC))
    return du, ddelta, dA.sum(0), dB, dC, dD.sum(0), dz, ddelta.sum((0, 2))
