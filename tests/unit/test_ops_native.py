"""Which kernels run: building and loading the C++ ones, what happens without a compiler, what threads may change; and
what packages for a GPU are called, and whether they are there."""

from __future__ import annotations

import functools
import importlib.metadata
import json
import os
import shutil
import stat
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from simba_fx import ops
from simba_fx.ops import backends
from simba_fx.ops.cpu import cache, native
from simba_fx.ops.cuda import packages as cuda
from simba_fx.ops.recurrences import recurrence_of


@pytest.fixture
def undecided(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """`native.load` as in a new process with an empty cache: gives the cache directory."""
    monkeypatch.setenv("SIMBA_FX_CACHE", str(tmp_path))
    monkeypatch.delenv("SIMBA_FX_NATIVE", raising=False)
    native.load.cache_clear()
    yield tmp_path
    native.load.cache_clear()


needs_compiler = pytest.mark.skipif(native.kernels() is None, reason=f"no native kernels: {native.load()}")


def script(path: Path, text: str) -> str:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


def scan_runs() -> bool:
    operands = (torch.ones(1, 3, 5), torch.ones(1, 3, 5), -torch.ones(3, 2), torch.ones(1, 2, 5), torch.ones(1, 2, 5))
    return bool(ops.selective_scan(*operands)[0].isfinite().all())


def test_switched_off(undecided: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SIMBA_FX_NATIVE", "0")
    assert ops.kernel_path("cpu") == "torch (SIMBA_FX_NATIVE=0)"
    assert scan_runs()
    assert list(undecided.iterdir()) == []


def test_a_compiler_that_is_not_there(undecided: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert ops.kernel_path("cpu") == "torch (no C++ compiler found: CXX=no-such-compiler is not on the path)"
    assert scan_runs()


def test_a_compiler_that_fails(undecided: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = script(
        undecided / "c++", '[ "$1" = -dumpfullversion ] && echo 1.0 && exit; echo internal error >&2; exit 1'
    )
    monkeypatch.setenv("CXX", broken)
    assert ops.kernel_path("cpu") == f"torch ({broken} failed: internal error)"
    assert scan_runs()
    assert list(undecided.glob("*.so")) == []


@needs_compiler
def test_a_flag_the_compiler_lacks_is_left_out(undecided: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = native._compiler()
    picky = script(undecided / "c++", f'case "$*" in *-fopenmp*) exit 1;; esac; exec {real} "$@"')
    monkeypatch.setenv("CXX", picky)
    path = ops.kernel_path("cpu")
    assert path.startswith("C++ (c++ ")
    assert "OpenMP" not in path
    assert scan_runs()


@needs_compiler
def test_kernels_are_built_once(undecided: Path) -> None:
    assert ops.kernel_path("cpu").startswith("C++ (")
    stamps = {file.name: file.stat().st_mtime_ns for file in undecided.iterdir()}
    assert sorted(name.rpartition(".")[2] for name in stamps) == ["json", "so"]
    native.load.cache_clear()
    assert native.kernels() is not None
    assert {file.name: file.stat().st_mtime_ns for file in undecided.iterdir()} == stamps


@needs_compiler
def test_first_uses_may_race(tmp_path: Path) -> None:
    environment = {**os.environ, "SIMBA_FX_CACHE": str(tmp_path)}
    code = "from simba_fx import ops; assert ops.kernel_path('cpu').startswith('C++'), ops.kernel_path('cpu')"
    racers = [subprocess.Popen([sys.executable, "-c", code], env=environment) for _ in range(3)]
    assert [racer.wait() for racer in racers] == [0, 0, 0]
    assert sorted(file.suffix for file in tmp_path.iterdir()) == [".json", ".so"]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache that a process of its own filled."""
    folder = tmp_path_factory.mktemp("built") / "cache"
    run_in(folder)
    return folder


FORKS = """
import json, os, sys
from simba_fx import ops

for line in sys.stdin:
    if os.fork() == 0:
        os.environ.update(json.loads(line))
        print(ops.kernel_path("cpu"), os.getenv("TORCHINDUCTOR_CACHE_DIR"), flush=True)
        os._exit(0)
    print("ended", os.waitstatus_to_exitcode(os.wait()[1]), flush=True)
"""
"""A process that has torch, and has not looked for kernels: each question is answered by a child of its own."""


@functools.cache
def _forks() -> subprocess.Popen[str]:
    environment = {name: held for name, held in os.environ.items() if name != "TORCHINDUCTOR_CACHE_DIR"}
    pipe = subprocess.PIPE
    return subprocess.Popen([sys.executable, "-c", FORKS], env=environment, stdin=pipe, stdout=pipe, text=True)


@pytest.fixture(scope="module", autouse=True)
def _forks_end() -> Iterator[None]:
    yield
    if _forks.cache_info().currsize:
        _forks().communicate()
        _forks.cache_clear()


def run_in(folder: Path, **variables: str) -> str:
    """`kernel_path` of a new process with that cache: where a bad file crashes it, the test goes on and fails."""
    forks: Any = _forks()
    print(json.dumps({"SIMBA_FX_CACHE": str(folder), **variables}), file=forks.stdin, flush=True)
    told = forks.stdout.readline().strip()
    assert not told.startswith("ended"), told
    assert forks.stdout.readline() == "ended 0\n"
    path, asked = told.rsplit(" ", 1)
    assert asked == "None", "asking set Inductor's folder"
    return path


@needs_compiler
def test_the_cache_is_its_owners_alone(built: Path) -> None:
    assert stat.S_IMODE(built.stat().st_mode) == 0o700
    assert {stat.S_IMODE(file.stat().st_mode) for file in built.iterdir()} == {0o600}


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    monkeypatch.delenv("SIMBA_FX_CACHE", raising=False)
    for caches, expected in (("", ".cache"), ("relative", ".cache"), (str(tmp_path / "caches"), "caches")):
        monkeypatch.setenv("XDG_CACHE_HOME", caches)
        assert cache.folder() == tmp_path / expected / "simba_fx"
    monkeypatch.setenv("SIMBA_FX_CACHE", str(tmp_path / "mine"))
    assert cache.folder() == tmp_path / "mine"


def library_in(folder: Path) -> Path:
    (library,) = folder.glob("*.so")
    return library


def described_in(folder: Path) -> Path:
    (described,) = folder.glob("*.json")
    return described


def plant(folder: Path) -> None:
    """Another library, whose code must not run: what loads it exits."""
    source = folder.parent / "planted.cpp"
    source.write_text("#include <cstdlib>\n__attribute__((constructor)) static void planted() { std::_Exit(66); }\n")
    made = folder.parent / "planted.so"
    subprocess.run([native._compiler(), "-shared", "-fPIC", str(source), "-o", str(made)], check=True)
    os.replace(made, library_in(folder))


def without_our_symbols(folder: Path) -> None:
    """Whole, by its digest, and of no use."""
    source, described = folder.parent / "other.cpp", described_in(folder)
    source.write_text('extern "C" int other() { return 0; }\n')
    made = folder.parent / "other.so"
    subprocess.run([native._compiler(), "-shared", "-fPIC", str(source), "-o", str(made)], check=True)
    library_in(folder).unlink()
    key, _, compiler = described.stem.partition("-")
    cache.keep(folder, key, compiler, "g++ 1.0", made)


def linked(folder: Path) -> None:
    library = library_in(folder)
    library.rename(folder.parent / "elsewhere.so")
    library.symlink_to(folder.parent / "elsewhere.so")


BROKEN: dict[str, Callable[[Path], object]] = {
    "planted": plant,
    "without our symbols": without_our_symbols,
    "truncated": lambda folder: os.truncate(library_in(folder), library_in(folder).stat().st_size // 2),
    "empty": lambda folder: os.truncate(library_in(folder), 0),
    "gone": lambda folder: library_in(folder).unlink(),
    "a link": linked,
    "writable by others": lambda folder: library_in(folder).chmod(0o666),
    "a pipe": lambda folder: (library_in(folder).unlink(), os.mkfifo(described_in(folder).with_suffix(".so"))),
    "no JSON": lambda folder: described_in(folder).write_text("{"),
    "no digest": lambda folder: described_in(folder).write_text('{"compiler": "g++"}'),
    "a path for a digest": lambda folder: described_in(folder).write_text('{"compiler": "g++", "sha256": "../x"}'),
    "another kind": lambda folder: described_in(folder).write_text('{"compiler": 3, "sha256": [1]}'),
}


@needs_compiler
@pytest.mark.parametrize("case", BROKEN)
def test_a_library_that_is_not_ours_or_not_whole_is_not_loaded(case: str, built: Path, tmp_path: Path) -> None:
    """Without a compiler there are no kernels, and the reason is told; with one they are built anew, and stay."""
    folder = tmp_path / "cache"
    shutil.copytree(built, folder)
    BROKEN[case](folder)
    told = run_in(folder, CXX="no-such-compiler")
    assert told.startswith("torch (no C++ compiler found: CXX=no-such-compiler is not on the path; ")
    assert str(folder) in told
    if case in ("planted", "without our symbols", "truncated", "empty", "a link", "no JSON"):  # seconds each
        assert run_in(folder).startswith("C++ (")
        assert run_in(folder, CXX="no-such-compiler").startswith("C++ (")


@needs_compiler
def test_kernels_serve_where_their_compiler_is_gone(built: Path) -> None:
    path = run_in(built)
    assert path.startswith("C++ (")
    assert run_in(built, CXX="no-such-compiler") == path
    assert run_in(built, PATH="/nowhere") == path


@needs_compiler
@pytest.mark.parametrize("case", ["others may write", "another owner", "a link", "a file", "no folder"])
def test_a_cache_that_is_not_ones_own_is_not_used(case: str, undecided: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels are then built for the process alone, and `kernel_path` says why."""
    place = undecided / "cache"
    monkeypatch.setenv("SIMBA_FX_CACHE", str(place))
    if case in ("others may write", "another owner"):
        place.mkdir()
        place.chmod(0o770 if case == "others may write" else 0o700)
        owner = os.getuid()
        monkeypatch.setattr(os, "getuid", lambda: owner + (case == "another owner"))
    elif case == "a link":
        (undecided / "real").mkdir(mode=0o700)
        place.symlink_to(undecided / "real")
    else:
        place.write_text("")
        if case == "no folder":
            monkeypatch.setenv("SIMBA_FX_CACHE", str(place / "inside"))
    told = {
        "others may write": f"{place} may be written by others (mode 770), expected 700)",
        "another owner": f"{place} belongs to user {os.getuid() - 1}, expected {os.getuid()})",
        "a link": f"no cache: {place} is a link or a file, expected a folder)",
        "a file": f"no cache: {place} is a link or a file, expected a folder)",
        "no folder": "no cache: [Errno 17] File exists: ",
    }[case]
    path = ops.kernel_path("cpu")
    assert path.startswith("C++ (")
    assert f"; {told}" in path
    assert scan_runs()
    assert not list(undecided.glob("*/*"))


@needs_compiler
def test_a_cache_that_cannot_be_written(undecided: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        if _[0] == undecided:
            raise OSError(28, "No space left on device")
        return real(*_)

    real = cache.keep
    monkeypatch.setattr(cache, "keep", refuse)
    assert ops.kernel_path("cpu").endswith("; not cached: [Errno 28] No space left on device)")
    assert scan_runs()
    assert list(undecided.iterdir()) == []


def test_importing_builds_nothing(tmp_path: Path) -> None:
    code = "import sys, simba_fx.ops; assert not {'transformers', 'mamba_ssm'} & set(sys.modules)"
    environment = {**os.environ, "SIMBA_FX_CACHE": str(tmp_path)}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("device", ["cuda", "mps"])
def test_other_devices_say_what_they_run(device: str) -> None:
    assert ops.kernel_path(device).startswith(("torch (", "mamba_ssm ", "fla ", "triton "))


def test_a_kind_of_scan_names_the_packages_that_run_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "delta_rule_fn", lambda: None)
    assert ops.kernel_path("cuda", recurrence_of("delta_scan").packages) == "torch (cannot import fla)"
    monkeypatch.setattr(cuda, "delta_rule_fn", lambda: print)
    monkeypatch.setattr(backends, "version", {"fla": "0.6.0"}.__getitem__)
    assert ops.kernel_path("cuda", recurrence_of("delta_scan").packages) == "fla 0.6.0 (in half precision)"


@pytest.mark.parametrize("named", ["its distribution", "itself", "nowhere"])
def test_a_package_whose_distribution_has_another_name(named: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's may be pytorch-triton."""
    monkeypatch.setattr(backends, "version", backends.version.__wrapped__)  # as in a new process
    monkeypatch.setattr(cuda, "ssd_scan_fn", lambda: None)
    monkeypatch.setattr(cuda, "delta_rule_fn", lambda: None)
    monkeypatch.setattr(backends, "triton_kernels", object)
    module = types.ModuleType("triton")
    monkeypatch.setitem(sys.modules, "triton", module)
    distributions = {"triton": "3.1"} if named == "its distribution" else {}
    if named != "nowhere":
        module.__dict__["__version__"] = "3.2+git"

    def version(name: str) -> str:
        if name not in distributions:
            raise importlib.metadata.PackageNotFoundError(name)
        return distributions[name]

    monkeypatch.setattr(importlib.metadata, "version", version)
    right = {"its distribution": "3.1", "itself": "3.2+git", "nowhere": "of unknown version"}[named]
    assert ops.kernel_path("cuda") == f"triton {right}"


@pytest.mark.parametrize("error", ["ImportError", "OSError", "AttributeError", "RuntimeError", "KeyError", "TypeError"])
def test_a_broken_package_counts_as_not_there(error: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / f"broken_by_{error}.py").write_text(f"raise {error}('built for another torch')")
    monkeypatch.syspath_prepend(tmp_path)
    assert cuda._function(f"broken_by_{error}", "scan") is None


@needs_compiler
def test_too_many_states_take_the_torch_path(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("the C++ kernel was called")

    monkeypatch.setattr(native, "selective_scan", refuse)
    u, B = torch.ones(1, 1, 2), torch.ones(1, 300, 2)
    assert ops.selective_scan(u, u, -torch.ones(1, 300), B, B)[1].shape == (1, 1, 300)


def scan_arguments(rows: int = 2, channels: int = 200, length: int = 70) -> tuple[torch.Tensor, ...]:
    random = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=random)

    tokens = (normal(rows, channels, length), normal(rows, channels, length))
    return *tokens, -normal(channels, 16).abs(), normal(rows, 16, length), normal(rows, 16, length)


def gradients() -> tuple[torch.Tensor, ...]:
    leaves = [t.requires_grad_() for t in scan_arguments()]
    y, last = ops.selective_scan(*leaves, None, None, None, True)
    return torch.autograd.grad(y.sum() + last.sum(), leaves)


def scores() -> tuple[torch.Tensor, ...]:
    return (ops.selective_token_score(*scan_arguments(), None, True, None, 1, "simba"),)


def outputs() -> tuple[torch.Tensor, ...]:
    return tuple(ops.selective_scan(*scan_arguments(), None, None, None, True))


@needs_compiler
@pytest.mark.parametrize("compute", [outputs, gradients, scores])
def test_results_do_not_depend_on_the_threads(compute: Callable[[], tuple[torch.Tensor, ...]]) -> None:
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = compute()
        torch.set_num_threads(4)
        four, again = compute(), compute()
    finally:
        torch.set_num_threads(threads)
    for a, b, c in zip(one, four, again):
        assert torch.equal(a, b)
        assert torch.equal(b, c)


@needs_compiler
def test_rows_do_not_depend_on_their_batch() -> None:
    arguments = scan_arguments(rows=3)
    y, last = ops.selective_scan(*arguments, None, None, None, True)
    alone = [t[1:2] if t.dim() == 3 else t for t in arguments]
    y_alone, last_alone = ops.selective_scan(*alone, None, None, None, True)
    assert torch.equal(y[1:2], y_alone)
    assert torch.equal(last[1:2], last_alone)


@needs_compiler
def test_special_values_reach_the_output() -> None:
    """NaN stays NaN in its channel and from its token on; infinite steps without softplus forget the past."""
    u, delta, A, B, C = scan_arguments(rows=1, channels=20, length=8)
    u[0, 3, 2] = float("nan")
    y, _ = ops.selective_scan(u, delta.abs(), A, B, C)
    nan = torch.zeros(20, 8, dtype=torch.bool)
    nan[3, 2:] = True
    assert torch.equal(y[0].isnan(), nan)
