"""A stage of full size without files, memory or values: its own losses run on the meta device, and can be counted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple, cast

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from longsana.data.clips import Batch, ClipSource
from longsana.data.trajectories import Trajectories
from longsana.encoders.vae import DecodeCache, VideoVAE
from longsana.flow.schedule import FlowSchedule
from longsana.models.dit import LongSanaDiT
from longsana.models.embeddings import TextEmbedding
from longsana.runtime.distributed import World
from longsana.training.build import StageBuilder
from longsana.training.captions import Captions
from longsana.training.checks import clip_shape, student_sigmas
from longsana.training.config import TrainingConfig
from longsana.training.learner import compute_dtype
from longsana.training.memory import LiveBytes, as_on_gpu
from longsana.training.pictures import Pictures
from longsana.training.stages.stage import MicroBatch, MicroBatches, Stage
from longsana.weights.build import empty_model, resolve_dtype

Role = Literal["generator", "critic"]
GPU, META = torch.device("cuda"), torch.device("meta")


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
    "WanVAE": Encoders(vae_parameters=126_892_531, cache_values=2364.5, decode_values=4206),
    "LTX2VAE_diffusers": Encoders(vae_parameters=1_222_479_601, cache_values=330.25, decode_values=2280),
}
"""By the type of the VAE, as they are published."""


class MetaBuilder(StageBuilder):
    """Builds a stage with networks on the meta device that allocate as on a GPU, and with stand-ins for its parts.

    networks: those that it has made, by role, with the settings of each.
    """

    def __init__(self, config: TrainingConfig, encoders: Encoders) -> None:
        super().__init__(config, micro_batches=MicroBatches(0, 1, 1), world=World(), device=META, folder=Path())
        self.networks: dict[str, LongSanaDiT] = {}
        self.captions = cast(Captions, _Captions(config))
        self.vae = cast(VideoVAE, _VAE(config, encoders))

    def stage(self) -> Stage:
        with LiveBytes():  # which answers where a value is asked for
            return super().stage()

    def check_checkpoints(self) -> None:
        """Check nothing: weights have no values."""

    def clips(self) -> ClipSource:
        return cast(ClipSource, _Clips(self.config))

    def trajectories(self) -> Trajectories:
        sigmas = student_sigmas(self.config)
        return Trajectories(_Clips(self.config, len(sigmas)), sigmas, (len(sigmas), *clip_shape(self.config)))

    def prompts(self) -> Sequence[str]:
        return [""]

    def pictures(self) -> Pictures | None:
        return cast(Pictures, _Pictures(self.latent_shape)) if self.config.train.image_probability else None

    def switch_prompts(self) -> Sequence[str]:
        return [] if self.config.streaming.switch_prompt_path is None else [""]

    def network(self, role: str) -> LongSanaDiT:
        trained, settings = role != "teacher", self.config.networks[role]
        # As FSDP gathers them: whole, in the dtype that computes.
        dtype = compute_dtype(self.config) if trained else resolve_dtype(settings.dtype, GPU)
        model = empty_model(settings).to(dtype).requires_grad_(trained)
        if self.config.train.lora.rank is not None:
            model = self._with_lora(role, model.requires_grad_(False)).to(dtype)
        for block in model.blocks:
            # Around a block's forward, where a backward pass that computes it again meets it too.
            block.forward = as_on_gpu(block.forward)
            if trained and self.config.train.gradient_checkpointing:
                block.forward = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)
        self.networks[role] = model
        return model


class MetaBatch(MicroBatch):
    """A micro-batch whose noise has no values."""

    @classmethod
    def first(cls, config: TrainingConfig, role: Role) -> MetaBatch:
        """The micro-batch of the first update of a learner."""
        return cls(config.train.seed, 0, role, 0, range(config.train.batch_size), META)

    def normal(self, name: str, shape: Sequence[int]) -> Tensor:
        """Noise of this shape, float32, without memory."""
        return torch.empty(*shape, dtype=torch.float32, device=META)


def lengths_of(config: TrainingConfig) -> list[TrainingConfig]:
    """The config with each length of a rollout that it draws, the longest last."""
    if config.trainer != "self_forcing":
        return [config]
    shortest, longest = config.rollout.min_num_training_frames, config.rollout.num_training_frames
    return [
        replace(config, rollout=replace(config.rollout, min_num_training_frames=frames, num_training_frames=frames))
        for frames in range(shortest, longest + 1, config.sampling.chunk_frames)
    ]


def beginnings_of(config: TrainingConfig) -> list[TrainingConfig]:
    """The config with each beginning of its videos that it draws: noise in all updates, or a picture in all of them.

    Without short first chunks, unless all are: as many chunks of fewer latents need no more.
    """
    train, share = config.train, config.train.image_probability
    drawn = {0.0} if share == 0 else {1.0} if share == 1 else {0.0, 1.0}
    train = replace(train, first_chunk_probability=float(train.first_chunk_probability == 1))
    return [replace(config, train=replace(train, image_probability=share)) for share in sorted(drawn)]


def first_chunks_of(config: TrainingConfig) -> list[tuple[float, TrainingConfig]]:
    """The config with each first chunk that it draws, the usual one in all updates or a short one, and its share."""
    share = config.train.first_chunk_probability
    drawn = {0.0: 1 - share, 1.0: share}
    return [
        (weight, replace(config, train=replace(config.train, first_chunk_probability=certain)))
        for certain, weight in drawn.items()
        if weight
    ]


def exiting(config: TrainingConfig, step: int) -> TrainingConfig:
    """The config with this exit step for every chunk: that of a student which has no further steps."""
    steps = FlowSchedule.from_config(config.scheduler).steps[: step + 1]
    return replace(
        config,
        scheduler=replace(config.scheduler, denoising_step_list=steps),
        rollout=replace(config.rollout, last_step_only=True),
    )


class _Captions:
    """Embeddings of the right shape and dtype."""

    def __init__(self, config: TrainingConfig) -> None:
        self._shape = (config.model.caption_length, config.model.caption_channels)
        self._dtype = resolve_dtype(config.text_encoder.dtype, GPU)

    def prepare(self, prompts: Sequence[str]) -> None:
        """Prepare nothing."""

    def embed(self, prompts: Sequence[str]) -> TextEmbedding:
        tokens = torch.empty(len(prompts), *self._shape, dtype=self._dtype, device=META)
        return TextEmbedding(tokens, torch.empty(tokens.shape[:2], dtype=torch.bool, device=META))

    def negative(self) -> TextEmbedding:
        return self.embed([""])


class _VAE:
    """Takes the memory of decoding, and remembers as much as a decoder does."""

    def __init__(self, config: TrainingConfig, encoders: Encoders) -> None:
        pixels = config.train.batch_size * config.sampling.height * config.sampling.width
        pixel = resolve_dtype(config.vae.weight_dtype, GPU).itemsize * pixels
        self._decoding, self._cache = pixel * encoders.decode_values, int(pixel * encoders.cache_values)

    def overlap_latent(self, latents: Tensor, cache: DecodeCache | None = None) -> tuple[Tensor, DecodeCache]:
        torch.empty(self._decoding, dtype=torch.uint8, device=META)
        seen = latents.shape[2] + (0 if cache is None else cache.latents)
        feature = torch.empty(self._cache, dtype=torch.uint8, device=META)
        return torch.empty_like(latents[:, :, :1]), DecodeCache((feature,), seen)


class _Pictures:
    """Latents of pictures, of the right shape."""

    def __init__(self, shape: tuple[int, int, int]) -> None:
        self._shape = shape

    def __call__(self, numbers: Sequence[int]) -> Tensor:
        channels, *size = self._shape
        return torch.empty(len(numbers), channels, 1, *size, dtype=torch.float32, device=META)


class _Clips:
    """One clip on the host, all zeros in the memory of one number; or one trajectory with so many states."""

    def __init__(self, config: TrainingConfig, *states: int) -> None:
        self._latents = torch.zeros((), dtype=torch.float32, device="cpu").expand(*states, *clip_shape(config))

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> tuple[Tensor, str]:
        return self._latents, ""

    def batch(self, indices: Sequence[int]) -> Batch:
        return Batch(self._latents.expand(len(indices), *self._latents.shape), [""] * len(indices))

    def prompts(self) -> list[str]:
        return [""]
