"""What a node of a captured graph says of itself beside its value: where it stands, which pass made it, what it is for.

A graph is a flat list of nodes in execution order. Every node belongs to one *region*, kept in `node.meta["region"]`:

    -1              before the first block (masks, rotary tables)
    0 … n-1         block i
    n               after the last block (final norm)

Placeholders, parameters (`get_attr`) and size arithmetic hoisted to the top are region -1. Regions never decrease
along the list.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import fx

__all__ = [
    "AUTOCAST",
    "MARK",
    "REGION",
    "Autocast",
    "Insert",
    "Mark",
    "Role",
    "bookkeeping",
    "give_role",
    "made_by",
    "region",
    "role",
    "tracked",
]

REGION = "region"
MARK = "simba_fx"
AUTOCAST = "autocast"


class Autocast(NamedTuple):
    """What a node runs under that was traced inside of `torch.autocast`, in `meta["autocast"]`."""

    device: str
    dtype: torch.dtype
    enabled: bool


class Role(enum.StrEnum):
    """What a node that a pass inserted is for."""

    NONE = ""
    """A step on the way to one that has a role."""

    # the graph's inputs and bookkeeping, all before the first block (`track-tokens`, `protect-tokens`)
    TAIL = "tail"
    LENGTH = "length"
    LENGTHS = "lengths"
    ROWS = "rows"
    POSITIONS = "positions"
    REAL = "real"
    PADDED = "padded"
    QUERY = "query"
    PROTECTED = "protected"

    # scores and choices; positions and realness of those that stay have the roles above
    SCORE = "score"
    SELECT = "select"
    KEPT = "kept"
    DROPPED = "dropped"
    LEFT = "left"

    # what crosses a cut (`gather-survivors`)
    CARRIED = "carried"
    """A block before the cut computed it: the residual stream."""
    INVARIANT = "invariant"
    """Of the tokens that stay, but not from the block before: tables, masks."""
    PLACE = "place"
    """Of where tokens stand, not of what they carry."""
    SQUARE = "square"
    """A mask over pairs of tokens."""

    # and what puts it back together (`restore-length`)
    EXIT = "exit"
    RESTORED = "restored"

    BLOCK = "block"
    KERNEL = "kernel"
    """A scan function of the model's own."""
    LAYOUT = "layout"


@dataclass(frozen=True)
class Mark:
    """Of a node that a pass inserted."""

    by: str
    """The pass's name."""
    role: Role = Role.NONE


def region(node: fx.Node) -> int:
    return int(node.meta.get(REGION, -1))


def made_by(node: fx.Node) -> str | None:
    """The name of the pass that inserted the node; None: it is the model's."""
    mark: Mark | None = node.meta.get(MARK)
    return mark.by if mark else None


def role(node: fx.Node) -> Role:
    """What a pass inserted the node for; `Role.NONE` for the model's own."""
    mark: Mark | None = node.meta.get(MARK)
    return mark.role if mark else Role.NONE


def give_role(node: fx.Node, new: Role) -> None:
    """Of a node that a pass inserted, in its graph alone: the mark may be shared with a copy."""
    node.meta[MARK] = replace(node.meta[MARK], role=new)


def bookkeeping(graph: fx.Graph) -> dict[Role, fx.Node]:
    """The nodes with a role before the first block, by that; of several with one role the first."""
    found: dict[Role, fx.Node] = {}
    for node in graph.nodes:
        if region(node) >= 0:
            break
        if (what := role(node)) is not Role.NONE:
            found.setdefault(what, node)
    return found


def tracked(graph: fx.Graph, wanted: Role) -> fx.Node | None:
    """The bookkeeping node of that role."""
    return bookkeeping(graph).get(wanted)


@dataclass(frozen=True)
class Insert:
    """Inserts nodes before `anchor`, in `region`, marked with the pass that made them and why."""

    graph: fx.Graph
    anchor: fx.Node
    region: int
    by: str

    def __call__(self, target: Any, *args: Any, val: Any = None, role: Role = Role.NONE, name: str | None = None,
                 like: fx.Node | None = None, op: str = "call_function", **kwargs: Any) -> fx.Node:  # fmt: skip
        with self.graph.inserting_before(self.anchor):
            node = self.graph.create_node(op, target, args, kwargs, name=name)
        if like is not None:
            node.meta.update({k: v for k, v in like.meta.items() if k in ("nn_module_stack", "stack_trace", AUTOCAST)})
        node.meta.update({"val": val, REGION: self.region, MARK: Mark(self.by, role)})
        return node
