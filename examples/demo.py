"""The main job on real weights and real text: `make demo`, or `python examples/demo.py`.

A 3M-parameter Mamba trained on Python source (examples/mamba-py-3m) reads source files that it was not trained on. The
same weights run dense and sparse; what is printed is the plan, the loss on the last 100 bytes against rivals, measured
times (compiled, in turns), a search for needles by a checkpoint that was trained to look back, a continuation from
each, and a picture of what was kept.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from real_text import sources, windows
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import MambaForCausalLM, logging

import simba_fx
from simba_fx.evaluation.tasks import Haystacks

SCORED = 100  # bytes at the end whose loss is read
HAYSTACK = 1024  # bytes that a needle is searched in
HERE = Path(__file__).resolve().parent


def step(text: str) -> None:
    print(f"[{time.perf_counter() - STARTED:5.1f} s] {text}", flush=True)


def last_loss(model: nn.Module, rows: Tensor) -> Tensor:
    """Loss in nats per byte of each row's last bytes."""
    with simba_fx.tail(model, SCORED):
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
    parser.add_argument("--share", type=float, default=0.5, help="of the tokens, that enters every block but the first")
    parser.add_argument("--criterion", default="simba-l2+write", help="what tokens are scored by")
    parser.add_argument("--span", type=int, default=15, help="tokens whose scores are pooled")
    parser.add_argument("--length", type=int, default=4096, help="tokens of the prompt that is timed")
    parser.add_argument("--repeats", type=int, default=9, help="timed calls of each model")
    parser.add_argument("--searches", type=int, default=8, help="needles searched at each depth")
    parser.add_argument("--out", type=Path, default=Path("demo-out"), help="where the pictures go")
    options = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    options.out.mkdir(parents=True, exist_ok=True)

    model = MambaForCausalLM.from_pretrained(HERE / "mamba-py-3m").eval()
    step("checkpoint loaded; transforming")
    variants = sparse_variants(model, options)
    sparse = variants["sparse"]
    timed = windows(1, options.length)
    step(f"transformed; the plan for {options.length} bytes:")
    report = simba_fx.report(sparse, timed)
    print(f"\n{report}\n")
    report.plot(options.out / "kept.png")

    rows = windows(16, 1025)
    step("loss of the last 100 of 1024 bytes, 16 files that the model was not trained on")
    losses = {name: last_loss(one, rows) for name, one in variants.items()}
    cut = int(report.mean_share * 1024)
    losses["left truncation"] = last_loss(variants["dense"], rows[:, -cut - 1 :])

    step("compiling dense and sparse (Inductor), then timing them in turns")
    calls: dict[str, Callable[[], object]] = {}
    for name in ("dense", "paper", "sparse"):
        compiled = torch.compile(variants[name])
        calls[name] = lambda one=compiled: one(timed, logits_to_keep=1)
    seconds = in_turns(calls, options.repeats)
    medians = {name: statistics.median(values) for name, values in seconds.items()}

    print(f"\n{'':16}{'loss - dense':>14}{'± s.e.':>9}{'FLOPs':>8}{'ms':>9}{'min … max':>18}{'speed-up':>10}")
    for name, loss in losses.items():
        over = loss - losses["dense"]
        line = f"{name:16}{over.mean():+14.4f}{over.std() / len(loss) ** 0.5:9.4f}"
        if name in medians:
            low, high = min(seconds[name]) * 1e3, max(seconds[name]) * 1e3
            line += f"{simba_fx.report(variants[name], timed).total.share:8.2f}"
            line += f"{medians[name] * 1e3:9.1f}{f'{low:.1f} … {high:.1f}':>18}{medians['dense'] / medians[name]:9.2f}x"
        print(line)
    print(
        f"\nDense loss {losses['dense'].mean():.4f} nats per byte; ± is the standard error of the difference.\n"
        f"'paper' is linear to 10 % by 'simba'; 'sparse', 'recent' and 'random' keep {options.share:g} of the tokens\n"
        f"behind the first block; 'left truncation' is dense on the last {cut} bytes.\n({report.machine}, torch "
        f"{torch.__version__})\n"
        "This text hardly needs its long context: recency and truncation lose nothing on it either. So:\n"
    )
    search_needles(options)

    step("a continuation of the same prompt from each")
    prompt = rows[:1, :600]
    for name in ("dense", "sparse"):
        out = variants[name].generate(prompt, max_new_tokens=80, do_sample=False, eos_token_id=None, pad_token_id=0)
        print(f"\n--- {name}: …{show(prompt[0, -60:])}⟶{show(out[0, prompt.shape[1] :])}")
    print()
    step(f"done; which token went where: {options.out / 'kept.png'}")


def sparse_variants(model: MambaForCausalLM, options: argparse.Namespace) -> dict[str, nn.Module]:
    """The same weights: dense, by the paper's setting, by ours, and by rivals at the counts of ours."""
    share = options.share
    return {
        "dense": simba_fx.transform(model, "dense"),
        "paper": simba_fx.transform(model, "linear", criterion="simba"),
        "sparse": simba_fx.transform(model, share, criterion=options.criterion, span=options.span),
        "recent": simba_fx.transform(model, share, criterion="recent"),
        "random": simba_fx.transform(model, share, criterion="random"),
    }


def search_needles(options: argparse.Namespace) -> None:
    """A task that needs the context: constants planted in source text, asked for at its end (`train_needles.py`)."""
    model = MambaForCausalLM.from_pretrained(HERE / "mamba-needles-3m").eval()
    variants = sparse_variants(model, options)
    depths = (0.0, 0.25, 0.5, 0.75, 1.0)
    step(f"{options.searches} needles at each of {len(depths)} depths of {HAYSTACK} bytes")
    texts = [torch.tensor(list(text)) for text in sources()]
    found: dict[str, list[tuple[float, bool]]] = {}
    haystacks = Haystacks(texts, lambda text: list(text.encode()), pairs=1, style="code", seed=0)
    for one in haystacks.searches("needles", HAYSTACK, depths, options.searches):
        kept = int(options.share * HAYSTACK)
        for name, variant in {**variants, "left truncation": variants["dense"]}.items():
            given = one.ids[:, -kept - one.answer :] if name == "left truncation" else one.ids
            with simba_fx.tail(variant, one.answer):
                logits = variant(given[:, :-1], use_cache=False, logits_to_keep=one.answer).logits
            right = bool((logits.argmax(2) == one.ids[:, -one.answer :]).all())
            found.setdefault(name, []).append((one.depth, right))
    print(f"\n{'found':16}{'all':>6}{'± s.e.':>8}" + "".join(f"{f'at {depth:g}':>9}" for depth in depths))
    for name, hits in found.items():
        share = sum(right for _, right in hits) / len(hits)
        line = f"{name:16}{share:6.2f}{(share * (1 - share) / len(hits)) ** 0.5:8.2f}"
        print(line + "".join(f"{sum(r for d, r in hits if d == depth) / options.searches:9.2f}" for depth in depths))
    print(f"\n(depth 0: the needle stands at the beginning; 'left truncation' reads the last {kept} bytes)\n")


def show(codes: Tensor) -> str:
    return bytes(codes.tolist()).decode("utf-8", errors="replace")


if __name__ == "__main__":
    STARTED = time.perf_counter()
    main()
