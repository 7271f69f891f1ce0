"""While a model is traced, blocks of one kind are traced once: tracing is what a first transform spends its time on.

A block is traced between two edges. A later one of its kind (`alike`) that is given alike arguments becomes one node,
a stand-in, which `expand` exchanges for a copy of the traced block's nodes. So the graph is the one that a whole trace
gives, node for node.

What would make that untrue is noticed, and the kind is then traced block by block: a forward that looks at its block's
number (which is a `Place` meanwhile, that only a cache may read), writes to its module or its arguments, takes what is
neither a tensor nor plain, or hands a tensor out by another way than its result.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import sympy
import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from simba_fx.capture.alike import PLAIN, Alike, Member, alike_blocks, contents
from simba_fx.capture.examples import autocast_dtype
from simba_fx.capture.guards import Question
from simba_fx.capture.lift import CallSite
from simba_fx.graph.facts import MARKERS, expression, is_size, look_up, opname, stem, value

__all__ = ["Differs", "Notes", "Place", "Trace", "expand", "once_per_kind"]


class Differs(BaseException):
    """Blocks of a kind are not what they seemed. (No Exception: a model's own code may catch those.)"""

    def __init__(self, kind: str) -> None:
        super().__init__(kind)
        self.kind = kind
        """The path of its first block."""


class Place:
    """The number of a block, which a forward hands to its cache and does not look at."""

    __slots__ = ("__kind", "__number")

    def __init__(self, number: int, kind: str) -> None:
        self.__number, self.__kind = number, kind

    def _looked_at(self, *_: Any, **__: Any) -> Any:
        raise Differs(self.__kind)

    __class__ = property(_looked_at)  # isinstance asks for it

    @staticmethod
    def number(layer: Any) -> Any:
        """What a cache reads of the number of a layer."""
        return layer.__number if type(layer) is Place else layer


_LOOKS = """bool index int float complex hash repr str format eq ne lt le gt ge add radd sub rsub mul rmul truediv
rtruediv floordiv rfloordiv mod rmod divmod rdivmod pow rpow neg pos abs invert and rand or ror xor rxor lshift rlshift
rshift rrshift round trunc floor ceil getattr copy deepcopy reduce_ex iter call len contains getitem"""
for _name in _LOOKS.split():
    setattr(Place, f"__{_name}__", Place._looked_at)


class Notes:
    """What stands for a cache while a model is traced: it notes what each layer would store, and what it was asked."""

    def start(self) -> None:
        self.stored: dict[Any, Tensor] = {}
        """By entries, which start with the number of a layer."""
        self.loose: set[Any] = set()
        """Entries of layers that a block named otherwise than by its own number."""
        self.questions: list[tuple[Any, ...]] = []
        """What was asked of a block's own layer: method, number, further arguments, answer."""

    def store(self, layer: Any, rest: tuple[Any, ...], tensor: Tensor) -> None:
        entry = (Place.number(layer), *rest)
        self.stored[entry] = tensor
        (self.loose.discard if type(layer) is Place else self.loose.add)(entry)

    def asked(self, method: str, layer: Any, *more: Any) -> Any:
        answer = self.ask(method, Place.number(layer), *more)
        if type(layer) is Place:
            self.questions.append((method, Place.number(layer), more, answer))
        return answer

    def ask(self, method: str, layer: Any, *more: Any) -> Any:
        """What a cache answers about a layer."""
        raise NotImplementedError


# --- while a model is traced -----------------------------------------------------------------------------------------


@dataclass(eq=False)
class Traced:
    """What a block did that was traced."""

    block: Member
    edges: tuple[int, int]
    looks: Any
    """Of its arguments."""
    questions: list[Question]
    sites: range
    asked: list[tuple[Any, ...]]
    """Of the cache."""
    stored: list[tuple[Any, ...]]
    """Entries of the cache, whose tensors come last in `result`."""
    result: list[tuple[str, Any]]
    """What it returned and stored, flat: `("given", i)`, `("made", i)` or `("plain", value)`."""
    made: list[Tensor]
    spec: pytree.TreeSpec


@dataclass
class StandIn:
    """A block that was not traced."""

    traced: Traced
    kind: Alike
    path: str
    sites: dict[int, int]
    """Call sites of the traced block, and those of this one."""


@dataclass
class Trace:
    """What has been traced of a model's blocks; `sites` and `questions` grow with the trace."""

    sites: list[CallSite]
    questions: list[Question]
    kinds: dict[Alike, list[Traced]] = field(default_factory=dict)
    stand_ins: list[StandIn] = field(default_factory=list)
    edges: Iterator[int] = field(default_factory=itertools.count)

    def call(self, kind: Alike, block: Member, own: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Run a block, or let one node stand for it."""
        leaves, spec = pytree.tree_flatten((args, kwargs))
        inner = (module for module in block.module.modules() if module is not block.module)
        plain = all(isinstance(leaf, (Tensor, Notes, *PLAIN)) for leaf in leaves)
        if not plain or any(module._forward_hooks or module._forward_pre_hooks for module in inner):
            return own(*args, **kwargs)
        notes: Any = next((leaf for leaf in leaves if isinstance(leaf, Notes)), None)
        looks = [spec, *_looks_of(leaves), {autocast_dtype(leaf.device) for leaf in leaves if isinstance(leaf, Tensor)}]
        for traced in self.kinds[kind]:
            apart = block.number - traced.block.number
            if traced.looks == looks and all(
                notes.ask(method, layer + apart, *more) == answer for method, layer, more, answer in traced.asked
            ):
                return self._stand_in(traced, kind, block, leaves, notes)
        return self._trace(kind, block, own, args, kwargs, leaves, looks, notes)

    def _trace(self, kind: Alike, block: Member, own: Callable[..., Any], args: Any, kwargs: Any, leaves: list[Any],
               looks: Any, notes: Any) -> Any:  # fmt: skip
        n_asked, known = (0, {}) if notes is None else (len(notes.questions), dict(notes.stored))
        n_questions, n_sites = len(self.questions), len(self.sites)
        given = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        edges = next(self.edges), next(self.edges)
        torch.ops.simba_fx.block_edge(given, edges[0])
        with _numbered(kind, block.module):
            state = _state(block.module)
            result = own(*args, **kwargs)
            unwritten = state == _state(block.module)
        flat, spec = pytree.tree_flatten(result)
        asked, new = [], {}
        if notes is not None:
            new = {entry: held for entry, held in notes.stored.items() if held is not known.get(entry)}
            asked, unwritten = notes.questions[n_asked:], unwritten and notes.loose.isdisjoint(new)
        made: list[Tensor] = []
        origins = [_origin(leaf, given, made) for leaf in (*flat, *new.values())]
        torch.ops.simba_fx.block_edge(made, edges[1])
        unwritten = unwritten and [*map(id, leaves)] == [*map(id, pytree.tree_leaves((args, kwargs)))]
        if unwritten and all(isinstance(leaf, (Tensor, *PLAIN)) for leaf in flat):
            questions, sites = self.questions[n_questions:], range(n_sites, len(self.sites))
            self.kinds[kind].append(Traced(block, edges, looks, questions, sites, asked, [*new], origins, made, spec))
        return result

    def _stand_in(self, traced: Traced, kind: Alike, block: Member, leaves: list[Any], notes: Any) -> Any:
        later = len(self.sites) - traced.sites.start
        self.questions += [
            replace(asked, scans=asked.scans + later, modules=asked.modules | {id(block.module)})
            for asked in traced.questions
        ]
        self.sites += [replace(self.sites[site]) for site in traced.sites]
        self.stand_ins.append(StandIn(traced, kind, block.path, {site: site + later for site in traced.sites}))
        given = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        with _results_like(traced.made):
            made = torch.ops.simba_fx.block_stand_in(given, len(self.stand_ins) - 1)
        tensors = {"given": given, "made": made}
        flat = [held if origin == "plain" else tensors[origin][held] for origin, held in traced.result]
        n_results = len(flat) - len(traced.stored)
        for (layer, *rest), tensor in zip(traced.stored, flat[n_results:]):
            notes.store(layer + block.number - traced.block.number, tuple(rest), tensor)
        return pytree.tree_unflatten(flat[:n_results], traced.spec)


@contextmanager
def once_per_kind(owner: nn.Module, sites: list[CallSite], questions: list[Question],
                  apart: Collection[str]) -> Iterator[Trace]:  # fmt: skip
    """While the body runs, blocks of `owner`, a copy for tracing, are traced once per kind.

    Args:
        sites, questions: grow as the trace meets calls of scans, and branches on sizes.
        apart: paths of the first blocks of kinds that are traced block by block.
    """
    trace = Trace(sites, questions, {kind: [] for kind in alike_blocks(owner) if kind.path not in apart})
    members = [(kind, block) for kind in trace.kinds for block in kind.members]
    calls = {id(vars(block.module)): functools.partial(trace.call, kind, block) for kind, block in members}
    classes: dict[Any, Any] = {type(block.module): vars(type(block.module)).get("forward") for _, block in members}
    try:
        for cls in classes:
            cls.forward = _dispatching(cls.forward, calls)
        yield trace
    finally:
        for cls, own in classes.items():
            if own is None:
                del cls.forward
            else:
                cls.forward = own


def _dispatching(own: Callable[..., Any], calls: Mapping[int, Callable[..., Any]]) -> Callable[..., Any]:
    """The forward of a class of blocks; `calls`: of those that are traced, by the ids of their `__dict__`, which is
    what a module has in common with what torch.export hands a forward in its place."""

    @functools.wraps(own)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        call = calls.get(id(self.__dict__))
        return own(self, *args, **kwargs) if call is None else call(functools.partial(own, self), args, kwargs)

    return forward


def _looks_of(leaves: list[Any]) -> Iterator[Any]:
    """What the arguments of a block look like, and which of them are one."""
    order = [*map(id, leaves)]
    for leaf in leaves:
        if isinstance(leaf, Tensor):
            sizes = tuple(map(_Size, (*leaf.shape, *leaf.stride())))
            yield order.index(id(leaf)), sizes, leaf.dtype, leaf.device, leaf.requires_grad
        else:
            yield type(leaf), id(leaf) if isinstance(leaf, Notes) else leaf


class _Size:
    """Equal to another size as far as the trace knows by then: it learns that sizes of several inputs are one."""

    __hash__ = None  # type: ignore[assignment]

    def __init__(self, size: int | torch.SymInt) -> None:
        self.size = size

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Size) and bool(expression(self.size) == expression(other.size))


def _origin(leaf: Any, given: list[Tensor], made: list[Tensor]) -> tuple[str, Any]:
    if not isinstance(leaf, Tensor):
        return "plain", leaf
    for name, tensors in (("given", given), ("made", made)):
        if (index := next((i for i, tensor in enumerate(tensors) if tensor is leaf), None)) is not None:
            return name, index
    made.append(leaf)
    return "made", len(made) - 1


@contextmanager
def _numbered(kind: Alike, block: nn.Module) -> Iterator[None]:
    """Let nobody look at the number of a block."""
    places = [(vars(block.get_submodule(path)), name) for path, name in kind.numbers]
    numbers = [held[name] for held, name in places]
    for (held, name), number in zip(places, numbers):
        held[name] = Place(number, kind.path)
    try:
        yield
    finally:
        for (held, name), number in zip(places, numbers):
            held[name] = number


def _state(block: nn.Module) -> list[Any]:
    """What a block's modules hold, by identity, and what that holds."""
    known: dict[int, Any] = {}
    return [(id(module), name, id(held), None if type(held) is Place else contents(held, known))
            for module in block.modules() for name, held in vars(module).items()]  # fmt: skip


# --- the two operators -----------------------------------------------------------------------------------------------

_library: Any = torch.library.Library("simba_fx", "FRAGMENT")  # type: ignore[no-untyped-call]  # untyped in torch
_library.define("block_edge(Tensor[] tensors, int edge) -> ()")
_library.define("block_stand_in(Tensor[] tensors, int number) -> Tensor[]")
_like: list[Tensor] = []


def _edge(tensors: list[Tensor], edge: int) -> None:
    pass


def _stand_in(tensors: list[Tensor], number: int) -> list[Tensor]:
    return [torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=t.device) for t in _like]


for _op, _function in (("block_edge", _edge), ("block_stand_in", _stand_in)):
    _library.impl(_op, _function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"simba_fx::{_op}", _function)
_EDGE, _STAND_IN = torch.ops.simba_fx.block_edge.default, torch.ops.simba_fx.block_stand_in.default
fx.node.has_side_effect(_EDGE)


@contextmanager
def _results_like(made: list[Tensor]) -> Iterator[None]:
    """What a stand-in returns. (One capture at a time: `capturing` is around it.)"""
    global _like
    before, _like = _like, made
    try:
        yield
    finally:
        _like = before


# --- after the trace -------------------------------------------------------------------------------------------------


def expand(graph: fx.Graph, trace: Trace, root: nn.Module, prefix: str) -> fx.Graph:
    """The graph with the nodes of each stand-in's kind in its place, and without edges.

    Args:
        root: what was traced; `prefix`: the path from it of what the blocks' paths start from.

    Raises:
        Differs: a tensor of a traced block is read elsewhere.
    """
    edges: dict[Any, fx.Node] = {node.args[1]: node for node in graph.find_nodes(op="call_function", target=_EDGE)}
    used = {stand_in.traced: stand_in.kind for stand_in in trace.stand_ins}
    bodies = {traced: _body(traced, kind, edges) for traced, kind in used.items()}
    attributes: dict[Any, fx.Node] = {node.target: node for node in graph.find_nodes(op="get_attr")}
    for node in graph.find_nodes(op="call_function", target=_STAND_IN):
        arguments: Any = node.args
        stand_in = trace.stand_ins[arguments[1]]
        paths = (f"{prefix}.{path}" for path in (stand_in.traced.block.path, stand_in.path))
        move = functools.partial(_moved, *paths)
        begin, end = (edges[edge] for edge in stand_in.traced.edges)
        copies: dict[fx.Node, fx.Node] = dict(zip(_list(begin), arguments[0]))

        def copied(held: fx.Node, copies: Any = copies, move: Any = move) -> Any:
            if held in copies or held.op != "get_attr" or (path := move(held.target)) == held.target:
                return copies.get(held, held)
            if not _has(root, path):  # a constant that the code makes
                return held
            if path not in attributes:
                with graph.inserting_before(held):
                    attributes[path] = graph.create_node("get_attr", path)
                attributes[path].meta = {**held.meta, "nn_module_stack": _moved_stack(held, move)}
            return attributes[path]

        with graph.inserting_before(node):
            for held in bodies[stand_in.traced]:
                if is_size(held) and copies.keys().isdisjoint(held.all_input_nodes):
                    continue  # computed once from B and L
                copy = copies[held] = graph.node_copy(held, copied)
                copy.meta["nn_module_stack"] = _moved_stack(held, move)
                if opname(held) in MARKERS:
                    place = 2 if opname(held).endswith("enter") else 1  # of the number of the call site
                    site: Any = held.args[place]
                    copy.update_arg(place, stand_in.sites[site])
        for item in list(node.users):
            index: Any = item.args[1]
            item.replace_all_uses_with(copied(_list(end)[index]))
            graph.erase_node(item)
        graph.erase_node(node)
    for edge in edges.values():
        graph.erase_node(edge)
    return _numbered_in_order(graph) if trace.stand_ins else graph


def _numbered_in_order(graph: fx.Graph) -> fx.Graph:
    """A copy whose names count up from its start to its end, as those of a whole trace do."""
    copy = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        name = stem(node.name) if node.op == "call_function" else node.name
        args, kwargs = (fx.node.map_arg(held, copies.__getitem__) for held in (node.args, node.kwargs))
        copies[node] = copy.create_node(node.op, node.target, args, kwargs, name=name, type_expr=node.type)
        copies[node].meta = node.meta
    return copy


def _has(root: nn.Module, path: str) -> bool:
    try:
        look_up(root, path)
    except AttributeError:
        return False
    return True


def _list(edge: fx.Node) -> list[fx.Node]:
    tensors: Any = edge.args[0]
    return list(tensors)


def _body(traced: Traced, kind: Alike, edges: Mapping[Any, fx.Node]) -> list[fx.Node]:
    """The nodes of a block that others have copies of: B and L are read once, by whichever block asks first."""
    begin, end = (edges.get(edge) for edge in traced.edges)
    if begin is None or end is None:
        raise Differs(kind.path)
    body: list[fx.Node] = []
    node = begin.next
    while node is not end:
        reads_symbol = is_size(node) and isinstance(expression(value(node)), sympy.Symbol)
        if node.op == "call_function" and node.target is not _EDGE and not reads_symbol:
            body.append(node)
        node = node.next
    inside, results = {*body, end}, {*_list(end)}
    if any(user not in inside for node in body if node not in results and not is_size(node) for user in node.users):
        raise Differs(kind.path)
    return body


def _moved(old: str, new: str, path: Any) -> str:
    return f"{new}{path[len(old) :]}" if f"{path}.".startswith(f"{old}.") else path


def _moved_stack(node: fx.Node, move: Callable[[str], str]) -> dict[str, Any]:
    stack = node.meta.get("nn_module_stack") or {}
    return {key: (move(path), kind) for key, (path, kind) in stack.items()}
