"""What the Triton kernels share: arithmetic that is exact to float32, and their launch.

Numbers that say nothing about alignment (lengths, counts, shares of a schedule) are `do_not_specialize`: Triton would
compile a kernel again for each that is 1 or a multiple of 16. Strides are specialised: vector loads depend on them.
"""

from __future__ import annotations

import os
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Kernels run in Triton's interpreter, on tensors of a CPU: slow, for tests."""

_TRACED: ContextVar[bool] = ContextVar("simba_fx_traced", default=False)

LOG2E = tl.constexpr(1.4426950408889634)
GONE = tl.constexpr(-126.0)
"""2^x counts as zero below this: a normal float32 no longer holds it."""
_PTX = tl.constexpr(not INTERPRETED and torch.version.hip is None)


@contextmanager
def traced() -> Any:
    """Kernels launched inside become nodes of the graph that is being traced (`torch.library.wrap_triton`)."""
    token = _TRACED.set(True)
    try:
        yield
    finally:
        _TRACED.reset(token)


class _Launcher:
    """`kernel[grid](...)` on the GPU that holds an operand: Triton itself launches on the current one."""

    def __init__(self, kernel: Any, device: torch.device) -> None:
        self.kernel, self.device = kernel, device

    def __getitem__(self, grid: Any) -> Any:
        def run(*args: Any, **kwargs: Any) -> None:
            with torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext():
                self.kernel[grid](*args, **kwargs)

        return run


def launch(kernel: Any, operand: Tensor) -> Any:
    """The kernel, to be given a grid and arguments, for operands on the device of this one."""
    return torch.library.wrap_triton(kernel) if _TRACED.get() else _Launcher(kernel, operand.device)


@triton.jit
def vanishing_exp2(x):
    """`2^x`, exactly zero where float32 would be subnormal: on NVIDIA's chips one instruction (2 ulp), where `tl.exp2`
    spends four more on those numbers."""
    if _PTX:
        return tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)
    else:
        return tl.where(x < GONE, 0.0, tl.exp2(x))


@triton.jit
def softplus(x):
    """`log(1 + e^x)` as `max(x, 0) + log1p(e^-|x|)`, and `log1p(e) = 2 artanh(e / (2 + e))`: relative accuracy."""
    e = vanishing_exp2(-tl.abs(x) * LOG2E)
    s = e / (2.0 + e)
    q = s * s
    p = q * (1.0 / 15.0) + 1.0 / 13.0
    p = p * q + 1.0 / 11.0
    p = p * q + 1.0 / 9.0
    p = p * q + 1.0 / 7.0
    p = p * q + 1.0 / 5.0
    p = p * q + 1.0 / 3.0
    p = p * q + 1.0
    return tl.where(x > 20.0, x, tl.maximum(x, 0.0) + 2.0 * s * p)


@triton.jit
def step_size(raw, bias, SOFTPLUS: tl.constexpr):
    """The step a token takes, from float32 `raw` and `bias`."""
    step = raw + bias
    if SOFTPLUS:
        step = softplus(step)
    return step


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + vanishing_exp2(-x * LOG2E))


@triton.jit
def last_real(real, length, BLOCK: tl.constexpr):
    """The last slot of a row `(length,)` of bools that is true, -1 if none is."""
    found = -1
    end = length
    while (end > 0) & (found < 0):
        slots = end - BLOCK + tl.arange(0, BLOCK)
        true = tl.load(real + slots, mask=slots >= 0, other=0) != 0
        found = tl.max(tl.where(true, slots, -1), axis=0)
        end -= BLOCK
    return found
