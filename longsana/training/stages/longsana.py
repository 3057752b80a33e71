"""LongSANA's own stage (method.md 7.7): Self-Forcing on the next stretch of a video that lives across iterations."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from longsana.encoders.vae import DecodeCache
from longsana.models.embeddings import TextEmbedding
from longsana.sampling.recent import NAME, Held, Recent
from longsana.sampling.sampler import absorb, timestep
from longsana.state import CausalState
from longsana.training.learner import compute_dtype
from longsana.training.stages.prompt_changes import NUMBERS, DrawnChanges, Progress, PromptChanges, Switches
from longsana.training.stages.self_forcing import SelfForcing, Window
from longsana.training.stages.stage import Loss, MicroBatch, MicroBatches
from longsana.weights.build import empty_model

log = logging.getLogger(__name__)


class Stream(NamedTuple):
    """The video of one micro-batch, as far as it has come; detached values.

    progress: how far it has come.
    overlap: (B, C, 1, H, W), what begins the next window; cache: the decoder's memory of all so far, if it is carried.
    recent: the last chunks, as far as a change of prompt reaches back.
    """

    progress: Progress
    text: TextEmbedding
    state: CausalState
    overlap: Tensor
    cache: DecodeCache | None
    recent: Recent


class LongSana(SelfForcing):
    """Generator and critic share the streams: every loss, of either, takes the next stretch of its own stream.

    Early parts of a state come from older weights; they are not computed again.

    switch_prompts: what streams go on with where they switch, one for each prompt; none without a switch file.
    any_process: see `Switches`.
    """

    def __init__(
        self,
        *arguments: Any,
        micro_batches: MicroBatches,
        switch_prompts: Sequence[str] = (),
        any_process: Callable[[bool], bool] = bool,
        **parts: Any,
    ) -> None:
        super().__init__(*arguments, **parts)
        self.micro_batches = micro_batches
        self.streams: dict[int, Stream] = {}
        self._serials: dict[int, int] = {}  # of the next stream of a micro-batch
        self.changes: PromptChanges = DrawnChanges(self.config, self.prompts)
        if switch_prompts:
            self.changes = Switches(self.config, switch_prompts, any_process)

    def loss(self, micro_batch: MicroBatch) -> Loss:
        fresh = micro_batch.index not in self.streams
        loss = super().loss(micro_batch)
        if fresh and not self.config.streaming.train_first_chunk:
            # Made all the same: processes whose streams are at other places run their networks as often.
            return Loss(0 * loss.value, loss.metrics, learns=False)
        return loss

    def rollout(self, micro_batch: MicroBatch) -> Window:
        stream = self.streams.pop(micro_batch.index, None)
        if stream is None:
            progress, state, recent = self._next_video(micro_batch), None, self.changes.recent()
            text = self.embed([self.prompts[number] for number in progress.numbers])
        else:
            progress, text, state, recent = stream.progress, stream.text, stream.state, stream.recent
        if self.changes.happens(micro_batch, None if stream is None else progress):
            state, text = self._changed(micro_batch, stream, text)
        first = self._first(micro_batch, stream, progress, text)
        short = stream is None and self.begins_short(micro_batch)
        plan = self.plan(self._stretch(stream), first, short=short)
        exits = self._exit_steps(micro_batch, len(plan))
        new, state = self.generate(micro_batch, plan, text, state, exits, first=first, keep_state=True, recent=recent)
        assert state is not None
        self._keep(micro_batch, stream, progress, text, state, new.detach(), recent)
        if stream is not None:
            return self.window_of(stream.overlap, new, text, exits)
        return self.beginning(new, text, exits, first)

    def _first(
        self, micro_batch: MicroBatch, stream: Stream | None, progress: Progress, text: TextEmbedding
    ) -> Tensor | None:
        """Latents (B, C, 1, H, W) of the pictures that a stream begins with, if it begins and has some."""
        if stream is None:
            return self.picture(micro_batch, progress.numbers)
        happens = micro_batch.happens("image", self.config.train.image_probability)
        if happens and self.config.sampling.image_first == "absorb" and self.micro_batches.processes > 1:
            # Processes whose streams begin absorb their pictures: all run the network as often.
            absorb(self.generator, self._no_latents(micro_batch, 1), text, None)
        return None

    def _no_latents(self, micro_batch: MicroBatch, frames: int) -> Tensor:
        """Zeros in the place of clean latents, (B, C, frames, H, W), for a pass that is made for other processes."""
        channels, *size = self.latent_shape
        shape = (len(micro_batch.samples), channels, frames, *size)
        return torch.zeros(shape, dtype=torch.float32, device=micro_batch.device)

    @torch.no_grad()
    def _changed(
        self, micro_batch: MicroBatch, stream: Stream | None, text: TextEmbedding
    ) -> tuple[CausalState | None, TextEmbedding]:
        """Change the prompt of a stream, if it is its turn: the state and the caption to go on with."""
        passes = 0

        def again(x0: Tensor, *, state: CausalState | None) -> CausalState:
            nonlocal passes
            if self.config.rollout.noisy_absorb:
                noise = micro_batch.normal(f"absorbed again {passes}", x0.shape)
                x0 = self.schedule.add_noise(x0, noise, timestep(0, x0))
            passes += 1
            return absorb(self.generator, x0, text, state)

        state = None if stream is None else stream.state
        prompts = None if stream is None else self.changes.prompts(micro_batch, stream.progress)
        if stream is not None and prompts is not None:
            text = self.embed(prompts)
            state = stream.recent.begin(self.changes.change, stream.state, again)
        if self.micro_batches.processes > 1:
            # Processes whose streams are at other places, or do not change, run the network as often.
            nothing = self._no_latents(micro_batch, self.config.sampling.chunk_frames)
            while passes < self.changes.change.chunks:
                again(nothing, state=None)
        return state, text

    def _stretch(self, stream: Stream | None) -> int:
        """Latent frames of the next stretch."""
        if stream is None:
            return self.config.rollout.num_training_frames
        return self.config.streaming.streaming_min_new_frame

    def _next_video(self, micro_batch: MicroBatch) -> Progress:
        """The micro-batch's next stream, before its first frame.

        Its number decides its prompts, not the iteration: with as many micro-batches as before, no prompt is left out
        or taken twice.
        """
        serial, batch = self._serials.get(micro_batch.index, 0), len(micro_batch.samples)
        first = (serial * self.micro_batches.count + micro_batch.index) * batch
        order = self.order["generator"]
        return Progress(serial, 0, tuple(order[first + i] for i in range(batch)))

    def _keep(
        self,
        micro_batch: MicroBatch,
        stream: Stream | None,
        progress: Progress,
        text: TextEmbedding,
        state: CausalState,
        new: Tensor,
        recent: Recent,
    ) -> None:
        """Put the stream back, unless it has come to its end."""
        self._serials[micro_batch.index] = progress.serial + 1
        fewer = self._stretch(None) - state.frames if stream is None else progress.fewer
        progress = progress._replace(frames=state.frames, fewer=fewer)
        if not new.isfinite().all():
            log.warning(
                "micro-batch %d: a stretch that is not finite; its stream ends at frame %d",
                micro_batch.index,
                state.frames,
            )
        elif self._goes_on(progress.place):
            overlap, cache = self.overlap(new, None if stream is None else stream.cache)
            # In the order of memory that a checkpoint gives back: convolutions round differently for another one.
            if cache is not None:
                cache = cache._replace(features=tuple(feature.contiguous() for feature in cache.features))
            self.streams[micro_batch.index] = Stream(progress, text, state, overlap.contiguous(), cache, recent)

    def _goes_on(self, place: int) -> bool:
        """Tell whether a stream has a next stretch at this place; see `Progress.place`."""
        streaming = self.config.streaming
        return place + streaming.streaming_min_new_frame <= streaming.streaming_max_length

    def state_tensors(self) -> Mapping[str, Mapping[str, Tensor]]:
        groups = {}
        for index in self.micro_batches.mine:
            tensors = {"serial": torch.tensor(self._serials.get(index, 0), dtype=torch.int64, device="cpu")}
            if stream := self.streams.get(index):
                state = stream.state
                numbers = {"frames": state.frames, "sinks": state.sinks}
                if stream.progress.fewer:
                    numbers |= {"fewer": stream.progress.fewer}
                tensors |= {
                    name: torch.tensor(number, dtype=torch.int64, device="cpu") for name, number in numbers.items()
                }
                tensors |= {"lead": stream.overlap}
                tensors |= {"kv": state.kv, "k_sum": state.k_sum, "tail": state.tail}
                tensors |= {"tokens": stream.text.tokens, "mask": stream.text.mask}
                tensors |= stream.recent.held.tensors() | self.changes.tensors(stream.progress)
                if stream.cache is not None:
                    tensors |= {f"cache_{i:03d}": feature for i, feature in enumerate(stream.cache.features)}
            groups[f"stream_{index:05d}"] = tensors
        return groups

    def restore(self, names: Sequence[str], read: Callable[[str], Mapping[str, Tensor]], *, anew: bool = False) -> None:
        """Take back the streams of this process's micro-batches, whole.

        Those that had none, or one that does not fit this run any more, begin one. anew: all of them do.
        """
        unfit: dict[int, str] = {}
        for index in self.micro_batches.mine:
            if (name := f"stream_{index:05d}") in names:
                if problem := self._take(index, read(name), anew):
                    unfit[index] = problem
            elif names:
                # As far along the prompts as the others, which go through them in step.
                self._serials[index] = int(read(names[0])["serial"])
        if names and len(names) != self.micro_batches.count:
            log.warning(
                "the checkpoint holds the streams of %d micro-batches, this run has %d: %d go on whole, %d end, "
                "%d begin anew",
                len(names),
                self.micro_batches.count,
                min(len(names), self.micro_batches.count),
                max(len(names) - self.micro_batches.count, 0),
                max(self.micro_batches.count - len(names), 0),
            )
        if unfit:
            log.warning(
                "%d of the streams of %d micro-batches of this process do not fit its settings any more; they end, and "
                "others begin: %s",
                *(len(unfit), len(self.micro_batches.mine), next(iter(unfit.values()))),
            )

    def _take(self, index: int, tensors: Mapping[str, Tensor], anew: bool) -> str:
        """Take a stream back; what is in the way of that, or nothing."""
        self._serials[index] = int(tensors["serial"])
        if "frames" not in tensors:  # the micro-batch was between two streams
            return ""
        frames = int(tensors["frames"])
        fewer = int(tensors["fewer"]) if "fewer" in tensors else 0
        if problem := "their numbers mean something else" if anew else self._misfit(frames, fewer, tensors):
            return problem
        parts = {name: tensor.to(self.vae.device) for name, tensor in tensors.items() if tensor.dim()}
        # Streams from before there were sinks have none.
        sinks = int(tensors["sinks"]) if "sinks" in tensors else 0
        state = CausalState(parts["kv"], parts["k_sum"], parts["tail"], frames, sinks)
        text = TextEmbedding(parts["tokens"], parts["mask"])
        features = tuple(parts[name] for name in sorted(parts) if name.startswith("cache_"))
        cache = DecodeCache(features, state.frames) if features else None
        recent = self.changes.recent()
        recent.take(Held.named(tensors, self.vae.device))
        numbers = tuple(tensors[NUMBERS].tolist()) if NUMBERS in tensors else ()
        progress = Progress(self._serials[index] - 1, frames, numbers, fewer)
        self.streams[index] = Stream(progress, text, state, parts["lead"], cache, recent)
        return ""

    def _misfit(self, frames: int, fewer: int, tensors: Mapping[str, Tensor]) -> str:
        """Say what a stream has that this run's would not, or nothing. frames, fewer: see `Progress`."""
        if not self._goes_on(frames + fewer):
            return f"{frames} latents, which leave no room for a stretch"
        if problem := self.changes.misfit(tensors):
            return problem
        saved = {
            name: _kind(name, tensor)
            for name, tensor in tensors.items()
            if tensor.dim() and name != NUMBERS and not name.startswith(NAME)
        }
        for name in self._kinds | saved:
            if saved.get(name) != self._kinds.get(name):
                return f"{name} {saved.get(name, 'missing')} (here: {self._kinds.get(name, 'none')})"
        return ""

    @cached_property
    def _kinds(self) -> dict[str, str]:
        """Shapes and dtypes of a stream of this run."""
        batch, (channels, height, width) = self.config.train.batch_size, self.latent_shape
        state = empty_model(self.config.model).to(compute_dtype(self.config)).empty_state(batch, height, width)
        text = self.embed([self.prompts[0]] * batch)
        overlap = torch.zeros(batch, channels, 1, height, width, dtype=torch.float32, device="cpu")
        parts = {"kv": state.kv, "k_sum": state.k_sum, "tail": state.tail, "lead": overlap}
        parts |= {"tokens": text.tokens, "mask": text.mask}
        if not self.config.rollout.overlap_latents:
            _, cache = self.vae.decode_stream(overlap.to(self.vae.device), more=True)
            parts |= {f"cache_{i:03d}": feature for i, feature in enumerate(cache.features)}
        return {name: _kind(name, part) for name, part in parts.items()}


def _kind(name: str, tensor: Tensor) -> str:
    """Shape and dtype, in words; of the decoder's memory without frames, which grow at the start of a video."""
    sizes = [str(size) for size in tensor.shape]
    if name.startswith("cache_"):
        sizes[2] = "*"
    return f"[{', '.join(sizes)}] {str(tensor.dtype).removeprefix('torch.')}"
