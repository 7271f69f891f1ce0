"""What a captured graph takes for granted of the sizes: a graph holds one side of every branch on them.

While a model is traced, torch answers questions about sizes from the example and notes a guard for most of them. Not
for `B == 1`: it takes every symbolic size for at least 2. So questions that the model's own code asks (`if`, `while`,
`bool`, `int`) are noted here as well, with the line that asked. Calls that would have other answers are refused.
"""

from __future__ import annotations

import functools
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
from torch import nn
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from simba_fx.compiling import PythonPrinter
from simba_fx.errors import CaptureError, InputError

__all__ = ["Guard", "Question", "check_guards", "guards_of", "is_foreign", "line_of", "watched"]

_TORCH = os.path.dirname(torch.__file__) + os.sep
_CONVERSIONS = (os.path.join(_TORCH, "__init__.py"), ("__bool__", "__int__"))
_BETWEEN = 8
"""Frames from `ShapeEnv.evaluate_expr` up to a conversion: at most. (They are six in torch 2.11 to 2.14.)"""
_OURS = str(Path(__file__).parents[1]) + os.sep


@dataclass(frozen=True)
class Question:
    """A fact about sizes that the trace relied on."""

    fact: sympy.Basic
    line: str
    """`net.py, line 16: if x.shape[1] > 30:`"""
    scans: int
    """How many scans had been met."""
    new: bool
    """Whether torch noted it as a guard: it is then taken for granted wherever it is asked again."""
    modules: frozenset[int]
    """The ids of the modules that were at work."""

    @property
    def fixes_a_size(self) -> bool:
        """Whether a size of the inputs is a number from here on: the trace will be refused."""
        sides = self.fact.args if isinstance(self.fact, sympy.Eq) else ()
        return any(side.is_Symbol for side in sides) and any(side.is_number for side in sides)


@dataclass(frozen=True)
class Guard:
    """A fact about B and L that calls must share."""

    text: str
    line: str
    reach: str
    """Of which lengths it must hold: the "input"'s, the "result"'s, or those of all "blocks" as well."""
    holds: Callable[[Any, Any], bool]
    """A function of B and L."""


@contextmanager
def watched(scans: Collection[Any]) -> Iterator[list[Question]]:
    """Note, in the list that is yielded, what this thread's traces take for granted; `scans` grows as they meet scans.

    Torch's method is replaced for the whole process while the body runs (`capturing` is around it); other threads
    get what they would have got.
    """
    questions: list[Question] = []
    own, thread = ShapeEnv.evaluate_expr, threading.get_ident()

    def evaluate_expr(self: Any, expr: Any, *args: Any, **kwargs: Any) -> Any:
        known = len(self.guards)
        answer = own(self, expr, *args, **kwargs)
        if threading.get_ident() == thread:
            facts = [guard.expr for guard in self.guards[known:]]
            new = bool(facts)
            if not new and isinstance(expr, sympy.logic.boolalg.Boolean) and _is_converted(sys._getframe(1)):
                facts = [expr if answer else sympy.Not(expr)]
            if facts:
                asker = _asker(sys._getframe(1))
                line = line_of(asker.f_code.co_filename, asker.f_lineno) if asker else ""
                modules = _modules(asker)
                questions.extend(Question(fact, line, len(scans), new, modules) for fact in facts)
        return answer

    patched: Any = ShapeEnv
    patched.evaluate_expr = evaluate_expr
    try:
        yield questions
    finally:
        patched.evaluate_expr = own


def is_foreign(frame: FrameType) -> bool:
    """Whether a frame runs code of torch's or of this package, and none of a model's."""
    return _is_foreign_file(frame.f_code.co_filename)


@functools.cache  # asked for every frame of every question
def _is_foreign_file(name: str) -> bool:
    return name.startswith((_TORCH, _OURS))


def _asker(frame: FrameType | None) -> FrameType | None:
    """The model's own code that a question comes from."""
    while frame is not None and is_foreign(frame):
        frame = frame.f_back
    return frame


def _is_converted(frame: FrameType | None) -> bool:
    """Whether the model's own code asked, by `bool` or `int`, rather than a function of torch that it called. Nearly
    all questions are torch's: the conversion is looked for a few frames up, where torch has it."""
    converted = False
    for _ in range(_BETWEEN):
        if frame is None or not is_foreign(frame):
            return converted and frame is not None
        converted = frame.f_code.co_filename == _CONVERSIONS[0] and frame.f_code.co_name in _CONVERSIONS[1]
        frame = frame.f_back
    return False


def line_of(file: str, number: int) -> str:
    """`net.py, line 16: if x.shape[1] > 30:`"""
    code = linecache.getline(file, number).strip()
    return f"{os.path.basename(file)}, line {number}" + (f": `{code}`" if code else "")


def _modules(frame: FrameType | None) -> frozenset[int]:
    """The modules whose methods are running."""
    found = set()
    while frame is not None:
        if isinstance(owner := frame.f_locals.get("self"), nn.Module):
            found.add(id(owner))
        frame = frame.f_back
    return frozenset(found)


def guards_of(shape_env: ShapeEnv, questions: Sequence[Question], sizes: Mapping[sympy.Symbol, str], scans: int,
              blocks: Collection[nn.Module]) -> tuple[Guard, ...]:  # fmt: skip
    """The guards of a trace.

    Args:
        sizes: the symbols of its inputs' sizes, each "B" or "L".
        scans: how many it met; `blocks`: the modules that tokens leave between, if they are modules.

    Raises:
        CaptureError: a guard is about something else, so that no call can be checked against it.
    """
    inside = {id(block) for block in blocks}
    noted = {question.fact for question in questions}
    rest = (Question(guard.expr, "", 0, True, frozenset()) for guard in shape_env.guards if guard.expr not in noted)
    letters = {symbol: sympy.Symbol(name, integer=True, positive=True) for symbol, name in sizes.items()}
    guards: dict[str, Guard] = {}
    for question in (*questions, *rest):
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
        reach = "blocks"
        if question.scans == 0 and not question.new:
            reach = "input"
        elif inside and question.scans == scans and not inside & question.modules:
            reach = "result"
        known = guards.get(text)
        if known is None or (known.reach != reach and known.reach != "blocks"):
            reach = reach if known is None else "blocks"
            guards[text] = Guard(text, question.line, reach, _function(text))
    return tuple(guards.values())


def _function(text: str) -> Callable[[Any, Any], bool]:
    """`text`, as torch prints an expression of B and L, as a function of them."""
    function: Callable[[Any, Any], bool] = eval(f"lambda B, L: {text}", {"math": math, "torch": torch})
    return function


def check_guards(guards: Sequence[Guard], name: str, rows: Any, length: Any, inside: Sequence[tuple[int, Any]],
                 restored: bool) -> None:  # fmt: skip
    """Refuse sizes that would have taken another branch.

    Args:
        name: of the model; `rows`, `length`: B and L of the call.
        inside: for each cut the block behind it and the tokens that enter it.
        restored: whether the result has the input's length, rather than the last block's.

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
        for block, count in inside if guard.reach == "blocks" or (guard.reach == "result" and not restored) else ():
            if not guard.holds(rows, count):
                raise InputError(
                    f"{told}; expected that to hold in every block, since a graph has one side of a branch; found "
                    f"B = {rows}, L = {count} at block {block}, of {length} tokens. Use schedule='dense', or write the "
                    "model without a branch on sizes."
                )
