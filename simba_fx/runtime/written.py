"""How what was traced inside of `torch.autocast` runs inside of it.

Nodes say so (`meta["autocast"]`), which passes need not look at. In a program, nodes around each run of them enter and
leave the region, and its code has a `with` in their place, which ends where an operator fails as well.
"""

from __future__ import annotations

import copy
import itertools

from torch import fx

from simba_fx.compiling import enter_autocast, exit_autocast
from simba_fx.graph.marks import AUTOCAST, Autocast

__all__ = ["with_regions", "write_regions"]


def with_regions(graph: fx.Graph) -> fx.Graph:
    """A copy with such nodes; the graph itself where there is nothing to enter, or where it has them."""
    if not any(map(_autocast, graph.nodes)) or graph.find_nodes(op="call_function", target=enter_autocast):
        return graph
    graph = copy.deepcopy(graph)
    runs = [(autocast, list(nodes)) for autocast, nodes in itertools.groupby(list(graph.nodes), _autocast)]
    for autocast, nodes in runs:
        if autocast is not None:
            with graph.inserting_before(nodes[0]):
                entered = graph.call_function(enter_autocast, (*autocast, None))
            with graph.inserting_after(nodes[-1]):
                graph.call_function(exit_autocast, (entered,))
    return graph


def _autocast(node: fx.Node) -> Autocast | None:
    return node.meta.get(AUTOCAST) if node.op == "call_function" else None


def write_regions(graph: fx.Graph) -> None:
    """Generate code for `graph` with a `with` in place of these nodes."""
    begins = {node.name: node.args for node in graph.find_nodes(op="call_function", target=enter_autocast)}
    ends = {node.name for node in graph.find_nodes(op="call_function", target=exit_autocast)}

    def written(body: list[str]) -> list[str]:
        lines, indent = [], ""
        for line in "".join(body).splitlines(keepends=True):
            name = line.partition(" = ")[0]
            if name in begins:
                device, dtype, enabled, _ = begins[name]
                lines.append(f"with torch.autocast({device!r}, {dtype}, {enabled}):\n")
                indent = "    "
            elif name in ends:
                indent = ""
            else:
                lines.append(line if line.startswith("#") else indent + line)  # fx counts nodes by its comments
        return lines

    if begins:
        graph.on_generate_code(lambda _: written)
