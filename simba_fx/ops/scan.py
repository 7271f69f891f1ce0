"""The scans and the convolution as operators: one node in a graph each, with fake kernels and backward operators.

This is the only place where they are defined (`torch.library.custom_op` accepts a second definition silently and
makes another overload of it). Letters and shapes: see `simba_fx.ops`. Arithmetic is float32 inside, whatever the
dtypes outside; an operand may have any strides. An operator's arguments are the fields of its record
(`simba_fx.ops.operands`), in order: a schema names them once more, for torch; everything behind it takes the record.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from simba_fx.ops import backends, chunked, chunked_ssd
from simba_fx.ops.inline import inline_on_gpu, never
from simba_fx.ops.operands import NO_LIMIT, CausalConv, SelectiveScan, SSDScan, step_size


def _token_output(like: Tensor) -> Tensor:
    """Room for a `(B, D, L)` result, channel-last (a transposed `(B, L, D)`): what the matrix product next to it reads.
    A leading dimension of L would also be a slow one: kept counts are rarely multiples of 8."""
    rows, channels, length = like.shape
    return like.new_empty(rows, length, channels).transpose(1, 2)


def _room(like: Tensor, operand: Tensor | None) -> Tensor:
    """Room for the gradient of an operand: contiguous, empty when there is no such operand."""
    return like.new_empty(0) if operand is None else torch.empty_like(operand, memory_format=torch.contiguous_format)


def _token_room(like: Tensor, operand: Tensor | None) -> Tensor:
    """Room for the gradient of a `(B, D, L)` operand, in the layout of `_token_output`."""
    return like.new_empty(0) if operand is None else _token_output(operand)


def _fit(gradient: Tensor, operand: Tensor | None) -> Tensor:
    """`gradient` in the dtype and shape of its operand, as `_room` has it."""
    if operand is None:
        return gradient.new_empty(0)
    return gradient.reshape(operand.shape).to(operand.dtype).contiguous()


def _fit_tokens(gradient: Tensor, operand: Tensor | None) -> Tensor:
    """`gradient` `(B, D, L)` in the dtype of its operand, as `_token_room` has it."""
    if operand is None:
        return gradient.new_empty(0)
    return gradient.to(operand.dtype).transpose(1, 2).contiguous().transpose(1, 2)


# --- Mamba-1 ---------------------------------------------------------------------------------------------------------


@torch.library.custom_op("simba_fx::selective_scan", mutates_args=())
def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
) -> tuple[Tensor, Tensor]:
    """The scan of Mamba-1: `h_t = exp(dt_t A) h_{t-1} + dt_t B_t u_t`, `y_t = (C_t . h_t + D u_t) silu(z_t)`.

    Gu & Dao 2023, section 3.2, as `mamba_ssm.selective_scan_fn` computes it (A discretised by zero-order hold, B by
    Euler); unlike there, the gradient that reaches `last_state` is not dropped.

    Args:
        u: input `(B, D, L)`.
        delta: raw step size `(B, D, L)`; `dt = softplus(delta + delta_bias)`, the softplus only if `delta_softplus`.
        A: `(D, N)`, real and negative.
        B, C: `(B, N, L)` or `(B, G, N, L)`; channel d reads group `d // (D // G)`.
        D: skip `(D,)`. z: gate `(B, D, L)`. delta_bias: `(D,)`.

    Returns:
        y `(B, D, L)` in u's dtype, channel-last; the last state `(B, D, N)`, float32.
    """
    scan = SelectiveScan(u, delta, A, B, C, D, z, delta_bias, delta_softplus)
    y, last = backends.selective_scan(scan.checked("selective_scan"))
    return y.detach(), last.detach()  # no views: what comes after may write into its results


@selective_scan.register_fake
def _(*arguments: Any) -> tuple[Tensor, Tensor]:
    scan = SelectiveScan(*arguments).checked("selective_scan")
    rows, channels, _, _, states = scan.sizes
    return _token_output(scan.u), scan.u.new_empty(rows, channels, states, dtype=torch.float32)


@torch.library.custom_op("simba_fx::selective_scan_backward", mutates_args=())
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
    """Gradients of u, delta, A, B, C, D, z and delta_bias from those of y and last_state; empty for absent operands."""
    scan = SelectiveScan(u, delta, A, B, C, D, z, delta_bias, delta_softplus)
    gradients = backends.selective_scan_backward(dy, dlast, scan.checked("selective_scan_backward", dy=dy, dlast=dlast))
    fits = (_fit_tokens, _fit_tokens, _fit, _fit, _fit, _fit, _fit_tokens, _fit)
    out = [fit(gradient, operand) for fit, gradient, operand in zip(fits, gradients, scan.arguments)]
    return tuple(out)  # type: ignore[return-value]


@selective_scan_backward.register_fake
def _(dy: Tensor, dlast: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    scan = SelectiveScan(*arguments)
    rooms = (_token_room, _token_room, _room, _room, _room, _room, _token_room, _room)
    return tuple(room(scan.u, operand) for room, operand in zip(rooms, scan.arguments))


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    """Saves tensor inputs for backward and keeps the rest (`None`, flags, numbers) on the context, by position."""
    ctx.save_for_backward(*(value for value in inputs if isinstance(value, Tensor)))
    ctx.others = tuple(None if isinstance(value, Tensor) else (value,) for value in inputs)


def _saved(ctx: Any) -> list[Any]:
    """The inputs that `_save` kept, in their order."""
    tensors = iter(ctx.saved_tensors)
    return [next(tensors) if other is None else other[0] for other in ctx.others]


def _present(gradients: tuple[Tensor, ...], operands: list[Any]) -> tuple[Tensor | None, ...]:
    """Gradients of the operands that exist, `None` for the others."""
    return tuple(g if isinstance(operand, Tensor) else None for g, operand in zip(gradients, operands))


def _differentiate_selective_scan(ctx: Any, dy: Tensor, dlast: Tensor) -> tuple[Tensor | None, ...]:
    inputs = _saved(ctx)
    return *_present(selective_scan_backward(dy, dlast, *inputs), inputs[:8]), None


selective_scan.register_autograd(_differentiate_selective_scan, setup_context=_save)


# --- Mamba-2 ---------------------------------------------------------------------------------------------------------


@torch.library.custom_op("simba_fx::ssd_scan", mutates_args=())
def ssd_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    dt_min: float = 0.0,
    dt_max: float = NO_LIMIT,
    chunk_size: int = 256,
) -> tuple[Tensor, Tensor]:
    """The scan of Mamba-2: `h_t = exp(dt_t A) h_{t-1} + dt_t x_t (x) B_t`, `y_t = (h_t C_t + D x_t) silu(z_t)`.

    Dao & Gu 2024, section 7, as `mamba_ssm.mamba_chunk_scan_combined` computes it.

    Args:
        x: input `(B, L, H, P)`.
        dt: raw step size `(B, L, H)`; the step is `clamp(softplus(dt + dt_bias), dt_min, dt_max)`, softplus only if
            `dt_softplus`.
        A: `(H,)`, real and negative.
        B, C: `(B, L, G, N)`; head h reads group `h // (H // G)`.
        D: skip `(H,)` or `(H, P)`. z: gate `(B, L, H, P)`. dt_bias: `(H,)`.
        chunk_size: tokens per matrix product, for the paths that work in chunks; the result does not depend on it.

    Returns:
        y `(B, L, H, P)` contiguous in x's dtype; the last state `(B, H, P, N)`, float32.
    """
    scan = SSDScan(x, dt, A, B, C, D, z, dt_bias, dt_softplus, dt_min, dt_max, chunk_size)
    y, last = backends.ssd_scan(scan.checked("ssd_scan"))
    # strides as the fake kernel has them, or a compiled graph dies; no views, into which autograd lets nobody write
    return y.contiguous().detach(), last.contiguous().detach()


@ssd_scan.register_fake
def _(*arguments: Any) -> tuple[Tensor, Tensor]:
    scan = SSDScan(*arguments).checked("ssd_scan")
    rows, _, heads, width, _, states = scan.sizes
    return scan.x.new_empty(scan.x.shape), scan.x.new_empty(rows, heads, width, states, dtype=torch.float32)


@torch.library.custom_op("simba_fx::ssd_scan_backward", mutates_args=())
def ssd_scan_backward(
    dy: Tensor,
    dlast: Tensor,
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, dt, A, B, C, D, z and dt_bias from those of y and last_state; empty for absent operands.

    A step held at `dt_min` or `dt_max` passes no gradient on, as `torch.clamp` has it.
    """
    scan = SSDScan(x, dt, A, B, C, D, z, dt_bias, dt_softplus, dt_min, dt_max, chunk_size)
    scan = scan.checked("ssd_scan_backward", dy=dy, dlast=dlast)
    dx, dstep, dA, dB, dC, dD, dz = chunked_ssd.ssd_scan_backward(dy, dlast, scan)
    raw = step_size(dt, dt_bias, False)
    step = F.softplus(raw) if dt_softplus else raw
    draw = torch.where((step >= dt_min) & (step <= dt_max), dstep, 0.0)
    draw = draw * torch.sigmoid(raw) if dt_softplus else draw
    if D is not None and D.dim() == 1:
        dD = dD.sum(1)
    gradients = (dx, draw, dA, dB, dC, dD, dz, draw.sum((0, 1)))
    out = [_fit(gradient, operand) for gradient, operand in zip(gradients, scan.arguments)]
    return tuple(out)  # type: ignore[return-value]


@ssd_scan_backward.register_fake
def _(dy: Tensor, dlast: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    return tuple(_room(arguments[0], operand) for operand in arguments[:8])


def _differentiate_ssd_scan(ctx: Any, dy: Tensor, dlast: Tensor) -> tuple[Tensor | None, ...]:
    inputs = _saved(ctx)
    return *_present(ssd_scan_backward(dy, dlast, *inputs), inputs[:8]), None, None, None, None


ssd_scan.register_autograd(_differentiate_ssd_scan, setup_context=_save)


# --- Convolution -----------------------------------------------------------------------------------------------------


@torch.library.custom_op("simba_fx::causal_conv1d", mutates_args=())
def causal_conv1d(x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str = "none") -> Tensor:
    """Depthwise convolution that sees no later token: `y_t[d] = act(bias[d] + sum_k weight[d, k] x_{t-W+1+k}[d])`.

    An operator of its own because aten's conv1d puts a guard on the batch size into CPU graphs.

    Args:
        x: `(B, D, L)`; tokens before the first count as zero.
        weight: `(D, W)`. bias: `(D,)`.
        activation: `"none"` or `"silu"`.

    Returns:
        `(B, D, L)` in x's dtype, channel-last.
    """
    conv = CausalConv(x, weight, bias, activation).checked("causal_conv1d")
    _known(activation)
    return backends.causal_conv1d(conv).detach()


def _known(activation: str) -> str:
    if activation not in ("none", "silu"):
        raise ValueError(f"causal_conv1d: activation must be 'none' or 'silu', got {activation!r}")
    return activation


@causal_conv1d.register_fake
def _(*arguments: Any) -> Tensor:
    conv = CausalConv(*arguments).checked("causal_conv1d")
    _known(conv.activation)
    return _token_output(conv.x)


@torch.library.custom_op("simba_fx::causal_conv1d_backward", mutates_args=())
def causal_conv1d_backward(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, activation: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias (empty if there is none) from that of y `(B, D, L)`."""
    conv = CausalConv(x, weight, bias, activation).checked("causal_conv1d_backward", dy=dy)
    dpre = dy.transpose(1, 2).float()
    if _known(activation) == "silu":
        dpre = dpre * chunked.silu_gradient(chunked.causal_conv1d(conv))
    dx, dweight, dbias = chunked.causal_conv1d_backward(dpre, x, weight)
    return _fit_tokens(dx.transpose(1, 2), x), _fit(dweight, weight), _fit(dbias, bias)


@causal_conv1d_backward.register_fake
def _(dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> tuple[Tensor, Tensor, Tensor]:
    return _token_room(x, x), _room(x, weight), _room(x, bias)


def _differentiate_causal_conv1d(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    inputs = _saved(ctx)
    return *_present(causal_conv1d_backward(dy, *inputs), inputs[:3]), None


causal_conv1d.register_autograd(_differentiate_causal_conv1d, setup_context=_save)


# --- In graphs for a GPU ---------------------------------------------------------------------------------------------


def _always(*_: Any) -> bool:
    return True


def _as_triton(*operands: Any) -> bool:
    """Whether the scan with these operands is a Triton kernel."""
    return backends.triton_scan(SelectiveScan(*operands)) is not None


def _backward_as_triton(*operands: Any) -> bool:
    return _as_triton(*operands[2:])


inline_on_gpu(selective_scan, _as_triton)
inline_on_gpu(selective_scan_backward, _backward_as_triton)
inline_on_gpu(ssd_scan, never)
inline_on_gpu(causal_conv1d, _always)
inline_on_gpu(causal_conv1d_backward, _always)
