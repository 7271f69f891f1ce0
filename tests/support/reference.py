"""The independent oracle: an eager, float64-scored reference of the whole method, with no graph and no simba_fx.

Written from method.md alone. One row at a time, without its padding: the model's *own* blocks run one by one on hidden
states that are indexed between them; the operands of each block's scan are caught on their way into the model's own
scan function and scored by a loop over tokens in float64. Slow and plain on purpose.

Letters: L tokens, D channels of the scan (heads × head width for Mamba-2), N states, V vocabulary.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import math
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from models import padded, tokens
from numpy.typing import NDArray
from torch import Tensor, nn

Array = NDArray[np.float64]

CRITERIA = ("simba", "simba-abs", "simba-l2", "write", "no-decay", "delta-norm", "clip", "recent")
Criterion = str | Callable[["Scan", int], Array]
"""A name, or a function `(scan, query) -> scores of the tokens 0…q`, higher = keep."""

# The one table of tolerances: relative RMS of a result against the reference, by the model's dtype.
# (Models of float64 weights compute parts in float32: scans, residual streams.)
TOLERANCE = {torch.float64: 2e-5, torch.float32: 2e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}
# Gradients pass through every block twice.
GRADIENT_TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-4, torch.bfloat16: 1e-1, torch.float16: 2e-2}
# Two scores closer than this, relative to the terms they are summed from, may be ordered either way in float32.
CLEAR_MARGIN = 1e-4


def relative_rms(actual: Tensor, expected: Tensor) -> float:
    """Root mean square of the difference over that of `expected`; 0 for two empty or two zero tensors."""
    actual, expected = actual.detach().double(), expected.detach().double()
    assert actual.shape == expected.shape, f"shapes differ: {tuple(actual.shape)} and {tuple(expected.shape)}"
    difference = (actual - expected).pow(2).sum().sqrt().item()
    scale = expected.pow(2).sum().sqrt().item()
    return difference / scale if scale > 0 else difference


def assert_close(name: str, actual: Tensor, expected: Tensor, tolerance: float) -> None:
    """Fails, naming the tensor and its error, where the relative RMS is not within `tolerance` (NaN included)."""
    error = relative_rms(actual, expected)
    assert error <= tolerance, f"{name}: relative RMS error {error:.3g}, allowed {tolerance:.3g}"


# The scan's operands.


@dataclass(frozen=True)
class Scan:
    """What one scan of one row was given, in float64, with one decay and one input per channel."""

    u: Array  # (L, D)
    delta: Array  # (L, D), after bias, softplus and limits
    a: Array  # (D, N), negative
    b: Array  # (L, D or 1, N)
    c: Array  # (L, D or 1, N)
    steps: Array  # (L, D of Mamba-1 or heads of Mamba-2): Δ before it is spread over a head's channels

    def written(self) -> Array:
        """`Σ (Δ_t u_t B_t)²` over channels and states, `(L,)`."""
        return (((self.delta * self.u)[..., None] * self.b) ** 2).sum((1, 2))


def _double(x: Tensor) -> Array:
    return x.detach().to(torch.float64).cpu().numpy()


def _step_sizes(raw: Array, bias: Tensor | None, softplus: bool) -> Array:
    """Δ = softplus(raw + bias), over the last axis of `raw`."""
    if bias is not None:
        raw = raw + _double(bias)
    return np.logaddexp(0.0, raw) if softplus else raw


def selective_operands(arguments: dict[str, Any]) -> Scan:
    """From a call of transformers' `mamba_selective_scan`: `(1, D, L)` inputs, `(1, N, L)` B and C."""
    delta = _step_sizes(_double(arguments["dt"])[0].T, arguments["delta_bias"], arguments["delta_softplus"])
    return Scan(
        u=_double(arguments["hidden_states"])[0].T,
        delta=delta,
        a=_double(arguments["A"]),
        b=_double(arguments["B"])[0].T[:, None, :],
        c=_double(arguments["C"])[0].T[:, None, :],
        steps=delta,
    )


def ssd_operands(arguments: dict[str, Any]) -> Scan:
    """From a call of transformers' `mamba2_chunk_scan`: `(1, L, H, P)` inputs, `(1, L, G, N)` B and C."""
    x = _double(arguments["hidden_states"])[0]  # (L, H, P)
    length, heads, width = x.shape
    b, c = _double(arguments["B"])[0], _double(arguments["C"])[0]  # (L, G, N)
    steps = _step_sizes(_double(arguments["dt"])[0], arguments["dt_bias"], arguments["dt_softplus"])  # (L, H)
    steps = np.clip(steps, *arguments["dt_limit"])
    head_of = np.arange(heads * width) // width
    group_of = head_of // (heads // b.shape[1])
    return Scan(
        u=x.reshape(length, heads * width),
        delta=steps[:, head_of],
        a=np.repeat(_double(arguments["A"])[head_of][:, None], b.shape[2], axis=1),
        b=b[:, group_of],
        c=c[:, group_of],
        steps=steps,
    )


@dataclass(frozen=True)
class DeltaRule:
    """What one gated delta rule of one row was given, in float64, heads first where they share keys."""

    v: Array  # (L, H, V)
    q: Array  # (L, H, K), normalised and scaled
    k: Array  # (L, H, K)
    g: Array  # (L, H, K), log decay
    steps: Array  # (L, H), beta

    @property
    def u(self) -> Array:
        return self.v.reshape(len(self.v), -1)

    @property
    def delta(self) -> Array:
        return np.repeat(self.steps, self.v.shape[2], 1)

    def contributions(self, q: int, decay: bool) -> tuple[Array, Array]:
        """`c_t v_t`: the query is carried backwards, `c_t = beta_t k_t . r_t`, `r = e^g (r - k_t c_t)`."""
        out, size = np.zeros((q + 1, *self.v.shape[1:])), np.zeros((q + 1, *self.v.shape[1:]))
        r = self.q[q]
        for t in range(q, -1, -1):
            c = self.steps[t] * (self.k[t] * r).sum(-1)
            out[t] = c[:, None] * self.v[t]
            size[t] = (self.steps[t] * np.abs(self.k[t] * r).sum(-1))[:, None] * np.abs(self.v[t])
            r = (np.exp(self.g[t]) if decay else 1.0) * (r - self.k[t] * c[:, None])
        return out.reshape(q + 1, -1), size.reshape(q + 1, -1)

    def written(self) -> Array:
        return ((self.k[..., :, None] * (self.steps[..., None] * self.v)[..., None, :]) ** 2).sum((1, 2, 3))

    def outputs(self) -> Array:
        state, y = np.zeros((*self.k.shape[1:], self.v.shape[2])), np.zeros_like(self.v)
        for t in range(len(y)):
            state = np.exp(self.g[t])[:, :, None] * state
            held = np.einsum("hkv,hk->hv", state, self.k[t])
            state = state + np.einsum("hk,hv->hkv", self.k[t], self.steps[t][:, None] * (self.v[t] - held))
            y[t] = np.einsum("hkv,hk->hv", state, self.q[t])
        return y.reshape(len(y), -1)


def delta_operands(arguments: dict[str, Any]) -> DeltaRule:
    """From a call of `torch_chunk_gated_delta_rule` or `chunk_kimi_delta_attention`: `(1, L, heads, ·)`."""
    q, k, v, g, beta = (_double(arguments[name])[0] for name in ("query", "key", "value", "g", "beta"))
    if arguments["use_qk_l2norm_in_kernel"]:
        q, k = (x / np.sqrt((x * x).sum(-1, keepdims=True) + 1e-6) for x in (q, k))
    q, k = (np.repeat(x, v.shape[1] // x.shape[1], 1) for x in (q / math.sqrt(q.shape[-1]), k))
    g = np.broadcast_to(g if g.ndim == 3 else g[..., None], k.shape)
    return DeltaRule(v, q, k, g, beta)


def lightning_operands(arguments: dict[str, Any]) -> Scan:
    """From a call of MiniMax's lightning attention, `(1, L, width)`: one fixed decay for each head, no steps."""
    own, hidden, mask = (arguments[name] for name in ("self", "hidden_states", "attention_mask"))
    with torch.no_grad():
        mixed = own.act_fn(own.qkv_proj(hidden)) * (1 if mask is None else mask[:, :, None])
    parts = _double(mixed)[0].reshape(mixed.shape[1], own.num_attention_heads, 3, own.head_dim)
    q, k, v = parts[:, :, 0], parts[:, :, 1], parts[:, :, 2]
    length, heads, width = v.shape
    head_of = np.arange(heads * width) // width
    decay = np.repeat(-_double(own.slope_rate).reshape(-1)[head_of][:, None], width, axis=1)
    steps = np.ones((length, heads))
    return Scan(v.reshape(length, -1), steps[:, head_of], decay, k[:, head_of], q[:, head_of], steps)


SCAN_FUNCTIONS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "mamba_selective_scan": selective_operands,
    "mamba2_chunk_scan": ssd_operands,
    "torch_chunk_gated_delta_rule": delta_operands,
    "chunk_kimi_delta_attention": delta_operands,
    "MiniMaxLightningAttention.forward": lightning_operands,
}


def _scan_functions(modeling: types.ModuleType) -> dict[str, tuple[Any, str, Any]]:
    """By name: what holds a scan function of a modeling file, its name there, and the function."""
    found = {}
    for name in SCAN_FUNCTIONS:
        *owners, own = name.split(".")
        holder = functools.reduce(lambda holder, owner: getattr(holder, owner, None), owners, modeling)
        if hasattr(holder, own):
            found[name] = holder, own, getattr(holder, own)
    return found


@contextlib.contextmanager
def recorded_scans(model: nn.Module) -> Iterator[list[dict[str, Any]]]:
    """Within it, every call of a scan function by `model`'s modeling module is noted, and runs as always."""
    modeling = sys.modules[type(model).__module__]
    calls: list[dict[str, Any]] = []

    def noting(name: str, function: Any) -> Any:
        signature = inspect.signature(function)

        @functools.wraps(function)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()
            calls.append({"function": name, "original": function, **bound.arguments})
            return function(*args, **kwargs)

        return wrapper

    found = _scan_functions(modeling)
    try:
        for name, (holder, own, function) in found.items():
            setattr(holder, own, noting(name, function))
        yield calls
    finally:
        for holder, own, function in found.values():
            setattr(holder, own, function)


@contextlib.contextmanager
def rounded_otherwise(modeling: types.ModuleType, seed: int) -> Iterator[None]:
    """The model's own scans, their results moved by less than half of bfloat16's spacing."""
    generator = torch.Generator().manual_seed(seed)
    functions = _scan_functions(modeling).values()

    def moved(function: Any, *args: Any, **kwargs: Any) -> Any:
        found = function(*args, **kwargs)
        result, *rest = found if isinstance(found, tuple) else (found,)
        result = result * (1 + (torch.rand(result.shape, generator=generator) - 0.5) * 2**-7)
        return (result, *rest) if isinstance(found, tuple) else result

    try:
        for holder, own, function in functions:
            setattr(holder, own, functools.partial(moved, function))
        yield
    finally:
        for holder, own, function in functions:
            setattr(holder, own, function)


def operands(call: dict[str, Any]) -> Any:
    return SCAN_FUNCTIONS[call["function"]](call)


# Scores.


def contributions(scan: Scan | DeltaRule, q: int, *, decay: bool = True) -> tuple[Array, Array]:
    """What each token t ≤ q adds to the scan's output at q, `(q + 1, D)`, and the same sum over |terms|.

    Method §2: `Δ_t u_t Σ_n C_q B_t exp(A R_t)`, `R_t = Σ_{t<i≤q} Δ_i`, summed backwards from q.
    """
    if isinstance(scan, DeltaRule):
        return scan.contributions(q, decay)
    out, size = np.zeros((q + 1, scan.u.shape[1])), np.zeros((q + 1, scan.u.shape[1]))
    rest = np.zeros(scan.u.shape[1])
    for t in range(q, -1, -1):
        terms = scan.c[q] * scan.b[t] * (np.exp(scan.a * rest[:, None]) if decay else np.ones_like(scan.a))
        out[t] = scan.delta[t] * scan.u[t] * terms.sum(-1)
        size[t] = np.abs(scan.delta[t] * scan.u[t]) * np.abs(terms).sum(-1)
        rest = rest + scan.delta[t]
    return out, size


def outputs(scan: Scan | DeltaRule) -> Array:
    """`y_t = C_t · h_t` of the recurrence, `(L, D)`: no skip, no gate."""
    if isinstance(scan, DeltaRule):
        return scan.outputs()
    state = np.zeros_like(scan.a)
    y = np.zeros_like(scan.u)
    for t in range(len(y)):
        state = np.exp(scan.delta[t][:, None] * scan.a) * state + (scan.delta[t] * scan.u[t])[:, None] * scan.b[t]
        y[t] = (scan.c[t] * state).sum(-1)
    return y


def score(scan: Scan | DeltaRule, q: int, criterion: Criterion) -> tuple[Array, Array]:
    """Scores of the tokens 0…q, higher = keep, and the size of what each was computed from (for margins)."""
    if not isinstance(criterion, str):
        found = criterion(scan, q)
        return found, np.abs(found)
    if criterion == "simba-l2":
        values, sizes = contributions(scan, q, decay=True)
        return np.linalg.norm(values, axis=-1), np.linalg.norm(sizes, axis=-1)
    if criterion == "write":
        norm = np.sqrt(scan.written()[: q + 1])
        return norm, norm
    if criterion in ("simba", "simba-abs", "no-decay"):
        values, sizes = contributions(scan, q, decay=criterion != "no-decay")
        if criterion == "simba-abs":
            values = np.abs(values)
        best = values.argmax(-1)
        rows = np.arange(q + 1)
        return values[rows, best], sizes[rows, best]
    if criterion == "delta-norm":
        norm = np.sqrt((scan.steps[: q + 1] ** 2).sum(-1))
        return norm, norm
    if criterion == "clip":
        y = outputs(scan)[: q + 1]
        return np.maximum(y, 0.0).mean(-1), np.abs(y).mean(-1)
    if criterion == "recent":
        position = np.arange(1.0, q + 2.0)
        return position, position
    raise ValueError(f"the reference knows the criteria {CRITERIA}, not {criterion!r}")


def hashed(key: int, seed: int) -> float:
    """Of criterion "random": two rounds of a 32-bit mixer over `key + seed`; 24 bits of it, in [0, 1)."""
    word = 2**32
    mixed = key % word
    for round_ in range(2):
        mixed = (mixed + (seed >> (32 * round_)) % word + 0x9E3779B9) % word
        mixed = (mixed ^ mixed >> 16) * 0x7FEB352D % word
        mixed = (mixed ^ mixed >> 15) * 0x6A09E667 % word
        mixed ^= mixed >> 16
    return (mixed >> 8) / 2**24


def spread(slots: int, wanted: int) -> list[float]:
    """Of criterion "stride": 1 for `wanted` of `slots` tokens, evenly spaced, the last one among them; else 0."""
    return [float((t + 1) * wanted // slots > t * wanted // slots) for t in range(slots)]


def choose(scores: Sequence[float], k: int) -> list[int]:
    """The `k` best positions, ascending; of two equal scores the later wins."""
    order = sorted(range(len(scores)), key=lambda t: (scores[t], t), reverse=True)
    return sorted(order[:k])


def pooled(scores: Array, span: int) -> Array:
    """For each token the one among the `span` around it whose score it gets; of two equal ones the later."""
    half = span // 2
    around = [range(max(0, t - half), min(len(scores), t + half + 1)) for t in range(len(scores))]
    return np.array([max(near, key=lambda t: (scores[t], t)) for near in around], dtype=np.int64)


def margin(scores: Array, sizes: Array, kept: Sequence[int], source: Array | None = None) -> float:
    """The gap between the worst kept and the best dropped score, relative to the terms they are summed from.

    Scores that float32 cannot tell from zero count as equal. `source`: the tokens whose scores these are. Where the
    worst kept and the best dropped have the score of one, the gap is the one to the next other score.
    """
    dropped = np.setdiff1d(np.arange(len(scores)), kept)
    if not len(dropped) or not len(kept):
        return float("inf")
    low, high = min(kept, key=lambda t: scores[t]), max(dropped, key=lambda t: scores[t])
    if source is not None and source[low] == source[high]:
        others = np.flatnonzero(source != source[low])
        gaps = np.abs(scores[others] - scores[low]) / np.maximum(np.maximum(sizes[others], sizes[low]), 1e-30)
        return float(gaps.min(initial=np.inf))
    return float((scores[low] - scores[high]) / max(sizes[low], sizes[high], 1e-30))


# Counts.


def exact_shares(shares: Sequence[Fraction | float]) -> tuple[Fraction, ...]:
    return tuple(Fraction(r) for r in shares)


def linear(blocks: int, final: Fraction = Fraction(1, 10)) -> tuple[Fraction, ...]:
    """`r_i = 1 − (1 − final)·i/(n−1)` (method §4)."""
    if blocks == 1:
        return (Fraction(1),)
    return tuple(1 - (1 - final) * Fraction(i, blocks - 1) for i in range(blocks))


def counts(length: int, shares: Sequence[Fraction | float], tail: int = 1, floor: int = 4) -> list[int]:
    """Tokens entering each block, by the sequential rule of method §4 and nothing else."""
    k = [length]
    for r in exact_shares(shares)[1:]:
        earlier = r * (length - tail)
        ceiling = -((-earlier.numerator) // earlier.denominator)
        k.append(min(k[-1], tail + max(ceiling, floor)))
    return k


# The whole model.


@dataclass
class Row:
    """The result of one row alone, without padding."""

    logits: Tensor  # (L, V): a token that left after block i carries the hidden state it left with
    hidden: Tensor  # (L, H): what `logits` was computed from, after the final norm
    kept: list[list[int]]  # per block, the positions of the tokens that entered it
    cache: Any  # the blocks' own states, or None
    margin: float  # of the closest call over all cuts; negative where tokens were kept that are not the best
    cuts: int = 0  # decisions made
    others: int = 0  # of these, the ones in which a caller's `chosen` are not the best-scored
    scores: list[Array] = field(default_factory=list)  # per cut, of the tokens up to the query
    sizes: list[Array] = field(default_factory=list)  # and what each was computed from
    streams: list[Tensor] = field(default_factory=list)  # per block (L, H): what each token had left a block with
    tokens: list[int] = field(default_factory=list)  # what `generate` continued with
    steps: list[Tensor] = field(default_factory=list)  # the logits (V,) that each of them was chosen from


def on_survivors(hidden: Tensor, blocks: Sequence[Any], kept: Sequence[Tensor]) -> Tensor:
    """What `blocks` make of `hidden` `(B, L, W)`, where block i is given the tokens `kept[i]` `(B, k_i)` alone."""
    before = torch.arange(hidden.shape[1]).expand(hidden.shape[:2])
    for block, positions in zip(blocks, kept, strict=True):
        place = torch.stack([torch.searchsorted(b, p) for b, p in zip(before, positions)])
        hidden = block(hidden.gather(1, place[..., None].expand(-1, -1, hidden.shape[2])))
        before = positions
    return hidden


def cache_name(model: nn.Module) -> str:
    """What the cache argument of `model` is called; it differs between families and versions of transformers."""
    parameters = inspect.signature(type(model).forward).parameters
    return next(name for name in ("cache", "past_key_values", "cache_params") if name in parameters)


class Pruned(nn.Module):
    """One of the model's own blocks, which sees only the tokens that are left, and drops some of them behind it.

    The model's own loop calls it with arguments for the whole row; they are indexed here, by name.
    """

    def __init__(self, block: nn.Module, index: int, row: Pruning) -> None:
        super().__init__()
        self.block, self.index, self.row = block, index, row

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("block"), name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        signature = inspect.signature(self.block.forward)
        positional = [name for name, p in signature.parameters.items() if p.kind is not p.VAR_KEYWORD]
        named = dict(zip(positional, args)) | kwargs
        stay = torch.tensor(self.row.positions)
        named = {name: indexed(name, value, stay) for name, value in named.items()}
        self.row.calls.clear()
        out = self.block(**named)
        hidden = self.row.leave(self.index, out[0] if isinstance(out, tuple) else out)
        return (hidden, *out[1:]) if isinstance(out, tuple) else hidden


def indexed(name: str, value: Any, stay: Tensor) -> Any:
    """An argument of a block for the tokens `stay`; hidden states come for these alone."""
    if name == "hidden_states" or not isinstance(value, Tensor | tuple):
        return value
    if name in ("position_ids", "original_hidden_states", "mamba_attention_mask"):
        return value[:, stay]
    if name == "position_embeddings":  # cos and sin
        return tuple(table[:, stay] for table in value)
    if name in ("attention_mask", "causal_mask"):
        return value[:, stay] if value.ndim == 2 else value[:, :, stay][..., stay]
    raise AssertionError(f"the reference does not know how to index the argument {name}")


@dataclass
class Pruning:
    """The state of one row on its way through the blocks."""

    planned: list[int]
    criterion: Criterion
    tail: int
    calls: list[dict[str, Any]]
    result: Row
    positions: list[int]
    named: frozenset[int] = frozenset()  # positions that are kept in every block
    query: int | None = None  # where scans are scored; None: at the first token of the tail
    seed: int = 0
    span: int = 1
    chosen: Sequence[Sequence[int]] | None = None  # per block, positions to go on with whatever the scores say
    past: Sequence[Sequence[int]] = ()  # per block, the positions of earlier calls that it saw: they only stay or go
    carried: Tensor | None = None  # (1, L, H): for every token, the hidden state of the last block it went through

    @classmethod
    def start(cls, calls: list[dict[str, Any]], result: Row, length: int, shares: Sequence[Fraction | float], *,
              criterion: Criterion = "simba", tail: int = 1, floor: int = 4, query: int | None = None,
              protect: Sequence[int] = (), seed: int = 0, span: int = 1,
              chosen: Sequence[Sequence[int]] | None = None,
              past: Sequence[Sequence[int]] = ()) -> Pruning:  # fmt: skip
        """Before the first block; `query` and `protect` count from either end of the row."""
        wanted = {*protect, *(() if query is None else (query,))}
        before = len(past[0]) if past else 0
        assert (1 if query is None else 0) <= tail <= length - before
        assert not (past and wanted), "named positions of a continued row: not needed"
        return cls(counts(length - before, shares, tail, max(floor, len(wanted))), criterion, tail, calls, result,
                   list(range(length)), frozenset(position % length for position in wanted),
                   None if query is None else query % length, seed, span, chosen, past)  # fmt: skip

    def leave(self, i: int, hidden: Tensor) -> Tensor:
        """What the next block sees of block i's output; behind the last one, every token's last hidden state."""
        self.result.kept.append(list(self.positions))
        before = hidden if self.carried is None else self.carried
        self.carried = before.index_copy(1, torch.tensor(self.positions), hidden)
        self.result.streams.append(self.carried[0])
        if i + 1 == len(self.planned):
            return self.carried
        return hidden[:, self.decide(i)]

    def decide(self, i: int) -> list[int]:
        """The slots that stay behind block i. The tail does, and what is named; the tokens before the tail compete."""
        before = [j for j, position in enumerate(self.positions) if self.past and position in self.past[0]]
        if before:
            return self.decide_on_new(i, len(before))
        if self.planned[i + 1] >= len(self.positions) or not self.calls:
            assert self.chosen is None or list(self.chosen[i + 1]) == self.positions, f"none may leave after block {i}"
            return list(range(len(self.positions)))
        rival = len(self.positions) - self.tail
        scores, sizes = self.score(i, rival)
        source = pooled(scores, self.span)
        scores, sizes = scores[source], sizes[source]
        sure = [j for j in range(rival) if self.positions[j] in self.named]
        ranked = scores[:rival].copy()
        ranked[sure] = np.inf
        self.result.scores.append(scores)
        self.result.sizes.append(sizes)
        best = choose(ranked.tolist(), self.planned[i + 1] - self.tail)
        stay, end = best, list(range(rival, len(self.positions)))
        if self.chosen is not None:
            where = {position: slot for slot, position in enumerate(self.positions)}
            stay = [where[position] for position in self.chosen[i + 1] if where[position] < rival]
            assert stay + end == [where[position] for position in self.chosen[i + 1]], f"the tail, in order, block {i}"
            assert set(sure) <= set(stay), f"a named position left after block {i}"
            assert len(stay) == len(best), f"{len(stay)} earlier tokens after block {i}, not {len(best)}"
        self.result.cuts += 1
        self.result.others += stay != best
        rivals = np.setdiff1d(np.arange(rival), sure)
        closest = margin(ranked[rivals], sizes[rivals], np.flatnonzero(np.isin(rivals, stay)).tolist(),
                         source[rivals] if self.span > 1 else None)  # fmt: skip
        if not isinstance(self.criterion, str) or self.criterion not in ("random", "stride", "recent"):
            self.result.margin = min(self.result.margin, closest)
        elif stay != best:  # a matter of positions: nothing is rounded
            self.result.margin = -float("inf")
        stay = stay + end
        self.positions = [self.positions[j] for j in stay]
        return stay

    def decide_on_new(self, i: int, before: int) -> list[int]:
        """Of a continued row: of earlier calls stay those that the next block saw then; the new tokens compete."""
        stay = [j for j in range(before) if self.positions[j] in self.past[i + 1]]
        assert [self.positions[j] for j in stay] == list(self.past[i + 1]), f"block {i} saw them too"
        rival, count = len(self.positions) - self.tail, self.planned[i + 1]
        best = list(range(before, rival))
        if count < len(self.positions) - before and self.calls:
            scores, sizes = (array[before:rival] for array in self.score(i, rival))
            best = choose(scores.tolist(), count - self.tail)
            self.result.cuts += 1
            self.result.margin = min(self.result.margin, margin(scores, sizes, best, None))
            best = [before + j for j in best]
        stay += best + list(range(rival, len(self.positions)))
        self.positions = [self.positions[j] for j in stay]
        return stay

    def score(self, i: int, rival: int) -> tuple[Array, Array]:
        """Scores and sizes of the tokens before the tail (and of some behind, whose scores are not read)."""
        count = max(rival, 0)
        if self.criterion == "random":
            before = self.positions[-1] - self.tail  # the last token that competes
            values = np.array([hashed(before - position, self.seed) for position in self.positions])
            return values, values
        if self.criterion == "stride":
            values = np.array(spread(count, self.planned[i + 1] - self.tail))
            return values, values
        q = rival if self.query is None else self.positions.index(self.query)
        every = [score(operands(call), q, self.criterion) for call in self.calls]
        scores, sizes = every[0]
        for other, other_sizes in every[1:]:  # several scans in one block: the scores combine by max
            scores, sizes = np.maximum(scores, other), np.maximum(sizes, other_sizes)
        return scores, sizes


def run_row(
    model: nn.Module,
    ids: Tensor,
    shares: Sequence[Fraction | float],
    *,
    criterion: Criterion = "simba",
    tail: int = 1,
    floor: int = 4,
    use_cache: bool = False,
    query: int | None = None,
    protect: Sequence[int] = (),
    seed: int = 0,
    span: int = 1,
    embeds: bool = False,
    chosen: Sequence[Sequence[int]] | None = None,
    past: Sequence[Sequence[int]] = (),
) -> Row:
    """The method on one row of ids `(L,)`, block by block, differentiable through the model's own operations.

    With `past`, what an earlier call on the first of the ids kept (`Row.kept`), the row is that call continued: a model
    is causal, so each block is run on what it saw then and on what is new, from its beginning. With `chosen`, per block
    the positions that enter it, the row goes on with these, and `margin` and `others` of the result say how far they
    are from the best-scored ones. Counts, order, tail and named positions are asserted.
    """
    backbone: Any = model.base_model
    cache = None
    if use_cache:
        from transformers import DynamicCache

        own = getattr(sys.modules[type(model).__module__], "MiniMaxCache", None)
        cache = DynamicCache(config=model.config) if own is None else own()
    result = Row(logits=ids, hidden=ids, kept=[], cache=cache, margin=float("inf"))
    blocks = backbone.layers

    def after_the_norm(_: Any, __: Any, output: Any) -> None:
        result.hidden = output[0][0]

    hook = backbone.register_forward_hook(after_the_norm)
    with recorded_scans(model) as calls:
        row = Pruning.start(calls, result, len(ids), shares, criterion=criterion, tail=tail, floor=floor, query=query,
                            protect=protect, seed=seed, span=span, chosen=chosen, past=past)  # fmt: skip
        assert len(row.planned) == len(blocks), "one share per block"
        try:
            backbone.layers = nn.ModuleList(Pruned(block, i, row) for i, block in enumerate(blocks))
            given = {cache_name(model): cache} if use_cache else {}
            lead = {"inputs_embeds": model.get_input_embeddings()(ids[None])} if embeds else {"input_ids": ids[None]}  # type: ignore[operator]
            result.logits = model(**lead, use_cache=use_cache, **given).logits[0]
            result.logits = result.logits.to(torch.promote_types(result.logits.dtype, torch.float32))
        finally:
            backbone.layers = blocks
            hook.remove()
    return result


@dataclass
class Batch:
    """Rows run alone, and put back at their real positions."""

    rows: list[Row]
    logits: Tensor  # (B, L, V), NaN at pads
    kept: list[list[list[int]]]  # per block and row, positions in the padded row
    real: Tensor  # (B, L) bool

    @property
    def margin(self) -> float:
        return min(row.margin for row in self.rows)


def chosen_of(chosen: Sequence[Tensor], b: int, place: Tensor) -> list[list[int]]:
    """Row b's part of `(B, k)` positions in a padded row (−1: none), as positions among its real tokens `place`."""
    slot = {position: j for j, position in enumerate(place.tolist())}
    return [[slot[p] for p in block[b].tolist() if p >= 0] for block in chosen]


def run(
    model: nn.Module,
    ids: Tensor,
    shares: Sequence[Fraction | float],
    mask: Tensor | None = None,
    chosen: Sequence[Tensor] | None = None,
    tail: int | Sequence[int] = 1,
    **options: Any,
) -> Batch:
    """The method on `(B, L)` ids: by definition each row alone, without its pads (method §6).

    `tail` may be one for each row. `chosen`: per block `(B, k)` positions in the padded row to go on with, −1 where
    there is none (see `run_row`).
    """
    real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    places = [torch.nonzero(r).flatten() for r in real]
    rows = []
    for b, (row, place) in enumerate(zip(ids, places)):
        own = None if chosen is None else chosen_of(chosen, b, place)
        at_its_end = tail if isinstance(tail, int) else tail[b]
        rows.append(run_row(model, row[place], shares, chosen=own, tail=at_its_end, **options))
    logits = torch.full((*ids.shape, rows[0].logits.shape[-1]), float("nan"), dtype=rows[0].logits.dtype)
    for b, (row, place) in enumerate(zip(rows, places)):
        logits[b, place] = row.logits.detach()
    kept = [[place[row.kept[i]].tolist() for row, place in zip(rows, places)] for i in range(len(rows[0].kept))]
    return Batch(rows, logits, kept, real)


def generate(
    model: nn.Module,
    ids: Tensor,
    shares: Sequence[Fraction | float],
    new: int,
    *,
    follow: Sequence[int] | None = None,
    **options: Any,
) -> Row:
    """Greedy decoding of one row: the original model, step by step, from the states of the pruned prefill.

    One token attends to everything that an attention layer holds, so no step needs a mask; where the token stands is
    said, since the model would ask a layer that holds fewer tokens. With `follow` the tokens are given.

    Returns the prefill's `Row` with `tokens` and `steps` filled in, its states advanced, and a margin that counts
    argmaxes too.
    """
    row = run_row(model, ids, shares, use_cache=True, **options)
    states, logits = row.cache, row.logits[-1]
    while True:
        row.steps.append(logits)
        if follow is None:
            first, second = torch.topk(logits, 2).values.tolist()
            row.margin = min(row.margin, (first - second) / max(abs(first), abs(second), 1e-30))
        row.tokens.append(int(logits.argmax()) if follow is None else follow[len(row.tokens)])
        if len(row.tokens) == new:
            return row
        given: dict[str, Any] = {cache_name(model): states}
        if "position_ids" in inspect.signature(type(model).forward).parameters:
            given["position_ids"] = torch.tensor([[len(ids) + len(row.tokens) - 1]])
        logits = model(input_ids=torch.tensor([row.tokens[-1:]]), use_cache=True, **given).logits[0, -1]


def held(cache: Any) -> list[Tensor]:
    """All that a cache holds."""
    found = [state for state in getattr(cache, "linear_cache", ()) if isinstance(state, Tensor)]  # MiniMax's
    for layer in cache.layers:
        for states in (getattr(layer, "conv_states", {}), getattr(layer, "recurrent_states", {})):
            found += [state for _, state in sorted(states.items()) if state is not None]
        found += [t for t in (getattr(layer, "keys", None), getattr(layer, "values", None)) if isinstance(t, Tensor)]
    return found


# Near ties.


class Draws:
    """Counts the drawn cases, and those discarded because a decision was too close to call in float32."""

    def __init__(self) -> None:
        self.drawn = 0
        self.discarded = 0

    def clear(self, result: Row | Batch) -> bool:
        """Whether every decision behind `result` is clear; a case where it is not is to be discarded."""
        self.drawn += 1
        self.discarded += result.margin < CLEAR_MARGIN
        return result.margin >= CLEAR_MARGIN

    def first(
        self,
        model: nn.Module,
        shares: Sequence[Fraction | float],
        make: Callable[[int], Tensor | tuple[Tensor, Tensor]],
        **options: Any,
    ) -> tuple[Tensor, Tensor | None, Batch]:
        """The first seed whose ids, or ids and mask, are a clear case: these, and the reference's result."""
        for seed in range(5):
            made = make(seed)
            ids, mask = made if isinstance(made, tuple) else (made, None)
            result = run(model, ids, shares, mask, **options)
            if self.clear(result):
                return ids, mask, result
        raise AssertionError("five draws in a row had near ties")

    def prompts(
        self, model: nn.Module, shares: Sequence[Fraction | float], lengths: Sequence[int], new: int
    ) -> list[tuple[Tensor, Row]]:
        """Prompts of these lengths with what `generate` makes of each; drawn again where a decision was too close."""
        found = []
        for n, length in enumerate(lengths):
            for attempt in range(5):
                ids = tokens(1000 * attempt + 10 * n + length, length)
                with torch.no_grad():
                    row = generate(model, ids, shares, new)
                if self.clear(row):
                    found.append((ids, row))
                    break
        assert len(found) == len(lengths), "five draws in a row had near ties"
        return found

    def check_generation(self, pruned: Any, model: nn.Module, shares: Sequence[Fraction | float]) -> None:
        """Greedy, 50 tokens, against `generate`: three rows alone, and as one batch padded on the left."""
        lengths = [44, 13, 43]
        prompts = self.prompts(model, shares, lengths, 50)
        for (ids, row), length in zip(prompts, lengths, strict=True):
            found = pruned.generate(ids[None], max_new_tokens=50, do_sample=False)
            assert found[0, length:].tolist() == row.tokens
        ids, mask = padded([ids for ids, _ in prompts], [0, 31, 1], [0, 0, 0])
        found = pruned.generate(ids, attention_mask=mask, max_new_tokens=50, do_sample=False)
        assert found[:, 44:].tolist() == [row.tokens for _, row in prompts]

    def check(self) -> None:
        """Discarding is the exception: if it is not, the tests prove little."""
        allowed = max(3, self.drawn // 10)
        assert self.discarded <= allowed, f"{self.discarded} of {self.drawn} drawn cases had near ties"
