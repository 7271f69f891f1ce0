"""Pass `score-tokens`: at the end of each block after which tokens leave, every token gets a score."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from simba_fx import ops
from simba_fx.graphs import Facts, Insert, end_of, nodes_of, operator_of, scans_of, tracked, value
from simba_fx.plan import Cut

_SCORES = {
    torch.ops.simba_fx.selective_scan.default: torch.ops.simba_fx.selective_token_score.default,
    torch.ops.simba_fx.ssd_scan.default: torch.ops.simba_fx.ssd_token_score.default,
}
_SKIPPED = ("D", "z", "chunk_size")  # operands that the score of a token does not read


@dataclass(frozen=True)
class ScoreTokens:
    """Insert one score per cut, `(B, k)` float32, higher = keep (method.md section 2).

    Before: `y, state = selective_scan(u, delta, A, B, C, D, z, delta_bias, True)`.
    After, at the block's end: `score_3 = selective_token_score(u, delta, A, B, C, delta_bias, True, real, tail,
    'simba')`.

    1. One scan in the block: its score. 2. Several: the maximum over them. 3. A criterion that looks at positions
    only ("recent", "random", "stride") reads no scan. 4. A user's criterion is the graph's submodule `criterion`.
    """

    cuts: tuple[Cut, ...]
    criterion: str = "simba"
    floor: int = 4
    seed: int = 0

    name = "score-tokens"

    def rewrite(self, graph: fx.Graph, facts: Facts) -> int:
        changed = 0
        for cut in self.cuts:
            if any(node.meta.get("simba_fx", {}).get("role") == "score" for node in nodes_of(graph, cut.block)):
                continue
            insert = Insert(graph, end_of(graph, cut.block), cut.block, self.name)
            scans = scans_of(graph, cut.block)
            positions: Any = tracked(graph, "positions")
            real = tracked(graph, "real")
            val = value(positions).new_empty(value(positions).shape, dtype=torch.float32)
            if self.criterion in ops.POSITION_CRITERIA:
                bookkeeping = [positions, real, tracked(graph, "lengths"), tracked(graph, "length")]
                rule = [tracked(graph, "tail"), cut.share.numerator, cut.share.denominator, self.floor]
                target = torch.ops.simba_fx.position_score.default
                arguments = [*bookkeeping, *rule, self.criterion, self.seed]
                insert(target, *arguments, val=val, role="score", name=f"score_{cut.block}", like=scans[0])
                changed += 1
                continue
            score = None
            for scan in scans:
                one = self._score(insert, scan, real, tracked(graph, "tail"), val)
                score = one if score is None else insert(torch.ops.aten.maximum.default, score, one, val=val)
            assert score is not None  # the plan cuts only behind blocks that have a scan
            score.meta["simba_fx"]["role"] = "score"
            score.name = f"score_{cut.block}"
            changed += 1
        return changed

    def _score(self, insert: Insert, scan: fx.Node, real: fx.Node | None, tail: fx.Node | None, val: Any) -> fx.Node:
        if self.criterion not in ops.CRITERIA:
            args = (str(operator_of(scan)._opname), list(scan.args), real, tail)
            return insert("criterion", *args, val=val, like=scan, op="call_module")
        names = [argument.name for argument in operator_of(scan)._schema.arguments]
        operands = [value for name, value in zip(names, _all_arguments(scan)) if name not in _SKIPPED]
        return insert(_SCORES[operator_of(scan)], *operands, real, tail, self.criterion, val=val, like=scan)


def _all_arguments(node: fx.Node) -> list[Any]:
    """The arguments of an operator call in schema order, defaults filled in."""
    arguments = operator_of(node)._schema.arguments
    given = dict(zip((a.name for a in arguments), node.args)) | node.kwargs
    return [given.get(a.name, a.default_value) for a in arguments]
