"""Beginnings of the inference command's videos: nothing, a film, or a saved state; and the states that it saves."""

from __future__ import annotations

import argparse
import dataclasses
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longsana.chunks import ChunkPlan
from longsana.config import InferenceConfig
from longsana.data.films import count_frames, frames_used
from longsana.data.prompts import Prompt
from longsana.data.story import Outline, check_lengths, place_parts, read_parts
from longsana.encoders.geometry import geometry
from longsana.published import DISTILLED
from longsana.runtime.errors import InputError
from longsana.runtime.files import expanded
from longsana.runtime.hub import file_sha256
from longsana.sampling.checks import check_size, chunk_plan, default_change, placed_parts
from longsana.weights.build import empty_model

if TYPE_CHECKING:  # they bring diffusers and transformers, which take seconds
    from torch import Tensor

    from longsana.sampling.continuation import Continuation, Moment

log = logging.getLogger(__name__)

NONE = "none"
SAVES = (NONE, "latents", "full")


@dataclass(frozen=True)
class Beginning:
    """Describe what all videos of a command begin from, and what is saved of them to go on from.

    path: of the film or the state; None: they begin from nothing. sha256: of that file.
    state: that was saved; its tensors are on the host. film: frames of it that are used.
    shown: an mp4 holds the film, too.
    saves: what a saved state holds, or none. every: a state is saved after so many chunks too; 0: at the end alone.
    """

    path: Path | None = None
    sha256: str = ""
    state: Continuation | None = None
    film: int = 0
    shown: bool = True
    saves: str = NONE
    every: int = 0

    @property
    def goes_on(self) -> bool:
        """True where something was before the videos' own chunks."""
        return self.path is not None

    @property
    def given_frames(self) -> int:
        """Pixel frames that an mp4 begins with and that were not sampled."""
        return self.film if self.shown else 0

    @property
    def record(self) -> dict[str, Any]:
        """Say, as part of a video's fingerprint, what it begins from; where that lies decides nothing."""
        if self.path is None:
            return {}
        kind = {"film_frames": self.film, "shown": self.shown} if self.state is None else {}
        return {"sha256": self.sha256, **kind}

    @property
    def saved(self) -> list[Any] | None:
        """Say, for sidecars, which states lie beside a video; None where none are asked for."""
        return None if self.saves == NONE else [self.saves, self.every]

    def encodes(self, prompts: Sequence[Prompt]) -> bool:
        """Tell whether pictures or films are encoded for any video of these prompts."""
        return self.film > 0 or any(prompt.pictures for prompt in prompts)

    def wants(self, chunk: int, count: int) -> bool:
        """Tell whether a state is saved after a chunk, from 0, of so many."""
        return self.saves != NONE and (chunk + 1 == count or (bool(self.every) and (chunk + 1) % self.every == 0))

    def goes_on_with(self, prompt: Prompt) -> bool:
        """Tell whether a prompt is the story that the state is in the middle of, as it was planned."""
        state = self.state
        return state is not None and prompt.text == state.prompt and bool(state.plan) and not state.words

    def pictures_of(self, prompt: Prompt) -> dict[int, Path]:
        """The file of the picture that each part begins with, by number: its own, or the state that holds it."""
        found: dict[int, Path] = {}
        if self.state is not None and self.path is not None and self.goes_on_with(prompt):
            found = dict.fromkeys(self.state.pictures, self.path)
        return found | prompt.pictures

    def pictures_held(self, prompts: Sequence[Prompt], outlines: Sequence[Outline]) -> dict[int, Tensor]:
        """Latents (1, C, 1, h, w) that the state holds of pictures to come, by the chunk that each begins.

        prompts, outlines: of videos that are sampled together.
        """
        for prompt, outline in zip(prompts, outlines, strict=True):
            if self.state is not None and self.goes_on_with(prompt):
                return {outline.parts[part].chunk: latents for part, latents in self.state.pictures.items()}
        return {}

    def outline(self, prompt: Prompt, config: InferenceConfig) -> Outline:
        """Place the parts of a prompt in its video: a state's own story goes on as planned.

        Raises:
            InputError: they do not fit into the video, or reach back to chunks that the state does not hold, or the
                state is in the middle of what this command does not make.
        """
        state = self.state
        if state is None:
            return placed_parts(config, prompt, goes_on=self.goes_on)
        own, lengths = prompt.text == state.prompt, chunk_plan(config, prompt.frames, goes_on=True).lengths
        if own and state.faded and state.faded < config.sampling.transition_chunks:
            raise InputError(
                f"{self.path}: of a stream, in the middle of a transition; go on with the pipeline's "
                "stream, from a later state, or with another prompt"
            )
        if len(prompt.parts) > 1 and self.goes_on_with(prompt):
            shape, fps, change = geometry(config.vae), config.sampling.fps, default_change(config)
            parts = place_parts(len(prompt.parts), prompt.marks, ChunkPlan(state.plan), shape, fps, change)
            outline = Outline(parts, len(state.plan)).after(state.chunk)
            check_lengths(outline, state.plan[state.chunk :], lengths)
        else:
            outline = placed_parts(config, prompt, goes_on=True)
        for chunk, change in outline.changes.items():
            if chunk < len(lengths):
                state.recent.check(change, chunk)
        return outline

    def continuation(
        self,
        moment: Moment,
        prompt: Prompt,
        seed: int,
        chunk: int,
        plan: Sequence[int],
        marks: tuple[str, str],
        config: InferenceConfig,
    ) -> Continuation:
        """The state to save of a video after chunk `chunk` (from 0) of its plan. moment: of this video alone."""
        from longsana.sampling.continuation import Continuation, Telling

        done, planned = 0, tuple(plan)
        if self.state is not None and self.goes_on_with(prompt):
            done, planned = self.state.chunk, self.state.plan
        to_come = self.outline(prompt, config).after(chunk + 1).parts
        return Continuation(
            moment.network,
            moment.decoder,
            seed,
            prompt.text,
            (prompt.height, prompt.width),
            moment.latents,
            prompt.repetition,
            done + chunk + 1,
            planned,
            moment.waiting,
            marks,
            recent=moment.recent,
            telling=Telling(*(getattr(config.sampling, name) for name in Telling._fields)),
            pictures={
                number: moment.pictures[part.chunk]
                for number, part in enumerate(to_come)
                if part.chunk in moment.pictures
            },
        )


def state_path(video: Path, chunk: int | None = None) -> Path:
    """Name the file beside a video for its state at the end, or after so many chunks."""
    return video.with_suffix(".safetensors" if chunk is None else f".chunk{chunk:05d}.safetensors")


def states_of(video: Path) -> list[Path]:
    """The states beside a video."""
    own = re.compile(re.escape(video.stem) + r"(\.chunk\d{5,})?\.safetensors")
    return sorted(path for path in video.parent.glob("*.safetensors") if own.fullmatch(path.name))


def prepare_beginning(
    options: argparse.Namespace, settings: Sequence[str], config: InferenceConfig
) -> tuple[Beginning, InferenceConfig]:
    """Read what the options name, all of it, and the config with a state's seed and size where none were given.

    settings: those of the command line, as `section.key=value`.

    Raises:
        InputError: an option has no such value or no meaning, a file is broken, or the state is of another network.
    """
    if options.save_state not in SAVES:
        raise InputError(f"--save_state {options.save_state}: must be one of {', '.join(SAVES)}")
    if options.save_every < 0:
        raise InputError(f"--save_every {options.save_every}: must be 0 (at the end alone) or more")
    if options.save_every and options.save_state == NONE:
        raise InputError("--save_every: has no meaning without --save_state")
    if options.new_frames_only and options.video is None:
        raise InputError("--new_frames_only: has no meaning without --video")
    if options.video is not None and options.from_state is not None:
        raise InputError("--video and --from_state: a video begins from one of them; save a state after the film")
    wanted = {"--video": options.video, "--from_state": options.from_state, "--save_state": options.save_state != NONE}
    sampler = config.scheduler.sampling_algo
    if sampler != DISTILLED and (given := [name for name, value in wanted.items() if value]):
        raise InputError(f"{given[0]}: has no meaning for the sampler {sampler}, which keeps no state")
    beginning = Beginning(saves=options.save_state, every=options.save_every, shown=not options.new_frames_only)
    if options.video is not None:
        path = expanded(options.video)
        count = count_frames(path, config.sampling.fps)
        film = frames_used(count, geometry(config.vae).time_stride)
        return dataclasses.replace(beginning, path=path, sha256=file_sha256(path), film=film), config
    if options.from_state is not None:
        from longsana.sampling.continuation import Continuation

        path = expanded(options.from_state)
        state = Continuation.load(path)
        config = _of_state(state, path, settings, config)
        return dataclasses.replace(beginning, path=path, sha256=file_sha256(path), state=state), config
    return beginning, config


def prompt_of(state: Continuation, config: InferenceConfig) -> Prompt:
    """The prompt of a state, for a command that names none."""
    parts, marks = ((state.words,), ()) if state.words else read_parts(state.prompt)
    return Prompt(1, state.prompt, parts, state.repetition, *state.size, config.sampling.seed, marks=marks)


def prompts_after(beginning: Beginning, prompts: Sequence[Prompt], config: InferenceConfig) -> list[Prompt]:
    """The prompts without pictures of parts that a state's own story has had before it.

    Raises:
        InputError: what there is cannot go on for one of them, or has no room for its parts.
    """
    if not beginning.goes_on:
        return list(prompts)
    following = []
    for prompt in prompts:
        if (config.sampling.num_frames if prompt.frames is None else prompt.frames) == 1:
            raise InputError("num_frames=1: adds no frame to a video that goes on, which gets one frame less")
        if beginning.state is not None and (prompt.height, prompt.width) != beginning.state.size:
            raise InputError(
                f"line {prompt.line}: {prompt.height}x{prompt.width}, and the state {beginning.path} is of "
                f"{beginning.state.size[0]}x{beginning.state.size[1]}"
            )
        following.append(_after(beginning, prompt, config))
        if following[-1].image is not None:
            raise InputError(f"line {prompt.line}: a picture to begin with, and what the video goes on from; give one")
    return following


def _after(beginning: Beginning, prompt: Prompt, config: InferenceConfig) -> Prompt:
    """A prompt without pictures that a state's own story has had; InputError: its parts cannot be placed."""
    try:
        parts = beginning.outline(prompt, config).parts
    except InputError as error:
        raise InputError(f"line {prompt.line}: {error}") from error
    if not beginning.goes_on_with(prompt):
        return prompt
    cuts = {number: path for number, path in prompt.cuts.items() if parts[number].chunk >= 0}
    if cuts != prompt.cuts or prompt.image is not None:
        log.info("line %d: pictures of parts that began before the state change nothing here", prompt.line)
    return dataclasses.replace(prompt, image=None, cuts=cuts)


def _of_state(state: Continuation, path: Path, settings: Sequence[str], config: InferenceConfig) -> InferenceConfig:
    given = {setting.partition("=")[0] for setting in settings}
    for side, own in zip(("height", "width"), state.size, strict=True):
        asked = getattr(config.sampling, side)
        if f"sampling.{side}" in given and asked != own:
            raise InputError(f"--{side} {asked}: the video of the state {path} has {own}")
    told = {} if state.telling is None else state.telling._asdict()
    kept = {name: value for name, value in ({"seed": state.seed} | told).items() if f"sampling.{name}" not in given}
    sampling = dataclasses.replace(config.sampling, height=state.size[0], width=state.size[1], **kept)
    config = dataclasses.replace(config, sampling=sampling)
    check_size(config, *state.size)
    size = geometry(config.vae).latent_size(*state.size)
    if state.latents is not None and tuple(state.latents.shape[3:]) != size:
        raise InputError(f"{path}: its latents have size {tuple(state.latents.shape[3:])}, its pictures need {size}")
    needed = empty_model(config.model).empty_state(1, *size)
    shapes = [tuple(getattr(one, name).shape) for name in ("kv", "k_sum", "tail") for one in (state.network, needed)]
    if shapes[::2] != shapes[1::2]:
        raise InputError(
            f"{path}: of another network or num_cached_blocks: its tensors have shapes {shapes[::2]}, this network "
            f"needs {shapes[1::2]}"
        )
    return config
