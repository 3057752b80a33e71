"""Training of a small Wan VAE on the shapes world: whole clips, as they will be streamed."""

from __future__ import annotations

import functools
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from longsana.config import VAEConfig
from longsana.encoders.closeness import Closeness
from longsana.encoders.vae import WanVAE, decode_clip, encode_clip
from longsana.encoders.vae_files import Model, new_model, save_model
from longsana.flow.noise import keyed_generator
from longsana.shapes.descent import Descent
from longsana.shapes.material import (
    PhasesConfig,
    check_phases,
    choose,
    clips_of,
    draw_pool,
    films,
    from_bytes,
    objects,
    pixel_error,
    to_bytes,
)
from longsana.shapes.remembered import WorldName

log = logging.getLogger(__name__)

WHOLE = 1 << 20  # latents a call: all of a clip but its first


@dataclass(frozen=True)
class VAETrainingConfig(PhasesConfig):
    """Phases are first single small pictures, then ever longer clips."""

    shape: str = "asset/shapes/vae"  # folder with the config.json of the VAE
    compile: bool = True  # on a GPU: norms with the activations after them are one kernel
    kl_weight: float = 3e-4
    statistics_clips: int = 256  # clips whose latents are measured to normalise all


def train_vae(config: VAETrainingConfig, folder: Path, device: torch.device) -> float:
    """Train and write a diffusers folder; returns its PSNR in dB on held-out clips, streamed.

    The loss is the mean absolute error of pixels, and of their differences, with the KL divergence kept small
    (method.md 7.10). The master weights are float32; on a GPU the network computes in bfloat16, channels last.

    Raises:
        InputError: the phases' lists do not have an entry each.
        Stopped: it was asked to stop; what it has is in the folder, and the same call goes on.
    """
    check_phases(config)
    descent = Descent(new_model(config.shape, config.seed).to(device), config, folder, device)
    network: Model = descent.network
    if device.type == "cuda" and config.compile:
        fuse_norms(network)

    def losses(pictures: Tensor, noise: Tensor) -> tuple[Tensor, ...]:
        error, divergence = _losses(network, pictures, noise, config.object_weight, config.edge_weight)
        return error + config.kl_weight * divergence, error, divergence

    phase = -1
    for step, own_phase in descent.steps():
        if own_phase != phase:
            phase = own_phase
            draw, differentiate = _Clips(config, phase, device), descent.gradients(losses)
        pictures = draw(step)
        rng = keyed_generator(config.seed, step, "vae", device=device)
        noise = torch.randn(_latents(network, pictures), generator=rng, dtype=torch.float32, device=device)
        (error, divergence), gradients = differentiate(pictures, noise)
        descent.apply(step, gradients)
        if told := descent.progress(step, pictures):
            log.info("vae: %s: error %.4f, KL %.2f", told, error.item(), divergence.item())
    _normalise(descent.average, config, device)
    save_model(descent.average, folder)
    psnr = held_out_psnr(folder, config.test_clips, config.test_frames, device, world=config.world)
    log.info("vae: %.2f dB on %d held-out clips of %d frames, streamed", psnr, config.test_clips, config.test_frames)
    descent.finish()
    return psnr


def held_out_psnr(
    folder: Path, clips: int, frames: int, device: torch.device, *, batch: int = 8, world: WorldName = "shapes"
) -> float:
    """Peak signal-to-noise ratio in dB over all pixels, after the way that inference takes."""
    vae = WanVAE.load(VAEConfig(vae_pretrained=str(folder), latents_per_call=5), device, torch.float32)
    closeness = Closeness()
    for pictures in films(world, 0, clips, frames, device, held_out=True, batch=batch):
        closeness.add(vae.decode_stream(vae.encode(pictures))[0], pictures)
    return closeness.decibels


def _losses(
    network: Model, pictures: Tensor, noise: Tensor, object_weight: float, edge_weight: float
) -> tuple[Tensor, Tensor]:
    """Error of pictures (B, 3, F, H, W), see `pixel_error`; and KL divergence from N(0, 1), the mean over latent
    values, in nats."""
    dtype = network.dtype
    moments = encode_clip(network, pictures.to(dtype), latents_per_call=WHOLE).float()
    mean, log_variance = moments.chunk(2, dim=1)
    log_variance = log_variance.clamp(-20, 10)
    latents = mean + (0.5 * log_variance).exp() * noise
    decoded = decode_clip(network, latents.to(dtype), latents_per_call=WHOLE)
    divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance)
    mask = None if object_weight == 1 else objects(pictures)
    return pixel_error(decoded.float() - pictures, mask, object_weight, edge_weight), divergence.mean()


def _latents(network: Model, pictures: Tensor) -> tuple[int, ...]:
    """The shape of the latents of pictures (B, 3, F, H, W)."""
    count, _, frames, height, width = pictures.shape
    return count, network.config.z_dim, 1 + (frames - 1) // 4, height // 8, width // 8


def fuse_norms(network: Model) -> None:
    """Let each norm of residual blocks and before the last convolutions do the SiLU after it, compiled, in place.

    As diffusers writes it, a norm takes ten passes over what it normalises, in float32, and more to differentiate.
    """
    for layer in network.modules():
        norms = [norm for name, norm in layer.named_children() if name in ("norm1", "norm2", "norm_out")]
        if norms:
            layer.nonlinearity = nn.Identity()
        for norm in norms:
            norm.forward = functools.partial(_normalised, norm.gamma)  # the method: names of weights stay


def _normalised(gamma: Tensor, x: Tensor) -> Tensor:
    rows = x.movedim(1, -1)
    flat = rows.reshape(-1, rows.shape[-1]).contiguous()
    torch._dynamo.mark_dynamic(flat, 0)  # one kernel for each number of channels
    return _norm_silu(flat, gamma.flatten()).view(rows.shape).movedim(-1, 1)


@torch.compile
def _norm_silu(x: Tensor, gamma: Tensor) -> Tensor:
    """SiLU of rows (N, C), each divided by its root mean square and times gamma (C,); in float32 within."""
    normal = F.normalize(x.float(), dim=1) * (x.shape[1] ** 0.5 * gamma.float())
    return F.silu(normal).to(x.dtype)


class _Clips:
    """Clips that the steps of a phase learn from: clips of their own, or some of the phase's pool."""

    def __init__(self, config: VAETrainingConfig, phase: int, device: torch.device) -> None:
        self._config, self._phase, self._device = config, phase, device
        self._pool: Tensor | None = None
        if config.pool:
            self._pool = torch.cat([to_bytes(pictures) for pictures in draw_pool(config, phase, device)])

    def __call__(self, step: int) -> Tensor:
        """Pictures (clips, 3, frames, H, W) of this step."""
        config, phase = self._config, self._phase
        if self._pool is None:
            return clips_of(config, phase, step, config.clips[phase], self._device)
        return from_bytes(self._pool[choose(config, phase, step, "vae").to(self._device)])


@torch.no_grad()
def _normalise(model: Any, config: VAETrainingConfig, device: torch.device) -> None:
    """Write mean and standard deviation of each latent channel into the model's config."""
    means = []
    drawn = films(config.world, config.seed + 2, config.statistics_clips, 81, device, held_out=False, batch=16)
    for pictures in drawn:
        moments = encode_clip(model, pictures, latents_per_call=5)
        means.append(moments.chunk(2, dim=1)[0].transpose(0, 1).flatten(1).double())
    values = torch.cat(means, dim=1)
    model.register_to_config(
        latents_mean=[round(value, 5) for value in values.mean(dim=1).tolist()],
        latents_std=[round(value, 5) for value in values.std(dim=1).tolist()],
    )
