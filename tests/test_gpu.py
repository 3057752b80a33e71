"""What a GPU must not change."""

from __future__ import annotations

import copy
import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from longsana.chunks import ChunkPlan
from longsana.config import ModelConfig, VAEConfig, load_config
from longsana.encoders.vae import WanVAE
from longsana.flow.noise import PromptNoise
from longsana.flow.schedule import FlowSchedule
from longsana.models.dit import LongSanaDiT
from longsana.models.embeddings import TextEmbedding
from longsana.models.float8 import to_float8
from longsana.ops import reference
from longsana.ops.dispatch import inductor_options
from longsana.runtime.distributed import World
from longsana.sampling.graphs import RecordedPass
from longsana.sampling.sampler import generate
from longsana.training.build import StageBuilder
from longsana.training.config import LoraConfig, TrainingConfig
from longsana.training.graphs import replay_passes
from longsana.training.lora import put_on
from longsana.training.parallel import connect, device_mesh, parallelise
from longsana.training.stages.stage import MicroBatch, MicroBatches
from longsana.weights.build import build_model
from tests.training.test_graphs import PASTS, two_chunks

pytestmark = pytest.mark.gpu
ROOT = Path(__file__).resolve().parents[1]
SHAPES = ModelConfig(model="SanaMSVideo_4M_P2_D12", depth=8, linear_head_dim=32, caption_channels=64, caption_length=48)


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


@pytest.fixture
def mesh() -> Iterator[DeviceMesh]:
    world, device = World.from_environment(), torch.device("cuda")
    connect(world, device)
    yield device_mesh("full", world, device)
    torch.distributed.destroy_process_group()


def gradients(model: LongSanaDiT, device: str, copies: int = 1) -> dict[str, torch.Tensor]:
    """Of every weight, from `copies` times the same two clips."""
    rng = torch.Generator().manual_seed(0)
    x0, noise = (torch.randn(2, 16, 21, 12, 20, generator=rng) for _ in range(2))
    text = TextEmbedding(torch.randn(2, 48, 64, generator=rng), torch.ones(2, 48, dtype=torch.bool))
    t = torch.tensor([300.0, 800.0])
    x0, noise, t, *text = (part.repeat(copies, *[1] * (part.dim() - 1)).to(device) for part in (x0, noise, t, *text))
    velocity, _ = model(FlowSchedule(3.0).add_noise(x0, noise, t), t, TextEmbedding(*text))
    (velocity.float() - (noise - x0)).square().mean().backward()
    grads = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    whole = {name: grad.full_tensor() if isinstance(grad, DTensor) else grad for name, grad in grads.items()}
    model.zero_grad()
    return {name: grad.float().cpu() for name, grad in whole.items()}


@pytest.mark.parametrize("copies", [1, 32])
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("replayed", [False, True])
def test_gradients_agree_with_the_cpu(copies: int, compiled: bool, replayed: bool, mesh: DeviceMesh) -> None:
    """In bfloat16 as training computes."""
    expected = gradients(build_model(SHAPES, device="cpu", dtype=torch.float32), "cpu")
    model = build_model(SHAPES, device="cuda", dtype=torch.float32)
    if replayed:
        replay_passes(model, torch.bfloat16, compile_blocks=compiled)
    else:
        parallelise(model, mesh, compute=torch.bfloat16, compile_blocks=compiled)
    for _ in range(2):
        given = gradients(model, "cuda", copies)
        assert given.keys() == expected.keys()
        wrong = {
            name: error
            for name, value in expected.items()
            if (error := float((given[name] - value).norm() / value.norm())) > 0.1
        }
        assert not wrong


def with_factors(model: LongSanaDiT) -> LongSanaDiT:
    """The network with a LoRA, of which no factor is zero."""
    put_on(model, LoraConfig(8, 16.0), 0)
    for number, weight in enumerate(weight for weight in model.parameters() if weight.requires_grad):
        rng = torch.Generator().manual_seed(number)
        weight.data.copy_(0.1 * torch.randn(weight.shape, generator=rng))
    return model


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("replayed", [False, True])
def test_gradients_of_a_lora_agree_with_the_cpu(compiled: bool, replayed: bool, mesh: DeviceMesh) -> None:
    """The base in bfloat16, shared with what is recorded; factors and their gradients in float32."""
    expected = gradients(with_factors(build_model(SHAPES, device="cpu", dtype=torch.float32)), "cpu")
    model = with_factors(build_model(SHAPES, device="cuda", dtype=torch.bfloat16))
    if replayed:
        replay_passes(model, torch.bfloat16, compile_blocks=compiled)
    else:
        parallelise(model, mesh, compute=torch.bfloat16, compile_blocks=compiled)
    for _ in range(2):
        given = gradients(model, "cuda")
        assert given.keys() == expected.keys() and all(".lora_" in name for name in given)
        wrong = {name: float((given[name] - value).norm() / value.norm()) for name, value in expected.items()}
        assert max(wrong.values()) < 0.1, wrong


@pytest.mark.parametrize("settings", [[], ["train.image_probability=1"]])
def test_what_is_made_ahead_does_not_wait_for_the_gpu(settings: list[str], tmp_path: Path) -> None:
    small = ["data.num_clips=2", "train.captions_together=1", "rollout.num_training_frames=5"]
    path = ROOT / "configs/sana_video_config/longsana/shapes/base.yaml"
    config = load_config(path, [*small, "model.load_from=seeded:0", *settings], TrainingConfig)
    device = torch.device("cuda", 0)
    builder = StageBuilder(config, micro_batches=MicroBatches(0, 1, 1), world=World(), device=device, folder=tmp_path)
    inputs = builder.stage().inputs
    assert inputs is not None
    inputs.begin(MicroBatch(0, 0, "generator", 0, range(2), device, device_noise=True))
    torch.cuda.set_sync_debug_mode("error")
    try:
        inputs.begin(MicroBatch(0, 1, "generator", 0, range(2, 4), device, device_noise=True))
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_compiled_gradients_at_full_width() -> None:
    """Of the modulation, sums over 17,160 tokens, which Inductor takes from memory that nobody wrote."""
    rng = torch.Generator("cuda").manual_seed(0)
    x, h = (torch.randn(1, 11, 1560, 2240, device="cuda", dtype=torch.bfloat16, generator=rng) for _ in range(2))
    modulation = torch.randn(3, 1, 1, 1, 2240, device="cuda", dtype=torch.bfloat16, generator=rng).requires_grad_()
    cotangent = torch.randn(x.shape, device="cuda", dtype=torch.bfloat16, generator=rng)

    def compute(x: torch.Tensor, h: torch.Tensor, modulation: torch.Tensor) -> torch.Tensor:
        shift, scale, gate = modulation.unbind()
        return reference.gated_residual(x, gate, reference.norm_modulate(h, shift, scale, 1e-6))

    expected = torch.autograd.grad(compute(x, h, modulation), modulation, cotangent)[0].float()
    compiled = torch.compile(compute, options=inductor_options())
    for _ in range(3):
        garbage = torch.full((1 << 28,), float("nan"), device="cuda")  # what the allocator hands out next
        del garbage
        given = torch.autograd.grad(compiled(x, h, modulation), modulation, cotangent)[0].float()
        assert (given - expected).norm() < 0.02 * expected.norm()


@pytest.mark.parametrize("settings", [{}, *PASTS])
@pytest.mark.parametrize("replayed", [False, True])
def test_fused_operations_make_the_same_network(
    replayed: bool, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Velocity, next state and gradients, of two chunks in a row and of one clip."""
    config = dataclasses.replace(SHAPES, **settings)
    plain, fused = (build_model(config, device="cuda", dtype=torch.float32) for _ in range(2))
    if replayed:
        replay_passes(fused, torch.float32)
    module = sys.modules["longsana.ops.dispatch"]  # longsana.ops.dispatch is also the name of the function
    monkeypatch.setattr(module, "backend", lambda: "reference")
    outputs, grads = two_chunks(plain), gradients(plain, "cuda")
    monkeypatch.setattr(module, "backend", lambda: "triton")
    for expected, given in zip(outputs, two_chunks(fused), strict=True):
        assert torch.allclose(expected, given, rtol=1e-3, atol=1e-4)
    for name, given in gradients(fused, "cuda").items():
        assert (given - grads[name]).norm() <= 1e-3 * grads[name].norm(), name


@pytest.mark.parametrize(("batch", "frames"), [(1, 5), (2, 1)])
@torch.no_grad()
def test_passes_in_float8(batch: int, frames: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain and fused they are near, as bfloat16 is; replayed they are themselves."""
    model = build_model(SHAPES, device="cuda", dtype=torch.bfloat16)
    rng = torch.Generator("cuda").manual_seed(0)
    for block in model.blocks:
        weight = block.feed_forward.temporal.weight  # zero in a new network
        weight.normal_(0.0, 0.5 / (3 * weight.shape[0]) ** 0.5, generator=rng)
    exact = copy.deepcopy(model)
    to_float8(model)
    x = torch.randn(batch, 16, frames, 12, 20, device="cuda", generator=rng)
    t = torch.full((batch,), 700.0, device="cuda")
    text = model.cache_caption(
        TextEmbedding(torch.randn(1, 48, 64, device="cuda", generator=rng), torch.ones(1, 48, device="cuda").bool())
    )
    module = sys.modules["longsana.ops.dispatch"]  # longsana.ops.dispatch is also the name of the function
    outputs = {}
    for name in ("reference", "triton"):
        monkeypatch.setattr(module, "backend", lambda name=name: name)
        _, state = model(x, t, text)
        outputs[name] = model(x, t, text, state=state)
    velocity, after = outputs["triton"]
    plain, plain_after = outputs["reference"]
    assert (velocity - plain).norm() < 0.05 * plain.norm()
    assert (after.kv - plain_after.kv).norm() < 0.05 * plain_after.kv.norm()
    unrounded, _ = exact(x, t, text, state=exact(x, t, text)[1])
    assert 0.002 < (velocity - unrounded).norm() / unrounded.norm() < 0.1
    replayed, replayed_after = RecordedPass(model, x, t, text, state).replay(x, t, state)
    assert torch.equal(replayed, velocity) and torch.equal(replayed_after.tail, after.tail)


@pytest.mark.parametrize("settings", [{}, *PASTS])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_replayed_passes_are_the_passes_themselves(checkpointing: bool, settings: dict[str, Any]) -> None:
    config = dataclasses.replace(SHAPES, **settings)
    plain, replayed = (build_model(config, device="cuda", dtype=torch.float32) for _ in range(2))
    replay_passes(replayed, torch.float32, checkpointing=checkpointing)
    for expected, given in zip(two_chunks(plain), two_chunks(replayed), strict=True):
        assert torch.allclose(expected, given, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_streamed_frames_are_the_frames_of_one_call(dtype: torch.dtype) -> None:
    config = VAEConfig(vae_pretrained="seeded:asset/shapes/vae", latents_per_call=1)
    vae = WanVAE.load(config, "cuda", dtype)
    latents = torch.randn(1, 16, 11, 12, 20, device="cuda")
    pieces, cache = [], None
    for piece in latents.split([4, 1, 6], dim=2):
        frames, cache = vae.decode_stream(piece, cache)
        pieces.append(frames)
    assert torch.equal(torch.cat(pieces, 2), vae.decode_stream(latents)[0])
