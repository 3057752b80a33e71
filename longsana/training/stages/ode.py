"""ODE initialisation (method.md 7.5): the student learns to jump from any state of a trajectory to its end."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from longsana.chunks import ChunkPlan
from longsana.data.trajectories import Trajectories
from longsana.flow.losses import trajectory_loss
from longsana.flow.noise import to_device
from longsana.flow.schedule import FlowSchedule
from longsana.models.embeddings import TextEmbedding
from longsana.training.config import TrainingConfig
from longsana.training.learner import Learner
from longsana.training.stages.stage import Ahead, Embed, Loss, MicroBatch, Shuffled, Stage, each_frame


class _Inputs(NamedTuple):
    """x, clean: (B, C, T, H, W). t: (B, T)."""

    x: Tensor
    clean: Tensor
    t: Tensor
    text: TextEmbedding
    plan: ChunkPlan


class OdeInitialisation(Stage):
    """One learner; each chunk of a clip is at a state of its own. All are seen at once, and none sees a later one.

    With probability `image_probability` clips begin with a picture: latent 0 is clean and has no loss. It is a chunk by
    itself, or the first latent of the first one, as `sampling.image_first` says.
    """

    def __init__(
        self, config: TrainingConfig, generator: Learner, *, embed: Embed, trajectories: Trajectories, frames: int
    ) -> None:
        self.learners = (generator,)
        self.generator, self.embed, self.trajectories = generator.model, embed, trajectories
        self.schedule = FlowSchedule.from_config(config.scheduler)
        self.image_probability = config.train.image_probability
        self.plan = ChunkPlan.split(frames, config.sampling.chunk_frames)
        self.plan_of_picture = ChunkPlan.with_picture(frames, config.sampling.chunk_frames, config.sampling.image_first)
        self.order = Shuffled(len(trajectories), config.train.seed, generator.name)
        self.inputs: Ahead[_Inputs] = Ahead(self._prepared)

    def loss(self, micro_batch: MicroBatch) -> Loss:
        x, clean, t, text, plan = self.inputs.take(micro_batch)
        velocity, _ = self.generator(x, t, text, plan=plan)
        loss = trajectory_loss(self.schedule.to_x0(x, velocity, t), clean, t)
        return Loss(loss, {"generator_loss": loss.detach()})

    def _prepared(self, micro_batch: MicroBatch) -> _Inputs:
        items = [self.trajectories[self.order[number]] for number in micro_batch.samples]
        text = self.embed([item.prompt for item in items])
        pictured = micro_batch.happens("image", self.image_probability)
        plan = self.plan_of_picture if pictured else self.plan
        # Of an item's states, (S, C, T, H, W).
        times = torch.tensor((*self.schedule.steps, 0), dtype=torch.float32, device="cpu")
        rng = micro_batch.rng("state")
        drawn = torch.randint(len(times), (len(items), len(plan)), generator=rng, dtype=torch.int64, device="cpu")
        index = each_frame(drawn, plan)
        if pictured:
            index[:, 0] = len(times) - 1
        frames = range(plan.frames)
        chosen = [item.states[own, :, frames].transpose(0, 1) for item, own in zip(items, index, strict=True)]
        # Chosen on the host: only these and the clean ones are moved.
        x = to_device(torch.stack(chosen), micro_batch.device).float()
        clean = to_device(torch.stack([item.states[-1] for item in items]), micro_batch.device).float()
        return _Inputs(x, clean, to_device(times[index], micro_batch.device), text, plan)
