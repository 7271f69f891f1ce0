"""Pictures: quality against compute, quality against the length of the context, tasks by depth."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from simba_fx.bench.plots import figures

__all__ = ["draw"]

_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKS = "osD^vPX"


def draw(found: dict[str, Any], folder: Path) -> list[str]:
    """Write the pictures that there is something to draw for. Raises: SimbaError without matplotlib."""
    new_figure = figures("eval")
    longest = [row for row in found["text"] if row["length"] == max(found["options"]["lengths"])]
    pictures: list[tuple[str, Any, Any]] = [("compute.png", _compute, longest)]
    if len(found["options"]["lengths"]) > 1:
        pictures.append(("context.png", _context, found["text"]))
    for task in found["options"]["tasks"]:
        pictures.append((f"{task}.png", _task, [row for row in found["tasks"] if row["task"] == task]))
    for name, painter, rows in pictures:
        figure = new_figure(11, 4.6)
        painter(figure, rows, found)
        where = found["environment"]
        about = f"{found['model']['name']}, {found['windows']} windows; hollow: schedules of several shares; "
        about += f"{where['machine']}, torch {where['versions']['torch']}"
        figure.suptitle(about, fontsize=9, color="#555555", x=0.01, ha="left")
        figure.savefig(folder / name, dpi=130)
    return [name for name, _, _ in pictures]


def _styles(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """By criterion or baseline: a colour and a mark."""
    names = list(dict.fromkeys(row["criterion"] or row["name"] for row in rows if row["kind"] != "dense"))
    return {
        name: {"color": _COLOURS[i % 7], "marker": _MARKS[(i + i // 7) % 7], "linestyle": ("-", "--", ":")[i // 7 % 3]}
        for i, name in enumerate(names)
    }


def _panels(figure: Any, rows: Sequence[dict[str, Any]]) -> list[tuple[Any, str]]:
    """All tokens, and, where there are enough, those that need their context."""
    panels = [("more", "loss of all scored tokens")]
    if any(row["far"] for row in rows):
        panels.append(("far", "loss of tokens that need their context"))
    grid = list(figure.subplots(1, len(panels), squeeze=False).flat)
    for axes, (_, title) in zip(grid, panels):
        axes.set_title(title, loc="left", fontsize=10)
        axes.set_ylabel("nats per token over dense")
        axes.axhline(0, color="#999999", linewidth=0.8)
        axes.set_yscale("symlog", linthresh=0.01)
        axes.grid(axis="y", color="#EEEEEE")
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    return [(axes, key) for axes, (key, _) in zip(grid, panels)]


def _lines(axes: Any, points: dict[str, list[tuple[float, dict[str, float]]]], styles: dict[str, Any]) -> None:
    for name, held in points.items():
        held = sorted(held, key=lambda point: point[0])
        x, y = [at for at, _ in held], [estimate["value"] for _, estimate in held]
        errors = [estimate["error"] for _, estimate in held]
        axes.errorbar(x, y, errors, label=name, linewidth=1.2, markersize=5, capsize=2, **styles[name])


def _compute(figure: Any, rows: Sequence[dict[str, Any]], found: dict[str, Any]) -> None:
    styles = _styles(rows)
    for axes, key in _panels(figure, rows):
        points: dict[str, list[Any]] = {}
        for row in rows:
            if row["kind"] == "dense" or row[key] is None:
                continue
            name = row["criterion"] or row["name"]
            if row["kind"] != "sparse" or _is_share(row["schedule"]):
                points.setdefault(name, []).append((row["share"], row[key]))
            else:  # a schedule of another kind is no point of that line
                styles_of = {"markerfacecolor": "none", **styles[name], "linestyle": ""}
                axes.plot(row["share"], row[key]["value"], markersize=7, **styles_of)
        _lines(axes, points, styles)
        axes.set_xlabel(f"FLOPs over dense, {rows[0]['length']:,} tokens")
    _legend(figure)


def _is_share(schedule: str) -> bool:
    return schedule.replace(".", "", 1).isdecimal()


def _context(figure: Any, rows: Sequence[dict[str, Any]], found: dict[str, Any]) -> None:
    """Of the first schedule."""
    first = (found["options"]["schedules"] or [""])[0]
    rows = [row for row in rows if row["kind"] != "dense" and row["schedule"] in ("", first)]
    styles = _styles(rows)
    for axes, key in _panels(figure, rows):
        points: dict[str, list[Any]] = {}
        for row in rows:
            if row[key] is not None:
                points.setdefault(row["criterion"] or row["name"], []).append((row["length"], row[key]))
        _lines(axes, points, styles)
        axes.set_xscale("log", base=2)
        lengths = found["options"]["lengths"]
        axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
        axes.minorticks_off()
        axes.set_xlabel(f"tokens of context, schedule {first}")
    _legend(figure)


def _legend(figure: Any) -> None:
    handles, names = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside right center", frameon=False, fontsize=9)


def _task(figure: Any, rows: Sequence[dict[str, Any]], found: dict[str, Any]) -> None:
    """A heat map for each rival: depth across, length upwards."""
    lengths, depths = found["options"]["lengths"], found["options"]["depths"]
    names = list(dict.fromkeys(row["name"] for row in rows))
    across = min(4, len(names))
    down = -(-len(names) // across)
    figure.set_size_inches(3.1 * across + 0.8, (0.5 * len(lengths) + 1.3) * down + 0.4)
    grid = list(figure.subplots(down, across, squeeze=False).flat)
    for axes, name in zip(grid, names):
        own = {row["length"]: row for row in rows if row["name"] == name}
        values = [[own[length]["by_depth"][str(depth)] for depth in depths] for length in lengths]
        image = axes.imshow(values, vmin=0, vmax=1, cmap="cividis", aspect="auto", origin="lower")
        axes.set_xticks(range(len(depths)), [f"{depth:g}" for depth in depths], fontsize=7)
        axes.set_yticks(range(len(lengths)), [f"{length:,}" for length in lengths], fontsize=7)
        for y, line in enumerate(values):
            for x, value in enumerate(line):
                axes.text(
                    x,
                    y,
                    f"{value:.2f}",
                    ha="center",
                    va="center",
                    fontsize=7,
                    color="white" if value < 0.6 else "black",
                )
        axes.set_title(f"{name} ({own[lengths[-1]]['share']:.2f})", fontsize=8, loc="left")
    for axes in grid[len(names) :]:
        axes.set_axis_off()
    figure.colorbar(image, ax=figure.axes, label="found", shrink=0.8)
    where = "where that stands which is asked for, from the beginning (0) to the end (1) of the context"
    figure.supxlabel(f"{rows[0]['task']}: {where}", fontsize=9)
    figure.supylabel("tokens", fontsize=9)
