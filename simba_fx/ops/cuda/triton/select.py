"""Selection as one Triton kernel per call: a program finds a row's k best slots and lists who stays and who goes.

The k-th best score is found digit by digit, eight bits at a time, in the histogram of what has matched so far (radix
select); then one walk over the row writes both lists in order. Ties go to the later slot. A row is read five times, a
mask twice more, from the L2 cache. Letters: `simba_fx.ops`; m slots of a region, k of them stay.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from simba_fx.ops.cuda.triton.common import launch

SPARE = tl.constexpr(2)
"""Columns of a list of dropped tokens beyond the tokens themselves (`ops.select`)."""


@triton.jit
def _keys(score, slot, slots, protected_from):
    """Scores of these slots as integers in the same order, 0 … 2^32 - 1: NaN least, protected slots largest."""
    value = tl.load(score + slot, mask=slot < slots, other=0.0)
    value = tl.where(value == value, value, float("-inf"))
    value = tl.where(value == 0.0, 0.0, value)  # -0 and 0 are a tie
    value = tl.where(slot >= protected_from, float("inf"), value)
    bits = value.to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) | -2147483648)).to(tl.uint32, bitcast=True)


@triton.jit
def _real(real, slot, slots, REAL: tl.constexpr):
    inside = slot < slots
    if REAL:
        return tl.load(real + slot, mask=inside, other=0) != 0
    else:
        return inside


@triton.jit(do_not_specialize=["slots", "k", "length", "tail", "share_p", "share_q", "floor", "position_row"])
def select_kernel(
    score, positions, real, lengths, kept, dropped, kept_positions, dropped_positions, kept_real,
    slots, k, length, tail, share_p, share_q, floor, position_row, position_slot,
    REAL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    left = slots - k + SPARE
    score += row * slots
    positions += row * position_row
    kept += row * k
    kept_positions += row * k
    dropped += row * left
    dropped_positions += row * left

    count = k  # of real tokens that stay
    protected_from = slots - tail
    pads_kept = 0  # pads that make up the rectangle
    masked_wanted = False
    masked_first = False
    if REAL:
        real += row * slots
        kept_real += row * k
        present = 0
        for start in range(0, slots, BLOCK):
            present += tl.sum(_real(real, start + tl.arange(0, BLOCK), slots, REAL).to(tl.int32), axis=0)
        # the tail begins where so many real tokens have passed
        passed = 0
        last = 0  # the row's last real slot
        protected_from = slots
        for start in range(0, slots, BLOCK):
            slot = start + tl.arange(0, BLOCK)
            is_real = _real(real, slot, slots, REAL)
            index = passed + tl.cumsum(is_real.to(tl.int32), axis=0) - 1
            first = tl.min(tl.where(is_real & (index >= present - tail), slot, slots), axis=0)
            protected_from = tl.minimum(protected_from, first)
            last = tl.maximum(last, tl.max(tl.where(is_real, slot, 0), axis=0))
            passed += tl.sum(is_real.to(tl.int32), axis=0)
        tokens = tl.load(lengths + row)
        earlier = (share_p * (tokens - tail) + share_q - 1) // share_q
        earlier = tl.where(tokens < tail, 0, earlier)
        wanted = tl.minimum(tokens, tail + tl.maximum(earlier, floor)).to(tl.int32)
        wanted = tl.maximum(tl.minimum(wanted, k), 0)  # whatever `lengths` says, nothing is written beyond the lists
        count = tl.maximum(tl.minimum(wanted, present), present - (slots - k) - 1)
        pads_kept = k - count
        masked_wanted = present + pads_kept > slots
        masked_first = tl.load(positions + last * position_slot) == length - 1  # the row was padded on the left alone

    # Radix select over the real slots: the key of the count-th best, how many of that key stay, and how many there are.
    threshold = tl.zeros((), tl.uint32)
    need = count
    equal = 0
    largest = tl.full((), 4294967295, tl.uint32)
    lowest = largest
    for digit in tl.static_range(4):
        shift = 24 - 8 * digit
        histogram = tl.zeros((256,), tl.int32)
        for start in range(0, slots, BLOCK):
            slot = start + tl.arange(0, BLOCK)
            key = _keys(score, slot, slots, protected_from)
            matches = _real(real, slot, slots, REAL)
            if digit == 0:
                lowest = tl.minimum(lowest, tl.min(tl.where(matches, key, largest), axis=0))
            else:
                matches = matches & ((key >> (shift + 8)) == (threshold >> (shift + 8)))
            histogram += tl.histogram(((key >> shift) & 255).to(tl.int32), 256, mask=matches)
        at_least = tl.cumsum(histogram, axis=0, reverse=True)
        bins = tl.arange(0, 256)
        chosen = tl.max(tl.where(at_least >= need, bins, 0), axis=0)
        equal = tl.sum(tl.where(bins == chosen, histogram, 0), axis=0)
        need -= tl.sum(tl.where(bins > chosen, histogram, 0), axis=0)
        threshold = threshold | (chosen.to(tl.uint32) << shift)

    # Both lists in one walk. Of equal keys the last `need` stay; pads fill up from the left; the masked one goes out.
    stayed = tl.where(masked_wanted & masked_first, 1, 0)
    gone = 0
    met = 0
    pads = 0
    masked = -1
    for start in range(0, slots, BLOCK):
        slot = start + tl.arange(0, BLOCK)
        inside = slot < slots
        is_real = _real(real, slot, slots, REAL)
        key = _keys(score, slot, slots, protected_from)
        ties = is_real & (key == threshold)
        tie = met + tl.cumsum(ties.to(tl.int32), axis=0) - 1
        met += tl.sum(ties.to(tl.int32), axis=0)
        stays_real = is_real & ((key > threshold) | (ties & (tie >= equal - need)))
        stays = stays_real
        if REAL:
            is_pad = inside & (is_real == 0)
            pad = pads + tl.cumsum(is_pad.to(tl.int32), axis=0) - 1
            pads += tl.sum(is_pad.to(tl.int32), axis=0)
            stays = stays_real | (is_pad & (pad < pads_kept))
            worst = tl.min(tl.where(is_real & (key == lowest), slot, slots), axis=0)
            masked = tl.where(masked_wanted & (masked < 0) & (worst < slots), worst, masked)
        leaves = inside & (stays == 0) & (slot != masked)
        position = tl.load(positions + slot * position_slot, mask=inside, other=0)
        at = stayed + tl.cumsum(stays.to(tl.int32), axis=0) - 1
        tl.store(kept + at, slot.to(tl.int64), mask=stays)
        tl.store(kept_positions + at, position, mask=stays)
        if REAL:
            tl.store(kept_real + at, stays_real, mask=stays)
        stayed += tl.sum(stays.to(tl.int32), axis=0)
        at = gone + tl.cumsum(leaves.to(tl.int32), axis=0) - 1
        tl.store(dropped + at, slot.to(tl.int64), mask=leaves)
        tl.store(dropped_positions + at, position, mask=leaves)
        gone += tl.sum(leaves.to(tl.int32), axis=0)

    spare = left - SPARE
    if masked >= 0:
        at = tl.where(masked_first, 0, k - 1)
        tl.store(kept + at, tl.cast(masked, tl.int64))
        tl.store(kept_positions + at, tl.cast(length, tl.int64))
        if REAL:
            tl.store(kept_real + at, False)
        tl.store(dropped_positions + spare, tl.load(positions + masked * position_slot))
    else:
        tl.store(dropped_positions + spare, tl.cast(length, tl.int64))
    tl.store(dropped + spare, tl.maximum(masked, 0).to(tl.int64))
    tl.store(dropped + spare + 1, tl.zeros((), tl.int64))
    tl.store(dropped_positions + spare + 1, tl.cast(length, tl.int64))


def select(
    score: Tensor,
    positions: Tensor,
    real: Tensor | None,
    lengths: Tensor | None,
    k: int,
    length: int,
    tail: int,
    share_p: int,
    share_q: int,
    floor: int,
) -> tuple[Tensor, ...]:
    """`ops.select_tokens`, or with `real` and `lengths` `ops.select_real_tokens`; `k` slots stay in every row."""
    rows, slots = score.shape
    sizes = (k, slots - k + SPARE.value, k, slots - k + SPARE.value)
    results: list[Tensor] = [torch.empty(rows, size, dtype=torch.int64, device=score.device) for size in sizes]
    if real is not None:
        results.append(torch.empty(rows, k, dtype=torch.bool, device=score.device))
    launch(select_kernel, score)[(rows,)](
        score.contiguous(), positions, None if real is None else real.contiguous(), lengths, *results,
        *([] if real is not None else [None]),
        slots, k, length, tail, share_p, share_q, floor, *positions.stride(), REAL=real is not None,
        BLOCK=2048, num_warps=8,
    )  # fmt: skip
    return tuple(results)
