"""Every message a caller can meet, word for word; and a refusal changes nothing.

What is refused before a graph exists is tested on `transform`, the rest on calls of its result. Messages of schedules
alone: test_schedule.py.
"""

from __future__ import annotations

import copy
import importlib
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from models import CACHE, dense, schedules, tokens
from torch import Tensor, nn
from transformers.models.mamba import modeling_mamba

import simba_fx
from simba_fx.errors import (
    CaptureError,
    CriterionError,
    GraphError,
    InputError,
    ScanNotFoundError,
    ScheduleError,
    SimbaError,
)

own_model: Any = importlib.import_module("own_model")

LINEAR = schedules(4)["linear"]


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return dense("mamba")


@pytest.fixture(scope="module")
def sparse(model: nn.Module) -> Any:
    made = simba_fx.transform(model, LINEAR)
    with torch.no_grad():
        made(tokens(0, 2, 20))
    return made


@pytest.fixture(scope="module")
def own() -> nn.Module:
    torch.manual_seed(0)
    made: nn.Module = own_model.MyMamba(vocabulary=53, width=16, states=4, depth=4).eval()
    return made


def runtimes(model: nn.Module) -> list[Any]:
    return [r for m in model.modules() for r in (m.__dict__.get("_simba"), m.__dict__.get("_simba")) if r is not None]


def state(model: nn.Module) -> dict[str, Any]:
    """What a refusal must leave as it is, beside what a call returns."""
    return {
        "weights": {name: (id(p), p._version) for name, p in (*model.named_parameters(), *model.named_buffers())},
        "modules": {name: (id(m), type(m), m.training) for name, m in model.named_modules()},
        "names": {name: id(value) for owner in (modeling_mamba, own_model) for name, value in vars(owner).items()},
        "runtimes": [
            (r.tail, id(r.last), {k: id(v) for k, v in getattr(r, "variants", {}).items()}) for r in runtimes(model)
        ],
    }


def output(model: nn.Module) -> Tensor:
    with torch.no_grad():
        found = model(tokens(0, 2, 20))
    return found if isinstance(found, Tensor) else found.logits


@contextmanager
def refused(error: type[SimbaError], message: str, *models: nn.Module) -> Iterator[None]:
    """The body raises exactly that, and the models are and do what they were and did."""
    outputs = [output(model) for model in models]
    before = [state(model) for model in models]
    with pytest.raises(SimbaError) as caught:
        yield
    assert str(caught.value) == message
    assert type(caught.value) is error
    assert [state(model) for model in models] == before
    assert all(torch.equal(output(model), logits) for model, logits in zip(models, outputs))


# Copies on several devices.

REPLICAS = (
    "DataParallel copies this {} to several devices in one process, and a sparse model runs on one; expected a process "
    "for each device. Launch with torchrun (DistributedDataParallel or fully_shard), or let the process see one device "
    "(CUDA_VISIBLE_DEVICES=0). The Trainer of transformers uses DataParallel where it sees several."
)


def test_replicas_of_data_parallel(sparse: Any, own: nn.Module) -> None:
    """What `nn.parallel.replicate` asks of every module of a model, and first of the model itself."""
    for inner in (sparse.backbone, sparse.backbone.layers[0]):
        with refused(InputError, REPLICAS.format(type(inner).__name__), sparse):
            inner._replicate_for_data_parallel()
    plain = simba_fx.transform(own, "linear")
    with refused(InputError, REPLICAS.format(type(plain).__name__), plain):
        plain._replicate_for_data_parallel()


def test_a_model_in_data_parallel(model: nn.Module) -> None:
    message = (
        "transform expects a model of one process, found one wrapped in DataParallel. Transform the model inside it "
        "(model.module), and wrap the result in DistributedDataParallel."
    )
    with refused(SimbaError, message, model):
        simba_fx.transform(nn.DataParallel(model), "linear")


# Arguments of transform.


def three_numbers(operands: Any, query: Tensor) -> Tensor:
    return torch.zeros(3)


def one_number(operands: Any, query: Tensor) -> Any:
    return 3


SHARES = "a share is the part of the input's tokens that enters the block."
FLOOR = (
    "transform expects floor to be an int of at least 0 (tokens kept before the tail); found {}. Write for example"
    " floor=4."
)
SPAN = (
    "transform expects span to be an odd number of tokens whose best score each gets, from 1 (none) to 1023; found {}. "
    "Write for example span=31."
)
SEED = "transform expects seed to be a 32-bit int; found {}. Write for example seed=4."
ARGUMENTS: dict[str, tuple[dict[str, Any], type[SimbaError], str]] = {
    "schedule name": (
        {"schedule": "lineal"},
        ScheduleError,
        "expected a schedule name, one of linear, constant, cosine, dense; found 'lineal'.",
    ),
    "schedule type": (
        {"schedule": None},
        ScheduleError,
        "expected a schedule (a name, share, mapping, function, sequence or object), found None;"
        " write for example schedule='linear' or schedule=Linear(final=0.1).",
    ),
    "criterion name": (
        {"criterion": "simbo"},
        CriterionError,
        "Unknown criterion 'simbo': expected one of 'simba', 'simba-abs', 'simba-l2', 'write', 'no-decay', "
        "'delta-norm', 'clip', 'removal',"
        " 'recent', 'random', 'stride', or a callable (scan operands, query) -> (B, L).",
    ),
    "criterion type": (
        {"criterion": 3},
        CriterionError,
        "Expected a criterion's name or a callable (scan operands, query) -> (B, L), found int. Write for example"
        " criterion='simba'.",
    ),
    "increasing shares": (
        {"schedule": [1, 0.5, 0.6, 0.1]},
        ScheduleError,
        "Explicit(values=(1, 0.5, 0.6, 0.1)): expected shares that never increase, found 0.6 at block 2 after 0.5; a"
        " token that left cannot come back, so lower this share or raise those before it.",
    ),
    "share of zero": (
        {"schedule": [1, 0.5, 0, 0]},
        ScheduleError,
        f"Explicit(values=(1, 0.5, 0, 0)): expected shares in (0, 1], found 0 at block 2; {SHARES}",
    ),
    "share above one": (
        {"schedule": lambda n: [1.2] * n},
        ScheduleError,
        f"Custom(<lambda>): expected shares in (0, 1], found 1.2 at block 0; {SHARES}",
    ),
    "ratio above one": (
        {"schedule": 1.5},
        ScheduleError,
        "Constant(share=1.5, start=1): expected share in (0, 1], found 1.5.",
    ),
    "first share": (
        {"schedule": [0.9, 0.5, 0.4, 0.1]},
        ScheduleError,
        "Explicit(values=(0.9, 0.5, 0.4, 0.1)): expected share 1 at block 0, found 0.9; every token enters the first"
        " block, so begin with 1.",
    ),
    "count of shares": (
        {"schedule": [1, 0.5]},
        ScheduleError,
        "Explicit(values=(1, 0.5)): expected 4 shares, one per block, found 2; write 4 shares or a mapping block ->"
        " share.",
    ),
    "no such block": (
        {"schedule": {9: 0.5}},
        ScheduleError,
        "Stages({9: 0.5}): expected blocks 0 to 3, found block 9; the model has 4 blocks.",
    ),
    "output": (
        {"output": "all"},
        SimbaError,
        "Unknown output='all': expected 'full' or 'kept'. Write transform(model, output='full').",
    ),
    "kernels": (
        {"kernels": "fast"},
        SimbaError,
        "Unknown kernels='fast': expected 'auto' or 'model'. Write transform(model, kernels='auto').",
    ),
    "compile": (
        {"compile": True},
        SimbaError,
        "Unknown compile=True: expected 'blocks' or 'whole'. Write transform(model, compile='blocks').",
    ),
    "negative floor": ({"floor": -1}, SimbaError, FLOOR.format("-1")),
    "fractional floor": ({"floor": 1.5}, SimbaError, FLOOR.format("1.5")),
    "boolean floor": ({"floor": True}, SimbaError, FLOOR.format("True")),
    "seed type": ({"seed": "a"}, SimbaError, SEED.format("'a'")),
    "even span": ({"span": 4}, SimbaError, SPAN.format("4")),
    "span type": ({"span": True}, SimbaError, SPAN.format("True")),
    "long span": ({"span": 1025}, SimbaError, SPAN.format("1025")),
    "span of positions": (
        {"criterion": "recent", "span": 5},
        CriterionError,
        "span=5 pools the scores of scans; criterion 'recent' looks at positions only and has none. Leave span out, or "
        "pass criterion='simba-l2'.",
    ),
    "positions among scores": (
        {"criterion": "simba+recent"},
        CriterionError,
        "'simba+recent' combines scores of scans; 'recent' looks at positions only and has none. Leave it out.",
    ),
    "boolean seed": ({"seed": True}, SimbaError, SEED.format("True")),
}


@pytest.mark.parametrize(("options", "error", "message"), ARGUMENTS.values(), ids=list(ARGUMENTS))
def test_arguments(model: nn.Module, options: dict[str, Any], error: type[SimbaError], message: str) -> None:
    with refused(error, message, model):
        simba_fx.transform(model, **options)


@pytest.mark.parametrize("family", ["transformers", "plain"])
def test_a_wrong_argument_is_refused_whatever_the_model(model: nn.Module, own: nn.Module, family: str) -> None:
    dense_model = model if family == "transformers" else own
    with refused(*ARGUMENTS["criterion name"][1:], dense_model):
        simba_fx.transform(dense_model, "linear", criterion="simbo")
    with refused(*ARGUMENTS["count of shares"][1:], dense_model):
        simba_fx.transform(dense_model, [1, 0.5])


def test_an_unknown_keyword_is_refused(model: nn.Module) -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'shedule'"):
        simba_fx.transform(model, "linear", shedule="linear")  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="positional argument"):
        simba_fx.transform(model, "linear", "simba")  # type: ignore[misc]


def test_example_inputs_of_a_model_whose_inputs_are_known(model: nn.Module) -> None:
    message = (
        "example_inputs are for plain modules; expected none for a transformers MambaForCausalLM, whose inputs are"
        " known. Leave the argument out."
    )
    with refused(SimbaError, message, model):
        simba_fx.transform(model, "linear", example_inputs=(tokens(0, 2, 20),))


# What is transformed.


def test_not_a_module() -> None:
    with refused(SimbaError, "transform expects a torch.nn.Module, found function. Pass the model object itself."):
        simba_fx.transform(lambda x: x, "linear")  # type: ignore[arg-type]


def test_a_module_that_holds_a_transformed_model(sparse: Any) -> None:
    message = (
        "This Sequential holds a result of simba_fx.transform; expected a dense model, or that result itself. "
        "Transform what is inside."
    )
    with refused(SimbaError, message, sparse):
        simba_fx.transform(nn.Sequential(sparse), "linear")


REGISTER = (
    " A model of attention or convolutions alone has no recurrence to score tokens by. If this one runs the scan of"
    " Mamba or Mamba-2 in a function of its own, register it:"
    " simba_fx.register_scan(function, adapter). If another that is "
    "linear in its values: simba_fx.register_recurrence(function, value)."
)


def test_no_recurrence_at_all() -> None:
    message = (
        "No scan was found in Sequential: expected at least one call of a registered scan function while it was"
        " traced, found none." + REGISTER
    )
    with refused(ScanNotFoundError, message):
        simba_fx.transform(nn.Sequential(nn.Embedding(53, 8), nn.Linear(8, 53)), "linear")


def unregistered_scan(x: Tensor, A: Tensor) -> Tensor:
    return torch.cumsum(x * A, 1)


class Mixer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.A_log = nn.Parameter(torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:
        return x + unregistered_scan(x, -self.A_log.exp())


class Unregistered(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(53, 8)
        self.mixers = nn.ModuleList(Mixer() for _ in range(2))

    def forward(self, ids: Tensor) -> Tensor:
        x: Tensor = self.embedding(ids)
        for mixer in self.mixers:
            x = mixer(x)
        return x


def test_a_function_that_is_not_registered() -> None:
    message = (
        "No scan was found in Unregistered: expected at least one call of a registered scan function while it was"
        f" traced, found none. It called {__name__}.unregistered_scan, not registered. If that computes the recurrence"
        " of Mamba or Mamba-2, or a gated delta rule, register it: simba_fx.register_scan(function, adapter). If"
        " another that is linear in its values: simba_fx.register_recurrence(function, value)."
    )
    bad = Unregistered()
    with refused(ScanNotFoundError, message, bad):
        simba_fx.transform(bad, "linear")


class HalfRegistered(nn.Module):
    """One block whose recurrence is known, one whose is not."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(53, 8)
        self.blocks = nn.ModuleList([own_model.Block(8, 2), Mixer()])

    def forward(self, ids: Tensor) -> Tensor:
        x: Tensor = self.embedding(ids)
        for block in self.blocks:
            x = block(x)
        return x


def test_one_mixer_of_several_is_not_registered() -> None:
    message = (
        "blocks.1 (Mixer) holds the weights of a scan (A_log) but called no registered scan function while it was"
        f" traced. It called {__name__}.unregistered_scan, not registered. If that computes the recurrence of Mamba or"
        " Mamba-2, or a gated delta rule, register it: simba_fx.register_scan(function, adapter). If another that is "
        "linear in its values: simba_fx.register_recurrence(function, value)."
    )
    bad = HalfRegistered()
    with refused(CaptureError, message, bad):
        simba_fx.transform(bad, "linear")


class FixedLength(own_model.MyMamba):  # type: ignore[misc, name-defined]
    """Python that needs the length as a number."""

    def forward(self, ids: Tensor) -> Tensor:
        weights = torch.tensor([1.0 / (t + 1) for t in range(ids.shape[1])])
        hidden = self.embedding(ids) * weights[:, None]
        for block in self.blocks:
            hidden = block(hidden)
        return self.head(self.norm(hidden))


def test_a_length_that_does_not_stay_symbolic() -> None:
    """One sentence of ours: what was expected, what fixed the length, and what to do; no page of torch's."""
    bad = FixedLength(vocabulary=53, width=8, states=2, depth=2).eval()
    logits = output(bad)
    before = state(bad)
    with pytest.raises(CaptureError) as caught:
        simba_fx.transform(bad, "linear")
    message = str(caught.value)
    assert "FixedLength" in message
    assert "length" in message
    assert "as a plain number (test_errors.py, line" in message
    assert "\n" not in message
    assert len(message) < 700
    assert state(bad) == before
    assert torch.equal(output(bad), logits)


def test_experts_in_a_python_loop() -> None:
    from transformers import JambaConfig, JambaForCausalLM

    config = JambaConfig(
        vocab_size=53, hidden_size=16, intermediate_size=16, num_hidden_layers=4, num_attention_heads=2,
        num_key_value_heads=1, attn_layer_period=4, attn_layer_offset=3, expert_layer_period=2, expert_layer_offset=1,
        num_experts=2, num_experts_per_tok=1, mamba_d_state=4, mamba_dt_rank=2, use_mamba_kernels=False, pad_token_id=0,
    )  # fmt: skip
    config._experts_implementation = "eager"
    bad = JambaForCausalLM(config).eval()
    message = (
        "experts_implementation='eager' loops over experts in Python and cannot be captured; expected 'grouped_mm' or"
        " 'batched_mm'. Load the model with experts_implementation='grouped_mm'."
    )
    with refused(CaptureError, message, bad):
        simba_fx.transform(bad, "linear")


# Plain modules and their example.


def test_a_plain_module_without_an_embedding_needs_an_example() -> None:
    message = (
        "Block is a plain module without an embedding; expected example_inputs=(tensor, ...) with the arguments of its"
        " forward, (B, L, ...) with B ≠ L. Pass them to transform."
    )
    with refused(CaptureError, message):
        simba_fx.transform(own_model.Block(8, 2), "linear")


def test_an_example_without_a_sequence() -> None:
    message = (
        "example_inputs must hold at least one tensor (B, L, ...); found hidden: int. Pass the arguments of"
        " Block.forward, for example (torch.zeros(2, 24, 8),)."
    )
    with refused(CaptureError, message):
        simba_fx.transform(own_model.Block(8, 2), "linear", example_inputs=(3,))


OTHER_ARGUMENTS = (
    "OptionalScale was captured with the arguments ids; found a call with {}. Transform the module again with"
    " example_inputs like this call's."
)


def test_a_plain_module_called_with_other_arguments() -> None:
    made = simba_fx.transform(OptionalScale(vocabulary=53, width=8, states=2, depth=4).eval(), LINEAR)
    with refused(InputError, OTHER_ARGUMENTS.format("ids, scale"), made):
        made(tokens(0, 2, 20), scale=torch.ones(()))
    with refused(InputError, OTHER_ARGUMENTS.format("scale"), made):
        made(None, torch.ones(()))


def test_a_plain_module_called_without_arguments() -> None:
    made = simba_fx.transform(OptionalScale(vocabulary=53, width=8, states=2, depth=4).eval(), LINEAR)
    with refused(InputError, OTHER_ARGUMENTS.format("none"), made):
        made(None)


class OptionalScale(own_model.MyMamba):  # type: ignore[misc, name-defined]
    def forward(self, ids: Tensor, scale: Tensor | None = None) -> Tensor:
        hidden = self.embedding(ids)
        for block in self.blocks:
            hidden = block(hidden)
        return self.head(hidden if scale is None else hidden * scale)


# Registering.

CALLABLES = " Pass the function object that the model calls, and an adapter that takes the same arguments."


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((3, len), "register_scan expects a callable function, found int." + CALLABLES),
        ((len, None), "register_scan expects a callable adapter, found NoneType." + CALLABLES),
    ],
    ids=["function", "adapter"],
)
def test_registering_what_cannot_be_called(arguments: tuple[Any, Any], message: str) -> None:
    with refused(SimbaError, message):
        simba_fx.register_scan(*arguments)


def first_tokens(x: Tensor, length: int) -> Tensor:
    return x.cumsum(1)[:, :length]


class Other(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(53, 8)

    def forward(self, ids: Tensor) -> Tensor:
        x: Tensor = self.embedding(ids)
        return x + first_tokens(x, ids.shape[1])


@pytest.fixture
def register(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """`register_scan`, undone after the test."""
    from simba_fx.capture import lift

    monkeypatch.setattr(lift, "_registered", dict(lift._registered))
    return simba_fx.register_scan


def test_an_adapter_that_names_no_operands(register: Callable[..., None]) -> None:
    register(first_tokens, lambda x, length: x)
    message = (
        "The adapter registered for first_tokens returned FakeTensor; expected a scan's "
        "operands: simba_fx.SelectiveScan, simba_fx.SSDScan or simba_fx.DeltaScan. Correct the call of "
        "simba_fx.register_scan."
    )
    bad = Other()
    with refused(CaptureError, message, bad):
        simba_fx.transform(bad, "linear")


def test_a_length_given_to_the_function(register: Callable[..., None]) -> None:
    def adapter(x: Tensor, length: int) -> Any:
        u = x.transpose(1, 2)
        return simba_fx.SelectiveScan(u, u, -torch.ones(8, 2), u[:, :2], u[:, :2]), lambda y, _: y.transpose(1, 2)

    register(first_tokens, adapter)
    message = (
        "first_tokens was called with a length as a plain number; expected tensors and constants. Read the length from"
        " a tensor inside the function."
    )
    bad = Other()
    with refused(CaptureError, message, bad):
        simba_fx.transform(bad, "linear")


# Calls of a transformed model.


def test_a_prompt_shorter_than_the_tail(sparse: Any) -> None:
    message = (
        "simba_fx.tail protects the last 21 tokens, but the prompt has 20; expected a tail of at most the prompt's"
        " length. Lower the tail or pass a longer prompt."
    )
    with refused(InputError, message, sparse), simba_fx.tail(sparse, 21):
        sparse(tokens(0, 2, 20))


def test_a_row_shorter_than_the_tail(sparse: Any) -> None:
    mask = torch.ones(2, 20, dtype=torch.int64)
    mask[1, :12] = 0
    message = (
        "simba_fx.tail protects the last 9 tokens, but row 1 has 8 real tokens; expected a tail of at most the shortest"
        " row's length. Lower the tail or remove the row."
    )
    with refused(InputError, message, sparse), simba_fx.tail(sparse, 9):
        sparse(tokens(0, 2, 20), attention_mask=mask)


def test_a_one_token_prompt_shorter_than_the_tail(sparse: Any) -> None:
    message = (
        "simba_fx.tail protects the last 2 tokens, but the prompt has 1; expected a tail of at most the prompt's"
        " length. Lower the tail or pass a longer prompt."
    )
    with refused(InputError, message, sparse), simba_fx.tail(sparse, 2):
        sparse(tokens(0, 2, 1))


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32])
def test_a_row_of_pads_alone(sparse: Any, dtype: torch.dtype) -> None:
    mask = torch.ones(2, 20, dtype=dtype)
    mask[1] = 0
    message = "Row 1 of attention_mask is all padding; expected at least one real token in every row. Remove the row."
    with refused(InputError, message, sparse):
        sparse(tokens(0, 2, 20), attention_mask=mask)


@pytest.mark.parametrize("shape", [(2, 1, 20, 20), (2, 19), (3, 20)])
def test_a_mask_of_another_shape(sparse: Any, shape: tuple[int, ...]) -> None:
    message = (
        "Expected an attention_mask (B, L) = (2, 20), 1 for real tokens and 0 for padding; found shape"
        f" {shape}. Pass the tokenizer's 2-D mask."
    )
    with refused(InputError, message, sparse):
        sparse(tokens(0, 2, 20), attention_mask=torch.ones(shape))


def test_padding_between_two_turns(sparse: Any) -> None:
    with torch.no_grad():
        cache = getattr(sparse(tokens(1, 2, 20), use_cache=True), CACHE)
    states = copy.deepcopy([layer.recurrent_states for layer in cache.layers])
    message = (
        "Row 0 of attention_mask has padding between its tokens, which are in 2 pieces; expected the real tokens of a "
        "row one after the other, with padding before or behind them, because padding in between still changes a "
        "model's states. Move it to one side."
    )
    with refused(InputError, message, sparse), torch.no_grad():
        mask = torch.tensor([[0, 1, 1], [1, 1, 1]])
        sparse(tokens(2, 2, 3), attention_mask=mask, **{CACHE: cache}, use_cache=True)
    for before, layer in zip(states, cache.layers, strict=True):
        assert all(torch.equal(before[key], layer.recurrent_states[key]) for key in before)


def test_an_argument_that_is_no_tensor(sparse: Any) -> None:
    message = (
        "MambaModel was called with packed=[3, 17], which a captured graph cannot take; expected tensors, numbers,"
        " flags and words. Leave the argument out."
    )
    with refused(InputError, message, sparse):
        sparse.backbone(tokens(0, 2, 20), packed=[3, 17])


def test_hidden_states_by_index(sparse: Any) -> None:
    message = (
        "MambaModel was called with output_hidden_states=[0, -1]; expected True or False. Ask for all of them and pick"
        " what you need."
    )
    with refused(InputError, message, sparse):
        sparse(tokens(0, 2, 20), output_hidden_states=[0, -1])


def test_ids_and_embeddings_together_meet_the_models_own_message(sparse: Any) -> None:
    with pytest.raises(ValueError, match="exactly one of input_ids or inputs_embeds"):
        sparse(tokens(0, 2, 20), inputs_embeds=torch.zeros(2, 20, 20))


@pytest.mark.parametrize("tail", [0, -1, 1.5, "3", True, None])
def test_a_tail_that_is_no_count(sparse: Any, tail: Any) -> None:
    message = (
        f"tail expects a whole number of tokens, at least 1, or one for each row; found {tail!r}. Write for example"
        " simba_fx.tail(sparse, 100)."
    )
    with refused(SimbaError, message, sparse), simba_fx.tail(sparse, tail):
        pass


WITHOUT = (
    "Expected a model returned by simba_fx.transform, found a MambaForCausalLM. Call simba_fx.transform(model) and pass"
    " its result."
)


@pytest.mark.parametrize("ask", [simba_fx.kept, simba_fx.explain, simba_fx.program], ids=lambda f: f.__name__)
def test_questions_about_a_dense_model(model: nn.Module, ask: Callable[[nn.Module], Any]) -> None:
    with refused(SimbaError, WITHOUT, model):
        ask(model)


def test_a_tail_on_a_dense_model(model: nn.Module) -> None:
    with refused(SimbaError, WITHOUT, model), simba_fx.tail(model, 2):
        pass


@pytest.mark.parametrize("family", ["transformers", "plain"])
def test_kept_before_any_call(model: nn.Module, own: nn.Module, family: str) -> None:
    made = simba_fx.transform(model if family == "transformers" else own, LINEAR)
    message = (
        "kept() tells what the last call kept; expected a call of the model before it, found none. Call the model"
        " first."
    )
    with refused(SimbaError, message):
        simba_fx.kept(made)
    assert output(made).shape == (2, 20, 53)
    assert len(simba_fx.kept(made)) == 4


# A user's criterion.


@pytest.mark.parametrize("compile", ["blocks", "whole"])
@pytest.mark.parametrize(("criterion", "found"), [(three_numbers, "(3,)"), (one_number, "int")], ids=["shape", "type"])
def test_a_criterion_of_the_wrong_shape(model: nn.Module, compile: Any, criterion: Any, found: str) -> None:
    made = simba_fx.transform(model, LINEAR, criterion=criterion, compile=compile)
    message = (
        f"The criterion {criterion.__name__} returned {found}; expected a tensor (B, L) = (2, 20), higher = keep."
        " Return one score per token."
    )
    with refused(CriterionError, message, model):
        output(made)


# Graphs that cannot be cut.


class Widened(own_model.MyMamba):  # type: ignore[misc, name-defined]
    """Carries a value of L + 3 from block to block."""

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.embedding(ids)
        wide = nn.functional.pad(hidden, (0, 0, 3, 0))
        for block in self.blocks:
            hidden = block(hidden) + wide[:, 3:]
        return self.head(hidden)


def message_of_refused_graph(bad: nn.Module) -> str:
    """The pass that refused is named beside the message."""
    logits, before = output(bad), state(bad)
    with pytest.raises(GraphError) as caught:
        simba_fx.transform(bad, "linear")
    assert caught.value.__notes__ == ["while simba_fx ran the pass GatherSurvivors(output='full')"]
    assert state(bad) == before
    assert torch.equal(output(bad), logits)
    return str(caught.value)


def test_a_value_computed_from_the_length_crosses_a_cut() -> None:
    assert message_of_refused_graph(Widened(vocabulary=53, width=8, states=2, depth=3).eval()) == (
        "Node pad in the model's own forward has shape (B, L + 3, 8) and crosses a cut; expected (B, L, ...), since"
        " survivors are chosen among the L tokens of the input. If the model puts tokens of its own beside those,"
        " transform the module inside it that is given all of them, with protect=range(n) for n in front; else keep"
        " that block whole (give the next block the same share)."
    )


class ChannelsFirstBlock(own_model.Block):  # type: ignore[misc, name-defined]
    def forward(self, hidden: Tensor) -> Tensor:
        found: Tensor = super().forward(hidden.transpose(1, 2)).transpose(1, 2)
        return found.contiguous()


class ChannelsFirst(own_model.MyMamba):  # type: ignore[misc, name-defined]
    """Carries `(B, D, L)` from block to block."""

    def __init__(self) -> None:
        super().__init__(vocabulary=53, width=8, states=2, depth=3)
        self.blocks = nn.ModuleList(ChannelsFirstBlock(8, 2) for _ in range(3))

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.embedding(ids).transpose(1, 2)
        for block in self.blocks:
            hidden = block(hidden)
        return self.head(hidden.transpose(1, 2))


def test_a_layout_that_cannot_be_gathered() -> None:
    assert message_of_refused_graph(ChannelsFirst().eval()) == (
        "Node contiguous in blocks.0 has shape (B, 8, L) and crosses a cut; expected (B, L, ...) with L in dimension 1"
        " alone, or (B, H, L, L), found it in (2,). This layout cannot be gathered; keep the blocks around it whole"
        " (give them the same share)."
    )


def test_a_criterion_of_another_recurrence() -> None:
    with pytest.raises(CriterionError) as caught:
        simba_fx.transform(dense("mamba"), "linear", criterion="removal")
    assert str(caught.value) == (
        "Criterion 'removal' is not one that a selective scan can be scored by; expected one of simba, simba-abs, "
        "simba-l2, write, no-decay, delta-norm, clip, one by position, or a function of your own. Pass one of those "
        "as criterion."
    )
    with torch.no_grad():
        simba_fx.transform(dense("qwen3-next"), "linear", criterion="removal")(input_ids=tokens(1, 2, 20))


def looping_wkv(k: Tensor, v: Tensor) -> Tensor:
    above, below, found = torch.zeros_like(v[:, 0]), torch.zeros_like(v[:, 0]), []
    for t in range(v.shape[1]):
        above, below = 0.9 * above + k[:, t].exp() * v[:, t], 0.9 * below + k[:, t].exp()
        found.append(above / below)
    return torch.stack(found, 1)


class Looping(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 16) for _ in range(24))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + looping_wkv(*layer(x).chunk(2, 2))
        return x


def test_a_recurrence_that_loops_in_python_is_refused_at_once() -> None:
    """By the function that loops, and before all layers are traced: that took minutes."""
    begun = time.perf_counter()
    with pytest.raises(ScanNotFoundError, match="looping_wkv, which loops over tokens in Python") as caught:
        simba_fx.transform(Looping().eval(), "linear", example_inputs=(torch.zeros(2, 24, 8),))
    assert "simba_fx.register_recurrence(function, value)" in str(caught.value)
    assert time.perf_counter() - begun < 60
    simba_fx.register_recurrence(looping_wkv, value="v")  # what the message says
    simba_fx.transform(Looping().eval(), "linear", example_inputs=(torch.zeros(2, 24, 8),))
