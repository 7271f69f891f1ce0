"""What goes on from where an earlier call stopped: scans, the convolution before them, attention.

A scan needs no kernel of its own for that. The state is put in front of the tokens as tokens, N of them (K for a delta
rule): each writes one column of the state, lets nothing decay, and is read by nobody. So every kernel and every
gradient is that of the scan, on every device. Scores need nothing at all: a token's contribution does not depend on the
state that the scan starts from. Everything is float32, which a state is: the functions of mamba_ssm take one dtype.

These are functions of operators, not operators: a graph calls them, and whoever traces it sees what they do.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from simba_fx.ops.operands import NO_LIMIT, DeltaScan, SelectiveScan, SSDScan

__all__ = ["CONTINUED", "attention", "causal_conv1d", "conv_state", "delta_scan", "selective_scan", "ssd_scan"]

SHORT = 2.0**-40
"""The step of a token that stands for a state. `exp(SHORT * A)` is 1 in float32 for A down to -32768, and a value that
was divided by a power of two is itself again when it is multiplied by it."""

_PAIRS = 2**24
"""Of tokens, in a mask that is made at once where nothing is traced or differentiated."""


def selective_scan(state: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    """`simba_fx::selective_scan` from `state` `(B, D, N)`; arguments and results as there."""
    scan = SelectiveScan(*arguments)
    steps = scan.steps().transpose(1, 2)
    rows, channels, states = state.shape
    keys = torch.eye(states, device=state.device).expand(*scan.B.shape[:-1], states)
    y, last = torch.ops.simba_fx.selective_scan(
        torch.cat((state.float() / SHORT, scan.u.float()), 2),
        torch.cat((steps.new_full((rows, channels, states), SHORT), steps), 2),
        scan.A,
        torch.cat((keys, scan.B.float()), -1),
        torch.cat((torch.zeros_like(keys), scan.C.float()), -1),
        scan.D,
        None if scan.z is None else torch.cat((steps.new_zeros(rows, channels, states), scan.z.float()), 2),
        None,
        False,
    )
    return y[:, :, states:].to(scan.u.dtype), last


def ssd_scan(state: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    """`simba_fx::ssd_scan` from `state` `(B, H, P, N)`; arguments and results as there."""
    scan = SSDScan(*arguments)
    steps = scan.steps()
    rows, heads, width, states = state.shape
    groups = scan.B.shape[2]
    keys = torch.eye(states, device=state.device)[None, :, None].expand(rows, -1, groups, -1)
    y, last = torch.ops.simba_fx.ssd_scan(
        torch.cat((state.float().permute(0, 3, 1, 2) / SHORT, scan.x.float()), 1),
        torch.cat((steps.new_full((rows, states, heads), SHORT), steps), 1),
        scan.A,
        torch.cat((keys, scan.B.float()), 1),
        torch.cat((torch.zeros_like(keys), scan.C.float()), 1),
        scan.D,
        None if scan.z is None else torch.cat((steps.new_zeros(rows, states, heads, width), scan.z.float()), 1),
        None,
        False,
        0.0,
        NO_LIMIT,
        scan.chunk_size,
    )
    return y[:, states:].to(scan.x.dtype), last


def delta_scan(state: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    """`simba_fx::delta_scan` from `state` `(B, H, K, V)`; arguments and results as there."""
    scan = DeltaScan(*arguments)
    rows, heads, width, _ = state.shape
    groups = scan.k.shape[2]
    keys = torch.eye(width, device=state.device)[None, :, None].expand(rows, -1, groups, -1)
    y, last = torch.ops.simba_fx.delta_scan(
        torch.cat((state.float().transpose(1, 2), scan.v.float()), 1),
        torch.cat((torch.zeros_like(keys), scan.q.float()), 1),
        torch.cat((keys, scan.k.float()), 1),
        torch.cat((keys.new_zeros(rows, width, *scan.g.shape[2:]), scan.g.float()), 1),
        torch.cat((keys.new_ones(rows, width, heads), scan.beta.float()), 1),
        scan.chunk_size,
    )
    return y[:, width:].to(scan.v.dtype), last


def causal_conv1d(state: Tensor, x: Tensor, *arguments: Any) -> Tensor:
    """`simba_fx::causal_conv1d` behind the inputs in `state` `(B, D, W)`; arguments and result as there."""
    y: Tensor = torch.ops.simba_fx.causal_conv1d(torch.cat((state.to(x.dtype), x), 2), *arguments)
    return y[:, :, state.shape[2] :]


def conv_state(state: Tensor, x: Tensor) -> Tensor:
    """The last W inputs `(B, D, W)`, of those in `state` and those of x `(B, D, L)`."""
    return torch.cat((state.to(x.dtype), x), 2)[:, :, -state.shape[2] :]


def attention(keys: Tensor, values: Tensor, real: Tensor, query: Tensor, key: Tensor, value: Tensor,
              mask: Tensor | None = None, dropout: float = 0.0, is_causal: bool = False,
              **options: Any) -> Tensor:  # fmt: skip
    """`scaled_dot_product_attention` that sees the past as well.

    Args:
        keys, values: of the past, as key and value are of the new tokens.
        real: which tokens of the past are, `(B, P)` bool.
        query, key, value: of the new tokens, `(B, H, L, width)`; key and value may have fewer heads (`enable_gqa`).
        mask: of the new tokens among themselves, `(·, ·, L, L)`, bool or added.
    """
    key, value = torch.cat((keys.to(key.dtype), key), 2), torch.cat((values.to(value.dtype), value), 2)
    length, slots = query.shape[2], key.shape[2]
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or length * slots <= _PAIRS:
        seen = _seen(real, query, mask, is_causal, slice(0, length))
        return scaled_dot_product_attention(query, key, value, seen, dropout, False, **options)
    found = query.new_empty(*query.shape[:3], value.shape[3])
    step = max(1, _PAIRS // slots)
    for begin in range(0, length, step):  # the mask of all pairs at once would outgrow keys and values
        part = slice(begin, begin + step)
        seen = _seen(real, query, mask, is_causal, part)
        found[:, :, part] = scaled_dot_product_attention(query[:, :, part], key, value, seen, dropout, False, **options)
    return found


def _seen(real: Tensor, query: Tensor, mask: Tensor | None, is_causal: bool, part: slice) -> Tensor:
    """What some of the new tokens may attend to: the past, and the new tokens by their own mask."""
    place = torch.arange(query.shape[2], device=query.device)
    if mask is not None:
        mask = mask[:, :, part]
    elif is_causal:
        mask = (place <= place[part, None])[None, None]
    else:
        mask = torch.ones_like(place, dtype=torch.bool)[None, None, None]
    rows = len(place[part])
    seen = real[:, None, None, :].expand(-1, mask.shape[1], rows, -1)
    if mask.dtype is not torch.bool:
        seen = torch.zeros_like(seen, dtype=mask.dtype).masked_fill(~seen, torch.finfo(mask.dtype).min)
    return torch.cat((seen, mask.expand(real.shape[0], -1, rows, -1)), 3)


CONTINUED: dict[Any, Any] = {
    torch.ops.simba_fx.selective_scan.default: selective_scan,
    torch.ops.simba_fx.ssd_scan.default: ssd_scan,
    torch.ops.simba_fx.delta_scan.default: delta_scan,
}
"""By the scan that starts from nothing."""
