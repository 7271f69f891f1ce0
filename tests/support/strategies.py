"""Hypothesis strategies, named for domains. Tested in test_reference.py."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

import torch
from hypothesis import Phase, settings
from hypothesis import strategies as st
from models import padded, tokens
from torch import Tensor

MASK_DTYPES = (torch.bool, torch.int64, torch.float32)


def examples(n: int) -> settings:
    """Settings of a whole-model property: `n` examples, no shrinking, since each step of it may cost a capture."""
    phases = (Phase.explicit, Phase.reuse, Phase.generate)
    return settings(deadline=None, max_examples=n, phases=phases, print_blob=True)


seeds = st.integers(0, 2**31 - 1)
lengths = st.integers(1, 200)
mask_dtypes = st.sampled_from(MASK_DTYPES)


@st.composite
def shares(draw: st.DrawFn, blocks: int) -> tuple[Fraction, ...]:
    """Shares a schedule may have: 1 first, then non-increasing fractions in (0, 1]; equal neighbours included."""
    pick = st.one_of(
        st.integers(1, 1000).map(lambda p: Fraction(p, 1000)),
        st.fractions(min_value=Fraction(1, 50), max_value=1, max_denominator=50),
    )
    rest = sorted(draw(st.lists(pick, min_size=blocks - 1, max_size=blocks - 1)), reverse=True)
    return (Fraction(1), *rest)


def tails(length: int) -> st.SearchStrategy[int]:
    """Tails a row of `length` real tokens may have, one and the whole row included."""
    return st.one_of(st.just(1), st.integers(1, length), st.integers(1, min(length, 8)))


@dataclass(frozen=True)
class PaddedBatch:
    """Rows of random ids with pads on either side, both, or none; at least one row is real at both ends or not."""

    ids: Tensor  # (B, L) int64
    mask: Tensor  # (B, L) int64, 1 = real
    lengths: tuple[int, ...]  # of the rows, without pads


@st.composite
def padded_batches(draw: st.DrawFn, max_rows: int = 4, max_length: int = 60, min_length: int = 1) -> PaddedBatch:
    """Batches whose rows differ in length, sometimes by one alone, and in the side they are padded on."""
    rows = draw(st.integers(2, max_rows))
    longest = draw(st.integers(min_length, max_length))
    shorter = st.one_of(st.integers(min_length, longest), st.integers(max(min_length, longest - 2), longest))
    sizes = [longest] + [draw(shorter) for _ in range(rows - 1)]
    slack = draw(st.one_of(st.just(0), st.integers(0, 5)))  # sometimes no row reaches the rectangle's length
    width = longest + slack
    side = st.sampled_from(("left", "right", "both"))
    right = []
    for size in sizes:
        free = width - size
        right.append({"left": 0, "right": free, "both": draw(st.integers(0, free))}[draw(side)])
    seed = draw(seeds)
    contents = [tokens(seed + b, size) for b, size in enumerate(sizes)]
    ids, mask = padded(contents, [width - n - r for n, r in zip(sizes, right)], right, fill=draw(st.integers(0, 52)))
    return PaddedBatch(ids, mask, tuple(sizes))
