"""Settings every test shares. Warnings are errors: the policy and its exceptions stand in pyproject.toml."""

from __future__ import annotations

import collections
import functools
import gc
import importlib.metadata
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings

# Two pytest-xdist workers with a thread pool each, on two cores, spend their time waiting for each other.
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)

# No test reads the lines of Python behind a graph's nodes, a tenth of each capture. (torch 2.11 always notes them.)
if hasattr(torch.fx.config, "do_not_emit_stack_traces"):
    torch.fx.config.do_not_emit_stack_traces = True

# Traces are large heaps of objects that live: looking through them again and again takes a seventh of the time.
gc.set_threshold(100_000, 50, 100)


def in_one_chunk(run: Callable[[], None]) -> None:
    """Run a test where the frames of all that it calls find room. CPython keeps frames in chunks of 16 kB, and where a
    loop calls across the edge of one, each call maps memory and gives it back: an eighth of the time of tests that
    trace. A frame of half a megabyte, this one, brings a chunk of a megabyte."""
    run()


in_one_chunk.__code__ = in_one_chunk.__code__.replace(co_stacksize=1 << 16)


@pytest.fixture(autouse=True, scope="module")
def _frozen() -> None:
    """What has been imported and captured before a file's tests stays: the collector need not look at it again."""
    gc.collect()
    gc.freeze()


# No deadline: an example that compiles, or the first that builds an operator, takes seconds. In CI the examples are the
# same every time, so a failure there is a failure of the change under test.
settings.register_profile("simba_fx", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("simba_fx-ci", settings.get_profile("simba_fx"), derandomize=True, print_blob=True)
settings.load_profile("simba_fx-ci" if os.environ.get("CI") else "simba_fx")


# --- the table of capabilities ------------------------------------------------------------------------------------
# `make table`: what the tests marked `capability` showed, model by model. The README holds a copy.

COLUMNS = ("parity", "padding", "generate", "continue", "train", "compile")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--capabilities", action="store_true", help="print a table of what each model can do")


LONG = ("test_families.py", "test_compile.py", "test_dynamo_backend.py", "test_mamba_ssm.py", "test_quantised.py",
        "test_triton.py", "test_distributed.py", "test_examples.py", "test_export.py", "test_finetuning.py",
        "test_bench.py", "test_gpu_check.py", "test_docs.py")  # fmt: skip
"""Files that take minutes, some for a single test: they start first, so that no worker is left waiting for one."""


def skip_what_fails_by_itself(items: list[pytest.Item]) -> None:
    """FalconH1 of transformers 5.17 makes two tokens of one on a CPU, so that it cannot decode."""
    if tuple(map(int, importlib.metadata.version("transformers").split(".")[:2])) >= (5, 24):
        return
    mark = pytest.mark.skip(reason="transformers' own FalconH1 makes two tokens of one")
    for item in items:
        params = getattr(item, "callspec", None) and item.callspec.params.values()  # type: ignore[attr-defined]
        if any("falcon-h1" in (param, getattr(param, "name", None)) for param in params or ()):
            item.add_marker(mark)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """With the option, only tests that stand for a cell run. The cell travels with the test's report."""
    skip_what_fails_by_itself(items)
    for item in items:
        item.runtest = functools.partial(in_one_chunk, item.runtest)  # type: ignore[method-assign]
    items.sort(key=lambda item: item.path.name not in LONG)
    if not config.getoption("--capabilities"):
        return
    items[:] = [item for item in items if item.get_closest_marker("capability")]
    for item in items:
        for mark in item.iter_markers("capability"):
            entry = getattr(item, "callspec", None) and item.callspec.params.get("entry")  # type: ignore[attr-defined]
            item.user_properties.append(("capability", (*mark.args, entry.title if entry else "")[:2]))


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    if config.getoption("--capabilities"):
        terminalreporter.write_line("\n" + "\n".join(table_of(terminalreporter.stats)))
    reports = [report for reports in terminalreporter.stats.values() for report in reports]
    fuzzed: collections.Counter[str] = collections.Counter()
    for report in reports:
        fuzzed.update(dict(value for name, value in getattr(report, "user_properties", ()) if name == "fuzz"))
    if fuzzed:
        terminalreporter.write_line("fuzzed: " + ", ".join(f"{name} {n}" for name, n in sorted(fuzzed.items())))


def table_of(stats: dict[str, list[Any]]) -> list[str]:
    """Markdown: a cell says "yes" where every test that stands for it passed, "NO" where one did not."""
    cells: dict[str, dict[str, bool]] = {}
    for outcome in ("passed", "failed", "error", "skipped"):
        for report in stats.get(outcome, []):
            for column, model in (cell for name, cell in report.user_properties if name == "capability"):
                row = cells.setdefault(model, {})
                row[column] = row.get(column, True) and outcome == "passed"
    head = ["| model | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    word = {True: "yes", False: "NO", None: "–"}
    rows = [f"| {m} | " + " | ".join(word[row.get(c)] for c in COLUMNS) + " |" for m, row in sorted(cells.items())]
    return head + rows
