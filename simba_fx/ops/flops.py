"""FLOP formulas of the operators for `torch.utils.flop_counter`, registered when `simba_fx.ops` is imported.

Counted as torch counts matmuls: a multiplication and an addition are one operation each; exponentials, softplus and
gates are not counted. Counts are of the *definition* (one token after the other), whatever the code that runs: the SSD
scan in chunks does more arithmetic than this, in matrix products. Letters: see `simba_fx.ops`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.flop_counter import flop_registry, register_flop_formula

_OPS = torch.ops.simba_fx


def _tokens_times_state(shape: Any, states: int) -> int:
    size = states
    for dim in shape:
        size *= dim
    return size


@register_flop_formula(_OPS.selective_scan)
def _selective_scan(u: Any, delta: Any, A: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    """Per token, channel and state: dt*A, a*h, dtu*B, their sum, C*h and its sum: 6."""
    return 6 * _tokens_times_state(u, A[1])


@register_flop_formula(_OPS.selective_scan_backward)
def _selective_scan_backward(
    dy: Any, dlast: Any, u: Any, delta: Any, A: Any, *args: Any, out_shape: Any = None, **kwargs: Any
) -> int:
    """States again (4), then g (3), and the sums for B, C, A, u and delta (2 + 2 + 4 + 2 + 2): 19."""
    return 19 * _tokens_times_state(u, A[1])


@register_flop_formula(_OPS.ssd_scan)
def _ssd_scan(x: Any, dt: Any, A: Any, B: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    """Per token, head channel and state: a*h, dtx*B, their sum, C*h and its sum: 5 (the decay is one per head)."""
    return 5 * _tokens_times_state(x, B[3])


@register_flop_formula(_OPS.ssd_scan_backward)
def _ssd_scan_backward(
    dy: Any, dlast: Any, x: Any, dt: Any, A: Any, B: Any, *args: Any, out_shape: Any = None, **kwargs: Any
) -> int:
    """States again (3), then g (3), and the sums for B, C, x and the decay (2 each): 14."""
    return 14 * _tokens_times_state(x, B[3])


@register_flop_formula(_OPS.delta_scan)
def _delta_scan(v: Any, q: Any, k: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    """Per token and element of a head's state: a*S, S*k and its sum, k times what is written, their sum, S*q and its
    sum: 7."""
    return 7 * _tokens_times_state(v, k[3])


@register_flop_formula(_OPS.delta_scan_backward)
def _delta_scan_backward(
    dy: Any, dlast: Any, v: Any, q: Any, k: Any, *args: Any, out_shape: Any = None, **kwargs: Any
) -> int:
    """The scan again, and twice as much for the gradients."""
    return 21 * _tokens_times_state(v, k[3])


@register_flop_formula(_OPS.delta_token_score)
def _delta_token_score(v: Any, q: Any, k: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    """Per token: `k . r` and one step of r in each head, a product and a comparison per channel. "removal": the scan
    beside; "write": a square and its sum of values and keys; "delta-norm": a square per head
    and its sum; "clip": the scan and a mean."""
    criterion = args[-1]
    heads = v[:3]
    if criterion == "clip":
        return _delta_scan(v, q, k) + 2 * _tokens_times_state(v, 1)
    if criterion == "delta-norm":
        return 2 * _tokens_times_state(heads, 1)
    if criterion == "write":
        return 2 * _tokens_times_state(v, 1) + 2 * _tokens_times_state(k, 1)
    shares = 5 * _tokens_times_state(heads, k[3]) + 2 * _tokens_times_state(v, 1)
    return shares + (_delta_scan(v, q, k) if criterion == "removal" else 0)


@register_flop_formula(_OPS.causal_conv1d)
def _causal_conv1d(x: Any, weight: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    """Per token and channel 2 W."""
    return 2 * _tokens_times_state(x, weight[1])


@register_flop_formula(_OPS.causal_conv1d_backward)
def _causal_conv1d_backward(dy: Any, x: Any, weight: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    """Once for x and once for the weight: 4 W."""
    return 4 * _tokens_times_state(x, weight[1])


@register_flop_formula(_OPS.selective_token_score)
def _selective_token_score(u: Any, delta: Any, A: Any, B: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    """Per token, channel and state: A*R, the weight and its sum: 3 ("simba"). "no-decay": `C_q . B_t` per group, and
    one product and comparison per channel; "write": a square and its sum of both; "delta-norm": a square and its
    sum; "clip": the scan and a mean."""
    criterion = args[-1]
    if criterion == "clip":
        return _selective_scan(u, delta, A) + 2 * _tokens_times_state(u, 1)
    if criterion == "delta-norm":
        return 2 * _tokens_times_state(u, 1)
    if criterion in ("no-decay", "write"):
        return 2 * _tokens_times_state(B, 1) + 2 * _tokens_times_state(u, 1)
    return 3 * _tokens_times_state(u, A[1])


@register_flop_formula(_OPS.ssd_token_score)
def _ssd_token_score(x: Any, dt: Any, A: Any, B: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    """Per token: `C_q . B_t` in each group, and one product and comparison per channel; "write": a square and its sum
    of both. "delta-norm": a square per head and its sum; "clip": the scan and a mean."""
    criterion = args[-1]
    if criterion == "clip":
        return _ssd_scan(x, dt, A, B) + 2 * _tokens_times_state(x, 1)
    if criterion == "delta-norm":
        return 2 * _tokens_times_state(dt, 1)
    return 2 * _tokens_times_state(B, 1) + 2 * _tokens_times_state(x, 1)


# --- operators of others that torch has no formula for --------------------------------------------------------------


def _attention(query: Any, key: Any, value: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    """Two matrix products per head, over all pairs of tokens, masked or not, as torch counts attention on a GPU."""
    rows, heads, queries, width = query
    return int(2 * rows * heads * queries * key[2] * (width + value[3]))


def _grouped_mm(rows: Any, weights: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    """`(M, K)` rows, each times one of the matrices `(E, K, N)`."""
    return int(2 * rows[-2] * rows[-1] * weights[-1] * (1 if len(rows) == 2 else rows[0]))


def missing() -> dict[Any, Any]:
    """By operator, for `FlopCounterMode(custom_mapping=...)`: nothing is registered globally for what is not ours."""
    known = {
        "aten::_scaled_dot_product_flash_attention_for_cpu": _attention,
        "aten::_grouped_mm": _grouped_mm,
        "transformers::grouped_mm_fallback": _grouped_mm,
    }
    found = {}
    for name, formula in known.items():
        space, operator = name.split("::")
        packet = getattr(getattr(torch.ops, space), operator, None)  # transformers defines its own when it needs it
        if packet is not None and packet not in flop_registry:
            found[packet] = formula
    return found
