"""Pass `outline-blocks`: each block becomes one call; equal blocks share one code object (`compile="blocks"`)."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch import Tensor, fx

from simba_fx.capture.blocks import paths
from simba_fx.errors import GraphError
from simba_fx.graph.facts import (
    BLOCK,
    CRITERION,
    BlockCode,
    Facts,
    by_region,
    drop_dead_code,
    expression,
    from_mask_alone,
    is_size,
    stem,
    value,
)
from simba_fx.graph.marks import AUTOCAST, Insert, Role, give_role, made_by, role

_TOP = ("track-tokens", "select-tokens", "restore-length")
"""Passes whose nodes stay at the top level: what connects blocks rather than computes in them."""
_BY_POSITION = (
    torch.ops.simba_fx.position_score.default,
    torch.ops.simba_fx.protect_tokens.default,
    torch.ops.simba_fx.take_square.default,
)
"""And operators of other passes that read no scan."""


@dataclass(frozen=True)
class OutlineBlocks:
    """Move each block's nodes into a module of its own.

    Before: forty nodes per block. After, a few lines per block:

        hidden_3, score_3 = block_3(hidden_2, kept_2, tail)
        kept_3, dropped_3, positions_3, left_3 = select_tokens(score_3, positions_2, length, tail, 7, 10, 4)
        exit_3 = take_tokens(hidden_3, dropped_3)

    1. A block that is a module of the model reads the tensors of that module; other tensors are its inputs. 2. Sizes
    are read again from the block's own inputs, so that a length is never an argument. 3. Blocks with the same code
    share one kind: `torch.compile` compiles that code once, for every depth and length. 4. What stands before and after
    the blocks stays at the top level.
    """

    attributes: Mapping[str, Any] = field(repr=False)
    """What `get_attr` targets stand for: blocks whose tensors look different do not share code."""

    name = "outline-blocks"

    def rewrite(self, graph: fx.Graph, facts: Facts) -> int:
        kinds: dict[Any, tuple[int, fx.Graph]] = {}
        masks = from_mask_alone(graph, facts)
        taken = {path.split(".")[0] for path in self.attributes}
        changed, blocks = 0, by_region(graph)
        for index in range(facts.n_blocks):
            inside = [node for node in blocks.get(index, ()) if not _at_top(node)]
            if not any(node.op != "placeholder" and isinstance(value(node), Tensor) for node in inside):
                continue
            path, target = facts.blocks[index], f"block_{index}"
            target = f"simba_{target}" if target in taken else target
            after = set(itertools.dropwhile(lambda node: node is not inside[0], blocks[index]))  # noqa: B023
            self._outline(graph, facts, inside, after, path, target, kinds, masks)
            changed += 1
        return changed

    def _outline(self, graph: fx.Graph, facts: Facts, inside: list[fx.Node], after: set[fx.Node], path: str,
                 target: str, kinds: dict[Any, tuple[int, fx.Graph]], masks: set[fx.Node]) -> None:  # fmt: skip
        members = set(inside)
        outside = list(dict.fromkeys(n for node in inside for n in node.all_input_nodes if n not in members))
        module = path if path and any(path in paths(node) for node in inside) else None
        owned = {node: _inner(node, module) for node in outside if node.op == "get_attr"}
        inputs = [node for node in outside if not owned.get(node) and not _recomputed(node)]
        sub, env = fx.Graph(), {}
        roles = {node: "mask" if node in masks else _role(node, facts) for node in inputs}
        inputs.sort(key=lambda node: roles[node] != "hidden")  # as the module has it
        names: list[str] = []
        for node in inputs:
            role = roles[node]
            names.append(role if role not in names else f"{role}_{len(names)}")
            env[node] = sub.placeholder(names[-1])
            env[node].meta = dict(node.meta)
        for node, inner in owned.items():
            if inner:
                env[node] = sub.create_node("get_attr", inner)  # fx's own method warns that the graph has no module
                env[node].meta = dict(node.meta)

        def size(node: fx.Node) -> fx.Node:
            """A size from outside, read again from the inputs."""
            if node in env:
                return env[node]
            if node.target is torch.ops.aten.sym_size.int:
                source, dim = _source(expression(value(node)), inputs)
                env[node] = sub.call_function(node.target, (env[source], dim))
            else:
                args, kwargs = fx.node.map_arg((node.args, node.kwargs), size)
                env[node] = sub.create_node(node.op, node.target, args, kwargs)
            env[node].meta = dict(node.meta)
            return env[node]

        for node in inside:
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: env[n] if n in env else size(n))
            name = stem(node.name) if made_by(node) else None
            target_inside = CRITERION if node.op == "call_module" else node.target
            env[node] = sub.create_node(node.op, target_inside, args, kwargs, name=name)
            env[node].meta = dict(node.meta)
        outputs = [node for node in inside if any(_reads(user, node) for user in node.users if user not in members)]
        outputs.sort(key=lambda node: (made_by(node) is not None, _kind_of_result(node) != "hidden"))
        sub.output(tuple(env[node] for node in outputs) if len(outputs) > 1 else env[outputs[0]])
        drop_dead_code(sub)
        for node in inputs:
            if node.op in ("call_function", "get_attr") and node in after:  # made here by what stays at the top level
                inside[0].prepend(node)
        call = self._replace(graph, inside, inputs, outputs, target)
        looks = tuple(_looks(self.attributes[str(node.target)]) for node in owned)
        said = ((n.op, n.target, n.name, str(n.args), str(n.kwargs), n.meta.get(AUTOCAST)) for n in sub.nodes)
        key = (tuple(said), looks)
        kind, code = kinds.setdefault(key, (len(kinds), sub))
        hooked = module is not None and all(path in (paths(n) or [path]) for n in inside if not made_by(n))
        call.meta[BLOCK] = BlockCode(code, kind, module, hooked, bool(sub.find_nodes(op="call_module")))

    def _replace(self, graph: fx.Graph, inside: list[fx.Node], inputs: list[fx.Node], outputs: list[fx.Node],
                 target: str) -> fx.Node:  # fmt: skip
        """One call in place of the nodes inside."""
        insert = Insert(graph, inside[0], inside[0].meta["region"], self.name)
        vals = tuple(value(node) for node in outputs)
        single = len(outputs) == 1
        call = insert(target, *inputs, op="call_module", val=vals[0] if single else vals, role=Role.BLOCK)
        call.meta["nn_module_stack"] = inside[0].meta.get("nn_module_stack")
        results = [call] if single else [insert(operator.getitem, call, i, val=vals[i]) for i in range(len(outputs))]
        members = set(inside)
        for node, result in zip(outputs, results):
            node.replace_all_uses_with(result, delete_user_cb=lambda user: user not in members)
            give_role(result, role(node))
        for node in reversed(inside):
            if not node.users:  # a size that a later block reads stays until that block reads it from its own inputs
                graph.erase_node(node)
        for node, result in zip(outputs, results):
            if made_by(node):
                result.name = node.name  # free again: the node itself is gone
            else:
                result.name = graph._graph_namespace.create_name(f"{_kind_of_result(node)}_{insert.region}", None)
        return call


def _at_top(node: fx.Node) -> bool:
    by = made_by(node)
    by_position = node.target in _BY_POSITION
    return node.op in ("placeholder", "get_attr", "output") or by in (*_TOP, OutlineBlocks.name) or by_position


def _inner(node: fx.Node, module: str | None) -> str | None:
    """The path of a tensor inside the block's module; None: it lies elsewhere."""
    inside = module is not None and str(node.target).startswith(f"{module}.")
    return str(node.target)[len(f"{module}.") :] if inside else None


def _recomputed(node: fx.Node) -> bool:
    """A size that a block reads from its own inputs; `tail` is a plain argument."""
    return is_size(node) and node.op == "call_function"


def _role(node: fx.Node, facts: Facts) -> str:
    """What an input is to a block, whichever block it is: equal blocks must name equal inputs alike."""
    known = {facts.primary: "hidden", facts.mask: "mask"}
    return "tensor" if node.op == "get_attr" else known.get(node.name) or stem(node.name)


def _reads(user: fx.Node, node: fx.Node) -> bool:
    return not is_size(node) or _at_top(user)


def _source(symbol: sympy.Expr, inputs: Iterable[fx.Node]) -> tuple[fx.Node, int]:
    for node in inputs:
        if isinstance(value(node), Tensor):
            for dim, size in enumerate(value(node).shape):
                if expression(size) == symbol:
                    return node, dim
    raise GraphError(f"A block reads the size {symbol} but none of its inputs has it; use compile='whole'.")


def _kind_of_result(node: fx.Node) -> str:
    """What flows from block to block has the length among its sizes; a cache's states have not."""
    sizes: tuple[Any, ...] = value(node).shape if isinstance(value(node), Tensor) else ()
    return "hidden" if len(sizes) > 1 and isinstance(expression(sizes[1]), sympy.Symbol) else "state"


def _looks(tensor: Tensor) -> tuple[Any, ...]:
    return type(tensor), tuple(tensor.shape), tensor.dtype, tensor.device, tensor.requires_grad
