"""Your own Mamba, made sparse: register the function that runs its scan, then transform. (python examples/own_model.py)

The model below is ordinary PyTorch and knows nothing of simba_fx. What simba_fx must be told is what the arguments of
its `scan` mean: one call of `register_scan`, with an adapter that names them.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import simba_fx

# --- the model: about sixty lines, unchanged ----------------------------------------------------------------------


def scan(x: Tensor, step: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """`h_t = exp(step_t A) h_{t-1} + step_t B_t x_t` and `y_t = C_t h_t`, token by token.

    `x`, `step` and the result are `(B, L, D)`; `A` is `(D, N)`, negative; `B`, `C` are `(B, L, N)`.
    """
    state, outputs = x.new_zeros(x.shape[0], *A.shape), []
    for t in range(x.shape[1]):
        decay = torch.exp(step[:, t, :, None] * A)
        state = decay * state + (step[:, t] * x[:, t])[:, :, None] * B[:, t, None, :]
        outputs.append((state * C[:, t, None, :]).sum(-1))
    return torch.stack(outputs, dim=1)


class Block(nn.Module):
    def __init__(self, width: int, states: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(width)
        self.inputs = nn.Linear(width, 2 * width, bias=False)
        self.conv = nn.Conv1d(width, width, kernel_size=4, padding=3, groups=width)
        self.selection = nn.Linear(width, width + 2 * states)
        self.A_log = nn.Parameter(torch.arange(1.0, states + 1).log().repeat(width, 1))
        self.D = nn.Parameter(torch.ones(width))
        self.output = nn.Linear(width, width, bias=False)
        self.sizes = (width, states, states)

    def forward(self, hidden: Tensor) -> Tensor:
        x, gate = self.inputs(self.norm(hidden)).chunk(2, dim=-1)
        x = F.silu(self.conv(x.transpose(1, 2))[..., : x.shape[1]].transpose(1, 2))
        step, B, C = self.selection(x).split(self.sizes, dim=-1)
        y = scan(x, F.softplus(step), -torch.exp(self.A_log), B, C) + self.D * x
        return hidden + self.output(y * F.silu(gate))


class MyMamba(nn.Module):
    def __init__(self, vocabulary: int = 97, width: int = 32, states: int = 8, depth: int = 6) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(Block(width, states) for _ in range(depth))
        self.norm = nn.RMSNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        """`(B, L)` token ids to `(B, L, vocabulary)` logits."""
        hidden = self.embedding(ids)
        for block in self.blocks:
            hidden = block(hidden)
        return self.head(self.norm(hidden))


# --- making it sparse ---------------------------------------------------------------------------------------------


def adapter(x: Tensor, step: Tensor, A: Tensor, B: Tensor, C: Tensor):  # type: ignore[no-untyped-def]
    """The arguments of `scan` in simba_fx's layout, `(B, D, L)`, and the way back for the result."""
    operands = simba_fx.SelectiveScan(
        u=x.transpose(1, 2), delta=step.transpose(1, 2), A=A, B=B.transpose(1, 2), C=C.transpose(1, 2)
    )
    return operands, lambda y, last_state: y.transpose(1, 2)


simba_fx.register_scan(scan, adapter)


def main() -> None:
    torch.manual_seed(0)
    model = MyMamba().eval()
    ids = torch.randint(97, (2, 200))

    with torch.no_grad():
        dense = model(ids)
        same = simba_fx.transform(model, schedule="dense")(ids)
        print(f"keep 1.0: largest difference from the dense model {(same - dense).abs().max():.1e}")

        sparse = simba_fx.transform(model, schedule="linear")
        pruned = sparse(ids)
        print(f"linear:   largest difference at the last token    {(pruned - dense)[:, -1].abs().max():.1e}")
        print("tokens that entered each block:", *(tokens.shape[1] for tokens in simba_fx.kept(sparse)))

        compiled = torch.compile(sparse)
        for length in (200, 120):
            difference = (compiled(ids[:, :length]) - sparse(ids[:, :length])).abs().max()
            print(f"compiled, {length} tokens: largest difference from eager {difference:.1e}")


if __name__ == "__main__":
    main()
