"""Pass `restore-length`: after the last block every token is back, each with the hidden state it left with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from simba_fx.errors import GraphError
from simba_fx.graph.facts import Facts, end_of, output_of, returned, selects, sequence_dims, value, where
from simba_fx.graph.marks import Insert, Role, made_by, region, role, tracked
from simba_fx.graph.residual import match_residual


@dataclass(frozen=True)
class RestoreLength:
    """Put survivors and early exits back in their places (method.md section 7, `output="full"`).

    Before: `h = block_11(...)` of length k, read by the final norm.
    After: at each cut, `exit_3 = take_tokens(h_3, dropped_3)`, and once after the last block

        full = restore_tokens([exit_0, …, exit_10, h], [left_0, …, left_10, positions_10], length)

    1. Each token is read once and written once: the places are a permutation of 0 … L-1 (with padding, place L takes
    what has none of its own). 2. Values of earlier blocks that are outputs (`output_hidden_states`) are restored
    from the exits before them. 3. `output="kept"`: nothing to restore. 4. Of several values carried from block to block
    each is restored from its own exits (`simba_fx.graph.residual`).
    """

    output: str = "full"

    name = "restore-length"

    def rewrite(self, graph: fx.Graph, facts: Facts) -> int:
        cuts = selects(graph)
        done = any(made_by(node) == self.name for node in graph.nodes)
        if self.output != "full" or not cuts or done:
            return 0
        outputs = output_of(graph)
        values = set(returned(graph)[: facts.values])
        readers = {node for node in graph.nodes if region(node) == facts.n_blocks and node is not outputs}
        changed = 0
        exits: dict[tuple[fx.Node, torch.dtype], fx.Node] = {}
        found = {}
        for node in list(graph.nodes):
            if not any(user in readers or (user is outputs and node in values) for user in node.users):
                continue
            before = [cut for cut in cuts if region(cut) < region(node) < facts.n_blocks]
            if not before:
                continue
            if isinstance(value(node), Tensor) and sequence_dims(node, facts):
                found[node] = before
        read_last = [node for node in found if any(user in readers for user in node.users)]
        left_with = {node: self._left_with(node, before, read_last, facts) for node, before in found.items()}
        for node, before in found.items():
            full = self._restore(graph, facts, node, left_with[node], before, exits)
            read_after = lambda user: user in readers  # noqa: E731
            node.replace_all_uses_with(full, delete_user_cb=read_after)
            if node in values:
                flat = returned(graph)
                restored = [full if n is node and i < facts.values else n for i, n in enumerate(flat)]
                outputs.args = (type(flat)(restored),)
            changed += 1
        return changed

    def _left_with(self, node: fx.Node, before: list[fx.Node], read_last: list[fx.Node],
                   facts: Facts) -> list[fx.Node]:  # fmt: skip
        """For each cut before `node`, the gather of the value that it continues."""
        beside = read_last if node in read_last else []
        gathers = match_residual(node, [_result(cut, 0).users for cut in before], beside, facts)
        if gathers is None:
            odd = next((cut for cut in before if len(_carried(cut)) != 1), before[0])
            names = ", ".join(_read_by(gathered).name for gathered in _carried(odd))
            left, right = facts.blocks[region(odd)], facts.blocks[region(odd) + 1]
            raise GraphError(
                f"Node {node.name} in {where(node)} is read after the last block; expected one value per cut that it "
                f"continues (the residual stream), found {names} between {left} and {right}. Use output='kept', or, "
                "if these are halves of one block, make them one module of a ModuleList."
            )
        return gathers

    def _restore(self, graph: fx.Graph, facts: Facts, node: fx.Node, left_with: list[fx.Node], before: list[fx.Node],
                 exits: dict[tuple[fx.Node, torch.dtype], fx.Node]) -> fx.Node:  # fmt: skip
        pieces, places, dtype = [], [], value(node).dtype
        for cut, gathered in zip(before, left_with):
            if (gathered, dtype) not in exits:
                exits[gathered, dtype] = self._exit(graph, cut, gathered, dtype)
            pieces.append(exits[gathered, dtype])
            places.append(_result(cut, 3))
        places.append(_result(before[-1], 2))
        insert = Insert(graph, end_of(graph, facts.n_blocks - 1), facts.n_blocks, self.name)
        length = tracked(graph, Role.LENGTH)
        positions: Any = tracked(graph, Role.POSITIONS)
        full = value(node).new_empty((*value(positions).shape, *value(node).shape[2:]))
        return insert(torch.ops.simba_fx.restore_tokens.default, [*pieces, node], places, length, val=full,
                      role=Role.RESTORED)  # fmt: skip

    def _exit(self, graph: fx.Graph, cut: fx.Node, gathered: fx.Node, dtype: torch.dtype) -> fx.Node:
        """What the tokens that leave at `cut` carry with them, `(B, m - k + 2, D)`, in the result's dtype."""
        insert = Insert(graph, end_of(graph, region(cut)), region(cut), self.name)
        others = sum(user.target is torch.ops.simba_fx.take_tokens.default for user in _result(cut, 1).users)
        name = f"exit_{region(cut)}" + (f"_{others}" if others else "")
        arguments = (_read_by(gathered), _result(cut, 1))
        val = value(gathered)
        taken = insert(torch.ops.simba_fx.take_tokens.default, *arguments, val=val, role=Role.EXIT, name=name)
        if val.dtype == dtype:
            return taken
        return insert(torch.ops.aten.to.dtype, taken, dtype, val=val.to(dtype), role=Role.EXIT)


def _carried(cut: fx.Node) -> list[fx.Node]:
    """The gathers of the residual stream at a cut."""
    return [user for user in _result(cut, 0).users if role(user) is Role.CARRIED]


def _read_by(gather: fx.Node) -> Any:
    return gather.args[0]


def _result(cut: fx.Node, index: int) -> Any:
    return next(user for user in cut.users if user.args[1] == index)
