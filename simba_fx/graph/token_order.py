"""Which way a scan runs along the sequence, and whether tokens keep their places on the way to it.

A graph has one order of tokens: that of its input, in which survivors are gathered. A block may turn the sequence
around (`flip` along it), scan, and turn it back; the scores of such a scan come out in turned slots. So every value
that has the length among its sizes is one of

    forward     in the input's order
    reversed    turned around an odd number of times
    mixed       computed from both: its slot t holds of token t as well as of token L - 1 - t
    shuffled    its tokens were moved by anything else than `flip`: indexing, `roll`, sorting, slices put together anew

Values that hold no token (parameters, tables made from the length alone) are none of these and go along with any. A
product with a permutation matrix looks like attention and is not found. Nothing here changes a graph but
`settle_flips`, which moves nodes of the outer forward over the border between two blocks.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from simba_fx.errors import GraphError
from simba_fx.graph.facts import (
    MARKERS,
    Facts,
    end_of,
    expression,
    is_size,
    operator_of,
    output_of,
    returned,
    scans_by_block,
    value,
    where,
)
from simba_fx.graph.marks import REGION, region
from simba_fx.graph.plan import Cut

__all__ = ["TokenOrder", "check_cuts", "directions_to", "reaches_all", "scan_directions", "settle_flips", "ways"]

FORWARD, REVERSED, MIXED, SHUFFLED = "forward", "reversed", "mixed", "shuffled"
_TURNED = {FORWARD: REVERSED, REVERSED: FORWARD, MIXED: MIXED, SHUFFLED: SHUFFLED}
_FLIPS = ("flip", "fliplr", "flipud")
_FACTORIES = ("zeros_like", "ones_like", "full_like", "empty_like", "rand_like", "randn_like", "new_zeros", "new_ones",
              "new_full", "new_empty")  # fmt: skip
"""Operators that read a tensor's size, not its tokens."""
_ALONG_A_DIM = (
    "gather", "index_select", "index_add", "index_copy", "index_fill", "scatter", "scatter_add", "scatter_reduce",
    "select_scatter", "slice_scatter", "sort", "argsort", "topk",
)  # fmt: skip
"""Operators that take or put tokens by index, along the dimension that is their argument `dim`."""
_ANYWHERE = ("rot90", "take", "put", "as_strided", "masked_select", "masked_scatter", "flatnonzero", "nonzero")


@dataclass(frozen=True)
class TokenOrder:
    """How the tokens of a value run, and the node that made it so."""

    kind: str
    by: fx.Node


def length_dims(node: fx.Node, facts: Facts) -> tuple[int, ...]:
    """The dimensions of a node's (first) result whose size is computed from the sequence length."""
    tensor = next((leaf for leaf in pytree.tree_leaves(value(node)) if isinstance(leaf, Tensor)), None)
    sizes = () if tensor is None else tensor.shape
    return tuple(dim for dim, size in enumerate(sizes) if facts.sequence in expression(size).free_symbols)


def ways(graph: fx.Graph, facts: Facts) -> dict[fx.Node, TokenOrder]:
    """The way of every node that holds tokens. What enters a block shuffled is an order of its own: forward there."""
    found: dict[fx.Node, TokenOrder] = {}
    touched: set[fx.Node] = set()  # what depends on a token, also where no length is left among the sizes: `x[:, :1]`
    for node in graph.nodes:
        name, sized = getattr(node.target, "_opname", ""), bool(length_dims(node, facts))
        if node.op in ("get_attr", "output") or is_size(node) or name in _FACTORIES:
            continue
        if node.op == "placeholder" and sized:
            found[node] = TokenOrder(FORWARD, node)
            touched.add(node)
        read = node.all_input_nodes if name not in MARKERS else [_first(node)]
        inputs = {n: _entering(found[n], n, node) for n in read if n in found}
        if any(n in touched for n in read):
            touched.add(node)
        if inputs and sized:
            found[node] = _moved(node, _joined(node, inputs.values()), touched, facts)
    return found


def _first(node: fx.Node) -> Any:
    return node.args[0]


def _entering(way: TokenOrder, source: fx.Node, user: fx.Node) -> TokenOrder:
    return TokenOrder(FORWARD, user) if way.kind == SHUFFLED and region(source) < region(user) else way


def _joined(node: fx.Node, inputs: Iterable[TokenOrder]) -> TokenOrder:
    """The way of what is computed slot by slot from values that run these ways."""
    by_kind = {way.kind: way for way in reversed(list(inputs))}
    for kind in (SHUFFLED, MIXED):
        if kind in by_kind:
            return by_kind[kind]
    return TokenOrder(MIXED, node) if len(by_kind) > 1 else next(iter(by_kind.values()))


def _moved(node: fx.Node, way: TokenOrder, touched: set[fx.Node], facts: Facts) -> TokenOrder:
    """The way of a node's result, given the way of its inputs and the nodes that depend on tokens."""
    name = getattr(node.target, "_opname", "")
    lead = next((argument for argument in node.args[:1] if isinstance(argument, fx.Node)), None)
    dims = () if lead is None else length_dims(lead, facts)
    if name in _FLIPS and lead is not None and dims:
        given: Any = {"fliplr": [1], "flipud": [0]}.get(name) or node.args[1]
        if not set(_positive(given, lead)) & set(dims):
            return way
        plain = len(dims) == 1 and expression(value(lead).shape[dims[0]]).free_symbols == {facts.sequence}
        return TokenOrder(_TURNED[way.kind] if plain else SHUFFLED, node)
    if _moves_tokens(node, name, lead, dims, touched, facts) or _splits_the_length(node, facts):
        return TokenOrder(SHUFFLED, node)
    return way


def _moves_tokens(node: fx.Node, name: str, lead: fx.Node | None, dims: Sequence[int], touched: set[fx.Node],
                  facts: Facts) -> bool:  # fmt: skip
    if name in ("cat", "concat", "concatenate"):
        tokens = [piece for piece in _first(node) if piece in touched]
        hit = bool(tokens) and _positive([_argument(node, "dim", 0)], tokens[0])[0] in length_dims(node, facts)
        return hit and len(tokens) > 1  # one piece of tokens and a constant before it: a shift, as a convolution's
    if lead is None or not dims:
        return False
    if name in ("index", "index_put", "_unsafe_index"):
        indices: Any = node.args[1]
        return any(index is not None and dim in dims for dim, index in enumerate(indices))
    if name == "roll":
        rolled: Any = node.args[2] if len(node.args) > 2 else ()
        return not rolled or bool(set(_positive(rolled, lead)) & set(dims))
    if name in _ALONG_A_DIM:
        return bool(set(_positive([_argument(node, "dim", -1)], lead)) & set(dims))
    return name in _ANYWHERE


def _argument(node: fx.Node, name: str, default: int) -> int:
    """An integer argument of an operator, by its name in the schema."""
    names = [argument.name for argument in operator_of(node)._schema.arguments]
    given = dict(zip(names, node.args)) | node.kwargs
    found: Any = given.get(name, default)
    return int(found)


def _positive(dims: Iterable[int], node: fx.Node) -> list[int]:
    rank = value(node).dim()
    return [dim % rank for dim in dims]


def _splits_the_length(node: fx.Node, facts: Facts) -> bool:
    """Sizes like `L // 4`: the parts may be put together in another order, and that is no longer seen."""
    sizes = [expression(size) for leaf in pytree.tree_leaves(value(node)) if isinstance(leaf, Tensor)
             for size in leaf.shape]  # fmt: skip
    return any(facts.sequence in size.free_symbols and not _is_whole(size, facts.sequence) for size in sizes)


@functools.lru_cache(maxsize=256)
def _is_whole(size: sympy.Expr, length: sympy.Symbol) -> bool:
    """Whether a size is a polynomial in the length with whole coefficients: `L`, `L + 3`, `B*L`, but not `L // 4`."""
    if not size.is_polynomial(length):
        return False
    return all(not any(part.is_Rational and not part.is_Integer for part in term.args or (term,))
               for term in sympy.Poly(size, length).coeffs())  # fmt: skip


# --- scans ---------------------------------------------------------------------------------------------------------


def scan_directions(
    graph: fx.Graph, facts: Facts, blocks: Iterable[int], found: dict[fx.Node, TokenOrder]
) -> dict[fx.Node, bool]:
    """For each scan of these blocks whether it runs against the input's order; `found` by `ways`.

    Raises:
        GraphError: its operands run different ways, or their tokens were moved by anything else than `flip`.
    """
    scans = scans_by_block(graph, facts.n_blocks)
    return {scan: _is_reversed(scan, found) for block in blocks for scan in scans[block]}


def _is_reversed(scan: fx.Node, found: dict[fx.Node, TokenOrder]) -> bool:
    operands = [n for n in scan.all_input_nodes if n in found]
    entering = {n: _entering(found[n], n, scan) for n in operands}
    for n, way in entering.items():
        if way.kind == SHUFFLED:
            raise GraphError(
                f"Node {way.by.name} ({way.by.target}) in {where(way.by)} moves tokens along the sequence on their way "
                f"to the scan {scan.name}; expected the input's order, or the whole sequence turned around by "
                "torch.flip, so that scores can be given back to their tokens. Reorder the tokens before the first "
                "block, or keep that block whole (give the next block the same share)."
            )
        if way.kind == MIXED:
            raise GraphError(
                f"Node {way.by.name} ({way.by.target}) in {where(way.by)} joins tokens in the input's order with "
                f"tokens in reversed order, and the scan {scan.name} reads it as its operand {n.name}; expected one "
                "direction per scan. Run one scan per direction, or keep that block whole (give the next block the "
                "same share)."
            )
    kinds = {way.kind: n for n, way in reversed(entering.items())}
    if len(kinds) > 1:
        raise GraphError(
            f"The operands of the scan {scan.name} in {where(scan)} run different ways: {kinds[FORWARD].name} in the "
            f"input's order, {kinds[REVERSED].name} reversed; expected one direction per scan. Flip all of its "
            "operands or none."
        )
    return REVERSED in kinds


def reaches_all(graph: fx.Graph, facts: Facts, query: int | None) -> tuple[bool, ...]:
    """For each block whether its scans carry every token to the query position, so that they can score them all.

    A scan that runs forward carries what stands before the query, a reversed one what stands behind it. Without a
    query each scan is scored at its own end, which every token reaches.
    """
    blocks = scans_by_block(graph, facts.n_blocks)
    if query is None:
        return tuple(map(bool, blocks))
    directions = scan_directions(graph, facts, range(facts.n_blocks), ways(graph, facts))
    return tuple(directions_to(query) <= {directions[scan] for scan in scans} for scans in blocks)


def directions_to(query: int) -> set[bool]:
    """The directions (True: reversed) of the scans that carry tokens to a query: both, but for a row's ends."""
    return {0: {True}, -1: {False}}.get(query, {False, True})


# --- borders between blocks ----------------------------------------------------------------------------------------


def check_cuts(graph: fx.Graph, facts: Facts, cuts: Sequence[Cut], found: dict[fx.Node, TokenOrder]) -> None:
    """Survivors are gathered, and put back, in the input's order.

    Raises:
        GraphError: a value that holds tokens in another order leaves its block.
    """
    blocks = [cut.block for cut in cuts]
    values = returned(graph)[: facts.values]
    for node, way in found.items():
        if way.kind not in (REVERSED, MIXED):
            continue
        for user in node.users:
            if user is output_of(graph) and node not in values:
                continue
            restored = region(node) < facts.n_blocks == region(user)  # from what left at any cut
            if any(restored or region(node) <= block < region(user) for block in blocks):
                raise GraphError(
                    f"Node {node.name} in {where(node)} holds its tokens in {way.kind} order and is read by "
                    f"{user.name} in {where(user)}, after tokens have left; expected the input's order between "
                    "blocks. Turn the sequence around (torch.flip) inside the block, before and after its scan."
                )


def settle_flips(graph: fx.Graph, facts: Facts) -> None:
    """Flips that the model's outer forward makes between two blocks go to the block that they are made for.

    Before: `y = block_0(x); block_1(y.flip(1)).flip(1)`, where the first flip ends region 0 and its result crosses
    the border. After: it begins region 1, and a flip back ends the region of what it turns back. The same nodes in an
    equivalent order.
    """
    if not any(map(_turns, graph.nodes)):
        return
    found = ways(graph, facts)
    inside = {path for path in facts.blocks if path}
    for node in list(graph.nodes):  # flips back: to the region that they read
        if _turns(node) and node in found and found[node].kind == FORWARD and found[_first(node)].kind == REVERSED:
            source = region(_first(node))
            if 0 <= source < region(node):
                end_of(graph, source).prepend(node)
                node.meta[REGION] = source
    for node in reversed(list(graph.nodes)):  # what is reversed, and whose users are in a later block: to that block
        if node in found and found[node].kind == REVERSED and node.users and not _belongs(node, inside):
            first = min(map(region, node.users))
            if region(node) < first and not any(user.op == "output" for user in node.users):
                end_of(graph, first - 1).prepend(node)
                node.meta[REGION] = first


def _turns(node: fx.Node) -> bool:
    return getattr(node.target, "_opname", "") in _FLIPS


def _belongs(node: fx.Node, blocks: set[str]) -> bool:
    """Whether a node was made by one of the blocks' own modules."""
    stack = node.meta.get("nn_module_stack") or {}
    return any(path == block or path.startswith(f"{block}.") for path, _ in stack.values() for block in blocks)
