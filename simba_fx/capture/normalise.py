"""From the flat graph that a front end traced to a `Captured` one, the form that the passes read.

Both ways to a graph (`export`: torch.export; `simba_fx.frontends.dynamo`: torch.compile) end here: asserts dropped,
casts that cast nothing and slices that cut nothing removed, every scan accounted for, regions assigned, sizes read in
one place each.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from simba_fx.capture import lift
from simba_fx.capture.blocks import EVERYTHING, assign_regions, paths
from simba_fx.capture.guards import Guard
from simba_fx.capture.refusals import advice
from simba_fx.errors import CaptureError
from simba_fx.graph.facts import Facts, drop_dead_code, expression, is_size, returned, value
from simba_fx.graph.marks import REGION
from simba_fx.graph.token_order import settle_flips
from simba_fx.ops.recurrences import SCANS

__all__ = ["Captured", "annotate", "check_every_mixer", "cut", "drop_no_ops", "strip_paths"]

_ASSERTIONS = ("_assert_tensor_metadata", "_assert_scalar", "sym_constrain_range", "_assert_async")


@dataclass(frozen=True)
class Captured:
    """A model (or its block stack) as one flat, dense graph."""

    graph: fx.Graph
    attributes: dict[str, Any] = field(repr=False)  # some have no memory, which torch prints all the same
    """What `get_attr` targets stand for: the module's own parameters and buffers, and constants."""
    facts: Facts
    sites: list[lift.CallSite]
    out_spec: pytree.TreeSpec
    arguments: tuple[str, ...]
    """The module's names of the inputs, in the order of the placeholders (fx renames an argument called `input`)."""

    inputs: tuple[str, ...]
    """The placeholders' own names, in the same order."""

    guards: tuple[Guard, ...] = ()
    """What calls must share with the example that was traced."""


def annotate(graph: fx.Graph, owner: nn.Module | None, primary: fx.Node, mask: fx.Node | None,
            values: int | None = None, marks: str = "real") -> Facts:  # fmt: skip
    """Give every node its region and every size its one place, in place; returns what is then known of the graph.

    Args:
        graph: flat, normalised (`drop_no_ops`), with at least one scan.
        owner: the module that the paths in `nn_module_stack` start from, if there is one.
        primary: the placeholder `(B, L, ...)` whose size 1 is a symbol; `mask`: that of the padding mask.
        marks: what the mask's values other than 0 mark, "real" tokens or "padding".
        values: how many of the outputs are the model's values; None: all.
    """
    batch, sequence = (expression(size) for size in value(primary).shape[:2])
    blocks = assign_regions(graph, owner, sequence)
    mask_name = None if mask is None else mask.name
    outputs = len(returned(graph)) if values is None else values
    facts = Facts(sequence, batch, primary.name, mask_name, blocks, outputs, marks)
    _read_sizes_once(graph, facts)
    settle_flips(graph, facts)
    graph.lint()
    return facts


def check_every_mixer(graph: fx.Graph, owner: nn.Module, called: Collection[str] = ()) -> None:
    """Each module that owns an `A_log` parameter must have run a lifted scan, or one around it that reads it.

    Args:
        called: functions of the model that look like scans and ran themselves.
    """
    seen = {path for node in graph.nodes if node.target in SCANS for path in paths(node)}
    for path, module in owner.named_modules():
        if "A_log" not in module._parameters or any(p == path or p.startswith(path + ".") for p in seen):
            continue
        names = [name for name, held in owner.named_parameters(remove_duplicate=False) if held is module.A_log]
        if not _reach_a_scan([n for n in graph.find_nodes(op="get_attr") if any(_is_at(n, name) for name in names)]):
            raise CaptureError(
                f"{path or type(owner).__name__} ({type(module).__name__}) holds the weights of a scan (A_log) but "
                f"called no registered scan function while it was traced.{advice(called)}"
            )


def _is_at(node: fx.Node, path: str) -> bool:
    return f".{node.target}".endswith(f".{path}")


def _reach_a_scan(nodes: list[fx.Node]) -> bool:
    """Whether a scan is computed from any of these nodes."""
    met = set(nodes)
    while nodes:
        node = nodes.pop()
        if node.target in SCANS:
            return True
        nodes += set(node.users) - met
        met |= set(node.users)
    return False


def cut(path: str, prefix: str) -> str:
    """A path seen from `prefix`, where it lies below it."""
    return path[len(prefix) + 1 :] if f"{path}.".startswith(f"{prefix}.") else path


def strip_paths(graph: fx.Graph, prefix: str) -> None:
    """Module paths as the user knows them."""
    for node in graph.nodes:
        if stack := node.meta.get("nn_module_stack"):
            node.meta["nn_module_stack"] = {k: (cut(path, prefix), kind) for k, (path, kind) in stack.items()}


def drop_no_ops(graph: fx.Graph) -> None:
    """Remove assertions, and what computes nothing."""
    for node in list(graph.nodes):
        if getattr(node.target, "_opname", "") in _ASSERTIONS:
            graph.erase_node(node)
        elif _is_no_op(node):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
    drop_dead_code(graph)


def _is_no_op(node: fx.Node) -> bool:
    """A cast to the dtype that its input has, or a slice that takes everything."""
    args: Any = node.args
    if node.target is torch.ops.aten.to.dtype:
        return len(args) == 2 and not node.kwargs and bool(value(args[0]).dtype == args[1])
    if node.target is torch.ops.aten.slice.Tensor and len(args) == 4:
        _, _, start, end = args
        return bool(start == 0 and isinstance(end, int) and end > EVERYTHING)
    return False


def _read_sizes_once(graph: fx.Graph, facts: Facts) -> None:
    """One node for B and one for L, read from the primary input, first in the graph."""
    lead = next(node for node in graph.find_nodes(op="placeholder") if node.name == facts.primary)
    after = [node for node in graph.nodes if node.op == "placeholder"][-1].next
    for dim, (symbol, name) in enumerate(((facts.batch, "batch"), (facts.sequence, "length"))):
        with graph.inserting_before(after):
            size = graph.call_function(torch.ops.aten.sym_size.int, (lead, dim))
            size.name = graph._graph_namespace.create_name(name, None)
        size.meta = {"val": value(lead).shape[dim], REGION: -1}
        for node in graph.nodes if isinstance(symbol, sympy.Symbol) else ():
            reads = node.target is torch.ops.aten.sym_size.int or (node.op == "placeholder" and is_size(node))
            if node is not size and reads and expression(value(node)) == symbol:
                node.replace_all_uses_with(size)
    drop_dead_code(graph)
