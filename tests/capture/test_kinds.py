"""Blocks of a kind are traced once: the graph is that of a whole trace, and what would make it another is noticed."""

from __future__ import annotations

import collections
import copy
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from graph_cases import WIDTH, Block, Feedforward, Plain, capture_plain
from models import SPREAD, names, three_rows, tokens
from torch import Tensor, fx, nn

import simba_fx
from simba_fx.capture import export, kinds
from simba_fx.capture.alike import contents
from simba_fx.capture.normalise import Captured
from simba_fx.graph.marks import region


@contextmanager
def block_by_block(*_: Any) -> Iterator[kinds.Trace]:
    yield kinds.Trace([], [])


class Counted:
    """Counts the traces, and the blocks that others stood for."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.traces = self.stood_for = 0
        own, expand = export._Trace._once, export.expand

        def once(*args: Any) -> Any:
            self.traces += 1
            return own(*args)

        def expanded(graph: fx.Graph, trace: kinds.Trace, *rest: Any) -> fx.Graph:
            found = expand(graph, trace, *rest)
            self.stood_for += len(trace.stand_ins)
            return found

        patch.setattr(export._Trace, "_once", once)
        patch.setattr(export, "expand", expanded)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Counted:
    return Counted(monkeypatch)


def described(captured: Captured) -> tuple[Any, ...]:
    """A captured graph without the names of its nodes and the numbers of its modules."""
    order = {node: f"%{i}" for i, node in enumerate(n for n in captured.graph.nodes if n.op != "get_attr")}
    constants = {path for path in captured.attributes if path.startswith("constant_")}

    def named(node: fx.Node) -> str:
        return "constant" if node.target in constants else order.get(node, str(node.target))

    nodes = []
    for node in order:
        val = node.meta.get("val")
        looks = (str(val.shape), str(val.stride()), val.dtype) if isinstance(val, Tensor) else str(val)
        where = [path for path, _ in (node.meta.get("nn_module_stack") or {}).values()]
        args, kwargs = (str(fx.node.map_arg(held, named)) for held in (node.args, node.kwargs))
        nodes.append((node.op, str(node.target), args, kwargs, looks, where, region(node)))
    sites = [(site.key, site.scans) for site in captured.sites]
    guards = [(guard.text, guard.line, guard.reach) for guard in captured.guards]
    attributes = {path: tuple(held.shape) for path, held in captured.attributes.items() if path not in constants}
    return nodes, sites, guards, attributes, captured.facts.blocks, captured.arguments


def graphs(sparse: Any) -> list[tuple[Any, ...]]:
    return [described(variant.built.captured) for known in sparse._simba.variants.values() for variant in known]


CALLS: dict[str, Callable[[nn.Module], Any]] = {
    "with a cache": lambda sparse: sparse(input_ids=tokens(1, 2, 9), use_cache=True),
    "padded, for training, with hidden states": lambda sparse: sparse.train()(
        **three_rows(masked=True), output_hidden_states=True, use_cache=False
    ),
}


@pytest.mark.parametrize("entry", SPREAD, ids=names(SPREAD))
def test_the_graph_is_that_of_a_whole_trace(entry: Any, counted: Counted, monkeypatch: pytest.MonkeyPatch) -> None:
    """Node for node, with shapes, strides, guards, call sites and what each node came from."""
    found = []
    for whole in (False, True):
        if whole:
            monkeypatch.setattr(export, "once_per_kind", block_by_block)
        sparse = simba_fx.transform(entry.make(), "linear")
        for call in CALLS.values():
            call(sparse)
        found.append((graphs(sparse), counted.stood_for))
    (once, stood_for), (whole_graphs, after) = found
    assert once == whole_graphs
    assert after == stood_for
    assert (stood_for == 0) == (entry.name == "zamba")  # it hands each block its number


def test_many_blocks_are_one_trace_of_each_kind(counted: Counted) -> None:
    module = Plain(*(Feedforward() if i % 3 == 2 else Block() for i in range(12)))
    captured = capture_plain(module)
    assert (counted.traces, counted.stood_for) == (1, 10)
    assert len(captured.sites) == 8


# --- what is noticed -------------------------------------------------------------------------------------------------


class Numbered(Block):
    """A block that knows its number; what it does with that is `use`."""

    def __init__(self, number: int, use: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.number, self.use = number, use

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x * (2 if self.use(self, x) else 1))


GLOBAL: list[Any] = []
LOOKS: dict[str, Callable[[Any, Tensor], Any]] = {
    "compares it": lambda self, _: self.number > 1,
    "asks whether it is 0": lambda self, _: bool(self.number),
    "counts with it": lambda self, _: self.number % 2,
    "looks it up in a list": lambda self, _: [0, 1, 0, 1][self.number],
    "looks it up in a dict": lambda self, _: {1: True}.get(self.number),
    "asks what it is": lambda self, _: isinstance(self.number, int),
    "writes it": lambda self, _: f"{self.number}" == "2",
    "makes a tensor of it": lambda self, x: x.new_zeros(self.number + 1).shape[0] == 3,
    "gives it to torch": lambda self, x: x.new_full((1,), self.number).shape[0] == 2,
    "makes a range of it": lambda self, _: len(range(self.number)) == 2,
    "swallows errors": lambda self, _: _swallowed(lambda: self.number + 1),
}


def _swallowed(look: Callable[[], Any]) -> bool:
    try:
        return bool(look())
    except Exception:
        return False


@pytest.mark.parametrize("how", LOOKS)
def test_a_block_that_looks_at_its_number_is_traced_itself(
    how: str, counted: Counted, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = Plain(*(Numbered(i, LOOKS[how]) for i in range(4)))
    found = described(capture_plain(module))
    assert (counted.traces, counted.stood_for) == (2, 0)
    monkeypatch.setattr(export, "once_per_kind", block_by_block)
    assert found == described(capture_plain(module))
    assert [block.number for block in module.layers] == [0, 1, 2, 3]


def test_a_block_that_does_not_look_at_its_number_is_not(counted: Counted) -> None:
    def without(self: Any, _: Tensor) -> bool:
        return self.number is None

    captured = capture_plain(Plain(*(Numbered(i, without) for i in range(4))))
    assert (counted.traces, counted.stood_for) == (1, 3)
    assert len(captured.sites) == 4


class Shifted(Block):
    def __init__(self, shift: int) -> None:
        super().__init__()
        self.shift = shift

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x * (1 + self.shift))


@pytest.mark.parametrize("shifts", [(0, 1, 0, 1), (1, 2, 1, 2), (0, 1, 2, 0), (0, 0, 2, 0), (0, 1, 2, 3), (3, 1, 1, 1)])
def test_numbers_are_each_blocks_own_whether_they_count_or_not(
    shifts: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """0, 1, 0, 1 begins as if it counted, and goes on as if it were the same in every block."""
    module, x = Plain(*map(Shifted, shifts)).eval(), torch.randn(2, 12, WIDTH)
    sparse = simba_fx.transform(module, [1 - i * 1e-6 for i in range(4)], example_inputs=(x,), kernels="model")
    assert torch.equal(sparse(x), module(x))
    found = described(capture_plain(module))
    monkeypatch.setattr(export, "once_per_kind", block_by_block)
    assert found == described(capture_plain(module))


class Counter:
    def __init__(self) -> None:
        self.calls = 0


class Deeper:
    def __init__(self) -> None:
        self.counter = Counter()


class Counting(Block):
    """Looks at something that the blocks share, and changes it."""

    def __init__(self, shared: Any) -> None:
        super().__init__()
        self.shared = shared

    def forward(self, x: Tensor) -> Tensor:
        held = self.shared
        if isinstance(held, Counter | Deeper):
            counter = held.counter if isinstance(held, Deeper) else held
            counter.calls = calls = counter.calls % 4 + 1
        else:
            place: Any = "calls" if isinstance(held, dict) else 0
            held, place = (held[0], 0) if isinstance(held, list) and isinstance(held[0], list) else (held, place)
            held[place] = calls = held[place] % 4 + 1
        return super().forward(x * calls)


SHARED: dict[str, Callable[[], Any]] = {
    "an object": Counter, "an object in one": Deeper, "a dict": lambda: {"calls": 0}, "a list": lambda: [0],
    "a list in one": lambda: [[0]], "a queue": lambda: collections.deque([0])}  # fmt: skip


@pytest.mark.parametrize("make", SHARED.values(), ids=SHARED)
def test_what_blocks_share_and_change_is_seen_by_each_and_left_as_it_was(make: Callable[[], Any]) -> None:
    shared, x = make(), torch.randn(2, 12, WIDTH)
    before = copy.deepcopy(shared)
    module = Plain(*(Counting(shared) for _ in range(4))).eval()
    sparse = simba_fx.transform(module, [1 - i * 1e-6 for i in range(4)], example_inputs=(x,), kernels="model")
    assert all(block.shared is shared for block in module.layers)
    assert contents(shared, {}) == contents(before, {})
    assert torch.equal(sparse(x), module(x))


class Writing(Block):
    def forward(self, x: Tensor) -> Tensor:
        self.seen = getattr(self, "seen", 0) + 1
        return super().forward(x)


class Appending(Block):
    def __init__(self, kept: list[Any] | collections.deque[Any]) -> None:
        super().__init__()
        self.kept = kept

    def forward(self, x: Tensor) -> Tensor:
        self.kept.append(x)
        return super().forward(x)


class Leaking(Block):
    """Hands a tensor out beside its result."""

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = super().forward(x)
        GLOBAL.append((y * 2).sum(1))
        return y


class Collecting(Plain):
    """Returns what its blocks handed out."""

    def forward(self, x: Tensor) -> Any:
        GLOBAL.clear()
        result = super().forward(x)
        return (result, *GLOBAL)


class Handed(Plain):
    """Hands its blocks an argument of another kind, or with another value, each."""

    def __init__(self, *blocks: nn.Module, arguments: Callable[[int, Tensor], Any]) -> None:
        super().__init__(*blocks)
        self.arguments = arguments

    def forward(self, x: Tensor) -> Any:
        for i, block in enumerate(self.layers):
            x = block(x, self.arguments(i, x))
        return self.head(self.norm(x))


class Looped(Plain):
    def forward(self, x: Tensor) -> Any:
        return super().forward(self.layers[1](self.layers[0](x)))


class Taking(Block):
    def forward(self, x: Tensor, more: Any) -> Tensor:
        y: Tensor = super().forward(x)
        if isinstance(more, Tensor):
            return y + more if more is not x else y
        return y * (2 if more else 1)


class Tagged(Block):
    def __init__(self, tag: Any) -> None:
        super().__init__()
        self.tag = tag

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x * self.tag[0])


class Constant(Block):
    """Makes tensors of plain numbers, and may hold one that is no parameter."""

    def __init__(self, held: Any = 0) -> None:
        super().__init__()
        self.held = held

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x * torch.tensor([1.0, 2, 3, 1, 2, 3])[torch.tensor([0, 2, 1, 3, 5, 4])] + self.held)


class Asking(Block):
    """Asks what torch answers without a guard: whoever asks before any scan asks of the input alone."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x * 2 if x.shape[1] == 1 else x)


class Circle:
    def __init__(self) -> None:
        self.itself = self

    def __getitem__(self, _: int) -> int:
        return 3


class Listed(list[int]):
    """Two of these have the same attributes, and other numbers."""

    def __init__(self, numbers: list[int]) -> None:
        super().__init__(numbers)
        self.name = "numbers"


def tied() -> Plain:
    module = Plain(*(Block() for _ in range(4)))
    module.layers[3].norm = module.layers[0].norm
    return module


def hooked() -> Plain:
    module = Plain(*(Block() for _ in range(4)))
    for i, block in enumerate(module.layers):
        block.norm.register_forward_hook(lambda module, args, result, i=i: result * (1 + i))
    return module


OTHERS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "writes to its module": (lambda: Plain(*(Writing() for _ in range(4))), 0),
    "appends to a list of its own": (lambda: Plain(*(Appending([]) for _ in range(4))), 0),
    "appends to a queue of all": (lambda: Plain(*map(Appending, [collections.deque()] * 4)), 0),
    "hands a tensor out by another way": (lambda: Collecting(*(Leaking() for _ in range(4))), 0),
    "is given its number": (lambda: Handed(*(Taking() for _ in range(4)), arguments=lambda i, _: i), 0),
    "is given a word, the same": (lambda: Handed(*(Taking() for _ in range(4)), arguments=lambda *_: "same"), 3),
    "is given a list of its own": (lambda: Handed(*(Taking() for _ in range(4)), arguments=lambda *_: [object()]), 0),
    "is given the same tensor twice": (
        lambda: Handed(*(Taking() for _ in range(4)), arguments=lambda i, x: x if i % 2 else x * 2),
        2,
    ),
    "makes constants": (lambda: Plain(*(Constant() for _ in range(4))), 3),
    "holds a tensor of its own": (lambda: Plain(*(Constant(torch.rand(WIDTH)) for _ in range(4))), 0),
    "holds a tensor that others hold": (lambda: Plain(*map(Constant, 4 * [torch.rand(WIDTH)])), 3),
    "asks about sizes": (lambda: Plain(*(Asking() for _ in range(4))), 3),
    "holds an equal list": (lambda: Plain(*(Tagged([3]) for _ in range(4))), 3),
    "holds an object that holds itself": (lambda: Plain(*(Tagged(Circle()) for _ in range(4))), 0),
    "holds a list with more to it": (lambda: Plain(*(Tagged(Listed([i])) for i in range(4))), 0),
    "holds another list": (lambda: Plain(*(Tagged([i]) for i in range(4))), 0),
    "shares a module": (tied, 1),
    "has hooks inside": (hooked, 0),
    "is given nothing at first": (lambda: Handed(*(Taking() for _ in range(4)), arguments=lambda i, _: i > 0), 2),
    "is there twice": (lambda: Plain(*2 * [Block()], Block(), Block()), 1),
    "is called twice": (lambda: Looped(*(Block() for _ in range(2))), 3),
}


@pytest.mark.filterwarnings("ignore:.*keeps tensors in layers")
@pytest.mark.parametrize("how", OTHERS)
def test_a_block_that_differs_is_traced_itself(how: str, counted: Counted, monkeypatch: pytest.MonkeyPatch) -> None:
    make, stood_for = OTHERS[how]
    module = make()
    found = described(capture_plain(module))
    assert counted.stood_for == stood_for
    for block in module.modules():
        block.__dict__.pop("seen", None)
    monkeypatch.setattr(export, "once_per_kind", block_by_block)
    assert found == described(capture_plain(module))


def test_constants_are_each_blocks_own() -> None:
    x = torch.randn(2, 20, WIDTH)
    for held in (torch.rand(4, WIDTH), torch.rand(WIDTH).expand(4, -1), [0] * 4):
        module = Plain(*map(Constant, held)).eval()
        sparse = simba_fx.transform(module, [1 - i * 1e-6 for i in range(4)], example_inputs=(x,), kernels="model")
        assert torch.equal(sparse(x), module(x))
        simba_fx.transform(module, "linear", example_inputs=(x,))(x)


class Short(Block):
    """Branches on the length."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x * 2 if x.shape[1] > 5 else x)


def test_a_branch_on_the_length_holds_in_the_blocks_that_follow() -> None:
    """The first block asks before any scan, of the input's length alone; the others ask of what is left of it."""
    module = Plain(*(Short() for _ in range(3)))
    sparse = simba_fx.transform(module, [1, 0.5, 0.2], example_inputs=(torch.zeros(2, 12, 6),))
    sparse(torch.randn(2, 40, 6))
    with pytest.raises(simba_fx.errors.InputError, match=r"L > 5 .* L = 5 at block"):
        sparse(torch.randn(2, 7, 6))


def test_an_error_in_a_block_is_told_as_it_is() -> None:
    def fail(self: Any, x: Tensor) -> Any:
        raise ValueError("the block's own words")

    with pytest.raises(Exception, match="the block's own words"):
        capture_plain(Plain(*(Numbered(i, functools.partial(fail)) for i in range(4))))
