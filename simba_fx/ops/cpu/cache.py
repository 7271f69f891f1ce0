"""Compiled libraries in a folder of the user's own. What others could have put there, or is not whole, is not loaded.

An entry is a file of JSON, `<key>-<compiler>.json`, with the library's digest and the compiler in words, and the
library, `<key>-<compiler>-<digest>.so`. Both are written beside and moved into place, the JSON last: processes may
build at once.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import stat
import tempfile
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Entry", "Refused", "entries", "folder", "keep"]


class Refused(Exception):
    """A folder or a file that is not used; the message is the reason."""


@dataclass(frozen=True)
class Entry:
    """A library whose digest was right when it was read, and what compiled it, in words."""

    library: Path
    compiler: str


def folder() -> Path:
    """The cache, made (mode 700) if there is none: `SIMBA_FX_CACHE`, else `simba_fx` in the user's caches.

    Raises:
        Refused: it cannot be made, is another user's or a link, or others may write to it.
    """
    try:
        place = _named()
        place.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            place.mkdir(mode=0o700)
        found = os.lstat(place)
    except (OSError, RuntimeError) as error:  # RuntimeError: no home
        raise Refused(f"no cache: {error}") from None
    if not stat.S_ISDIR(found.st_mode):
        raise Refused(f"no cache: {place} is a link or a file, expected a folder")
    _check_private(place, found)
    return place


def _named() -> Path:
    if os.environ.get("SIMBA_FX_CACHE"):
        return Path(os.environ["SIMBA_FX_CACHE"]).absolute()
    caches = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(caches) if os.path.isabs(caches) else Path.home() / ".cache") / "simba_fx"


def _check_private(place: Path, found: os.stat_result) -> None:
    if hasattr(os, "getuid") and found.st_uid != os.getuid():
        raise Refused(f"{place} belongs to user {found.st_uid}, expected {os.getuid()}")
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise Refused(f"{place} may be written by others (mode {stat.S_IMODE(found.st_mode):o}), expected 700")


def entries(place: Path, key: str, compiler: str = "*") -> tuple[list[Entry], list[str]]:
    """The usable entries of a key, the newest first, and why others are not used."""
    found: list[tuple[int, Entry]] = []
    refused: list[str] = []
    for file in place.glob(f"{key}-{compiler}.json"):
        try:
            found.append((os.lstat(file).st_mtime_ns, _checked(file)))
        except (OSError, Refused) as reason:
            refused.append(str(reason))
    return [entry for _, entry in sorted(found, key=lambda pair: -pair[0])], refused


def _checked(file: Path) -> Entry:
    try:
        written = json.loads(_read(file))
        digest, compiler = written["sha256"], written["compiler"]
        usable = isinstance(compiler, str) and re.fullmatch("[0-9a-f]{64}", digest)
    except (ValueError, KeyError, TypeError, RecursionError):
        usable = None
    if not usable:
        raise Refused(f"{file} is damaged")
    library = _library(file, digest)
    if hashlib.sha256(_read(library)).hexdigest() != digest:
        raise Refused(f"{library} is damaged")
    return Entry(library, compiler)


def _library(file: Path, digest: str) -> Path:
    return file.with_name(f"{file.stem}-{digest[:16]}.so")


def _read(file: Path) -> bytes:
    """A plain file of the user's own."""
    opened = os.open(file, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
    with open(opened, "rb") as held:
        found = os.fstat(opened)
        if not stat.S_ISREG(found.st_mode):
            raise Refused(f"{file} is no plain file")
        _check_private(file, found)
        return held.read()


def keep(place: Path, key: str, compiler: str, words: str, built: Path) -> Entry:
    """Move a library that was built into the cache; `compiler` identifies what built it, `words` say it."""
    file = place / f"{key}-{compiler}.json"
    digest = hashlib.sha256(built.read_bytes()).hexdigest()
    library = _library(file, digest)
    built.chmod(0o600)  # whatever the umask is: nobody else's to write
    os.replace(built, library)
    opened, beside = tempfile.mkstemp(dir=place, prefix=".simba_fx-")
    try:
        with open(opened, "w", encoding="utf-8") as held:
            json.dump({"sha256": digest, "compiler": words}, held)
        os.replace(beside, file)
    except BaseException:
        Path(beside).unlink(missing_ok=True)
        raise
    return Entry(library, words)
