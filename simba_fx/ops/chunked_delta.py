"""Gated delta rules in plain PyTorch, a chunk of C tokens at a time (Yang et al. 2024, WY form).

With b the sum of g inside a chunk and `T_ij = beta_i (k_i . k_j) e^{b_i - b_j}` for j < i, everything inside a chunk is
one triangular system `I + T`. Letters: see `simba_fx.ops` and `simba_fx.ops.delta`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from simba_fx.ops.operands import DeltaScan

__all__ = ["delta_reads", "delta_scan", "delta_writes"]


class _Chunks:
    """Float32 operands by chunk, `(B, H, c, C, ·)`, and the triangular system of each."""

    def __init__(self, v: Tensor, q: Tensor, k: Tensor, g: Tensor, beta: Tensor, size: int) -> None:
        self.rows, self.length, self.heads, self.width = v.shape
        most = 64 if g.dim() == 3 else 16  # with decays by channel each pair of a chunk's tokens has K numbers
        size = max(1, min(size, most, self.length))
        missing = -self.length % size

        def chunked(operand: Tensor) -> Tensor:
            """`(B, L, heads, ...)`; what is added at the end neither decays nor writes."""
            operand = operand.float().repeat_interleave(self.heads // operand.shape[2], 2).transpose(1, 2)
            rest = operand.shape[3:]
            operand = F.pad(operand, (0, 0) * len(rest) + (0, missing))
            return operand.reshape(*operand.shape[:2], (self.length + missing) // size, size, *rest)

        self.v, self.q, self.k, self.beta = map(chunked, (v, q, k, beta))
        prefix = chunked(g if g.dim() == 4 else g.unsqueeze(3)).double().cumsum(3)  # (B, H, c, C, K or 1)
        self.from_start = prefix.float().exp()
        self.to_end = (prefix[..., -1:, :] - prefix).float().exp()
        self.whole = self.from_start[..., -1, :, None]
        between = (prefix.unsqueeze(4) - prefix.unsqueeze(3)).float()
        later = torch.ones(size, size, dtype=torch.bool, device=v.device).triu(1).unsqueeze(2)
        self.between = between.masked_fill(later, -torch.inf).exp()
        self.system = self.beta.unsqueeze(4) * self.products(self.k)  # its diagonal is not read

    def products(self, left: Tensor) -> Tensor:
        """What is left of each key when a later token of its chunk reads it with `left`: `(B, H, c, C, C)`."""
        if self.between.shape[5] == 1:
            return left @ self.k.mT * self.between.squeeze(5)
        return (left.unsqueeze(4) * self.k.unsqueeze(3) * self.between).sum(5)

    def solve(self, right: Tensor, transposed: bool = False) -> Tensor:
        """`(I + T)^-1 right`, or the same of its transpose."""
        system = self.system.mT if transposed else self.system
        solved: Tensor = torch.linalg.solve_triangular(system, right, upper=transposed, unitriangular=True)
        return solved

    def corrections(self) -> Tensor:
        """What each token's write takes from the state that enters its chunk: `(B, H, c, C, K)`."""
        return self.solve(self.beta.unsqueeze(4) * self.from_start * self.k)


def delta_scan(scan: DeltaScan) -> tuple[Tensor, Tensor]:
    """y `(B, L, H, V)`, the last state `(B, H, K, V)`, float32."""
    y, state, _ = delta_writes(scan)
    return y, state


def delta_writes(scan: DeltaScan) -> tuple[Tensor, Tensor, Tensor]:
    """The same, and what each token writes at its key, `beta_t (v_t - S^T k_t)` `(B, L, H, V)`."""
    chunks = _Chunks(scan.v, scan.q, scan.k, scan.g, scan.beta, scan.chunk_size)
    written, corrections = chunks.solve(chunks.beta.unsqueeze(4) * chunks.v), chunks.corrections()
    inside = chunks.products(chunks.q)
    reads, keys = chunks.q * chunks.from_start, (chunks.k * chunks.to_end).mT
    state = chunks.v.new_zeros(chunks.rows, chunks.heads, chunks.k.shape[4], chunks.width)
    outputs, writes = [], []
    for at in range(chunks.v.shape[2]):
        new = written[:, :, at] - corrections[:, :, at] @ state
        writes.append(new)
        outputs.append(reads[:, :, at] @ state + inside[:, :, at] @ new)
        state = state * chunks.whole[:, :, at] + keys[:, :, at] @ new
    none = [chunks.v.new_empty(chunks.rows, chunks.heads, 0, chunks.width)]
    y, new = (torch.cat(found or none, 2)[:, :, : chunks.length].transpose(1, 2) for found in (outputs, writes))
    return y, state, new


def delta_reads(scan: DeltaScan, q_query: Tensor, query: Tensor, decays: bool) -> Tensor:
    """`k_t . r_t` `(B, L, H)`: the query, `q_query` `(B, G, K)`, is carried backwards, a chunk at a time."""
    _, length, heads, _ = scan.v.shape
    counts = (torch.arange(length, device=query.device) <= query.unsqueeze(1)).unsqueeze(2)
    g = scan.g.float() if decays else torch.zeros_like(scan.g, dtype=torch.float32)
    g = torch.where(counts if g.dim() == 3 else counts.unsqueeze(3), g, 0.0)
    beta = torch.where(counts, scan.beta.float(), 0.0)  # behind the query nothing decays and nothing is written
    chunks = _Chunks(scan.v, scan.q, scan.k, g, beta, scan.chunk_size)
    corrections, keys = chunks.corrections(), chunks.k * chunks.to_end
    r = q_query.float().repeat_interleave(heads // q_query.shape[1], 1).unsqueeze(3)
    found = []
    for at in reversed(range(chunks.v.shape[2])):
        met = keys[:, :, at] @ r
        found.append(met)
        r = chunks.whole[:, :, at] * r - corrections[:, :, at].mT @ met
    met = torch.stack(found[::-1], 2) if found else chunks.beta.unsqueeze(4)
    reads = chunks.solve(met, transposed=True).squeeze(4)
    return reads.flatten(2, 3)[:, :, : chunks.length].transpose(1, 2)
