"""From captions to latents: what is computed once."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from longsana.config import InferenceConfig, load_config
from longsana.data.prompts import Prompt
from longsana.runtime.clock import Clock
from longsana.sampling.pipeline import Caption, VideoPipeline

CONFIG = "configs/sana_video_config/longsana/shapes/longsana.yaml"
TEXTS = ("A big red circle moves slowly to the left on a black background.", "A small blue square stays still.")


@pytest.fixture(scope="module")
def loaded() -> tuple[VideoPipeline, Caption]:
    """Three chunks of two latents; a caption of two parts."""
    config = load_config(
        CONFIG,
        ["sampling.num_frames=21", "sampling.chunk_frames=2", "sampling.height=32", "sampling.width=32"],
        InferenceConfig,
    )
    pipeline = VideoPipeline(config, "cpu")
    with pipeline.text_encoder() as encoder:
        caption = pipeline.encode(encoder, Prompt(1, TEXTS[0], TEXTS, 0, 32, 32))
    pipeline.load()
    return pipeline, caption


def latents(pipeline: VideoPipeline, texts: tuple[str, ...], caption: Caption) -> Tensor:
    prompt = Prompt(1, texts[0], texts, 0, 32, 32)
    return torch.cat([frames.latents for frames in pipeline.sample([prompt], [caption], Clock())], dim=2)


@pytest.mark.parametrize("parts", [1, 2])
def test_a_prompt_is_read_once_however_many_chunks_it_has(loaded, monkeypatch, parts):
    pipeline, caption = loaded
    texts, caption = TEXTS[:parts], Caption(caption.parts[:parts], None)
    assert len(pipeline.plan) == 3
    reads, read = [], pipeline.model.cache_caption
    monkeypatch.setattr(pipeline, "_cached", lambda text: reads.append(text) or read(text))
    ahead = latents(pipeline, texts, caption)
    assert len(reads) == parts
    monkeypatch.setattr(pipeline, "_cached", lambda text: text)
    torch.testing.assert_close(ahead, latents(pipeline, texts, caption), rtol=1e-3, atol=1e-3)
