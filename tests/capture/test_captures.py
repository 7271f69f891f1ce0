"""A model is traced once for each kind of call, whatever the schedules: until its modules or their code change."""

from __future__ import annotations

import collections
import copy
import functools
import gc
import importlib
import sys
import time
import types
import weakref
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from models import BY_NAME, logits, tokens
from torch import Tensor, nn

import simba_fx
from simba_fx.runtime import captures
from simba_fx.runtime.fingerprint import snapshot

own_model: Any = importlib.import_module("own_model")

PLAIN = torch.randint(50, (2, 30), generator=torch.Generator().manual_seed(0))


class Traces:
    count = 0


@pytest.fixture
def traces(monkeypatch: pytest.MonkeyPatch) -> Traces:
    """How often torch traced."""
    own, counted = torch.export.export, Traces()

    def export(*args: Any, **kwargs: Any) -> Any:
        counted.count += 1
        return own(*args, **kwargs)

    monkeypatch.setattr(torch.export, "export", export)
    return counted


def build(name: str) -> nn.Module:
    """A model of whose kind nothing was captured."""
    if name != "plain":
        model = BY_NAME[name].build()
        captures.share(model.get_submodule(model.base_model_prefix), {})
        return model
    simba_fx.register_scan(own_model.scan, own_model.adapter)
    torch.manual_seed(0)
    return own_model.MyMamba(50, 16, 4, 4).eval()  # type: ignore[no-any-return]


def run(model: nn.Module, name: str) -> Tensor:
    found: Tensor = model(PLAIN) if name == "plain" else logits(model, input_ids=tokens(1, 2, 30))
    return found


CHANGES: list[dict[str, Any]] = [
    {"schedule": "cosine"},
    {"schedule": "dense"},
    {"schedule": (1, 0.9, 0.5, 0.2), "criterion": "recent"},
    {"output": "kept"},
    {"floor": 0, "criterion": "simba-abs", "protect": (0, 3)},
    {"criterion": lambda operands, query: operands.delta.abs().sum(1)},  # (B, D, L) in Mamba's scan
    {"compile": "whole"},
]


@pytest.mark.parametrize("name", ["mamba", "bamba", "plain"])
def test_other_options_need_no_other_trace(name: str, traces: Traces) -> None:
    """The results are those of a model that was never transformed before, in whatever order."""
    model = build(name)
    run(simba_fx.transform(model, "linear"), name)
    before = traces.count
    for change in (*CHANGES[:5], {}, *CHANGES[5:]) if name == "mamba" else (CHANGES[4], {}, CHANGES[6]):
        again = simba_fx.transform(model, **change)
        found = run(again, name)
        if change.get("compile") != "whole":
            assert traces.count == before
        count = traces.count
        fresh = simba_fx.transform(build(name), **change)
        assert torch.equal(found, run(fresh, name))
        assert all(torch.equal(a, b) for a, b in zip(simba_fx.kept(again), simba_fx.kept(fresh), strict=True))
        traces.count = before = min(before, count)


def test_what_dynamo_leaves_in_a_file_is_no_other_code(traces: Traces) -> None:
    model = build("mamba")
    sparse = simba_fx.transform(model, "linear")
    run(sparse, "mamba")
    file = vars(sys.modules[type(model).__module__])
    before, traced = len(file), traces.count
    run(torch.compile(sparse, backend="eager"), "mamba")
    run(simba_fx.transform(model, 0.5), "mamba")
    assert len(file) > before
    assert traces.count == traced


def test_a_kind_of_call_that_one_has_met_is_known_to_the_next(traces: Traces) -> None:
    model, ids = build("mamba"), tokens(1, 2, 30)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    logits(simba_fx.transform(model, "linear"), input_ids=ids, attention_mask=mask)
    before = traces.count
    assert before == 2
    found = logits(simba_fx.transform(model, 0.5), input_ids=ids, attention_mask=mask)
    assert traces.count == before
    assert torch.equal(found, logits(simba_fx.transform(build("mamba"), 0.5), input_ids=ids, attention_mask=mask))


def test_an_object_that_holds_plain_values_is_known_by_them(traces: Traces) -> None:
    """A block that reads a setting of an object of its own is traced anew when that was changed in place."""
    simba_fx.register_scan(own_model.scan, own_model.adapter)

    class Scaled(own_model.Block):  # type: ignore[misc, name-defined]
        def forward(self, hidden: Tensor) -> Tensor:
            return super().forward(hidden) * self.settings.scale  # type: ignore[no-any-return]

    model: Any = own_model.MyMamba(50, 16, 4, 4).eval()
    model.blocks = nn.ModuleList(Scaled(16, 4) for _ in range(4))
    settings = [types.SimpleNamespace(scale=1.0, sizes={"kept": [2, 3]}) for _ in model.blocks]
    for block, held in zip(model.blocks, settings):
        block.settings = held
    before = model(PLAIN)
    torch.testing.assert_close(simba_fx.transform(model, "dense")(PLAIN), before)
    simba_fx.transform(model, "linear")
    assert traces.count == 1
    settings[2].scale = 2.0
    torch.testing.assert_close(simba_fx.transform(model, "dense")(PLAIN), model(PLAIN))
    assert not torch.allclose(model(PLAIN), before, atol=1e-3)
    assert traces.count == 2
    settings[2].scale = 1.0
    settings[0] = model.blocks[0].settings = copy.deepcopy(settings[0])  # another object that says the same
    sparse = simba_fx.transform(model, "linear")
    assert traces.count == 2
    found = sparse(PLAIN)
    sparse.blocks[1].settings.scale = 2.0  # a sparse model's own modules hold the same objects
    again = sparse(PLAIN)
    assert traces.count == 3
    torch.testing.assert_close(again, simba_fx.transform(copy.deepcopy(model), "linear")(PLAIN))
    assert not torch.allclose(again, found, atol=1e-3)


def test_a_function_that_is_exchanged_on_a_module_is_seen(traces: Traces) -> None:
    simba_fx.register_scan(own_model.scan, own_model.adapter)

    class Gated(own_model.Block):  # type: ignore[misc, name-defined]
        act: Any = staticmethod(torch.tanh)

        def forward(self, hidden: Tensor) -> Tensor:
            return hidden + self.act(super().forward(hidden))  # type: ignore[no-any-return]

    model: Any = own_model.MyMamba(50, 16, 4, 4).eval()
    model.blocks = nn.ModuleList(Gated(16, 4) for _ in range(4))
    sparse = simba_fx.transform(model, "dense")
    torch.testing.assert_close(sparse(PLAIN), before := model(PLAIN))
    for act in (nn.functional.gelu, lambda x: 2 * x, functools.partial(nn.functional.leaky_relu, negative_slope=0.2)):
        for one in (model, sparse):
            one.blocks[2].act = act
        torch.testing.assert_close(sparse(PLAIN), model(PLAIN))
        assert not torch.allclose(model(PLAIN), before, atol=1e-3)
    assert traces.count == 4
    sparse(PLAIN)
    assert traces.count == 4


def replace_method(model: Any, patch: pytest.MonkeyPatch) -> None:
    own = own_model.Block.forward
    patch.setattr(own_model.Block, "forward", lambda self, hidden: own(self, hidden) * 2)


def replace_function(model: Any, patch: pytest.MonkeyPatch) -> None:
    """Of the file that the model's classes stand in."""
    own = own_model.scan

    def scan(x: Tensor, *rest: Tensor) -> Tensor:
        return own(2 * x, *rest)  # type: ignore[no-any-return]

    simba_fx.register_scan(scan, lambda x, *rest: own_model.adapter(2 * x, *rest))
    patch.setattr(own_model, "scan", scan)


def hook(model: Any, patch: pytest.MonkeyPatch) -> None:
    model.blocks[1].register_forward_hook(lambda module, args, output: output * 2)


def exchange(model: Any, patch: pytest.MonkeyPatch) -> None:
    model.blocks[1].inputs = nn.Sequential(model.blocks[1].inputs, nn.Dropout(0.1)).eval()


def other_numbers(model: Any, patch: pytest.MonkeyPatch) -> None:
    model.to(torch.bfloat16)


def other_adapter(model: Any, patch: pytest.MonkeyPatch) -> None:
    simba_fx.register_scan(own_model.scan, lambda *operands: own_model.adapter(*operands))


@pytest.mark.parametrize(
    "change", [replace_method, replace_function, hook, exchange, other_numbers, other_adapter], ids=lambda c: c.__name__
)
def test_what_changed_is_traced_anew(
    change: Callable[[Any, pytest.MonkeyPatch], None], traces: Traces, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build("plain")
    simba_fx.transform(model, "dense")
    change(model, monkeypatch)
    before = traces.count
    sparse = simba_fx.transform(model, "dense")
    assert traces.count == before + 1
    torch.testing.assert_close(run(sparse, "plain"), run(model, "plain"), rtol=2e-2, atol=2e-2)


def test_weights_are_those_of_now(traces: Traces) -> None:
    for name in ("plain", "mamba"):
        model = build(name)
        run(simba_fx.transform(model, "dense"), name)
        before = traces.count
        model.load_state_dict({key: held * 1.1 for key, held in model.state_dict().items()}, assign=True)
        torch.testing.assert_close(
            run(simba_fx.transform(model, "dense"), name), run(model, name), rtol=1e-3, atol=1e-3
        )
        assert traces.count == before


@pytest.mark.parametrize("name", ["mamba", "bamba", "plain"])
@pytest.mark.parametrize("wrapped", [lambda model: model, torch.compile])
def test_a_sparse_model_is_planned_anew(name: str, wrapped: Any, traces: Traces) -> None:
    """The same weights, other options; those that are not named are the usual ones. Nothing is traced again."""
    model = build(name)
    first = simba_fx.transform(model, "linear", criterion="recent", output="kept")
    found, before = run(first, name), traces.count
    again = simba_fx.transform(wrapped(first), "cosine")
    assert torch.equal(run(again, name), run(simba_fx.transform(model, "cosine"), name))
    assert traces.count == before
    assert torch.equal(run(first, name), found)
    assert {id(p) for p in again.parameters()} == {id(p) for p in model.parameters()}
    if name != "plain":
        stack = first.base_model  # type: ignore[attr-defined]
        assert type(simba_fx.transform(stack, "linear")).__name__ == type(stack).__name__


def test_a_plain_module_with_a_mask_is_planned_anew() -> None:
    masked: Any = importlib.import_module("graph_cases")
    module = masked.Masked(masked.Block(), masked.Block()).eval()
    x, mask = torch.randn(2, 24, masked.WIDTH), torch.ones(2, 24)
    options = {"example_inputs": (x, mask), "mask": "mask"}
    again = simba_fx.transform(simba_fx.transform(module, "dense", **options), (1, 0.5))
    mask[1, :7] = 0
    assert torch.equal(again(x, mask), simba_fx.transform(module, (1, 0.5), **options)(x, mask))


def test_a_copy_has_captures_of_its_own(traces: Traces) -> None:
    model = build("mamba")
    first = simba_fx.transform(model, "linear")
    found = run(copy.deepcopy(first), "mamba")
    assert traces.count == 2
    assert torch.equal(found, run(first, "mamba"))


@pytest.mark.parametrize("name", ["mamba", "plain"])
def test_captures_go_with_their_model_and_are_few(name: str) -> None:
    model = build(name)
    sparse = simba_fx.transform(model, "linear")
    run(sparse, name)
    store = captures.stored_with(model if name == "plain" else model.base_model)  # type: ignore[arg-type]
    assert 1 <= len(store) <= 2
    for number in range(captures.MOST + 4):
        captures.captured(store, model, snapshot(model), (number,), lambda: next(iter(store.values())))
    assert len(store) == captures.MOST
    there = weakref.ref(model)
    del model
    gc.collect()
    assert there() is None
    run(sparse, name)  # a sparse model needs no dense one


def test_a_sweep_is_cheap() -> None:
    """64 blocks, one schedule after another: processor time, of which this machine has two cores."""
    from transformers import MambaConfig, MambaModel

    config = MambaConfig(vocab_size=50, hidden_size=16, state_size=4, num_hidden_layers=64, time_step_rank=2)
    model = MambaModel(config).eval()
    simba_fx.transform(model, "linear")
    taken = []
    for share in (0.5, 0.3, 0.2):
        begun = time.process_time()
        simba_fx.transform(model, simba_fx.Linear(share))
        taken.append(time.process_time() - begun)
    assert min(taken) < 1.5, taken


# --- what a module may hold a setting in --------------------------------------------------------------------------


class Slotted:
    __slots__ = ("scale",)

    def __init__(self, scale: float) -> None:
        self.scale = scale


class Mixed(types.SimpleNamespace):
    """No plain object: it holds another."""

    def __init__(self, scale: float) -> None:
        super().__init__(scale=scale, more=object())


Held = types.SimpleNamespace
Named = collections.namedtuple("Named", "scale")
SETTINGS: dict[str, tuple[Callable[[float], Any], Callable[[Any], float]]] = {
    "dict": (lambda x: {"scale": x}, lambda held: held["scale"]),
    "OrderedDict": (lambda x: collections.OrderedDict(scale=x), lambda held: held["scale"]),
    "defaultdict": (lambda x: collections.defaultdict(float, scale=x), lambda held: held["scale"]),
    "namedtuple": (Named, lambda held: held.scale),
    "deque": (lambda x: collections.deque([x]), lambda held: held[0]),
    "frozenset": (lambda x: frozenset([x]), lambda held: next(iter(held))),
    "torch.Size": (lambda x: torch.Size([int(x)]), lambda held: held[0]),
    "object": (lambda x: Held(scale=x), lambda held: held.scale),
    "object in a list": (lambda x: [Held(scale=x)], lambda held: held[0].scale),
    "object in an object": (
        lambda x: types.SimpleNamespace(o=types.SimpleNamespace(scale=x)),
        lambda held: held.o.scale,
    ),
    "slots": (Slotted, lambda held: held.scale),
    "object of any kind": (Mixed, lambda held: held.scale),
    "Fraction": (Fraction, float),
    "range": (lambda x: range(int(x)), len),
    "bytes": (lambda x: bytes([int(x)]), lambda held: held[0]),
    "NumPy": (np.float32, float),
    "closure": (lambda x: lambda: x, lambda held: held()),
}


def scaled_by(read: Callable[[Any], float]) -> Any:
    """A model that reads a number from its attribute `setting`."""

    class Scaled(own_model.MyMamba):  # type: ignore[misc]  # the example's own
        def forward(self, ids: Tensor) -> Tensor:
            hidden = self.embedding(ids)
            for block in self.blocks:
                hidden = block(hidden) * read(self.setting)
            return self.head(self.norm(hidden))  # type: ignore[no-any-return]

    simba_fx.register_scan(own_model.scan, own_model.adapter)
    torch.manual_seed(0)
    return Scaled(50, 16, 4, 2).eval()


@pytest.mark.parametrize("kind", SETTINGS)
def test_a_setting_that_is_exchanged_is_seen_whatever_holds_it(kind: str, traces: Traces) -> None:
    """On the model, by the next transform; and on a sparse model, by its next call."""
    make, read = SETTINGS[kind]

    model = scaled_by(read)
    model.setting = make(1.0)
    sparse = simba_fx.transform(model, 0.5)
    first = sparse(PLAIN)
    model.setting = make(2.0)
    second = simba_fx.transform(model, 0.5)(PLAIN)
    assert not torch.equal(first, second)
    assert torch.equal(sparse(PLAIN), first)
    runtime: Any = sparse._simba
    runtime.root.setting = make(2.0)
    assert torch.equal(sparse(PLAIN), second)
    before = traces.count
    assert torch.equal(sparse(PLAIN), second)
    assert traces.count == before


@pytest.mark.parametrize("name", ["object", "object in a list", "object in an object", "OrderedDict", "deque"])
def test_a_setting_that_is_changed_where_it_is_held_is_seen(name: str) -> None:
    make, read = SETTINGS[name]

    model = scaled_by(read)
    model.setting = held = make(1.0)
    sparse = simba_fx.transform(model, 0.5)
    first = sparse(PLAIN)
    if isinstance(held, dict):
        held["scale"] = 2.0
    elif isinstance(held, collections.deque):
        held[0] = 2.0
    else:
        holder = held[0] if isinstance(held, list) else getattr(held, "o", held)
        holder.scale = 2.0
    assert torch.equal(sparse(PLAIN), simba_fx.transform(model, 0.5)(PLAIN))
    assert not torch.equal(sparse(PLAIN), first)


@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
@pytest.mark.parametrize("name", ["mamba", "jamba", "plain"])
def test_a_list_of_blocks_that_lost_one(name: str, before: bool) -> None:
    """`del layers[i]` leaves an OrderedDict of modules, which is copied like any other."""

    def blocks(held: Any) -> Any:
        return held.blocks if name == "plain" else held.base_model.layers

    def shortened(held: Any) -> Any:
        del blocks(held)[-1]
        return held

    model, other = build(name), shortened(build(name))
    if name != "plain":
        other.config.num_hidden_layers = len(other.base_model.layers)
    expected = run(simba_fx.transform(other, "linear"), name)
    if before:
        shortened(model)
    own = list(blocks(model))
    sparse = simba_fx.transform(model, "linear")
    if not before:
        shortened(sparse._simba.root if name == "plain" else sparse)
    assert torch.equal(run(sparse, name), expected)
    assert list(blocks(model)) == own
    assert [type(block) for block in own] == [type(block) for block in blocks(build(name))][: len(own)]
