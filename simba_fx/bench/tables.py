"""The results as markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from simba_fx.bench.options import MODES
from simba_fx.bench.parts import PARTS

__all__ = ["groups", "in_ms", "markdown", "table"]

_COLUMNS = ("length", "variant", "ms, median (quartiles; min … max)", "peak MiB", "GFLOP", "scorer", "speed-up",
            "promise", "merit", "promise, merit with scorer", "first call, s", "compiled again")  # fmt: skip


def table(head: Sequence[str], rows: Iterable[Sequence[str]], left: int = 2) -> list[str]:
    """Markdown, the first `left` columns flush left."""
    rule = ["---" if i < left else "---:" for i in range(len(head))]
    return ["| " + " | ".join(cells) + " |" for cells in (head, rule, *rows)]


def groups(rows: Iterable[dict[str, Any]]) -> dict[tuple[str, str, int], list[dict[str, Any]]]:
    """Rows by (model, mode, batch), in order."""
    found: dict[tuple[str, str, int], list[dict[str, Any]]] = {}
    for row in rows:
        found.setdefault((row["model"], row["mode"], row["batch"]), []).append(row)
    return found


def markdown(found: dict[str, Any]) -> str:
    """Everything that was measured, as tables with the words that they need."""
    lines = ["# simba-fx bench", "", *_machine(found), ""]
    for (model, mode, batch), rows in groups(found["rows"]).items():
        about = found["models"][model]
        size = f"{about['blocks']} blocks, {about['parameters'] / 1e6:.3g} M parameters"
        lines += [f"## {model} ({size}), {mode}, batch {batch}", "", MODES[mode].says, ""]
        lines += table(_COLUMNS, [_cells(row) for row in rows])
        lines += ["", *_crossings(found["crossover"], model, mode, batch), *_recompiles(rows), *_notes(rows), ""]
        lines += ["Share of each part of the time that operators (CPU) or kernels (CUDA) take, one profiled call:", ""]
        lines += [*_shares(rows), ""]
    if found["decode"]:
        lines += ["## Decoding: ms per token of `generate`, uncompiled, batch and prompt as given", ""]
        head = ("model", "prompt", "batch", "tokens", "ms, median (quartiles; min … max)")
        lines += table(head, [_decoded(row) for row in found["decode"]], left=2)
        lines += [""]
    return "\n".join([*lines, *_words(found["options"]), ""])


def _machine(found: dict[str, Any]) -> list[str]:
    where, options = found["environment"], found["options"]
    versions = ", ".join(f"{name} {version}" for name, version in where["versions"].items() if version)
    lines = [
        f"* machine: {where['machine']}; {where['date']}",
        f"* {versions}; Python {where['python']}",
        f"* scans run by: {where['kernels']}",
        f"* {options['dtype']}, {options['repeats']} calls of each variant in turns after {options['warmup']} + 1, "
        f"head: {'the last token' if options['head'] == 'last' else 'all tokens'}, criterion {options['criterion']}",
    ]
    if where["device"] == "cuda":
        flushed = "overwritten" if options["flush_l2"] else "as the call before left it"
        lines.append(f"* times by CUDA events around each call; L2 {flushed}; clocks at the start: {where['clocks']}")
    return lines


def _cells(row: dict[str, Any]) -> list[str]:
    if "time" not in row:
        return [f"{row['length']:,}", row["name"], row["error"], *[""] * (len(_COLUMNS) - 3)]
    again = "by design" if MODES[row["mode"]].static else "–" if row["recompiles"] is None else str(row["recompiles"])
    dense = row["kind"] in ("dense", "original")
    scored = "" if dense else f"{row['promise_with_scorer']:.2f}x, {row['merit_with_scorer']:.2f}"
    return [
        f"{row['length']:,}",
        row["name"],
        in_ms(row["time"]),
        "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**20:.1f}",
        f"{row['flops']['total'] / 1e9:.4g}",
        f"{row['flops']['scorer'] / 1e9:.3g}" if row["flops"]["scorer"] else "",
        f"{row['speedup']:.2f}x" + ("" if row["kind"] == "dense" else _between(row, 1)),
        "" if dense else f"{row['promise']:.2f}x",
        "" if dense else f"{row['merit']:.2f}" + _between(row, row["promise"]),
        scored,
        f"{row['first_call_seconds']:.1f}",
        again,
    ]


def _between(row: dict[str, Any], promise: float) -> str:
    return f" ({row['speedup_low'] / promise:.2f} … {row['speedup_high'] / promise:.2f})"


def in_ms(time: dict[str, float]) -> str:
    ms = {name: f"{_digits(seconds * 1e3)}" for name, seconds in time.items()}
    return f"{ms['median']} ({ms['q1']} … {ms['q3']}; {ms['min']} … {ms['max']})"


def _digits(value: float) -> str:
    return f"{value:.0f}" if value >= 1000 else f"{value:.1f}" if value >= 100 else f"{value:.3g}"


def _crossings(crossover: list[dict[str, Any]], model: str, mode: str, batch: int) -> list[str]:
    said = []
    for row in crossover:
        here = (row["model"], row["mode"], row["batch"]) == (model, mode, batch)
        if here and row["name"] not in ("dense", "original"):
            where = "at no measured length" if row["length"] is None else f"from {row['length']:,} tokens on"
            said.append(f"{row['name']} {where}")
    return [f"Faster than dense: {'; '.join(said)}."] if said else []


def _recompiles(rows: list[dict[str, Any]]) -> list[str]:
    """Summed over the lengths and batches of a mode in which one compilation should serve them all."""
    again: dict[str, int] = {}
    for row in rows:
        if row.get("recompiles") is not None:
            again[row["name"]] = again.get(row["name"], 0) + row["recompiles"]
    told = ", ".join(f"{name} {number}" for name, number in again.items())
    return [f"Graphs compiled again over all these lengths: {told}."] if again else []


def _notes(rows: list[dict[str, Any]]) -> list[str]:
    """How peers were aimed, and what would make a figure doubtful."""
    lines = []
    for row in rows:
        if "aim" in row and row["kind"] == "peer":
            off = row["flops"]["total"] + row["flops"]["scorer"]
            told = f"{row['says']}; {row['aim']}; {off / row['target_flops'] - 1:+.1%} of its target"
            lines.append(f"* {row['name']} at {row['length']:,}: {told}.")
    if any(row.get("graphs_while_timed") for row in rows):
        lines.append("* Something was compiled while it was timed: see graphs_while_timed in results.json.")
    if skipped := sorted({row["name"] for row in rows if row.get("cuda_graphs_skipped")}):
        lines.append(f"* Inductor went without CUDA graphs in places: {', '.join(skipped)}.")
    return ["", *lines] if lines else []


def _shares(rows: list[dict[str, Any]]) -> list[str]:
    told = [
        [f"{row['length']:,}", row["name"], *(f"{row['shares'][part]:.1%}" for part in PARTS)]
        for row in rows
        if row.get("shares")
    ]
    return table(("length", "variant", *PARTS), told)


def _decoded(row: dict[str, Any]) -> list[str]:
    kept = "dense" if row["name"] == "dense" else f"pruned by {row['name']}"
    return [row["model"], f"{row['length']:,} tokens, {kept}", str(row["batch"]), str(len(row["seconds"])),
            in_ms(row["time"])]  # fmt: skip


def _words(options: dict[str, Any]) -> list[str]:
    head = "of the last token" if options["head"] == "last" else "of all tokens"
    cache = "with an empty compiler cache" if options["fresh_cache"] else "the compiler's cache on disk may be warm"
    return [
        "## Words",
        "",
        f"* *GFLOP*: of the call, with the head {head}, without the scorer; *scorer*: what scoring adds.",
        "* *speed-up*: median time of dense over this one's (between the quartiles of both).",
        "* *promise*: dense FLOPs over this one's, without the scorer; *merit*: speed-up over promise; beside them the "
        "same with the scorer's FLOPs counted as work.",
        "* *dense*: the same model with every token kept, the same operators, the same mode.",
        f"* *first call*: seconds of a variant's first call at this point, compilation included; {cache}.",
        "* *compiled again*: graphs compiled at this point after the variant's first one (batch 1 and larger batches "
        "have one each).",
        "* *peak*: bytes of tensors beyond weights and inputs, by torch's allocator; none under CUDA graphs, which "
        "keep theirs.",
        "* *fused and other*: what Inductor fused (norms, gates, residual sums, and the gather of survivors where "
        "it is read inside a norm), and everything that is nothing else.",
        "* peers are given the FLOPs of the first schedule, scorer included, and are counted themselves.",
    ]
