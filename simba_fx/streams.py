"""Which of the values that cross a cut a value read after the last block continues.

Most models carry one value from block to block (the residual stream). Some carry several of one width: `mamba_ssm`
keeps the last block's output and the sum of all before it apart, so that a fused kernel can add and normalise them. A
token that leaves at a cut leaves with all of them, and each must come back as the right one.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import fx

from simba_fx.graphs import MARK, Facts, region, value, where

__all__ = ["continued"]

_MARKERS = (torch.ops.simba_fx.site_enter.default, torch.ops.simba_fx.site_exit.default)
_GATHERED = ("carried", "invariant")


def continued(node: fx.Node, kept_users: Iterable[fx.Node], beside: Iterable[fx.Node],
              facts: Facts) -> fx.Node | None:  # fmt: skip
    """The gather at one cut that `node` continues, or None where that is not certain.

    Args:
        node: a value `(B, L, ...)` that a later part of the model reads.
        kept_users: what reads the survivors' places at the cut; candidates are gathers of the same sizes behind L.
        beside: all values that are read in the same place, `node` among them.

    1. One value, one candidate that the block before the cut computed: that one. 2. Several: each value is matched with
    the only candidate that the same place of a block computed with the same operator. 3. If one value and one candidate
    are left over, they match. 4. Where the blocks before the cut computed too few, what they only passed on counts
    too, if the next block takes it up for good (in the first block, the sum so far is the embedding).
    """
    sizes = value(node).shape[2:]
    gathers = [user for user in kept_users if _role(user) in _GATHERED]
    alike = [gather for gather in gathers if value(gather).shape[2:] == sizes]
    group = [other for other in beside if value(other).shape[2:] == sizes]
    origins = {other: _origin(other, facts) for other in group}
    if len(set(origins.values())) < len(group):
        group = [node]  # one stream, read at several depths
    candidates = [gather for gather in alike if _role(gather) == "carried"]
    if len(candidates) < len(group):
        candidates += [gather for gather in alike if _role(gather) == "invariant" and _taken_up(gather)]
    if len(candidates) == len(group) == 1:
        return candidates[0]
    matches: dict[fx.Node, fx.Node] = {}
    for other in group:
        same = [gather for gather in candidates if _origin(gather, facts) == origins[other]]
        if len(same) == 1:
            matches[other] = same[0]
    left = [gather for gather in candidates if gather not in matches.values()]
    if node not in matches and len(group) - len(matches) == len(left) == 1:
        return left[0]
    return matches.get(node)


def _role(gather: fx.Node) -> str:
    return str((gather.meta.get(MARK) or {}).get("role", ""))


def _taken_up(gather: fx.Node) -> bool:
    """Whether one block reads it and no later one does: it lives on in what that block computes from it."""
    return len({region(user) for user in gather.users}) == 1


def _origin(node: fx.Node, facts: Facts) -> tuple[str, Any]:
    """Where inside its block a value is computed, and by which operator; gathers and markers are looked through."""
    while node.target in _MARKERS or _role(node) in _GATHERED:
        source: Any = node.args[0]
        node = source
    path, block = where(node), region(node)
    if 0 <= block < facts.n_blocks and f"{path}.".startswith(f"{facts.blocks[block]}."):
        path = path[len(facts.blocks[block]) :]
    return path, node.target
