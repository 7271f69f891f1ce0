"""What is different while `torch.export` traces a transformed model.

Non-strict export, the default, runs the model's Python with stand-ins: every parameter of the module that is exported
is replaced, where it is registered, by a fake tensor that records what is done to it; a program reads its tensors
there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from simba_fx.compiling import exported, recorded
from simba_fx.errors import CaptureError

__all__ = ["CallsOfModule", "refuse_onnx"]


def _is_for_onnx() -> bool:
    return torch.onnx.is_in_onnx_export()


torch.compiler.assume_constant_result(_is_for_onnx)  # type: ignore[no-untyped-call]  # else Dynamo takes it for False


def refuse_onnx() -> None:
    """Raises: CaptureError: under `torch.onnx.export`."""
    if recorded() and _is_for_onnx():
        raise CaptureError(
            "A sparse model was given to torch.onnx.export; expected torch.export.export, because the operators that "
            "choose and take tokens have no counterpart in ONNX. Export the dense model to ONNX, or the sparse one by "
            "torch.export.export(model, ..., strict=False)."
        )


class CallsOfModule(fx.graph.CodeGen):
    """Lets `torch.export` call a plain module's program as the module is called.

    It does not call a GraphModule's `forward` but interprets the graph, whose inputs and outputs are flat, and asks the
    graph's code generator, this one, what to make of arguments and results.
    """

    def __init__(self, prepare: Callable[..., list[Any]], finish: Callable[..., Any]) -> None:
        super().__init__()
        self.prepare, self.finish = prepare, finish
        self.open: list[Any] | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> fx.graph.CodeGen:
        """Of a graph that is copied alone: it is called with flat inputs."""
        return fx.graph.CodeGen()

    def process_inputs(self, *args: Any) -> Any:
        if not exported():
            return args
        refuse_onnx()
        self.open = self.prepare(args, {})
        return self.open

    def process_outputs(self, outputs: Any) -> Any:
        if self.open is None:
            return outputs
        inputs, self.open = self.open, None
        return self.finish(inputs, outputs)
