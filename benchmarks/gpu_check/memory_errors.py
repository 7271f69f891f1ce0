"""Stage s, run under compute-sanitizer: the Triton kernels at sizes that fit no block, each tensor an allocation."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from common import DEVICE, DRY, attempt, synchronize
from torch import Tensor

from simba_fx.ops import backends

OPS = torch.ops.simba_fx
SIZES = ((1, 8), (17, 8)) if DRY else ((1, 8), (67, 24), (300, 40))
"""Tokens, channels."""
ROWS, N = 2, 16


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, device=DEVICE)


def every_kernel(length: int, channels: int) -> dict[str, Any]:
    lengths = torch.tensor([[length], [max(1, length - 5)]], device=DEVICE)
    real = torch.arange(length, device=DEVICE) < lengths
    A = -torch.rand(channels, N, device=DEVICE)
    u, delta, z = (random(ROWS, channels, length).bfloat16() for _ in range(3))
    B, C = (random(ROWS, N, length).bfloat16() for _ in range(2))
    weight, skip, bias = random(channels, 4), random(channels), random(channels)
    OPS.causal_conv1d(u, weight, bias, "silu")
    OPS.selective_scan(u, delta, A, B, C, skip, z, bias, True)
    for mask in (None, real):
        OPS.selective_token_score(u, delta, A, B, C, None, True, mask, 1, "simba")
    x, dt = random(ROWS, length, 2, 16), random(ROWS, length, 2)
    B, C = (random(ROWS, length, 1, N) for _ in range(2))
    OPS.ssd_token_score(x, dt, A[:2, 0], B, C, None, True, 0.0, 9.0, real, 1, "simba")
    q, k = (random(ROWS, length, 1, N) / N for _ in "qk")
    for shape in ((2,), (2, N)):
        g, beta = -random(ROWS, length, *shape).abs(), random(ROWS, length, 2).sigmoid()
        OPS.delta_token_score(x, q, k, g, beta, 64, real, 1, "simba")
    score, positions = random(ROWS, length), torch.arange(length, device=DEVICE).expand(ROWS, length)
    rule = length, 1, 1, 2, 0
    OPS.select_tokens(score, positions, *rule)
    OPS.select_real_tokens(score, positions, real, real.sum(1), *rule)
    synchronize()
    return {"ok": True}


def main() -> None:
    if DRY:
        backends.on_gpu = lambda operand: True
    for length, channels in SIZES:
        attempt("sanitizer", partial(every_kernel, length, channels), need=0, L=length)


if __name__ == "__main__":
    main()
