"""The results as markdown."""

from __future__ import annotations

import itertools
from typing import Any

from simba_fx.bench.tables import table
from simba_fx.evaluation.runner import KNOWN

__all__ = ["markdown"]


def markdown(found: dict[str, Any]) -> str:
    """Everything that was measured, as tables with the words that they need."""
    o, where = found["options"], found["environment"]
    lines = [
        "# simba-fx eval",
        "",
        f"* model: {found['model']['name']}, {found['model']['parameters'] / 1e6:.3g} M parameters, {o['dtype']}",
        f"* {where['machine']}, torch {where['versions']['torch']}; {where['date']}",
        f"* text: {found['windows']} windows; loss in nats of the last {o['last']} tokens, which choose nothing of "
        "what is kept",
        "* differences are to the dense model, window by window, ± one standard error over windows",
        f"* *far*: tokens that cost the dense model less than {KNOWN:g} nats with the whole context, and more than "
        f"{o['gain']:g} nats more with {o['near']} to {o['near'] + o['last']} of its tokens",
        "* FLOPs: of one row over those of the dense model, scorer included, counted on the call",
        "",
    ]
    for length in o["lengths"]:
        rows = [row for row in found["text"] if row["length"] == length]
        base = next(row for row in rows if row["kind"] == "dense")
        far = f"{base['far']['n']} far tokens, {100 * base['far_share']:.1f} %" if base["far"] else "too few far tokens"
        lines += [f"## {length} tokens of text: dense loss {base['loss']:.4f}; {far}", ""]
        lines += table(("what", "FLOPs", "loss - dense", "far loss - dense", "how"),
                       [_text(row) for row in rows if row is not base])  # fmt: skip
        lines += [""]
    for task, length in itertools.product(o["tasks"], o["lengths"]):
        rows = [row for row in found["tasks"] if (row["task"], row["length"]) == (task, length)]
        n, of = rows[0]["accuracy"]["n"], f", one of {o['pairs']}" if task in ("needles", "recall") else ""
        lines += [f"## {length} tokens, {task}{of}: accuracy over {n} searches", ""]
        depths = list(rows[0]["by_depth"])
        lines += table(("what", "FLOPs", "found", *(f"at {float(depth):g}" for depth in depths)), map(_found, rows))
        lines += [""]
    return "\n".join(lines)


def _estimate(held: dict[str, float] | None) -> str:
    return "–" if held is None else f"{held['value']:+.4f} ± {held['error']:.4f}"


def _text(row: dict[str, Any]) -> list[str]:
    return [row["name"], f"{row['share']:.3f}", _estimate(row["more"]), _estimate(row["far"]), row["says"]]


def _found(row: dict[str, Any]) -> list[str]:
    accuracy = row["accuracy"]
    whole = f"{accuracy['value']:.2f} ± {accuracy['error']:.2f}"
    return [row["name"], f"{row['share']:.3f}", whole, *(f"{share:.2f}" for share in row["by_depth"].values())]
