"""Which tokens stay: selection as operators, with ascending indices and no host synchronisation.

On CUDA one Triton kernel per call, elsewhere sorts.

Counts come from `simba_fx.schedule.kept_count` (method.md section 4) and depend on shapes alone. Letters: see
`simba_fx.ops`; here m is the number of slots of the region (the tokens that reached this cut) and k how many stay.
"""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from simba_fx.errors import CriterionError
from simba_fx.ops import backends, checks
from simba_fx.ops.inline import inline_on_gpu
from simba_fx.schedule import kept_count

POSITION_CRITERIA = ("recent", "random", "stride")
"""Criteria that look at positions only: keep the last ones, seeded uniform, evenly spaced."""


SPARE = 2
"""Columns of a list of dropped tokens beyond the tokens themselves: a list of none or one would be compiled apart."""


def _kept(slots: int, length: int, tail: int, share_p: int, share_q: int, floor: int) -> int:
    """k = min(m, count(length)). For symbolic sizes the count alone: where shares do not increase along the blocks m is
    never below it, and minima nested over sixty cuts are what makes a whole graph slow to compile."""
    count = kept_count(length, Fraction(share_p, share_q), tail, floor)
    return min(slots, count) if isinstance(slots, int) and isinstance(count, int) else count


def ranking(score: Tensor) -> Tensor:
    """Slots from best to worst `(B, m)`; of equal scores the later slot first, NaN last."""
    score = score.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    return score.shape[1] - 1 - score.flip(1).argsort(dim=1, descending=True, stable=True)


def _plain(slots: Tensor) -> Tensor:
    """`(B, k)` contiguous, with the strides that say so: those of a single row may be anything, and are guarded on."""
    return slots.contiguous().flatten().view(slots.shape)


@torch.library.custom_op("simba_fx::select_tokens", mutates_args=())
def select_tokens(
    score: Tensor, positions: Tensor, length: int, tail: int, share_p: int, share_q: int, floor: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Keeps the last `tail` slots and the best-scored earlier ones; of equal scores the later token.

    Args:
        score: `(B, m)` float32, higher = keep.
        positions: `(B, m)` int64, where each slot's token stood in the input.
        length: tokens in the input; k = min(m, kept_count(length, share_p / share_q, tail, floor)).

    Returns:
        kept `(B, k)` and dropped `(B, m - k + 2)`, slots in ascending order, then the positions of both. The last two
        columns of dropped are spare (`SPARE`): slot 0, position `length`.
    """
    checks.fit("select_tokens", checks.SLOTS, score=score, positions=positions)
    checks.rule("select_tokens", length, tail, share_p, share_q, floor)
    slots = score.shape[1]
    k = _kept(slots, length, tail, share_p, share_q, floor)
    if (kernels := backends.triton_for(score)) is not None:
        chosen = kernels.select.select(score, positions, None, None, k, length, tail, share_p, share_q, floor)
        return chosen[0], chosen[1], chosen[2], chosen[3]
    return _of_whole_rows(score, positions, k, length, tail)


def _of_whole_rows(
    score: Tensor, positions: Tensor, k: int, length: int, tail: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    slots = score.shape[1]
    protected = torch.arange(slots, device=score.device) >= slots - tail
    order = ranking(score.masked_fill(protected, torch.inf))
    kept, dropped = _plain(order[:, :k].sort(1).values), order[:, k:].sort(1).values
    kept_positions, dropped_positions = positions.gather(1, kept), positions.gather(1, dropped)
    spare = kept.new_zeros(score.shape[0], SPARE)
    return kept, torch.cat((dropped, spare), 1), kept_positions, torch.cat((dropped_positions, spare + length), 1)


@select_tokens.register_fake
def _(
    score: Tensor, positions: Tensor, length: int, tail: int, share_p: int, share_q: int, floor: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    checks.fit("select_tokens", checks.SLOTS, score=score, positions=positions)
    checks.rule("select_tokens", length, tail, share_p, share_q, floor)
    rows, slots = score.shape
    k = _kept(slots, length, tail, share_p, share_q, floor)
    sizes = (k, slots - k + SPARE, k, slots - k + SPARE)
    kept, dropped, kept_at, dropped_at = (positions.new_empty(rows, size) for size in sizes)
    return kept, dropped, kept_at, dropped_at


@torch.library.custom_op("simba_fx::select_real_tokens", mutates_args=())
def select_real_tokens(
    score: Tensor,
    positions: Tensor,
    real: Tensor,
    lengths: Tensor,
    length: int,
    tail: int,
    share_p: int,
    share_q: int,
    floor: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`select_tokens` for padded rows: each row keeps what it would keep alone, and pads make up the rectangle.

    Row b keeps its last `tail` real tokens and its best-scored earlier real ones, `kept_count(lengths[b], ...)` in all.
    The other of the k slots are pads of the row, leftmost first. A row may have one pad too few (counts round up;
    drops of two lengths differ from proportion by less than one token each). Its worst dropped real token then stays
    as a **masked token**: marked not real, with position `length`, a place outside the input, and moved to the end
    of the row that was padded in the input: right, unless the row's last real token stood last there. (No pad may be
    left, and a model that is given no mask computes with the masked token, which must then stand behind everything
    real.) Its true position is listed with the dropped ones.

    Args:
        score: `(B, m)` float32, higher = keep; whatever a pad's score, it never outranks a real token.
        positions: `(B, m)` int64. real: `(B, m)` bool. lengths: `(B,)` int64, real tokens of each row of the *input*.
        length: padded length of the input.

    Returns:
        kept `(B, k)`, slots ascending but for a masked token; dropped `(B, m - k + 2)`: slots ascending, then that of
        the masked token or 0, then 0; kept positions; dropped positions, `length` where there is no masked token and
        last; kept_real `(B, k)`. Over a chain of cuts, all dropped and the last kept positions name every position
        exactly once, and `length` any number of times.
    """
    checks.fit("select_real_tokens", checks.SLOTS, score=score, positions=positions, real=real, lengths=lengths)
    checks.rule("select_real_tokens", length, tail, share_p, share_q, floor)
    checks.inside("select_real_tokens", "lengths", lengths, 0, length)
    slots = score.shape[1]
    k = _kept(slots, length, tail, share_p, share_q, floor)
    if (kernels := backends.triton_for(score)) is not None:
        chosen = kernels.select.select(score, positions, real, lengths, k, length, tail, share_p, share_q, floor)
        return chosen[0], chosen[1], chosen[2], chosen[3], chosen[4]
    if score.device.type == "cpu" and bool(real.all()) and bool((lengths == length).all()):  # the usual case, quicker
        kept, dropped, kept_at, dropped_at = _of_whole_rows(score, positions, k, length, tail)
        return kept, dropped, kept_at, dropped_at, real.new_ones(kept.shape)
    slot = torch.arange(slots, device=score.device).expand(score.shape)
    present = real.sum(1, keepdim=True)
    count = kept_count(lengths, Fraction(share_p, share_q), tail, floor).unsqueeze(1)
    count = torch.maximum(torch.minimum(count, present), present - (slots - k) - 1)

    in_tail = real & (real.flip(1).cumsum(1).flip(1) <= tail)
    order = ranking(torch.where(real, score, -slot.float()))
    order = order.gather(1, (real.long() + in_tail).gather(1, order).argsort(dim=1, descending=True, stable=True))
    rank = torch.empty_like(order).scatter_(1, order, slot.contiguous())

    stays_real = rank < count
    stays_pad = (rank >= present) & (rank < present + k - count)
    masked = (rank == present - 1) & (present + k - count > slots)
    stays = stays_real | stays_pad | masked
    last = torch.where(real, positions, -1).amax(1, keepdim=True)
    outer = torch.where(last == length - 1, -1, slots)
    outwards = torch.where(stays, torch.where(masked, outer, slot), slots + 1).argsort(dim=1, stable=True)
    kept = _plain(outwards[:, :k])
    gone = torch.where(stays, slots, slot).argsort(dim=1, stable=True)[:, : slots - k]
    has_masked = masked.any(1, keepdim=True)
    spare = gone.new_zeros(score.shape[0], SPARE - 1)
    dropped = torch.cat((gone, masked.long().argmax(1, keepdim=True), spare), 1)
    kept_positions = positions.masked_fill(masked, length).gather(1, kept)
    dropped_positions = positions.gather(1, dropped)
    dropped_positions[:, slots - k : slots - k + 1].masked_fill_(~has_masked, length)
    dropped_positions[:, slots - k + 1 :] = length
    return kept, dropped, kept_positions, dropped_positions, stays_real.gather(1, kept)


@select_real_tokens.register_fake
def _(
    score: Tensor,
    positions: Tensor,
    real: Tensor,
    lengths: Tensor,
    length: int,
    tail: int,
    share_p: int,
    share_q: int,
    floor: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    checks.fit("select_real_tokens", checks.SLOTS, score=score, positions=positions, real=real, lengths=lengths)
    checks.rule("select_real_tokens", length, tail, share_p, share_q, floor)
    rows, slots = score.shape
    k = _kept(slots, length, tail, share_p, share_q, floor)
    sizes = (k, slots - k + SPARE, k, slots - k + SPARE)
    kept, dropped, kept_at, dropped_at = (positions.new_empty(rows, size) for size in sizes)
    return kept, dropped, kept_at, dropped_at, real.new_empty(rows, k)


inline_on_gpu(select_tokens, backends.has_triton)
inline_on_gpu(select_real_tokens, backends.has_triton)


@torch.library.custom_op("simba_fx::position_score", mutates_args=())
def position_score(
    positions: Tensor,
    real: Tensor | None,
    lengths: Tensor | None,
    length: int,
    tail: int,
    share_p: int,
    share_q: int,
    floor: int,
    criterion: str,
    seed: int,
) -> Tensor:
    """Scores that need no scan, `(B, m)` float32, higher = keep; arguments as in `select_real_tokens`.

    `"recent"`: the slot's index. `"random"`: uniform in [0, 1), a hash of the seed and of the distance from the row's
    tail in input positions, so a row's draw does not depend on the batch it is in, nor on padding that is counted as
    its tail (`simba_fx.runtime.rows`). `"stride"`: 1 for evenly spaced real tokens before the tail, as many as the row
    keeps there, else 0.

    Raises:
        CriterionError: for an unknown criterion.
    """
    _check(criterion)
    checks.fit("position_score", checks.SLOTS, positions=positions, real=real, lengths=lengths)
    checks.rule("position_score", length, tail, share_p, share_q, floor)
    rows, slots = positions.shape
    if criterion == "recent":
        return torch.arange(slots, device=positions.device, dtype=torch.float32).repeat(rows, 1)
    mask = torch.ones_like(positions, dtype=torch.bool) if real is None else real
    if criterion == "random":
        last = torch.where(mask, positions, -1).amax(1, keepdim=True)
        return _uniform(last - tail - positions, seed)
    earlier = mask & (mask.flip(1).cumsum(1).flip(1) > tail)
    available = earlier.sum(1, keepdim=True)
    inputs = torch.full((rows,), length, device=positions.device) if lengths is None else lengths
    wanted = kept_count(inputs, Fraction(share_p, share_q), tail, floor).unsqueeze(1) - tail
    step = earlier.cumsum(1) * wanted
    every = available.clamp(min=1)
    return (earlier & (step // every > (step - wanted) // every)).float()


def _check(criterion: str) -> None:
    if criterion not in POSITION_CRITERIA:
        known = ", ".join(POSITION_CRITERIA)
        raise CriterionError(f"unknown criterion {criterion!r}; positions can be scored by {known}")


def _uniform(key: Tensor, seed: int) -> Tensor:
    """A hash of int64 `key` and `seed` to 24 random bits, as float32 in [0, 1); 32-bit avalanche mixing in int64."""
    low32 = 0xFFFFFFFF
    mixed = key & low32
    for round_ in range(2):
        mixed = (mixed + ((seed >> (32 * round_)) & low32) + 0x9E3779B9) & low32
        mixed = mixed ^ (mixed >> 16)
        mixed = (mixed * 0x7FEB352D) & low32
        mixed = mixed ^ (mixed >> 15)
        mixed = (mixed * 0x6A09E667) & low32
        mixed = mixed ^ (mixed >> 16)
    return (mixed >> 8).float() / (1 << 24)


@position_score.register_fake
def _(
    positions: Tensor,
    real: Tensor | None,
    lengths: Tensor | None,
    length: int,
    tail: int,
    share_p: int,
    share_q: int,
    floor: int,
    criterion: str,
    seed: int,
) -> Tensor:
    _check(criterion)
    checks.fit("position_score", checks.SLOTS, positions=positions, real=real, lengths=lengths)
    checks.rule("position_score", length, tail, share_p, share_q, floor)
    return positions.new_empty(positions.shape, dtype=torch.float32)


@torch.library.custom_op("simba_fx::take_square", mutates_args=())
def take_square(square: Tensor, positions: Tensor, real: Tensor | None) -> Tensor:
    """A mask over pairs of tokens, for survivors: `out[b, h, i, j] = square[b, h, positions[b, i], positions[b, j]]`.

    Args:
        square: `(B, H, L, L)`, queries then keys: bool (True = attend) or additive floats; B may be 1, for all rows.
        positions: `(B, k)` int64, where each survivor stood in the input; L for a masked token (`select_real_tokens`).
        real: `(B, k)` bool; keys that are not real are masked. None: all are.

    Returns:
        `(B, H, k, k)` in the dtype of `square`.
    """
    checks.fit("take_square", checks.SLOTS, square=_of_each_row(square, positions), positions=positions, real=real)
    checks.inside("take_square", "positions", positions, 0, square.shape[2])
    rows = torch.arange(square.shape[0], device=square.device)[:, None, None]
    index = positions.clamp(max=square.shape[2] - 1)
    taken = square[rows, :, index[:, :, None], index[:, None, :]]  # (B, k, k, H): advanced indices come first
    taken = taken.permute(0, 3, 1, 2).contiguous().detach()
    if real is None:
        return taken
    return taken.masked_fill_(~real[:, None, None, :], False if taken.dtype == torch.bool else _lowest(taken.dtype))


def _of_each_row(square: Tensor, positions: Tensor) -> Tensor:
    """`(B, H, L, L)` of one that all rows share."""
    rows = square.shape[0] if square.dim() == 4 and positions.dim() else None
    return square.expand(positions.shape[0], -1, -1, -1) if type(rows) is int and rows == 1 else square


def _lowest(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).min


@take_square.register_fake
def _(square: Tensor, positions: Tensor, real: Tensor | None) -> Tensor:
    checks.fit("take_square", checks.SLOTS, square=_of_each_row(square, positions), positions=positions, real=real)
    rows, slots = positions.shape
    return square.new_empty(rows, square.shape[1], slots, slots)


def _scattered(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    """What each pair of the input was taken for: a bias may be learned."""
    positions, real = ctx.saved_tensors
    if real is not None:
        grad = grad.masked_fill(~real[:, None, None, :], 0)
    rows = torch.arange(ctx.sizes[0], device=grad.device)[:, None, None]
    index = positions.clamp(max=ctx.sizes[2] - 1)
    back = grad.new_zeros([ctx.sizes[i] for i in (0, 2, 3, 1)])
    back = back.index_put((rows, index[:, :, None], index[:, None, :]), grad.permute(0, 2, 3, 1), accumulate=True)
    return back.permute(0, 3, 1, 2), None, None


def _taken(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    square, positions, real = inputs
    ctx.save_for_backward(positions, real)
    ctx.sizes = square.shape


take_square.register_autograd(_scattered, setup_context=_taken)
