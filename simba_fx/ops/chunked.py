"""The scans in plain PyTorch, a window of tokens at a time: the path of machines without a compiler, on any device.

No Python loop runs over single tokens, no `(B, L, D, N)` tensor is made (only a window of it), and nothing is ever
divided by a cumulative product, so any strength of decay is exact to float32 rounding. Letters: see `simba_fx.ops`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from simba_fx.ops.contributions import reduced
from simba_fx.ops.operands import CausalConv, SelectiveScan, step_size

_WINDOW_ELEMENTS = 1 << 20
"""Elements of a `(B, W, D, N)` window tensor: big enough to amortise a kernel launch, small enough for a cache."""


def linear_recurrence_(decay: Tensor, h: Tensor) -> None:
    """Turns inputs into states, in place along dim 1: `h_t += decay_t * h_{t-1}`, both `(B, W, ...)`.

    Cyclic reduction: fold each even token into its successor, solve the half-length problem of the odd tokens, then
    give every even token its predecessor. About three passes over `h` in all; products of decays only, no quotients.
    """
    width = h.shape[1]
    if width < 2:
        return
    pairs = width // 2
    odd, before_odd = h[:, 1::2], h[:, : 2 * pairs : 2]
    odd.addcmul_(decay[:, 1::2], before_odd)
    linear_recurrence_(decay[:, 1::2] * decay[:, : 2 * pairs : 2], odd)
    h[:, 2::2].addcmul_(decay[:, 2::2], h[:, 1 : width - 1 : 2])


def windows(length: int, width: int) -> list[slice]:
    """Consecutive slices of at most `width` tokens that cover `length` tokens."""
    return [slice(start, min(start + width, length)) for start in range(0, length, width)]


def window_width(elements_per_token: int) -> int:
    """Tokens in a window of about `_WINDOW_ELEMENTS` elements, between 16 and 512."""
    return max(16, min(512, _WINDOW_ELEMENTS // max(1, elements_per_token)))


def split_groups(tensor: Tensor, dim: int, groups: int) -> Tensor:
    """Dim `dim` of size D (or H) becomes two, `(G, D / G)`: channels, or heads, by the group they read."""
    shape = tensor.shape
    return tensor.reshape(*shape[:dim], groups, shape[dim] // groups, *shape[dim + 1 :])


def silu_gradient(x: Tensor) -> Tensor:
    """`d silu(x) / dx`."""
    gate = torch.sigmoid(x)
    return gate * (1 + x * (1 - gate))


class _SelectiveWindow:
    """One window of the selective scan in float32, time before channels, channels in groups: `(B, W, G, D/G, N)`."""

    def __init__(self, at: slice, scan: SelectiveScan) -> None:
        _, _, _, groups, _ = scan.sizes
        raw = scan.delta[:, :, at].transpose(1, 2)
        self.raw = step_size(raw, scan.delta_bias, False)
        self.dt = split_groups(F.softplus(self.raw) if scan.delta_softplus else self.raw, 2, groups)
        self.u = split_groups(scan.u[:, :, at].transpose(1, 2).float(), 2, groups)
        self.A = split_groups(scan.A.float(), 0, groups)
        self.B = scan.B[..., at].permute(0, 3, 1, 2).float().contiguous()
        self.C = scan.C[..., at].permute(0, 3, 1, 2).float().contiguous()
        self.decay = torch.exp_(self.dt.unsqueeze(-1) * self.A)

    def states(self, before: Tensor) -> Tensor:
        """States after each token `(B, W, G, D/G, N)`, `before` `(B, G, D/G, N)` being the one that precedes them."""
        h = (self.dt * self.u).unsqueeze(-1) * self.B.unsqueeze(3)
        h[:, 0].addcmul_(self.decay[:, 0], before)
        linear_recurrence_(self.decay, h)
        return h

    def read(self, h: Tensor) -> Tensor:
        """`C_t . h_t`: `(B, W, G, D/G)`."""
        return torch.matmul(h, self.C.unsqueeze(-1)).squeeze(-1)


def selective_scan(scan: SelectiveScan) -> tuple[Tensor, Tensor]:
    """`simba_fx::selective_scan` with `B`, `C` `(B, G, N, L)`; returns y as `(B, L, D)` contiguous and `(B, D, N)`."""
    u, D, z = scan.u, scan.D, scan.z
    rows, channels, length, groups, states = scan.sizes
    y = u.new_empty(rows, length, channels)
    h = scan.A.new_zeros(rows, groups, channels // groups, states, dtype=torch.float32)
    for at in windows(length, window_width(rows * channels * states)):
        w = _SelectiveWindow(at, scan)
        hs = w.states(h)
        h = hs[:, -1]
        out = w.read(hs).flatten(2)
        if D is not None:
            out = out + D.float() * w.u.flatten(2)
        if z is not None:
            out = out * F.silu(z[:, :, at].transpose(1, 2).float())
        y[:, at] = out
    return y, h.reshape(rows, channels, states).clone()


def selective_scan_backward(
    dy: Tensor, dlast: Tensor, scan: SelectiveScan
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Float32 gradients of u, delta, A, B, C, D, z, delta_bias in their shapes; zeros for an absent D or z.

    Window starts are recomputed first (`L / W` states), then windows are walked backwards: with
    `g_t = C_t dy_t + decay_{t+1} g_{t+1}` the gradient reaching state t, everything else is a contraction.
    """
    u, D, z = scan.u, scan.D, scan.z
    rows, channels, length, groups, states = scan.sizes
    spans = windows(length, window_width(rows * channels * states))
    starts = [scan.A.new_zeros(rows, groups, channels // groups, states, dtype=torch.float32)]
    for at in spans[:-1]:
        starts.append(_SelectiveWindow(at, scan).states(starts[-1])[:, -1].clone())

    du, ddelta, dz = (torch.zeros(rows, length, channels, dtype=torch.float32, device=u.device) for _ in range(3))
    dB, dC = (torch.zeros(rows, length, groups, states, dtype=torch.float32, device=u.device) for _ in range(2))
    dA = torch.zeros(groups, channels // groups, states, dtype=torch.float32, device=u.device)
    dD = torch.zeros(channels, dtype=torch.float32, device=u.device)
    carry = dlast.float().reshape(starts[0].shape)
    for at, start in zip(reversed(spans), reversed(starts)):
        w = _SelectiveWindow(at, scan)
        hs = w.states(start)
        dout = dy[:, :, at].transpose(1, 2).float()
        if z is not None:
            gate = z[:, :, at].transpose(1, 2).float()
            y = w.read(hs).flatten(2)
            y = y if D is None else y + D.float() * w.u.flatten(2)
            dz[:, at] = dout * y * silu_gradient(gate)
            dout = dout * F.silu(gate)
        dout = split_groups(dout, 2, groups)
        g = dout.unsqueeze(-1) * w.C.unsqueeze(3)
        g[:, -1] += carry
        g = g.flip(1)
        linear_recurrence_(w.decay.roll(-1, 1).flip(1), g)
        g = g.flip(1)
        carry = w.decay[:, 0] * g[:, 0]

        dC[:, at] = (dout.unsqueeze(3) @ hs).squeeze(3)
        dB[:, at] = ((w.dt * w.u).unsqueeze(3) @ g).squeeze(3)
        response = (g @ w.B.unsqueeze(-1)).squeeze(-1)
        dstate = g * w.decay
        dstate[:, 0] *= start
        dstate[:, 1:] *= hs[:, :-1]
        dA += torch.einsum("bwgdn,bwgd->gdn", dstate, w.dt)
        ddt = (response * w.u + (dstate * w.A).sum(-1)).flatten(2)
        ddelta[:, at] = ddt * torch.sigmoid(w.raw) if scan.delta_softplus else ddt
        du_at = (w.dt * response).flatten(2)
        if D is not None:
            du_at = du_at + D.float() * dout.flatten(2)
            dD += (dout * w.u).sum((0, 1)).flatten()
        du[:, at] = du_at
    channel_last = [t.transpose(1, 2) for t in (du, ddelta, dz)]
    return (
        channel_last[0],
        channel_last[1],
        dA.flatten(0, 1),
        dB.permute(0, 2, 3, 1),
        dC.permute(0, 2, 3, 1),
        dD,
        channel_last[2],
        ddelta.sum((0, 1)),
    )


def causal_conv1d(conv: CausalConv) -> Tensor:
    """The convolution before its activation: float32 `(B, L, D)`."""
    width, length = conv.weight.shape[1], conv.x.shape[2]
    padded = F.pad(conv.x.transpose(1, 2).float(), (0, 0, width - 1, 0))
    out = padded.new_zeros(1) if conv.bias is None else conv.bias.float()
    for k, tap in enumerate(conv.weight.float().unbind(1)):
        out = out + padded[:, k : k + length] * tap
    return out


def causal_conv1d_backward(dy: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x `(B, L, D)`, weight `(D, W)` and bias `(D,)` from dy `(B, L, D)` before the activation."""
    width, length = weight.shape[1], x.shape[2]
    padded = F.pad(x.transpose(1, 2).float(), (0, 0, width - 1, 0))
    ahead = F.pad(dy, (0, 0, 0, width - 1))
    dx = torch.zeros_like(dy)
    dweight = torch.empty(weight.shape, dtype=torch.float32, device=x.device)
    for k, tap in enumerate(weight.float().unbind(1)):
        dx += ahead[:, width - 1 - k : width - 1 - k + length] * tap
        dweight[:, k] = (dy * padded[:, k : k + length]).sum((0, 1))
    return dx, dweight, dy.sum((0, 1))


def _vanishing_exp_(x: Tensor) -> Tensor:
    """`exp(x)` in place, exactly 0 below -87, where float32 turns subnormal and MKL's exp ten times slower."""
    gone = x < -87
    return x.clamp_(min=-87).exp_().masked_fill_(gone, 0.0)


def selective_score(scan: SelectiveScan, C_query: Tensor, query: Tensor, criterion: str) -> Tensor:
    """The score of the contributions to all channels `(B, L)`, anything after the query.

    B is `(B, G, N, L)`, `C_query` `(B, G, N)`, `query` `(B,)` int64.
    Windows are walked backwards from the last token, so `R_t` is carried as a suffix sum.
    """
    u, delta = scan.u, scan.delta
    rows, channels, length, groups, states = scan.sizes
    score = torch.empty(rows, length, dtype=torch.float32, device=u.device)
    remaining = torch.zeros(rows, channels, dtype=torch.float32, device=u.device)
    decay = split_groups(scan.A.float(), 0, groups)
    for at in reversed(windows(length, window_width(rows * channels * states))):
        dt = step_size(delta[:, :, at].transpose(1, 2), scan.delta_bias, scan.delta_softplus)
        counted = torch.arange(at.start, at.stop, device=u.device) <= query.unsqueeze(1)
        backwards = torch.where(counted.unsqueeze(2), dt, 0.0).flip(1)
        sums = backwards.cumsum(1) + remaining.unsqueeze(1)
        after = split_groups(torch.cat((remaining.unsqueeze(1), sums[:, :-1]), 1).flip(1), 2, groups)
        remaining = sums[:, -1]
        weight = (scan.B[..., at].float() * C_query.unsqueeze(3)).permute(0, 3, 1, 2).contiguous()
        response = (_vanishing_exp_(after.unsqueeze(-1) * decay) @ weight.unsqueeze(-1)).squeeze(-1).flatten(2)
        share = dt * u[:, :, at].transpose(1, 2).float() * response
        score[:, at] = reduced(share, criterion)
    return score
