"""Stages c and d: a tiny model of the tests' registry on the GPU against itself on a CPU, and no wait for the GPU.

FAMILY names the model, MAMBA=1 lets simba_fx find mamba_ssm. Beside every error stands, block by block, which share of
the kept positions is the same: where that is below 1 a decision fell otherwise, and the error says nothing more.
"""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import reference
import torch
from common import DEVICE, DRY, add_mamba, attempt, left, record, relative_rms
from models import BY_NAME, linear, padded, tokens  # before mamba_ssm can be found: the CPU's answers are PyTorch's
from torch import Tensor, nn
from torch._dynamo.utils import counters

import simba_fx
from simba_fx.ops import kernel_path
from simba_fx.ops.cuda import packages as cuda

ENTRY = BY_NAME[os.environ["FAMILY"]]
LENGTH = 40 if DRY else 150
PADS = (0, 29)
PLANS: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("blocks", "blocks", {}),
    ("blocks, CUDA graphs", "blocks", {"mode": "reduce-overhead"}),
    ("whole", "whole", {"dynamic": False}),
    ("whole, CUDA graphs", "whole", {"dynamic": False, "mode": "reduce-overhead"}),
)


@dataclass(frozen=True)
class Prompt:
    ids: Tensor
    mask: Tensor | None = None

    def arguments(self, device: torch.device) -> dict[str, Tensor]:
        found = {"input_ids": self.ids.to(device)}
        return found if self.mask is None else found | {"attention_mask": self.mask.to(device)}


@dataclass(frozen=True)
class Answer:
    logits: Tensor
    """Of the real tokens only."""
    kept: list[Tensor]

    def against(self, right: Answer) -> dict[str, Any]:
        same = [(a.cpu() == b.cpu()).float().mean().item() for a, b in zip(self.kept, right.kept)]
        return {"rms": relative_rms(self.logits, right.logits), "kept": [round(share, 4) for share in same]}


def clearest(model: nn.Module, make: Callable[[int], Prompt]) -> Prompt:
    """Of twelve draws the one whose closest decision is clearest: none may depend on rounding."""

    def margin(prompt: Prompt) -> float:
        with torch.no_grad():
            return reference.run(model, prompt.ids, linear(ENTRY), prompt.mask).margin

    return max(map(make, range(12)), key=margin)


def two_rows(seed: int) -> Prompt:
    return Prompt(tokens(seed, 2, LENGTH))


def two_padded_rows(seed: int) -> Prompt:
    rows = [tokens(seed, LENGTH), tokens(seed + 1, LENGTH - PADS[1])]
    return Prompt(*padded(rows, PADS, (0, 0)))


def call(run: Any, arguments: dict[str, Tensor], use_cache: bool = False) -> Tensor:
    with torch.no_grad():
        logits: Tensor = run(**arguments, use_cache=use_cache).logits
    return logits


def answer(run: Any, sparse: nn.Module, prompt: Prompt, use_cache: bool = False) -> Answer:
    """Of `run`, which is `sparse` or a compiled form of it. A CUDA graph's next replay overwrites what it returned."""
    device = next(sparse.parameters()).device
    logits = call(run, prompt.arguments(device), use_cache).clone()
    kept = [positions.clone() for positions in simba_fx.kept(sparse)]
    return Answer(logits if prompt.mask is None else logits[prompt.mask.to(device) != 0], kept)


def quiet(run: Any, arguments: dict[str, Tensor]) -> dict[str, Any]:
    """A call in which nothing may wait for the GPU."""
    if DRY:
        call(run, arguments)
        return {"ok": True}
    torch.cuda.set_sync_debug_mode("error")
    try:
        call(run, arguments)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return {"ok": True}


class Checks:
    def __init__(self) -> None:
        self.cpu = ENTRY.build()
        self.gpu = ENTRY.build().to(DEVICE)
        self.on_cpu = simba_fx.transform(self.cpu, "linear")
        self.sparse = simba_fx.transform(self.gpu, "linear")
        self.plain = clearest(self.cpu, two_rows)
        self.masked = clearest(self.cpu, two_padded_rows)
        self.arguments = self.plain.arguments(DEVICE)
        self.masked_arguments = self.masked.arguments(DEVICE)
        # mamba_ssm's SSD scan multiplies float32 in TF32, 10 bits.
        self.tolerance = 1e-2 if not DRY and ENTRY.kind == "ssd" and cuda.ssd_scan_fn() is not None else 1e-3

    def judged(self, found: dict[str, Any], **more: Any) -> dict[str, Any]:
        return {"ok": found["rms"] < self.tolerance, **found, **more}

    def worst(self, got: list[Answer], right: Answer) -> dict[str, Any]:
        """Of several calls; an error that is not a number is the worst."""
        found = [a.against(right) for a in got]
        return self.judged(max(found, key=lambda f: float("inf") if f["rms"] != f["rms"] else f["rms"]))

    def same_as_on_a_cpu(self, prompt: Prompt) -> dict[str, Any]:
        right = answer(self.on_cpu, self.on_cpu, prompt)
        return self.judged(answer(self.sparse, self.sparse, prompt).against(right))

    def padded_as_alone(self) -> dict[str, Any]:
        mask = self.masked.mask
        assert mask is not None
        together = call(self.sparse, self.masked_arguments)
        kept = [positions.cpu() for positions in simba_fx.kept(self.sparse)]
        errors, same = [], []
        for row, pads in enumerate(PADS):
            alone = answer(self.sparse, self.sparse, Prompt(self.masked.ids[row : row + 1, pads:]))
            errors.append(relative_rms(together[row, pads:], alone.logits[0]))
            for block, positions in zip(kept, alone.kept):
                same.append(torch.equal(block[row][block[row] >= 0], positions[0].cpu() + pads))
        return {"ok": max(errors) < self.tolerance, "rms": errors, "kept": sum(same) / len(same)}

    def generate(self) -> dict[str, Any]:
        options = {"max_new_tokens": 4 if DRY else 16, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
        right = self.on_cpu.generate(self.plain.ids, **options)  # type: ignore[operator]
        got = self.sparse.generate(self.arguments["input_ids"], **options).cpu()  # type: ignore[operator]
        return {"ok": torch.equal(got, right), "same": (got == right).float().mean().item()}

    def backward(self) -> dict[str, Any]:
        found = []
        for model, device in ((self.cpu, torch.device("cpu")), (self.gpu, DEVICE)):
            sparse: Any = simba_fx.transform(copy.deepcopy(model), "linear")
            ids = self.plain.ids.to(device)
            sparse(ids, labels=ids, use_cache=False).loss.backward()
            found.append({name: p.grad for name, p in sparse.named_parameters() if p.grad is not None})
        errors = {name: relative_rms(found[1][name], gradient) for name, gradient in found[0].items()}
        worst = max(errors, key=lambda name: errors[name])
        return {"ok": errors[worst] < 1e-2, "worst": worst, "rms": errors[worst]}

    def compiled(self, title: str, way: str, options: dict[str, Any]) -> None:
        """One way of compiling, and with its result whatever else it should stand."""
        torch._dynamo.reset()
        counters.clear()
        if DRY:
            options = {name: value for name, value in options.items() if name != "mode"}
        calls = 4 if "graphs" in title else 2  # recorded, then replayed
        sparse: Any = self.sparse if way == "blocks" else simba_fx.transform(self.gpu, "linear", compile="whole")
        run = torch.compile(sparse, **options)

        def several(prompt: Prompt, **more: Any) -> dict[str, Any]:
            right = answer(sparse, sparse, prompt, **more)
            return self.worst([answer(run, sparse, prompt, **more) for _ in range(calls)], right)

        def first() -> dict[str, Any]:
            right = answer(sparse, sparse, self.plain)
            answer(sparse, sparse, self.masked)  # "whole" is traced from a graph that is there
            begun = time.time()
            got = [answer(run, sparse, self.plain)]
            seconds = time.time() - begun
            got += [answer(run, sparse, self.plain) for _ in range(calls - 1)]
            graphs = counters["stats"]["unique_graphs"]
            if way == "blocks":
                for length in (LENGTH - 17, LENGTH + 40):
                    call(run, {"input_ids": tokens(2, 2, length).to(DEVICE)})
            return self.worst(got, right) | {
                "first_s": round(seconds, 1),
                "graphs": graphs,
                "recompiled": counters["stats"]["unique_graphs"] - graphs,
                "cudagraph_skips": counters["inductor"]["cudagraph_skips"],
                "breaks": sum(counters["graph_break"].values()),
            }

        if not attempt(f"compiled: {title}", first, need=15):
            return
        attempt(f"no sync: {title}", lambda: quiet(run, self.arguments))
        if attempt(f"compiled, mask: {title}", lambda: several(self.masked)):
            attempt(f"no sync, mask: {title}", lambda: quiet(run, self.masked_arguments))
        if way == "blocks":
            attempt(f"compiled, use_cache: {title}", lambda: several(self.plain, use_cache=True))

    def full_graph(self) -> dict[str, Any]:
        torch._dynamo.reset()
        sparse = simba_fx.transform(self.gpu, "linear", compile="whole")
        call(sparse, self.arguments)
        call(torch.compile(sparse, fullgraph=True, dynamic=False, backend="eager"), self.arguments)
        return {"ok": True}

    def in_bfloat16(self) -> dict[str, Any]:
        """Compiled against uncompiled: Inductor rounds elsewhere, so a decision may fall otherwise."""
        torch._dynamo.reset()
        sparse: Any = simba_fx.transform(ENTRY.build().to(DEVICE, torch.bfloat16), "linear")
        right = answer(sparse, sparse, self.plain)
        found = answer(torch.compile(sparse), sparse, self.plain).against(right)
        return {"ok": found["rms"] < 0.1 if min(found["kept"]) == 1 else None, **found}


def main() -> None:
    if os.environ.get("MAMBA") == "1":
        add_mamba()
    record("kernels", path=kernel_path(DEVICE.type))
    checks = Checks()
    attempt("eager = CPU", lambda: checks.same_as_on_a_cpu(checks.plain))
    attempt("eager, mask = CPU", lambda: checks.same_as_on_a_cpu(checks.masked))
    attempt("padded = alone", checks.padded_as_alone)
    attempt("no sync, eager", lambda: quiet(checks.sparse, checks.arguments))
    attempt("no sync, eager, mask", lambda: quiet(checks.sparse, checks.masked_arguments))
    attempt("generate = CPU", checks.generate)
    attempt("backward = CPU", checks.backward)
    for plan in PLANS:
        checks.compiled(*plan)
    attempt("whole, fullgraph=True", checks.full_graph, need=15)
    attempt("bf16: compiled = eager", checks.in_bfloat16, need=15)
    record("end", ok=True, seconds_left=round(left(), 1))


if __name__ == "__main__":
    main()
