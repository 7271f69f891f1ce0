"""Which code runs an operator on a device: kept apart from the operators, so that they read as their definitions."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from simba_fx.ops import chunked, chunked_ssd


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
    y, last = chunked.selective_scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus)
    return _token_layout(y), last


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
    return chunked.selective_scan_backward(dy, dlast, u, delta, A, B, C, D, z, delta_bias, delta_softplus)


def ssd_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    dt_min: float,
    dt_max: float,
    chunk_size: int,
) -> tuple[Tensor, Tensor]:
    step = chunked_ssd.ssd_step_size(dt, dt_bias, dt_softplus, dt_min, dt_max)
    return chunked_ssd.ssd_scan(x, step, A, B, C, D, z, chunk_size)


def causal_conv1d(x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool) -> Tensor:
    y = chunked.causal_conv1d(x, weight, bias)
    return _token_layout((F.silu(y) if silu else y).to(x.dtype))


def _token_layout(y: Tensor) -> Tensor:
    """`(B, L, D)` -> `(B, D, L)`, channel-last on CPU and contiguous elsewhere."""
    y = y.transpose(1, 2)
    return y if y.device.type == "cpu" else y.contiguous()


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
    return chunked.selective_score(u, delta, A, B, C_query, delta_bias, delta_softplus, query, absolute)
