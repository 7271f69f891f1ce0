"""`simba-fx bench` on tiny models: what it writes is checked against independent computations, never a time itself."""

from __future__ import annotations

import copy
import functools
import itertools
import json
import math
import statistics
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import simba_fx
from simba_fx import cli
from simba_fx.bench import compile_modes, measure, models, parts, peers, results, tables, utrc
from simba_fx.bench.options import MODES, BenchError, Mode, parse_schedule
from simba_fx.bench.variants import compiler_settings

CPU = torch.device("cpu")
EVERY = "Linear(0.2, every=2)"
LENGTHS = (40, 96)
NAMES = ("dense", "linear", EVERY, "delta-norm", "utrc", "left-truncation", "layer-drop")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """One run of the command: eager, two lengths, two rows, two schedules, every peer, decoding."""
    folder = tmp_path_factory.mktemp("bench")
    arguments = ["bench", "--model", "mamba-tiny", "--device", "cpu", "--modes", "eager", "--repeats", "3",
                 "--warmup", "0", "--batches", "2", "--lengths", *map(str, LENGTHS), "--schedules", "linear", EVERY,
                 "--decode", "4", "--peers", *NAMES[3:], "--out", str(folder)]  # fmt: skip
    assert cli.main(arguments) == 0
    found: dict[str, Any] = json.loads((folder / "results.json").read_text())
    return found, folder


def rows_of(found: dict[str, Any], name: str) -> dict[int, dict[str, Any]]:
    return {row["length"]: row for row in found["rows"] if row["name"] == name}


def test_every_point_is_there(run: tuple[dict[str, Any], Path]) -> None:
    found, folder = run
    assert [(row["length"], row["name"]) for row in found["rows"]] == list(itertools.product(LENGTHS, NAMES))
    assert all(row["batch"] == 2 and row["mode"] == "eager" and len(row["seconds"]) == 3 for row in found["rows"])
    assert all(row["recompiles"] is None and row["graphs"] == 0 for row in found["rows"])
    assert found["environment"]["versions"]["torch"] == torch.__version__
    assert {"machine", "date", "kernels"} <= found["environment"].keys()
    assert found["options"]["head"] == "last"
    assert sorted(path.name for path in folder.iterdir()) == ["results.json", "shares.png", "speed.png", "table.md"]
    assert all((folder / name).read_bytes().startswith(b"\x89PNG") for name in ("speed.png", "shares.png"))


def test_figures_of_merit_follow_from_the_raw_numbers(run: tuple[dict[str, Any], Path]) -> None:
    found, folder = run
    text = (folder / "table.md").read_text()
    for name in NAMES[1:]:
        for length, row in rows_of(found, name).items():
            dense = rows_of(found, "dense")[length]
            speedup = statistics.median(dense["seconds"]) / statistics.median(row["seconds"])
            sparse, scorer = row["flops"]["total"], row["flops"]["scorer"]
            assert row["merit"] == pytest.approx(speedup * sparse / dense["flops"]["total"])
            assert row["merit_with_scorer"] == pytest.approx(speedup * (sparse + scorer) / dense["flops"]["total"])
            printed = next(line for line in text.splitlines() if line.startswith(f"| {length} | {name} |")).split("|")
            assert printed[9].split()[0] == f"{row['merit']:.2f}"
            assert row["speedup_low"] <= row["speedup"] <= row["speedup_high"]


def test_flops_are_those_of_the_report(run: tuple[dict[str, Any], Path]) -> None:
    found, _ = run
    model = models.build("mamba-tiny", CPU, torch.float32)
    for schedule in ("linear", EVERY):
        sparse = simba_fx.transform(model, parse_schedule(schedule))
        for length, row in rows_of(found, schedule).items():
            total = simba_fx.report(sparse, torch.ones(2, length, dtype=torch.int64), logits_to_keep=1).total
            assert row["flops"]["total"] == total.sparse
            assert row["flops"]["scorer"] == total.scorer > 0
            assert rows_of(found, "dense")[length]["flops"]["total"] == total.dense


def test_peers_cost_what_the_first_schedule_costs(run: tuple[dict[str, Any], Path]) -> None:
    found, _ = run
    for length, row in rows_of(found, "linear").items():
        target = row["flops"]["total"] + row["flops"]["scorer"]
        block = rows_of(found, "dense")[length]["flops"]["total"] / 6
        one_token = rows_of(found, "dense")[length]["flops"]["total"] / length
        for name, within in (("utrc", 0.02 * target), ("left-truncation", one_token / 2), ("layer-drop", block / 2)):
            flops = rows_of(found, name)[length]["flops"]
            assert rows_of(found, name)[length]["target_flops"] == target
            assert abs(flops["total"] + flops["scorer"] - target) <= within, name
        delta_norm = rows_of(found, "delta-norm")[length]["flops"]  # the same blocks, scored for less
        assert delta_norm["total"] == row["flops"]["total"]
        assert 0 < delta_norm["scorer"] < row["flops"]["scorer"]


def test_shares_add_up_and_only_pruning_scores(run: tuple[dict[str, Any], Path]) -> None:
    found, _ = run
    for name in NAMES[:3]:
        for row in rows_of(found, name).values():
            assert sum(row["shares"].values()) == pytest.approx(1)
            assert (row["shares"]["score"] > 0) == (row["shares"]["select"] > 0) == (name != "dense")
            assert row["shares"]["scan"] > 0
            assert row["peak_bytes"] > 0
    assert "shares" not in rows_of(found, "utrc")[LENGTHS[0]]


def test_decoding_is_timed_token_by_token(run: tuple[dict[str, Any], Path]) -> None:
    found, _ = run
    assert [(row["name"], row["length"], len(row["seconds"])) for row in found["decode"]] == [
        ("dense", LENGTHS[-1], 2 * 3),
        ("linear", LENGTHS[-1], 2 * 3),
    ]


def test_a_point_without_memory_is_said(run: tuple[dict[str, Any], Path]) -> None:
    found = copy.deepcopy(run[0])
    point = {"model": "mamba-tiny", "mode": "eager", "batch": 2, "length": 999, "name": "all", "kind": "error"}
    found["rows"].append(point | {"error": "out of memory"})
    line = next(line for line in tables.markdown(found).splitlines() if line.startswith("| 999 |"))
    assert [cell.strip() for cell in line.split("|")[1:5]] == ["999", "all", "out of memory", ""]
    assert results.crossovers(found["rows"]) == found["crossover"]


# --- arithmetic -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("speedups", "expected"),
    [
        ({1: 0.5, 2: 0.9, 4: 1.1, 8: 1.5}, 4),
        ({1: 1.2, 2: 0.9, 4: 1.1}, 4),
        ({8: 1.5, 1: 1.2}, 1),
        ({1: 1.2, 2: 0.9}, None),
        ({1: 1.0}, None),
        ({}, None),
    ],
)
def test_crossover(speedups: dict[int, float], expected: int | None) -> None:
    assert results.crossover(speedups) == expected


def test_spread_and_merit() -> None:
    assert results.spread([5.0, 1.0, 2.0, 4.0, 3.0]) == {"median": 3, "q1": 2, "q3": 4, "min": 1, "max": 5}
    assert results.merit(2.0, 1.0, 200, 100) == 1.0
    assert results.merit(3.0, 2.0, 200, 100) == 0.75


def test_calls_take_turns() -> None:
    order: list[str] = []
    calls = {name: (lambda name=name: order.append(name)) for name in "ab"}
    found = measure.in_turns(calls, 2, lambda call: float(call() is None))
    assert order == ["a", "b", "a", "b"]
    assert found == {"a": [1.0, 1.0], "b": [1.0, 1.0]}


def test_peak_memory_counts_what_is_held_at_once() -> None:
    def call() -> Tensor:
        first = torch.empty(1000, dtype=torch.uint8)
        second = torch.empty(500, dtype=torch.uint8)
        del first
        third = torch.empty(700, dtype=torch.uint8)
        return second + third[:500]

    assert measure.peak_memory(call, CPU) == 500 + 700 + 500


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("simba_fx::selective_token_score", "score"),
        ("_selective_score_kernel", "score"),
        ("simba_fx::select_tokens", "select"),
        ("simba_fx::selective_scan", "scan"),
        ("void selective_scan_fwd_kernel<Selective_Scan_fwd_kernel_traits<128>>", "scan"),
        ("_chunk_scan_fwd_kernel", "scan"),
        ("simba_fx::causal_conv1d", "convolution"),
        ("causal_conv1d_channellast_fwd_kernel", "convolution"),
        ("aten::index", "gather, restore"),
        ("simba_fx::restore_tokens", "gather, restore"),
        ("aten::mm", "GEMM"),
        ("nvjet_hsh_128x256_64x4_2x1_v_bz_coopA_TNT", "GEMM"),
        ("aten::select", None),
        ("triton_red_fused_add_mul_0", None),
    ],
)
def test_parts_by_name(name: str, part: str | None) -> None:
    assert parts.part_of(name) == part


def event(name: str, device: str, time: float, parent: Any = None, kernels: Any = ()) -> SimpleNamespace:
    """What the profiler tells of an operator or a kernel, as far as it is read."""
    return SimpleNamespace(name=name, device_type=SimpleNamespace(name=device), self_device_time_total=time,
                           cpu_parent=parent, kernels=kernels, is_user_annotation=False)  # fmt: skip


def test_kernels_without_a_part_go_to_the_operator_that_launched_them() -> None:
    select = event("simba_fx::select_tokens", "CPU", 0)
    fill, add = (SimpleNamespace(name="elementwise", duration=time) for time in (3.0, 2.0))
    found = parts._kernels([
        select,
        event("aten::fill_", "CPU", 0, parent=select, kernels=[fill]),
        event("aten::add", "CPU", 0, kernels=[add]),
        event("nvjet_hsh", "CUDA", 10),
        event("elementwise", "CUDA", 3),
        event("elementwise", "CUDA", 2),
        event("triton_in_a_cuda_graph", "CUDA", 5),
    ])  # fmt: skip
    assert {part: time for part, time in found.items() if time} == {"GEMM": 10, "select": 3, "fused and other": 2 + 5}


# --- UTRC -------------------------------------------------------------------------------------------------------------


def naive_reduction(residual: Tensor, mixer: Tensor, importance: Tensor, going: int, tail: int) -> Tensor:
    """One row, token by token, float64: `(N, D)`, `(N, D)`, `(N,)` -> `(N - going, D)`."""
    tokens = len(importance)
    order = sorted(range(tokens), key=lambda t: math.inf if t >= tokens - tail else float(importance[t]))
    lower, upper = order[: tokens // 2], order[tokens // 2 :]
    hidden = residual + mixer
    links = []
    for a in (a for a in lower if a < tokens - tail):
        similar = {b: float(torch.cosine_similarity(hidden[a], hidden[b], dim=0)) for b in upper}
        best = max(similar, key=lambda b: similar[b])
        links.append((similar[best], a, best))
    links = sorted(links, reverse=True)[:going]
    merged = {"residual": links, "mixer": links[: (going + 1) // 2]}
    out = {"residual": residual.clone(), "mixer": mixer.clone()}
    for branch, values in (("residual", residual), ("mixer", mixer)):
        for b in upper:
            sources = [values[a] for _, a, target in merged[branch] if target == b]
            if sources:
                out[branch][b] = (values[b] + sum(sources) / len(sources)) / 2
    gone = {a for _, a, _ in links}
    return torch.stack([out["residual"][t] + out["mixer"][t] for t in range(tokens) if t not in gone])


@pytest.mark.parametrize(("tokens", "going", "tail"), [(13, 1, 1), (13, 4, 1), (20, 10, 1), (7, 3, 2), (12, 3, 9)])
def test_utrc_merges_and_drops_as_a_loop_does(tokens: int, going: int, tail: int) -> None:
    torch.manual_seed(tokens + going)
    residual, mixer = torch.randn(2, 3, tokens, 5, dtype=torch.float64)
    importance = torch.rand(3, tokens, dtype=torch.float64)
    found = utrc.reduce_tokens(residual, mixer, importance, going, tail)
    expected = torch.stack([naive_reduction(residual[b], mixer[b], importance[b], going, tail) for b in range(3)])
    torch.testing.assert_close(found, expected)


def test_utrc_reduces_where_it_was_described() -> None:
    assert utrc.places(64) == (12, 17, 22, 27, 32, 37, 42)
    assert utrc.places(48) == (10, 15, 20, 25, 30, 35)
    assert utrc.places(6) == (1, 2, 3, 4)
    assert [utrc.removed(10, 0.5, tail) for tail in (1, 7, 10)] == [5, 3, 0]
    for ratio, cut in ((0.9729, 0.10), (0.9415, 0.20), (0.9043, 0.30)):  # of the layers' FLOPs, published
        assert 1 - sum(utrc.counts(64, 100_000, ratio)) / (64 * 100_000) == pytest.approx(cut, abs=2e-3)


@pytest.mark.parametrize("name", ["mamba-tiny", "mamba2-tiny"])
def test_utrc_runs_the_models_own_blocks(name: str) -> None:
    model = models.build(name, CPU, torch.float32)
    ids = torch.randint(1, 61, (2, 30), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        rival = utrc.UTRC(model)
        torch.testing.assert_close(rival(ids), model(ids).logits, atol=1e-4, rtol=1e-4)
        rival.ratio = 0.7
        left = 30
        for _ in rival.places:
            left -= 30 and left - math.ceil(0.7 * left)
        assert rival(ids).shape == (2, left, 61)


def test_layer_drop_keeps_the_ends_and_the_model() -> None:
    model = models.build("mamba-tiny", CPU, torch.float32)
    shorter = peers.fewer_blocks(model, 3)
    layers = list(model.backbone.layers)
    assert [layers.index(layer) for layer in shorter.backbone.layers] == [0, 2, 5]
    assert len(model.backbone.layers) == model.config.num_hidden_layers == 6


# --- models and options -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("mamba-130m", 129),
        ("mamba-2.8b", 2768),
        ("mamba2-130m", 129),
        ("mamba2-2.7b", 2703),
        ("bamba-0.9b", 855),
        ("qwen3.5-0.5b", 525),
        ("qwen3.5-9b", 8954),
    ],
)
def test_named_models_have_their_published_sizes(name: str, millions: int) -> None:
    model = models.build(name, torch.device("meta"), torch.bfloat16)
    assert models.weights(model) / 1e6 == pytest.approx(millions, rel=0.01)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--model", "mamba-3b"], "--model expects one of mamba-130m"),
        (["--layers", "99"], "expected 2 to 24 blocks"),
        (["--schedules", "liner"], "--schedules expects linear, cosine"),
        (["--schedules", "Linear(final=2)"], "expected final in (0, 1]"),
        (["--modes", "cuda-graphs"], "needs a CUDA device"),
        (["--flush-l2"], "--flush-l2 empties a GPU's cache"),
        (["--fresh-cache", "--modes", "eager"], "only uncompiled modes"),
        (["--peers", "utrc", "--schedules"], "found no schedule"),
        (["--model", "bamba-tiny", "--peers", "utrc"], "whose blocks are all alike"),
        (["--criterion", "best"], "Unknown criterion 'best': expected one of 'simba'"),
        (["--repeats", "1"], "--repeats expects whole numbers of at least 2; found 1"),
        (["--decode", "2"], "at least 3 tokens"),
        (["--device", "tpu"], "--device expects cpu or cuda"),
    ],
)
def test_options_are_refused_with_a_sentence(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    device = [] if "--device" in arguments else ["--device", "cpu"]
    assert cli.main(["bench", *device, "--out", str(tmp_path / "none"), *arguments]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "none").exists(), "refused before anything is written"


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what is said without a GPU")
def test_cuda_is_refused_where_there_is_none(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "--device", "cuda"]) == 2
    assert "expects a CUDA device that torch can use" in capsys.readouterr().err


def test_schedules_are_written_as_in_python() -> None:
    assert parse_schedule("linear") == simba_fx.Linear()
    assert parse_schedule("0.5") == simba_fx.Constant(0.5)
    assert parse_schedule("Linear(0.1, every=4)") == simba_fx.Linear(0.1, every=4)
    assert parse_schedule("{3: 0.5}") == simba_fx.Stages({3: 0.5})
    for text in ("__import__('os')", "Linear(open('x'))", "dense", "Dense()"):
        with pytest.raises(BenchError, match="--schedules expects"):
            parse_schedule(text)


def test_asking_for_help_imports_nothing_heavy() -> None:
    heavy = {"torch", "transformers", "matplotlib"}
    code = f"import sys\nfrom simba_fx import cli\ncli.parser()\nprint(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# --- compiling --------------------------------------------------------------------------------------------------------


def test_no_model_runs_uncompiled_unnoticed() -> None:
    """Dynamo gives up on a function that many models share after a few of them; here that would be an error."""
    with compiler_settings():
        assert torch._dynamo.config.fail_on_recompile_limit_hit
        assert torch._dynamo.config.recompile_limit > 100
    assert torch._dynamo.config.recompile_limit < 100


def test_graphs_are_counted() -> None:
    before = measure.graphs_compiled()
    double = torch.compile(lambda x: 2 * x, backend="eager", dynamic=False)
    for size in (3, 4, 3):
        double(torch.ones(size))
    assert measure.graphs_compiled() - before == 2


def test_one_compilation_serves_every_length(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What Dynamo captures, and when it does so again, does not depend on the backend: Inductor is left out."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    arguments = ["bench", "--model", "mamba-tiny", "--layers", "2", "--device", "cpu", "--modes", "compiled",
                 "--repeats", "2", "--warmup", "0", "--batches", "2", "--lengths", "40", "96", "--schedules", "0.5",
                 "--fresh-cache", "--out", str(tmp_path)]  # fmt: skip
    assert cli.main(arguments) == 0
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert [(row["name"], row["recompiles"]) for row in rows] == [
        ("dense", None), ("0.5", None), ("dense", 0), ("0.5", 0),
    ]  # fmt: skip
    assert all((row["graphs"] > 0) == (row["length"] == 40) for row in rows)
    assert "Graphs compiled again over all these lengths: dense 0, 0.5 0." in (tmp_path / "table.md").read_text()


def test_a_way_that_takes_too_long_is_stopped_and_said() -> None:
    asked: dict[str, Any] = {"model": "mamba-tiny", "threads": None, "device": "cpu"}
    found = compile_modes.measure_way(asked, limit=0.2)
    assert found["stopped"]
    cells = compile_modes._cells({"way": "sparse-blocks", **found}, 0.2)
    assert cells == ["sparse-blocks", "> 0.2", *[""] * 8]


def test_ways_of_compiling() -> None:
    assert len(compile_modes.WAYS) == 10
    assert [name for name, way in compile_modes.WAYS.items() if way.graphs and way.dynamic] == []
    assert {mode.compile for mode in MODES.values()} == {"blocks", "whole"}
    assert all(isinstance(mode, Mode) for mode in MODES.values())
    assert tables.table(("a", "b"), [("1", "2")], left=1) == ["| a | b |", "| --- | ---: |", "| 1 | 2 |"]
