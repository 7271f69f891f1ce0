"""Scans by other packages' kernels, where those can be imported, on CUDA: Mamba-2's by mamba_ssm's, forward; those of
delta rules by fla's (flash-linear-attention), forward and backward.

Kept to what the packages document (mamba-ssm 2.3.2, flash-linear-attention 0.6.0). fla is what transformers runs too,
where it is installed. No GPU has run it here yet; in Triton's interpreter its kernels gave our scan's values and
gradients to 5e-7 (float32, by hand). mamba_ssm: Its selective scan and causal_conv1d are not called. On an H200
(docs/kernels.md) the scan took 1.2 to 2.5 times as long as ours on operands as models make them; the convolution was a
little quicker than ours, which a compiled graph launches by itself. Backward passes take the PyTorch path: the
package's own sit behind autograd functions, which do not record inside an operator, and drop the gradient of
`last_state`. Letters: see `simba_fx.ops`.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any

import torch
from torch import Tensor

from simba_fx.ops.operands import DeltaScan, SSDScan


@functools.cache
def _function(module: str, name: str) -> Any:
    """The function, or None where its package cannot be imported: not installed, built for another torch, or broken."""
    try:
        return getattr(importlib.import_module(module), name)
    except Exception:  # whatever a package does when it is imported: PyTorch and Triton can do without
        return None


def ssd_scan_fn() -> Any:
    """`mamba_ssm`'s SSD scan, or None."""
    return _function("mamba_ssm.ops.triton.ssd_combined", "mamba_chunk_scan_combined")


def ssd_scan(scan: SSDScan) -> tuple[Tensor, Tensor]:
    """As `backends.ssd_scan`; the step size is found by the kernels as well."""
    y, last = ssd_scan_fn()(
        scan.x, scan.dt, scan.A.float(), scan.B, scan.C, scan.chunk_size, D=scan.D, z=scan.z, dt_bias=scan.dt_bias,
        dt_softplus=scan.dt_softplus, dt_limit=(scan.dt_min, scan.dt_max), return_final_states=True,
    )  # fmt: skip
    return y.to(scan.x.dtype), last.float()


def delta_rule_fn(by_channel: bool = False) -> Any:
    """`fla`'s gated delta rule, with a decay for each head or for each key channel (Kimi delta attention), or None."""
    if by_channel:
        return _function("fla.ops.kda", "chunk_kda")
    return _function("fla.ops.gated_delta_rule", "chunk_gated_delta_rule")


def takes_delta_scan(scan: DeltaScan) -> bool:
    """Half precision only: of float32 fla's kernels make TF32 (10 bits), which no tolerance here allows for."""
    half = scan.v.dtype in (torch.bfloat16, torch.float16)
    return half and scan.k.shape[3] <= 256 and delta_rule_fn(scan.g.dim() == 4) is not None


def delta_scan(scan: DeltaScan) -> tuple[Tensor, Tensor]:
    """As `backends.delta_scan`. Keys and queries take the values' dtype, as they do where fla normalises them."""
    v, times = scan.v, scan.v.shape[2] // scan.q.shape[2]
    q, k = (x.to(v.dtype).repeat_interleave(times, 2) if times > 1 else x.to(v.dtype) for x in (scan.q, scan.k))
    y, last = delta_rule_fn(scan.g.dim() == 4)(
        q, k, v, scan.g.float(), scan.beta.float(), scale=1.0, output_final_state=True
    )
    return y, last.float()
