"""results.json and summary.md from what the parts have left so far: run after each of them."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

WORK, OUT = Path(os.environ["WORK"]), Path(os.environ["OUT"])
Row = dict[str, Any]

OUTCOME = re.compile(r"(PASSED|FAILED|ERROR|SKIPPED) (?:\S*/)?(test_cuda\.py::\S+(?: \S+?\])?)")
ENDED = re.compile(r"^=+ .*(?:passed|failed|error|skipped).*=+$", re.MULTILINE)
REASON = re.compile(r"^E   +(\S.*)$", re.MULTILINE)


def rows() -> list[Row]:
    """The last line of a part that was stopped may be half a line."""
    found = []
    for file in sorted((WORK / "results").glob("*.jsonl")):
        for line in file.read_text().splitlines():
            try:
                found.append(json.loads(line))
            except ValueError:
                continue
    return found


def tests() -> dict[str, Row]:
    """What pytest said, or had said when it was stopped."""
    found = {}
    for file in sorted((WORK / "logs").glob("b[12].txt")):
        text = file.read_text(errors="replace")
        outcomes = {name: outcome for outcome, name in OUTCOME.findall(text)}
        found[file.stem] = {
            "counts": {kind: sum(o == kind for o in outcomes.values()) for kind in sorted(set(outcomes.values()))},
            "failed": sorted(name for name, outcome in outcomes.items() if outcome in ("FAILED", "ERROR")),
            "end": ENDED.findall(text)[-1:],
            "why": list(dict.fromkeys(reason[:220] for reason in REASON.findall(text)))[:40],
        }
    return found


def benchmarks() -> dict[str, Row]:
    return {file.parent.name: json.loads(file.read_text()) for file in sorted((WORK / "bench").glob("*/results.json"))}


def number(value: Any, digits: int = 3) -> str:
    return "" if value is None else f"{value:.{digits}g}" if isinstance(value, float) else str(value)


def table(columns: str, lines: Iterable[Iterable[Any]]) -> list[str]:
    """Markdown; `columns` are separated by commas."""
    names = columns.split(",")
    head = ["| " + " | ".join(name.strip() for name in names) + " |", "|" + "---|" * len(names)]
    return [*head, *("| " + " | ".join(number(cell) for cell in line) + " |" for line in lines), ""]


def machine(found: list[Row]) -> Iterator[str]:
    for row in found:
        if row["stage"] == "a" and "L" not in row:
            told = (f"{name} {number(value)}" for name, value in row.items() if name not in ("stage", "at"))
            yield "* " + ", ".join(told)
    yield ""


def test_results(found: dict[str, Row]) -> Iterator[str]:
    yield from ("## Tests (tests/unit/test_cuda.py; b1 without mamba_ssm, b2 with)", "")
    for stage, about in found.items():
        yield from (f"**{stage}** {about['counts']} {' '.join(about['end'])}", "")
        yield from (f"* {name}" for name in about["failed"])
        yield from ("", f"reasons: {' / '.join(about['why'][:12])}", "")


def end_to_end(found: list[Row]) -> Iterator[str]:
    yield from ("## End to end (c) and host waits (d)", "")
    words = {True: "ok", False: "**NO**", None: "–"}

    def cells(row: Row) -> tuple[str, ...]:
        more = {name: value for name, value in row.items() if name not in ("stage", "name", "ok", "at", "where", "end")}
        return row["stage"][3:], row["name"], words[row.get("ok")], str(more)[:330]

    checks = [row for row in found if row["stage"].startswith("cd") and row["name"] not in ("end", "kernels")]
    yield from table("model, check, , ", map(cells, checks))


def products(found: list[Row]) -> Iterator[str]:
    yield from ("## Products of a block of mamba-2.8b", "")
    measured = [row for row in found if row["name"].startswith("gemm ") and "L" in row and "us" in row]
    lines = ([row.get(name) for name in ("name", "L", "us", "ns_per_token", "TFLOPs")] for row in measured)
    yield from table("product, L, us, ns/token, TFLOP/s", lines)


def kernels(found: list[Row]) -> Iterator[str]:
    """In a CUDA graph where a kernel can be in one, and called from Python."""
    yield from ("## Kernels (e)", "")
    mine = [row for row in found if row["stage"] in ("e1", "e2", "e3")]

    def cells(row: Row) -> tuple[Any, ...]:
        us = row.get("us")
        told = row.get("error", "")[:160] if us is None else number(us, 4)
        return row["name"], row["L"], told, row.get("called_us"), row.get("ns_per_token"), row.get("times_floor")

    yield from table("kernel, L, us, called us, ns/token, times floor", (cells(row) for row in mine if "L" in row))
    for row in mine:
        if row["name"].startswith(("host:", "autotuned:")):
            yield f"* {row['name']}: {number(row.get('us')) or row.get('best')}"
    yield ""


def merit(found: dict[str, Row]) -> Iterator[str]:
    yield from ("## Figure of merit (f, h)", "")
    named = [(name, run, row) for name, run in found.items() for row in run["rows"]]

    def cells(name: str, run: Row, row: Row) -> list[Any]:
        start = [f"{name} ({run['models'][row['model']]['blocks']} blocks)", row["mode"], row["length"], row["name"]]
        if (time := row.get("time")) is None:
            return [*start, row.get("error"), *[""] * 8]
        median, first, third = (f"{time[key] * 1e3:.2f}" for key in ("median", "q1", "q3"))
        peak = number((row.get("peak_bytes") or 0) / 2**20, 5)
        return [
            *start,
            f"{median} ({first} … {third})",
            row["speedup"],
            row["promise"],
            f"**{number(row['merit'])}**",
            row["merit_with_scorer"],
            peak,
            row["first_call_seconds"],
            str(row["recompiles"]),
            str(row["cuda_graphs_skipped"]),
        ]

    columns = "run, mode, L, variant, ms (q1 … q3), speed-up, promise, merit, with scorer, peak MiB, first s"
    yield from table(f"{columns}, recompiled, graphs skipped", (cells(*each) for each in named))
    yield from ("Shares of the time, by part:", "")
    for name, _, row in named:
        if row.get("shares"):
            parts = ", ".join(f"{part} {share:.1%}" for part, share in row["shares"].items() if share)
            yield f"* {name} {row['mode']} {row['length']} {row['name']}: {parts}"
    yield ""


def profiles(found: list[Row]) -> Iterator[str]:
    yield from ("## One call: events, kernels, Python (g; tables in profile.txt)", "")
    mine = [row for row in found if row["stage"] == "g" and "us" in row]

    def cells(row: Row) -> list[Any]:
        counted = [
            f"{row['us']:.0f}",
            f"{row['kernels_us']:.0f}",
            row["launches"],
            row["busy"],
            f"{row['host_us']:.0f}",
        ]
        return [f"{row['name'][8:]} ({row['blocks']} blocks)", row["L"], row["schedule"], *counted]

    yield from table("model, L, schedule, us, kernels us, launches, busy, Python us", map(cells, mine))


def errors(found: list[Row]) -> Iterator[str]:
    wrong = [row for row in found if row.get("ok") is False]
    yield from (f"## Errors ({len(wrong)})", "")
    for row in wrong:
        about = ", ".join(f"{name} {row[name]}" for name in ("L", "schedule") if name in row)
        what = row.get("error") or f"rms {row.get('rms')}, kept {row.get('kept')}"
        yield f"* {row['stage']}, {row['name']} {about}: {what[:1200]} {row.get('where', '')}"
        if row.get("end"):
            yield from ("", "  ```", *(f"  {line}" for line in row["end"]), "  ```", "")


def main() -> None:
    found, tested, timed = rows(), tests(), benchmarks()
    part = OUT / "results.json.part"
    part.write_text(json.dumps({"rows": found, "tests": tested, "bench": timed}, indent=0))
    os.replace(part, OUT / "results.json")
    lines = ["# simba_fx on a GPU: what was measured", "", *machine(found), *test_results(tested), *end_to_end(found)]
    lines += [*products(found), *kernels(found), *merit(timed), *profiles(found), *errors(found)]
    (OUT / "summary.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
