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

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

from simba_fx.errors import GraphError
from simba_fx.graphs import MARK, Facts, drop_dead_code, value

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
        The rewritten graph, `meta["val"]` true for every node, and one stage per pass, after a first one, "capture".

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
    """One node per line, inserted ones marked with pass and block."""
    lines = []
    for node in graph.nodes:
        if node.op in ("placeholder", "get_attr"):
            continue
        args = ", ".join([*map(_short, node.args), *(f"{k}={_short(v)}" for k, v in node.kwargs.items())])
        target = getattr(node.target, "_opname", getattr(node.target, "__name__", str(node.target)))
        mark = node.meta.get(MARK)
        origin = f"    # {mark['pass']}, block {mark['block']}" if mark else ""
        lines.append(f"{node.name} = {target}({args}){origin}" if node.op != "output" else f"return {args}")
    return "\n".join(lines)


def _short(argument: Any) -> str:
    if isinstance(argument, list | tuple):
        return "[" + ", ".join(map(_short, argument)) + "]"
    return str(argument)


def diff(before: Stage, after: Stage, context: int = 1) -> str:
    """Unified diff of two stages' graphs."""
    lines = difflib.unified_diff(before.text.splitlines(), after.text.splitlines(), "before", after.by, lineterm="", n=context)
    return "\n".join(lines)


def refresh_values(graph: fx.Graph, attributes: dict[str, Any]) -> None:
    """Recompute every `meta["val"]` from the placeholders' by running the graph on fake tensors.

    Raises:
        GraphError: an operator refuses its inputs' shapes, so the rewrite was wrong.
    """
    modes = [v.fake_mode for node in graph.find_nodes(op="placeholder") if hasattr(v := value(node), "fake_mode")]
    mode: FakeTensorMode = modes[0]

    class Refresh(fx.Interpreter):
        def run_node(self, node: fx.Node) -> Any:
            try:
                node.meta["val"] = result = super().run_node(node)
            except Exception as error:
                raise GraphError(
                    f"Node {node.name} ({node.target}) no longer fits its inputs after the rewrite: {error}"
                ) from error
            return result

    fake = {k: mode.from_tensor(v, static_shapes=True) if isinstance(v, torch.Tensor) else v for k, v in attributes.items()}
    module = fx.GraphModule(fake, graph)
    inputs = [value(node) for node in graph.find_nodes(op="placeholder")]
    with mode, torch.no_grad():
        Refresh(module, garbage_collect_values=False).run(*inputs)


def same_values(graph: fx.Graph, other: fx.Graph) -> bool:
    """Whether two graphs with equal nodes agree in every value's shape, dtype and device."""
    flat = lambda g: [pytree.tree_map(_signature, value(node)) for node in g.nodes]  # noqa: E731
    return flat(graph) == flat(other)


def _signature(leaf: Any) -> Any:
    return (tuple(map(str, leaf.shape)), leaf.dtype, str(leaf.device)) if isinstance(leaf, torch.Tensor) else str(leaf)
