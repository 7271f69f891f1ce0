"""Lightning attention of transformers' MiniMax, whose forward holds the recurrence between its projections (read in
transformers 5.17 to 5.24).

While such a model is captured, `forward` below stands for that method: the same computation, in which the recurrence is
a function that can be lifted. Lightning attention (Qin et al. 2024) is the scan of Mamba-2 with steps of 1 and one
fixed decay for each head.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from simba_fx.capture.rows import Finish, Row, StandIn
from simba_fx.ops.operands import Operands, SSDScan

__all__ = ["OWNERS", "ROWS", "lightning_attention"]

OWNERS = ("transformers.models.minimax.", __name__)


def lightning_attention(
    q: Tensor, k: Tensor, v: Tensor, slope_rate: Tensor, query_decay: Tensor, key_decay: Tensor,
    diagonal_decay: Tensor, block_size: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As transformers computes it, bit for bit.

    Args:
        q, k, v: `(B, H, L, K)`.
        slope_rate: `(H, 1, 1)`, by how much a head's state decays at each token; the other three are powers of it.

    Returns:
        y `(B, H, L, K)`; the last state `(B, H, K, K)`, keys first.
    """
    state = v.new_zeros(*v.shape[:2], k.shape[3], v.shape[3])
    found = []
    for q_block, k_block, v_block in zip(*(torch.split(x, block_size, 2) for x in (q, k, v))):
        size = q_block.shape[2]
        inside = torch.matmul(q_block, k_block.transpose(-1, -2)) * diagonal_decay[:, :, :size, :size]
        before = torch.matmul(q_block * query_decay[:, :size], state)
        found.append(before + torch.matmul(inside, v_block))
        new = torch.matmul((k_block * key_decay[:, -size:]).transpose(-1, -2), v_block)
        state = state * torch.exp(-slope_rate * size) + new
    return torch.cat(found, dim=-2), state


def _lightning(q: Tensor, k: Tensor, v: Tensor, slope_rate: Tensor, query_decay: Tensor, key_decay: Tensor,
               diagonal_decay: Tensor, block_size: int) -> tuple[Operands, Finish]:  # fmt: skip
    x, B, C = (operand.transpose(1, 2) for operand in (v, k, q))
    steps = torch.ones_like(x[..., 0], dtype=torch.float32)

    def finish(y: Tensor, state: Tensor) -> Any:
        return y.to(v.dtype).transpose(1, 2), state.to(v.dtype).transpose(2, 3)

    return SSDScan(x, steps, -slope_rate.flatten().float(), B, C, chunk_size=block_size), finish


def _forward(original: Callable[..., Any]) -> Callable[..., Any]:
    def forward(self: Any, hidden_states: Tensor, position_embeddings: Any = None, attention_mask: Any = None,
                cache: Any = None, past_key_values: Any = None, **more: Any) -> tuple[Tensor, Tensor]:  # fmt: skip
        cache = past_key_values if cache is None else cache
        rows, length = hidden_states.shape[:2]
        qkv = self.act_fn(self.qkv_proj(hidden_states))
        if attention_mask is not None:
            qkv = (qkv * attention_mask[:, :, None]).to(qkv.dtype)
        qkv = qkv.reshape(rows, length, self.num_attention_heads, 3 * self.head_dim)
        q, k, v = (part.transpose(1, 2) for part in torch.split(qkv, self.head_dim, dim=3))
        y, state = lightning_attention(
            q, k, v, self.slope_rate, self.query_decay, self.key_decay, self.diagonal_decay, self.block_size
        )
        y = self.norm(y.transpose(1, 2).reshape(rows, length, self.num_attention_heads * self.head_dim))
        y = self.out_proj(F.sigmoid(self.output_gate(hidden_states)) * y)
        if cache is not None:
            cache.set_linear_cache(self.layer_idx, state)
        return y, state

    return forward


ROWS: dict[str, Row] = {
    "MiniMaxLightningAttention.forward": StandIn(_forward),
    "lightning_attention": _lightning,
}
