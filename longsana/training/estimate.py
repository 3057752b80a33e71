"""What a training run needs, before it is started: memory of a process, and arithmetic of an update."""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

import torch
from torch import nn

from longsana.config import ModelConfig
from longsana.models.dit import LongSanaDiT
from longsana.runtime.distributed import World
from longsana.training.checks import DISTILLED, micro_batches_of
from longsana.training.config import TrainingConfig
from longsana.training.flops import forward_flops
from longsana.training.rehearsal import (
    Role,
    Update,
    compute_dtype,
    kept_values,
    latent_size,
    on_gpu,
    rehearse,
    rollouts,
    schedule,
)
from longsana.weights.build import empty_model

FLOAT = torch.float32.itemsize


class Encoders(NamedTuple):
    """The frozen parts around the networks: Gemma 2 2B, and a VAE.

    For a pixel of a frame, cache_values: what the decoder remembers of a video; decode_values: held at the peak of
        decoding one latent after another, with what it gives but without the workspaces of convolutions.
    """

    vae_parameters: int
    cache_values: float
    decode_values: int
    text_parameters: int = 2_614_341_888


PUBLISHED = {
    "WanVAE": Encoders(vae_parameters=126_892_531, cache_values=2364.5, decode_values=6370),
    "LTX2VAE_diffusers": Encoders(vae_parameters=1_222_479_601, cache_values=330.25, decode_values=2280),
}
"""By the type of the VAE, as they are published."""


class Estimate(NamedTuple):
    """Memory of the fullest process, in bytes. See `estimate` for what each part is."""

    parameters: dict[str, int]  # of each network: numbers, not bytes
    state: int  # one recurrent state
    weights: int
    moments: int
    average: int
    teacher: int
    text_encoder: int
    vae: int
    streams: int
    gathered: int
    reduced: int
    updates: dict[str, Update]

    @property
    def fullest(self) -> str:
        """The learner whose update needs most."""
        return max(self.updates, key=lambda name: self.updates[name].activations + self.updates[name].gradients)

    @property
    def parts(self) -> dict[str, int]:
        """What `total` is the sum of."""
        peak = self.updates[self.fullest]
        return {
            "weights, float32": self.weights,
            "Adam's moments": self.moments,
            "running average": self.average,
            "teacher": self.teacher,
            "text encoder": self.text_encoder,
            "VAE": self.vae,
            "live streams": self.streams,
            "gathered weights": self.gathered,
            "gradients on their way": self.reduced,
            f"gradients ({self.fullest})": peak.gradients,
            f"activations ({self.fullest})": peak.activations,
        }

    @property
    def total(self) -> int:
        return sum(self.parts.values())

    def table(self) -> str:
        """Lines to print."""
        lines = [f"{name + ' parameters':32}{count:>16,}" for name, count in self.parameters.items()]
        lines += [f"{'recurrent state':32}{self.state / 2**20:>12.1f} MiB", "memory of a process, estimated:"]
        lines += [f"  {name:30}{size / 2**30:>12.2f} GiB" for name, size in self.parts.items() if size]
        lines += [f"  {'total':30}{self.total / 2**30:>12.2f} GiB"]
        lines += [
            f"{f'kept for the backward pass of the {name}':48}{update.kept / 2**30:.2f} GiB"
            for name, update in self.updates.items()
        ]
        return "\n".join(lines)


def estimate(
    config: TrainingConfig, world_size: int, *, local_size: int | None = None, encoders: Encoders | None = None
) -> Estimate:
    """Memory of a GPU that trains as a checked config says, as one of `world_size`; local_size: of those on its host.

    Counted from names and shapes: `parameters`, `state`, and what lies there all the time: `weights`, `moments` and
    `average` (float32 shards of the fullest process), `teacher`, encoders, `streams` (of live videos, the states and
    the decoder's caches).
    Rehearsed: `updates`. Known from how FSDP works: `gathered` (whole weights in the dtype that computes: what lies
    outside blocks, and the blocks in flight) and `reduced` (a block's gradients, whole, before and in their reduction).

    Not in it: what the allocator reserves beyond what is in use (5 to 8 GiB below), CUDA's context, workspaces of
    convolutions, what torch.compile and train.cuda_graphs change (graphs hold a second copy of the weights, and the
    activations of every kind of pass, as reserved memory), a text encoder that is offloaded (there while it encodes,
    when little else is), and validation, which holds no gradients.

    The 2B network at 480p, 21 latents, on an H100 alone (torch 2.11), as `max_memory_allocated` without encoders and
    average: critic's update 66.4 GiB, estimated 66.0; generator's 62.8, estimated 62.4. Six blocks, no checkpointing,
    with average: 63.0, estimated 63.4. On several processes `gathered` is the least certain part.

    Raises:
        InputError: the config makes no network, or the batch does not divide.
    """
    encoders = encoders or PUBLISHED[config.vae.vae_type]
    train, distilled = config.train, config.trainer in DISTILLED
    world = World(size=world_size, local_size=local_size or world_size)
    sharers = {"full": world.size, "no_shard": 1}.get(train.sharding_strategy, world.local_size)
    accumulation = micro_batches_of(config, world).accumulation
    learners: dict[Role, LongSanaDiT] = {"generator": empty_model(config.model)}
    networks: dict[str, LongSanaDiT] = {"generator": learners["generator"]}
    if distilled:
        networks["critic"] = learners["critic"] = empty_model(config.fake_score)
        networks["teacher"] = empty_model(config.real_score)
    kept = {name: sum(kept_values(p, sharers) for p in model.parameters()) for name, model in networks.items()}
    trained = FLOAT * sum(kept[role] for role in learners)
    compute, vae = compute_dtype(config).itemsize, on_gpu(config.vae.weight_dtype).itemsize
    block = max(_count(model.blocks[0]) for model in networks.values())
    state = learners["generator"].to(compute_dtype(config)).empty_state(train.batch_size, *latent_size(config))
    pixels = train.batch_size * config.sampling.height * config.sampling.width
    cache = 0 if config.rollout.overlap_latents else int(vae * encoders.cache_values * pixels)
    return Estimate(
        parameters={name: _count(model) for name, model in networks.items()},
        state=sum(part.nbytes for part in state[:3]),  # its own nbytes asks where the storages lie
        weights=trained,
        moments=2 * trained,
        average=FLOAT * kept["generator"] if train.ema_weight > 0 else 0,
        teacher=on_gpu(config.real_score.dtype).itemsize * kept["teacher"] if distilled else 0,
        text_encoder=on_gpu(config.text_encoder.dtype).itemsize * encoders.text_parameters
        if train.text_encoder == "keep"
        else 0,
        vae=vae * encoders.vae_parameters if distilled else 0,
        streams=accumulation * (sum(part.nbytes for part in state[:3]) + cache) if config.trainer == "longsana" else 0,
        gathered=compute * _gathered(networks.values(), sharers, train.sharding_strategy == "hybrid_zero2"),
        reduced=block * (compute + FLOAT),
        updates={
            role: rehearse(
                config,
                role,
                processes=sharers,
                accumulates=accumulation > 1,
                decoding=vae * encoders.decode_values * pixels,
            )
            for role in learners
        },
    )


def model_flops(config: TrainingConfig, role: Role, *, exit_step: int | None = None) -> int:
    """Operations of one update of a learner with batch 1: the networks' products, as `forward_flops` counts them.

    A forward pass counts once, one with its backward pass three times; what checkpointing computes again and the
    encoders do not count. exit_step: of every chunk of a rollout; None is the mean over the steps that training draws.
    Lengths of rollouts that are drawn enter by their mean, too. LongSANA: a stretch after the first.
    """
    size = latent_size(config)

    def forward(network: ModelConfig, *lengths: int) -> int:
        return sum(forward_flops(network, frames, *size) for frames in lengths)

    if config.trainer not in DISTILLED:
        return 3 * forward(config.model, config.rollout.num_training_frames)
    last = len(schedule(config).steps) - 1
    drawn = [last] if config.rollout.last_step_only else list(range(last + 1))
    totals = []
    for rollout in rollouts(config)[-1:] if config.trainer == "longsana" else rollouts(config):
        for step in drawn if exit_step is None else [exit_step]:
            total = (step + 1) * forward(config.model, *rollout.plan.lengths)
            total += forward(config.model, *rollout.absorbed)
            if role == "generator":
                total += 2 * forward(config.model, *rollout.learned)
                total += forward(config.fake_score, rollout.window) + 2 * forward(config.real_score, rollout.window)
            else:
                total += 3 * forward(config.fake_score, rollout.window)
            totals.append(total)
    return sum(totals) // len(totals)


def _gathered(networks: Collection[LongSanaDiT], sharers: int, keeps: bool) -> int:
    """Numbers of whole weights that are there at a time. keeps: until a backward pass, which most never see."""
    if keeps:
        return sum(map(_count, networks))
    # What is outside blocks, and a block; of several processes', another on its way and one still in its buffer.
    outside = max(_count(model) - _count(model.blocks) for model in networks)
    return outside + max(_count(model.blocks[0]) for model in networks) * (1 if sharers == 1 else 3)


def _count(module: nn.Module) -> int:
    return sum(weight.numel() for weight in module.parameters())
