"""The operators as Triton kernels, for CUDA. Importing this package imports Triton: ImportError where there is none."""

from simba_fx.ops.cuda.triton import conv, delta, scan, score, select

_BOUNDARIES = (scan.selective_scan_kernel, scan.chain_kernel)
_STEPS_BEHIND = (score.step_sums_kernel, score.suffix_kernel)

KERNELS = {
    "selective_scan": _BOUNDARIES,
    "selective_scan_backward": (*_BOUNDARIES, scan.selective_scan_backward_kernel),
    "causal_conv1d": (conv.causal_conv1d_kernel,),
    "selective_token_score": (*_STEPS_BEHIND, score.selective_score_kernel),
    "delta_token_score": (delta.delta_reads_kernel,),
    "ssd_token_score": (*_STEPS_BEHIND, score.ssd_score_kernel),
    "select_tokens": (select.select_kernel,),
    "select_real_tokens": (select.select_kernel,),
}
"""By operator of `simba_fx.ops`: the kernels that it launches."""

__all__ = ["KERNELS", "conv", "delta", "scan", "score", "select"]
