"""torch.compile of a transformed model: compiled once, for every length, batch and depth, with eager's values.

Graphs are counted with a backend that runs them as they are (`CompileCounterWithBackend("eager")`): what Dynamo
captures, and when it captures again, does not depend on the backend. Inductor itself runs on the smallest models.
"""

from __future__ import annotations

import copy
import functools
import gc
import importlib
import pickle
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import reference
import torch
from models import BY_NAME, VOCABULARY, padded, randomise, tokens
from reference import GRADIENT_TOLERANCE, TOLERANCE, assert_close
from subprocesses import environment
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters
from torch._inductor.utils import fresh_cache
from transformers import CompileConfig

import simba_fx
from simba_fx.capture.examples import autocast_dtype
from simba_fx.compiling import exported

own_model: Any = importlib.import_module("own_model")

DRAWS = reference.Draws()
FAMILIES = ("mamba", "mamba2-one-group")
every_family = pytest.mark.parametrize("family", FAMILIES)
every_mode = pytest.mark.parametrize("mode", ["blocks", "whole"])
every_masking = pytest.mark.parametrize("masked", [False, True], ids=["no mask", "left-padded"])

# Each batch from 2 to 20 and a spread of lengths from 9 to 300: the extremes, and the short ones one by one, where
# counts reach the floor and where one token leaves, or none.
SIZES = (
    *((2 + i, 9 + 16 * i) for i in range(19)),
    *((20 - i % 19, length) for i, length in enumerate(range(9, 25))),
    (2, 300),
    (20, 300),
    (20, 9),
    (2, 9),
)
FEW_SIZES = ((2, 9), (20, 300), (5, 17), (3, 12), (20, 9), (2, 300))


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.fixture(scope="module", autouse=True)
def _most_draws_are_used() -> Iterator[None]:
    yield
    DRAWS.check()


def dense(family: str, blocks: int = 4, **changes: Any) -> nn.Module:
    model = BY_NAME[family].make(num_hidden_layers=blocks, **changes)  # type: ignore[call-arg]
    randomise(model, seed=7)
    return model.eval()


def left_padded(seed: int, rows: int, length: int) -> tuple[Tensor, Tensor]:
    """Ids and mask: row b has b % 4 pads on its left, the first row none."""
    sizes = [length - b % 4 for b in range(rows)]
    contents = [tokens(seed + b, size) for b, size in enumerate(sizes)]
    return padded(contents, [length - size for size in sizes], [0] * rows)


def inputs(seed: int, rows: int, length: int, masked: bool) -> dict[str, Tensor]:
    if not masked:
        return {"input_ids": tokens(seed, rows, length)}
    ids, mask = left_padded(seed, rows, length)
    return {"input_ids": ids, "attention_mask": mask}


def clear_inputs(model: nn.Module, rows: int, length: int, masked: bool) -> dict[str, Tensor]:
    """Inputs for which no decision is too close to call: rounding cannot change what is kept."""
    shares = reference.linear(len(model.backbone.layers))

    def make(seed: int) -> Any:
        return left_padded(seed, rows, length) if masked else tokens(seed, rows, length)

    ids, mask, _ = DRAWS.first(model, shares, make)
    return {"input_ids": ids} if mask is None else {"input_ids": ids, "attention_mask": mask}


def first_call(compiled: Any, masked: bool) -> None:
    """The call that compiles; every later recompilation is an error (`error_on_recompile`)."""
    compiled(**inputs(0, 3, 20, masked))


def compiled_for_counting(sparse: nn.Module, mode: str) -> tuple[Any, Any]:
    counting = CompileCounterWithBackend("eager")
    whole = {"fullgraph": True, "dynamic": True} if mode == "whole" else {}
    return torch.compile(sparse, backend=counting, **whole), counting


# No recompilation.


@pytest.mark.parametrize(
    ("family", "mode", "masked"),
    [
        ("mamba", "blocks", False),
        ("mamba2-one-group", "blocks", True),
        ("mamba", "whole", True),
        ("mamba2-one-group", "whole", False),
    ],
)
def test_one_compilation_serves_every_batch_and_length(family: str, mode: str, masked: bool) -> None:
    sparse = simba_fx.transform(dense(family), "linear", compile=mode, criterion="simba")
    compiled, counting = compiled_for_counting(sparse, mode)
    recompiled = []
    with torch.no_grad():
        sparse(**inputs(0, 3, 20, masked))  # captured before it is compiled: see test_fullgraph_needs_no_call_before_it
        first_call(compiled, masked)
        graphs = counting.frame_count
        for rows, length in SIZES:
            call = inputs(rows, rows, length, masked)
            assert compiled(**call).logits.shape == (rows, length, VOCABULARY)
            if counting.frame_count > graphs:
                recompiled.append((rows, length))
                graphs = counting.frame_count
    assert recompiled == [], f"(batch, length) that compiled anew, after a first call of (3, 20): {recompiled}"


@every_family
def test_the_number_of_graphs_does_not_depend_on_depth(family: str) -> None:
    """Nor is any frame compiled twice, not even while the first call runs: equal blocks meet compiled code."""
    counts = []
    for blocks in (4, 9):
        torch._dynamo.reset()
        sparse = simba_fx.transform(dense(family, blocks=blocks), "linear", criterion="simba")
        compiled, counting = compiled_for_counting(sparse, "blocks")
        with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
            for rows, length in ((3, 20), *FEW_SIZES):
                compiled(**inputs(1, rows, length, masked=False))
        counts.append(counting.frame_count)
    assert counts[0] == counts[1]
    assert counts[0] <= 6  # embedding, first block, block, last block, what follows, head


@every_masking
@pytest.mark.parametrize("first", [5, 16])
def test_one_row_compiles_once_from_a_short_text_on(first: int, masked: bool) -> None:
    """A text of which everything is kept comes first; the strides of a single row mean nothing, and are guarded on."""
    sparse = simba_fx.transform(dense("mamba", blocks=12), "linear", criterion="simba")
    compiled, _ = compiled_for_counting(sparse, "blocks")
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        for length in (first, 128, 300, 20, 9):
            call = {"input_ids": tokens(1, 1, length)}
            if masked:
                call["attention_mask"] = (torch.arange(length) >= 2).long().unsqueeze(0)
            compiled(**call)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
@pytest.mark.parametrize("options", [{}, {"labels": "kept"}], ids=["plain", "labels"])
def test_whole_is_one_graph_after_adapters_as_blocks(options: Any) -> None:
    """The class of a model inside of a PEFT model is the same as that of one alone."""
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(dense("mamba", 2), LoraConfig(target_modules=["in_proj"]))  # type: ignore[arg-type]
    simba_fx.transform(adapted, "linear", **options)
    sparse = simba_fx.transform(BY_NAME["mamba"].build(), "linear", compile="whole", **options)
    compiled, counting = compiled_for_counting(sparse, "whole")
    with torch.no_grad():
        for call in (sparse, compiled):
            call(tokens(0, 2, 30), use_cache=False, labels=tokens(0, 2, 30))
    assert counting.frame_count == 1


@pytest.mark.parametrize("kind", ["transformers", "plain"])
def test_one_graph_of_the_whole_serves_every_tail(kind: str) -> None:
    """Also tails of answers. (A number would be compiled value by value.)"""
    plain = own_model.MyMamba(53, 16, 4, 3).eval()
    sparse: Any = simba_fx.transform(
        plain if kind == "plain" else dense("mamba"), "linear", compile="whole", criterion="simba"
    )
    options: Any = {} if kind == "plain" else {"use_cache": False}
    run = lambda model, ids: model(ids, **options) if kind == "plain" else model(ids, **options).logits  # noqa: E731
    with torch.no_grad():
        run(sparse, tokens(0, 2, 30))
        compiled, counting = compiled_for_counting(sparse, "whole")
        for seed, tail in enumerate((1, 2, 3, 5, 9, 4, 14, 8, 12, 13, 1)):
            ids = tokens(seed, 3, 40)
            with simba_fx.answer(sparse, tail) if seed % 2 else simba_fx.tail(sparse, tail):
                assert torch.equal(run(compiled, ids), run(sparse, ids))
        assert torch.equal(run(compiled, ids), run(sparse, ids))
    assert counting.frame_count == 1


@every_masking
def test_whole_is_one_graph_without_a_break(masked: bool) -> None:
    sparse = simba_fx.transform(dense("mamba"), "linear", compile="whole", criterion="simba")
    with torch.no_grad():
        sparse(**inputs(0, 3, 20, masked))
        found = torch._dynamo.explain(sparse)(**inputs(0, 3, 20, masked))
    assert found.graph_count == 1
    assert found.graph_break_count == 0, found.break_reasons


@every_masking
def test_fullgraph_needs_no_call_before_it(masked: bool) -> None:
    """The first call of a compiled model may be the first of its signature: with a mask, say."""
    sparse = simba_fx.transform(dense("mamba"), "linear", compile="whole", criterion="simba")
    compiled, counting = compiled_for_counting(sparse, "whole")
    with torch.no_grad():
        first_call(compiled, masked)
    assert counting.frame_count == 1


def test_dynamo_is_not_asked_which_devices_have_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch 2.11's cannot trace the question: it stops there, as any does at what is disabled."""
    monkeypatch.setattr(torch.amp, "is_autocast_available", torch.compiler.disable(torch.amp.is_autocast_available))
    compiled, counting = compiled_for_counting(
        simba_fx.transform(dense("mamba"), "linear", compile="whole", criterion="simba"), "whole"
    )
    with torch.no_grad():
        first_call(compiled, masked=False)
    assert counting.frame_count == 1
    ask = torch.compile(autocast_dtype, backend="eager", fullgraph=True)
    for kind, right in (("cpu", torch.bfloat16), ("cuda", None), ("meta", None)):
        with torch.autocast("cpu", torch.bfloat16):
            assert ask(torch.device(kind)) == autocast_dtype(torch.device(kind)) == right
        assert ask(torch.device(kind)) is None


@pytest.mark.parametrize("broken", [False, True], ids=["one graph", "a break before it is asked"])
@pytest.mark.parametrize("kind", ["mamba", "plain"])
def test_a_compiled_call_is_remembered_as_a_call(
    kind: str, broken: bool, plain: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it kept is known after it and behind it in compiled code. Without `fullgraph` Dynamo compiles what remembers
    as a frame of its own, and torch 2.11's takes `is_exporting()` for True wherever it compiles: so here, for any."""
    monkeypatch.setattr(torch.compiler, "is_exporting", lambda: torch.compiler.is_dynamo_compiling())
    sparse: Any = simba_fx.transform(
        plain if kind == "plain" else dense("mamba"), "linear", compile="whole", criterion="simba"
    )

    def asked(ids: Tensor) -> Any:
        sparse(ids)
        if broken:
            torch._dynamo.graph_break()
        return remembered()

    def remembered() -> list[Tensor]:
        return [*simba_fx.kept(sparse), simba_fx.reached(sparse)]

    compiled, compiled_asked = (torch.compile(run, backend="eager", dynamic=False) for run in (sparse, asked))
    texts = [tokens(seed, 2, 40) for seed in (1, 2)]
    with torch.no_grad():
        expected = [asked(ids) for ids in texts]
        assert not torch.equal(expected[0][-1], expected[1][-1])
        for i in (0, 1, 0):
            compiled(texts[i])
            found = [remembered(), compiled_asked(texts[i]), remembered()]
            for one in found:
                assert all(torch.equal(a, b) for a, b in zip(one, expected[i], strict=True))
        assert not torch.compile(exported, backend="eager", fullgraph=True)()


@every_mode
def test_a_protected_tail_is_honoured_by_compiled_code(mode: str) -> None:
    sparse = simba_fx.transform(dense("mamba"), "linear", compile=mode, criterion="simba")
    compiled, _ = compiled_for_counting(sparse, mode)
    ids = tokens(3, 2, 61)
    with torch.no_grad():
        compiled(ids)
        for tail in (5, 20):
            with simba_fx.tail(compiled, tail):
                found = compiled(ids).logits
                kept = simba_fx.kept(compiled)
                assert_close("logits", found, sparse(ids).logits, 1e-6)
            counts = reference.counts(61, reference.linear(4), tail)
            assert [block.shape for block in kept] == [(2, k) for k in counts]


# Inductor.


@pytest.mark.parametrize(("family", "masked"), [("mamba", True), ("mamba2-one-group", False)])
def test_blocks_with_inductor_recompile_nothing_and_equal_eager(family: str, masked: bool) -> None:
    model = dense(family)
    sparse = simba_fx.transform(model, "linear", criterion="simba")
    compiled = torch.compile(sparse)
    with torch.no_grad():
        first_call(compiled, masked)
        graphs = counters["stats"]["unique_graphs"]
        with torch._dynamo.config.patch(error_on_recompile=True):
            for rows, length in FEW_SIZES:
                compiled(**inputs(1, rows, length, masked))
            for rows, length in ((2, 61), (4, 30)):
                call = clear_inputs(model, rows, length, masked)
                found = compiled(**call).logits
                kept = simba_fx.kept(compiled)
                assert_close(f"logits ({rows}, {length})", found, sparse(**call).logits, TOLERANCE[torch.float32])
                assert all(torch.equal(a, b) for a, b in zip(kept, simba_fx.kept(sparse), strict=True))
        assert counters["stats"]["unique_graphs"] == graphs


@every_family
def test_whole_with_inductor_equals_eager(family: str) -> None:
    model = dense(family, blocks=3)
    sparse = simba_fx.transform(model, "linear", compile="whole", criterion="simba")
    compiled = torch.compile(sparse, fullgraph=True, dynamic=True)
    with torch.no_grad(), fresh_cache():  # an entry of the cache on disk may carry guards of its own
        for rows, length in ((2, 61), (4, 30)):
            call = clear_inputs(model, rows, length, masked=False)
            found = compiled(**call).logits
            assert_close(f"logits ({rows}, {length})", found, sparse(**call).logits, TOLERANCE[torch.float32])
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


@every_family
def test_gradients_through_the_compiled_model_equal_eager(family: str) -> None:
    model = dense(family, blocks=3)
    sparse = simba_fx.transform(model, "linear", criterion="simba").train()
    call = clear_inputs(model, 2, 40, masked=False)

    def gradients(run: Any) -> dict[str, Tensor]:
        sparse.zero_grad(set_to_none=True)
        run(**call, labels=call["input_ids"]).loss.backward()
        return {name: p.grad.clone() for name, p in sparse.named_parameters() if p.grad is not None}

    expected = gradients(sparse)
    found = gradients(torch.compile(sparse))
    assert found.keys() == expected.keys() == dict(sparse.named_parameters()).keys()
    for name, gradient in expected.items():
        assert_close(name, found[name], gradient, GRADIENT_TOLERANCE[torch.float32])


def test_generate_runs_on_a_compiled_model() -> None:
    model = dense("mamba", blocks=3)
    sparse = simba_fx.transform(model, "linear", criterion="simba")
    call = clear_inputs(model, 2, 30, masked=True)
    options = {"max_new_tokens": 5, "do_sample": False}
    expected = sparse.generate(**call, **options)
    assert torch.equal(torch.compile(sparse).generate(**call, **options), expected)
    compiled_in_place = simba_fx.transform(model, "linear", criterion="simba")
    compiled_in_place.compile(backend="eager")
    assert torch.equal(compiled_in_place.generate(**call, **options), expected)
    assert counters["stats"]["unique_graphs"] > 0


# `module.compile()`, which leaves its result on the module.


@pytest.mark.parametrize("path", ["", "backbone", "backbone.layers.1", "backbone.layers.1.mixer"])
def test_what_was_compiled_in_place_before_is_compiled_no_longer(path: str) -> None:
    """It ran the model that it was made of: a sparse model that kept it would be that dense model."""
    model, ids, counter = dense("mamba"), tokens(1, 2, 30), CompileCounterWithBackend("eager")
    expected = simba_fx.transform(model, "linear")(ids).logits
    model.get_submodule(path).compile(backend=counter)
    sparse = simba_fx.transform(model, "linear")
    assert torch.equal(sparse(ids).logits, expected)
    assert counter.frame_count == 0
    assert model.get_submodule(path)._compiled_call_impl is not None


def test_what_is_compiled_in_place_before_is_compiled_no_longer_of_a_plain_module(plain: nn.Module) -> None:
    ids, counter = tokens(1, 2, 60), CompileCounterWithBackend("eager")
    expected = simba_fx.transform(plain, "linear")(ids)
    for path in ("", "blocks.1"):
        module = plain.get_submodule(path)
        module.compile(backend=counter)
        assert torch.equal(simba_fx.transform(plain, "linear")(ids), expected)
        module._compiled_call_impl = None
    assert counter.frame_count == 0


@pytest.mark.parametrize("family", ["mamba", "bamba"])
def test_blocks_compiled_in_place_are_compiled_once_for_every_length(family: str) -> None:
    model = dense(family)
    sparse, eager = simba_fx.transform(model, "linear"), simba_fx.transform(model, "linear")
    counter = CompileCounterWithBackend("eager")
    for block in sparse.base_model.layers:
        block.compile(backend=counter)
    with torch.no_grad():
        compiled = set()
        for rows, length in FEW_SIZES:
            ids = tokens(length, rows, length)
            assert torch.equal(sparse(ids, use_cache=False).logits, eager(ids, use_cache=False).logits)
            compiled.add(counter.frame_count)
        assert len(compiled) == 1
        assert 0 < counter.frame_count <= 4
    options = {"max_new_tokens": 4, "do_sample": False}
    assert torch.equal(sparse.generate(ids, **options), eager.generate(ids, **options))


def test_steps_that_transformers_compiled_for_the_dense_model_are_not_the_sparse_ones() -> None:
    """With a static cache it keeps a compiled call on the model, where the device is a GPU or it is told to."""
    model, ids = BY_NAME["jamba"].build(), tokens(1, 2, 30)
    static = {"max_new_tokens": 6, "do_sample": False, "cache_implementation": "static"}
    expected = simba_fx.transform(model, "linear").generate(ids, disable_compile=True, **static)
    everywhere = CompileConfig(backend="eager", fullgraph=False, mode=None)
    everywhere._compile_all_devices = True
    dense_tokens = model.generate(ids, compile_config=everywhere, **static)
    assert "_compiled_call" in model.__dict__
    sparse, calls = simba_fx.transform(model, "linear"), []
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    assert torch.equal(sparse.generate(ids, compile_config=everywhere, **static), expected)
    assert calls == []
    assert not torch.equal(dense_tokens, expected)


def test_a_copy_is_not_compiled() -> None:
    sparse, ids = simba_fx.transform(dense("mamba"), "linear"), tokens(1, 2, 30)
    before = sparse(ids).logits
    sparse.compile(backend="eager")
    for copied in (copy.deepcopy(sparse), pickle.loads(pickle.dumps(sparse))):
        with torch.no_grad():
            for parameter in copied.parameters():
                parameter.zero_()
        assert not copied(ids).logits.any()
    assert torch.equal(sparse(ids).logits, before)


@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
def test_compiled_wrappers_inside_a_model_are_refused(before: bool) -> None:
    model, ids = dense("mamba"), tokens(1, 2, 30)
    if not before:
        model = simba_fx.transform(model, "linear")
    layers: Any = model.base_model.layers
    layers[1] = torch.compile(layers[1])
    with pytest.raises(simba_fx.errors.CaptureError) as caught:
        simba_fx.transform(model, "linear") if before else model(ids)
    path = "backbone.layers.1" if before else "layers.1"
    assert str(caught.value) == (
        f"{path} is wrapped by torch.compile (OptimizedModule); expected modules that are not compiled inside of a "
        "model that is transformed. Take that wrapper off, transform, and compile the sparse model: "
        "torch.compile(sparse) compiles each kind of block once."
    )
    layers[1] = layers[1]._orig_mod
    (simba_fx.transform(model, "linear") if before else model)(ids)


# Depth costs nothing.


def seconds_of_cpu() -> float:
    """Of this process and of the compilers it has waited for."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def many_blocks(blocks: int) -> nn.Module:
    return dense("mamba", blocks, hidden_size=16, state_size=4, time_step_rank=2)


@functools.cache
def transformed(blocks: int) -> tuple[nn.Module, float]:
    """The model and the CPU seconds that it took: once, for every test of its depth."""
    model = many_blocks(blocks)
    simba_fx.transform(dense("mamba", 2), "linear", criterion="simba")  # imports
    start = time.process_time()
    sparse = simba_fx.transform(model, "linear", criterion="simba")
    return sparse, time.process_time() - start


@pytest.fixture
def _one_thread() -> Iterator[None]:
    """Threads that wait for each other on a busy machine spin, and spinning counts as CPU seconds. So does looking
    through the millions of objects that the tests before this one left for the garbage collector."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
    torch.set_num_threads(threads)


@pytest.mark.parametrize(("blocks", "allowed"), [(64, 8)])
def test_transform_is_quick(blocks: int, allowed: float) -> None:
    """CPU seconds, which count little of what else the machine does, in a process that has nothing else to look after;
    the better of two, where one is too many."""
    script = (
        "import torch; torch.set_num_threads(1); import simba_fx, test_compile\n"
        f"sparse, taken = test_compile.transformed({blocks})\n"
        "print(len(simba_fx.program(sparse).cuts), taken)"
    )
    times: list[float] = []
    while not times or (times[-1] >= allowed and len(times) < 2):
        run = subprocess.run(
            [sys.executable, "-c", script], env=environment(Path(__file__).parent), capture_output=True, text=True
        )
        assert run.returncode == 0, run.stderr
        cuts, taken = run.stdout.split()[-2:]
        assert int(cuts) == blocks - 1
        times.append(float(taken))
    assert times[-1] < allowed, f"{times} s"


@pytest.mark.usefixtures("_one_thread")
def test_sixty_four_blocks_compile_in_seconds() -> None:
    sparse, _ = transformed(64)
    assert len(simba_fx.program(sparse).cuts) == 63
    compiled = torch.compile(sparse)
    with torch.no_grad(), fresh_cache(), torch._inductor.config.patch(compile_threads=1):  # compilers: our children
        torch.compile(lambda x: x.sin() + 1)(torch.ones(5))  # Inductor's own start: imports, compiler flags, headers
        start = seconds_of_cpu()
        compiled(tokens(1, 2, 200))
        taken = seconds_of_cpu() - start
        with torch._dynamo.config.patch(error_on_recompile=True):
            compiled(tokens(2, 3, 77))
    assert taken <= 15, f"{taken:.1f} CPU seconds"


# Plain modules.


@pytest.fixture(scope="module")
def plain() -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = own_model.MyMamba(vocabulary=VOCABULARY, width=16, states=4, depth=4).eval()
    return model


@every_mode
def test_a_plain_module_compiles_once_for_every_batch_and_length(plain: nn.Module, mode: str) -> None:
    sparse = simba_fx.transform(plain, "linear", compile=mode, criterion="simba")
    compiled, counting = compiled_for_counting(sparse, mode)
    with torch.no_grad():
        compiled(tokens(0, 3, 20))
        graphs = counting.frame_count
        assert graphs == 1 if mode == "whole" else graphs <= 6
        # this model calls nn.Conv1d itself, whose CPU kernel guards on 2 <= B <= 15: dense it is compiled twice as well
        for rows, length in ((rows, length) for rows, length in SIZES if rows <= 15):
            found = compiled(tokens(rows, rows, length))
            assert found.shape == (rows, length, VOCABULARY)
            assert counting.frame_count == graphs, f"({rows}, {length}) compiled anew"
        ids = tokens(1, 4, 50)
        assert_close("logits", compiled(ids), sparse(ids), 1e-6)


@every_mode
def test_a_plain_module_compiles_with_inductor(plain: nn.Module, mode: str) -> None:
    sparse = simba_fx.transform(plain, "linear", criterion="recent", compile=mode)  # ties and near ties cannot flip
    compiled = torch.compile(sparse, dynamic=True if mode == "whole" else None, fullgraph=mode == "whole")
    ids = tokens(1, 4, 50)
    with torch.no_grad():
        assert_close("logits", compiled(ids), sparse(ids), TOLERANCE[torch.float32])


# The model's own kernels.


@every_mode
@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a .functools.lru_cache.:UserWarning")  # in transformers
def test_the_models_own_kernels_compile(mode: str) -> None:
    """transformers' fallback loops over tokens, so it may compile once per length; its values stay."""
    sparse = simba_fx.transform(dense("mamba", blocks=3), "linear", kernels="model", compile=mode, criterion="simba")
    compiled = torch.compile(sparse, backend="eager", fullgraph=mode == "whole")
    ids = tokens(1, 2, 12)
    with torch.no_grad():
        assert_close("logits", compiled(ids).logits, sparse(ids).logits, TOLERANCE[torch.float32])
