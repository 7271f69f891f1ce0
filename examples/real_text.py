"""Python source that the example checkpoint has never seen, read from installed packages when it is asked for.

simba-fx eval examples/mamba-py-3m --text $(python examples/real_text.py)
"""

from __future__ import annotations

from collections.abc import Iterable
from importlib.machinery import PathFinder
from pathlib import Path

import torch
from torch import Tensor

UNSEEN = ("pip", "pytest", "_pytest", "hypothesis", "jinja2")
"""Installed packages outside the checkpoint's training list; jinja2 comes with torch."""
SHORTEST = 2000  # bytes: shorter files are mostly licence headers and imports


def folders(packages: Iterable[str] = UNSEEN) -> list[Path]:
    """Where those packages that are installed stand."""
    found = (PathFinder.find_spec(package) for package in packages)  # not importlib.util: it runs setuptools' finder
    return [Path(spec.origin).parent for spec in found if spec is not None and spec.origin is not None]


def sources(packages: Iterable[str] = UNSEEN) -> list[bytes]:
    """The source files of those packages that are installed, in a fixed order."""
    texts = []
    for package in packages:
        spec = PathFinder.find_spec(package)  # not importlib.util: asking setuptools' finder for pip has side effects
        if spec is not None and spec.origin is not None:
            paths = sorted(Path(spec.origin).parent.rglob("*.py")) if spec.submodule_search_locations else [spec.origin]
            texts += [text for path in paths if len(text := Path(path).read_bytes()) > SHORTEST]
    return texts


def windows(count: int, length: int, seed: int = 0) -> Tensor:
    """`(count, length)` int64 byte windows, each from another file, at random offsets."""
    texts = [text for text in sources() if len(text) > length]
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for index in torch.randperm(len(texts), generator=generator)[:count].tolist():
        start = int(torch.randint(0, len(texts[index]) - length, (1,), generator=generator))
        rows.append(torch.tensor(list(texts[index][start : start + length])))
    if len(rows) < count:
        raise SystemExit(f"found {len(rows)} source files longer than {length} bytes in {UNSEEN}, expected {count}")
    return torch.stack(rows)


if __name__ == "__main__":
    print(*folders())
