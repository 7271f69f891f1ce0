"""The registry of model families that every whole-model test runs over: tiny, random, seeded, in eval mode.

Adding a family later is one entry of `REGISTRY`. The weights are drawn so that scores discriminate: decays, step
sizes and embeddings differ widely between channels and tokens, hence kept sets that differ from any simple rule.
"""

from __future__ import annotations

import functools
import inspect
import math
import sys
import types
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import plain_transformers  # noqa: F401  # before the modeling files
import torch
import transformers
from torch import Tensor, nn
from transformers import (
    BambaConfig,
    BambaForCausalLM,
    FalconH1Config,
    FalconH1ForCausalLM,
    FalconMambaConfig,
    FalconMambaForCausalLM,
    GraniteMoeHybridConfig,
    GraniteMoeHybridForCausalLM,
    JambaConfig,
    JambaForCausalLM,
    KimiLinearConfig,
    KimiLinearForCausalLM,
    Mamba2Config,
    Mamba2ForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MambaModel,
    MiniMaxConfig,
    MiniMaxForCausalLM,
    NemotronHConfig,
    NemotronHForCausalLM,
    OlmoHybridConfig,
    OlmoHybridForCausalLM,
    Qwen3_5ForCausalLM,
    Qwen3_5TextConfig,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
    Zamba2Config,
    Zamba2ForCausalLM,
    ZambaConfig,
    ZambaForCausalLM,
)
from transformers.models.bamba import modeling_bamba
from transformers.models.falcon_h1 import modeling_falcon_h1
from transformers.models.falcon_mamba import modeling_falcon_mamba
from transformers.models.granitemoehybrid import modeling_granitemoehybrid
from transformers.models.jamba import modeling_jamba
from transformers.models.kimi_linear import modeling_kimi_linear
from transformers.models.mamba import modeling_mamba
from transformers.models.mamba2 import modeling_mamba2
from transformers.models.minimax import modeling_minimax
from transformers.models.nemotron_h import modeling_nemotron_h
from transformers.models.olmo_hybrid import modeling_olmo_hybrid
from transformers.models.qwen3_5 import modeling_qwen3_5
from transformers.models.qwen3_next import modeling_qwen3_next
from transformers.models.zamba import modeling_zamba
from transformers.models.zamba2 import modeling_zamba2

VOCABULARY = 53  # a prime, so that no other size of a model equals it by accident
CACHE = next(name for name in ("cache", "cache_params") if name in inspect.signature(MambaModel.forward).parameters)
"""What a pure Mamba's cache argument is called: `cache` from transformers 5.24 on."""
CHECKPOINT = Path(__file__).resolve().parents[2] / "examples" / "mamba-py-3m"


@dataclass(frozen=True)
class Entry:
    """One model of the registry."""

    name: str
    make: Callable[[], nn.Module]
    kind: str  # "selective" (Mamba-1's scan), "ssd" (Mamba-2's) or "delta" (gated delta rules)
    modeling: types.ModuleType  # the module whose functions run the scan
    backbone: str = "backbone"  # path from the model to the module that holds the blocks
    dtype: torch.dtype = torch.float32
    seed: int = 0

    @property
    def title(self) -> str:
        """Of its family, in the table of capabilities."""
        return f"transformers `{self.modeling.__name__.split('.')[-2]}`"

    def build(self) -> nn.Module:
        """A fresh model: the same weights at every call, which it shares with no other; but what was captured of one
        serves the next, as long as that looks the same (`simba_fx.runtime.captures`)."""
        from simba_fx.runtime import captures

        captures.MOST = 100  # of all tests of a family: a user's model is called in fewer ways
        model = self.make()
        randomise(model, self.seed)
        captures.share(getattr(model, "base_model", model), _stores.setdefault(self.name, {}))
        return model.to(self.dtype).eval()


_stores: dict[str, Any] = {}


def randomise(model: nn.Module, seed: int) -> None:
    """Draws every parameter of `model` by its role, from one seed."""
    generator = torch.Generator().manual_seed(seed)

    def normal(p: Tensor, std: float, mean: float = 0.0) -> Tensor:
        return torch.randn(p.shape, generator=generator) * std + mean

    def log_uniform(p: Tensor, low: float, high: float) -> Tensor:
        return torch.exp(torch.rand(p.shape, generator=generator) * math.log(high / low) + math.log(low))

    with torch.no_grad():
        for name, p in model.named_parameters():
            role = ".".join(name.rsplit(".", 2)[-2:])
            if name.endswith("A_log"):  # time constants from a few tokens to hundreds
                value = log_uniform(p, 0.1, 4.0).log()
            elif name.endswith(("dt_bias", "dt_proj.bias", "dt_proj_bias")):  # inverse softplus of the step size
                step = log_uniform(p, 0.01, 0.3)
                value = step + torch.log(-torch.expm1(-step))
            elif p.ndim == 1 and "norm" in role:
                value = normal(p, 0.2, mean=1.0)
            elif p.ndim == 1:  # D and the other biases
                value = normal(p, 0.5)
            elif "embed" in role:
                value = normal(p, 1.0)
            elif "out_proj" in role:  # blocks that speak louder than the embedding, else greedy decoding repeats itself
                value = normal(p, 2 * p.shape[-1] ** -0.5)
            elif "conv1d" in role:
                value = normal(p, 0.6)
            else:  # projections: unit gain
                value = normal(p, p.shape[-1] ** -0.5)
            p.copy_(value)


_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "conv_kernel": 4,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": None,
    "use_cache": True,
    "tie_word_embeddings": False,  # tied, the random models only repeat their input
}


def _mamba(**changes: Any) -> nn.Module:
    sizes = {"hidden_size": 20, "state_size": 4, "num_hidden_layers": 4, "expand": 2, "time_step_rank": 3}
    return MambaForCausalLM(MambaConfig(**(_COMMON | sizes | changes)))


def _falcon_mamba(**changes: Any) -> nn.Module:
    sizes = {"hidden_size": 18, "state_size": 5, "num_hidden_layers": 3, "expand": 2, "time_step_rank": 4}
    return FalconMambaForCausalLM(FalconMambaConfig(**(_COMMON | sizes | changes)))


def _mamba2(**changes: Any) -> nn.Module:
    sizes = {
        "hidden_size": 16,
        "state_size": 6,
        "num_hidden_layers": 4,
        "expand": 2,
        "num_heads": 4,
        "head_dim": 8,
        "chunk_size": 8,
    }
    return Mamba2ForCausalLM(Mamba2Config(**(_COMMON | sizes | changes)))


# Hybrids. Widths differ from one another wherever a family allows it.

_HYBRID: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": None,
    "use_cache": True,
    "tie_word_embeddings": False,
}
_SELECTIVE: dict[str, Any] = {"mamba_d_state": 5, "mamba_d_conv": 4, "mamba_expand": 2, "mamba_dt_rank": 3}
_SSD: dict[str, Any] = {"mamba_n_heads": 4, "mamba_d_head": 8, "mamba_n_groups": 2, "mamba_d_state": 6,
                        "mamba_d_conv": 4, "mamba_expand": 2, "mamba_chunk_size": 8}  # fmt: skip


def _hybrid(model: type[nn.Module], config: Any, *sizes: dict[str, Any], experts: str | None = None) -> nn.Module:
    merged: dict[str, Any] = functools.reduce(lambda a, b: a | b, (_HYBRID, *sizes))
    made = model(config(**merged))
    if experts is not None:
        made.set_experts_implementation(experts)
    return made


def _jamba(**changes: Any) -> nn.Module:
    """Attention at block 1, experts at every second block."""
    sizes = {"num_hidden_layers": 4, "attn_layer_period": 3, "attn_layer_offset": 1, "expert_layer_period": 2,
             "expert_layer_offset": 1, "num_experts": 4, "num_experts_per_tok": 2}  # fmt: skip
    experts = changes.pop("experts", "grouped_mm")
    return _hybrid(JambaForCausalLM, JambaConfig, _SELECTIVE, sizes, changes, experts=experts)


def _bamba(**changes: Any) -> nn.Module:
    sizes = {"num_hidden_layers": 4, "attn_layer_indices": [1]}
    return _hybrid(BambaForCausalLM, BambaConfig, _SSD, sizes, changes)


def _zamba(**changes: Any) -> nn.Module:
    """Two scans per block; one attention block's weights are shared by two blocks."""
    sizes = {"num_hidden_layers": 5, "attention_hidden_size": 32, "num_key_value_heads": 4, "n_mamba_heads": 2,
             "attn_layer_period": 2, "attn_layer_offset": 1}  # fmt: skip
    return _hybrid(ZambaForCausalLM, ZambaConfig, _SELECTIVE, sizes, changes)


def _zamba2(**changes: Any) -> nn.Module:
    sizes = {"num_hidden_layers": 4, "num_key_value_heads": 4, "n_mamba_heads": 4, "mamba_headdim": 8,
             "mamba_ngroups": 2, "mamba_d_state": 6, "mamba_d_conv": 4, "mamba_expand": 2, "chunk_size": 8,
             "num_mem_blocks": 1, "use_mem_rope": True, "use_shared_attention_adapter": True, "adapter_rank": 3,
             "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"]}  # fmt: skip
    return _hybrid(Zamba2ForCausalLM, Zamba2Config, sizes, changes)


def _falcon_h1(**changes: Any) -> nn.Module:
    """Attention and scan side by side in each block; embeddings scaled where the model looks them up."""
    sizes = {"num_hidden_layers": 4, "mamba_d_ssm": 32, "embedding_multiplier": 1.7, "mamba_rms_norm": True,
             "ssm_out_multiplier": 0.8, "attention_out_multiplier": 1.2}  # fmt: skip
    return _hybrid(FalconH1ForCausalLM, FalconH1Config, _SSD, sizes, changes)


def _nemotron_h(**changes: Any) -> nn.Module:
    """Two blocks without a scan: attention, experts."""
    sizes = {"layers_block_type": ["mamba", "attention", "mamba", "moe", "mamba"], "head_dim": 4, "mamba_num_heads": 4,
             "mamba_head_dim": 8, "n_groups": 2, "ssm_state_size": 6, "conv_kernel": 4, "chunk_size": 8,
             "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
             "moe_shared_expert_intermediate_size": 16}  # fmt: skip
    experts = changes.pop("experts", "grouped_mm")
    return _hybrid(NemotronHForCausalLM, NemotronHConfig, sizes, changes, experts=experts)


def _granite(**changes: Any) -> nn.Module:
    sizes = {"num_hidden_layers": 4, "layer_types": ["mamba", "attention", "mamba", "mamba"], "num_local_experts": 4,
             "num_experts_per_tok": 2, "shared_intermediate_size": 12, "position_embedding_type": "rope",
             "embedding_multiplier": 1.5, "residual_multiplier": 0.7}  # fmt: skip
    experts = changes.pop("experts", "batched_mm")
    return _hybrid(GraniteMoeHybridForCausalLM, GraniteMoeHybridConfig, _SSD, sizes, changes, experts=experts)


_DELTA: dict[str, Any] = {"num_hidden_layers": 4, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
                          "linear_key_head_dim": 8, "linear_value_head_dim": 6, "linear_conv_kernel_dim": 4,
                          "layer_types": ["linear_attention", "full_attention", "linear_attention",
                                          "linear_attention"]}  # fmt: skip


def _qwen3_next(**changes: Any) -> nn.Module:
    """Experts in every block."""
    sizes = {"head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
             "shared_expert_intermediate_size": 16}  # fmt: skip
    experts = changes.pop("experts", "grouped_mm")
    return _hybrid(Qwen3NextForCausalLM, Qwen3NextConfig, _DELTA, sizes, changes, experts=experts)


def _qwen3_5(**changes: Any) -> nn.Module:
    return _hybrid(Qwen3_5ForCausalLM, Qwen3_5TextConfig, _DELTA, {"head_dim": 8}, changes)


def _olmo_hybrid(**changes: Any) -> nn.Module:
    return _hybrid(OlmoHybridForCausalLM, OlmoHybridConfig, _DELTA, changes)


def _kimi_linear(**changes: Any) -> nn.Module:
    """A decay for each key channel; attention over latent keys; experts but in the first block."""
    sizes = {"num_key_value_heads": 4, "kv_lora_rank": 10, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8,
             "v_head_dim": 6,
             "num_experts": 4, "num_experts_per_token": 2, "moe_intermediate_size": 16, "linear_head_dim": 8,
             "linear_num_heads": 2, "num_expert_group": 1, "topk_group": 1, "layer_types": _DELTA["layer_types"],
             "num_hidden_layers": 4}  # fmt: skip
    experts = changes.pop("experts", "grouped_mm")
    return _hybrid(KimiLinearForCausalLM, KimiLinearConfig, sizes, changes, experts=experts)


def _minimax(**changes: Any) -> nn.Module:
    """Lightning attention, whose states are in a cache of the model's own; experts in every block."""
    sizes = {"num_hidden_layers": 5, "head_dim": 8, "block_size": 16, "num_local_experts": 4, "num_experts_per_tok": 2,
             "layer_types": ["full_attention", *["linear_attention"] * 2, "full_attention", "linear_attention"],
             }  # fmt: skip
    experts = changes.pop("experts", "grouped_mm")
    return _hybrid(MiniMaxForCausalLM, MiniMaxConfig, sizes, changes, experts=experts)


_GATED: dict[str, Any] = _DELTA | {"head_dim": 8}
_LATENT: dict[str, Any] = {
    "num_hidden_layers": 4, "head_dim": 8, "layer_group_size": 2, "first_k_dense_replace": 1, "kv_lora_rank": 8,
    "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8, "n_group": 1, "topk_group": 1,
    "num_key_value_heads": 4,
}  # fmt: skip
_EXPERTS: dict[str, Any] = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}


def _relative(name: str, sizes: dict[str, Any], seed: int) -> Iterator[Entry]:
    """A family of delta rules, if transformers has it."""
    cls = getattr(transformers, f"{name}ForCausalLM", None)
    config = getattr(transformers, f"{name}TextConfig", None) or getattr(transformers, f"{name}Config", None)
    if cls is not None and config is not None:
        experts = "grouped_mm" if _EXPERTS.keys() <= sizes.keys() else None
        make = functools.partial(_hybrid, cls, config, sizes, experts=experts)
        modeling = sys.modules[cls.__module__]
        yield Entry(modeling.__name__.split(".")[-2].replace("_", "-"), make, "delta", modeling, seed=seed)


REGISTRY: tuple[Entry, ...] = (
    Entry("mamba", _mamba, "selective", modeling_mamba),
    Entry(
        "mamba-residual-in-own-dtype",
        functools.partial(
            _mamba, residual_in_fp32=False, tie_word_embeddings=True, num_hidden_layers=5, hidden_size=16
        ),
        "selective",
        modeling_mamba,
        seed=1,
    ),
    Entry("falcon-mamba", _falcon_mamba, "selective", modeling_falcon_mamba, seed=2),
    Entry("mamba2-one-group", functools.partial(_mamba2, n_groups=1), "ssd", modeling_mamba2, seed=3),
    Entry(
        "mamba2-two-groups",
        functools.partial(_mamba2, n_groups=2, num_hidden_layers=3, chunk_size=16, residual_in_fp32=False),
        "ssd",
        modeling_mamba2,
        seed=4,
    ),
    Entry("mamba-bf16", _mamba, "selective", modeling_mamba, dtype=torch.bfloat16, seed=5),
    Entry("mamba2-bf16", functools.partial(_mamba2, n_groups=2), "ssd", modeling_mamba2, dtype=torch.bfloat16, seed=6),
)
FLOAT32: tuple[Entry, ...] = tuple(entry for entry in REGISTRY if entry.dtype is torch.float32)
HYBRIDS: tuple[Entry, ...] = (
    Entry("jamba", _jamba, "selective", modeling_jamba, seed=10),
    Entry("bamba", _bamba, "ssd", modeling_bamba, seed=11),
    Entry("zamba", _zamba, "selective", modeling_zamba, seed=12),
    Entry("zamba2", _zamba2, "ssd", modeling_zamba2, seed=13),
    Entry("falcon-h1", _falcon_h1, "ssd", modeling_falcon_h1, seed=14),
    Entry("nemotron-h", _nemotron_h, "ssd", modeling_nemotron_h, seed=15),
    Entry("granite-hybrid", _granite, "ssd", modeling_granitemoehybrid, seed=16),
)
DELTA_RULES: tuple[Entry, ...] = (
    Entry("qwen3-next", _qwen3_next, "delta", modeling_qwen3_next, seed=17),
    Entry("qwen3-5", _qwen3_5, "delta", modeling_qwen3_5, seed=18),
    Entry("olmo-hybrid", _olmo_hybrid, "delta", modeling_olmo_hybrid, seed=19),
    Entry("kimi-linear", _kimi_linear, "delta", modeling_kimi_linear, seed=20),
)
"""Gated delta rules and attention in turns."""
MINIMAX = Entry("minimax", _minimax, "ssd", modeling_minimax, seed=21)
"""Its cache has no static kind, moves no rows for beams, does not continue."""
RELATIVES: tuple[Entry, ...] = (
    *_relative("Qwen3_5Moe", _GATED | _EXPERTS | {"num_experts": 4, "shared_expert_intermediate_size": 16}, seed=22),
    *_relative("BailingHybrid", _LATENT | _EXPERTS | {"num_local_experts": 4}, seed=23),
    *_relative("LaraMini", _GATED, seed=24),
    MINIMAX,
)
"""Those whose scan functions are others', as far as this transformers has them, and MiniMax (test_relatives)."""
BY_NAME: dict[str, Entry] = {entry.name: entry for entry in (*REGISTRY, *HYBRIDS, *DELTA_RULES, *RELATIVES)}
# For tests that need many captures: one float32 entry per modeling file, and one per kind of scan.
PER_FAMILY: tuple[Entry, ...] = tuple({entry.modeling: entry for entry in FLOAT32}.values())
FAMILIES: tuple[Entry, ...] = (*PER_FAMILY, *HYBRIDS, *DELTA_RULES)
SPREAD: tuple[Entry, ...] = tuple(entry for entry in FAMILIES if entry.name in (
    "mamba-residual-in-own-dtype", "mamba2-two-groups", "jamba", "zamba", "falcon-h1", "qwen3-next", "kimi-linear"
))  # fmt: skip
"""One of each build: scans alone, attention and experts in turns, a shared block, both side by side, delta rules."""
PER_KIND: tuple[Entry, ...] = (BY_NAME["mamba"], BY_NAME["mamba2-two-groups"])


def names(entries: Iterable[Entry]) -> list[str]:
    """The test ids of `entries`."""
    return [entry.name for entry in entries]


def n_blocks(model: nn.Module) -> int:
    return len(model.base_model.layers)


@functools.cache
def dense(name: str) -> nn.Module:
    """The registry's model `name`, built once. For tests that change no weight."""
    return BY_NAME[name].build()


@functools.cache
def sparse(name: str, schedule: Any, **options: Any) -> nn.Module:
    """`dense(name)` transformed, once per schedule and options: every new graph costs a capture.

    By the paper's criterion unless told otherwise: the eager reference knows no ranks.
    """
    import simba_fx

    return simba_fx.transform(dense(name), schedule, **{"criterion": "simba", **options})


def keep_all(blocks: int) -> tuple[Fraction, ...]:
    """Shares that shrink at every block and still keep every token of any input shorter than 10**6/blocks.

    Equal consecutive shares would insert no cut; with these the score, select and gather nodes are all there.
    """
    return tuple(1 - Fraction(i, 10**6) for i in range(blocks))


def tokens(seed: int, *shape: int, vocabulary: int = VOCABULARY) -> Tensor:
    """Random token ids of `shape`, from a seed; never 0, which `generate` takes for a pad when no mask is given."""
    return torch.randint(1, vocabulary, shape, generator=torch.Generator().manual_seed(seed))


def padded(rows: Sequence[Tensor], left: Sequence[int], right: Sequence[int], fill: int = 7) -> tuple[Tensor, Tensor]:
    """Rows of ids, each with its own pads on both sides, as `(B, L)` ids and a `(B, L)` int64 mask of the real ones.

    Pads hold `fill`, an ordinary token: nothing but the mask says which positions are real.
    """
    length = max(a + len(row) + b for row, a, b in zip(rows, left, right))
    ids = torch.full((len(rows), length), fill)
    mask = torch.zeros((len(rows), length), dtype=torch.int64)
    for b, (row, before, after) in enumerate(zip(rows, left, right)):
        start = before + (length - before - len(row) - after)  # what is missing to the rectangle goes to the left
        ids[b, start : start + len(row)] = row
        mask[b, start : start + len(row)] = 1
    return ids, mask


def three_rows(masked: bool) -> dict[str, Tensor]:
    """Three rows of 37; masked: one padded on the left, one on the right, one whole."""
    if not masked:
        return {"input_ids": tokens(1, 3, 37)}
    ids, mask = padded([tokens(1, 37), tokens(2, 30), tokens(3, 33)], [0, 7, 0], [0, 0, 4])
    return {"input_ids": ids, "attention_mask": mask}


def schedules(blocks: int) -> dict[str, tuple[Fraction, ...]]:
    """A few schedules of different shapes, by name: tests share their graphs (see `sparse`)."""
    half = blocks // 2
    return {
        "linear": tuple(1 - Fraction(9, 10) * Fraction(i, blocks - 1) for i in range(blocks)),
        "steep": tuple(Fraction(3, 5) ** i for i in range(blocks)),
        "stairs": (Fraction(1),) + (Fraction(7, 9),) * (half - 1) + (Fraction(2, 7),) * (blocks - half),
    }


def linear(entry: Entry) -> tuple[Fraction, ...]:
    """The schedule "linear" for a model of the registry."""
    return schedules(n_blocks(dense(entry.name)))["linear"]


def everything(entry: Entry) -> tuple[Fraction, ...]:
    """`keep_all` for a model of the registry."""
    return keep_all(n_blocks(dense(entry.name)))


def logits(model: nn.Module, **call: Any) -> Tensor:
    """Of a call without gradients; by default of two rows of 37 tokens."""
    with torch.no_grad():
        found: Tensor = model(**(call or {"input_ids": tokens(1, 2, 37)})).logits
    return found
