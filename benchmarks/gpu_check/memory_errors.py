"""Stage s, run under compute-sanitizer: the Triton kernels at sizes that fit no block, each tensor an allocation."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from common import DEVICE, DRY, attempt, synchronize
from torch import Tensor

from simba_fx.ops import backends

K = backends.triton_kernels()
SIZES = ((1, 8), (17, 8)) if DRY else ((1, 8), (67, 24), (300, 40))
"""Tokens, channels."""
ROWS, N = 2, 16


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, device=DEVICE)


def every_kernel(length: int, channels: int) -> dict[str, Any]:
    lengths = torch.tensor([[length], [max(1, length - 5)]], device=DEVICE)
    real = torch.arange(length, device=DEVICE) < lengths
    A = -torch.rand(channels, N, device=DEVICE)
    u, delta = (random(ROWS, channels, length).bfloat16() for _ in range(2))
    B, C = (random(ROWS, 1, N, length).bfloat16() for _ in range(2))
    for mask in (None, real):
        K.score.selective_token_score(u, delta, A, B, C, None, True, mask, 1, False)
    K.scan.selective_scan(u, delta, A, B, C, None, None, None, True)
    x, dt = random(ROWS, length, 2, 16), random(ROWS, length, 2)
    B, C = (random(ROWS, length, 1, 16) for _ in range(2))
    K.score.ssd_token_score(x, dt, A[:2, 0], B, C, None, True, 0.0, 9.0, real, 1, "simba")
    score, positions = random(ROWS, length), torch.arange(length, device=DEVICE).expand(ROWS, length)
    rule = max(1, length // 2), length, 1, 1, 2, 0
    K.select.select(score, positions, None, None, *rule)
    K.select.select(score, positions, real, real.sum(1), *rule)
    synchronize()
    return {"ok": True}


def main() -> None:
    if DRY:
        backends.on_gpu = lambda operand: True
    for length, channels in SIZES:
        attempt("sanitizer", partial(every_kernel, length, channels), need=0, L=length)


if __name__ == "__main__":
    main()
