"""What a captured graph takes for granted of the sizes: a graph holds one side of every branch on them.

While a model is traced, torch answers questions about sizes from the example and notes a guard for most of them. Not
for `B == 1`: it takes every symbolic size for at least 2. So questions that the model's own code asks (`if`, `while`,
`bool`, `int`) are noted here as well, with the line that asked. Calls that would have other answers are refused.
"""

from __future__ import annotations

import linecache
import math
import os
import sys
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import sympy
import torch
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._sympy.printers import PythonPrinter

from simba_fx.errors import CaptureError, InputError

__all__ = ["Guard", "Question", "check_guards", "guards_of", "watched"]

_TORCH = os.path.dirname(torch.__file__) + os.sep
_CONVERSIONS = (os.path.join(_TORCH, "__init__.py"), ("__bool__", "__int__"))
_OURS = str(Path(__file__).parent) + os.sep


@dataclass(frozen=True)
class Question:
    """A fact about sizes that the trace relied on."""

    fact: sympy.Basic
    line: str
    """`net.py, line 16: if x.shape[1] > 30:`"""
    early: bool
    """Asked of sizes of the input alone: before the first scan, and answered without a guard, hence asked anew (and
    noted anew) wherever else it matters."""


@dataclass(frozen=True)
class Guard:
    """A fact about B and L that calls must share."""

    text: str
    line: str
    early: bool
    holds: Callable[[Any, Any], bool]
    """A function of B and L: of the lengths in blocks as well, unless `early`."""


@contextmanager
def watched(scans: Collection[Any]) -> Iterator[list[Question]]:
    """Note, in the list that is yielded, what this thread's traces take for granted; `scans` grows as they meet scans.

    Torch's method is replaced for the whole process while the body runs (`simba_fx.lift.one_at_a_time` is held);
    other threads get what they would have got.
    """
    questions: list[Question] = []
    own, thread = ShapeEnv.evaluate_expr, threading.get_ident()

    def evaluate_expr(self: Any, expr: Any, *args: Any, **kwargs: Any) -> Any:
        known = len(self.guards)
        answer = own(self, expr, *args, **kwargs)
        if threading.get_ident() == thread:
            line, direct = _asker(sys._getframe(1))
            questions.extend(Question(guard.expr, line, False) for guard in self.guards[known:])
            if direct and len(self.guards) == known and isinstance(expr, sympy.logic.boolalg.Boolean):
                questions.append(Question(expr if answer else sympy.Not(expr), line, not scans))
        return answer

    patched: Any = ShapeEnv
    patched.evaluate_expr = evaluate_expr
    try:
        yield questions
    finally:
        patched.evaluate_expr = own


def _asker(frame: FrameType | None) -> tuple[str, bool]:
    """The line of the model's code that a question comes from, and whether it asked itself, not a function of torch."""
    direct = False
    while frame is not None and (ours := frame.f_code.co_filename).startswith((_TORCH, _OURS)):
        direct = ours == _CONVERSIONS[0] and frame.f_code.co_name in _CONVERSIONS[1]
        frame = frame.f_back
    if frame is None:
        return "", False
    file, number = frame.f_code.co_filename, frame.f_lineno
    code = linecache.getline(file, number).strip()
    return f"{os.path.basename(file)}, line {number}" + (f": `{code}`" if code else ""), direct


def guards_of(shape_env: ShapeEnv, questions: Sequence[Question],
              sizes: Mapping[sympy.Symbol, str]) -> tuple[Guard, ...]:  # fmt: skip
    """The guards of a trace. `sizes`: the symbols of its inputs' sizes, each "B" or "L".

    Raises:
        CaptureError: a guard is about something else, so that no call can be checked against it.
    """
    noted = {question.fact: question for question in reversed(questions)}
    every = [noted.get(guard.expr, Question(guard.expr, "", False)) for guard in shape_env.guards]
    every += [question for question in questions if question.fact not in {guard.expr for guard in shape_env.guards}]
    letters = {symbol: sympy.Symbol(name, integer=True, positive=True) for symbol, name in sizes.items()}
    guards: dict[str, Guard] = {}
    for question in every:
        fact = question.fact.xreplace(letters)
        fact = fact.canonical if isinstance(fact, sympy.core.relational.Relational) else fact
        if fact in (sympy.true, True):
            continue
        text = PythonPrinter().doprint(fact)
        if unknown := fact.free_symbols - set(letters.values()):
            raise CaptureError(
                f"The model branches on {', '.join(sorted(map(str, unknown)))}, a size that depends on its data "
                f"({question.line or text}); expected branches on the sizes of its inputs alone. Take the branch out."
            )
        known = guards.get(text)
        if known is None or (known.early and not question.early):
            guards[text] = Guard(text, question.line, question.early, _function(text))
    return tuple(guards.values())


def _function(text: str) -> Callable[[Any, Any], bool]:
    """`text`, as torch prints an expression of B and L, as a function of them."""
    function: Callable[[Any, Any], bool] = eval(f"lambda B, L: {text}", {"math": math, "torch": torch})
    return function


def check_guards(guards: Sequence[Guard], name: str, rows: Any, length: Any, inside: Sequence[tuple[int, Any]]) -> None:
    """Refuse sizes that would have taken another branch.

    Args:
        name: of the model; `rows`, `length`: B and L of the call.
        inside: for each cut the block behind it and the tokens that enter it.

    Raises:
        InputError: a guard does not hold, at the input or where fewer tokens are left.
    """
    for guard in guards:
        told = f"{name} was captured where {guard.text}" + (f" ({guard.line})" if guard.line else "")
        if not guard.holds(rows, length):
            raise InputError(
                f"{told}; expected calls for which that holds, since a graph has one side of a branch; found "
                f"B = {rows}, L = {length}. Pass other sizes, or write the model without a branch on them."
            )
        for block, count in () if guard.early else inside:
            if not guard.holds(rows, count):
                raise InputError(
                    f"{told}; expected that to hold in every block, since a graph has one side of a branch; found "
                    f"B = {rows}, L = {count} at block {block}, of {length} tokens. Use schedule='dense', or write the "
                    "model without a branch on sizes."
                )
