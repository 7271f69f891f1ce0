"""Pass `protect-tokens`: the graph learns where the tokens stand that a caller named by position."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from simba_fx.graph.facts import Facts, value
from simba_fx.graph.marks import Insert, Role, tracked
from simba_fx.options import named_positions


@dataclass(frozen=True)
class ProtectTokens:
    """Add the positions that scores aim at and must not let go.

    Before: the bookkeeping of `track-tokens`. After, behind it and before the first block:

        query = row_positions(positions, real, [5])          # (B, 1) int64, with a `query` only
        protected = row_positions(positions, real, [5, 0])   # (B, n) int64: the query, and what `protect` names

    1. Positions count a row's real tokens, negative ones from its end. 2. `score-tokens` scores at the query and gives
    what is protected the score +inf. 3. Neither option: nothing to do.
    """

    query: int | None = None
    protect: tuple[int, ...] = ()

    name = "protect-tokens"

    def rewrite(self, graph: fx.Graph, facts: Facts) -> int:
        positions, real = tracked(graph, Role.POSITIONS), tracked(graph, Role.REAL)
        wanted = named_positions(self.query, self.protect)
        if not wanted or positions is None or tracked(graph, Role.PROTECTED) is not None:
            return 0
        known = (positions, real, tracked(graph, Role.LENGTHS))  # lengths may be an input, which comes first
        last = [node for node in graph.nodes if node in known][-1]
        insert = Insert(graph, last.next, -1, self.name)
        grid = value(positions)
        for role, columns in ((Role.QUERY, wanted[:1] if self.query is not None else []), (Role.PROTECTED, wanted)):
            if columns:
                val = grid.new_empty((grid.shape[0], len(columns)))
                target = torch.ops.simba_fx.row_positions.default
                insert(target, positions, real, columns, val=val, role=role, name=str(role))
        return 1
