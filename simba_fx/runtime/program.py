"""What a transformed graph runs as: a `Program`, and for each block a `Block`, which runs the code of its `Kind`.

None of them owns a tensor. A program reads those of the model where they are registered; the code of a kind is a
`forward` that runs on the model's own module, between the hooks of that module. With `compile="blocks"` the program's
frame is left to Python, and each kind is compiled once, because the blocks that share it share one code object and
their lengths are marked as dynamic.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Mapping
from typing import Any

import sympy
import torch
from torch import Tensor, fx, nn
from torch.utils.checkpoint import checkpoint

from simba_fx.capture import leftovers
from simba_fx.compiling import disable_compile, dynamic_marker, skip_frame
from simba_fx.graph.facts import BLOCK, CRITERION, BlockCode, expression, look_up, tensor_paths, value
from simba_fx.runtime.clone import adopt_block, refuse_replicas
from simba_fx.runtime.fsdp import MET, as_captured, refuse_sharded
from simba_fx.runtime.written import with_regions, write_regions

__all__ = ["Block", "Kind", "Program", "blocks_of"]

_TREE = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")
_checkpoint = functools.partial(checkpoint, use_reentrant=False)


class Kind(fx.GraphModule):
    """The code that equal blocks share: a `forward` whose `self` is a module of the model."""

    def __init__(self, graph: fx.Graph, name: str) -> None:
        super().__init__(nn.Module(), fx.Graph(), class_name=name)
        self.graph = with_regions(graph)
        inputs: Any = graph.find_nodes(op="placeholder")
        results: Any = graph.output_node().args[0]
        self.dynamic = tuple(map(_symbolic_dims, inputs))
        """For each input, the dimensions that are B or L."""
        self.dtypes = tuple(map(_dtype, inputs))
        self.result_dtypes = tuple(map(_dtype, results)) if isinstance(results, tuple) else _dtype(results)
        self.paths = tuple(str(node.target) for node in graph.find_nodes(op="get_attr"))
        """Of the tensors that it reads, in the module that it runs on."""

    def recompile(self) -> Any:
        write_regions(self.graph)
        code = super().recompile()
        forward = type(self).forward
        leftovers.free_with(type(self), forward.__code__)

        def recomputed(run: Callable[..., Any], module: nn.Module, *inputs: Any) -> Any:
            return run(functools.partial(forward, module), *inputs)

        own = recomputed.__code__.replace()  # Dynamo keeps what it compiled by code object
        self.__dict__["recomputed"] = types.FunctionType(own, globals(), "recomputed", None, recomputed.__closure__)
        return code


def _dtype(node: Any) -> torch.dtype | None:
    return value(node).dtype if isinstance(value(node), Tensor) else None


def _symbolic_dims(node: fx.Node) -> tuple[int, ...]:
    val = value(node)
    sizes = val.shape if isinstance(val, Tensor) else ()
    return tuple(dim for dim, size in enumerate(sizes) if isinstance(expression(size), sympy.Symbol))


class Block(nn.Module):
    """One block of a program: the code of its kind, on the model's module at its path.

    A `call_module` node wants an `nn.Module`; this one has neither parameters nor submodules.
    """

    kind: Kind
    path: str | None
    """Of the module that the code reads tensors of, from the program's root; None: it reads none."""
    hooked: bool
    """Whether the code is all of that module's, and runs between its hooks."""
    criterion: nn.Module | None
    """A user's, which the code calls."""
    root: Any

    def __init__(self, kind: Kind, path: str | None, hooked: bool = False, criterion: nn.Module | None = None,
                 root: Any = None) -> None:  # fmt: skip
        super().__init__()
        self.__dict__.update(kind=kind, path=path, hooked=hooked, criterion=criterion, root=root)
        call, run = _frames()
        self.__dict__.update(names=tuple(filter(None, (path or "").split("."))), run=functools.partial(run, self))
        type(self).__call__ = call  # type: ignore[method-assign]  # instead of torch's, which runs hooks

    @property
    def graph(self) -> fx.Graph:
        return self.kind.graph

    @property
    def code(self) -> str:
        return self.kind.code

    def copy(self) -> Block:
        return Block(self.kind, self.path, self.hooked, self.criterion, self.root)

    def module(self) -> Any:
        """What the code runs on: the model's module as it is now."""
        module = self.root
        for name in self.__dict__["names"]:
            module = module._modules[name]
        module = self.kind if self.path is None else module
        if self.criterion is not None:
            module.__dict__[CRITERION] = self.criterion
        return module

    def __repr__(self) -> str:
        return f"{type(self.kind).__name__} on {self.path}"


def blocks_of(graph: fx.Graph, criterion: nn.Module | None) -> dict[str, Block]:
    """The blocks that an outlined graph calls, by the name that it calls them; `criterion`: the user's, if any."""
    kinds: dict[int, Kind] = {}
    blocks: dict[str, Block] = {}
    for node in graph.find_nodes(op="call_module"):
        code: BlockCode | None = node.meta.get(BLOCK)
        if code is not None:
            if code.kind not in kinds:
                kinds[code.kind] = Kind(code.graph, f"Kind{code.kind}")
            user = criterion if code.scored_by_user else None
            blocks[str(node.target)] = Block(kinds[code.kind], code.path, code.hooked, user)
    return blocks


@functools.cache
def _frames() -> tuple[Any, Any]:
    """Python's share in the call of a block: (a block on its inputs, its code on a module and inputs).

    Each is one frame that Dynamo skips, so that it meets the code of kinds and nothing else.
    """
    mark, call_module = dynamic_marker(), nn.Module.__call__
    adopt, refuse = disable_compile(adopt_block), disable_compile(refuse_sharded)

    def call(block: Any, *inputs: Any) -> Any:
        kind = block.kind
        module = block.module()
        mark(inputs, kind.dynamic, module._compiled_call_impl is not None)  # `module.compile()`
        if not block.hooked:
            return block.run(module, inputs)
        cls = type(module)
        if not hasattr(cls, "_simba_block"):
            adopt(module)
        results = call_module(module, *inputs, _simba=block.run)
        return as_captured(results, kind.result_dtypes) if hasattr(cls, "_get_fsdp_state") else results

    def run(block: Any, module: Any, inputs: tuple[Any, ...]) -> Any:
        kind = block.kind
        if MET:
            refuse(((f"{block.path}.{path}", look_up(module, path)) for path in kind.paths), block.path)
        if hasattr(type(module), "_get_fsdp_state"):
            inputs = as_captured(inputs, kind.dtypes)
        held = module.__dict__
        if not (held.get("gradient_checkpointing") and module.training and torch.is_grad_enabled()):
            return type(kind).forward(module, *inputs)
        return kind.recomputed(held.get("_gradient_checkpointing_func", _checkpoint), module, *inputs)  # transformers'

    Block.module = skip_frame(Block.module)  # type: ignore[method-assign]
    return skip_frame(call), skip_frame(run)


class Program(fx.GraphModule):
    """A captured and rewritten model, over the tensors that it is given until it is told which module's to read."""

    _skips_frame = False
    _targets: tuple[str, ...]
    """What the graph and its blocks refer to."""
    _top: tuple[str, ...]
    """The paths of the tensors that the top level reads itself."""
    _own: dict[str, Any]
    """What is no part of the model: constants, and a user's criterion. (Everything, until there is a model.)"""
    _simba_root: Any = None
    """The module that tensors are read from."""

    _replicate_for_data_parallel = refuse_replicas

    def __init__(self, attributes: Mapping[str, Any], graph: fx.Graph, name: str = "Program") -> None:
        super().__init__(nn.Module(), fx.Graph(), class_name=name)
        for path, held in attributes.items():
            if isinstance(held, Block):
                held.__dict__["root"] = self
                self.__dict__[path] = held
                type(self)._skips_frame = True
            else:
                _register(self, path, held)
        self.__dict__["_own"] = {path: held for path, held in attributes.items() if not isinstance(held, Block)}
        self.__dict__["_targets"] = tuple(attributes)
        self.__dict__["_top"] = tuple(str(node.target) for node in graph.find_nodes(op="get_attr"))
        self.graph = with_regions(graph)

    def attributes(self) -> dict[str, Any]:
        """What the graph's targets stand for now: tensors by path, submodules, blocks."""
        return {path: look_up(self, path) for path in self._targets}

    def _blocks(self) -> dict[str, Block]:
        return {name: held for name, held in self.__dict__.items() if isinstance(held, Block)}

    def called(self) -> tuple[str, ...]:
        """The paths of the blocks that are called as modules."""
        return tuple(str(block.path) for block in self._blocks().values() if block.hooked)

    def read_from(self, root: nn.Module) -> None:
        """From now on compute with what is registered in `root`, whose containers this program shares. What does not
        lie there stays the program's own."""
        theirs = tensor_paths(root)
        own = {path: held for path, held in self._own.items() if path not in theirs}
        self.__dict__.update({name: root.__dict__[name] for name in _TREE} | own, _simba_root=root, _own=own)
        for block in self._blocks().values():
            block.__dict__["root"] = root
            block.module()  # gives it the criterion
            if block.hooked:
                adopt_block(root.get_submodule(str(block.path)))

    def over(self, root: nn.Module) -> Any:
        """The same program, reading from another module tree."""
        graph = fx.Graph()
        graph.output(graph.graph_copy(self.graph, {}))
        blocks = {path: held.copy() for path, held in self._blocks().items()}
        program: Any = type(self).__mro__[1]({**blocks, **self._own}, graph, type(self).__name__)
        program.__dict__["_targets"] = self._targets
        program.read_from(root)
        return program

    def refuse_sharded(self) -> None:
        """Raises: InputError: the top level would compute with a sharded parameter."""
        if MET:
            refuse_sharded(((path, look_up(self, path)) for path in self._top), "what surrounds the blocks")

    def recompile(self) -> Any:
        write_regions(self.graph)
        code = super().recompile()
        leftovers.free_with(type(self), type(self).forward.__code__)
        if self._skips_frame:
            type(self).forward = skip_frame(type(self).forward)
        return code


def _register(root: Any, path: str, held: Any) -> None:
    *parents, name = path.split(".")
    for parent in parents:
        if parent not in root._modules:
            root.add_module(parent, nn.Module())
        root = root._modules[parent]
    if isinstance(held, nn.Parameter):
        root.register_parameter(name, held)
    elif isinstance(held, Tensor):
        root.register_buffer(name, held)
    else:
        root.add_module(name, held)
