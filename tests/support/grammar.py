"""Plain modules drawn from a small grammar, and what each of them computes, in plain words.

A module is blocks in one or two lists; every block runs *steps* on its tokens before its scans. A step is a function of
the block, its tokens `x (B, L, D)`, and their places. In the module `places` is None: the step reads sizes, slices
tables, builds masks as user code does. In the reference each row's survivors come with the places `(B, k)` that they
have in the input, and with the input's length.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from graph_cases import WIDTH, Block, Feedforward
from torch import Tensor, nn
from torch.nn import functional as F

LONGEST = 64


@dataclass(frozen=True)
class Places:
    """Where the tokens of a step stand in the input, `(B, k)`, and the input's length."""

    at: Tensor
    length: int


Step = Callable[[Any, Tensor, Places | None], Tensor]

# --- steps that read sizes: in a block they are those of the survivors ------------------------------------------------


def root_of_length(block: Any, x: Tensor, places: Places | None) -> Tensor:
    return x / x.shape[1] ** 0.5


def truth_as_tensor(block: Any, x: Tensor, places: Places | None) -> Tensor:
    return x * (1 + torch.tensor(x.shape[1] > 17))


def truth_as_number(block: Any, x: Tensor, places: Places | None) -> Tensor:
    return x * ((x.shape[1] > 17) + 1)


def length_as_tensor(block: Any, x: Tensor, places: Places | None) -> Tensor:
    return x / torch.full((), x.shape[1])


def largest(block: Any, x: Tensor, places: Places | None) -> Tensor:
    return x / max(x.shape[1], 20)


def first_half(block: Any, x: Tensor, places: Places | None) -> Tensor:
    return x + x[:, : x.shape[1] // 2 + 1].mean(1, keepdim=True)


def branch_on_length(block: Any, x: Tensor, places: Places | None) -> Tensor:
    return 2 * x if x.shape[1] > 30 else x


def branch_on_parity(block: Any, x: Tensor, places: Places | None) -> Tensor:
    return 2 * x if x.shape[1] % 2 else x


def branch_on_rows(block: Any, x: Tensor, places: Places | None) -> Tensor:
    return 2 * x if x.shape[0] > 4 else x


def branch_on_one_row(block: Any, x: Tensor, places: Places | None) -> Tensor:
    return 2 * x if x.shape[0] == 1 else x


def branch_on_one_token(block: Any, x: Tensor, places: Places | None) -> Tensor:
    return 2 * x if not x.shape[1] - 1 else x


def truth_as_int(block: Any, x: Tensor, places: Places | None) -> Tensor:
    return x * (1 + int(x.shape[0] == 1))


def halved_to_whole(block: Any, x: Tensor, places: Places | None) -> Tensor:
    return x / int(x.shape[1] / 2 + 1)


def fixed_slice(block: Any, x: Tensor, places: Places | None) -> Tensor:
    return x + x[:, :30].mean(1, keepdim=True)


def last_three(block: Any, x: Tensor, places: Places | None) -> Tensor:
    return x + x[:, -3:].mean(1, keepdim=True)


def loop_on_length(block: Any, x: Tensor, places: Places | None) -> Tensor:
    size = x.shape[1]
    while size > 16:
        size, x = size // 2, x * 1.5
    return x


def float_of_length(block: Any, x: Tensor, places: Places | None) -> Tensor:
    return x / float(x.shape[1])


# --- steps that read places: they are the input's, in whichever block -------------------------------------------------


def table(block: Any, x: Tensor, places: Places | None) -> Tensor:
    return x + (block.table[:, : x.shape[1]] if places is None else block.table[0][places.at])


def shifted_table(block: Any, x: Tensor, places: Places | None) -> Tensor:
    return x + (block.table[:, 1 : x.shape[1] + 1] if places is None else block.table[0][places.at + 1])


def embedded_places(block: Any, x: Tensor, places: Places | None) -> Tensor:
    at = torch.arange(x.shape[1], device=x.device) if places is None else places.at
    return x + F.embedding(at, block.table[0])


def ramp(block: Any, x: Tensor, places: Places | None) -> Tensor:
    at, length = (torch.arange(x.shape[1]), x.shape[1]) if places is None else (places.at, places.length)
    return x * (1 + at / (2 * length))[..., None]


def counted(block: Any, x: Tensor, places: Places | None) -> Tensor:
    at = torch.ones_like(x[..., 0]).cumsum(1) if places is None else places.at + 1.0
    return x * (1 + at / LONGEST)[..., None]


def joined_table(block: Any, x: Tensor, places: Places | None) -> Tensor:
    rows = block.table[:, : x.shape[1]].expand(x.shape[0], -1, -1) if places is None else block.table[0][places.at]
    return torch.cat((x, rows), -1)[..., 3 : 3 + WIDTH]


def _angles(block: Any, x: Tensor, places: Places | None) -> tuple[Tensor, Tensor]:
    if places is None:
        return block.cos[: x.shape[1]], block.sin[: x.shape[1]]
    return block.cos[places.at], block.sin[places.at]


def rotary(block: Any, x: Tensor, places: Places | None) -> Tensor:
    cos, sin = _angles(block, x, places)
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), -1)


def _heads(x: Tensor) -> Tensor:
    return x.unflatten(-1, (2, WIDTH // 2)).transpose(1, 2)


def rotary_heads(block: Any, x: Tensor, places: Places | None) -> Tensor:
    """Tables `(L, 3)` meet `(B, 2, L, 3)`."""
    cos, sin = (t if places is None else t[:, None] for t in _angles(block, x, places))
    heads = _heads(x)
    return (heads * cos + heads.flip(-1) * sin).transpose(1, 2).flatten(2)


def _ahead(x: Tensor, places: Places | None) -> Tensor:
    """`(L, L)` or `(B, k, k)`: how many places a key is before a query."""
    at = torch.arange(x.shape[1]) if places is None else places.at
    return at[..., :, None] - at[..., None, :]


def causal(block: Any, x: Tensor, places: Places | None) -> Tensor:
    square = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool)
    seen = square.tril() if places is None else _ahead(x, places) >= 0
    return x + (x @ x.transpose(1, 2)).masked_fill(~seen, -1e9).softmax(-1) @ x


def windowed(block: Any, x: Tensor, places: Places | None) -> Tensor:
    near = _ahead(x, places).abs() < 3
    near = near if places is None else near[:, None]
    heads = _heads(x)
    return x + F.scaled_dot_product_attention(heads, heads, heads, attn_mask=near).transpose(1, 2).flatten(2)


def learned_bias(block: Any, x: Tensor, places: Places | None) -> Tensor:
    """A bias `(H, L, L)`, taken from a table by distance."""
    bias = block.bias[:, _ahead(x, places) + LONGEST]
    bias = bias if places is None else bias.transpose(0, 1)
    heads = _heads(x)
    return x + ((heads @ heads.transpose(2, 3) + bias).softmax(-1) @ heads).transpose(1, 2).flatten(2)


def mixed_by_places(block: Any, x: Tensor, places: Places | None) -> Tensor:
    return x + (-_ahead(x, places).abs() / 4).exp() @ x / LONGEST


def written_places(block: Any, x: Tensor, places: Places | None) -> Tensor:
    if places is None:
        at = torch.arange(x.shape[1], dtype=torch.float32)
        at += 1
    else:
        at = places.at + 1.0
    return x * (1 + at / LONGEST)[..., None]


def taken_by_place(block: Any, x: Tensor, places: Places | None) -> Tensor:
    """Each token, picked by its number among those that are there."""
    return x + x[:, torch.arange(x.shape[1])]


SIZES: tuple[Step, ...] = (root_of_length, truth_as_tensor, length_as_tensor, largest, first_half, truth_as_number,
                           branch_on_length, branch_on_parity, branch_on_rows, branch_on_one_row, branch_on_one_token,
                           truth_as_int, halved_to_whole, fixed_slice, last_three, loop_on_length,
                           float_of_length)  # fmt: skip
PLACES: tuple[Step, ...] = (table, shifted_table, embedded_places, ramp, counted, joined_table, rotary, rotary_heads,
                            causal, windowed, learned_bias, mixed_by_places, written_places,
                            taken_by_place)  # fmt: skip
ROW_BY_ROW = (table, shifted_table, embedded_places, joined_table, rotary, rotary_heads)
"""Those whose result for a token does not depend on which others are there, be it as padding."""

# --- modules ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Spec:
    """One module of the grammar."""

    blocks: tuple[str, ...]
    """Of each block: "one" scan, "two" scans, "none"."""
    steps: tuple[Step, ...] = ()
    outside: bool = False
    """Whether the residual addition is the outer module's."""
    lists: int = 1
    mask: torch.dtype | None = None
    marks: str = "real"
    early: bool = False
    """Whether what hides padding is computed before the blocks."""


class Stepping(Block):
    """A block that runs steps on its tokens first."""

    def __init__(self, spec: Spec, kind: str) -> None:
        super().__init__({"one": 1, "two": 2, "none": 0}[kind])
        self.spec = spec
        self.feed = Feedforward() if kind == "none" else None
        self.table = nn.Parameter(torch.randn(1, LONGEST + 1, WIDTH))
        self.bias = nn.Parameter(torch.randn(2, 2 * LONGEST))
        angles = torch.outer(torch.arange(float(LONGEST)), torch.tensor([0.1, 0.7, 1.3]))
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())

    def forward(self, x: Tensor, real: Tensor | None = None, places: Places | None = None) -> Tensor:
        for step in self.spec.steps:
            x = step(self, x, places)
        if real is not None:
            x = x * real
        y = self.norm(x)
        for mixer in self.mixers:
            y = mixer(y)
        y = self.feed(x) - x if self.feed is not None else y
        x = y if self.spec.outside else x + y
        return x if real is None else x * real


class Drawn(nn.Module):
    """The module of a spec, as its user wrote it."""

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.spec = spec
        blocks = [Stepping(spec, kind) for kind in spec.blocks]
        half = len(blocks) // 2 if spec.lists == 2 else len(blocks)
        self.layers = nn.ModuleList(blocks[:half])
        if spec.lists == 2:
            self.later = nn.ModuleList(blocks[half:])
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 4)

    def blocks(self) -> dict[str, Stepping]:
        return {path: block for path, block in self.named_modules() if isinstance(block, Stepping)}

    def real(self, mask: Tensor) -> Tensor:
        """`(B, L, 1)`: 1 where a token is real."""
        if self.spec.marks == "padding":
            mask = ~mask if mask.dtype == torch.bool else mask == 0
        return mask[..., None].float()

    def step(self, block: Stepping, x: Tensor, real: Tensor | None, places: Places | None = None) -> Tensor:
        return x + block(x, real, places) if self.spec.outside else block(x, real, places)

    def forward(self, x: Tensor, hide: Tensor | None = None) -> Tensor:
        early = self.real(hide) if hide is not None and self.spec.early else None
        for block in self.blocks().values():
            real = early if early is not None or hide is None else self.real(hide)
            x = self.step(block, x, real)
        return self.head(self.norm(x))

    def expected(self, x: Tensor, kept: dict[str, Tensor], at: Tensor, length: int) -> Tensor:
        """The same of tokens `x (B, L, D)` without padding, that stand at `at (B, L)` of an input of `length`, when
        the block at a path sees those that stand at `kept[path] (B, k)` and every other one has left with what it had.
        A block that is not named sees every token."""
        result = x
        for path, block in self.blocks().items():
            stay = kept.get(path, at)
            hidden = result.gather(1, _places_among(stay, at))
            hidden = self.step(block, hidden, None, Places(stay, length))
            result = result.scatter(1, _places_among(stay, at), hidden)
        return self.head(self.norm(result))


def _places_among(chosen: Tensor, every: Tensor) -> Tensor:
    """For each of `chosen (B, k)` its index in `every (B, L)`, as wide as a token, `(B, k, D)`."""
    found = (every[:, None, :] == chosen[:, :, None]).float().argmax(2)
    return found[..., None].expand(-1, -1, WIDTH)
