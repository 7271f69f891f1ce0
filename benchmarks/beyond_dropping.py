"""What a dropped token could leave behind, tried on the example checkpoints: `python benchmarks/beyond_dropping.py`.

The tokens that stay behind the first block are those that simba_fx keeps (`0.5`, `0.3`, the default criterion). Then
the model's own blocks run on them, and what was dropped

    drop     leaves nothing: what simba_fx does, and what this script is checked against
    merge    is averaged into the residual of the next token that stays
    half     the same, with half of the weight
    decay    still decays the states: the next token that stays decays them as often as there were tokens
    both     merge and decay

With `--hybrid`, on the small Qwen3.5, whose attention looks things up: a token that left

    drop     leaves nothing
    keys     is still seen by attention, in the state that it left with: its keys and values are computed from that
    back     comes back for blocks of attention alone, MLP included

Text: loss of the last 100 bytes over the dense model's, window by window, ± one standard error. Needles: share of
planted constants of which all six digits are the likeliest. Beside both the difference to `drop`, case by case.
"""

from __future__ import annotations

import argparse
import itertools
import random
import statistics
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM, MambaForCausalLM
from transformers.models.mamba import modeling_mamba

import simba_fx

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
sys.path.insert(0, str(EXAMPLES))
from real_text import sources, windows  # noqa: E402  # scripts beside the other examples, not a package
from train_needles import ANSWER, DIGITS, KEYS  # noqa: E402

LAST = 100
MERGED = {"drop": 0.0, "merge": 1.0, "half": 0.5, "decay": 0.0, "both": 1.0}
"""The weight of dropped tokens beside the one that stays."""
DECAYS = ("decay", "both")


@contextmanager
def scans(gaps: list[Tensor | None]) -> Iterator[None]:
    """The models' scans by simba_fx's operator. `gaps[0]` `(1, k)`: how often a token decays the states; None: once."""
    own = modeling_mamba.mamba_selective_scan

    def scan(u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None, z: Tensor | None = None,
             delta_bias: Tensor | None = None, delta_softplus: bool = False, return_last_state: bool = False,
             **_: Any) -> Any:  # fmt: skip
        if gaps[0] is not None:
            dt = dt if delta_bias is None else dt + delta_bias[:, None]
            dt, B = (F.softplus(dt) if delta_softplus else dt) * gaps[0][:, None], B / gaps[0][:, None]
            delta_bias, delta_softplus = None, False
        y, state = torch.ops.simba_fx.selective_scan(u, dt, A, B, C, D, z, delta_bias, delta_softplus)
        return (y, state) if return_last_state else y

    modeling_mamba.mamba_selective_scan = scan
    try:
        yield
    finally:
        modeling_mamba.mamba_selective_scan = own


@torch.no_grad()
def logits(model: Any, ids: Tensor, kept: Tensor, what: str, gaps: list[Tensor | None]) -> Tensor:
    """Of the tokens that stay, `(k, vocabulary)`; ids `(1, L)`, kept `(k,)`."""
    stack = model.backbone
    gaps[0] = None
    hidden = stack.layers[0](stack.embeddings(ids))[0]
    group = torch.searchsorted(kept, torch.arange(ids.shape[1]))  # the next token that stays; the last one does
    stays = torch.zeros(ids.shape[1]).index_fill(0, kept, 1.0)
    weight = torch.where(stays > 0, 1.0, MERGED[what])
    count = torch.zeros(len(kept)).index_add(0, group, weight)
    hidden = torch.zeros(len(kept), hidden.shape[1]).index_add(0, group, hidden * weight[:, None]) / count[:, None]
    if what in DECAYS:
        gaps[0] = torch.zeros(len(kept)).index_add(0, group, torch.ones(ids.shape[1]))[None]
    hidden = hidden[None]
    for block in stack.layers[1:]:
        hidden = block(hidden)
    found: Tensor = model.lm_head(stack.norm_f(hidden))[0]
    return found


@torch.no_grad()
def hybrid_logits(model: Any, ids: Tensor, kept: Tensor, first: int, what: str) -> Tensor:
    """Of the tokens `kept` `(k,)` that enter block `first` and those behind it, `(k, vocabulary)`; ids `(1, L)`."""
    stack, places = model.model, torch.arange(ids.shape[1])[None]
    hidden = stack.embed_tokens(ids)
    tables = stack.rotary_emb(hidden, places[None].expand(3, -1, -1))
    for number, layer in enumerate(stack.layers):
        stays = kept if number >= first and (what == "drop" or layer.block_type == "linear_attention") else places[0]
        told = {"position_embeddings": tuple(table[:, stays] for table in tables), "attention_mask": None,
                "position_ids": places[:, stays]}  # fmt: skip
        found = layer(hidden[:, stays], **told)
        changed = kept if what == "keys" and number >= first else stays  # the others are as they were
        hidden = hidden.index_copy(1, changed, found[:, torch.searchsorted(stays, changed)])
    found_logits: Tensor = model.lm_head(stack.norm(hidden[:, kept]))[0]
    return found_logits


def of_a_hybrid(first: int, share: float, criterion: str, count: int, length: int) -> dict[str, list[list[float]]]:
    """What is found by what is left behind: needles (1 or 0), and losses over the dense model's."""
    model = AutoModelForCausalLM.from_pretrained(EXAMPLES / "qwen3.5-needles-2m").eval()
    sparse = simba_fx.transform(model, {first: share}, criterion=criterion)
    draw, texts = random.Random(0), sources()
    found: dict[str, list[list[float]]] = {what: [[], []] for what in ("drop", "keys", "back")}
    for _ in range(2 * count):
        ids, answer = needle(texts, length, draw)
        kept, _ = kept_by(sparse, ids, ANSWER + 1, first)
        for what, (needles, _) in found.items():
            made = hybrid_logits(model, ids, kept, first, what)
            needles.append(float(torch.equal(made[-ANSWER - 1 : -1].argmax(1), answer)))
    for row in windows(count, length + 1):
        ids, target = row[None, :-1], row[-LAST:]
        kept, own = kept_by(sparse, ids, LAST, first)
        right = hybrid_logits(model, ids, torch.arange(length), first, "drop")[-LAST:]
        for what, (_, losses) in found.items():
            made = hybrid_logits(model, ids, kept, first, what)[-LAST:]
            if what == "drop":
                torch.testing.assert_close(made, own, rtol=1e-3, atol=1e-3)
            losses.append(float(F.cross_entropy(made, target) - F.cross_entropy(right, target)))
    return found


def needle(texts: list[bytes], length: int, draw: random.Random) -> tuple[Tensor, Tensor]:
    """Ids `(1, L)` that end in a question and its answer, and the answer `(6,)`."""
    key, answer = draw.choice(KEYS), "".join(draw.choices(DIGITS, k=ANSWER))
    planted, asked = f'TOKEN_{key} = "{answer}"\n'.encode(), f'assert TOKEN_{key} == "{answer}'.encode()
    room = length - len(planted) - len(asked)
    text = draw.choice([text for text in texts if len(text) > room + 1])
    start = draw.randrange(len(text) - room)
    body = text[start : start + room]
    place = draw.choice([0, *(i + 1 for i, byte in enumerate(body) if byte == 10)])
    ids = torch.tensor([list(body[:place] + planted + body[place:] + asked)])
    return ids, ids[0, -ANSWER:]


def kept_by(sparse: Any, ids: Tensor, tail: int, block: int = 1) -> tuple[Tensor, Tensor]:
    """The tokens that enter a block, and the logits of the last `tail`."""
    with torch.no_grad(), simba_fx.tail(sparse, tail):
        found = sparse(ids, use_cache=False).logits[0, -tail:]
    return simba_fx.kept(sparse)[block][0], found


def on_text(share: float, count: int, length: int) -> dict[str, list[float]]:
    """Losses by what is left behind, window by window, over the dense model's."""
    model = MambaForCausalLM.from_pretrained(EXAMPLES / "mamba-py-3m").eval()
    sparse, dense = simba_fx.transform(model, share), simba_fx.transform(model, "dense")
    gaps: list[Tensor | None] = [None]
    found: dict[str, list[float]] = {what: [] for what in MERGED}
    with scans(gaps):
        for row in windows(count, length + 1):
            ids, target = row[None, :-1], row[-LAST:]
            kept, own = kept_by(sparse, ids, LAST)
            _, right = kept_by(dense, ids, LAST)
            for what in MERGED:
                made = logits(model, ids, kept, what, gaps)[-LAST:]
                if what == "drop":
                    torch.testing.assert_close(made, own, rtol=1e-3, atol=1e-3)
                found[what].append(float(F.cross_entropy(made, target) - F.cross_entropy(right, target)))
    return found


def on_needles(share: float, count: int, length: int) -> dict[str, list[float]]:
    """1 for each needle that is found, else 0, by what is left behind; and by the dense model."""
    model = MambaForCausalLM.from_pretrained(EXAMPLES / "mamba-needles-3m").eval()
    sparse, draw, texts = simba_fx.transform(model, share), random.Random(0), sources()
    gaps: list[Tensor | None] = [None]
    found: dict[str, list[float]] = {what: [] for what in ("dense", *MERGED)}
    with scans(gaps):
        for _ in range(count):
            ids, answer = needle(texts, length, draw)
            kept, _ = kept_by(sparse, ids, ANSWER + 1)
            for what in found:
                stays = torch.arange(ids.shape[1]) if what == "dense" else kept
                made = logits(model, ids, stays, "drop" if what == "dense" else what, gaps)
                found[what].append(float(torch.equal(made[-ANSWER - 1 : -1].argmax(1), answer)))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=32, help="windows of text; six times as many needles")
    parser.add_argument("--length", type=int, default=1024, help="bytes")
    parser.add_argument("--hybrid", action="store_true", help="ask the small Qwen3.5; twice as many needles")
    options = parser.parse_args()
    if options.hybrid:
        print("| cut, share, criterion | what is left behind | loss over dense | needles found | more than `drop` |")
        print("|---|---|---|---|---|")
        for first, share, criterion in itertools.product((1, 5), (0.5, 0.3), ("simba-l2+write", "recent", "random")):
            found = of_a_hybrid(first, share, criterion, options.count, options.length)
            for what, (needles, losses) in found.items():
                more = mean([a - b for a, b in zip(needles, found["drop"][0])], 3)
                print(f"| {first}, {share}, {criterion} | {what} | {mean(losses, 4)} | {mean(needles, 3)} | {more} |",
                      flush=True)  # fmt: skip
        return
    print("| share | what is left behind | loss over dense | over `drop` | needles found | more than `drop` |")
    print("|---|---|---|---|---|---|")
    for share in (0.5, 0.3):
        text = on_text(share, options.count, options.length)
        needles = on_needles(share, 6 * options.count, options.length)
        print(f"| {share} | dense | – | – | {mean(needles['dense'], 3)} | – |")
        for what in MERGED:
            beside = [mean([a - b for a, b in zip(one[what], one["drop"])], digits)
                      for one, digits in ((text, 4), (needles, 3))]  # fmt: skip
            cells = (mean(text[what], 4), beside[0], mean(needles[what], 3), beside[1])
            print(f"| {share} | {what} | {' | '.join(cells)} |", flush=True)


def mean(numbers: list[float], digits: int) -> str:
    """And its standard error."""
    error = statistics.stdev(numbers) / len(numbers) ** 0.5
    return f"{statistics.mean(numbers):+.{digits}f} ± {error:.{digits}f}"


if __name__ == "__main__":
    main()
