"""FLOPs, budgets, `report`: against counts by hand, against the rewritten graph, against the picture's pixels."""

from __future__ import annotations

import builtins
import dataclasses
import functools
import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import models
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import simba_fx
from simba_fx import flops
from simba_fx.errors import ScheduleError, SimbaError
from simba_fx.frontends.transformers.model import stack_of
from simba_fx.options import Options
from simba_fx.reporting import DROPPED, KEPT, PADDING, Report
from simba_fx.schedule import resolve_shares

LENGTH = 160


def by_hand(config: Any, tokens: int) -> tuple[int, int, int]:
    """FLOPs per row of a block, its scorer and the LM head, from the sizes in the model's config alone."""
    width, states, taps = config.hidden_size, config.state_size, config.conv_kernel
    inner = config.intermediate_size if hasattr(config, "intermediate_size") else config.expand * width
    head = 2 * width * config.vocab_size
    if "mamba2" in config.model_type:
        heads, groups = config.num_heads, config.n_groups
        mixed = inner + 2 * groups * states
        block = 2 * width * (inner + mixed + heads) + 2 * taps * mixed + 5 * inner * states + 2 * inner * width
        return block * tokens, (2 * groups * states + 2 * inner) * tokens, head * tokens
    rank = config.time_step_rank
    projections = 2 * width * 2 * inner + 2 * inner * (rank + 2 * states) + 2 * rank * inner + 2 * inner * width
    return (projections + 2 * taps * inner + 6 * inner * states) * tokens, 3 * inner * states * tokens, head * tokens


@pytest.mark.parametrize("name", ["mamba", "falcon-mamba", "mamba2-one-group", "mamba2-two-groups"])
def test_flops_are_those_counted_by_hand(name: str) -> None:
    sparse, rows = models.sparse(name, "linear"), 2
    found = simba_fx.report(sparse, models.tokens(0, rows, LENGTH))
    config = models.dense(name).config
    n = config.num_hidden_layers
    for block in found.blocks:
        dense, _, _ = by_hand(config, rows * LENGTH)
        here, scorer, _ = by_hand(config, rows * block.tokens)
        assert (block.flops_dense, block.flops_sparse) == (dense, here)
        assert block.flops_scorer == (scorer if block.index < n - 1 else 0)
    blocks = [by_hand(config, rows * block.tokens) for block in found.blocks]
    head = by_hand(config, rows * LENGTH)[2]
    assert found.stack.dense == n * by_hand(config, rows * LENGTH)[0]
    assert found.stack.sparse == sum(block for block, _, _ in blocks)
    assert found.total.scorer == found.stack.scorer == sum(scorer for _, scorer, _ in blocks[:-1])
    assert found.total.dense == found.stack.dense + head
    assert found.total.sparse == found.stack.sparse + head


@pytest.mark.parametrize(("name", "output"), [("mamba", "full"), ("mamba2-two-groups", "full"), ("mamba", "kept")])
def test_the_rewritten_graph_costs_what_the_report_says(name: str, output: str) -> None:
    """The report evaluates polynomials of the dense graph; here the program's own graph is counted, node by node."""
    sparse = models.sparse(name, "linear", output=output)
    found = simba_fx.report(sparse, models.tokens(1, 3, 97))
    built = simba_fx.program(sparse)
    counts = flops.count(built.graph, built.captured.attributes, built.captured.facts, 3, 97)
    assert [counts.regions[block.index] for block in found.blocks] == [block.flops_sparse for block in found.blocks]
    assert [counts.scores.get(block.index, 0) for block in found.blocks] == [b.flops_scorer for b in found.blocks]
    seen = found.blocks[-1].tokens if output == "kept" else 97
    assert found.total.sparse - found.stack.sparse == by_hand(models.dense(name).config, 3 * seen)[2]


@pytest.mark.parametrize("name", ["mamba", "mamba2-one-group"])
def test_keeping_every_token_costs_the_dense_model_and_the_scorer(name: str) -> None:
    sparse = models.sparse(name, models.keep_all(models.n_blocks(models.dense(name))))
    found = simba_fx.report(sparse, models.tokens(2, 2, LENGTH))
    assert all(block.tokens == LENGTH and block.flops_sparse == block.flops_dense for block in found.blocks)
    assert found.total.sparse == found.total.dense
    assert found.total.scorer > 0
    assert found.ideal_speedup < 1
    assert all("keeps all of so few tokens" in block.reason for block in found.blocks[:-1])


def test_shares_tokens_and_flops_fall_from_block_to_block() -> None:
    found = simba_fx.report(models.sparse("mamba", "linear"), models.tokens(3, 1, LENGTH))
    for above, below in zip(found.blocks[1:], found.blocks):
        assert above.tokens < below.tokens
        assert above.flops_sparse < below.flops_sparse
        assert above.share_asked < below.share_asked
    assert [block.path for block in found.blocks] == [f"backbone.layers.{i}" for i in range(4)]
    assert [bool(block.reason) for block in found.blocks] == [False, False, False, True]


def test_totals_are_consistent() -> None:
    found = simba_fx.report(models.sparse("mamba2-two-groups", "linear"), models.tokens(4, 2, LENGTH))
    for column in ("flops_dense", "flops_sparse", "flops_scorer"):
        total = getattr(found.stack, column.removeprefix("flops_"))
        assert total == sum(getattr(block, column) for block in found.blocks)
    assert found.total.sparse_with_scorer == found.total.sparse + found.total.scorer
    assert found.ideal_speedup == found.total.dense / found.total.sparse_with_scorer
    assert found.ideal_speedup < found.stack.ideal_speedup  # the head costs the same on both sides
    assert found.mean_share == pytest.approx(np.mean([block.share_delivered for block in found.blocks]))


def test_flops_do_not_depend_on_the_kernels_and_those_that_ran_are_named() -> None:
    ids = models.tokens(5, 1, 40)
    ours = simba_fx.report(models.sparse("mamba", "linear"), ids)
    own = simba_fx.report(models.sparse("mamba", "linear", kernels="model"), ids)
    assert own.blocks == ours.blocks
    assert own.total == ours.total
    assert own.kernels.startswith("the model's own: ")
    assert "mamba_selective_scan" in own.kernels
    assert ours.kernels.startswith(("C++ (", "torch ("))
    rule = simba_fx.report(models.sparse("qwen3-5", "linear"), ids)
    assert rule.kernels == "torch (delta rule)"  # there are no kernels for it, whatever the machine has
    assert [block.scan for block in rule.blocks] == ["delta rule", "none", "delta rule", "delta rule"]


# --- budgets -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "share", "shape", "output"),
    [("mamba", 0.5, "constant", "full"), ("mamba2-one-group", 0.7, "cosine", "full"), ("mamba", 0.7, "linear", "kept"),
     ("bamba", 0.8, "linear", "full")],
)  # fmt: skip
def test_a_budget_is_met_to_one_percent(name: str, share: float, shape: str, output: str) -> None:
    budget = simba_fx.Budget(share, shape=shape, length=1024)
    sparse = simba_fx.transform(models.dense(name), budget, output=output, compile="whole")
    found = simba_fx.report(sparse, models.tokens(6, 1, 1024))
    assert share - 0.01 < found.total.share <= share
    assert str(budget) in str(found)
    costs = [simba_fx.report(sparse, models.tokens(6, 1, length)).total.share for length in (40, 5000)]
    assert costs == sorted(costs, reverse=True)  # what is said of other lengths
    assert costs[0] > share > costs[-1] - 0.001


@functools.cache
def price(name: str) -> tuple[flops.BudgetCost, Any]:
    captured = simba_fx.program(models.sparse(name, "linear")).captured
    return flops.BudgetCost(models.dense(name), stack_of(models.dense(name))), captured


@given(
    name=st.sampled_from(["mamba", "mamba2-two-groups", "jamba"]),
    shape=st.sampled_from(["linear", "cosine", "constant"]),
    every=st.sampled_from([1, 1, 2]),
    output=st.sampled_from(["full", "kept"]),
    length=st.integers(6, 4096),
    share=st.floats(0.2, 1),
)
@settings(max_examples=25)
def test_a_budget_is_never_exceeded_and_met_where_a_final_share_meets_it(
    name: str, shape: str, every: int, output: Any, length: int, share: float
) -> None:
    """Against the costs of 100 final shares, from the steepest ramp to just below dense, and of dense."""
    budget = simba_fx.Budget(share, shape, 1 if shape == "constant" else every, length=length)
    counted, captured = price(name)
    cost, n_blocks = counted(captured, Options(budget, output=output), length), captured.facts.n_blocks
    first = 1 if shape == "constant" else -10_000
    steps = {first, 9_999, 10_000, *range(first, 10_000, (10_000 - first) // 100)}
    within = [found for found in (cost(budget._shares(step, n_blocks)) for step in steps) if found <= share]
    try:
        solved = cost(resolve_shares(budget, n_blocks, cost))
    except ScheduleError:
        assert not within
    else:
        assert max(within, default=0.0) <= solved <= share
        if length >= 100:
            assert solved >= share - 0.01


def test_a_budget_gives_every_capture_of_a_model_the_same_shares() -> None:
    sparse = simba_fx.transform(models.dense("mamba"), simba_fx.Budget(0.7, length=64))
    shares = simba_fx.program(sparse).shares
    ids, mask = models.padded([models.tokens(7, 64), models.tokens(8, 50)], left=(0, 0), right=(0, 14))
    found = simba_fx.report(sparse, ids, attention_mask=mask)
    assert len(sparse._simba.variants) == 2
    assert simba_fx.program(sparse).shares == shares
    assert found.total.share == pytest.approx(0.7, abs=0.01)


def test_a_budget_out_of_reach_says_what_is_in_reach() -> None:
    model = models.dense("mamba")
    with pytest.raises(
        ScheduleError, match=r"cannot be met: even with share 0\.0001 from the first cut on the forward costs 0\.\d+"
    ) as error:
        simba_fx.transform(model, simba_fx.Budget(0.1, length=512))
    reachable = float(str(error.value).split("costs ")[1].split(" of")[0])
    captured = simba_fx.program(models.sparse("mamba", "linear")).captured
    cost = flops.BudgetCost(model)(captured, Options(simba_fx.Dense()), 512)
    shares = resolve_shares(simba_fx.Budget(reachable, length=512), 4, cost)
    assert cost(shares) <= reachable
    assert cost((Fraction(1),) * 4) == 1


def test_counting_looks_at_shapes_alone() -> None:
    built = simba_fx.program(models.sparse("mamba", "linear"))
    captured = built.captured
    poisoned = {k: torch.full_like(v, float("nan")) for k, v in captured.attributes.items()}
    one = flops.count(captured.graph, captured.attributes, captured.facts, 2, 33)
    assert flops.count(captured.graph, poisoned, captured.facts, 2, 33).regions == one.regions


@pytest.mark.parametrize("points", [(5, 9, 17), (8, 16, 32)])
def test_a_curve_is_exact_for_quadratics(points: tuple[int, ...]) -> None:
    truth = lambda n: 7 * n * n + 3 * n + 11  # noqa: E731
    curve = flops.Curve(tuple((n, truth(n)) for n in points))
    assert [curve(n) for n in range(40)] == [truth(n) for n in range(40)]
    assert flops.Curve(tuple((n, 0) for n in points))(12) == 0


# --- plain modules and criteria ------------------------------------------------------------------------------------


class Plain(nn.Module):
    """Token ids through a backbone and a head of its own; no transformers model itself."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = models.BY_NAME["mamba"].build().get_submodule("backbone")
        self.backbone.config.use_cache = False
        self.norm = nn.LayerNorm(20)
        self.score = nn.Linear(20, 7)

    def forward(self, input_ids: Tensor) -> Tensor:
        hidden = self.backbone(input_ids, use_cache=False).last_hidden_state
        return self.score(self.norm(hidden))


def test_plain_modules_count_what_follows_their_blocks_as_the_head() -> None:
    sparse = simba_fx.transform(Plain().eval(), simba_fx.Budget(0.8, length=128))
    found = simba_fx.report(sparse, models.tokens(9, 1, 128))
    assert [block.path for block in found.blocks] == [f"backbone.layers.{i}" for i in range(4)]
    assert [block.flops_dense for block in found.blocks] == [by_hand(models.dense("mamba").config, 128)[0]] * 4
    assert found.total.dense - found.stack.dense == 2 * 128 * 20 * 7
    assert found.total.share == pytest.approx(0.8, abs=0.01)


def energy(operands: Any, query: Tensor) -> Tensor:
    """A criterion of matrix products: counted."""
    return torch.einsum("bdl,bdl->bl", operands.u.float(), operands.u.float())


def peeking(operands: Any, query: Tensor) -> Tensor:
    """A criterion that reads values: it runs, and cannot be counted."""
    scale = float(operands.u.abs().max().item())
    return operands.u.float().amax(1) / scale


def test_a_users_criterion_is_counted_where_shapes_suffice() -> None:
    ids = models.tokens(10, 2, LENGTH)
    found = simba_fx.report(simba_fx.transform(models.dense("mamba"), "linear", criterion=energy, compile="whole"), ids)
    assert (found.criterion, found.notes) == ("energy", ())
    assert [b.flops_scorer for b in found.blocks] == [2 * 2 * 40 * b.tokens for b in found.blocks[:-1]] + [0]
    found = simba_fx.report(simba_fx.transform(models.dense("mamba"), "linear", criterion=peeking), ids)
    assert found.total.scorer == 0
    assert found.notes[0].startswith("The criterion needs more than shapes and is not counted: ")
    assert found.notes[0] in str(found)


@pytest.mark.parametrize("criterion", ["recent", "delta-norm"])
def test_other_criteria_by_name(criterion: str) -> None:
    found = simba_fx.report(models.sparse("mamba", "linear", criterion=criterion), models.tokens(11, 1, 64))
    assert found.criterion == criterion
    assert found.total.sparse < found.total.dense


# --- calls ---------------------------------------------------------------------------------------------------------


def test_padded_batches_report_real_tokens() -> None:
    ids, mask = models.padded([models.tokens(12, 120), models.tokens(13, 60)], left=(0, 50), right=(0, 10))
    sparse = models.sparse("mamba", "linear")
    found = simba_fx.report(sparse, ids, attention_mask=mask)
    assert (found.rows, found.length) == (2, 120)
    for block, positions in zip(found.blocks, simba_fx.kept(sparse)):
        assert block.tokens == positions.shape[1]
        assert block.real_tokens == (positions >= 0).sum() / 2
    assert found.blocks[0].real_tokens == 90
    unpadded = simba_fx.report(sparse, ids)
    assert unpadded.total == found.total  # what is computed is the rectangle
    assert unpadded.blocks[0].real_tokens is None


@pytest.mark.parametrize("length", [1, 2, 5])
def test_short_inputs_lose_nothing_and_say_why(length: int) -> None:
    found = simba_fx.report(models.sparse("mamba", "linear"), models.tokens(14, 1, length))
    assert {block.tokens for block in found.blocks} == {length}
    assert all(block.reason for block in found.blocks)
    assert found.total.sparse == found.total.dense == sum(
        4 * block + head for block, _, head in [by_hand(models.dense("mamba").config, length)]
    )  # fmt: skip
    assert (found.total.scorer == 0) == (length == 1)


def test_the_tail_arguments_and_the_backbone_alone() -> None:
    sparse, ids = models.sparse("mamba", "linear"), models.tokens(15, 1, 90)
    with simba_fx.tail(sparse, 30):
        found = simba_fx.report(sparse, ids)
    assert found.tail == 30
    assert found.blocks[-1].tokens == 30 + 6
    last = simba_fx.report(sparse, ids, logits_to_keep=1)
    assert last.total.dense - last.stack.dense == by_hand(models.dense("mamba").config, 1)[2]
    labelled = simba_fx.report(sparse, input_ids=ids, labels=ids)
    assert labelled.total == simba_fx.report(sparse, ids).total
    backbone = simba_fx.transform(models.dense("mamba").get_submodule("backbone"), "linear", criterion="simba")
    alone = simba_fx.report(backbone, ids)
    assert alone.total == alone.stack == labelled.stack
    assert alone.blocks[0].path == "layers.0"


def test_a_dense_model_has_no_report() -> None:
    with pytest.raises(SimbaError, match=r"Expected a model returned by simba_fx\.transform"):
        simba_fx.report(models.dense("mamba"), models.tokens(0, 1, 9))


# --- what a report says --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def padded_report() -> Report:
    ids, mask = models.padded([models.tokens(16, 60), models.tokens(17, 41)], left=(0, 14), right=(0, 5))
    return simba_fx.report(models.sparse("mamba", "linear"), ids, attention_mask=mask)


def test_a_report_round_trips_through_json(padded_report: Report) -> None:
    found = padded_report.to_dict()
    assert json.loads(json.dumps(found)) == found
    assert [block["tokens"] for block in found["blocks"]] == [block.tokens for block in padded_report.blocks]
    assert found["totals"]["with_head"]["ideal_speedup"] == padded_report.ideal_speedup
    assert found["totals"]["without_head"]["dense"] == padded_report.stack.dense


def test_a_report_prints_as_an_aligned_table(padded_report: Report) -> None:
    lines = str(padded_report).splitlines()
    head = next(i for i, line in enumerate(lines) if line.startswith("block"))
    table = lines[head : head + 2 + len(padded_report.blocks)]
    assert [line.split()[:2] for line in table[2:]] == [[str(b.index), b.path] for b in padded_report.blocks]
    end = table[0].index("scorer kFLOP") + len("scorer kFLOP")
    assert all(line[end - 1] not in " " and line[end : end + 1] in ("", " ") for line in table)
    assert f"{padded_report.total.ideal_speedup:.3f}x" in str(padded_report)
    assert max(map(len, lines)) < 200
    assert lines == [line.rstrip() for line in lines]


def pixels(path: Path) -> np.ndarray:
    import matplotlib.image

    return np.round(matplotlib.image.imread(path)[..., :3] * 255).astype(int)


def close(image: np.ndarray, colour: str) -> np.ndarray:
    rgb = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    return np.abs(image - rgb).max(-1) <= 2


@pytest.mark.parametrize("row", [0, 1])
def test_the_picture_shows_the_kept_set(padded_report: Report, tmp_path: Path, row: int) -> None:
    path = tmp_path / "trapezoid.png"
    padded_report.plot(path, row=row)
    image = pixels(path)
    drawn = np.stack([close(image, DROPPED), close(image, KEPT), close(image, PADDING)])
    filled = drawn.any(0)
    filled[int(0.9 * len(filled)) :] = False  # the legend
    ys, xs = np.flatnonzero(filled.sum(1) > 300), np.flatnonzero(filled.sum(0) > 100)
    top, bottom, left, right = ys[0], ys[-1] + 1, xs[0], xs[-1] + 1
    n, length = len(padded_report.blocks), padded_report.length
    y = (bottom - (np.arange(n) + 0.5) * (bottom - top) / n).astype(int)
    x = (left + (np.arange(length) + 0.5) * (right - left) / length).astype(int)
    seen = drawn[:, y][:, :, x]  # (3, n, L): the colour in the middle of each cell
    expected = np.zeros((3, n, length), dtype=bool)
    for block, positions in enumerate(padded_report.positions):
        expected[1, block, [p for p in positions[row].tolist() if p >= 0]] = True
    real = np.zeros(length, dtype=bool)
    real[slice(0, 60) if row == 0 else slice(14, 55)] = True
    expected[0] = real & ~expected[1]
    expected[2] = ~real
    np.testing.assert_array_equal(seen, expected)


def test_long_inputs_are_averaged_into_the_picture(tmp_path: Path) -> None:
    kept_all = torch.arange(10_000)[None]
    rows = [kept_all, kept_all[:, ::2]]
    found = simba_fx.report(models.sparse("mamba", "linear"), models.tokens(18, 1, 30))
    long = dataclasses.replace(found, length=10_000, blocks=found.blocks[:2], positions=tuple(rows))
    long.plot(tmp_path / "long.png")
    image = pixels(tmp_path / "long.png")
    assert close(image, KEPT).sum() > 100_000  # block 0
    shades = [
        int(a, 16) * 0.5 + int(b, 16) * 0.5 for a, b in ((KEPT[i : i + 2], DROPPED[i : i + 2]) for i in (1, 3, 5))
    ]
    assert (np.abs(image - shades).max(-1) < 30).sum() > 100_000  # block 1: every second token, half as dark


def test_a_picture_needs_matplotlib_and_an_existing_row(
    padded_report: Report, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SimbaError, match=r"expected a row from 0 to 1, found row=2\.$"):
        padded_report.plot(tmp_path / "none.png", row=2)
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(SimbaError, match=r"expected the extra 'plot'\. Install it: pip install simba-fx\[plot\]\.$"):
        padded_report.plot(tmp_path / "none.png")


def test_shares_asked_and_delivered() -> None:
    shares = (Fraction(1), Fraction(1, 2), Fraction(1, 2), Fraction(1, 4))
    found = simba_fx.report(models.sparse("mamba", shares, compile="whole"), models.tokens(19, 1, 101))
    assert [block.share_asked for block in found.blocks] == [1, 0.5, 0.5, 0.25]
    assert [block.tokens for block in found.blocks] == [101, 51, 51, 26]
    assert [block.share_delivered for block in found.blocks] == [n / 101 for n in (101, 51, 51, 26)]
    assert [bool(block.reason) for block in found.blocks] == [False, True, False, True]
    assert [block.scan for block in found.blocks] == ["selective scan"] * 4


def test_attention_and_experts_are_counted() -> None:
    """torch has no formula for attention on a CPU, nor for grouped products: by hand, for Jamba's block of both."""
    model, length = models.dense("jamba"), 64
    found = simba_fx.report(models.sparse("jamba", models.schedules(4)["linear"]), models.tokens(1, 1, length))
    config = model.config
    width, inner, heads, kv = 16, 24, config.num_attention_heads, config.num_key_value_heads
    head = width // heads
    projections = 2 * length * width * (2 * heads * head + 2 * kv * head)
    pairs = 2 * heads * length * length * 2 * head
    router = 2 * length * width * 4
    experts = 2 * (2 * length * width * 2 * inner + 2 * length * inner * width)  # two for each token
    assert found.blocks[1].scan == "none"
    assert found.blocks[1].flops_dense == projections + pairs + router + experts
    kept = found.blocks[1].tokens
    shorter = (projections + router + experts) * kept // length + pairs * kept * kept // length**2
    assert found.blocks[1].flops_sparse == shorter
