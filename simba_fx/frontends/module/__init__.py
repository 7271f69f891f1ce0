"""Plain modules: any `nn.Module` that calls a registered scan. Read `model` first."""

from simba_fx.frontends.module.files import KEYS, describe, read, write
from simba_fx.frontends.module.model import install, owns

__all__ = ["KEYS", "LIBRARY", "TAKES", "describe", "install", "owns", "read", "write"]

LIBRARY = "torch"
TAKES = frozenset({"mask", "mask_marks", "example_inputs"})
