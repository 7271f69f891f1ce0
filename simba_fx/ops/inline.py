"""On a GPU, `torch.compile` looks into our operators; everywhere else they are one opaque call each.

`torch.library.triton_op` does this for every device, which is no use here: on a CPU the same operators call C++. So the
operators stay `torch.library.custom_op`s, and the rule below takes its part. An exported program keeps the operators,
as it does those of `triton_op`.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._library.custom_ops import CustomOpDef
from torch._subclasses.functional_tensor import FunctionalTensorMode

from simba_fx.ops import backends


def inline_on_gpu(operator: CustomOpDef, traceable: Callable[..., bool]) -> None:
    """When `torch.compile` traces a call on CUDA tensors of which `traceable(*arguments)` holds, it traces the body.

    The body then consists of PyTorch's operators and of Triton kernels launched with `triton.common.launch`.
    """
    body = operator._init_fn

    def rule(mode: Any, called: Any, types: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not _on_gpu(args) or _exporting() or not traceable(*args, **kwargs):
            return mode.__torch_dispatch__(called, types, args, kwargs)
        with mode, backends.traced():
            return body(*args, **kwargs)

    operator.register_torch_dispatch(FunctionalTensorMode, rule)
    _name_kernels(operator._opoverload._opname, operator._opoverload._name)


def never(*_: Any) -> bool:
    """Of an operator whose body has sizes that are numbers of chunks, or loops over them: torch would guard on these,
    and compile it again."""
    return False


def differentiated(function: Callable[..., tuple[Tensor, ...]], operands: Sequence[Tensor],
                   arriving: Sequence[Tensor]) -> tuple[Tensor, ...]:  # fmt: skip
    """Gradients of `operands` from those that arrive at the results of `function(*operands)`, inside of an operator.

    The body of an operator runs with autograd's dispatch keys excluded; here they are not, nor, as in graphs that
    AOTAutograd made, the one by which a write into a view reaches what is viewed. What is saved meanwhile is nobody
    else's business (hooks that move saved tensors elsewhere).
    """
    keys = torch._C.DispatchKeySet
    views = keys(torch._C.DispatchKey.ADInplaceOrView)
    autograd = functools.reduce(lambda a, b: a | keys(b), _AUTOGRAD, views)
    include = torch._C._dispatch_tls_local_include_set() | views
    exclude = torch._C._dispatch_tls_local_exclude_set() - autograd
    own = torch.autograd.graph.saved_tensors_hooks(_as_it_is, _as_it_is)
    with torch.inference_mode(False), torch._C._ForceDispatchKeyGuard(include, exclude), torch.enable_grad(), own:
        leaves = [(x.clone() if x.is_inference() else x.detach()).requires_grad_() for x in operands]
        arriving = [x.clone() if x.is_inference() else x for x in arriving]
        return torch.autograd.grad(function(*leaves), leaves, arriving, allow_unused=True, materialize_grads=True)


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor


_AUTOGRAD = [getattr(torch._C.DispatchKey, name) for name in ("AutogradFunctionality", "AutogradCPU", "AutogradCUDA")]


def _on_gpu(args: tuple[Any, ...]) -> bool:
    return any(isinstance(argument, Tensor) and backends.on_gpu(argument) for argument in args)


def _exporting() -> bool:
    import torch._functorch.config

    return not torch._functorch.config.decompose_custom_triton_ops


def _name_kernels(name: str, full_name: str) -> None:
    """What a call becomes is part of what AOTAutograd's cache looks a graph up by, so that no cache outlives it.

    That is the kernels' sources and `circumstances`. Torch asks for them where it can import Triton, without which it
    compiles nothing for a GPU; on a CPU without Triton its cache does not see that this package has changed.
    """

    class Kernels:
        def __iter__(self) -> Iterator[Any]:
            yield _Note(circumstances())
            found = backends.triton_kernels()
            yield from () if found is None else found.KERNELS.get(name, ())

    known: Any = torch._library.triton.triton_ops_to_kernels
    known[full_name] = Kernels()


class _Note:
    """Text in the place of a kernel: as much of `triton.JITFunction` as torch reads to hash a source."""

    __name__ = "simba_fx_circumstances"

    def __init__(self, text: str) -> None:
        self.src = text

    @staticmethod
    def fn() -> None: ...


def circumstances() -> str:
    """What decides how a call is traced, besides its arguments: our own code. No package decides: mamba_ssm's scan is
    looked for when the operator runs."""
    return f"simba_fx {backends.version('simba_fx')} {_digest()}"


@functools.cache
def _digest() -> str:
    """SHA-256 of the sources in this folder."""
    folder, digest = Path(__file__).parent, hashlib.sha256()
    for source in sorted(folder.rglob("*.py")):
        digest.update(f"{source.relative_to(folder)}\n".encode() + source.read_bytes())
    return digest.hexdigest()
