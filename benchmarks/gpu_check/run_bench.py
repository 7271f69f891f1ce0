"""Stages f and h: `simba-fx bench` where mamba_ssm can be imported before transformers is, as in an installation."""

from __future__ import annotations

import os
import sys

from common import DRY, add_mamba


def main() -> int:
    if os.environ.get("MAMBA") == "1" and not DRY:
        add_mamba()
    from simba_fx.cli import main as bench

    return bench(sys.argv[1:])


if __name__ == "__main__":
    raise SystemExit(main())
