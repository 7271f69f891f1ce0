"""Pass `select-tokens`: behind each score, the choice of the tokens that stay."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from simba_fx.graph.facts import Facts, by_region, output_of, returned, selects, value
from simba_fx.graph.marks import Insert, Role, bookkeeping, role
from simba_fx.graph.plan import Cut

OUTPUTS = (Role.KEPT, Role.DROPPED, Role.POSITIONS, Role.LEFT, Role.REAL)
"""Names of a selection's results: region indices that stay and go, then their positions in the input, then realness."""


@dataclass(frozen=True)
class SelectTokens:
    """Insert one selection per score.

    Before: `score_3 = selective_token_score(...)`.
    After: `kept_3, dropped_3, positions_3, left_3 = select_tokens(score_3, positions, length, tail, 7, 10, 4)`, with
    `real_3` as a fifth result where rows may be padded. The count is a function of `length` alone (method.md
    section 4), the results' shapes of shapes alone. The graph also returns every `positions_i` (and `real_i`).
    """

    cuts: tuple[Cut, ...]
    floor: int = 4

    name = "select-tokens"

    def rewrite(self, graph: fx.Graph, facts: Facts) -> int:
        changed = 0
        done, blocks, books = {node.args[0] for node in selects(graph)}, by_region(graph), bookkeeping(graph)
        for cut in self.cuts:
            inside = blocks[cut.block]
            score = next(n for n in reversed(inside) if role(n) is Role.SCORE)
            if score in done:
                continue
            insert = Insert(graph, inside[-1].next, cut.block, self.name)
            positions, real, lengths = books[Role.POSITIONS], books.get(Role.REAL), books.get(Role.LENGTHS)
            rule = (books[Role.LENGTH], books[Role.TAIL])
            share = (cut.share.numerator, cut.share.denominator, self.floor)
            grid = value(positions)
            vals: tuple[Any, ...] = (grid, grid, grid, grid)
            arguments: tuple[Any, ...] = (score, positions)
            target = torch.ops.simba_fx.select_tokens.default
            if real is not None:
                target, arguments = torch.ops.simba_fx.select_real_tokens.default, (score, positions, real, lengths)
                vals = (*vals, value(real))
            arguments = (*arguments, *rule, *share)
            chosen = insert(target, *arguments, val=vals, role=Role.SELECT, like=score, name=f"chosen_{cut.block}")
            for index, (what, val) in enumerate(zip(OUTPUTS, vals)):
                result = insert(operator.getitem, chosen, index, val=val, role=what, name=f"{what}_{cut.block}")
                if what in (Role.POSITIONS, Role.REAL):
                    output = output_of(graph)
                    output.args = ((*returned(graph), result),)
            changed += 1
        return changed
