"""Training of a small Wan VAE on the shapes world: whole clips, as they will be streamed."""

from __future__ import annotations

import copy
import functools
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
from longsana.runtime.graphs import Recording
from longsana.shapes.rate import warm_cosine
from longsana.shapes.remembered import WORLDS, WorldName
from longsana.shapes.scenes import render
from longsana.shapes.snapshot import Snapshot

log = logging.getLogger(__name__)

WHOLE = 1 << 20  # latents a call: all of a clip but its first
DIFFERS = 0.04
"""Distance, in a range of 2, from the ground's colour beyond which a pixel belongs to a shape or its edge."""
WARM_UP = 3
"""Steps before recording: what libraries set up on first use must not be part of a graph."""


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
    pool: tuple[int, ...] = ()  # clips that are drawn before a phase, of which its steps take some; none: each its own
    object_weight: float = 1.0  # of errors on shapes and two pixels around them, for 1 elsewhere
    edge_weight: float = 0.0  # of errors of differences between neighbouring pixels
    cuda_graphs: bool = True  # on a GPU: steps are recorded and replayed
    compile: bool = True  # on a GPU: norms with the activations after them are one kernel
    lr: float = 1.2e-3
    kl_weight: float = 3e-4
    average: float = 0.998  # of the weights that are kept
    statistics_clips: int = 256  # clips whose latents are measured to normalise all
    test_clips: int = 32  # held-out clips
    test_frames: int = 81


def train_vae(config: VAETrainingConfig, folder: Path, device: torch.device) -> float:
    """Train and write a diffusers folder; returns its PSNR in dB on held-out clips, streamed.

    The loss is the mean absolute error of pixels, and of their differences, with the KL divergence kept small
    (method.md 7.10). The master weights are float32; on a GPU the network computes in bfloat16, channels last.

    Raises:
        Stopped: it was asked to stop; what it has is in the folder, and the same call goes on.
    """
    master = new_model(config.shape, config.seed).to(device)
    compute = torch.bfloat16 if device.type == "cuda" else torch.float32
    network: Model = nn.Module.to(copy.deepcopy(master), compute)
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True  # a phase's shapes never change
        _lay_out(network)
        if config.compile:
            fuse_norms(network)
    average = copy.deepcopy(master)
    weights, working, averaged = (list(model.parameters()) for model in (master, network, average))
    total = sum(config.steps)
    optimiser = torch.optim.AdamW(weights, lr=config.lr, betas=(0.9, 0.99), weight_decay=1e-4)
    networks = {"weights": master, "average": average}
    snapshot = Snapshot(folder, config, networks, optimiser, lambda step: warm_cosine(step, total))
    with torch.no_grad():
        torch._foreach_copy_(working, weights)

    phase_of = [phase for phase, count in enumerate(config.steps) for _ in range(count)]
    phase, started = -1, time.perf_counter()
    for step in snapshot.steps(total, save_at=tuple(itertools.accumulate(config.steps))):
        if phase_of[step] != phase:
            phase = phase_of[step]
            draw, differentiate = _Clips(config, phase, device), _Gradients(network, config, replays(config, device))
        pictures = draw(step)
        rng = keyed_generator(config.seed, step, "vae", device=device)
        noise = torch.randn(_latents(network, pictures), generator=rng, dtype=torch.float32, device=device)
        error, divergence, gradients = differentiate(pictures, noise)
        for weight, gradient in zip(weights, gradients, strict=True):
            weight.grad = gradient
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimiser.step()
        with torch.no_grad():
            torch._foreach_copy_(working, weights)
            torch._foreach_lerp_(averaged, weights, 1 - min(config.average, step / (step + 10)))
        if (step + 1) % 50 == 0 or step + 1 == total:
            log.info(
                "vae: step %d of %d, %d clips of %d frames: error %.4f, KL %.2f, %.0f s",
                step + 1, total, len(pictures), pictures.shape[2], error.item(), divergence.item(),
                time.perf_counter() - started,
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


def _losses(
    network: Model, pictures: Tensor, noise: Tensor, object_weight: float, edge_weight: float
) -> tuple[Tensor, Tensor]:
    """Error of pictures (B, 3, F, H, W), and KL divergence from N(0, 1), the mean over latent values, in nats.

    The error is a weighted mean over pixels: of the absolute error, and edge_weight times that of differences to the
    right and down.
    """
    dtype = network.dtype
    moments = encode_clip(network, pictures.to(dtype), latents_per_call=WHOLE).float()
    mean, log_variance = moments.chunk(2, dim=1)
    log_variance = log_variance.clamp(-20, 10)
    latents = mean + (0.5 * log_variance).exp() * noise
    decoded = decode_clip(network, latents.to(dtype), latents_per_call=WHOLE)
    divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance)
    wrong = decoded.float() - pictures
    if object_weight == 1 and not edge_weight:
        return wrong.abs().mean(), divergence.mean()
    weight = 1 + (object_weight - 1) * _objects(pictures)
    weight = weight / weight.mean()
    error = (wrong.abs() * weight).mean()
    for side in (3, 4):
        count = weight.shape[side] - 1
        both = torch.minimum(weight.narrow(side, 0, count), weight.narrow(side, 1, count))
        error = error + edge_weight / 2 * (wrong.diff(dim=side).abs() * both).mean()
    return error, divergence.mean()


def _objects(pictures: Tensor) -> Tensor:
    """Mask shapes and two pixels around them: 1 of pictures (B, 3, F, H, W), else 0; (B, 1, F, H, W)."""
    ground = pictures[..., ::4, ::4].flatten(2).median(dim=2).values  # shapes cover less than half
    differs = (pictures - ground[..., None, None, None]).abs().amax(1, keepdim=True) > DIFFERS
    return F.max_pool3d(differs.float(), (1, 5, 5), stride=1, padding=(0, 2, 2))


def _latents(network: Model, pictures: Tensor) -> tuple[int, ...]:
    """The shape of the latents of pictures (B, 3, F, H, W)."""
    count, _, frames, height, width = pictures.shape
    return count, network.config.z_dim, 1 + (frames - 1) // 4, height // 8, width // 8


def _lay_out(network: Model) -> None:
    """Put channels last: in any other layout a GPU reorders them in every convolution."""
    layouts = {4: torch.channels_last, 5: torch.channels_last_3d}
    for parameter in network.parameters():
        if parameter.dim() in layouts:
            parameter.data = parameter.data.contiguous(memory_format=layouts[parameter.dim()])


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


def replays(config: VAETrainingConfig, device: torch.device) -> bool:
    """Tell whether steps are recorded and replayed."""
    return device.type == "cuda" and config.cuda_graphs


class _Gradients:
    """Gradients of a phase's steps, whose shapes never change. recorded: as a CUDA graph."""

    def __init__(self, network: Model, config: VAETrainingConfig, recorded: bool) -> None:
        self._network, self._config, self._recorded = network, config, recorded
        self._weights = list(network.parameters())
        self._learned = [True] * len(self._weights)
        self._recording: Recording | None = None

    def __call__(self, pictures: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, list[Tensor | None]]:
        """Error, divergence, and the gradient of each weight, float32; None of one that pictures do not use."""
        inputs = [pictures, noise]
        if self._recorded and self._recording is None:
            self._recording = Recording(self._differentiate, inputs, warm_up=self._differentiate, warm_ups=WARM_UP)
        made = self._differentiate(*inputs) if self._recording is None else self._recording.replay(inputs)
        error, divergence, *found = made
        gradients = iter(found)
        return error, divergence, [next(gradients) if learned else None for learned in self._learned]

    def _differentiate(self, pictures: Tensor, noise: Tensor) -> list[Tensor]:
        config = self._config
        error, divergence = _losses(self._network, pictures, noise, config.object_weight, config.edge_weight)
        gradients = torch.autograd.grad(error + config.kl_weight * divergence, self._weights, allow_unused=True)
        self._learned = [gradient is not None for gradient in gradients]  # single frames use no temporal strides
        return [error.detach(), divergence.detach(), *(part.float() for part in gradients if part is not None)]


class _Clips:
    """Clips that the steps of a phase learn from: clips of their own, or some of the phase's pool."""

    def __init__(self, config: VAETrainingConfig, phase: int, device: torch.device) -> None:
        self._config, self._device = config, device
        self._count, self._frames = config.clips[phase], config.frames[phase]
        self._size = (config.heights[phase], config.widths[phase])
        self._pool: Tensor | None = None
        if config.pool:
            first, most = sum(config.steps) + sum(config.pool[:phase]), 64
            drawn = [
                (self._draw(first + start, min(most, config.pool[phase] - start)) * 127.5 + 127.5).round().byte()
                for start in range(0, config.pool[phase], most)
            ]
            self._pool = torch.cat(drawn)

    def __call__(self, step: int) -> Tensor:
        """Pictures (clips, 3, frames, H, W) of this step."""
        if self._pool is None:
            return self._draw(step, self._count)
        rng = keyed_generator(self._config.seed, step, "vae clips")
        chosen = torch.randint(len(self._pool), (self._count,), generator=rng)
        return self._pool[chosen.to(self._device)].float() / 127.5 - 1

    def _draw(self, step: int, count: int) -> Tensor:
        config = self._config
        return _clips(config.seed, step, count, self._frames, self._size, self._device, config.world)


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
