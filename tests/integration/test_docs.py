"""The pages: their code runs as it is printed, their links lead somewhere, and the README stays short.

Code that is fenced as ```python runs, block after block of one page in one namespace, in a folder that holds `examples`
and nothing else. Code that cannot run here is fenced as ```python no-run, with the reason in a comment just before it.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import simba_fx
from simba_fx.graph import runner as pipeline

ROOT = Path(__file__).resolve().parents[2]
RUN = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
PAGES = [*RUN, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
REASON = re.compile(r"<!-- not run: \S.*-->")
ABSOLUTE = re.compile(r"(?:^|[\s(`\"'=])(/[A-Za-z_][\w.-]*(?:/[\w.-]+)*|[A-Za-z]:\\\w+|file://\S+)", re.M)

every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    kind: str
    """What stands behind the fence."""
    line: int
    """Of its first line, from 1."""
    text: str
    before: str
    """The last line before it that is not empty."""


def blocks(text: str) -> Iterator[Block]:
    lines = text.splitlines()
    opened: int | None = None
    for number, line in enumerate(lines):
        if not line.startswith("```"):
            continue
        if opened is None:
            opened = number
            continue
        before = next((held for held in reversed(lines[:opened]) if held), "")
        yield Block(lines[opened][3:], opened + 2, "\n".join(lines[opened + 1 : number]), before)
        opened = None
    assert opened is None, f"the fence of line {opened} is not closed"


def prose(text: str) -> str:
    """The page without its fenced blocks."""
    return re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)


def anchors(text: str) -> set[str]:
    """The headings of a page, as links name them."""
    titles = re.findall(r"^#+ (.*)$", prose(text), re.M)
    return {re.sub(r"[^\w\- ]", "", re.sub(r"[`*]", "", title).lower()).replace(" ", "-") for title in titles}


def broken_links(page: Path, text: str) -> list[str]:
    """The relative links of a page that lead nowhere."""
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(text)):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        place = (page.parent / name).resolve() if name else page
        inside = place.is_relative_to(ROOT) and place.exists()
        if not inside or (anchor and anchor not in anchors(place.read_text() if name else text)):
            broken.append(target)
    return broken


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where a page runs; what it imports from the examples is forgotten behind it."""
    for name in ("examples", "benchmarks"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    modules = set(sys.modules)
    yield tmp_path
    scripts = {path.stem for name in ("examples", "benchmarks") for path in (ROOT / name).glob("*.py")}
    for name in scripts & (set(sys.modules) - modules):
        del sys.modules[name]
    torch.compiler.reset()


@pytest.mark.parametrize(
    "page", [page for page in RUN if any(block.kind == "python" for block in blocks(page.read_text()))],
    ids=lambda page: page.relative_to(ROOT).as_posix(),
)  # fmt: skip
def test_the_code_of_a_page_runs(page: Path, folder: Path) -> None:
    namespace: dict[str, Any] = {"__name__": "page"}
    for block in blocks(page.read_text()):
        if block.kind == "python":  # a failure then names the page and its line
            exec(compile("\n" * (block.line - 1) + block.text, str(page), "exec"), namespace)


def test_the_printed_graph_is_what_is_printed() -> None:
    """The few lines of one block, and the gather inside the next."""
    from transformers import MambaForCausalLM

    readme = (ROOT / "README.md").read_text()
    (lines,) = [block.text.splitlines() for block in blocks(readme) if "outline-blocks" in block.text]
    model = MambaForCausalLM.from_pretrained(ROOT / "examples" / "mamba-py-3m")
    sparse: Any = simba_fx.transform(model, schedule="linear")
    built = simba_fx.program(sparse)
    printed = iter(built.history[-1].text.splitlines())
    assert [line for line in lines if line not in printed] == []  # in this order, some left out between them
    (gather,) = re.findall(r"`(survivors = .*?)`", readme)
    assert pipeline.text(built.program.block_2.graph).splitlines()[1].startswith(f"{gather}    #")


@every_page
def test_code_that_does_not_run_says_why(page: Path) -> None:
    for block in blocks(page.read_text()):
        assert block.kind in ("", "python", "python no-run"), f"line {block.line}"
        if block.kind == "python no-run":
            assert REASON.fullmatch(block.before), f"line {block.line}: no comment that says why it does not run"
            compile(block.text, str(page), "exec")


@every_page
def test_links_lead_somewhere(page: Path) -> None:
    assert broken_links(page, page.read_text()) == []


@every_page
def test_no_absolute_paths(page: Path) -> None:
    assert ABSOLUTE.findall(page.read_text()) == []


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_bytes()) <= 10_000


def test_every_page_is_listed() -> None:
    """In reading order in docs/README.md, and in the README."""
    pages = {page.name for page in (ROOT / "docs").glob("*.md")} - {"README.md"}
    assert set(re.findall(r"\]\(([\w-]+\.md)\)", (ROOT / "docs" / "README.md").read_text())) == pages
    assert pages <= set(re.findall(r"\]\(docs/([\w-]+\.md)\)", (ROOT / "README.md").read_text()))


FILES = {path.relative_to(ROOT).as_posix() for folder in ("simba_fx", "passes", "tests", "benchmarks", "examples")
         for path in (ROOT / folder).rglob("*.*")}  # fmt: skip


def missing_files(text: str) -> list[str]:
    """Files of this repository that a page names in `backticks`, in full or by the end of their path."""
    named = re.findall(r"`([\w./-]+\.(?:py|cpp|sh))`", text)
    return [name for name in named if not any(f"/{file}".endswith(f"/{name}") for file in FILES)]


@every_page
def test_files_that_a_page_names_are_there(page: Path) -> None:
    if page.name != "CHANGELOG.md":  # which tells of what was
        assert missing_files(page.read_text()) == []


def test_the_watch_sees_what_is_wrong() -> None:
    assert missing_files("`simba_fx/api.py`, `api.py`, `scan.py`, `ops/cpu/kernels.cpp`, `gone.py`") == ["gone.py"]
    page = ROOT / "docs" / "method.md"
    text = (
        "# Two `words`, here\n[a](#two-words-here) [b](#another) [c](../README.md#which-models) [d](nothing.md)\n"
        "[e](../README.md#nothing) [f](../../outside.md) [g](https://example.org)\n"
        "```\n[h](in-code.md)\n# no heading\n```"
    )
    assert broken_links(page, text) == ["#another", "nothing.md", "../README.md#nothing", "../../outside.md"]
    assert anchors(text) == {"two-words-here"}
    found = ABSOLUTE.findall("in/out `/home/me/x` ~/.cache/simba_fx a / b (/usr/lib) C:\\temp https://a/b ./c")
    assert found == ["/home/me/x", "/usr/lib", "C:\\temp"]
    (block,) = blocks("text\n\n```python no-run\na = 1\n```\n")
    assert block == Block("python no-run", 4, "a = 1", "text")
