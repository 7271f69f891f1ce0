"""Which code runs an operator on a device: kept apart from the operators, so that they read as their definitions.

CPU: the C++ kernels where they can be built; CUDA: mamba_ssm's where they can be imported; else, and for operands that
those do not take, PyTorch. Projections come grouped here: B and C of a selective scan are `(B, G, N, L)`.
"""

from __future__ import annotations

import importlib.metadata

import torch.nn.functional as F
from torch import Tensor

from simba_fx.ops import chunked, chunked_ssd, cuda, native


def kernel_path(device_type: str) -> str:
    """In words, what runs the scans on such a device: `"C++ (g++ 12.2, OpenMP, AVX512)"`, `"torch (<reason>)"`, ...

    Asking may compile the CPU kernels (seconds, once per machine) or import mamba_ssm.
    """
    if device_type == "cpu":
        found = native.load()
        return f"torch ({found})" if isinstance(found, str) else found.description
    if device_type == "cuda":
        if cuda.selective_scan_fn() is None:
            return "torch (mamba_ssm cannot be imported)"
        return f"mamba_ssm {importlib.metadata.version('mamba_ssm')}"
    return f"torch (no kernels for {device_type})"


def _native_scan(operand: Tensor, states: int) -> bool:
    return operand.device.type == "cpu" and native.supports(states)


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
    """y `(B, D, L)` in the operator's layout, last state `(B, D, N)`."""
    if u.device.type == "cuda" and cuda.selective_scan_fn() is not None:
        return cuda.selective_scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus)
    run = native.selective_scan if _native_scan(u, A.shape[1]) else chunked.selective_scan
    y, last = run(u, delta, A, B, C, D, z, delta_bias, delta_softplus)
    return token_layout(y), last


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
) -> tuple[Tensor, ...]:
    """Float32 gradients of u, delta, A, B, C, D, z, delta_bias."""
    run = native.selective_scan_backward if _native_scan(u, A.shape[1]) else chunked.selective_scan_backward
    return run(dy, dlast, u, delta, A, B, C, D, z, delta_bias, delta_softplus)


def selective_score(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C_query: Tensor,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    query: Tensor,
    absolute: bool,
) -> Tensor:
    """Largest contribution over the channels `(B, L)`, anything after the query; `C_query` `(B, G, N)`."""
    run = native.selective_score if _native_scan(u, A.shape[1]) else chunked.selective_score
    return run(u, delta, A, B, C_query, delta_bias, delta_softplus, query, absolute)


def ssd_scan(
    x: Tensor,
    step: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    chunk_size: int,
) -> tuple[Tensor, Tensor]:
    """y `(B, L, H, P)`, last state `(B, H, P, N)`; `step` `(B, L, H)` float32 is final: softplus and clamp are done."""
    if x.device.type == "cuda" and cuda.ssd_scan_fn() is not None:
        return cuda.ssd_scan(x, step, A, B, C, D, z, chunk_size)
    if _native_scan(x, B.shape[3]):
        return native.ssd_scan(x, step, A, B, C, D, z)
    return chunked_ssd.ssd_scan(x, step, A, B, C, D, z, chunk_size)


def causal_conv1d(x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool) -> Tensor:
    """`(B, D, L)` in the operator's layout and x's dtype."""
    taps = weight.shape[1]
    if x.device.type == "cuda" and 2 <= taps <= 4 and cuda.causal_conv1d_fn() is not None:
        return cuda.causal_conv1d(x, weight, bias, silu)
    if x.device.type == "cpu" and native.supports_taps(taps):
        return token_layout(native.causal_conv1d(x, weight, bias, silu))
    y = chunked.causal_conv1d(x, weight, bias)
    return token_layout((F.silu(y) if silu else y).to(x.dtype))


def token_layout(y: Tensor) -> Tensor:
    """`(B, L, D)` -> `(B, D, L)`, channel-last on CPU and contiguous elsewhere."""
    y = y.transpose(1, 2)
    return y if y.device.type == "cpu" else y.contiguous()
