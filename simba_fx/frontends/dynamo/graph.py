"""Between Dynamo's graph and the graph that passes read: traced to functional ATen on the way in, put back into the
calling convention of Dynamo's on the way out.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from simba_fx.capture.autocast import mark_regions, regions_noted_of
from simba_fx.frontends.dynamo.internals import TracingContext, aot_export_module, as_from_dynamo, is_float, tracing
from simba_fx.frontends.dynamo.substitutes import is_lifted_call
from simba_fx.graph.facts import output_of, returned
from simba_fx.graph.marks import REGION
from simba_fx.runtime.written import with_regions

__all__ = ["Flat", "constant", "flattened", "float_inputs", "lifted_calls", "module_of"]


@dataclass(frozen=True)
class Flat:
    """Dynamo's graph as functional, pre-dispatch ATen; placeholders have the names that they have there."""

    graph: fx.Graph
    attributes: dict[str, Any]
    """What `get_attr` targets stand for: constants of the frame."""
    mutated: tuple[str, ...]
    """The placeholders that the first outputs are to be copied to, in the order of those outputs."""


def lifted_calls(gm: fx.GraphModule) -> tuple[int, int]:
    """How many calls of lifted functions are in Dynamo's graph, and in graphs that its operators run."""
    inner = [module for module in gm.modules() if isinstance(module, fx.GraphModule) and module is not gm]
    return _lifted(gm), sum(map(_lifted, inner))


def _lifted(gm: fx.GraphModule) -> int:
    return sum(map(is_lifted_call, gm.graph.nodes))


def flattened(gm: fx.GraphModule) -> Flat:
    """Trace Dynamo's graph on its own fake tensors and symbols; scans become operators, module paths are kept."""
    values = [node.meta["example_value"] for node in gm.graph.find_nodes(op="placeholder")]
    tensors: Any = (value for value in values if isinstance(value, torch.Tensor))
    context = TracingContext(next(tensors).fake_mode)  # what AOTAutograd notes in the usual one is the inner backend's
    with regions_noted_of(gm.graph), tracing(context):
        flat: Any
        flat, signature = aot_export_module(gm, values, trace_joint=False, pre_dispatch=True)
    graph = copy.deepcopy(flat.graph)
    mark_regions(graph)
    own = [*dict(gm.named_parameters(remove_duplicate=False)), *dict(gm.named_buffers(remove_duplicate=False))]
    placeholders = list(graph.find_nodes(op="placeholder"))
    names = dict(zip(signature.user_inputs, (node.name for node in gm.graph.find_nodes(op="placeholder"))))
    for node, target in zip(placeholders, own):
        with graph.inserting_before(node):
            held = graph.get_attr(target)
        held.meta = node.meta
        node.replace_all_uses_with(held)
        graph.erase_node(node)
    for node in placeholders[len(own) :]:
        node.target = node.name = names[node.name]
    attributes = {target: _held(gm, target) for target in own}
    for node in graph.find_nodes(op="get_attr"):
        if node.target not in attributes:
            attributes[node.target] = _held(flat, node.target)
    mutated = [*signature.buffers_to_mutate.values(), *signature.user_inputs_to_mutate.values()]
    return Flat(graph, attributes, tuple(names.get(name, name) for name in mutated))


def _held(root: Any, target: str) -> Any:
    for name in target.split("."):
        root = getattr(root, name)
    return root


def float_inputs(gm: fx.GraphModule) -> set[str]:
    """The symbols of floats that Dynamo made inputs of the graph (a norm's epsilon, under `dynamic=True`)."""
    numbers = [node.meta.get("example_value") for node in gm.graph.nodes]
    symbols = (s for number in numbers if isinstance(number, torch.SymFloat) for s in number.node.expr.free_symbols)
    return {str(symbol) for symbol in symbols if is_float(symbol)}


def constant(node: fx.Node, number: float) -> None:
    """Write `number` wherever `node` is read, and remove the node."""
    for user in list(node.users):
        user.args, user.kwargs = fx.node.map_arg((user.args, user.kwargs), lambda n: number if n is node else n)
    node.graph.erase_node(node)


def module_of(gm: fx.GraphModule, graph: fx.Graph, attributes: dict[str, Any], mutated: Iterable[str],
              values: int) -> fx.GraphModule:  # fmt: skip
    """The rewritten `graph` in the place of Dynamo's `gm`: same inputs, same outputs, same effects on its inputs.

    The first `values` outputs are what the flat graph returned; what passes added after them is dropped.
    """
    graph = with_regions(graph)
    kept = list(returned(graph))[:values]
    inputs = {node.name: node for node in graph.find_nodes(op="placeholder")}
    for name, new in zip(mutated, kept):
        with graph.inserting_before(output_of(graph)):
            graph.call_function(torch.ops.aten.copy_.default, (inputs[name], new))
    output_of(graph).args = (tuple(kept[len(tuple(mutated)) :]),)
    for node, original in zip(inputs.values(), gm.graph.find_nodes(op="placeholder")):
        node.meta = {**original.meta, REGION: -1}
        as_from_dynamo(node, original)
    graph.lint()
    module = fx.GraphModule(attributes, graph)
    module.meta = gm.meta
    for name in ("_param_name_to_source", "_source_to_user_stacks"):
        setattr(module, name, getattr(gm, name))
    return module
