"""What a saved folder may ask for: looked over before anything is built from it, since a stranger may have written it.

Loading runs no code of the folder's or of a hub's, and reads no file outside of the folder. transformers does what its
caller says and what `config.json` says; here neither may say more than which of transformers' own functions run.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from simba_fx.capture.scan_functions import SCANNING
from simba_fx.errors import SimbaError

__all__ = ["check_config", "check_files", "check_implementations", "read_json", "scanning_class"]

IMPLEMENTATIONS: dict[str, tuple[str, ...]] = {
    "attn_implementation": ("eager", "sdpa", "flex_attention", "flash_attention_2", "flash_attention_3"),
    "experts_implementation": ("eager", "batched_mm", "grouped_mm"),
}
"""What a file may choose. Anything else may be code of a hub's: a caller may ask for that, a file may not."""
_QUANTISED = ("bitsandbytes", "torchao")
"""Whose code is a package that is installed; others fetch kernels from a hub."""
_FORBIDDEN = {
    "adapter_config.json": "adapters of PEFT, which save never writes",
    ".metadata": "a distributed checkpoint, which save never writes",
}
_READ = (".json", ".safetensors", ".pt", ".bin", ".metadata")


def check_files(folder: Path) -> None:
    """The names in a folder.

    Raises:
        SimbaError: a file that would be read leads outside of the folder, by a link or by an index of shards; adapters
            or a distributed checkpoint, which transformers would load by itself.
    """
    root = folder.resolve()
    # huggingface_hub keeps what it downloads as links from `snapshots/<revision>` to `blobs`, beside it.
    roots = (root, root.parent.parent / "blobs") if root.parent.name == "snapshots" else (root,)
    for file in sorted(folder.iterdir()):
        if file.name in _FORBIDDEN:
            raise SimbaError(
                f"{file} belongs to {_FORBIDDEN[file.name]}; expected the files of one dense model. Move it out of the "
                "folder."
            )
        if not file.name.endswith(_READ):
            continue
        if file.is_symlink() and not any(file.resolve().is_relative_to(place) for place in roots):
            raise SimbaError(
                f"{file} is a link to {file.resolve()}, outside of the folder; expected a file. Put a copy there."
            )
        if file.name.endswith(".index.json"):
            shards = read_json(file).get("weight_map")
            for name in shards.values() if isinstance(shards, dict) else (shards,):
                if (
                    not isinstance(name, str)
                    or name in (".", "..")
                    or not name.endswith(_READ)
                    or set(name) & set("/\\")
                ):
                    raise SimbaError(
                        f"{file}: expected the names of files in the folder in its weight_map, found {name!r}. Save "
                        "the model again."
                    )


def check_implementations(written: Any, place: str, given: Collection[str] = ()) -> dict[str, str]:
    """Which functions a file chose, but for those that the caller chose (`given`) himself.

    Raises:
        SimbaError: no mapping of known names to known words; flash attention that is not installed, which transformers
            would fetch from a hub.
    """
    if not isinstance(written, dict) or not written.keys() <= IMPLEMENTATIONS.keys():
        raise SimbaError(
            f"{place}: expected the keys {', '.join(IMPLEMENTATIONS)} at most, found {written!r}. Correct it, and hand "
            "what else from_pretrained is to know to simba_fx.load."
        )
    chosen = {}
    for name, held in written.items():
        if name in given:
            continue
        if held not in IMPLEMENTATIONS[name]:
            raise SimbaError(
                f"{place}: expected {name} to be one of {', '.join(IMPLEMENTATIONS[name])}, found {held!r}; a file may "
                f"not choose other code. If you want it, write simba_fx.load(directory, {name}=...)."
            )
        if held.startswith("flash_attention") and not _installed(held):
            raise SimbaError(
                f"{place} asks for {held}, which is not installed here; expected it to be, since load fetches no code. "
                f'Install it, or write simba_fx.load(directory, {name}="sdpa").'
            )
        chosen[name] = held
    return chosen


def _installed(flash: str) -> bool:
    import transformers.utils

    found = getattr(transformers.utils, f"is_flash_attn_{flash[-1]}_available", None)
    return found is not None and bool(found())


def check_config(file: Path, given: Collection[str] = ()) -> dict[str, Any]:
    """transformers' `config.json`. `auto_map` may stay: a class of transformers' own does not look at it.

    Raises:
        SimbaError: no JSON object; it names kernels, files of weights, or a quantisation whose code is fetched.
    """
    config = read_json(file)
    for name, held in _entries(config):
        if held is None:
            continue
        plain = name.removeprefix("_").removesuffix("_internal")
        if plain in IMPLEMENTATIONS:
            for one in held.values() if isinstance(held, dict) else (held,):
                check_implementations({plain: one}, str(file), given)
        elif name == "transformers_weights":
            raise SimbaError(
                f"{file}: expected no transformers_weights, found {held!r}; load reads model.safetensors. Delete the "
                "key."
            )
        elif name == "quantization_config":
            method = held.get("quant_method") if isinstance(held, dict) else held
            if method not in _QUANTISED:
                raise SimbaError(
                    f"{file}: expected weights that are quantised by {' or '.join(_QUANTISED)}, if at all, found "
                    f"{method!r}. Load the dense model with transformers, and pass it to simba_fx.transform."
                )
    return config


def _entries(held: Any) -> Iterator[tuple[str, Any]]:
    """Keys and values of all objects in a piece of JSON, outermost first."""
    if isinstance(held, dict):
        yield from held.items()
    for inner in held.values() if isinstance(held, dict) else held if isinstance(held, list) else ():
        yield from _entries(inner)


def scanning_class(config: Mapping[str, Any], expected: str, file: Path) -> Any:
    """The class of transformers' own that a configuration names: one that scans, so no `Auto` class, no other model.

    Raises:
        SimbaError: there is none of that name.
    """
    import transformers

    architectures = config.get("architectures")
    name = architectures[0] if isinstance(architectures, list) and architectures else None
    cls = getattr(transformers, name, None) if isinstance(name, str) else None
    is_model = isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel) and cls.__name__ == name
    if not is_model:
        raise SimbaError(
            f"{file} names the class {name!r}, which transformers {transformers.__version__} does not have; expected "
            f"{expected}. Install a version that has it."
        )
    if not SCANNING & vars(sys.modules[cls.__module__]).keys():
        raise SimbaError(
            f"{file} names the class {name!r}, a model without a scan; expected {expected}. Save the model again."
        )
    return cls


def read_json(file: Path) -> dict[str, Any]:
    """Raises: SimbaError: no such file, or no JSON object."""
    try:
        written = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise SimbaError(f"{file} is no JSON: {error}. Correct it, or transform the dense model.") from error
    except OSError as error:
        raise SimbaError(
            f"{file} cannot be read: {error.strerror}; expected a file that simba_fx.save wrote."
        ) from error
    if not isinstance(written, dict):
        raise SimbaError(f"{file}: expected a JSON object, found a {type(written).__name__}. Save the model again.")
    return written
