"""Recurrences as loops over tokens, `(B, L, ...)`: linear in their values, and such as look like it and are not.

The formulas: Yang et al. 2024 (GLA, DeltaNet), De et al. 2024 (RG-LRU), Peng et al. 2023 and 2025 (RWKV-4, RWKV-7),
Beck et al. 2024 (mLSTM, sLSTM), Siems et al. 2025 (DeltaProduct), Sun et al. 2024 (TTT).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

ROWS, LENGTH, HEADS, KEYS, VALUES = 2, 11, 2, 3, 3
Step = Callable[..., tuple[Any, Tensor]]


def loop(step: Step, state: Any, *operands: Tensor) -> tuple[Tensor, Any]:
    ys = []
    for t in range(operands[0].shape[1]):
        state, y = step(state, *(operand[:, t] for operand in operands))
        ys.append(y)
    return torch.stack(ys, 1), state


def matrix(v: Tensor, k: Tensor) -> Tensor:
    return v.new_zeros(v.shape[0], v.shape[2], k.shape[3], v.shape[3])


def read(state: Tensor, q: Tensor) -> Tensor:
    return (state * q.unsqueeze(-1)).sum(-2)


def outer(k: Tensor, v: Tensor) -> Tensor:
    return k.unsqueeze(-1) * v.unsqueeze(-2)


def gla(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    def step(state: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        state = state * g.exp().unsqueeze(-1) + outer(k, v)
        return state, read(state, q)

    return loop(step, matrix(v, k), q, k, v, g)


def head_first(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    """The same, `(B, H, L, ...)`."""
    return gla(*(operand.transpose(1, 2) for operand in (q, k, v, g)))[0].transpose(1, 2)


def delta_net(q: Tensor, k: Tensor, v: Tensor, beta: Tensor) -> Tensor:
    def step(state: Tensor, q: Tensor, k: Tensor, v: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
        state = state + outer(k, beta.unsqueeze(-1) * (v - read(state, k)))
        return state, read(state, q)

    return loop(step, matrix(v, k), q, F.normalize(k, dim=-1), v, beta)[0]


def delta_product(q: Tensor, k: Tensor, v: Tensor, beta: Tensor) -> Tensor:
    """Two writes for each token, of one value."""

    def step(state: Tensor, q: Tensor, k: Tensor, v: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
        for key in (k, k.flip(-1)):
            state = state + outer(key, beta.unsqueeze(-1) * (v - read(state, key)))
        return state, read(state, q)

    return loop(step, matrix(v, k), q, F.normalize(k, dim=-1), v, beta)[0]


def rwkv7(r: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor) -> Tensor:
    def step(state: Tensor, r: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        state = state * w.exp().unsqueeze(-1) + outer(b, read(state, a)) + outer(k, v)
        return state, read(state, r)

    return loop(step, matrix(v, k), r, w, k, v, a, b)[0]


def rwkv4(v: Tensor, k: Tensor) -> Tensor:
    def step(state: Any, v: Tensor, k: Tensor) -> tuple[Any, Tensor]:
        above, below = state
        y = (above + (k + 0.5).exp() * v) / (below + (k + 0.5).exp())
        return (0.8 * above + k.exp() * v, 0.8 * below + k.exp()), y

    return loop(step, (torch.zeros_like(v[:, 0]),) * 2, v, k)[0]


def rg_lru(x: Tensor, a: Tensor) -> Tensor:
    def step(state: Tensor, x: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
        state = a * state + (1 - a * a).sqrt() * x
        return state, state

    return loop(step, torch.zeros_like(x[:, 0]), x, a)[0]


def mlstm(q: Tensor, k: Tensor, v: Tensor, i: Tensor, f: Tensor) -> Tensor:
    def step(state: Any, q: Tensor, k: Tensor, v: Tensor, i: Tensor, f: Tensor) -> tuple[Any, Tensor]:
        memory, norm = state
        forget, write = f.sigmoid().unsqueeze(-1), i.exp().unsqueeze(-1)
        memory, norm = forget.unsqueeze(-1) * memory + outer(write * k, v), forget * norm + write * k
        return (memory, norm), read(memory, q) / (norm * q).sum(-1, keepdim=True).abs().clamp(min=1)

    return loop(step, (matrix(v, k), torch.zeros_like(k[:, 0])), q, k, v, i, f)[0]


def random(*names: str, seed: int = 0, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Operands by name, as a model would make them."""
    torch.manual_seed(seed)
    per_key = ("q", "k", "r", "a_", "b_", "g", "w")
    made = {}
    for name in names:
        rest = {"v": (HEADS, VALUES), "x": (VALUES,), "beta": (HEADS,), "i": (HEADS,), "f": (HEADS,)}.get(name)
        drawn = torch.randn(ROWS, LENGTH, *(rest or (HEADS, KEYS)))
        if name in ("g", "w"):
            drawn = -F.softplus(drawn)
        elif name == "beta" or (name == "a" and "x" in names):
            drawn = drawn.sigmoid()
        made[name] = drawn.to(dtype)
        assert name in per_key or rest or name in ("a", "b")
    if "x" in made and "a" in made:
        made["a"] = torch.rand(ROWS, LENGTH, VALUES).to(dtype)
    if "k" in made and set(made) == {"v", "k"}:
        made["k"] = torch.randn(ROWS, LENGTH, HEADS, VALUES).to(dtype)
    return made


LINEAR: dict[str, tuple[Callable[..., Any], str, tuple[str, ...]]] = {
    "GLA": (gla, "v", ("q", "k", "v", "g")),
    "DeltaNet": (delta_net, "v", ("q", "k", "v", "beta")),
    "DeltaProduct": (delta_product, "v", ("q", "k", "v", "beta")),
    "RWKV-7": (rwkv7, "v", ("r", "w", "k", "v", "a", "b")),
    "RWKV-4": (rwkv4, "v", ("v", "k")),
    "RG-LRU": (rg_lru, "x", ("x", "a")),
    "mLSTM": (mlstm, "v", ("q", "k", "v", "i", "f")),
}
"""Function, values, operands."""


def started(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    """GLA from another state than zero."""
    return gla(q, k, v, g)[0] + q.sum(-1, keepdim=True)


def skipping_norm(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    return F.layer_norm(gla(q, k, v, g)[0], v.shape[-1:])


def mixing(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    """An output channel reads two channels of values."""
    return gla(q, k, v + 0.5 * v.roll(1, -1), g)[0]


def oja(q: Tensor, k: Tensor, v: Tensor, beta: Tensor) -> Tensor:
    """What is erased depends on the values."""

    def step(state: Tensor, q: Tensor, k: Tensor, v: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
        found = (state * v.unsqueeze(-2)).sum(-1)
        state = state + outer(beta.unsqueeze(-1) * (k - found), v)
        return state, read(state, q)

    return loop(step, matrix(v, k), q, k, v, beta)[0]


def slstm(x: Tensor, a: Tensor) -> Tensor:
    """Gates that read what was put out before."""

    def step(state: Any, x: Tensor, a: Tensor) -> tuple[Any, Tensor]:
        cell, out = state
        cell = (a + out).sigmoid() * cell + x
        return (cell, cell.tanh()), cell.tanh()

    return loop(step, (torch.zeros_like(x[:, 0]),) * 2, x, a)[0]


def ttt(q: Tensor, k: Tensor, v: Tensor, beta: Tensor) -> Tensor:
    """A step of gradient descent through a layer norm."""

    def step(state: Tensor, q: Tensor, k: Tensor, v: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
        error = F.layer_norm(read(state, k) - v, v.shape[-1:])
        state = state - outer(k, beta.unsqueeze(-1) * error)
        return state, read(state, q)

    return loop(step, matrix(v, k), q, F.normalize(k, dim=-1), v, beta)[0]


OTHERS: dict[str, tuple[Callable[..., Any], str, tuple[str, ...]]] = {
    "another start": (started, "v", ("q", "k", "v", "g")),
    "a norm of the output": (skipping_norm, "v", ("q", "k", "v", "g")),
    "channels that mix": (mixing, "v", ("q", "k", "v", "g")),
    "Oja's rule": (oja, "v", ("q", "k", "v", "beta")),
    "sLSTM": (slstm, "x", ("x", "a")),
    "TTT": (ttt, "v", ("q", "k", "v", "beta")),
    "the keys of a delta rule": (delta_net, "k", ("q", "k", "v", "beta")),
    "the decay": (gla, "g", ("q", "k", "v", "g")),
}
