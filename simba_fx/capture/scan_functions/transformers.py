"""The functions of `transformers.models.*` that a captured model must not run itself: scans, convolutions, fused paths,
and causal masks that attention does not need.

Rows are found by name: every modeling file holds a twin of the same few functions (read in transformers 5.17 to 5.24).
transformers itself is not imported.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from simba_fx.capture.rows import Finish, Linear, Row, StandIn
from simba_fx.capture.scan_functions.delta import delta_rule
from simba_fx.errors import CaptureError
from simba_fx.ops.operands import CausalConv, Operands, SelectiveScan, SSDScan

__all__ = ["OWNERS", "ROWS", "SCANS"]

OWNERS = "transformers.models."


def _selective(u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None,
                  z: Tensor | None = None, delta_bias: Tensor | None = None, delta_softplus: bool = False,
                  return_last_state: bool = False, **_: Any) -> tuple[Operands, Finish]:  # fmt: skip
    dtype = u.dtype  # the torch path of transformers computes the skip and the gate in the promoted dtype
    for other in (D, z):
        dtype = dtype if other is None else torch.promote_types(dtype, other.dtype)

    def finish(y: Tensor, state: Tensor) -> Any:
        return (y.to(dtype), state) if return_last_state else y.to(dtype)

    return SelectiveScan(u, dt, A, B, C, D, z, delta_bias, delta_softplus), finish


def _ssd(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, chunk_size: int, D: Tensor | None = None,
            dt_bias: Tensor | None = None, initial_states: Tensor | None = None, dt_softplus: bool = False,
            dt_limit: tuple[float, float] = (0.0, float("inf")), return_final_states: bool = False,
            z: Tensor | None = None, seq_idx: Tensor | None = None, **_: Any) -> tuple[Operands, Finish]:  # fmt: skip
    if initial_states is not None or seq_idx is not None:
        given = "initial_states" if initial_states is not None else "seq_idx"
        raise CaptureError(
            f"mamba2_chunk_scan was called with {given}; only whole sequences that start from a zero state can be "
            "pruned. Call the model without packed sequences and without a warm cache."
        )

    def finish(y: Tensor, state: Tensor) -> Any:
        return (y.float(), state) if return_final_states else y.float()

    dt_min, dt_max = map(float, dt_limit)
    return SSDScan(x, dt, A, B, C, D, z, dt_bias, dt_softplus, dt_min, dt_max, chunk_size), finish


def _delta(query: Tensor, key: Tensor, value: Tensor, g: Tensor, beta: Tensor, chunk_size: int = 64,
           initial_state: Tensor | None = None, output_final_state: bool = False, use_qk_l2norm_in_kernel: bool = False,
           cu_seqlens: Tensor | None = None, **_: Any) -> tuple[Operands, Finish]:  # fmt: skip
    if initial_state is not None or cu_seqlens is not None:
        given = "initial_state" if initial_state is not None else "cu_seqlens"
        raise CaptureError(
            f"The gated delta rule was called with {given}; only whole sequences that start from a zero state can be "
            "pruned. Call the model without packed sequences and without a warm cache."
        )
    return delta_rule(query, key, value, g, beta, normalised=use_qk_l2norm_in_kernel, scale=None,
                      state=output_final_state, chunk_size=chunk_size)  # fmt: skip


def _conv(x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None,
             seq_idx: Tensor | None = None, **_: Any) -> tuple[Operands, Finish] | None:  # fmt: skip
    if seq_idx is not None or activation not in (None, "silu", "swish"):
        return None
    return CausalConv(x, weight, bias, "none" if activation is None else "silu"), lambda y, _: y


def _absent(_: Any) -> Any:
    """The fused entry points return None where no fused kernel exists: the model then takes its unfused path."""
    return lambda *_, **__: None


def _nothing(_: Any) -> Any:
    """What divides RWKV's weights when it is first called (`refuse_rescaling`: of no more blocks than it divides)."""
    return lambda *_, **__: None


def _causal_mask(create: Callable[..., Any]) -> Callable[..., Any]:
    """No mask where nothing is padded: `scaled_dot_product_attention` then runs causally by itself, as it does outside
    of a trace, and builds no `(L, L)` tensor. Survivors keep their order, so causal stays causal."""
    signature = inspect.signature(create)

    def stand_in(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs).arguments
        config = given["config"]
        plain = all(given.get(name) is None for name in ("attention_mask", *_OVERLAYS))
        if plain and config._attn_implementation == "sdpa" and getattr(config, "is_causal", True):
            return None
        return create(*args, **kwargs)

    return stand_in


_OVERLAYS = ("or_mask_function", "and_mask_function", "block_sequence_ids")


SCANS: dict[str, Row] = {
    "mamba_selective_scan": _selective,
    "mamba2_chunk_scan": _ssd,
    "torch_chunk_gated_delta_rule": _delta,
    "chunk_kimi_delta_attention": _delta,
    "rwkv_linear_attention": Linear("value"),
    "RecurrentGemmaRglru._rnn_scan": Linear("hidden_states"),
    "wrap_chunkwise_arbitrary_sequence_length": Linear("value", shared=True),
}
"""A model with one of these in its modeling file can be transformed."""
ROWS: dict[str, Row] = {
    **SCANS,
    "causal_conv1d_fn": _conv,
    "create_causal_mask": StandIn(_causal_mask, dynamo=False),  # one function of all models, whoever compiles them
    "RwkvModel._rescale_layers": StandIn(_nothing),
    "mamba_inner_fn": StandIn(_absent),
    "mamba2_split_conv1d_scan_combined": StandIn(_absent),
}
