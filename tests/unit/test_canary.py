"""Whether this torch and this transformers have what the library takes from them, and a minute of what it is for.

`make canary-oldest` and `make canary-newest` run this file on both ends of what is supported. A private name that is
gone fails here by its name. Names are read from the source; those that hang on objects stand in a table, which must
list exactly what the source uses.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from models import BY_NAME, logits, tokens
from torch import fx, nn

import simba_fx

HOUSE = Path(simba_fx.__file__).parent
SOURCES = [*HOUSE.rglob("*.py"), *Path(importlib.import_module("simba_fx.passes").__file__ or "").parent.glob("*.py")]
LIBRARIES = ("torch", "transformers")


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def dotted(node: ast.AST) -> list[str] | None:
    """`torch._dynamo.reset` as its parts, from a name on."""
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return [node.id, *reversed(parts)] if isinstance(node, ast.Name) else None


def imported(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """(name in the file, what it stands for) for what comes from the libraries."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield (alias.asname or alias.name.partition(".")[0]), (alias.name if alias.asname else
                                                                      alias.name.partition(".")[0])  # fmt: skip
                yield alias.name, alias.name
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield from ((alias.asname or alias.name, f"{node.module}.{alias.name}") for alias in node.names)


def by_path(files: Iterable[Path] = SOURCES) -> list[str]:
    """Private names that are reached from a module: `torch._dynamo.maybe_mark_dynamic`."""
    found = set()
    for file in files:
        tree = ast.parse(file.read_text())
        names = {name: path for name, path in imported(tree) if path.partition(".")[0] in LIBRARIES}
        paths = {*names.values()}
        for node in ast.walk(tree):
            parts = dotted(node) if isinstance(node, ast.Attribute) else None
            if parts and parts[0] in names:
                paths.add(".".join([names[parts[0]], *parts[1:]]))
        found |= {path for path in paths if any(map(is_private, path.split(".")))}
    return sorted(path for path in found if not path.startswith("torch.ops.simba_fx"))


@pytest.mark.parametrize("path", by_path())
def test_a_private_name_is_there(path: str) -> None:
    parts, held = path.split("."), None
    for count in range(len(parts), 0, -1):  # the longest module
        try:
            held = importlib.import_module(".".join(parts[:count]))
        except ModuleNotFoundError as error:
            if not ".".join(parts[:count]).startswith(str(error.name)):
                pytest.skip(f"{error.name} is not installed")
            continue
        break
    for name in parts[count:]:
        assert hasattr(held, name), f"{path}: {name} is gone"
        held = getattr(held, name)


def _text(module: str) -> str:
    return inspect.getsource(importlib.import_module(module))


def _config() -> Any:
    return BY_NAME["mamba"].build().config


def _operator() -> Any:
    return importlib.import_module("simba_fx.ops.scan").selective_scan


ON_OBJECTS: dict[str, Callable[[], bool]] = {
    "_TorchCompileInductorWrapper": lambda: hasattr(torch, "_TorchCompileInductorWrapper"),
    "_TorchCompileWrapper": lambda: hasattr(torch, "_TorchCompileWrapper"),
    "_attn_implementation": lambda: hasattr(_config(), "_attn_implementation"),
    "_buffers": lambda: "_buffers" in vars(nn.Module()),
    "_compiled_call_impl": lambda: hasattr(nn.Module, "_compiled_call_impl"),
    "_dynamo_source": lambda: True,  # of ours
    "_enabled": lambda: torch.autocast("cpu")._enabled,
    "_expr": lambda: "self._expr" in _text("torch.fx.experimental.sym_node"),
    "_forward_hooks": lambda: "_forward_hooks" in vars(nn.Module()),
    "_forward_pre_hooks": lambda: "_forward_pre_hooks" in vars(nn.Module()),
    "_get_fsdp_state": lambda: "_get_fsdp_state" in _text("torch.distributed.fsdp._fully_shard._fully_shard"),
    "_getframe": lambda: hasattr(sys, "_getframe"),
    "_graph_namespace": lambda: hasattr(fx.Graph(), "_graph_namespace"),
    "_hf_hook": lambda: "module._hf_hook =" in _text("accelerate.hooks"),
    "_init_fn": lambda: hasattr(_operator(), "_init_fn"),
    "_opname": lambda: hasattr(torch.ops.aten.add.Tensor, "_opname"),
    "_opoverload": lambda: hasattr(_operator(), "_opoverload"),
    "_parameters": lambda: "_parameters" in vars(nn.Module()),
    "_orig_cls_mro_index": lambda: "_orig_cls_mro_index" in _text("torch.distributed.fsdp._fully_shard._fully_shard"),
    "_schema": lambda: hasattr(torch.ops.aten.add.Tensor, "_schema"),
    "_torchdynamo_disable_msg": lambda: "_torchdynamo_disable_msg" in _text("torch._dynamo.eval_frame"),
}
"""Attributes of objects. What only mamba_ssm has is looked at by its own tests (`_get_states_from_cache`)."""
IN_STRINGS: dict[str, Callable[[], bool]] = {
    "_call_impl": lambda: hasattr(nn.Module, "_call_impl"),
    "_dynamo_static_indices": lambda: "_dynamo_static_indices" in _text("torch._dynamo.decorators"),
    "_dynamo_weak_dynamic_indices": lambda: "_dynamo_weak_dynamic_indices" in _text("torch._dynamo.decorators"),
    "_experts_implementation": lambda: "_experts_implementation" in _text("transformers.configuration_utils"),
    "_gradient_checkpointing_func": lambda: "_gradient_checkpointing_func" in _text("transformers.modeling_utils"),
    "_hf_peft_config_loaded": lambda: "_hf_peft_config_loaded" in _text("transformers.integrations.peft"),
    "_mp_policy": lambda: "_mp_policy" in _text("torch.distributed.fsdp._fully_shard._fsdp_state"),
    "_non_persistent_buffers_set": lambda: "_non_persistent_buffers_set" in vars(nn.Module()),
    "_orig_mod": lambda: "_orig_mod" in _text("torch._dynamo.eval_frame"),
    "_output_capturing_hooks_installed": lambda: (
        "_output_capturing_hooks_installed" in _text("transformers.utils.output_capturing")
    ),
    "_param_name_to_source": lambda: "_param_name_to_source" in _text("torch._dynamo.output_graph"),
    "_replicate_for_data_parallel": lambda: hasattr(nn.Module, "_replicate_for_data_parallel"),
    "_source_to_user_stacks": lambda: "_source_to_user_stacks" in _text("torch._dynamo.output_graph"),
    "_torchdynamo_orig_backend": lambda: "_torchdynamo_orig_backend" in _text("torch._dynamo.eval_frame"),
    "_torchdynamo_orig_callable": lambda: "_torchdynamo_orig_callable" in _text("torch._dynamo.eval_frame"),
    "ShapeEnv.evaluate_expr": lambda: hasattr(torch.fx.experimental.symbolic_shapes.ShapeEnv, "evaluate_expr"),
}
"""Names that the source has in strings, or that it replaces."""


def on_objects() -> set[str]:
    """Private attributes that the source reads from objects and defines nowhere itself."""
    used, own = set(), set()
    for file in SOURCES:
        tree = ast.parse(file.read_text())
        names = dict(imported(tree))
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                own.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                own.add(node.id)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                own |= {node.attr} if isinstance(node.value, ast.Name) and node.value.id == "self" else set()
            elif isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant):
                own |= {str(node.slice.value)} if isinstance(node.ctx, ast.Store) else set()
            if isinstance(node, ast.Attribute) and is_private(node.attr):
                parts = dotted(node)
                if not (parts and parts[0] in names and names[parts[0]].partition(".")[0] in LIBRARIES):
                    used.add(node.attr)
    return used - own


def test_the_table_lists_what_the_source_uses() -> None:
    elsewhere = {"_get_states_from_cache"}
    assert on_objects() - elsewhere == set(ON_OBJECTS)
    text = "".join(file.read_text() for file in SOURCES)
    assert [name for name in IN_STRINGS if name.rpartition(".")[2] not in text] == []


@pytest.mark.parametrize("name", [*ON_OBJECTS, *IN_STRINGS])
def test_a_private_attribute_is_there(name: str) -> None:
    assert (ON_OBJECTS | IN_STRINGS)[name](), f"{name} is gone"


@pytest.mark.parametrize("name", ["mamba", "mamba2-two-groups", "bamba"])
def test_a_minute_of_everything(name: str, tmp_path: Path) -> None:
    """Keep 1.0 bit for bit, pruned calls, decoding, training, compiling, exporting, saving."""
    model: Any = BY_NAME[name].build()
    ids = tokens(1, 2, 40)
    dense = simba_fx.transform(model, "dense", kernels="model")
    assert torch.equal(logits(dense, input_ids=ids), logits(model, input_ids=ids))
    sparse: Any = simba_fx.transform(model, "linear")
    expected = logits(sparse, input_ids=ids)
    assert simba_fx.kept(sparse)[-1].shape[1] < 40
    assert sparse.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0).shape == (2, 43)
    sparse.train()(ids, labels=ids).loss.backward()
    assert all(p.grad is not None for path, p in model.named_parameters() if "layers.0" in path)
    sparse.eval().zero_grad()
    compiled = torch.compile(sparse, backend="aot_eager")
    torch.testing.assert_close(logits(compiled, input_ids=ids), expected, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        sparse(ids, use_cache=False)
        exported = torch.export.export(sparse, (), {"input_ids": ids, "use_cache": False}, strict=False)
        torch.testing.assert_close(exported.module()(input_ids=ids, use_cache=False).logits, expected,
                                   rtol=1e-4, atol=1e-4)  # fmt: skip
    simba_fx.save(sparse, tmp_path)
    assert torch.equal(logits(simba_fx.load(tmp_path), input_ids=ids), expected)
