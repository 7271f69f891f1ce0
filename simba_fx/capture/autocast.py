"""`torch.autocast` inside of a forward.

A graph holds such a region as an operator that runs a graph of its own. Where it changes nothing (most say
`enabled=False` where it is off already) the operators stand in the graph themselves.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx

from simba_fx.errors import CaptureError
from simba_fx.graph.facts import where
from simba_fx.graph.marks import region

__all__ = ["idle_regions_left_out", "refuse_graphs_in_blocks"]


@contextmanager
def idle_regions_left_out() -> Iterator[None]:
    """While the body runs, in this thread."""
    own: Any = torch.autocast.__enter__, torch.autocast.__exit__
    thread, idle = threading.get_ident(), set[int]()

    def enter(self: Any) -> Any:
        on, dtype = torch.is_autocast_enabled(self.device), torch.get_autocast_dtype(self.device)
        alike = self._enabled == on and (not on or self.fast_dtype == dtype)
        if threading.get_ident() != thread or not alike:
            return own[0](self)
        idle.add(id(self))
        return self

    def leave(self: Any, *raised: Any) -> Any:
        if threading.get_ident() == thread and id(self) in idle:
            idle.discard(id(self))
            return None
        return own[1](self, *raised)

    torch.autocast.__enter__, torch.autocast.__exit__ = enter, leave  # type: ignore[method-assign]
    try:
        yield
    finally:
        torch.autocast.__enter__, torch.autocast.__exit__ = own  # type: ignore[method-assign]


def refuse_graphs_in_blocks(graph: fx.Graph, attributes: dict[str, Any], blocks: int) -> None:
    """`attributes`: what `get_attr` nodes name; `blocks`: how many there are.

    Raises:
        CaptureError: an operator of a block runs a graph of its own, into which no pass looks.
    """
    for node in graph.find_nodes(op="get_attr"):
        user = next((user for user in node.users if 0 <= region(user) < blocks), None)
        if isinstance(attributes.get(node.target), fx.GraphModule) and user is not None:
            raise CaptureError(
                f"{where(user)} runs {user.target} on a graph of its own, as a part of a forward under torch.autocast "
                "becomes one; expected a block of plain operators, since tokens are scored and gathered between them. "
                "Write the casts out there (x.float(), x.to(torch.bfloat16)), or use autocast around the whole model."
            )
