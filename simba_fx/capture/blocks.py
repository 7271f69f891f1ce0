"""Which block each node of a flat graph belongs to: its region (`simba_fx.graph.facts`).

Blocks are the members of the outermost list of modules that holds every scan. Without such a list the graph is cut
between its scans, where the fewest bytes are alive.
"""

from __future__ import annotations

import bisect
import functools
import itertools
import math
import re
from collections.abc import Mapping

import sympy
from torch import Tensor, fx, nn

from simba_fx.graph.facts import expression, value, where
from simba_fx.graph.marks import REGION
from simba_fx.ops.recurrences import SCANS

__all__ = ["EVERYTHING", "assign_regions", "block_list", "paths"]

EVERYTHING = 2**62


def paths(node: fx.Node) -> list[str]:
    """The paths of the modules that a node came from, outermost first."""
    return [path for path, _ in (node.meta.get("nn_module_stack") or {}).values()]


def assign_regions(graph: fx.Graph, owner: nn.Module | None, sequence: sympy.Symbol) -> tuple[str, ...]:
    """Give every node its region; returns the blocks' paths, which start from `owner` (None: from no module)."""
    scans = [node for node in graph.nodes if node.target in SCANS]
    parent = None if owner is None else block_list(scans, owner)
    if owner is None or parent is None:
        return _narrowest_regions(graph, scans, sequence)
    blocks = tuple(f"{parent}.{name}".lstrip(".") for name, _ in owner.get_submodule(parent).named_children())
    numbers = {block: index for index, block in enumerate(blocks)}
    inside = re.compile((re.escape(parent) + r"\." if parent else "") + r"[^.]+")
    nodes = list(graph.nodes)
    inside_of: dict[int, list[int]] = {}
    current = -1
    for place, node in enumerate(nodes):
        index = None if node.op in ("placeholder", "get_attr", "output") else _block_index(node, inside, numbers)
        if index is not None and index >= current:
            current = index
            inside_of.setdefault(index, []).append(place)
    _set_regions(nodes, _starts(nodes, inside_of, len(blocks), sequence))
    return blocks


def _starts(
    nodes: list[fx.Node], inside_of: Mapping[int, list[int]], n_blocks: int, sequence: sympy.Symbol
) -> list[int]:
    """Where each block starts, and what follows the last one.

    Between the code of two modules it is the place where the fewest bytes are alive: a residual that is added around a
    module, and a norm in front of it, belong to its block. The first block starts, and the last one ends, where no more
    is alive than between blocks.
    """
    alive = _alive(nodes, sequence)
    between: list[int] = []
    end, begin = None, 0
    for index in range(n_blocks):
        places = inside_of.get(index)
        if places is not None:
            if end is None:
                begin = places[0]
            else:
                between.append(min(range(places[0], end - 1, -1), key=alive.__getitem__))
            end = places[-1] + 1
        elif end is not None:  # a block of which nothing is left
            between.append(end)
    end = len(nodes) if end is None else end
    widest = max((alive[start] for start in between), default=EVERYTHING)
    first = next((i for i in range(begin, -1, -1) if alive[i] <= widest), begin)
    last = next((i for i in range(end, len(nodes)) if alive[i] <= widest), end)
    empty = n_blocks - 1 - len(between)  # blocks of which nothing is left before the first that has something
    return [*[first] * (1 + empty), *between, last]


def _set_regions(nodes: list[fx.Node], starts: list[int]) -> None:
    """What is before the first start is region -1; inputs and weights are there, wherever they stand."""
    for i, node in enumerate(nodes):
        hoisted = node.op in ("placeholder", "get_attr")
        node.meta[REGION] = -1 if hoisted else bisect.bisect_right(starts, i) - 1


def _alive(nodes: list[fx.Node], sequence: sympy.Symbol) -> list[int]:
    """Before each node, the bytes of tensors that depend on the length and are read from there on by more than the
    output."""
    at = {node: i for i, node in enumerate(nodes)}
    change = [0] * (len(nodes) + 2)
    for node in nodes:
        last_use = max((at[user] for user in node.users if user.op != "output"), default=at[node])
        if last_use > at[node] and (size := _sequence_bytes(node, sequence)):
            change[at[node] + 1] += size
            change[last_use + 1] -= size
    return list(itertools.accumulate(change))


def _block_index(node: fx.Node, inside: re.Pattern[str], numbers: dict[str, int]) -> int | None:
    matches = (inside.match(path) for path in paths(node))
    return next((numbers[match.group()] for match in matches if match and match.group() in numbers), None)


def block_list(scans: list[fx.Node], owner: nn.Module) -> str | None:
    """The path of the outermost list of modules that holds every scan."""
    candidates = []
    for path in paths(scans[0]):
        if match := re.fullmatch(r"(?:(.*)\.)?(\d+)", path):
            parent = match.group(1) or ""
            if isinstance(owner.get_submodule(parent), nn.ModuleList | nn.Sequential):
                candidates.append(parent)
    for parent in candidates:
        inside = re.compile((re.escape(parent) + r"\." if parent else "") + r"\d+(\..*)?")
        if all(any(inside.fullmatch(path) for path in paths(scan)) for scan in scans):
            return parent
    return None


def _narrowest_regions(graph: fx.Graph, scans: list[fx.Node], sequence: sympy.Symbol) -> tuple[str, ...]:
    """No list of blocks: cut between two scans where the fewest bytes that depend on the length are alive."""
    nodes = list(graph.nodes)
    at = {node: i for i, node in enumerate(nodes)}
    alive = _alive(nodes, sequence)
    ends = [
        min(range(at[scan] + 1, at[following] + 1), key=alive.__getitem__)
        for scan, following in itertools.pairwise(scans)
    ]
    widest = max((alive[end] for end in ends), default=0)
    rest = range(at[scans[-1]] + 1, len(nodes))
    ends.append(next((i for i in rest if alive[i] <= widest), len(nodes) - 1))
    _set_regions(nodes, [0, *ends])
    return tuple(where(scan) for scan in scans)


def _sequence_bytes(node: fx.Node, sequence: sympy.Symbol, length: int = 64) -> int:
    """Bytes of one row of a tensor that has the length among its sizes, for a prompt of `length` tokens; else 0.
    Nothing is cut while a node's results are still one tuple."""
    val = value(node)
    if isinstance(val, tuple | list):
        return EVERYTHING
    if not isinstance(val, Tensor):
        return 0
    sizes = tuple(expression(size) for size in val.shape)
    return _numbers(sizes, sequence, length) * val.element_size()


@functools.lru_cache(4096)
def _numbers(sizes: tuple[sympy.Expr, ...], sequence: sympy.Symbol, length: int) -> int:
    """How many there are in a tensor of these sizes; 0 without the length among them."""
    symbols = {symbol for size in sizes for symbol in size.free_symbols}
    numbers = {symbol: length if symbol == sequence else 1 for symbol in symbols}
    return math.prod(int(size.subs(numbers)) for size in sizes) if sequence in symbols else 0
