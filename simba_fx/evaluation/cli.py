"""The commands `simba-fx eval` and `simba-fx page`. Nothing heavy is imported to parse or to help."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import sys
from pathlib import Path
from typing import Any

from simba_fx.bench.cli import device_of
from simba_fx.bench.options import Criterion, parse_schedule
from simba_fx.evaluation.options import BASELINES, STYLES, TASKS, EvalError, Options

__all__ = ["add_commands"]


def add_commands(commands: Any) -> None:
    _add_eval(commands)
    _add_page(commands)
    _add_flow(commands)
    harness = commands.add_parser(
        "lm-eval", help="lm-eval-harness, with --model simba for sparse models", add_help=False
    )
    harness.set_defaults(run=_harness)


def _add_eval(commands: Any) -> None:
    command = commands.add_parser(
        "eval", help="quality against compute, on a model and texts of your own",
        description="Loss of the last tokens after long contexts, and needles found in them: dense, sparse and rivals.",
    )  # fmt: skip
    add = command.add_argument
    add("model", help="folder with a transformers checkpoint; its tokenizer, if it has one, else bytes")
    add("--text", nargs="+", required=True, metavar="FILE", help="files, or folders whose files are read")
    add("--lengths", type=int, nargs="+", default=[1024, 2048], metavar="L", help="tokens of context (1024 2048)")
    add("--last", type=int, default=100, metavar="M", help="tokens whose loss is read (100)")
    add("--windows", type=int, default=16, metavar="N", help="windows of text (16)")
    add("--schedules", nargs="*", default=["linear", "0.3", "0.5", "0.7"], metavar="S", help="(linear 0.3 0.5 0.7)")
    add("--criteria", nargs="+", metavar="C", default=["simba-l2+write", "simba", "random", "recent"],
        help="names, a span behind a slash (simba-l2+write/15 simba random recent)")  # fmt: skip
    add("--baselines", nargs="*", choices=BASELINES, default=["left-truncation"], metavar="B",
        help=f"at the FLOPs of each schedule, of {', '.join(BASELINES)}")  # fmt: skip
    add("--against", nargs="*", default=[], metavar="MODEL", help="other models that read the same tokens, dense")
    add("--near", type=int, default=128, metavar="K", help="context that far tokens have to do without (128)")
    add("--gain", type=float, default=1.0, metavar="NATS", help="by which the whole context helps far tokens (1)")
    add("--tasks", nargs="*", choices=TASKS, default=[], metavar="T",
        help=f"what is planted in the texts and searched: {', '.join(TASKS)} (none)")  # fmt: skip
    add("--searches", type=int, default=10, metavar="N", help="of each task, at each length and depth (10)")
    add("--depths", type=float, nargs="+", default=[0.0, 0.25, 0.5, 0.75, 1.0], metavar="D")
    add("--pairs", type=int, default=4, metavar="P", help="keys and values in a haystack of needles or recall (4)")
    add("--style", choices=STYLES, default="code", help="of the lines of needles and lookup (code)")
    add("--device", help="cpu or cuda; cuda where there is one")
    add("--dtype", choices=("bfloat16", "float32", "float16"), default="float32")
    add("--batch", type=int, default=8192, metavar="T", help="tokens of a call, over its rows (8192)")
    add("--seed", type=int, default=0)
    add("--threads", type=int, help="threads on a CPU")
    add("--out", type=Path, default=Path("eval-out"), metavar="FOLDER",
        help="where results go (eval-out); a run that was stopped goes on there")  # fmt: skip
    command.set_defaults(run=_run)


def _add_page(commands: Any) -> None:
    command = commands.add_parser(
        "page", help="a text as a page of HTML, each token coloured by how far it travelled",
        description="Run a sparse model on the beginning of a text, and write a page that needs nothing but itself.",
    )  # fmt: skip
    add = command.add_argument
    add("model", help="folder with a transformers checkpoint; its tokenizer, if it has one, else bytes")
    add("--text", required=True, metavar="FILE")
    add("--tokens", type=int, default=1024, metavar="L", help="of the text, from its beginning (1024)")
    add("--schedule", default="0.5", help="as in Python (0.5)")
    add("--criterion", default="simba-l2+write", help="a span behind a slash: simba-l2/31 (simba-l2+write/15)")
    add("--device", help="cpu or cuda; cuda where there is one")
    add("--out", type=Path, default=Path("page.html"), metavar="FILE")
    command.set_defaults(run=_page)


def _add_flow(commands: Any) -> None:
    command = commands.add_parser(
        "flow", help="how alike neighbouring tokens are behind each block, and from how far back scans read",
        description="Draw two measures, block by block, of the dense model and of sparse ones (evaluation/flow.py).",
    )  # fmt: skip
    add = command.add_argument
    add("model", help="folder with a transformers checkpoint; its tokenizer, if it has one, else bytes")
    add("--text", nargs="+", required=True, metavar="FILE", help="files, and folders whose files are read")
    add("--tokens", type=int, default=1024, metavar="L", help="of a window (1024)")
    add("--windows", type=int, default=8, metavar="N", help="at most (8)")
    add("--schedules", nargs="*", default=["0.5", "linear"], metavar="S", help="(0.5 linear)")
    add("--criterion", default="simba-l2+write", help="a span behind a slash: simba-l2/31 (simba-l2+write/15)")
    add("--device", help="cpu or cuda; cuda where there is one")
    add("--seed", type=int, default=0)
    add("--out", type=Path, default=Path("flow.png"), metavar="FILE")
    command.set_defaults(run=_flow)


def _flow(given: argparse.Namespace) -> int:
    criterion = Criterion.parse(given.criterion)
    schedules = {"dense": "dense"} | {text: parse_schedule(text) for text in given.schedules}
    import torch

    import simba_fx
    from simba_fx.bench import models
    from simba_fx.evaluation.flow import draw, flow
    from simba_fx.evaluation.texts import documents, encoder_of, windows

    models.quiet()
    model = models.build(given.model, torch.device(device_of(given.device)), torch.float32)
    texts = documents(tuple(given.text), encoder_of(given.model, model.config.vocab_size), given.tokens)
    ids = windows(texts, given.windows, given.tokens, given.seed).to(model.device)
    found = {}
    for text, schedule in schedules.items():
        sparse = simba_fx.transform(model, schedule, criterion=criterion.name, span=criterion.span)
        found[text] = flow(sparse, ids)
        for block, (alike, far) in enumerate(zip(found[text].similarity.mean(1), found[text].distance.mean(1))):
            print(f"{text:24} block {block:3}  cosine of neighbours {alike:6.3f}  reads {far:8.1f} tokens back")
    draw(found, given.out)
    print(f"{len(ids)} windows of {given.tokens} tokens; written to {given.out}", file=sys.stderr)
    return 0


def _harness(given: argparse.Namespace) -> int:
    """Hand everything behind `simba-fx lm-eval` to lm-eval."""
    if importlib.util.find_spec("lm_eval") is None:
        raise EvalError("lm-eval-harness is not installed; expected the extra 'eval': pip install simba-fx[eval].")
    importlib.import_module("simba_fx.evaluation.harness")
    main: Any = importlib.import_module("lm_eval.__main__").cli_evaluate
    sys.argv = ["lm_eval", *given.rest]
    main()
    return 0


def _page(given: argparse.Namespace) -> int:
    criterion, schedule = Criterion.parse(given.criterion), parse_schedule(given.schedule)
    if not Path(given.text).is_file():
        raise EvalError(f"--text expects a file; found none at {given.text}.")
    import torch

    import simba_fx
    from simba_fx.bench import models
    from simba_fx.evaluation.page import write_page
    from simba_fx.evaluation.texts import encoder_of, shown

    models.quiet()
    model = models.build(given.model, torch.device(device_of(given.device)), torch.float32)
    ids = encoder_of(given.model, model.config.vocab_size)(Path(given.text).read_text(errors="replace"))[: given.tokens]
    sparse = simba_fx.transform(model, schedule, criterion=criterion.name, span=criterion.span)
    with torch.no_grad():
        sparse(torch.tensor([ids], device=model.device), use_cache=False)
    title = f"{models.title(given.model)}: {given.schedule}, {criterion}"
    write_page(sparse, shown(given.model, ids), given.out, title=title)
    print(f"written to {given.out}", file=sys.stderr)
    return 0


def _run(given: argparse.Namespace) -> int:
    options = options_of(given)
    options.check()
    from simba_fx.evaluation.plots import draw
    from simba_fx.evaluation.runner import Run
    from simba_fx.evaluation.tables import markdown

    options.out.mkdir(parents=True, exist_ok=True)
    try:
        found = Run(options)()
    except KeyboardInterrupt:
        print(f"\nstopped: the same command goes on from {options.out}", file=sys.stderr)
        return 130
    text = markdown(found)
    (options.out / "table.md").write_text(text)
    print(text)
    pictures = draw(found, options.out)
    print(f"written to {options.out}: {', '.join(('results.json', 'table.md', *pictures))}", file=sys.stderr)
    return 0


def options_of(given: argparse.Namespace) -> Options:
    return Options(
        model=given.model,
        texts=tuple(given.text),
        lengths=tuple(sorted(set(given.lengths))),
        last=given.last,
        windows=given.windows,
        schedules=tuple(given.schedules),
        criteria=tuple(given.criteria),
        baselines=tuple(given.baselines),
        against=tuple(given.against),
        near=given.near,
        gain=given.gain,
        tasks=tuple(given.tasks),
        searches=given.searches,
        depths=tuple(given.depths),
        pairs=given.pairs,
        style=given.style,
        device=device_of(given.device),
        dtype=given.dtype,
        batch=given.batch,
        seed=given.seed,
        threads=given.threads,
        out=given.out,
    )
