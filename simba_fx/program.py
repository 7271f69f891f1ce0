"""What a transformed graph runs as: one `Program`, and under it one `Block` per block.

Both are ordinary `torch.fx.GraphModule`s: they print and run eagerly. What they add is how
`torch.compile` meets them with `compile="blocks"`: the program's own frame is left to Python, and each *kind* of block
is compiled once, because its instances share one code object and their lengths are marked as dynamic.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import Tensor, fx, nn
from torch.utils.checkpoint import checkpoint

from simba_fx import leftovers
from simba_fx.graphs import expression, look_up, value
from simba_fx.sharding import hollow, refuse_sharded, run_sharded, state_of

__all__ = ["Block", "Program", "dynamic_marker", "left_alone", "left_to_python"]

_BLOCKS = (
    "compile='blocks' compiles block by block; fullgraph=True and torch.export.export(strict=True) need "
    "simba_fx.transform(..., compile='whole')"
)


def left_to_python(function: Any) -> Any:
    """Dynamo runs this frame as it is, and goes on compiling the frames that it calls. (Importing Dynamo takes a
    second: called while a model is transformed, not at import.)

    `torch._dynamo.disable(recursive=False)` promises the same, but its wrapper raises wherever torch.export is at work
    in the process, be it in another thread. Dynamo remembers code objects: the function gets one of its own.
    """
    import torch._dynamo.decorators

    code = function.__code__.replace()
    alone: Any = types.FunctionType(code, function.__globals__, function.__name__, None, function.__closure__)
    alone.__defaults__, alone.__kwdefaults__ = function.__defaults__, function.__kwdefaults__
    alone = torch._dynamo.decorators.skip(functools.update_wrapper(alone, function))
    alone._torchdynamo_disable_msg = _BLOCKS
    return alone


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


@dataclass(frozen=True)
class Source:
    """Where a program or a block reads a tensor, at each call: `module.attribute` becomes `holder[name]`."""

    path: str
    module: nn.Module
    attribute: str
    holder: dict[str, Any]
    name: str

    @staticmethod
    def at(root: nn.Module, path: str, reader: nn.Module, name: str) -> Source:
        parent, _, attribute = path.rpartition(".")
        parameters: Any = reader._parameters
        return Source(path, root.get_submodule(parent), attribute,
                      parameters if name in parameters else reader._buffers, name)  # fmt: skip

    @property
    def tensor(self) -> Any:
        held = self.module._parameters.get(self.attribute)
        return self.module._buffers[self.attribute] if held is None else held

    def read(self) -> bool:
        """Read the tensor anew; whether it is another object than before."""
        held, before = self.tensor, self.holder[self.name]
        self.holder[self.name] = held
        return held is not before


def _module_at(root: nn.Module, path: str) -> nn.Module | None:
    """The module that a block stands for; None where a block is no module."""
    try:
        return root.get_submodule(path)
    except AttributeError:
        return None


def _recomputed() -> Callable[..., Any]:
    """A function of its own for each kind of block (Dynamo keeps what it compiled by code object)."""

    def recomputed(self: Block, run: Any, *inputs: Any) -> Any:
        return run(self.forward, *inputs)

    return types.FunctionType(recomputed.__code__.replace(), globals())


_checkpoint = functools.partial(checkpoint, use_reentrant=False)


class Block(fx.GraphModule):
    """One block of a transformed model: its code belongs to its kind, its parameters are its own.

    It stands for a module of the model, its *owner*: it reads the owner's tensors anew at each call, runs between the
    hooks that FSDP put on the owner, and is recomputed in backward where the owner says so (`gradient_checkpointing`).
    """

    _dynamic: tuple[tuple[int, ...], ...] = ()
    """For each input, the dimensions that are B or L."""
    _path: str = ""
    """The owner's path in the model."""
    _owner: nn.Module | None = None
    _sources: tuple[Source, ...] = ()

    @staticmethod
    def kind(graph: fx.Graph, owned: Mapping[str, Any], modules: Mapping[str, nn.Module], name: str) -> Block:
        """What blocks with this code have in common; it holds no tensors itself."""
        looks = {key: hollow(held) if isinstance(held, Tensor) else held for key, held in owned.items()}
        block = Block({**looks, **modules}, graph, class_name=name)
        block.__dict__["_dynamic"] = tuple(map(_symbolic_dims, graph.find_nodes(op="placeholder")))
        return block

    def recompile(self) -> Any:
        code = super().recompile()
        leftovers.let_go_with(type(self), type(self).forward.__code__)
        mark, recomputed, ready, sharded = dynamic_marker(), _recomputed(), left_alone(_ready), left_alone(_sharded)

        def body(self: Block, *inputs: Any) -> Any:
            recompute = ready(self)
            return self.forward(*inputs) if recompute is None else recomputed(self, recompute, *inputs)

        def run(self: Block, *inputs: Any) -> Any:
            mark(inputs, self._dynamic)
            if sharded(self):
                return between_hooks(self._owner, functools.partial(body, self), inputs)
            return body(self, *inputs)

        body, between_hooks = left_to_python(body), left_to_python(run_sharded)
        type(self).__call__ = left_to_python(run)  # type: ignore[method-assign]  # instead of GraphModule's wrapper
        return code

    def instance(self, owned: Mapping[str, Any], path: str = "") -> Block:
        """The same code over other parameters, for the module at `path`."""
        block: Block = object.__new__(type(self))
        block.__dict__.update(self.__dict__)
        block.__dict__["_path"] = path or self._path
        block.__dict__["_parameters"] = {k: v for k, v in owned.items() if isinstance(v, nn.Parameter)}
        block.__dict__["_buffers"] = {k: v for k, v in owned.items() if not isinstance(v, nn.Parameter)}
        block.__dict__["_modules"] = dict(self._modules)
        return block


def _ready(block: Block) -> Callable[..., Any] | None:
    """Read the block's tensors. (Dynamo must not look at this: it would guard every tensor of every block.)

    Returns:
        What the block is to be recomputed with in backward; None: it is not.
    """
    for source in block._sources:
        source.read()
    owner = block._owner
    if owner is None:
        return None
    refuse_sharded(((source.path, source.tensor) for source in block._sources), block._path)
    if not (owner.training and owner.__dict__.get("gradient_checkpointing") and torch.is_grad_enabled()):
        return None
    chosen: Callable[..., Any] = owner.__dict__.get("_gradient_checkpointing_func", _checkpoint)  # by transformers
    return chosen


def _sharded(block: Block) -> bool:
    return block._owner is not None and state_of(block._owner) is not None


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
    """What the graph's targets stand for, by path; None: a tensor, registered under it."""
    _bindings: list[tuple[Block, str, str]]
    """(block, its name for a tensor, the tensor's path), for each tensor of each block."""
    _top: tuple[str, ...]
    """The paths of the tensors that the top level reads itself."""
    _sources: tuple[Source, ...] = ()

    def __init__(self, attributes: Mapping[str, Any], graph: fx.Graph, name: str = "Program") -> None:
        blocks = {target: held for target, held in attributes.items() if isinstance(held, Block)}
        super().__init__(dict(attributes), graph, class_name=name)
        paths = {id(held): path for path, held in attributes.items() if isinstance(held, Tensor)}
        for target, block in blocks.items():
            self._modules.pop(target, None)
            self.__dict__[target] = block
        for target, held in attributes.items():
            _register(self, target, held)
        self.__dict__["_held"] = {path: None if isinstance(held, Tensor) else held for path, held in attributes.items()}
        self.__dict__["_top"] = tuple(str(n.target) for n in graph.find_nodes(op="get_attr") if n.target in attributes)
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
        return {path: look_up(self, path) if held is None else held for path, held in self._held.items()}

    def bind(self, root: nn.Module, paths: Iterable[str]) -> None:
        """From now on read the tensors at these paths from `root`, a module tree that may be this program's own."""
        own = set(paths)
        sources: dict[int, list[Source]] = {}
        for block, name, path in self._bindings:
            if path in own:
                sources.setdefault(id(block), []).append(Source.at(root, path, block, name))
        for block in self._blocks():
            block.__dict__["_owner"] = _module_at(root, block._path)
            block.__dict__["_sources"] = tuple(sources.get(id(block), ()))
        if root is not self:
            parts = ((path, *path.rpartition(".")) for path in own)
            top = (Source.at(root, path, self.get_submodule(parent), name) for path, parent, _, name in parts)
            self.__dict__["_sources"] = tuple(top)

    def read(self) -> bool:
        """Read the tensors of the program's own tree anew; each block reads its own when it is called.

        Returns:
            Whether any is another object than before.

        Raises:
            InputError: the top level would compute with a sharded parameter.
        """
        changed = [source.read() for source in self._sources]
        if self._sources:
            refuse_sharded(((path, look_up(self, path)) for path in self._top), "what surrounds the blocks")
        return any(changed)

    def let_go(self) -> None:
        """Hold no tensor that the model has replaced."""
        for source in self.sources():
            source.read()

    def sources(self) -> tuple[Source, ...]:
        """Where the program and its blocks read tensors."""
        return *self._sources, *(source for block in self._blocks() for source in block._sources)

    def _blocks(self) -> Iterable[Block]:
        return {id(held): held for held in self._held.values() if isinstance(held, Block)}.values()

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
        leftovers.let_go_with(type(self), type(self).forward.__code__)
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
