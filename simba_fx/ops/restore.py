"""Early exits: tokens taken out of the stream at a cut, and put back in their places after the last block.

Both are copies of whole rows, and operators rather than plain gathers: at the top level of a program, which is left to
Python, each is one call. On a CPU nothing of what leaves is copied twice, which would double the time. On a GPU it is
(room for the whole sequence is held while it is restored), so that launches do not grow in number with the pieces:
`torch.cat` takes 128 tensors in one. Letters: see `simba_fx.ops`; m slots of a region, d tokens that leave.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from simba_fx.errors import OperandError
from simba_fx.ops import backends, checks


def _rows(index: Tensor, stride: int) -> Tensor:
    """Slots `(B, d)` as rows of a `(B * stride, ...)` matrix, flat."""
    if index.shape[0] == 1:
        return index.flatten()
    first = torch.arange(index.shape[0], device=index.device) * stride
    return (index + first[:, None]).flatten()


@torch.library.custom_op("simba_fx::take_tokens", mutates_args=())
def take_tokens(hidden: Tensor, index: Tensor) -> Tensor:
    """`hidden[b, index[b, j]]`: `(B, m, ...)` and `(B, d)` int64 to `(B, d, ...)`."""
    checks.fit("take_tokens", checks.SLOTS, hidden=hidden, index=index)
    checks.inside("take_tokens", "index", index, 0, hidden.shape[1] - 1)
    taken = hidden.flatten(0, 1).index_select(0, _rows(index, hidden.shape[1]))
    return taken.view(*index.shape, *hidden.shape[2:]).detach()  # no view: results may be written into


@take_tokens.register_fake
def _(hidden: Tensor, index: Tensor) -> Tensor:
    checks.fit("take_tokens", checks.SLOTS, hidden=hidden, index=index)
    return hidden.new_empty(*index.shape, *hidden.shape[2:])


@torch.library.custom_op("simba_fx::take_tokens_backward", mutates_args=())
def take_tokens_backward(grad: Tensor, index: Tensor, slots: int) -> Tensor:
    """The gradient of `hidden`, `(B, m, ...)`; an index that occurs twice adds up."""
    checks.fit("take_tokens_backward", checks.SLOTS, grad=grad, index=index)
    checks.inside("take_tokens_backward", "index", index, 0, slots - 1)
    out = grad.new_zeros(grad.shape[0] * slots, *grad.shape[2:])
    out.index_add_(0, _rows(index, slots), grad.flatten(0, 1))
    return out.view(grad.shape[0], slots, *grad.shape[2:])


@take_tokens_backward.register_fake
def _(grad: Tensor, index: Tensor, slots: int) -> Tensor:
    checks.fit("take_tokens_backward", checks.SLOTS, grad=grad, index=index)
    return grad.new_empty(grad.shape[0], slots, *grad.shape[2:])


def _save_index(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    hidden, index = inputs
    ctx.save_for_backward(index)
    ctx.slots = hidden.shape[1]


def _take_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    (index,) = ctx.saved_tensors
    return torch.ops.simba_fx.take_tokens_backward(grad, index, ctx.slots), None


take_tokens.register_autograd(_take_backward, setup_context=_save_index)


@torch.library.custom_op("simba_fx::restore_tokens", mutates_args=())
def restore_tokens(pieces: list[Tensor], places: list[Tensor], length: int) -> Tensor:
    """Rows back in their places: `out[b, places[i][b, j]] = pieces[i][b, j]`.

    Args:
        pieces: tensors `(B, d_i, ...)` of one dtype. places: `(B, d_i)` int64; together they name each of 0 … length-1
            exactly once per row, and `length`, a place outside the result, any number of times.
        length: tokens of the result, L.

    Returns:
        `(B, L, ...)`.
    """
    _check_pieces("restore_tokens", pieces, places)
    _check_places(places, pieces[0].shape[0], length)
    rows, inner = pieces[0].shape[0], pieces[0].shape[2:]
    out = pieces[0].new_empty(rows * length + 1, *inner)  # one row more, for what has no place
    if backends.on_gpu(out):  # piece by piece, 64 of them took 4.3 ms on an H200, whatever their length
        pieces, places = [torch.cat(pieces, 1)], [torch.cat(places, 1)]
    for piece, place in zip(pieces, places):
        out.index_copy_(0, _flat_places(place, length), piece.flatten(0, 1))
    return out[:-1].view(rows, length, *inner).detach()


def _check_pieces(operator: str, pieces: list[Tensor], places: list[Tensor]) -> None:
    """Raises: OperandError unless each piece has a place for each of its tokens, and all are of one kind."""
    if not pieces or len(pieces) != len(places):
        raise OperandError(
            f"simba_fx::{operator} expected pieces and as many places, at least one; found {len(pieces)} and "
            f"{len(places)}. Pass the places of every piece."
        )
    first = pieces[0]
    for piece, place in zip(pieces, places):
        checks.fit(operator, checks.SLOTS, piece=piece, place=place)
        same = piece.dtype == first.dtype and piece.device == first.device and piece.dim() == first.dim()
        sizes = zip((piece.shape[0], *piece.shape[2:]), (first.shape[0], *first.shape[2:]))
        if not same or any(type(a) is int and type(b) is int and a != b for a, b in sizes):
            raise OperandError(
                f"simba_fx::{operator} expected pieces that differ in their number of tokens alone; found "
                f"{tuple(first.shape)} {first.dtype} and {tuple(piece.shape)} {piece.dtype}. Pass pieces of one stream."
            )


def _check_places(places: list[Tensor], rows: int, length: int) -> None:
    """Raises: OperandError unless the places name each token of each row once. Only in memory of the CPU: what they
    leave out would be whatever the memory held."""
    checks.at_least("restore_tokens", {"length": (length, 0)})
    if backends.on_gpu(places[0]) or places[0].device.type != "cpu":
        return
    named = torch.cat(places, 1)
    checks.inside("restore_tokens", "places", named, 0, length)
    times = named.new_zeros(rows, length + 1).scatter_add_(1, named, torch.ones_like(named))[:, :length]
    if bool((times != 1).any()):
        row, token = (int(index) for index in (times != 1).nonzero()[0])
        raise OperandError(
            f"simba_fx::restore_tokens expected places that name each of 0 to {length - 1} once in each row; found "
            f"{token} {int(times[row, token])} times in row {row}. Pass the places of every token."
        )


def _flat_places(place: Tensor, length: int) -> Tensor:
    if place.shape[0] == 1:
        return place.flatten()
    return _rows(place, length).masked_fill_(place.flatten() == length, place.shape[0] * length)


@restore_tokens.register_fake
def _(pieces: list[Tensor], places: list[Tensor], length: int) -> Tensor:
    _check_pieces("restore_tokens", pieces, places)
    return pieces[0].new_empty(pieces[0].shape[0], length, *pieces[0].shape[2:])


@torch.library.custom_op("simba_fx::restore_tokens_backward", mutates_args=())
def restore_tokens_backward(grad: Tensor, places: list[Tensor]) -> list[Tensor]:
    """The gradient of each piece; zero for what had no place."""
    for place in places:
        checks.fit("restore_tokens_backward", checks.RESTORED, grad=grad, place=place)
    length, grads = grad.shape[1], []
    for place in places:
        checks.inside("restore_tokens_backward", "places", place, 0, length)
        nowhere = place == length
        taken = grad.flatten(0, 1).index_select(0, _rows(place.masked_fill(nowhere, 0), length))
        taken = taken.view(*place.shape, *grad.shape[2:])
        grads.append(taken.masked_fill_(nowhere.view(*place.shape, *(1,) * (grad.dim() - 2)), 0))
    return grads


@restore_tokens_backward.register_fake
def _(grad: Tensor, places: list[Tensor]) -> list[Tensor]:
    for place in places:
        checks.fit("restore_tokens_backward", checks.RESTORED, grad=grad, place=place)
    return [grad.new_empty(*place.shape, *grad.shape[2:]) for place in places]


def _save_places(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1])


def _restore_backward(ctx: Any, grad: Tensor) -> tuple[list[Tensor], list[None], None]:
    places = list(ctx.saved_tensors)
    if backends.on_gpu(grad):  # likewise; views of the one gather are made here: an operator may not return any
        (taken,) = torch.ops.simba_fx.restore_tokens_backward(grad, [torch.cat(places, 1)])
        grads = list(taken.split([place.shape[1] for place in places], 1))
    else:
        grads = torch.ops.simba_fx.restore_tokens_backward(grad, places)
    return grads, [None] * len(places), None


restore_tokens.register_autograd(_restore_backward, setup_context=_save_places)
