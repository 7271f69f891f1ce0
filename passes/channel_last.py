"""Pass `channel-last`: step sizes come out of their matrix product the way round that the scan reads them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, fx

from simba_fx.graph.facts import Facts, value
from simba_fx.graph.marks import Insert, Role, region
from simba_fx.ops.recurrences import SCANS

_ATEN = torch.ops.aten


@dataclass(frozen=True)
class ChannelLast:
    """Swap the sides of a product of a weight with transposed tokens that a scan alone reads.

    Before: `delta = matmul(W, transpose(x, 1, 2))` `(B, D, L)`, L innermost: its leading dimension is the kept count,
    which is rarely a multiple of 8, and what the next kernel reads together lies L apart.
    After: `delta = transpose(linear(x, W), 1, 2)`, the same numbers to rounding with D innermost.
    """

    name = "channel-last"

    def rewrite(self, graph: fx.Graph, facts: Facts) -> int:
        changed = 0
        for node in list(graph.find_nodes(op="call_function", target=_ATEN.matmul.default)):
            weight, tokens = node.args
            if (tokens.target is not _ATEN.transpose.int or set(tokens.args[1:]) not in ({1, 2}, {-1, -2})
                    or value(tokens).dim() != 3 or not isinstance(value(weight), Tensor) or value(weight).dim() != 2
                    or any(user.target not in SCANS for user in node.users)):  # fmt: skip
                continue
            insert = Insert(graph, node, region(node), self.name)
            val = value(node).mT.contiguous()
            product = insert(_ATEN.linear.default, tokens.args[0], weight, val=val, like=node, role=Role.LAYOUT)
            back = insert(_ATEN.transpose.int, product, 1, 2, val=val.mT, like=node, role=Role.LAYOUT)
            node.replace_all_uses_with(back)
            graph.erase_node(node)
            if not tokens.users:
                graph.erase_node(tokens)
            changed += 1
        return changed
