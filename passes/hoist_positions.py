"""Pass `hoist-positions`: what a block computes from the length alone is computed once, of the whole input."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import Tensor, fx

from simba_fx.errors import GraphError
from simba_fx.graph.facts import (
    SAME_PLACES,
    SIMILAR,
    Facts,
    end_of,
    expression,
    is_even,
    is_size,
    operator_of,
    opname,
    placeholder,
    selects,
    shape_text,
    value,
    where,
)
from simba_fx.graph.marks import AUTOCAST, Insert, made_by, region

_BROADCAST = ("scaled_dot_product_attention", "masked_fill", "where", "cat", "stack", "type_as", "expand_as")
"""Beside pointwise operators, those whose operands meet dimension by dimension, counted from the last."""


@dataclass(frozen=True)
class HoistPositions:
    """Keep every token's place where it was in the input.

    Before, in block 3, which sees k tokens: `table = slice(pos, 1, 0, length); x = h + table`, and `arange(length)`.
    After: `table` is computed before the first block, of the input's length, and crosses cuts as every per-token value
    does, so that each survivor keeps its own row. Otherwise survivors would be numbered anew.

    1. What is moved depends on sizes, parameters, and the padding mask alone, has the length among its sizes or is
    computed from what has, and differs from place to place: `ones(length)` stays. 2. Equal computations become one.
    3. Where such a value meets tokens it is given as many dimensions as they have; over pairs of tokens, `(L, L)` or
    `(H, L, L)` becomes `(1, H, L, L)`. 4. Fails closed where it meets them otherwise than place by place (a matrix
    product, an index), and where it is written in place.
    """

    output: str = "full"

    name = "hoist-positions"

    def rewrite(self, graph: fx.Graph, facts: Facts) -> int:
        first = min(map(region, selects(graph)), default=facts.n_blocks)
        last = facts.n_blocks - (self.output == "full")
        free, placed = _positional(graph, facts)
        self._refuse_writes(graph, facts, free, first)
        inside = [node for node in placed if 0 <= region(node) <= last and first < last]
        hoist = _Hoist(Insert(graph, end_of(graph, -1), -1, self.name), facts)
        changed = 0
        for node in inside:
            node.replace_all_uses_with(hoist(node), delete_user_cb=lambda user: user not in free)
        for node in reversed(list(graph.nodes)):
            if node in free and not node.users and region(node) >= 0:
                graph.erase_node(node)
        free, _ = _positional(graph, facts)
        hoist.insert = Insert(graph, end_of(graph, -1), -1, self.name)  # the node that was there may be gone
        for node in [node for node in graph.nodes if region(node) == -1 and node.op == "call_function" and _own(node)]:
            for user in [user for user in node.users if first < region(user) <= last and user.op != "output"]:
                changed += _own(user) and self._meet(hoist, node, user, facts, node in free)
        return changed + len(inside)

    def _refuse_writes(self, graph: fx.Graph, facts: Facts, free: set[fx.Node], first: int) -> None:
        for node in graph.nodes:
            if region(node) <= first or not _is_write(node) or not free.issuperset(_tensors_read(node)):
                continue
            if _length_dims(_written(node), facts):
                raise GraphError(
                    f"Node {node.name} in {where(node)} writes into a tensor made from the length, after tokens have "
                    f"left; expected no {opname(node)} there, since places are those of the whole input. Write it "
                    "without the trailing underscore or the assignment, or keep the blocks before it whole."
                )

    def _meet(self, hoist: _Hoist, node: fx.Node, user: fx.Node, facts: Facts, free: bool) -> int:
        """Give `node` the dimensions of the tokens that it meets in `user`; 1 where that changed anything."""
        rank, val = _rank(user), value(node)
        if not free or not (dims := _length_dims(node, facts)):
            return 0
        ahead = 0 if rank is None else max(rank - val.dim(), 0)
        if ahead == 0 and _settled(node, facts):
            return 0
        places = tuple(dim + ahead for dim in dims)
        exact = all(expression(val.shape[dim]) == facts.sequence for dim in dims)
        lead = sympy.Integer(1) if ahead else expression(val.shape[0])
        catenated = opname(user) in ("cat", "stack")
        if rank != val.dim() + ahead or not exact or lead not in (1, facts.batch) or (catenated and ahead):
            raise self._refusal(node, user, facts)
        steps: list[Any] = [(torch.ops.aten.unsqueeze.default, 0)] * ahead
        back: tuple[Any, ...] | None = None
        if len(places) == 1 and places[0] > 1:
            steps.append((torch.ops.aten.transpose.int, 1, places[0]))
            back = (torch.ops.aten.transpose.int, 1, places[0])
        elif places == (1, 2) and rank == 3:
            steps.append((torch.ops.aten.unsqueeze.default, 1))
            back = (torch.ops.aten.squeeze.dim, 1)
        elif places != (1,) and (places, rank) != ((2, 3), 4):
            raise self._refusal(node, user, facts)
        given = node
        for target, *args in steps:
            given = hoist.once(target, (given, *args), {}, node)
        if back is not None:
            insert = Insert(hoist.insert.graph, user, region(user), self.name)
            given = insert(back[0], given, *back[1:], val=back[0](value(given), *back[1:]), like=user)
        user.replace_input_with(node, given)
        return 1

    @staticmethod
    def _refusal(node: fx.Node, user: fx.Node, facts: Facts) -> GraphError:
        return GraphError(
            f"Node {user.name} in {where(user)} reads {node.name} {shape_text(value(node), facts)}, which is computed "
            "from the length alone, after tokens have left; expected it to meet (B, L, ...) tokens place by place, or "
            f"(B, H, L, L) pairs, found {opname(user)}. Compute it outside of the model and pass it as an argument "
            "(B, L, ...), or keep the blocks before it whole (give them the same share)."
        )


def _own(node: fx.Node) -> bool:
    """Whether the node is the model's, or this pass's copy of one; not the bookkeeping of other passes."""
    return made_by(node) in (None, HoistPositions.name)


def _rank(user: fx.Node) -> int | None:
    """The dimensions that operands of `user` meet in, where they meet dimension by dimension."""
    target = operator_of(user)
    pointwise = torch.Tag.pointwise in getattr(target, "tags", ())
    val = value(user)
    if not (pointwise or opname(user) in _BROADCAST) or not isinstance(val, Tensor):
        return None
    return val.dim() - (opname(user) == "stack")


def _length_dims(node: fx.Node, facts: Facts) -> tuple[int, ...]:
    """The dimensions of a tensor (of the first of several) whose size is computed from the length."""
    sizes = next(_tensors(node), torch.empty(())).shape
    return tuple(dim for dim, size in enumerate(sizes) if facts.sequence in expression(size).free_symbols)


def _tensors(node: fx.Node) -> Iterator[Tensor]:
    val = value(node)
    return (leaf for leaf in (val if isinstance(val, tuple | list) else [val]) if isinstance(leaf, Tensor))


def _tensors_read(node: fx.Node) -> list[fx.Node]:
    return [read for read in node.all_input_nodes if not is_size(read)]


def _is_drawn(node: fx.Node) -> bool:
    """Noise, which is no place: survivors get some of their own."""
    return torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())


def _is_write(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is not None and schema.is_mutable and operator_of(node).namespace == "aten"


def _written(write: fx.Node) -> fx.Node:
    """The tensor that a write changes, behind its views."""
    written: Any = write.args[0]
    while _is_view(written):
        written = written.args[0]
    return written  # type: ignore[no-any-return]


def _is_view(node: fx.Node) -> bool:
    return opname(node) in (*SAME_PLACES, "slice", "select")


def _settled(node: fx.Node, facts: Facts) -> bool:
    """Whether every row has tokens, or pairs of them, where `gather-survivors` looks for them."""
    val, dims = value(node), _length_dims(node, facts)
    exact = isinstance(val, Tensor) and all(expression(val.shape[dim]) == facts.sequence for dim in dims)
    rows = exact and val.dim() > 1 and expression(val.shape[0]) in (1, facts.batch)
    return rows and (dims == (1,) or (dims == (2, 3) and val.dim() == 4))


def _positional(graph: fx.Graph, facts: Facts) -> tuple[set[fx.Node], list[fx.Node]]:
    """What is computed from no token, but from sizes, parameters, fixed tables among the inputs and the padding mask;
    and, in the graph's order, what of it a block computes that differs from place to place.

    What stood ready before the first block, row by row, is a per-token value like any other: what blocks compute from
    it is computed from survivors. A size that counts the tokens of all rows (`B * L`, of experts) is no place. Room
    that is made empty and then written to from tokens holds tokens, and so does noise (`_is_drawn`).
    """
    writes, room = [node for node in graph.nodes if _is_write(node)], set[fx.Node]()
    while True:
        free, placed = _computed_from_places(graph, facts, room)
        filled = {_written(node) for node in writes if _is_drawn(node) or not free.issuperset(_tensors_read(node))}
        if filled <= room:
            return free, placed
        room |= filled


def _computed_from_places(graph: fx.Graph, facts: Facts, room: set[fx.Node]) -> tuple[set[fx.Node], list[fx.Node]]:
    """The same, where tokens are written to `room`."""
    free: set[fx.Node] = set()
    placed: dict[fx.Node, None] = {}
    mask = None if facts.mask is None else placeholder(graph, facts.mask)
    ready: set[fx.Node] = set()
    for node in graph.nodes:
        read = _tensors_read(node)
        if node.op in ("placeholder", "get_attr"):
            if node.op == "get_attr" or node is mask or _is_fixed(node):
                free.add(node)
            continue
        made = node.op == "call_function" and next(_tensors(node), None) is not None and _own(node)
        holds_tokens = node in room or _is_write(node) or _is_drawn(node)
        if not made or holds_tokens or not (opname(node) in SIMILAR or free.issuperset(read)):
            continue
        free.add(node)
        if region(node) < 0:
            ready |= {node} if _settled(node, facts) else set()
            continue
        if ready.intersection(read):
            free.discard(node)
            continue
        uneven = not is_even(node) and any(_is_place(n, facts) for n in (node, *read))
        outside = (n for n in read if n.op == "call_function" and region(n) < 0)
        if uneven or not placed.keys().isdisjoint(read) or any(_is_place(n, facts) for n in outside):
            placed[node] = None
    return free, list(placed)


def _is_fixed(node: fx.Node) -> bool:
    sizes = [expression(size) for tensor in _tensors(node) for size in tensor.shape]
    return bool(sizes) and not any(size.free_symbols for size in sizes)


def _is_place(node: fx.Node, facts: Facts) -> bool:
    sizes = (expression(size).free_symbols for tensor in _tensors(node) for size in tensor.shape)
    return any(facts.sequence in symbols and facts.batch not in symbols for symbols in sizes)


class _Hoist:
    """Repeats nodes before the first block, each distinct one once."""

    def __init__(self, insert: Insert, facts: Facts) -> None:
        self.insert, self.facts = insert, facts
        self.known: dict[Any, fx.Node] = {}

    def __call__(self, node: fx.Node) -> fx.Node:
        if node.op != "call_function" or region(node) == -1:
            return node
        if opname(node) in SIMILAR and any(isinstance(value(n), Tensor) for n in node.all_input_nodes):
            return self._filled(node)
        given: Any = (node.args, node.kwargs)
        args, kwargs = fx.node.map_arg(given, self)
        return self.once(node.target, args, kwargs, node, val=value(node))

    def once(self, target: Any, args: Any, kwargs: Any, like: fx.Node, val: Any = None) -> fx.Node:
        key = (target, repr(args), repr(kwargs), like.meta.get(AUTOCAST))
        if key not in self.known:
            if val is None:
                found: Any = fx.node.map_arg(args, value)
                val = target(*found)
            self.known[key] = self.insert(target, *args, val=val, like=like, **kwargs)
        return self.known[key]

    def _filled(self, node: fx.Node) -> fx.Node:
        """`ones_like(x)` and its kind, of the input's sizes: `x` is a block's."""
        number: Any = SIMILAR[opname(node)]
        if number is None and opname(node) in ("full_like", "new_full"):
            number = node.args[-1]
        if number is None or isinstance(number, fx.Node):
            raise GraphError(
                f"Node {node.name} in {where(node)} takes its shape from tokens, and positions are computed from it; "
                "expected torch.full, torch.ones or torch.zeros there. Write that, with the sizes of its argument."
            )
        val = value(node)
        sizes = [self._size(size, node) for size in val.shape]
        return self.once(torch.ops.aten.full.default, (sizes, number), {"dtype": val.dtype, "device": val.device}, node,
                         val=val)  # fmt: skip

    def _size(self, size: Any, node: fx.Node) -> Any:
        symbols = {self.facts.batch: 0, self.facts.sequence: 1}
        if not expression(size).free_symbols:
            return int(size)
        if (dim := symbols.get(expression(size))) is None:
            raise GraphError(
                f"Node {node.name} in {where(node)} has shape {shape_text(value(node), self.facts)}, and positions are "
                "computed from it; expected sizes B, L and numbers. Write torch.arange there."
            )
        lead = placeholder(self.insert.graph, self.facts.primary)
        return self.once(torch.ops.aten.sym_size.int, (lead, dim), {}, node, val=size)
