"""The functions of flash-linear-attention (`fla.ops`) that a user's own model calls (read in 0.6.0, which is not
imported here).

They are autograd functions over Triton kernels, which no graph can hold and no CPU can run. A gated delta rule becomes
the operator for it, which calls the same function where fla's kernels run (`simba_fx.ops.cuda.packages`); of any other
recurrence the function itself stays, as one that a user registered. (fla's own layers have further kernels, for
convolutions and norms, for which there are no rows.)
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from simba_fx.capture.rows import Finish, Linear, Row
from simba_fx.capture.scan_functions.delta import delta_rule
from simba_fx.errors import CaptureError
from simba_fx.ops.operands import Operands

__all__ = ["OWNERS", "ROWS"]

OWNERS = ("fla.ops.",)


def _gated(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, scale: float | None = None,
           initial_state: Tensor | None = None, output_final_state: bool = False,
           use_qk_l2norm_in_kernel: bool = False, use_gate_in_kernel: bool = False, A_log: Tensor | None = None,
           dt_bias: Tensor | None = None, use_beta_sigmoid_in_kernel: bool = False, allow_neg_eigval: bool = False,
           **others: Any) -> tuple[Operands, Finish]:  # fmt: skip
    """q, k `(B, L, G, K)`, v `(B, L, H, V)`, beta `(B, L, H)`; g likewise, or `(B, L, H, K)`."""
    _refuse_unread(others | {"initial_state": initial_state})
    if use_gate_in_kernel:
        assert A_log is not None
        shift = 0.0 if dt_bias is None else dt_bias.float().view(g.shape[2:])
        rate = A_log.float().exp()
        g = -(rate if g.dim() == 3 else rate.unsqueeze(1)) * F.softplus(g.float() + shift)
    if use_beta_sigmoid_in_kernel:
        beta = beta.float().sigmoid() * (2 if allow_neg_eigval else 1)
    return delta_rule(q, k, v, g, beta, normalised=use_qk_l2norm_in_kernel, scale=scale, state=output_final_state)


def _plain(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, scale: float | None = None,
           initial_state: Tensor | None = None, output_final_state: bool = False,
           use_qk_l2norm_in_kernel: bool = False, **others: Any) -> tuple[Operands, Finish]:  # fmt: skip
    """Nothing decays."""
    return _gated(q, k, v, torch.zeros_like(beta, dtype=torch.float32), beta, scale, initial_state, output_final_state,
                  use_qk_l2norm_in_kernel, **others)  # fmt: skip


def _refuse_unread(given: dict[str, Any]) -> None:
    for name, held in given.items():
        if held is not None and held is not False and name != "chunk_size":
            raise CaptureError(
                f"fla's delta rule was called with {name}; only whole sequences that start from a zero state, with "
                "arguments that change no layout and no gate, can be pruned. Call it without."
            )


_BY_HEAD = Linear("v", shared=True)
ROWS: dict[str, Row] = {
    "chunk_gated_delta_rule": _gated,
    "chunk_kda": _gated,
    "chunk_delta_rule": _plain,
    **dict.fromkeys(
        ("chunk_comba", "chunk_gla", "chunk_gsa", "chunk_lightning_attn", "chunk_retention", "chunk_rwkv6",
         "chunk_rwkv7", "chunk_simple_gla"),
        _BY_HEAD,
    ),
    "chunk_gdn2": Linear("v"),  # what is written depends on the channel
    "chunk_hgrn": Linear("x"),
}  # fmt: skip
