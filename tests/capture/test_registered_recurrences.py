"""Recurrences that users register: the contract, exact scores, whole models, and every refusal."""

from __future__ import annotations

import copy
import dataclasses
import functools
import sys
from collections.abc import Callable
from math import nan
from typing import Any

import pytest
import recurrences as known
import torch
from models import BY_NAME, VOCABULARY, tokens
from recurrences import LINEAR, OTHERS, random
from reference import assert_close, cache_name, on_survivors
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import simba_fx
from simba_fx.capture import lift
from simba_fx.capture.function_adapter import Contract, contract
from simba_fx.errors import CacheError, CaptureError, CriterionError, InputError, SimbaError
from simba_fx.ops.function_scan import FunctionCall, known_as

OPS = torch.ops.simba_fx
HERE = sys.modules[__name__]


# --- the contract, and scores ----------------------------------------------------------------------------------------


def values_of(function: Callable[..., Any], value: str, operands: dict[str, Tensor]) -> Callable[[Tensor], Tensor]:
    def run(held: Tensor) -> Tensor:
        found = function(**(operands | {value: held}))
        result: Tensor = found[0] if isinstance(found, tuple) else found
        return result

    return run


@pytest.mark.parametrize("name", LINEAR)
def test_a_linear_recurrence_keeps_the_contract(name: str) -> None:
    function, value, names = LINEAR[name]
    for seed in range(3):
        operands = random(*names, seed=seed)
        found = contract(values_of(function, value, operands), operands[value])
        assert found.worst < 1e-12
        assert found.kept(torch.float64)


@pytest.mark.parametrize("name", OTHERS)
def test_another_function_does_not(name: str) -> None:
    function, value, names = OTHERS[name]
    for seed in range(3):
        operands = random(*names, seed=seed)
        found = contract(values_of(function, value, operands), operands[value])
        assert not found.kept(torch.float64)
        assert found.worst > 1e-2


def call_of(name: str, operands: dict[str, Tensor], **changes: Any) -> dict[str, Any]:
    """The arguments of the operator."""
    function, value, names = LINEAR[name]
    held = tuple(operands[key] for key in names)
    spec = pytree.treespec_dumps(pytree.tree_flatten((held, {}))[1])
    leaves = tuple([i] for i in range(len(names)))
    found = function(*held)
    states = [leaf for leaf in pytree.tree_leaves(found)[1:] if isinstance(leaf, Tensor)]
    sizes = tuple((("B", *state.shape[1:]), str(state.dtype)[6:]) for state in states)
    dtype = str(operands[value].dtype)[6:]
    call = FunctionCall(known_as(function), spec, leaves, names.index(value), 1, 0, dtype, sizes)
    others = [operands[key] for key in names if key != value]
    return {"value": operands[value], "operands": others, "call": dataclasses.replace(call, **changes).text}


@pytest.mark.parametrize("name", LINEAR)
@pytest.mark.parametrize("masked", [False, True])
def test_scores_are_what_is_lost_without_a_tokens_value(name: str, masked: bool) -> None:
    """Another query in each row: y there with and without the value of one token, for each token."""
    function, value, names = LINEAR[name]
    operands = random(*names, seed=4)
    real = torch.ones(known.ROWS, known.LENGTH, dtype=torch.bool)
    real[1, -3:] = not masked
    tail = 2
    queries = [known.LENGTH - tail, known.LENGTH - tail - (3 if masked else 0)]
    run = values_of(function, value, operands)
    whole, expected = run(operands[value]), torch.zeros(known.ROWS, known.LENGTH, dtype=torch.float64)
    largest, norm = expected.clone(), expected.clone()
    for t in range(known.LENGTH):
        without = operands[value].clone()
        without[:, t] = 0
        lost = whole - run(without)
        for row, query in enumerate(queries):
            if t <= query:
                expected[row, t] = lost[row, query].max()
                largest[row, t] = lost[row, query].abs().max()
                norm[row, t] = lost[row, query].pow(2).sum().sqrt()
    call = call_of(name, operands)
    for criterion, wanted in (("simba", expected), ("simba-abs", largest), ("simba-l2", norm)):
        found = OPS.recurrence_token_score(**call, real=real if masked else None, tail=tail, criterion=criterion)
        assert_close("score", found.double(), wanted, 1e-6)
    clip = OPS.recurrence_token_score(**call, real=real, tail=1, criterion="clip")
    assert_close("clip", clip[0].double(), whole[0].clamp(min=0).flatten(1).mean(1), 1e-6)


@pytest.mark.parametrize("name", ["GLA", "DeltaNet", "DeltaProduct", "RWKV-7", "mLSTM"])
def test_channels_that_share_a_coefficient_are_scored_by_one(name: str) -> None:
    operands = random(*LINEAR[name][2], seed=5)
    for criterion in ("simba", "simba-abs", "simba-l2"):
        each = OPS.recurrence_token_score(**call_of(name, operands), real=None, tail=1, criterion=criterion)
        one = OPS.recurrence_token_score(**call_of(name, operands, shared=True), real=None, tail=1, criterion=criterion)
        assert_close("score", one, each, 1e-6)


@pytest.mark.parametrize("name", LINEAR)
def test_the_operator_is_the_function_with_its_gradients(name: str) -> None:
    function, _, names = LINEAR[name]
    operands = {key: held.requires_grad_() for key, held in random(*names, seed=6).items()}
    call = call_of(name, operands)
    y, *states = OPS.recurrence(**call)
    expected = [leaf for leaf in pytree.tree_leaves(function(**operands)) if isinstance(leaf, Tensor)]
    assert all(torch.equal(a, b) for a, b in zip((y, *states), expected, strict=True))
    cotangents = [torch.randn_like(leaf) for leaf in expected]
    ours = torch.autograd.grad((y, *states), [*operands.values()], cotangents)
    theirs = torch.autograd.grad(expected, [*operands.values()], cotangents)
    for a, b in zip(ours, theirs):
        assert_close("gradient", a, b, 1e-12)
    torch.library.opcheck(OPS.recurrence.default, (call["value"], call["operands"], call["call"]))


# --- whole models ----------------------------------------------------------------------------------------------------


class Block(nn.Module):
    """A residual block around a gated linear attention of two heads."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.norm, self.into, self.out = nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.Linear(width, width)

    def operands(self, x: Tensor) -> tuple[Tensor, ...]:
        q, k, v, g = self.into(self.norm(x)).unflatten(2, (2, -1)).chunk(4, 3)
        return q, k, v, -nn.functional.softplus(g)

    def forward(self, x: Tensor) -> Tensor:
        y, _ = own_scan(*self.operands(x))
        out: Tensor = x + self.out(y.flatten(2))
        return out


def own_scan(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    return known.gla(q, k, v, g)


class Model(nn.Module):
    def __init__(self, blocks: int = 4) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(blocks))
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        out: Tensor = self.head(x)
        return out


def model(seed: int = 0) -> Model:
    torch.manual_seed(seed)
    return Model().eval()


EXAMPLE = (torch.zeros(2, 13, 12),)


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lift, "_registered", dict(lift._registered))
    simba_fx.register_recurrence(own_scan, value="v", shared=True)


@pytest.mark.parametrize("kernels", ["auto", "model"])
def test_with_everything_kept_the_bits_are_the_dense_models(kernels: str) -> None:
    module = model()
    shares = [1 - i * 1e-6 for i in range(4)]
    sparse = simba_fx.transform(module, shares, example_inputs=EXAMPLE, kernels=kernels, criterion="simba")
    assert len(simba_fx.program(sparse).cuts) == 3
    for rows, length in ((2, 13), (1, 30), (3, 7)):
        x = torch.randn(rows, length, 12)
        ours, theirs = sparse(x), module(x)
        assert torch.equal(ours, theirs)
        grads = [torch.autograd.grad(y.sum(), module.layers[0].into.weight)[0] for y in (ours, theirs)]
        assert_close("gradient", grads[0], grads[1], 1e-5)


@pytest.mark.parametrize("seed", range(3))
def test_a_pruned_model_is_its_own_blocks_on_the_tokens_that_contribute_most(seed: int) -> None:
    module = model(seed)
    sparse = simba_fx.transform(module, [1, 0.6, 0.4, 0.2], example_inputs=EXAMPLE, criterion="simba")
    x = torch.randn(2, 40, 12)
    with torch.no_grad():
        found = sparse(x)
        kept = simba_fx.kept(sparse)
        for row in range(2):
            hidden, positions = x[row : row + 1], torch.arange(40)
            left: list[tuple[Tensor, Tensor]] = []
            for block, now in zip(module.layers, [*kept[1:], None]):
                q, k, v, g = (operand.double() for operand in block.operands(hidden))
                hidden = block(hidden)
                if now is None:
                    break
                y = known.gla(q, k, v, g)[0]
                lost = torch.stack([
                    y[0, -1] - known.gla(q, k, v * (torch.arange(len(positions)) != t)[:, None, None], g)[0][0, -1]
                    for t in range(len(positions) - 1)
                ])  # fmt: skip
                best = lost.flatten(1).amax(1).topk(now.shape[1] - 1).indices
                stays = torch.cat((best, torch.tensor([len(positions) - 1]))).sort().values
                assert torch.equal(positions[stays], now[row])
                leaves = torch.ones(len(positions), dtype=torch.bool).index_fill(0, stays, False)
                left.append((positions[leaves], hidden[0, leaves]))
                hidden, positions = hidden[:, stays], positions[stays]
            full = torch.zeros(40, 12).index_copy(0, positions, hidden[0])
            for places, held in left:
                full = full.index_copy(0, places, held)
            assert_close("output", found[row], module.head(full), 1e-5)


def test_it_compiles_for_every_length_and_exports() -> None:
    sparse = simba_fx.transform(model(), "linear", example_inputs=EXAMPLE, criterion="simba")
    torch._dynamo.reset()
    compiled = torch.compile(sparse, backend="aot_eager")
    with torch.no_grad():
        for length in (13, 21, 40):
            x = torch.randn(2, length, 12)
            assert_close("output", compiled(x), sparse(x), 1e-6)
        sizes = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
        program = torch.export.export(sparse, (torch.randn(2, 13, 12),), dynamic_shapes=(sizes,))
        x = torch.randn(3, 25, 12)
        assert torch.equal(program.module()(x), sparse(x))


def test_report_names_it_and_other_criteria_are_refused() -> None:
    sparse = simba_fx.transform(model(), "linear", example_inputs=EXAMPLE, criterion="simba")
    assert "registered recurrence" in str(simba_fx.report(sparse, torch.randn(2, 20, 12)))
    for criterion in ("no-decay", "delta-norm"):
        with pytest.raises(CriterionError, match="expected one of simba, simba-abs, simba-l2, clip, one by position"):
            simba_fx.transform(model(), "linear", example_inputs=EXAMPLE, criterion=criterion)
    for criterion in ("simba-abs", "clip", "recent", "stride"):
        simba_fx.transform(model(), "linear", example_inputs=EXAMPLE, criterion=criterion)(torch.randn(2, 20, 12))


def in_a_table(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    found = known.gla(q, k, v, g)[0]
    table, half = torch.zeros_like(found), found.shape[1] // 2
    table[:, :half] = found[:, :half]
    table[:, half:] = found[:, half:]
    return table


def test_what_is_written_into_a_view_counts_in_compiled_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """In scores and in gradients: AOTAutograd runs its graphs without what such writes are noted by."""
    torch._dynamo.reset()
    monkeypatch.setattr(HERE, "own_scan", lambda *operands: (in_a_table(*operands), None))
    simba_fx.register_recurrence(in_a_table, value="v", shared=True)
    sparse = simba_fx.transform(model(), [1, 0.6, 0.4, 0.2], example_inputs=EXAMPLE, criterion="simba")
    compiled = torch.compile(sparse, backend="aot_eager")
    x = torch.randn(2, 40, 12)
    weights = list(sparse.parameters())
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            found = []
            for run in (sparse, compiled):
                y = run(x)
                found.append((y, *simba_fx.kept(sparse), *(torch.autograd.grad(y.sum(), weights) if grad else ())))
            for own, other in zip(*found, strict=True):
                assert_close("compiled", other, own, 1e-5)


def test_of_several_criteria_it_is_scored_by_those_that_it_has() -> None:
    """Nobody knows what a function writes: the default is the contribution alone, pooled."""
    module, x = model(), torch.randn(2, 40, 12)
    default = simba_fx.transform(module, [1, 0.6, 0.4, 0.2], example_inputs=EXAMPLE)
    alone = simba_fx.transform(module, [1, 0.6, 0.4, 0.2], example_inputs=EXAMPLE, criterion="simba-l2", span=15)
    with torch.no_grad():
        assert torch.equal(default(x), alone(x))
    assert "recurrence_token_score" in simba_fx.explain(default)
    with pytest.raises(CriterionError, match="Criterion 'write' is not one that a registered recurrence"):
        simba_fx.transform(module, "linear", example_inputs=EXAMPLE, criterion="write+delta-norm")


def test_the_dynamo_backend_refuses_it() -> None:
    """It traces without values, on which the contract has to be kept. Dynamo puts its own words around ours."""
    torch._dynamo.reset()
    with pytest.raises(Exception, match=r"is a registered recurrence, which has to run on values before it is traced"):
        torch.compile(model(), backend="simba_fx")(torch.randn(2, 20, 12))


def test_a_criterion_of_ones_own_sees_the_operands() -> None:
    seen = []

    def criterion(operands: Any, query: Tensor) -> Tensor:
        seen.append(type(operands).__name__)
        largest: Tensor = operands.value.flatten(2).norm(dim=2)
        return largest

    sparse = simba_fx.transform(model(), "linear", example_inputs=EXAMPLE, criterion=criterion)
    sparse(torch.randn(2, 20, 12))
    assert set(seen) == {"FunctionScan"}


# --- models of transformers ------------------------------------------------------------------------------------------


def rwkv() -> nn.Module:
    from transformers import RwkvConfig, RwkvForCausalLM

    config = RwkvConfig(vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=3, attention_hidden_size=16)
    made: nn.Module = RwkvForCausalLM(config).eval()
    return made


def recurrent_gemma() -> nn.Module:
    from transformers import RecurrentGemmaConfig, RecurrentGemmaForCausalLM

    config = RecurrentGemmaConfig(vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=3, lru_width=16,
                                  intermediate_size=32, num_attention_heads=2, head_dim=8, attention_window_size=64,
                                  block_types=["recurrent", "recurrent", "attention"])  # fmt: skip
    made: nn.Module = RecurrentGemmaForCausalLM(config).eval()
    return made


def xlstm() -> nn.Module:
    from transformers import xLSTMConfig, xLSTMForCausalLM

    config = xLSTMConfig(vocab_size=VOCABULARY, hidden_size=128, embedding_dim=128, num_blocks=3, num_heads=4,
                         chunk_size=8)  # fmt: skip  # of smaller ones transformers' own cache has other sizes
    made: nn.Module = xLSTMForCausalLM(config).eval()
    return made


@pytest.mark.capability("parity", "transformers `recurrent_gemma`")
def test_recurrent_gemma_runs_without_a_cache() -> None:
    torch.manual_seed(0)
    module, ids = recurrent_gemma(), tokens(1, 2, 20)
    with torch.no_grad():
        dense = module(input_ids=ids, use_cache=False).logits
        everything = simba_fx.transform(module, [1, 1 - 1e-6, 1 - 2e-6], criterion="simba")
        assert torch.equal(everything(input_ids=ids, use_cache=False).logits, dense)
        sparse = simba_fx.transform(module, "linear", criterion="simba")
        found = sparse(input_ids=ids, use_cache=False).logits
        assert found.shape == dense.shape
        assert [held.shape[1] for held in simba_fx.kept(sparse)] == [20, 12, 5]
        told = r"attend to a sliding window.*Pass use_cache=False, or generate with the dense model"
        with pytest.raises(CacheError, match=told):
            sparse(input_ids=ids, use_cache=True)


@pytest.mark.capability("parity", "transformers `rwkv`")
def test_rwkv_returns_its_states() -> None:
    """Everything kept: the dense model's bits."""
    torch.manual_seed(0)
    module, ids = rwkv(), tokens(1, 2, 20)
    everything = simba_fx.transform(module, [1, 1 - 1e-6, 1 - 2e-6], criterion="simba")
    with torch.no_grad():
        for cache in (False, True):
            dense, found = (one(input_ids=ids, use_cache=cache) for one in (module, everything))
            assert torch.equal(found.logits, dense.logits)
        assert len(found.state) == 5
        assert all(torch.equal(own, right) for own, right in zip(found.state, dense.state, strict=True))
        with pytest.raises(InputError, match="several tokens and the state of an earlier call, which this package"):
            everything(input_ids=ids, state=found.state, use_cache=True)


@pytest.mark.capability("generate", "transformers `rwkv`")
def test_rwkv_generates_from_the_states_of_its_own_blocks_on_the_survivors() -> None:
    torch.manual_seed(0)
    module: Any = rwkv()
    ids, stack = tokens(1, 1, 40), module.rwkv
    sparse: Any = simba_fx.transform(module, "linear")
    with torch.no_grad():
        found = sparse(input_ids=ids, use_cache=True)
        kept = simba_fx.kept(sparse)
        assert [held.shape[1] for held in kept] == [40, 23, 5]
        states = [torch.zeros(1, 16, 3) for _ in range(4)] + [torch.full((1, 16, 3), -1e30)]
        hidden, before = stack.embeddings(ids), torch.arange(40)
        for block, (positions,) in zip(stack.blocks, kept):
            hidden = hidden[:, torch.searchsorted(before, positions)]
            hidden, states, _ = block(hidden, state=states, use_cache=True)
            before = positions
        for own, right in zip(found.state, states, strict=True):
            assert_close("state", own, right, 1e-5)
        logits, said = module.head(stack.ln_out(hidden[:, -1])), []
        while len(said) < 50:
            said.append(int(logits.argmax()))
            step = module(input_ids=torch.tensor([said[-1:]]), state=states, use_cache=True)
            logits, states = step.logits[:, -1], step.state
        assert sparse.generate(ids, max_new_tokens=50, do_sample=False)[0, 40:].tolist() == said


LEARNING = [pytest.param(make, marks=pytest.mark.capability("train", f"transformers `{make.__name__}`"))
            for make in (rwkv, xlstm, recurrent_gemma)]  # fmt: skip


@pytest.mark.parametrize("make", LEARNING)
def test_it_learns_the_same(make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    module, ids = make().train(), tokens(1, 2, 30)
    with torch.no_grad():
        for name, weight in module.named_parameters():
            if name.endswith("recurrent_param"):
                weight[:4] = -20.0  # decays of 1: RecurrentGemma's own function then limits the gradient of a root
    everything = simba_fx.transform(module, [1, 1 - 1e-6, 1 - 2e-6], criterion="simba")
    losses = [model(input_ids=ids, labels=ids, use_cache=False).loss for model in (module, everything)]
    found = [torch.autograd.grad(loss, list(module.parameters())) for loss in losses]
    for (name, _), mine, own in zip(module.named_parameters(), found[1], found[0], strict=True):
        assert_close(name, mine, own, 1e-5)


COMPILED = [pytest.param(make, marks=pytest.mark.capability("compile", f"transformers `{make.__name__}`"))
            for make in (rwkv, recurrent_gemma)]  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*should not be instantiated")  # Dynamo does, of autograd functions
@pytest.mark.parametrize("make", COMPILED)
def test_it_compiles(make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    sparse = simba_fx.transform(make(), "linear", criterion="simba")
    torch._dynamo.reset()
    compiled = torch.compile(sparse, backend="aot_eager")
    with torch.no_grad():
        for length in (30, 41):
            ids = tokens(length, 2, length)
            assert_close("logits", compiled(ids, use_cache=False).logits, sparse(ids, use_cache=False).logits, 1e-5)


@pytest.mark.parametrize("called", [False, True])
def test_a_rwkv_that_rescales_its_weights_is_refused(called: bool) -> None:
    """In place, at its first call and whenever it begins or ends to train; and the sparse model shares them."""
    from transformers import RwkvConfig, RwkvForCausalLM

    sizes = {"vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 4, "attention_hidden_size": 16}
    module, ids = RwkvForCausalLM(RwkvConfig(**sizes, rescale_every=2)).eval(), tokens(1, 2, 20)
    if called:
        module(ids)
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(
        CaptureError, match=r"RwkvModel rescales its weights in place .* Load the model with rescale_ev"
    ):
        simba_fx.transform(module, "linear")
    assert all(torch.equal(held, before[name]) for name, held in module.state_dict().items())
    right = RwkvForCausalLM(RwkvConfig(**sizes, rescale_every=0)).eval()
    with torch.no_grad():
        dense = right(ids, use_cache=False).logits
        assert torch.equal(
            simba_fx.transform(right, [1, 0.999999, 0.999998, 0.999997])(ids, use_cache=False).logits, dense
        )


class WritesOnce(Model):
    """Halves a weight when it is first called."""

    def __init__(self) -> None:
        super().__init__()
        self.halved = False

    def forward(self, x: Tensor) -> Tensor:
        if not self.halved:
            with torch.no_grad():
                self.layers[1].out.weight[:, :3].mul_(0.5)  # type: ignore[union-attr,index]
        self.halved = True
        return super().forward(x)


@pytest.mark.parametrize("registered", [True, False])
@pytest.mark.parametrize("learns", [True, False])
def test_a_forward_that_writes_into_its_own_weights_is_refused(learns: bool, registered: bool,
                                                               monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    """Before anything is written, whether the model runs on values first or is only traced."""
    if not registered:
        monkeypatch.setattr(HERE, "own_scan", as_ssd)
        simba_fx.register_scan(as_ssd, ssd_of)
    torch.manual_seed(0)
    module, x = WritesOnce().eval().requires_grad_(learns), torch.randn(2, 20, 12)
    before = copy.deepcopy(module.state_dict())
    told = r"The model's forward writes into its own weight layers\.1\.out\.weight; expected .*call the model once"
    with pytest.raises(CaptureError, match=told):
        simba_fx.transform(module, "linear", example_inputs=EXAMPLE)
    assert all(torch.equal(held, before[name]) for name, held in module.state_dict().items())
    dense = module(x)
    everything = simba_fx.transform(module, [1 - i * 1e-6 for i in range(4)], example_inputs=EXAMPLE, criterion="simba")
    assert_close("output", everything(x), dense, 1e-5)


def as_ssd(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> tuple[Tensor, None]:
    """One decay for all heads, and no other gate."""
    return known.gla(q, k, v, torch.full_like(g, -0.5))[0], None


def ssd_of(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Any:
    steps = torch.ones_like(v[..., 0])
    return simba_fx.SSDScan(v, steps, torch.full((2,), -0.5), k, q), lambda y, state: (y, None)


@pytest.mark.capability("parity", "transformers `xlstm`")
def test_xlstm_fills_its_own_cache() -> None:
    """A table of states. Everything kept: the dense model's bits."""
    torch.manual_seed(0)
    module, ids = xlstm(), tokens(1, 2, 41)
    name = cache_name(module)
    everything = simba_fx.transform(module, [1, 1 - 1e-6, 1 - 2e-6], criterion="simba")
    with torch.no_grad():
        for cache in (False, True):
            dense, found = (one(input_ids=ids, use_cache=cache) for one in (module, everything))
            assert torch.equal(found.logits, dense.logits)
        own, right = found[name], dense[name]
        assert type(own) is type(right)
        assert torch.equal(own.seqlen_offset, right.seqlen_offset)
        for layer, states in right.rnn_state.items():
            assert len(states) == 3
            assert all(map(torch.equal, own.rnn_state[layer], states))
        with pytest.raises(InputError, match="Several new tokens on a warm xLSTMCache, whose states this package does"):
            everything(input_ids=ids, **{name: own})
        step = tokens(2, 2, 1)
        assert torch.equal(
            everything(input_ids=step, **{name: own}).logits, module(input_ids=step, **{name: right}).logits
        )


@pytest.mark.capability("generate", "transformers `xlstm`")
def test_xlstm_generates_from_the_states_of_its_own_blocks_on_the_survivors() -> None:
    torch.manual_seed(0)
    module: Any = xlstm()
    ids, stack, cap = tokens(1, 1, 41), module.backbone, module.config.output_logit_soft_cap
    name = cache_name(module)
    sparse: Any = simba_fx.transform(module, "linear", criterion="simba")
    with torch.no_grad():
        found = sparse(input_ids=ids, use_cache=True)
        kept = simba_fx.kept(sparse)
        assert [held.shape[1] for held in kept] == [41, 23, 5]
        hidden, before, states = stack.embeddings(ids), torch.arange(41), []
        for block, (positions,) in zip(stack.blocks, kept):
            hidden, left = block(hidden[:, torch.searchsorted(before, positions)], None)
            before = positions
            states.append(left)
        for layer, left in enumerate(states):
            for own, right in zip(found[name].rnn_state[layer], left, strict=True):
                assert_close("state", own, right, 1e-5)
        said: list[int] = []
        while len(said) < 50:
            said.append(int((cap * torch.tanh(module.lm_head(stack.out_norm(hidden[:, -1])) / cap)).argmax()))
            hidden = stack.embeddings(torch.tensor([said[-1:]]))
            for layer, block in enumerate(stack.blocks):
                hidden, states[layer] = block(hidden, states[layer])
        assert sparse.generate(ids, max_new_tokens=50, do_sample=False)[0, 41:].tolist() == said


def test_a_long_prompt_of_xlstm_runs_in_one_piece() -> None:
    """Which transformers computes in pieces, to rounding the same."""
    torch.manual_seed(0)
    module, ids = xlstm(), tokens(1, 2, 41)
    module.config.max_inference_chunksize = 16
    name = cache_name(module)
    everything = simba_fx.transform(module, [1, 1 - 1e-6, 1 - 2e-6], criterion="simba")
    with torch.no_grad():
        dense, found = (one(input_ids=ids, use_cache=True) for one in (module, everything))
    assert module.config.max_inference_chunksize == everything.config.max_inference_chunksize == 16
    assert_close("logits", found.logits, dense.logits, 1e-3)  # their scan casts keys and values to bfloat16
    for layer in range(3):
        for own, right in zip(found[name].rnn_state[layer], dense[name].rnn_state[layer], strict=True):
            assert_close("state", own, right, 1e-3)


def test_an_xlstm_in_half_precision_is_refused() -> None:
    """transformers' own scan multiplies float32 by it, unless it is given states."""
    module: Any = xlstm().to(torch.bfloat16)
    with pytest.raises(RuntimeError, match="same dtype"):
        module(tokens(1, 2, 41), use_cache=False)
    with pytest.raises(CaptureError, match=r"weights of torch.bfloat16, .*expected torch.float32. Load the model with"):
        simba_fx.transform(module)


@pytest.mark.capability("compile", "transformers `xlstm`")
def test_xlstm_is_its_own_blocks_on_the_survivors() -> None:
    """Which are those that contribute most, by a loop in float64 over what its first block computes."""
    torch.manual_seed(0)
    module: Any = xlstm()
    ids = tokens(1, 2, 41)
    sparse = simba_fx.transform(module, [1, 0.6, 0.3], criterion="simba")
    stack, first = module.backbone, {}
    with torch.no_grad():
        found = sparse(input_ids=ids, use_cache=False).logits
        kept = simba_fx.kept(sparse)
        hook = stack.blocks[0].mlstm_layer.mlstm_backend.register_forward_pre_hook(
            lambda _, args, given: first.update(given), with_kwargs=True
        )
        blocks = [lambda hidden, own=block: own(hidden, None)[0] for block in stack.blocks]
        states = on_survivors(stack.embeddings(ids), blocks, kept)
        hook.remove()
        cap = module.config.output_logit_soft_cap
        right = cap * torch.tanh(module.lm_head(stack.out_norm(states[:, -1])) / cap)
        torch._dynamo.reset()
        compiled = torch.compile(sparse, backend="aot_eager")(input_ids=ids, use_cache=False).logits
    assert_close("logits", found[:, -1], right, 1e-5)
    assert_close("compiled", compiled, found, 1e-5)
    q, k, v, i, f = (first[name].double().transpose(1, 2) for name in ("query", "key", "value", "igate", "fgate"))
    q = q * q.shape[-1] ** -0.5
    one_by_one = [v * (torch.arange(41) == token)[:, None, None] for token in range(41)]
    score = torch.stack([known.mlstm(q, k, alone, i, f)[:, -1].amax((1, 2)) for alone in one_by_one], 1)
    for row, positions in zip(score, kept[1]):
        best = row[:-1].topk(len(positions) - 1).indices
        assert torch.equal(torch.cat((best, torch.tensor([40]))).sort().values, positions)


class HeadFirst(Block):
    def forward(self, x: Tensor) -> Tensor:
        y = head_first(*(operand.transpose(1, 2) for operand in self.operands(x)), scale=0.5)
        out: Tensor = x + self.out(y.transpose(1, 2).flatten(2))
        return out


def head_first(q: Tensor, k: Tensor, v: Tensor, g: Tensor, *, scale: float) -> Tensor:
    return known.head_first(q, k, v, g) * scale


class Method(Block):
    """Its scan is a method, which does not look at its module."""

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.out(self.scan(*self.operands(x))[0].flatten(2))
        return out

    def scan(self, q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> tuple[Tensor, None]:
        return known.gla(q, k, v, g)[0], None


class Held(Block):
    """Its scan hangs on it, with a part of its work, and with a part of that one's."""

    def __init__(self) -> None:
        super().__init__()
        self.scan = functools.partial(in_parts, inner=functools.partial(part, keep=known.gla), dtype=torch.float32)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.out(self.scan(*self.operands(x)).flatten(2))
        return out


def part(q: Tensor, k: Tensor, v: Tensor, g: Tensor, keep: Callable[..., Any]) -> Tensor:
    found: Tensor = keep(q, k, v, g)[0]
    return found


def in_parts(q: Tensor, k: Tensor, v: Tensor, g: Tensor, inner: Callable[..., Tensor], dtype: torch.dtype) -> Tensor:
    return inner(q, k, v, g).to(dtype)


LAYOUTS = [(HeadFirst, head_first), (Method, Method.scan), (Held, in_parts)]


@pytest.mark.parametrize(("block", "function"), LAYOUTS)
def test_other_layouts_and_methods(block: type[Block], function: Callable[..., Any]) -> None:
    simba_fx.register_recurrence(function, value="v", shared=True)
    module = model()
    module.layers = nn.ModuleList(block() for _ in range(4))
    x = torch.randn(2, 30, 12)
    everything = simba_fx.transform(module, [1 - i * 1e-6 for i in range(4)], example_inputs=EXAMPLE, criterion="simba")
    assert torch.equal(everything(x), module(x))
    sparse = simba_fx.transform(module, "linear", example_inputs=EXAMPLE, criterion="simba")
    assert sparse(x).shape == (2, 30, 5)
    plain = model()
    plain.load_state_dict(module.state_dict())
    other = simba_fx.transform(plain, "linear", example_inputs=EXAMPLE, criterion="simba")
    other(x)
    first = [simba_fx.kept(pruned)[1] for pruned in (sparse, other)]
    assert torch.equal(*first)


# --- refusals --------------------------------------------------------------------------------------------------------


def refusal(function: Callable[..., Any], value: str, monkeypatch: pytest.MonkeyPatch, shared: bool = False) -> str:
    """What is said of a model whose blocks call `function`."""
    monkeypatch.setattr(HERE, "own_scan", lambda *operands: (stranger(*operands), None))
    monkeypatch.setattr(HERE, "stranger", function)
    simba_fx.register_recurrence(function, value=value, shared=shared)
    with pytest.raises(CaptureError) as refused:
        simba_fx.transform(model(), "linear", example_inputs=EXAMPLE, criterion="simba")
    return str(refused.value)


def stranger(*operands: Tensor) -> Any:
    raise NotImplementedError


@pytest.mark.parametrize("name", ["another start", "a norm of the output", "channels that mix", "the decay"])
def test_a_function_that_is_not_linear_is_refused_with_the_numbers(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    function, value, _ = OTHERS[name]
    said = refusal(function, value, monkeypatch)
    assert said.startswith(f"{function.__name__} is not linear in {value}: on a few random tokens the contributions of")
    assert "Tokens of such a function have no exact score." in said


def test_numbers_that_are_none_keep_no_contract() -> None:
    for numbers in ((nan, 0.0, 0.0), (0.0, nan, 0.0), (0.0, 0.0, nan)):
        assert not Contract(*numbers).kept(torch.float64)
    found = contract(lambda v: torch.where(v.abs() < 1e-9, nan, v).cumsum(1), torch.zeros(2, 9, 3))
    assert not found.kept(torch.float32)


def doubled(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    return known.gla(q, k, v, g)[0]


def test_one_tensor_for_two_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    """The values are known by their parameter: keys that are the same tensor are held."""
    monkeypatch.setattr(HERE, "own_scan", lambda q, k, v, g: (doubled(v, v, v, g), None))
    simba_fx.register_recurrence(doubled, value="v", shared=True)
    module = model()
    sparse = simba_fx.transform(module, [1, 0.5, 0.5, 0.5], example_inputs=EXAMPLE, criterion="simba")
    x = torch.randn(1, 20, 12)
    with torch.no_grad():
        sparse(x)
        _, _, v, g = (operand.double() for operand in module.layers[0].operands(x))
    lost = torch.stack([
        known.gla(v, v, v * (torch.arange(20) == t)[:, None, None], g)[0][0, -1].amax() for t in range(19)
    ])  # fmt: skip
    kept = simba_fx.kept(sparse)[1][0]
    best = lost.topk(len(kept) - 1).indices
    assert torch.equal(torch.cat((best, torch.tensor([19]))).sort().values, kept)


def other_sizes(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    return known.gla(q, k, v, g)[0].flatten(2)


def without_gradient(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    return known.gla(q, k, v, g)[0].detach()


def test_channels_that_are_said_to_share_a_coefficient_and_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    said = refusal(by_channel, "v", monkeypatch, shared=True)
    assert said.startswith("by_channel is not linear in v: ")
    assert "other values, or another number of channels, change the coefficients by" in said
    simba_fx.register_recurrence(by_channel, value="v")
    simba_fx.transform(model(), "linear", example_inputs=EXAMPLE, criterion="simba")


def by_channel(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    return known.gla(q, k, v * torch.linspace(1, 2, v.shape[3]), g)[0]


def test_other_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    assert refusal(other_sizes, "v", monkeypatch).startswith(
        "other_sizes returned (3, 24, 12); expected y, of the sizes of v (3, 24, 2, 6), and perhaps other tensors."
    )
    assert "without_gradient cannot be differentiated" in refusal(without_gradient, "v", monkeypatch)
    with pytest.raises(SimbaError, match=r"has no parameter 'values'; expected the one .* of q, k, v, g"):
        simba_fx.register_recurrence(other_sizes, value="values")
    with pytest.raises(SimbaError, match="register_recurrence expects a function, found str"):
        simba_fx.register_recurrence("gla", value="v")  # type: ignore[arg-type]


def test_a_recurrence_made_of_a_step() -> None:
    @simba_fx.LinearRecurrence
    def scan(state: Any, v: Tensor, q: Tensor, k: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        state = state * g.exp().unsqueeze(3) + k.unsqueeze(3) * v.unsqueeze(2)
        return state, (state * q.unsqueeze(3)).sum(2)

    operands = random(*LINEAR["GLA"][2])
    assert_close("y", scan(**operands), known.gla(**operands)[0], 1e-12)
    with pytest.raises(SimbaError, match=r"LinearRecurrence expects a step \(state, value, ...\), found .*short"):
        simba_fx.LinearRecurrence(short)


def short(state: Any) -> Any:
    return state, state


def test_functions_of_one_name_are_each_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a closure that is made twice: a sparse model goes on calling the one that it was made with."""

    def made(scale: float) -> Callable[..., Any]:
        def scan(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
            return known.gla(q, k, v, g)[0] * scale

        simba_fx.register_recurrence(scan, value="v")
        return scan

    module, x, results = model(), torch.randn(2, 20, 12), []
    everything = [1 - i * 1e-6 for i in range(4)]
    for scale in (1.0, 2.0):
        monkeypatch.setattr(HERE, "stranger", made(scale))
        monkeypatch.setattr(HERE, "own_scan", lambda *operands: (stranger(*operands), None))
        results.append((simba_fx.transform(module, everything, example_inputs=EXAMPLE, criterion="simba"), module(x)))
    for sparse, expected in results:
        assert torch.equal(sparse(x), expected)


def test_a_graph_whose_function_cannot_be_imported_says_so() -> None:
    call = call_of("GLA", random(*LINEAR["GLA"][2]), function="no_such_module:scan")
    with pytest.raises(SimbaError, match="A graph calls scan of no_such_module, which cannot be imported here"):
        OPS.recurrence(**call)


@pytest.mark.parametrize("name", ["bamba", "qwen3-next"])
def test_the_run_that_examines_functions_leaves_nothing_on_the_model(name: str) -> None:
    """transformers puts hooks on modules for hidden states; those of the run before a trace counted twice in it."""
    model = BY_NAME[name].make().eval()
    sparse = simba_fx.transform(model, "linear", criterion="simba")
    found = sparse(input_ids=tokens(1, 2, 37), output_hidden_states=True).hidden_states
    assert len(found) == model.config.num_hidden_layers + 1
