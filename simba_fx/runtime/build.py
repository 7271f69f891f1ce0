"""The one function that turns a captured graph into a program."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, fx, nn

from simba_fx import ops, passes, schedule
from simba_fx.capture.guards import check_guards
from simba_fx.capture.normalise import Captured
from simba_fx.errors import CriterionError, GraphError
from simba_fx.graph.plan import Cut, cuts_of
from simba_fx.graph.runner import Stage, run_passes
from simba_fx.graph.token_order import directions_to, reaches_all
from simba_fx.ops.recurrences import recurrence_of
from simba_fx.options import Criterion, Options
from simba_fx.runtime.program import Program, blocks_of

__all__ = ["Built", "build_program"]


@dataclass(frozen=True)
class Built:
    """A program and how it came about."""

    program: Program
    captured: Captured
    graph: fx.Graph
    """The rewritten graph, flat: what the program computes, before blocks were outlined."""
    shares: tuple[Fraction, ...]
    cuts: tuple[Cut, ...]
    has_scan: tuple[bool, ...]
    """For each block whether it has a scan that tokens can be scored by."""
    history: list[Stage]
    trailing: bool = False
    """Whether the program is told the rows' lengths, as an input after `tail`."""
    floor: int = 4
    restored: bool = True
    """Whether results have the input's length."""

    @property
    def ragged(self) -> bool:
        """Whether rows may differ in length: selections then say which of the kept tokens are real."""
        return self.trailing or self.captured.facts.mask is not None

    def check_sizes(self, name: str, rows: Any, length: Any, tail: int) -> None:
        """Raises: InputError: the model `name` branches otherwise for these sizes, or for those of a block."""
        if self.captured.guards:
            inside = [(cut.block + 1, schedule.kept_count(length, cut.share, tail, self.floor)) for cut in self.cuts]
            check_guards(self.captured.guards, name, rows, length, inside, self.restored)


def build_program(captured: Captured, options: Options, cost: Callable[..., schedule.Cost] | None = None, *,
                  program_class: type[Program] = Program, trailing: bool = False,
                  states: tuple[tuple[int, str, int], ...] = ()) -> Built:  # fmt: skip
    """Run the passes over a captured graph; `cost(captured, options, length)` prices schedules for a FLOP budget.

    With `trailing` the program of a model that is given no mask takes the lengths of its rows. With `states`, what the
    graph leaves in a cache, the program goes on from such states, by the operators of simba_fx whatever `kernels` says.
    """
    facts = captured.facts
    shares = schedule_shares(captured, options, cost)
    has_scan = scoring_blocks(captured, options)
    cuts = cuts_of(shares, has_scan)
    attributes = dict(captured.attributes)
    name = options.criterion if isinstance(options.criterion, str) else "custom"
    if not isinstance(options.criterion, str):
        attributes["criterion"] = CustomCriterion(options.criterion)
    kernels = "auto" if states else options.kernels
    rewrites = passes.pipeline(cuts, criterion=name, floor=options.least_kept, seed=options.seed,
                               span=options.pooled, output=options.output, sites=tuple(captured.sites),
                               kernels=kernels, query=options.query, protect=options.protect, trailing=trailing,
                               states=states)  # fmt: skip
    prepared, history = _prepared(captured, kernels)
    graph, stages = run_passes(prepared, facts, rewrites)
    history = [*history, *stages[1:]]
    top = graph
    if options.compile == "blocks":
        top, stages = run_passes(graph, facts, [passes.OutlineBlocks(attributes)])
        history += stages[1:]
        attributes |= blocks_of(top, attributes.get("criterion"))
    return Built(program_class(attributes, top), captured, graph, shares, cuts, has_scan, history, trailing,
                 options.least_kept, options.output == "full")  # fmt: skip


_prepared_graphs: weakref.WeakKeyDictionary[fx.Graph, dict[str, tuple[fx.Graph, list[Stage]]]]
_prepared_graphs = weakref.WeakKeyDictionary()


def _prepared(captured: Captured, kernels: str) -> tuple[fx.Graph, list[Stage]]:
    """A captured graph after the passes that ask for no more options."""
    known = _prepared_graphs.setdefault(captured.graph, {})
    if kernels not in known:
        known[kernels] = run_passes(captured.graph, captured.facts, passes.preparation(kernels))
    return known[kernels]


def scoring_blocks(captured: Captured, options: Options) -> tuple[bool, ...]:
    """For each block whether tokens can leave after it: it has a scan, and its scans reach the query from all sides.

    Raises:
        GraphError: no block's scans reach the query.
    """
    facts, query = captured.facts, options.query
    by_position = options.criterion in ops.POSITION_CRITERIA  # looks at no scan
    reached = reaches_all(captured.graph, facts, None if by_position else query)
    if query is not None and not any(reached):
        needed = " and ".join(("a forward scan", "a reversed scan")[way] for way in sorted(directions_to(query)))
        raise GraphError(
            f"query={query} is reached by every token only where a block has {needed}; found no such block among the "
            f"{facts.n_blocks} of this model. Leave query out (each scan is then scored at its own end), or, to keep "
            "the last tokens of a text, use simba_fx.tail."
        )
    return reached


def schedule_shares(captured: Captured, options: Options, cost: Any) -> tuple[Fraction, ...]:
    """The share of each block; a FLOP budget is solved against the captured graph's own FLOPs."""
    plan = options.schedule
    price = cost(captured, options, plan.length) if isinstance(plan, schedule.Budget) and cost is not None else None
    return schedule.resolve_shares(plan, captured.facts.n_blocks, price)


class CustomCriterion(nn.Module):
    """A user's criterion as a node of the graph: rebuilds the operands, checks the result."""

    def __init__(self, function: Criterion) -> None:
        super().__init__()
        self.function = function

    @torch.no_grad()
    def forward(self, kind: str, arguments: list[Any], real: Tensor | None, tail: int) -> Tensor:
        recurrence, first = recurrence_of(kind), arguments[0]
        rows, length = recurrence.sizes(first)
        query = ops.query_position(real, tail, rows=rows, length=length, device=first.device)
        operands: Any = recurrence.operands(*arguments)
        score = self.function(operands, query)
        if not isinstance(score, Tensor) or score.shape != (rows, length):
            found = tuple(score.shape) if isinstance(score, Tensor) else type(score).__name__
            name = getattr(self.function, "__name__", type(self.function).__name__)
            raise CriterionError(
                f"The criterion {name} returned {found}; expected a tensor (B, L) = ({rows}, {length}), "
                "higher = keep. Return one score per token."
            )
        return score.float()
