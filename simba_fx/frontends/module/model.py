"""Plain modules: the whole module becomes one program with the module's own signature."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from simba_fx.capture.examples import EXAMPLE, autocast_dtype, named_sizes
from simba_fx.capture.export import capture_graph
from simba_fx.capture.normalise import Captured
from simba_fx.compiling import disable_compile, dynamic_marker, one_at_a_time, skip_frame, traced
from simba_fx.errors import CaptureError, InputError, SimbaError
from simba_fx.flops import BudgetCost
from simba_fx.frontends.files import name_of
from simba_fx.options import Options
from simba_fx.runtime import exporting
from simba_fx.runtime.build import Built, build_program
from simba_fx.runtime.captures import captured, share, stored_with
from simba_fx.runtime.clone import copies_of, copy_to_trace, dense_again, refuse_other_forwards
from simba_fx.runtime.exporting import CallsOfModule
from simba_fx.runtime.fingerprint import Fingerprint, Snapshot
from simba_fx.runtime.inputs import check_mask
from simba_fx.runtime.last_call import LastCall, Memory
from simba_fx.runtime.program import Block, Program
from simba_fx.runtime.rows import refuse_ragged

__all__ = ["PlainProgram", "PlainRuntime", "install", "owns"]

_LIKE_A_MASK = ("mask", "pad", "lengths")
_KEPT_GRAPHS = 8


@dataclass(eq=False)
class PlainRuntime(Memory):
    """The runtime of one transformed plain module."""

    options: Options
    name: str
    signature: inspect.Signature
    autocast: torch.dtype | None
    """What `torch.autocast` cast to while the module was captured."""
    tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...], torch.device]]
    """What it was captured with, by argument: dtype and shape `(B, L, ...)`, of the sizes `EXAMPLE`. (Tensors here
    would be inputs of every graph that Dynamo traces.)"""
    constants: Mapping[str, Any]
    """The arguments that are no tensors; they are part of the graph."""
    primary: str
    mask: str | None
    cost: Any
    store: Any
    """Captures that serve whatever the options, of the module that this one came from."""
    graphs: list[tuple[Snapshot, Built, Any]] = field(default_factory=list)
    """Of the module as it was then (its mode, its submodules); the last one runs."""
    held: Any = None
    """The program that is called."""

    @property
    def built(self) -> Built:
        return self.graphs[-1][1]

    def any_built(self) -> Built:
        return self.built

    def dense(self, _: nn.Module) -> nn.Module:
        """The module that the program came from: a copy over the same parameters."""
        model = dense_again(self.root)
        share(model, self.store)
        return model

    stack = None
    """The whole module is captured, nothing around it."""

    def arguments(self, example_inputs: Any, mask: Any, mask_marks: Any) -> tuple[Any, Any, Any]:
        """Of another transform: where no `example_inputs` are given, what it was captured with."""
        if example_inputs is not None:
            return example_inputs, mask, mask_marks
        known = (self.options.mask, self.options.mask_marks) if mask is None else (mask, mask_marks)
        return self.examples(), *known

    def examples(self) -> dict[str, Any]:
        """Arguments like those that it was captured with."""
        tensors = {name: torch.zeros(shape, dtype=dtype, device=device)
                   for name, (dtype, shape, device) in self.tensors.items()}  # fmt: skip
        held = tensors | dict(self.constants)
        return {name: held[name] for name in self.signature.parameters if name in held}

    def start(self, root: nn.Module, known: tuple[Snapshot, Built, Any] | None = None) -> PlainProgram:
        """The program of a module tree, which it shares; `known`: what runs on an equal tree."""
        self.root, self.fingerprint = root, Fingerprint(root, self.options.compile == "blocks")
        now = self.fingerprint.snapshot()
        built = self._built(now) if known is None else known[1]
        program: Any = built.program
        if known is None:
            program.read_from(root)
        else:
            program = program.over(root)
        self.fingerprint.captured(program.called())
        program.__dict__["training"] = root.training
        self.graphs.append((now, replace(built, program=program), program.state()))
        _call_as_module(program, self)
        return program  # type: ignore[no-any-return]

    def follow(self) -> None:
        """Run the graph of the module as it is now: another one in the other mode, or with other submodules."""
        now = self.fingerprint.snapshot()
        if now == self.graphs[-1][0]:
            return
        with one_at_a_time():
            found = next((graph for graph in self.graphs if graph[0] == now), None)
            if found is None:
                built = self._built(now)
                other: Any = built.program
                other.read_from(self.root)
                found = now, replace(built, program=self.held), other.state()
            self.held.become(found[2])
            others = [graph for graph in self.graphs if graph is not found]
            self.graphs = [*others[1 - _KEPT_GRAPHS :], found]

    def _built(self, now: Snapshot) -> Built:
        constants = tuple((name, repr(held)) for name, held in self.constants.items())
        rest = (
            *self.tensors.items(),
            *constants,
            self.primary,
            self.mask,
            self.options.mask_marks,
            self.options.kernels,
            self.options.compile,
            self.autocast,
        )
        graph, _ = captured(self.store, self.root, now, rest, lambda: (self._trace(), None))
        return build_program(graph, self.options, self.cost, program_class=PlainProgram)

    def _trace(self) -> Captured:
        root, examples = copy_to_trace(self.root, self.fingerprint.live()), self.examples()
        device = next(device for _, _, device in self.tensors.values())
        around = torch.autocast(device.type, self.autocast, enabled=self.autocast is not None)
        with torch.inference_mode(False), around:  # as at first, whatever surrounds a later call
            graph = capture_graph(root, root, examples, primary=self.primary, mask=self.mask,
                                  marks=self.options.mask_marks, kernels=self.options.kernels)  # fmt: skip
        for node in graph.graph.find_nodes(op="placeholder"):  # numbers, flags and words are in the graph already
            if node.name not in graph.inputs:
                graph.graph.erase_node(node)
        return graph

    def prepare(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Any]:
        """The program's inputs for a call of the module, in order.

        Raises:
            InputError: other arguments than the program was captured with, or a mask that cannot be used.
        """
        if not traced():
            self.follow()
        captured = self.built.captured
        given = dict(zip(self.signature.parameters, args)) | dict(kwargs)
        if len(given) != len(args) + len(kwargs):
            raise InputError(
                f"{self.name} was called with {len(args)} positional and {len(kwargs)} keyword arguments; expected "
                f"{', '.join(self.signature.parameters)}, each once. Leave out what is given twice or has no name."
            )
        bound = {name: held for name, held in given.items() if held is not None and not self._fixed(name, held)}
        if set(bound) != set(captured.arguments):
            raise InputError(
                f"{self.name} was captured with the arguments {', '.join(captured.arguments)}; found a call with "
                f"{', '.join(bound) or 'none'}. Transform the module again with example_inputs like this call's."
            )
        inputs = [bound[name] for name in captured.arguments]
        if not traced():
            self._check_looks(dict(zip(captured.arguments, inputs)))
        lead, mask = inputs[captured.inputs.index(captured.facts.primary)], self._mask(inputs)
        refuse_ragged(self.name, self.asked)
        check_mask(mask, lead.shape[0], lead.shape[1], self.shortest_row, self.options.named)
        self.built.check_sizes(self.name, lead.shape[0], lead.shape[1], self.tail)
        if (around := autocast_dtype(lead.device)) != self.autocast:
            raise InputError(
                f"{self.name} was captured with torch.autocast {_told(self.autocast)} and is called with it "
                f"{_told(around)}; expected the same, because a graph holds the casts of one of them. Call "
                "simba_fx.transform inside the autocast that the model will run in."
            )
        return [*inputs, self.tail]

    def _check_looks(self, given: Mapping[str, Any]) -> None:
        """Raises: InputError: an argument has other sizes, or another kind of numbers, than the graph was made for."""
        captured = self.built.captured
        lead = given[captured.arguments[captured.inputs.index(captured.facts.primary)]]
        for name, held in given.items():
            dtype, shape, _ = self.tensors[name]
            kind = (dtype == torch.bool, dtype.is_floating_point, dtype.is_complex)
            named = named_sizes(torch.empty(shape, device="meta"), *EXAMPLE.values())
            sizes = {"B": lead.shape[0], "L": lead.shape[1]} if isinstance(lead, Tensor) and lead.dim() > 1 else {}
            expected = [sizes.get(size, size) if isinstance(size, str) else size for size in named]
            alike = isinstance(held, Tensor) and [*held.shape] == expected
            if not alike or (held.dtype == torch.bool, held.is_floating_point(), held.is_complex()) != kind:
                found = f"{held.dtype} {tuple(held.shape)}" if isinstance(held, Tensor) else type(held).__name__
                raise InputError(
                    f"{self.name} was captured with {name} ({', '.join(map(str, named))}) of {dtype}, that is "
                    f"{tuple(expected)} in this call; found {found}. Pass such a tensor, or transform the module again "
                    "with example_inputs like this call's."
                )

    def _fixed(self, name: str, held: Any) -> bool:
        """Whether an argument is a number, flag or word that the program was captured with, and holds."""
        known = self.constants.get(name)
        return known is not None and type(known) is type(held) and known == held

    def finish(self, inputs: list[Any], flat: Any) -> Any:
        """The module's result; what was kept is remembered."""
        captured = self.built.captured
        lead, mask = inputs[captured.inputs.index(captured.facts.primary)], self._mask(inputs)
        values, kept = flat[: captured.facts.values], flat[captured.facts.values :]
        real, step = (None, 1) if mask is None else (kept[1::2], 2)
        self.last = LastCall(lead.shape[0], lead.shape[1], self.built, kept[::step], real, mask)
        return pytree.tree_unflatten(list(values), captured.out_spec)

    def _mask(self, inputs: list[Any]) -> Tensor | None:
        """The padding mask of a call, other than 0 where a token is real."""
        captured = self.built.captured
        if captured.facts.mask is None:
            return None
        mask: Tensor = inputs[captured.inputs.index(captured.facts.mask)]
        return mask if self.options.mask_marks == "real" else mask == 0


def _told(autocast: torch.dtype | None) -> str:
    return "off" if autocast is None else f"to {name_of(autocast)}"


class PlainProgram(Program):
    """A program that is called as the module was that it came from, over a copy of the module's tree."""

    _simba_run: Any = None
    """Its generated forward, which takes and gives what is flat."""

    def read_from(self, root: nn.Module) -> None:
        super().read_from(root)
        self.__dict__.update({name: root.__dict__[name] for name in _HOOKS})

    def recompile(self) -> Any:
        """Also by a user who edited the graph; the program is called as before."""
        code = super().recompile()
        if (runtime := self.__dict__.get("_simba")) is not None:
            _call_as_module(self, runtime)
        return code

    def state(self) -> tuple[fx.Graph, dict[str, Any], tuple[str, ...], tuple[str, ...]]:
        """What this program runs; see `become`."""
        return self.graph, {**self._blocks(), **self._own}, self._targets, self._top

    def become(self, state: tuple[fx.Graph, dict[str, Any], tuple[str, ...], tuple[str, ...]]) -> None:
        """Run what another program runs, over the same modules."""
        graph, held, targets, top = state
        for path in (*self._blocks(), *self._own):
            del self.__dict__[path]
        own = {path: found for path, found in held.items() if not isinstance(found, Block)}
        self.__dict__.update(held, _own=own, _targets=targets, _top=top)
        self.graph = graph
        self.read_from(self._simba_root)

    def _apply(self, fn: Any, recurse: bool = True) -> PlainProgram:
        """What is no part of the model moves with it."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for path, held in self._own.items():
            moved: Any = held._apply if isinstance(held, nn.Module) else None
            self.__dict__[path] = fn(held) if moved is None else moved(fn)
        self.__dict__["_own"] = {path: self.__dict__[path] for path in self._own}
        return self

    def train(self, mode: bool = True) -> PlainProgram:
        """As of any module; the graph follows."""
        super().train(mode)
        self._simba_root.training = mode
        if (runtime := self.__dict__.get("_simba")) is not None:
            runtime.follow()
        return self

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise SimbaError(
            f"The program of a plain module ({self.__dict__['_simba'].name}) cannot be pickled, and so not go "
            "through torch.save or to another process; expected its state_dict(), or a folder. Write "
            "simba_fx.save(sparse, folder), and simba_fx.load(folder, module) there."
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> PlainProgram:
        """A copy over copies of the parameters, with a runtime of its own."""
        runtime: PlainRuntime = self.__dict__["_simba"]
        program = replace(runtime, graphs=[], store={}).start(copy.deepcopy(self._simba_root, memo), runtime.graphs[-1])
        memo[id(self)] = program
        return program


_HOOKS = tuple(name for name in vars(nn.Module()) if "hooks" in name)


def owns(model: nn.Module) -> bool:
    return True


def install(model: nn.Module, options: Options, example: Any) -> fx.GraphModule:
    """Capture `model` and return its program, callable as the module was."""
    signature = inspect.signature(model.forward)
    inputs = _examples(model, signature, example)
    wide = [name for name, value in inputs.items() if isinstance(value, Tensor) and value.dim() >= 2]
    texts = [name for name in wide if name != options.mask and not _like_a_mask(name, inputs[name])]
    primary = (texts or wide)[0]
    mask = _stated_mask(type(model).__name__, inputs, primary, options)
    device = next(held.device for held in inputs.values() if isinstance(held, Tensor))
    tensors = {name: (held.dtype, tuple(held.shape), held.device) for name, held in inputs.items()
               if isinstance(held, Tensor)}  # fmt: skip
    constants = {name: held for name, held in inputs.items() if name not in tensors}
    refuse_other_forwards(model)
    runtime = PlainRuntime(options, type(model).__name__, signature, autocast_dtype(device), tensors, constants,
                           primary, mask, BudgetCost(None), stored_with(model))  # fmt: skip
    with one_at_a_time():
        return runtime.start(copies_of(model)[model])


def _call_as_module(program: Any, runtime: PlainRuntime) -> None:
    """Give the program the module's signature: flat inputs and outputs are bound and unbound around its code."""
    program.__dict__["_simba"] = runtime
    runtime.held = program
    cls = type(program)
    blocks = runtime.options.compile == "blocks"
    python: Callable[[Any], Any] = disable_compile if blocks else lambda function: function
    prepare, finish, mark = python(PlainRuntime.prepare), python(PlainRuntime.finish), dynamic_marker()
    refuse, run = python(exporting.refuse_onnx), cls.forward

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        inputs = prepare(runtime, args, kwargs)
        if blocks:
            mark(inputs, ((0, 1),) * len(inputs))
        refuse()
        return finish(runtime, inputs, self._simba_run(self, *inputs))

    outer: Any = skip_frame(forward) if blocks else forward
    own = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    outer.__signature__ = runtime.signature.replace(parameters=[own, *runtime.signature.parameters.values()])
    cls._simba_run, cls.forward = staticmethod(run), outer
    program.graph.set_codegen(CallsOfModule(runtime.prepare, runtime.finish))


def _examples(model: nn.Module, signature: inspect.Signature, example: Any) -> dict[str, Any]:
    """Example tensors by argument name, resized so that B ≠ L."""
    name = type(model).__name__
    if example is None:
        first = next(iter(signature.parameters))
        if not any(isinstance(module, nn.Embedding) for module in model.modules()):
            raise CaptureError(
                f"{name} is a plain module without an embedding; expected example_inputs=(tensor, ...) "
                "with the arguments of its forward, (B, L, ...) with B ≠ L. Pass them to transform."
            )
        device = next(model.parameters()).device
        return {first: torch.zeros(EXAMPLE["B"], EXAMPLE["L"], dtype=torch.int64, device=device)}
    args, kwargs = ((), example) if isinstance(example, Mapping) else (tuple(example), {})
    try:
        bound = dict(signature.bind(*args, **kwargs).arguments)
    except TypeError as error:
        raise CaptureError(
            f"example_inputs do not fit {name}.forward{signature}: {error}. Pass the arguments of a call, for example "
            "(torch.zeros(2, 24, 8),)."
        ) from error
    lead = next((v for v in bound.values() if isinstance(v, Tensor) and v.dim() >= 2), None)
    if lead is None:
        found = ", ".join(f"{key}: {type(value).__name__}" for key, value in bound.items())
        raise CaptureError(
            f"example_inputs must hold at least one tensor (B, L, ...); found {found or 'none'}. Pass the arguments of "
            f"{name}.forward, for example (torch.zeros(2, 24, 8),)."
        )
    rows, length = lead.shape[:2]
    return {key: _resized(value, rows, length) for key, value in bound.items() if value is not None}


def _stated_mask(model: str, inputs: Mapping[str, Any], primary: str, options: Options) -> str | None:
    """The name of the argument that is a padding mask, as the caller states it.

    Raises:
        InputError: it is no argument `(B, L)`; or nothing is stated, and there are arguments that may be one.
    """
    told = options.mask
    if isinstance(told, str):
        held = inputs.get(told)
        if not isinstance(held, Tensor) or tuple(held.shape) != tuple(EXAMPLE.values()) or told == primary:
            found = ", ".join(f"{name} {tuple(h.shape)}" for name, h in inputs.items() if isinstance(h, Tensor))
            raise InputError(
                f"mask={told!r}: expected the name of an argument (B, L) beside {primary} among the example_inputs of "
                f"{model}; found {found}. Pass an example of the mask in example_inputs, or its right name."
            )
        return told
    alike = [name for name, held in inputs.items() if name != primary and _like_a_mask(name, held)]
    if alike and told is None:
        raise InputError(
            f"{model} has the argument {alike[0]}, which may be a padding mask, and was not told; expected it "
            "to be stated, since a mask that is taken for text, or in the wrong sense, changes results. Pass "
            f"mask={alike[0]!r} to transform if values other than 0 mark real tokens, mask={alike[0]!r}, "
            "mask_marks='padding' if they mark padding, or mask=False if no argument says what is padding."
        )
    return None


def _like_a_mask(name: str, held: Any) -> bool:
    if not isinstance(held, Tensor):
        return False
    named = any(word in name.lower() for word in _LIKE_A_MASK)
    rows, length = EXAMPLE.values()
    return (held.dim() == 2 and tuple(held.shape) == (rows, length) and (named or held.dtype == torch.bool)) or (
        named and tuple(held.shape) == (rows,)
    )


def _resized(value: Any, rows: int, length: int) -> Any:
    if not isinstance(value, Tensor):
        return value
    sizes = [EXAMPLE[size] if isinstance(size, str) else size for size in named_sizes(value, rows, length)]
    return torch.zeros(sizes, dtype=value.dtype, device=value.device)
