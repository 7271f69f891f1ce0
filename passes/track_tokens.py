"""Pass `track-tokens`: the graph learns where each of its tokens stood in the input, and which are real."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from simba_fx.graph.facts import Facts, placeholder, value
from simba_fx.graph.marks import MARK, REGION, Insert, Mark, Role, tracked


@dataclass(frozen=True)
class TrackTokens:
    """Add the bookkeeping that selections read and write.

    Before: `def forward(inputs_embeds, attention_mask)`.
    After: `def forward(inputs_embeds, attention_mask, tail)` and, before the first block,

        rows = arange(batch).unsqueeze(1)                    # (B, 1) int64: x[rows, kept] picks tokens row by row
        positions = arange(length).expand(batch, length)     # (B, L) int64
        real = attention_mask != 0                           # (B, L) bool, only with a padding mask (== 0: of padding)
        lengths = real.sum(1)                                # (B,) int64, only with a padding mask

    With `trailing`, for a model that is given no mask: `def forward(inputs_embeds, tail, lengths)`, `lengths` `(B,)`
    int64, and `real = positions < lengths.unsqueeze(1)`. The model computes as if there were no padding; behind
    everything real, in a causal model, it changes nothing.
    """

    trailing: bool = False

    name = "track-tokens"

    def rewrite(self, graph: fx.Graph, facts: Facts) -> int:
        if tracked(graph, Role.TAIL) is not None:
            return 0
        last = [node for node in graph.nodes if node.op == "placeholder"][-1]
        with graph.inserting_after(last):
            tail = graph.placeholder("tail")
        tail.meta = {"val": 1, REGION: -1, MARK: Mark(self.name, Role.TAIL)}
        lead = value(primary := placeholder(graph, facts.primary))
        rows, columns = lead.shape[:2]
        last = tail
        if self.trailing and facts.mask is None:
            with graph.inserting_after(tail):
                last = graph.placeholder("lengths")
            val = lead.new_empty((rows,), dtype=torch.int64)
            last.meta = {"val": val, REGION: -1, MARK: Mark(self.name, Role.LENGTHS)}
        first = Insert(graph, last.next, -1, self.name)
        batch = first(torch.ops.aten.sym_size.int, primary, 0, val=rows, name="batch")
        length = first(torch.ops.aten.sym_size.int, primary, 1, val=columns, role=Role.LENGTH, name="input_length")
        insert = Insert(graph, length.next, -1, self.name)
        grid = lead.new_empty((rows, columns), dtype=torch.int64)
        kind = {"dtype": torch.int64, "device": lead.device}
        line = insert(torch.ops.aten.arange.default, batch, val=grid[:, 0], **kind)
        insert(torch.ops.aten.unsqueeze.default, line, 1, val=grid[:, :1], role=Role.ROWS, name="rows")
        line = insert(torch.ops.aten.arange.default, length, val=grid[0], **kind)
        placed = insert(
            torch.ops.aten.expand.default, line, [batch, length], val=grid, role=Role.POSITIONS, name="positions"
        )
        if facts.mask is not None:
            mask = placeholder(graph, facts.mask)
            marks = torch.ops.aten.ne.Scalar if facts.mask_marks == "real" else torch.ops.aten.eq.Scalar
            real = insert(marks, mask, 0, val=grid.to(torch.bool), role=Role.REAL, name="real")
            insert(torch.ops.aten.sum.dim_IntList, real, [1], val=grid[:, 0], role=Role.LENGTHS, name="lengths")
        elif self.trailing:
            column = insert(torch.ops.aten.unsqueeze.default, last, 1, val=grid[:, :1])
            insert(torch.ops.aten.lt.Tensor, placed, column, val=grid.to(torch.bool), role=Role.REAL, name="real")
        return 1
