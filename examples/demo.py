"""The main job on real weights and real text: `make demo`, or `python examples/demo.py`.

A 3M-parameter Mamba trained on Python source (examples/mamba-py-3m) reads source files that it was not trained on. The
same weights run dense and sparse; what is printed is the plan, the loss on the last 100 bytes, FLOPs, measured time of
both (compiled, in turns) with transformers' own beside them, a continuation from each, and a picture of what was kept.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from real_text import windows
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import MambaForCausalLM, logging

import simba_fx

SCORED = 100  # bytes at the end whose loss is read
HERE = Path(__file__).resolve().parent


def step(text: str) -> None:
    print(f"[{time.perf_counter() - STARTED:5.1f} s] {text}", flush=True)


def last_loss(model: nn.Module, rows: Tensor) -> Tensor:
    """Loss in nats per byte of each row's last bytes."""
    logits = model(rows[:, :-1], use_cache=False).logits[:, -SCORED:]
    return cross_entropy(logits.transpose(1, 2), rows[:, -SCORED:], reduction="none").mean(1)


def in_turns(calls: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each call, measured in turns after one warm-up of each."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(repeats + 1):
        for name, call in calls.items():
            begin = time.perf_counter()
            call()
            if turn:
                seconds[name].append(time.perf_counter() - begin)
    return seconds


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--final", type=float, default=0.1, help="share of the tokens that enters the last block")
    parser.add_argument("--every", type=int, default=1, help="blocks between two cuts; the mean share stays the same")
    parser.add_argument("--length", type=int, default=4096, help="tokens of the prompt that is timed")
    parser.add_argument("--repeats", type=int, default=9, help="timed calls of each model")
    parser.add_argument("--out", type=Path, default=Path("demo-out"), help="where the picture goes")
    options = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()

    model = MambaForCausalLM.from_pretrained(HERE / "mamba-py-3m").eval()
    step("checkpoint loaded; transforming")
    schedule = simba_fx.Linear(options.final, options.every)
    dense, sparse = simba_fx.transform(model, "dense"), simba_fx.transform(model, schedule)
    timed = windows(1, options.length)
    step(f"transformed; the plan for {options.length} bytes:")
    report = simba_fx.report(sparse, timed)
    print(f"\n{report}\n")

    rows = windows(16, 1025)
    with simba_fx.tail(dense, SCORED), simba_fx.tail(sparse, SCORED):
        step("loss of the last 100 of 1024 bytes, 16 files that the model was not trained on")
        losses = {
            "transformers": last_loss(model, rows),
            "dense": last_loss(dense, rows),
            "sparse": last_loss(sparse, rows),
        }
    recent = simba_fx.transform(model, schedule, criterion="recent")
    with simba_fx.tail(recent, SCORED):
        losses["recent"] = last_loss(recent, rows)
    cut = int(report.mean_share * 1024)
    losses["left truncation"] = last_loss(dense, rows[:, -cut - 1 :])

    step("compiling dense and sparse (Inductor), then timing them in turns")
    calls: dict[str, Callable[[], object]] = {}
    for name, one in (("dense", torch.compile(dense)), ("sparse", torch.compile(sparse))):
        calls[name] = lambda one=one: one(timed, logits_to_keep=1)
    seconds = in_turns(calls, options.repeats)
    seconds |= in_turns({"transformers": lambda: model(timed, logits_to_keep=1)}, 2)
    medians = {name: statistics.median(values) for name, values in seconds.items()}

    print(f"\n{'':16}{'loss':>10}{'± s.e.':>9}{'GFLOPs':>10}{'ms':>9}{'min … max':>18}{'speed-up':>10}")
    flops = {"dense": report.total.dense, "sparse": report.total.sparse_with_scorer, "transformers": report.total.dense}
    for name, loss in losses.items():
        error = (loss - losses["dense"]).std() / len(loss) ** 0.5
        line = f"{name:16}{loss.mean():10.4f}{error:9.4f}"
        if name in medians:
            low, high = min(seconds[name]) * 1e3, max(seconds[name]) * 1e3
            line += f"{flops[name] / 1e9:10.2f}{medians[name] * 1e3:9.1f}{f'{low:.1f} … {high:.1f}':>18}"
            line += f"{medians['dense'] / medians[name]:9.2f}x"
        print(line)
    gain = medians["dense"] / medians["sparse"]
    print(
        f"\nThe FLOPs promise {report.ideal_speedup:.2f}x; measured {gain:.2f}x, which is "
        f"{gain / report.ideal_speedup:.0%} of it ({report.machine}, torch {torch.__version__}).\n"
        "± is the standard error of the difference to dense. 'recent' keeps the last tokens by the same schedule;\n"
        f"'left truncation' is dense on the last {cut} bytes. This text hardly needs its long context, so both are\n"
        "strong rivals here; a claim for pruning inside the model needs a task where truncation hurts.\n"
    )

    step("a continuation of the same prompt from each")
    prompt = rows[:1, :600]
    for name, one in (("dense", dense), ("sparse", sparse)):
        out = one.generate(prompt, max_new_tokens=80, do_sample=False, eos_token_id=None, pad_token_id=0)
        print(f"\n--- {name}: …{show(prompt[0, -60:])}⟶{show(out[0, prompt.shape[1] :])}")

    options.out.mkdir(parents=True, exist_ok=True)
    picture = options.out / "trapezoid.png"
    report.plot(picture)
    print()
    step(f"done; which token went where: {picture}")


def show(codes: Tensor) -> str:
    return bytes(codes.tolist()).decode("utf-8", errors="replace")


if __name__ == "__main__":
    STARTED = time.perf_counter()
    main()
