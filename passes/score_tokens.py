"""Pass `score-tokens`: at the end of each block after which tokens leave, every token gets a score."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from simba_fx import ops
from simba_fx.errors import CriterionError
from simba_fx.graph.facts import Facts, by_region, operator_of, scans_by_block, value
from simba_fx.graph.marks import Insert, Role, bookkeeping, give_role, region, role
from simba_fx.graph.plan import Cut
from simba_fx.graph.token_order import check_cuts, directions_to, scan_directions, ways
from simba_fx.ops.recurrences import recurrence_of

Books = dict[Role, fx.Node]
_READ_BY_POSITION = (Role.POSITIONS, Role.REAL, Role.LENGTHS, Role.LENGTH, Role.TAIL)


@dataclass(frozen=True)
class ScoreTokens:
    """Insert one score per cut, `(B, k)` float32, higher = keep (method.md section 2).

    Before: `y, state = selective_scan(u, delta, A, B, C, D, z, delta_bias, True)`.
    After, at the block's end: `score_3 = selective_token_score(u, delta, A, B, C, delta_bias, True, real, tail,
    'simba')`.

    1. One scan in the block: its score. 2. Several: the maximum over them. 3. A criterion that looks at positions
    only ("recent", "random", "stride") reads no scan. 4. A user's criterion is the graph's submodule `criterion`.
    5. A scan that runs against the input's order is scored at its own end, the row's first real token, and its scores
    are flipped back. 6. With a `query` position every scan is scored there; a token is scored by the scans that carry
    it to the query: forward ones before it, reversed ones behind it. 7. Protected tokens get +inf. 8. With a
    `span`, each scan's scores are pooled over so many neighbours. 9. Of several
    criteria, `"simba-l2+write"`, a token has its best rank among the scores of a scan; those that the scan's recurrence
    lacks are left out.
    """

    cuts: tuple[Cut, ...]
    criterion: str = "simba"
    floor: int = 4
    seed: int = 0
    span: int = 1

    name = "score-tokens"

    def rewrite(self, graph: fx.Graph, facts: Facts) -> int:
        scored = {region(node) for node in graph.nodes if role(node) is Role.SCORE}
        cuts = [cut for cut in self.cuts if cut.block not in scored]
        if not cuts:
            return 0
        found = ways(graph, facts)
        reads_scans = self.criterion not in ops.POSITION_CRITERIA
        directions = scan_directions(graph, facts, [c.block for c in cuts], found) if reads_scans else {}
        check_cuts(graph, facts, cuts, found)
        books = bookkeeping(graph)
        positions, protected = books[Role.POSITIONS], books.get(Role.PROTECTED)
        val = value(positions).new_empty(value(positions).shape, dtype=torch.float32)
        vals = val, val.bool()
        blocks, scans_in = by_region(graph), scans_by_block(graph, facts.n_blocks)
        for cut in cuts:
            insert = Insert(graph, blocks[cut.block][-1].next, cut.block, self.name)
            scans = scans_in[cut.block]
            if reads_scans:
                score = self._by_scans(insert, books, {scan: directions[scan] for scan in scans}, *vals)
            else:
                score = self._by_position(insert, books, cut, scans[0], val)
            if protected is not None:
                score.name = f"unprotected_{cut.block}"
                score = insert(torch.ops.simba_fx.protect_tokens.default, score, positions, protected, val=val)
            give_role(score, Role.SCORE)
            score.name = f"score_{cut.block}"
        return len(cuts)

    def _by_position(self, insert: Insert, books: Books, cut: Cut, like: fx.Node, val: Any) -> fx.Node:
        rule = [cut.share.numerator, cut.share.denominator, self.floor]
        target = torch.ops.simba_fx.position_score.default
        return insert(target, *map(books.get, _READ_BY_POSITION), *rule, self.criterion, self.seed, val=val, like=like)

    def _by_scans(self, insert: Insert, books: Books, scans: dict[fx.Node, bool], val: Any, grid: Any) -> fx.Node:
        """The largest score over the scans; with a query, over those that carry a token there."""
        sides, before = {}, None
        if (query := books.get(Role.QUERY)) is not None:
            wanted: Any = query.args[2]
            scans = {scan: way for scan, way in scans.items() if way in directions_to(wanted[0])}
            if False in scans.values():
                before = insert(torch.ops.aten.le.Tensor, books[Role.POSITIONS], query, val=grid)
        for backward in dict.fromkeys(scans.values()):
            window, tail = self._aim(insert, books, before, backward, grid)
            scores = [self._score(insert, scan, window, tail, val) for scan, way in scans.items() if way == backward]
            sides[backward] = functools.reduce(lambda a, b: insert(_MAXIMUM, a, b, val=val), scores)
            if backward:
                sides[True] = insert(torch.ops.aten.flip.default, sides[True], [1], val=val)
        if len(sides) == 1:
            return next(iter(sides.values()))
        if before is None:
            return insert(_MAXIMUM, *sides.values(), val=val)
        return insert(torch.ops.aten.where.self, before, sides[False], sides[True], val=val)

    def _aim(self, insert: Insert, books: Books, before: fx.Node | None, backward: bool, grid: Any) -> tuple[Any, Any]:
        """`real` and `tail` of a score, in the scan's own direction: they say at which token it is taken."""
        real: Any = books.get(Role.REAL)
        tail: Any = books[Role.TAIL]
        if (query := books.get(Role.QUERY)) is not None:  # the last of the tokens that the scan has met by then
            tail, met = 1, before
            if backward:
                met = insert(torch.ops.aten.ge.Tensor, books[Role.POSITIONS], query, val=grid)
            real = met if real is None else insert(torch.ops.aten.bitwise_and.Tensor, met, real, val=grid)
        if backward:  # without a query a reversed scan ends at the row's first token: no tail
            tail = 1
            real = None if real is None else insert(torch.ops.aten.flip.default, real, [1], val=grid)
        return real, tail

    def _score(self, insert: Insert, scan: fx.Node, real: fx.Node | None, tail: Any, val: Any) -> fx.Node:
        """The pooled score of a scan; of several criteria the best rank."""
        criteria, scores = self.criterion.split("+"), []
        had = [name for name in criteria if name == "custom" or name in recurrence_of(scan.target).criteria]
        for criterion in had or criteria:
            score = self._by_criterion(criterion, insert, scan, real, tail, val)
            if self.span > 1:
                score = insert(torch.ops.simba_fx.pool_scores.default, score, real, tail, self.span, val=val)
            if len(criteria) > 1:
                score = insert(torch.ops.simba_fx.rank_scores.default, score, real, tail, val=val)
            scores.append(score)
        return functools.reduce(lambda a, b: insert(_MAXIMUM, a, b, val=val), scores)

    def _by_criterion(
        self, criterion: str, insert: Insert, scan: fx.Node, real: fx.Node | None, tail: Any, val: Any
    ) -> fx.Node:
        if criterion == "custom":
            args = (str(operator_of(scan)._opname), list(scan.args), real, tail)
            return insert("criterion", *args, val=val, like=scan, op="call_module")
        recurrence = recurrence_of(scan.target)
        if criterion not in recurrence.criteria:
            raise CriterionError(
                f"Criterion {criterion!r} is not one that a {recurrence.title} can be scored by; "
                f"expected one of {', '.join(recurrence.criteria)}, one by position, or a function of your own. Pass "
                "one of those as criterion."
            )
        named = recurrence.named(scan.args, scan.kwargs)
        operands = [named[name] for name in recurrence.scored]
        return insert(recurrence.score, *operands, real, tail, criterion, val=val, like=scan)


_MAXIMUM = torch.ops.aten.maximum.default
