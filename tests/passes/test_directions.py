"""Which way scans run: what the analysis says of small graphs, what it refuses, and flips that change their block."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from graph_cases import WIDTH, Block, Both, Mixer, Plain, Turned, TurnedOutside, capture_plain
from torch import Tensor, nn

import simba_fx
from simba_fx.errors import GraphError
from simba_fx.graph.marks import region
from simba_fx.graph.token_order import reaches_all, scan_directions, ways


class Applied(nn.Module):
    """Two blocks whose scans see `before(x)`; `after` turns their results back."""

    def __init__(self, before: Callable[[Tensor], Tensor], after: Callable[[Tensor], Tensor] = lambda y: y) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_AppliedBlock(before, after) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.layers:
            x = block(x)
        return x


class _AppliedBlock(nn.Module):
    def __init__(self, before: Callable[[Tensor], Tensor], after: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.mixer, self.before, self.after = Mixer(), before, after

    def forward(self, x: Tensor) -> Tensor:
        return x + self.after(self.mixer(self.before(x)))


def directions(module: nn.Module) -> list[bool]:
    captured = capture_plain(module.eval())
    found = ways(captured.graph, captured.facts)
    return list(scan_directions(captured.graph, captured.facts, range(captured.facts.n_blocks), found).values())


KEEPS_THE_ORDER: dict[str, Callable[[Tensor], Tensor]] = {
    "nothing": lambda x: x,
    "two flips": lambda x: x.flip(1).flip(1),
    "a flip of the channels": lambda x: x.flip(2),
    "a flip of a table": lambda x: x * torch.arange(x.shape[1]).flip(0)[:, None],
    "a shift by one token": lambda x: torch.cat((torch.zeros_like(x[:1, :1]).expand(x.shape[0], 1, -1), x[:, :-1]), 1),
    "a window": lambda x: nn.functional.pad(x, (0, 0, 3, 0))[:, : x.shape[1]],
    "attention": lambda x: torch.softmax(x @ x.transpose(1, 2), -1) @ x,
    "an index of the channels": lambda x: x[:, :, [1, 0, 2, 3, 4, 5]],
    "a roll of the channels": lambda x: x.roll(1, 2),
    "a mean over the sequence, reversed": lambda x: x + x.flip(1).mean(1, keepdim=True),
    "channels sorted": lambda x: x.sort(2).values,
    "batch and sequence in one dimension": lambda x: (x.flatten(0, 1) * 2).view(x.shape),
}
TURNS: dict[str, Callable[[Tensor], Tensor]] = {
    "flip": lambda x: x.flip(1),
    "flip of a negative dimension": lambda x: x.flip(-2),
    "flip of sequence and channels": lambda x: x.flip((1, 2)),
    "fliplr": torch.fliplr,
    "flipud": lambda x: torch.flipud(x.transpose(0, 1)).transpose(0, 1),
    "flip behind a transposition": lambda x: x.transpose(1, 2).flip(-1).transpose(1, 2),
    "three flips": lambda x: x.flip(1).flip(1).flip(1),
    "a flip and a table": lambda x: x.flip(1) * torch.arange(x.shape[1])[:, None],
}
SHUFFLES: dict[str, Callable[[Tensor], Tensor]] = {
    "index": lambda x: x[:, torch.arange(x.shape[1] - 1, -1, -1)],
    "index_select": lambda x: x.index_select(1, torch.arange(x.shape[1]).flip(0)),
    "gather": lambda x: x.gather(1, torch.arange(x.shape[1])[None, :, None].expand(x.shape)),
    "roll": lambda x: x.roll(1, 1),
    "roll of everything": lambda x: x.roll(1),
    "sort": lambda x: x.sort(1).values,
    "rot90": lambda x: torch.rot90(x, 2, (1, 2)),
    "slices put together anew": lambda x: torch.cat((x[:, 1:], x[:, :1]), 1),
    "halves exchanged": lambda x: torch.cat(x.chunk(2, 1)[::-1], 1)[:, : x.shape[1]],
    "scatter": lambda x: torch.zeros(x.shape).index_copy(1, torch.arange(x.shape[1]).flip(0), x),
    "a flip of batch and sequence in one dimension": lambda x: x.flatten(0, 1).flip(0).view(x.shape),
}


@pytest.mark.parametrize("name", KEEPS_THE_ORDER)
def test_what_keeps_the_order(name: str) -> None:
    assert directions(Applied(KEEPS_THE_ORDER[name])) == [False, False]


@pytest.mark.parametrize("name", TURNS)
def test_what_turns_the_sequence_around(name: str) -> None:
    assert directions(Applied(TURNS[name], lambda y: y.flip(1))) == [True, True]


@pytest.mark.parametrize("name", SHUFFLES)
def test_what_moves_tokens_otherwise_is_refused(name: str) -> None:
    module = Applied(SHUFFLES[name]).eval()
    with pytest.raises(GraphError, match="moves tokens along the sequence on their way to the scan selective_scan;"):
        simba_fx.transform(module, [1, 0.5], example_inputs=(torch.zeros(2, 24, WIDTH),))


def refused(module: nn.Module, shares: list[float]) -> str:
    with pytest.raises(GraphError) as caught:
        simba_fx.transform(module.eval(), shares, example_inputs=(torch.zeros(2, 24, WIDTH),))
    return str(caught.value)


def test_the_message_of_a_shuffle_names_the_node() -> None:
    assert refused(Applied(lambda x: x.roll(1, 1)), [1, 0.5]) == (
        "Node roll (aten.roll.default) in layers.0 moves tokens along the sequence on their way to the scan"
        " selective_scan; expected the input's order, or the whole sequence turned around by torch.flip, so that scores"
        " can be given back to their tokens. Reorder the tokens before the first block, or keep that block whole (give"
        " the next block the same share)."
    )


def test_a_shuffle_where_no_token_leaves_is_no_matter() -> None:
    """In a block after which nothing leaves, and under a criterion that reads no scan; the result is then right."""
    module = Applied(lambda x: x.roll(1, 1), lambda y: y.roll(-1, 1)).eval()
    x = torch.randn(2, 20, WIDTH)
    for options in ({"schedule": "dense"}, {"schedule": [1, 0.5], "criterion": "recent", "floor": 99}):
        sparse = simba_fx.transform(module, **options, kernels="model", example_inputs=(x,))
        assert torch.equal(sparse(x), module(x))


def test_tokens_of_both_orders_in_one_operand() -> None:
    assert refused(Applied(lambda x: x + x.flip(1)), [1, 0.5]) == (
        "Node add (aten.add.Tensor) in layers.0 joins tokens in the input's order with tokens in reversed order, and"
        " the scan selective_scan reads it as its operand transpose; expected one direction per scan. Run one scan per"
        " direction, or keep that block whole (give the next block the same share)."
    )


class HalfTurned(Mixer):
    """Flips what it scans, but not what it is scanned with."""

    def operands(self, x: Tensor) -> tuple[Tensor, ...]:
        u, *others = super().operands(x)
        return u.flip(2), *others


def test_operands_that_run_different_ways() -> None:
    module = Plain(Block(), Block())
    module.layers[0].mixers[0] = HalfTurned()
    assert refused(module, [1, 0.5]) == (
        "The operands of the scan selective_scan in layers.0.mixers.0 run different ways: transpose_1 in the input's"
        " order, flip reversed; expected one direction per scan. Flip all of its operands or none."
    )


class StaysTurned(Block):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.flip(1))


def test_what_crosses_a_cut_in_reversed_order() -> None:
    assert refused(Plain(StaysTurned(), Block()), [1, 0.5]) == (
        "Node add in layers.0 holds its tokens in reversed order and is read by layer_norm_1 in layers.1.norm, after"
        " tokens have left; expected the input's order between blocks. Turn the sequence around (torch.flip) inside the"
        " block, before and after its scan."
    )


def test_what_is_restored_in_reversed_order() -> None:
    """No cut lies between, but the survivors of the first cut are put back in what follows."""
    assert refused(Plain(Block(), Block(), StaysTurned()), [1, 0.5, 0.5]).startswith(
        "Node add_2 in layers.2 holds its tokens in reversed order and is read by layer_norm_3 in norm, after tokens"
    )


def test_a_mixture_crosses_a_cut() -> None:
    class Mixing(Block):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + x.flip(1)

    assert refused(Plain(Mixing(), Block()), [1, 0.5]).startswith("Node add_1 in layers.0 holds its tokens in mixed")


def test_which_blocks_carry_every_token_to_a_query() -> None:
    captured = capture_plain(Plain(Block(), Turned(), Both()).eval())
    expected = {None: (True, True, True), -1: (True, False, True), 0: (False, True, True), 3: (False, False, True)}
    assert {query: reaches_all(captured.graph, captured.facts, query) for query in expected} == expected


def test_flips_between_blocks_go_to_the_block_they_are_made_for() -> None:
    captured = capture_plain(TurnedOutside(*(Block() for _ in range(4))).eval())
    flips = [region(node) for node in captured.graph.nodes if "flip" in node.name]
    assert flips == [1, 1, 3, 3]
    found = ways(captured.graph, captured.facts)
    assert list(scan_directions(captured.graph, captured.facts, range(4), found).values()) == [False, True, False, True]
    captured.graph.lint()


def test_what_a_flip_between_blocks_takes_along() -> None:
    """Here the outer forward goes on computing with the reversed tokens before it calls the block."""

    class Scaled(Plain):
        def forward(self, x: Tensor) -> Tensor:
            first, second = self.layers
            return self.head(self.norm(second(torch.tanh(first(x).flip(1)) * 2).flip(1)))

    captured = capture_plain(Scaled(Block(), Block()).eval())
    moved = {node.name: region(node) for node in captured.graph.nodes if node.name in ("flip", "tanh", "mul", "flip_1")}
    assert moved == {"flip": 1, "tanh": 1, "mul": 1, "flip_1": 1}
