"""Changes of prompt in training: a stream's next stretch may have another caption, as the next part of a story has.

Either they are drawn, for all streams of an update, or a stream switches once, from the prompts that it began with to
the same lines of another file.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from longsana.chunks import ChunkPlan
from longsana.data.story import Change
from longsana.flow.noise import keyed_generator
from longsana.runtime.errors import InputError
from longsana.sampling.recent import Held, Recent
from longsana.training.config import StreamingConfig, TrainingConfig
from longsana.training.stages.stage import MicroBatch

NUMBERS = "prompts"
"""The name of the numbers of a stream's prompts, in checkpoints."""


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


def switch_places(config: TrainingConfig) -> list[int]:
    """List the latent frames at which a stream may switch to the switch file, each as likely as the others.

    They are beginnings of stretches: a place between two of them is rounded up. None without a switch file.

    Raises:
        InputError: a setting of the switch has no meaning, or no stretch begins at a place or after it.
    """
    for setting, value, why in _without_meaning(config.streaming):
        raise InputError(f"streaming.{setting}={value}: has no meaning {why}; leave it out")
    streaming, first = config.streaming, config.rollout.num_training_frames
    if streaming.switch_prompt_path is None:
        return []
    longest, new = streaming.streaming_max_length, streaming.streaming_min_new_frame
    starts = range(first, longest - new + 1, new)
    if not starts:
        raise InputError(
            f"streaming.switch_prompt_path={streaming.switch_prompt_path}: a stream is one stretch, which cannot "
            f"switch; make streaming.streaming_max_length={longest} at least {first + new}"
        )
    if streaming.switch_mode == "random":
        return list(starts)
    places: tuple[int, ...] = (streaming.fixed_switch_index,)
    setting = "fixed_switch_index"
    if streaming.switch_mode == "random_choice":
        setting, places = "switch_choices", streaming.switch_choices
    if not places:
        raise InputError("streaming.switch_choices: streaming.switch_mode=random_choice needs at least one place")
    if max(places) > starts[-1]:
        raise InputError(
            f"streaming.{setting}: {max(places)} is a place that no stretch reaches: the last of a stream begins at "
            f"latent {starts[-1]}; give at most that, or a longer streaming.streaming_max_length={longest}"
        )
    return [next(start for start in starts if start >= place) for place in places]


def _without_meaning(streaming: StreamingConfig) -> Iterator[tuple[str, object, str]]:
    """Settings that change nothing beside the others, their values, and why they do not."""
    mode, default = streaming.switch_mode, StreamingConfig()
    no_file = "without streaming.switch_prompt_path"
    other_mode = f"with streaming.switch_mode={mode}"
    if streaming.switch_prompt_path is None:
        reasons = dict.fromkeys(("switch_mode", "fixed_switch_index", "switch_choices"), no_file)
    else:
        reasons = {"prompt_change_prob": "with streaming.switch_prompt_path, which says when prompts change"}
        reasons |= {} if mode == "fixed" else {"fixed_switch_index": other_mode}
        reasons |= {} if mode == "random_choice" else {"switch_choices": other_mode}
    for setting, why in reasons.items():
        if (value := getattr(streaming, setting)) != getattr(default, setting):
            yield setting, value, why


class Progress(NamedTuple):
    """The progress of a stream.

    serial: how many videos its micro-batch has begun before it.
    frames: its latent frames so far.
    numbers: of the prompts that it began with; a checkpoint holds them for a switch file alone.
    fewer: latent frames that its first stretch had less than others, since it began with a short chunk.
    """

    serial: int
    frames: int
    numbers: tuple[int, ...]
    fewer: int = 0

    @property
    def place(self) -> int:
        """Its latent frames so far, had its first stretch been as long as others: so it switches and ends with them."""
        return self.frames + self.fewer


class PromptChanges(ABC):
    """The changes of prompt of a run's streams, as functions of what they are for. change: of the past, with each."""

    def __init__(self, config: TrainingConfig) -> None:
        self.change = change_of(config)
        self._seed = config.train.seed
        lengths = (config.rollout.num_training_frames, config.streaming.streaming_min_new_frame)
        self._frames = max(max(ChunkPlan.split(frames, config.sampling.chunk_frames).lengths) for frames in lengths)

    @property
    @abstractmethod
    def may_happen(self) -> bool:
        """True if a prompt may change in this run."""

    @abstractmethod
    def happens(self, micro_batch: MicroBatch, progress: Progress | None) -> bool:
        """Tell whether networks absorb again in this update: the same answer on all processes, which all ask.

        progress: of this micro-batch's stream; None: one begins.
        """

    @abstractmethod
    def prompts(self, micro_batch: MicroBatch, progress: Progress) -> Sequence[str] | None:
        """The prompts that a stream goes on with where a change happens; None if its own stay."""

    def recent(self) -> Recent:
        """Make room for what the changes of a new stream will reach back to."""
        return Recent([self.change] if self.may_happen else [], self._frames)

    def tensors(self, progress: Progress) -> dict[str, Tensor]:
        """Name what a checkpoint holds of a stream's progress for its changes alone: tensors of any shape."""
        return {}

    def misfit(self, tensors: Mapping[str, Tensor]) -> str:
        """Say what a saved stream, of tensors of any shape by name, lacks to change its prompt as this run's do."""
        if not self.may_happen or not self.change.chunks:
            return ""
        held = Held.named(tensors)
        if held.reaches(self.change, 0):
            return ""
        needed = "kv" if self.change.kind == "recache" else "x0"
        return f"no {needed} of its last {self.change.chunks} chunks"


class DrawnChanges(PromptChanges):
    """Changes with a probability in each update, to prompts of the run that are drawn for each stream."""

    def __init__(self, config: TrainingConfig, prompts: Sequence[str]) -> None:
        super().__init__(config)
        self._probability, self._prompts = config.streaming.prompt_change_prob, prompts

    @property
    def may_happen(self) -> bool:
        return self._probability > 0

    def happens(self, micro_batch: MicroBatch, progress: Progress | None) -> bool:
        return micro_batch.happens("prompt change", self._probability)

    def prompts(self, micro_batch: MicroBatch, progress: Progress) -> Sequence[str]:
        rng = keyed_generator(self._seed, "prompt change", micro_batch.index, progress.serial, progress.frames)
        shape = (len(micro_batch.samples),)
        numbers = torch.randint(len(self._prompts), shape, generator=rng, dtype=torch.int64, device="cpu").tolist()
        return [self._prompts[number] for number in numbers]


class Switches(PromptChanges):
    """One change in each stream, from the prompts that it began with to the prompts of the same lines of another file.

    prompts: of the switch file, one for each of the run's.
    any_process: tells all processes, which all ask, whether it is so on any of them. Their streams need not be at one
    place: others begin where one was not finite, or where a run goes on with more processes.
    """

    def __init__(self, config: TrainingConfig, prompts: Sequence[str], any_process: Callable[[bool], bool]) -> None:
        super().__init__(config)
        self._places, self._prompts, self._any_process = switch_places(config), prompts, any_process
        self._first, self._new = config.rollout.num_training_frames, config.streaming.streaming_min_new_frame

    @property
    def may_happen(self) -> bool:
        return True

    def place(self, index: int, serial: int) -> int:
        """The latent frame from which on a stream, number `serial` of a micro-batch, has its second prompts."""
        rng = keyed_generator(self._seed, "switch", index, serial)
        number = torch.randint(len(self._places), (), generator=rng, dtype=torch.int64, device="cpu")
        return self._places[int(number)]

    def happens(self, micro_batch: MicroBatch, progress: Progress | None) -> bool:
        return self._any_process(progress is not None and self._is_there(micro_batch, progress))

    def prompts(self, micro_batch: MicroBatch, progress: Progress) -> Sequence[str] | None:
        if not self._is_there(micro_batch, progress):
            return None
        return [self._prompts[number] for number in progress.numbers]

    def tensors(self, progress: Progress) -> dict[str, Tensor]:
        """Name the numbers of a stream's prompts, of shape (B,)."""
        return {NUMBERS: torch.tensor(progress.numbers, dtype=torch.int64, device="cpu")}

    def misfit(self, tensors: Mapping[str, Tensor]) -> str:
        """Say what a saved stream, of tensors of any shape by name, lacks, prompts of this run's files among it."""
        if NUMBERS not in tensors:
            return "no numbers of its prompts"
        if (last := int(tensors[NUMBERS].max())) >= len(self._prompts):
            return f"prompt number {last + 1}, where there are {len(self._prompts)}"
        return super().misfit(tensors)

    def _is_there(self, micro_batch: MicroBatch, progress: Progress) -> bool:
        """Tell whether the place of a stream is the next stretch's beginning; it may have grown by other stretches."""
        before = progress.place - (self._new if progress.place > self._first else self._first)
        return before < self.place(micro_batch.index, progress.serial) <= progress.place
