"""The user's texts as tokens, and windows of them."""

from __future__ import annotations

import importlib
import random
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from simba_fx.evaluation.options import EvalError

__all__ = ["byte_tokenizer", "documents", "encoder_of", "has_tokenizer", "shown", "windows"]

_TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")


def encoder_of(name: str, vocabulary: int) -> Callable[[str], list[int]]:
    """What makes tokens of a text: the tokenizer beside a checkpoint, or its bytes where there is none.

    Raises:
        EvalError: the model has neither a tokenizer nor room for bytes.
    """
    if has_tokenizer(name):
        transformers: Any = importlib.import_module("transformers")
        tokenizer = transformers.AutoTokenizer.from_pretrained(name)
        return lambda text: tokenizer.encode(text, add_special_tokens=False)
    if vocabulary < 256:
        raise EvalError(
            f"{name} has no tokenizer beside it; expected one, or a vocabulary of 256 bytes and more, found "
            f"{vocabulary}. Save the tokenizer in the model's folder."
        )
    return lambda text: list(text.encode())


def has_tokenizer(folder: str) -> bool:
    """Whether there is one beside a checkpoint. (transformers makes one up where there is none.)"""
    return any((Path(folder) / file).is_file() for file in _TOKENIZERS)


def byte_tokenizer(end: int) -> Any:
    """A tokenizer of transformers with a token for each byte, of which `end` ends a text."""
    tokenizers: Any = importlib.import_module("tokenizers")
    transformers: Any = importlib.import_module("transformers")
    vocabulary = {f"<0x{byte:02X}>": byte for byte in range(256)}
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, [], byte_fallback=True))
    made.decoder = tokenizers.decoders.Sequence([tokenizers.decoders.ByteFallback(), tokenizers.decoders.Fuse()])
    last = f"<0x{end:02X}>"
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, bos_token=last, eos_token=last, pad_token=last)


def shown(name: str, ids: Sequence[int]) -> list[str]:
    """Each token as text."""
    if has_tokenizer(name):
        transformers: Any = importlib.import_module("transformers")
        tokenizer = transformers.AutoTokenizer.from_pretrained(name)
        return [tokenizer.decode([token]) for token in ids]
    return [bytes([token]).decode("latin-1") for token in ids]


def documents(paths: Iterable[str], encode: Callable[[str], list[int]], least: int) -> list[Tensor]:
    """The texts of more than `least` tokens, each `(T,)` int64, in the order of their paths.

    Raises:
        EvalError: a path that is not there.
    """
    files: list[Path] = []
    for path in map(Path, paths):
        if not path.exists():
            raise EvalError(f"--text expects files or folders; found nothing at {path}.")
        files += (
            sorted(file for file in path.rglob("*") if file.is_file() and file.suffix != ".pyc")
            if path.is_dir()
            else [path]
        )
    found = []
    for file in files:
        if file.stat().st_size <= least:  # a token is a byte, or more
            continue
        text = file.read_bytes()
        if b"\0" in text[:4096]:  # no text
            continue
        tokens = encode(text.decode(errors="replace"))
        if len(tokens) > least:
            found.append(torch.tensor(tokens))
    return found


def windows(texts: Sequence[Tensor], count: int, length: int, seed: int) -> Tensor:
    """Up to `count` windows `(n, length)` int64 that do not overlap, of as many texts as there are.

    Raises:
        EvalError: fewer than two.
    """
    draw = random.Random(seed)
    places: list[list[tuple[int, int]]] = []
    for index, text in enumerate(texts):
        fit = len(text) // length
        first = draw.randrange(len(text) - fit * length + 1) if fit else 0
        own = [(index, first + i * length) for i in range(fit)]
        draw.shuffle(own)
        places.append(own)
    draw.shuffle(places)
    order = [own[turn] for turn in range(max(map(len, places), default=0)) for own in places if turn < len(own)]
    if len(order) < 2:
        raise EvalError(
            f"--text holds {len(order)} windows of {length} tokens; expected at least 2, of texts that are as long. "
            "Name more or longer texts, or shorter --lengths."
        )
    return torch.stack([texts[index][start : start + length] for index, start in order[:count]])
