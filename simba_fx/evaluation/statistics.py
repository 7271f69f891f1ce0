"""Means of paired differences and their standard errors.

A window is one observation: its tokens are not independent of each other.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Estimate", "mean", "paired", "ratio", "share"]


@dataclass(frozen=True)
class Estimate:
    """A mean over `n` observations, and the standard error of it."""

    value: float
    error: float
    n: int

    def __str__(self) -> str:
        return f"{self.value:+.4f} ± {self.error:.4f}"


def mean(observations: Tensor) -> Estimate:
    """Of `(n,)`, n at least 2."""
    n = len(observations)
    return Estimate(float(observations.mean()), float(observations.std()) / math.sqrt(n), n)


def ratio(totals: Tensor, counts: Tensor) -> Estimate | None:
    """The mean over all tokens of windows that have `counts` `(n,)` of them, which add up to `totals` `(n,)`.

    The error is that of a ratio of two sums over windows (linearised); n of the estimate is the number of tokens. None:
    fewer than two windows have any.
    """
    if int((counts > 0).sum()) < 2:
        return None
    n, value = len(counts), totals.sum() / counts.sum()
    residual = totals - value * counts
    error = math.sqrt(float(residual.square().sum()) / (n * (n - 1))) / float(counts.double().mean())
    return Estimate(float(value), error, int(counts.sum()))


def share(hits: Tensor) -> Estimate:
    """Of `(n,)` bool."""
    n, value = len(hits), float(hits.double().mean())
    return Estimate(value, math.sqrt(value * (1 - value) / n), n)


def paired(losses: Tensor, dense: Tensor, chosen: Tensor | None = None) -> Estimate | None:
    """Losses `(n, m)` of n windows over those of the dense model; `chosen` `(n, m)` bool: of these tokens alone."""
    difference = (losses - dense).double()
    if chosen is None:
        return mean(difference.mean(1))
    return ratio(torch.where(chosen, difference, 0.0).sum(1), chosen.sum(1))
