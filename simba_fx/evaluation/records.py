"""What an evaluation has measured, a line of JSON as soon as it is known, so that a run that was stopped goes on."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from simba_fx.evaluation.options import EvalError

__all__ = ["Records"]


class Records:
    """The lines of one file, by their keys."""

    def __init__(self, path: Path, subject: dict[str, Any]) -> None:
        """`subject`: what everything in the file is about.

        Raises:
            EvalError: the file is about something else.
        """
        self.path, self.found = path, dict[tuple[Any, ...], dict[str, Any]]()
        if path.is_file():
            lines = path.read_text().splitlines(keepends=True)
            whole = [line for line in lines if line.endswith("\n")]  # the last one may have been cut off
            first = json.loads(whole[0]) if whole else subject
            if first != subject:
                differs = ", ".join(key for key in subject if first.get(key) != subject[key])
                raise EvalError(
                    f"{path.name} holds measurements of another run ({differs} differ); expected those of this one. "
                    "Give another folder as --out, or delete the file."
                )
            self.found = {self._key(line): line for line in map(json.loads, whole[1:])}
            if len(whole) < len(lines):
                path.write_text("".join(whole))
        if not path.is_file() or not path.stat().st_size:
            self._write(subject, "w")

    @staticmethod
    def _key(line: dict[str, Any]) -> tuple[Any, ...]:
        return tuple(line["key"])

    def get(self, *key: Any) -> dict[str, Any] | None:
        return self.found.get(key)

    def put(self, *key: Any, **values: Any) -> dict[str, Any]:
        line = {"key": list(key)} | values
        self.found[key] = line
        self._write(line, "a")
        return line

    def _write(self, line: dict[str, Any], mode: str) -> None:
        with self.path.open(mode) as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())
