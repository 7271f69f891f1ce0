"""Runs passes, in order, on a private copy of a captured graph, and remembers what each did.

The runner, never a pass, copies, checks and records. A pass is a frozen dataclass with `name` and
`rewrite(graph, facts) -> int`, the number of sites it changed.
"""

from __future__ import annotations

import copy
import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import fx

from simba_fx.graph.facts import Facts, drop_dead_code
from simba_fx.graph.marks import AUTOCAST, made_by, region

__all__ = ["Pass", "Stage", "run_passes"]


class Pass(Protocol):
    """A rewrite of a graph. Equal fields, equal behaviour; it prints as its own configuration."""

    @property
    def name(self) -> str: ...

    def rewrite(self, graph: fx.Graph, facts: Facts) -> int:
        """Edit `graph` in place; return how many sites changed. A second run changes none."""
        ...


@dataclass(frozen=True)
class Stage:
    """What one pass did."""

    by: str
    changed: int
    text: str
    """The graph after the pass, one node per line."""


def run_passes(graph: fx.Graph, facts: Facts, passes: Sequence[Pass]) -> tuple[fx.Graph, list[Stage]]:
    """Rewrite a copy of `graph`.

    Returns:
        The rewritten graph and one stage per pass, after a first one, "capture". Every node's `meta["val"]` is true
        in the length of its own region (`simba_fx.graph.facts`).

    Raises:
        GraphError and whatever a pass raises, with a note that names the pass.
    """
    graph = copy.deepcopy(graph)
    history = [Stage("capture", 0, text(graph))]
    for step in passes:
        try:
            changed = step.rewrite(graph, facts)
            graph.lint()
        except Exception as error:
            error.add_note(f"while simba_fx ran the pass {step!r}")
            raise
        history.append(Stage(repr(step), changed, text(graph)))
    drop_dead_code(graph)
    return graph, history


def text(graph: fx.Graph) -> str:
    """The arguments, then one node per line, inserted ones marked with pass and block."""
    arguments = ", ".join(node.name for node in graph.find_nodes(op="placeholder"))
    lines = [f"forward({arguments}):"]
    for node in graph.nodes:
        if node.op in ("placeholder", "get_attr"):
            continue
        args = ", ".join([*map(_short, node.args), *(f"{k}={_short(v)}" for k, v in node.kwargs.items())])
        target = getattr(node.target, "_opname", getattr(node.target, "__name__", str(node.target)))
        origin = f"    # {by}, block {region(node)}" if (by := made_by(node)) else ""
        origin += f"    # {autocast}" if (autocast := node.meta.get(AUTOCAST)) else ""
        lines.append(f"{node.name} = {target}({args}){origin}" if node.op != "output" else f"return {args}")
    return "\n".join(lines)


def _short(argument: Any) -> str:
    if isinstance(argument, list | tuple):
        return "[" + ", ".join(map(_short, argument)) + "]"
    told = str(argument)
    return told if len(told) <= _LONG else f"{told[:_LONG]}…"


_LONG = 100
"""Characters of an argument: how a registered function is called takes a page."""


def diff(before: Stage, after: Stage, context: int = 1) -> str:
    """Unified diff of two stages' graphs."""
    old, new = before.text.splitlines(), after.text.splitlines()
    return "\n".join(difflib.unified_diff(old, new, before.by, after.by, lineterm="", n=context))
