"""The frame whose graph is compiled, and what has been tried of it: Dynamo may trace one frame several times."""

from __future__ import annotations

import re
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import sympy
from torch import Tensor, fx, nn

from simba_fx.capture.blocks import paths
from simba_fx.errors import CaptureError
from simba_fx.frontends.dynamo.inputs import Input, Marks, inputs_of
from simba_fx.frontends.dynamo.internals import CompileContext, output_graph, restart
from simba_fx.graph.facts import expression

__all__ = ["Attempt", "Frame"]


@dataclass(frozen=True)
class Frame:
    """What Dynamo knows of the function whose graph this is."""

    inputs: tuple[Input, ...]
    scope: Mapping[str, Any]
    """Its variables, as Dynamo's names read them: L holds the local ones, G the global ones."""
    piece: bool
    """Whether the graph ends, or its function begins, at a graph break."""

    @staticmethod
    def current(gm: fx.GraphModule) -> Frame:
        output = output_graph()
        code = output.root_tx.f_code.co_name
        piece = output.compile_subgraph_reason.graph_break or code.startswith("torch_dynamo_resume_in")
        inputs = tuple(inputs_of(gm.graph, output.local_scope))
        return Frame(inputs, {"L": output.local_scope, "G": output.global_scope}, bool(piece))

    def module(self, nodes: Sequence[fx.Node]) -> tuple[str, nn.Module | None]:
        """The module that the paths of these nodes start from, and Dynamo's name for it; "", None where none is."""
        roots = {match.group() if (match := _ROOT.match(_first_path(node))) else "" for node in nodes}
        if len(roots) != 1 or not (root := roots.pop()):
            return "", None
        try:
            found = eval(root, {"__builtins__": {}}, dict(self.scope))  # as Dynamo's guards read the same names
        except (LookupError, AttributeError):
            return "", None
        return (root, found) if isinstance(found, nn.Module) else ("", None)


_ROOT = re.compile(r"[LG](\[[^\]]*\])+")


def _first_path(node: fx.Node) -> str:
    return next(iter(paths(node)), "")


@dataclass(eq=False)
class Attempt:
    """What one compilation of one frame has tried; Dynamo may trace it several times."""

    marks: Marks = field(default_factory=Marks)
    retraced: bool = False
    static: bool = False
    """Whether Dynamo wanted the length fixed: the rewritten graph is then made for this one."""

    @staticmethod
    def current() -> Attempt:
        """Of the compilation that is at work in this thread."""
        context = CompileContext.get()
        if context not in _attempts:
            _attempts[context] = attempt = Attempt()
            weakref.finalize(context, attempt.marks.undo)  # should tracing end in an error
        return _attempts[context]

    def retrace(self, frame: Frame, length: sympy.Expr, rows: sympy.Expr) -> None:
        """Have Dynamo trace the frame again, with the length as a symbol of its own.

        A graph whose length is a number does not tell which of its numbers are that length; and one whose batch and
        length are one symbol does not tell them apart.
        """
        numbers = [_hint(size, frame) for size in (rows, length)]
        if self.retraced or not self.marks.length(frame.inputs, *numbers):
            raise CaptureError(
                f"The length of the sequence ({length}) did not stay symbolic while Dynamo traced the model; expected "
                "a tensor input (B, L, ...), and no branch or Python loop over its tokens. Use simba_fx.transform."
            )
        self.retraced, self.static = True, not length.free_symbols
        restart("the length as a symbol")


_attempts: weakref.WeakKeyDictionary[CompileContext, Attempt] = weakref.WeakKeyDictionary()


def _hint(size: sympy.Expr, frame: Frame) -> int:
    """A size in the call that is being compiled."""
    for given in frame.inputs:
        val = given.node.meta["example_value"]
        for number, symbolic in zip(given.example.shape, val.shape) if isinstance(given.example, Tensor) else ():
            if expression(symbolic) == size:
                return int(number)
    return int(size) if size.is_Integer else 0
