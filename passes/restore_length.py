"""Pass `restore-length`: after the last block every token is back, each with the hidden state it left with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from simba_fx.errors import GraphError
from simba_fx.graphs import (
    Facts,
    Insert,
    end_of,
    output_of,
    region,
    returned,
    selects,
    sequence_dims,
    tracked,
    value,
    where,
)


@dataclass(frozen=True)
class RestoreLength:
    """Put survivors and early exits back in their places (method.md section 7, `output="full"`).

    Before: `h = block_11(...)` of length k, read by the final norm.
    After: at each cut, `exit_3 = take_tokens(h_3, dropped_3)`, and once after the last block

        full = restore_tokens([exit_0, …, exit_10, h], [left_0, …, left_10, positions_10], length)

    1. Each token is read once and written once: the places are a permutation of 0 … L-1 (with padding, place L takes
    what has none of its own). 2. Values of earlier blocks that are outputs (`output_hidden_states`) are restored
    from the exits before them. 3. `output="kept"`: nothing to restore.
    """

    output: str = "full"

    name = "restore-length"

    def rewrite(self, graph: fx.Graph, facts: Facts) -> int:
        cuts = selects(graph)
        done = any((node.meta.get("simba_fx") or {}).get("pass") == self.name for node in graph.nodes)
        if self.output != "full" or not cuts or done:
            return 0
        outputs = output_of(graph)
        values = set(returned(graph)[: facts.values])
        readers = [node for node in graph.nodes if region(node) == facts.n_blocks and node is not outputs]
        changed = 0
        exits: dict[tuple[fx.Node, int], fx.Node] = {}
        for node in list(graph.nodes):
            before = [cut for cut in cuts if region(cut) < region(node) < facts.n_blocks]
            if not before or not any(user in readers or (user is outputs and node in values) for user in node.users):
                continue
            if not isinstance(value(node), Tensor) or not sequence_dims(node, facts):
                continue
            index = self._carried_index(node, cuts)
            full = self._restore(graph, facts, node, index, before, exits)
            read_after = lambda user: user in readers  # noqa: E731
            node.replace_all_uses_with(full, delete_user_cb=read_after)
            if node in values:
                flat = returned(graph)
                restored = [full if n is node and i < facts.values else n for i, n in enumerate(flat)]
                outputs.args = (type(flat)(restored),)
            changed += 1
        return changed

    def _carried_index(self, node: fx.Node, cuts: list[fx.Node]) -> int:
        """Which of the values carried from block to block `node` continues."""
        carried = [_carried(cut) for cut in cuts]
        matching = [i for i, gathered in enumerate(carried[0]) if value(gathered).shape[2:] == value(node).shape[2:]]
        if len({len(values) for values in carried}) > 1 or len(matching) != 1:
            names = [[_read_by(gathered).name for gathered in values] for values in carried]
            raise GraphError(
                f"Node {node.name} in {where(node)} is read after the last block; expected one value per cut that it "
                f"continues (the residual stream), found {names[0]} at the first cut and {names[-1]} at the last. Use "
                "output='kept', or keep the blocks around it whole."
            )
        return matching[0]

    def _restore(self, graph: fx.Graph, facts: Facts, node: fx.Node, index: int, before: list[fx.Node],
                 exits: dict[tuple[fx.Node, int], fx.Node]) -> fx.Node:  # fmt: skip
        pieces, places = [], []
        for cut in before:
            if (cut, index) not in exits:
                exits[cut, index] = self._exit(graph, cut, index, value(node).dtype)
            pieces.append(exits[cut, index])
            places.append(_result(cut, 3))
        places.append(_result(before[-1], 2))
        insert = Insert(graph, end_of(graph, facts.n_blocks - 1), facts.n_blocks, self.name)
        length = tracked(graph, "length")
        positions: Any = tracked(graph, "positions")
        full = value(node).new_empty((*value(positions).shape, *value(node).shape[2:]))
        return insert(torch.ops.simba_fx.restore_tokens.default, [*pieces, node], places, length, val=full,
                      role="restored")  # fmt: skip

    def _exit(self, graph: fx.Graph, cut: fx.Node, index: int, dtype: torch.dtype) -> fx.Node:
        """What the tokens that leave at `cut` carry with them, `(B, m - k + 2, D)`, in the result's dtype."""
        gathered = _carried(cut)[index]
        insert = Insert(graph, end_of(graph, region(cut)), region(cut), self.name)
        name = f"exit_{region(cut)}" + (f"_{index}" if index else "")
        arguments = (_read_by(gathered), _result(cut, 1))
        val = value(gathered)
        taken = insert(torch.ops.simba_fx.take_tokens.default, *arguments, val=val, role="exit", name=name)
        if val.dtype == dtype:
            return taken
        return insert(torch.ops.aten.to.dtype, taken, dtype, val=val.to(dtype), role="exit")


def _carried(cut: fx.Node) -> list[fx.Node]:
    """The gathers of the residual stream at a cut."""
    return [user for user in _result(cut, 0).users if user.meta.get("simba_fx", {}).get("role") == "carried"]


def _read_by(gather: fx.Node) -> Any:
    return gather.args[0]


def _result(cut: fx.Node, index: int) -> Any:
    return next(user for user in cut.users if user.args[1] == index)
