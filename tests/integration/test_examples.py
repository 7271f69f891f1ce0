"""The examples run as a newcomer runs them: in a process of their own, with nothing set up for them."""

from __future__ import annotations

import ast
import importlib
import json
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


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


def test_own_recurrence(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, str(EXAMPLES / "own_recurrence.py")], capture_output=True, text=True, timeout=300, cwd=tmp_path
    )
    assert result.returncode == 0, result.stderr
    dense, pruned, counts, refused = result.stdout.splitlines()
    assert float(dense.split()[-1]) == 0
    assert 0 < float(pruned.split()[-1]) < 10
    assert counts == "tokens that entered each block: 200 165 129 93 57 21"
    assert refused.startswith("refused: eroding is not linear in v: on a few random tokens the contributions of all")


def test_the_model_of_the_example_is_about_sixty_lines() -> None:
    """It is documentation: short enough to read, and its own code knows nothing of simba_fx."""
    text = (EXAMPLES / "own_model.py").read_text()
    model = text.split("# --- the model")[1].split("# --- making it sparse")[0]
    assert len(model.splitlines()) <= 65
    assert "simba_fx" not in model


def test_vision_mamba(tmp_path: Path) -> None:
    """With hardly any training: the numbers differ, the lines do not; and the picture is one."""
    command = [sys.executable, str(EXAMPLES / "vision_mamba.py"), "--steps", "2"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    dense, head, *table, saved = result.stdout.splitlines()
    assert re.fullmatch(r"dense: 0\.\d{3} of the directions told, chance 0\.25", dense)
    assert " ".join(head.split()) == "schedule mean share FLOPs of dense accuracy keeping random tokens"
    rows = [line.split() for line in table]
    assert [row[0] for row in rows] == [f"Linear(final={final})" for final in (0.5, 0.3, 0.1)]
    shares, flops, *accuracies = ([float(row[i]) for row in rows] for i in range(1, 5))
    assert 1 > shares[0] > shares[1] > shares[2] > 0.5
    assert 1 > flops[0] > flops[1] > flops[2] > 0.5
    assert all(0 <= found <= 1 for column in accuracies for found in column)
    assert saved == "saved vision_mamba.png: the patches that entered the last block"
    assert (tmp_path / "vision_mamba.png").read_bytes().startswith(b"\x89PNG")


def test_package(tmp_path: Path) -> None:
    """With two cuts, which compile sooner: a package on its own gives the sparse model's values at other sizes."""
    command = [sys.executable, "-W", "ignore", str(EXAMPLES / "package.py")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    *steps, sizes, loaded, imported, one, two, three = result.stdout.splitlines()
    told = [re.sub(r" +[\d.]+ s$", "", line) for line in (*steps, loaded)]
    assert told == ["transformed", "exported", "compiled by AOTInductor", "loaded and run in a fresh process"]
    assert re.fullmatch(r"exported\.pt2: 1[2-9]\.\d MB, sparse\.pt2: 1[2-9]\.\d MB", sizes)
    assert imported == "imported there besides torch and the operators: nothing"
    pattern = r"(\d) x (\d+) bytes, (\d+) in the last block: largest difference exported (\S+), compiled (\S+)"
    found = [[float(n) for n in re.fullmatch(pattern, line).groups()] for line in (one, two, three)]
    assert [row[:3] for row in found] == [[1, 700, 71], [4, 150, 16], [3, 64, 8]]
    assert all(exported == 0 and compiled < 1e-3 for *_, exported, compiled in found), found
    assert not list(tmp_path.iterdir()), "nothing is left behind"


def test_needles_are_planted_before_they_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    train = importlib.import_module("train_needles")
    texts = [b"".join(f"line = {i}\n".encode() for i in range(200))]
    for seed in range(20):
        ids, answers = train.window(texts, 400, 3, random.Random(seed))
        text = bytes(ids)
        assert len(text) == 401
        assert len(answers) == 3 * train.ANSWER
        for begin in answers[:: train.ANSWER]:
            value = text[begin : begin + train.ANSWER]
            line = text[:begin].rpartition(b"\n")[2]
            assert re.fullmatch(rb'assert TOKEN_[A-Z] == "', line)
            planted = b'TOKEN_%c = "%s"\n' % (line[13], value)
            assert text.count(planted) == 1
            assert text.index(planted) < begin
            assert answers[answers.index(begin) : answers.index(begin) + train.ANSWER] == [*range(begin, begin + 6)]


def test_training_on_needles_goes_on_where_it_stopped(tmp_path: Path) -> None:
    options = ["--lengths", "64", "--tokens", "128", "--steps", "2", "--threads", "1"]
    command = [sys.executable, str(EXAMPLES / "train_needles.py"), "--out", str(tmp_path), *options]
    steps = []
    for _ in range(2):
        result = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert result.returncode == 0, result.stderr
        steps.append(json.loads(result.stdout.splitlines()[-1])["step"])
    assert steps == [2, 4]


def test_chat_goes_on_and_reads_again(tmp_path: Path) -> None:
    options = ["--first", "400", "--second", "120", "--windows", "2", "--repeats", "1"]
    command = [sys.executable, "-W", "ignore", str(EXAMPLES / "chat.py"), *options]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    pattern = r"(.{18}) +[\d.]+ ms \([\d.]+ to [\d.]+\)   loss - dense ([+-][\d.]+) ± [\d.]+"
    found = [re.fullmatch(pattern, line) for line in result.stdout.splitlines()[2:]]
    assert [match[1].strip() for match in found] == ["dense, whole", "pruned, whole", "pruned, in turns"]
    assert float(found[0][2]) == 0
    assert all(abs(float(match[2])) < 0.5 for match in found)


def test_a_small_model_trains_from_nothing_and_goes_on(tmp_path: Path) -> None:
    sizes = ["--width", "16", "--blocks", "2", "--length", "64", "--tokens", "128", "--threads", "1"]
    sizes += ["--packages", "pluggy"]
    command = [sys.executable, "-W", "ignore", str(EXAMPLES / "train_small.py"), "--out", str(tmp_path / "new"), *sizes]
    for steps in (["--steps", "2"], ["--steps", "1", "--schedule", "0.5", "--last", "8"]):
        result = subprocess.run([*command, *steps], capture_output=True, text=True, timeout=300)
        assert result.returncode == 0, result.stderr
    lines = [json.loads(line) for line in (tmp_path / "new" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 3]
    assert [line["bytes"] for line in lines] == [2 * 2 * 65, 3 * 2 * 65]
    assert all(1 < line["loss"] < 7 for line in lines)
    hybrid = [*command, "--family", "qwen3.5", "--blocks", "4", "--steps", "1", "--out", str(tmp_path / "hybrid")]
    result = subprocess.run(hybrid, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    layers = json.loads((tmp_path / "hybrid" / "config.json").read_text())["layer_types"]
    assert layers == ["linear_attention"] * 3 + ["full_attention"]


def test_memory_of_chunks_is_measured() -> None:
    script = EXAMPLES.parent / "benchmarks" / "chunked_prefill.py"
    command = [sys.executable, "-W", "ignore", str(script), "--one", "jamba", "2048", "512"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert 0 <= float(result.stdout.split()[-1]) < 1000


def test_what_dropped_tokens_could_leave_behind_is_measured() -> None:
    """The script stops where dropping alone is not what simba_fx computes."""
    script = EXAMPLES.parent / "benchmarks" / "beyond_dropping.py"
    command = [sys.executable, str(script), "--count", "2", "--length", "256"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    rows = [line.split(" | ") for line in result.stdout.splitlines() if line.startswith("| 0.")]
    left = ["dense", "drop", "merge", "half", "decay", "both"]
    assert [row[:2] for row in rows] == [[f"| {share}", what] for share in (0.5, 0.3) for what in left]
    assert all(row[3].startswith("+0.0000 ±") for row in rows if row[1] == "drop")


def test_of_a_hybrid_too() -> None:
    """Likewise, on one window and two needles."""
    folder = EXAMPLES.parent / "benchmarks"
    code = "import beyond_dropping; print(beyond_dropping.of_a_hybrid(1, 0.5, 'recent', 1, 128))"
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=folder)
    assert result.returncode == 0, result.stderr
    found = ast.literal_eval(result.stdout)
    assert [*found] == ["drop", "keys", "back"]
    assert all([len(needles), len(losses)] == [2, 1] for needles, losses in found.values())
    assert found["drop"][1] != found["keys"][1] != found["back"][1]
