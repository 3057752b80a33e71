"""From captions to latents: what is computed once."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch import Tensor

from longsana.config import InferenceConfig, load_config
from longsana.data.prompts import Prompt
from longsana.encoders.vae import VideoVAE
from longsana.models.dit import LongSanaDiT
from longsana.sampling.captions import Caption, caption_encoder
from longsana.sampling.engine import Engine
from tests.pipelines.repository import shallow

CONFIG = "configs/sana_video_config/longsana/shapes/longsana.yaml"
TEXTS = ("A big red circle moves slowly to the left on a black background.", "A small blue square stays still.")

Loaded = tuple[Engine, LongSanaDiT, VideoVAE, Caption]


@pytest.fixture(scope="module")
def loaded() -> Loaded:
    """Three chunks of two latents; a caption of two parts."""
    config: InferenceConfig = load_config(
        CONFIG,
        [*shallow(), "sampling.num_frames=21", "sampling.chunk_frames=2", "sampling.height=32", "sampling.width=32"],
    )
    engine = Engine(config, "cpu")
    with caption_encoder(engine.config, engine.device) as encode:
        caption = encode(Prompt(1, TEXTS[0], TEXTS, 0, 32, 32))
    return engine, *engine.load(), caption


@pytest.mark.parametrize("parts", [1, 2])
def test_a_caption_is_cached_once_however_many_chunks_it_has(
    loaded: Loaded, monkeypatch: pytest.MonkeyPatch, parts: int
) -> None:
    engine, network, decoder, caption = loaded
    assert len(engine.plan) == 3
    prompt = Prompt(1, TEXTS[0], TEXTS[:parts], 0, 32, 32)

    def latents() -> Tensor:
        captions = [Caption(caption.parts[:parts])]
        return torch.cat([frames.latents for frames in engine.sample(network, decoder, [prompt], captions)], dim=2)

    cached, cache_caption = [], network.cache_caption
    monkeypatch.setattr(network, "cache_caption", lambda text: cached.append(text) or cache_caption(text))
    ahead = latents()
    assert len(cached) == parts
    monkeypatch.setattr(network, "cache_caption", lambda text: text)
    torch.testing.assert_close(ahead, latents(), rtol=1e-3, atol=1e-3)


def test_the_text_encoder_is_gone_after_its_block(loaded: Loaded) -> None:
    """Its memory, 5 GiB of Gemma 2 2B, is the network's; whoever encoded still holds the encoder."""
    engine, *_ = loaded
    with caption_encoder(engine.config, engine.device) as encode:
        weights = weakref.ref(encode.encoder.model)
        assert weights() is not None
    assert weights() is None and encode is not None
