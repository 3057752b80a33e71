"""Training of a small Wan VAE on the shapes world: whole clips, as they will be streamed."""

from __future__ import annotations

import copy
import itertools
import logging
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from longsana.config import VAEConfig
from longsana.encoders.vae import WanVAE, decode_clip, encode_clip
from longsana.encoders.vae_files import Model, new_model, save_model
from longsana.flow.noise import keyed_generator
from longsana.shapes.rate import warm_cosine
from longsana.shapes.remembered import WORLDS, WorldName
from longsana.shapes.scenes import render
from longsana.shapes.snapshot import Snapshot

log = logging.getLogger(__name__)

WHOLE = 1 << 20  # latents a call: all of a clip but its first


@dataclass(frozen=True)
class VAETrainingConfig:
    """steps to widths have an entry a phase: first single small pictures, then ever longer clips.

    world: whose scenes it is trained on and tested with.
    """

    world: WorldName = "shapes"
    shape: str = "asset/shapes/vae"  # folder with the config.json of the VAE
    seed: int = 0
    steps: tuple[int, ...] = (400, 700, 200, 50)
    clips: tuple[int, ...] = (256, 48, 24, 12)  # a step
    frames: tuple[int, ...] = (1, 17, 81, 81)  # a clip; 4n + 1
    heights: tuple[int, ...] = (64, 64, 64, 96)
    widths: tuple[int, ...] = (64, 64, 96, 160)
    lr: float = 1.2e-3
    kl_weight: float = 3e-4
    average: float = 0.998  # of the weights that are kept
    statistics_clips: int = 256  # clips whose latents are measured to normalise all
    test_clips: int = 32  # held-out clips
    test_frames: int = 81


def train_vae(config: VAETrainingConfig, folder: Path, device: torch.device) -> float:
    """Train and write a diffusers folder; returns its PSNR in dB on held-out clips, streamed.

    The loss is the mean absolute error, with the KL divergence (method.md 7.9) kept small. The master weights are
    float32; on a GPU the network computes in bfloat16.

    Raises:
        Stopped: it was asked to stop; what it has is in the folder, and the same call goes on.
    """
    master = new_model(config.shape, config.seed).to(device)
    compute = torch.bfloat16 if device.type == "cuda" else torch.float32
    network: Model = nn.Module.to(copy.deepcopy(master), compute)
    average = copy.deepcopy(master)
    weights, working, averaged = (list(model.parameters()) for model in (master, network, average))
    total = sum(config.steps)
    optimiser = torch.optim.AdamW(weights, lr=config.lr, betas=(0.9, 0.99), weight_decay=1e-4)
    networks = {"weights": master, "average": average}
    snapshot = Snapshot(folder, config, networks, optimiser, lambda step: warm_cosine(step, total))
    with torch.no_grad():
        torch._foreach_copy_(working, weights)
    phases = list(zip(config.steps, config.clips, config.frames, config.heights, config.widths, strict=True))
    phase_of = [phase for phase in phases for _ in range(phase[0])]
    started = time.perf_counter()
    for step in snapshot.steps(total, save_at=tuple(itertools.accumulate(config.steps))):
        _, clips, frames, *size = phase_of[step]
        pictures = _clips(config.seed, step, clips, frames, (size[0], size[1]), device, config.world)
        rng = keyed_generator(config.seed, step, "vae", device=device)
        error, divergence = _losses(network, pictures, rng)
        (error + config.kl_weight * divergence).backward()
        for weight, copied in zip(weights, working, strict=True):
            weight.grad = None if copied.grad is None else copied.grad.float()
            copied.grad = None
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimiser.step()
        with torch.no_grad():
            torch._foreach_copy_(working, weights)
            torch._foreach_lerp_(averaged, weights, 1 - min(config.average, step / (step + 10)))
        if (step + 1) % 50 == 0 or step + 1 == total:
            log.info(
                "vae: step %d of %d, %d clips of %d frames: error %.4f, KL %.2f, %.0f s",
                step + 1, total, clips, frames, error.item(), divergence.item(), time.perf_counter() - started,
            )  # fmt: skip
    _normalise(average, config, device)
    save_model(average, folder)
    psnr = held_out_psnr(folder, config.test_clips, config.test_frames, device, world=config.world)
    log.info("vae: %.2f dB on %d held-out clips of %d frames, streamed", psnr, config.test_clips, config.test_frames)
    snapshot.remove()
    return psnr


def held_out_psnr(
    folder: Path, clips: int, frames: int, device: torch.device, *, batch: int = 8, world: WorldName = "shapes"
) -> float:
    """Peak signal-to-noise ratio in dB over all pixels, after the way that inference takes."""
    vae = WanVAE.load(VAEConfig(vae_pretrained=str(folder), latents_per_call=5), device, torch.float32)
    squares, count = 0.0, 0
    for pictures in _films(world, 0, clips, frames, device, held_out=True, batch=batch):
        decoded, _ = vae.decode_stream(vae.encode(pictures))
        squares += (decoded - pictures).square().sum(dtype=torch.float64).item()
        count += pictures.numel()
    return 10 * math.log10(4 / (squares / count))


def _losses(network: Model, pictures: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Mean absolute error, and KL divergence from N(0, 1), the mean over latent values, in nats."""
    dtype = network.dtype
    moments = encode_clip(network, pictures.to(dtype), latents_per_call=WHOLE).float()
    mean, log_variance = moments.chunk(2, dim=1)
    log_variance = log_variance.clamp(-20, 10)
    noise = torch.randn(mean.shape, generator=rng, dtype=torch.float32, device=mean.device)
    latents = mean + (0.5 * log_variance).exp() * noise
    decoded = decode_clip(network, latents.to(dtype), latents_per_call=WHOLE)
    divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance)
    return F.l1_loss(decoded.float(), pictures), divergence.mean()


def _clips(
    seed: int, step: int, count: int, frames: int, size: tuple[int, int], device: torch.device, world: WorldName
) -> Tensor:
    """(count, 3, frames, H, W). Single frames are four moments of a scene each: to draw scenes would take longer."""
    moments = 4 if frames == 1 else 1
    scenes = [WORLDS[world](seed + 1, step * 1024 + number, size=size) for number in range(-(-count // moments))]
    if moments == 1:
        return render(scenes, range(frames), size=size, device=device)
    pictures = render(scenes, range(0, 80, 80 // moments), size=size, device=device)
    return pictures.transpose(1, 2).flatten(0, 1)[:count, :, None]


def _films(
    world: WorldName, seed: int, count: int, frames: int, device: torch.device, *, held_out: bool, batch: int
) -> Iterator[Tensor]:
    """Pictures (B, 3, frames, H, W) of the seed's first `count` scenes, at most `batch` at a time."""
    for first in range(0, count, batch):
        indices = range(first, min(first + batch, count))
        scenes = [WORLDS[world](seed, index, held_out=held_out) for index in indices]
        yield render(scenes, range(frames), device=device)


@torch.no_grad()
def _normalise(model: Any, config: VAETrainingConfig, device: torch.device) -> None:
    """Write mean and standard deviation of each latent channel into the model's config."""
    means = []
    films = _films(config.world, config.seed + 2, config.statistics_clips, 81, device, held_out=False, batch=16)
    for pictures in films:
        moments = encode_clip(model, pictures, latents_per_call=5)
        means.append(moments.chunk(2, dim=1)[0].transpose(0, 1).flatten(1).double())
    values = torch.cat(means, dim=1)
    model.register_to_config(
        latents_mean=[round(value, 5) for value in values.mean(dim=1).tolist()],
        latents_std=[round(value, 5) for value in values.std(dim=1).tolist()],
    )
