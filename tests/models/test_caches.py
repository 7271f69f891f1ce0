"""Caches of pruned prompts: allocated beforehand, emptied, pickled, copied, and after a step that failed."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from models import BY_NAME, CACHE, Entry, names, padded, sparse, tokens
from reference import cache_name
from torch import Tensor, nn
from transformers import DynamicCache, StaticCache

import simba_fx
from simba_fx.frontends.transformers.caches import is_warm

HYBRIDS = [BY_NAME[name] for name in ("bamba", "falcon-h1", "jamba", "zamba2")]
every_hybrid = pytest.mark.parametrize("entry", HYBRIDS, ids=names(HYBRIDS))


def cache_argument(entry: Entry) -> str:
    return CACHE if entry.name.startswith("mamba") or CACHE == "cache" else "past_key_values"


def generate(model: Any, ids: Tensor, **more: Any) -> Tensor:
    found: Tensor = model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0, **more)
    return found


@every_hybrid
@pytest.mark.parametrize("empty", ["reset", "early"])
def test_an_empty_static_cache_takes_a_prompt(entry: Entry, empty: str) -> None:
    """Whether it was emptied, or its room was allocated before there was anything to hold."""
    model, ids = sparse(entry.name, "linear"), tokens(1, 1, 30)
    cache: Any = StaticCache(config=model.config, max_cache_len=64)
    if empty == "early":
        config: Any = model.config
        width = getattr(config, "attention_head_dim", None) or getattr(config, "head_dim", None)
        width = width or config.hidden_size // config.num_attention_heads
        cache.early_initialization(1, config.num_key_value_heads, width, torch.float32, torch.device("cpu"))
    first = generate(model, ids, **{cache_argument(entry): cache})
    assert torch.equal(first, generate(model, ids))
    if empty == "reset":
        cache.reset()
        assert torch.equal(generate(model, ids, **{cache_argument(entry): cache}), first)


def prompt(model: nn.Module, name: str) -> tuple[Any, Tensor]:
    """A cache after two padded rows, and the mask of the step that comes next."""
    ids, mask = padded([tokens(1, 30), tokens(2, 21)], [0, 9], [0, 0])
    with torch.no_grad():
        output = model(ids, attention_mask=mask, use_cache=True)
    return output[name], nn.functional.pad(mask, (0, 1), value=1)


def step(model: nn.Module, name: str, cache: Any, mask: Tensor, token: int = 5) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(torch.full((2, 1), token), attention_mask=mask, use_cache=True, **{name: cache}).logits
    return found


@pytest.mark.parametrize("name", ["mamba", "bamba", "jamba"])
@pytest.mark.parametrize(
    "way", [lambda cache: pickle.loads(pickle.dumps(cache)), copy.deepcopy], ids=["pickle", "copy"]
)
def test_a_cache_may_be_stored(name: str, way: Callable[[Any], Any]) -> None:
    model, argument = sparse(name, "linear"), cache_argument(BY_NAME[name])
    cache, mask = prompt(model, argument)
    again = way(cache)
    right = step(model, argument, cache, mask)
    assert torch.equal(step(model, argument, again, mask), right)


@pytest.mark.parametrize("name", ["bamba", "jamba", "zamba2"])
def test_a_step_that_failed_leaves_the_cache_as_it_was(name: str) -> None:
    model, argument = sparse(name, "linear"), cache_argument(BY_NAME[name])
    cache, mask = prompt(model, argument)
    right = step(model, argument, cache, mask)
    cache, mask = prompt(model, argument)
    with pytest.raises(IndexError):
        step(model, argument, cache, mask, token=10**6)
    assert torch.equal(step(model, argument, cache, mask), right)


@pytest.mark.parametrize("name", ["mamba", "bamba"])
def test_a_prompt_of_one_token_is_a_prompt(name: str) -> None:
    """With an empty cache, as `generate` passes it: `kept` tells of it, and what it cannot have is refused."""
    pruned, ids = sparse(name, "linear"), tokens(1, 2, 1)
    with torch.no_grad():
        pruned(tokens(2, 1, 20))
        pruned.generate(ids, max_new_tokens=2, do_sample=False, pad_token_id=0)
        assert [block.tolist() for block in simba_fx.kept(pruned)] == [[[0], [0]]] * 4
        empty = {cache_name(pruned): DynamicCache(config=pruned.config)}
        with simba_fx.tail(pruned, 2), pytest.raises(simba_fx.errors.InputError, match="last 2 tokens, but the prompt"):
            pruned(ids, use_cache=True, **empty)


def test_a_decoding_step_does_not_ask_a_device_how_full_a_cache_is() -> None:
    """Layers with recurrent states know it in Python, wherever they stand."""

    def asked() -> int:
        raise AssertionError("a static layer's length is on its device")

    keys = SimpleNamespace(keys=torch.ones(1, 1, 4, 2), get_seq_length=asked)
    for state in ({0: True}, {0: False, 1: True}):
        assert is_warm(SimpleNamespace(layers=[keys, SimpleNamespace(has_previous_state=state)]))
    keys.get_seq_length = lambda: torch.tensor(0)
    assert not is_warm(SimpleNamespace(layers=[keys, SimpleNamespace(has_previous_state={0: False})]))
    keys.get_seq_length = lambda: torch.tensor(3)
    assert is_warm(SimpleNamespace(layers=[keys]))
