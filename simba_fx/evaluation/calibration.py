"""`calibrate`: a schedule for one model and one kind of text, from what each block suffers when tokens leave early."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn

import simba_fx
from simba_fx.evaluation import statistics
from simba_fx.evaluation.options import EvalError
from simba_fx.evaluation.rivals import Rival, flops_of
from simba_fx.flops import ModelFlops
from simba_fx.options import CRITERION
from simba_fx.schedule import Explicit, kept_count

__all__ = ["Calibration", "calibrate"]

SHARES = (0.85, 0.7, 0.55, 0.4, 0.3, 0.2, 0.1)
_PLACES = 12
"""Blocks in front of which tokens may leave: of deeper models evenly spaced ones."""
_BINS = 500
"""Steps in which the budget is counted."""


@dataclass(frozen=True)
class Calibration:
    """What was found. `str()` is a table."""

    schedule: Explicit
    """The best of `candidates`, by what was measured."""
    predicted: float
    """Nats per token over the dense model that the solved schedule was expected to lose."""
    candidates: dict[str, tuple[Explicit, float, statistics.Estimate]]
    """"solved", and simple schedules of the same cost: the schedule, its FLOPs over the dense model's (head and scorer
    included), and the loss over the dense model's that was measured."""
    damage: dict[int, dict[float, float]]
    """Block -> share -> nats per token lost if so many tokens enter this block and all behind it, and all before it."""
    dense_loss: float

    def __str__(self) -> str:
        shares = sorted({share for held in self.damage.values() for share in held}, reverse=True)
        lines = ["loss over dense if this share of the tokens enters a block and all behind it:"]
        lines += ["block " + " ".join(f"{share:8.2f}" for share in shares)]
        lines += [f"{block:5} " + " ".join(f"{held[s]:+8.4f}" for s in shares) for block, held in self.damage.items()]
        lines += [
            "",
            f"predicted for the solved schedule: {self.predicted:+.4f}; measured, ± one standard error:",
        ]
        for name, (schedule, cost, loss) in self.candidates.items():
            lines.append(f"{name:9} {loss}  FLOPs {cost:.3f}  {schedule}")
        return "\n".join(lines)


def calibrate(model: nn.Module, input_ids: Tensor, budget: float = 0.6, *, criterion: Any = CRITERION,
              span: int | None = None, last: int = 100, shares: Sequence[float] = SHARES, batch: int = 8192,
              **options: Any) -> Calibration:  # fmt: skip
    """A schedule for `model` on texts like these, at so much of the dense model's FLOPs.

    Measures how much loss it costs that only a share of the tokens enters block i and all behind it, for every i; adds
    such losses up where shares fall in steps; and solves for the shares that lose least at the budget (dynamic
    programming). The result is measured against simple schedules of the same cost, and the best one is returned.

    Args:
        model: a causal language model of transformers.
        input_ids: windows of text `(n, L + 1)` int64, n at least 2. With more windows a difference between schedules is
            less of an accident: look at the errors.
        budget: FLOPs over those of the dense model, head and scorer included, in (0, 1).
        criterion, span, options: of `transform`.
        last: tokens at the end of each window whose loss is read; they choose nothing of what is kept.
        shares: which shares are tried, falling.
        batch: tokens of a call.

    Raises:
        EvalError: no schedule of these shares costs so little; fewer than two windows; windows that are too short.
    """
    if input_ids.dim() != 2 or len(input_ids) < 2 or input_ids.shape[1] <= last + 1:
        raise EvalError(
            f"calibrate expects windows (n, L + 1), n at least 2, of more than last={last} tokens; found "
            f"{tuple(input_ids.shape)}. Pass more or longer windows."
        )
    flops = flops_of(simba_fx.transform(model, "dense"), input_ids, last)
    n_blocks = len(flops.blocks)
    step = max(1, -(-(n_blocks - 1) // _PLACES))
    places = range(1, n_blocks, step)
    cost = _Cost(flops, input_ids.shape[1] - 1, last, n_blocks, step)
    if cost.places([min(shares)] * len(places)) > budget:
        raise _too_little(cost, shares, len(places), budget)
    measured = _Measured(model, input_ids, last, batch, {"criterion": criterion, "span": span, **options})
    dense = measured.losses("dense")

    def at(shares_by_place: Sequence[float]) -> Explicit:
        """A share for each place, as a schedule."""
        return Explicit([1] + [shares_by_place[(block - 1) // step] for block in range(1, n_blocks)])

    damage: dict[int, dict[float, float]] = {}
    for index, place in enumerate(places):
        tried = (at([1.0] * index + [share] * (len(places) - index)) for share in shares)
        damage[place] = {s: measured.over(dense, schedule).value for s, schedule in zip(shares, tried)}
    predicted, solved = _solve(damage, cost, (1.0, *shares), budget)
    found = {"solved": at(solved)}
    found |= {
        "constant": at(_within(lambda share: [share] * len(places), cost, budget)),
        "linear": at(_within(lambda end: _line(end, len(places)), cost, budget)),
    }
    candidates = {
        name: (schedule, cost.of([float(s) for s in schedule.values]), measured.over(dense, schedule))
        for name, schedule in found.items()
    }
    best = min(candidates.values(), key=lambda held: held[2].value)[0]
    return Calibration(best, predicted, candidates, damage, float(dense.mean()))


class _Measured:
    """Losses of one model under schedules."""

    def __init__(self, model: nn.Module, ids: Tensor, last: int, batch: int, options: dict[str, Any]) -> None:
        self.model, self.last, self.options = model, last, options
        self.parts = torch.split(ids, max(1, batch // (ids.shape[1] - 1)))

    def losses(self, schedule: Any) -> Tensor:
        sparse = simba_fx.transform(self.model, schedule, **self.options)
        rival = Rival("", "sparse", sparse)
        return torch.cat([rival.scores(rows, self.last)[0] for rows in self.parts])

    def over(self, dense: Tensor, schedule: Any) -> statistics.Estimate:
        found = statistics.paired(self.losses(schedule), dense)
        assert found is not None  # of all tokens
        return found


@dataclass(frozen=True)
class _Cost:
    """FLOPs over those of the dense model, of a share for each block."""

    flops: ModelFlops
    length: int
    last: int
    n_blocks: int
    step: int

    def block(self, block: int, share: float) -> int:
        return self.flops.blocks[block](self.tokens(share))

    def tokens(self, share: float) -> int:
        return self.length if share == 1 else kept_count(self.length, Fraction(str(share)), self.last)

    def cut(self, block: int, share: float) -> int:
        """Of scores, in front of a block where the share falls from this one."""
        return self.flops.scores[block - 1](self.tokens(share))

    def fixed(self) -> int:
        """What no schedule changes."""
        return self.flops.before(self.length) + self.flops.blocks[0](self.length) + self.flops.head(self.length)

    def dense(self) -> int:
        return self.flops.stack([self.length] * self.n_blocks) + self.flops.head(self.length)

    def of(self, shares: Sequence[float]) -> float:
        blocks = sum(self.block(block, share) for block, share in enumerate(shares) if block)
        pairs = zip(range(1, self.n_blocks), shares, shares[1:])
        scores = sum(self.cut(block, before) for block, before, after in pairs if after < before)
        return (self.fixed() + blocks + scores) / self.dense()

    def places(self, shares: Sequence[float]) -> float:
        """Of a share for each place."""
        return self.of([1.0, *(shares[(block - 1) // self.step] for block in range(1, self.n_blocks))])


def _too_little(cost: _Cost, shares: Sequence[float], places: int, budget: float) -> EvalError:
    least = cost.places([min(shares)] * places)
    return EvalError(
        f"calibrate found no schedule within budget={budget}; the least of shares={min(shares)} costs {least:.3f}. Ask "
        "for more, or try smaller shares."
    )


def _line(end: float, places: int) -> list[float]:
    return [round(1 - (1 - end) * (i + 1) / places, 4) for i in range(places)]


def _within(schedule: Callable[[float], list[float]], cost: _Cost, budget: float) -> list[float]:
    """The least drastic of a family of schedules, by one number, that costs no more than the budget."""
    low, high = 0.01, 1.0
    for _ in range(12):
        middle = round((low + high) / 2, 4)
        low, high = (middle, high) if cost.places(schedule(middle)) <= budget else (low, middle)
    return schedule(low)


def _solve(damage: dict[int, dict[float, float]], cost: _Cost, shares: Sequence[float],
           budget: float) -> tuple[float, list[float]]:  # fmt: skip
    """The non-increasing shares, one for each place, whose damages add up to least at the budget.

    A step from share a down to b at a place does the damage of b there less that of a: what was lost already is not
    lost again.
    """
    unit = cost.dense() * budget / _BINS
    room = int((cost.dense() * budget - cost.fixed()) / unit)
    harm = {place: {1.0: 0.0, **held} for place, held in damage.items()}
    best: dict[tuple[int, float], tuple[float, list[float]]] = {(0, 1.0): (0.0, [])}
    for place in damage:
        blocks = range(place, min(place + cost.step, cost.n_blocks))
        found: dict[tuple[int, float], tuple[float, list[float]]] = {}
        for (spent, before), (lost, chosen) in best.items():
            for share in shares:
                if share > before:
                    continue
                flops = sum(cost.block(block, share) for block in blocks)
                flops += cost.cut(place, before) if share < before else 0
                key = spent + -int(-flops // unit), share
                more = lost + max(0.0, harm[place][share] - harm[place][before])
                if key[0] <= room and (key not in found or more < found[key][0]):
                    found[key] = more, [*chosen, share]
        best = found
    if not best:
        raise _too_little(cost, shares, len(damage), budget)  # by less than the steps that are counted in
    return min(best.values(), key=lambda held: held[0])
