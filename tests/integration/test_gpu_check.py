"""benchmarks/gpu_check.sh without a GPU: its dry run, and that nothing that is late or fails costs more than itself."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
TRITON = Path(sys.prefix) / "triton"

pytestmark = pytest.mark.skipif(not all(map(shutil.which, ("bash", "timeout"))), reason="no bash, or no timeout")


def run_script(out: Path, only: str, **variables: str) -> tuple[str, list[dict[str, Any]], str]:
    """A dry run of these stages: its summary, its lines of results and its log."""
    environment = os.environ | {"DRY": "1", "PY": sys.executable, "OUT": str(out), "ONLY": only, **variables}
    command = ["bash", str(BENCHMARKS / "gpu_check.sh")]
    done = subprocess.run(command, env=environment, cwd=out, capture_output=True, text=True)
    log = (out / "log.txt").read_text()
    assert done.returncode == 0, f"{log[-5000:]}\n{done.stderr[-2000:]}"
    return (out / "summary.md").read_text(), json.loads((out / "results.json").read_text())["rows"], log


def test_a_dry_run_measures_and_finds_no_error(tmp_path: Path) -> None:
    """The kernels run in Triton's interpreter, which is installed in a folder of its own (see the Makefile)."""
    kernels = {"DRY_PATH": str(TRITON)} if TRITON.is_dir() else {}
    parts = ["a", "e1", "e2", "e3"] if kernels else ["a"]
    summary, rows, log = run_script(tmp_path, "a e" if kernels else "a", BUDGET="400", **kernels)
    for part in parts:
        assert f"{part}: exit status 0" in log
    assert not [row for row in rows if row.get("ok") is False]
    assert summary.endswith("## Errors (0)\n\n")
    assert "* name environment, torch " in summary
    measured = {(row["stage"], row["name"]): row["us"] for row in rows if "us" in row}
    expected = [("a", "copy"), ("a", "gemm x_proj, A channel-last")]
    if kernels:
        expected += [("e1", name) for name in ("score, mamba init", "scan", "conv (odd length)", "select, 8 rows")]
        expected += [
            ("e2", name) for name in ("ssd score, mamba2 init, channel-last", "ssd scan, PyTorch, channel-last")
        ]
        expected += [
            ("e3", name) for name in ("delta rule score, simba-l2", "Kimi delta score, write", "Kimi delta scan")
        ]
    for stage, name in expected:
        assert measured[stage, name] > 0
        assert f"| {name} |" in summary or stage == "a"
    assert not list(tmp_path.glob("*.part"))


def test_without_time_there_is_a_summary_that_says_so(tmp_path: Path) -> None:
    summary, rows, log = run_script(tmp_path, "a e f g h s", BUDGET="5")
    assert rows == []
    assert summary.endswith("## Errors (0)\n\n")
    for part in (
        "a",
        "e1",
        "e2",
        "e3",
        "f1-mamba-16",
        "f4-mamba2-graphs-16",
        "f5-qwen3.5-8192",
        "g",
        "h1-mamba-whole",
        "s",
    ):
        assert f"{part}: left out, no time" in log


def records(tmp_path: Path, script: str, limit: int) -> list[dict[str, Any]]:
    """What a part with these statements records."""
    (tmp_path / "results").mkdir()
    variables = {"DRY": "1", "STAGE": "x", "LIMIT": str(limit), **dict.fromkeys(("WORK", "SITE", "OUT"), str(tmp_path))}
    environment = os.environ | variables | {"PYTHONPATH": str(BENCHMARKS / "gpu_check")}
    subprocess.run([sys.executable, "-c", script], env=environment, cwd=tmp_path, check=True, capture_output=True)
    return [json.loads(line) for line in (tmp_path / "results" / "x.jsonl").read_text().splitlines()]


def test_what_is_late_is_left_out_and_the_part_goes_on(tmp_path: Path) -> None:
    script = "from common import attempt, record\nassert not attempt('late', print, L=3)\nrecord('end')"
    late, end = records(tmp_path, script, limit=0)
    assert (late["ok"], late["error"], late["L"]) == (None, "left out: no time", 3)
    assert end["name"] == "end"


def test_an_error_is_recorded_from_both_ends(tmp_path: Path) -> None:
    """A compiler's message begins with where it ran and ends with what went wrong."""
    script = """
from common import attempt
def fail():
    raise ValueError("\\n".join(f"line {i}" for i in range(40)))
assert not attempt("wrong", fail)
assert attempt("right", lambda: {"us": 1.0})
"""
    wrong, right = records(tmp_path, script, limit=60)
    assert wrong["ok"] is False
    assert wrong["error"] == "ValueError: line 0 | line 1 | line 2 | line 3"
    assert wrong["end"] == [f"line {i}" for i in range(28, 40)]
    assert wrong["where"][-1].endswith("fail")
    assert right["us"] == 1.0
