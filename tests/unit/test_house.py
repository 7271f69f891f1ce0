"""The structure of the package: imports go one way, and what is torch's own business is met in few places."""

from __future__ import annotations

import ast
import importlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_canary import by_path

import simba_fx

HOUSE = Path(simba_fx.__file__).parent
PASSES = Path(importlib.import_module("simba_fx.passes").__file__ or "").parent
LAYERS = ("errors versions schedule", "ops", "compiling options", "graph", "capture", "passes", "runtime",
          "flops untrusted", "frontends", "api", "saving reporting", "bench", "evaluation", "cli")  # fmt: skip
"""What is on a line may import what is on it and on those before."""
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names.split()}
COMPILER = ("simba_fx.compiling", "simba_fx.ops.inline", "simba_fx.frontends.dynamo.internals", "simba_fx.bench")
"""Who knows private names of torch."""


def modules() -> dict[str, Path]:
    files = {("simba_fx", *file.relative_to(HOUSE).with_suffix("").parts): file for file in HOUSE.rglob("*.py")}
    files |= {("simba_fx", "passes", file.stem): file for file in PASSES.glob("*.py")}
    return {".".join(parts).removesuffix(".__init__"): file for parts, file in files.items()}


MODULES = modules()


def imports(name: str, late: bool = True) -> Iterator[str]:
    """The modules of this package that a module imports; `late`: in its functions as well."""
    tree = ast.parse(MODULES[name].read_text())
    for node in ast.walk(tree) if late else tree.body:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.startswith("simba_fx."))
        elif isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "simba_fx":
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (full if full in MODULES else str(node.module) for full in names)


def part(name: str) -> str:
    return name.split(".")[1]


@pytest.mark.parametrize("name", sorted(set(MODULES) - {"simba_fx"}))
def test_imports_go_one_way(name: str) -> None:
    upwards = [other for other in imports(name) if other != "simba_fx" and RANK[part(other)] > RANK[part(name)]]
    assert not upwards


def test_no_module_waits_for_itself() -> None:
    """The order in which modules can be imported, one after the other."""
    left = {name: {other for other in imports(name, late=False) if other in MODULES} for name in MODULES}
    left["simba_fx"] = set()  # it imports when it is asked
    while ready := [name for name, needs in left.items() if not needs & left.keys() - {name}]:
        for name in ready:
            del left[name]
    assert not left


def test_a_module_and_what_its_package_offers_have_different_names() -> None:
    for name, file in MODULES.items():
        if file.stem == "__init__" and "triton" not in name:  # which is not everywhere
            inside = {other.rpartition(".")[2] for other in MODULES if other.rpartition(".")[0] == name}
            offered = importlib.import_module(name)
            functions = {one for one in getattr(offered, "__all__", ()) if callable(getattr(offered, one))}
            assert not inside & functions, name


def test_private_names_of_torch_stand_in_few_places() -> None:
    for name, file in MODULES.items():
        if not name.startswith(COMPILER):
            found = [path for path in by_path([file]) if path.startswith("torch.") and "_pytree" not in path]
            assert [path for path in found if not path.startswith("torch.ops.")] == [], name
