"""Training of the small world's tiny decoder: it learns the pictures that the VAE's own decoder makes of its latents.

Clips are whole, from their first latent, so that what the decoder remembers from frame to frame is trained too.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from longsana.config import VAEConfig
from longsana.encoders.closeness import Closeness
from longsana.encoders.tiny_layouts import LATENTS, SHAPES, TINY, latents_key
from longsana.encoders.tiny_network import TinyNetwork, load_tiny
from longsana.encoders.tiny_vae import TinyVAE
from longsana.encoders.vae import WanVAE
from longsana.runtime.errors import InputError
from longsana.shapes.descent import Descent
from longsana.shapes.material import (
    PhasesConfig,
    check_phases,
    choose,
    draw_pool,
    films,
    from_bytes,
    objects,
    pixel_error,
    to_bytes,
)
from longsana.weights.files import write_safetensors

log = logging.getLogger(__name__)

KIND = TINY[SHAPES]
SHIPPED_VAE = "asset/shapes/vae"
LATENTS_PER_CALL = 5
ONE_FILE = 1 << 62
"""Bytes of a shard that all weights fit in."""


@dataclass(frozen=True)
class DecoderTrainingConfig(PhasesConfig):
    """Phases are small pictures first, then those of the world's own size. Each needs a pool: the VAE sees it once."""

    vae: str = SHIPPED_VAE  # whose latents are decoded; its folder
    steps: tuple[int, ...] = (3000, 3000)
    clips: tuple[int, ...] = (48, 6)
    frames: tuple[int, ...] = (17, 49)
    heights: tuple[int, ...] = (64, 96)
    widths: tuple[int, ...] = (64, 160)
    pool: tuple[int, ...] = (6144, 768)
    object_weight: float = 8.0
    edge_weight: float = 0.5
    lr: float = 2.0e-3


def train_decoder(config: DecoderTrainingConfig, folder: Path, device: torch.device) -> float:
    """Train and write tae_shapes.safetensors; returns PSNR in dB to the full decoder's pictures of held-out clips.

    The loss is that of the VAE's pixels, here to the full decoder's pictures; shapes are where the clip has them. The
    master weights are float32; on a GPU the network computes in bfloat16, channels last.

    Raises:
        InputError: there is no such VAE, it is the other world's, or the phases' lists do not have an entry each.
        Stopped: it was asked to stop; what it has is in the folder, and the same call goes on.
    """
    check_phases(config, pooled=True)
    if config.world != "shapes" and config.vae == SHIPPED_VAE:
        raise InputError(f"vae={config.vae}: was trained on the world shapes; give that of {config.world}, vae=FOLDER")
    full = WanVAE.load(VAEConfig(vae_pretrained=config.vae, latents_per_call=LATENTS_PER_CALL), device, torch.float32)
    master = load_tiny(KIND, f"seeded:{config.seed}", device, torch.float32).requires_grad_(True)
    descent = Descent(master, config, folder, device)

    network: Any = descent.network

    def losses(latents: Tensor, pictures: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        error = _loss(network, latents, from_bytes(pictures), mask, config)
        return error, error

    phase = -1
    for step, own_phase in descent.steps():
        if own_phase != phase:
            phase = own_phase
            lessons, differentiate = _Lessons(config, phase, full, device), descent.gradients(losses)
        latents, pictures, mask = lessons(step)
        (error,), gradients = differentiate(latents, pictures, mask)
        descent.apply(step, gradients)
        if told := descent.progress(step, pictures):
            log.info("decoder: %s: error %.4f", told, error.item())
    path = folder / f"{SHAPES}.safetensors"
    halves = {name: weight.half().cpu().contiguous() for name, weight in descent.average.state_dict().items()}
    write_safetensors(halves, path, ONE_FILE, {LATENTS: latents_key(full.model.config)})
    likeness = held_out_likeness(path, config, full, device)
    log.info(
        "decoder: %.2f dB to the full decoder's pictures of %d held-out clips of %d frames, streamed; to the true ones "
        "%.2f dB, the full decoder's own are %.2f dB from them",
        likeness.to_full, config.test_clips, config.test_frames, likeness.to_truth, likeness.full_to_truth,
    )  # fmt: skip
    descent.finish()
    return likeness.to_full


class Likeness(NamedTuple):
    """PSNR in dB of the tiny decoder's pictures to the full decoder's and to the true ones, and of these two."""

    to_full: float
    to_truth: float
    full_to_truth: float


def held_out_likeness(
    path: Path, config: DecoderTrainingConfig, full: WanVAE, device: torch.device, *, batch: int = 8
) -> Likeness:
    """Compare the decoder of the file `path` on held-out clips, after the way that inference takes. full: the VAE."""
    tiny = TinyVAE(load_tiny(KIND, str(path), device, torch.float32), LATENTS_PER_CALL)
    to_full, to_truth, full_to_truth = (Closeness() for _ in Likeness._fields)
    for truth in films(config.world, 0, config.test_clips, config.test_frames, device, held_out=True, batch=batch):
        latents = full.encode(truth)
        own, expected = (vae.decode_stream(latents)[0] for vae in (tiny, full))
        to_full.add(own, expected)
        to_truth.add(own, truth)
        full_to_truth.add(expected, truth)
    return Likeness(to_full.decibels, to_truth.decibels, full_to_truth.decibels)


def _loss(
    network: TinyNetwork, latents: Tensor, pictures: Tensor, mask: Tensor, config: DecoderTrainingConfig
) -> Tensor:
    """Error of the pictures (B, 3, F, H, W) that a decoder makes of latents (B, C, T, h, w); see `pixel_error`."""
    decoded, _ = network.decode(latents.to(network.dtype))
    shown = 2 * decoded[:, :, network.kind.stride - 1 :].float() - 1
    return pixel_error(shown - pictures, mask, config.object_weight, config.edge_weight)


class _Lessons:
    """A phase's pool: latents (N, C, T, h, w), the full decoder's pictures (N, 3, F, H, W) and where shapes are."""

    def __init__(self, config: DecoderTrainingConfig, phase: int, full: WanVAE, device: torch.device) -> None:
        self._config, self._phase, self._device = config, phase, device
        seen = [_seen(full, truth) for truth in draw_pool(config, phase, device)]
        self._latents, self._pictures, self._masks = (torch.cat(parts) for parts in zip(*seen, strict=True))

    def __call__(self, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """Latents, pictures and masks of the clips of this step; the latter two are bytes."""
        places = choose(self._config, self._phase, step, "decoder").to(self._device)
        return self._latents[places], self._pictures[places], self._masks[places]


def _seen(full: WanVAE, truth: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Latents of true pictures, what the full decoder makes of them, and where the true ones have shapes."""
    latents = full.encode(truth)
    pictures, _ = full.decode_stream(latents)
    return latents, to_bytes(pictures), objects(truth).byte()
