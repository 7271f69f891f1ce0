"""From a token's contributions to all channels to one number, the score.

The largest is what Song et al. 2025 take. Their l2 norm counts a token that moves many channels a little, too.
"""

from __future__ import annotations

import torch
from torch import Tensor

CONTRIBUTIONS = ("simba", "simba-abs", "simba-l2")
"""The largest contribution, the largest absolute one, the l2 norm."""


def over_channels(weight: Tensor, values: Tensor, criterion: str) -> Tensor:
    """The score of contributions `weight * values`, none of which is materialised: channels share a weight.

    Args:
        weight: `(B, L, H)` float32; values: `(B, L, H, P)`.
        criterion: one of `CONTRIBUTIONS`; any other is scored as "simba".

    Returns:
        `(B, L)` float32.
    """
    if criterion == "simba-l2":
        return norm(weight * norm(values))
    low, high = (value.float() for value in values.aminmax(dim=3))
    if criterion == "simba-abs":
        return (weight.abs() * torch.maximum(low.abs(), high.abs())).amax(2)
    return (weight * torch.where(weight >= 0, high, low)).amax(2)


def norm(values: Tensor) -> Tensor:
    """The l2 norm over the last dimension, in float32, without a copy in float32."""
    wide = values.dtype if values.dtype.itemsize > 4 else torch.float32
    found: Tensor = torch.linalg.vector_norm(values, dim=-1, dtype=wide)
    return found.float()


def reduced(contributions: Tensor, criterion: str) -> Tensor:
    """The score of contributions `(..., D)`, as in `over_channels`; they may be overwritten."""
    if criterion == "simba-l2":
        return norm(contributions)
    return (contributions.abs_() if criterion == "simba-abs" else contributions).amax(-1)


def written(values: Tensor, keys: Tensor) -> Tensor:
    """The Frobenius norm of what a token writes into the states, products of values and keys.

    Args:
        values, keys: norms of both for each state `(B, L, ...)` float32, which broadcast.

    Returns:
        `(B, L)` float32.
    """
    return norm((values * keys).flatten(2))
