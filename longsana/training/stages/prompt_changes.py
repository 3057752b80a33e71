"""Changes of prompt in training: a stream's next stretch may have another caption, as the next part of a story has."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from longsana.chunks import ChunkPlan
from longsana.data.story import Change
from longsana.flow.noise import keyed_generator
from longsana.runtime.errors import InputError
from longsana.sampling.recent import Recent
from longsana.training.config import TrainingConfig
from longsana.training.stages.stage import MicroBatch


def change_of(config: TrainingConfig) -> Change:
    """Read what becomes of the past of a stream whose prompt changes.

    Raises:
        InputError: it is no change, or one that a stream cannot have.
    """
    name = f"streaming.prompt_change={config.streaming.prompt_change}"
    try:
        change = Change.parse(config.streaming.prompt_change)
    except InputError as error:
        raise InputError(f"streaming.prompt_change: {error}") from error
    if change.kind == "cut":
        raise InputError(f"{name}: a stream that is cut is another stream; use keep, recache=K or rebuild=W")
    return change


class PromptChanges:
    """The changes of prompt of a run's streams, as functions of what they are for.

    count: prompts of the run.
    """

    def __init__(self, config: TrainingConfig, count: int) -> None:
        self.change = change_of(config)
        self._probability, self._count, self._seed = config.streaming.prompt_change_prob, count, config.train.seed
        lengths = (config.rollout.num_training_frames, config.streaming.streaming_min_new_frame)
        self._frames = max(max(ChunkPlan.split(frames, config.sampling.chunk_frames).lengths) for frames in lengths)

    def recent(self) -> Recent:
        """Make room for what the changes of a new stream will reach back to."""
        return Recent([self.change] if self._probability else [], self._frames)

    def happens(self, micro_batch: MicroBatch) -> bool:
        """Tell whether streams change their prompt in this update, all micro-batches or none."""
        if not self._probability:
            return False
        draw = torch.rand((), generator=micro_batch.shared_rng("prompt change"), dtype=torch.float64, device="cpu")
        return bool(draw < self._probability)

    def prompts(self, index: int, serial: int, frames: int, batch: int) -> list[int]:
        """Draw the numbers of the prompts that a micro-batch's stream goes on with after so many latent frames."""
        rng = keyed_generator(self._seed, "prompt change", index, serial, frames)
        return torch.randint(self._count, (batch,), generator=rng, dtype=torch.int64, device="cpu").tolist()

    def misfit(self, tensors: Mapping[str, Tensor]) -> str:
        """Say what a saved stream, of tensors of any shape by name, lacks to change its prompt as this run's do."""
        if not self._probability or not self.change.chunks:
            return ""
        needed = "recent_000_kv" if self.change.kind == "recache" else "recent_000_x0"
        return "" if needed in tensors else f"no {needed.rpartition('_')[2]} of its last chunks"
