"""Which code runs an operator on a device: kept apart from the operators, so that they read as their definitions.

CPU: the C++ kernels where they can be built. CUDA: Triton kernels; for the scans of Mamba-2 mamba_ssm's and of delta
rules fla's, where those can be imported. Else, and for operands that those do not take, PyTorch. Projections come
grouped here: B and C of a selective scan are `(B, G, N, L)`.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from simba_fx.ops import chunked, chunked_delta, chunked_ssd
from simba_fx.ops.cpu import native
from simba_fx.ops.cuda import packages as cuda
from simba_fx.ops.operands import CausalConv, DeltaScan, SelectiveScan, SSDScan


def kernel_path(device_type: str, packages: tuple[str, ...] = ("mamba_ssm", "fla", "triton")) -> str:
    """In words, what runs the scans on such a device: `"C++ (g++ 12.2, OpenMP, AVX512)"`, `"torch (<reason>)"`, ...

    Asking may compile the CPU kernels (seconds, once per machine) or import those packages (on a GPU).
    """
    if device_type == "cpu":
        found = native.load()
        return f"torch ({found})" if isinstance(found, str) else found.description
    if device_type == "cuda":
        limits = {"fla": " (in half precision)"}
        there: dict[str, Any] = {"mamba_ssm": cuda.ssd_scan_fn, "fla": cuda.delta_rule_fn, "triton": triton_kernels}
        names = [f"{name} {version(name)}{limits.get(name, '')}" for name in packages if there[name]() is not None]
        return ", ".join(names) or f"torch (cannot import {', '.join(packages)})"
    return f"torch (no kernels for {device_type})"


@functools.cache
def version(package: str) -> str:
    """The version of a package that can be imported: its own word where its distribution has another name."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return str(getattr(importlib.import_module(package), "__version__", "of unknown version"))


def on_gpu(operand: Tensor) -> bool:
    """Whether operands on such a device take the CUDA paths. (Tests of these say yes to the CPU.)"""
    return operand.device.type == "cuda"


@functools.cache
def triton_kernels() -> Any:
    """The package `simba_fx.ops.cuda.triton`, or None where Triton cannot be imported."""
    try:
        return importlib.import_module("simba_fx.ops.cuda.triton")
    except ImportError:
        return None


def has_triton(*_: Any) -> bool:
    """Whether Triton can be imported, whatever the arguments of the operator that asks (`inline.inline_on_gpu`)."""
    return triton_kernels() is not None


def triton_for(operand: Tensor) -> Any:
    """The Triton kernels for operands on such a device, or None."""
    return triton_kernels() if on_gpu(operand) else None


MOST_STATES = 32
"""States of a channel that a thread's registers hold (`simba_fx.ops.cuda.triton.scan`)."""


def triton_scan(scan: SelectiveScan) -> Any:
    """The Triton kernels for a selective scan or its score, or None."""
    return triton_for(scan.u) if scan.A.shape[1] <= MOST_STATES else None


def traced() -> AbstractContextManager[Any]:
    """Inside, what is launched becomes part of the graph that is being traced."""
    if triton_kernels() is None:
        return nullcontext()
    context: AbstractContextManager[Any] = importlib.import_module("simba_fx.ops.cuda.triton.common").traced()
    return context


def _native_scan(scan: SelectiveScan | SSDScan) -> bool:
    operand, states = scan.arguments[0], scan.sizes[-1]
    return operand.device.type == "cpu" and not on_gpu(operand) and native.supports(states)


def selective_scan(scan: SelectiveScan) -> tuple[Tensor, Tensor]:
    """y `(B, D, L)` in the operator's layout, last state `(B, D, N)`."""
    if (kernels := triton_scan(scan)) is not None:
        y, last = kernels.scan.selective_scan(scan)
        return y, last
    run = native.selective_scan if _native_scan(scan) else chunked.selective_scan
    y, last = run(scan)
    return y.transpose(1, 2), last


def selective_scan_backward(dy: Tensor, dlast: Tensor, scan: SelectiveScan) -> tuple[Tensor, ...]:
    """Float32 gradients of u, delta, A, B, C, D, z, delta_bias."""
    if (kernels := triton_scan(scan)) is not None:
        gradients: tuple[Tensor, ...] = kernels.scan.selective_scan_backward(dy, dlast, scan)
        return gradients
    run = native.selective_scan_backward if _native_scan(scan) else chunked.selective_scan_backward
    return run(dy, dlast, scan)


def selective_score(scan: SelectiveScan, C_query: Tensor, query: Tensor, criterion: str) -> Tensor:
    """The score of the contributions `(B, L)`, anything after the query; `C_query` `(B, G, N)`."""
    run = native.selective_score if _native_scan(scan) else chunked.selective_score
    return run(scan, C_query, query, criterion)


def ssd_scan(scan: SSDScan) -> tuple[Tensor, Tensor]:
    """y `(B, L, H, P)`, last state `(B, H, P, N)`."""
    if on_gpu(scan.x):
        return cuda.ssd_scan(scan) if cuda.ssd_scan_fn() is not None else chunked_ssd.ssd_scan_at_once(scan)
    return native.ssd_scan(scan) if _native_scan(scan) else chunked_ssd.ssd_scan(scan)


def delta_scan(scan: DeltaScan) -> tuple[Tensor, Tensor]:
    """y `(B, L, H, V)` in any float dtype, last state `(B, H, K, V)` float32; autograd differentiates either."""
    packaged = on_gpu(scan.v) and cuda.takes_delta_scan(scan)
    return cuda.delta_scan(scan) if packaged else chunked_delta.delta_scan(scan)


MOST_KEYS = 256
"""Key channels of a head that a warp's registers hold (`simba_fx.ops.cuda.triton.delta`)."""


def delta_reads(scan: DeltaScan, q_query: Tensor, query: Tensor, decays: bool) -> Tensor:
    """`k_t . r_t` `(B, L, H)` float32, anything after the query; `q_query` `(B, G, K)`."""
    kernels = triton_for(scan.v) if scan.k.shape[3] <= MOST_KEYS else None
    run = chunked_delta.delta_reads if kernels is None else kernels.delta.delta_reads
    reads: Tensor = run(scan, q_query, query, decays)
    return reads


def causal_conv1d(conv: CausalConv) -> Tensor:
    """`(B, D, L)` channel-last, in x's dtype."""
    x = conv.x
    if (kernels := triton_for(x)) is not None:
        fused: Tensor = kernels.conv.causal_conv1d(conv)
        return fused
    if x.device.type == "cpu" and not on_gpu(x) and native.supports_taps(conv.weight.shape[1]):
        return native.causal_conv1d(conv).transpose(1, 2)
    y = chunked.causal_conv1d(conv)
    return (F.silu(y) if conv.activation == "silu" else y).to(x.dtype).transpose(1, 2)
