"""Which of the values that cross a cut a value read after the last block continues.

Most models carry one value from block to block (the residual stream). Some carry several of one width: `mamba_ssm`
keeps the last block's output and the sum of all before it apart, so that a fused kernel can add and normalise them. A
token that leaves at a cut leaves with all of them, and each must come back as the right one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import fx

from simba_fx.graph.facts import MARKERS, Facts, opname, value, where
from simba_fx.graph.marks import Role, region, role

__all__ = ["match_residual"]

_GATHERED = (Role.CARRIED, Role.INVARIANT)


def match_residual(node: fx.Node, cuts: Sequence[Iterable[fx.Node]], beside: Sequence[fx.Node],
              facts: Facts) -> list[fx.Node] | None:  # fmt: skip
    """For each cut the gather of the value that `node` continues, or None where one of them is not certain.

    Args:
        node: a value `(B, L, ...)` that is read after the last block, or that the graph returns.
        cuts: for each cut before it, first to last, what reads the survivors' places.
        beside: all values that are read after the last block; empty if `node` is not one of them.

    Candidates at a cut are the gathers of the same sizes behind L.

    1. One value is read: it continues the only candidate that the block before the cut computed. 2. Several are read:
    each continues the only candidate that the same place of a block computed with the same operator. Where one value
    and one candidate are left over, they match too, and that place is known at the cuts before. 3. Where the block
    before the cut computed too few, candidates that it only passed on count as well, if one block takes them up for
    good (at the first cut, the sum so far is the embedding). 4. A value that the last block only passed on could be any
    of the candidates: there must be one, or one of its place.
    """
    sizes = value(node).shape[2:]
    group = [other for other in beside if value(other).shape[2:] == sizes] or [node]
    places = {_origin(other, facts): other for other in group}
    in_turn = len(places) < len(group) or (bool(beside) and region(_source(node)) < facts.n_blocks - 1)
    if len(places) < len(group):
        group, places = [node], {_origin(node, facts): node}
    found = []
    for users in reversed(cuts):
        alike = [user for user in users if role(user) in _GATHERED and value(user).shape[2:] == sizes]
        candidates = alike if in_turn else [gather for gather in alike if role(gather) is Role.CARRIED]
        if len(candidates) < len(group):
            candidates = [gather for gather in alike if role(gather) is Role.CARRIED or _taken_up(gather)]
        matches = {node: candidates[0]} if len(candidates) == len(group) == 1 else _matches(candidates, places, facts)
        if len(group) - len(matches) == 1:
            left = [gather for gather in candidates if gather not in matches.values()]
            unmatched = next(other for other in group if other not in matches)
            if len(left) == 1 and len(group) > 1 and places.setdefault(_origin(left[0], facts), unmatched) is unmatched:
                matches[unmatched] = left[0]
        if node not in matches:
            return None
        found.append(matches[node])
    return found[::-1]


def _matches(candidates: list[fx.Node], places: dict[Any, fx.Node], facts: Facts) -> dict[fx.Node, fx.Node]:
    """By value, the candidate whose place is known to be the value's, where there is only one."""
    of: dict[fx.Node, list[fx.Node]] = {}
    for gather in candidates:
        if (other := places.get(_origin(gather, facts))) is not None:
            of.setdefault(other, []).append(gather)
    return {other: gathers[0] for other, gathers in of.items() if len(gathers) == 1}


def _taken_up(gather: fx.Node) -> bool:
    """Whether one block reads it and no later one does: it lives on in what that block computes from it."""
    return len({region(user) for user in gather.users}) == 1


def _source(node: fx.Node) -> fx.Node:
    """The value that a gather (of a gather, …) gathers."""
    while role(node) in _GATHERED:
        source: Any = node.args[0]
        node = source
    return node


def _origin(node: fx.Node, facts: Facts) -> tuple[str, Any]:
    """Where inside its block a value is computed, and by which operator; gathers and markers are looked through."""
    while opname(node) in MARKERS or role(node) in _GATHERED:
        source: Any = node.args[0]
        node = source
    path, block = where(node), region(node)
    if 0 <= block < facts.n_blocks and f"{path}.".startswith(f"{facts.blocks[block]}."):
        path = path[len(facts.blocks[block]) :]
    return path, node.target
