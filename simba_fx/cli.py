"""The command `simba-fx`. Nothing heavy is imported to parse or to help."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from simba_fx.bench import cli as bench
from simba_fx.errors import SimbaError
from simba_fx.evaluation import cli as evaluation

__all__ = ["main", "parser"]


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="simba-fx", description="What simba_fx gains and costs: on this machine, for a model."
    )
    commands = top.add_subparsers(dest="command", required=True)
    bench.add_commands(commands)
    evaluation.add_commands(commands)
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    top = parser()
    given, rest = top.parse_known_args(arguments)
    if rest and given.command != "lm-eval":
        top.error(f"unrecognized arguments: {' '.join(rest)}")
    given.rest = rest
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # else the profiler says at every use that it starts and stops
    try:
        status: int = given.run(given)
        return status
    except SimbaError as error:
        print(f"simba-fx: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    raise SystemExit(main())
