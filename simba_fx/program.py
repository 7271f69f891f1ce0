"""What a transformed graph runs as: one `Program`, and under it one `Block` per block.

Both are ordinary `torch.fx.GraphModule`s: they print and run eagerly. What they add is how
`torch.compile` meets them with `compile="blocks"`: the program's own frame is left to Python, and each *kind* of block
is compiled once, because its instances share one code object and their lengths are marked as dynamic.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import sympy
from torch import Tensor, fx, nn

from simba_fx.graphs import expression, look_up, value

__all__ = ["Block", "Program", "dynamic_marker", "left_alone", "left_to_python"]


def left_to_python(function: Any) -> Any:
    """Dynamo runs this frame as it is, and goes on compiling the frames that it calls. (Importing Dynamo takes a
    second: called while a model is transformed, not at import.)"""
    import torch._dynamo

    return torch._dynamo.disable(function, recursive=False)  # type: ignore[no-untyped-call]  # untyped in torch


def left_alone(function: Any) -> Any:
    """Dynamo compiles neither this frame nor those that it calls."""
    import torch._dynamo

    return torch._dynamo.disable(function)  # type: ignore[no-untyped-call]  # untyped in torch


@functools.cache
def dynamic_marker() -> Callable[[Iterable[Any], Iterable[tuple[int, ...]]], None]:
    """A function that lets the first compilation serve every size of the given dimensions of the given tensors."""
    import torch._dynamo

    def mark(values: Iterable[Any], dims: Iterable[tuple[int, ...]]) -> None:
        for tensor, dynamic in zip(values, dims):
            if isinstance(tensor, Tensor):
                for dim in dynamic[: tensor.dim()]:
                    torch._dynamo.maybe_mark_dynamic(tensor, dim)

    marker: Callable[[Iterable[Any], Iterable[tuple[int, ...]]], None] = left_alone(mark)
    return marker


class Block(fx.GraphModule):
    """One block of a transformed model: its code belongs to its kind, its parameters are its own."""

    _dynamic: tuple[tuple[int, ...], ...] = ()
    """For each input, the dimensions that are B or L."""

    @staticmethod
    def kind(graph: fx.Graph, owned: Mapping[str, Any], modules: Mapping[str, nn.Module], name: str) -> Block:
        block = Block({**owned, **modules}, graph, class_name=name)
        block.__dict__["_dynamic"] = tuple(map(_symbolic_dims, graph.find_nodes(op="placeholder")))
        return block

    def recompile(self) -> Any:
        code = super().recompile()
        mark = dynamic_marker()

        def run(self: Block, *inputs: Any) -> Any:
            mark(inputs, self._dynamic)
            return self.forward(*inputs)

        type(self).__call__ = left_to_python(run)  # type: ignore[method-assign]  # instead of GraphModule's wrapper
        return code

    def instance(self, owned: Mapping[str, Any]) -> Block:
        """The same code over other parameters."""
        block: Block = object.__new__(type(self))
        block.__dict__.update(self.__dict__)
        block.__dict__["_parameters"] = {k: v for k, v in owned.items() if isinstance(v, nn.Parameter)}
        block.__dict__["_buffers"] = {k: v for k, v in owned.items() if not isinstance(v, nn.Parameter)}
        block.__dict__["_modules"] = dict(self._modules)
        return block


def _symbolic_dims(node: fx.Node) -> tuple[int, ...]:
    val = value(node)
    sizes = val.shape if isinstance(val, Tensor) else ()
    return tuple(dim for dim, size in enumerate(sizes) if isinstance(expression(size), sympy.Symbol))


class Program(fx.GraphModule):
    """A captured and rewritten model over the original's own parameters.

    Parameters and buffers are registered under the paths that they have in the original module; the blocks are reached
    as attributes but hold no parameters of their own in `state_dict()`.
    """

    _left_to_python = False
    _held: dict[str, Any]
    """What the graph's targets stand for, by path."""
    _bindings: list[tuple[Block, str, str]]
    """(block, its name for a tensor, the tensor's path), for each tensor of each block."""

    def __init__(self, attributes: Mapping[str, Any], graph: fx.Graph, name: str = "Program") -> None:
        blocks = {target: held for target, held in attributes.items() if isinstance(held, Block)}
        super().__init__(dict(attributes), graph, class_name=name)
        paths = {id(held): path for path, held in attributes.items() if isinstance(held, Tensor)}
        for target, block in blocks.items():
            self._modules.pop(target, None)
            self.__dict__[target] = block
        for target, held in attributes.items():
            _register(self, target, held)
        self.__dict__["_held"] = dict(attributes)
        self.__dict__["_bindings"] = [
            (block, name, paths[id(tensor)])
            for block in blocks.values()
            for name, tensor in (*block._parameters.items(), *block._buffers.items())
        ]
        if blocks:
            type(self)._left_to_python = True
            self.recompile()

    def attributes(self) -> dict[str, Any]:
        """What the graph's targets stand for now: tensors by path, submodules, blocks."""
        return {path: look_up(self, path) if isinstance(held, Tensor) else held for path, held in self._held.items()}

    def rebind(self) -> None:
        """Let the blocks read the parameters registered now (`load_state_dict(assign=True)` replaces them)."""
        for block, name, path in self._bindings:
            held = block._parameters if name in block._parameters else block._buffers
            held[name] = look_up(self, path)

    def over(self, attributes: Mapping[str, Any]) -> Any:
        """The same program over other tensors, given by the same paths."""
        blocks: dict[int, dict[str, Any]] = {id(held): {} for held in self._held.values() if isinstance(held, Block)}
        for block, name, path in self._bindings:
            blocks[id(block)][name] = attributes[path]
        new = {
            path: held.instance(blocks[id(held)]) if isinstance(held, Block) else attributes[path]
            for path, held in self._held.items()
        }
        graph = fx.Graph()
        graph.output(graph.graph_copy(self.graph, {}))
        return type(self).__mro__[1](new, graph, type(self).__name__)

    def recompile(self) -> Any:
        code = super().recompile()
        if self._left_to_python:
            type(self).forward = left_to_python(type(self).forward)
        return code


def _register(root: Any, path: str, tensor: Any) -> None:
    *parents, name = path.split(".")
    for parent in parents:
        if parent not in root._modules:
            root.add_module(parent, nn.Module())
        root = root._modules[parent]
    if isinstance(tensor, nn.Parameter):
        root.register_parameter(name, tensor)
    elif isinstance(tensor, Tensor):
        root.register_buffer(name, tensor)
