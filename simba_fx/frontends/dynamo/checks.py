"""What the backend asks of a graph before its passes run: inputs that it can name, and reasons to refuse it.

A schedule is for a whole model on a whole text; whatever may be less is refused, never pruned in part, nor left dense
in silence.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import sympy
import torch
from torch import Tensor, fx, nn

from simba_fx.capture.blocks import block_list, paths
from simba_fx.capture.refusals import advice
from simba_fx.errors import CaptureError, GraphError, InputError, ScanNotFoundError
from simba_fx.frontends.dynamo.frame import Frame
from simba_fx.frontends.dynamo.inputs import Input
from simba_fx.graph.facts import Facts, expression, returned, shape_text, value, where
from simba_fx.graph.marks import Role, region, tracked
from simba_fx.options import Options

__all__ = [
    "assert_real_tokens",
    "check_lengths",
    "mask_of",
    "primary_of",
    "refuse_hidden_calls",
    "refuse_keys",
    "refuse_missed",
    "refuse_nameless_masks",
    "refuse_one_block",
    "refuse_own_backward",
    "refuse_pieces",
    "refuse_states",
]

_MASKS = ("attention_mask", "linear_attention")  # of transformers; the last: in a dict of masks, of a cache
_POSITIONS = ("position_ids", "token_type_ids")


def _masks(options: Options) -> tuple[str, ...]:
    """What a padding mask is called: as the options say, else by transformers."""
    return _MASKS if options.mask is None else (options.mask,) if options.mask else ()


def primary_of(given: Mapping[fx.Node, Input], length: sympy.Expr, options: Options) -> fx.Node:
    """The input `(B, L, ...)` that sizes are read from: the first that is no mask."""
    found = [node for node in given if value(node).dim() > 1 and expression(value(node).shape[1]) == length]
    if not found or not isinstance(length, sympy.Symbol):
        raise CaptureError(
            f"The scans run over {length} tokens; expected the length of an input (B, L, ...), found inputs "
            f"{', '.join(f'{g.source} {tuple(value(node).shape)}' for node, g in given.items()) or 'without tensors'}. "
            "Use simba_fx.transform."
        )
    return next((node for node in found if given[node].name not in _masks(options)), found[0])


def mask_of(given: Mapping[fx.Node, Input], primary: fx.Node, options: Options) -> fx.Node | None:
    masks = [node for node, g in given.items() if g.name in _masks(options) and node is not primary]
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


def refuse_pieces(graph: fx.Graph, scans: list[fx.Node], owner: nn.Module | None, piece: bool) -> None:
    """A schedule is for all blocks: a part of them must not be taken for the whole."""
    parent = None if owner is None else block_list(scans, owner)
    if owner is None or parent is None:
        missing, known = [], False
    else:
        seen = {path for node in graph.nodes for path in paths(node)}
        members = [name for name, _ in owner.get_submodule(parent).named_children()]
        missing, known = [name for name in members if f"{parent}.{name}".lstrip(".") not in seen], True
    if missing or (piece and not known):
        what = f"lacks the blocks {', '.join(missing)} of {parent}" if missing else "may lack some of its blocks"
        raise GraphError(
            f"A graph break divides the model: this graph holds {len(scans)} scans and {what}; expected all blocks in "
            "one graph, since a schedule is for all of them. Compile with fullgraph=True to see where it breaks, or "
            "use simba_fx.transform."
        )


def refuse_hidden_calls(hidden: int) -> None:
    if hidden:
        raise GraphError(
            f"{hidden} scans or convolutions are inside of operators that run graphs of their own (gradient "
            "checkpointing?); expected them in the model's own graph. Turn checkpointing off, or use "
            "simba_fx.transform."
        )


def refuse_own_backward(graph: fx.Graph) -> None:
    """Dynamo's graph holds forward and backward of a `torch.autograd.Function`; a flat one would hold the forward."""
    if any(getattr(node.target, "__name__", "") == "autograd_function_apply" for node in graph.nodes):
        raise GraphError(
            "The model calls a torch.autograd.Function, whose backward would be lost where its graph is rewritten; "
            "expected operators alone where gradients are wanted. Use simba_fx.transform, whose graphs call such "
            "functions again, or call the model under torch.no_grad()."
        )


def refuse_keys(graph: fx.Graph, facts: Facts) -> None:
    """Keys and values: decoding goes on from them only where a cache knows which tokens a layer holds."""
    for node in returned(graph):
        val = value(node) if isinstance(node, fx.Node) else None
        if isinstance(val, Tensor) and facts.sequence in (sizes := [expression(size) for size in val.shape])[2:]:
            raise GraphError(
                f"The graph returns {node.name} of {where(node)}, {shape_text(val, facts)}: an attention layer's keys "
                f"or values, found with the length in dimension {sizes.index(facts.sequence, 2)}; expected a cache "
                "without attention layers. Pass use_cache=False, or use simba_fx.transform."
            )


def refuse_one_block(n_blocks: int, scans: list[fx.Node]) -> None:
    if n_blocks < 2:
        raise GraphError(
            f"This graph holds one block (scans: {len(scans)}), and tokens leave between blocks; expected two or more "
            "in one graph. Compile the whole model, with fullgraph=True to see whether and where it breaks into "
            "pieces, or use simba_fx.transform."
        )


def refuse_states(given: Mapping[fx.Node, Input], length: sympy.Expr) -> None:
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


def refuse_nameless_masks(given: Mapping[fx.Node, Input], primary: fx.Node, mask: fx.Node | None, n_blocks: int,
                           options: Options) -> None:  # fmt: skip
    if options.mask is False or (options.mask is not None and mask is not None):
        return
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
                "attention_mask, or to be told. Pass options={'mask': its name}, with 'mask_marks': 'padding' if "
                "values other than 0 mark padding, or {'mask': False} if no argument says what is padding."
            )


def check_lengths(lead: Tensor, length: sympy.Expr, options: Options, tail: int) -> None:
    """Every text has the tokens that must be kept of it, and every pruned length is one that Dynamo's graph is for."""
    shape_env: Any = lead.fake_mode.shape_env  # type: ignore[attr-defined]  # a fake tensor
    shortest = int(shape_env.bound_sympy(length).lower)
    least = tail + options.least_kept
    if 2 < shortest > least:
        raise CaptureError(
            f"Dynamo traced the model for texts of at least {shortest} tokens, since it branches on the length, and "
            f"'floor' and 'tail' allow it to keep {least}; expected at least {shortest}. Pass "
            f"options={{'floor': {shortest - tail}}}, or use simba_fx.transform."
        )
    needed = _needed(options, tail)
    if needed > 2 and not bool(lead.shape[1] >= needed):  # guards
        raise InputError(
            f"The options 'tail', 'query' and 'protect' need {needed} tokens; found a text of {int(lead.shape[1])}. "
            "Lower them or pass a longer text."
        )


def _needed(options: Options, tail: int) -> int:
    """How many real tokens every row must have."""
    return max([1, tail, *(position + 1 if position >= 0 else -position for position in options.named)])


def assert_real_tokens(graph: fx.Graph, options: Options, tail: int) -> None:
    """Each row has the real tokens that must be kept of it: checked where the graph runs."""
    lengths: Any = tracked(graph, Role.LENGTHS)
    needed = _needed(options, tail)
    message = f"a row of the mask has fewer real tokens than simba_fx must keep of it ({needed})"
    with graph.inserting_before(lengths.next):
        enough = graph.call_function(torch.ops.aten.ge.Scalar, (lengths, needed))
        every = graph.call_function(torch.ops.aten.all.default, (enough,))
        graph.call_function(torch.ops.aten._assert_async.msg, (every, message))


def refuse_missed(gm: fx.GraphModule, frame: Frame) -> None:
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
    _, owner = frame.module(many[:1])
    name = type(owner).__name__ if owner is not None else "the compiled function"
    raise ScanNotFoundError(
        f"No scan was found in {name}: expected at least one call of a registered scan function while it was traced, "
        f"found none.{advice()}"
    )
