"""Plain modules: what a graph takes for granted of sizes is checked at each call; masks are stated, not guessed."""

from __future__ import annotations

import itertools
import re
from typing import Any

import grammar
import pytest
import torch
from grammar import Drawn, Spec, Step
from graph_cases import WIDTH, Mixer
from test_fuzz_modules import check, transformed
from torch import Tensor, nn

import simba_fx
from simba_fx.errors import CaptureError, GraphError, InputError

GUARDED: tuple[tuple[Step, str, tuple[int, int], tuple[int, int]], ...] = (
    (grammar.branch_on_length, "L <= 30", (2, 30), (2, 31)),
    (grammar.branch_on_parity, "(L % 2) == 0", (2, 8), (2, 9)),
    (grammar.branch_on_rows, "B <= 4", (4, 9), (5, 9)),
    (grammar.branch_on_one_row, "B != 1", (2, 9), (1, 9)),
    (grammar.truth_as_int, "B != 1", (2, 9), (1, 9)),
    (grammar.branch_on_one_token, "((-1) + L) != 0", (2, 2), (2, 1)),
    (grammar.fixed_slice, "L < 30", (2, 29), (2, 31)),
    (grammar.last_three, "L >= 3", (2, 4), (2, 2)),
)


def line_of(step: Step) -> str:
    return f"grammar.py, line {step.__code__.co_firstlineno + 1}: `"


@pytest.mark.parametrize(("step", "fact", "same", "other"), GUARDED, ids=[row[0].__name__ for row in GUARDED])
def test_a_branch_or_slice_on_sizes_holds_or_is_refused(
    step: Step, fact: str, same: tuple[int, int], other: tuple[int, int]
) -> None:
    """Case 1, also where nothing is pruned."""
    torch.manual_seed(0)
    module = Drawn(Spec(("one", "one"), (step,))).eval()
    sparse = transformed(module, "dense")
    x = torch.randn(*same, WIDTH)
    torch.testing.assert_close(sparse(x), module(x), rtol=1e-4, atol=1e-5)
    with pytest.raises(InputError) as caught:
        sparse(torch.randn(*other, WIDTH))
    said = f"Drawn was captured where {fact} ({line_of(step)}"
    assert str(caught.value).startswith(said)
    assert str(caught.value).endswith(
        f"`); expected calls for which that holds, since a graph has one side of a branch; found B = {other[0]}, "
        f"L = {other[1]}. Pass other sizes, or write the model without a branch on them."
    )


def test_a_branch_holds_in_every_block() -> None:
    module = Drawn(Spec(("one", "one"), (grammar.last_three,))).eval()
    sparse = transformed(module, (1, 0.5), floor=0)
    check(module, sparse, 2, 8, seed=0)
    with pytest.raises(InputError) as caught:
        sparse(torch.randn(2, 4, WIDTH))
    assert "expected that to hold in every block" in str(caught.value)
    assert "found B = 2, L = 3 at block 1, of 4 tokens. Use schedule='dense'" in str(caught.value)
    check(module, transformed(module, "dense"), 2, 4, seed=0)


class Outer(nn.Module):
    """Asks outside of its blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Mixer() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] == 1:
            return 2 * x
        for layer in self.layers:
            x = layer(x)
        return x


def test_what_is_asked_of_the_input_alone_is_not_asked_of_survivors() -> None:
    """With few tokens a class token may be left alone in a block."""
    sparse = simba_fx.transform(Outer(), [1, 0.1], query=-1, floor=0, example_inputs=(torch.zeros(2, 24, WIDTH),))
    sparse(torch.randn(2, 8, WIDTH))
    assert [block.shape[1] for block in simba_fx.kept(sparse)] == [8, 1]
    with pytest.raises(InputError, match="captured where L != 1"):
        sparse(torch.randn(2, 1, WIDTH))


@pytest.mark.parametrize("step", [grammar.float_of_length], ids=lambda step: step.__name__)
def test_a_length_that_becomes_a_number_is_refused_with_its_line(step: Step) -> None:
    with pytest.raises(CaptureError, match=re.escape(line_of(step))):
        transformed(Drawn(Spec(("one", "one"), (step,))), "dense")


@pytest.mark.parametrize(
    ("step", "words"),
    [(grammar.mixed_by_places, "found matmul"), (grammar.written_places, "writes into a tensor made from the length"),
     (grammar.taken_by_place, "moves tokens along the sequence")],
    ids=lambda value: getattr(value, "__name__", ""),
)  # fmt: skip
def test_places_that_cannot_be_gathered_are_refused(step: Step, words: str) -> None:
    """Never renumbered; where nothing leaves, nothing is refused."""
    module = Drawn(Spec(("one", "one"), (step,))).eval()
    with pytest.raises(GraphError, match=words):
        transformed(module, [1, 0.5])
    check(module, transformed(module, "dense"), 2, 20, seed=0)


def test_a_learned_bias_over_pairs_gets_its_gradient() -> None:
    torch.manual_seed(0)
    module = Drawn(Spec(("one", "one", "one"), (grammar.learned_bias,)))
    sparse = transformed(module, (1, 0.7, 0.4))
    x, at = torch.randn(2, 20, WIDTH), torch.arange(20).expand(2, 20)
    biases = [block.bias for block in module.blocks().values()]
    found = torch.autograd.grad(sparse(x).square().sum(), biases)
    kept = dict(zip(module.blocks(), simba_fx.kept(sparse)))
    expected = torch.autograd.grad(module.expected(x, kept, at, 20).square().sum(), biases)
    for ours, theirs in zip(found, expected):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4 * float(theirs.abs().max()))


# --- masks -----------------------------------------------------------------------------------------------------------

MASKS = list(itertools.product((torch.bool, torch.int64, torch.float32), ("real", "padding"), (False, True)))


@pytest.mark.parametrize(("dtype", "marks", "early"), MASKS)
def test_a_stated_mask_of_either_sense_and_any_dtype(dtype: torch.dtype, marks: str, early: bool) -> None:
    """Cases 2 and 9: every row of a batch equals the row alone; also where `~mask` is computed before the blocks."""
    torch.manual_seed(2)
    module = Drawn(Spec(("one", "one", "one"), mask=dtype, marks=marks, early=early)).eval()
    check(module, transformed(module, (1, 0.7, 0.4)), 3, 30, seed=3)


class Argued(Outer):
    def forward(self, x: Tensor, other: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x * other[..., None])


class Padded(Outer):
    def forward(self, x: Tensor, key_padding_mask: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x * key_padding_mask[..., None])


@pytest.mark.parametrize(("kind", "name", "dtype"), [(Argued, "other", torch.bool),
                                                     (Padded, "key_padding_mask", torch.float32)])  # fmt: skip
def test_an_argument_that_may_be_a_mask_is_stated(kind: type[nn.Module], name: str, dtype: torch.dtype) -> None:
    example = (torch.zeros(2, 24, WIDTH), torch.ones(2, 24).to(dtype))
    with pytest.raises(InputError) as caught:
        simba_fx.transform(kind(), "linear", example_inputs=example)
    assert str(caught.value) == (
        f"{kind.__name__} has the argument {name}, which may be a padding mask, and was not told; expected it to be "
        f"stated, since a mask that is taken for text, or in the wrong sense, changes results. Pass mask={name!r} to "
        f"transform if values other than 0 mark real tokens, mask={name!r}, mask_marks='padding' if they mark padding, "
        "or mask=False if no argument says what is padding."
    )
    stated: dict[str, Any]
    for stated in ({"mask": name}, {"mask": name, "mask_marks": "padding"}, {"mask": False}):
        sparse = simba_fx.transform(kind(), example_inputs=example, **stated)
        facts = simba_fx.program(sparse).captured.facts
        assert (facts.mask is None) == (stated["mask"] is False)


def test_a_mask_that_is_no_argument() -> None:
    with pytest.raises(InputError, match=r"mask='pad': expected the name of an argument .* found x \(3, 24, 6\)"):
        simba_fx.transform(Outer(), "linear", mask="pad", example_inputs=(torch.zeros(2, 24, WIDTH),))


def test_an_argument_of_another_kind_or_size() -> None:
    example = (torch.zeros(2, 24, WIDTH), torch.ones(2, 24, dtype=torch.bool))
    sparse = simba_fx.transform(Argued(), "linear", mask="other", example_inputs=example)
    with pytest.raises(InputError) as caught:
        sparse(torch.randn(2, 9, WIDTH), torch.ones(2, 9, dtype=torch.int64))
    assert str(caught.value) == (
        "Argued was captured with other (B, L) of torch.bool, that is (2, 9) in this call; found torch.int64 (2, 9). "
        "Pass such a tensor, or transform the module again with example_inputs like this call's."
    )
    with pytest.raises(InputError, match=r"\(B, L, 6\) of torch.float32, that is \(2, 9, 6\) .* found .*\(2, 9, 7\)"):
        sparse(torch.randn(2, 9, 7), torch.ones(2, 9, dtype=torch.bool))
