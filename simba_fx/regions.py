"""Which block each node of a flat graph belongs to: its region (`simba_fx.graphs`).

Blocks are the members of the outermost list of modules that holds every scan. Without such a list the graph is cut
between its scans, where the fewest bytes are alive.
"""

from __future__ import annotations

import itertools
import math
import re

import sympy
from torch import Tensor, fx, nn

from simba_fx.graphs import REGION, SCANS, expression, value, where

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
    current, last = -1, None
    for node in graph.nodes:
        if node.op not in ("placeholder", "get_attr", "output"):
            index = _block_index(node, inside, numbers)
            if index is not None and index >= current:
                current, last = index, node
        node.meta[REGION] = current if node.op not in ("placeholder", "get_attr") else -1
    _start_tail(graph, last, len(blocks))
    return blocks


def _start_tail(graph: fx.Graph, last: fx.Node | None, n_blocks: int) -> None:
    """What follows the last block's last node is region n."""
    behind = False
    for node in graph.nodes:
        if behind and node.op != "get_attr":
            node.meta[REGION] = n_blocks
        behind = behind or node is last


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
    alive = [0] * (len(nodes) + 1)
    for node in nodes:
        last_use = max((at[user] for user in node.users if user.op != "output"), default=at[node])
        for i in range(at[node] + 1, last_use + 1):
            alive[i] += _sequence_bytes(node, sequence)
    ends = [
        min(range(at[scan] + 1, at[following] + 1), key=alive.__getitem__)
        for scan, following in itertools.pairwise(scans)
    ]
    widest = max((alive[end] for end in ends), default=0)
    rest = range(at[scans[-1]] + 1, len(nodes))
    ends.append(next((i for i in rest if alive[i] <= widest), len(nodes) - 1))
    for i, node in enumerate(nodes):
        hoisted = node.op in ("placeholder", "get_attr")
        node.meta[REGION] = -1 if hoisted else sum(i >= end for end in ends)
    return tuple(where(scan) for scan in scans)


def _sequence_bytes(node: fx.Node, sequence: sympy.Symbol, length: int = 64) -> int:
    """Bytes of one row of a tensor that has the length among its sizes, for a prompt of `length` tokens; else 0.
    Nothing is cut while a node's results are still one tuple."""
    val = value(node)
    if isinstance(val, tuple | list):
        return EVERYTHING
    if not isinstance(val, Tensor):
        return 0
    sizes = [expression(size) for size in val.shape]
    if not any(sequence in size.free_symbols for size in sizes):
        return 0
    numbers = {symbol: length if symbol == sequence else 1 for size in sizes for symbol in size.free_symbols}
    concrete = [int(size.subs(numbers)) for size in sizes]
    return math.prod(concrete) * val.element_size()
