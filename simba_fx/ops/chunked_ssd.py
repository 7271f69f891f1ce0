"""The SSD scan (Mamba-2) as matrix products, a chunk of tokens at a time, forward and backward, on any device.

Dao & Gu 2024, section 6 (block decomposition), with two deliberate differences: chunks are walked one by one, carrying
the state, so that memory stays at one chunk; and decays between two tokens come from a float64 prefix sum, because the
difference of two long float32 sums loses the digits that matter. Letters: see `simba_fx.ops`; here the heads are split
into groups, `H = G * R`, and subscripts in einsums are t, s tokens of a chunk, g, r, p, n.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from simba_fx.ops.chunked import silu_gradient, split_groups, windows
from simba_fx.ops.operands import SSDScan


def _chunks(length: int, chunk_size: int, device: torch.device) -> list[slice]:
    """Chunks of `chunk_size` tokens, but of 64 at most on CPU, where the quadratic part costs more than it saves."""
    return windows(length, min(chunk_size, 64) if device.type == "cpu" else chunk_size)


class _Chunk:
    """One chunk in float32: `x (B, T, G, R, P)`, `dt (B, T, G, R)`, `B`, `C (B, T, G, N)` and its decays."""

    def __init__(self, at: slice, scan: SSDScan, steps: Tensor) -> None:
        groups, A = scan.B.shape[2], scan.A
        self.value = split_groups(scan.x[:, at].float(), 2, groups)
        self.dt = split_groups(steps[:, at], 2, groups)
        self.x = self.value * self.dt.unsqueeze(-1)
        self.B, self.C = scan.B[:, at].float(), scan.C[:, at].float()
        prefix = (self.dt.double() * split_groups(A.double(), 0, groups)).cumsum(1).permute(0, 2, 3, 1)
        between = (prefix.unsqueeze(-1) - prefix.unsqueeze(-2)).float()
        later = torch.ones(between.shape[-2:], dtype=torch.bool, device=A.device).triu(1)
        self.between = between.masked_fill_(later, -torch.inf).exp_()
        self.from_start = prefix.float().exp_()
        self.to_end = (prefix[..., -1:] - prefix).float().exp_()
        self.whole = self.from_start[..., -1, None, None]
        self.overlap = torch.einsum("btgn,bsgn->bgts", self.C, self.B).unsqueeze(2)

    def read(self, before: Tensor) -> Tensor:
        """Outputs before skip and gate `(B, T, G, R, P)`; `before` `(B, G, R, P, N)` is the state that enters."""
        inside = torch.einsum("bgrts,bsgrp->btgrp", self.overlap * self.between, self.x)
        carried = torch.einsum("btgn,bgrpn->bgrtp", self.C, before) * self.from_start.unsqueeze(-1)
        return inside + carried.permute(0, 3, 1, 2, 4)

    def advance(self, before: Tensor) -> Tensor:
        """The state that leaves `(B, G, R, P, N)`."""
        weighted = self.x * self.to_end.permute(0, 3, 1, 2).unsqueeze(-1)
        return self.whole * before + torch.einsum("bsgrp,bsgn->bgrpn", weighted, self.B)


def _decays(prefix: Tensor) -> Tensor:
    """`exp(prefix_t - prefix_s)` for s up to t, else 0: `(..., T, T)` float32 from float64 prefix sums `(..., T)`."""
    between = (prefix.unsqueeze(-1) - prefix.unsqueeze(-2)).float()
    later = torch.ones(between.shape[-2:], dtype=torch.bool, device=prefix.device).triu(1)
    return between.masked_fill(later, -torch.inf).exp_()


def _skip(D: Tensor) -> Tensor:
    """`(H,)` or `(H, P)` -> float32, broadcastable over `(B, L, H, P)`."""
    return D.float() if D.dim() == 2 else D.float().unsqueeze(-1)


def ssd_scan(scan: SSDScan) -> tuple[Tensor, Tensor]:
    """As `simba_fx::ssd_scan`: `(B, L, H, P)` in x's dtype and `(B, H, P, N)`."""
    x, D, z, steps = scan.x, scan.D, scan.z, scan.steps()
    rows, length, heads, width, groups, states = scan.sizes
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    h = torch.zeros(rows, groups, heads // groups, width, states, dtype=torch.float32, device=x.device)
    for at in _chunks(length, scan.chunk_size, x.device):
        chunk = _Chunk(at, scan, steps)
        out = chunk.read(h).flatten(2, 3)
        if D is not None:
            out = out + _skip(D) * chunk.value.flatten(2, 3)
        if z is not None:
            out = out * F.silu(z[:, at].float())
        y[:, at] = out
        h = chunk.advance(h)
    return y, h.flatten(1, 2)


def ssd_scan_at_once(scan: SSDScan) -> tuple[Tensor, Tensor]:
    """`ssd_scan` with every chunk at the same time, for a GPU, where a loop over chunks would be launched one by one.

    Chunks hand their states on by one more product, over pairs of chunks. Memory: `(B, L, H, T)` with T tokens a chunk.
    Products of bfloat16 operands are bfloat16's, summed in float32 by the hardware, as mamba_ssm has them; float16 is
    too short for states.
    """
    x, A, B, C, D, z = scan.x, scan.A, scan.B, scan.C, scan.D, scan.z
    rows, length, heads, width, groups, states = scan.sizes
    size = min(scan.chunk_size, 128)
    missing = -length % size
    padded = [F.pad(t, (0, 0) * (t.dim() - 2) + (0, missing)) for t in (x, scan.steps(), B, C)]
    whole = [t.view(rows, -1, size, *t.shape[2:]) for t in padded]
    value, step = (split_groups(t.float(), 3, groups) for t in whole[:2])  # (B, c, T, G, R, P), (B, c, T, G, R)
    dtype = torch.bfloat16 if x.dtype == B.dtype == C.dtype == torch.bfloat16 else torch.float32

    def product(equation: str, a: Tensor, b: Tensor) -> Tensor:
        return torch.einsum(equation, a.to(dtype), b.to(dtype)).float()

    B_, C_ = whole[2:]
    scaled = value * step.unsqueeze(-1)
    prefix = (step.double() * split_groups(A.double(), 0, groups)).cumsum(2).permute(0, 3, 4, 1, 2)  # (B, G, R, c, T)
    mixing = _decays(prefix) * product("bctgn,bcsgn->bgcts", C_, B_).unsqueeze(2)
    y = product("bgrcts,bcsgrp->bctgrp", mixing, scaled)

    to_end = (prefix[..., -1:] - prefix).float().exp_().permute(0, 3, 4, 1, 2)
    added = product("bcsgrp,bcsgn->bgrcpn", scaled * to_end.unsqueeze(-1), B_)
    chunks = prefix[..., -1].cumsum(-1)  # log-decay from the start of the row to the end of each chunk
    reached = torch.einsum("bgrij,bgrjpn->bgripn", _decays(chunks), added)  # states that leave the chunks
    entering = F.pad(reached[..., :-1, :, :], (0, 0, 0, 0, 1, 0))
    carried = product("bctgn,bgrcpn->bctgrp", C_, entering)
    y = y + carried * prefix.float().exp().permute(0, 3, 4, 1, 2).unsqueeze(-1)

    y = y.flatten(3, 4).flatten(1, 2)[:, :length]
    if D is not None:
        y = y + _skip(D) * x.float()
    if z is not None:
        y = y * F.silu(z.float())
    return y.to(x.dtype), reached[..., -1, :, :].reshape(rows, heads, width, states)


def ssd_scan_backward(
    dy: Tensor, dlast: Tensor, scan: SSDScan
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Float32 gradients of x, dt (the final step sizes), A, B, C, D `(H, P)` and z.

    The gradient of the log-decay of step i collects every path that crosses i. It is summed from those paths alone
    (masked sums of `dM * M`), not as a difference of two sums, so strong decay leaves no rounding residue.
    """
    x, A, B, C, D, z, steps = scan.x, scan.A, scan.B, scan.C, scan.D, scan.z, scan.steps()
    rows, length, heads, width, groups, states = scan.sizes
    spans = _chunks(length, scan.chunk_size, x.device)
    starts = [torch.zeros(rows, groups, heads // groups, width, states, dtype=torch.float32, device=x.device)]
    for at in spans[:-1]:
        starts.append(_Chunk(at, scan, steps).advance(starts[-1]))

    dx, dz = (torch.zeros(x.shape, dtype=torch.float32, device=x.device) for _ in range(2))
    ddt = torch.zeros(rows, length, heads, dtype=torch.float32, device=x.device)
    dB, dC = (torch.zeros(t.shape, dtype=torch.float32, device=x.device) for t in (B, C))
    dA, dD = (torch.zeros(shape, dtype=torch.float32, device=x.device) for shape in ((heads,), (heads, width)))
    dh = split_groups(dlast.float(), 1, groups)
    for at, before in zip(reversed(spans), reversed(starts)):
        c = _Chunk(at, scan, steps)
        value = c.value.flatten(2, 3)
        dout = dy[:, at].float()
        if z is not None:
            gate = z[:, at].float()
            y = c.read(before).flatten(2, 3)
            y = y if D is None else y + _skip(D) * value
            dz[:, at] = dout * y * silu_gradient(gate)
            dout = dout * F.silu(gate)
        dv = 0 if D is None else _skip(D) * dout
        dD += (dout * value).sum((0, 1))
        dout = split_groups(dout, 2, groups)

        mixing = c.overlap * c.between
        dmixing = torch.einsum("btgrp,bsgrp->bgrts", dout, c.x)
        doverlap = (dmixing * c.between).sum(2)
        carried = torch.einsum("btgrp,bgrpn->bgrtn", dout, before) * c.from_start.unsqueeze(-1)
        pulled = torch.einsum("bsgrp,bgrpn->bgrsn", c.x, dh) * c.to_end.unsqueeze(-1)
        dC[:, at] = torch.einsum("bgts,bsgn->btgn", doverlap, c.B) + carried.sum(2).transpose(1, 2)
        dB[:, at] = torch.einsum("bgts,btgn->bsgn", doverlap, c.C) + pulled.sum(2).transpose(1, 2)
        dscaled = torch.einsum("bgrts,btgrp->bsgrp", mixing, dout)
        arriving = torch.einsum("bgrpn,bsgn->bgrsp", dh, c.B) * c.to_end.unsqueeze(-1)
        dscaled = (dscaled + arriving.permute(0, 3, 1, 2, 4)).flatten(2, 3)

        crossing = (dmixing * mixing).flip(3).cumsum(3).flip(3).tril_(-1).sum(-1)
        into = torch.einsum("bgrtn,btgn->bgrt", carried, c.C).flip(3).cumsum(3).flip(3)
        out_of = torch.einsum("bgrsn,bsgn->bgrs", pulled, c.B).cumsum(3)
        out_of = F.pad(out_of[..., :-1], (1, 0))
        through = (dh * c.whole * before).sum((-1, -2)).unsqueeze(-1)
        dlog = (crossing + into + out_of + through).permute(0, 3, 1, 2).flatten(2)

        step = c.dt.flatten(2)
        dx[:, at] = dscaled * step.unsqueeze(-1) + dv
        ddt[:, at] = (dscaled * value).sum(-1) + dlog * A.float()
        dA += (dlog * step).sum((0, 1))
        weighted = dout * c.from_start.permute(0, 3, 1, 2).unsqueeze(-1)
        dh = c.whole * dh + torch.einsum("btgrp,btgn->bgrpn", weighted, c.C)
    return dx, ddt, dA, dB, dC, dD, dz
