"""What Dynamo's graphs are given: which of their inputs are a module's own, what a caller named the others, and how to
have the length of a sequence traced as a symbol.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, fx, nn

from simba_fx.capture.examples import named_sizes
from simba_fx.frontends.dynamo.internals import AttrSource, LocalSource, NNModuleSource

__all__ = ["Input", "Marks", "inputs_of"]


@dataclass(frozen=True)
class Input:
    """One placeholder of Dynamo's graph."""

    node: fx.Node
    source: str
    """As Dynamo writes it: `L['input_ids']`."""
    name: str | None
    """What the caller, or the module that is called, names it; None: nothing is known."""
    example: Any
    """The tensor of the call that is being compiled, or a number."""
    owned: bool
    """Whether it is a parameter or buffer of a module."""
    held: bool
    """Whether it was found inside an argument that is an object of some class, as a cache's states are."""


def inputs_of(graph: fx.Graph, scope: Mapping[str, Any]) -> list[Input]:
    """The inputs of Dynamo's graph, in order; `scope`: the local variables of the frame that it was traced from."""
    found = []
    for node in graph.find_nodes(op="placeholder"):
        argument = node.meta["grapharg"]
        chain = list(_chain(argument.source))
        owned = isinstance(argument.example, nn.Parameter) or any(isinstance(s, NNModuleSource) for s in chain)
        held = not owned and any(isinstance(s, AttrSource) for s in chain)
        name = argument.source.name
        source = name if isinstance(name, str) else name()  # a method before torch 2.12
        found.append(Input(node, source, _argument_name(chain, scope), argument.example, owned, held))
    return found


def _chain(source: Any) -> Iterable[Any]:
    while source is not None:
        yield source
        source = getattr(source, "base", None)


def _argument_name(chain: list[Any], scope: Mapping[str, Any]) -> str | None:
    """The keyword, attribute or variable that an input came by; what came by position has the callee's name for it."""
    last = chain[0]
    if isinstance(last, LocalSource):
        return last.local_name
    if isinstance(last, AttrSource):
        return last.member
    index = getattr(last, "index", None)
    if isinstance(index, str):
        return index
    if isinstance(index, int) and len(chain) == 2 and isinstance(chain[1], LocalSource):
        arguments = scope.get(chain[1].local_name)  # the *args of a wrapper around a module's forward
        if isinstance(arguments, tuple) and arguments and isinstance(arguments[0], nn.Module):
            return dict(enumerate(inspect.signature(type(arguments[0]).forward).parameters)).get(index)
    return None


_DYNAMIC, _STATIC = "_dynamo_weak_dynamic_indices", "_dynamo_static_indices"


@dataclass
class Marks:
    """Marks on the tensors of a call that say which sizes Dynamo is to trace as symbols, and what was there before."""

    before: list[tuple[Tensor, str, Any]] = field(default_factory=list)

    def length(self, inputs: Iterable[Input], rows: int, length: int) -> bool:
        """Mark every size that is the length, and every other size of the same tensors as fixed; whether there is one.

        What the call marks itself stays marked: it may ask for more symbols than one.
        """
        marked = False
        for given in inputs:
            if given.owned or not isinstance(given.example, Tensor):
                continue
            sizes = named_sizes(given.example, rows, length)
            dims = [d for d, size in enumerate(sizes) if size == "L"] or ([0] if sizes == (length,) else [])
            if dims:
                self._add(given.example, _DYNAMIC, dims)
                self._add(given.example, _STATIC, [d for d in range(len(sizes)) if d not in dims])
                marked = marked or len(sizes) > 1
        return marked

    def _add(self, tensor: Tensor, attribute: str, dims: list[int]) -> None:
        old = getattr(tensor, attribute, None)
        self.before.append((tensor, attribute, old))
        if dims:
            setattr(tensor, attribute, {*(old or ()), *dims})

    def undo(self) -> None:
        """Leave the tensors as they were found."""
        for tensor, attribute, old in reversed(self.before):
            if old is not None:
                setattr(tensor, attribute, old)
            elif hasattr(tensor, attribute):
                delattr(tensor, attribute)
        self.before.clear()
