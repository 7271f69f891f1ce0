"""The operators as Triton kernels, for CUDA. Importing this package imports Triton: ImportError where there is none."""

from simba_fx.ops.triton import scan, score, select

KERNELS = {
    "selective_scan": (scan.selective_scan_kernel,),
    "selective_scan_backward": (scan.selective_scan_kernel, scan.selective_scan_backward_kernel),
    "selective_token_score": (score.selective_score_kernel,),
    "ssd_token_score": (score.ssd_score_kernel,),
    "select_tokens": (select.select_kernel,),
    "select_real_tokens": (select.select_kernel,),
}
"""By operator of `simba_fx.ops`: the kernels that it launches."""

__all__ = ["KERNELS", "scan", "score", "select"]
