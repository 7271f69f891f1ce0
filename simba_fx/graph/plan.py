"""Where tokens leave: the cuts that a schedule asks of a model whose scans are known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

__all__ = ["Cut", "cuts_of", "entering"]


@dataclass(frozen=True)
class Cut:
    """After block `block` the tokens are cut down to `share` of the input's."""

    block: int
    share: Fraction

    def __repr__(self) -> str:
        return f"{self.block}→{self.share}"


def cuts_of(shares: Sequence[Fraction], has_scan: Sequence[bool]) -> tuple[Cut, ...]:
    """The cuts of a schedule, first block first.

    Nothing leaves after the last block, after a block without a scan (the next one that has a scan catches up with
    the schedule), or where the next block's share equals the current one.
    """
    cuts: list[Cut] = []
    current = shares[0]
    for block, share in enumerate(shares[1:]):
        if has_scan[block] and share < current:
            cuts.append(Cut(block, share))
            current = share
    return tuple(cuts)


def entering(cuts: Sequence[Cut], n_blocks: int) -> tuple[Fraction, ...]:
    """The share of the input that really enters each block."""
    shares, current = [], Fraction(1)
    after = {cut.block + 1: cut.share for cut in cuts}
    for block in range(n_blocks):
        current = after.get(block, current)
        shares.append(current)
    return tuple(shares)


def reasons(shares: Sequence[Fraction], has_scan: Sequence[bool]) -> dict[int, str]:
    """For each block after which nothing leaves: why."""
    cut_blocks = {cut.block for cut in cuts_of(shares, has_scan)}
    why = {}
    for block in range(len(shares)):
        if block in cut_blocks:
            continue
        if block == len(shares) - 1:
            why[block] = "it is the last block: its output is the model's"
        elif not has_scan[block]:
            why[block] = "it has no scan to score tokens with; the next block that has one catches up"
        else:
            why[block] = f"the schedule gives block {block + 1} the same share ({shares[block + 1]})"
    return why
