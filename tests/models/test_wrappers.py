"""A language model inside a model of pictures and texts: refused, naming what can be transformed, which works."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from models import BY_NAME, keep_all, padded, tokens
from torch import Tensor, nn

import simba_fx
from simba_fx.errors import CaptureError

transformers = pytest.importorskip("transformers")
PICTURE, STARTS, ENDS = 50, 49, 48


@pytest.fixture(scope="module")
def models() -> tuple[Any, Any]:
    """A Qwen3.5 for pictures and texts, and one for texts over the same weights."""
    text: Any = BY_NAME["qwen3-5"].build()
    config = text.config.to_dict() | {
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5,
                            "mrope_section": [1, 1, 0], "mrope_interleaved": True},
    }  # fmt: skip
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2, "num_position_embeddings": 16,
              "out_hidden_size": text.config.hidden_size}  # fmt: skip
    torch.manual_seed(0)
    wrapper = transformers.Qwen3_5ForConditionalGeneration(
        transformers.Qwen3_5Config(text_config=config, vision_config=vision, image_token_id=PICTURE,
                                   video_token_id=47, vision_start_token_id=STARTS, vision_end_token_id=ENDS)
    ).eval()  # fmt: skip
    alone = transformers.Qwen3_5ForCausalLM(wrapper.config.text_config).eval()
    alone.load_state_dict(text.state_dict())
    wrapper.model.language_model.load_state_dict(alone.model.state_dict())
    wrapper.lm_head.load_state_dict(alone.lm_head.state_dict())
    return wrapper, alone


@contextmanager
def sparse(wrapper: Any, schedule: Any, **options: Any) -> Iterator[nn.Module]:
    """What the refusal says."""
    dense = wrapper.model.language_model
    wrapper.model.language_model = simba_fx.transform(dense, schedule, **options)
    try:
        yield wrapper.model.language_model
    finally:
        wrapper.model.language_model = dense


def with_a_picture(wrapper: Any) -> dict[str, Tensor]:
    vision = wrapper.model.visual.config
    ids = torch.cat((torch.tensor([[5, 6, STARTS, *4 * [PICTURE], ENDS]]), tokens(1, 1, 29, vocabulary=47)), 1)
    pixels = torch.randn(16, vision.in_channels * vision.temporal_patch_size * vision.patch_size**2)
    return {"input_ids": ids, "pixel_values": pixels, "image_grid_thw": torch.tensor([[1, 4, 4]]),
            "mm_token_type_ids": (ids == PICTURE).long()}  # fmt: skip


def test_the_wrapper_is_refused_by_the_name_of_its_language_model(models: tuple[Any, Any]) -> None:
    said = r"Write model\.model\.language_model = simba_fx\.transform\(model\.model\.language_model, \.\.\.\)"
    with pytest.raises(CaptureError, match=said):
        simba_fx.transform(models[0], "linear")


def test_of_texts_it_is_the_language_model_alone(models: tuple[Any, Any]) -> None:
    wrapper, alone = models
    ids, mask = padded([tokens(1, 20, vocabulary=47), tokens(2, 14, vocabulary=47)], [0, 6], [0, 0])
    other = simba_fx.transform(alone, "linear")
    with sparse(wrapper, "linear"), torch.no_grad():
        for call in ({"input_ids": ids[:1]}, {"input_ids": ids, "attention_mask": mask}):
            real = call.get("attention_mask", torch.ones_like(call["input_ids"])).bool()
            assert torch.equal(wrapper(**call).logits[real], other(**call).logits[real])
            ours, theirs = (m.generate(**call, max_new_tokens=20, do_sample=False) for m in (wrapper, other))
            assert torch.equal(ours, theirs)


def test_with_a_picture(models: tuple[Any, Any]) -> None:
    wrapper, _ = models
    torch.manual_seed(1)
    call = with_a_picture(wrapper)
    with torch.no_grad():
        dense, said = wrapper(**call).logits, wrapper.generate(**call, max_new_tokens=8, do_sample=False)
        with sparse(wrapper, keep_all(4), kernels="model"):
            assert torch.equal(wrapper(**call).logits, dense)
            assert torch.equal(wrapper.generate(**call, max_new_tokens=8, do_sample=False), said)
        with sparse(wrapper, "linear") as inner:
            assert wrapper(**call).logits.shape == dense.shape
            assert simba_fx.kept(inner)[-1].shape[1] < 10
            assert wrapper.generate(**call, max_new_tokens=8).shape == said.shape
