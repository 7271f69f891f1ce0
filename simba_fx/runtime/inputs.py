"""Checks of what a transformed model is called with."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from simba_fx.compiling import assert_on_device, traced
from simba_fx.errors import InputError


def check_mask(mask: Tensor | None, rows: int, length: int, tail: int, named: Sequence[int] = ()) -> Tensor | None:
    """A padding mask that can be used, or None where nothing is padded.

    Raises:
        InputError: not `(B, L)`; a row without a real token, or with padding between its tokens; a tail longer than a
            row, or a row too short for one of the `named` positions (of `query` and `protect`). On a GPU what concerns
            rows is asserted on the device, without a synchronisation.
    """
    if isinstance(length, int) and length == 0:
        raise InputError("Expected prompts of at least one token, found an empty one, (B, 0). Leave such calls out.")
    needed = max([1, *[_needed(position) for position in named]])
    if needed > length:
        raise InputError(
            f"query or protect names position {_farthest(named)}, but the prompt has {length} tokens; expected at "
            f"least {needed}. Name a position that it has, or pass a longer prompt."
        )
    if tail > length:
        raise InputError(
            f"simba_fx.tail protects the last {tail} tokens, but the prompt has {length}; expected a tail of at most "
            "the prompt's length. Lower the tail or pass a longer prompt."
        )
    if mask is None:
        return None
    if tuple(mask.shape) != (rows, length):
        raise InputError(
            f"Expected an attention_mask (B, L) = ({rows}, {length}), 1 for real tokens and 0 for padding; found shape "
            f"{tuple(mask.shape)}. Pass the tokenizer's 2-D mask."
        )
    if traced():
        return mask
    real = mask != 0
    pieces = (real.diff(dim=1, prepend=mask.new_zeros(rows, 1, dtype=torch.bool)) & real).sum(1)
    if mask.is_cuda:
        assert_on_device((pieces >= 1).all(), "a row of attention_mask is all padding")
        assert_on_device((pieces <= 1).all(), "a row has padding between its tokens")
        check_rows(real.sum(1), tail, named)
        return mask
    row = int(pieces.argmin())
    if int(pieces[row]) == 0:
        raise InputError(
            f"Row {row} of attention_mask is all padding; expected at least one real token in every row. "
            "Remove the row."
        )
    row = int(pieces.argmax())
    if (parts := int(pieces[row])) > 1:
        raise InputError(
            f"Row {row} of attention_mask has padding between its tokens, which are in {parts} pieces; expected the "
            "real tokens of a row one after the other, with padding before or behind them, because padding in between "
            "still changes a model's states. Move it to one side."
        )
    check_rows(real.sum(1), tail, named)
    return None if bool((mask == 1).all()) else mask


def check_rows(lengths: Tensor, tail: int, named: Sequence[int]) -> None:
    """Rows of so many real tokens, `(B,)`, have what is asked of them.

    Raises:
        InputError: a row shorter than the tail, or too short for a position of `query` or `protect`. On a GPU both are
            asserted on the device, without a synchronisation.
    """
    needed = max([1, *[_needed(position) for position in named]])
    if max(tail, needed) <= 1:
        return
    if lengths.is_cuda:
        assert_on_device((lengths >= tail).all(), "a row has fewer real tokens than the protected tail")
        assert_on_device((lengths >= needed).all(), "a row is too short for a position of query or protect")
        return
    row = int(lengths.argmin())
    found = int(lengths[row])
    if found < tail:
        raise InputError(
            f"simba_fx.tail protects the last {tail} tokens, but row {row} has {found} real tokens; expected a tail of "
            "at most the shortest row's length. Lower the tail or remove the row."
        )
    if found < needed:
        raise InputError(
            f"query or protect names position {_farthest(named)}, but row {row} has {found} real tokens; expected at "
            f"least {needed} in every row. Name a position that every row has, or remove the row."
        )


def check_positions(positions: Tensor | None, embeds: Tensor, mask: Tensor | None, first: int = 0) -> Tensor:
    """Positions of the tokens `(B, L)` int64; counted from `first` where none are given. Of tokens in pictures and
    texts they have several axes, `(k, B, L)`, the first of four being the place in the row.

    Raises:
        InputError: not `(B, L)`, `(1, L)` or `(k, B, L)`; positions that do not rise by one from one real token to the
            next: several sequences packed in a row.
    """
    rows, length = embeds.shape[:2]
    if positions is None:
        return torch.arange(first, first + length, device=embeds.device).expand(rows, length)
    if positions.dim() == 3 and positions.shape[1:] == embeds.shape[:2]:
        if positions.shape[0] == 4:
            check_positions(positions[0], embeds, mask)
        return positions
    if positions.dim() != 2 or positions.shape[0] not in (1, rows) or positions.shape[1] != length:
        raise InputError(
            f"Expected position_ids (B, L) = ({rows}, {length}); found shape {tuple(positions.shape)}. Leave the "
            "argument out, or pass one position per token."
        )
    if not traced():
        rising = positions.diff(dim=1) == 1
        if mask is not None:  # of padding nothing is asked
            rising = rising | (mask[:, 1:] == 0) | (mask[:, :-1] == 0)
        rising = rising.all()
        if positions.is_cuda:
            assert_on_device(rising, "position_ids of a packed row: only whole sequences can be pruned")
        elif not bool(rising):
            raise InputError(
                "position_ids do not rise by one from token to token, as in rows that pack several sequences; expected "
                "one sequence per row. Pass one sequence per row, padded, with an attention_mask."
            )
    return positions.expand(rows, length)


def _needed(position: int) -> int:
    """How many tokens a row has that has this position."""
    return position + 1 if position >= 0 else -position


def _farthest(named: Sequence[int]) -> int:
    return max(named, key=_needed)
