"""simba_fx: a compiler pass that makes a pretrained state-space model do less work per token, without training.

    sparse = simba_fx.transform(model, schedule="linear")
    sparse = torch.compile(sparse)

Importing this package patches nothing, touches no device and imports neither transformers nor mamba_ssm.
"""

from simba_fx import errors
from simba_fx.api import explain, kept, program, reached, tail, transform
from simba_fx.lift import register_scan
from simba_fx.operands import SelectiveScan, SSDScan
from simba_fx.report import report
from simba_fx.schedule import Budget, Constant, Cosine, Dense, Linear, Stages

__all__ = [
    "Budget",
    "Constant",
    "Cosine",
    "Dense",
    "Linear",
    "SSDScan",
    "SelectiveScan",
    "Stages",
    "errors",
    "explain",
    "kept",
    "program",
    "reached",
    "register_scan",
    "report",
    "tail",
    "transform",
]
