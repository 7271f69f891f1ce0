"""The walk that scores a gated delta rule, as a Triton kernel. Letters: `simba_fx.ops`, `simba_fx.ops.delta`.

The query is carried backwards in time, one token after the other: a program is one warp with one head of one row, its
r `(K,)` in registers. Tokens depend on each other, so a long prompt takes as long as its walk; several tokens are read
at once, before the first of them is needed.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from simba_fx.ops.cuda.triton.common import LOG2E, launch, vanishing_exp2
from simba_fx.ops.operands import DeltaScan

AHEAD = 8
"""Tokens that are read at once."""


@triton.jit(do_not_specialize=["length"])
def delta_reads_kernel(
    q_query, k, g, beta, query, reads, length, width, share,
    q_row, q_head, q_channel, k_row, k_token, k_head, k_channel, g_row, g_token, g_head, g_channel,
    beta_row, beta_token, beta_head,
    DECAY: tl.constexpr, BY_CHANNEL: tl.constexpr, AHEAD: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """`reads` `(B, L, H)`, zeros, of which each program writes its head's up to the query: `k_t . r_t`."""
    head, heads = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    row = tl.program_id(1).to(tl.int64)
    n = tl.arange(0, BLOCK_K)
    exists = n < width
    last = tl.load(query + row)
    k += row * k_row + head // share * k_head + n * k_channel
    g += row * g_row + head * g_head
    if BY_CHANNEL:
        g += n * g_channel
    beta += row * beta_row + head * beta_head
    reads += row * length * heads + head
    r = tl.load(q_query + row * q_row + head // share * q_head + n * q_channel, mask=exists, other=0.0).to(tl.float32)
    for behind in range(0, last + 1, AHEAD):
        keys = ()
        strengths = ()
        decays = ()
        for i in tl.static_range(AHEAD):
            t = tl.maximum(last - behind - i, 0)  # what is read twice is not used
            keys = keys + (tl.load(k + t * k_token, mask=exists, other=0.0).to(tl.float32),)
            strengths = strengths + (tl.load(beta + t * beta_token).to(tl.float32),)
            if DECAY:
                if BY_CHANNEL:
                    decay = tl.load(g + t * g_token, mask=exists, other=0.0).to(tl.float32)
                else:
                    decay = tl.load(g + t * g_token).to(tl.float32)
                decays = decays + (vanishing_exp2(decay * LOG2E),)
        for i in tl.static_range(AHEAD):
            t = last - behind - i
            met = tl.sum(keys[i] * r, axis=0)
            tl.store(reads + t * heads, met, mask=t >= 0)
            r -= keys[i] * (strengths[i] * met)
            if DECAY:
                r *= decays[i]


def delta_reads(scan: DeltaScan, q_query: Tensor, query: Tensor, decays: bool) -> Tensor:
    """As `backends.delta_reads`."""
    v, k, g, beta = scan.v, scan.k, scan.g, scan.beta
    rows, length, heads, _ = v.shape
    _, _, groups, width = k.shape
    reads = v.new_zeros(rows, length, heads, dtype=torch.float32)
    launch(delta_reads_kernel, v)[heads, rows](
        q_query, k, g, beta, query, reads, length, width, heads // groups, *q_query.stride(), *k.stride(),
        *g.stride()[:3], g.stride(3) if g.dim() == 4 else 0, *beta.stride(),
        DECAY=decays, BY_CHANNEL=g.dim() == 4, AHEAD=AHEAD, BLOCK_K=triton.next_power_of_2(width), num_warps=1,
    )  # fmt: skip
    return reads
