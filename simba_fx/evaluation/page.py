"""A text as a page of HTML, each token in the colour of how far it travelled."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

import simba_fx
from simba_fx.errors import SimbaError

__all__ = ["travel", "write_page"]

_PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>@TITLE@</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 62em; padding: 0 1em; color: #222; }
#text { font: 13px/1.6 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere; border: 1px solid #ddd;
  padding: 1em; }
#text span { color: #111; }
#text span.gone { background: none !important; color: #c4c4c4; }
#text span.light { color: #fff; }
.key { display: inline-block; width: 1.6em; height: 0.9em; margin-right: 1px; vertical-align: middle; }
input { width: 20em; vertical-align: middle; }
p { margin: 0.6em 0; }
</style></head><body>
<h1>@TITLE@</h1>
<p>@ABOUT@</p>
<p>left after the first block @KEYS@ went through all @BLOCKS@ blocks</p>
<p><label>Tokens that enter block <input id="block" type="range" min="0" max="@BLOCKS@" value="0">
<output id="shown"></output></label></p>
<div id="text" aria-label="the text, coloured by how far each token travelled"></div>
<script>
const tokens = @TOKENS@, blocks = @BLOCKS@, colours = @COLOURS@;
const text = document.getElementById("text"), slider = document.getElementById("block");
const spans = tokens.map(([token, depth]) => {
  const span = document.createElement("span");
  span.textContent = token;
  span.style.background = colours[depth];
  if (depth < blocks / 2) span.classList.add("light");
  span.title = depth === blocks ? "went through all blocks" : `left after block ${depth - 1}`;
  text.append(span);
  return span;
});
function show() {
  const at = Number(slider.value), whole = at === blocks;
  const there = tokens.filter(([, depth]) => depth > at || (whole && depth === blocks)).length;
  document.getElementById("shown").textContent = (whole ? "the end" : at) + `: ${there} of ${tokens.length}`;
  spans.forEach((span, i) => span.classList.toggle("gone", whole ? tokens[i][1] < blocks : tokens[i][1] <= at));
}
slider.addEventListener("input", show);
show();
</script></body></html>
"""
_KEY = '<span class="key" style="background: {}"></span>'
_DARK, _BRIGHT = (68, 1, 84), (253, 231, 37)
_MIDDLE = (33, 145, 140)


def travel(sparse: nn.Module, row: int = 0) -> Tensor:
    """Through how many blocks each token of the last call went, `(L,)` int64; 0 for padding.

    Raises:
        SimbaError: the model has not been called yet.
    """
    blocks = [entered[row] for entered in simba_fx.kept(sparse)]
    depth = torch.zeros(blocks[0].shape[0], dtype=torch.int64)
    for entered in blocks:
        depth[entered[entered >= 0].cpu()] += 1
    return depth


def write_page(
    sparse: nn.Module,
    tokens: Sequence[str],
    path: str | Path,
    *,
    row: int = 0,
    title: str = "How far each token travelled",
) -> None:
    """Write a page, which needs nothing but itself, of row `row` of the last call of `sparse`.

    Args:
        tokens: the row's tokens as text, one for each of its L places.

    Raises:
        SimbaError: the model has not been called yet, or that call had another number of tokens.
    """
    depth = travel(sparse, row)
    if len(tokens) != len(depth):
        raise SimbaError(
            f"write_page expects one text for each of the {len(depth)} tokens of the last call; found {len(tokens)}. "
            "Call the model on the tokens that are to be shown."
        )
    blocks = len(simba_fx.kept(sparse))
    built = simba_fx.program(sparse)
    share = float(depth.double().mean()) / blocks
    fills = {
        "TITLE": html.escape(title),
        "ABOUT": f"{len(tokens):,} tokens, {blocks} blocks; a token went through {100 * share:.0f} % of them on "
        f"average. Shares of the tokens that enter each block: {', '.join(f'{float(s):.2g}' for s in built.shares)}.",
        "KEYS": "".join(_KEY.format(_colour(depth, blocks)) for depth in range(1, blocks + 1)),
        "BLOCKS": str(blocks),
        "TOKENS": json.dumps([[token, int(d)] for token, d in zip(tokens, depth)]).replace("<", "\\u003c"),
        "COLOURS": json.dumps([_colour(d, blocks) for d in range(blocks + 1)]),
    }
    page = re.sub("@([A-Z]+)@", lambda found: fills[found[1]], _PAGE)  # at once: what is filled in may look like that
    Path(path).write_text(page, encoding="utf-8")


def _colour(depth: int, blocks: int) -> str:
    """From dark violet through green to yellow (after viridis), which colour-blind eyes tell apart by lightness."""
    at = max(0, depth - 1) / max(1, blocks - 1)
    low, high, part = (_DARK, _MIDDLE, 2 * at) if at < 0.5 else (_MIDDLE, _BRIGHT, 2 * at - 1)
    return "#" + "".join(f"{round(a + (b - a) * part):02x}" for a, b in zip(low, high))
