"""A sparse model in a folder: the dense model's own files, and beside them `simba_fx.json`, how it was made sparse.

Plain libraries read the folder as the dense model, since a sparse model has the same class, configuration and weights.
The JSON file is meant to be read, and may be edited: shares that were written as fractions are strings ("1/10"), and
the shares that they come to are listed, block by block.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Mapping
from fractions import Fraction
from numbers import Rational, Real
from pathlib import Path
from typing import Any

from torch import nn

from simba_fx import schedule
from simba_fx.api import program, runtime_of, transform
from simba_fx.errors import ScheduleError, SimbaError
from simba_fx.frontends import FRONTENDS, frontend_of
from simba_fx.frontends.files import CORRECT, FILE
from simba_fx.options import Criterion, Options
from simba_fx.runtime.fsdp import is_sharded
from simba_fx.untrusted import (
    check_files,
    read_json,
)

__all__ = ["load", "save"]

FORMAT = 1
_FRONTENDS = {frontend.LIBRARY: frontend for frontend in FRONTENDS}
_SCHEDULES: dict[str, type[Any]] = {
    cls.__name__: cls
    for cls in (schedule.Linear, schedule.Cosine, schedule.Constant, schedule.Dense, schedule.Stages, schedule.Explicit)
}
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
    folder = Path(directory)
    if folder.exists() and not folder.is_dir():
        raise SimbaError(f"save expects a folder; found the file {folder}. Name another place.")
    text = json.dumps(_described(model), indent=2, ensure_ascii=False) + "\n"
    frontend = frontend_of(model)
    if folder.exists():
        (folder / FILE).unlink(missing_ok=True)
        frontend.write(model, folder)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".simba_fx-") as beside:
            (Path(beside) / FILE).write_text(text, encoding="utf-8")
            os.replace(Path(beside) / FILE, folder / FILE)
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    staged = folder.parent / f".{folder.name}-{uuid.uuid4().hex}"
    staged.mkdir()  # not tempfile's: that would be its owner's alone
    try:
        frontend.write(model, staged)
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
    library: str = written["library"]
    if (model is None) == (library == "torch"):
        raise SimbaError(
            f"{folder} holds a plain module ({written['class']}), and load was given none to put its weights into; "
            f"expected a dense instance. Write simba_fx.load(directory, {written['class']}(...))."
            if library == "torch"
            else f"{folder} holds a {written['class']} of {library}, which load builds itself; expected no model, "
            f"found a {type(model).__name__}. Leave it out."
        )
    model, examples = _FRONTENDS[library].read(folder, written, model, kwargs)
    named = {field.name: getattr(options, field.name) for field in dataclasses.fields(Options)}
    sparse = transform(model, named.pop("schedule"), **named, example_inputs=examples)
    _check_shares(program(sparse).shares, written, folder)
    return sparse


# --- what is written -------------------------------------------------------------------------------------------------


def _described(model: nn.Module) -> dict[str, Any]:
    """All that `load` needs, as JSON. Raises: SimbaError: a model that could not be loaded again."""
    name, runtime = type(model).__name__, runtime_of(model)
    if runtime is None:
        inside = any(runtime_of(module) is not None for module in model.modules())
        raise SimbaError(
            f"save expects what simba_fx.transform returned; found a {name}"
            + (" that has a sparse model inside. Save that one." if inside else ". Transform the model first.")
        )
    if any(map(is_sharded, model.parameters())):
        raise SimbaError(
            f"save expects a model whose weights are whole; those of this {name} are sharded. Gather them first "
            "(torch.distributed.checkpoint.state_dict)."
        )
    frontend, shares = frontend_of(model), program(model).shares
    written = {"format": FORMAT, "library": frontend.LIBRARY, "class": name} | frontend.describe(model)
    written["options"] = options_to_json(runtime.options, shares)
    written["shares"] = [_number(share) for share in shares]
    return written


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
        newer = {
            "span": 1,
            "mask": None,
            "mask_marks": "real",
            "tail": "last",
            "pad_token_id": None,
        }  # than the oldest files
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
    if written.get("library") not in [*_FRONTENDS]:  # a list: what is written may have no hash
        raise SimbaError(
            f"{FILE}: expected a library among {', '.join(_FRONTENDS)}; found {written.get('library')!r}. Correct it, "
            "or transform the dense model."
        )
    keys = _FRONTENDS[written["library"]].KEYS
    optional = {"shares", *({"other_dtypes"} if "dtype" in keys else ())} & set(written)
    _expect_keys(written, {"format", "library", "class", "options"} | keys | optional, "file")
    for name, (kind, told) in _KINDS.items():
        if name in written and not isinstance(written[name], kind):
            raise SimbaError(f"{FILE}: expected {name} to be {told}; found {written[name]!r}. {CORRECT}")
    for name in ([written["dtype"]] if "dtype" in keys else []) + list(written.get("other_dtypes", {}).values()):
        if name not in _FLOATS:
            raise SimbaError(f"{FILE}: expected a dtype among {', '.join(_FLOATS)}; found {name!r}. {CORRECT}")
    return written


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
