"""Pass `continue-states`: a prompt that goes on from the states an earlier call left in a cache."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from simba_fx.errors import CacheError
from simba_fx.graph.facts import (
    Facts,
    depends_on_length,
    expression,
    is_size,
    operator_of,
    returned,
    value,
    where,
)
from simba_fx.graph.marks import MARK, REGION, Insert, Mark, region
from simba_fx.ops import continued

_CONV = torch.ops.simba_fx.causal_conv1d.default
_ATTENTION = torch.ops.aten.scaled_dot_product_attention.default
_CASTS = (torch.ops.aten.to.dtype, torch.ops.aten._to_copy.default)


@dataclass(frozen=True)
class ContinueStates:
    """Let every scan, convolution and attention start from what is in the cache.

    Before: `y, last = selective_scan(u, delta, A, …)`, and the graph returns `last` for the cache.
    After: `y, last = continued.selective_scan(past_recurrent_3, u, delta, A, …)`, with one more input of the graph for
    each state that it returns. Scores stay: a contribution to the output does not depend on the state before.

    1. A convolution sees the last inputs of the call before, and hands on the last of both. 2. Attention sees the keys
    and values that its own layer has kept, those that are real; which these are is one more input, `past_real_3`.
    3. What the earlier calls kept is in the states, and is never scored again.
    """

    states: tuple[tuple[int, str, int], ...]
    """What the graph returns behind the model's values: layer, kind, and which of several."""

    name = "continue-states"

    def rewrite(self, graph: fx.Graph, facts: Facts) -> int:
        nodes = returned(graph)[facts.values : facts.values + len(self.states)]
        stored = dict(zip(self.states, nodes))
        past = {entry: self._input(graph, entry, node) for entry, node in stored.items()}
        for (layer, kind, index), node in stored.items():
            if kind == "conv":
                self._convolve(graph, node, past[layer, kind, index])
            elif kind == "recurrent":
                self._scan(graph, node, past[layer, kind, index])
            elif kind == "keys":
                held = past[layer, kind, index], past[layer, "values", index]
                real = self._input(graph, (layer, "real", index), node)
                self._attend(graph, node, stored[layer, "values", index], (*held, real), facts)
        return len(stored)

    def _input(self, graph: fx.Graph, entry: tuple[int, str, int], node: fx.Node) -> fx.Node:
        layer, kind, index = entry
        last = [node for node in graph.nodes if node.op == "placeholder"][-1]
        with graph.inserting_after(last):
            made = graph.placeholder(f"past_{kind}{index or ''}_{layer}")
        val = value(node)[:, 0, :, 0].bool() if kind == "real" else value(node)  # keys are of a length of their own
        made.meta = {"val": val, REGION: -1, MARK: Mark(self.name)}
        return made

    def _convolve(self, graph: fx.Graph, node: fx.Node, state: fx.Node) -> None:
        padded: Any = node.args[0] if node.target is torch.ops.aten.slice.Tensor else None
        if padded is None or padded.target is not torch.ops.aten.pad.default:
            raise self._unknown(node, "the inputs of a convolution")
        x: Any = padded.args[0]
        if not (convs := [user for user in x.users if user.target is _CONV]):
            raise self._unknown(node, "the inputs of a convolution")
        for conv in convs:
            conv.target, conv.args = continued.causal_conv1d, (state, *conv.args)
        insert = Insert(graph, node, region(node), self.name)
        node.replace_all_uses_with(insert(continued.conv_state, state, x, val=value(node), like=node))

    def _scan(self, graph: fx.Graph, node: fx.Node, state: fx.Node) -> None:
        found: Any = node
        while found.target in _CASTS:
            found = found.args[0]
        if found.target is torch.ops.aten.stack.default:  # a scan for each of several heads
            parts, dim = found.args[0], found.args[1] if len(found.args) > 1 else 0
            for i, part in enumerate(parts):
                insert = Insert(graph, _scan_of(part), region(part), self.name)
                self._scan(graph, part, insert(torch.ops.aten.select.int, state, dim, i, val=value(part)))
            return
        scan = _scan_of(found)
        if operator_of(scan) not in continued.CONTINUED:
            raise self._unknown(node, "the last state of a scan")
        scan.target, scan.args = continued.CONTINUED[scan.target], (state, *scan.args)

    def _attend(self, graph: fx.Graph, keys: fx.Node, values: fx.Node, past: tuple[fx.Node, ...], facts: Facts) -> None:
        """What the attention makes of the new tokens' entries, it makes of the past ones as well."""
        made = [keys, values]
        for node in _following(keys):
            if node.target is _ATTENTION and node.args[1] in made and node.args[2] in made:
                seen = self._of_the_past(graph, made, node, past, facts)
                node.target, node.args = continued.attention, (*seen, past[2], *node.args)
                return
            if any(one in made for one in node.all_input_nodes):
                made.append(node)
        raise self._unknown(keys, "the keys of scaled_dot_product_attention")

    def _of_the_past(self, graph: fx.Graph, made: list[fx.Node], attention: fx.Node, past: tuple[fx.Node, ...],
                     facts: Facts) -> tuple[fx.Node, fx.Node]:  # fmt: skip
        """Keys and values as the attention takes them: the nodes that make them, once more, on what the cache holds."""
        insert = Insert(graph, attention, region(attention), self.name)
        copies, length = dict(zip(made, past)), None
        for node in made[2:]:
            for one in node.all_input_nodes:
                if one in copies or one.op == "get_attr" or (is_size(one) and not depends_on_length(one, facts)):
                    continue
                if not is_size(one) or expression(value(one)) != facts.sequence:
                    raise self._unknown(made[0], "all that its keys are made of")
                length = length or insert(torch.ops.aten.sym_size.int, past[0], 2, val=value(one))
                copies[one] = length
            with graph.inserting_before(attention):
                copies[node] = graph.node_copy(node, lambda one: copies.get(one, one))
            copies[node].meta.update({REGION: region(attention), MARK: Mark(self.name)})
        return copies[attention.args[1]], copies[attention.args[2]]  # type: ignore[index]

    def _unknown(self, node: fx.Node, expected: str) -> CacheError:
        return CacheError(
            f"Several new tokens on a warm cache: {where(node)} stores {node.name}, which is not {expected} as it is; "
            "expected what can be started from. Pass the tokens one at a time, or the whole text with an empty cache."
        )


def _scan_of(state: fx.Node) -> fx.Node:
    """The call whose second result `state` is; else `state` itself."""
    found: Any = state.args[0] if state.target is operator.getitem and state.args[1] == 1 else state
    return found  # type: ignore[no-any-return]


def _following(node: fx.Node) -> Iterator[fx.Node]:
    """The nodes behind it in its block."""
    while region(node.next) == region(node):
        node = node.next
        yield node
