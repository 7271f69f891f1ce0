"""Mamba-2's scan by mamba_ssm's kernels, when they can be imported: forward passes on CUDA.

Kept to what the package documents (mamba-ssm 2.3.2). Its selective scan and causal_conv1d are not called. On an H200
(docs/kernels.md) the scan took 1.2 to 2.5 times as long as ours on operands as models make them; the convolution was a
little quicker than ours, which a compiled graph launches by itself. Backward passes take the PyTorch path: the
package's own sit behind autograd functions, which do not record inside an operator, and drop the gradient of
`last_state`. Letters: see `simba_fx.ops`.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any

from torch import Tensor

from simba_fx.ops.operands import SSDScan


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
