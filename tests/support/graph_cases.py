"""Captured graphs that every pass is held against, easy to hard, each captured once per session.

Adding a case is one entry of `CASES`. The plain modules are written by hand around `loop_scan`, a scan in a user's own
words, registered below as a user would register it; the others are tiny transformers models.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from models import VOCABULARY, _falcon_h1, _falcon_mamba, _jamba, _mamba, _mamba2, _zamba, randomise
from torch import Tensor, nn
from torch.nn.functional import softplus

from simba_fx import SelectiveScan, register_scan
from simba_fx.capture.export import capture_graph
from simba_fx.capture.normalise import Captured
from simba_fx.frontends.transformers.calls import usual_signature
from simba_fx.frontends.transformers.trace import capture_stack
from simba_fx.runtime.stack import Signature

ROWS, LENGTH = 3, 24  # of the example that is traced; no width below equals either
WIDTH, STATES = 6, 5


def loop_scan(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """`h_t = exp(Δ_t A) h_{t-1} + Δ_t B_t u_t`, `y_t = C_t · h_t`, one token at a time. `u`, `delta`, y `(B, D, L)`."""
    h = u.new_zeros(u.shape[0], u.shape[1], A.shape[1])
    ys = []
    for t in range(u.shape[2]):
        h = torch.exp(delta[:, :, t, None] * A) * h + (delta[:, :, t] * u[:, :, t])[..., None] * B[:, None, :, t]
        ys.append((h * C[:, None, :, t]).sum(-1))
    return torch.stack(ys, 2)


register_scan(loop_scan, SelectiveScan)


class Mixer(nn.Module):
    """One scan over `x (B, L, D)`."""

    def __init__(self) -> None:
        super().__init__()
        self.step, self.write, self.read = (nn.Linear(WIDTH, n) for n in (WIDTH, STATES, STATES))
        self.A_log = nn.Parameter(torch.linspace(-2, 1, WIDTH * STATES).reshape(WIDTH, STATES))

    def operands(self, x: Tensor) -> tuple[Tensor, ...]:
        u, step, B, C = (v.transpose(1, 2) for v in (x, softplus(self.step(x)), self.write(x), self.read(x)))
        return u, step, -self.A_log.exp(), B, C

    def forward(self, x: Tensor) -> Tensor:
        return loop_scan(*self.operands(x)).transpose(1, 2)


class Block(nn.Module):
    """A residual block around any number of mixers, one after the other."""

    def __init__(self, mixers: int = 1) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.mixers = nn.ModuleList(Mixer() for _ in range(mixers))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        for mixer in self.mixers:
            y = mixer(y)
        return x + y


class Both(Block):
    """Two scans side by side, the second against the order of the tokens, as in Vision Mamba."""

    directions = (False, True)

    def __init__(self) -> None:
        super().__init__(2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        ahead, back = self.mixers
        return x + ahead(y) + back(y.flip(1)).flip(1)


class Turned(Block):
    """One scan, against the order of the tokens."""

    directions = (True,)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mixers[0](self.norm(x).flip(1)).flip(1)


class Feedforward(nn.Module):
    """A block without a scan."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(x)))


class Positioned(Block):
    """A block that reads the sequence length."""

    def forward(self, x: Tensor) -> Tensor:
        ramp = torch.arange(x.shape[1], device=x.device) / (2 * x.shape[1])
        return super().forward(x * (1 + ramp[:, None]))


class Plain(nn.Module):
    """Blocks in a list, then a norm and a head."""

    def __init__(self, *blocks: nn.Module, hidden_states: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList(blocks)
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 4)
        self.hidden_states = hidden_states

    def forward(self, x: Tensor) -> Any:
        every = []
        for block in self.layers:
            x = block(x)
            every.append(x)
        result = self.head(self.norm(x))
        return (result, *every) if self.hidden_states else result


class Masked(Plain):
    """The same with a padding mask, used by every block."""

    def forward(self, x: Tensor, mask: Tensor) -> Any:
        for block in self.layers:
            x = block(x * mask[..., None])
        return self.head(self.norm(x))


class Real(Plain):
    """With a padding mask that keeps pads from every scan: a row's result does not depend on its padding."""

    def forward(self, x: Tensor, mask: Tensor) -> Any:
        x = x * mask[..., None]
        for block in self.layers:
            x = block(x) * mask[..., None]
        return self.head(self.norm(x))


class TurnedOutside(Plain):
    """Every second block sees the tokens in reversed order; the outer forward turns them around."""

    def forward(self, x: Tensor) -> Tensor:
        for index, block in enumerate(self.layers):
            x = block(x.flip(1)).flip(1) if index % 2 else block(x)
        return self.head(self.norm(x))


class Recalling(Plain):
    """Two embeddings of the input are read again by every block."""

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__(*blocks)
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.first(x), self.second(x)
        for block in self.layers:
            x = block(x + first) + second
        return self.head(self.norm(x))


class Unlisted(nn.Module):
    """Two mixers, no list of blocks: the cut falls where the fewest bytes are alive."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Mixer(), Mixer()
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.first(self.norm(x))
        x = x + self.second(self.norm(x))
        return self.head(self.norm(x))


@dataclass(frozen=True)
class Case:
    """A module, how it is captured, and after which blocks a falling schedule cuts."""

    name: str
    make: Callable[[], nn.Module]
    cut_after: tuple[int, ...]
    n_blocks: int
    mask: bool = False
    cache: bool | None = None  # None: a plain module
    query: int | None = None
    protect: tuple[int, ...] = ()

    def __str__(self) -> str:
        return self.name

    @functools.cached_property
    def module(self) -> nn.Module:
        """The user's module: what was captured, with the paths that the graph knows."""
        torch.manual_seed(0)
        module = self.make().eval()
        if self.cache is not None:
            randomise(module, 0)
            module = module.base_model
        return module

    @functools.cached_property
    def captured(self) -> Captured:
        return capture_plain(self.module, self.mask) if self.cache is None else self._transformers()

    def _transformers(self) -> Captured:
        kind = torch.int64 if self.mask else None
        cpu, cache = torch.device("cpu"), bool(self.cache)
        extra = usual_signature(self.module, self.module.get_input_embeddings().weight, False).extra
        return capture_stack(self.module, Signature(torch.float32, cpu, kind, cache, False, False, extra=extra))[0]

    @property
    def shares(self) -> tuple[Fraction, ...]:
        """A schedule that falls at every block."""
        return tuple(1 - Fraction(i, self.n_blocks + 1) for i in range(self.n_blocks))

    def inputs(self, rows: int, length: int, *, padded: bool = False) -> list[Tensor]:
        """Random inputs of the graph, in its order; `padded`: row b has b pads on the left."""
        generator = torch.Generator().manual_seed(rows * 1000 + length)
        pads = torch.arange(rows)[:, None] if padded else torch.zeros(rows, 1)
        grid = torch.arange(length).expand(rows, length)
        integers = {"position_ids": grid, "input_ids": grid % VOCABULARY}
        found = []
        for node in self.captured.graph.find_nodes(op="placeholder"):
            if node.name == self.captured.facts.primary:
                found.append(torch.randn(rows, length, node.meta["val"].shape[2], generator=generator))
            elif node.name == self.captured.facts.mask:
                found.append((grid >= pads).to(node.meta["val"].dtype if self.cache is None else torch.int64))
            else:
                found.append(integers[node.name])
        return found


def capture_plain(module: nn.Module, mask: bool = False) -> Captured:
    """A module of `x (B, L, D)`, and of `mask (B, L)`, as `transform` captures it."""
    inputs = {"x": torch.zeros(ROWS, LENGTH, WIDTH)}
    if mask:
        inputs["mask"] = torch.ones(ROWS, LENGTH)
    return capture_graph(module, module, inputs, primary="x", mask="mask" if mask else None)


CASES: tuple[Case, ...] = (
    Case("two blocks", lambda: Plain(Block(), Block()), (0,), 2),
    Case("two blocks with a mask", lambda: Masked(Block(), Block(), Block()), (0, 1), 3, mask=True),
    Case("no list of blocks", Unlisted, (0,), 2),
    Case("two scans in a block", lambda: Plain(Block(2), Block(), Block()), (0, 1), 3),
    Case("a block without a scan", lambda: Plain(Block(), Feedforward(), Block(), Block()), (0, 2), 4),
    Case("length arithmetic in a block", lambda: Plain(*(Positioned() for _ in range(3))), (0, 1), 3),
    Case("hidden states", lambda: Plain(Block(), Block(), Block(), hidden_states=True), (0, 1), 3),
    Case("embeddings read again", lambda: Recalling(Block(), Block(), Block()), (0, 1), 3),
    Case("two directions", lambda: Plain(Both(), Both(), Both()), (0, 1), 3, query=5, protect=(0,)),
    Case("two directions with a mask", lambda: Real(Both(), Both(), Both()), (0, 1), 3, mask=True, query=-2),
    Case("two directions, each at its end", lambda: Real(Both(), Both(), Both()), (0, 1), 3, mask=True, protect=(4, 0)),
    Case("alternating directions", lambda: Plain(Block(), Turned(), Block(), Turned()), (0, 1, 2), 4, protect=(-1, 3)),
    Case("turned outside", lambda: TurnedOutside(Block(), Positioned(), Block(), Positioned()), (0, 1, 2), 4),
    Case("mamba", _mamba, (0, 1, 2), 4, cache=False),
    Case("mamba with a mask", _mamba, (0, 1, 2), 4, mask=True, cache=False),
    Case("mamba with a cache", _mamba, (0, 1, 2), 4, cache=True),
    Case("mamba2 with a mask and a cache", lambda: _mamba2(n_groups=2), (0, 1, 2), 4, mask=True, cache=True),
    Case("falcon-mamba with a mask and a cache", _falcon_mamba, (0, 1), 3, mask=True, cache=True),
    Case("jamba", _jamba, (0, 2), 4, cache=False),
    Case("zamba with a mask", _zamba, (0, 1, 2, 3), 5, mask=True, cache=False),
    Case("falcon-h1 with a mask and a cache", _falcon_h1, (0, 1, 2), 4, mask=True, cache=True),
)
