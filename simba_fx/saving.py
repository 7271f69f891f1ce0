"""A sparse model in a folder: the dense model's own files, and beside them `simba_fx.json`, how it was made sparse.

Plain libraries read the folder as the dense model, since a sparse model has the same class, configuration and weights.
The JSON file is meant to be read, and may be edited: shares that were written as fractions are strings ("1/10"), and
the shares that they come to are listed, block by block.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import json
import os
import pickle
import shutil
import tempfile
import uuid
from collections.abc import Callable, Mapping
from fractions import Fraction
from numbers import Rational, Real
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from simba_fx import schedule
from simba_fx.api import program, runtime_of, transform
from simba_fx.errors import ScheduleError, SimbaError
from simba_fx.frontends import mamba_ssm as mixer_model
from simba_fx.frontends.transformers import model as huggingface
from simba_fx.options import Criterion, Options
from simba_fx.runtime.fsdp import dense_class, is_sharded
from simba_fx.untrusted import (
    IMPLEMENTATIONS,
    check_config,
    check_files,
    check_implementations,
    read_json,
    scanning_class,
)

__all__ = ["load", "save"]

FORMAT = 1
FILE = "simba_fx.json"
WEIGHTS = "weights.pt"
"""Of a plain module; the libraries' models have files of their own."""
LIBRARIES = ("transformers", "mamba_ssm", "torch")
_SCHEDULES: dict[str, type[Any]] = {
    cls.__name__: cls
    for cls in (schedule.Linear, schedule.Cosine, schedule.Constant, schedule.Dense, schedule.Stages, schedule.Explicit)
}
_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in vars(torch).values() if isinstance(dtype, torch.dtype)}
_FLOATS = ("float32", "bfloat16", "float16", "float64")
_LONGEST = 1000
"""Characters of a share: more than any that a schedule comes to."""


def save(sparse: nn.Module, directory: str | os.PathLike[str]) -> None:
    """Write a sparse model into a folder: the dense model's files, and `simba_fx.json`, the options of `transform`.

    The folder stays one of the dense model: `from_pretrained` of transformers or mamba_ssm reads it as before. Weights
    are written by the model's own `save_pretrained`; those of a plain module with `torch.save`. A `Budget`, and a
    schedule that is a function or an object of yours, are written as the shares that they came to: a saved model keeps
    the tokens that it kept, also where a later version counts FLOPs differently, and no code has to be found again. A
    criterion that is a function is written as its name, and `load` asks for the function.

    A new folder appears at once, whole. In a folder that exists, `simba_fx.json` goes first and comes back last, so
    that an interrupted call leaves no sparse model with other weights.

    Args:
        sparse: what `transform` returned, compiled or not.
        directory: the folder; it is made if there is none.

    Raises:
        SimbaError: not the result of `transform` itself; a PEFT model, sharded weights, or a class that its library
            cannot load; arguments of a plain module that cannot be written; `directory` is a file. Nothing is written.
    """
    model = getattr(sparse, "_orig_mod", sparse)
    library, runtime = _library_of(model), runtime_of(model)
    folder = Path(directory)
    if folder.exists() and not folder.is_dir():
        raise SimbaError(f"save expects a folder; found the file {folder}. Name another place.")
    text = json.dumps(_described(model, runtime, library), indent=2, ensure_ascii=False) + "\n"
    if folder.exists():
        (folder / FILE).unlink(missing_ok=True)
        _write(model, library, folder)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".simba_fx-") as beside:
            (Path(beside) / FILE).write_text(text, encoding="utf-8")
            os.replace(Path(beside) / FILE, folder / FILE)
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    staged = folder.parent / f".{folder.name}-{uuid.uuid4().hex}"
    staged.mkdir()  # not tempfile's: that would be its owner's alone
    try:
        _write(model, library, staged)
        (staged / FILE).write_text(text, encoding="utf-8")
        os.replace(staged, folder)
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def load(directory: str | os.PathLike[str], model: nn.Module | None = None, *, criterion: Criterion | None = None,
         **kwargs: Any) -> Any:  # fmt: skip
    """The sparse model that `save` wrote: the same class, weights, options and kept tokens, hence the same bits.

    Args:
        directory: the folder.
        model: of a plain module, a dense instance of its class. Its weights become the saved ones, in their dtypes, on
            the device where it is; the result shares them. For models of transformers and mamba_ssm: none.
        criterion: the function, where the model was saved with one.
        kwargs: handed on to `from_pretrained`: `dtype` (else as saved), `device` (mamba_ssm), `device_map`, …

    Returns:
        What `transform` returns for such a model.

    Raises:
        SimbaError: no such folder; no or no usable `simba_fx.json`; a `model` where there should be none or the other
            way round, or one whose weights are others; a missing `criterion`.
        ScheduleError: shares for another number of blocks.

    A folder may be a stranger's: whatever its files say, no code of it or of a hub's runs, no pickled object is built,
    and no file outside of it is read. What `kwargs` say is yours to answer for.
    """
    folder = Path(directory)
    written = _read(folder)
    options = _options(written, criterion)
    library = written["library"]
    if (model is None) == (library == "torch"):
        raise SimbaError(
            f"{folder} holds a plain module ({written['class']}), and load was given none to put its weights into; "
            f"expected a dense instance. Write simba_fx.load(directory, {written['class']}(...))."
            if library == "torch"
            else f"{folder} holds a {written['class']} of {library}, which load builds itself; expected no model, "
            f"found a {type(model).__name__}. Leave it out."
        )
    examples = {}
    if library == "torch":
        if kwargs:
            raise SimbaError(
                f"load passes {', '.join(kwargs)} on to from_pretrained, which a plain module does not have; expected "
                "no further arguments. Call .to() on the result."
            )
        examples["example_inputs"] = _example_inputs(written["example_inputs"], model)
        _put_weights(model, folder / WEIGHTS)
    else:
        model = _pretrained(folder, written, kwargs)
    named = {field.name: getattr(options, field.name) for field in dataclasses.fields(Options)}
    sparse = transform(model, named.pop("schedule"), **named, **examples)  # type: ignore[arg-type]
    _check_shares(program(sparse).shares, written, folder)
    return sparse


# --- what is written -------------------------------------------------------------------------------------------------


def _library_of(model: nn.Module) -> str:
    """Raises: SimbaError: a model that could not be loaded again."""
    name = type(model).__name__
    if runtime_of(model) is None:
        inside = any(runtime_of(module) is not None for module in model.modules())
        raise SimbaError(
            f"save expects what simba_fx.transform returned; found a {name}"
            + (" that has a sparse model inside. Save that one." if inside else ". Transform the model first.")
        )
    if huggingface.base_of(model) is not model or getattr(model, "_hf_peft_config_loaded", False):
        raise SimbaError(
            f"save writes whole models; found adapters of PEFT on a {name}. Save them with save_pretrained, and "
            "transform again after loading; or merge them first (merge_and_unload)."
        )
    if any(map(is_sharded, model.parameters())):
        raise SimbaError(
            f"save expects a model whose weights are whole; those of this {name} are sharded. Gather them first "
            "(torch.distributed.checkpoint.state_dict)."
        )
    if huggingface.is_pretrained(model):
        import transformers

        if getattr(transformers, name, None) is not dense_class(model):
            raise SimbaError(
                f"{name} is no class that transformers exports, so load could not find it; expected one of its own. "
                "Use the model's save_pretrained, and simba_fx.transform after loading."
            )
        return "transformers"
    if mixer_model.is_mixer(model):
        if not hasattr(model, "save_pretrained"):
            raise SimbaError(
                f"A {name} alone cannot be saved by mamba_ssm; expected the MambaLMHeadModel around it. Use torch.save "
                "on its state_dict(), and simba_fx.transform after loading."
            )
        return "mamba_ssm"
    return "torch"


def _described(model: nn.Module, runtime: Any, library: str) -> dict[str, Any]:
    """All that `load` needs, as JSON."""
    shares = program(model).shares
    written: dict[str, Any] = {"format": FORMAT, "library": library, "class": type(model).__name__}
    if library == "torch":
        written["class"] = runtime.name
        tensors = {
            name: {"dtype": _name(dtype), "shape": list(shape)} for name, (dtype, shape, _) in runtime.tensors.items()
        }
        written["example_inputs"] = tensors | {name: _constant(name, held) for name, held in runtime.constants.items()}
    else:
        written |= _dtypes(model)
    if library == "transformers":
        config: Any = model.config
        chosen = {name: getattr(config, f"_{name}", None) for name in IMPLEMENTATIONS}
        written["implementations"] = {name: held for name, held in chosen.items() if isinstance(held, str)}
    written["options"] = options_to_json(runtime.options, shares)
    written["shares"] = [_number(share) for share in shares]
    return written


def _dtypes(model: nn.Module) -> dict[str, Any]:
    """The dtype of most weights, and which have another; `from_pretrained` knows one for all."""
    names = {name: _name(held.dtype) for name, held in model.state_dict().items() if held.is_floating_point()}
    usual = max(sorted(set(names.values())), key=list(names.values()).count)
    others = {name: dtype for name, dtype in names.items() if dtype != usual}
    return {"dtype": usual, "other_dtypes": others} if others else {"dtype": usual}


def options_to_json(options: Options, shares: tuple[Fraction, ...]) -> dict[str, Any]:
    """Options as JSON holds them; `shares` are what the schedule came to."""
    written = {field.name: getattr(options, field.name) for field in dataclasses.fields(Options)}
    written["schedule"] = _schedule_to_json(options.schedule, shares)
    written["protect"] = list(options.protect)
    if not isinstance(options.criterion, str):
        written["criterion"] = {"function": getattr(options.criterion, "__name__", type(options.criterion).__name__)}
    return written


def options_from_json(written: Mapping[str, Any], criterion: Criterion | None = None) -> Options:
    """Options again. Raises: SimbaError, by what is wrong with them."""
    if isinstance(written, Mapping):
        newer = {"mask": None, "mask_marks": "real", "tail": "last", "pad_token_id": None}  # than the oldest files
        written = newer | dict(written)
    _expect_keys(written, {field.name for field in dataclasses.fields(Options)}, "options")
    given = dict(written)
    given["schedule"] = _schedule_from_json(written["schedule"])
    if isinstance(written["criterion"], dict):
        given["criterion"] = criterion
    return Options(**given)


def _schedule_to_json(plan: Any, shares: tuple[Fraction, ...]) -> dict[str, Any]:
    if _SCHEDULES.get(type(plan).__name__) is not type(plan):
        return {"kind": "Explicit", "values": [_number(share) for share in shares], "made_by": repr(plan)}
    written: dict[str, Any] = {"kind": type(plan).__name__}
    for field in dataclasses.fields(plan):
        held = getattr(plan, field.name)
        if isinstance(held, Mapping):
            held = {str(block): _number(share) for block, share in held.items()}
        elif isinstance(held, tuple):
            held = [_number(share) for share in held]
        else:
            held = _number(held)
        written[field.name] = held
    return written


def _schedule_from_json(written: Any) -> Any:
    kind = written.get("kind") if isinstance(written, dict) else None
    if not isinstance(kind, str) or kind not in _SCHEDULES:
        raise SimbaError(
            f"{FILE}: expected a schedule of kind {', '.join(_SCHEDULES)}; found {kind!r}. Correct it, or transform "
            "the dense model."
        )
    names = {field.name for field in dataclasses.fields(_SCHEDULES[kind])}
    fields = {name: held for name, held in written.items() if name not in ("kind", "made_by")}
    _expect_keys(fields, names, f"schedule {kind}")
    read: dict[str, Any] = {}
    for name, held in fields.items():
        if isinstance(held, dict):
            read[name] = {_block(block): _share(share) for block, share in held.items()}
        else:
            read[name] = [_share(share) for share in held] if isinstance(held, list) else _share(held)
    try:
        return _SCHEDULES[kind](**read)
    except (TypeError, AttributeError) as error:
        raise SimbaError(
            f"{FILE}: {written} is no schedule {kind}: {error}. Correct it, or transform the dense model."
        ) from error


def _number(value: Any) -> Any:
    """A share as JSON: fractions are strings, so that they stay exact."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return int(value) if isinstance(value, int) else float(value)
    if isinstance(value, Rational):
        return str(Fraction(value))
    return float(value) if isinstance(value, Real) else value


def _share(written: Any) -> Any:
    if isinstance(written, int | float) and not isinstance(written, bool) and abs(written) < 2**63:
        return written
    try:
        if isinstance(written, str) and len(written) < _LONGEST and "e" not in written.lower():  # 1e999999999
            return Fraction(written)
    except (ValueError, ZeroDivisionError):
        pass
    raise SimbaError(f'{FILE}: expected a share, a number or a fraction as "1/10"; found {written!r}.')


def _block(written: str) -> int:
    try:
        return int(written)
    except ValueError:
        raise SimbaError(f"{FILE}: expected the number of a block in a schedule Stages; found {written!r}.") from None


def _constant(name: str, held: Any) -> Any:
    """An example argument of a plain module that is no tensor."""
    if held is None or isinstance(held, bool | int | float | str):
        return {"value": held}
    raise SimbaError(
        f"The module was transformed with {name}={held!r} among its example_inputs, which {FILE} cannot hold; expected "
        "tensors, numbers, flags and words. Save its state_dict(), and simba_fx.transform after loading."
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _write(model: nn.Module, library: str, folder: Path) -> None:
    if library == "torch":
        with tempfile.TemporaryDirectory(dir=folder, prefix=".simba_fx-") as beside:
            torch.save(dict(model.state_dict()), Path(beside) / WEIGHTS)
            os.replace(Path(beside) / WEIGHTS, folder / WEIGHTS)
    else:
        saved: Callable[[str], Any] = model.save_pretrained  # type: ignore[assignment]
        saved(str(folder))


# --- what is read ----------------------------------------------------------------------------------------------------


def _read(folder: Path) -> dict[str, Any]:
    """The JSON file, its outer keys checked."""
    if not folder.is_dir():
        raise SimbaError(
            f"load expects a folder that simba_fx.save wrote; found {'a file' if folder.exists() else 'nothing'} at "
            f"{folder}. Check the path."
        )
    if not (folder / FILE).is_file():
        raise SimbaError(
            f"{folder} has no {FILE}, so it holds no sparse model; expected a folder that simba_fx.save wrote. Load "
            "the dense model with its own library and pass it to simba_fx.transform."
        )
    check_files(folder)
    written = read_json(folder / FILE)
    found = written.get("format")
    if found != FORMAT or isinstance(found, bool):
        raise SimbaError(
            f"{folder / FILE} has format {found!r}; this version of simba_fx reads format {FORMAT}. Use the version "
            "that wrote it, or transform the dense model."
        )
    if written.get("library") not in LIBRARIES:
        raise SimbaError(
            f"{FILE}: expected a library among {', '.join(LIBRARIES)}; found {written.get('library')!r}. Correct it, "
            "or transform the dense model."
        )
    keys = {
        "transformers": {"dtype", "implementations"},
        "mamba_ssm": {"dtype"},
        "torch": {"example_inputs"},
    }[written["library"]]
    optional = {"shares", *({"other_dtypes"} if "dtype" in keys else ())} & set(written)
    _expect_keys(written, {"format", "library", "class", "options"} | keys | optional, "file")
    for name, (kind, told) in _KINDS.items():
        if name in written and not isinstance(written[name], kind):
            raise SimbaError(f"{FILE}: expected {name} to be {told}; found {written[name]!r}. {_CORRECT}")
    for name in ([written["dtype"]] if "dtype" in keys else []) + list(written.get("other_dtypes", {}).values()):
        if name not in _FLOATS:
            raise SimbaError(f"{FILE}: expected a dtype among {', '.join(_FLOATS)}; found {name!r}. {_CORRECT}")
    return written


_CORRECT = "Correct it, or transform the dense model."
_KINDS: dict[str, tuple[type, str]] = {
    "class": (str, "the name of a class"),
    "shares": (list, "a list, a share for each block"),
    "other_dtypes": (dict, "an object, the dtypes of weights by their names"),
    "example_inputs": (dict, "an object, an argument of the module for each name"),
}


def _expect_keys(written: Any, names: set[str], what: str) -> None:
    found = set(written) if isinstance(written, dict) else set()
    if found == names and isinstance(written, dict):
        return
    told = [f"unknown: {', '.join(sorted(found - names))}"] if found - names else []
    told += [f"missing: {', '.join(sorted(names - found))}"] if names - found else []
    raise SimbaError(
        f"{FILE}, {what}: expected the keys {', '.join(sorted(names))}; {'; '.join(told)}. Correct the file, or use "
        "the version of simba_fx that wrote it."
    )


def _options(written: Mapping[str, Any], criterion: Criterion | None) -> Options:
    held = written["options"]
    marker = held.get("criterion") if isinstance(held, dict) else None
    if isinstance(marker, dict) and criterion is None:
        name = marker.get("function")
        raise SimbaError(
            f"The model was saved with a criterion of your own, {name}, which a file cannot hold; expected it as an "
            f"argument. Write simba_fx.load(directory, criterion={name})."
        )
    if not isinstance(marker, dict) and criterion is not None:
        raise SimbaError(
            f"The model was saved with criterion={marker!r}, and load was given another; expected none. Leave it out, "
            "or transform the dense model with it."
        )
    return options_from_json(held, criterion)


_SAFE = {"trust_remote_code": False, "local_files_only": True, "use_safetensors": True}
"""transformers' defaults, or stricter than those. Only the caller may say otherwise."""


def _pretrained(folder: Path, written: Mapping[str, Any], kwargs: Mapping[str, Any]) -> nn.Module:
    """The dense model of a library, each weight in the dtype that it had, unless a dtype is given."""
    usual, others = _DTYPES[written["dtype"]], written.get("other_dtypes", {})
    as_saved = not {"dtype", "torch_dtype"} & set(kwargs)
    widest = functools.reduce(torch.promote_types, (_DTYPES[name] for name in others.values()), usual)
    given = ({"dtype": widest} if as_saved else {}) | dict(kwargs)
    model: nn.Module
    if written["library"] == "transformers":
        chosen = check_implementations(written["implementations"], f"{FILE}, implementations", kwargs)
        file = folder / "config.json"
        cls = scanning_class(check_config(file, kwargs), written["class"], file)
        model = cls.from_pretrained(folder, **(_SAFE | chosen | given))
    else:
        models: Any = importlib.import_module("mamba_ssm.models.mixer_seq_simple")
        model = models.MambaLMHeadModel.from_pretrained(str(folder), **given).eval()  # as transformers has it
    for name, held in model.state_dict(keep_vars=True).items() if as_saved else ():
        if held.is_floating_point() and held.dtype is not (dtype := _DTYPES[others.get(name, written["dtype"])]):
            held.data = held.data.to(dtype)
    return model


def _example_inputs(written: Any, model: Any) -> dict[str, Any]:
    """Example arguments of a plain module, on its device."""
    device = next((held.device for held in (*model.parameters(), *model.buffers())), None)
    try:
        return {
            name: _constant(name, held["value"])["value"]
            if "value" in held
            else torch.zeros(held["shape"], dtype=_DTYPES[held["dtype"]], device=device)
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


def _check_shares(found: tuple[Fraction, ...], written: Mapping[str, Any], folder: Path) -> None:
    if "shares" not in written:
        return
    expected = tuple(_share(share) for share in written["shares"])
    if expected != found:
        raise ScheduleError(
            f"{folder / FILE} lists shares for {len(expected)} blocks, and its schedule comes to others here, for "
            f"{len(found)}: {', '.join(map(str, found))}. Expected the same, so that the loaded model keeps what the "
            'saved one kept. If you changed the schedule on purpose, delete "shares" from the file.'
        )
