"""The operators that a transformed graph is made of: scans, scores and selections, each a single named node.

Letters, the same in every docstring of this package, and the symbols they stand for in the papers (Mamba: Gu & Dao
2023; Mamba-2: Dao & Gu 2024; Simba: Song et al. 2025):

    B   rows of a batch                     L   tokens (T in Mamba-2, L in Simba)
    D   channels of the scan (D; d_inner)   N   states (N; d_state)
    H   heads                               P   channels of a head; D = H * P
    G   groups of heads or channels that share B_t and C_t
    W   width of the convolution (d_conv), or of a window of tokens where a docstring says so
    u, x   the scan's input (x)             dt, delta   step size (Δ), raw before bias and softplus
    A   decay rates, negative               B_t, C_t    input and output projections (B_t, C_t)
    h   state                               q   query position (the last token that precedes every scored target)
    R_t steps after token t up to q         m, k   slots of a region, and how many of them stay

Where an argument is called B it is the projection; where a shape says `(B, ...)` it is the number of rows.
Importing this package compiles nothing and imports neither transformers nor mamba_ssm.
"""

from simba_fx.ops.backends import kernel_path
from simba_fx.ops.delta import delta_scan, delta_token_score
from simba_fx.ops.pool import pool_scores, rank_scores
from simba_fx.ops.protect import protect_tokens, row_positions
from simba_fx.ops.restore import restore_tokens, take_tokens
from simba_fx.ops.scan import causal_conv1d, selective_scan, ssd_scan
from simba_fx.ops.score import CRITERIA, query_position, selective_token_score, ssd_token_score
from simba_fx.ops.select import POSITION_CRITERIA, position_score, select_real_tokens, select_tokens, take_square

from simba_fx.ops import flops  # isort: skip  # after the operators: it registers a formula for each of them

__all__ = [
    "CRITERIA",
    "POSITION_CRITERIA",
    "causal_conv1d",
    "delta_scan",
    "delta_token_score",
    "flops",
    "kernel_path",
    "pool_scores",
    "position_score",
    "protect_tokens",
    "query_position",
    "rank_scores",
    "restore_tokens",
    "row_positions",
    "select_real_tokens",
    "select_tokens",
    "selective_scan",
    "selective_token_score",
    "ssd_scan",
    "ssd_token_score",
    "take_square",
    "take_tokens",
]
