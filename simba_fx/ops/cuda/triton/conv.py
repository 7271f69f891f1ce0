"""The depthwise causal convolution as a Triton kernel: bound by memory, channel-last at full width.

Letters: see `simba_fx.ops`.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from simba_fx.ops.cuda.triton.common import launch, sigmoid
from simba_fx.ops.operands import CausalConv


@triton.jit(do_not_specialize=["length"])
def causal_conv1d_kernel(
    x, weight, bias, y, length, channels, x_row, x_channel, x_token, weight_channel, weight_tap,
    TAPS: tl.constexpr, BIAS: tl.constexpr, SILU: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(2).to(tl.int64)
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    t = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    exists = d < channels
    x += row * x_row + d.to(tl.int64) * x_channel
    out = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    if BIAS:
        out += tl.load(bias + d, mask=exists, other=0.0).to(tl.float32)[None, :]
    for tap in tl.static_range(TAPS):
        from_ = t - (TAPS - 1 - tap)
        mask = ((from_ >= 0) & (from_ < length))[:, None] & exists[None, :]
        value = tl.load(x[None, :] + from_.to(tl.int64)[:, None] * x_token, mask=mask, other=0.0).to(tl.float32)
        tap_weight = tl.load(weight + d * weight_channel + tap * weight_tap, mask=exists, other=0.0).to(tl.float32)
        out += value * tap_weight[None, :]
    if SILU:
        out *= sigmoid(out)
    at = (row * length + t.to(tl.int64))[:, None] * channels + d[None, :]
    tl.store(y + at, out, mask=(t < length)[:, None] & exists[None, :])


def causal_conv1d(conv: CausalConv) -> Tensor:
    """`ops.causal_conv1d`: `(B, D, L)` channel-last, in x's dtype."""
    x, weight, bias = conv.x, conv.weight, conv.bias
    rows, channels, length = x.shape
    y = x.new_empty(rows, length, channels)
    launch(causal_conv1d_kernel, x)[triton.cdiv(channels, 128), triton.cdiv(length, 32), rows](
        x, weight, x if bias is None else bias, y, length, channels, *x.stride(), *weight.stride(),
        TAPS=weight.shape[1], BIAS=bias is not None, SILU=conv.activation == "silu", BLOCK_T=32, BLOCK_D=128,
    )  # fmt: skip
    return y.transpose(1, 2)
