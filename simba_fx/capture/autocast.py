"""`torch.autocast` inside of a forward.

torch.export makes an operator of such a region that runs a graph of its own, into which no pass looks. Here the nodes
of a region stand in the graph as all others do, and each says what it runs under (`meta["autocast"]`); the code that
is generated runs them there. A region that changes nothing (most say `enabled=False` where it is off already) is none.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from simba_fx.compiling import enter_autocast, exit_autocast
from simba_fx.errors import CaptureError
from simba_fx.graph.facts import value, where
from simba_fx.graph.marks import AUTOCAST, Autocast, region

__all__ = ["mark_regions", "refuse_graphs_in_blocks", "regions_noted", "regions_noted_of"]

_library: Any = torch.library.Library("simba_fx", "FRAGMENT")  # type: ignore[no-untyped-call]  # untyped in torch
_library.define("autocast_begins(str device, ScalarType dtype, bool enabled) -> ()")
_library.define("autocast_ends() -> ()")
for _op in ("autocast_begins", "autocast_ends"):
    _library.impl(_op, lambda *_: None, "CompositeExplicitAutograd")
    torch.library.register_fake(f"simba_fx::{_op}", lambda *_: None)
_BEGINS, _ENDS = torch.ops.simba_fx.autocast_begins.default, torch.ops.simba_fx.autocast_ends.default
fx.node.has_side_effect(_BEGINS)
fx.node.has_side_effect(_ENDS)


@contextmanager
def regions_noted() -> Iterator[None]:
    """While the body runs, a region that this thread traces lies between two nodes."""
    own: Any = torch.autocast.__enter__, torch.autocast.__exit__
    thread, entered = threading.get_ident(), dict[int, Any]()

    def enter(self: Any) -> Any:
        if threading.get_ident() != thread:
            return own[0](self)
        entered[id(self)] = _enter(self)
        return self

    def leave(self: Any, *raised: Any) -> Any:
        if threading.get_ident() != thread or id(self) not in entered:
            return own[1](self, *raised)
        return _leave(entered.pop(id(self)))

    torch.autocast.__enter__, torch.autocast.__exit__ = enter, leave  # type: ignore[method-assign]
    try:
        yield
    finally:
        torch.autocast.__enter__, torch.autocast.__exit__ = own  # type: ignore[method-assign]


@contextmanager
def regions_noted_of(graph: fx.Graph) -> Iterator[None]:
    """The same, while a graph of Dynamo's is traced, which has nodes that enter and leave regions."""
    replaced: dict[Any, Any] = {enter_autocast: lambda *args: _enter(torch.autocast(*args)), exit_autocast: _leave}
    nodes = [(node, node.target) for node in graph.nodes if node.target in replaced]
    for node, target in nodes:
        node.target = replaced[target]
    try:
        yield
    finally:
        for node, target in nodes:
            node.target = target


def _enter(autocast: Any) -> tuple[str, tuple[Any, ...] | None]:
    """The device, and what was there before; None: the region changes nothing."""
    device, dtype, enabled = autocast.device, autocast.fast_dtype, autocast._enabled
    before = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    if enabled == before[0] and (not enabled or dtype == before[1]):
        return device, None
    torch.autocast_increment_nesting()
    _set(device, enabled, dtype)
    torch.ops.simba_fx.autocast_begins(device, dtype, enabled)
    return device, before


def _leave(entered: tuple[str, tuple[Any, ...] | None]) -> None:
    device, before = entered
    if before is not None:
        torch.ops.simba_fx.autocast_ends()
        if torch.autocast_decrement_nesting() == 0:
            torch.clear_autocast_cache()
        _set(device, *before)


def _set(device: str, enabled: bool, dtype: torch.dtype) -> None:
    torch.set_autocast_enabled(device, enabled)
    torch.set_autocast_dtype(device, dtype)


def mark_regions(graph: fx.Graph) -> None:
    """Let each node say in which region it was traced, instead of the nodes around."""
    inside: list[Autocast] = []
    for node in graph.nodes:
        if node.target is _BEGINS:
            inside.append(Autocast(*node.args))
        elif node.target is _ENDS:
            inside.pop()
        elif inside and any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(value(node))):
            node.meta[AUTOCAST] = inside[-1]
    for target in (_BEGINS, _ENDS):
        for node in graph.find_nodes(op="call_function", target=target):
            graph.erase_node(node)


def refuse_graphs_in_blocks(graph: fx.Graph, attributes: dict[str, Any], blocks: int) -> None:
    """`attributes`: what `get_attr` nodes name; `blocks`: how many there are.

    Raises:
        CaptureError: an operator of a block runs a graph of its own, into which no pass looks.
    """
    for node in graph.find_nodes(op="get_attr"):
        user = next((user for user in node.users if 0 <= region(user) < blocks), None)
        if isinstance(attributes.get(node.target), fx.GraphModule) and user is not None:
            raise CaptureError(
                f"{where(user)} runs {user.target} on a graph of its own; expected a block of plain operators, since "
                "tokens are scored and gathered between them. Write the block without it."
            )
