"""What a GPU must not change."""

from __future__ import annotations

import pytest
import torch

from longsana.chunks import ChunkPlan
from longsana.config import ModelConfig, VAEConfig
from longsana.encoders.vae import WanVAE
from longsana.flow.schedule import FlowSchedule
from longsana.models.build import build_model
from longsana.models.embeddings import TextEmbedding
from longsana.sampling.noise import PromptNoise
from longsana.sampling.sampler import generate

pytestmark = pytest.mark.gpu
SHAPES = ModelConfig(model="SanaMSVideo_2M_P2_D8", linear_head_dim=28, caption_channels=64, caption_length=48)


def test_noise_is_the_same_on_cpu_and_gpu() -> None:
    noise = PromptNoise(0, [("a red circle", 0), ("a blue square", 1)])
    shape = (16, 5, 12, 20)
    assert torch.equal(noise.draw(11, 2, shape, "cuda").cpu(), noise.draw(11, 2, shape, "cpu"))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-3), (torch.bfloat16, 0.1)])
def test_latents_agree_with_the_cpu(dtype: torch.dtype, tolerance: float) -> None:
    latents = {}
    for device in ("cpu", "cuda"):
        model = build_model(SHAPES, device=device, dtype=dtype if device == "cuda" else torch.float32)
        tokens = torch.randn(1, 48, 64, generator=torch.Generator().manual_seed(0)).to(device)
        text = TextEmbedding(tokens, torch.ones(1, 48, dtype=torch.bool, device=device))
        chunks = generate(
            model,
            FlowSchedule(7.0),
            [text] * 2,
            ChunkPlan((6, 5)),
            shape=(16, 12, 20),
            rng=PromptNoise(0, [("a red circle", 0)]),
            device=device,
        )
        latents[device] = torch.cat([chunk.latents.cpu() for chunk in chunks], dim=2)
    difference = (latents["cuda"] - latents["cpu"]).norm() / latents["cpu"].norm()
    assert difference < tolerance, difference


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_streamed_frames_are_the_frames_of_one_call(dtype: torch.dtype) -> None:
    config = VAEConfig(vae_pretrained="seeded:asset/shapes/vae", latents_per_call=1)
    vae = WanVAE.load(config, "cuda", dtype)
    latents = torch.randn(1, 16, 11, 12, 20, device="cuda")
    pieces, cache = [], None
    for piece in latents.split([4, 1, 6], dim=2):
        frames, cache = vae.decode_stream(piece, cache)
        pieces.append(frames)
    assert torch.equal(torch.cat(pieces, 2), vae.decode(latents))
