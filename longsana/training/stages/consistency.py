"""Causal consistency (method.md 7.5): the student learns to jump along the teacher's way, without trajectories.

From a noisy clip the teacher takes one small step, and the student's answer there is what it is to answer before it, as
in consistency distillation (Song et al. 2023): answers along a way become one, its end.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from longsana.chunks import ChunkPlan
from longsana.data.clips import ClipSource
from longsana.flow.losses import consistency_loss, guided
from longsana.flow.noise import to_device
from longsana.flow.schedule import TIMESTEPS, FlowSchedule, per_frame, uniform_sigmas
from longsana.models.dit import LongSanaDiT
from longsana.models.embeddings import TextEmbedding
from longsana.runtime.errors import InputError
from longsana.training.config import ConsistencyConfig, TrainingConfig
from longsana.training.learner import Learner
from longsana.training.stages.stage import Ahead, Embed, Loss, MicroBatch, Shuffled, Stage, each_frame, repeated


class _Inputs(NamedTuple):
    """x: (B, C, T, H, W). t, nearer: (B, T), the timesteps before and after a step of the teacher's."""

    x: Tensor
    t: Tensor
    nearer: Tensor
    text: TextEmbedding
    plan: ChunkPlan


class Consistency(Stage):
    """One learner, whose chunks are seen at once, and none sees a later one; and a frozen teacher of its noisy clips.

    With `causal_teacher` the teacher sees a clip so, too. Of each clip some first chunks, any number but all, are clean
    and have no loss, so that what is learned goes on from a clean past; the others are at one level. A bidirectional
    teacher sees a clip whose frames are all at one level.

    With probability `image_probability` clips begin with a picture: latent 0 is clean and has no loss. It is a chunk by
    itself, or the first latent of the first one, as `sampling.image_first` says.

    negative: (1, L, C), the negative caption of the teacher's guidance.
    """

    def __init__(
        self,
        config: TrainingConfig,
        generator: Learner,
        teacher: LongSanaDiT,
        *,
        embed: Embed,
        negative: TextEmbedding,
        clips: ClipSource,
        frames: int,
    ) -> None:
        self.settings, self.image_probability = config.consistency, config.train.image_probability
        self.learners = (generator,)
        self.generator, self.teacher, self.negative = generator.model, teacher, negative
        self.embed, self.clips = embed, clips
        self.schedule = FlowSchedule.from_config(config.scheduler)
        self.times = timesteps(self.settings)
        size = config.sampling.chunk_frames
        self.plan = ChunkPlan.split(frames, size)
        self.plan_of_picture = ChunkPlan.with_picture(frames, size, config.sampling.image_first)
        self.order = Shuffled(len(clips), config.train.seed, generator.name)
        self.inputs: Ahead[_Inputs] = Ahead(self._prepared)

    def loss(self, micro_batch: MicroBatch) -> Loss:
        x, t, nearer, text, plan = self.inputs.take(micro_batch)
        with torch.no_grad():
            target = self._target(x, t, nearer, text, plan)
        velocity, _ = self.generator(x, t, text, plan=plan)
        loss = consistency_loss(self.schedule.to_x0(x, velocity, t), target, t)
        return Loss(loss, {"generator_loss": loss.detach()})

    def _prepared(self, micro_batch: MicroBatch) -> _Inputs:
        latents, prompts = self.clips.batch([self.order[number] for number in micro_batch.samples])
        x0, text = to_device(latents, micro_batch.device).float(), self.embed(prompts)
        pictured = micro_batch.happens("image", self.image_probability)
        plan = self.plan_of_picture if pictured else self.plan
        level, clean = self._levels(len(prompts), plan, micro_batch, pictured=pictured)
        t, nearer = (to_device(self.times[at].masked_fill(clean, 0), micro_batch.device) for at in (level, level + 1))
        whole = per_frame(to_device(clean, micro_batch.device), x0)
        noise = micro_batch.normal("noise", x0.shape)
        return _Inputs(torch.where(whole, x0, self.schedule.add_noise(x0, noise, t)), t, nearer, text, plan)

    def _target(self, x: Tensor, t: Tensor, nearer: Tensor, text: TextEmbedding, plan: ChunkPlan) -> Tensor:
        """The student's answer (B, C, T, H, W) a step of the teacher's further on; at the end of the way, x there.

        t, nearer: (B, T), the timesteps before and after that step.
        """
        seen = plan if self.settings.causal_teacher else None
        captions = text, repeated(self.negative, len(x))
        cond, uncond = (self.teacher(x, t, caption, plan=seen)[0] for caption in captions)
        velocity = guided(cond, uncond, self.settings.guidance_scale)
        arrived = nearer == 0
        level = self.schedule.sigma(nearer).masked_fill(arrived, 0)
        step = (level - self.schedule.sigma(t)).masked_fill(t == 0, 0)  # what is clean stays so
        further = (x + per_frame(step, x) * velocity).to(x.dtype)
        answer, _ = self.generator(further, nearer, text, plan=plan)
        return torch.where(per_frame(arrived, x), further, self.schedule.to_x0(further, answer, nearer))

    def _levels(self, batch: int, plan: ChunkPlan, micro_batch: MicroBatch, *, pictured: bool) -> tuple[Tensor, Tensor]:
        """Draw where on the way each frame is, an index into `times`, and whether it is clean instead; both (B, T)."""
        rng = micro_batch.rng("level")
        drawn = torch.randint(len(self.times) - 1, (batch, 1), generator=rng, dtype=torch.int64, device="cpu")
        alone = int(pictured and plan.lengths[0] == 1)  # a picture that is a chunk by itself is clean anyway
        before = torch.zeros(batch, 1, dtype=torch.int64, device="cpu")
        if self.settings.causal_teacher:
            before = torch.randint(alone, len(plan), (batch, 1), generator=rng, dtype=torch.int64, device="cpu")
        chunk = torch.arange(len(plan), dtype=torch.int64, device="cpu")
        clean = each_frame(chunk < before, plan)
        if pictured:
            clean[:, 0] = True
        return drawn.expand(batch, plan.frames), clean


def timesteps(settings: ConsistencyConfig) -> Tensor:
    """(steps + 1,), float32, on the CPU: whole timesteps of the teacher's way, from 1000 to 0.

    Raises:
        InputError: so many are not apart.
    """
    found = (TIMESTEPS * uniform_sigmas(settings.shift, settings.num_steps)).round()
    if len(found.unique()) < len(found):
        raise InputError(
            f"consistency.num_steps={settings.num_steps}: with consistency.shift={settings.shift:g} some of them have "
            "the same timestep, which is a whole number; take fewer"
        )
    return found.float()
