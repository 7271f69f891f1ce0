"""The kernels of mamba_ssm and causal_conv1d, when they can be imported: forward passes on CUDA.

Not run by this project's own tests, which have no GPU: kept to what the packages document (mamba-ssm 2.3.2,
causal-conv1d 1.7). Backward passes take the PyTorch path on CUDA: the packages' own sit behind autograd functions,
which do not record inside an operator, and mamba_ssm drops the gradient of `last_state`. Letters: see `simba_fx.ops`.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any

import torch
from torch import Tensor


@functools.cache
def _function(module: str, name: str) -> Any:
    """The function, or None where its package cannot be imported: not installed, built for another torch, or broken."""
    try:
        return getattr(importlib.import_module(module), name)
    except Exception:  # whatever a package does when it is imported: PyTorch and Triton can do without
        return None


def selective_scan_fn() -> Any:
    """`mamba_ssm`'s selective scan, or None."""
    return _function("mamba_ssm.ops.selective_scan_interface", "selective_scan_fn")


def ssd_scan_fn() -> Any:
    """`mamba_ssm`'s SSD scan, or None."""
    return _function("mamba_ssm.ops.triton.ssd_combined", "mamba_chunk_scan_combined")


def causal_conv1d_fn() -> Any:
    """`causal_conv1d`'s convolution, or None."""
    return _function("causal_conv1d", "causal_conv1d_fn")


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
) -> tuple[Tensor, Tensor]:
    """As `chunked.selective_scan`, but y is `(B, D, L)`. The kernel wants one dtype: float32 where operands differ."""
    mixed = any(t is not None and t.dtype != u.dtype for t in (delta, B, C, z))
    dtype = torch.float32 if mixed else u.dtype
    u_, delta_, B_, C_, z_ = (None if t is None else t.to(dtype) for t in (u, delta, B, C, z))
    D_, bias = (None if t is None else t.float() for t in (D, delta_bias))
    y, last = selective_scan_fn()(u_, delta_, A.float(), B_, C_, D_, z_, bias, delta_softplus, return_last_state=True)
    return y.to(u.dtype).contiguous(), last


def ssd_scan(
    x: Tensor, step: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None, chunk_size: int
) -> tuple[Tensor, Tensor]:
    """As `chunked_ssd.ssd_scan`."""
    y, last = ssd_scan_fn()(x, step, A.float(), B, C, chunk_size, D=D, z=z, return_final_states=True)
    return y.to(x.dtype).contiguous(), last.float()


def causal_conv1d(x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool) -> Tensor:
    """Convolution and activation, `(B, D, L)` in x's dtype; 2 to 4 taps."""
    weight, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
    y: Tensor = causal_conv1d_fn()(x.contiguous(), weight, bias, activation="silu" if silu else None)
    return y
