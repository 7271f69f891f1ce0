"""From a module to one flat graph in which every scan is one node and the sequence length is one symbol.

`torch.export` (non-strict, under `no_grad`) does the tracing while `simba_fx.lift` stands in for the scan functions.
The result is normalised at once to a plain graph: asserts dropped, casts that cast nothing and slices that cut nothing
removed, sizes read in one place each, regions assigned. Parameters stay the module's own objects.
"""

from __future__ import annotations

import copy
import inspect
import itertools
import math
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from simba_fx import lift
from simba_fx.directions import settle_flips
from simba_fx.errors import CaptureError, ScanNotFoundError, SimbaError
from simba_fx.graphs import REGION, SCANS, Facts, drop_dead_code, expression, look_up, returned, value, where
from simba_fx.inputs import named_sizes

__all__ = ["Captured", "capture"]

_ROOT = "module"
_ASSERTIONS = ("_assert_tensor_metadata", "_assert_scalar", "sym_constrain_range", "_assert_async")
_EVERYTHING = 2**62


@dataclass(frozen=True)
class Captured:
    """A model (or its block stack) as one flat, dense graph."""

    graph: fx.Graph
    attributes: dict[str, Any]
    """What `get_attr` targets stand for: the module's own parameters and buffers, and constants."""
    facts: Facts
    sites: list[lift.CallSite]
    out_spec: pytree.TreeSpec
    arguments: tuple[str, ...]
    """The module's names of the inputs, in the order of the placeholders (fx renames an argument called `input`)."""

    inputs: tuple[str, ...]
    """The placeholders' own names, in the same order."""


def _root(module: nn.Module, names: list[str]) -> nn.Module:
    """`module` under a path of its own, and with a signature that names every input: export names placeholders so."""

    def forward(self: Any, **inputs: Any) -> Any:
        return self.module(**inputs)

    parameters = [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in ("self", *names)]
    forward.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    root: nn.Module = type("Root", (nn.Module,), {"forward": forward})()
    root.module = module
    root.training = module.training
    return root


def capture(module: nn.Module, owner: nn.Module, inputs: Mapping[str, Any], *, primary: str, mask: str | None = None,
            prefix: str = "", values: Callable[[], int] | None = None,
            spare: Collection[str] = ()) -> Captured:  # fmt: skip
    """Trace `module(**inputs)` into a flat graph.

    Args:
        module: what is traced; `owner`, inside it under the path `prefix`, is the user's module, whose classes are
            searched for scan functions and whose paths appear in messages.
        inputs: example tensors by name, B ≠ L, both > 1; a first dimension of size B and later ones of size L become
            symbolic.
        primary: the name of the tensor `(B, L, ...)` that sizes are read from; `mask`: of the padding mask.
        values: called after tracing; how many flat outputs are values (the others are cache states). None: all.
        spare: names of inputs that are left out of the graph where nothing reads them.

    Raises:
        ScanNotFoundError: no registered scan function ran.
        CaptureError: tracing failed, the length did not stay symbolic, or a scan was missed.
    """
    rows, length = _example_sizes(inputs, primary)
    dynamic = pytree.tree_map(lambda leaf: _dynamic_dims(leaf, rows, length), dict(inputs))
    root = _root(module, list(inputs))
    try:
        with lift.lifted(owner) as sites, torch.no_grad():
            exported = torch.export.export(root, (), dict(inputs), dynamic_shapes=dynamic, strict=False)
    except Exception as error:
        raise _explained(error, owner) from error
    flat = exported.module(check_guards=False)
    flat.graph.set_codegen(fx.graph.CodeGen())  # inputs and outputs flat, without pytree code around them
    graph = copy.deepcopy(flat.graph)  # no longer owned by a module: nodes may name attributes of ours
    inside = ".".join(filter(None, (_ROOT, prefix)))
    _strip_paths(graph, inside)
    _drop_no_ops(graph)
    if not any(node.target in SCANS for node in graph.nodes):
        raise ScanNotFoundError(
            f"No scan was found in {type(owner).__name__}: expected at least one call of a registered scan function "
            f"while it was traced, found none.{_advice(owner)}"
        )
    _check_every_mixer(graph, owner)
    attributes = {}
    for node in graph.find_nodes(op="get_attr"):
        tensor = look_up(flat, node.target)
        node.target = _cut(node.target, inside)
        node.name = graph._graph_namespace.create_name(node.target.replace(".", "_"), None)
        attributes[node.target] = tensor
    given = [name for name, held in inputs.items() if isinstance(held, Tensor)]
    named = dict(zip(given, graph.find_nodes(op="placeholder")))
    for name in [name for name in spare if name in named and not named[name].users]:
        graph.erase_node(named.pop(name))
    shape = value(named[primary]).shape
    batch, sequence = (expression(size) for size in shape[:2])
    if not isinstance(sequence, sympy.Symbol) or not isinstance(batch, sympy.Symbol):
        raise CaptureError(
            f"The sizes of {primary} did not stay symbolic in {type(owner).__name__}: expected (B, L, ...) with two "
            f"symbols, found {tuple(shape)}. A Python loop over tokens fixes the length.{_advice(owner)}"
        )
    blocks = _assign_regions(graph, owner, sequence)
    count = len(returned(graph)) if values is None else values()
    arguments, placeholders = tuple(named), tuple(node.name for node in named.values())
    mask_name = None if mask is None else named[mask].name
    facts = Facts(sequence, batch, named[primary].name, mask_name, blocks, count)
    _read_sizes_once(graph, facts)
    settle_flips(graph, facts)
    graph.lint()
    return Captured(graph, attributes, facts, sites, exported.call_spec.out_spec, arguments, placeholders)


def _example_sizes(inputs: Mapping[str, Any], primary: str) -> tuple[int, int]:
    lead = inputs.get(primary)
    if not isinstance(lead, Tensor) or lead.dim() < 2 or len({1, *lead.shape[:2]}) < 3:
        found = tuple(lead.shape) if isinstance(lead, Tensor) else type(lead).__name__
        raise CaptureError(
            f"Capture expects an example {primary} of shape (B, L, ...), B ≠ L, both > 1; found {found}."
        )
    return int(lead.shape[0]), int(lead.shape[1])


def _dynamic_dims(leaf: Any, rows: int, length: int) -> Any:
    if not isinstance(leaf, Tensor):
        return None
    return {
        d: torch.export.Dim.DYNAMIC for d, size in enumerate(named_sizes(leaf, rows, length)) if isinstance(size, str)
    }


def _explained(error: Exception, owner: nn.Module) -> Exception:
    """One of our own errors raised while tracing comes back as it is; anything else is told in one sentence."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, SimbaError):
            return type(cause)(*cause.args)
        cause = cause.__cause__ or cause.__context__
    told = str(error).strip() or type(error).__name__
    if "Constraints violated" in told or "specialized" in told:
        told = "a Python loop over tokens, or a branch on the length, fixes the length"
    return CaptureError(
        f"{type(owner).__name__} could not be captured as one graph with a symbolic length: "
        f"{told.splitlines()[0][:300].rstrip('.')}.{_advice(owner)}"
    )


def _advice(owner: nn.Module) -> str:
    names = lift.suggestions(owner)
    if names:
        return (
            f" Functions of its code that look like scans and are not registered: {', '.join(names)}. Register the one "
            "that runs the scan: simba_fx.register_scan(function, adapter)."
        )
    return (
        " If the model runs its scan in a function of its own, register it: simba_fx.register_scan(function, adapter)."
    )


def _check_every_mixer(graph: fx.Graph, owner: nn.Module) -> None:
    """Each module that owns an `A_log` parameter must have run a lifted scan."""
    seen = {path for node in graph.nodes if node.target in SCANS for path in _paths(node)}
    for path, module in owner.named_modules():
        if "A_log" in module._parameters and not any(p == path or p.startswith(path + ".") for p in seen):
            raise CaptureError(
                f"{path or type(owner).__name__} ({type(module).__name__}) holds the weights of a scan (A_log) but "
                f"called no registered scan function while it was traced.{_advice(owner)}"
            )


# --- normalising -------------------------------------------------------------------------------------------------


def _cut(path: str, prefix: str) -> str:
    return path[len(prefix) + 1 :] if f"{path}.".startswith(f"{prefix}.") else path


def _strip_paths(graph: fx.Graph, prefix: str) -> None:
    """Module paths as the user knows them."""
    for node in graph.nodes:
        if stack := node.meta.get("nn_module_stack"):
            node.meta["nn_module_stack"] = {k: (_cut(path, prefix), kind) for k, (path, kind) in stack.items()}


def _drop_no_ops(graph: fx.Graph) -> None:
    for node in list(graph.nodes):
        if getattr(node.target, "_opname", "") in _ASSERTIONS:
            graph.erase_node(node)
        elif _is_no_op(node):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
    drop_dead_code(graph)


def _is_no_op(node: fx.Node) -> bool:
    """A cast to the dtype that its input has, or a slice that takes everything."""
    args: Any = node.args
    if node.target is torch.ops.aten.to.dtype:
        return len(args) == 2 and not node.kwargs and bool(value(args[0]).dtype == args[1])
    if node.target is torch.ops.aten.slice.Tensor and len(args) == 4:
        _, _, start, end = args
        return bool(start == 0 and isinstance(end, int) and end > _EVERYTHING)
    return False


def _read_sizes_once(graph: fx.Graph, facts: Facts) -> None:
    """One node for B and one for L, read from the primary input, first in the graph."""
    lead = next(node for node in graph.find_nodes(op="placeholder") if node.name == facts.primary)
    after = [node for node in graph.nodes if node.op == "placeholder"][-1].next
    for dim, (symbol, name) in enumerate(((facts.batch, "batch"), (facts.sequence, "length"))):
        with graph.inserting_before(after):
            size = graph.call_function(torch.ops.aten.sym_size.int, (lead, dim))
            size.name = graph._graph_namespace.create_name(name, None)
        size.meta = {"val": value(lead).shape[dim], REGION: -1}
        for node in graph.nodes:
            if node is not size and node.target is torch.ops.aten.sym_size.int and expression(value(node)) == symbol:
                node.replace_all_uses_with(size)
    drop_dead_code(graph)


# --- regions -----------------------------------------------------------------------------------------------------


def _paths(node: fx.Node) -> list[str]:
    return [path for path, _ in (node.meta.get("nn_module_stack") or {}).values()]


def _assign_regions(graph: fx.Graph, owner: nn.Module, sequence: sympy.Symbol) -> tuple[str, ...]:
    scans = [node for node in graph.nodes if node.target in SCANS]
    parent = _block_list(scans, owner)
    if parent is None:
        return _narrowest_regions(graph, scans, sequence)
    blocks = tuple(f"{parent}.{name}".lstrip(".") for name, _ in owner.get_submodule(parent).named_children())
    numbers = {block: index for index, block in enumerate(blocks)}
    inside = re.compile((re.escape(parent) + r"\." if parent else "") + r"[^.]+")
    current, last = -1, None
    for node in graph.nodes:
        if node.op not in ("placeholder", "get_attr", "output"):
            index = _block_index(node, inside, numbers)
            if index is not None and index >= current:
                current, last = index, node
        node.meta[REGION] = current if node.op not in ("placeholder", "get_attr") else -1
    _start_tail(graph, last, len(blocks))
    return blocks


def _start_tail(graph: fx.Graph, last: fx.Node | None, n_blocks: int) -> None:
    """What follows the last block's last node is region n."""
    behind = False
    for node in graph.nodes:
        if behind and node.op != "get_attr":
            node.meta[REGION] = n_blocks
        behind = behind or node is last


def _block_index(node: fx.Node, inside: re.Pattern[str], numbers: dict[str, int]) -> int | None:
    matches = (inside.match(path) for path in _paths(node))
    return next((numbers[match.group()] for match in matches if match and match.group() in numbers), None)


def _block_list(scans: list[fx.Node], owner: nn.Module) -> str | None:
    """The path of the outermost list of modules that holds every scan."""
    candidates = []
    for path in _paths(scans[0]):
        if match := re.fullmatch(r"(?:(.*)\.)?(\d+)", path):
            parent = match.group(1) or ""
            if isinstance(owner.get_submodule(parent), nn.ModuleList | nn.Sequential):
                candidates.append(parent)
    for parent in candidates:
        inside = re.compile((re.escape(parent) + r"\." if parent else "") + r"\d+(\..*)?")
        if all(any(inside.fullmatch(path) for path in _paths(scan)) for scan in scans):
            return parent
    return None


def _narrowest_regions(graph: fx.Graph, scans: list[fx.Node], sequence: sympy.Symbol) -> tuple[str, ...]:
    """No list of blocks: cut between two scans where the fewest bytes that depend on the length are alive."""
    nodes = list(graph.nodes)
    at = {node: i for i, node in enumerate(nodes)}
    alive = [0] * (len(nodes) + 1)
    for node in nodes:
        last_use = max((at[user] for user in node.users if user.op != "output"), default=at[node])
        for i in range(at[node] + 1, last_use + 1):
            alive[i] += _sequence_bytes(node, sequence)
    ends = [
        min(range(at[scan] + 1, at[following] + 1), key=alive.__getitem__)
        for scan, following in itertools.pairwise(scans)
    ]
    widest = max((alive[end] for end in ends), default=0)
    rest = range(at[scans[-1]] + 1, len(nodes))
    ends.append(next((i for i in rest if alive[i] <= widest), len(nodes) - 1))
    for i, node in enumerate(nodes):
        hoisted = node.op in ("placeholder", "get_attr")
        node.meta[REGION] = -1 if hoisted else sum(i >= end for end in ends)
    return tuple(where(scan) for scan in scans)


def _sequence_bytes(node: fx.Node, sequence: sympy.Symbol, length: int = 64) -> int:
    """Bytes of one row of a tensor that has the length among its sizes, for a prompt of `length` tokens; else 0.
    Nothing is cut while a node's results are still one tuple."""
    val = value(node)
    if isinstance(val, tuple | list):
        return _EVERYTHING
    if not isinstance(val, Tensor):
        return 0
    sizes = [expression(size) for size in val.shape]
    if not any(sequence in size.free_symbols for size in sizes):
        return 0
    numbers = {symbol: length if symbol == sequence else 1 for size in sizes for symbol in size.free_symbols}
    concrete = [int(size.subs(numbers)) for size in sizes]
    return math.prod(concrete) * val.element_size()
