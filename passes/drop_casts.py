"""Pass `drop-casts`: numbers that are widened and narrowed again, with nothing computed between, stay as they are."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from simba_fx.graph.facts import Facts, value

_ATEN = torch.ops.aten
_CAST = _ATEN.to.dtype
_VIEWS = (_ATEN.transpose.int, _ATEN.permute.default, _ATEN.view.default, _ATEN.reshape.default,
          _ATEN.unsqueeze.default, _ATEN.squeeze.dim, _ATEN.flatten.using_ints, _ATEN.unflatten.int)  # fmt: skip
_WIDER: dict[torch.dtype, tuple[torch.dtype, ...]] = {
    torch.bfloat16: (torch.float32, torch.float64),
    torch.float16: (torch.float32, torch.float64),
    torch.float32: (torch.float64,),
}


@dataclass(frozen=True)
class DropCasts:
    """Skip a cast to a wider dtype whose only way on is back to the dtype that it came from.

    Before: `w = to(y, float32); t = transpose(w, 1, 2); r = to(t, bfloat16)`: a copy of y, since no compiler drops a
    pair of roundings.
    After: `t = transpose(y, 1, 2)`, bit for bit the same.
    """

    name = "drop-casts"

    def rewrite(self, graph: fx.Graph, facts: Facts) -> int:
        changed = 0
        for narrow in list(graph.nodes):
            if narrow.target is not _CAST:
                continue
            views: list[fx.Node] = []
            wide = narrow.args[0]
            while wide.target in _VIEWS and len(wide.users) == 1:
                views.append(wide)
                wide = wide.args[0]
            source = wide.args[0] if wide.target is _CAST and len(wide.users) == 1 else None
            if source is None or not _is_round_trip(*map(_dtype, (source, wide, narrow))):
                continue
            wide.replace_all_uses_with(source)
            for view in views:
                view.meta["val"] = value(view).to(_dtype(source))
            narrow.replace_all_uses_with(narrow.args[0])
            graph.erase_node(narrow)
            graph.erase_node(wide)
            changed += 1
        return changed


def _dtype(node: fx.Node) -> torch.dtype:
    dtype: torch.dtype = value(node).dtype
    return dtype


def _is_round_trip(source: torch.dtype, wide: torch.dtype, narrow: torch.dtype) -> bool:
    return source == narrow and wide in _WIDER.get(source, ())
