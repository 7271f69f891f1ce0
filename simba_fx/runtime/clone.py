"""A sparse model beside an existing one: a copy of its module tree over the same parameters, and subclasses.

`isinstance`, `state_dict` keys, names and signatures stay true; hooks and modes of one tree do not reach the other.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
import itertools
import types
import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import nn

from simba_fx.compiling import dynamic_marker, is_compiled_method, skip_frame, skip_frame_unless_inlined
from simba_fx.errors import CaptureError, InputError
from simba_fx.runtime.fingerprint import hooks_of
from simba_fx.runtime.fsdp import dense_class, is_hook, is_sharded, own_class, state_of, whole_shape

__all__ = ["adopt_block", "clone_around", "copies_of", "copy_to_trace", "dense_again", "own_forward", "refuse_replicas",
           "subclass"]  # fmt: skip

_classes: weakref.WeakValueDictionary[tuple[type, str], type] = weakref.WeakValueDictionary()


def clone_around(model: nn.Module, runtime: Any, stack_class: type, blocks: bool) -> nn.Module:
    """A sparse copy of `model`, whose block stack `runtime.stack` (it may be `model` itself) becomes a `stack_class`.

    The clone's stack finds the runtime and the runtime finds the clone's stack. `blocks`: what surrounds the stack is
    compiled for every batch and length (`compile="blocks"`).
    """
    refuse_other_forwards(model, runtime.stack)
    refuse_other_forwards(runtime.stack)
    copies = copies_of(model, runtime.stack)
    clone, inner = copies[model], copies[runtime.stack]
    inner.__class__ = stack_class
    inner.__dict__["_simba"] = clone.__dict__["_simba"] = runtime
    if blocks and clone is not inner:
        clone.__class__ = _outer_class(type(clone))
    runtime.stack = inner
    return clone


def copies_of(*roots: nn.Module) -> dict[nn.Module, nn.Module]:
    """Module trees of their own over the same parameters and buffers: for each module of these trees its copy.

    Hooks, modes (`train`, `eval`) and submodules of one tree do not reach the other. A module that occurs twice occurs
    twice in the copy.
    """
    containers: dict[int, Any] = {}
    copies = {module: _shallow(module, containers) for root in roots for module in root.modules()}
    for clone in copies.values():
        for name, child in clone._modules.items():
            clone._modules[name] = None if child is None else copies[child]
        _rebind_methods(clone, copies)
    return copies


def _rebind_methods(clone: nn.Module, copies: Mapping[nn.Module, nn.Module]) -> None:
    """Methods that were put on a module, among its hooks or its attributes (PEFT does), belong to the copy as well."""

    def rebound(held: Any) -> Any:
        owner: Any = held.__self__ if isinstance(held, types.MethodType) else None
        if isinstance(owner, nn.Module) and owner in copies:
            return types.MethodType(held.__func__, copies[owner])
        if type(held).__name__ == "_WrappedHook":  # of torch.nn; it remembers its module weakly
            return type(held)(rebound(held.hook), clone if held.with_module else None)
        return held

    for name, held in clone.__dict__.items():
        clone.__dict__[name] = rebound(held)
        if name.endswith("_hooks") and isinstance(held, dict):
            for key, hook in held.items():
                held[key] = rebound(hook)


def refuse_other_forwards(root: nn.Module, stack: nn.Module | None = None) -> None:
    """Raises: CaptureError: a module is run by a function that knows that object only, and no copy of it.

    Args:
        root: whose modules are looked at; `stack`: the block stack in it, if it is another.
    """
    inside = frozenset() if stack is None else frozenset(stack.modules()) - {stack}
    for path, module in root.named_modules():
        if "_orig_mod" in module._modules:
            raise CaptureError(
                f"{path or 'the model'} is wrapped by torch.compile ({type(module).__name__}); expected modules that "
                "are not compiled inside of a model that is transformed. Take that wrapper off, transform, and compile "
                "the sparse model: torch.compile(sparse) compiles each kind of block once."
            )
        forward = module.__dict__.get("forward")
        if forward is None or "_hf_hook" in module.__dict__ or module in inside:
            continue
        own = isinstance(forward, types.MethodType) and forward.__self__ is module
        if module is stack or (not own and (stack is not None or module is not root)):
            how = "Write it as a forward hook, or as the forward of a subclass and set the module's __class__."
            if stack is not None:
                how = "Transform the model first, and then apply what replaces it."
            raise CaptureError(
                f"The forward of {path or 'the model'} ({type(module).__name__}) was replaced on the object; expected "
                f"the forward of its class, because graphs are captured from a copy of the model. {how}"
            )


def _shallow(module: nn.Module, containers: dict[int, Any]) -> nn.Module:
    """The same parameters, buffers, hooks and submodules in containers of its own; `containers`: copies by the identity
    of what they are of, so that modules that share one share its copy."""
    clone: nn.Module = object.__new__(type(module))  # classes of FSDP and of parametrisations refuse copies
    clone.__dict__.update(_state(module))
    for name, held in clone.__dict__.items():
        if type(held) in (dict, set) or name in _CONTAINERS:
            clone.__dict__[name] = containers.setdefault(id(held), copy.copy(held))
    return clone


_CONTAINERS = frozenset(name for name, held in vars(nn.Module()).items() if isinstance(held, dict | set))
"""Of every module. Mostly plain, but `del model.layers[i]` leaves an `OrderedDict`, and hooks come in one."""


def copy_to_trace(stack: nn.Module, live: Iterable[nn.Module]) -> nn.Module:
    """A copy of a module tree to capture from. Tracing puts fake tensors into the modules, which other threads may be
    using; and of a sharded stack it has to see whole parameters (without memory), and no hooks of FSDP.

    Args:
        live: modules that are called while the graph runs: their hooks are no part of it.

    Raises:
        CaptureError: accelerate moves the weights of a module, or a module has another forward than its class's.
    """
    refuse_offloaded(stack)
    refuse_other_forwards(stack)
    copies = copies_of(stack)
    _make_whole(stack, copies, None)
    for clone in copies.values():
        if "gradient_checkpointing" in clone.__dict__:  # a graph is recomputed as a block, not in it
            clone.__dict__["gradient_checkpointing"] = False
    for module in live:
        clone, known = copies[module], hooks_of(module)
        for hooks in (clone._forward_pre_hooks, clone._forward_hooks):
            for key in [key for key, hook in hooks.items() if any(hook is other for other in known)]:
                del hooks[key]
    return copies[stack]


def refuse_offloaded(stack: nn.Module) -> None:
    """Hooks of accelerate move weights or inputs between devices around each module, and a graph calls no modules."""
    for path, module in stack.named_modules():
        if "_hf_hook" in module.__dict__:
            raise CaptureError(
                f"{path or type(stack).__name__} is dispatched by accelerate ({type(module._hf_hook).__name__}): its "
                "weights or inputs move between devices around each module. Expected the block stack on one device: "
                "load with device_map={'': device}, or spread it with torch.distributed.fsdp.fully_shard after "
                "simba_fx.transform."
            )


def _make_whole(module: nn.Module, copies: Mapping[nn.Module, nn.Module], state: Any) -> None:
    clone, state = copies[module], state_of(module) or state
    if state is not None:
        clone.__class__ = own_class(module)
        for hooks in (clone._forward_pre_hooks, clone._forward_hooks):
            for key in [key for key, hook in hooks.items() if is_hook(hook)]:
                del hooks[key]
        clone._parameters = {
            name: whole_shape(held, state) if held is not None and is_sharded(held) else held
            for name, held in module._parameters.items()
        }
    for child in module._modules.values():
        if child is not None:
            _make_whole(child, copies, state)


def subclass(cls: type[nn.Module], kind: str, forward: Callable[..., Any], **members: Any) -> type:
    """A subclass of a model's class, under its name and with its signature, with a forward and members of ours."""
    ours: Any = _classes.get((cls, kind))
    if ours is None:
        if forward is not cls.forward:
            forward.__signature__ = inspect.signature(cls.forward)  # type: ignore[attr-defined]
            forward.__doc__ = cls.forward.__doc__
        names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "_simba_class": True}
        ways = {"__reduce_ex__": _pickled, "__copy__": _shallow_copy, "__deepcopy__": _deep_copy,
                "_replicate_for_data_parallel": refuse_replicas}  # fmt: skip
        ours = _classes[cls, kind] = type(cls.__name__, (cls,), {**names, **ways, **members})
        ours.forward = forward  # after transformers has wrapped it
    return ours  # type: ignore[no-any-return]


def adopt_block(module: nn.Module) -> None:
    """Let a block of a sparse model run the code of a program between its hooks, where it is told so by a keyword;
    other calls (a decoding step) run the forward of its class."""
    cls: Any = type(module)
    if hasattr(cls, "_simba_block"):
        return
    own = cls.forward

    def forward(self: Any, *args: Any, _simba: Any = None, **kwargs: Any) -> Any:
        return own(self, *args, **kwargs) if _simba is None else _simba(self, args)

    module.__class__ = subclass(cls, "block", skip_frame_unless_inlined(forward), _simba_block=True,
                                __reduce_ex__=_pickled_alone, __init_subclass__=_as_it_is)  # fmt: skip


def refuse_replicas(self: nn.Module) -> Any:
    """`nn.DataParallel` asks every module for a replica. The code of a program would go on reading the original."""
    raise InputError(
        f"DataParallel copies this {type(self).__name__} to several devices in one process, and a sparse model runs on "
        "one; expected a process for each device. Launch with torchrun (DistributedDataParallel or fully_shard), or "
        "let the process see one device (CUDA_VISIBLE_DEVICES=0). The Trainer of transformers uses DataParallel where "
        "it sees several."
    )


def _as_it_is(cls: type) -> None:
    """transformers wraps the forward of each subclass of a layer, those that `fully_shard` makes among them, so that
    it is recomputed in backward. Kinds see to that themselves."""


def _pickled_alone(self: nn.Module, protocol: Any) -> Any:
    """A block of a sparse model by itself is the dense model's."""
    return dense_again(self).__reduce_ex__(protocol)


def _pickled(self: nn.Module, protocol: Any) -> Any:
    """A sparse model is pickled as the dense model and what was asked for, and transformed again."""
    return _transformed_again, (dense_again(self), self.__dict__["_simba"].options)


def dense_again(sparse: nn.Module) -> nn.Module:
    """A copy over the same parameters with nothing of ours in it."""
    copies = copies_of(sparse)
    for clone in copies.values():
        clone.__class__ = dense_class(clone)
        for name in [name for name in clone.__dict__ if name.startswith("_simba")]:
            del clone.__dict__[name]
        _without_recorders(clone)
    return copies[sparse]


def _without_recorders(clone: nn.Module) -> None:
    """transformers puts hooks that cannot be pickled on its modules with the first call for hidden states or router
    logits, and puts them there again where they are missing."""
    clone.__dict__.pop("_output_capturing_hooks_installed", None)
    for key, hook in list(clone._forward_hooks.items()):
        if getattr(hook, "__module__", "") == "transformers.utils.output_capturing":
            del clone._forward_hooks[key]


def _transformed_again(model: nn.Module, options: Any) -> nn.Module:
    import simba_fx

    given = {field.name: getattr(options, field.name) for field in dataclasses.fields(options)}
    sparse: nn.Module = simba_fx.transform(model, given.pop("schedule"), **given)
    return sparse


def _state(module: nn.Module) -> dict[str, Any]:
    """What a copy starts with: not what `module.compile()`, or transformers for the steps of `generate`, made of the
    original, which would go on running that."""
    return {name: held for name, held in module.__dict__.items() if not is_compiled_method(held)}


def _shallow_copy(self: Any) -> Any:
    clone = object.__new__(type(self))
    clone.__dict__.update(_state(self))
    return clone


def _deep_copy(self: Any, memo: dict[int, Any]) -> Any:
    clone = memo[id(self)] = object.__new__(type(self))
    clone.__dict__.update(copy.deepcopy(_state(self), memo))
    return clone


def own_forward(stack: nn.Module) -> Callable[..., Any]:
    """The forward that the model's class defines, also for a stack that is already sparse."""
    classes: Any = type(stack).__mro__  # FSDP mixes a class in before ours
    ours = max((i for i, cls in enumerate(classes) if cls.__dict__.get("_simba_class")), default=-1)
    cls = classes[ours + 1]
    forward: Callable[..., Any] = cls.forward.__get__(stack)
    return forward


def _outer_class(cls: type[nn.Module]) -> type:
    """The class of what stands around a sparse stack: its own forward, compiled once for every batch and length."""
    own, mark = cls.forward, dynamic_marker()

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        mark((*args, *kwargs.values()), itertools.repeat((0, 1)))
        return own(self, *args, **kwargs)

    return subclass(cls, "outer", skip_frame(forward))
