"""Whole models under drawn options and drawn sequences of calls, against the eager reference (reference.py).

An option set (`Setting`) is decided by its number, so that a failure names it; for each, Hypothesis draws sequences of
calls to one and the same sparse model (captures cost seconds, calls milliseconds). What is compared: what was kept, the
results at every real token, the cache and what decoding makes of it, gradients, and what a refused call leaves behind.

The reference goes on with the tokens that the library kept (`reference.run_row(chosen=...)`), and says how far these
are from the best-scored ones. So no draw is thrown away: near ties are counted, and must be few.

The suite runs a few settings. `SIMBA_FX_FUZZ=10000` runs that many sequences (`make fuzz`); `SIMBA_FX_FUZZ_FROM=200`
starts with another setting.
"""

from __future__ import annotations

import collections
import contextlib
import copy
import functools
import os
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from models import BY_NAME, FAMILIES, VOCABULARY, Entry, n_blocks, padded, randomise, tokens
from reference import GRADIENT_TOLERANCE, TOLERANCE, assert_close, cache_name, relative_rms
from subprocesses import run_checks
from test_mamba_ssm import PACKAGES, TRITON
from torch import Tensor, nn

import simba_fx
from simba_fx.errors import InputError

FUZZ = int(os.environ.get("SIMBA_FX_FUZZ", "0"))
FIRST = int(os.environ.get("SIMBA_FX_FUZZ_FROM", "0"))
PER_SETTING = 100 if FUZZ else 6
NUMBERS = range(FIRST, FIRST + max(1, FUZZ // PER_SETTING)) if FUZZ else (-1, -2, -3)
"""Of the settings that run; negative ones are the suite's own (`SUITE`)."""

SHAPES: dict[str, Sequence[dict[str, Any]]] = {
    "mamba-residual-in-own-dtype": ({}, {"num_hidden_layers": 1}, {"num_hidden_layers": 7, "residual_in_fp32": True},
                                    {"conv_kernel": 2}),
    "falcon-mamba": ({}, {"num_hidden_layers": 2}),
    "mamba2-two-groups": ({}, {"n_groups": 1, "num_hidden_layers": 4}, {"chunk_size": 4, "num_hidden_layers": 2}),
    "jamba": ({}, {"attn_layer_offset": 0}, {"attn_layer_offset": 2, "expert_layer_offset": 0}),
    "bamba": ({}, {"attn_layer_indices": [0, 3]}, {"attn_layer_indices": [1, 2], "mamba_chunk_size": 16}),
    "zamba": ({}, {"attn_layer_offset": 0, "num_hidden_layers": 4}),
    "zamba2": ({}, {"layers_block_type": ["hybrid", "mamba", "mamba", "hybrid", "mamba"], "num_hidden_layers": 5}),
    "nemotron-h": ({}, {"layers_block_type": ["attention", "mamba", "mamba", "moe"]},
                   {"layers_block_type": ["moe", "mamba", "attention", "mamba"]}),
    "granite-hybrid": ({}, {"layer_types": ["attention", "mamba", "mamba", "attention"]},
                       {"position_embedding_type": "nope"}),
}  # fmt: skip
"""Other sizes and orders of layers than the registry's, by family."""
HABITS = ("train", "embeds", "mask dtype", "gradients", "no cache", "hidden states", "labels", "other weights")
WITH_EXPERTS = ("jamba", "nemotron-h", "granite-hybrid", "qwen3-next", "kimi-linear")
"""A rounding may send a token to another expert: in bfloat16 that happens, and proves nothing."""


# Settings.


def by_strength(operands: Any, query: Tensor) -> Tensor:
    """A user's criterion: step times input, of the loudest channel."""
    if isinstance(operands, simba_fx.DeltaScan):
        return (operands.beta.float()[..., None] * operands.v.float().abs()).amax((2, 3))
    if isinstance(operands, simba_fx.SelectiveScan):
        raw = operands.delta if operands.delta_bias is None else operands.delta + operands.delta_bias[:, None]
        step = nn.functional.softplus(raw.float()) if operands.delta_softplus else raw.float()
        return (step * operands.u.float().abs()).amax(1)
    raw = operands.dt if operands.dt_bias is None else operands.dt + operands.dt_bias
    step = nn.functional.softplus(raw.float()) if operands.dt_softplus else raw.float()
    step = step.clamp(operands.dt_min, operands.dt_max)
    return (step[..., None] * operands.x.float().abs()).amax((2, 3))


def strength(scan: reference.Scan, q: int) -> reference.Array:
    """The reference's own `by_strength`."""
    return np.abs(scan.delta * scan.u).max(-1)


@dataclass(frozen=True)
class Setting:
    """A model and the options it is transformed with."""

    number: int
    entry: Entry
    shape: dict[str, Any]
    dtype: torch.dtype
    schedule: Any
    shares: tuple[Fraction, ...] | None  # None: those that the library solved for
    options: dict[str, Any]
    positions: str  # "none", "query", "protect"
    habits: tuple[str, ...]  # what its calls do beside plain prompts: each may cost a capture

    @property
    def criterion(self) -> Any:
        chosen = self.options["criterion"]
        return chosen if isinstance(chosen, str) else strength

    @property
    def least_tail(self) -> int:
        return 1 if self.options.get("query") is None else 0

    @property
    def needed(self) -> int:
        """Real tokens that each row has to have."""
        query = self.options.get("query")
        named = (*self.options.get("protect", ()), *(() if query is None else (query,)))
        return max([1, *(p + 1 if p >= 0 else -p for p in named)])


def draw_schedule(rng: random.Random, blocks: int) -> tuple[Any, tuple[Fraction, ...] | None]:
    """A schedule as a user may write it, and the shares it stands for."""
    final = Fraction(rng.choice((1, 2, 5, 8)), 10)
    start = rng.randrange(blocks - 1) if blocks > 2 else 0
    ramp = (Fraction(1),) * start + reference.linear(blocks - start, final)
    random_shares = (Fraction(1), *sorted((Fraction(rng.randint(1, 60), 60) for _ in range(blocks - 1)), reverse=True))
    stages = {rng.randrange(1, blocks): Fraction(3, 5), blocks - 1: Fraction(1, 4)} if blocks > 1 else {}
    filled, share = [], Fraction(1)
    for block in range(blocks):
        share = stages.get(block, share)
        filled.append(share)
    first = rng.randint(1, blocks - 1) if blocks > 1 else 1
    constant = (Fraction(1),) * min(first, blocks) + (final,) * (blocks - first)
    choices: list[tuple[Any, tuple[Fraction, ...] | None]] = [
        ("linear", reference.linear(blocks)),
        (simba_fx.Linear(final, start=start), ramp),
        (list(random_shares), random_shares),
        (simba_fx.Stages(stages), tuple(filled)),
        (simba_fx.Constant(final, first), constant),
        (tuple(1 - Fraction(i, 10**6) for i in range(blocks)), tuple(1 - Fraction(i, 10**6) for i in range(blocks))),
        ("dense", (Fraction(1),) * blocks),
        (list(random_shares), random_shares),
        (simba_fx.Linear(final, start=start), ramp),
    ]
    if blocks > 2:
        choices += [(simba_fx.Linear(final, every=2), None), (simba_fx.Cosine(final), None)]
        choices += [(simba_fx.Budget(Fraction(rng.randint(7, 9), 10), length=64), None)]
    return rng.choice(choices)


def setting(number: int) -> Setting:
    """The option set with this number: families in turn, everything else drawn."""
    if number < 0:
        return SUITE[-number - 1]
    rng = random.Random(number)
    entry = FAMILIES[number % len(FAMILIES)]
    shape = rng.choice(SHAPES.get(entry.name, ({},)))
    others = (torch.float64, torch.bfloat16) if entry.name not in WITH_EXPERTS else ()  # grouped_mm takes no float64
    dtypes = [torch.float32] * 3 + [*others]
    names = [*reference.CRITERIA, "random", "stride", by_strength]
    options: dict[str, Any] = {
        "criterion": rng.choice(["simba"] * 5 + names),
        "floor": rng.choice((0, 1, 4, 4, 9)),
        "kernels": rng.choice(("auto", "auto", "model")),
        "output": rng.choice(("full", "full", "full", "kept")),
        "compile": rng.choice(("blocks", "blocks", "whole")),
        "seed": rng.choice((0, 7, -3)),
    }
    positions = rng.choice(("none", "none", "none", "query", "protect"))
    if positions == "query":
        options["query"] = -1
    if positions != "none":
        options["protect"] = tuple(rng.sample((0, 1, 2, 5, -1, -2, -3), rng.randint(0, 3)))
    if options["output"] == "full":
        options["labels"] = rng.choice(("all", "kept"))
        if positions != "query" and rng.random() < 0.2:
            options["tail"] = "labels"
    habits = tuple(rng.sample(HABITS, 3))
    blocks = n_blocks(build(entry, shape))
    schedule, shares = draw_schedule(rng, blocks)
    return Setting(number, entry, shape, rng.choice(dtypes), schedule, shares, options, positions, habits)


_PLAIN: dict[str, Any] = {"criterion": "simba", "floor": 1, "kernels": "auto", "output": "full", "compile": "blocks",
                          "seed": 0, "labels": "kept"}  # fmt: skip
_TWO, _THREE = (Fraction(1), Fraction(1, 3)), (Fraction(1), Fraction(1, 2), Fraction(1, 5))
SUITE = (
    Setting(-1, BY_NAME["mamba"], {"num_hidden_layers": 3}, torch.float32, _THREE, _THREE,
            _PLAIN, "none", ("gradients",)),
    Setting(-2, BY_NAME["bamba"], {"num_hidden_layers": 3}, torch.float32, "linear", reference.linear(3),
            _PLAIN | {"protect": (1, -2)}, "protect", ("labels",)),
    Setting(-3, BY_NAME["mamba2-two-groups"], {"num_hidden_layers": 2, "chunk_size": 4}, torch.bfloat16, _TWO, _TWO,
            _PLAIN | {"output": "kept", "kernels": "model", "labels": "all", "query": -1}, "query", ("other weights",)),
)  # fmt: skip
"""What runs without `SIMBA_FX_FUZZ`: models of few layers, with few kinds of calls, each of which costs a capture."""


def build(entry: Entry, shape: dict[str, Any]) -> nn.Module:
    model = entry.make(**shape)  # type: ignore[call-arg]  # the registry's makers take sizes
    randomise(model, entry.seed)
    return model.eval()


@functools.lru_cache(maxsize=2)
def subject(number: int) -> Subject:
    return Subject(setting(number))


class Subject:
    """A setting's dense and sparse models, and what was counted on them."""

    def __init__(self, chosen: Setting) -> None:
        self.setting = chosen
        self.dense = build(chosen.entry, chosen.shape).to(chosen.dtype)
        self.truth = build(chosen.entry, chosen.shape).to(chosen.dtype).float()
        self.sparse = simba_fx.transform(self.dense, chosen.schedule, **chosen.options)
        self.shares = chosen.shares or simba_fx.program(self.sparse).shares
        assert len(self.shares) == n_blocks(self.dense)
        first: list[Any] = []
        watched = self.dense.base_model.layers[0].register_forward_hook(lambda _, __, output: first.append(output))
        with torch.no_grad():
            plain = self.dense(input_ids=tokens(0, 1, 3), output_hidden_states=True)
        watched.remove()
        behind = first[0][0] if isinstance(first[0], tuple) else first[0]
        self.dtype = plain.logits.dtype
        self.stream = [torch.equal(hidden, behind) for hidden in plain.hidden_states].index(True)
        """Which of the model's `hidden_states` is the first block's output: some models begin with the embeddings."""
        self.weights = {name: p.detach().clone() for name, p in self.dense.named_parameters()}

    def perturb(self, seed: int) -> None:
        """Other weights, in place, as an optimiser's step leaves them."""
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for p in self.dense.parameters():
                p.mul_(1 + 0.1 * torch.randn(p.shape, generator=generator).to(p.dtype))

    def restore(self) -> None:
        with torch.no_grad():
            for name, p in self.dense.named_parameters():
                p.copy_(self.weights[name])


# Calls.


@dataclass(frozen=True)
class Row:
    length: int
    left: int
    right: int


@dataclass(frozen=True)
class Call:
    """One call of the sparse model."""

    what: str  # "forward", "generate", or a refusal
    rows: tuple[Row, ...]
    mask: torch.dtype | None
    tail: int | tuple[int, ...] | None  # one for all rows, or one for each
    seed: int
    fill: int
    grad: str = "no_grad"
    use_cache: bool | None = None
    train: bool = False
    embeds: bool = False
    hidden: bool = False
    labels: tuple[int, ...] = ()  # how many tokens of each row, its last ones, are labelled
    last: int = 0  # logits of so many slots alone; 0: of all
    recompute: bool = False
    unmasked: str = ""  # how padding at the ends of rows is told instead: "lengths", or "pad id"
    new: int = 3
    broken: tuple[int, int] = field(default=(0, 0))

    def inputs(self) -> tuple[Tensor, Tensor | None]:
        contents = [tokens(self.seed + b, row.length) for b, row in enumerate(self.rows)]
        ids, mask = padded(contents, [r.left for r in self.rows], [r.right for r in self.rows], fill=self.fill)
        return ids, None if self.mask is None else mask.to(self.mask)

    @property
    def answers(self) -> bool:
        """Whether a tail is told as an answer, which it is one token longer than."""
        return isinstance(self.tail, int) and self.tail > 1 and self.seed % 2 == 1

    @property
    def trailing(self) -> bool:
        """Whether rows are padded, at their ends alone."""
        return any(row.right for row in self.rows) and not any(row.left for row in self.rows)


REFUSALS = ("a tail longer than a row", "a row of pads", "too short for a named position", "a mask of another shape",
            "a hole in a row")  # fmt: skip


@st.composite
def calls(draw: st.DrawFn, chosen: Setting) -> Call:
    """A call that is right, or one that is to be refused."""
    habits = chosen.habits
    what = draw(st.sampled_from(["forward"] * 6 + ["generate"] * 2 + ["refused", "other weights"]))
    least = max(chosen.needed, chosen.least_tail, 1)
    longest = draw(st.one_of(st.integers(least, least + 9), st.integers(least, 60)))
    count = draw(st.integers(1, 3))
    side = draw(st.sampled_from(("none", "left", "right", "both", "each its own")))
    side = "left" if what == "generate" and side != "none" else side
    slack = 0 if side == "none" else draw(st.sampled_from((0, 0, 1, 6)))
    rows = []
    for b in range(count):
        near = st.integers(max(least, longest - 2), longest)
        length = longest if b == 0 or side == "none" else draw(st.one_of(near, st.integers(least, longest)))
        free = longest + slack - length
        own = draw(st.sampled_from(("left", "right", "both"))) if side == "each its own" else side
        right = {"none": 0, "left": 0, "right": free, "both": draw(st.integers(0, free))}[own]
        rows.append(Row(length, free - right, right))
    whole = all(row.left == row.right == 0 for row in rows)
    other = draw(st.sampled_from((torch.bool, torch.float32))) if "mask dtype" in habits else torch.int64
    mask = draw(st.sampled_from((None, other))) if whole else draw(st.sampled_from((torch.int64, other)))
    shortest = min(row.length for row in rows)
    tail = draw(st.one_of(st.none(), st.integers(1, shortest), st.integers(1, min(shortest, 5))))
    call = Call(what, tuple(rows), mask, tail, draw(st.integers(0, 2**20)), draw(st.integers(0, VOCABULARY - 1)))
    if what == "forward":
        train = "train" in habits and draw(st.booleans())
        modes = ["no_grad", "inference_mode", "enable_grad"] + ["backward"] * (2 if "gradients" in habits else 0)
        grad = draw(st.sampled_from(modes))
        cache = draw(st.sampled_from((None, True, False))) if "no cache" in habits and not train else None
        embeds = "embeds" in habits and draw(st.booleans())
        if call.trailing and (unmasked := draw(st.sampled_from(("", "lengths", "pad id")))):
            embeds = embeds and unmasked == "lengths"
            call = replace(call, unmasked=unmasked, fill=0 if unmasked == "pad id" else call.fill)
        if chosen.least_tail and not cache and draw(st.integers(0, 3)) == 0:
            call = replace(call, tail=tuple(draw(st.integers(2, row.length + 1)) for row in rows))
        full = chosen.options["output"] == "full"
        labels: tuple[int, ...] = ()
        if "labels" in habits and full and longest + slack > 1 and draw(st.booleans()):
            labels = tuple(draw(st.one_of(st.just(row.length), st.integers(0, row.length))) for row in rows)
            cache = None  # tails that differ fill none
        return replace(call, grad=grad, train=train, use_cache=False if grad == "backward" else cache, embeds=embeds,
                       hidden="hidden states" in habits and full and draw(st.booleans()),
                       labels=labels,
                       last=0 if labels else draw(st.sampled_from((0, 0, 0, 1, 3))),
                       recompute=train and chosen.options["compile"] == "blocks" and draw(st.booleans()))  # fmt: skip
    if what == "generate":
        return replace(call, new=draw(st.integers(1, 5)))
    if what == "other weights":
        return call if what in habits and chosen.dtype is not torch.bfloat16 else replace(call, what="forward")
    where = (draw(st.integers(0, count - 1)), draw(st.integers(0, 100)))
    if call.trailing and (unmasked := draw(st.sampled_from(("", "lengths", "pad id")))):
        kind = draw(st.sampled_from(("a tail longer than a row", "too short for a named position")))
        return replace(call, what=kind, broken=where, unmasked=unmasked, fill=0)
    return replace(call, what=draw(st.sampled_from(REFUSALS)), broken=where)


# Checks.

COUNTS: collections.Counter[str] = collections.Counter()


@pytest.fixture(scope="module", autouse=True)
def near_ties_are_few() -> Iterator[None]:
    yield
    assert COUNTS["decided otherwise, float"] <= max(2, COUNTS["decisions, float"] // 100), COUNTS
    assert COUNTS["forward"] > COUNTS["refused"] or not COUNTS["sequences"], COUNTS


@pytest.fixture
def counted(record_property: Callable[[str, Any], None]) -> Iterator[None]:
    """What a test ran, for the line at the end of the run (conftest.py)."""
    before = collections.Counter(COUNTS)
    yield
    for name in COUNTS:
        record_property("fuzz", (name, COUNTS[name] - before[name]))


def check(one: Subject, call: Call) -> None:
    if call.what in REFUSALS:
        check_refusal(one, call)
    elif call.what == "other weights":
        one.perturb(call.seed)
    elif call.what == "generate":
        check_generation(one, call)
    else:
        check_forward(one, call)


@contextlib.contextmanager
def tail_of(one: Subject, call: Call) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        if isinstance(call.tail, int) and call.answers:
            stack.enter_context(simba_fx.answer(one.sparse, call.tail - 1))
        elif isinstance(call.tail, int):
            stack.enter_context(simba_fx.tail(one.sparse, call.tail))
        elif call.tail is not None:
            stack.enter_context(simba_fx.answer(one.sparse, torch.tensor(call.tail) - 1))
        if call.unmasked == "lengths":
            stack.enter_context(simba_fx.lengths(one.sparse, torch.tensor([row.length for row in call.rows])))
        yield


def given_to(one: Subject, call: Call) -> dict[str, Any]:
    ids, mask = call.inputs()
    given: dict[str, Any] = {"input_ids": ids}
    if call.embeds:
        given = {"inputs_embeds": one.dense.get_input_embeddings()(ids)}  # type: ignore[operator]
    optional = {
        "attention_mask": None if call.unmasked else mask,
        "use_cache": call.use_cache,
        "output_hidden_states": call.hidden or None,
        "logits_to_keep": call.last or None,
        "labels": labels_of(call) if call.labels else None,
    }
    return given | {name: value for name, value in optional.items() if value is not None}


def labels_of(call: Call) -> Tensor:
    """What is to be predicted: the last tokens of each row, no pads."""
    ids, _ = call.inputs()
    labels = torch.full_like(ids, -100)
    for b, (row, n) in enumerate(zip(call.rows, call.labels)):
        end = ids.shape[1] - row.right
        labels[b, end - n : end] = ids[b, end - n : end]
    return labels


def options_of(one: Subject, call: Call) -> dict[str, Any]:
    """The setting and the tail, in the reference's words."""
    named = {name: one.setting.options[name] for name in ("floor", "seed", "query", "protect")
             if name in one.setting.options}  # fmt: skip
    tail: Any = one.setting.least_tail if call.tail is None else call.tail
    if call.labels and one.setting.options.get("tail") == "labels":  # from the token that predicts the first label
        tail = tuple(n + 1 for n in call.labels)
    if isinstance(tail, tuple):  # a row that is nothing but answer has no token before it
        tail = [min(n, row.length) for n, row in zip(tail, call.rows)]
    return {"tail": tail, "criterion": one.setting.criterion, **named}


def tails_differ(one: Subject, call: Call) -> bool:
    tail = options_of(one, call)["tail"]
    return isinstance(tail, list) and len(set(tail)) > 1


def named_positions(one: Subject) -> tuple[int, ...]:
    options = one.setting.options
    return (*options.get("protect", ()), *([options["query"]] if options.get("query") is not None else []))


def expected_of(one: Subject, call: Call, model: nn.Module | None = None, cache: bool = False) -> reference.Batch:
    """The reference, going on with what the sparse model kept."""
    ids, mask = call.inputs()
    return reference.run(one.dense if model is None else model, ids, one.shares, mask, chosen=simba_fx.kept(one.sparse),
                         use_cache=cache, embeds=call.embeds, **options_of(one, call))  # fmt: skip


def count_decisions(one: Subject, rows: Sequence[reference.Row], truths: Sequence[reference.Row]) -> None:
    """A kept token may lie below a dropped one by what rounding makes of two scores; in bfloat16 scores are taken in
    float32, and may be off as far as those of the model's own blocks are."""
    kind = "bfloat16" if one.setting.dtype is torch.bfloat16 else "float"
    for row, truth in zip(rows, truths or rows, strict=True):
        COUNTS[f"decisions, {kind}"] += row.cuts
        COUNTS[f"decided otherwise, {kind}"] += row.others
        allowed = 2 * (off(row, truth) + 0.02) if truths else reference.CLEAR_MARGIN
        below = f"kept what scores {-truth.margin:.3g} below what left, where rounding explains {allowed:.3g}"
        assert truth.margin > -allowed, below
        assert row.others == 0 or row.margin <= 0


def off(row: reference.Row, truth: reference.Row) -> float:
    """The most that a score is off, relative to the terms that it is summed from."""
    cuts = zip(row.scores, truth.scores, truth.sizes, strict=True)
    return max((float(np.max(np.abs(own - true) / np.maximum(sizes, 1e-30), initial=0)) for own, true, sizes in cuts),
               default=0.0)  # fmt: skip


def truth_of(one: Subject, call: Call) -> reference.Batch | None:
    """The same weights in float32, where the model has bfloat16."""
    if one.setting.dtype is not torch.bfloat16:
        return None
    with torch.no_grad():
        return expected_of(one, call, one.truth)


def check_forward(one: Subject, call: Call) -> None:
    COUNTS["forward"] += 1
    COUNTS["without a mask, padded"] += bool(call.unmasked)
    COUNTS["tails of their own"] += isinstance(call.tail, tuple)
    for model in (one.dense, one.sparse):
        model.train(call.train)
    if call.recompute:
        recompute(one.sparse, "enable")
    modes: dict[str, Callable[[], Any]] = {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode}
    if tails_differ(one, call) and any(p < 0 for p in named_positions(one)):
        with pytest.raises(InputError, match="rows whose tails differ, and query or protect"), tail_of(one, call):
            one.sparse(**given_to(one, call))
        return
    with modes.get(call.grad, torch.enable_grad)(), tail_of(one, call):
        found = one.sparse(**given_to(one, call))
    backward = call.grad == "backward"
    cached = found.get(cache_name(one.dense)) is not None
    with torch.enable_grad() if backward else torch.no_grad():
        expected = expected_of(one, call, cache=cached)
    truth = truth_of(one, call)
    count_decisions(one, expected.rows, truth.rows if truth else ())
    assert found.logits.dtype is one.dtype
    compare_logits(one, call, found.logits, expected, truth)
    if one.setting.dtype is not torch.bfloat16:
        if cached:
            compare_states(one, call, found[cache_name(one.dense)], expected)
        if call.labels and not call.last:
            compare_losses(one, call, found.loss, expected)
        if call.hidden:
            compare_streams(found.hidden_states[one.stream :], expected)
        if backward:
            compare_gradients(one, call, found.logits, expected)
    if call.recompute:
        recompute(one.sparse, "disable")


def recompute(model: Any, way: str) -> None:
    """Recompute blocks in backward, or do not; from transformers 5.24 on the method has another name."""
    known = [f"{name}_checkpointing_{way}" for name in ("activation", "gradient")]
    getattr(model, next(name for name in known if hasattr(model, name)))()


def places(one: Subject, call: Call) -> list[tuple[Tensor, Tensor]]:
    """For each row, slots of the result and the input positions that they stand for."""
    ids, mask = call.inputs()
    real = torch.ones_like(ids).bool() if mask is None else mask.bool()
    if one.setting.options["output"] == "full":
        return [(torch.nonzero(row).flatten(),) * 2 for row in real]
    last = simba_fx.kept(one.sparse)[-1]
    return [(torch.nonzero(row >= 0).flatten(), row[row >= 0]) for row in last]


def logits_of(one: Subject, call: Call, width: int) -> list[tuple[Tensor, Tensor]]:
    """The same for logits, of which a call may want the last ones alone."""
    first = simba_fx.kept(one.sparse)[-1 if one.setting.options["output"] == "kept" else 0].shape[1] - width
    assert first == max(0, first if call.last else 0)
    assert not call.last or width == min(call.last, width + first)
    return [(slots[slots >= first] - first, positions[slots >= first]) for slots, positions in places(one, call)]


def compare(name: str, ours: Tensor, theirs: Tensor, truth: Tensor | None,
            otherwise: Callable[[int], Tensor]) -> None:  # fmt: skip
    """Against the reference; in bfloat16 both are measured against the same weights in float32.

    A token at which the model is ill-conditioned may be rounded well by chance: `otherwise(seed)`, the reference with
    its scans rounded another way, tells how far off rounding alone brings it.
    """
    assert not theirs.isnan().any(), name
    if truth is None:
        return assert_close(name, ours, theirs, TOLERANCE[torch.float32])
    own, our = (relative_rms(x, truth) for x in (theirs, ours))
    if our <= 4 * own + 0.02:
        return None
    COUNTS["bfloat16, by other roundings"] += 1
    spread = max(relative_rms(otherwise(seed), truth) for seed in range(8))
    assert our <= 2 * spread, f"{name}: {our:.3g} off where rounding explains {own:.3g} to {spread:.3g}"


def compare_logits(one: Subject, call: Call, found: Tensor, expected: reference.Batch,
                   truth: reference.Batch | None) -> None:  # fmt: skip
    for b, (slots, positions) in enumerate(logits_of(one, call, found.shape[1])):
        ours, theirs = found[b, slots].detach(), expected.logits[b, positions]
        same_shapes = len(call.rows) == 1 and call.mask is None and not call.last
        if one.setting.options["kernels"] == "model" and same_shapes:
            COUNTS["compared bit by bit"] += 1
            assert torch.equal(ours.to(theirs.dtype), theirs), f"row {b}: {relative_rms(ours, theirs):.3g} off"
        else:

            def otherwise(seed: int, b: int = b, positions: Tensor = positions) -> Tensor:
                with torch.no_grad(), reference.rounded_otherwise(one.setting.entry.modeling, seed):
                    return expected_of(one, call).logits[b, positions]

            compare(f"row {b}", ours, theirs, None if truth is None else truth.logits[b, positions], otherwise)


def compare_states(one: Subject, call: Call, cache: Any, expected: reference.Batch) -> None:
    """Of rows that end with a real token: what follows a pad is no state of the row."""
    dtype = one.setting.dtype
    whole = bool(expected.real.all())
    for b, row in enumerate(expected.rows):
        if call.rows[b].right:
            continue
        for i, (ours, theirs) in enumerate(zip(cache.layers, row.cache.layers, strict=True)):
            for kind in ("conv_states", "recurrent_states"):
                for j, held in (getattr(theirs, kind, None) or {}).items():
                    COUNTS["states"] += 1
                    name = f"{kind} {j} of layer {i}, row {b}"
                    assert_close(name, getattr(ours, kind)[j][b], held[0], TOLERANCE[dtype])
            if isinstance(getattr(theirs, "keys", None), Tensor):
                real = getattr(ours, "real", None)
                slots = slice(None) if real is None else real[b]
                assert_close(f"values {i}, row {b}", ours.values[b][:, slots], theirs.values[0], TOLERANCE[dtype])
                if whole:  # else they are rotated to other positions
                    assert_close(f"keys {i}, row {b}", ours.keys[b], theirs.keys[0], TOLERANCE[dtype])


def compare_losses(one: Subject, call: Call, found: Tensor, expected: reference.Batch) -> None:
    """The mean over the labels that count; a token's label is that of the next place."""
    COUNTS["losses"] += 1
    labels = labels_of(call)
    losses = nn.functional.cross_entropy(expected.logits[:, :-1].float().transpose(1, 2), labels[:, 1:].clamp(min=0),
                                         reduction="none")  # fmt: skip
    counted = labels[:, 1:] != -100
    if one.setting.options["labels"] == "kept":
        reached = torch.zeros_like(expected.real)
        for b, row in enumerate(expected.kept[-1]):
            reached[b, row] = True
        counted = counted & reached[:, :-1]
    if (counted & ~expected.real[:, :-1]).any():
        return  # a pad before the first token predicts it: the reference does not know a pad's logits
    if counted.any():
        assert_close("loss", found, losses[counted].mean(), TOLERANCE[torch.float32])


def compare_streams(found: Sequence[Tensor], expected: reference.Batch) -> None:
    """`output_hidden_states`: what comes out of each block; a token that is gone has what it left with."""
    COUNTS["hidden states"] += 1
    for b, row in enumerate(expected.rows):
        for i, stream in enumerate(row.streams[:-1]):
            ours = found[i][b, expected.real[b]]
            assert_close(f"behind block {i}, row {b}", ours, stream, TOLERANCE[torch.float32])


def weighted(one: Subject, call: Call, length: int, expected: reference.Batch, weights: Tensor) -> Tensor:
    """The reference's side of what `compare_gradients` differentiates."""
    total = weights.new_zeros((), dtype=expected.rows[0].logits.dtype)
    for b, (_, positions) in enumerate(logits_of(one, call, length)):
        own = torch.searchsorted(torch.nonzero(expected.real[b]).flatten(), positions)
        logits = expected.rows[b].logits[own]
        total = total + (logits * weights[b, positions].to(logits.dtype)).sum()
    return total


def compare_gradients(one: Subject, call: Call, logits: Tensor, expected: reference.Batch) -> None:
    """Within the tolerance of the reference's or, where conditioning is bad, no farther from float64 than they are."""
    COUNTS["gradients"] += 1
    weights = torch.randn(*expected.real.shape, logits.shape[-1], generator=torch.Generator().manual_seed(call.seed))
    parameters = {name: p for name, p in one.dense.named_parameters() if p.requires_grad}
    ours = logits.new_zeros(())
    for b, (slots, positions) in enumerate(logits_of(one, call, logits.shape[1])):
        ours = ours + (logits[b, slots] * weights[b, positions].to(logits.dtype)).sum()
    theirs = weighted(one, call, logits.shape[1], expected, weights)
    found, wanted = (torch.autograd.grad(loss, list(parameters.values()), allow_unused=True) for loss in (ours, theirs))
    scale = max(float(g.norm()) for g in wanted if g is not None)
    tolerance, truth = GRADIENT_TOLERANCE[one.setting.dtype], None
    for name, own_grad, other in zip(parameters, found, wanted, strict=True):
        if other is None or float(other.norm()) <= 1e-5 * scale:
            continue
        assert own_grad is not None, name
        if relative_rms(own_grad, other) <= tolerance:
            continue
        if truth is None:
            COUNTS["gradients, by float64"] += 1
            double = copy.deepcopy(one.dense).double()
            loss = weighted(one, call, logits.shape[1], expected_of(one, call, double), weights)
            names = [n for n, p in double.named_parameters() if p.requires_grad]
            parts = [p for p in double.parameters() if p.requires_grad]
            truth = dict(zip(names, torch.autograd.grad(loss, parts, allow_unused=True)))
        true = truth[name]
        assert true is not None, name
        assert_close(f"gradient of {name}", own_grad, true, max(tolerance, relative_rms(other, true)))


def check_generation(one: Subject, call: Call) -> None:
    """Each step's logits are those of the original, continued from the pruned prompt's own states."""
    COUNTS["generate"] += 1
    for model in (one.dense, one.sparse):
        model.eval()
    ids, mask = call.inputs()
    with tail_of(one, call):
        found = one.sparse.generate(  # type: ignore[operator]
            ids, attention_mask=mask, max_new_tokens=call.new, do_sample=False, pad_token_id=0, output_logits=True,
            return_dict_in_generate=True)  # fmt: skip
    kept, length = simba_fx.kept(one.sparse), ids.shape[1]
    assert kept[0].shape[1] == length, "steps are no prompts"
    real = torch.ones_like(ids).bool() if mask is None else mask.bool()
    for b in range(len(ids)):
        place = torch.nonzero(real[b]).flatten()
        options = options_of(one, call) | {"chosen": reference.chosen_of(kept, b, place)}
        models = (one.dense, one.truth) if one.setting.dtype is torch.bfloat16 else (one.dense,)
        with torch.no_grad():
            rows = [reference.generate(model, ids[b, place], one.shares, call.new,
                                       follow=found.sequences[b, length:].tolist(), **options)
                    for model in models]  # fmt: skip
        count_decisions(one, rows[:1], rows[1:])
        for step, ours in enumerate(found.logits):
            theirs, *truth = [row.steps[step] for row in rows]

            def otherwise(
                seed: int, b: int = b, step: int = step, place: Tensor = place, options: Any = options
            ) -> Tensor:
                with torch.no_grad(), reference.rounded_otherwise(one.setting.entry.modeling, seed):
                    row = reference.generate(one.dense, ids[b, place], one.shares, call.new,
                                             follow=found.sequences[b, length:].tolist(), **options)  # fmt: skip
                return row.steps[step]

            compare(f"step {step}, row {b}", ours[b], theirs, truth[0] if truth else None, otherwise)


def check_refusal(one: Subject, call: Call) -> None:
    """Refused with a sentence; what the model knows of its last call stays."""
    one.sparse.eval()
    ids, mask = call.inputs()
    mask = torch.ones_like(ids) if mask is None else mask
    row, place = call.broken
    tail: Any = contextlib.nullcontext()
    given: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
    if call.what == "a tail longer than a row":
        tail = simba_fx.tail(one.sparse, min(r.length for r in call.rows) + 1 + place)
    elif call.what == "a row of pads":
        mask[row] = 0
    elif call.what == "too short for a named position":
        if one.setting.needed < 2:
            return
        mask[row] = 0
        own = place % (one.setting.needed - 1) + 1
        mask[row, slice(0, own) if call.unmasked else slice(ids.shape[1] - own, None)] = 1
        ids[row, own:] = 0 if call.unmasked else ids[row, own:]
    elif call.what == "a mask of another shape":
        given["attention_mask"] = torch.ones(ids.shape[0], ids.shape[1] + 1 + place)
    else:  # a hole in a row
        at = call.rows[row]
        if at.length < 3:
            return
        mask[row, at.left + 1 + place % (at.length - 2)] = 0
    if call.unmasked:
        given.pop("attention_mask")
    lengths = (
        simba_fx.lengths(one.sparse, (mask != 0).sum(1)) if call.unmasked == "lengths" else contextlib.nullcontext()
    )
    before = kept_or_none(one)
    COUNTS["refused"] += 1
    with pytest.raises(InputError, match=r"xpected .*\. [A-Z]"), tail, lengths, torch.no_grad():
        one.sparse(**given)
    after = kept_or_none(one)
    assert (before is None) == (after is None)
    assert all(torch.equal(a, b) for a, b in zip(before or [], after or [], strict=True))


def kept_or_none(one: Subject) -> list[Tensor] | None:
    """What was kept in the last call; None before any."""
    try:
        return simba_fx.kept(one.sparse)
    except simba_fx.errors.SimbaError:
        return None


def fuzz(number: int, examples: int) -> None:
    """Draws sequences of calls to the model of one setting."""
    one = subject(number)

    @settings(deadline=None, max_examples=examples, print_blob=True, database=None,
              phases=(Phase.explicit, Phase.generate, *([Phase.shrink] if FUZZ else [])),
              suppress_health_check=list(HealthCheck))  # fmt: skip
    @given(sequence=st.lists(calls(one.setting), min_size=1, max_size=4))
    def run(sequence: list[Call]) -> None:
        COUNTS["sequences"] += 1
        try:
            for call in sequence:
                check(one, call)
        finally:
            if any(call.what == "other weights" for call in sequence):
                one.restore()

    run()


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.usefixtures("counted")
def test_any_sequence_of_calls_equals_the_reference(number: int) -> None:
    fuzz(number, PER_SETTING)


@pytest.mark.parametrize("number", range(FIRST, FIRST + FUZZ // 400))
@pytest.mark.usefixtures("counted")
def test_the_same_of_mamba_ssms_models(number: int) -> None:
    """In a process of its own (test_mamba_ssm.py says why), which takes seconds to start: not in the suite."""
    run_checks(Path(__file__).with_name("mamba_ssm_fuzz.py"), [PACKAGES, TRITON], 1, SIMBA_FX_FUZZ_SETTING=str(number))
    COUNTS["settings of mamba_ssm"] += 1
