"""Families that call the scan functions of others: everything kept, padded, generated, pruned. (What `test_families`
asks of each family is asked of those whose functions these are.)"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from models import VOCABULARY, keep_all, padded, tokens
from torch import nn

import simba_fx

BASE: dict[str, Any] = {"vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 32, "pad_token_id": 0,
                        "num_hidden_layers": 4, "num_attention_heads": 2}  # fmt: skip
GATED: dict[str, Any] = {
    "num_key_value_heads": 1, "head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "linear_key_head_dim": 4, "linear_value_head_dim": 4,
    "layer_types": ["linear_attention", "full_attention", "linear_attention", "linear_attention"],
}  # fmt: skip
LATENT: dict[str, Any] = {
    "num_key_value_heads": 2, "head_dim": 8, "layer_group_size": 2, "first_k_dense_replace": 1, "kv_lora_rank": 8,
    "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8, "n_group": 1, "topk_group": 1,
}  # fmt: skip
EXPERTS: dict[str, Any] = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
SIZES: dict[str, dict[str, Any]] = {
    "Qwen3_5Moe": GATED | EXPERTS | {"num_experts": 4, "shared_expert_intermediate_size": 16},
    "LaraMini": GATED,
    "BailingHybrid": LATENT | EXPERTS | {"num_local_experts": 4},
}


def build(name: str) -> nn.Module:
    cls = getattr(transformers, f"{name}ForCausalLM", None)
    config: Any = getattr(transformers, f"{name}TextConfig", None) or getattr(transformers, f"{name}Config", None)
    if cls is None or config is None:
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    torch.manual_seed(0)
    model: nn.Module = cls(config(**BASE, **SIZES[name])).eval()
    return model


@pytest.mark.parametrize("name", SIZES)
def test_a_relative_of_a_family(name: str) -> None:
    model = build(name)
    everything = simba_fx.transform(model, keep_all(4), kernels="model")
    sparse: Any = simba_fx.transform(model, "linear")
    ids, mask = padded([tokens(1, 20), tokens(2, 15)], [0, 5], [0, 0])
    with torch.no_grad():
        for call in ({"input_ids": ids}, {"input_ids": ids, "attention_mask": mask}):
            real = call.get("attention_mask", torch.ones_like(ids)).bool()
            assert torch.equal(everything(**call).logits[real], model(**call).logits[real])
            said = [m.generate(**call, max_new_tokens=8, do_sample=False) for m in (everything, model)]
            assert torch.equal(*said)
            found = sparse(**call).logits
            alone = sparse(input_ids=ids[:1]).logits
            torch.testing.assert_close(found[:1], alone, rtol=1e-4, atol=1e-5)
        sparse(input_ids=ids)
        assert [held.shape[1] for held in simba_fx.kept(sparse)] == [20, 15, 15, 5]
        assert sparse.generate(input_ids=ids, max_new_tokens=4).shape == (2, 24)
