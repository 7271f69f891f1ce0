"""Pass `gather-survivors`: cut the sequence. After a selection, only survivors are seen by the blocks that follow."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from simba_fx.errors import GraphError
from simba_fx.graph.facts import (
    Facts,
    depends_on_length,
    end_of,
    expression,
    from_mask_alone,
    is_even,
    is_size,
    output_of,
    placeholder,
    selects,
    sequence_dims,
    shape_text,
    stem,
    value,
    where,
)
from simba_fx.graph.marks import Insert, Role, bookkeeping, made_by, region, role, tracked

_BOOKKEEPING = (Role.POSITIONS, Role.REAL)
_GATHERED = (Role.CARRIED, Role.INVARIANT, Role.PLACE)


@dataclass(frozen=True)
class GatherSurvivors:
    """Rewire every value alive across a cut to its survivors, and every length to the new one.

    Before: `h = block_3(...); kept_3 = select_tokens(score_3, ...); o = block_4(h, mask, length)`.
    After, at the start of block 4:

        survivors = h[rows, kept_3]             # (B, k, D); one gather for every live tensor with a length
        mask_4 = where(real_3, mask[kept_3], 0)  # pads stay pads; ~mask and its kind are made anew
        square_4 = take_square(mask_of_pairs, positions_3, real_3)  # (B, 1, L, L): only where a block reads it
        length_4 = kept_3.size(1)                # and size arithmetic that starts from it

    1. Parameters and cache states have no sequence dimension: untouched. 2. The graph's own outputs are left alone:
    each layer caches what it saw. 3. What comes after the last block sees the input's length again (`restore-length`)
    unless `output="kept"`. 4. A table `(1, L, ...)` that all rows share is expanded to the rows first. Fails closed on
    a live size computed from the length but not equal to it.
    """

    output: str = "full"

    name = "gather-survivors"

    def rewrite(self, graph: fx.Graph, facts: Facts) -> int:
        last = facts.n_blocks - (self.output == "full")
        from_mask = from_mask_alone(graph, facts)
        masks = [placeholder(graph, facts.mask)] if facts.mask is not None else []  # as each cut leaves it
        cuts, changed = selects(graph), 0
        live: list[fx.Node] = []
        rows = bookkeeping(graph).get(Role.ROWS)
        at, end = next(iter(graph.nodes)), output_of(graph)  # the walk of the graph, which each cut takes to its end
        for select, until in zip(cuts, [*map(region, cuts[1:]), facts.n_blocks]):
            while at is not end and region(at) <= region(select):
                live.append(at)
                at = at.next
            before = at.prev
            insert = Insert(graph, at, region(select) + 1, self.name)
            done, live = self._cut(insert, facts, select, until, last, live, from_mask, masks, rows)
            at, changed = before.next, changed + done
        return changed

    def _cut(self, insert: Insert, facts: Facts, select: fx.Node, until: int, last: int, alive: list[fx.Node],
             from_mask: set[fx.Node], masks: list[fx.Node], rows: Any) -> tuple[int, list[fx.Node]]:  # fmt: skip
        """Whether anything was changed, and which nodes are alive behind the cut, of those that were before."""
        results = {node.args[1]: node for node in select.users}
        kept: fx.Node = results[0]
        renamed: dict[Role, Any] = {Role.POSITIONS: results[2], Role.REAL: results.get(4)}
        if any(made_by(user) == self.name for user in kept.users):
            return 0, alive
        block = region(select)

        def beyond(user: fx.Node) -> bool:
            return block < region(user) <= last and user.op != "output"

        live = [node for node in alive if any(map(beyond, node.users))]
        shorter = self._shorter(facts, insert, kept)
        fresh: dict[fx.Node, fx.Node] = {}

        def anew(node: fx.Node) -> fx.Node:
            """The mask, or what is computed from it place by place, of the tokens that are left."""
            if is_size(node):
                return shorter(node)
            if node not in fresh and node is masks[-1]:
                fresh[node] = self._gather(insert, node, (1,), (rows, kept), False, facts)
                fresh[node] = self._blank_pads(insert, fresh[node], (1,), renamed[Role.REAL], facts)
            elif node not in fresh:
                given: Any = (node.args, node.kwargs)
                args, kwargs = fx.node.map_arg(given, anew)
                fresh[node] = insert(node.target, *args, val=value(node), role=Role.INVARIANT, like=node, **kwargs)
            return fresh[node]

        for node in live:
            what = role(node)
            if node.op == "get_attr" or node in results.values() or what is Role.ROWS:
                continue
            if what in _BOOKKEEPING:
                node.replace_all_uses_with(renamed[what], delete_user_cb=beyond)
                continue
            if not (dims := sequence_dims(node, facts)):
                continue
            if dims == (2, 3) and value(node).dim() == 4:
                self._take_square(insert, node, results, until, facts)
                continue
            if masks and _place_by_place(node, masks[-1]):
                node.replace_all_uses_with(anew(node), delete_user_cb=lambda u: beyond(u) and not _inserted_now(u))
                continue
            carried = region(node) == block and what not in _GATHERED and node not in from_mask
            gathered = self._gather(insert, node, dims, (rows, kept), carried, facts)
            if node in from_mask and renamed[Role.REAL] is not None:
                gathered = self._blank_pads(insert, gathered, dims, renamed[Role.REAL], facts)
                from_mask.add(gathered)
            node.replace_all_uses_with(gathered, delete_user_cb=lambda user: beyond(user) and not _inserted_now(user))
        for node in live:
            if depends_on_length(node, facts):
                for user in [user for user in node.users if beyond(user) and not _counts_from_input(user)]:
                    user.replace_input_with(node, shorter(node))
        if masks and masks[-1] in fresh:
            masks.append(fresh[masks[-1]])
        from_mask.update(fresh.values())
        return 1, list(dict.fromkeys((*live, *results.values())))

    def _gather(self, insert: Insert, node: fx.Node, dims: tuple[int, ...], at: tuple[Any, fx.Node], carried: bool,
                facts: Facts) -> fx.Node:  # fmt: skip
        val, place, (rows, kept) = value(node), _is_place(node, facts), at
        shared = dims == (1,) and expression(val.shape[0]) == 1 != expression(value(kept).shape[0])
        if shared:  # a table for all rows: each takes places of its own
            early = Insert(insert.graph, end_of(insert.graph, region(node)), region(node), self.name)
            lead = placeholder(insert.graph, facts.primary)
            count = early(torch.ops.aten.sym_size.int, lead, 0, val=value(kept).shape[0])
            val = val.expand(value(kept).shape[0], *val.shape[1:])
            sizes = [count, *[-1] * (val.dim() - 1)]
            node = early(torch.ops.aten.expand.default, node, sizes, val=val, role=Role.INVARIANT, like=node)
        if dims != (1,) or val.shape[0] != value(kept).shape[0]:
            raise GraphError(
                f"Node {node.name} in {where(node)} has shape {shape_text(val, facts)} and crosses a cut; expected "
                f"(B, L, ...) with L in dimension 1 alone, or (B, H, L, L), found it in {dims}. This layout cannot be "
                "gathered; keep the blocks around it whole (give them the same share)."
            )
        what = Role.PLACE if place else Role.CARRIED if carried else Role.INVARIANT
        if val.dim() == 2:
            return insert(torch.ops.aten.gather.default, node, 1, kept, val=val, role=what, like=node)
        name = f"{'survivors' if carried else stem(node.name)}_{insert.region}"
        return insert(torch.ops.aten.index.Tensor, node, [rows, kept], val=val, role=what, like=node, name=name)

    def _take_square(self, insert: Insert, node: fx.Node, results: dict[Any, fx.Node], until: int,
                     facts: Facts) -> None:  # fmt: skip
        """A mask over pairs of tokens, taken from the input's up to the next cut, and only where it is read."""
        readers = [user for user in node.users if insert.region <= region(user) <= until and user.op != "output"]
        if region(node) != -1:
            raise GraphError(
                f"Node {node.name} in {where(node)} has shape {shape_text(value(node), facts)} and crosses a cut; "
                "expected a mask over pairs of tokens to be made before the first block, found it made in a block. "
                "Keep that block whole (give the next block the same share)."
            )
        if not readers:
            return
        name = f"square_{insert.region}"
        hides_pads = facts.mask in _inputs_read(node)  # what is computed from places alone has no pad to hide
        real = results.get(4) if hides_pads else None
        taken = insert(torch.ops.simba_fx.take_square.default, node, results[2], real, val=value(node),
                       role=Role.SQUARE, like=node, name=name)  # fmt: skip
        for user in readers:
            user.replace_input_with(node, taken)

    def _blank_pads(self, insert: Insert, gathered: fx.Node, dims: tuple[int, ...], real: fx.Node,
                       facts: Facts) -> fx.Node:  # fmt: skip
        val, name = value(gathered), f"mask_{insert.region}"
        if facts.mask_marks == "padding" and val.dim() == 2:
            padded = self._padded(insert.graph, facts)
            return insert(torch.ops.aten.where.self, real, gathered, padded, val=val, role=Role.INVARIANT,
                          like=gathered, name=name)  # fmt: skip
        for _ in range(val.dim() - 2):
            real = insert(torch.ops.aten.unsqueeze.default, real, -1, val=value(real)[..., None])
        nothing = False if val.dtype == torch.bool else 0  # a number would make integers of truth values
        return insert(torch.ops.aten.where.ScalarOther, real, gathered, nothing, val=val, role=Role.INVARIANT,
                      like=gathered, name=name)  # fmt: skip

    def _padded(self, graph: fx.Graph, facts: Facts) -> fx.Node:
        """What the mask says of padding, `(B, 1)`: its value at the first pad of each row. A row without one has no
        pads among its survivors either."""
        if (known := tracked(graph, Role.PADDED)) is not None:
            return known
        mask = placeholder(graph, str(facts.mask))
        real: Any = tracked(graph, Role.REAL)
        insert = Insert(graph, end_of(graph, -1), -1, self.name)
        numbers = insert(torch.ops.aten.to.dtype, real, torch.int64, val=value(real).long())
        first = insert(torch.ops.aten.argmin.default, numbers, 1, True, val=value(numbers)[:, :1])
        return insert(torch.ops.aten.gather.default, mask, 1, first, val=value(mask)[:, :1], role=Role.PADDED)

    def _shorter(self, facts: Facts, insert: Insert, kept: fx.Node) -> Callable[[fx.Node], fx.Node]:
        """Size arithmetic that is used beyond the cut starts from the new length. Selections count from the input's."""
        clones: dict[fx.Node, fx.Node] = {}

        def shorter(node: fx.Node) -> fx.Node:
            if not depends_on_length(node, facts):
                return node
            if node not in clones and node.target is torch.ops.aten.sym_size.int:
                clones[node] = insert(torch.ops.aten.sym_size.int, kept, 1, val=value(node))
            elif node not in clones:
                given: Any = (node.args, node.kwargs)
                args, kwargs = torch.fx.node.map_arg(given, shorter)
                clones[node] = insert(node.target, *args, val=value(node), like=node, **kwargs)
            return clones[node]

        return shorter


def _place_by_place(node: fx.Node, mask: fx.Node) -> bool:
    """Whether a node is the padding mask, or computed from it alone by operators that do the same at every place."""
    read = [n for n in node.all_input_nodes if not is_size(n)]
    even = node.op == "call_function" and role(node) is not Role.REAL and is_even(node)
    return node is mask or (even and bool(read) and all(_place_by_place(n, mask) for n in read))


def _inputs_read(node: fx.Node) -> set[str]:
    """The graph's inputs that a node is computed from, other than by their sizes."""
    seen, ahead = set[fx.Node](), [node]
    while ahead:
        if (one := ahead.pop()) not in seen:
            seen.add(one)
            ahead += [read for read in one.all_input_nodes if not is_size(read)]
    return {one.name for one in seen if one.op == "placeholder"}


def _is_place(node: fx.Node, facts: Facts) -> bool:
    """Whether a value, or what it is gathered from, depends on no token: the place of a token, not what it carries."""
    if role(node) is Role.PLACE:
        return True
    if region(node) != -1:
        return False
    tokens = (name for name in _inputs_read(node) if sequence_dims(placeholder(node.graph, name), facts))
    return not set(tokens) - {facts.mask}


def _inserted_now(user: fx.Node) -> bool:
    return made_by(user) == GatherSurvivors.name


def _counts_from_input(user: fx.Node) -> bool:
    """Selections and scores by position count from the input's length, whatever the length of their region."""
    return made_by(user) in ("select-tokens", "score-tokens", GatherSurvivors.name)
