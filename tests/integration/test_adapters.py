"""Models that were changed: LoRA by PEFT, int8 weights by torchao, dispatch by accelerate, other modules and settings.

A graph holds what a model computed when it was captured. Here the model changes, before the transform and after it.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from models import (
    BY_NAME,
    PER_KIND,
    Entry,
    dense,
    everything,
    linear,
    logits,
    n_blocks,
    names,
    sparse,
    three_rows,
    tokens,
)
from reference import TOLERANCE, assert_close
from torch import Tensor, nn

import simba_fx
from simba_fx.errors import CaptureError
from simba_fx.frontends.transformers import trace

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings(  # PEFT asks transformers by the old name
    "ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"
)

ADAPTED = (BY_NAME["mamba"], BY_NAME["jamba"])
every_adapted = pytest.mark.parametrize("entry", ADAPTED, ids=names(ADAPTED))
every_kind = pytest.mark.parametrize("entry", PER_KIND, ids=names(PER_KIND))


def with_lora(model: nn.Module, seed: int = 1, name: str = "default", **changes: Any) -> Any:
    """LoRA that does something from the start, the same at every call."""
    torch.manual_seed(seed)
    config = peft.LoraConfig(r=3, target_modules=["in_proj", "x_proj"], init_lora_weights=False, **changes)
    return peft.get_peft_model(model, config, adapter_name=name)


# --- LoRA ------------------------------------------------------------------------------------------------------------


@every_adapted
def test_lora_before_the_transform(entry: Entry) -> None:
    adapted = with_lora(entry.build())
    pruned = simba_fx.transform(adapted, everything(entry), kernels="model")
    assert isinstance(pruned, peft.PeftModel)
    for call in (three_rows(False), three_rows(True)):
        assert torch.equal(logits(pruned, **call), logits(adapted, **call))
    assert not torch.equal(logits(pruned), logits(dense(entry.name)))
    new = {"input_ids": tokens(1, 2, 30), "max_new_tokens": 6, "do_sample": False}
    assert torch.equal(pruned.generate(**new), adapted.generate(**new))


@every_adapted
def test_lora_after_the_transform(entry: Entry) -> None:
    adapted = with_lora(simba_fx.transform(entry.build(), everything(entry), kernels="model"))
    expected = with_lora(entry.build())
    for call in (three_rows(False), three_rows(True)):
        assert torch.equal(logits(adapted, **call), logits(expected, **call))
    assert len(simba_fx.kept(adapted)) == n_blocks(dense(entry.name))


@every_kind
def test_the_dense_model_stays_without_the_adapter(entry: Entry) -> None:
    model = entry.build()
    before = logits(model)
    adapted = with_lora(simba_fx.transform(model, everything(entry), kernels="model"))
    assert not torch.equal(logits(adapted), before)
    assert_close("dense", logits(model), before, 1e-5)  # its weights are frozen now: rounding, by torch's other kernels
    assert not any("lora" in name for name, _ in model.named_parameters())


@every_adapted
def test_adapters_switched_off_and_on_merged_and_exchanged(entry: Entry) -> None:
    """Every change that PEFT makes with the model's weights untouched, or behind the graph's back."""
    model = entry.build()
    adapted = with_lora(simba_fx.transform(model, everything(entry), kernels="model"))
    expected = with_lora(entry.build())
    on = logits(expected)
    assert torch.equal(logits(adapted), on)
    with adapted.disable_adapter():
        assert torch.equal(logits(adapted), logits(model))
    assert torch.equal(logits(adapted), on)
    for model in (adapted, expected):
        torch.manual_seed(5)
        model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["in_proj"], init_lora_weights=False))
        model.set_adapter("other")
    assert torch.equal(logits(adapted), logits(expected))
    assert not torch.equal(logits(adapted), on)
    for model in (adapted, expected):
        model.set_adapter("default")
        model.merge_adapter()
    assert torch.equal(logits(adapted), logits(expected))
    for model in (adapted, expected):
        model.unmerge_adapter()
    assert_close("unmerged", logits(adapted), on, 1e-5)
    alone = adapted.merge_and_unload()
    assert_close("unloaded", logits(alone), on, 1e-5)
    assert len(simba_fx.kept(alone)) == n_blocks(alone)


@every_kind
def test_toggling_an_adapter_captures_once_per_state(entry: Entry, monkeypatch: pytest.MonkeyPatch) -> None:
    adapted = with_lora(simba_fx.transform(entry.build(), linear(entry)))
    logits(adapted)
    with adapted.disable_adapter():
        logits(adapted)
    monkeypatch.setattr(trace, "capture_graph", None)  # from here on, capturing is an error
    for _ in range(3):
        on = logits(adapted)
        with adapted.disable_adapter():
            assert not torch.equal(logits(adapted), on)


@every_adapted
def test_only_the_adapter_learns_and_it_learns_the_same(entry: Entry) -> None:
    """LoRA before or after the transform, recomputed or not: the same gradients, of the adapter alone."""
    call = {"input_ids": tokens(1, 2, 40), "labels": tokens(1, 2, 40), "use_cache": False}

    def gradients(model: Any) -> dict[str, Tensor]:
        model.train()
        model(**call).loss.backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    before = gradients(simba_fx.transform(with_lora(entry.build()), linear(entry)))
    after = gradients(with_lora(simba_fx.transform(entry.build(), linear(entry))))
    assert before.keys() == after.keys()
    assert all("lora" in name for name in before)
    assert all(torch.equal(before[name], after[name]) for name in before)

    recomputing = with_lora(simba_fx.transform(entry.build(), linear(entry)))
    for layer in recomputing.base_model.model.base_model.layers:
        layer.gradient_checkpointing = True
    again = gradients(recomputing)
    assert all(torch.equal(before[name], again[name]) for name in before)

    dense_gradients = gradients(with_lora(entry.build()))
    whole = gradients(simba_fx.transform(with_lora(entry.build()), everything(entry), kernels="model"))
    assert all(torch.equal(whole[name], dense_gradients[name]) for name in dense_gradients)


def test_dropout_of_an_adapter_follows_the_mode() -> None:
    adapted = with_lora(simba_fx.transform(BY_NAME["mamba"].build(), "linear"), lora_dropout=0.5)
    adapted.eval()
    assert torch.equal(logits(adapted), logits(adapted))
    adapted.train()
    assert not torch.equal(logits(adapted), logits(adapted))
    adapted.eval()
    assert torch.equal(logits(adapted), logits(adapted))


def test_an_adapter_is_saved_and_loaded(tmp_path: Path) -> None:
    adapted = with_lora(simba_fx.transform(BY_NAME["mamba"].build(), "linear"))
    adapted.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(simba_fx.transform(BY_NAME["mamba"].build(), "linear"), tmp_path)
    assert torch.equal(logits(again), logits(adapted))


@every_kind
def test_an_adapted_model_compiles(entry: Entry) -> None:
    torch._dynamo.reset()
    adapted = simba_fx.transform(with_lora(entry.build()), linear(entry))
    compiled = torch.compile(adapted, backend="aot_eager")
    assert_close("logits", logits(compiled), logits(adapted), TOLERANCE[torch.float32])
    with torch._dynamo.config.patch(error_on_recompile=True):
        logits(compiled, input_ids=tokens(2, 3, 50))


# --- what else may change --------------------------------------------------------------------------------------------


def test_a_module_that_is_exchanged_is_captured_anew() -> None:
    model = BY_NAME["mamba"].build()
    pruned = simba_fx.transform(model, everything(BY_NAME["mamba"]), kernels="model")
    logits(pruned)
    for either in (model, pruned):
        mixer = either.backbone.layers[1].mixer
        old = mixer.out_proj
        mixer.out_proj = nn.Sequential(nn.Linear(old.in_features, 5), nn.Linear(5, old.out_features))
        torch.manual_seed(3)
        for p in mixer.out_proj.parameters():
            nn.init.normal_(p, std=0.3)
    assert torch.equal(logits(pruned), logits(model))
    assert not torch.equal(logits(pruned), logits(dense("mamba")))


def test_a_setting_that_is_changed_is_read() -> None:
    model = BY_NAME["mamba"].build()
    pruned = simba_fx.transform(model, everything(BY_NAME["mamba"]), kernels="model")
    logits(pruned)
    for either in (model, pruned):
        either.backbone.layers[2].norm.variance_epsilon = 0.3
    assert torch.equal(logits(pruned), logits(model))
    assert not torch.equal(logits(pruned), logits(dense("mamba")))


def test_modules_that_change_at_every_call_are_warned_of() -> None:
    pruned = simba_fx.transform(BY_NAME["mamba"].build(), "linear")
    pruned.backbone.layers[1].calls = 0
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        for call in range(10):
            pruned.backbone.layers[1].calls = call
            logits(pruned)
    (told, *_) = [str(warning.message) for warning in caught if "captured" in str(warning.message)]
    assert told == (
        "MambaModel was captured 9 times for calls of one kind, because its modules changed in between (the last time: "
        "calls of layers.1 (MambaBlock)). Each capture takes seconds; keep what changes at every call out of the "
        "modules' attributes."
    )


def test_hooks_of_a_copy_do_not_need_the_original() -> None:
    """Hooks that a module registered on itself are the copy's own."""
    model = BY_NAME["mamba"].build()
    seen: list[nn.Module] = []
    model.backbone.register_load_state_dict_pre_hook(lambda module, *_: seen.append(module))
    pruned = simba_fx.transform(model, "linear")
    weights = {name: weight.clone() for name, weight in pruned.state_dict().items()}
    del model
    pruned.load_state_dict(weights)
    assert seen == [pruned.backbone]


def test_a_forward_that_was_replaced_on_the_object() -> None:
    model = BY_NAME["mamba"].build()
    model.backbone.forward = model.backbone.forward
    with pytest.raises(CaptureError) as refused:
        simba_fx.transform(model, "linear")
    assert str(refused.value) == (
        "The forward of backbone (MambaModel) was replaced on the object; expected the forward of its class, because "
        "graphs are captured from a copy of the model. Transform the model first, and then apply what replaces it."
    )


def test_a_method_that_was_put_on_a_block_goes_with_the_copy() -> None:
    import types

    model = BY_NAME["mamba"].build()

    def louder(self: Any, hidden: Tensor) -> Tensor:
        return 2 * type(self).forward(self, hidden)

    norm = model.backbone.layers[1].norm
    norm.forward = types.MethodType(louder, norm)
    pruned = simba_fx.transform(model, everything(BY_NAME["mamba"]), kernels="model")
    assert torch.equal(logits(pruned), logits(model))
    assert pruned.backbone.layers[1].norm.forward.__self__ is pruned.backbone.layers[1].norm


# --- accelerate ------------------------------------------------------------------------------------------------------


REFUSED = (
    "embeddings is dispatched by accelerate (AlignDevicesHook): its weights or inputs move between devices around each "
    "module. Expected the block stack on one device: load with device_map={'': device}, or spread it with "
    "torch.distributed.fsdp.fully_shard after simba_fx.transform."
)


def offloaded(model: nn.Module, folder: Path) -> nn.Module:
    from accelerate import disk_offload

    disk_offload(model, str(folder), execution_device=torch.device("cpu"))
    return model


def test_a_dispatched_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CaptureError) as refused:
        simba_fx.transform(offloaded(BY_NAME["mamba"].build(), tmp_path), "linear")
    assert str(refused.value) == REFUSED


def test_a_sparse_model_that_is_dispatched_later_is_refused(tmp_path: Path) -> None:
    pruned = simba_fx.transform(BY_NAME["mamba"].build(), "linear")
    with torch.no_grad():
        pruned(input_ids=tokens(1, 1, 24))
    offloaded(pruned, tmp_path)
    with pytest.raises(CaptureError) as refused, torch.no_grad():
        pruned(input_ids=tokens(1, 1, 24))
    assert str(refused.value) == REFUSED


def test_a_model_loaded_onto_one_device_works(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    dense("mamba").save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, device_map={"": "cpu"})
    expected = logits(sparse("mamba", "linear"))
    assert_close("logits", logits(simba_fx.transform(model, "linear", criterion="simba")), expected, 1e-6)
