"""`torch.compile(model, backend="simba_fx")`: equal to `transform`, and nothing to anybody else.

The inner backend is mostly "eager", which runs the rewritten graph as it is: what it computes does not depend on who
compiles it. Inductor itself runs on one small model.
"""

from __future__ import annotations

import copy
import importlib
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from models import CACHE, CHECKPOINT, dense, sparse, three_rows, tokens
from reference import GRADIENT_TOLERANCE, TOLERANCE, assert_close
from torch import Tensor, fx, nn
from torch._dynamo.exc import BackendCompilerFailed
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters

import simba_fx
from simba_fx.frontends.dynamo import simba_fx as backend
from simba_fx.graph.facts import SELECTS
from simba_fx.ops.recurrences import SCANS

own_model: Any = importlib.import_module("own_model")

FAMILIES = ("mamba", "mamba2-two-groups")
every_family = pytest.mark.parametrize("family", FAMILIES)


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


class Inner:
    """An inner backend that keeps the graphs that it is given, and runs them node by node: selections are seen."""

    def __init__(self) -> None:
        self.graphs: list[fx.GraphModule] = []
        self.kept: list[Tensor] = []

    def __call__(self, gm: fx.GraphModule, _: Any) -> Callable[..., Any]:
        self.graphs.append(gm)
        inner = self

        class Watching(fx.Interpreter):
            def run_node(self, n: fx.Node) -> Any:
                result = super().run_node(n)
                if n.target in SELECTS:
                    positions = result[2]
                    inner.kept.append(positions if len(result) < 5 else torch.where(result[4], positions, -1))
                return result

        def run(*inputs: Any) -> Any:
            self.kept = []
            return Watching(gm).run(*inputs)

        return run

    def selections(self) -> list[int]:
        """How many selections each graph holds."""
        return [sum(node.target in SELECTS for node in gm.graph.nodes) for gm in self.graphs]


def compiled(model: Any, inner: Any = "eager", dynamic: bool | None = None, **options: Any) -> Any:
    """By the function, which needs no metadata of an installation; its name is tested in a process of its own."""
    options = {"backend": inner, "schedule": "linear", "criterion": "simba", **options}
    return torch.compile(model, backend=backend, dynamic=dynamic, options=options)


def same_kept(inner: Inner, reference: nn.Module) -> None:
    kept = simba_fx.kept(reference)
    expected = [kept[cut.block + 1] for cut in simba_fx.program(reference).cuts]
    assert len(inner.kept) == len(expected) > 0
    for found, wanted in zip(inner.kept, expected):
        torch.testing.assert_close(found.sort(1).values, wanted.sort(1).values, rtol=0, atol=0)


def refusal(call: Callable[[], Any]) -> str:
    """What the backend says, without what Dynamo adds."""
    with pytest.raises(BackendCompilerFailed) as caught:
        call()
    return str(caught.value.inner_exception).split("\n")[0]


# Equal to transform.


@pytest.mark.parametrize(
    ("family", "masked", "dynamic"),
    [
        ("mamba", False, None),
        ("mamba", True, True),
        ("mamba2-two-groups", False, True),
        ("mamba2-two-groups", True, None),
    ],
)
def test_a_model_computes_what_transform_computes(family: str, masked: bool, dynamic: bool | None) -> None:
    model, reference, inner = dense(family), sparse(family, "linear"), Inner()
    call = three_rows(masked)
    with torch.no_grad():
        found, expected = compiled(model, inner, dynamic)(**call), reference(**call)
        assert torch.equal(found.logits, expected.logits)
        assert not torch.allclose(found.logits, model(**call).logits, rtol=0.1)
    same_kept(inner, reference)


@pytest.mark.parametrize(("name", "masked"), [("jamba", False), ("falcon-h1", True)])
def test_hybrids_without_a_cache(name: str, masked: bool) -> None:
    call = three_rows(masked) | {"use_cache": False}
    with torch.no_grad():
        found = compiled(dense(name), "eager", True)(**call).logits
        assert torch.equal(found, sparse(name, "linear")(**call).logits)


def test_one_compilation_serves_every_batch_and_length() -> None:
    model, reference, inner = dense("mamba"), sparse("mamba", "linear"), Inner()
    run = compiled(model, inner, dynamic=True)
    with torch.no_grad():
        for rows, length in ((3, 24), (2, 9), (20, 100), (5, 17), (7, 300), (3, 10)):
            ids = tokens(rows, rows, length)
            assert torch.equal(run(ids).logits, reference(ids).logits)
            same_kept(inner, reference)
    assert len(inner.graphs) == 1


def reads_of_length(gm: fx.GraphModule) -> list[fx.Node]:
    """Where the length of the text is read, rather than written as a number."""
    sizes = gm.graph.find_nodes(op="call_function", target=torch.ops.aten.sym_size.int)
    return [node for node in sizes if node.args[0].op == "placeholder" and node.args[1] == 1]


def test_by_default_the_first_length_has_a_graph_of_its_own_and_the_second_serves_every_other() -> None:
    model, reference, inner = dense("mamba"), sparse("mamba", "linear"), Inner()
    run = compiled(model, inner)
    with torch.no_grad():
        for length in (24, 31, 57, 24, 9):
            ids = tokens(length, 3, length)
            assert torch.equal(run(ids).logits, reference(ids).logits)
    assert inner.selections() == [3, 3]
    assert [bool(reads_of_length(gm)) for gm in inner.graphs] == [False, True]


@pytest.mark.parametrize(
    ("shape", "dynamic"),
    [
        ((1, 24), None),
        ((1, 24), True),
        ((24, 24), None),
        ((20, 20), True),
        ((1, 2), True),
        ((2, 3), None),
        ((3, 5), True),
    ],
)
def test_one_row_and_sizes_that_coincide(shape: tuple[int, int], dynamic: bool | None) -> None:
    """20 is the model's width as well; texts shorter than the convolution, and than what is always kept."""
    ids = tokens(5, *shape)
    with torch.no_grad():
        found, expected = compiled(dense("mamba"), "eager", dynamic)(ids), sparse("mamba", "linear")(ids)
    assert torch.equal(found.logits, expected.logits)


@every_family
def test_embeddings_instead_of_ids(family: str) -> None:
    model, ids = dense(family), tokens(3, 2, 20)
    embeds = model.get_input_embeddings()(ids).detach()
    with torch.no_grad():
        found = compiled(model)(inputs_embeds=embeds).logits
        assert torch.equal(found, sparse(family, "linear")(inputs_embeds=embeds).logits)


def test_bfloat16() -> None:
    ids = tokens(1, 3, 37)
    with torch.no_grad():
        found = compiled(dense("mamba-bf16"))(ids).logits
        assert torch.equal(found, sparse("mamba-bf16", "linear")(ids).logits)


@pytest.mark.parametrize(
    "options",
    [
        {"schedule": 0.5},
        {"schedule": [1, 0.7, 0.7, 0.2]},
        {"schedule": simba_fx.Budget(0.7)},
        {"criterion": "no-decay"},
        {"criterion": "recent", "floor": 7},
        {"criterion": "random", "seed": 3},
        {"protect": [0, 5]},
        {"query": -1, "protect": [2]},
    ],
    ids=lambda options: " ".join(f"{k}={v}" for k, v in options.items()),
)
def test_options_are_those_of_transform(options: dict[str, Any]) -> None:
    model, inner, ids = dense("mamba"), Inner(), tokens(4, 3, 41)
    given = {"schedule": "linear", "criterion": "simba", **options}
    reference = simba_fx.transform(model, **given)
    with torch.no_grad():
        found, expected = compiled(model, inner, **given)(ids).logits, reference(ids).logits
    assert torch.equal(found, expected)
    same_kept(inner, reference)


def test_what_is_left_out_is_as_in_transform() -> None:
    model, inner, ids = dense("mamba"), Inner(), tokens(4, 3, 41)
    reference = simba_fx.transform(model)
    with torch.no_grad():
        found = torch.compile(model, backend=backend, options={"backend": inner})(ids).logits
        assert torch.equal(found, reference(ids).logits)
    same_kept(inner, reference)


def test_a_criterion_of_ones_own() -> None:
    def closeness(operands: Any, query: Tensor) -> Tensor:
        return -(operands.u.sum(1) - operands.u.sum(1).gather(1, query[:, None])).abs()

    model, ids = dense("mamba"), tokens(4, 3, 41)
    with torch.no_grad():
        found = compiled(model, criterion=closeness)(ids).logits
        assert torch.equal(found, simba_fx.transform(model, "linear", criterion=closeness)(ids).logits)


def test_a_tail_is_kept_and_cannot_choose_its_context() -> None:
    model, reference, inner, ids = dense("mamba"), sparse("mamba", "linear"), Inner(), tokens(4, 3, 41)
    with torch.no_grad():
        found = compiled(model, inner, tail=12)(ids, labels=ids)
        with simba_fx.tail(reference, 12):
            expected = reference(ids, labels=ids)
    assert torch.equal(found.loss, expected.loss)
    assert torch.equal(found.logits, expected.logits)
    same_kept(inner, reference)


def test_hidden_states_have_their_full_length() -> None:
    ids = tokens(4, 3, 41)
    with torch.no_grad():
        found = compiled(dense("mamba"))(ids, output_hidden_states=True).hidden_states
        expected = sparse("mamba", "linear")(ids, output_hidden_states=True).hidden_states
    assert len(found) == len(expected) == 5
    assert all(torch.equal(a, b) for a, b in zip(found, expected))


def test_a_plain_module_with_a_registered_scan() -> None:
    torch.manual_seed(0)
    model, inner, ids = own_model.MyMamba().eval(), Inner(), torch.randint(97, (2, 60))
    reference = simba_fx.transform(model, "linear", criterion="simba")
    run = compiled(model, inner)
    with torch.no_grad():
        for given in (ids, ids[:, :31], ids[:, :44]):
            assert torch.equal(run(given), reference(given))
            same_kept(inner, reference)


def test_a_scan_registered_after_the_backend_was_loaded_in_a_model_without_a_list_of_blocks() -> None:
    class Mixer(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.step, self.output = nn.Linear(width, width), nn.Linear(width, width)
            self.A = nn.Parameter(-torch.rand(width, 3))
            self.BC = nn.Linear(width, 6)

        def forward(self, x: Tensor) -> Tensor:
            B, C = self.BC(x).chunk(2, -1)
            return x + self.output(scan_of_test(x, nn.functional.softplus(self.step(x)), self.A, B, C))

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.third = Mixer(8), Mixer(8), Mixer(8)

        def forward(self, x: Tensor) -> Tensor:
            return self.third(self.second(self.first(x)))

    simba_fx.register_scan(scan_of_test, own_model.adapter)
    torch.manual_seed(1)
    model, x = Two().eval(), torch.randn(2, 30, 8)
    with pytest.warns(UserWarning, match="scan_of_test was not compared .*: only the graph is run"):
        reference = simba_fx.transform(model, 0.5, example_inputs=(x,), criterion="simba")
    with torch.no_grad():
        assert torch.equal(compiled(model, schedule=0.5)(x), reference(x))


def scan_of_test(x: Tensor, step: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    raise AssertionError("only the graph is run")


# Training.


@pytest.mark.parametrize(("family", "inner"), [("mamba", "eager"), ("mamba2-two-groups", "aot_eager")])
def test_gradients(family: str, inner: str) -> None:
    model = copy.deepcopy(dense(family)).train()
    reference = simba_fx.transform(copy.deepcopy(model), "linear", criterion="simba")
    call = three_rows(True)
    compiled(model, inner)(**call, labels=call["input_ids"]).loss.backward()
    reference(**call, labels=call["input_ids"]).loss.backward()
    expected = dict(reference.named_parameters())
    for name, parameter in model.named_parameters():
        theirs = expected[name].grad
        assert parameter.grad is not None
        assert theirs is not None
        assert_close(name, parameter.grad, theirs, GRADIENT_TOLERANCE[torch.float32])


# Decoding.


@pytest.mark.parametrize(("family", "dynamic"), [("mamba", True), ("mamba2-two-groups", None)])
def test_generate_prunes_the_prompt_and_decodes_dense(family: str, dynamic: bool | None) -> None:
    model, inner = copy.deepcopy(dense(family)), Inner()
    options = {"backend": inner, "schedule": "linear", "criterion": "simba"}
    model.compile(backend=backend, dynamic=dynamic, options=options)
    ids = tokens(8, 2, 33)
    found = model.generate(ids, max_new_tokens=12, do_sample=False)
    assert torch.equal(found, sparse(family, "linear").generate(ids, max_new_tokens=12, do_sample=False))
    prompts = [count for count in inner.selections() if count]
    assert prompts == [len(model.base_model.layers) - 1]
    decoding = [gm for gm, count in zip(inner.graphs, inner.selections()) if not count]
    assert decoding
    assert not any(node.target in SCANS for gm in decoding for node in gm.graph.nodes)


def test_a_prompt_of_one_token_is_dense() -> None:
    model, inner, ids = dense("mamba"), Inner(), tokens(8, 3, 1)
    with torch.no_grad():
        assert_close("logits", compiled(model, inner)(ids).logits, model(ids).logits, TOLERANCE[torch.float32])
    assert inner.selections() == [0]


def test_states_are_those_that_the_blocks_saw() -> None:
    ids = tokens(8, 3, 33)
    with torch.no_grad():
        found = compiled(dense("mamba"))(ids, use_cache=True)[CACHE]
        expected = sparse("mamba", "linear")(ids, use_cache=True)[CACHE]
    for ours, theirs in zip(found.layers, expected.layers):
        assert torch.equal(ours.conv_states[0], theirs.conv_states[0])
        assert torch.equal(ours.recurrent_states[0], theirs.recurrent_states[0])


def test_what_the_model_writes_in_place_is_written() -> None:
    class Remembering(own_model.MyMamba):  # type: ignore[misc]  # the example's own
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("last", torch.zeros(32))

        def forward(self, ids: Tensor) -> Tensor:
            hidden = self.embedding(ids)
            for block in self.blocks:
                hidden = block(hidden)
            self.last.copy_(hidden[0, -1])
            return hidden

    torch.manual_seed(0)
    model, ids = Remembering().eval(), tokens(1, 2, 50)
    with torch.no_grad():
        hidden = compiled(model)(ids)
    assert torch.equal(model.last, hidden[0, -1])
    assert model.last.any()


# Whoever else compiles.


def dense_graph(model: nn.Module, ids: Tensor) -> tuple[str, Tensor]:
    torch._dynamo.reset()
    counting = CompileCounterWithBackend("eager")
    with torch.no_grad():
        logits = torch.compile(model, backend=counting)(ids).logits
    return "\n".join(gm.print_readable(print_output=False) for gm in counting.graphs), logits


@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`:UserWarning")  # transformers' own
def test_another_backend_and_eager_calls_see_the_model_itself() -> None:
    model, ids = dense("mamba"), tokens(2, 2, 9)
    with torch.no_grad():
        eager = model(ids).logits
    before, logits = dense_graph(model, ids)
    with torch.no_grad():
        compiled(model)(ids)
    after, again = dense_graph(model, ids)
    assert "simba_fx" not in before
    assert after == before
    assert torch.equal(again, logits)
    assert_close("logits", logits, eager, TOLERANCE[torch.float32])  # transformers scans otherwise when it is compiled
    with torch.no_grad():
        assert torch.equal(model(ids).logits, eager)


def test_a_fresh_process_has_the_same_graph_as_one_that_loaded_the_backend() -> None:
    program = """
import sys, warnings
warnings.simplefilter("ignore")
import torch
from transformers import MambaConfig, MambaForCausalLM
if sys.argv[1] == "loaded":
    import simba_fx.frontends.dynamo
graphs = []
def backend(gm, _):
    graphs.append(gm.print_readable(print_output=False))
    return gm.forward
torch.manual_seed(0)
model = MambaForCausalLM(MambaConfig(hidden_size=8, num_hidden_layers=2, vocab_size=11)).eval()
with torch.no_grad():
    torch.compile(model, backend=backend)(torch.ones(2, 5, dtype=torch.int64))
import re
print(len(graphs), *(re.sub("#.*", "", graph) for graph in graphs))
"""
    runs = [
        subprocess.run([sys.executable, "-c", program, how], capture_output=True, text=True, check=True).stdout
        for how in ("alone", "loaded")
    ]
    assert runs[0].startswith("1 class GraphModule")
    assert runs[0] == runs[1]


def test_another_thread_runs_the_model_itself_meanwhile() -> None:
    model, ids, found = dense("mamba"), tokens(2, 2, 9), {}
    started, done = threading.Event(), threading.Event()

    def inner(gm: fx.GraphModule, _: Any) -> Any:  # while the backend is at work in this thread
        started.set()
        assert done.wait(60)
        return gm.forward

    def other() -> None:
        assert started.wait(60)
        with torch.no_grad():
            found["eager"] = model(ids).logits
        done.set()

    thread = threading.Thread(target=other)
    thread.start()
    with torch.no_grad():
        pruned = compiled(model, inner)(ids).logits
        expected = model(ids).logits
    thread.join()
    assert_close("logits", found["eager"], expected, TOLERANCE[torch.float32])
    assert not torch.allclose(pruned, expected, rtol=0.1)


def test_two_option_sets_and_two_models_in_one_process() -> None:
    ids = tokens(6, 2, 40)
    pairs = [("mamba", "linear"), ("mamba", 0.5), ("mamba2-two-groups", 0.5)]
    runs = [(compiled(dense(family), schedule=schedule), sparse(family, schedule)) for family, schedule in pairs]
    with torch.no_grad():
        for given in (ids, ids[:, :23], ids):
            for run, reference in runs:
                assert torch.equal(run(given).logits, reference(given).logits)


def test_the_tensors_of_the_call_are_left_unmarked() -> None:
    ids = tokens(6, 2, 40)
    before = set(vars(ids))
    with torch.no_grad():
        compiled(dense("mamba"))(ids)
    assert set(vars(ids)) == before


def test_the_entry_point_needs_no_import(tmp_path: Path) -> None:
    program = """
import sys, warnings
warnings.simplefilter("ignore")
import torch
from transformers import MambaConfig, MambaForCausalLM
assert not [name for name in sys.modules if name.startswith("simba_fx")]
torch.manual_seed(0)
model = MambaForCausalLM(MambaConfig(hidden_size=8, num_hidden_layers=3, vocab_size=11)).eval()
ids = torch.randint(11, (2, 40))
with torch.no_grad():
    found = torch.compile(model, backend="simba_fx", options={"backend": "eager", "schedule": 0.5})(ids).logits
    import simba_fx
    print(torch.equal(found, simba_fx.transform(model, 0.5)(ids).logits), torch.equal(found, model(ids).logits))
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "False"]


# Inductor, and real weights.


def test_inductor() -> None:
    model, reference, call = dense("mamba"), sparse("mamba", "linear"), three_rows(True)
    with torch.no_grad():
        options = {"schedule": "linear", "criterion": "simba"}
        found = torch.compile(model, backend=backend, options=options)(**call).logits
        assert_close("logits", found, reference(**call).logits, TOLERANCE[torch.float32])


def test_the_trained_checkpoint() -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(CHECKPOINT).eval()
    ids = torch.tensor([list(Path(__file__).read_bytes()[:400])])
    with torch.no_grad():
        found = compiled(model)(ids).logits
        assert torch.equal(found, simba_fx.transform(model, "linear", criterion="simba")(ids).logits)


# What is refused.


def test_unknown_options_and_those_that_do_not_apply() -> None:
    x = torch.randn(2, 9, 8)

    def said(**options: Any) -> str:
        return refusal(lambda: torch.compile(own_model.Block(8, 3), backend=backend, options=options)(x))

    assert said(shedule="linear") == (
        "Unknown option 'shedule' of backend=\"simba_fx\": expected schedule, criterion, floor, seed, span, query, "
        "protect, "
        "mask, mask_marks, tail, backend, mode, options. Options of the inner backend go one level down: "
        'options={"options": {...}}.'
    )
    assert said(output="kept") == (
        "Option 'output' does not apply to backend=\"simba_fx\": Dynamo has fixed what the model returns before the "
        "passes run, so every result has its full length. Leave the option out, or use simba_fx.transform."
    )
    assert said(kernels="model").startswith("Option 'kernels' does not apply to backend=\"simba_fx\": the operators of")
    assert said(compile="blocks").startswith("Option 'compile' does not apply to backend=\"simba_fx\": torch.compile")
    assert said(tail=0) == (
        "Option 'tail' expects a whole number of tokens, at least 1; found 0. Write for example "
        'options={"tail": 100}.'
    )
    assert said(schedule="liner").startswith("expected a schedule name, one of linear")
    assert said(criterion="best").startswith("Unknown criterion 'best'")
    assert said(floor=-1).startswith("transform expects floor to be")
    assert said(backend="simba_fx") == (
        "Option 'backend' names the backend that compiles the rewritten graph; expected another one than simba_fx. "
        "Leave it out for Inductor."
    )


def test_a_backend_that_calls_this_one() -> None:
    def mine(gm: fx.GraphModule, inputs: Any) -> Any:
        return backend(gm, inputs, options={"backend": "eager"})

    model = nn.Sequential(nn.Linear(3, 3))
    assert refusal(lambda: torch.compile(model, backend=mine)(torch.ones(2, 3))) == (
        "simba_fx.frontends.dynamo.simba_fx was called by another backend, or outside of torch.compile; expected to be "
        'the backend that Dynamo traces for, so that scans are calls. Write torch.compile(model, backend="simba_fx").'
    )


def test_modules_without_a_scan_are_compiled_as_they_are() -> None:
    model, inner, x = nn.Sequential(nn.Linear(3, 3), nn.ReLU()), Inner(), torch.ones(2, 3)
    assert torch.equal(compiled(model, inner)(x), model(x))
    assert inner.selections() == [0]


def test_a_model_whose_scan_is_not_registered() -> None:
    class Stack(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.decay = nn.Embedding(11, 4), nn.Parameter(torch.rand(4))

        def forward(self, ids: Tensor) -> Tensor:
            return running_scan(self.embedding(ids), self.decay)

    said = refusal(lambda: compiled(Stack())(tokens(1, 2, 9, vocabulary=11)))
    assert said.endswith(
        "No scan was found in Stack: expected at least one call of a registered scan function while it was traced, "
        "found none. A model of attention or convolutions alone has no recurrence to score tokens by. If this one runs "
        "the scan of Mamba or Mamba-2 in a function of its own, register it: "
        "simba_fx.register_scan(function, adapter). If another that is "
        "linear in its values: simba_fx.register_recurrence(function, value)."
    )


def running_scan(x: Tensor, decay: Tensor) -> Tensor:
    state, states = x[:, 0], []
    for t in range(x.shape[1]):
        state = decay * state + x[:, t]
        states.append(state)
    return torch.stack(states, 1)


@every_family
def test_several_tokens_on_a_warm_cache(family: str) -> None:
    model, ids = dense(family), tokens(3, 2, 20)
    run = compiled(model)
    with torch.no_grad():
        cache = run(ids, use_cache=True)[CACHE]
        with pytest.raises((BackendCompilerFailed, RuntimeError), match=r"an empty cache|without a warm cache"):
            run(ids[:, :7], use_cache=True, **{CACHE: cache})


def test_a_cache_with_attention_layers() -> None:
    said = refusal(lambda: compiled(dense("jamba"))(tokens(1, 2, 20), use_cache=True))
    assert said.startswith("The graph returns cat")
    assert said.endswith(
        "of model.layers.1.self_attn, (2, 2, L, 4): an attention layer's keys or values, found with the length in "
        "dimension 2; expected a cache without attention layers. Pass use_cache=False, or use simba_fx.transform."
    )


def test_a_mask_that_has_no_name() -> None:
    model, call = dense("mamba"), three_rows(True)

    def step(ids: Tensor, real: Tensor) -> Tensor:
        return model(ids, attention_mask=real).logits

    assert refusal(lambda: compiled(step)(*call.values())) == (
        "The blocks read L['real'] (B, L), torch.int64, which may be a padding mask; expected one called "
        "attention_mask, or to be told. Pass options={'mask': its name}, with 'mask_marks': 'padding' if values other "
        "than 0 mark padding, or {'mask': False} if no argument says what is padding."
    )

    def inverse(ids: Tensor, padded: Tensor) -> Tensor:
        return model(ids, attention_mask=(~padded).long()).logits

    with torch.no_grad():
        expected = sparse("mamba", "linear")(**call).logits
        assert torch.equal(compiled(step, mask="real")(*call.values()), expected)
        padding = call["attention_mask"] == 0
        assert torch.equal(compiled(inverse, mask="padded", mask_marks="padding")(call["input_ids"], padding), expected)
        positional = compiled(model)(*call.values()).logits
        assert torch.equal(positional, expected)


def test_a_mask_of_another_shape() -> None:
    class Masked(own_model.MyMamba):  # type: ignore[misc]  # the example's own
        def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
            hidden = self.embedding(ids) * mask
            for block in self.blocks:
                hidden = block(hidden)
            return self.head(self.norm(hidden))

    said = refusal(lambda: compiled(Masked(), mask="mask")(tokens(1, 2, 20), torch.ones(2, 20, 1, dtype=torch.int64)))
    assert said.startswith(
        "Expected one attention_mask (B, L), 1 for real tokens and 0 for padding; found L['mask'] (2, "
    )
    assert said.endswith("Pass the tokenizer's 2-D mask.")


def test_a_row_without_enough_real_tokens_is_found_when_the_graph_runs() -> None:
    call = three_rows(True)
    call["attention_mask"][1] = 0
    with torch.no_grad(), pytest.raises(RuntimeError, match="fewer real tokens than simba_fx must keep of it"):
        compiled(dense("mamba"))(**call)


def test_a_text_that_is_shorter_than_the_tail() -> None:
    run = compiled(dense("mamba"), tail=12)
    with torch.no_grad():
        run(tokens(1, 2, 20))
    assert refusal(lambda: run(tokens(1, 2, 9))) == (
        "The options 'tail', 'query' and 'protect' need 12 tokens; found a text of 9. Lower them or pass a longer text."
    )


def test_a_model_that_branches_on_lengths_that_are_pruned_away() -> None:
    """With a cache the model pads texts shorter than its convolution; a graph without that is for longer ones."""
    model, ids = dense("mamba"), tokens(1, 2, 30)
    assert refusal(lambda: compiled(model, floor=0)(ids, use_cache=True)) == (
        "Dynamo traced the model for texts of at least 4 tokens, since it branches on the length, and 'floor' and "
        "'tail' allow it to keep 1; expected at least 4. Pass options={'floor': 3}, or use simba_fx.transform."
    )
    with torch.no_grad():
        found = compiled(model, floor=3)(ids, use_cache=True).logits
        assert torch.equal(found, simba_fx.transform(model, "linear", floor=3, criterion="simba")(ids).logits)


def test_one_block() -> None:
    block = own_model.Block(8, 3)
    assert refusal(lambda: compiled(block)(torch.randn(2, 20, 8))) == (
        "This graph holds one block (scans: 1), and tokens leave between blocks; expected two or more in one graph. "
        "Compile the whole model, with fullgraph=True to see whether and where it breaks into pieces, or use "
        "simba_fx.transform."
    )


def test_a_piece_of_a_model() -> None:
    class Broken(own_model.MyMamba):  # type: ignore[misc]  # the example's own
        def forward(self, ids: Tensor) -> Tensor:
            hidden = self.blocks[1](self.blocks[0](self.embedding(ids)))
            torch._dynamo.graph_break()
            for block in self.blocks[2:]:
                hidden = block(hidden)
            return self.head(self.norm(hidden))

    assert refusal(lambda: compiled(Broken())(tokens(1, 2, 20))) == (
        "A graph break divides the model: this graph holds 2 scans and lacks the blocks 2, 3, 4, 5 of blocks; expected "
        "all blocks in one graph, since a schedule is for all of them. Compile with fullgraph=True to see where it "
        "breaks, or use simba_fx.transform."
    )


def test_a_break_behind_the_blocks_is_none_of_their_business() -> None:
    class Broken(own_model.MyMamba):  # type: ignore[misc]  # the example's own
        def forward(self, ids: Tensor) -> Tensor:
            hidden = self.embedding(ids)
            for block in self.blocks:
                hidden = block(hidden)
            torch._dynamo.graph_break()
            return self.head(self.norm(hidden))

    torch.manual_seed(0)
    model, ids = Broken().eval(), tokens(1, 2, 50)
    whole = own_model.MyMamba().eval()
    whole.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(compiled(model)(ids), simba_fx.transform(whole, "linear", criterion="simba")(ids))


def test_gradient_checkpointing() -> None:
    class Checkpointed(own_model.MyMamba):  # type: ignore[misc]  # the example's own
        def forward(self, ids: Tensor) -> Tensor:
            hidden = self.embedding(ids)
            for block in self.blocks:
                hidden = torch.utils.checkpoint.checkpoint(block, hidden, use_reentrant=False)
            return self.head(self.norm(hidden))

    assert refusal(lambda: compiled(Checkpointed())(tokens(1, 2, 20))) == (
        "6 scans or convolutions are inside of operators that run graphs of their own (gradient checkpointing?); "
        "expected them in the model's own graph. Turn checkpointing off, or use simba_fx.transform."
    )


class _Rounded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: Any, *arriving: Tensor) -> Any:
        return arriving[0]


@pytest.mark.filterwarnings("ignore:.*should not be instantiated")  # Dynamo does
@pytest.mark.filterwarnings("ignore:scan was not compared")
def test_a_function_with_a_backward_of_its_own() -> None:
    class Rounding(own_model.MyMamba):  # type: ignore[misc]  # the example's own
        def forward(self, ids: Tensor) -> Tensor:
            found: Tensor = super().forward(ids) + _Rounded.apply(self.embedding(ids)).sum(-1, keepdim=True)
            return found

    model, ids = Rounding(), tokens(1, 2, 20)
    assert refusal(lambda: compiled(model)(ids)) == (
        "The model calls a torch.autograd.Function, whose backward would be lost where its graph is rewritten; "
        "expected operators alone where gradients are wanted. Use simba_fx.transform, whose graphs call such functions "
        "again, or call the model under torch.no_grad()."
    )
    with torch.no_grad():
        assert compiled(model)(ids).shape == (2, 20, 97)
