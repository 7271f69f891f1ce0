"""The functions of `mamba_ssm` and `causal_conv1d` that a captured model must not run itself: scans, convolutions,
fused blocks and fused norms (read in mamba-ssm 2.3.2.post1 and causal-conv1d 1.7.0; neither is imported).

They are autograd functions over CUDA extensions and Triton kernels, which no graph can hold. A scan or a convolution
becomes one operator. A fused function is taken apart: the same computation as ordinary operators around a scan, float32
where its kernel computes in float32 and rounded to the model's dtype where its kernel stores. `kernels="model"` puts
the original call back. Letters: see `simba_fx.ops`; M is the model's width, E the width after the out-projection.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from simba_fx.capture.rows import Finish, Row
from simba_fx.capture.scan_functions import mamba3
from simba_fx.errors import CaptureError
from simba_fx.ops.operands import CausalConv, Operands, SelectiveScan, SSDScan

__all__ = ["OWNERS", "ROWS"]

OWNERS = ("mamba_ssm.", "causal_conv1d.")
_WITHOUT_LIMIT = (0.0, float("inf"))


# --- scans and the convolution ---------------------------------------------------------------------------------------


def _selective(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None,
               z: Tensor | None = None, delta_bias: Tensor | None = None, delta_softplus: bool = False,
               return_last_state: bool = False) -> tuple[Operands, Finish]:  # fmt: skip
    _refuse_unread("selective_scan_fn", A, B=B, C=C)
    scan = SelectiveScan(u, delta, A, B, C, D, z, delta_bias, delta_softplus)
    return scan, lambda y, state: (y, state) if return_last_state else y


def _ssd(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, chunk_size: int, D: Tensor | None = None,
         z: Tensor | None = None, dt_bias: Tensor | None = None, initial_states: Tensor | None = None,
         seq_idx: Tensor | None = None, cu_seqlens: Tensor | None = None, dt_softplus: bool = False,
         dt_limit: tuple[float, float] = _WITHOUT_LIMIT, return_final_states: bool = False,
         return_varlen_states: bool = False, **_: Any) -> tuple[Operands, Finish]:  # fmt: skip
    packed = {"initial_states": initial_states, "seq_idx": seq_idx, "cu_seqlens": cu_seqlens}
    _refuse_packed("mamba_chunk_scan_combined", **packed)
    dt_min, dt_max = map(float, dt_limit)
    scan = SSDScan(x, dt, A, B, C, D, z, dt_bias, dt_softplus, dt_min, dt_max, chunk_size)
    return scan, lambda y, state: (y, state) if return_final_states else y


def _conv(x: Tensor, weight: Tensor, bias: Tensor | None = None, seq_idx: Tensor | None = None,
          initial_states: Tensor | None = None, return_final_states: bool = False,
          final_states_out: Tensor | None = None, activation: str | None = None) -> Operands | None:  # fmt: skip
    _refuse_packed("causal_conv1d_fn", seq_idx=seq_idx, initial_states=initial_states)
    if return_final_states:
        raise CaptureError(
            "causal_conv1d_fn was called with return_final_states=True; expected a convolution that returns its output "
            "alone. Take the state from the convolution's input, as mamba_ssm's own blocks do."
        )
    kind = _activation(activation)
    return None if kind is None else CausalConv(x, weight, bias, kind)


def _activation(name: str | None) -> str | None:
    """As our operator calls it; None for one that neither knows (the package then says so)."""
    return {None: "none", "silu": "silu", "swish": "silu"}.get(name)


def _refuse_packed(function: str, **given: Tensor | None) -> None:
    for name, held in given.items():
        if held is not None:
            raise CaptureError(
                f"{function} was called with {name}; only whole sequences that start from a zero state can be pruned. "
                "Call the model without packed sequences and without a warm cache."
            )


def _refuse_unread(function: str, A: Tensor, **per_token: Tensor | None) -> None:
    if A.is_complex():
        raise CaptureError(
            f"{function} was called with a complex A {tuple(A.shape)}; expected a real one. Models with complex states "
            "cannot be pruned yet."
        )
    for name, held in per_token.items():
        if held is not None and held.dim() < 3:
            raise CaptureError(
                f"{function} was called with a {name} of shape {tuple(held.shape)} that is the same for every token; "
                "expected (B, N, L) or (B, G, N, L). Such scans score no token by its content and cannot be pruned."
            )


# --- fused norms -----------------------------------------------------------------------------------------------------


def _normalised(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, rms: bool) -> Tensor:
    """Norm over the last dimension of float32 `x`, in float32."""
    weight, bias = weight.float(), None if bias is None else bias.float()
    if not rms:
        return F.layer_norm(x, (x.shape[-1],), weight, bias, eps)
    scaled = _rms_scaled(x, eps) * weight
    return scaled if bias is None else scaled + bias


def _rms_scaled(x: Tensor, eps: float) -> Tensor:
    return x * (1 / torch.sqrt(x.square().mean(-1, keepdim=True) + eps))


@dataclass(frozen=True)
class AddNorm(Operands):
    """`layer_norm_fn` and `rms_norm_fn`: `residual + x`, then its norm, `(B, L, M)` each.

    The sum is kept in the residual's dtype (`residual_in_fp32` decides where there is none yet); the norm reads it in
    float32, before it is rounded.
    """

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    residual: Tensor | None
    eps: float
    rms: bool
    prenorm: bool
    residual_in_fp32: bool

    entry = "x"

    def run(self) -> tuple[Any, None]:
        x, residual = self.x, self.residual
        total = x.float() if residual is None else x.float() + residual.float()
        out = _normalised(total, self.weight, self.bias, self.eps, self.rms).to(x.dtype)
        if not self.prenorm:
            return out, None
        stored = torch.float32 if self.residual_in_fp32 else x.dtype
        return (out, total.to(stored if residual is None else residual.dtype)), None


def _add_norm(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None = None, x1: Any = None,
              weight1: Any = None, bias1: Any = None, eps: float = 1e-6, dropout_p: float = 0.0, rowscale: Any = None,
              prenorm: bool = False, residual_in_fp32: bool = False, is_rms_norm: bool = False,
              return_dropout_mask: bool = False) -> Operands:  # fmt: skip
    unread = {"x1": x1, "weight1": weight1, "bias1": bias1, "rowscale": rowscale,
              "dropout_p": dropout_p or None, "return_dropout_mask": return_dropout_mask or None}  # fmt: skip
    for name, held in unread.items():
        if held is not None:
            raise CaptureError(
                f"layer_norm_fn was called with {name}; expected a norm of x, or of x + residual, without dropout. "
                "Transform the model in eval mode, or with fused_add_norm=False."
            )
    return AddNorm(x, weight, bias, residual, eps, is_rms_norm, prenorm, residual_in_fp32)


def _add_rms_norm(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None = None, x1: Any = None,
                  weight1: Any = None, bias1: Any = None, eps: float = 1e-6, dropout_p: float = 0.0,
                  rowscale: Any = None, prenorm: bool = False, residual_in_fp32: bool = False,
                  return_dropout_mask: bool = False) -> Operands:  # fmt: skip
    return _add_norm(x, weight, bias, residual, x1, weight1, bias1, eps, dropout_p, rowscale, prenorm, residual_in_fp32,
                     True, return_dropout_mask)  # fmt: skip


@dataclass(frozen=True)
class GatedNorm(Operands):
    """`rmsnorm_fn`: `norm(x) silu(z)`, or `norm(x silu(z))`, `(B, L, D)`, in float32.

    The mean square is over groups of `group_size` channels (None: over all of them).
    """

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    z: Tensor | None
    eps: float
    group_size: int | None
    norm_before_gate: bool

    entry = "x"

    def run(self) -> tuple[Tensor, None]:
        x = self.x.float()
        gate = None if self.z is None else F.silu(self.z.float())
        if gate is not None and not self.norm_before_gate:
            x = x * gate
        groups = (-1, self.group_size or x.shape[-1])
        x = _rms_scaled(torch.unflatten(x, -1, groups), self.eps).flatten(-2) * self.weight.float()
        x = x if self.bias is None else x + self.bias.float()
        if gate is not None and self.norm_before_gate:
            x = x * gate
        return x.to(self.x.dtype), None


def _gated_norm(x: Tensor, weight: Tensor, bias: Tensor | None, z: Tensor | None = None, eps: float = 1e-6,
                group_size: int | None = None, norm_before_gate: bool = True) -> Operands:  # fmt: skip
    return GatedNorm(x, weight, bias, z, eps, group_size, norm_before_gate)


# --- fused blocks ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MambaInner(Operands):
    """`mamba_inner_fn`, Mamba-1 after its in-projection: `xz (B, 2D, L)` to `(B, L, E)`.

    Convolution, projections of the step and of B and C, scan, gate, out-projection; the package's `mamba_inner_ref`.
    """

    xz: Tensor
    conv1d_weight: Tensor
    conv1d_bias: Tensor | None
    x_proj_weight: Tensor
    delta_proj_weight: Tensor
    out_proj_weight: Tensor
    out_proj_bias: Tensor | None
    A: Tensor
    B: Tensor | None
    C: Tensor | None
    D: Tensor | None
    delta_bias: Tensor | None
    B_proj_bias: Tensor | None
    C_proj_bias: Tensor | None
    delta_softplus: bool
    norms: tuple[Tensor | None, Tensor | None, Tensor | None]
    """Weights of the norms of the step, of B and of C (Falcon-Mamba)."""
    eps: float

    entry = "xz"

    def run(self) -> tuple[Tensor, None]:
        x, z = self.xz.chunk(2, dim=1)  # (B, D, L) each
        x, _ = CausalConv(x, self.conv1d_weight.squeeze(1), self.conv1d_bias, "silu").run()
        rank, states = self.delta_proj_weight.shape[1], self.A.shape[1]
        parts = torch.split(F.linear(x.transpose(1, 2), self.x_proj_weight), [rank, states, states], -1)
        delta = self._scaled(F.linear(parts[0], self.delta_proj_weight), self.norms[0])  # (B, L, D)
        B, C = self.B, self.C
        if B is None:
            B = self._scaled(_biased(parts[1], self.B_proj_bias), self.norms[1]).transpose(1, 2)  # (B, N, L)
        if C is None:
            C = self._scaled(_biased(parts[2], self.C_proj_bias), self.norms[2]).transpose(1, 2)
        scan = SelectiveScan(x, delta.transpose(1, 2), self.A, B, C, self.D, z, self.delta_bias, self.delta_softplus)
        y, _ = scan.run()
        return F.linear(y.transpose(1, 2), self.out_proj_weight, self.out_proj_bias), None

    def _scaled(self, x: Tensor, weight: Tensor | None) -> Tensor:
        return x if weight is None else _normalised(x.float(), weight, None, self.eps, True).to(x.dtype)


def _biased(x: Tensor, bias: Tensor | None) -> Tensor:
    return x if bias is None else x + bias.to(x.dtype)


def _mamba_inner(xz: Tensor, conv1d_weight: Tensor, conv1d_bias: Tensor | None, x_proj_weight: Tensor,
                 delta_proj_weight: Tensor, out_proj_weight: Tensor, out_proj_bias: Tensor | None, A: Tensor,
                 B: Tensor | None = None, C: Tensor | None = None, D: Tensor | None = None,
                 delta_bias: Tensor | None = None, B_proj_bias: Tensor | None = None,
                 C_proj_bias: Tensor | None = None, delta_softplus: bool = True, checkpoint_lvl: int = 1,
                 b_rms_weight: Tensor | None = None, c_rms_weight: Tensor | None = None,
                 dt_rms_weight: Tensor | None = None, b_c_dt_rms_eps: float = 1e-6) -> Operands:  # fmt: skip
    _refuse_unread("mamba_inner_fn", A, B=B, C=C)
    norms = (dt_rms_weight, b_rms_weight, c_rms_weight)
    return MambaInner(xz, conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight, out_proj_weight, out_proj_bias,
                      A, B, C, D, delta_bias, B_proj_bias, C_proj_bias, delta_softplus, norms,
                      b_c_dt_rms_eps)  # fmt: skip


@dataclass(frozen=True)
class Mamba2Inner(Operands):
    """`mamba_split_conv1d_scan_combined`, Mamba-2 after its in-projection: `zxbcdt (B, L, 2 S + D + (D + 2 G N) + H)`,
    S channels of a gated MLP beside the scan's D, to `(B, L, S + D)`, or `(B, L, E)` with an out-projection.

    Convolution, scan, gated norm (or gate in the scan), gated MLP, out-projection.
    """

    zxbcdt: Tensor
    conv1d_weight: Tensor
    conv1d_bias: Tensor | None
    dt_bias: Tensor
    A: Tensor
    D: Tensor
    chunk_size: int
    dt_limit: tuple[float, float]
    return_final_states: bool
    activation: str
    rmsnorm_weight: Tensor | None
    rmsnorm_eps: float
    outproj_weight: Tensor | None
    outproj_bias: Tensor | None
    headdim: int
    ngroups: int
    norm_before_gate: bool

    entry = "zxbcdt"

    def run(self) -> tuple[Any, None]:
        heads, width, groups = self.A.shape[0], self.headdim, self.ngroups
        scanned, sizes = heads * width, (groups, -1)
        both = self.conv1d_weight.shape[0] - scanned  # channels of B and C
        beside = (self.zxbcdt.shape[-1] - 2 * scanned - both - heads) // 2
        z0, x0, z, xbc, dt = torch.split(self.zxbcdt, [beside, beside, scanned, scanned + both, heads], -1)
        xbc, _ = CausalConv(xbc.transpose(1, 2), self.conv1d_weight, self.conv1d_bias, self.activation).run()
        x, B, C = torch.split(xbc.transpose(1, 2), [scanned, both // 2, both // 2], -1)
        x, B, C = torch.unflatten(x, -1, (heads, width)), torch.unflatten(B, -1, sizes), torch.unflatten(C, -1, sizes)
        gate = torch.unflatten(z, -1, (heads, width)) if self.rmsnorm_weight is None else None
        dt_min, dt_max = map(float, self.dt_limit)
        scan = SSDScan(x, dt, self.A, B, C, self.D, gate, self.dt_bias, True, dt_min, dt_max, self.chunk_size)
        y, state = scan.run()
        y = y.flatten(-2)
        if self.rmsnorm_weight is not None:
            group_size, before = scanned // groups, self.norm_before_gate
            y, _ = GatedNorm(y, self.rmsnorm_weight, None, z, self.rmsnorm_eps, group_size, before).run()
        if beside:
            y = torch.cat([(F.silu(z0.float()) * x0.float()).to(y.dtype), y], -1)
        if self.outproj_weight is not None:
            y = F.linear(y, self.outproj_weight, self.outproj_bias)
        return ((y, state) if self.return_final_states else y), None


def _mamba2_inner(zxbcdt: Tensor, conv1d_weight: Tensor, conv1d_bias: Tensor | None, dt_bias: Tensor, A: Tensor,
                  D: Tensor, chunk_size: int, initial_states: Tensor | None = None, seq_idx: Tensor | None = None,
                  dt_limit: tuple[float, float] = _WITHOUT_LIMIT, return_final_states: bool = False,
                  activation: str | None = "silu", rmsnorm_weight: Tensor | None = None, rmsnorm_eps: float = 1e-6,
                  outproj_weight: Tensor | None = None, outproj_bias: Tensor | None = None,
                  headdim: int | None = None, ngroups: int = 1, norm_before_gate: bool = True,
                  **_: Any) -> Operands | None:  # fmt: skip
    _refuse_packed("mamba_split_conv1d_scan_combined", initial_states=initial_states, seq_idx=seq_idx)
    kind, width = _activation(activation), D.shape[1] if D.dim() == 2 else headdim
    if kind is None or width is None:
        return None  # the package says what is wrong
    return Mamba2Inner(zxbcdt, conv1d_weight, conv1d_bias, dt_bias, A, D, chunk_size, dt_limit, return_final_states,
                       kind, rmsnorm_weight, rmsnorm_eps, outproj_weight, outproj_bias, width, ngroups,
                       norm_before_gate)  # fmt: skip


ROWS: dict[str, Row] = {
    "selective_scan_fn": _selective,
    "mamba_chunk_scan_combined": _ssd,
    "causal_conv1d_fn": _conv,
    "layer_norm_fn": _add_norm,
    "rms_norm_fn": _add_rms_norm,
    "rmsnorm_fn": _gated_norm,
    "mamba_inner_fn": _mamba_inner,
    "mamba_split_conv1d_scan_combined": _mamba2_inner,
    **mamba3.ROWS,
}
