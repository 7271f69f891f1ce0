"""Run by test_quantised.py, in a process that can import torchao."""

from __future__ import annotations

import copy

import pytest
import torch
from models import (
    BY_NAME,
    CHECKPOINT,
    PER_KIND,
    Entry,
    everything,
    linear,
    logits,
    names,
    three_rows,
    tokens,
)
from reference import TOLERANCE, assert_close
from torch import nn
from torchao.quantization import Int8WeightOnlyConfig, quantize_

import simba_fx

QUANTISED = (*PER_KIND, BY_NAME["jamba"])
every_entry = pytest.mark.parametrize("entry", QUANTISED, ids=names(QUANTISED))


def quantised(model: nn.Module) -> nn.Module:
    """int8 weights in every linear layer but dt_proj, whose weight a Mamba block multiplies by itself."""

    def chosen(module: nn.Module, path: str) -> bool:
        return isinstance(module, nn.Linear) and not path.endswith("dt_proj")

    quantize_(model, Int8WeightOnlyConfig(), filter_fn=chosen)
    return model


def dequantised(model: nn.Module) -> nn.Module:
    """The same numbers in float32."""
    plain = copy.deepcopy(model)
    for module in plain.modules():
        weight = getattr(module, "weight", None)
        if weight is not None and type(weight) is not nn.Parameter:
            module.weight = nn.Parameter(weight.dequantize())
    return plain


@every_entry
def test_everything_kept_is_the_quantised_model(entry: Entry) -> None:
    model = quantised(entry.build())
    kinds = {type(p).__name__ for p in model.parameters()}
    assert "Int8Tensor" in kinds
    pruned = simba_fx.transform(model, everything(entry), kernels="model")
    for masked in (False, True):
        assert_close("logits", logits(pruned, **three_rows(masked)), logits(model, **three_rows(masked)), 1e-5)


@every_entry
def test_a_pruned_quantised_model_is_the_pruned_model_of_its_numbers(entry: Entry) -> None:
    model = quantised(entry.build())
    pruned, expected = simba_fx.transform(model, linear(entry)), simba_fx.transform(dequantised(model), linear(entry))
    call = three_rows(masked=True)
    assert_close("logits", logits(pruned, **call), logits(expected, **call), TOLERANCE[torch.float32])
    assert all(torch.equal(a, b) for a, b in zip(simba_fx.kept(pruned), simba_fx.kept(expected), strict=True))
    assert simba_fx.kept(pruned)[-1].shape[1] < 12
    new = {"input_ids": tokens(1, 2, 30), "max_new_tokens": 6, "do_sample": False}
    assert torch.equal(pruned.generate(**new), expected.generate(**new))


@every_entry
def test_quantising_after_the_transform(entry: Entry) -> None:
    pruned = simba_fx.transform(entry.build(), linear(entry))
    in_float = logits(pruned)
    quantised(pruned)
    expected = simba_fx.transform(quantised(entry.build()), linear(entry))
    assert_close("logits", logits(pruned), logits(expected), 1e-5)
    assert not torch.equal(logits(pruned), in_float)


@every_entry
def test_a_quantised_model_compiles(entry: Entry) -> None:
    torch._dynamo.reset()
    pruned = simba_fx.transform(quantised(entry.build()), linear(entry))
    compiled = torch.compile(pruned, backend="aot_eager")
    assert_close("logits", logits(compiled), logits(pruned), TOLERANCE[torch.float32])
    with torch._dynamo.config.patch(error_on_recompile=True):
        logits(compiled, input_ids=tokens(2, 3, 50))


def test_the_trained_checkpoint_in_int8() -> None:
    """Quantising moves a pruned model's loss as little as the dense one's."""
    from transformers import AutoModelForCausalLM

    text = CHECKPOINT.parent.joinpath("own_model.py").read_bytes()[:1024]
    ids = torch.tensor([list(text)])

    def losses(model: nn.Module) -> tuple[float, float]:
        with torch.no_grad():
            pruned = simba_fx.transform(model, "linear")
            return model(input_ids=ids, labels=ids).loss.item(), pruned(input_ids=ids, labels=ids).loss.item()

    model = AutoModelForCausalLM.from_pretrained(CHECKPOINT)
    whole, pruned = losses(model)
    whole8, pruned8 = losses(quantised(model))
    assert abs(whole8 - whole) < 0.01
    assert abs(pruned8 - pruned) < 0.01
    assert pruned8 != pruned
