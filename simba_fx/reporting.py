"""`report`: what one call of a transformed model kept and what it cost, as a table, a dictionary and a picture."""

from __future__ import annotations

import dataclasses
import itertools
import os
import platform
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from simba_fx import ops
from simba_fx.api import _runtime, kept
from simba_fx.errors import SimbaError
from simba_fx.flops import model_flops, surroundings_of
from simba_fx.graph.facts import scans_by_block
from simba_fx.graph.marks import Role, role
from simba_fx.graph.plan import reasons
from simba_fx.ops.recurrences import recurrence_of
from simba_fx.options import Options
from simba_fx.runtime.build import Built, CustomCriterion

__all__ = ["BlockRow", "Report", "Total", "report"]

KEPT, DROPPED, PADDING = "#0072B2", "#E4E4E4", "#F2CF8D"
"""Colours of the picture: blue, light grey, light orange (after Okabe and Ito): apart to colour-blind eyes as well."""

_COLUMNS = 1600  # of the picture: longer inputs are averaged into so many


@dataclass(frozen=True)
class BlockRow:
    """One block. Tokens are per row; FLOPs are of the whole batch."""

    index: int
    path: str
    scan: str
    """The kinds of recurrence in it ("selective scan", "ssd scan"), joined by " + ", or "none"."""
    tokens: int
    """Tokens that enter the block: the rectangle that it computes on."""
    real_tokens: float | None
    """Of these, real ones, on average over the rows; None where nothing is padded."""
    share_asked: float
    """What the schedule says, of the input's tokens."""
    share_delivered: float
    """tokens / the input's length."""
    flops_dense: int
    flops_sparse: int
    flops_scorer: int
    """Of scoring this block's tokens; not part of `flops_sparse`."""
    reason: str
    """Why no token leaves after this block; empty where some do."""


@dataclass(frozen=True)
class Total:
    """FLOPs of one call."""

    dense: int
    sparse: int
    """Without the scorer."""
    scorer: int

    @property
    def sparse_with_scorer(self) -> int:
        return self.sparse + self.scorer

    @property
    def share(self) -> float:
        """Sparse, scorer included, over dense: what `Budget` asks for."""
        return self.sparse_with_scorer / self.dense if self.dense else 1.0

    @property
    def ideal_speedup(self) -> float:
        """Dense over sparse, scorer included: the speed-up, were every FLOP equally fast."""
        return self.dense / self.sparse_with_scorer if self.dense else 1.0


@dataclass(frozen=True)
class Report:
    """What one call kept and what it cost. `str()` is a table."""

    blocks: tuple[BlockRow, ...]
    rows: int
    length: int
    """Tokens per row in the input, padding included."""
    tail: int
    stack: Total
    """Without the head: the blocks, and what comes before the first."""
    total: Total
    """The whole call: with the head (the LM head; in a plain module, what follows the last block)."""
    schedule: str
    criterion: str
    span: int
    """Tokens whose scores are pooled; 1: none."""
    output: str
    kernels: str
    """What ran the scans."""
    machine: str
    torch_version: str
    notes: tuple[str, ...] = ()
    positions: tuple[Tensor, ...] = field(default=(), repr=False, compare=False)
    """`simba_fx.kept` of the call, on the CPU: for each block the original positions `(B, k_i)` that entered it."""

    @property
    def _spans(self) -> str:
        return "" if self.span == 1 else f" over spans of {self.span}"

    @property
    def mean_share(self) -> float:
        """Tokens computed on, over tokens computed on by the dense model."""
        return sum(block.tokens for block in self.blocks) / (self.length * len(self.blocks))

    @property
    def ideal_speedup(self) -> float:
        """Dense FLOPs over sparse FLOPs, head and scorer included."""
        return self.total.ideal_speedup

    def to_dict(self) -> dict[str, Any]:
        """Everything but the positions, in types that JSON knows."""
        skipped = ("blocks", "stack", "total", "positions", "notes")
        plain = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in skipped}
        totals = {"with_head": _total_dict(self.total), "without_head": _total_dict(self.stack)}
        return {
            **plain,
            "notes": list(self.notes),
            "mean_share": self.mean_share,
            "totals": totals,
            "blocks": [dataclasses.asdict(block) for block in self.blocks],
        }

    def __str__(self) -> str:
        head = [
            f"{len(self.blocks)} blocks, {self.rows} x {self.length} tokens, tail {self.tail}",
            f"schedule {self.schedule}, criterion {self.criterion}{self._spans}, output {self.output}",
            f"kernels: {self.kernels}",
            f"{self.machine}, torch {self.torch_version}",
        ]
        tail = [f"mean share of tokens {self.mean_share:.3f}", *(f"note: {note}" for note in self.notes)]
        return "\n".join([*head, "", *self._block_table(), "", *self._total_table(), "", *tail])

    def _block_table(self) -> list[str]:
        scale, unit = _unit(max((block.flops_dense for block in self.blocks), default=0))
        padded = any(block.real_tokens is not None for block in self.blocks)
        title = ["block", "module", "scan", "tokens", *(["real"] if padded else []), "asked", "kept",
                 f"dense {unit}", f"sparse {unit}", f"scorer {unit}", "no token leaves after it:"]  # fmt: skip
        lines = []
        for block in self.blocks:
            real = [] if not padded else ["" if block.real_tokens is None else f"{block.real_tokens:.1f}"]
            shares = (f"{share:.3f}" for share in (block.share_asked, block.share_delivered))
            flops = (f"{n / scale:.3f}" for n in (block.flops_dense, block.flops_sparse, block.flops_scorer))
            lines.append(
                [str(block.index), block.path, block.scan, str(block.tokens), *real, *shares, *flops, block.reason]
            )
        return _aligned([title, *lines], left=(1, 2, len(title) - 1))

    def _total_table(self) -> list[str]:
        scale, unit = _unit(self.total.dense)
        title = ["", f"dense {unit}", f"sparse {unit}", f"scorer {unit}", "sparse / dense", "ideal speed-up"]
        lines = [title]
        for name, total in (("whole call", self.total), ("without the head", self.stack)):
            numbers = (f"{n / scale:.3f}" for n in (total.dense, total.sparse, total.scorer))
            lines.append([name, *numbers, f"{total.share:.3f}", f"{total.ideal_speedup:.3f}x"])
        return _aligned(lines, left=(0,))

    def plot(self, path: str | Path, row: int = 0) -> None:
        """Save the trapezoid: which tokens of row `row` (across) entered which block (upwards).

        The format is that of the file's suffix. Inputs of more than 1600 tokens are averaged into 1600 columns.

        Raises:
            SimbaError: matplotlib is not installed, or there is no such row.
        """
        if not -self.rows <= row < self.rows:
            raise SimbaError(
                f"plot draws one row of the batch; expected a row from 0 to {self.rows - 1}, found row={row}."
            )
        try:
            from matplotlib.backends.backend_agg import FigureCanvasAgg
            from matplotlib.figure import Figure
        except ImportError as error:
            raise SimbaError(
                "Report.plot draws with matplotlib, which is not installed; expected the extra 'plot'. Install it: "
                "pip install simba-fx[plot]."
            ) from error
        figure = Figure(figsize=(10, 5.2), layout="constrained")
        FigureCanvasAgg(figure)
        self._draw(figure, [positions[row] for positions in self.positions])
        figure.savefig(path, dpi=150)

    def _draw(self, figure: Any, rows: Sequence[Tensor]) -> None:
        from matplotlib.colors import to_rgb
        from matplotlib.patches import Patch
        from matplotlib.ticker import MaxNLocator

        n = len(rows)
        state = torch.zeros(n, self.length, dtype=torch.int64)  # (n, L): 0 dropped, 1 kept, 2 padding
        for block, positions in enumerate(rows):
            state[block, positions[positions >= 0]] = 1
        state[:, state[0] == 0] = 2  # every real token enters the first block
        colours = torch.tensor([to_rgb(colour) for colour in (DROPPED, KEPT, PADDING)])
        image = colours[state].permute(0, 2, 1)  # (n, 3, L)
        if self.length > _COLUMNS:
            image = nn.functional.interpolate(image, size=_COLUMNS, mode="area")
        axes = figure.add_subplot()
        axes.imshow(image.permute(0, 2, 1).numpy(), origin="lower", aspect="auto", interpolation="nearest",
                    extent=(-0.5, self.length - 0.5, -0.5, n - 0.5))  # fmt: skip
        if n <= 32:
            axes.hlines([block + 0.5 for block in range(n - 1)], -0.5, self.length - 0.5, colors="white", linewidth=0.8)
        axes.set_xlabel("position of the token in the input")
        axes.set_ylabel("block")
        axes.xaxis.set_major_locator(MaxNLocator(nbins=10, integer=True, min_n_ticks=1))
        axes.set_xlim(-0.5, self.length - 0.5)
        step = -(-n // 16)
        ticks = [*(block for block in range(0, n - 1, step) if n - 1 - block > step / 2), n - 1]
        axes.set_yticks(ticks)
        counts = axes.secondary_yaxis("right")
        counts.set_yticks(ticks, [f"{int((rows[block] >= 0).sum()):,}" for block in ticks])
        counts.set_ylabel("tokens that enter the block")
        for side in (*axes.spines.values(), *counts.spines.values()):
            side.set_visible(False)
        axes.set_title(
            f"{self.schedule}, {self.criterion}{self._spans}: mean share of tokens {self.mean_share:.2f}", loc="left"
        )
        names = {1: (KEPT, "enters the block"), 0: (DROPPED, "left before"), 2: (PADDING, "padding")}
        present = [entry for value, entry in names.items() if bool((state == value).any())]
        patches = [Patch(facecolor=colour, label=name) for colour, name in present]
        figure.legend(handles=patches, loc="outside lower center", ncols=3, frameon=False)


def report(sparse: nn.Module, *args: Any, **kwargs: Any) -> Report:
    """Call `sparse(*args, **kwargs)` once, without gradients, and tell what each block saw and what it cost.

    Tokens are those of the call; FLOPs follow from its shapes, for the dense model and for this one, and do not depend
    on the kernels that ran. A compiled model runs uncompiled here: the counts are the same.

    Raises:
        SimbaError: `sparse` is not a result of `transform`.
    """
    runtime = _runtime(sparse)
    model = getattr(sparse, "_orig_mod", sparse)
    with torch.no_grad():
        model(*args, **kwargs)
    batch, length, ran, _, _, mask = runtime.last
    built: Built = runtime.any_built()
    facts, positions = built.captured.facts, kept(sparse)
    tokens = [entered.shape[1] for entered in positions]
    cut_blocks = [] if ran is None else [cut.block for cut in built.cuts]
    stack = runtime.stack
    prefix = "" if stack is None else next(name for name, module in model.named_modules() if module is stack)
    criterion, custom = _criterion(built, cut_blocks)
    flops = model_flops(
        built.captured,
        rows=batch,
        length=length,
        criterion=criterion,
        custom=custom,
        surroundings=None if stack is None else surroundings_of(model, stack, args, kwargs, length),
        query=runtime.options.query,
    )
    why = _why(built, tokens, ran is None)
    rows = tuple(
        BlockRow(
            index=block,
            path=".".join(filter(None, (prefix, path))),
            scan=_scan_kind(built, block),
            tokens=tokens[block],
            real_tokens=None
            if mask is None or bool((mask != 0).all())
            else float((positions[block] >= 0).sum(1).double().mean()),
            share_asked=float(built.shares[block]),
            share_delivered=tokens[block] / length,
            flops_dense=flops.blocks[block](length),
            flops_sparse=flops.blocks[block](tokens[block]),
            flops_scorer=flops.scores[block](tokens[block]) if block in cut_blocks else 0,
            reason=why.get(block, ""),
        )
        for block, path in enumerate(facts.blocks)
    )
    output = _setting(built, "output")
    head = flops.head(length), flops.head(length if output == "full" else tokens[-1])
    scorer = flops.scoring(cut_blocks, tokens)
    blocks = Total(flops.stack([length] * facts.n_blocks), flops.stack(tokens), scorer)
    device = positions[0].device
    return Report(
        blocks=rows,
        rows=batch,
        length=length,
        tail=runtime.tail,
        stack=blocks,
        total=Total(blocks.dense + head[0], blocks.sparse + head[1], scorer),
        schedule=_schedule(runtime, built),
        criterion=criterion if custom is None else _name(custom.function),
        span=runtime.options.pooled,
        output=output,
        kernels=_kernels(built, device),
        machine=_machine(device),
        torch_version=str(torch.__version__),
        notes=tuple(filter(None, (_named(runtime.options), flops.not_counted))),
        positions=tuple(entered.cpu() for entered in positions),
    )


# --- what a program says of itself ---------------------------------------------------------------------------------


def _scan_kind(built: Built, block: int) -> str:
    scans = scans_by_block(built.captured.graph, built.captured.facts.n_blocks)[block]
    return " + ".join(dict.fromkeys(recurrence_of(scan.target).title for scan in scans)) or "none"


def _setting(built: Built, name: str) -> str:
    """A setting of the passes that ran: each prints as its own configuration."""
    return next(found.group(1) for stage in built.history if (found := re.search(rf"\b{name}='([^']*)'", stage.by)))


def _criterion(built: Built, cut_blocks: Sequence[int]) -> tuple[str, nn.Module | None]:
    """The criterion's name, and the module that runs it if it is a user's."""
    found = (held for held in built.program.attributes().values() if isinstance(held, CustomCriterion))
    custom = next(found, None) if cut_blocks else None
    name = _setting(built, "criterion")
    return ("simba" if name == "custom" and custom is None else name), custom


def _name(function: Any) -> str:
    return str(getattr(function, "__qualname__", type(function).__qualname__))


def _named(options: Options) -> str:
    """Which tokens were named by position."""
    scored = "" if options.query is None else f"every scan is scored at position {options.query}; "
    kept_always = ", ".join(map(str, options.named))
    return f"{scored}kept in every block: {kept_always}" if options.named else ""


def _schedule(runtime: Any, built: Built) -> str:
    options = getattr(runtime, "options", None)
    if options is not None:
        return repr(options.schedule)
    return "shares " + ", ".join(f"{float(share):.3g}" for share in built.shares)


def _why(built: Built, tokens: Sequence[int], dense: bool) -> dict[int, str]:
    """For each block after which no token left in this call: why."""
    if dense:
        return dict.fromkeys(range(len(tokens)), "a call with one token runs dense")
    why = reasons(built.shares, built.has_scan)
    for cut in built.cuts:
        if tokens[cut.block + 1] == tokens[cut.block]:
            why[cut.block] = f"share {float(cut.share):.3g} with floor and tail, rounded up, keeps all of so few tokens"
    return why


def _kernels(built: Built, device: torch.device) -> str:
    """What ran the scans."""
    if any(role(node) is Role.KERNEL for node in built.graph.nodes):
        return "the model's own: " + ", ".join(sorted({site.name for site in built.captured.sites}))
    scans = itertools.chain.from_iterable(scans_by_block(built.captured.graph, built.captured.facts.n_blocks))
    kinds = dict.fromkeys(recurrence_of(scan.target) for scan in scans)
    paths = [
        ops.kernel_path(device.type, kind.packages) if device.type in kind.kernels else f"torch ({kind.title})"
        for kind in kinds
    ]
    return " + ".join(dict.fromkeys(paths)) or ops.kernel_path(device.type)


def _machine(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        text = ""
    found = re.search(r"model name\s*: (.*)", text)
    name = found.group(1).strip() if found else platform.processor() or platform.machine()
    return f"{name}, {os.cpu_count()} CPUs, {torch.get_num_threads()} threads"


# --- tables --------------------------------------------------------------------------------------------------------


def _total_dict(total: Total) -> dict[str, Any]:
    derived = ("sparse_with_scorer", "share", "ideal_speedup")
    return dataclasses.asdict(total) | {name: getattr(total, name) for name in derived}


def _unit(largest: int) -> tuple[float, str]:
    scales = ((1e12, "TFLOP"), (1e9, "GFLOP"), (1e6, "MFLOP"), (1e3, "kFLOP"))
    return next(((scale, unit) for scale, unit in scales if largest >= scale), (1.0, "FLOP"))


def _aligned(lines: Sequence[Sequence[str]], left: Sequence[int]) -> list[str]:
    """Columns two spaces apart, flush right but those in `left`."""
    widths = [max(map(len, column)) for column in zip(*lines)]
    rule = ["-" * width for width in widths]
    cells = [lines[0], rule, *lines[1:]]
    place = [str.ljust if i in left else str.rjust for i in range(len(widths))]
    return ["  ".join(put(cell, width) for put, cell, width in zip(place, line, widths)).rstrip() for line in cells]
