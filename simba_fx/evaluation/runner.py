"""The loop of `simba-fx eval`: every measurement is on disk as soon as it is made, and is not made twice."""

from __future__ import annotations

import hashlib
import itertools
import sys
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from simba_fx.bench import measure, models, results
from simba_fx.bench.runner import DTYPES
from simba_fx.evaluation import statistics
from simba_fx.evaluation.options import TASKS, Options
from simba_fx.evaluation.records import Records
from simba_fx.evaluation.rivals import Rival, flops_of, rivals_of
from simba_fx.evaluation.tasks import Haystacks, Search
from simba_fx.evaluation.texts import documents, encoder_of, windows
from simba_fx.flops import ModelFlops

__all__ = ["KNOWN", "Run"]

KNOWN = 2.0
"""Nats below which the dense model knows a token, given the whole context (LongPPL, Fang et al. 2024)."""


class Run:
    """One run: `Run(options)()` gives everything that was measured, as JSON holds it."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.begun = time.perf_counter()
        self.done = 0
        self.flops: dict[tuple[int, int], ModelFlops] = {}
        """Of the dense model, by length and tokens whose logits are read."""

    def __call__(self) -> dict[str, Any]:
        o = self.options
        if o.threads is not None:
            torch.set_num_threads(o.threads)
        models.quiet()
        device = torch.device(o.device)
        self.say(f"reading {o.model} and the texts")
        model = models.build(o.model, device, DTYPES[o.dtype])
        encode = encoder_of(o.model, model.config.vocab_size)
        texts = documents(o.texts, encode, o.lengths[-1] + 1)
        rows = windows(texts, o.windows, o.lengths[-1] + 1, o.seed)
        self.rivals = rivals_of(model, o)
        self.records = Records(o.out / "measured.jsonl", self._subject(model, rows))
        near = sum(length > o.near + o.last for length in o.lengths)
        self.total = (len(o.lengths) * len(self.rivals) + near) * len(rows)
        self.total += len(o.lengths) * len(self.rivals) * len(o.tasks) * o.searches * len(o.depths)
        found: dict[str, Any] = {
            "environment": measure.environment(device),
            "options": o.to_dict(),
            "model": {"name": models.title(o.model), "parameters": models.weights(model)},
            "windows": len(rows),
            "text": [],
            "tasks": [],
        }
        for length in o.lengths:
            found["text"] += self._text(length, rows[:, -length - 1 :].to(device))
            results.save(found, o.out / "results.json")
        haystacks = Haystacks(texts, encode, o.pairs, o.style, o.seed)
        for task, length in itertools.product(o.tasks, o.lengths):
            drawn = list(haystacks.searches(task, length, o.depths, o.searches))
            found["tasks"] += self._task(task, length, drawn, device)
            results.save(found, o.out / "results.json")
        return found

    def _subject(self, model: nn.Module, rows: Tensor) -> dict[str, Any]:
        """What every measurement of the run depends on; of the weights a few of each tensor, which training changes."""
        o = self.options
        few = torch.cat([p.detach().flatten()[:64].float().cpu() for p in model.parameters()])
        return {"model": models.title(o.model), "weights": _digest(few), "text": _digest(rows), "last": o.last,
                "seed": o.seed, "dtype": o.dtype, "pairs": o.pairs, "style": o.style}  # fmt: skip

    def _key(self, kind: str, rival: Rival, name: str, length: int) -> tuple[Any, ...]:
        """Of a measurement: what it depends on beside the subject."""
        leader = self.options.criteria[0] if rival.aim is not None else ""  # whose FLOPs a baseline has
        searches = (self.options.searches, *self.options.depths) if kind in TASKS else ()
        return (kind, name, length, leader, *searches)

    def say(self, text: str) -> None:
        print(f"[{time.perf_counter() - self.begun:6.1f} s] {text}", file=sys.stderr, flush=True)

    def _advance(self, steps: int, what: str, last: bool) -> None:
        """`last`: of what is measured; a file, unlike a terminal, gets one line for it."""
        self.done += steps
        if not (last or sys.stderr.isatty()):
            return
        spent, share = time.perf_counter() - self.begun, self.done / self.total
        bar = "█" * int(24 * share)
        end = "\r" if sys.stderr.isatty() and self.done < self.total else "\n"
        line = f"[{bar:24}] {100 * share:5.1f} %  {spent:5.0f} s, {spent / share - spent:5.0f} s to go  {what}"
        print(f"{line:110}", end=end, file=sys.stderr, flush=True)

    def _aimed(self, rival: Rival, ids: Tensor, last: int) -> None:
        """Give a baseline the FLOPs of its schedule."""
        if rival.aim is not None:
            rival.tokens = None
            leader = next(other for other in self.rivals if other.kind == "sparse" and other.schedule == rival.schedule)
            length = ids.shape[1] - 1
            if (length, last) not in self.flops:
                self.flops[length, last] = flops_of(self.rivals[0].module, ids, last)
            rival.says = rival.aim(rival, self.flops[length, last], length, last, leader.cost(ids, last))
            rival.flops.clear()

    # --- loss on text ---------------------------------------------------------------------------------------------

    def _losses(self, rival: Rival, length: int, ids: Tensor, name: str) -> tuple[Tensor, dict[str, Any]]:
        """`(windows, last)` and what else is known of it."""
        last = self.options.last
        key = self._key("text", rival, name, length)
        known = self.records.get(*key)
        if known is None:
            self._aimed(rival, ids, last)
            parts = torch.split(ids, max(1, self.options.batch // length))
            measured = []
            for rows in parts:
                measured.append(rival.scores(rows, last)[0].cpu())
                self._advance(len(rows), f"{name}, {length} tokens", rows is parts[-1])
            losses = [[round(x, 5) for x in row] for row in torch.cat(measured).tolist()]
            known = self.records.put(*key, losses=losses, flops=rival.cost(ids, last), says=rival.says)
        else:
            self._advance(len(ids), f"{name}, {length} tokens", True)
        return torch.tensor(known["losses"]), known

    def _text(self, length: int, ids: Tensor) -> Iterator[dict[str, Any]]:
        o, dense = self.options, self.rivals[0]
        base, about = self._losses(dense, length, ids, "dense")
        chosen = torch.zeros_like(base, dtype=torch.bool)
        if length > o.near + o.last:
            near = self._losses(dense, o.near + o.last, ids[:, -o.near - o.last - 1 :], "dense, near")[0]
            chosen = (near - base > o.gain) & (base < KNOWN)
        for rival in self.rivals:
            losses, known = (base, about) if rival is dense else self._losses(rival, length, ids, rival.name)
            row = {
                "length": length, "name": rival.name, "kind": rival.kind, "schedule": rival.schedule,
                "criterion": rival.criterion, "says": known["says"], "flops": known["flops"],
                "share": known["flops"] / about["flops"], "loss": float(losses.mean()),
                "more": _told(statistics.paired(losses, base)), "far": _told(statistics.paired(losses, base, chosen)),
                "far_share": float(chosen.double().mean()),
                "far_loss": float(losses[chosen].mean()) if chosen.any() else None,
            }  # fmt: skip
            yield row

    # --- tasks ------------------------------------------------------------------------------------------------------

    def _task(self, task: str, length: int, drawn: list[Search], device: torch.device) -> Iterator[dict[str, Any]]:
        depths = torch.tensor([search.depth for search in drawn])
        dense: dict[str, Any] | None = None  # the first
        for rival in self.rivals:
            key = self._key(task, rival, rival.name, length)
            known = self.records.get(*key)
            if known is None:
                hits: list[bool] = []
                for search in drawn:
                    ids = search.ids.to(device)
                    if rival.aim is not None and not hits:
                        self._aimed(rival, ids, search.answer)
                    hits.append(bool(rival.scores(ids, search.answer)[1].all()))
                    self._advance(1, f"{task}, {rival.name}, {length} tokens", search is drawn[-1])
                cost = rival.cost(ids, search.answer)
                known = self.records.put(*key, found=hits, flops=cost, says=rival.says)
            else:
                self._advance(len(drawn), f"{task}, {rival.name}, {length} tokens", True)
            hits_tensor = torch.tensor(known["found"])
            dense = dense or known
            yield {
                "task": task, "length": length, "name": rival.name, "kind": rival.kind, "schedule": rival.schedule,
                "criterion": rival.criterion, "says": known["says"], "share": known["flops"] / dense["flops"],
                "accuracy": _told(statistics.share(hits_tensor)),
                "by_depth": {str(d): float(hits_tensor[depths == d].double().mean()) for d in self.options.depths},
            }  # fmt: skip


def _digest(values: Tensor) -> str:
    return hashlib.sha256(values.numpy().tobytes()).hexdigest()[:16]


def _told(estimate: statistics.Estimate | None) -> dict[str, float] | None:
    return None if estimate is None else vars(estimate)
