"""The examples run as a newcomer runs them: in a process of their own, with nothing set up for them."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def test_own_model(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, str(EXAMPLES / "own_model.py")], capture_output=True, text=True, timeout=300, cwd=tmp_path
    )
    assert result.returncode == 0, result.stderr
    dense, pruned, counts, *compiled = result.stdout.splitlines()

    def number(line: str) -> float:
        return float(line.split()[-1])

    assert dense.startswith("keep 1.0")
    assert number(dense) < 1e-5
    assert 0 < number(pruned) < 1
    assert counts == "tokens that entered each block: 200 165 129 93 57 21"
    assert [re.findall(r"compiled, (\d+) tokens", line) for line in compiled] == [["200"], ["120"]]
    assert all(number(line) < 1e-4 for line in compiled)


def test_the_model_of_the_example_is_about_sixty_lines() -> None:
    """It is documentation: short enough to read, and its own code knows nothing of simba_fx."""
    text = (EXAMPLES / "own_model.py").read_text()
    model = text.split("# --- the model")[1].split("# --- making it sparse")[0]
    assert len(model.splitlines()) <= 65
    assert "simba_fx" not in model
