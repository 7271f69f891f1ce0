"""`torch.compile(model, backend="simba_fx", options={"schedule": "linear"})`: the passes on Dynamo's graph.

Dynamo traces the model, one call per scan (`substitutes`). A graph that holds a prompt's scans is traced on to
ATen, rewritten by the same passes as under `transform`, and given to an inner backend, Inductor by default. Every other
graph (decoding steps, prompts of one token, what has no scan) goes there as it is. torch finds the backend under its
name through the entry point `torch_dynamo_backends`: nothing needs to be imported.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from simba_fx.capture.normalise import Captured, annotate, check_every_mixer, drop_no_ops, strip_paths
from simba_fx.errors import SimbaError
from simba_fx.flops import BudgetCost
from simba_fx.frontends.dynamo import substitutes
from simba_fx.frontends.dynamo.checks import (
    assert_real_tokens,
    check_lengths,
    mask_of,
    primary_of,
    refuse_hidden_calls,
    refuse_keys,
    refuse_missed,
    refuse_nameless_masks,
    refuse_one_block,
    refuse_own_backward,
    refuse_pieces,
    refuse_states,
)
from simba_fx.frontends.dynamo.frame import Attempt, Frame
from simba_fx.frontends.dynamo.graph import Flat, constant, flattened, float_inputs, lifted_calls, module_of
from simba_fx.frontends.dynamo.internals import inner_backend, restart, specialize
from simba_fx.graph.facts import expression, placeholder, value
from simba_fx.ops.recurrences import SCANS, recurrence_of
from simba_fx.options import SCHEDULE, Options
from simba_fx.runtime.build import build_program
from simba_fx.schedule import as_schedule

__all__ = ["simba_fx"]


def simba_fx(gm: fx.GraphModule, example_inputs: list[Any], *, options: Mapping[str, Any] | None = None,
             mode: str | None = None) -> Any:  # fmt: skip
    """The backend. What it compiles computes what `transform(model, **options)` does, for the same inputs.

    Before: Dynamo's graph of a model, dense. After: the inner backend's function of the rewritten graph: same inputs,
    same outputs of the same sizes; a dropped token leaves with the hidden state that it left with. Graphs without a
    prompt's scans are compiled as they are.

    Args:
        gm, example_inputs: as Dynamo gives them to a backend.
        options: of `torch.compile`. "schedule", "criterion", "floor", "seed", "span", "query", "protect", "mask",
            "mask_marks" as in `transform`; "tail": trailing tokens that are kept, scored at the first of them (1; with
            a query 0); "backend": the inner one, a name or a function ("inductor"); "mode" and "options": of
            `torch.compile`, for the inner backend.
        mode: of `torch.compile`, for the inner backend.

    Raises:
        SimbaError, ScheduleError, CriterionError: options that are unknown, or cannot be used here.
        ScanNotFoundError: a model is called on a text, and no registered scan function runs.
        CaptureError: the length is no symbol, a scan was missed, or the model branches on lengths that are pruned away.
        GraphError: a piece of a model between graph breaks; a value crosses a cut that cannot be gathered.
        InputError: a prompt on a warm cache; a mask that is not `(B, L)` or has no name; a text shorter than the tail.
        Dynamo raises these as `BackendCompilerFailed`, whose text holds theirs.
    """
    settings = Settings.of(options, mode)
    if not substitutes.tracing_for(simba_fx):
        raise SimbaError(
            "simba_fx.frontends.dynamo.simba_fx was called by another backend, or outside of torch.compile; expected "
            "to be the backend that Dynamo traces for, so that scans are calls. Write torch.compile(model, "
            'backend="simba_fx").'
        )
    attempt = Attempt.current()
    attempt.marks.undo()
    if substitutes.keep_fresh(simba_fx):  # a function became known after this frame's trace began
        restart("scan functions that were not stood in for")
    frame = Frame.current(gm)
    calls, hidden = lifted_calls(gm)
    refuse_hidden_calls(hidden)
    if not calls:
        refuse_missed(gm, frame)
        return settings.inner(gm, example_inputs)
    refuse_own_backward(gm.graph)
    specialize(float_inputs(gm))  # epsilons
    flat = flattened(gm)
    drop_no_ops(flat.graph)
    scans = [node for node in flat.graph.nodes if node.target in SCANS]
    if not scans:  # a convolution alone
        return settings.inner(gm, example_inputs)
    rows, length = _sizes(scans[0])
    if length == 1:
        return settings.inner(gm, example_inputs)
    if not length.free_symbols or length == rows:
        attempt.retrace(frame, length, rows)
    rewritten = _pruned(gm, flat, frame, settings, length, attempt.static)
    return settings.inner(rewritten, example_inputs)


substitutes.keep_fresh(simba_fx)


# --- options -----------------------------------------------------------------------------------------------------

_PRUNING = ("schedule", "criterion", "floor", "seed", "span", "query", "protect", "mask", "mask_marks")
_KNOWN = (*_PRUNING, "tail", "backend", "mode", "options")
_ELSEWHERE = {
    "compile": "torch.compile makes one graph, and the inner backend compiles it. Leave the option out",
    "kernels": "the operators of simba_fx run the scans, as with kernels='auto'. Leave the option out, or use "
    "simba_fx.transform",
    "output": "Dynamo has fixed what the model returns before the passes run, so every result has its full length. "
    "Leave the option out, or use simba_fx.transform",
}


@dataclass(frozen=True)
class Settings:
    """The options of one `torch.compile`, normalised."""

    options: Options
    tail: int
    inner: Any
    """The inner backend, a function of a graph and its example inputs."""

    @staticmethod
    def of(given: Mapping[str, Any] | None, mode: str | None) -> Settings:
        """Raises: SimbaError and its children for an option that is unknown or cannot be used."""
        given = dict(given or {})
        for name in given:
            if name in _ELSEWHERE:
                raise SimbaError(f'Option {name!r} does not apply to backend="simba_fx": {_ELSEWHERE[name]}.')
            if name not in _KNOWN:
                raise SimbaError(
                    f'Unknown option {name!r} of backend="simba_fx": expected {", ".join(_KNOWN)}. Options of the '
                    'inner backend go one level down: options={"options": {...}}.'
                )
        pruning = {name: given[name] for name in _PRUNING if name in given}
        options = Options(as_schedule(pruning.pop("schedule", SCHEDULE)), compile="whole", **pruning)
        tail = given.get("tail", options.least_tail)
        if isinstance(tail, bool) or not isinstance(tail, int) or tail < options.least_tail:
            raise SimbaError(
                f"Option 'tail' expects a whole number of tokens, at least {options.least_tail}; found {tail!r}. Write "
                'for example options={"tail": 100}.'
            )
        name, inner_options = given.get("backend", "inductor"), given.get("options")
        if name in ("simba_fx", simba_fx):
            raise SimbaError(
                "Option 'backend' names the backend that compiles the rewritten graph; expected another one than "
                "simba_fx. Leave it out for Inductor."
            )
        return Settings(options, tail, inner_backend(name, given.get("mode", mode), inner_options))


# --- rewriting -----------------------------------------------------------------------------------------------------


def _sizes(scan: fx.Node) -> tuple[sympy.Expr, sympy.Expr]:
    """B and L of a scan's first operand."""
    lead: Any = scan.args[0]
    rows, length = recurrence_of(scan.target).sizes(value(lead))
    return expression(rows), expression(length)


def _pruned(gm: fx.GraphModule, flat: Flat, frame: Frame, settings: Settings, length: sympy.Expr,
            static: bool) -> fx.GraphModule:  # fmt: skip
    """The rewritten graph; `static`: for the length of the call that is compiled alone."""
    graph, options, tail = flat.graph, settings.options, settings.tail
    scans = [node for node in graph.nodes if node.target in SCANS]
    root, owner = frame.module(scans)
    strip_paths(graph, root)
    refuse_pieces(graph, scans, owner, frame.piece)
    if owner is not None:
        check_every_mixer(graph, owner)
    nodes = list(graph.find_nodes(op="placeholder"))
    given = {node: g for node, g in zip(nodes, frame.inputs) if not g.owned and isinstance(g.example, Tensor)}
    primary = primary_of(given, length, options)
    mask = mask_of(given, primary, options)
    refuse_states(given, length)
    facts = annotate(graph, owner, primary, mask, marks=options.mask_marks)
    refuse_one_block(facts.n_blocks, scans)
    refuse_nameless_masks(given, primary, mask, facts.n_blocks, options)
    refuse_keys(graph, facts)
    check_lengths(value(primary), length, options, tail)
    names = tuple(node.name for node in nodes)
    built = build_program(Captured(graph, flat.attributes, facts, [], _FLAT, names, names), options, BudgetCost(None))
    rewritten = built.graph
    if mask is not None:
        assert_real_tokens(rewritten, options, tail)
    constant(placeholder(rewritten, "tail"), tail)
    if static:
        number = int(value(primary).shape[1])  # guards: another length is another compilation
        for node in list(rewritten.find_nodes(op="call_function", target=torch.ops.aten.sym_size.int)):
            if node.args == (placeholder(rewritten, facts.primary), 1):
                constant(node, number)
    return module_of(gm, rewritten, built.program.attributes(), flat.mutated, facts.values)


_FLAT = pytree.tree_structure(())  # Dynamo's graphs return flat tuples: nothing is put together from them
