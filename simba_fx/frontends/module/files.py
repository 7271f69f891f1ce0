"""The files of a plain module: its weights, and what it was captured with."""

from __future__ import annotations

import os
import pickle
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from simba_fx.errors import SimbaError
from simba_fx.frontends.files import DTYPES, FILE, name_of

__all__ = ["KEYS", "describe", "read", "write"]

KEYS = frozenset({"example_inputs"})
WEIGHTS = "weights.pt"


def describe(model: nn.Module) -> dict[str, Any]:
    runtime: Any = model.__dict__["_simba"]
    tensors = {name: {"dtype": name_of(dtype), "shape": list(shape)}
               for name, (dtype, shape, _) in runtime.tensors.items()}  # fmt: skip
    constants = {name: _constant(name, held) for name, held in runtime.constants.items()}
    return {"class": runtime.name, "example_inputs": tensors | constants}


def write(model: nn.Module, folder: Path) -> None:
    with tempfile.TemporaryDirectory(dir=folder, prefix=".simba_fx-") as beside:
        torch.save(dict(model.state_dict()), Path(beside) / WEIGHTS)
        os.replace(Path(beside) / WEIGHTS, folder / WEIGHTS)


def read(folder: Path, written: Mapping[str, Any], model: Any, kwargs: Mapping[str, Any]) -> tuple[Any, Any]:
    if kwargs:
        raise SimbaError(
            f"load passes {', '.join(kwargs)} on to from_pretrained, which a plain module does not have; expected "
            "no further arguments. Call .to() on the result."
        )
    examples = _example_inputs(written["example_inputs"], model)
    _put_weights(model, folder / WEIGHTS)
    return model, examples


def _constant(name: str, held: Any) -> Any:
    """An example argument of a plain module that is no tensor."""
    if held is None or isinstance(held, bool | int | float | str):
        return {"value": held}
    raise SimbaError(
        f"The module was transformed with {name}={held!r} among its example_inputs, which {FILE} cannot hold; expected "
        "tensors, numbers, flags and words. Save its state_dict(), and simba_fx.transform after loading."
    )


def _example_inputs(written: Any, model: Any) -> dict[str, Any]:
    """Example arguments of a plain module, on its device."""
    device = next((held.device for held in (*model.parameters(), *model.buffers())), None)
    try:
        return {
            name: _constant(name, held["value"])["value"]
            if "value" in held
            else torch.zeros(held["shape"], dtype=DTYPES[held["dtype"]], device=device)
            for name, held in written.items()
        }
    except (KeyError, TypeError, AttributeError, RuntimeError) as error:  # RuntimeError: sizes below 0, or too large
        raise SimbaError(
            f'{FILE}, example_inputs: expected {{"dtype": ..., "shape": [...]}} or {{"value": ...}} for each argument; '
            f"found {written}. Correct it, or transform the dense module."
        ) from error


def _put_weights(model: Any, file: Path) -> None:
    """Give a module the saved weights. It is looked over before it is changed.

    Raises:
        SimbaError: no such file; other names or shapes than the module's.
    """
    if not file.is_file():
        raise SimbaError(f"{file} is missing; expected the weights that simba_fx.save wrote. Save the model again.")
    try:
        saved: dict[str, Tensor] = torch.load(file, map_location="cpu", weights_only=True)
        if not isinstance(saved, dict) or not all(isinstance(held, Tensor) for held in saved.values()):
            raise TypeError("it holds other things than tensors by their names")
    except (RuntimeError, TypeError, ValueError, EOFError, KeyError, pickle.UnpicklingError) as error:
        raise SimbaError(
            f"{file} cannot be read ({type(error).__name__}); expected the weights that simba_fx.save wrote. Save the "
            "model again."
        ) from error
    own = model.state_dict(keep_vars=True)
    wrong = [f"{name} is missing" for name in own if name not in saved]
    wrong += [f"{name} is unknown" for name in saved if name not in own]
    wrong += [
        f"{name} has shape {tuple(held.shape)}, expected {tuple(own[name].shape)}"
        for name, held in saved.items()
        if name in own and held.shape != own[name].shape
    ]
    if wrong:
        raise SimbaError(
            f"{file} does not hold the weights of this {type(model).__name__}: {wrong[0]}"
            + (f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else "")
            + ". Make the module with the sizes that it was saved with."
        )
    for name, held in saved.items():  # in place: tied weights stay tied
        if own[name].dtype is not held.dtype:
            own[name].data = own[name].data.to(held.dtype)
    model.load_state_dict(saved)
