"""Early exits: taking rows out and putting them back."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from simba_fx import ops
from simba_fx.ops import backends, restore

OPS = torch.ops.simba_fx


def _split(rows: int, length: int, parts: int, seed: int) -> list[Tensor]:
    """A random partition of 0 … length-1 per row, the same sizes in every row."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.stack([torch.randperm(length, generator=generator) for _ in range(rows)])
    cuts = sorted(torch.randint(0, length + 1, (parts - 1,), generator=generator).tolist())
    return [part.sort(1).values for part in order.tensor_split(cuts, dim=1)]


@settings(max_examples=30)
@given(rows=st.integers(1, 3), length=st.integers(1, 40), parts=st.integers(1, 5), seed=st.integers(0, 10**6))
def test_taking_apart_and_restoring_is_the_identity(rows: int, length: int, parts: int, seed: int) -> None:
    hidden = torch.randn(rows, length, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    hidden.requires_grad_()
    places = _split(rows, length, parts, seed)
    pieces = [ops.take_tokens(hidden, place) for place in places]
    for piece, place in zip(pieces, places):
        assert torch.equal(piece, torch.stack([row[index] for row, index in zip(hidden, place)]))
    restored = ops.restore_tokens(pieces, places, length)
    assert torch.equal(restored, hidden)
    weight = torch.randn_like(hidden)
    (grad,) = torch.autograd.grad((restored * weight).sum(), hidden)
    assert torch.equal(grad, weight)


def test_what_has_no_place_is_left_out_and_gets_no_gradient() -> None:
    piece = torch.randn(2, 3, 4, requires_grad=True)
    places = torch.tensor([[0, 1, 2], [1, 2, 0]])
    masked = torch.full((2, 1, 4), torch.nan, requires_grad=True)
    out = ops.restore_tokens([piece, masked], [places, torch.full((2, 1), 3)], 3)
    assert torch.equal(out[1, 1], piece[1, 0])
    out.sum().backward()
    assert torch.equal(piece.grad, torch.ones_like(piece))
    assert torch.equal(masked.grad, torch.zeros_like(masked))


def test_an_index_taken_twice_adds_its_gradients() -> None:
    hidden = torch.randn(1, 3, 2, requires_grad=True)
    ops.take_tokens(hidden, torch.tensor([[2, 2, 0]])).sum().backward()
    assert hidden.grad is not None
    assert torch.equal(hidden.grad[0, :, 0], torch.tensor([1.0, 0.0, 2.0]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_opcheck(dtype: torch.dtype) -> None:
    hidden = torch.randn(2, 7, 3, dtype=dtype, requires_grad=True)
    places = _split(2, 7, 3, 1)
    pieces = [torch.randn(2, place.shape[1], 3, dtype=dtype, requires_grad=True) for place in places]
    torch.library.opcheck(torch.ops.simba_fx.take_tokens.default, (hidden, places[0]))
    torch.library.opcheck(torch.ops.simba_fx.restore_tokens.default, (pieces, places, 7))
    torch.library.opcheck(torch.ops.simba_fx.take_tokens_backward.default, (pieces[0].detach(), places[0], 7))
    torch.library.opcheck(torch.ops.simba_fx.restore_tokens_backward.default, (hidden.detach(), places))


BODIES = {
    OPS.restore_tokens.default: restore.restore_tokens._init_fn,
    OPS.restore_tokens_backward.default: restore.restore_tokens_backward._init_fn,
}


class Counted(TorchDispatchMode):
    """PyTorch's operators that are called inside, those in the bodies of ours included."""

    count = 0

    def __torch_dispatch__(self, called: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if called in BODIES:
            with self:
                return BODIES[called](*args)
        self.count += 1
        return called(*args, **(kwargs or {}))


def _restored(rows: int, parts: int) -> tuple[tuple[int, int], list[Tensor]]:
    """How many operators the two passes called; the result and the gradients. Pieces have two masked tokens per row."""
    generator = torch.Generator().manual_seed(parts)
    places, pieces = [], []
    for part in _split(rows, 60, parts, parts):
        place = torch.cat([part, torch.full((rows, 2), 60)], 1)
        place = place.gather(1, torch.stack([torch.randperm(place.shape[1], generator=generator) for _ in range(rows)]))
        piece = torch.randn(*place.shape, 3, generator=generator).masked_fill((place == 60)[..., None], torch.nan)
        places.append(place)
        pieces.append(piece.requires_grad_())
    with Counted() as forward:
        out = ops.restore_tokens(pieces, places, 60)
    weight = torch.randn(out.shape, generator=generator)
    with Counted() as backward:
        grads = torch.autograd.grad(out, pieces, weight)
    return (forward.count, backward.count), [out, *grads]


@pytest.mark.parametrize("rows", [1, 3])
def test_on_a_gpu_no_piece_costs_a_launch_of_its_own(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The paths of CUDA on CPU tensors: bit for bit what the loops of a CPU give."""
    right = {parts: _restored(rows, parts) for parts in (3, 40)}
    monkeypatch.setattr(backends, "on_gpu", lambda operand: True)
    got = {parts: _restored(rows, parts) for parts in (3, 40)}
    assert got[3][0] == got[40][0]
    assert all(few < many for few, many in zip(right[3][0], right[40][0]))  # of the loops, counted likewise
    for parts in (3, 40):
        assert all(torch.equal(ours, loops) for ours, loops in zip(got[parts][1], right[parts][1], strict=True))
