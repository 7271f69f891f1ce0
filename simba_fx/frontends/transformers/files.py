"""The files of a transformers model, and of a folder that a stranger may have written."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from simba_fx.errors import SimbaError
from simba_fx.frontends.files import FILE, dtype_to_ask_for, dtypes_of, in_saved_dtypes
from simba_fx.frontends.transformers.model import base_of
from simba_fx.runtime.fsdp import dense_class
from simba_fx.untrusted import IMPLEMENTATIONS, check_config, check_implementations, scanning_class

__all__ = ["KEYS", "describe", "read", "write"]

KEYS = frozenset({"dtype", "implementations"})
_SAFE = {"trust_remote_code": False, "local_files_only": True, "use_safetensors": True}
"""transformers' defaults, or stricter than those. Only the caller may say otherwise."""


def describe(model: nn.Module) -> dict[str, Any]:
    import transformers

    name, config = type(model).__name__, base_of(model).config
    if base_of(model) is not model or getattr(model, "_hf_peft_config_loaded", False):
        raise SimbaError(
            f"save writes whole models; found adapters of PEFT on a {name}. Save them with save_pretrained, and "
            "transform again after loading; or merge them first (merge_and_unload)."
        )
    if getattr(transformers, name, None) is not dense_class(model):
        raise SimbaError(
            f"{name} is no class that transformers exports, so load could not find it; expected one of its own. "
            "Use the model's save_pretrained, and simba_fx.transform after loading."
        )
    chosen = {name: getattr(config, f"_{name}", None) for name in IMPLEMENTATIONS}
    return dtypes_of(model) | {
        "implementations": {name: held for name, held in chosen.items() if isinstance(held, str)}
    }


def write(model: Any, folder: Path) -> None:
    model.save_pretrained(str(folder))


def read(folder: Path, written: Mapping[str, Any], model: Any, kwargs: Mapping[str, Any]) -> tuple[Any, Any]:
    chosen = check_implementations(written["implementations"], f"{FILE}, implementations", kwargs)
    file = folder / "config.json"
    cls = scanning_class(check_config(file, kwargs), written["class"], file)
    found = cls.from_pretrained(folder, **(_SAFE | chosen | dtype_to_ask_for(written, kwargs) | dict(kwargs)))
    return in_saved_dtypes(found, written, kwargs), None
