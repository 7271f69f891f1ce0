"""Fine-tuning a sparse model with what people use: Trainer, autocast, activation checkpointing, losses on survivors."""

from __future__ import annotations

import contextlib
import copy
import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import reference
import torch
from models import (
    BY_NAME,
    CHECKPOINT,
    PER_KIND,
    SPREAD,
    VOCABULARY,
    Entry,
    dense,
    keep_all,
    linear,
    n_blocks,
    names,
    sparse,
    three_rows,
    tokens,
)
from reference import GRADIENT_TOLERANCE, TOLERANCE, assert_close, relative_rms
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import Dataset

import simba_fx
from simba_fx.errors import InputError, SimbaError

own_model: Any = importlib.import_module("own_model")

every_kind = pytest.mark.parametrize("entry", PER_KIND, ids=names(PER_KIND))
every_build = pytest.mark.parametrize("entry", SPREAD, ids=names(SPREAD))
every_masking = pytest.mark.parametrize("masked", [False, True], ids=["no mask", "padded"])
IGNORED = -100


def gradients(model: nn.Module, run: Any = None, **call: Any) -> dict[str, Tensor]:
    """Of the model's own loss on its input."""
    model.zero_grad(set_to_none=True)
    (model if run is None else run)(**call, labels=call["input_ids"]).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


class Saved:
    """Bytes that autograd keeps for backward while the body runs, each storage counted once."""

    def __enter__(self) -> Saved:
        self.storages: dict[int, Any] = {}
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self.pack, lambda tensor: tensor)
        self.hooks.__enter__()
        return self

    def pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        self.storages[storage.data_ptr()] = storage  # held, so that no other can get its address
        return tensor

    def __exit__(self, *exception: Any) -> None:
        self.hooks.__exit__(*exception)

    def bytes(self, model: nn.Module) -> int:
        """Without the parameters, which are there anyway."""
        weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        return sum(storage.nbytes() for address, storage in self.storages.items() if address not in weights)


# --- activation checkpointing ----------------------------------------------------------------------------------------


def recompute(model: nn.Module, enable: bool, **settings: Any) -> None:
    """transformers 5.24 renamed it, and warns of the old name."""
    for name in (f"{kind}_checkpointing_{'enable' if enable else 'disable'}" for kind in ("activation", "gradient")):
        if hasattr(model, name):
            key = f"{name.split('_')[0]}_checkpointing_kwargs"
            getattr(model, name)(**({key: settings} if settings else {}))
            return
    raise AssertionError("this model cannot recompute")


@every_build
def test_recomputing_blocks_leaves_the_same_gradients_and_less_in_memory(entry: Entry) -> None:
    model = simba_fx.transform(entry.build(), linear(entry)).train()
    call = {"input_ids": tokens(1, 2, 64)}
    with Saved() as plain:
        expected = gradients(model, **call)
    kept = simba_fx.kept(model)
    recompute(model, True)
    with Saved() as recomputed:
        found = gradients(model, **call)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert all(torch.equal(a, b) for a, b in zip(kept, simba_fx.kept(model)))
    assert recomputed.bytes(model) < 0.5 * plain.bytes(model)
    recompute(model, False)
    with Saved() as again:
        gradients(model, **call)
    assert again.bytes(model) == plain.bytes(model)


def test_nothing_is_recomputed_in_evaluation() -> None:
    model = simba_fx.transform(BY_NAME["mamba"].build(), "linear")
    recompute(model, True)
    model.eval()
    with Saved() as found:
        model(input_ids=tokens(1, 2, 64)).logits.sum()
    recompute(model, False)
    with Saved() as expected:
        model(input_ids=tokens(1, 2, 64)).logits.sum()
    assert found.bytes(model) == expected.bytes(model)


def test_the_models_own_way_of_recomputing_is_used() -> None:
    model = simba_fx.transform(BY_NAME["mamba"].build(), "linear").train()
    call = {"input_ids": tokens(1, 2, 40)}
    expected = gradients(model, **call)
    recompute(model, True, use_reentrant=True)
    seen = []
    own = model.backbone.layers[0]._gradient_checkpointing_func
    for layer in model.backbone.layers:
        layer._gradient_checkpointing_func = lambda *args: seen.append(own.keywords) or own(*args)
    found = gradients(model, **call)
    assert seen == [{"use_reentrant": True}] * 4
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@every_kind
def test_recomputing_blocks_under_compile(entry: Entry) -> None:
    torch._dynamo.reset()
    model = simba_fx.transform(entry.build(), linear(entry)).train()
    call = {"input_ids": tokens(1, 2, 40)}
    expected = gradients(model, **call)
    recompute(model, True)
    compiled = torch.compile(model, backend="aot_eager")
    found = gradients(model, compiled, **call)
    with torch._dynamo.config.patch(error_on_recompile=True):
        gradients(model, compiled, input_ids=tokens(2, 3, 55))
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert_close(name, found[name], gradient, GRADIENT_TOLERANCE[torch.float32])


def test_recomputing_blocks_of_a_plain_module() -> None:
    torch.manual_seed(0)
    model = simba_fx.transform(own_model.MyMamba(vocabulary=VOCABULARY, width=16, states=4, depth=4), "linear").train()
    ids = tokens(1, 2, 64)

    def run() -> tuple[dict[str, Tensor], int]:
        model.zero_grad(set_to_none=True)
        with Saved() as saved:
            cross_entropy(model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
        return {name: p.grad for name, p in model.named_parameters()}, saved.bytes(model)

    expected, much = run()
    for block in model.blocks.children():
        block.gradient_checkpointing = True
    found, little = run()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert little < 0.5 * much


def test_one_graph_cannot_be_recomputed_block_by_block() -> None:
    model = simba_fx.transform(BY_NAME["mamba"].build(), "linear", compile="whole").train()
    recompute(model, True)
    with pytest.raises(InputError) as refused:
        model(input_ids=tokens(1, 2, 24))
    assert str(refused.value) == (
        "gradient_checkpointing of MambaModel recomputes block by block, but with compile='whole' there are no blocks; "
        "expected compile='blocks' (the default of simba_fx.transform). Use that, or call "
        "gradient_checkpointing_disable()."
    )


# --- autocast --------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def half() -> Iterator[None]:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        yield


@every_build
def test_everything_kept_under_autocast_is_the_dense_model(entry: Entry) -> None:
    pruned = sparse(entry.name, keep_all(n_blocks(dense(entry.name))), kernels="model")
    call = three_rows(masked=True)
    with torch.no_grad(), half():
        expected, found = dense(entry.name)(**call).logits, pruned(**call).logits
    with torch.no_grad():
        outside = pruned(**call).logits
        assert torch.equal(outside, dense(entry.name)(**call).logits)
    real = call.get("attention_mask", torch.ones_like(call["input_ids"])).bool()
    assert torch.equal(found[real], expected[real])
    assert not torch.equal(found[real], outside[real])


@every_kind
def test_our_operators_lose_no_more_under_autocast_than_the_model_itself(entry: Entry) -> None:
    pruned = sparse(entry.name, keep_all(n_blocks(dense(entry.name))))
    call = {"input_ids": tokens(1, 2, 40)}
    with torch.no_grad():
        exact = dense(entry.name)(**call).logits
        with half():
            theirs, ours = dense(entry.name)(**call).logits, pruned(**call).logits
    assert relative_rms(ours, exact) < 1.5 * relative_rms(theirs, exact)


@every_kind
def test_training_under_autocast(entry: Entry) -> None:
    """The gradients of everything kept are the dense model's; those of a pruned model are float32, and it learns."""
    model = entry.build().train()
    whole = simba_fx.transform(model, keep_all(n_blocks(model)), kernels="model")
    call = {"input_ids": tokens(1, 2, 40)}
    with half():
        expected = copy.deepcopy(gradients(model, **call))
        found = gradients(whole, **call)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    pruned = simba_fx.transform(model, linear(entry))
    optimizer = torch.optim.AdamW(pruned.parameters(), lr=3e-3)
    losses = []
    for _ in range(6):
        optimizer.zero_grad()
        with half():
            loss = pruned(**call, labels=call["input_ids"]).loss
        loss.backward()
        losses.append(loss.item())
        assert all(p.grad.dtype == torch.float32 for p in pruned.parameters())
        optimizer.step()
    assert losses[-1] < 0.9 * losses[0]


def test_a_plain_module_is_captured_inside_the_autocast_it_runs_in() -> None:
    torch.manual_seed(0)
    model = own_model.MyMamba(vocabulary=VOCABULARY, width=16, states=4, depth=4)
    ids = tokens(1, 2, 24)
    with torch.no_grad(), half():
        found = simba_fx.transform(model, keep_all(4), kernels="model")(ids)
        assert found.dtype == torch.bfloat16
        assert_close("logits", found, model(ids), TOLERANCE[torch.bfloat16])
    outside = simba_fx.transform(model, "linear")
    with pytest.raises(InputError) as refused, half():
        outside(ids)
    assert str(refused.value) == (
        "MyMamba was captured with torch.autocast off and is called with it to bfloat16; expected the same, because a "
        "graph holds the casts of one of them. Call simba_fx.transform inside the autocast that the model will run in."
    )


# --- labels of tokens that left early --------------------------------------------------------------------------------


@every_kind
@every_masking
def test_the_loss_counts_only_what_survivors_predict(entry: Entry, masked: bool) -> None:
    """Against a loss taken by hand from the kept positions of the last block."""
    model = entry.build()
    pruned = simba_fx.transform(model, linear(entry), labels="kept")
    call = three_rows(masked)
    labels = call["input_ids"].masked_fill(call.get("attention_mask", torch.ones_like(call["input_ids"])) == 0, IGNORED)
    given = labels.clone()
    output = pruned(**call, labels=labels)
    assert torch.equal(labels, given)
    terms, reached = [], simba_fx.reached(pruned)
    for b, row in enumerate(simba_fx.kept(pruned)[-1].tolist()):
        survivors = {t for t in row if t >= 0}
        assert {t for t in range(37) if reached[b, t]} == survivors
        terms += [(b, t) for t in survivors if t + 1 < 37 and labels[b, t + 1] != IGNORED]
    expected = cross_entropy(torch.stack([output.logits[b, t] for b, t in terms]),
                             torch.stack([labels[b, t + 1] for b, t in terms]))  # fmt: skip
    assert 3 < len(terms) < 60
    assert_close("loss", output.loss, expected, 1e-6)
    everything = simba_fx.transform(model, linear(entry))(**call, labels=labels).loss
    assert abs(everything - output.loss) > 1e-3


@pytest.mark.parametrize("mode", ["blocks", "whole"])
def test_the_loss_of_survivors_compiles(mode: str) -> None:
    torch._dynamo.reset()
    pruned = simba_fx.transform(BY_NAME["mamba"].build(), "linear", labels="kept", compile=mode)
    call = {"input_ids": tokens(1, 3, 40), "labels": tokens(2, 3, 40), "use_cache": False}
    whole = {"fullgraph": True, "dynamic": True} if mode == "whole" else {}
    with torch.no_grad():
        expected = pruned(**call).loss
        assert_close("loss", torch.compile(pruned, backend="aot_eager", **whole)(**call).loss, expected, 1e-5)


def test_the_share_of_labels_that_count_scales_the_number_of_items() -> None:
    """Gradient accumulation sums over micro-batches and divides by all labels of them: a mean stays a mean."""
    pruned = simba_fx.transform(BY_NAME["mamba"].build(), "linear", labels="kept")
    call = {"input_ids": tokens(1, 2, 40), "labels": tokens(2, 2, 40)}
    with torch.no_grad():
        mean = pruned(**call).loss
        summed = pruned(**call, num_items_in_batch=torch.tensor(2 * 39)).loss
        half = pruned(**call, num_items_in_batch=4 * 39).loss
    assert_close("mean of all", summed, mean, 1e-6)
    assert_close("half of a batch twice as large", 2 * half, mean, 1e-6)


def test_labels_that_were_shifted_already() -> None:
    pruned = simba_fx.transform(BY_NAME["mamba"].build(), "linear", labels="kept")
    ids = tokens(1, 2, 40)
    shifted = nn.functional.pad(ids[:, 1:], (0, 1), value=IGNORED)
    with torch.no_grad():
        expected = pruned(input_ids=ids, labels=ids).loss
        assert torch.equal(pruned(input_ids=ids, labels=ids, shift_labels=shifted).loss, expected)


def test_a_loss_set_on_the_model_is_the_one_that_counts_survivors() -> None:
    pruned = simba_fx.transform(BY_NAME["mamba"].build(), "linear", labels="kept")
    seen: list[Tensor] = []
    pruned.loss_function = lambda logits, labels, vocab_size, **_: seen.append(labels) or logits.sum()
    ids = tokens(1, 1, 40)
    pruned(input_ids=ids, labels=ids)
    predicted = (seen[0][0, 1:] != IGNORED).nonzero().flatten().tolist()
    assert predicted == [t for t in range(39) if simba_fx.reached(pruned)[0, t]]
    assert len(predicted) < 20


def test_survivors_are_all_tokens_where_nothing_left() -> None:
    pruned = sparse("mamba", "dense")
    with torch.no_grad():
        pruned(**three_rows(masked=True))
    assert torch.equal(simba_fx.reached(pruned), three_rows(masked=True)["attention_mask"].bool())
    with torch.no_grad():
        pruned(input_ids=tokens(1, 2, 1))
    assert torch.equal(simba_fx.reached(pruned), torch.ones(2, 1, dtype=torch.bool))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            lambda: dense("mamba").backbone,
            "labels='kept' is for models that compute a loss from labels; found MambaModel, which does not. Leave it "
            "out, and mask your own loss with simba_fx.reached(sparse).",
        ),
        (
            lambda: own_model.MyMamba(),
            "labels='kept' changes the loss of a transformers model; expected 'all' for a MyMamba, whose loss is "
            "outside of it. Leave it out, and mask your own loss with simba_fx.reached(sparse).",
        ),
    ],
    ids=["no head", "plain"],
)
def test_models_without_a_loss(model: Any, message: str) -> None:
    with pytest.raises(SimbaError) as refused:
        simba_fx.transform(model(), "linear", labels="kept")
    assert str(refused.value) == message


# --- loops and libraries ---------------------------------------------------------------------------------------------


class Windows(Dataset[dict[str, Tensor]]):
    """Windows of Python source, one byte a token."""

    def __init__(self, count: int, length: int) -> None:
        text = Path(reference.__file__).read_bytes()
        self.windows = [torch.tensor(list(text[i * length : (i + 1) * length])) for i in range(count)]

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.windows[index], "labels": self.windows[index]}


def trained(model: nn.Module, folder: Path, **arguments: Any) -> tuple[Any, list[float]]:
    from transformers import Trainer, TrainingArguments

    settings = TrainingArguments(output_dir=str(folder), per_device_train_batch_size=2, max_steps=3, logging_steps=1,
                                 learning_rate=1e-3, report_to=[], disable_tqdm=True, use_cpu=True, seed=1,
                                 lr_scheduler_type="constant", **arguments)  # fmt: skip
    trainer = Trainer(model=model, args=settings, train_dataset=Windows(8, 96), eval_dataset=Windows(2, 96))
    trainer.train()
    return trainer, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize(
    "arguments", [{}, {"gradient_checkpointing": True}, {"bf16": True}], ids=["float32", "recomputed", "bf16"]
)
def test_the_trainer_fine_tunes_the_trained_checkpoint(tmp_path: Path, arguments: dict[str, Any]) -> None:
    """The same losses and weights as a plain loop over the same batches; what it saves loads as a dense model."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(CHECKPOINT)
    before = copy.deepcopy(model.state_dict())
    trainer, losses = trained(simba_fx.transform(model, "linear"), tmp_path, save_strategy="no", **arguments)
    assert len(losses) == 3

    again = AutoModelForCausalLM.from_pretrained(CHECKPOINT)
    pruned = simba_fx.transform(again, "linear").train()
    optimizer = torch.optim.AdamW(pruned.parameters(), lr=1e-3, weight_decay=0.0)
    for batch, loss in zip(trainer.get_train_dataloader(), losses):
        optimizer.zero_grad()
        with half() if arguments.get("bf16") else contextlib.nullcontext():
            ours = pruned(**{name: batch[name] for name in ("input_ids", "labels")}).loss
        ours.backward()
        torch.nn.utils.clip_grad_norm_(pruned.parameters(), 1.0)
        optimizer.step()
        assert abs(ours.item() - loss) < 2e-3
    moved = max(relative_rms(weight, before[name]) for name, weight in model.state_dict().items())
    assert moved > 1e-3
    for name, weight in model.state_dict().items():
        assert relative_rms(weight, again.state_dict()[name]) < 0.1 * moved, name

    evaluated = trainer.evaluate()["eval_loss"]
    ids = torch.stack(Windows(2, 96).windows)
    with torch.no_grad(), half() if arguments.get("bf16") else contextlib.nullcontext():
        assert abs(trainer.model.eval()(input_ids=ids, labels=ids).loss.item() - evaluated) < 1e-4
    trainer.save_model(str(tmp_path / "saved"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert type(loaded) is type(model)
    assert all(torch.equal(loaded.state_dict()[name], weight) for name, weight in model.state_dict().items())


@every_kind
def test_functional_calls_and_their_gradients(entry: Entry) -> None:
    """`functional_call` runs the model on other weights without setting them; no graph is captured for that."""
    model = simba_fx.transform(entry.build(), linear(entry))
    ids = tokens(1, 2, 32)
    weights = {name: p.detach() * 1.01 for name, p in model.named_parameters()}

    with torch.no_grad():
        model(input_ids=ids, labels=ids)
    before = simba_fx.program(model)
    given = {name: weight.requires_grad_() for name, weight in weights.items()}
    loss = torch.func.functional_call(model, given, (), {"input_ids": ids, "labels": ids}).loss
    found = dict(zip(given, torch.autograd.grad(loss, list(given.values()))))
    other = entry.build()
    other.load_state_dict(weights)
    pruned = simba_fx.transform(other, linear(entry))
    assert_close("loss", loss, pruned(input_ids=ids, labels=ids).loss, 1e-6)
    for name, gradient in gradients(pruned, input_ids=ids).items():
        assert_close(name, found[name], gradient, GRADIENT_TOLERANCE[torch.float32])
    assert simba_fx.program(model) is before


@every_kind
def test_weights_that_were_replaced_are_read(entry: Entry) -> None:
    model, other = entry.build(), dense(entry.name)
    pruned = simba_fx.transform(model, linear(entry), criterion="simba")
    ids = tokens(1, 2, 32)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.1)
        changed = pruned(input_ids=ids).logits
        before = simba_fx.program(pruned)
        pruned.load_state_dict(dict(other.state_dict()), assign=True)
        assert_close("logits", pruned(input_ids=ids).logits, sparse(entry.name, linear(entry))(input_ids=ids).logits,
                     TOLERANCE[torch.float32])  # fmt: skip
        assert not torch.equal(changed, pruned(input_ids=ids).logits)
    assert simba_fx.program(pruned) is before


def test_replaced_weights_are_let_go() -> None:
    """No graph keeps a tensor alive that the model has replaced, not even one captured for another kind of call."""
    import gc
    import weakref

    pruned = simba_fx.transform(BY_NAME["mamba"].build(), "linear")
    ids = tokens(1, 2, 32)
    with torch.no_grad():
        for call in ({}, {"use_cache": False}, three_rows(masked=True)):
            pruned(**({"input_ids": ids} | call))
        old = [weakref.ref(p) for p in pruned.backbone.parameters()]
        pruned.load_state_dict({k: v.clone() for k, v in pruned.state_dict().items()}, assign=True)
        pruned(input_ids=ids)
    gc.collect()
    assert not [ref for ref in old if ref() is not None]
