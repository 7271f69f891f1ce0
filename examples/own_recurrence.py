"""A recurrence of your own, made sparse: write one step of it, or register the function that runs it.
(python examples/own_recurrence.py)

The block below is Gated Linear Attention (Yang et al. 2024) of two heads. simba_fx has no kernel for it and needs none:
its output is linear in the values, so that one backward pass says what each token contributes.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import simba_fx


@simba_fx.LinearRecurrence
def attention(state: Tensor, v: Tensor, q: Tensor, k: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """One token of each row: `v (B, H, V)`; `q`, `k` and the log decay `g` `(B, H, K)`; the state `(B, H, K, V)`."""
    state = state * g.exp().unsqueeze(3) + k.unsqueeze(3) * v.unsqueeze(2)
    return state, (state * q.unsqueeze(3)).sum(2)


class Block(nn.Module):
    def __init__(self, width: int, heads: int = 2) -> None:
        super().__init__()
        self.norm, self.heads = nn.RMSNorm(width), heads
        self.inputs = nn.Linear(width, 4 * width, bias=False)
        self.output = nn.Linear(width, width, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        v, q, k, g = self.inputs(self.norm(hidden)).unflatten(2, (self.heads, -1)).chunk(4, dim=-1)
        y = attention(v, q, k, F.logsigmoid(g) / 16)
        return hidden + self.output(y.flatten(2))


class Model(nn.Module):
    def __init__(self, vocabulary: int = 97, width: int = 32, depth: int = 6) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))
        self.head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        """`(B, L)` token ids to `(B, L, vocabulary)` logits."""
        hidden = self.embedding(ids)
        for block in self.blocks:
            hidden = block(hidden)
        return self.head(hidden)


def eroding(state: Tensor, v: Tensor, q: Tensor, k: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """The same with a state that is squashed: no longer linear in v, so no token has a share of its own."""
    state = torch.tanh(state * g.exp().unsqueeze(3) + k.unsqueeze(3) * v.unsqueeze(2))
    return state, (state * q.unsqueeze(3)).sum(2)


def main() -> None:
    torch.manual_seed(0)
    model = Model().eval()
    ids = torch.randint(97, (2, 200))

    with torch.no_grad():
        dense = model(ids)
        same = simba_fx.transform(model, schedule="dense")(ids)
        print(f"keep 1.0: largest difference from the dense model {(same - dense).abs().max():.1e}")
        sparse = simba_fx.transform(model, schedule="linear")
        pruned = sparse(ids)
        print(f"linear:   largest difference at the last token    {(pruned - dense)[:, -1].abs().max():.1e}")
        print("tokens that entered each block:", *(tokens.shape[1] for tokens in simba_fx.kept(sparse)))

    global attention
    attention = simba_fx.LinearRecurrence(eroding)
    try:
        simba_fx.transform(model, schedule="linear")
    except simba_fx.errors.CaptureError as error:
        print("refused:", error)


if __name__ == "__main__":
    main()
