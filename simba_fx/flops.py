"""FLOPs of a model, dense and pruned, from shapes alone: nothing is computed.

The captured graph, with a score behind every scan, runs on fake tensors under torch's flop counter (matrix products;
`simba_fx.ops.flops` has the formulas of the operators, and those that torch lacks). A block's FLOPs are a polynomial of
degree 2 at most in the tokens that it sees: linear for a scan, quadratic for attention. So counts at three lengths give
them for every number of tokens, hence for every schedule, whatever `kernels` runs the scans.

Words: *head* is what lies outside the block stack: for a transformers model what the outer model does around its
backbone (the LM head), for a plain module what comes after its last block. Units: FLOPs, a multiplication and an
addition one each.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

from simba_fx import ops, passes
from simba_fx.capture.normalise import Captured
from simba_fx.compiling import FakeTensorMode
from simba_fx.graph.facts import Facts, value
from simba_fx.graph.marks import AUTOCAST, made_by, region
from simba_fx.graph.plan import Cut, cuts_of, entering
from simba_fx.graph.token_order import reaches_all
from simba_fx.ops.recurrences import recurrence_of
from simba_fx.options import Options
from simba_fx.runtime.build import CustomCriterion, scoring_blocks
from simba_fx.schedule import Budget, Cost, kept_count

__all__ = ["BudgetCost", "Counts", "Curve", "ModelFlops", "budget_cost", "count", "model_flops", "surroundings_of"]


@dataclass(frozen=True)
class Counts:
    """FLOPs of one run of a graph."""

    regions: Mapping[int, int]
    """By region (`simba_fx.graph.facts`), without scores."""
    scores: Mapping[int, int]
    """Of the nodes that `score-tokens` made, by region."""
    outputs: tuple[Any, ...]
    """The graph's flat outputs, as fake tensors."""
    not_counted: str = ""
    """Why a user's criterion has no FLOPs here; empty if it has."""


def count(graph: fx.Graph, attributes: Mapping[str, Any], facts: Facts, rows: int, length: int,
          mode: FakeTensorMode | None = None) -> Counts:  # fmt: skip
    """Count the FLOPs of `graph` for `rows` rows of `length` tokens, by region, on fake tensors.

    Takes a captured graph as well as a rewritten one whose scans are operators (`kernels="auto"`). `attributes` holds
    what `get_attr` and `call_module` nodes name; real tensors are read for their shapes only.
    """
    mode = mode or FakeTensorMode()
    with mode, torch.no_grad(), FlopCounterMode(display=False, custom_mapping=ops.flops.missing()) as counter:
        inputs = [_input(value(node), rows, length) for node in graph.find_nodes(op="placeholder")]
        counting = _Counting(graph, attributes, mode, counter)
        outputs = counting.run(*inputs)
    return Counts(counting.regions, counting.scores, tuple(outputs), counting.not_counted)


def _input(val: Any, rows: int, length: int) -> Any:
    """A placeholder's value with its symbolic sizes filled in: `rows` in dimension 0, `length` behind it."""
    if not isinstance(val, Tensor):
        return val
    sizes = [n if isinstance(n, int) else rows if d == 0 else length for d, n in enumerate(val.shape)]
    return torch.empty(sizes, dtype=val.dtype, device=val.device)


class _Counting(fx.Interpreter):
    """Runs a graph node by node and books each node's FLOPs. Equal calls, as equal blocks make them, run once."""

    def __init__(self, graph: fx.Graph, attributes: Mapping[str, Any], mode: FakeTensorMode,
                 counter: FlopCounterMode) -> None:  # fmt: skip
        super().__init__(nn.Module(), graph=graph)
        self.attributes, self.mode, self.counter = attributes, mode, counter
        self.known: dict[Any, tuple[Any, int]] = {}
        self.regions: dict[int, int] = {}
        self.scores: dict[int, int] = {}
        self.not_counted = ""

    def run_node(self, n: fx.Node) -> Any:
        if n.op != "call_function":
            before = self.counter.get_total_flops()
            result, flops = super().run_node(n), self.counter.get_total_flops() - before
        else:
            args, kwargs = self.fetch_args_kwargs_from_env(n)
            key = (n.target, _signature(args), _signature(kwargs), n.meta.get(AUTOCAST))
            if key not in self.known:
                before = self.counter.get_total_flops()
                autocast = n.meta.get(AUTOCAST)
                with torch.autocast(*autocast) if autocast else nullcontext():
                    self.known[key] = super().run_node(n), self.counter.get_total_flops() - before
            result, flops = self.known[key]
        books = self.scores if made_by(n) == passes.ScoreTokens.name else self.regions
        books[region(n)] = books.get(region(n), 0) + flops
        return result

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        found = self.attributes[target]
        return self.mode.from_tensor(found, static_shapes=True) if isinstance(found, Tensor) else found

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        """A user's criterion. It may read values, which fake tensors lack: then it is not counted, and that is said."""
        kind, operands = args[:2]
        try:
            return self.attributes[target](*args, **kwargs)
        except Exception as error:  # any code of the user's
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            self.not_counted = f"The criterion needs more than shapes and is not counted: {first[:120]}"
            lead = operands[0]
            return lead.new_empty(recurrence_of(kind).sizes(lead), dtype=torch.float32)


def _signature(argument: Any) -> Any:
    """Equal for arguments that give results of equal shapes, and equal FLOPs."""
    if isinstance(argument, Tensor):
        return (*argument.shape, argument.stride(), argument.dtype, argument.device)
    if isinstance(argument, list | tuple):
        return tuple(map(_signature, argument))
    if isinstance(argument, dict):
        return tuple((name, _signature(one)) for name, one in argument.items())
    return type(argument), repr(argument)


# --- as functions of the number of tokens --------------------------------------------------------------------------


@dataclass(frozen=True)
class Curve:
    """The polynomial through `points`, evaluated exactly."""

    points: tuple[tuple[int, int], ...]

    def __call__(self, tokens: int) -> int:
        """FLOPs for that many tokens (Lagrange's form; rounded, should the truth be no polynomial of this degree)."""
        total = Fraction(0)
        for at, flops in self.points if any(flops for _, flops in self.points) else ():
            term = Fraction(flops)
            for other, _ in self.points:
                if other != at:
                    term *= Fraction(tokens - other, at - other)
            total += term
        return round(total)


@dataclass(frozen=True)
class ModelFlops:
    """FLOPs of every part of a model as functions of the tokens that the part sees."""

    before: Curve
    """Before the first block: rotary tables, a plain module's input projection."""
    blocks: tuple[Curve, ...]
    scores: tuple[Curve, ...]
    """Of scoring the tokens of a block, were they to leave after it."""
    head: Curve
    not_counted: str = ""

    def stack(self, tokens: Sequence[int]) -> int:
        """Blocks that see so many tokens each, the first one all of them, and what comes before them; no scores."""
        return self.before(tokens[0]) + sum(block(n) for block, n in zip(self.blocks, tokens))

    def scoring(self, cut_blocks: Sequence[int], tokens: Sequence[int]) -> int:
        """The scores of the blocks after which tokens leave."""
        return sum(self.scores[block](tokens[block]) for block in cut_blocks)


Surroundings = Callable[[Any, int], None]
"""`(the stack's outputs by name, or its one output, tokens)`: runs what surrounds the stack, on fake tensors."""


def model_flops(captured: Captured, *, rows: int, length: int, criterion: str = "simba",
                custom: nn.Module | None = None, surroundings: Surroundings | None = None,
                query: int | None = None) -> ModelFlops:  # fmt: skip
    """Count a captured model for `rows` rows of any number of tokens.

    Args:
        length: tokens in the input; the longest of the three lengths that are counted.
        criterion: by name; `custom`: the module that runs a user's.
        surroundings: of the stack, see `surroundings_of`; None: nothing surrounds it.
        query: the position that every scan is scored at, if one was named.
    """
    facts = captured.facts
    scored = reaches_all(captured.graph, facts, None if criterion in ops.POSITION_CRITERIA else query)
    cuts = tuple(Cut(block, Fraction(1, 2)) for block in range(facts.n_blocks - 1) if scored[block])
    graph = copy.deepcopy(captured.graph)
    protect = () if query is None else (passes.ProtectTokens(query),)
    for step in (passes.EraseSites(), passes.TrackTokens(), *protect, passes.ScoreTokens(cuts, criterion)):
        step.rewrite(graph, facts)  # not through the runner, which drops scores that nothing reads
    attributes = captured.attributes | ({} if custom is None else {"criterion": custom})
    longest = max(length, _SHORTEST)
    counts, heads = {}, []
    for tokens in (-(-longest // 4), -(-longest // 2), longest):
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        counts[tokens] = found = count(graph, attributes, facts, rows, tokens, mode)
        head = found.regions.get(facts.n_blocks, 0)
        if surroundings is not None:
            named, _ = pytree.tree_unflatten(list(found.outputs), captured.out_spec)
            with mode, torch.no_grad(), FlopCounterMode(display=False, custom_mapping=ops.flops.missing()) as counter:
                surroundings(named, tokens)
            head += counter.get_total_flops()
        heads.append((tokens, head))

    def curve(books: str, index: int) -> Curve:
        return Curve(tuple((tokens, getattr(found, books).get(index, 0)) for tokens, found in counts.items()))

    return ModelFlops(
        curve("regions", -1),
        tuple(curve("regions", block) for block in range(facts.n_blocks)),
        tuple(curve("scores", block) for block in range(facts.n_blocks)),
        Curve(tuple(heads)),
        found.not_counted,
    )


_SHORTEST = 8  # of the longest length that is counted: three lengths must differ, and a graph may refuse one token


def surroundings_of(model: nn.Module, stack: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any],
                    length: int) -> Surroundings | None:  # fmt: skip
    """What a model does around its block stack when called so; None where the stack is all there is.

    The model's own forward runs, in a shallow copy whose stack only hands out what the graph gave. Of the tensors
    among the arguments only shapes matter: a size behind the first that is `length` becomes the number of tokens.
    """
    path = next(name for name, module in model.named_modules() if module is stack)
    if not path:
        return None
    shell = inner = _apart(model)
    for name in path.split("."):
        inner._modules[name] = held = _apart(inner.get_submodule(name))
        inner = held

    def run(named: Any, tokens: int) -> None:
        def resized(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf
            sizes = [tokens if d > 0 and n == length else n for d, n in enumerate(leaf.shape)]
            return torch.empty(sizes, dtype=leaf.dtype, device=leaf.device)

        inner.__dict__["forward"] = lambda *_, **__: named if isinstance(named, Tensor) else _StackOutput(named)
        call_args, call_kwargs = pytree.tree_map(resized, (tuple(args), dict(kwargs)))
        shell(*call_args, **call_kwargs)

    return run


def _apart(module: nn.Module) -> nn.Module:
    """A copy whose submodules can be replaced without touching `module`'s."""
    shell = copy.copy(module)
    shell.__dict__["_modules"] = dict(module._modules)
    return shell


class _StackOutput:
    """A stack's outputs as transformers hands them out: by name, None where there is none, or by index."""

    def __init__(self, named: Mapping[str, Any]) -> None:
        self.named = named

    def __getattr__(self, name: str) -> Any:
        return self.named.get(name)

    def __getitem__(self, index: Any) -> Any:
        return self.named.get(index) if isinstance(index, str) else tuple(self.named.values())[index]


# --- budgets -------------------------------------------------------------------------------------------------------


@dataclass
class BudgetCost:
    """Answers `simba_fx.Budget`: what a schedule costs, as a share of the dense forward.

    `model`: the model around a block `stack`, whose head counts; None for a plain module. Only a first question counts
    anything: later captures of the same model (with a mask, in another dtype) get the same answers, hence the same
    schedule.
    """

    model: nn.Module | None
    stack: nn.Module | None = None
    known: ModelFlops | None = None

    def __call__(self, captured: Captured, options: Options, length: int) -> Cost:
        """The cost of one row of `length` tokens, LM head and scorer included, as a function of the blocks' shares."""
        if self.known is None:
            self.known = self._count(captured, options, length)
        flops, n_blocks = self.known, captured.facts.n_blocks
        has_scan = scoring_blocks(captured, options)
        dense = flops.stack([length] * n_blocks) + flops.head(length)

        def cost(shares: tuple[Fraction, ...]) -> float:
            cuts = cuts_of(shares, has_scan)
            tokens = [
                kept_count(length, share, options.least_tail, options.least_kept) for share in entering(cuts, n_blocks)
            ]
            head = flops.head(length if options.output == "full" else tokens[-1])
            return (flops.stack(tokens) + flops.scoring([cut.block for cut in cuts], tokens) + head) / dense

        return cost

    def _count(self, captured: Captured, options: Options, length: int) -> ModelFlops:
        criterion = options.criterion if isinstance(options.criterion, str) else "custom"
        custom = None if isinstance(options.criterion, str) else CustomCriterion(options.criterion)
        surroundings = None
        if self.model is not None and self.stack is not None:
            ids = torch.empty(1, length, dtype=torch.int64, device="meta")
            surroundings = surroundings_of(self.model, self.stack, (ids,), {}, length)
        return model_flops(captured, rows=1, length=length, criterion=criterion, custom=custom,
                           surroundings=surroundings, query=options.query)  # fmt: skip


def budget_cost(model: nn.Module, stack: Any, options: Options) -> BudgetCost | None:
    """What `build_program` asks when the schedule is a FLOP budget; arguments as in `BudgetCost`. None: it is not, and
    nothing needs to remember the dense model."""
    return BudgetCost(model, stack) if isinstance(options.schedule, Budget) else None
