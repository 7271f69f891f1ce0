"""From a module to one flat graph in which every scan is one node and the sequence length is one symbol.

`torch.export` (non-strict, under `no_grad`) does the tracing while `lift` stands in for the scan functions. The result
is normalised at once to a plain graph (`normalise`). Parameters stay the module's own objects.
"""

from __future__ import annotations

import copy
import functools
import inspect
import itertools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import sympy
import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from simba_fx.capture import leftovers, lift
from simba_fx.capture.adapters import compare_adapters, say_not_compared
from simba_fx.capture.alike import Alike
from simba_fx.capture.autocast import mark_regions, refuse_graphs_in_blocks, regions_noted
from simba_fx.capture.examples import named_sizes
from simba_fx.capture.gradients import OwnGradients, drop_idle_detaches
from simba_fx.capture.guards import Question, guards_of, watched
from simba_fx.capture.kinds import Differs, expand, once_per_kind
from simba_fx.capture.normalise import Captured, annotate, check_every_mixer, cut, drop_no_ops, strip_paths
from simba_fx.capture.recurrences import keep_contract
from simba_fx.capture.refusals import Watch, advice, explained, refuse_quantised, told_in_words
from simba_fx.capture.surroundings import Surroundings
from simba_fx.capture.writes import Changes, refuse_writes, undisturbed
from simba_fx.errors import CaptureError, ScanNotFoundError, SimbaError
from simba_fx.graph.facts import expression, look_up, tensor_paths, value
from simba_fx.ops.recurrences import SCANS

__all__ = ["Captured", "capture_graph"]

_ROOT = "module"


def _root(module: nn.Module, names: list[str], around: Callable[[], AbstractContextManager[None]]) -> nn.Module:
    """`module` under a path of its own, and with a signature that names every input: export names placeholders so.
    `around` its forward are those who watch it."""

    def forward(self: Any, **inputs: Any) -> Any:
        with around():
            return self.module(**inputs)

    parameters = [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in ("self", *names)]
    forward.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    root: nn.Module = type("Root", (nn.Module,), {"forward": forward})()
    root.module = module
    root.training = module.training
    return root


class _Trace:
    """One model's way through torch.export, with blocks of a kind traced once (`kinds`)."""

    def __init__(self, root: nn.Module, owner: nn.Module, gradients: OwnGradients, inputs: dict[str, Any],
                 dynamic: Any) -> None:  # fmt: skip
        self.root, self.owner, self.gradients, self.inputs, self.dynamic = root, owner, gradients, inputs, dynamic
        self.sites: list[lift.CallSite] = []
        self.questions: list[Question] = []
        self.kinds: Collection[Alike] = ()

    def run(self, watch: Watch, inside: str) -> fx.Graph:
        """The flat graph; `inside`: the path of `owner` from the root."""
        apart: set[str] = set()
        while True:
            try:
                return self._once(watch, inside, apart)
            except Differs as found:
                apart.add(found.kind)
            except Exception as error:
                if not self.kinds or watch.fixed or isinstance(error, SimbaError):
                    raise
                apart |= {kind.path for kind in self.kinds}  # it may be of our making

    def _once(self, watch: Watch, inside: str, apart: Collection[str]) -> fx.Graph:
        with (
            undisturbed(self.owner),
            leftovers.none_left(),
            lift.lifted(self.owner) as sites,
            watched(sites) as questions,
            once_per_kind(self.owner, sites, questions, apart) as trace,
            self.gradients.watched(self.owner, sites),
            regions_noted(),
            torch.no_grad(),
        ):
            self.sites = watch.sites = sites
            self.questions = watch.questions = questions
            self.kinds = trace.kinds
            exported = torch.export.export(self.root, (), self.inputs, dynamic_shapes=self.dynamic, strict=False)
            self.flat = exported.module(check_guards=False)  # of ours: they hold in every block, and are told in words
        self.out_spec: Any = exported.call_spec.out_spec
        self.flat.graph.set_codegen(fx.graph.CodeGen())  # inputs and outputs flat, without pytree code around them
        graph = copy.deepcopy(self.flat.graph)  # no longer owned by a module: nodes may name attributes of ours
        graph = expand(graph, trace, self.root, inside)
        mark_regions(graph)
        return graph

    def look_up(self, path: str) -> Any:
        """What a `get_attr` node names. (The exported module has not the weights of blocks that were not traced.)"""
        try:
            return look_up(self.flat, path)
        except AttributeError:
            return look_up(self.root, path)


def capture_graph(module: nn.Module, owner: nn.Module, inputs: Mapping[str, Any], *, primary: str,
                  mask: str | None = None, prefix: str = "", values: Callable[[], int] | None = None,
                  spare: Collection[str] = (), kernels: str = "auto", marks: str = "real") -> Captured:  # fmt: skip
    """Trace `module(**inputs)` into a flat graph.

    Args:
        module: what is traced; `owner`, inside it under the path `prefix`, is the user's module, whose classes are
            searched for scan functions and whose paths appear in messages.
        inputs: example tensors by name, B ≠ L, both > 1; a first dimension of size B and later ones of size L become
            symbolic.
        primary: the name of the tensor `(B, L, ...)` that sizes are read from; `mask`: of the padding mask.
        marks: what the padding mask's values other than 0 mark, "real" tokens or "padding".
        values: called after tracing; how many flat outputs are values (the others are cache states). None: all.
        spare: names of inputs that are left out of the graph where nothing reads them.
        kernels: the option of `transform`: whether a user's scan function runs itself or as its adapter says.

    Raises:
        ScanNotFoundError: no registered scan function ran.
        CaptureError: tracing failed, the length did not stay symbolic, a scan was missed, or a user's adapter does not
            say what the function computes.
    """
    rows, length = _example_sizes(inputs, primary)
    refuse_quantised(owner)
    name = type(owner).__name__
    watch, gradients, changes, surroundings = Watch(name), OwnGradients(), Changes(owner), Surroundings(owner, name)

    @contextmanager
    def watching() -> Iterator[None]:
        with told_in_words(name), changes.watched(), surroundings.watched(), gradients, watch:
            yield

    root = _root(module, list(inputs), watching)
    compare = functools.partial(compare_adapters, module, owner, inputs, mask=mask, kernels=kernels)
    inside = ".".join(filter(None, (_ROOT, prefix)))
    dynamic = pytree.tree_map(lambda leaf: _dynamic_dims(leaf, rows, length), dict(inputs))
    trace = _Trace(root, owner, gradients, dict(inputs), dynamic)
    keep_contract(module, owner, inputs, mask=mask)
    try:
        graph = trace.run(watch, inside)
    except Exception as error:
        compare(trace.sites)  # a result of the wrong shape may be what stopped the trace
        raise explained(error, owner, module, inputs, trace.questions, watch) from error
    sites, questions = trace.sites, trace.questions
    strip_paths(graph, inside)
    drop_no_ops(graph)
    if not any(node.target in SCANS for node in graph.nodes):
        raise ScanNotFoundError(
            f"No scan was found in {type(owner).__name__}: expected at least one call of a registered scan function "
            f"while it was traced, found none.{advice(watch.called)}"
        )
    check_every_mixer(graph, owner, watch.called)
    known = len(lift.returned)
    if why := compare(sites):
        say_not_compared([site.function for site in sites], why)
    if len(lift.returned) > known:  # results have other dtypes than was taken for granted
        return capture_graph(module, owner, inputs, primary=primary, mask=mask, prefix=prefix, values=values,
                             spare=spare, kernels=kernels, marks=marks)  # fmt: skip
    attributes = {}
    own = tensor_paths(owner)
    names = (f"constant_{number}" for number in itertools.count() if f"constant_{number}" not in own)
    constants: dict[str, str] = {}
    for node in graph.find_nodes(op="get_attr"):
        tensor = trace.look_up(node.target)
        path = cut(node.target, inside)
        if path not in own and path not in constants:
            constants[path] = next(names)
        node.target = constants.get(path, path)
        node.name = graph._graph_namespace.create_name(node.target.replace(".", "_"), None)
        attributes[node.target] = tensor
    refuse_writes(graph, attributes)
    drop_idle_detaches(graph, attributes)
    gradients.warn(name)
    changes.check(name, attributes.values())
    surroundings.warn()
    given = [name for name, held in inputs.items() if isinstance(held, Tensor)]
    named = dict(zip(given, graph.find_nodes(op="placeholder")))
    for name in [name for name in spare if name in named and not named[name].users]:
        graph.erase_node(named.pop(name))
    shape = value(named[primary]).shape
    batch, sequence = (expression(size) for size in shape[:2])
    if not isinstance(sequence, sympy.Symbol) or not isinstance(batch, sympy.Symbol):
        raise CaptureError(
            f"The sizes of {primary} did not stay symbolic in {type(owner).__name__}: expected (B, L, ...) with two "
            f"symbols, found {tuple(shape)}. Write the model without a use of them as plain numbers."
        )
    arguments, placeholders = tuple(named), tuple(node.name for node in named.values())
    count = None if values is None else values()
    facts = annotate(graph, owner, named[primary], None if mask is None else named[mask], count, marks)
    refuse_graphs_in_blocks(graph, attributes, facts.n_blocks)
    letters = _letters(named, {name: named_sizes(inputs[name], rows, length) for name in named})
    shape_env = value(named[primary]).fake_mode.shape_env
    guards = guards_of(shape_env, questions, letters, len(sites), _block_modules(owner, facts.blocks))
    return Captured(graph, attributes, facts, sites, trace.out_spec, arguments, placeholders, guards)


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


def _letters(named: Mapping[str, fx.Node], sizes: Mapping[str, tuple[int | str, ...]]) -> dict[sympy.Symbol, str]:
    """Every symbolic size of an input is the B or the L of a call."""
    letters = {}
    for name, node in named.items():
        for size, letter in zip(value(node).shape, sizes[name]):
            if isinstance(letter, str):
                letters.update(dict.fromkeys(_symbols(size), letter))
    return letters


def _block_modules(owner: nn.Module, paths: Sequence[str]) -> list[nn.Module]:
    """The blocks, where they are the members of a list."""
    lists = {path.rpartition(".")[0] for path in paths}
    listed = all(isinstance(owner.get_submodule(path), nn.ModuleList | nn.Sequential) for path in lists)
    return [owner.get_submodule(path) for path in paths] if listed else []


def _symbols(size: int | torch.SymInt) -> tuple[sympy.Symbol, ...]:
    """A size's symbol before and after those of several inputs became one."""
    if not isinstance(size, torch.SymInt):
        return ()
    return tuple(s for s in (size.node._expr, size.node.expr) if isinstance(s, sympy.Symbol))
