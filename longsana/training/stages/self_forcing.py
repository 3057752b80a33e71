"""Self-Forcing with distribution matching (method.md 7.6): the student learns on what it generates itself.

A rollout is made exactly as in inference, chunk after chunk with a carried state. The generator follows the difference
of two scores of it, the frozen teacher's and that of a critic, which learns to denoise the student's videos.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import repeat
from typing import NamedTuple

import torch
from torch import Tensor

from longsana.chunks import ChunkPlan
from longsana.encoders.vae import DecodeCache, VideoVAE
from longsana.flow.losses import dmd_gradient, dmd_loss, flow_loss, guided
from longsana.flow.schedule import TIMESTEPS, FlowSchedule
from longsana.flow.timesteps import score_timesteps
from longsana.models.embeddings import TextEmbedding
from longsana.sampling.recent import Recent
from longsana.sampling.sampler import Network, after_clean, begun_with, generate
from longsana.state import CausalState
from longsana.training.config import TrainingConfig
from longsana.training.learner import Learner
from longsana.training.pictures import Pictures
from longsana.training.stages.stage import Embed, Loss, MicroBatch, Shuffled, Stage, repeated


class Window(NamedTuple):
    """The window of a rollout that a loss sees.

    latents: (B, C, T, H, W); those of new frames carry the graph of their chunk's exit step, if there is one.
    text: the caption of each sample.
    exit_steps: of each chunk, an index into the schedule's steps.
    learned_from: the first frame that the loss counts: 1 after an overlap latent, or a picture.
    pictured: the first frame is a picture that was given, which the scores see clean, as a base model does.
    """

    latents: Tensor
    text: TextEmbedding
    exit_steps: list[int]
    learned_from: int = 0
    pictured: bool = False


@dataclass(frozen=True)
class _RolloutNoise:
    """A rollout's noise, as a function of the micro-batch and of the frames since the rollout's `first`."""

    micro_batch: MicroBatch
    first: int

    def draw(self, start: int, step: int, shape: Sequence[int], device: torch.device | str) -> Tensor:
        """Draw noise of a micro-batch; see `longsana.flow.noise.Noise`."""
        name = f"chunk {start - self.first}, step {step}"
        return self.micro_batch.normal(name, (len(self.micro_batch.samples), *shape)).to(device)


class SelfForcing(Stage):
    """Learners: the generator, in every `dfake_gen_update_ratio`-th iteration, and the critic, in each.

    teacher: the frozen bidirectional base model; negative: (1, L, C), the negative caption of its guidance.
    vae: decodes and encodes again the frame that leads a later window; latent_shape: (C, H, W) of a latent frame.
    pictures: those that the prompts begin with, by their numbers; None: no video begins with one.
    """

    def __init__(
        self,
        config: TrainingConfig,
        generator: Learner,
        critic: Learner,
        teacher: Network,
        *,
        embed: Embed,
        negative: TextEmbedding,
        prompts: Sequence[str],
        vae: VideoVAE,
        latent_shape: tuple[int, int, int],
        pictures: Pictures | None = None,
    ) -> None:
        self.config, self.pictures = config, pictures
        self.learners = (generator, critic)
        self.generator, self.critic, self.teacher = generator.model, critic.model, teacher
        self.embed, self.negative, self.prompts = embed, negative, prompts
        self.vae, self.latent_shape = vae, latent_shape
        # Published training does not round timesteps, though its inference does.
        self.schedule = replace(FlowSchedule.from_config(config.scheduler), bf16_timesteps=False)
        self.order = {
            learner.name: Shuffled(len(prompts), config.train.seed, learner.name) for learner in self.learners
        }

    def loss(self, micro_batch: MicroBatch) -> Loss:
        learns = micro_batch.role == "generator"
        with torch.set_grad_enabled(learns):
            window = self.rollout(micro_batch)
        return self._generator_loss(window, micro_batch) if learns else self._critic_loss(window, micro_batch)

    def rollout(self, micro_batch: MicroBatch) -> Window:
        """A video of its own for each sample, and the last `slice_last_frames` of it as the window."""
        settings = self.config.rollout
        numbers = [self.order[micro_batch.role][number] for number in micro_batch.samples]
        text = self.embed([self.prompts[number] for number in numbers])
        first = self.picture(micro_batch, numbers)
        plan = self.plan(self._length(micro_batch), first, short=self.begins_short(micro_batch))
        exits = self._exit_steps(micro_batch, len(plan))
        surplus = plan.frames - settings.slice_last_frames
        learned_from = surplus + 1 if surplus > 0 else 0
        latents, _ = self.generate(micro_batch, plan, text, None, exits, first=first, learned_from=learned_from)
        if surplus <= 0:
            return self.beginning(latents, text, exits, first)
        overlap, _ = self.overlap(latents[:, :, : surplus + 1].detach(), None)
        return self.window_of(overlap, latents[:, :, surplus + 1 :], text, exits)

    def picture(self, micro_batch: MicroBatch, numbers: Sequence[int]) -> Tensor | None:
        """Clean latents (B, C, 1, H, W) that the videos of these prompts begin with, if those of this update do."""
        if not micro_batch.happens("image", self.config.train.image_probability):
            return None
        assert self.pictures is not None, "the prompts have no pictures"
        return self.pictures(numbers).to(micro_batch.device)

    def begins_short(self, micro_batch: MicroBatch) -> bool:
        """Tell whether videos that begin in this update begin with a short chunk."""
        return micro_batch.happens("first chunk", self.config.train.first_chunk_probability)

    def plan(self, frames: int, first: Tensor | None, *, short: bool = False) -> ChunkPlan:
        """The chunks of so many new latents.

        first: (B, C, 1, H, W), a picture that they begin with.
        short: the first chunk, or the one after a picture that is absorbed, has `sampling.first_chunk_frames`. There
            are as many chunks, so that all processes run the network equally often, and so fewer latents.
        """
        sampling, apart = self.config.sampling, first is not None and self.config.sampling.image_first == "absorb"
        if first is None:
            plan = ChunkPlan.split(frames, sampling.chunk_frames)
        else:
            plan = ChunkPlan.with_picture(frames, sampling.chunk_frames, sampling.image_first)
        return plan.resized(int(apart), sampling.first_chunk_frames) if short else plan

    def beginning(self, latents: Tensor, text: TextEmbedding, exits: list[int], first: Tensor | None) -> Window:
        """The whole beginning of a video as a window.

        latents: (B, C, T, H, W). exits: of its chunks. first: (B, C, 1, H, W), the picture that it begins with.
        """
        if first is None:
            return Window(latents, text, exits)
        # A picture that is a chunk by itself takes no step.
        own = exits[1:] if self.config.sampling.image_first == "absorb" else exits
        return Window(latents, text, own, learned_from=1, pictured=True)

    def generate(
        self,
        micro_batch: MicroBatch,
        plan: ChunkPlan,
        text: TextEmbedding,
        state: CausalState | None,
        exits: Sequence[int],
        *,
        first: Tensor | None = None,
        learned_from: int = 0,
        keep_state: bool = False,
        recent: Recent | None = None,
    ) -> tuple[Tensor, CausalState | None]:
        """New latents (B, C, plan.frames, H, W) after `state`, and the state after them.

        Each chunk's latents are the x0 of its exit step, which alone builds a graph; states never carry one.
        first: (B, C, 1, H, W), a picture that they begin with.
        learned_from: chunks that end before this frame build none.
        keep_state: absorb the last chunk too; nothing reads its state otherwise.
        recent: is given every chunk to hold; with `keep_state` alone.
        """
        latents = []
        for chunk in generate(
            self.generator,
            self.schedule,
            repeat(text, len(plan)),
            plan,
            shape=self.latent_shape,
            rng=_RolloutNoise(micro_batch, 0 if state is None else state.frames),
            device=micro_batch.device,
            state=state,
            first=first,
            exits=exits,
            learned_from=learned_from if torch.is_grad_enabled() else None,
            absorb_last=keep_state,
            noisy_absorb=self.config.rollout.noisy_absorb,
        ):
            latents.append(chunk.latents)
            if recent is not None:
                assert chunk.state is not None
                recent.keep(chunk.latents.detach(), state, chunk.state)
            state = chunk.state  # a list of chunks would keep the state of each
        return torch.cat(latents, dim=2), state

    def overlap(self, latents: Tensor, cache: DecodeCache | None) -> tuple[Tensor, DecodeCache | None]:
        """The overlap latent of the window after these latents, (B, C, 1, H, W), and the decoder's cache after them.

        cache: of the video before them. A clip's first latent is a single picture, so the last picture of these is
        encoded again.
        """
        if self.config.rollout.overlap_latents:
            return self.vae.overlap_latent(latents[:, :, -self.config.rollout.overlap_latents :])[0], None
        return self.vae.overlap_latent(latents, cache)

    def window_of(self, overlap: Tensor, new: Tensor, text: TextEmbedding, exits: list[int]) -> Window:
        """Frames from the middle of a video as a clip of its own, which is what the scores know.

        overlap: (B, C, 1, H, W), a picture of its own. new: (B, C, T, H, W), which alone are learned.
        """
        return Window(torch.cat([overlap, new], dim=2), text, exits, learned_from=1)

    def _generator_loss(self, window: Window, micro_batch: MicroBatch) -> Loss:
        x, learned = window.latents, slice(window.learned_from, None)
        with torch.no_grad():
            noisy, t = self._noisy(window, micro_batch.normal("score", x.shape), micro_batch)
            fake = self._clean(self.critic, noisy, t, window.text)
            real = guided(
                self._clean(self.teacher, noisy, t, window.text),
                self._clean(self.teacher, noisy, t, repeated(self.negative, x.shape[0])),
                self.config.distillation.guidance_scale,
            )
            if window.pictured:  # of a clean latent there is nothing to predict
                fake, real = begun_with(x[:, :, :1], fake), begun_with(x[:, :, :1], real)
            gradient = dmd_gradient(x, fake, real)
            metrics = {
                "generator_distance_to_real": (x - real).abs().mean(),
                "dmdtrain_gradient_norm": gradient.abs().mean(),
            }
        loss = dmd_loss(x[:, :, learned], gradient[:, :, learned])
        return Loss(loss, {"generator_loss": loss.detach(), **metrics})

    def _critic_loss(self, window: Window, micro_batch: MicroBatch) -> Loss:
        x, learned = window.latents, slice(window.learned_from, None)
        noise = micro_batch.normal("score", x.shape)
        velocity, _ = self.critic(*self._noisy(window, noise, micro_batch), window.text)
        # The velocity itself: published code takes it from x0, which bfloat16 rounds and a small sigma magnifies.
        loss = flow_loss(*(video[:, :, learned] for video in (velocity, x, noise)))
        return Loss(loss, {"critic_loss": loss.detach()})

    def _noisy(self, window: Window, noise: Tensor, micro_batch: MicroBatch) -> tuple[Tensor, Tensor]:
        """A window as the scores see it, (B, C, T, H, W), and its timesteps: (B,), or (B, T) after a clean picture."""
        x, t = window.latents, self._timesteps(micro_batch, window.exit_steps)
        noisy = self.schedule.add_noise(x, noise, t)
        return (begun_with(x[:, :, :1], noisy), after_clean(t, x)) if window.pictured else (noisy, t)

    def _clean(self, network: Network, noisy: Tensor, t: Tensor, text: TextEmbedding) -> Tensor:
        velocity, _ = network(noisy, t, text)
        return self.schedule.to_x0(noisy, velocity, t)

    def _timesteps(self, micro_batch: MicroBatch, exits: Sequence[int]) -> Tensor:
        settings, first, last = self.config.distillation, 0, TIMESTEPS
        if settings.ts_schedule:
            first = (*self.schedule.steps, 0)[exits[0] + 1]
        if settings.ts_schedule_max:
            last = self.schedule.steps[exits[0]]
        return score_timesteps(
            len(micro_batch.samples),
            shift=settings.timestep_shift,
            low=settings.min_timestep,
            high=settings.max_timestep,
            first=first,
            last=last,
            rng=micro_batch.rng("t"),
        ).to(micro_batch.device)

    def _exit_steps(self, micro_batch: MicroBatch, chunks: int) -> list[int]:
        """Draw for each chunk the step whose x0 is its output, the same in all micro-batches; see `shared_rng`."""
        settings, last = self.config.rollout, len(self.schedule.steps) - 1
        if settings.last_step_only:
            return [last] * chunks
        rng = micro_batch.shared_rng("exit")
        draws = torch.randint(last + 1, (chunks,), generator=rng, dtype=torch.int64, device="cpu").tolist()
        return [draws[0]] * chunks if settings.same_step_across_blocks else draws

    def _length(self, micro_batch: MicroBatch) -> int:
        """Latent frames of this rollout: num_training_frames, less a whole number of chunks, drawn evenly."""
        settings, chunk = self.config.rollout, self.config.sampling.chunk_frames
        choices = (settings.num_training_frames - settings.min_num_training_frames) // chunk + 1
        fewer = int(
            torch.randint(choices, (), generator=micro_batch.shared_rng("length"), dtype=torch.int64, device="cpu")
        )
        return settings.num_training_frames - fewer * chunk
