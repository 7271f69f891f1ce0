"""The contract of a pass, clause by clause: every pass × every case graph × every way to run, and broken passes caught.

A clause is a checker `check_*(run)` that raises `Broken`. The same checkers judge the real passes and, further down,
passes that are wrong on purpose: each must be caught by the clause it breaks.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
import re
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import pytest
import sympy
import torch
from expecttest import assert_expected_inline
from graph_cases import CASES, Case
from models import VOCABULARY, _mamba
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

import simba_fx
from simba_fx import SelectiveScan, passes
from simba_fx.graph import runner as pipeline
from simba_fx.graph.facts import SELECTS, Facts, end_of, expression, output_of, scans_by_block, selects, value
from simba_fx.graph.marks import MARK, REGION, Insert, Role, made_by, region, role
from simba_fx.graph.plan import cuts_of
from simba_fx.ops.select import SPARE
from simba_fx.passes.select_tokens import OUTPUTS
from simba_fx.runtime.build import CustomCriterion
from simba_fx.runtime.program import Program, blocks_of
from simba_fx.schedule import kept_count


def largest_input(operands: SelectiveScan, query: Tensor) -> Tensor:
    """A user's criterion."""
    u = next(v for v in vars(operands).values() if isinstance(v, Tensor))
    return u.abs().amax(1) if isinstance(operands, SelectiveScan) else u.abs().amax((2, 3))


WAYS: dict[str, dict[str, Any]] = {
    "full": {},
    "kept": {"output": "kept"},
    "model's kernels": {"kernels": "model"},
    "by position": {"criterion": "recent"},
    "user's criterion": {"criterion": "custom"},
}


def ways(case: Case) -> list[str]:
    """Other criteria only change which score is inserted: the small cases show them."""
    return list(WAYS) if case in CASES[:3] else list(WAYS)[:3]


class Broken(AssertionError):
    """A clause of the contract does not hold."""


# --- one run of one pass -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """One pass over a private copy of one graph, and what there was before."""

    step: Any
    facts: Facts
    changed: int
    before: fx.Graph
    before_was: list[Any]  # the snapshot of `before` taken before the pass ran
    after: fx.Graph
    old: dict[fx.Node, Any]  # the nodes of `after` that were there already, with their provenance then
    attributes: dict[str, Any]
    attributes_were: dict[str, tuple[Any, int]]


def run(step: Any, graph: fx.Graph, facts: Facts, attributes: dict[str, Any]) -> Run:
    """What the runner does with one pass, keeping everything a checker may ask for."""
    was = snapshot(graph)
    attributes_were = {name: (tensor, version(tensor)) for name, tensor in attributes.items()}
    after = copy.deepcopy(graph)
    old = {node: provenance(node) for node in after.nodes}
    changed = step.rewrite(after, facts)
    return Run(step, facts, changed, graph, was, after, old, attributes, attributes_were)


def version(held: Any) -> int:
    return held._version if isinstance(held, Tensor) else 0


def provenance(node: fx.Node) -> Any:
    return (dict(node.meta.get("nn_module_stack") or {}), node.meta.get("stack_trace"), node.meta.get(REGION))


def listing(graph: fx.Graph) -> str:
    """The whole graph as text, placeholders and attributes included."""
    held = [f"{node.op} {node.name} = {node.target}" for node in graph.nodes if node.op in ("placeholder", "get_attr")]
    return "\n".join([*held, pipeline.text(graph)])


def snapshot(graph: fx.Graph) -> list[Any]:
    """Everything a pass could change in a graph that is not its own, meta included."""
    return [
        (node.op, node.name, str(node.target), str(node.args), str(node.kwargs), *provenance(node),
         repr(node.meta.get(MARK)), repr(pytree.tree_map(signature, value(node))))
        for node in graph.nodes
    ]  # fmt: skip


def signature(leaf: Any) -> Any:
    return (tuple(map(str, leaf.shape)), leaf.dtype) if isinstance(leaf, Tensor) else str(leaf)


@functools.cache
def runs(case: Case, way: str) -> tuple[Run, ...]:
    """Every pass of one transform, each on the result of the one before, outlining last."""
    captured, options = case.captured, WAYS[way]
    facts = captured.facts
    has_scan = [*map(bool, scans_by_block(captured.graph, facts.n_blocks))]
    cuts, named = cuts_of(case.shares, has_scan), {"query": case.query, "protect": case.protect}
    steps = passes.pipeline(cuts, sites=tuple(captured.sites), **named, **options)
    steps = (*passes.preparation(options.get("kernels", "auto")), *steps)
    attributes = dict(captured.attributes)
    if options.get("criterion") == "custom":
        attributes["criterion"] = CustomCriterion(largest_input)
    done: list[Run] = []
    graph = captured.graph
    for step in (*steps, passes.OutlineBlocks(attributes)):
        if step.name == "outline-blocks":
            graph, _ = pipeline.run_passes(graph, facts, [])  # the runner drops what nothing reads
        done.append(run(step, graph, facts, attributes))
        graph = done[-1].after
    return tuple(done)


every_case = pytest.mark.parametrize("case", CASES, ids=str)
CATALOGUE: tuple[Any, ...] = tuple(
    getattr(passes, name) for name in passes.__all__ if isinstance(getattr(passes, name), type)
)


# --- the clauses -------------------------------------------------------------------------------------------------


def check_pure(run: Run) -> None:
    """The graph that the copy was made from is untouched, down to the meta of its nodes."""
    for was, now in zip(run.before_was, snapshot(run.before)):
        if was != now:
            raise Broken(f"{run.step!r} changed the graph it was given: {was} became {now}")
    if len(run.before_was) != len(run.before.nodes):
        raise Broken(f"{run.step!r} changed the number of nodes of the graph it was given")


def check_weights_shared(run: Run) -> None:
    """The same tensors, unwritten, and no others."""
    for name, (tensor, written) in run.attributes_were.items():
        if run.attributes.get(name) is not tensor:
            raise Broken(f"{run.step!r} replaced {name}")
        if version(tensor) != written:
            raise Broken(f"{run.step!r} wrote to {name}")
    if added := run.attributes.keys() - run.attributes_were.keys():
        raise Broken(f"{run.step!r} gave {sorted(added)[0]} of its own")
    for node in run.after.find_nodes(op="get_attr"):
        if node.target not in run.attributes:
            raise Broken(f"{run.step!r} reads {node.target}, which is no attribute")


def check_honest(run: Run) -> None:
    """0 sites changed exactly if nothing changed."""
    same = listing(run.before) == listing(run.after)
    if same != (run.changed == 0):
        raise Broken(
            f"{run.step!r} says it changed {run.changed} sites, the text is {'the same' if same else 'another'}"
        )


def check_well_formed(run: Run) -> None:
    """Valid, every node in a region, regions in order, what is new says which pass made it and where."""
    try:
        run.after.lint()
    except Exception as error:
        raise Broken(f"{run.step!r} left a graph that lint refuses: {error}") from error
    highest = -1
    for node in run.after.nodes:
        here = node.meta.get(REGION)
        if not isinstance(here, int) or not -1 <= here <= run.facts.n_blocks:
            raise Broken(f"{run.step!r} left {node.name} in region {here}")
        if node.op not in ("placeholder", "get_attr"):
            if here < highest:
                raise Broken(f"{run.step!r} left {node.name} of region {here} behind region {highest}")
            highest = here
        if node not in run.old and (made_by(node) != run.step.name or REGION not in node.meta):
            raise Broken(f"{run.step!r} inserted {node.name} of {node.meta.get(REGION)} as {made_by(node)}")


def check_provenance(run: Run) -> None:
    """Nodes that stay keep their module, their source line and their region."""
    for node in run.after.nodes:
        if node in run.old and provenance(node) != run.old[node]:
            raise Broken(
                f"{run.step!r} changed where {node.name} comes from: {run.old[node]} became {provenance(node)}"
            )


def check_outputs(run: Run) -> None:
    """What the graph returned it still returns, in its place: values, then cache states; new results come last."""
    before, after = (output_of(graph).args[0] for graph in (run.before, run.after))
    if len(after) < len(before):
        raise Broken(f"{run.step!r} dropped an output")
    for old, new in zip(before, after):
        if signature(value(old)) != signature(value(new)):
            raise Broken(f"{run.step!r} put {new.name} {signature(value(new))} in the place of {old.name}")


def check_idempotent(run_: Run) -> None:
    """A second run finds nothing left to do."""
    try:
        again = run(run_.step, run_.after, run_.facts, run_.attributes)
    except Exception as error:
        raise Broken(f"{run_.step!r} fails on its own result: {error}") from error
    if again.changed or listing(again.after) != listing(run_.after):
        raise Broken(f"{run_.step!r} changed {again.changed} sites of its own result")


ROWS, LENGTH, TAIL = 2, 13, 2  # of the concrete run


class Lengths:
    """How many tokens each region has when a graph runs on rows of `LENGTH`.

    A cut counts once survivors are gathered; the region after the blocks has the input's length again once that is
    restored. The results of a selection stand in their block but are as long as what they list: `kept`, `positions`
    and `real` as the next region, `dropped`, `left` and the `exit` values as what leaves and the spare columns.
    """

    def __init__(self, graph: fx.Graph, facts: Facts) -> None:
        by = set(map(made_by, graph.nodes))
        outlined = "outline-blocks" in by
        self.entering, self.chosen = {-1: LENGTH}, {}
        cuts = {region(cut): cut for cut in selects(graph)}
        for block in range(facts.n_blocks + 1):
            self.entering[block] = self.entering[block - 1]
            if (cut := cuts.get(block - 1)) is not None:
                p, q, floor = cut.args[-3:]
                kept = min(self.entering[block], kept_count(LENGTH, Fraction(p, q), TAIL, floor))
                self.chosen[block - 1] = (kept, self.entering[block] - kept + SPARE)
                if outlined or "gather-survivors" in by:
                    self.entering[block] = kept
        if "restore-length" in by:
            self.entering[facts.n_blocks] = LENGTH

    def of(self, node: fx.Node) -> list[int]:
        """What L stands for in each leaf of a node's value."""
        here = region(node)
        chosen = node.target in SELECTS
        leaves = pytree.tree_leaves(value(node))
        found = []
        for what in OUTPUTS if chosen else [role(node)] * len(leaves):
            if here in self.chosen and made_by(node) == "select-tokens":
                found.append(self.chosen[here][what in (Role.DROPPED, Role.LEFT)])
            elif here in self.chosen and what is Role.EXIT:
                found.append(self.chosen[here][1])
            else:
                found.append(self.entering[here])
        return found[: len(leaves)]


def check_values(run: Run) -> None:
    """Every `meta["val"]` has the shape and dtype of what its node yields, in the length of the node's own region."""
    lengths = Lengths(run.after, run.facts)
    own, blocks = run.attributes, blocks_of(run.after, run.attributes.get("criterion"))

    def compare(node: fx.Node, result: Any, meant: list[int]) -> None:
        declared, actual = pytree.tree_leaves(value(node)), pytree.tree_leaves(result)
        if len(declared) != len(actual):
            raise Broken(f"{run.step!r}: {node.name} declares {len(declared)} results, yields {len(actual)}")
        for leaf, real, length in zip(declared, actual, meant):
            if node.op == "placeholder" and node.name == "tail":
                continue
            told, found = concrete(leaf, run.facts, length), concrete(real, run.facts, length)
            if told != found:
                raise Broken(f"{run.step!r}: {node.name} of region {region(node)} declares {told}, yields {found}")

    # between these two passes what follows the blocks reads survivors where it will read every token
    unrestored = run.step.name == "gather-survivors" and getattr(run.step, "output", "") == "full"

    class Inside(fx.Interpreter):
        """A block: its graph is its kind's, so that its nodes' region is this instance's."""

        here = 0

        def run_node(self, node: fx.Node) -> Any:
            result = super().run_node(node)
            if node.op not in ("placeholder", "output", "get_attr"):
                compare(node, result, [lengths.entering[self.here]] * 9)
            return result

    class Top(fx.Interpreter):
        def run_node(self, node: fx.Node) -> Any:
            if unrestored and region(node) == run.facts.n_blocks and node.op == "call_function":
                return value(node)
            if node.op == "call_module" and node.target in blocks:
                block = blocks[node.target]
                inside = Inside(block.module(), graph=block.graph)
                inside.here = region(node)
                result = inside.run(*self.map_nodes_to_values(node.args, node))
            else:
                result = super().run_node(node)
            if node.op != "output":
                compare(node, result, lengths.of(node))
            return result

    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        inputs = [value_of(node, run.facts) for node in run.after.find_nodes(op="placeholder")]
        Top(Program({**own, **blocks}, run.after), garbage_collect_values=False).run(*inputs)


def value_of(node: fx.Node, facts: Facts) -> Any:
    if node.name == "tail":
        return TAIL
    shape, dtype = concrete(value(node), facts, LENGTH)
    return torch.ones(shape, dtype=dtype)


def concrete(leaf: Any, facts: Facts, length: int) -> Any:
    """A declared or actual value with numbers for its symbols."""
    sizes = {facts.batch: ROWS, facts.sequence: length}
    number = lambda size: int(sympy.sympify(expression(size)).subs(sizes))  # noqa: E731
    if isinstance(leaf, Tensor):
        return tuple(map(number, leaf.shape)), leaf.dtype
    return number(leaf) if isinstance(leaf, int | torch.SymInt) else leaf


def check_order(run: Run, case: Case) -> None:
    """Survivors are gathered in ascending order, on real tensors: a scan is order-sensitive."""

    class Watched(fx.Interpreter):
        def run_node(self, node: fx.Node) -> Any:
            if made_by(node) == "gather-survivors" and node.target in _GATHERS:
                index = node.args[1][-1] if node.target is torch.ops.aten.index.Tensor else node.args[2]
                chosen = self.env[index]
                if not bool((chosen.diff(dim=1) > 0).all()):
                    raise Broken(f"{run.step!r}: {node.name} gathers {node.args[0]} in the order {chosen.tolist()}")
            return super().run_node(node)

    with torch.no_grad():
        tail = [TAIL] if any(node.name == "tail" for node in run.after.find_nodes(op="placeholder")) else []
        Watched(Program(run.attributes, run.after), garbage_collect_values=False).run(*case.inputs(ROWS, LENGTH), *tail)


_GATHERS = (torch.ops.aten.index.Tensor, torch.ops.aten.gather.default)
CLAUSES: tuple[Callable[[Run], None], ...] = (
    check_pure,
    check_weights_shared,
    check_honest,
    check_well_formed,
    check_provenance,
    check_outputs,
)


@every_case
@pytest.mark.parametrize("clause", CLAUSES, ids=lambda clause: clause.__name__.removeprefix("check_"))
def test_every_pass_keeps_the_clause(clause: Callable[[Run], None], case: Case) -> None:
    for way in ways(case):
        for one in runs(case, way):
            clause(one)


@pytest.mark.parametrize(("case", "way"), [(case, way) for case in CASES for way in ways(case)], ids=str)
def test_every_value_is_true(way: str, case: Case) -> None:
    """After each pass of the usual way; of the finished graphs, flat and outlined, of the others."""
    for one in runs(case, way) if way == "full" else runs(case, way)[-2:]:
        check_values(one)


@every_case
@pytest.mark.parametrize("name", [cls.name for cls in CATALOGUE])
def test_a_pass_finds_nothing_to_do_on_its_result(name: str, case: Case) -> None:
    """Rewrites of the flat graph are tried on the finished flat graph, outlining on its own result."""
    for way in ways(case):
        *rewrites, outlined = runs(case, way)
        for one in rewrites:
            if one.step.name == name:
                check_idempotent(dataclasses.replace(one, after=outlined.before))
        if name == outlined.step.name:
            check_idempotent(outlined)


@every_case
def test_survivors_stay_in_order(case: Case) -> None:
    check_order(runs(case, "full")[-2], case)


@every_case
def test_the_cuts_are_where_the_case_says(case: Case) -> None:
    for way in ways(case):
        assert tuple(region(cut) for cut in selects(runs(case, way)[-2].after)) == case.cut_after


@every_case
def test_the_runner_works_on_a_copy(case: Case) -> None:
    captured, was = case.captured, snapshot(case.captured.graph)
    steps = [one.step for one in runs(case, "full")[:-1]]
    graph, history = pipeline.run_passes(captured.graph, captured.facts, steps)
    assert snapshot(captured.graph) == was
    assert graph is not captured.graph
    assert [stage.by for stage in history] == ["capture", *map(repr, steps)]
    for before, after in itertools.pairwise(history):
        assert (after.changed == 0) == (after.text == before.text)


@every_case
def test_a_program_holds_the_modules_own_parameters(case: Case) -> None:
    outlined = runs(case, "full")[-1]
    own, blocks = outlined.attributes, blocks_of(outlined.after, None)
    theirs = dict(case.module.named_parameters())
    for program in (Program(own, outlined.before), Program({**own, **blocks}, outlined.after)):
        ours = dict(program.named_parameters())
        assert ours
        assert all(ours[name] is theirs[name] for name in ours)
    assert {id(p) for block in blocks.values() for p in block.parameters()} <= {id(p) for p in theirs.values()}


@every_case
def test_equal_blocks_are_one_kind(case: Case) -> None:
    """Between the first and the last block, two blocks of one class that both cut share their code."""
    if case.name == "a block without a scan":
        pytest.skip("after the first block one cut is left")
    blocks = blocks_of(runs(case, "full")[-1].after, None)
    kinds: dict[Any, set[Any]] = {}
    for index in case.cut_after[1:]:
        path = case.captured.facts.blocks[index]
        kind = tuple(type(module) for module in case.module.get_submodule(path).modules())
        kinds.setdefault(kind, set()).add(blocks[f"block_{index}"].kind)
    assert all(len(code) == 1 for code in kinds.values())


# --- broken passes are caught ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rewrite:
    """A pass in one function, for tests."""

    function: Callable[..., int]
    attributes: Any = dataclasses.field(default=None, repr=False)
    original: Any = dataclasses.field(default=None, repr=False)

    @property
    def name(self) -> str:
        return self.function.__name__

    def rewrite(self, graph: fx.Graph, facts: Facts) -> int:
        return self.function(self, graph, facts)


def _first(graph: fx.Graph) -> fx.Node:
    """An operator in the middle of the first block that yields one tensor."""
    return next(n for n in graph.nodes if n.op == "call_function" and region(n) == 0 and isinstance(value(n), Tensor))


def _behind(graph: fx.Graph, node: fx.Node, by: str, val: Any = None) -> fx.Node:
    """A proper insertion: `relu(node)`, read by the node's users."""
    new = Insert(graph, node.next, region(node), by)(torch.ops.aten.relu.default, node, like=node)
    new.meta["val"] = value(node) if val is None else val
    node.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)
    return new


def correct(self: Rewrite, graph: fx.Graph, facts: Facts) -> int:
    if any(made_by(node) == self.name for node in graph.nodes):
        return 0
    _behind(graph, _first(graph), self.name)
    return 1


def boasts(self: Rewrite, graph: fx.Graph, facts: Facts) -> int:
    return 1


def conceals(self: Rewrite, graph: fx.Graph, facts: Facts) -> int:
    _behind(graph, _first(graph), self.name)
    return 0


def edits_the_original(self: Rewrite, graph: fx.Graph, facts: Facts) -> int:
    _behind(self.original, _first(self.original), self.name)
    return 0


def edits_shared_meta(self: Rewrite, graph: fx.Graph, facts: Facts) -> int:
    next(node for node in graph.nodes if node.meta.get("nn_module_stack")).meta["nn_module_stack"].clear()
    return 0


def writes_to_a_weight(self: Rewrite, graph: fx.Graph, facts: Facts) -> int:
    with torch.no_grad():
        next(t for t in self.attributes.values() if isinstance(t, Tensor)).add_(1).sub_(1)
    return 0


def copies_a_weight(self: Rewrite, graph: fx.Graph, facts: Facts) -> int:
    name = next(n.target for n in graph.find_nodes(op="get_attr"))
    self.attributes[name] = self.attributes[name].clone()
    return 0


def invents_an_attribute(self: Rewrite, graph: fx.Graph, facts: Facts) -> int:
    next(iter(graph.find_nodes(op="get_attr"))).target = "nowhere"
    return 1


def reads_what_comes_later(self: Rewrite, graph: fx.Graph, facts: Facts) -> int:
    node = _first(graph)
    _behind(graph, node, self.name).append(node)
    return 1


def leaves_no_mark(self: Rewrite, graph: fx.Graph, facts: Facts) -> int:
    del _behind(graph, _first(graph), self.name).meta[MARK]
    return 1


def signs_for_another(self: Rewrite, graph: fx.Graph, facts: Facts) -> int:
    _behind(graph, _first(graph), "score-tokens")
    return 1


def leaves_no_region(self: Rewrite, graph: fx.Graph, facts: Facts) -> int:
    del _behind(graph, _first(graph), self.name).meta[REGION]
    return 1


def inserts_a_later_region_too_early(self: Rewrite, graph: fx.Graph, facts: Facts) -> int:
    new = _behind(graph, _first(graph), self.name)
    new.meta[REGION] = 1
    return 1


def forgets_the_module(self: Rewrite, graph: fx.Graph, facts: Facts) -> int:
    _first(graph).meta.pop("nn_module_stack")
    return correct(self, graph, facts)


def moves_a_node_to_another_region(self: Rewrite, graph: fx.Graph, facts: Facts) -> int:
    end_of(graph, 0).prev.meta[REGION] = 1
    return correct(self, graph, facts)


def drops_an_output(self: Rewrite, graph: fx.Graph, facts: Facts) -> int:
    output_of(graph).args = (output_of(graph).args[0][:-1],)
    return 1


def puts_another_value_first(self: Rewrite, graph: fx.Graph, facts: Facts) -> int:
    flat = output_of(graph).args[0]
    output_of(graph).args = ([flat[-1], *flat[1:], flat[0]],)
    return 1


def declares_another_dtype(self: Rewrite, graph: fx.Graph, facts: Facts) -> int:
    _behind(graph, _first(graph), self.name, val=value(_first(graph)).double())
    return 1


def declares_another_size(self: Rewrite, graph: fx.Graph, facts: Facts) -> int:
    _behind(graph, _first(graph), self.name, val=value(_first(graph))[:, :, :1])
    return 1


def forgets_to_gather(self: Rewrite, graph: fx.Graph, facts: Facts) -> int:
    gathered = next(n for n in graph.nodes if role(n) is Role.CARRIED)
    kept = next(n for n in graph.nodes if role(n) is Role.POSITIONS and region(n) == -1)
    gathered.args = (gathered.args[0], [gathered.args[1][0], kept])  # every token, in its place
    return 1


def gathers_from_the_end(self: Rewrite, graph: fx.Graph, facts: Facts) -> int:
    gathered = next(n for n in graph.nodes if role(n) is Role.CARRIED)
    rows, kept = gathered.args[1]
    turned = Insert(graph, gathered, region(gathered), self.name)(
        torch.ops.aten.flip.default, kept, [1], val=value(kept)
    )
    gathered.args = (gathered.args[0], [rows, turned])
    return 1


def never_settles(self: Rewrite, graph: fx.Graph, facts: Facts) -> int:
    _behind(graph, _first(graph), self.name)
    return 1


BROKEN: tuple[tuple[Callable[..., int], Callable[[Run], None], str], ...] = (
    (boasts, check_honest, "says it changed 1 sites, the text is the same"),
    (conceals, check_honest, "says it changed 0 sites, the text is another"),
    (edits_the_original, check_pure, "changed the graph it was given"),
    (edits_shared_meta, check_pure, "changed the graph it was given"),
    (writes_to_a_weight, check_weights_shared, "wrote to "),
    (copies_a_weight, check_weights_shared, "replaced "),
    (invents_an_attribute, check_weights_shared, "reads nowhere, which is no attribute"),
    (reads_what_comes_later, check_well_formed, "lint refuses"),
    (leaves_no_mark, check_well_formed, "as None"),
    (signs_for_another, check_well_formed, "as score-tokens"),
    (leaves_no_region, check_well_formed, "in region None"),
    (inserts_a_later_region_too_early, check_well_formed, "behind region 1"),
    (forgets_the_module, check_provenance, "changed where "),
    (moves_a_node_to_another_region, check_provenance, "changed where "),
    (drops_an_output, check_outputs, "dropped an output"),
    (puts_another_value_first, check_outputs, "in the place of "),
    (declares_another_dtype, check_values, "torch.float64"),
    (declares_another_size, check_values, "declares "),
    (forgets_to_gather, check_values, "of region 1 declares "),
    (gathers_from_the_end, lambda run: check_order(run, CASES[0]), "in the order "),
    (never_settles, check_idempotent, "changed 1 sites of its own result"),
)


def broken_run(function: Callable[..., int]) -> Run:
    """A test's pass on the finished flat graph of the first case."""
    finished = runs(CASES[0], "full")[-1]
    graph = copy.deepcopy(finished.before)
    for node in graph.nodes:  # what a broken pass does to shared meta must not outlive its test
        node.meta = {key: dict(held) if isinstance(held, dict) else held for key, held in node.meta.items()}
    attributes = dict(CASES[0].captured.attributes)
    return run(Rewrite(function, attributes, graph), graph, finished.facts, attributes)


def test_a_correct_pass_breaks_no_clause() -> None:
    one = broken_run(correct)
    for clause in (*CLAUSES, check_values, check_idempotent):
        clause(one)
    check_order(one, CASES[0])


@pytest.mark.parametrize(("function", "clause", "message"), BROKEN, ids=[function.__name__ for function, *_ in BROKEN])
def test_a_broken_pass_is_caught(function: Callable[..., int], clause: Callable[[Run], None], message: str) -> None:
    with pytest.raises(Broken, match=re.escape(message)):
        clause(broken_run(function))


def test_the_runner_refuses_what_lint_refuses_and_names_the_pass() -> None:
    facts, step = CASES[0].captured.facts, Rewrite(reads_what_comes_later)
    with pytest.raises(RuntimeError, match="was used before it has been defined") as caught:
        pipeline.run_passes(runs(CASES[0], "full")[-1].before, facts, [step])
    assert caught.value.__notes__ == [f"while simba_fx ran the pass {step!r}"]


# --- what a pass looks like --------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", CATALOGUE, ids=lambda cls: cls.__name__)
def test_a_pass_is_a_frozen_dataclass_with_a_kebab_case_name(cls: Any) -> None:
    assert dataclasses.is_dataclass(cls)
    assert cls.__dataclass_params__.frozen
    assert cls.name == re.sub(r"(?<!^)(?=[A-Z])", "-", cls.__name__).lower()
    assert cls.__module__ == f"simba_fx.passes.{cls.name.replace('-', '_')}"
    assert f"Pass `{cls.name}`" in __import__(cls.__module__, fromlist=["_"]).__doc__


def test_the_catalogue_lists_the_passes_in_the_order_in_which_they_run() -> None:
    listed = re.findall(r"^    ([a-z]+-[a-z]+) ", passes.__doc__, flags=re.M)
    ran = {kernels: [step.name for step in (*passes.preparation(kernels), *passes.pipeline((), kernels=kernels))]
           for kernels in ("auto", "model")}  # fmt: skip
    assert [name for name in listed if name in ran["auto"]] == ran["auto"]
    assert [name for name in listed if name in ran["model"]] == ran["model"]
    assert sorted(listed) == sorted(cls.name for cls in CATALOGUE)


def test_a_pass_prints_as_its_configuration() -> None:
    case = CASES[1]
    lines = [repr(one.step) for one in (*runs(case, "full"), runs(case, "model's kernels")[-2])]
    assert lines == [
        "EraseSites()",
        "ChannelLast()",
        "DropCasts()",
        "TrackTokens(trailing=False)",
        "ScoreTokens(cuts=(0→3/4, 1→1/2), criterion='simba', floor=4, seed=0, span=1)",
        "SelectTokens(cuts=(0→3/4, 1→1/2), floor=4)",
        "HoistPositions(output='full')",
        "GatherSurvivors(output='full')",
        "RestoreLength(output='full')",
        "OutlineBlocks()",
        "RestoreKernels()",
    ]


# --- layouts and casts -------------------------------------------------------------------------------------------


def test_step_sizes_come_out_of_their_product_channel_last() -> None:
    """Unless something else reads the product, or the model's own functions run."""
    model = _mamba(num_hidden_layers=2)
    graph = simba_fx.program(simba_fx.transform(model, [1, 0.5])).graph
    scans = [node for node in graph.nodes if node.target is torch.ops.simba_fx.selective_scan.default]
    assert len(scans) == 2
    for scan in scans:
        delta = scan.args[1]
        assert (delta.target, delta.args[1:]) == (torch.ops.aten.transpose.int, (1, 2))
        assert delta.args[0].target is torch.ops.aten.linear.default
        assert delta.meta["val"].stride(1) == 1
    own = simba_fx.program(simba_fx.transform(model, [1, 0.5], kernels="model")).graph
    assert len(own.find_nodes(op="call_function", target=torch.ops.aten.matmul.default)) == 2


def test_a_cast_there_and_back_is_dropped_bit_for_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    model = _mamba(num_hidden_layers=2).bfloat16()
    for layer in model.backbone.layers:
        layer.mixer.D.data = layer.mixer.D.data.float()  # as some checkpoints have it: the scan's result is widened
    ids = torch.randint(1, VOCABULARY, (2, 30))
    sparse = simba_fx.transform(model, [1, 0.5])
    casts = [node for node in simba_fx.program(sparse).graph.nodes if node.target is torch.ops.aten.to.dtype]
    dropped = next(stage for stage in simba_fx.program(sparse).history if stage.by == "DropCasts()").changed
    monkeypatch.setattr(passes.DropCasts, "rewrite", lambda self, graph, facts: 0)
    plain = simba_fx.transform(copy.deepcopy(model), [1, 0.5])  # which is captured anew
    all_casts = [node for node in simba_fx.program(plain).graph.nodes if node.target is torch.ops.aten.to.dtype]
    assert dropped >= 1
    assert len(all_casts) == len(casts) + 2 * dropped
    with torch.no_grad():
        assert torch.equal(sparse(ids, use_cache=False)[0], plain(ids, use_cache=False)[0])


# --- golden texts ------------------------------------------------------------------------------------------------


def test_the_flat_graph_of_the_smallest_case() -> None:
    assert_expected_inline(
        pipeline.text(runs(CASES[0], "full")[-1].before),
        """\
forward(x, tail):
batch = sym_size(x, 0)    # track-tokens, block -1
input_length = sym_size(x, 1)    # track-tokens, block -1
arange_default = arange(batch, dtype=torch.int64, device=cpu)    # track-tokens, block -1
rows = unsqueeze(arange_default, 1)    # track-tokens, block -1
arange_default_1 = arange(input_length, dtype=torch.int64, device=cpu)    # track-tokens, block -1
positions = expand(arange_default_1, [batch, input_length])    # track-tokens, block -1
layer_norm = layer_norm(x, [6], layers_0_norm_weight, layers_0_norm_bias, 1e-05, False)
linear = linear(layer_norm, layers_0_mixers_0_step_weight, layers_0_mixers_0_step_bias)
softplus = softplus(linear)
linear_1 = linear(layer_norm, layers_0_mixers_0_write_weight, layers_0_mixers_0_write_bias)
linear_2 = linear(layer_norm, layers_0_mixers_0_read_weight, layers_0_mixers_0_read_bias)
transpose = transpose(layer_norm, 1, 2)
transpose_1 = transpose(softplus, 1, 2)
transpose_2 = transpose(linear_1, 1, 2)
transpose_3 = transpose(linear_2, 1, 2)
exp = exp(layers_0_mixers_0_A_log)
neg = neg(exp)
selective_scan = selective_scan(transpose, transpose_1, neg, transpose_2, transpose_3)
getitem = getitem(selective_scan, 0)
transpose_4 = transpose(getitem, 1, 2)
add = add(x, transpose_4)
score_0 = selective_token_score(transpose, transpose_1, neg, transpose_2, transpose_3, None, False, None, tail, simba)    # score-tokens, block 0
chosen_0 = select_tokens(score_0, positions, input_length, tail, 2, 3, 4)    # select-tokens, block 0
kept_0 = getitem(chosen_0, 0)    # select-tokens, block 0
dropped_0 = getitem(chosen_0, 1)    # select-tokens, block 0
positions_0 = getitem(chosen_0, 2)    # select-tokens, block 0
left_0 = getitem(chosen_0, 3)    # select-tokens, block 0
exit_0 = take_tokens(add, dropped_0)    # restore-length, block 0
survivors_1 = index(add, [rows, kept_0])    # gather-survivors, block 1
layer_norm_1 = layer_norm(survivors_1, [6], layers_1_norm_weight, layers_1_norm_bias, 1e-05, False)
linear_3 = linear(layer_norm_1, layers_1_mixers_0_step_weight, layers_1_mixers_0_step_bias)
softplus_1 = softplus(linear_3)
linear_4 = linear(layer_norm_1, layers_1_mixers_0_write_weight, layers_1_mixers_0_write_bias)
linear_5 = linear(layer_norm_1, layers_1_mixers_0_read_weight, layers_1_mixers_0_read_bias)
transpose_5 = transpose(layer_norm_1, 1, 2)
transpose_6 = transpose(softplus_1, 1, 2)
transpose_7 = transpose(linear_4, 1, 2)
transpose_8 = transpose(linear_5, 1, 2)
exp_1 = exp(layers_1_mixers_0_A_log)
neg_1 = neg(exp_1)
selective_scan_1 = selective_scan(transpose_5, transpose_6, neg_1, transpose_7, transpose_8)
getitem_2 = getitem(selective_scan_1, 0)
transpose_9 = transpose(getitem_2, 1, 2)
add_1 = add(survivors_1, transpose_9)
restore_tokens_default = restore_tokens([exit_0, add_1], [left_0, positions_0], input_length)    # restore-length, block 2
layer_norm_2 = layer_norm(restore_tokens_default, [6], norm_weight, norm_bias, 1e-05, False)
linear_6 = linear(layer_norm_2, head_weight, head_bias)
return [linear_6, positions_0]""",  # noqa: E501
    )


def test_the_outlined_graph_of_the_smallest_case() -> None:
    assert_expected_inline(
        pipeline.text(runs(CASES[0], "full")[-1].after),
        """\
forward(x, tail):
batch = sym_size(x, 0)    # track-tokens, block -1
input_length = sym_size(x, 1)    # track-tokens, block -1
arange_default = arange(batch, dtype=torch.int64, device=cpu)    # track-tokens, block -1
rows = unsqueeze(arange_default, 1)    # track-tokens, block -1
arange_default_1 = arange(input_length, dtype=torch.int64, device=cpu)    # track-tokens, block -1
positions = expand(arange_default_1, [batch, input_length])    # track-tokens, block -1
block_0 = block_0(x, tail)    # outline-blocks, block 0
hidden_0 = getitem(block_0, 0)    # outline-blocks, block 0
score_0 = getitem(block_0, 1)    # outline-blocks, block 0
chosen_0 = select_tokens(score_0, positions, input_length, tail, 2, 3, 4)    # select-tokens, block 0
kept_0 = getitem(chosen_0, 0)    # select-tokens, block 0
dropped_0 = getitem(chosen_0, 1)    # select-tokens, block 0
positions_0 = getitem(chosen_0, 2)    # select-tokens, block 0
left_0 = getitem(chosen_0, 3)    # select-tokens, block 0
exit_0 = take_tokens(hidden_0, dropped_0)    # restore-length, block 0
hidden_1 = block_1(hidden_0, rows, kept_0)    # outline-blocks, block 1
restore_tokens_default = restore_tokens([exit_0, hidden_1], [left_0, positions_0], input_length)    # restore-length, block 2
layer_norm_2 = layer_norm(restore_tokens_default, [6], norm_weight, norm_bias, 1e-05, False)
linear_6 = linear(layer_norm_2, head_weight, head_bias)
return [linear_6, positions_0]""",  # noqa: E501
    )


def test_the_outlined_graph_with_a_mask() -> None:
    assert_expected_inline(
        pipeline.text(runs(CASES[1], "full")[-1].after),
        """\
forward(x, mask, tail):
batch = sym_size(x, 0)    # track-tokens, block -1
input_length = sym_size(x, 1)    # track-tokens, block -1
arange_default = arange(batch, dtype=torch.int64, device=cpu)    # track-tokens, block -1
rows = unsqueeze(arange_default, 1)    # track-tokens, block -1
arange_default_1 = arange(input_length, dtype=torch.int64, device=cpu)    # track-tokens, block -1
positions = expand(arange_default_1, [batch, input_length])    # track-tokens, block -1
real = ne(mask, 0)    # track-tokens, block -1
lengths = sum(real, [1])    # track-tokens, block -1
unsqueeze = unsqueeze(mask, 2)
mul = mul(x, unsqueeze)
block_0 = block_0(mul, mask, real, tail)    # outline-blocks, block 0
hidden_0 = getitem(block_0, 0)    # outline-blocks, block 0
score_0 = getitem(block_0, 1)    # outline-blocks, block 0
chosen_0 = select_real_tokens(score_0, positions, real, lengths, input_length, tail, 3, 4, 4)    # select-tokens, block 0
kept_0 = getitem(chosen_0, 0)    # select-tokens, block 0
dropped_0 = getitem(chosen_0, 1)    # select-tokens, block 0
positions_0 = getitem(chosen_0, 2)    # select-tokens, block 0
left_0 = getitem(chosen_0, 3)    # select-tokens, block 0
real_0 = getitem(chosen_0, 4)    # select-tokens, block 0
exit_0 = take_tokens(hidden_0, dropped_0)    # restore-length, block 0
block_1 = block_1(hidden_0, mask, kept_0, real_0, rows, tail)    # outline-blocks, block 1
hidden_1 = getitem(block_1, 0)    # outline-blocks, block 1
score_1 = getitem(block_1, 1)    # outline-blocks, block 1
chosen_1 = select_real_tokens(score_1, positions_0, real_0, lengths, input_length, tail, 1, 2, 4)    # select-tokens, block 1
kept_1 = getitem(chosen_1, 0)    # select-tokens, block 1
dropped_1 = getitem(chosen_1, 1)    # select-tokens, block 1
positions_1 = getitem(chosen_1, 2)    # select-tokens, block 1
left_1 = getitem(chosen_1, 3)    # select-tokens, block 1
real_1 = getitem(chosen_1, 4)    # select-tokens, block 1
exit_1 = take_tokens(hidden_1, dropped_1)    # restore-length, block 1
hidden_2 = block_2(hidden_1, rows, kept_1)    # outline-blocks, block 2
restore_tokens_default = restore_tokens([exit_0, exit_1, hidden_2], [left_0, left_1, positions_1], input_length)    # restore-length, block 3
layer_norm_3 = layer_norm(restore_tokens_default, [6], norm_weight, norm_bias, 1e-05, False)
linear_9 = linear(layer_norm_3, head_weight, head_bias)
return [linear_9, positions_0, real_0, positions_1, real_1]""",  # noqa: E501
    )


def test_a_block_of_the_smallest_case() -> None:
    block = blocks_of(runs(CASES[0], "full")[-1].after, None)["block_1"]
    assert_expected_inline(
        pipeline.text(block.graph),
        """\
forward(hidden, rows, kept):
survivors = index(hidden, [rows, kept])    # gather-survivors, block 1
layer_norm_default = layer_norm(survivors, [6], norm_weight, norm_bias, 1e-05, False)
linear_default = linear(layer_norm_default, mixers_0_step_weight, mixers_0_step_bias)
softplus_default = softplus(linear_default)
linear_default_1 = linear(layer_norm_default, mixers_0_write_weight, mixers_0_write_bias)
linear_default_2 = linear(layer_norm_default, mixers_0_read_weight, mixers_0_read_bias)
transpose_int = transpose(layer_norm_default, 1, 2)
transpose_int_1 = transpose(softplus_default, 1, 2)
transpose_int_2 = transpose(linear_default_1, 1, 2)
transpose_int_3 = transpose(linear_default_2, 1, 2)
exp_default = exp(mixers_0_a_log)
neg_default = neg(exp_default)
selective_scan_default = selective_scan(transpose_int, transpose_int_1, neg_default, transpose_int_2, transpose_int_3)
getitem = getitem(selective_scan_default, 0)
transpose_int_4 = transpose(getitem, 1, 2)
add_tensor = add(survivors, transpose_int_4)
return add_tensor""",
    )


def test_a_diff_of_two_stages() -> None:
    captured = CASES[0].captured
    _, history = pipeline.run_passes(captured.graph, captured.facts, [passes.EraseSites()])
    assert_expected_inline(
        pipeline.diff(*history),
        """\
--- capture
+++ EraseSites()
@@ -12,7 +12,5 @@
 neg = neg(exp)
-site_enter = site_enter(transpose, [transpose, transpose_1, neg, transpose_2, transpose_3], 0)
-selective_scan = selective_scan(site_enter, transpose_1, neg, transpose_2, transpose_3)
+selective_scan = selective_scan(transpose, transpose_1, neg, transpose_2, transpose_3)
 getitem = getitem(selective_scan, 0)
-site_exit = site_exit(getitem, 0, 0)
-transpose_4 = transpose(site_exit, 1, 2)
+transpose_4 = transpose(getitem, 1, 2)
 add = add(x, transpose_4)
@@ -29,7 +27,5 @@
 neg_1 = neg(exp_1)
-site_enter_1 = site_enter(transpose_5, [transpose_5, transpose_6, neg_1, transpose_7, transpose_8], 1)
-selective_scan_1 = selective_scan(site_enter_1, transpose_6, neg_1, transpose_7, transpose_8)
+selective_scan_1 = selective_scan(transpose_5, transpose_6, neg_1, transpose_7, transpose_8)
 getitem_2 = getitem(selective_scan_1, 0)
-site_exit_1 = site_exit(getitem_2, 1, 0)
-transpose_9 = transpose(site_exit_1, 1, 2)
+transpose_9 = transpose(getitem_2, 1, 2)
 add_1 = add(add, transpose_9)""",
    )
