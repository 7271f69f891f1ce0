"""The operands of a gated delta rule, of whichever library's function: all of them take the same."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from simba_fx.capture.rows import Finish
from simba_fx.ops.operands import DeltaScan, Operands

__all__ = ["delta_rule"]


def delta_rule(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, *, normalised: bool, scale: float | None,
               state: bool, chunk_size: int = 64) -> tuple[Operands, Finish]:  # fmt: skip
    """Sizes as in `DeltaScan`.

    Args:
        normalised: whether the function normalises keys and queries, in float32, before it scales.
        scale: of queries; None: `K ** -0.5`.
        state: whether it returns the last state, else None in its place.
    """
    dtype = q.dtype
    q, k = q.float(), k.float()
    if normalised:
        q, k = (x * torch.rsqrt((x * x).sum(-1, keepdim=True) + 1e-6) for x in (q, k))

    def finish(y: Tensor, last: Tensor) -> Any:
        return y.to(dtype), last if state else None

    return DeltaScan(v, q * (q.shape[-1] ** -0.5 if scale is None else scale), k, g, beta, chunk_size), finish
