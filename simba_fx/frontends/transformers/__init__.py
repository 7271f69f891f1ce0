"""Models of transformers, and PEFT models around one. Read `model` first."""

from simba_fx.frontends.transformers.files import KEYS, describe, read, write
from simba_fx.frontends.transformers.model import install, owns

__all__ = ["KEYS", "LIBRARY", "TAKES", "describe", "install", "owns", "read", "write"]

LIBRARY = "transformers"
TAKES = frozenset({"labels", "tail", "pad_token_id"})
