"""`torch.compile(model, backend="simba_fx", options={"schedule": "linear"})`: the passes on Dynamo's graph.

Dynamo traces the model, one call per scan (`simba_fx.substitutes`). A graph that holds a prompt's scans is traced on to
ATen, rewritten by the same passes as under `transform`, and given to an inner backend, Inductor by default. Every other
graph (decoding steps, prompts of one token, what has no scan) goes there as it is. Found by torch under its name through
the entry point `torch_dynamo_backends`: nothing needs to be imported.
"""

from __future__ import annotations

import re
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch import Tensor, fx, nn
from torch._dynamo.exc import TensorifyScalarRestartAnalysis
from torch._dynamo.symbolic_convert import InstructionTranslator, TensorifyState
from torch._guards import CompileContext

from simba_fx import substitutes
from simba_fx.build import Options, build
from simba_fx.dynamo_graph import Flat, constant, flattened, float_inputs, holds_scans, module_of
from simba_fx.dynamo_inputs import Input, Marks, inputs_of
from simba_fx.errors import CaptureError, GraphError, InputError, ScanNotFoundError, SimbaError
from simba_fx.flat import Captured, advice, check_every_mixer, drop_no_ops, settled, strip_paths
from simba_fx.flops import budget_cost
from simba_fx.graphs import (
    SCANS,
    expression,
    placeholder,
    region,
    tracked,
    value,
)
from simba_fx.regions import block_list, paths
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
        options: of `torch.compile`. "schedule", "criterion", "floor", "seed", "query" and "protect" as in `transform`;
            "tail": trailing tokens that are kept, scored at the first of them (1; with a query 0); "backend": the inner
            one, a name or a function ("inductor"); "mode" and "options": of `torch.compile`, for the inner backend.
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
            "simba_fx.dynamo.simba_fx was called by a function that Dynamo does not know it through; expected it as the "
            'backend itself: scans were not stood in for. Write torch.compile(model, backend="simba_fx").'
        )
    attempt = _attempts.setdefault(CompileContext.get(), Attempt())
    attempt.marks.undo()
    if substitutes.refresh(simba_fx):  # a function became known after this frame's trace began
        raise TensorifyScalarRestartAnalysis(restart_reason="simba_fx: scan functions that were not stood in for")
    frame = Frame.current(gm)
    if not holds_scans(gm):
        _refuse_missed(gm, frame)
        return settings.inner(gm, example_inputs)
    if floats := {name for name in float_inputs(gm) if not TensorifyState.should_specialize(name)}:
        for name in floats:  # constants of the model: its epsilons; the inner backend would ask for the same later
            TensorifyState.specialize(name)
        raise TensorifyScalarRestartAnalysis(restart_reason="simba_fx: floats are constants")
    flat = flattened(gm)
    drop_no_ops(flat.graph)
    if flat.hidden:
        raise GraphError(
            f"{flat.hidden} scans are inside of an operator that holds a graph of its own (gradient checkpointing?); "
            "expected them in the model's graph. Turn checkpointing off, or use simba_fx.transform."
        )
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


substitutes.refresh(simba_fx)
torch._dynamo.callback.on_compile_start(lambda _: substitutes.refresh(simba_fx))


# --- options -----------------------------------------------------------------------------------------------------

_PRUNING = ("schedule", "criterion", "floor", "seed", "query", "protect")
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
                    f'Unknown option {name!r} of backend="simba_fx": expected {", ".join(_KNOWN)}. Options of the inner '
                    'backend go one level down: options={"options": {...}}.'
                )
        pruning = {name: given[name] for name in _PRUNING if name in given}
        options = Options(as_schedule(pruning.pop("schedule", "linear")), compile="whole", **pruning)
        tail = given.get("tail", options.tail)
        if isinstance(tail, bool) or not isinstance(tail, int) or tail < options.tail:
            raise SimbaError(
                f"Option 'tail' expects a whole number of tokens, at least {options.tail}; found {tail!r}. Write for "
                'example options={"tail": 100}.'
            )
        name, inner_options = given.get("backend", "inductor"), given.get("options")
        if name in ("simba_fx", simba_fx):
            raise SimbaError(
                "Option 'backend' names the backend that compiles the rewritten graph; expected another one than "
                "simba_fx. Leave it out for Inductor."
            )
        mode = given.get("mode", mode)
        wrapper: Any = torch._TorchCompileInductorWrapper if name == "inductor" else torch._TorchCompileWrapper
        return Settings(options, tail, wrapper(mode, inner_options, None) if name == "inductor" else
                        wrapper(name, mode, inner_options, None))  # fmt: skip


# --- the frame that is compiled ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Frame:
    """What Dynamo knows of the function whose graph this is."""

    inputs: tuple[Input, ...]
    scope: Mapping[str, Any]
    """Its variables, as Dynamo's names read them: L holds the local ones, G the global ones."""
    piece: bool
    """Whether the graph ends, or its function begins, at a graph break."""

    @staticmethod
    def current(gm: fx.GraphModule) -> Frame:
        output: Any = InstructionTranslator.current_tx().output
        code = output.root_tx.f_code.co_name
        piece = output.compile_subgraph_reason.graph_break or code.startswith("torch_dynamo_resume_in")
        inputs = tuple(inputs_of(gm.graph, output.local_scope))
        return Frame(inputs, {"L": output.local_scope, "G": output.global_scope}, bool(piece))

    def module(self, nodes: Sequence[fx.Node]) -> tuple[str, nn.Module | None]:
        """The module that the paths of these nodes start from, under Dynamo's name for it; "", None: there is no one."""
        roots = {match.group() if (match := _ROOT.match(_first_path(node))) else "" for node in nodes}
        if len(roots) != 1 or not (root := roots.pop()):
            return "", None
        try:
            found = eval(root, {"__builtins__": {}}, dict(self.scope))  # as Dynamo's guards read the same names
        except (LookupError, AttributeError):
            return "", None
        return (root, found) if isinstance(found, nn.Module) else ("", None)


_ROOT = re.compile(r"[LG](\[[^\]]*\])+")


def _first_path(node: fx.Node) -> str:
    return next(iter(paths(node)), "")


def _refuse_missed(gm: fx.GraphModule, frame: Frame) -> None:
    """A whole model that reads more than one token runs a scan, or the backend was not meant for it.

    Raises:
        ScanNotFoundError: it ran none.
    """
    lookups = [node for node in gm.graph.nodes if node.target is nn.functional.embedding]
    many = [
        node for node in lookups if node.meta["example_value"].dim() > 2 and node.meta["example_value"].shape[1] != 1
    ]
    weights = any(given.owned and given.source.endswith("['A_log']") for given in frame.inputs)
    if not many or (frame.piece and not weights):
        return
    root, owner = frame.module(many[:1])
    name = type(owner).__name__ if owner is not None else "the compiled function"
    raise ScanNotFoundError(
        f"No scan was found in {name}: expected at least one call of a registered scan function while it was traced, "
        f"found none.{'' if owner is None else advice(owner)}"
    )


# --- a symbolic length ---------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Attempt:
    """What one compilation of one frame has tried; Dynamo may trace it several times."""

    marks: Marks = field(default_factory=Marks)
    retraced: bool = False
    static: bool = False
    """Whether Dynamo wanted the length fixed: the rewritten graph is then made for this one."""

    def retrace(self, frame: Frame, length: sympy.Expr, rows: sympy.Expr) -> None:
        """Have Dynamo trace the frame again, with the length as a symbol of its own.

        A graph whose length is a number does not tell which of its numbers are that length; and one whose batch and
        length are one symbol does not tell them apart.
        """
        numbers = [_hint(size, frame) for size in (rows, length)]
        if self.retraced or not self.marks.length(frame.inputs, *numbers):
            raise CaptureError(
                f"The length of the sequence ({length}) did not stay symbolic while Dynamo traced the model; expected "
                "a tensor input (B, L, ...), and no branch or Python loop over its tokens. Use simba_fx.transform."
            )
        self.retraced, self.static = True, not length.free_symbols
        raise TensorifyScalarRestartAnalysis(restart_reason="simba_fx: the length as a symbol")


_attempts: weakref.WeakKeyDictionary[CompileContext, Attempt] = weakref.WeakKeyDictionary()


def _hint(size: sympy.Expr, frame: Frame) -> int:
    """A size in the call that is being compiled."""
    for given in frame.inputs:
        val = given.node.meta["example_value"]
        for number, symbolic in zip(given.example.shape, val.shape) if isinstance(given.example, Tensor) else ():
            if expression(symbolic) == size:
                return int(number)
    return int(size) if size.is_Integer else 0


def _sizes(scan: fx.Node) -> tuple[sympy.Expr, sympy.Expr]:
    """B and L of a scan's first operand, `(B, D, L)` or `(B, L, H, P)`."""
    lead: Any = scan.args[0]
    shape = value(lead).shape
    return expression(shape[0]), expression(shape[2 if scan.target is SCANS[0] else 1])


# --- rewriting -----------------------------------------------------------------------------------------------------

_MASKS = ("attention_mask", "mask", "padding_mask", "linear_attention")  # the last: in a dict of masks, of a cache
_POSITIONS = ("position_ids", "token_type_ids")


def _pruned(gm: fx.GraphModule, flat: Flat, frame: Frame, settings: Settings, length: sympy.Expr,
            static: bool) -> fx.GraphModule:  # fmt: skip
    graph = flat.graph
    scans = [node for node in graph.nodes if node.target in SCANS]
    root, owner = frame.module(scans)
    strip_paths(graph, root)
    _refuse_pieces(graph, scans, owner, frame)
    if owner is not None:
        check_every_mixer(graph, owner)
    nodes = {given.node.name: node for given, node in zip(frame.inputs, graph.find_nodes(op="placeholder"))}
    given = {nodes[g.node.name]: g for g in frame.inputs if not g.owned and isinstance(g.example, Tensor)}
    primary = _primary(given, length)
    mask = _mask(given, primary)
    _refuse_states(given, length)
    facts = settled(graph, owner, primary, mask)
    _refuse_one_block(facts.n_blocks, scans)
    _refuse_nameless_masks(given, primary, mask, facts.n_blocks)
    _check_lengths(value(primary), length, settings)
    captured = Captured(graph, flat.attributes, facts, [], None, tuple(nodes), tuple(nodes))  # type: ignore[arg-type]
    built = build(captured, settings.options, budget_cost(None))
    rewritten = built.graph
    if mask is not None:
        _assert_real_tokens(rewritten, settings)
    constant(placeholder(rewritten, "tail"), settings.tail)
    if static:
        number = int(value(primary).shape[1])  # guards: another length is another compilation
        for node in list(rewritten.find_nodes(op="call_function", target=torch.ops.aten.sym_size.int)):
            if node.args == (placeholder(rewritten, facts.primary), 1):
                constant(node, number)
    return module_of(gm, rewritten, built.program.attributes(), flat.mutated, facts.values)


def _primary(given: Mapping[fx.Node, Input], length: sympy.Expr) -> fx.Node:
    """The input `(B, L, ...)` that sizes are read from: the first that is no mask."""
    found = [node for node in given if value(node).dim() > 1 and expression(value(node).shape[1]) == length]
    if not found or not isinstance(length, sympy.Symbol):
        raise CaptureError(
            f"The scans run over {length} tokens; expected the length of an input (B, L, ...), found inputs "
            f"{', '.join(f'{g.source} {tuple(value(node).shape)}' for node, g in given.items()) or 'without tensors'}. "
            "Use simba_fx.transform."
        )
    return next((node for node in found if given[node].name not in _MASKS), found[0])


def _mask(given: Mapping[fx.Node, Input], primary: fx.Node) -> fx.Node | None:
    masks = [node for node, g in given.items() if g.name in _MASKS and node is not primary]
    if not masks:
        return None
    sizes = [expression(size) for size in value(masks[0]).shape]
    if len(masks) > 1 or sizes != [expression(size) for size in value(primary).shape[:2]]:
        raise InputError(
            f"Expected one attention_mask (B, L), 1 for real tokens and 0 for padding; found "
            f"{', '.join(f'{given[node].source} {tuple(value(node).shape)}' for node in masks)}. Pass the tokenizer's "
            "2-D mask."
        )
    return masks[0]


# --- what is refused -----------------------------------------------------------------------------------------------


def _refuse_pieces(graph: fx.Graph, scans: list[fx.Node], owner: nn.Module | None, frame: Frame) -> None:
    """A schedule is for all blocks: a part of them must not be taken for the whole."""
    parent = None if owner is None else block_list(scans, owner)
    if owner is None or parent is None:
        missing, known = [], False
    else:
        seen = {path for node in graph.nodes for path in paths(node)}
        members = [name for name, _ in owner.get_submodule(parent).named_children()]
        missing, known = [name for name in members if f"{parent}.{name}".lstrip(".") not in seen], True
    if missing or (frame.piece and not known):
        what = f"lacks the blocks {', '.join(missing)} of {parent}" if missing else "may lack some of its blocks"
        raise GraphError(
            f"A graph break divides the model: this graph holds {len(scans)} scans and {what}; expected all blocks in "
            "one graph, since a schedule is for all of them. Compile with fullgraph=True to see where it breaks, or use "
            "simba_fx.transform."
        )


def _refuse_one_block(n_blocks: int, scans: list[fx.Node]) -> None:
    if n_blocks < 2:
        raise GraphError(
            f"This graph holds one block ({len(scans)} scans), and tokens leave between blocks; expected a model of two "
            "or more in one graph. Compile the whole model, with fullgraph=True to see whether and where it breaks "
            "into pieces, or use simba_fx.transform."
        )


def _refuse_states(given: Mapping[fx.Node, Input], length: sympy.Expr) -> None:
    """A cache's states from before this prompt; that a state is overwritten is no reading of it."""
    for node, g in given.items():
        if not g.held or any(length in expression(size).free_symbols for size in value(node).shape):
            continue
        if any(user.target is not torch.ops.aten.copy.default or node in user.args[1:] for user in node.users):
            raise InputError(
                f"This graph reads {g.source} {tuple(value(node).shape)}, as a prompt does that goes on from a warm "
                "cache; expected a whole prompt with an empty cache, or one new token. Pass the tokens one at a time, "
                "or start with an empty cache; a tensor that is no state, pass as an argument of its own."
            )


def _refuse_nameless_masks(given: Mapping[fx.Node, Input], primary: fx.Node, mask: fx.Node | None,
                           n_blocks: int) -> None:  # fmt: skip
    sizes = [expression(size) for size in value(primary).shape[:2]]
    for node, g in given.items():
        val = value(node)
        if node is mask or g.name in _POSITIONS or val.is_floating_point():
            continue
        if [expression(size) for size in val.shape] != sizes:
            continue
        if any(user.target is torch.ops.aten.embedding.default for user in node.users):
            continue
        if any(region(user) < n_blocks for user in node.users):
            raise InputError(
                f"The blocks read {g.source} (B, L), {val.dtype}, which may be a padding mask; expected one called "
                "attention_mask, mask or padding_mask. Compile the model itself, or call the argument so."
            )


def _check_lengths(lead: Tensor, length: sympy.Expr, settings: Settings) -> None:
    """Every text is as long as what must be kept of it, and every pruned length is one that the model was traced for."""
    named = [position + 1 if position >= 0 else -position for position in settings.options.named]
    needed = max([settings.tail, *named])
    if needed > 2 and not bool(lead.shape[1] >= needed):
        raise InputError(
            f"The options 'tail', 'query' and 'protect' need {needed} tokens; found a text of {int(lead.shape[1])}. "
            "Lower them or pass a longer text."
        )
    shape_env: Any = lead.fake_mode.shape_env  # type: ignore[attr-defined]  # a fake tensor
    shortest = int(shape_env.bound_sympy(length).lower)
    floor = max(settings.options.floor, len(named))
    if min(shortest, settings.tail + floor) < shortest and shortest > 2:
        raise CaptureError(
            f"The model was traced for texts of at least {shortest} tokens (it branches there), and 'floor' and 'tail' "
            f"let it keep {settings.tail + floor}; expected at least as many. Pass options={{'floor': "
            f"{shortest - settings.tail}}}, or use simba_fx.transform."
        )


def _assert_real_tokens(graph: fx.Graph, settings: Settings) -> None:
    """Each row has the real tokens that must be kept of it: checked where the graph runs."""
    lengths: Any = tracked(graph, "lengths")
    named = [position + 1 if position >= 0 else -position for position in settings.options.named]
    needed = max([settings.tail, 1, *named])
    message = f"a row of the mask has fewer real tokens than simba_fx must keep of it ({needed})"
    with graph.inserting_before(lengths.next):
        enough = graph.call_function(torch.ops.aten.ge.Scalar, (lengths, needed))
        every = graph.call_function(torch.ops.aten.all.default, (enough,))
        graph.call_function(torch.ops.aten._assert_async.msg, (every, message))
