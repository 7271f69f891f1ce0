"""`simba-fx eval` and `calibrate`: every number against one that is computed here, on the trained checkpoint."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference
import torch
from models import CHECKPOINT, dense, tokens
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import MambaForCausalLM

import simba_fx
from simba_fx import cli
from simba_fx.errors import SimbaError
from simba_fx.evaluation import statistics, tables
from simba_fx.evaluation.flow import flow
from simba_fx.evaluation.page import write_page
from simba_fx.evaluation.tasks import Haystacks
from simba_fx.evaluation.texts import windows
from simba_fx.schedule import Explicit

TEXT = Path(__file__).parent.parent
LENGTH, LAST, WINDOWS, NEAR = 160, 20, 4, 32
ARGUMENTS = ["eval", str(CHECKPOINT), "--text", str(TEXT / "unit"), "--lengths", str(LENGTH), "--last", str(LAST),
             "--windows", str(WINDOWS), "--schedules", "0.5", "--criteria", "simba-l2/5", "recent", "--near", str(NEAR),
             "--gain", "0.2", "--baselines", "left-truncation", "layer-drop", "utrc", "--device", "cpu"]  # fmt: skip

NEEDLES = ["--tasks", "needles", "--searches", "2", "--depths", "0", "1", "--pairs", "2"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out: Path = tmp_path_factory.mktemp("eval")
    assert cli.main([*ARGUMENTS, *NEEDLES, "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def results(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "results.json").read_text())
    return found


@pytest.fixture(scope="module")
def rows() -> Tensor:
    files = sorted(file for file in (TEXT / "unit").rglob("*") if file.is_file() and file.suffix != ".pyc")
    texts = [torch.tensor(list(file.read_bytes())) for file in files if file.stat().st_size > LENGTH + 1]
    return windows(texts, WINDOWS, LENGTH + 1, 0)


def losses(model: torch.nn.Module, rows: Tensor) -> Tensor:
    with torch.no_grad():
        logits = model(rows[:, :-1]).logits[:, -LAST:]
    return cross_entropy(logits.transpose(1, 2), rows[:, -LAST:], reduction="none")


def of(results: dict[str, Any], name: str) -> dict[str, Any]:
    return next(row for row in results["text"] if row["name"] == name)


def test_losses_are_those_of_the_models_themselves(results: dict[str, Any], rows: Tensor) -> None:
    model = MambaForCausalLM.from_pretrained(CHECKPOINT).eval()
    dense = losses(model, rows)
    assert of(results, "dense")["loss"] == pytest.approx(float(dense.mean()), abs=1e-4)
    sparse = simba_fx.transform(model, 0.5, criterion="simba-l2", span=5)
    with simba_fx.tail(sparse, LAST):
        over = (losses(sparse, rows) - dense).mean(1).numpy()
    row = of(results, "0.5, simba-l2/5")
    assert row["more"]["value"] == pytest.approx(over.mean(), abs=1e-4)
    assert row["more"]["error"] == pytest.approx(over.std(ddof=1) / np.sqrt(WINDOWS), abs=1e-4)
    short = of(results, "left-truncation at the cost of 0.5")
    tokens = int(short["says"].split()[6])
    assert LAST < tokens < LENGTH
    over = (losses(model, rows[:, -tokens - 1 :]) - dense).mean(1).numpy()
    assert short["more"]["value"] == pytest.approx(over.mean(), abs=1e-4)


def test_far_tokens_are_chosen_by_the_dense_model(results: dict[str, Any], rows: Tensor) -> None:
    model = MambaForCausalLM.from_pretrained(CHECKPOINT).eval()
    dense, near = losses(model, rows), losses(model, rows[:, -NEAR - LAST - 1 :])
    chosen = (near - dense > 0.2) & (dense < 2)
    assert 0 < int(chosen.sum()) < chosen.numel()
    sparse = simba_fx.transform(model, 0.5, criterion="recent")
    with simba_fx.tail(sparse, LAST):
        over = losses(sparse, rows) - dense
    row = of(results, "0.5, recent")
    assert row["far_share"] == pytest.approx(float(chosen.double().mean()))
    assert row["far"]["n"] == int(chosen.sum())
    assert row["far"]["value"] == pytest.approx(float(over[chosen].mean()), abs=1e-3)


def test_rivals_cost_what_the_first_criterion_costs(results: dict[str, Any]) -> None:
    leader = of(results, "0.5, simba-l2/5")
    assert 0.4 < leader["share"] < 0.7
    assert of(results, "left-truncation at the cost of 0.5")["share"] == pytest.approx(leader["share"], abs=0.01)
    blocks = of(results, "layer-drop at the cost of 0.5")
    assert blocks["share"] == pytest.approx(leader["share"], abs=0.06)  # a twelfth is a block
    assert of(results, "0.5, recent")["share"] < leader["share"], "it has no scorer"
    merged = of(results, "utrc at the cost of 0.5")
    assert merged["share"] == pytest.approx(leader["share"], abs=0.02)
    assert re.fullmatch(r"ratio 0\.\d{4} after blocks 2, 3, 4, 5, 6, 7, 8", merged["says"])
    assert 0 < merged["more"]["value"] < 5, "it is a model still"
    sparse = simba_fx.transform(MambaForCausalLM.from_pretrained(CHECKPOINT).eval(), 0.5, criterion="simba-l2", span=5)
    with simba_fx.tail(sparse, LAST):
        total = simba_fx.report(sparse, torch.ones(1, LENGTH, dtype=torch.int64), logits_to_keep=LAST).total
    assert leader["flops"] == pytest.approx(total.sparse_with_scorer, rel=0.01)


def test_tables_and_pictures_are_written(folder: Path, results: dict[str, Any]) -> None:
    text = (folder / "table.md").read_text()
    assert text == tables.markdown(results)
    for row in results["text"][1:]:
        assert f"| {row['name']} | {row['share']:.3f} |" in text
    assert "4 windows" in text
    assert "160 tokens, needles, one of 2: accuracy over 4 searches" in text
    for picture in ("compute.png", "needles.png"):
        assert (folder / picture).stat().st_size > 10_000


def test_a_run_that_was_stopped_goes_on(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = folder / "measured.jsonl"
    whole, before = log.read_text(), (folder / "results.json").read_text()
    lines = whole.splitlines(keepends=True)
    log.write_text("".join(lines[:4]) + lines[4][:30])  # the last line was cut off
    assert cli.main([*ARGUMENTS, *NEEDLES, "--out", str(folder)]) == 0
    after = json.loads((folder / "results.json").read_text())
    assert after["text"] == json.loads(before)["text"]
    assert after["tasks"] == json.loads(before)["tasks"]
    assert sorted(log.read_text().splitlines()) == sorted(whole.splitlines())
    capsys.readouterr()
    assert cli.main([*ARGUMENTS, "--seed", "1", "--out", str(folder)]) == 2
    assert "measurements of another run (text, seed" in capsys.readouterr().err


def test_measurements_of_other_questions_are_not_taken_for_answers(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Other searches, other leaders of baselines, other weights in a folder of the same name."""
    asked = [
        *ARGUMENTS,
        "--criteria",
        "recent",
        "simba-l2/5",
        "--tasks",
        "needles",
        "--searches",
        "1",
        "--depths",
        "0.5",
        "--pairs",
        "2",
    ]
    found = []
    for out in (folder, tmp_path / "fresh"):
        assert cli.main([*asked, "--out", str(out)]) == 0
        results = json.loads((out / "results.json").read_text())
        found.append((results["text"], results["tasks"]))
    assert found[0] == found[1]
    other = tmp_path / CHECKPOINT.name
    model = MambaForCausalLM.from_pretrained(CHECKPOINT)
    with torch.no_grad():
        model.backbone.norm_f.weight[0] += 1
    model.save_pretrained(other)
    capsys.readouterr()
    assert cli.main([asked[0], str(other), *asked[2:], "--out", str(folder)]) == 2
    assert "measurements of another run (weights differ)" in capsys.readouterr().err


LINES = torch.tensor(list(("x" * 19 + "\n").encode() * 100))


def haystacks(*texts: Tensor, pairs: int = 3) -> Haystacks:
    return Haystacks(texts, lambda text: list(text.encode()), pairs, "code", 0)


@pytest.mark.parametrize("task", ["needles", "lookup"])
def test_lines_stand_where_they_should(task: str) -> None:
    for search in haystacks(LINES).searches(task, 400, [0.0, 0.5, 1.0], 3):
        ids = bytes(search.ids[0].tolist())
        assert len(ids) == 400 + search.answer
        question, answer = ids[: -search.answer], ids[-search.answer :].decode()
        line = question.rpartition(b"\n")[2].decode()
        assert re.fullmatch(r'assert TOKEN_[A-Z]+ == "', line)
        planted = f'{line[7:-5]} = "{answer}"\n'.encode()
        assert question.count(planted) == 1
        assert question.index(planted) / len(question) == pytest.approx(search.depth, abs=0.2)
        assert question.count(b"TOKEN_") == 4 if task == "needles" else question.count(b"TOKEN_") > 12
    with pytest.raises(SimbaError, match="texts of at least 4000 tokens; found none"):
        list(haystacks(LINES).searches(task, 4000, [0.0], 1))


def test_a_string_is_copied_from_where_it_was_planted() -> None:
    text = torch.arange(1000) % 97  # an own end of lines: token 10
    for search in haystacks(text).searches("copying", 300, [0.0, 0.5, 1.0], 4):
        ids = search.ids[0].tolist()
        assert len(ids) == 300 + 8 == len(ids[:300]) + search.answer
        string = ids[-16:]
        place = next(i for i in range(300) if ids[i : i + 16] == string)
        assert place / 284 == pytest.approx(search.depth, abs=0.2)


def test_scattered_tokens_are_the_answer_in_their_order() -> None:
    text = torch.arange(1000) % 97
    for search in haystacks(text).searches("selective", 300, [0.0, 0.5, 1.0], 4):
        ids = search.ids[0].tolist()
        noise = max(set(ids), key=ids.count)
        assert len(ids) == 300 + search.answer == 300 + 16
        *haystack, asked = ids[:300]
        assert [token for token in haystack if token != noise] == ids[300:]
        assert asked not in (noise, *ids[300:])
        places = [place for place, token in enumerate(haystack) if token != noise]
        assert search.depth * 150 - 1 <= places[0] < places[-1] <= search.depth * 150 + 150
    with pytest.raises(SimbaError, match="3 different tokens and --lengths of 33 and more; found 97 and 32"):
        list(haystacks(text).searches("selective", 32, [0.0], 1))


def test_recall_has_one_value_for_each_key() -> None:
    for search in haystacks(torch.arange(1000) % 97, pairs=5).searches("recall", 300, [0.0, 0.5, 1.0], 4):
        ids = search.ids[0].tolist()
        assert len(ids) == 301
        key, value = ids[-2:]
        places = [i for i in range(299) if ids[i] == key]
        assert [ids[i + 1] for i in places] == [value], "planted once, and its value follows"
        assert places[0] / 297 == pytest.approx(search.depth, abs=0.05)
    with pytest.raises(SimbaError, match="more than 5 different tokens; the texts hold 4"):
        list(haystacks(torch.arange(1000) % 4, pairs=5).searches("recall", 300, [0.0], 1))


def test_windows_do_not_overlap_and_come_from_all_texts() -> None:
    texts = [torch.arange(1000 * i, 1000 * i + 95) for i in range(4)]
    found = windows(texts, 100, 30, seed=3)
    assert len(found) == 12
    assert len(found.unique()) == 12 * 30
    assert {int(row[0]) // 1000 for row in found[:4]} == {0, 1, 2, 3}
    with pytest.raises(SimbaError, match="holds 0 windows of 200 tokens; expected at least 2"):
        windows(texts, 4, 200, seed=0)


def test_the_error_of_a_ratio_is_that_of_repeated_draws() -> None:
    """Against the spread of the ratio over many samples of windows, which have few and many such tokens."""
    generator = torch.Generator().manual_seed(0)

    def draw(n: int) -> tuple[Tensor, Tensor]:
        counts = torch.randint(0, 9, (n,), generator=generator)
        centre = 0.3 + 0.1 * torch.randn(n, generator=generator, dtype=torch.float64)
        return centre * counts, counts

    estimates = [statistics.ratio(*draw(40)) for _ in range(2000)]
    values = np.array([e.value for e in estimates if e])
    assert np.mean([e.error for e in estimates if e]) == pytest.approx(values.std(), rel=0.1)
    assert statistics.ratio(torch.tensor([1.0, 0.0]), torch.tensor([3, 0])) is None
    half = statistics.share(torch.tensor([True, False] * 50))
    assert (half.value, half.n) == (0.5, 100)
    assert half.error == pytest.approx(0.05)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (["--criteria", "simba/x"], "with a span behind a slash where scores are pooled; found 'simba/x'"),
        (["--criteria", "simba-l3"], "Unknown criterion 'simba-l3'"),
        (["--criteria", "simba+recent"], "'simba+recent' combines scores of scans; 'recent' looks at positions only"),
        (["--criteria", "recent/5"], "span=5 pools the scores of scans; criterion 'recent'"),
        (["--lengths", "20"], "expected more than --last 20, found 20"),
        (["--windows", "1"], "--windows expects whole numbers of at least 2; found 1"),
        (["--text", "nowhere"], "--text expects files or folders; found nothing at nowhere"),
        (["--schedules", "1.5"], "1.5"),
        (["--against", "mamba-tiny"], "has a vocabulary of 61, the model one of 256"),
        (["--depths", "2"], "--depths expects shares of the context"),
        (["--lengths", "9000000"], "holds 0 windows of 9000001 tokens"),
    ],
)
def test_what_cannot_be_run_is_refused(
    change: list[str], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([*ARGUMENTS, *change, "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert told in said
    assert "Traceback" not in said


def test_help_imports_nothing_heavy() -> None:
    code = "import sys; from simba_fx import cli; cli.parser(); print({'torch', 'transformers'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"


# --- flow ------------------------------------------------------------------------------------------------------------


def test_flow_is_that_of_the_models_own_states_and_scans() -> None:
    model, ids = dense("mamba"), tokens(0, 3, 40)
    found = flow(simba_fx.transform(model, "dense"), ids)
    with torch.no_grad():
        hidden = [model.get_input_embeddings()(ids)]
        for layer in model.base_model.layers:
            hidden.append(layer(hidden[-1]))
    for states, row in zip(hidden[1:], found.similarity, strict=True):
        unit = states / states.norm(dim=2, keepdim=True)
        torch.testing.assert_close(row, (unit[:, 1:] * unit[:, :-1]).sum(2).mean(1))
    for index, row in enumerate(ids):
        with reference.recorded_scans(model) as calls, torch.no_grad():
            model(row[None])
        for block, call in enumerate(calls):
            weight = reference.score(reference.operands(call), 39, "simba-l2")[0]
            far = (weight * np.arange(39, -1, -1)).sum() / weight.sum()
            assert float(found.distance[block, index]) == pytest.approx(far, rel=1e-3)


def test_flow_of_a_sparse_model_counts_tokens_of_the_input() -> None:
    model, ids = dense("mamba"), tokens(0, 2, 40)
    sparse = simba_fx.transform(model, 0.5, criterion="recent")
    found, whole = flow(sparse, ids), flow(simba_fx.transform(model, "dense"), ids)
    assert torch.equal(found.distance[0], whole.distance[0]), "the first block reads everything"
    assert [len(entered[0]) for entered in simba_fx.kept(sparse)][1:] == [21] * (len(found.distance) - 1)
    alone = flow(simba_fx.transform(model, "dense"), ids[:, -21:])
    assert float(found.distance[1].max()) < 21, "the most recent ones"
    assert not torch.allclose(found.similarity[-1], alone.similarity[-1]), "they have met the others in block 0"


def test_the_command_flow_draws_what_it_prints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "flow.png"
    asked = [
        "flow",
        str(CHECKPOINT),
        "--text",
        str(TEXT / "unit"),
        "--tokens",
        "64",
        "--windows",
        "3",
        "--schedules",
        "0.5",
    ]
    assert cli.main([*asked, "--out", str(picture)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["dense"] * 12 + ["0.5"] * 12
    assert picture.stat().st_size > 10_000


# --- calibrate -------------------------------------------------------------------------------------------------------


def test_calibrate_measures_solves_and_checks(rows: Tensor) -> None:
    model = MambaForCausalLM.from_pretrained(CHECKPOINT).eval()
    found = simba_fx.calibrate(model, rows, 0.7, last=LAST, shares=(0.6, 0.3), span=5)
    dense = losses(model, rows)
    assert found.dense_loss == pytest.approx(float(dense.mean()), abs=1e-4)
    assert list(found.damage) == list(range(1, 12))
    sparse = simba_fx.transform(model, Explicit([1] * 7 + [0.3] * 5), span=5)
    with simba_fx.tail(sparse, LAST):
        assert found.damage[7][0.3] == pytest.approx(float((losses(sparse, rows) - dense).mean()), abs=1e-4)
    for name, (schedule, cost, loss) in found.candidates.items():
        assert cost <= 0.7
        assert name in str(found)
        sparse = simba_fx.transform(model, schedule, span=5)
        with simba_fx.tail(sparse, LAST):
            told = simba_fx.report(sparse, rows[:1, :-1], logits_to_keep=LAST)
            assert loss.value == pytest.approx(float((losses(sparse, rows) - dense).mean()), abs=1e-4), name
        assert cost == pytest.approx(told.total.share, abs=0.005), name
    assert found.schedule == min(found.candidates.values(), key=lambda held: held[2].value)[0]


def test_the_solved_schedule_is_the_best_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against every non-increasing choice of shares, on a cost and damages that are made up."""
    import itertools

    from simba_fx.evaluation import calibration

    draw = np.random.default_rng(0)
    shares = (1.0, 0.6, 0.3)
    flops = dataclasses.make_dataclass("Flops", ["blocks", "scores", "before", "head"])(
        [lambda n, w=w: int(w * n) for w in (5, 9, 2, 7, 4)], [lambda n: n] * 5, lambda n: 0, lambda n: 3 * n
    )
    cost = calibration._Cost(flops, 100000, 1, 5, 1)
    monkeypatch.setattr(calibration._Cost, "dense", lambda self: 27 * 100000 + 3 * 100000)
    for budget in (0.56, 0.7, 0.9):
        damage = {place: dict(zip(shares[1:], sorted(draw.random(2)))) for place in range(1, 5)}
        lost, chosen = calibration._solve(damage, cost, shares, budget)
        every = []
        for choice in itertools.product(shares, repeat=4):
            if list(choice) == sorted(choice, reverse=True) and cost.places(choice) <= budget:
                held = [{1.0: 0.0, **damage[place]} for place in range(1, 5)]
                steps = zip((1.0, *choice), choice, held)
                every.append(sum(max(0.0, harm[after] - harm[before]) for before, after, harm in steps))
        assert cost.places(chosen) <= budget
        assert lost == pytest.approx(min(every), abs=0.02)


def test_calibrate_refuses_what_it_cannot_do(rows: Tensor) -> None:
    model = MambaForCausalLM.from_pretrained(CHECKPOINT).eval()
    with pytest.raises(SimbaError, match=r"windows \(n, L \+ 1\), n at least 2"):
        simba_fx.calibrate(model, rows[:1])
    with pytest.raises(SimbaError, match=r"no schedule within budget=0\.2; the least of shares=0\.7 costs 0\.7"):
        simba_fx.calibrate(model, rows, 0.2, last=LAST, shares=(0.7,))


# --- the page --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out: Path = tmp_path_factory.mktemp("page") / "page.html"
    source = out.with_name("text.py")
    source.write_text('def f(x):\n    return "</script><b>&amp;" + x  # é\n' * 6)
    model = ["page", str(CHECKPOINT), "--text", str(source), "--tokens", "200", "--device", "cpu", "--out", str(out)]
    assert cli.main([*model, "--schedule", "Linear(0.2)", "--criterion", "simba-l2/5"]) == 0
    return out


def told(page: Path) -> list[list[Any]]:
    """What the page's script was given."""
    line = page.read_text().partition("const tokens = ")[2]
    tokens: list[list[Any]] = json.JSONDecoder().raw_decode(line)[0]
    return tokens


def test_a_page_says_how_far_each_token_travelled(page: Path) -> None:
    text = page.with_name("text.py").read_bytes()[:200]
    sparse = simba_fx.transform(
        MambaForCausalLM.from_pretrained(CHECKPOINT).eval(), simba_fx.Linear(0.2), criterion="simba-l2", span=5
    )
    with torch.no_grad():
        sparse(torch.tensor([list(text)]), use_cache=False)
    blocks = simba_fx.kept(sparse)
    for place, (token, depth) in enumerate(told(page)):
        assert token.encode("latin-1") == text[place : place + 1]
        assert depth == sum(place in entered[0].tolist() for entered in blocks)
    strange = ["<!-- <script> @COLOURS@", *"x" * 199]  # what would end or change the page
    other = page.with_name("other.html")
    write_page(sparse, strange, other, title="@TOKENS@ </title>")
    assert [token for token, _ in told(other)] == strange
    assert "<!--" not in other.read_text()
    assert "<title>@TOKENS@ &lt;/title&gt;</title>" in other.read_text()
    with pytest.raises(SimbaError, match="one text for each of the 200 tokens of the last call; found 3"):
        write_page(sparse, list("abc"), page)


@pytest.mark.skipif(shutil.which("chromium") is None, reason="no browser")
def test_a_browser_shows_the_page(page: Path, tmp_path: Path) -> None:
    switches = ("headless", "no-sandbox", "disable-gpu", "no-first-run", "disable-background-networking")
    command = [
        "chromium",
        *(f"--{name}" for name in switches),
        "--virtual-time-budget=2000",
        f"--user-data-dir={tmp_path}",
        "--dump-dom",
        page.as_uri(),
    ]
    shown = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout
    body = shown.partition('<div id="text"')[2].partition("</div>")[0]
    assert body.count("<span") == 200
    assert "&lt;/script&gt;&lt;b&gt;&amp;amp;" in "".join(re.findall(r">([^<]*)</span>", body))
    assert "0: 200 of 200" in shown
