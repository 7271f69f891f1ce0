"""The passes, in the order in which they run. Imported as `simba_fx.passes`; each is one file and one frozen dataclass.

What each does, and what it needs before it:

    erase-sites       the markers of lifted calls go                       once for each capture, with kernels="auto";
    channel-last      step sizes lie as the scan reads them                else restore-kernels at the end
    drop-casts        no number is widened only to be narrowed again

    track-tokens      where each token stood in the input, which are real
    protect-tokens    where the tokens stand that a caller named           only with `query` or `protect`
    score-tokens      one score per cut, at the block's end                needs the scans' operands
    select-tokens     one selection per score                              needs the scores and the bookkeeping
    hoist-positions   what blocks make of the length is the input's        needs the selections: what is behind a cut
    gather-survivors  everything alive across a cut is gathered            needs every selection in place
    restore-length    early exits and survivors back in their places       needs the gathers: they name the residual
    restore-kernels   the model's own scan functions                       last, since it hides the scans
    restore-functions those with a backward of their own                    only where a model has some
    continue-states   scans and attention start from a cache's states      instead of it, on a warm cache
    outline-blocks    one call per block, equal blocks share code          only compile="blocks"; sees the final nodes
"""

from __future__ import annotations

if __name__ != "simba_fx.passes":
    raise ImportError(
        f"This folder was imported as {__name__!r}; expected 'simba_fx.passes'. Operators and passes must exist once: "
        "write `from simba_fx import passes`."
    )

from typing import Any

from simba_fx.graph.plan import Cut
from simba_fx.passes.channel_last import ChannelLast
from simba_fx.passes.continue_states import ContinueStates
from simba_fx.passes.drop_casts import DropCasts
from simba_fx.passes.erase_sites import EraseSites
from simba_fx.passes.gather_survivors import GatherSurvivors
from simba_fx.passes.hoist_positions import HoistPositions
from simba_fx.passes.outline_blocks import OutlineBlocks
from simba_fx.passes.protect_tokens import ProtectTokens
from simba_fx.passes.restore_functions import RestoreFunctions
from simba_fx.passes.restore_kernels import RestoreKernels
from simba_fx.passes.restore_length import RestoreLength
from simba_fx.passes.score_tokens import ScoreTokens
from simba_fx.passes.select_tokens import SelectTokens
from simba_fx.passes.track_tokens import TrackTokens

__all__ = [
    "ChannelLast",
    "ContinueStates",
    "DropCasts",
    "EraseSites",
    "GatherSurvivors",
    "HoistPositions",
    "OutlineBlocks",
    "ProtectTokens",
    "RestoreFunctions",
    "RestoreKernels",
    "RestoreLength",
    "ScoreTokens",
    "SelectTokens",
    "TrackTokens",
    "pipeline",
    "preparation",
]


def preparation(kernels: str = "auto") -> tuple[Any, ...]:
    """The passes that depend on nothing but what was captured, first to last: they run once for all transforms."""
    return (EraseSites(), ChannelLast(), DropCasts()) if kernels == "auto" else ()


def pipeline(cuts: tuple[Cut, ...], *, criterion: str = "simba", floor: int = 4, seed: int = 0, span: int = 1,
             output: str = "full", sites: tuple[Any, ...] = (), kernels: str = "auto", query: int | None = None,
             protect: tuple[int, ...] = (), trailing: bool = False,
             states: tuple[tuple[int, str, int], ...] = ()) -> tuple[Any, ...]:  # fmt: skip
    """The passes of one transform behind those, up to outlining, first to last; `states`: what a warm cache holds."""
    return (
        TrackTokens(trailing),
        *((ProtectTokens(query, protect),) if query is not None or protect else ()),
        ScoreTokens(cuts, criterion, floor, seed, span),
        SelectTokens(cuts, floor),
        HoistPositions(output),
        GatherSurvivors(output),
        RestoreLength(output),
        *((ContinueStates(states),) if states else (RestoreKernels(sites),) if kernels == "model" else ()),
        *((RestoreFunctions(sites),) if any(site.own for site in sites) else ()),
    )
