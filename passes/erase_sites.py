"""Pass `erase-sites`: the markers of lifted calls go; the canonical operators stay."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from simba_fx.graph.facts import Facts


@dataclass(frozen=True)
class EraseSites:
    """Drop the identities that `simba_fx.capture.lift` put around each lifted call.

    Before: `e = site_enter(u, [...], 3); y = selective_scan(e, ...)[0]; r = site_exit(y, 3, 0)`.
    After: `y = selective_scan(u, ...)[0]`, and r's users read y.
    """

    name = "erase-sites"

    def rewrite(self, graph: fx.Graph, facts: Facts) -> int:
        markers = (torch.ops.simba_fx.site_enter.default, torch.ops.simba_fx.site_exit.default)
        changed = 0
        for node in list(graph.nodes):
            if node.target not in markers:
                continue
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
            changed += 1
        return changed
