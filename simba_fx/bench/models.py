"""The models that can be named: published sizes with random weights, small ones for tests, or a local checkpoint."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from simba_fx.bench.options import BenchError

Sizes = Callable[[int], dict[str, Any]]
"""Number of blocks -> the config's other arguments."""


def _mamba(width: int, state: int = 16, vocabulary: int = 50280) -> Sizes:
    return lambda _: {"hidden_size": width, "state_size": state, "vocab_size": vocabulary, "expand": 2}


def _mamba2(width: int, head_dim: int = 64, state: int = 128, vocabulary: int = 50288) -> Sizes:
    return lambda _: {
        "hidden_size": width, "num_heads": 2 * width // head_dim, "head_dim": head_dim, "state_size": state,
        "n_groups": 1, "expand": 2, "chunk_size": 256, "vocab_size": vocabulary, "tie_word_embeddings": True,
    }  # fmt: skip


def _bamba(width: int, inner: int, heads: int, head_dim: int = 64, state: int = 128, vocabulary: int = 50288) -> Sizes:
    """Attention at a quarter, a half and three quarters of the depth; an MLP in every block."""
    return lambda layers: {
        "hidden_size": width, "intermediate_size": inner, "num_attention_heads": heads,
        "num_key_value_heads": heads // 4, "mamba_n_heads": 2 * width // head_dim, "mamba_d_head": head_dim,
        "mamba_d_state": state, "mamba_n_groups": 1, "mamba_expand": 2, "mamba_chunk_size": 256,
        "attn_layer_indices": sorted({layers // 4, layers // 2, 3 * layers // 4}), "vocab_size": vocabulary,
        "tie_word_embeddings": True,
    }  # fmt: skip


def _qwen35(
    width: int, inner: int, heads: int, head_dim: int = 128, values: int = 2, vocabulary: int = 248320
) -> Sizes:
    """Gated delta rules, `heads` of keys, `values` times as many of values; attention in every fourth block."""
    return lambda _: {
        "hidden_size": width, "intermediate_size": inner, "linear_num_key_heads": heads,
        "linear_num_value_heads": values * heads, "linear_key_head_dim": head_dim, "linear_value_head_dim": head_dim,
        "num_attention_heads": heads, "num_key_value_heads": heads // 4, "head_dim": 2 * head_dim,
        "vocab_size": vocabulary,
    }  # fmt: skip


NAMED: dict[str, tuple[str, int, Sizes]] = {
    "mamba-130m": ("mamba", 24, _mamba(768)),
    "mamba-370m": ("mamba", 48, _mamba(1024)),
    "mamba-790m": ("mamba", 48, _mamba(1536)),
    "mamba-1.4b": ("mamba", 48, _mamba(2048)),
    "mamba-2.8b": ("mamba", 64, _mamba(2560)),
    "mamba2-130m": ("mamba2", 24, _mamba2(768)),
    "mamba2-370m": ("mamba2", 48, _mamba2(1024)),
    "mamba2-780m": ("mamba2", 48, _mamba2(1536)),
    "mamba2-1.3b": ("mamba2", 48, _mamba2(2048)),
    "mamba2-2.7b": ("mamba2", 64, _mamba2(2560)),
    "bamba-0.9b": ("bamba", 24, _bamba(1536, 4096, 24)),
    "qwen3.5-0.5b": ("qwen3_5_text", 24, _qwen35(1024, 3072, 8, vocabulary=50288)),
    "qwen3.5-9b": ("qwen3_5_text", 32, _qwen35(4096, 12288, 16)),
    "mamba-tiny": ("mamba", 6, _mamba(32, 4, 61)),
    "mamba2-tiny": ("mamba2", 6, _mamba2(32, 16, 8, 61)),
    "bamba-tiny": ("bamba", 6, _bamba(32, 48, 4, 16, 8, 61)),
    "qwen3.5-tiny": ("qwen3_5_text", 6, _qwen35(32, 48, 4, 8, vocabulary=61)),
}
"""Name -> transformers' model type, blocks, other sizes. The sizes of mamba-* and mamba2-* are the published ones,
qwen3.5-9b has transformers' defaults; bamba-0.9b and qwen3.5-0.5b are of those architectures, at moderate sizes of our
own."""


PURE = ("mamba", "mamba2", "falcon_mamba")
"""transformers' model types whose blocks are all alike, a norm and a scan."""


def check_model(name: str, layers: int | None = None) -> str:
    """The model's type in transformers.

    Raises:
        BenchError: `name` is neither one of `NAMED` nor a folder with a config.json, or it has no so few blocks.
    """
    if name not in NAMED and not (Path(name) / "config.json").is_file():
        raise BenchError(
            f"--model expects one of {', '.join(NAMED)}, or a folder with a transformers checkpoint; found {name!r}. "
            "Name one of them, or give the path of a folder that holds a config.json."
        )
    if name in NAMED:
        kind, blocks = NAMED[name][:2]
    else:
        config = json.loads((Path(name) / "config.json").read_text())
        kind, blocks = config["model_type"], config["num_hidden_layers"]
    _fewer(name, blocks, layers)
    return kind


def title(name: str) -> str:
    """What a model is called in the results: a checkpoint by its folder's own name."""
    return name if name in NAMED else Path(name).resolve().name


def build(name: str, device: torch.device, dtype: torch.dtype, layers: int | None = None) -> Any:
    """The causal language model `name`, in eval mode, made on `device` in `dtype`: no float32 copy stands beside it.

    Args:
        layers: number of blocks, fewer than the model has; None: all.
    """
    transformers: Any = importlib.import_module("transformers")
    configs, causal = transformers.AutoConfig, transformers.AutoModelForCausalLM
    if name in NAMED:
        kind, blocks, sizes = NAMED[name]
        blocks = _fewer(name, blocks, layers)
        config = configs.for_model(kind, num_hidden_layers=blocks, **sizes(blocks))
        torch.manual_seed(0)
        with torch.device(device):
            model = causal.from_config(config, dtype=dtype)
    else:
        found = configs.from_pretrained(name).num_hidden_layers
        changes = {} if layers is None else {"num_hidden_layers": _fewer(name, found, layers)}
        model = causal.from_pretrained(name, dtype=dtype, **changes).to(device)
    model.config.use_cache = False  # what is timed is a forward pass; decoding asks for its cache by itself
    model.requires_grad_(False)
    return model.eval()


def _fewer(name: str, blocks: int, layers: int | None) -> int:
    if layers is not None and not 2 <= layers <= blocks:
        raise BenchError(
            f"--layers shortens a model: expected 2 to {blocks} blocks for {name}, found {layers}. Leave it out."
        )
    return layers or blocks


def weights(model: nn.Module) -> int:
    """Parameters, shared ones once."""
    return sum(parameter.numel() for parameter in model.parameters())


def quiet() -> None:
    """transformers' progress bars and advice stay out of the output."""
    logging: Any = importlib.import_module("transformers").logging
    logging.set_verbosity_error()
    logging.disable_progress_bar()
