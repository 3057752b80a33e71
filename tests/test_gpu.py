"""What a GPU must not change."""

from __future__ import annotations

import pytest
import torch
from torch.distributed.tensor import DTensor

from longsana.chunks import ChunkPlan
from longsana.config import ModelConfig, VAEConfig
from longsana.encoders.vae import WanVAE
from longsana.flow.schedule import FlowSchedule
from longsana.models.build import build_model
from longsana.models.embeddings import TextEmbedding
from longsana.runtime.distributed import World
from longsana.sampling.noise import PromptNoise
from longsana.sampling.sampler import generate
from longsana.training.parallel import connect, device_mesh, parallelise

pytestmark = pytest.mark.gpu
SHAPES = ModelConfig(model="SanaMSVideo_3M_P2_D8", linear_head_dim=32, caption_channels=64, caption_length=48)


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


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("batch", [2, 64])
def test_gradients_agree_with_the_cpu(batch: int, compiled: bool) -> None:
    """In bfloat16 as training computes. Compiled blocks once trained to ever larger gradients (H100, torch 2.11)."""
    rng = torch.Generator().manual_seed(0)
    x0, noise = (torch.randn(2, 16, 21, 12, 20, generator=rng) for _ in range(2))
    tokens = torch.randn(2, 48, 64, generator=rng)
    t = torch.tensor([300.0, 800.0])
    norms = {}
    for device, copies in (("cpu", 1), ("cuda", batch // 2)):
        torch.manual_seed(0)
        model = build_model(SHAPES, device=device, dtype=torch.float32)
        if device == "cuda":
            world = World.from_environment()
            connect(world, torch.device(device))
            mesh = device_mesh("full", world, torch.device(device))
            model = parallelise(model, mesh, compute=torch.bfloat16, compile_blocks=compiled)
        text = TextEmbedding(tokens.repeat(copies, 1, 1), torch.ones(2 * copies, 48, dtype=torch.bool))
        text = TextEmbedding(*(part.to(device) for part in text))
        clean, drawn = (part.repeat(copies, 1, 1, 1, 1).to(device) for part in (x0, noise))
        times = t.repeat(copies).to(device)
        velocity, _ = model(FlowSchedule(3.0).add_noise(clean, drawn, times), times, text)
        (velocity.float() - (drawn - clean)).square().mean().backward()
        grads = [weight.grad for weight in model.parameters() if weight.grad is not None]
        grads = [grad.full_tensor() if isinstance(grad, DTensor) else grad for grad in grads]
        norms[device] = torch.stack([grad.norm().cpu() for grad in grads])
    difference = (norms["cuda"] - norms["cpu"]).norm() / norms["cpu"].norm()
    assert difference < 0.05, (norms["cpu"], norms["cuda"])


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
