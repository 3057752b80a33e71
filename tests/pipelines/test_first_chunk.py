"""A first chunk of its own length: streams, calls and continuations are one video to the bit, whatever it is."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from longsana.data.prompts import Prompt
from longsana.flow.noise import PromptNoise
from longsana.pipelines.video import LongSanaVideoChunk, LongSanaVideoPipeline
from longsana.runtime.errors import InputError
from longsana.sampling.captions import caption_encoder
from longsana.sampling.continuation import Continuation
from longsana.sampling.engine import Engine
from tests.pipelines.repository import OTHER, PROMPT, SIZE, shapes_config
from tests.pipelines.test_stream import same_state

OPTIONS: dict[str, Any] = {"chunk_frames": 3, "num_inference_steps": 2, **SIZE}
LATENTS: dict[str, Any] = OPTIONS | {"output_type": "latent"}


def seed() -> torch.Generator:
    return torch.Generator().manual_seed(11)


def joined(chunks: list[LongSanaVideoChunk]) -> Tensor:
    return torch.cat([chunk.frames for chunk in chunks], dim=2)


@pytest.mark.parametrize(
    ("first", "lengths"),
    [(0, [4, 3, 3]), (1, [1, 3, 3, 3]), (2, [2, 3, 3, 2]), (3, [3, 3, 3, 1]), (4, [4, 3, 3])],
)
def test_a_stream_is_the_call_however_it_is_cut(
    loaded: LongSanaVideoPipeline, first: int, lengths: list[int], tmp_path: Path
) -> None:
    """Latents and frames, 10 latents in chunks of 3, each state from a file; and an endless one begins like it."""
    own = LATENTS | {"first_chunk_frames": first}
    whole = loaded(PROMPT, num_frames=37, generator=seed(), **own).frames
    chunks = list(loaded.stream(PROMPT, 37, generator=seed(), **own))
    assert [chunk.frames.shape[2] for chunk in chunks] == lengths
    assert torch.equal(joined(chunks), whole)
    endless = list(islice(loaded.stream(PROMPT, generator=seed(), **own), 3))
    assert torch.equal(joined(endless), whole[:, :, : sum(lengths[:3])])
    shown = {**OPTIONS, "first_chunk_frames": first, "output_type": "pt", "latents_per_call": 2}
    frames = loaded(PROMPT, num_frames=37, generator=seed(), **shown).frames
    streamed = list(loaded.stream(PROMPT, 37, generator=seed(), **shown))
    assert torch.equal(torch.cat([chunk.frames for chunk in streamed], dim=1), frames)
    for done in range(1, len(lengths)):
        loaded.save_state(streamed[done - 1], file := tmp_path / f"{done}.safetensors", memory="full")
        # Neither length is said again: they are the state's.
        plain = {name: value for name, value in shown.items() if "chunk" not in name}
        rest = list(loaded.stream(state=file, num_frames=4 * sum(lengths[done:]), **plain))
        assert [chunk.frames.shape[1] for chunk in rest] == [4 * length for length in lengths[done:]]
        assert torch.equal(torch.cat([chunk.frames for chunk in rest], dim=1), frames[:, -4 * sum(lengths[done:]) :])
        assert same_state(rest[-1].state, streamed[-1].state)


def test_noise_is_that_of_the_absolute_frame(loaded: LongSanaVideoPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[tuple[int, int, int]] = []
    draw = PromptNoise.draw

    def seen(self: Any, start: int, step: int, shape: Any, device: Any) -> Tensor:
        drawn.append((start, step, shape[1]))
        result: Tensor = draw(self, start, step, shape, device)
        return result

    monkeypatch.setattr(PromptNoise, "draw", seen)
    list(loaded.stream(PROMPT, 37, generator=seed(), **LATENTS, first_chunk_frames=2))
    assert [one for one in drawn if one[1] == 0] == [(0, 0, 2), (2, 0, 3), (5, 0, 3), (8, 0, 2)]


@pytest.mark.parametrize("change", ["keep", "recache=2", "rebuild=1", "cut"])
def test_a_story_is_placed_by_the_plan(loaded: LongSanaVideoPipeline, change: str) -> None:
    """Chunks of 1, 3, 3, 3 latents begin at 0, 1/16, 13/16 and 25/16 s; a part of one second ends at the nearest."""
    story = f"{PROMPT}[1s] | [{change}] {OTHER}"
    own = LATENTS | {"first_chunk_frames": 1, "fps": 16.0}
    whole = loaded(story, num_frames=37, generator=seed(), **own).frames
    chunks = list(loaded.stream(story, 37, generator=seed(), **own))
    assert torch.equal(joined(chunks), whole) and chunks[0].state.plan == (1, 3, 3, 3)
    for done in (1, 2, 3):
        (chunk, *_) = loaded.stream(state=chunks[done - 1], num_frames=12, output_type="latent", num_inference_steps=2)
        assert torch.equal(chunk.frames, chunks[done].frames) and same_state(chunk.state, chunks[done].state)
    with pytest.raises(InputError, match=r"^chunks of 2 latents, where the state's story was planned in chunks of 3"):
        loaded.stream(state=chunks[0], num_frames=8, **LATENTS | {"chunk_frames": 3})


@pytest.mark.parametrize(("way", "lengths"), [("pin", [2, 3, 3, 2]), ("absorb", [1, 2, 3, 3, 1])])
def test_a_picture_and_a_first_chunk(loaded: LongSanaVideoPipeline, way: str, lengths: list[int]) -> None:
    picture = Image.fromarray(np.arange(32 * 48 * 3, dtype=np.uint32).astype(np.uint8).reshape(32, 48, 3))
    own = LATENTS | {"first_chunk_frames": 2, "image": picture, "image_first": way}
    whole = loaded(PROMPT, num_frames=37, generator=seed(), **own).frames
    chunks = list(loaded.stream(PROMPT, 37, generator=seed(), **own))
    assert [chunk.frames.shape[2] for chunk in chunks] == lengths and torch.equal(joined(chunks), whole)
    endless = list(islice(loaded.stream(PROMPT, generator=seed(), **own), 3))
    assert torch.equal(joined(endless), whole[:, :, : sum(lengths[:3])])


def test_a_film_goes_on_with_the_remainder_last(loaded: LongSanaVideoPipeline) -> None:
    film = np.zeros((9, 32, 48, 3), np.uint8)
    own = LATENTS | {"first_chunk_frames": 2, "video": film, "new_frames_only": True}
    whole = loaded(PROMPT, num_frames=16, generator=seed(), **own).frames
    chunks = list(loaded.stream(PROMPT, 16, generator=seed(), **own))
    assert [chunk.frames.shape[2] for chunk in chunks] == [3, 1] and torch.equal(joined(chunks), whole)


def test_files_of_states(loaded: LongSanaVideoPipeline, tmp_path: Path) -> None:
    """A state says its first chunk; one without such is written as it was before there was any."""
    for first, version in ((0, b'"schema": 3'), (2, b'"schema": 4')):
        chunk = next(loaded.stream(PROMPT, generator=seed(), **OPTIONS, first_chunk_frames=first))
        loaded.save_state(chunk, file := tmp_path / f"{first}.safetensors")
        telling = Continuation.load(file).telling
        assert telling is not None and telling.first_chunk_frames == first
        assert version.replace(b'"', b'\\"') in file.read_bytes()


def test_what_does_not_fit_is_refused(loaded: LongSanaVideoPipeline, loaded_base: LongSanaVideoPipeline) -> None:
    for call in (loaded, loaded.stream):
        with pytest.raises(InputError, match=r"^first_chunk_frames=5: must be at most 4, chunk_frames \+ 1"):
            call(PROMPT, num_frames=37, **OPTIONS, first_chunk_frames=5)
    with pytest.raises(InputError, match=r"^first_chunk_frames: has no meaning for the base model"):
        loaded_base(PROMPT, num_frames=9, first_chunk_frames=2, **SIZE)


def test_the_batch_commands_videos_are_the_calls(loaded: LongSanaVideoPipeline) -> None:
    """Latents to the bit; and gone on from a state in the middle, with the chunks that were left."""
    config = shapes_config(**{"sampling.num_frames": 37, "sampling.chunk_frames": 3, "sampling.first_chunk_frames": 2})
    engine = Engine(replace(config, scheduler=replace(config.scheduler, denoising_step_list=(1000, 889))), "cpu")
    prompt = Prompt(1, PROMPT, (PROMPT,), 0, 32, 48, 11)
    with caption_encoder(engine.config, engine.device) as encode:
        caption = encode(prompt)
    parts = engine.load()
    frames = list(engine.sample(*parts, [prompt], [caption], wanted=lambda chunk: chunk == 1))
    own = LATENTS | {"num_inference_steps": None, "timesteps": (1000, 889), "first_chunk_frames": 2}
    whole = loaded(PROMPT, num_frames=37, generator=seed(), **own).frames
    assert torch.equal(torch.cat([part.latents for part in frames], dim=2), whole)
    (after,) = [part.after for part in frames if part.after is not None]
    more = engine.sample(*parts, [replace(prompt, frames=21)], [caption], begun=after)
    rest = [part.latents for part in more]
    assert [part.shape[2] for part in rest] == [3, 2] and torch.equal(torch.cat(rest, dim=2), whole[:, :, 5:])
