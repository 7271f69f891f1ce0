"""Two pictures: speed-up against length, and where the time goes. Colours after Okabe and Ito."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from simba_fx.bench.parts import PARTS
from simba_fx.bench.tables import groups
from simba_fx.errors import SimbaError

__all__ = ["draw", "figures"]

_SCHEDULES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000")
_PEER, _PEER_MARKS = "#7A7A7A", "^vDX"
_PARTS = dict(zip(PARTS, ("#0072B2", "#56B4E9", "#009E73", "#D55E00", "#E69F00", "#F0E442", "#BBBBBB")))


def figures(command: str) -> Callable[[float, float], Any]:
    """What makes a matplotlib figure of so many inches, for a command. Raises: SimbaError without matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise SimbaError(
            f"simba-fx {command} draws with matplotlib, which is not installed; expected the extra 'plot'. The numbers "
            "are in results.json and table.md. Install it: pip install simba-fx[plot]."
        ) from error

    def new(width: float, height: float) -> Figure:
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasAgg(figure)
        return figure

    return new


def draw(found: dict[str, Any], folder: Path) -> list[str]:
    """Write the pictures that there is something to draw for. Raises: SimbaError without matplotlib."""
    new_figure = figures("bench")
    rows = [row for row in found["rows"] if "time" in row]
    written = []
    for name, painter in (("speed.png", _speed), ("shares.png", _shares)):
        panels = painter_panels(rows, name)
        if not panels:
            continue
        across = min(2, len(panels))
        down = math.ceil(len(panels) / across)
        figure = new_figure(6.4 * across + 1.2, 4.3 * down + 0.5)
        grid = list(figure.subplots(down, across, squeeze=False).flat)
        for axes, ((model, mode, batch), held) in zip(grid, panels.items()):
            painter(axes, held)
            axes.set_title(f"{model}, {mode}, batch {batch}", loc="left", fontsize=10)
        for axes in grid[len(panels) :]:
            axes.set_axis_off()
        where = found["environment"]
        figure.suptitle(f"{where['machine']}, torch {where['versions']['torch']}, {found['options']['dtype']}",
                        fontsize=9, color="#555555", x=0.01, ha="left")  # fmt: skip
        figure.savefig(folder / name, dpi=130)
        written.append(name)
    return written


def painter_panels(rows: list[dict[str, Any]], name: str) -> dict[tuple[str, str, int], list[dict[str, Any]]]:
    """Rows by panel: those of every length for speeds, of the longest for shares."""
    panels = groups(rows)
    if name == "speed.png":
        return {key: held for key, held in panels.items() if any(row["kind"] != "dense" for row in held)}
    longest = {key: max(row["length"] for row in held) for key, held in panels.items()}
    return {
        key: told
        for key, held in panels.items()
        if (told := [row for row in held if row["length"] == longest[key] and row.get("shares")])
    }


def _speed(axes: Any, rows: list[dict[str, Any]]) -> None:
    """Lines of measured speed-ups between the quartiles of both times; dashed, what the FLOPs promise."""
    lengths = sorted({row["length"] for row in rows})
    place = {length: i for i, length in enumerate(lengths)}
    names = {row["name"]: row["kind"] for row in rows if row["kind"] in ("schedule", "peer")}
    colours, marks, dash = iter(_SCHEDULES * 4), iter(_PEER_MARKS * 4), 0
    handles = []
    for name, kind in names.items():
        own = [row for row in rows if row["name"] == name]
        x = [place[row["length"]] for row in own]
        y = [row["speedup"] for row in own]
        if kind == "peer":
            handles += axes.plot(x, y, color=_PEER, linewidth=1, marker=next(marks), markersize=5, label=name)
            continue
        colour = next(colours)
        reach = [
            [v - row["speedup_low"] for v, row in zip(y, own)],
            [row["speedup_high"] - v for v, row in zip(y, own)],
        ]
        axes.errorbar(x, y, reach, color=colour, linewidth=0, elinewidth=1.2, capsize=3)
        handles += axes.plot(x, y, color=colour, linewidth=2, marker="o", markersize=5, label=name)
        handles += axes.plot(x, [row["promise"] for row in own], color=colour, linewidth=1.4,
                             linestyle=(dash, (4, 4)), label="what its FLOPs promise")  # fmt: skip
        dash += 4  # equal promises fill each other's gaps
    axes.axhline(1, color="#999999", linewidth=1)
    axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths])
    axes.set_xlim(-0.3, len(lengths) - 0.7)
    low, high = axes.get_ylim()
    axes.set_ylim(min(low, 0.8), max(high, 1.1))
    axes.set_xlabel("tokens per row")
    axes.set_ylabel("speed-up over dense (×)")
    _tidy(axes)
    axes.legend(handles=handles, loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=8)


def _shares(axes: Any, rows: list[dict[str, Any]]) -> None:
    """One bar per variant, as high as its median time; the parts by their share of the profiled time."""
    x = range(len(rows))
    times = [row["time"]["median"] * 1e3 for row in rows]
    below = [0.0] * len(rows)
    for part, colour in _PARTS.items():
        heights = [row["shares"][part] * time for row, time in zip(rows, times)]
        axes.bar(x, heights, bottom=below, width=0.62, color=colour, edgecolor="white", linewidth=0.6, label=part)
        for i, (height, base) in enumerate(zip(heights, below)):
            if height > 0.05 * max(times):
                dark = part in ("GEMM", "convolution", "scan")
                axes.text(i, base + height / 2, f"{rows[i]['shares'][part]:.0%}", ha="center", va="center", fontsize=8,
                          color="white" if dark and part != "scan" else "black")  # fmt: skip
        below = [base + height for base, height in zip(below, heights)]
    for i, row in enumerate(rows):
        text = "" if row["kind"] == "dense" else f"\n{row['speedup']:.2f}× of {row['promise']:.2f}×"
        axes.text(i, times[i] + 0.01 * max(times), f"{_ms(times[i])} ms{text}", ha="center", va="bottom", fontsize=8)
    axes.set_xticks(x, [row["name"] for row in rows], fontsize=8)
    axes.set_xlim(-0.6, len(rows) - 0.4)
    axes.set_ylim(0, 1.17 * max(times))
    axes.set_ylabel(f"ms per call of {rows[0]['length']:,} tokens")
    _tidy(axes)
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(handles[::-1], labels[::-1], loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=8)


def _tidy(axes: Any) -> None:
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.grid(axis="y", color="#E4E4E4", linewidth=0.8)
    axes.set_axisbelow(True)


def _ms(time: float) -> str:
    return f"{time:,.0f}" if time >= 100 else f"{time:.3g}"
