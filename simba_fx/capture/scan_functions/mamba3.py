"""Mamba-3's scan (Lahoti et al. 2026; `mamba_ssm`'s `mamba3_siso_combined`, read in 2.3.2.post1), as that of Mamba-2.

A token's write is split between its own step and the next one, by the trapezoidal rule; keys and queries turn by angles
that add up over tokens:

    h_t = a_t h_{t-1} + a_t (1 - l_t) d_t v_{t-1} k_{t-1}^T + l_t d_t v_t k_t^T,    y_t = h_t q_t,    a_t = exp(ADT_t)

The second term of t + 1 decays as the third of t does, so both are one write of `l_t d_t + (1 - l_{t+1}) d_{t+1}`: a
scan with one input a token, of which y_t may not have seen the second part of its own.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from simba_fx.capture.rows import Finish, Row
from simba_fx.errors import CaptureError
from simba_fx.ops.operands import Operands, SSDScan

__all__ = ["ROWS", "refuse_mimo"]

_LEAST_STEP = 1e-30
"""Below it nothing decays; what is written is divided by it, and multiplied again in the scan."""


def _siso(Q: Tensor, K: Tensor, V: Tensor, ADT: Tensor, DT: Tensor, Trap: Tensor, Q_bias: Tensor, K_bias: Tensor,
          Angles: Tensor, D: Tensor | None = None, Z: Tensor | None = None, Input_States: Any = None,
          chunk_size: int = 64, return_final_states: bool = False,
          cu_seqlens: Tensor | None = None) -> tuple[Operands, Finish]:  # fmt: skip
    """Q, K `(B, L, G, N)`, V, Z `(B, L, H, P)`, ADT, DT, Trap `(B, H, L)`, biases `(H, N)`, Angles `(B, L, H, S)`."""
    unread = {"Input_States": Input_States, "cu_seqlens": cu_seqlens,
              "return_final_states": return_final_states or None}  # fmt: skip
    for name, held in unread.items():
        if held is not None:
            raise CaptureError(
                f"mamba3_siso_combined was called with {name}; only whole sequences that start from a zero state, and "
                "that nothing is decoded after, can be pruned. Call the model without packed sequences and without "
                "inference_params."
            )
    step, share = (part.float().transpose(1, 2) for part in (DT, Trap.float().sigmoid()))  # (B, L, H)
    angles = (torch.tanh(Angles.float()) * math.pi * step[..., None]).double().cumsum(1).float()
    q, k = _turned(Q, Q_bias, angles), _turned(K, K_bias, angles)
    later = F.pad((1 - share) * step, (0, 0, -1, 1))  # what the next token's step writes of this one
    decay = (-ADT.float().transpose(1, 2)).clamp(min=_LEAST_STEP)
    written = k * ((share * step + later) / decay)[..., None]
    own = (q * k).sum(-1) * later  # which a token's own output has not seen
    skip = own if D is None else own - D.float()

    def finish(y: Tensor, _: Any) -> Tensor:
        y = y - skip[..., None] * V.float()
        return (y if Z is None else y * F.silu(Z.float())).to(V.dtype)

    rate = torch.full_like(Q_bias[:, 0], -1.0, dtype=torch.float32)
    return SSDScan(V.float(), decay, rate, written, q, chunk_size=chunk_size), finish


def _turned(x: Tensor, bias: Tensor, angles: Tensor) -> Tensor:
    """`x + bias` for each head `(B, L, H, N)`, its pairs of neighbouring channels turned by the angles there are."""
    turning = 2 * angles.shape[3]
    x = x.float().repeat_interleave(bias.shape[0] // x.shape[2], 2) + bias.float()
    first, second = torch.unflatten(x[..., :turning], -1, (-1, 2)).unbind(-1)
    cos, sin = angles.cos(), angles.sin()
    turned = torch.stack((first * cos - second * sin, first * sin + second * cos), -1).flatten(-2)
    return torch.cat((turned, x[..., turning:]), -1)


ROWS: dict[str, Row] = {"mamba3_siso_combined": _siso}


def refuse_mimo(path: str, module: nn.Module) -> None:
    """The scan of several inputs and outputs is a function that there is no row for.

    Raises:
        CaptureError: `module` is, or derives from, `mamba_ssm`'s Mamba3, and was made with is_mimo.
    """
    owner, made_so = ("mamba_ssm.modules.mamba3", "Mamba3"), getattr(module, "is_mimo", False)
    if made_so and any((cls.__module__, cls.__name__) == owner for cls in type(module).__mro__):
        raise CaptureError(
            f"{path or 'The model'} is a Mamba-3 block ({type(module).__name__}) with is_mimo=True; expected "
            "is_mimo=False: its scan with several inputs is not supported. Leave such a model dense."
        )
