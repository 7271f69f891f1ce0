"""What a forward writes to its model.

Into weights: refused. A captured graph would write at each call, also where the model does so once (RWKV divides its
weights when it is first called), and it shares its weights with the dense model. Buffers are another matter: they are
what a model keeps from call to call, and a graph writes into them. Another tensor in a buffer's place is none that a
graph could put there: refused, as is one in the place of any tensor that the forward reads. An attribute that counts,
or says that the first call is over, or that a tensor is kept in for others to read (a loss of a router), stays as it
is in a graph: said.
"""

from __future__ import annotations

import copy
import itertools
import operator
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from simba_fx.capture.alike import CONTAINERS, PLAIN, is_plain_object
from simba_fx.compiling import TorchDispatchMode
from simba_fx.errors import CaptureError, warn

__all__ = ["Changes", "NoWrites", "refuse_writes", "undisturbed"]


class NoWrites(TorchDispatchMode):  # type: ignore[no-untyped-call]  # untyped in torch
    """While `module` runs: stops before one of its parameters would be written into.

    Raises:
        CaptureError: naming it.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        weights = ((path, weight.untyped_storage().data_ptr()) for path, weight in module.named_parameters())
        self.weights = {address: path for path, address in weights if address}  # 0: no memory, as on meta

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in _written(operator, args, kwargs or {}):
            if not isinstance(tensor, Tensor) or tensor.is_meta:
                continue
            if (path := self.weights.get(tensor.untyped_storage().data_ptr())) is not None:
                raise _error(path)
        return operator(*args, **(kwargs or {}))


@contextmanager
def undisturbed(module: nn.Module) -> Iterator[None]:
    """What modules write on themselves meanwhile, or into what they hold, is gone afterwards."""
    seen: set[int] = set()
    before = [(held, copy.copy(held)) for inner in module.modules() for held in _written_into(vars(inner), seen)]
    try:
        yield
    finally:
        for held, items in before:
            same = len(held) == len(items) and all(map(operator.is_, _items(held), _items(items)))
            if not same:  # others may read what did not change
                held.clear()
                held.update(items) if isinstance(held, dict | set) else held.extend(items)


def _written_into(held: Any, seen: set[int], depth: int = 4) -> Iterator[Any]:
    """A container, and those in it; of an object with plain values, the dict that holds them. Each once: `seen`."""
    if type(held) in PLAIN or isinstance(held, nn.Module | Tensor) or id(held) in seen or depth == 0:
        return
    seen.add(id(held))
    held = vars(held) if is_plain_object(held) else held
    if isinstance(held, dict | list | set | deque):
        yield held
    if isinstance(held, CONTAINERS):
        for one in list(_items(held)):
            yield from _written_into(one, seen, depth - 1)


def _items(held: Any) -> Iterator[Any]:
    return itertools.chain(held, held.values()) if isinstance(held, dict) else iter(held)


class Changes:
    """What forwards of `module`, traced inside of `watched`, change of its attributes: numbers, flags and words, the
    tensors that are its buffers, and others that it has or that its lists and dicts hold. These are put back."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.attributes: dict[str, tuple[Any, Any]] = {}
        self.buffers: dict[str, None] = {}
        self.tensors: dict[str, Any] = {}
        """By path, what was in the place of a tensor."""

    @contextmanager
    def watched(self) -> Iterator[None]:
        before = {module: (_attributes(module), dict(module._buffers)) for module in self.module.modules()}
        yield
        for path, module in self.module.named_modules():
            attributes, buffers = before.get(module, ({}, {}))
            for name, held in buffers.items():
                if module._buffers.get(name, held) is not held and held is not None:
                    self.buffers[f"{path}.{name}".lstrip(".")] = None
            for name, (now, holds) in _attributes(module).items():
                held, held_by = attributes.get(name, (None, None))
                if name in attributes and type(held) in PLAIN and type(now) in PLAIN and held != now:
                    self.attributes[f"{path}.{name}".lstrip(".")] = held, now
                if _new_tensors(now, holds, held, held_by):
                    _put_back(module, name, attributes)
                    if not _is_library(module):
                        self.tensors[f"{path}.{name}".lstrip(".")] = held

    def check(self, name: str, read: Iterable[Any]) -> None:
        """`name`: what messages call the model; `read`: the tensors that its graph reads.

        Raises:
            CaptureError: a buffer was replaced, or another tensor that is read.
        """
        for path in self.buffers:
            raise CaptureError(
                f"{name}'s forward puts another tensor in the place of its buffer {path}; expected buffers that are "
                "written in place, which is what a graph can do. Write self.buffer.copy_(new), under torch.no_grad()."
            )
        known = {_address(tensor) for tensor in read if self.tensors} - {0}
        for path, held in self.tensors.items():
            if _address(held) in known:
                raise CaptureError(
                    f"{name}'s forward reads {path}, and puts another tensor in its place; expected tensors that are "
                    "kept from call to call to be buffers that are written in place, which is what a graph can do. "
                    "Call self.register_buffer once, and self.buffer.copy_(new) under torch.no_grad()."
                )
        if self.tensors:
            warn(
                f"{name}'s forward keeps tensors in {_listed(self.tensors)}, which a call of its graph leaves as they "
                "are. If somebody reads them (a loss of a router, hidden states), return them from the forward."
            )
        for path, (held, now) in [*self.attributes.items()][:1]:
            others = f" (and {len(self.attributes) - 1} others)" if len(self.attributes) > 1 else ""
            warn(
                f"{name}'s forward changes {path} from {held!r} to {now!r}{others}; its graph computes every time as "
                f"with {held!r}. If that matters, and it changes at the first call alone, call the model once before "
                "it is transformed."
            )


_OF_MODULES = frozenset(vars(nn.Module()))


def _attributes(module: nn.Module) -> dict[str, tuple[Any, Any]]:
    """By name, with what containers hold."""
    own = {name: held for name, held in vars(module).items() if name not in _OF_MODULES}
    return {name: (held, copy.copy(held) if isinstance(held, CONTAINERS) else None) for name, held in own.items()}


def _put_back(module: nn.Module, name: str, attributes: Mapping[str, tuple[Any, Any]]) -> None:
    """`attributes`: those that the module had."""
    if name not in attributes:
        delattr(module, name)
        return
    held, holds = attributes[name]
    setattr(module, name, held)
    if isinstance(held, dict | list | deque):
        held.clear()
        held.update(holds) if isinstance(held, dict) else held.extend(holds)


def _new_tensors(now: Any, holds: Any, held: Any, held_by: Any) -> bool:
    """Whether `now`, which holds `holds`, is or holds a tensor that `held` was or held not."""
    if isinstance(now, Tensor):
        return now is not held
    known = {id(leaf) for leaf in pytree.tree_leaves(held_by)}
    return any(isinstance(leaf, Tensor) and id(leaf) not in known for leaf in pytree.tree_leaves(holds))


def _is_library(module: nn.Module) -> bool:
    """Of torch, which sets such attributes where weights are parametrised by hooks, or of transformers."""
    return type(module).__module__.partition(".")[0] in ("torch", "transformers")


def _address(held: Any) -> int:
    """Where a plain tensor lies; 0: it is none, or lies nowhere."""
    plain = type(held) in (Tensor, nn.Parameter) and not held.is_meta
    return held.untyped_storage().data_ptr() if plain else 0


def _listed(paths: Collection[str]) -> str:
    first = next(iter(paths))
    return f"{first} (and {len(paths) - 1} others)" if len(paths) > 1 else first


def refuse_writes(graph: fx.Graph, attributes: Mapping[str, Any]) -> None:
    """`attributes` holds what `get_attr` nodes name.

    Raises:
        CaptureError: a node writes into a parameter, or into a view of one.
    """
    for node in graph.nodes:
        for base in _written(node.target, node.args, node.kwargs):
            while isinstance(base, fx.Node) and _is_view(base.target):
                base = base.args[0]
            named = isinstance(base, fx.Node) and base.op == "get_attr"
            if named and isinstance(attributes.get(base.target), nn.Parameter):
                raise _error(base.target)


def _written(operator: Any, args: Any, kwargs: Mapping[str, Any]) -> Iterator[Any]:
    """The arguments that an operator writes into."""
    schema = getattr(operator, "_schema", None)  # Python's own functions have none
    if schema is None or not schema.is_mutable:
        return
    for place, argument in enumerate(schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            held = args[place] if place < len(args) else kwargs.get(argument.name)
            yield from pytree.tree_leaves(held)


def _is_view(operator: Any) -> bool:
    schema = getattr(operator, "_schema", None)
    return schema is not None and any(result.alias_info is not None for result in schema.returns)


def _error(path: str) -> CaptureError:
    return CaptureError(
        f"The model's forward writes into its own weight {path}; expected weights that a call leaves as they are, "
        "since a captured graph would write at each call, and the dense model has the same weights. Do it before the "
        "model is transformed: call the model once, if it writes at its first call only."
    )
