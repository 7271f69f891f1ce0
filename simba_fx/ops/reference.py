"""The oracle for tests: every operator as its definition reads, one token at a time, in float64. Clear and slow.

Plain differentiable PyTorch, so autograd through these functions is the oracle of the backward operators as well.
Letters are those of `simba_fx.ops`; formulas: Gu & Dao 2023, eq. 2 and section 3.2 (Mamba-1), Dao & Gu 2024,
section 7 (Mamba-2), and Song et al. 2025 (Simba) for the contributions.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def _double(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.double()


def _step(delta: Tensor, bias: Tensor | None, softplus: bool) -> Tensor:
    raw = delta.double() if bias is None else delta.double() + bias.double()
    return F.softplus(raw) if softplus else raw


def _per_channel(grouped: Tensor, channels: int) -> Tensor:
    """`(B, N, L)` or `(B, G, N, L)` -> `(B, D, N, L)` in float64: channel d reads group `d // (D // G)`."""
    grouped = grouped.double()
    grouped = grouped.unsqueeze(1) if grouped.dim() == 3 else grouped
    return grouped.repeat_interleave(channels // grouped.shape[1], dim=1)


def selective_scan_ref(
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
    """`h_t = exp(dt_t A) h_{t-1} + dt_t B_t u_t`, `y_t = C_t . h_t + D u_t`, gated: `(B, D, L)`, `(B, D, N)`."""
    rows, channels, length = u.shape
    x, decay = u.double(), A.double()
    dt = _step(delta, None if delta_bias is None else delta_bias[:, None], delta_softplus)
    Bd, Cd = _per_channel(B, channels), _per_channel(C, channels)
    h = x.new_zeros(rows, channels, A.shape[1])
    outputs = []
    for t in range(length):
        step = dt[:, :, t, None]
        h = torch.exp(step * decay) * h + step * Bd[..., t] * x[:, :, t, None]
        outputs.append((Cd[..., t] * h).sum(-1))
    y = torch.stack(outputs, dim=-1)
    if D is not None:
        y = y + D.double()[:, None] * x
    return (y if z is None else y * F.silu(z.double())), h


def ssd_scan_ref(
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
    dt_max: float = float("inf"),
) -> tuple[Tensor, Tensor]:
    """`h_t = exp(dt_t A) h_{t-1} + dt_t x_t (x) B_t`, `y_t = h_t C_t + D x_t`, gated.

    Returns `(B, L, H, P)` and `(B, H, P, N)`. `dt` is clamped to `[dt_min, dt_max]` after the softplus.
    """
    rows, length, heads, width = x.shape
    value, step = x.double(), _step(dt, dt_bias, dt_softplus).clamp(dt_min, dt_max)
    Bh = B.double().repeat_interleave(heads // B.shape[2], dim=2)
    Ch = C.double().repeat_interleave(heads // C.shape[2], dim=2)
    h = value.new_zeros(rows, heads, width, B.shape[3])
    outputs = []
    for t in range(length):
        decay = torch.exp(step[:, t] * A.double())[..., None, None]
        h = decay * h + (step[:, t, :, None] * value[:, t])[..., None] * Bh[:, t, :, None, :]
        outputs.append((h * Ch[:, t, :, None, :]).sum(-1))
    y = torch.stack(outputs, dim=1)
    if D is not None:
        y = y + (D.double() if D.dim() == 2 else D.double()[:, None]) * value
    return (y if z is None else y * F.silu(z.double())), h


def causal_conv1d_ref(x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str = "none") -> Tensor:
    """`y_t[d] = bias[d] + sum_k weight[d, k] x_{t-W+1+k}[d]`, zeros before the first token: `(B, D, L)`."""
    padded = F.pad(x.double(), (weight.shape[1] - 1, 0))
    y = F.conv1d(padded, weight.double()[:, None], _double(bias), groups=weight.shape[0])
    return F.silu(y) if activation == "silu" else y


def delta_scan_ref(v: Tensor, q: Tensor, k: Tensor, g: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
    """`S = e^g S; S = S + k beta (v - S^T k)^T; y = S^T q`: `(B, L, H, V)`, `(B, H, K, V)`."""
    rows, length, heads, width = v.shape
    q, k = (operand.double().repeat_interleave(heads // operand.shape[2], 2) for operand in (q, k))
    v, g, beta = v.double(), g.double(), beta.double()
    state = v.new_zeros(rows, heads, k.shape[3], width)
    outputs = []
    for t in range(length):
        state = state * (g[:, t, :, None] if g.dim() == 3 else g[:, t]).unsqueeze(3).exp()
        held = torch.einsum("bhkv,bhk->bhv", state, k[:, t])
        state = state + torch.einsum("bhk,bhv->bhkv", k[:, t], beta[:, t, :, None] * (v[:, t] - held))
        outputs.append(torch.einsum("bhkv,bhk->bhv", state, q[:, t]))
    return torch.stack(outputs, 1), state


def delta_contributions_ref(v: Tensor, q: Tensor, k: Tensor, g: Tensor, beta: Tensor, query: Tensor) -> Tensor:
    """What each token adds to the output at its row's query, `(B, L, H, V)`: the scan of that token's value alone."""
    rows, length = v.shape[:2]
    found = []
    for t in range(length):
        alone = torch.zeros_like(v, dtype=torch.float64)
        alone[:, t] = v[:, t].double()
        y, _ = delta_scan_ref(alone, q, k, g, beta)
        found.append(torch.stack([y[b, int(query[b])] for b in range(rows)]))
    return torch.stack(found, 1)


def selective_contributions_ref(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    query: Tensor,
) -> Tensor:
    """Share of token t in `y_q` before skip and gate: `(B, D, L)`, zero for t > q. `query` is `(B,)`."""
    rows, channels, length = u.shape
    dt = _step(delta, None if delta_bias is None else delta_bias[:, None], delta_softplus)
    Bd, Cd = _per_channel(B, channels), _per_channel(C, channels)
    out = torch.zeros(rows, channels, length, dtype=torch.float64)
    for b in range(rows):
        remaining = torch.zeros(channels, dtype=torch.float64)
        q = int(query[b])
        for t in range(q, -1, -1):
            response = (Cd[b, :, :, q] * Bd[b, :, :, t] * torch.exp(A.double() * remaining[:, None])).sum(-1)
            out[b, :, t] = dt[b, :, t] * u[b, :, t].double() * response
            remaining = remaining + dt[b, :, t]
    return out


def ssd_contributions_ref(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    dt_min: float,
    dt_max: float,
    query: Tensor,
) -> Tensor:
    """Share of token t in `y_q` before skip and gate: `(B, L, H, P)`, zero for t > q. `query` is `(B,)`."""
    rows, _, heads, _ = x.shape
    step = _step(dt, dt_bias, dt_softplus).clamp(dt_min, dt_max)
    Bh = B.double().repeat_interleave(heads // B.shape[2], dim=2)
    Ch = C.double().repeat_interleave(heads // C.shape[2], dim=2)
    out = torch.zeros(x.shape, dtype=torch.float64)
    for b in range(rows):
        remaining = torch.zeros(heads, dtype=torch.float64)
        q = int(query[b])
        for t in range(q, -1, -1):
            weight = torch.exp(A.double() * remaining) * step[b, t] * (Ch[b, q] * Bh[b, t]).sum(-1)
            out[b, t] = weight[:, None] * x[b, t].double()
            remaining = remaining + step[b, t]
    return out
