"""What an import does (nothing but define names) and what a wheel holds (the whole package)."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
OPTIONAL = ("transformers", "mamba_ssm", "causal_conv1d", "triton", "matplotlib")

# Compares every function, class and class attribute of every loaded module before and after a statement.
WATCH = """
import importlib, json, sys, types
preload, statement, optional = json.loads(sys.argv[1])
for name in preload:
    importlib.import_module(name)

CODE = (type, types.FunctionType, types.BuiltinFunctionType, classmethod, staticmethod, property)

def code_by_name():
    found = {}
    for module_name, module in list(sys.modules.items()):
        for name, value in list(getattr(module, "__dict__", {}).items()):
            if isinstance(value, CODE):
                found[f"{module_name}.{name}"] = value
            if isinstance(value, type):
                for attribute, inner in list(vars(value).items()):
                    if isinstance(inner, CODE):
                        found[f"{value.__module__}.{value.__qualname__}.{attribute}"] = inner
    return found

before, loaded = code_by_name(), set(sys.modules)
exec(statement, {})
after = code_by_name()
import torch
print(json.dumps({
    "imported": sorted(name for name in optional if name in sys.modules and name not in loaded),
    "patched": sorted(name for name in before if after.get(name) is not before[name]),
    "device": torch.cuda.is_initialized(),
}))
"""

QUIET = {"imported": [], "patched": [], "device": False}


def effects(statement: str, *preload: str) -> dict[str, Any]:
    """What running `statement` in a fresh interpreter, after importing `preload`, loads and replaces."""
    arguments = json.dumps([preload, statement, OPTIONAL])
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", WATCH, arguments], cwd=ROOT, capture_output=True, text=True, check=True
    )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_import_loads_no_optional_package_and_patches_nothing_in_torch() -> None:
    # torch._inductor first: loading it, torch rewraps functions of its own (torch.manual_seed), which is not our doing.
    assert effects("import simba_fx", "torch._inductor.compile_fx") == QUIET


def test_import_of_the_folder_under_its_own_name_is_refused() -> None:
    done = subprocess.run([sys.executable, "-c", "import passes"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        "ImportError: This folder was imported as 'passes'; expected 'simba_fx.passes'. Operators and passes must exist"
        " once: write `from simba_fx import passes`."
    )


def test_import_patches_nothing_in_transformers() -> None:
    pytest.importorskip("transformers")
    models = ("transformers.models.mamba.modeling_mamba", "transformers.models.mamba2.modeling_mamba2")
    assert effects("import simba_fx", "torch", *models) == QUIET


@pytest.mark.parametrize(
    ("statement", "key", "name"),
    [
        ("import simba_fx, matplotlib", "imported", "matplotlib"),
        (
            "import simba_fx, torch; torch.nn.Linear.forward = lambda self, x: x",
            "patched",
            "torch.nn.modules.linear.Linear.forward",
        ),
        (
            "import simba_fx, torch; torch.nn.functional.silu = lambda x: x",
            "patched",
            "torch.nn.functional.silu",
        ),
    ],
    ids=["import", "method", "function"],
)
def test_the_watch_sees_an_import_that_does_more(statement: str, key: str, name: str) -> None:
    assert name in effects(statement, "torch")[key]


def run(script: str) -> list[str]:
    """The lines that a script prints in a fresh interpreter."""
    command = [sys.executable, "-W", "ignore", "-c", script]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()


def test_the_operators_are_imported_alone() -> None:
    """A process that runs an exported program needs no more than them."""
    loaded = "print(*sorted(name for name in sys.modules if name.split('.')[0] == 'simba_fx'))"
    (names,) = run(f"import sys, simba_fx.ops; {loaded}")
    found = {name for name in names.split() if not name.startswith("simba_fx.ops")}
    assert found == {"simba_fx", "simba_fx.errors", "simba_fx.schedule"}
    (names,) = run(f"import sys; from simba_fx import Linear, ops; {loaded}")
    assert {name for name in names.split() if not name.startswith("simba_fx.ops")} == found
    (names,) = run(f"import sys, simba_fx; simba_fx.transform; {loaded}")
    assert {"simba_fx.api", "simba_fx.passes", "simba_fx.frontends.transformers.model"} <= set(names.split())


def test_names_are_found_however_they_are_asked_for() -> None:
    assert run(
        "from simba_fx.runtime.program import Program\n"
        "import simba_fx\n"
        "from simba_fx import passes, program\n"
        "print(program.__name__, simba_fx.program is program, passes.__name__)\n"
        "print(simba_fx.errors.SimbaError.__name__, simba_fx.frontends.__name__)"
    ) == ["program True simba_fx.passes", "SimbaError simba_fx.frontends"]
    assert run(
        "import simba_fx\nprint(set(simba_fx.__all__) <= set(dir(simba_fx)), hasattr(simba_fx, 'nonsense'))\n"
        "from simba_fx import *\nprint(load.__module__, report.__module__)\n"
        "try:\n    simba_fx.nonsense\nexcept AttributeError as error:\n    print(error)"
    ) == ["True False", "simba_fx.saving simba_fx.reporting", "module 'simba_fx' has no attribute 'nonsense'"]


def sources() -> set[str]:
    """Files of the checkout that belong in a wheel, by their place in it."""
    found = {
        path.relative_to(ROOT).as_posix()
        for pattern in ("*.py", "*.cpp", "py.typed")
        for path in (ROOT / "simba_fx").rglob(pattern)
    }
    return found | {f"simba_fx/passes/{path.relative_to(ROOT / 'passes')}" for path in (ROOT / "passes").rglob("*.py")}


def test_a_clone_that_is_not_installed_is_whole(tmp_path: Path) -> None:
    """`python` at its top imports the sources, whatever is installed: a newcomer's first line."""
    for folder in ("simba_fx", "passes"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    code = "import simba_fx, simba_fx.passes.score_tokens as one; print(simba_fx.transform.__module__, one.__file__)"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["simba_fx.api", str(tmp_path / "passes" / "score_tokens.py")]


@pytest.mark.slow
def test_a_wheel_holds_the_whole_package_and_nothing_else(tmp_path: Path) -> None:
    checkout = tmp_path / "checkout"
    for folder in ("simba_fx", "passes"):
        shutil.copytree(ROOT / folder, checkout / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, checkout)
    build = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        ".",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(tmp_path),
    ]
    subprocess.run(build, cwd=checkout, check=True)

    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        held = set(archive.namelist())
        archive.extractall(tmp_path / "site")
    package = {name for name in held if ".dist-info/" not in name}
    assert package == sources()
    assert {"simba_fx/passes/__init__.py", "simba_fx/py.typed"} <= package
    assert any(name.endswith("/LICENSE") for name in held - package)

    locate = "import simba_fx, simba_fx.passes as passes; print(passes.__file__)"
    done = subprocess.run(
        [sys.executable, "-c", locate], cwd=tmp_path / "site", capture_output=True, text=True, check=True
    )
    assert Path(done.stdout.strip()) == tmp_path / "site" / "simba_fx" / "passes" / "__init__.py"
