"""The public surface: what is exported, what a transformed model is, and what can be asked of it."""

from __future__ import annotations

import copy
import importlib
import inspect
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import reference
import torch
from models import BY_NAME, VOCABULARY, dense, padded, schedules, tokens
from reference import TOLERANCE, assert_close, counts
from torch import Tensor, fx, nn

import simba_fx

own_model: Any = importlib.import_module("own_model")

LINEAR = reference.linear(4)
every_family = pytest.mark.parametrize("family", ["mamba", "mamba2-one-group"])
every_mode = pytest.mark.parametrize("mode", ["blocks", "whole"])


def own(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    model: nn.Module = own_model.MyMamba(vocabulary=VOCABULARY, width=16, states=4, depth=4).eval()
    return model


def run(model: Any, *args: Any, **kwargs: Any) -> Tensor:
    with torch.no_grad():
        found = model(*args, **kwargs)
    return found if isinstance(found, Tensor) else found.logits


def kept_counts(model: Any) -> list[int]:
    return [positions.shape[1] for positions in simba_fx.kept(model)]


# The surface.


def test_the_public_surface() -> None:
    assert simba_fx.__all__ == [
        "Budget",
        "Constant",
        "Cosine",
        "DeltaScan",
        "Dense",
        "Linear",
        "LinearRecurrence",
        "SSDScan",
        "SelectiveScan",
        "Stages",
        "answer",
        "calibrate",
        "errors",
        "explain",
        "kept",
        "lengths",
        "load",
        "program",
        "reached",
        "register_recurrence",
        "register_scan",
        "report",
        "save",
        "tail",
        "transform",
    ]
    assert all(hasattr(simba_fx, name) for name in simba_fx.__all__)


def test_every_error_is_a_simba_error_with_a_docstring() -> None:
    found = [e for _, e in inspect.getmembers(simba_fx.errors, inspect.isclass) if issubclass(e, Exception)]
    assert len(found) == 9
    for error in found:
        assert issubclass(error, simba_fx.errors.SimbaError)
        assert error.__doc__


def test_the_signature_of_transform() -> None:
    parameters = inspect.signature(simba_fx.transform).parameters
    assert {name: p.default for name, p in parameters.items()} == {
        "model": inspect.Parameter.empty,
        "schedule": 0.5,
        "criterion": "simba-l2+write",
        "output": "full",
        "floor": 4,
        "kernels": "auto",
        "compile": "blocks",
        "seed": 0,
        "span": None,
        "query": None,
        "protect": (),
        "labels": "all",
        "tail": "last",
        "pad_token_id": None,
        "mask": None,
        "mask_marks": "real",
        "example_inputs": None,
    }
    keyword_only = [name for name, p in parameters.items() if p.kind is inspect.Parameter.KEYWORD_ONLY]
    assert keyword_only == list(parameters)[2:]
    assert all(p.kind is not inspect.Parameter.VAR_KEYWORD for p in parameters.values()), "typos must not be swallowed"


@pytest.mark.parametrize("name", [name for name in simba_fx.__all__ if name != "errors"])
def test_every_export_says_what_it_is_in_one_line(name: str) -> None:
    first, *rest = inspect.getdoc(getattr(simba_fx, name)).splitlines()
    assert first.endswith((".", ":"))
    assert not rest or not rest[0], "a blank line follows the first"
    assert not first.startswith(f"{name}("), "not the signature that dataclass writes"


def test_the_first_line_of_transforms_docstring_says_that_the_model_is_untouched() -> None:
    first = inspect.getdoc(simba_fx.transform).splitlines()[0]
    assert first == "A sparse copy of `model` over the same weights; `model` itself is untouched and stays dense."
    assert "Raises:" in inspect.getdoc(simba_fx.transform)


# A transformers model.


@every_family
def test_the_result_is_a_model_of_the_same_class(family: str) -> None:
    model = dense(family)
    sparse = simba_fx.transform(model, "linear")
    assert isinstance(sparse, type(model))
    assert type(sparse).__name__ == type(model).__name__
    assert type(sparse).__module__ == type(model).__module__
    assert isinstance(sparse.backbone, type(model.backbone))
    assert sparse.config is model.config
    assert sparse.generation_config is model.generation_config
    for method in ("forward",):
        assert inspect.signature(getattr(sparse, method)) == inspect.signature(getattr(model, method))
        assert inspect.signature(getattr(sparse.backbone, method)) == inspect.signature(model.backbone.forward)
    assert sparse.training == model.training
    assert sparse.get_input_embeddings().weight is model.get_input_embeddings().weight
    assert [name for name, _ in sparse.named_modules()] == [name for name, _ in model.named_modules()]


@every_family
def test_weights_are_the_same_objects_and_the_original_stays_dense(family: str) -> None:
    model, ids = dense(family), tokens(1, 2, 40)
    before = run(model, ids)
    sparse = simba_fx.transform(model, "linear")
    assert not torch.equal(run(sparse, ids), before)
    assert torch.equal(run(model, ids), before)
    theirs, ours = dict(model.named_parameters()), dict(sparse.named_parameters())
    assert list(theirs) == list(ours)
    assert all(ours[name] is p for name, p in theirs.items())
    assert type(model).__mro__[0].__module__.startswith("transformers.")
    assert not any(name.startswith("_simba") for module in model.modules() for name in vars(module))


@every_family
def test_state_dicts_load_both_ways(family: str) -> None:
    ids, entry = tokens(1, 2, 40), BY_NAME[family]
    model, other = entry.build(), entry.build()
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(0.9)
    sparse, expected = simba_fx.transform(model, "linear"), run(simba_fx.transform(other, "linear"), ids)
    assert list(sparse.state_dict()) == list(model.state_dict())
    assert sparse.load_state_dict(other.state_dict()).missing_keys == []
    assert torch.equal(run(sparse, ids), expected)
    assert torch.equal(run(model, ids), run(other, ids)), "the weights are shared"
    fresh = entry.build()
    fresh.load_state_dict(sparse.state_dict())
    assert torch.equal(run(fresh, ids), run(other, ids))


@every_family
def test_what_is_saved_is_the_dense_checkpoint(family: str, tmp_path: Path) -> None:
    model, ids = dense(family), tokens(1, 2, 40)
    sparse = simba_fx.transform(model, "linear")
    expected = run(sparse, ids)
    sparse.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    assert type(again) is type(model)
    assert torch.equal(run(again, ids), run(model, ids))
    assert torch.equal(run(simba_fx.transform(again, "linear"), ids), expected)
    assert again.config.architectures == [type(model).__name__]


@every_family
def test_generate_runs(family: str) -> None:
    sparse = simba_fx.transform(dense(family), "linear")
    found = sparse.generate(tokens(1, 2, 30), max_new_tokens=4, do_sample=False)
    assert found.shape == (2, 34)


def test_hooks_of_the_model_run_once_per_call() -> None:
    model, ids, calls = BY_NAME["mamba"].build(), tokens(1, 2, 30), []
    model.register_forward_hook(lambda *_: calls.append("model"))
    model.backbone.register_forward_hook(lambda *_: calls.append("stack"))
    sparse = simba_fx.transform(model, "linear")
    calls.clear()
    run(sparse, ids)
    assert calls == ["stack", "model"]
    sparse.register_forward_hook(lambda *_: calls.append("ours alone"))
    calls.clear()
    run(model, ids)
    assert calls == ["stack", "model"]


@pytest.mark.parametrize("called", [False, True], ids=["never called", "called"])
def test_a_deep_copy_is_independent(called: bool) -> None:
    ids, sparse = tokens(1, 2, 40), simba_fx.transform(BY_NAME["mamba"].build(), "linear")
    if called:
        run(sparse, ids)
    twin = copy.deepcopy(sparse)
    expected = run(sparse, ids)
    assert torch.equal(run(twin, ids), expected)
    assert not {id(p) for p in twin.parameters()} & {id(p) for p in sparse.parameters()}
    with torch.no_grad():
        for p in twin.parameters():
            p.mul_(0.5)
    assert torch.equal(run(sparse, ids), expected)
    assert not torch.equal(run(twin, ids), expected)
    with simba_fx.tail(twin, 11):
        run(twin, ids)
        run(sparse, ids)
    assert kept_counts(twin) == counts(40, LINEAR, tail=11)
    assert kept_counts(sparse) == counts(40, LINEAR)


def test_another_dtype_takes_effect_at_the_next_call() -> None:
    ids, sparse = tokens(1, 2, 40), simba_fx.transform(BY_NAME["mamba"].build(), "linear")
    run(sparse, ids)
    assert sparse.to(torch.bfloat16) is sparse
    assert sparse.dtype is torch.bfloat16
    expected = simba_fx.transform(BY_NAME["mamba"].build().to(torch.bfloat16), "linear")
    assert torch.equal(run(sparse, ids), run(expected, ids))
    assert kept_counts(sparse) == counts(40, LINEAR)


def test_parameters_that_are_replaced_are_picked_up() -> None:
    ids, model, other = tokens(1, 2, 40), BY_NAME["mamba"].build(), BY_NAME["mamba"].build()
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(0.9)
    sparse = simba_fx.transform(model, "linear")
    before = run(sparse, ids)
    sparse.load_state_dict(other.state_dict(), assign=True)
    assert torch.equal(run(sparse, ids), run(simba_fx.transform(other, "linear"), ids))
    assert not torch.equal(run(sparse, ids), before)


def test_train_and_eval_are_the_copys_own() -> None:
    """`train()` of one says nothing to the other where their modules are their own."""
    model = BY_NAME["mamba"].build()
    sparse = simba_fx.transform(model, "linear")
    sparse.train()
    assert sparse.training
    assert sparse.backbone.training
    assert not model.training
    assert not model.backbone.training
    sparse(tokens(1, 2, 20), labels=tokens(1, 2, 20)).loss.backward()
    assert model.backbone.layers[0].mixer.A_log.grad is not None, "the weights are shared"


# A plain module.


@every_mode
def test_a_plain_module_becomes_a_graph_module_with_its_own_signature(mode: str) -> None:
    model, ids = own(), tokens(1, 2, 40)
    sparse = simba_fx.transform(model, "linear", compile=mode)
    assert isinstance(sparse, fx.GraphModule)
    assert inspect.signature(sparse.forward) == inspect.signature(model.forward)
    assert torch.equal(run(sparse, ids=ids), run(sparse, ids))
    assert list(sparse.state_dict()) == list(model.state_dict())
    assert {id(p) for p in sparse.parameters()} == {id(p) for p in model.parameters()}
    assert sparse.training == model.training
    assert kept_counts(sparse) == counts(40, LINEAR)


@every_mode
def test_a_plain_modules_graph_may_be_edited(mode: str) -> None:
    ids = tokens(1, 2, 40)
    sparse: Any = simba_fx.transform(own(), "linear", compile=mode)
    found = run(sparse, ids)
    (result, *_), *_ = sparse.graph.output_node().args
    with sparse.graph.inserting_after(result):
        doubled = sparse.graph.call_function(torch.ops.aten.mul.Tensor, (result, 2))
    result.replace_all_uses_with(doubled, delete_user_cb=lambda user: user is not doubled)
    sparse.graph.lint()
    sparse.recompile()
    for one in (sparse, copy.deepcopy(sparse)):
        assert torch.equal(run(one, ids), 2 * found)
    assert inspect.signature(sparse.forward) == inspect.signature(own().forward)


@every_mode
def test_a_plain_modules_state_dicts_load_both_ways(mode: str) -> None:
    ids, model, other = tokens(1, 2, 40), own(0), own(1)
    sparse, expected = (
        simba_fx.transform(model, "linear", compile=mode),
        run(simba_fx.transform(other, "linear", compile=mode), ids),
    )
    sparse.load_state_dict(other.state_dict())
    assert torch.equal(run(sparse, ids), expected)
    fresh = own(2)
    fresh.load_state_dict(sparse.state_dict())
    assert torch.equal(run(fresh, ids), run(other, ids))


@every_mode
def test_a_plain_modules_replaced_parameters_are_picked_up(mode: str) -> None:
    ids, model, other = tokens(1, 2, 40), own(0), own(1)
    sparse, expected = (
        simba_fx.transform(model, "linear", compile=mode),
        run(simba_fx.transform(other, "linear", compile=mode), ids),
    )
    sparse.load_state_dict(other.state_dict(), assign=True)
    assert torch.equal(run(sparse, ids), expected)


@every_mode
def test_a_plain_module_changes_its_dtype(mode: str) -> None:
    ids, sparse = tokens(1, 2, 40), simba_fx.transform(own(), "linear", compile=mode)
    run(sparse, ids)
    expected = run(simba_fx.transform(own().to(torch.bfloat16), "linear", compile=mode), ids)
    found = run(sparse.to(torch.bfloat16), ids)
    assert found.dtype is torch.bfloat16
    assert torch.equal(found, expected)


@every_mode
def test_a_deep_copy_of_a_plain_module_is_independent(mode: str) -> None:
    ids, sparse = tokens(1, 2, 40), simba_fx.transform(own(), "linear", compile=mode)
    expected = run(sparse, ids)
    twin = copy.deepcopy(sparse)
    assert torch.equal(run(twin, ids), expected)
    with torch.no_grad():
        for p in twin.parameters():
            p.mul_(0.5)
    assert torch.equal(run(sparse, ids), expected)
    assert not torch.equal(run(twin, ids), expected)
    with simba_fx.tail(twin, 11):
        run(sparse, ids)
    assert kept_counts(sparse) == counts(40, LINEAR)


@pytest.mark.parametrize("shape", [(3, 9, 16), (9, 9, 16), (1, 7, 16), (1, 1, 16)], ids=str)
def test_only_the_form_of_an_example_is_read(shape: tuple[int, ...]) -> None:
    stack = nn.Sequential(own_model.Block(16, 4), own_model.Block(16, 4)).eval()
    sparse = simba_fx.transform(stack, [1, 0.5], example_inputs=(torch.zeros(shape),))
    found, expected = run(sparse, x := torch.randn(2, 40, 16)), run(stack[0], x)
    assert found.shape == x.shape
    assert kept_counts(sparse) == [40, 21]
    gone = sorted(set(range(40)) - set(simba_fx.kept(sparse)[1][0].tolist()))
    assert_close("early exits", found[0, gone], expected[0, gone], TOLERANCE[torch.float32])


def test_a_plain_module_trains() -> None:
    model, ids = own(), tokens(1, 2, 40)
    simba_fx.transform(model, "linear")(ids).square().mean().backward()
    assert all(p.grad is not None for p in model.parameters())


# Schedules, criteria, output.


SPELLINGS: dict[str, tuple[Any, Any]] = {
    "linear": ("linear", reference.linear(4)),
    "constant": ("constant", [1, *[Fraction(55, 100)] * 3]),
    "cosine": ("cosine", [1, Fraction(775, 1000), Fraction(325, 1000), Fraction(1, 10)]),
    "dense": ("dense", [1] * 4),
    "ratio": (0.5, [1, *[Fraction(1, 2)] * 3]),
    "ratio one": (1, [1] * 4),
    "fraction": (Fraction(1, 3), [1, *[Fraction(1, 3)] * 3]),
    "list": ([1, 0.7, 0.7, 0.2], [1, Fraction(7, 10), Fraction(7, 10), Fraction(1, 5)]),
    "tuple": ((1, 1, 0.9, 0.9), [1, 1, Fraction(9, 10), Fraction(9, 10)]),
    "mapping": ({2: 0.4}, [1, 1, Fraction(2, 5), Fraction(2, 5)]),
    "callable": (lambda n: [1 - i / (2 * n) for i in range(n)], [1, Fraction(7, 8), Fraction(3, 4), Fraction(5, 8)]),
    "Linear": (simba_fx.Linear(final=0.4), [1, Fraction(4, 5), Fraction(3, 5), Fraction(2, 5)]),
    "Linear every": (simba_fx.Linear(final=0.5, every=2), [1, 1, Fraction(1, 2), Fraction(1, 2)]),
    "Linear start": (simba_fx.Linear(final=0.5, start=2), [1, 1, 1, Fraction(1, 2)]),
    "Constant": (simba_fx.Constant(0.25, start=3), [1, 1, 1, Fraction(1, 4)]),
    "Dense": (simba_fx.Dense(), [1] * 4),
    "Stages": (simba_fx.Stages({1: 0.5, 3: 0.3}), [1, Fraction(1, 2), Fraction(1, 2), Fraction(3, 10)]),
}


@pytest.mark.parametrize(("schedule", "shares"), SPELLINGS.values(), ids=list(SPELLINGS))
def test_every_spelling_of_a_schedule_keeps_the_promised_counts(schedule: Any, shares: Any) -> None:
    sparse = simba_fx.transform(dense("mamba"), schedule, floor=2)
    for length in (3, 47):
        run(sparse, tokens(1, 2, length))
        assert kept_counts(sparse) == counts(length, shares, floor=2)


def test_a_budget_prunes() -> None:
    sparse = simba_fx.transform(dense("mamba"), simba_fx.Budget(0.8, length=64))
    run(sparse, tokens(1, 2, 64))
    shares = simba_fx.program(sparse).shares
    assert kept_counts(sparse) == counts(64, shares)
    assert list(shares) == sorted(shares, reverse=True)
    assert shares[0] == 1 > shares[-1]


def test_a_criterion_of_ones_own_decides() -> None:
    seen: list[Any] = []

    def earliest(operands: Any, query: Tensor) -> Tensor:
        """Prefers the earliest tokens: what no criterion of ours does."""
        seen.append((operands, query))
        rows, _, length = operands.u.shape
        return -torch.arange(length).float().expand(rows, length)

    sparse = simba_fx.transform(dense("mamba"), [1, 0.5, 0.5, 0.25], criterion=earliest)
    run(sparse, tokens(1, 2, 41))
    assert simba_fx.kept(sparse)[1].tolist() == [[*range(20), 40]] * 2
    assert simba_fx.kept(sparse)[3].tolist() == [[*range(10), 40]] * 2
    assert all(isinstance(operands, simba_fx.SelectiveScan) for operands, _ in seen)
    assert [query.tolist() for _, query in seen] == [[40, 40], [20, 20]]
    assert all(not operands.u.requires_grad for operands, _ in seen)


def test_a_criterion_of_ones_own_gets_the_query_of_each_padded_row() -> None:
    seen: list[Tensor] = []

    def recent(operands: Any, query: Tensor) -> Tensor:
        seen.append(query)
        rows, length = operands.x.shape[:2]
        return torch.arange(length).float().expand(rows, length)

    sparse = simba_fx.transform(dense("mamba2-one-group"), [1, 0.5, 0.5, 0.5], criterion=recent)
    ids, mask = padded([tokens(1, 30), tokens(2, 20)], [0, 0], [0, 10])
    with simba_fx.tail(sparse, 3):
        run(sparse, ids, attention_mask=mask)
    assert [query.tolist() for query in seen] == [[27, 17]]
    named = simba_fx.transform(dense("mamba2-one-group"), [1, 0.5, 0.5, 0.5], criterion="recent")
    with simba_fx.tail(named, 3):
        run(named, ids, attention_mask=mask)
    assert all(torch.equal(a, b) for a, b in zip(simba_fx.kept(sparse), simba_fx.kept(named), strict=True))


@every_mode
def test_kept_output_is_the_survivors_rows_of_the_full_output(mode: str) -> None:
    ids, model = tokens(1, 2, 41), dense("mamba")
    full, kept = (simba_fx.transform(model, "linear", output=output, compile=mode) for output in ("full", "kept"))
    whole, survivors = run(full, ids), run(kept, ids)
    assert survivors.shape == (2, counts(41, LINEAR)[-1], VOCABULARY)
    rows = torch.arange(2)[:, None]
    assert_close("survivors", survivors, whole[rows, simba_fx.kept(kept)[-1]], 1e-6)
    assert all(torch.equal(a, b) for a, b in zip(simba_fx.kept(full), simba_fx.kept(kept), strict=True))


def test_kept_output_of_a_plain_module() -> None:
    ids, sparse = tokens(1, 2, 41), simba_fx.transform(own(), "linear", output="kept")
    assert run(sparse, ids).shape == (2, counts(41, LINEAR)[-1], VOCABULARY)


# What can be asked.


@pytest.mark.parametrize("make", [lambda: dense("mamba"), own], ids=["transformers", "plain"])
def test_explain_tells_what_each_pass_did_and_what_was_disable_compile(make: Callable[[], nn.Module]) -> None:
    sparse = simba_fx.transform(make(), [1, 0.5, 0.5, 0.25])
    text = simba_fx.explain(sparse)
    lines = text.splitlines()
    assert lines[0] == "4 blocks, 4 with a scan, 2 cuts"
    headings = [line for line in lines if line.startswith("== ") and line.endswith(" sites")]
    names = [heading.split("(")[0].removeprefix("== ") for heading in headings]
    assert names == [
        "EraseSites",
        "ChannelLast",
        "DropCasts",
        "TrackTokens",
        "ScoreTokens",
        "SelectTokens",
        "HoistPositions",
        "GatherSurvivors",
        "RestoreLength",
        "OutlineBlocks",
    ]
    changed = dict(zip(names, (int(heading.split(": ")[-1].split()[0]) for heading in headings)))
    assert changed["ScoreTokens"] == changed["SelectTokens"] == changed["GatherSurvivors"] == 2
    assert [name for name, sites in changed.items() if not sites] in (
        ["DropCasts", "HoistPositions"],
        ["ChannelLast", "DropCasts", "HoistPositions"],
    )
    inserted = [line for line in lines if line.startswith("+") and "selective_token_score(" in line]
    by = dict.fromkeys(line.split("# ")[1] for line in inserted)  # behind a cut its `real` is another: shown again
    assert list(by) == ["score-tokens, block 0", "score-tokens, block 2"]
    parent = "layers" if "layers" in text.split("==")[-1] else "blocks"
    assert text.split("== blocks after which no token leaves\n")[1].splitlines() == [
        f"{parent}.1: the schedule gives block 2 the same share (1/2)",
        f"{parent}.3: it is the last block: its output is the model's",
    ]


def test_the_program_is_a_readable_graph() -> None:
    sparse = simba_fx.transform(dense("mamba"), [1, 0.5, 0.5, 0.25])
    built = simba_fx.program(sparse)
    assert isinstance(built.program, fx.GraphModule)
    code = built.program.print_readable(print_output=False)
    assert code.count("select_real_tokens") == 2
    assert "block_3" in code
    assert built.shares == (1, Fraction(1, 2), Fraction(1, 2), Fraction(1, 4))
    assert [cut.block for cut in built.cuts] == [0, 2]
    assert built.history[0].by == "capture"


def test_kept_speaks_of_the_last_call() -> None:
    sparse = simba_fx.transform(dense("mamba"), "linear")
    run(sparse, tokens(1, 2, 40))
    first = simba_fx.kept(sparse)
    run(sparse, tokens(1, 3, 25))
    assert kept_counts(sparse) == counts(25, LINEAR)
    assert [k.shape[0] for k in simba_fx.kept(sparse)] == [3] * 4
    assert [k.shape[1] for k in first] == counts(40, LINEAR), "an answer stays as it was given"
    assert all(k.dtype is torch.int64 for k in first)


def test_kept_of_padded_rows_is_ascending_with_the_missing_first() -> None:
    sparse = simba_fx.transform(dense("mamba"), schedules(4)["linear"])
    ids, mask = padded([tokens(1, 30), tokens(2, 12)], [0, 18], [0, 0])
    run(sparse, ids, attention_mask=mask)
    for block, (long, short) in enumerate(zip(counts(30, LINEAR), counts(12, LINEAR))):
        positions = simba_fx.kept(sparse)[block]
        assert (positions >= 0).sum(1).tolist() == [long, short]
        assert torch.equal(positions, positions.sort(1).values)
        assert positions.max() < 30


def test_a_question_reaches_through_torch_compile() -> None:
    sparse = simba_fx.transform(dense("mamba"), "linear")
    compiled = torch.compile(sparse, backend="eager")
    run(compiled, tokens(1, 2, 40))
    assert kept_counts(compiled) == counts(40, LINEAR)
    assert simba_fx.explain(compiled) == simba_fx.explain(sparse)
