"""What is different while `torch.export` traces a transformed model.

Non-strict export, the default, runs the model's Python with stand-ins: every parameter of the module that is exported
is replaced, where it is registered, by a fake tensor that records what is done to it. Three things follow. A program
must read its tensors from there and not from where it keeps them, or they would become constants of the exported
program; what it kept must be back afterwards; and what a traced call remembers is symbolic, so it must not be taken for
the result of a call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from simba_fx.program import Program

__all__ = ["Memory", "run"]


class Memory:
    """What a runtime remembers of its last call, as `last`: (rows, length, program, positions per cut, real per cut,
    mask). What a call under `torch.export` leaves is seen by what runs later in the same trace (a loss, a wrapper that
    asks `kept`) and by nobody else."""

    _called: tuple[Any, ...] | None = None
    _traced: tuple[Any, ...] | None = None

    @property
    def last(self) -> tuple[Any, ...] | None:
        return self._traced if torch.compiler.is_exporting() else self._called

    @last.setter
    def last(self, call: tuple[Any, ...] | None) -> None:
        if torch.compiler.is_exporting():
            self._traced = call
        else:
            self._called, self._traced = call, None


def run(program: Program, forward: Callable[..., Any], *inputs: Any) -> Any:
    """`forward(*inputs)`, the program's; under `torch.export` over what it has put in the place of the parameters."""
    if not torch.compiler.is_exporting() or torch.compiler.is_dynamo_compiling():
        return forward(*inputs)
    sources = program.sources()
    before = [source.holder[source.name] for source in sources]
    program.read()
    try:
        return forward(*inputs)
    finally:
        for source, tensor in zip(sources, before):
            source.holder[source.name] = tensor
