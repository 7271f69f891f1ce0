"""A saved folder that a stranger wrote: whatever it says, loading it runs none of its code and reads nothing else."""

from __future__ import annotations

import functools
import json
import os
import pickle
import sys
import tempfile
import types
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from models import dense
from torch import nn

import simba_fx
from simba_fx.errors import SimbaError
from simba_fx.frontends.files import FILE
from simba_fx.frontends.module.files import WEIGHTS

HERE = Path(__file__).resolve().parents[2]
OWN = (sys.prefix, sys.base_prefix, str(HERE), *map(os.path.realpath, (sys.prefix, sys.base_prefix)), "/proc", "/sys",
       "/dev", "/etc", "/usr")  # fmt: skip
"""Python's, the library's and the system's own places."""
_opened: list[list[str]] = []


def _hear(event: str, arguments: tuple[Any, ...]) -> None:
    if _opened and event == "open" and isinstance(arguments[0], str | bytes):
        _opened[-1].append(os.path.realpath(os.fsdecode(arguments[0])))


sys.addaudithook(_hear)  # for good: there is no way back, so it listens only inside `watched`


@contextmanager
def watched(folder: Path) -> Iterator[list[str]]:
    """Fails where a file outside of the folder is opened, or a module imported from it; gives what was opened."""
    _opened.append([])
    try:
        yield _opened[-1]
    finally:
        opened = _opened.pop()
    root = os.path.realpath(folder)
    outside = [path for path in opened if not path.startswith((root + os.sep, *OWN)) and path != root]
    assert outside == []
    files = [getattr(module, "__file__", None) or "" for module in list(sys.modules.values())]
    assert not [file for file in files if _place_of(file).startswith(root + os.sep)]


@functools.cache  # thousands of modules are asked for at every watch
def _place_of(file: str) -> str:
    return os.path.realpath(file)


def test_the_watch_hears_of_files_and_modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "inside").mkdir()
    (tmp_path / "secret").write_text("")
    with pytest.raises(AssertionError), watched(tmp_path / "inside"):
        (tmp_path / "secret").read_text()
    module = types.ModuleType("planted")
    module.__file__ = str(tmp_path / "inside" / "planted.py")
    monkeypatch.setitem(sys.modules, "planted", module)
    with pytest.raises(AssertionError), watched(tmp_path / "inside"):
        pass


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    transformers.logging.disable_progress_bar()
    folder = tmp_path_factory.mktemp("saved")
    simba_fx.save(simba_fx.transform(dense("mamba"), simba_fx.Linear(0.2)), folder)
    simba_fx.load(folder)  # imports what there is to import
    return folder


def copied(saved: Path, folder: Path, ours: Any = None, config: Any = None) -> Path:
    """A copy with other entries in `simba_fx.json` and `config.json`, and with code that must not run."""
    folder.mkdir(exist_ok=True)
    for file in saved.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    for name, changes in ((FILE, ours), ("config.json", config)):
        if changes:
            written = json.loads((folder / name).read_text())
            (folder / name).write_text(json.dumps(written | changes))
    for name in ("modeling_mine", "configuration_mine", "custom_generate"):
        (folder / f"{name}.py").write_text("raise SystemExit('a stranger was here')")
    return folder


def refused(folder: Path, start: str, *args: Any, **kwargs: Any) -> None:
    """By one sentence of ours, and before a model is built."""
    with watched(folder) as opened, pytest.raises(SimbaError) as caught:
        simba_fx.load(folder, *args, **kwargs)
    assert str(caught.value).replace(f"{folder}{os.sep}", "").startswith(start), caught.value
    assert not [path for path in opened if path.endswith((".safetensors", ".bin"))]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("trust_remote_code", True),
        ("subfolder", "../elsewhere"),
        ("config", "/etc/hostname"),
        ("gguf_file", "../model.gguf"),
        ("allow_all_kernels", True),
        ("use_kernels", True),
        ("kernel_config", {}),
        ("use_safetensors", False),
        ("weights_only", False),
        ("adapter_kwargs", {"_adapter_model_path": "/tmp"}),
        ("quantization_config", {"quant_method": "gptq"}),
        ("variant", "../x"),
        ("attn_implementation ", "eager"),
    ],
)
def test_what_from_pretrained_is_told_is_not_the_files_to_say(
    key: str, value: Any, saved: Path, tmp_path: Path
) -> None:
    folder = copied(saved, tmp_path / "it", {"implementations": {key: value}})
    refused(folder, "simba_fx.json, implementations: expected the keys attn_implementation, experts_impl")
    folder = copied(saved, tmp_path / "it", {key: value})
    refused(folder, "simba_fx.json, file: expected the keys class, ")


KERNELS = ["kernels-community/flash-attn2", "some/one", "some/one@v1:function", "paged|some/one", "../x", "", 3, None,
           {"": "some/one"}, ["eager"], True]  # fmt: skip


@pytest.mark.parametrize("name", ["attn_implementation", "experts_implementation"])
@pytest.mark.parametrize("value", KERNELS)
def test_kernels_of_a_hub_are_not_the_files_to_choose(name: str, value: Any, saved: Path, tmp_path: Path) -> None:
    folder = copied(saved, tmp_path / "it", {"implementations": {name: value}})
    refused(folder, f"simba_fx.json, implementations: expected {name} to be one of eager, ")
    if value is not None:
        for key in (name, f"_{name}", f"_{name}_internal"):
            folder = copied(saved, tmp_path / "it", config={key: value})
            refused(folder, f"config.json: expected {name} to be one of eager, ")
            folder = copied(saved, tmp_path / "it", config={"inner": [{key: value}]})
            refused(folder, f"config.json: expected {name} to be one of eager, ")


def test_the_caller_may_choose(saved: Path, tmp_path: Path) -> None:
    folder = copied(saved, tmp_path / "it", {"implementations": {"attn_implementation": "some/one"}})
    with watched(folder):
        assert simba_fx.load(folder, attn_implementation="eager").config._attn_implementation == "eager"


def test_flash_attention_is_not_fetched(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformers.utils, "is_flash_attn_2_available", lambda: False)
    folder = copied(saved, tmp_path / "it", {"implementations": {"attn_implementation": "flash_attention_2"}})
    refused(folder, "simba_fx.json, implementations asks for flash_attention_2, which is not installed here; expected")


@pytest.mark.parametrize(
    ("key", "value", "start"),
    [
        ("library", ["torch"], "simba_fx.json: expected a library among"),
        ("library", "os", "simba_fx.json: expected a library among"),
        ("class", 3, "simba_fx.json: expected class to be the name of a class; found 3"),
        ("dtype", ["float32"], "simba_fx.json: expected a dtype among"),
        ("dtype", "nn", "simba_fx.json: expected a dtype among"),
        ("dtype", "int8", "simba_fx.json: expected a dtype among"),
        ("other_dtypes", ["float32"], "simba_fx.json: expected other_dtypes to be an object"),
        ("other_dtypes", {"x": {}}, "simba_fx.json: expected a dtype among"),
        ("implementations", [], "simba_fx.json, implementations: expected the keys"),
        ("shares", 3, "simba_fx.json: expected shares to be a list"),
        ("format", True, "simba_fx.json has format True"),
        ("format", "1", "simba_fx.json has format '1'"),
        ("options", [], "simba_fx.json, options: expected the keys"),
    ],
)
def test_every_key_is_of_its_kind(key: str, value: Any, start: str, saved: Path, tmp_path: Path) -> None:
    refused(copied(saved, tmp_path / "it", {key: value}), start)


@pytest.mark.parametrize("share", [10**400, "1e999999999", "1" * 5000, "nan", [0.5], None, True, {}])
def test_shares_are_short_numbers(share: Any, saved: Path, tmp_path: Path) -> None:
    options = json.loads((saved / FILE).read_text())["options"]
    schedule = {"kind": "Explicit", "values": [1, share, share, share]}
    refused(
        copied(saved, tmp_path / "it", {"options": options | {"schedule": schedule}}), "simba_fx.json: expected a sh"
    )
    refused(
        copied(saved, tmp_path / "it", {"options": options | {"schedule": {"kind": [share]}}}), "simba_fx.json: exp"
    )


@pytest.mark.parametrize(
    ("changes", "start"),
    [
        ({"transformers_weights": "../x.safetensors"}, "config.json: expected no transformers_weights"),
        ({"transformers_weights": "adapter_model.bin"}, "config.json: expected no transformers_weights"),
        ({"quantization_config": {"quant_method": "mxfp4"}}, "config.json: expected weights that are quantised by"),
        ({"quantization_config": "gptq"}, "config.json: expected weights that are quantised by"),
        ({"architectures": ["AutoModelForCausalLM"]}, "config.json names the class 'AutoModelForCausalLM', which"),
        ({"architectures": ["pipeline"]}, "config.json names the class 'pipeline', which"),
        ({"architectures": ["PreTrainedModel"]}, "config.json names the class 'PreTrainedModel', a model without a sc"),
        ({"architectures": ["GPT2LMHeadModel"]}, "config.json names the class 'GPT2LMHeadModel', a model without a sc"),
        ({"architectures": "MambaForCausalLM"}, "config.json names the class None, which"),
        ({"architectures": [["x"]]}, "config.json names the class ['x'], which"),
    ],
)
def test_the_configuration_brings_no_code(changes: Any, start: str, saved: Path, tmp_path: Path) -> None:
    refused(copied(saved, tmp_path / "it", config=changes), start)


def test_classes_of_the_folder_are_not_looked_at(saved: Path, tmp_path: Path) -> None:
    """Models that once came with code of their own keep its names in their configuration."""
    mapped = {"AutoConfig": "configuration_mine.Mine", "AutoModelForCausalLM": "modeling_mine.Mine"}
    folder = copied(saved, tmp_path / "it", config={"auto_map": mapped, "custom_generate": "../x"})
    with watched(folder):
        assert type(simba_fx.load(folder)).__name__ == "MambaForCausalLM"


class Evil:
    def __reduce__(self) -> Any:
        return sys.exit, ("a stranger was here",)


def test_no_pickle_is_read(saved: Path, tmp_path: Path) -> None:
    folder = copied(saved, tmp_path / "it")
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Evil()))
    with watched(folder) as opened, pytest.raises(OSError, match=r"no file named model\.safetensors"):
        simba_fx.load(folder)
    assert str(folder / "pytorch_model.bin") not in opened


def test_weights_of_a_plain_module_are_tensors_only(tmp_path: Path) -> None:
    model = dense("mamba").backbone.layers[0].mixer.in_proj  # any module: its weights are looked at first
    described = {"format": 1, "library": "torch", "class": "Linear", "example_inputs": {}}
    options = {"schedule": {"kind": "Dense"}, "criterion": "simba", "output": "full", "floor": 4, "kernels": "auto",
               "compile": "blocks", "seed": 0, "query": None, "protect": [], "labels": "all"}  # fmt: skip
    (tmp_path / FILE).write_text(json.dumps(described | {"options": options}))
    assert isinstance(model, nn.Module)
    for held in (Evil(), {"weight": Evil()}, [1], {"weight": 3}):
        torch.save(held, tmp_path / WEIGHTS)
        refused(tmp_path, "weights.pt cannot be read (", model)
    (tmp_path / WEIGHTS).write_bytes(b"no weights")
    refused(tmp_path, "weights.pt cannot be read (", model)
    for held in ({"shape": [-1], "dtype": "float32"}, {"shape": [2**60], "dtype": "float32"}, {"value": [1]}, 3):
        written = described | {"options": options, "example_inputs": {"x": held}}
        (tmp_path / FILE).write_text(json.dumps(written))
        with pytest.raises(SimbaError):
            simba_fx.load(tmp_path, model)


@pytest.mark.parametrize("name", [FILE, "config.json", "generation_config.json", "model.safetensors"])
def test_links_that_lead_outside_are_refused(name: str, saved: Path, tmp_path: Path) -> None:
    folder = copied(saved, tmp_path / "it")
    (folder / name).rename(tmp_path / "secret")
    (folder / name).symlink_to(tmp_path / "secret")
    refused(folder, f"{name} is a link to {tmp_path / 'secret'}, outside of the folder; expected a file. Put a copy")


def test_links_of_a_hubs_cache_are_files_of_the_folder(saved: Path, tmp_path: Path) -> None:
    (tmp_path / "snapshots").mkdir()
    (tmp_path / "blobs").mkdir()
    folder = copied(saved, tmp_path / "snapshots" / "abc")
    for name in (FILE, "config.json", "model.safetensors"):
        (folder / name).rename(tmp_path / "blobs" / name)
        (folder / name).symlink_to(Path("../../blobs") / name)
    with watched(tmp_path):
        simba_fx.load(folder)


@pytest.mark.parametrize(
    "shard", ["../x.safetensors", "/etc/hostname", "..", "a\\b.safetensors", 3, "modeling_mine.py"]
)
def test_an_index_of_shards_names_files_of_the_folder(shard: Any, saved: Path, tmp_path: Path) -> None:
    folder = copied(saved, tmp_path / "it")
    (folder / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": {"backbone.embeddings.weight": shard}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(folder, "model.safetensors.index.json: expected the names of files in the folder in its weight_map, found")


@pytest.mark.parametrize("name", ["adapter_config.json", ".metadata"])
def test_what_transformers_would_load_besides_is_refused(name: str, saved: Path, tmp_path: Path) -> None:
    folder = copied(saved, tmp_path / "it")
    (folder / name).write_text('{"base_model_name_or_path": "../elsewhere", "auto_mapping": {"parent_library": "os"}}')
    refused(folder, f"{name} belongs to ")


@pytest.mark.parametrize("text", ["[" * 100_000, "3", "\0", '"x"', "[]"])
@pytest.mark.parametrize("name", [FILE, "config.json"])
def test_what_is_no_object_is_refused(name: str, text: str, saved: Path, tmp_path: Path) -> None:
    folder = copied(saved, tmp_path / "it")
    (folder / name).write_text(text)
    refused(folder, name)


WORDS = st.sampled_from(["..", "/etc/hostname", "../elsewhere", "some/one", "eager", "sdpa", "float32", "bfloat16",
                         "1/2", "True", "nan", "os", "~", ".", "flash_attention_2", "Linear", "torch"])  # fmt: skip
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | WORDS | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=3),
    max_leaves=5,
)
PATHS = st.sampled_from(
    [(name,) for name in ("format", "library", "class", "dtype", "other_dtypes", "implementations", "options")]
    + [("implementations", name) for name in ("attn_implementation", "trust_remote_code", "subfolder", "config")]
    + [("options", name) for name in ("schedule", "criterion", "output", "floor", "kernels", "compile", "seed", "query",
                                      "protect", "labels")]
    + [("options", "schedule", name) for name in ("kind", "final", "every", "start", "values", "stages")]
    + [(name,) for name in ("shares", "subfolder", "trust_remote_code", "example_inputs")]
)  # fmt: skip


@settings(max_examples=60)
@given(PATHS, VALUES)
def test_any_file_is_loaded_or_refused(saved: Path, path: tuple[str, ...], value: Any) -> None:
    with tempfile.TemporaryDirectory() as place:
        folder = copied(saved, Path(place) / "it")
        written = json.loads((folder / FILE).read_text())
        inner = written
        for name in path[:-1]:
            inner = inner[name]
        inner[path[-1]] = value
        (folder / FILE).write_text(json.dumps(written))
        with watched(folder), suppress(SimbaError):
            simba_fx.load(folder)
