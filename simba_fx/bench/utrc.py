"""UTRC as described (arXiv 2410.14725, and this project's notes on it): the peer that merges tokens.

Its released code departs from its paper, hence "as described"; nothing of that code is used here. After some blocks,
of the N tokens that are left, with S the mean over channels of max(0, y) and y what the scan operator returns:

1. The lower half by S is A, the upper half B. Each a in A links to the b in B that is most similar to it, by the cosine
   of the block's outputs.
2. The r = N - ceil(ratio * N) tokens of A with the strongest links go. In the residual branch all of them are merged
   into their b; in the mixer's branch the stronger half is merged and the other half dropped.
3. Merging is b <- (a + b) / 2; several a of one b are averaged first (ours; the paper leaves it open).
4. The last tokens, whose logits are read, are always in B (ours).

The blocks are those of the dense program that it is compared with, hence the same operators; scores cost no second
scan.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

import simba_fx
from simba_fx.bench.options import BenchError
from simba_fx.compiling import dynamic_marker, skip_frame
from simba_fx.flops import ModelFlops
from simba_fx.graph.facts import operator_of
from simba_fx.ops.recurrences import SCANS
from simba_fx.runtime.program import Block, Kind

__all__ = ["UTRC", "places", "reduce_tokens", "removed"]

_PUBLISHED = {64: range(12, 43, 5), 48: range(10, 36, 5)}


def places(n_blocks: int) -> tuple[int, ...]:
    """The blocks after which tokens go: 12, 17, …, 42 of 64 and 10, 15, …, 35 of 48; other depths as 64, to scale."""
    if n_blocks in _PUBLISHED:
        return tuple(_PUBLISHED[n_blocks])
    scaled = {round(block * n_blocks / 64) for block in _PUBLISHED[64]}
    return tuple(sorted(block for block in scaled if block < n_blocks - 1))


def removed(tokens: int, ratio: float, tail: int = 1) -> int:
    """How many of so many tokens go at one place; at most the half that may, and none of the tail."""
    return min(tokens - math.ceil(ratio * tokens), tokens // 2, tokens - tail)


def counts(n_blocks: int, length: int, ratio: float, tail: int = 1) -> list[int]:
    """Tokens that enter each block."""
    found, tokens, cut = [], length, places(n_blocks)
    for block in range(n_blocks):
        found.append(tokens)
        tokens -= removed(tokens, ratio, tail) if block in cut else 0
    return found


def reduce_tokens(residual: Tensor, mixer: Tensor, importance: Tensor, going: int, tail: int = 1) -> Tensor:
    """The block's output `(B, N - going, D)`, from both branches `(B, N, D)` and the importance `(B, N)`."""
    rows, tokens = importance.shape
    last = torch.arange(tokens, device=importance.device) >= tokens - tail
    order = importance.masked_fill(last, float("inf")).argsort(1)
    lower, upper = order[:, : tokens // 2], order[:, tokens // 2 :]
    unit = nn.functional.normalize(residual + mixer, dim=2)
    similarity = _take(unit, lower) @ _take(unit, upper).transpose(1, 2)
    strength, link = similarity.max(2)
    strength = strength.masked_fill(lower >= tokens - tail, -2)  # where the tail is more than half
    strongest = strength.topk(going, 1).indices
    source, target = lower.gather(1, strongest), upper.gather(1, link.gather(1, strongest))
    half = (going + 1) // 2
    hidden = _merge(residual, source, target) + _merge(mixer, source[:, :half], target[:, :half])
    stays = torch.ones(rows, tokens, dtype=torch.int32, device=hidden.device).scatter(1, source, 0)
    kept = stays.argsort(dim=1, descending=True, stable=True)[:, : tokens - going]
    return _take(hidden, kept)


def _take(values: Tensor, index: Tensor) -> Tensor:
    """`(B, N, D)` at `(B, k)`."""
    return values.gather(1, index.unsqueeze(2).expand(-1, -1, values.shape[2]))


def _merge(values: Tensor, source: Tensor, target: Tensor) -> Tensor:
    """Each target becomes the mean of itself and the mean of its sources."""
    wide = target.unsqueeze(2).expand(-1, -1, values.shape[2])
    total = torch.zeros_like(values).scatter_add(1, wide, _take(values, source))
    number = values.new_zeros(values.shape[:2]).scatter_add(1, target, values.new_ones(target.shape)).unsqueeze(2)
    return torch.where(number > 0, (values + total / number.clamp(min=1)) / 2, values)


class UTRC(nn.Module):
    """A pure Mamba or Mamba-2 model that reduces tokens so. Its logits are those of the tokens that are left.

    Under `torch.compile` each kind of block and the reduction are compiled, as in a sparse model with compile="blocks".
    """

    def __init__(self, model: Any, ratio: float = 1.0) -> None:
        """`model`: the dense model, as transformers made it. `ratio`: share of the tokens kept at each place."""
        super().__init__()
        dense = simba_fx.transform(model, "dense")
        device = model.get_input_embeddings().weight.device
        with torch.no_grad():  # the graph without a cache
            dense(torch.zeros(1, 8, dtype=torch.int64, device=device), use_cache=False)
        program: Any = simba_fx.program(dense).program
        nodes = list(program.graph.find_nodes(op="call_module"))
        self.ratio, self.tail = ratio, 1
        self.places = places(len(nodes))
        self.embed, self.head = model.get_input_embeddings(), model.get_output_embeddings()
        self.norm = getattr(model.base_model, "norm_f", None)
        blocks = [getattr(program, node.target) for node in nodes]
        if self.norm is None or not all(map(_is_plain, blocks)):
            raise BenchError(
                f"utrc is described for pure Mamba and Mamba-2 models; found {type(model).__name__}, whose blocks take "
                "or hold more than that. Leave it out."
            )
        kinds: dict[Any, Kind] = {}
        self.__dict__["blocks"] = [_piece(block, i in self.places, kinds) for i, block in enumerate(blocks)]
        for name in ("_run", "_reduced"):  # the loop stays Python, what it calls is compiled
            self.__dict__[name] = skip_frame(getattr(type(self), name))

    def aim(self, flops: ModelFlops, rows: int, length: int, target: int, head_is_fixed: bool) -> str:
        """Set the ratio up for so many FLOPs, and say how; `head_is_fixed`: the head reads the tail alone."""

        def cost(ratio: float) -> int:
            tokens = counts(len(flops.blocks), length, ratio, self.tail)
            pairs = sum((tokens[at] // 2) * (tokens[at] - tokens[at] // 2) for at in self.places if ratio < 1)
            similarity = 2 * rows * pairs * int(self.embed.weight.shape[1])
            return flops.stack(tokens) + similarity + flops.head(length if head_is_fixed else tokens[-1])

        low, high = 0.5, 1.0
        for _ in range(30):
            middle = (low + high) / 2
            low, high = (middle, high) if cost(middle) <= target else (low, middle)
        self.ratio = low
        return f"ratio {low:.4f} after blocks {', '.join(map(str, self.places))}"

    def forward(self, input_ids: Tensor, use_cache: bool = False, logits_to_keep: int = 0) -> Tensor:
        """Logits `(B, min(k, logits_to_keep or k), V)` of the k tokens that are left."""
        return self.__dict__["_run"](self, input_ids, logits_to_keep)  # type: ignore[no-any-return]

    def _run(self, input_ids: Tensor, logits_to_keep: int) -> Tensor:
        hidden = self.embed(input_ids)
        for index, block in enumerate(self.__dict__["blocks"]):
            found = block(hidden)
            hidden = self.__dict__["_reduced"](self, *found) if index in self.places else found
        norm: Any = self.norm
        hidden = norm(hidden[:, -logits_to_keep:])
        logits: Tensor = self.head(hidden.to(self.head.weight.dtype)).float()
        return logits

    def _reduced(self, residual: Tensor, mixer: Tensor, y: Tensor) -> Tensor:
        going = removed(residual.shape[1], self.ratio, self.tail)
        if not going:
            return residual + mixer
        dynamic_marker()((residual, mixer, y), ((0, 1), (0, 1), (0, 1 if y.dim() == 4 else 2)))
        return _scored_and_reduced(residual, mixer, y, going, self.tail)


def _scored_and_reduced(residual: Tensor, mixer: Tensor, y: Tensor, going: int, tail: int) -> Tensor:
    """`y` is `(B, D, N)` of a selective scan or `(B, N, H, P)` of an SSD scan."""
    importance = y.float().clamp(min=0).mean(1 if y.dim() == 3 else (2, 3))
    return reduce_tokens(residual, mixer, importance, going, tail)


# --- blocks of the dense program, with other outputs ------------------------------------------------------------------


def _is_plain(block: Block) -> bool:
    """One input, one scan, and a sum of two branches at the end."""
    scans = [node for node in block.graph.nodes if node.target in SCANS]
    result = _result(block.graph)
    return len(block.graph.find_nodes(op="placeholder")) == 1 and len(scans) == 1 and _is_sum(result)


def _is_sum(node: fx.Node) -> bool:
    return operator_of(node) is torch.ops.aten.add.Tensor and all(isinstance(a, fx.Node) for a in node.args[:2])


def _result(graph: fx.Graph) -> fx.Node:
    found: Any = graph.output_node().args[0]
    last: fx.Node = found[-1] if isinstance(found, Sequence) else found
    return last


def _piece(block: Block, reducing: bool, kinds: dict[Any, Kind]) -> Block:
    """The block with its new hidden state as its only output; where it reduces, with residual, mixer's output and y."""
    key = block.kind, reducing
    if key not in kinds:
        graph = fx.Graph()
        graph.output(graph.graph_copy(block.graph, {}))
        result = _result(graph)
        if reducing:
            scan = next(node for node in graph.nodes if node.target in SCANS)
            y = next(user for user in scan.users if user.target is operator.getitem and user.args[1] == 0)
            outputs: Any = (*result.args[:2], y)
        else:
            outputs = result
        graph.output_node().args = (outputs,)
        graph.eliminate_dead_code()
        for old, new in zip(block.graph.find_nodes(op="placeholder"), graph.find_nodes(op="placeholder")):
            new.meta = dict(old.meta)
        kinds[key] = Kind(graph, f"Utrc{len(kinds)}")
    return Block(kinds[key], block.path, block.hooked, root=block.root)
