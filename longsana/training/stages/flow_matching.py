"""Flow matching (method.md 7.4): the base model, and the block-causal one, learn the velocity of noisy latents."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from longsana.chunks import ChunkPlan
from longsana.data.clips import ClipSource
from longsana.flow.losses import flow_loss
from longsana.flow.noise import to_device
from longsana.flow.schedule import FlowSchedule
from longsana.flow.timesteps import independent, monotone
from longsana.models.embeddings import TextEmbedding
from longsana.training.config import TrainingConfig
from longsana.training.learner import Learner
from longsana.training.stages.stage import Ahead, Embed, Loss, MicroBatch, Shuffled, Stage, each_frame


class _Inputs(NamedTuple):
    """x, x0, noise: (B, C, T, H, W). t: (B, T). pinned: latent 0 is a picture."""

    x: Tensor
    x0: Tensor
    noise: Tensor
    t: Tensor
    text: TextEmbedding
    pinned: bool


class FlowMatching(Stage):
    """One learner, on clips of latents with captions, some of which are dropped for the null caption.

    Bidirectional: a clip is one chunk with one timestep. Causal: a timestep a chunk, and no chunk sees a later one.
    A frame's loss counts (1 - sigma) to the power `weight_power`.
    With probability `image_probability` clips begin with a picture: latent 0 is clean, has timestep 0 and no loss.
    null: (1, L, C), what a dropped caption becomes; with `dropped_caption: masked_null` under the caption's own mask.
    """

    def __init__(
        self,
        config: TrainingConfig,
        generator: Learner,
        *,
        embed: Embed,
        null: TextEmbedding,
        clips: ClipSource,
        frames: int,
    ) -> None:
        self.settings, self.image_probability = config.flow_matching, config.train.image_probability
        self.learners = (generator,)
        self.generator, self.embed, self.null, self.clips = generator.model, embed, null, clips
        self.schedule = FlowSchedule(self.settings.flow_shift)
        self.plan = ChunkPlan.split(frames, config.sampling.chunk_frames if self.settings.causal else frames)
        self.order = Shuffled(len(clips), config.train.seed, generator.name)
        self.inputs: Ahead[_Inputs] = Ahead(self._prepared)

    def loss(self, micro_batch: MicroBatch) -> Loss:
        x, x0, noise, t, text, pinned = self.inputs.take(micro_batch)
        velocity, _ = self.generator(x, t, text, plan=self.plan)
        power = self.settings.weight_power
        weight = (1 - self.schedule.sigma(t)) ** power if power else None
        if pinned:
            velocity, x0, noise = (video[:, :, 1:] for video in (velocity, x0, noise))
            weight = None if weight is None else weight[:, 1:]
        loss = flow_loss(velocity, x0, noise, weight)
        return Loss(loss, {"generator_loss": loss.detach()})

    def _prepared(self, micro_batch: MicroBatch) -> _Inputs:
        latents, prompts = self.clips.batch([self.order[number] for number in micro_batch.samples])
        x0 = to_device(latents, micro_batch.device).float()
        text = self._drop(self.embed(prompts), micro_batch)
        t = each_frame(self._timesteps(len(prompts), micro_batch.rng("t")), self.plan)
        pinned = micro_batch.happens("image", self.image_probability)
        if pinned:
            t[:, 0] = 0
        t = to_device(t, micro_batch.device)
        noise = micro_batch.normal("noise", x0.shape)
        x = self.schedule.add_noise(x0, noise, t)
        if pinned:
            x[:, :, 0] = x0[:, :, 0]  # at t = 0 the schedule has a least sigma, which is not 0
        return _Inputs(x, x0, noise, t, text, pinned)

    def _timesteps(self, batch: int, rng: torch.Generator) -> Tensor:
        """(B, chunks)."""
        settings = self.settings
        ordered = settings.chunk_sampling_strategy == "incremental" and len(self.plan) > 1
        return (monotone if ordered else independent)(
            batch,
            len(self.plan),
            mean=settings.logit_mean,
            std=settings.logit_std,
            shift=settings.flow_shift,
            same_prob=settings.same_timestep_prob,
            rng=rng,
        )

    def _drop(self, text: TextEmbedding, micro_batch: MicroBatch) -> TextEmbedding:
        """Some captions replaced by the null caption."""
        batch = len(micro_batch.samples)
        drawn = torch.rand(batch, generator=micro_batch.rng("drop"), dtype=torch.float32, device="cpu")
        dropped = to_device(drawn < self.settings.class_dropout_prob, micro_batch.device)
        null_mask = text.mask if self.settings.dropped_caption == "masked_null" else self.null.mask
        return TextEmbedding(
            torch.where(dropped[:, None, None], self.null.tokens.to(text.tokens.dtype), text.tokens),
            torch.where(dropped[:, None], null_mask, text.mask),
        )
