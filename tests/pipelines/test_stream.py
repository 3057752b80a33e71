"""A stream is the one-shot video to the bit, however it is cut, and its memory does not grow."""

from __future__ import annotations

from itertools import count, islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from longsana.encoders.vae import LTX2VAE
from longsana.flow import noise
from longsana.flow.noise import keyed_generator
from longsana.pipelines import pictures
from longsana.pipelines.video import LongSanaVideoChunk, LongSanaVideoPipeline
from longsana.runtime.errors import InputError
from longsana.sampling.continuation import Continuation
from tests.pipelines.repository import OTHER, PROMPT, SIZE

# Chunks of 3, 2, 2 latents: 9, 8, 8 frames.
CHUNKS: dict[str, Any] = {"chunk_frames": 2, "num_inference_steps": 2, "output_type": "pt"}


def seed() -> torch.Generator:
    return torch.Generator().manual_seed(11)


def joined(chunks: list[LongSanaVideoChunk]) -> Tensor:
    return torch.cat([chunk.frames for chunk in chunks], dim=1)


@pytest.fixture(scope="module")
def one_shot(loaded: LongSanaVideoPipeline) -> Tensor:
    frames: Tensor = loaded(PROMPT, num_frames=25, generator=seed(), **SIZE, **CHUNKS).frames
    return frames


def test_a_stream_is_the_one_shot_video(loaded: LongSanaVideoPipeline, one_shot: Tensor) -> None:
    chunks = list(loaded.stream(PROMPT, 25, generator=seed(), **SIZE, **CHUNKS))
    assert [chunk.frames.shape[1] for chunk in chunks] == [9, 8, 8]
    assert torch.equal(joined(chunks), one_shot)
    latents = list(loaded.stream(PROMPT, 25, generator=seed(), **SIZE, **CHUNKS | {"output_type": "latent"}))
    whole = loaded(PROMPT, num_frames=25, generator=seed(), **SIZE, **CHUNKS | {"output_type": "latent"}).frames
    assert torch.equal(torch.cat([chunk.frames for chunk in latents], dim=2), whole)


def test_without_an_end(loaded: LongSanaVideoPipeline, one_shot: Tensor) -> None:
    stream = loaded.stream(PROMPT, generator=seed(), **SIZE, **CHUNKS)
    chunks = list(islice(stream, 4))
    stream.close()
    assert joined(chunks).shape[1] == 33 and torch.equal(joined(chunks[:3]), one_shot)


@pytest.mark.parametrize("cut", [1, 2])
def test_it_goes_on_from_a_state(loaded: LongSanaVideoPipeline, one_shot: Tensor, cut: int) -> None:
    first = list(islice(loaded.stream(PROMPT, generator=seed(), **SIZE, **CHUNKS), cut))
    rest = list(loaded.stream(num_frames=25 - 9 - 8 * (cut - 1), state=first[-1].state, **CHUNKS))
    assert torch.equal(joined(first + rest), one_shot)
    # A state is a value: it may be gone on from again, elsewhere.
    other = next(loaded.stream(OTHER, state=first[-1].state, **CHUNKS))
    again = list(loaded.stream(num_frames=25 - 9 - 8 * (cut - 1), state=first[-1].state, **CHUNKS))
    assert torch.equal(joined(again), joined(rest)) and not torch.equal(other.frames, rest[0].frames)


def test_prompts_change_between_chunks(loaded: LongSanaVideoPipeline, one_shot: Tensor) -> None:
    chunks = list(loaded.stream([PROMPT, OTHER], 25, generator=seed(), **SIZE, **CHUNKS))
    assert torch.equal(chunks[0].frames, one_shot[:, :9])
    assert [chunk.state.prompt for chunk in chunks] == [PROMPT, OTHER, OTHER]
    rest = list(loaded.stream(OTHER, 16, state=chunks[0].state, **CHUNKS))
    assert torch.equal(joined(rest), joined(chunks[1:]))


# Changes of the past --------------------------------------------------------------------------------------------------

LATENTS = SIZE | CHUNKS | {"output_type": "latent"}
CHANGES = ("keep", "recache=1", "recache=2", "rebuild=1", "rebuild=2", "cut")


def same_state(one: Continuation, other: Continuation) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.network[:3], other.network[:3], strict=True))


@pytest.mark.parametrize("change", CHANGES)
def test_a_story_is_that_of_the_call_however_it_is_cut(loaded: LongSanaVideoPipeline, change: str) -> None:
    """To the bit, with a transition that the cuts fall into; each state is gone on from by itself."""
    story = f"{PROMPT} | [{change}] {OTHER}[1.5s]"
    options: dict[str, Any] = LATENTS | {"fps": 16.0, "transition_chunks": 2, "transition": "spherical"}
    whole = loaded(story, num_frames=49, generator=seed(), **options).frames
    chunks = list(loaded.stream(story, 49, generator=seed(), **options))
    assert torch.equal(torch.cat([chunk.frames for chunk in chunks], dim=2), whole)
    assert [chunk.state.chunk for chunk in chunks] == [1, 2, 3, 4, 5, 6]
    for cut in range(1, 6):
        (chunk, *_) = loaded.stream(state=chunks[cut - 1], num_frames=8, **options)
        assert torch.equal(chunk.frames, chunks[cut].frames) and same_state(chunk.state, chunks[cut].state)
    beyond = list(islice(loaded.stream(state=chunks[3], **options), 4))
    assert torch.equal(beyond[1].frames, chunks[5].frames) and beyond[3].state.prompt == story


@pytest.mark.parametrize("change", CHANGES)
def test_a_prompt_that_is_asked_for_changes_the_past(
    loaded: LongSanaVideoPipeline, change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a story does, on equal noise; and cut anywhere it is the same to the bit, the changed chunk's seam too."""
    monkeypatch.setattr(noise, "keyed_generator", lambda seed, text, *key: keyed_generator(seed, "", *key))
    story = loaded(f"{PROMPT}[1s] | [{change}] {OTHER}", num_frames=49, generator=seed(), **LATENTS).frames
    options = LATENTS | {"prompt_change": change}
    prompts = [PROMPT] * 2 + [OTHER] * 4
    chunks = list(loaded.stream(iter(prompts), 49, generator=seed(), **options))
    assert torch.equal(torch.cat([chunk.frames for chunk in chunks], dim=2), story)
    for cut in range(1, 6):
        rest = list(loaded.stream(prompts[cut:], 8 * (6 - cut), state=chunks[cut - 1], **options))
        assert same_state(rest[-1].state, chunks[-1].state)
    marked = list(loaded.stream([PROMPT, PROMPT, f"[{change}] {OTHER}"], 25, generator=seed(), **options))
    assert torch.equal(marked[2].frames, chunks[2].frames)


def test_a_transition_is_cut_and_interrupted(loaded: LongSanaVideoPipeline, tmp_path: Path) -> None:
    options: dict[str, Any] = LATENTS | {"transition_chunks": 2}
    prompts = [PROMPT, OTHER, OTHER, OTHER, PROMPT, OTHER, OTHER, OTHER]
    chunks = list(loaded.stream(prompts, 65, generator=seed(), **options))
    assert [(chunk.state.before, chunk.state.faded) for chunk in chunks] == [
        ("", 0),
        *[(PROMPT, 1), (PROMPT, 2), ("", 0)],
        *[(OTHER, 1), (PROMPT, 1), (PROMPT, 2), ("", 0)],
    ]
    for cut in range(1, 8):
        loaded.save_state(chunks[cut - 1], tmp_path / "state")
        (chunk,) = loaded.stream(prompts[cut], 8, state=tmp_path / "state", **options)
        assert torch.equal(chunk.frames, chunks[cut].frames)
    plain = list(loaded.stream(prompts, 33, generator=seed(), **LATENTS))
    assert not torch.equal(plain[1].frames, chunks[1].frames)
    cut_off = list(loaded.stream([PROMPT, f"[cut] {OTHER}"], 17, generator=seed(), **options))
    assert cut_off[1].state.faded == 0, "there is none after a cut"


def test_a_story_that_is_gone_on_from_by_another_prompt(loaded: LongSanaVideoPipeline) -> None:
    """It changes from the words that the story showed last, not from all of it."""
    chunks = list(loaded.stream(f"{PROMPT}<split>{OTHER}", 25, generator=seed(), **LATENTS))
    options: dict[str, Any] = LATENTS | {"transition_chunks": 1}
    (changed,) = loaded.stream(PROMPT, 8, state=chunks[2], **options)
    assert changed.state.before == OTHER
    (same,) = loaded.stream(OTHER, 8, state=chunks[2], **options)
    assert same.state.before == "" and not torch.equal(changed.frames, same.frames)


@pytest.mark.parametrize(
    "prompt", [rf"\[cut] {PROMPT}", f"[cute] {PROMPT}", f"[keep calm] {PROMPT}", rf"{PROMPT} \| {OTHER}[1s]"]
)
def test_brackets_and_bars_that_are_words_stay_words(
    loaded: LongSanaVideoPipeline, tmp_path: Path, prompt: str
) -> None:
    """Where a stream goes on without being told anything, from memory and from a file; and where it is said again."""
    chunks = list(loaded.stream(prompt, 25, generator=seed(), **LATENTS))
    loaded.save_state(chunks[0], tmp_path / "state")
    for state, said in ((chunks[0], None), (tmp_path / "state", None), (chunks[0], prompt)):
        rest = list(loaded.stream(said, 16, state=state, **LATENTS))
        assert [chunk.state.words for chunk in rest] == [chunks[0].state.words] * 2
        assert same_state(rest[-1].state, chunks[-1].state)
    if not prompt.startswith("\\"):  # which a call, whose prompt is no change, shows to the network
        whole = loaded(prompt, num_frames=25, generator=seed(), **LATENTS).frames
        assert torch.equal(torch.cat([chunk.frames for chunk in chunks], dim=2), whole)


def test_a_state_says_how_its_prompt_was_told(loaded: LongSanaVideoPipeline, tmp_path: Path) -> None:
    """A story, and a stream of prompts, go on without a word on chunks, frame rate, changes and transitions."""
    options = LATENTS | {"chunk_frames": 3, "fps": 8.0, "transition_chunks": 1, "transition": "spherical"}
    chunks = list(loaded.stream(f"{PROMPT}[3s] | [recache=1] {OTHER}", 61, generator=seed(), **options))
    plain: dict[str, Any] = {name: LATENTS[name] for name in ("num_inference_steps", "output_type")}
    for cut in range(1, len(chunks)):
        loaded.save_state(chunks[cut - 1], tmp_path / "state")
        (chunk,) = loaded.stream(num_frames=12, state=tmp_path / "state", **plain)
        assert torch.equal(chunk.frames, chunks[cut].frames)
    with pytest.raises(
        InputError, match=r"chunks of 2 latents, where the state's story was planned in chunks of 3, 3, 3"
    ):
        loaded.stream(num_frames=8, state=chunks[0], chunk_frames=2, **plain)
    live = list(loaded.stream([PROMPT, OTHER, OTHER], 33, generator=seed(), prompt_change="rebuild=1", **options))
    (again,) = loaded.stream(OTHER, 12, state=live[0], **plain)
    assert torch.equal(again.frames, live[1].frames)
    other = next(loaded.stream(OTHER, 12, state=live[0], prompt_change="keep", **plain))
    assert not torch.equal(other.frames, again.frames)


@pytest.mark.parametrize("change", ["recache=2", "rebuild=2"])
def test_what_a_stream_holds_does_not_grow(loaded: LongSanaVideoPipeline, change: str) -> None:
    prompts = ([PROMPT, PROMPT, OTHER, OTHER][chunk % 4] for chunk in count())
    sizes = []
    for chunk in islice(loaded.stream(prompts, generator=seed(), prompt_change=change, **LATENTS), 9):
        recent = chunk.state.recent
        assert recent.reach == 2 and chunk.state.latents is not None
        states = [kept.before.nbytes for kept in recent.chunks if kept.before is not None]
        sizes.append((len(recent.chunks), sum(kept.latents.nbytes for kept in recent.chunks), sum(states)))
        assert bool(states) == (change == "recache=2")
        if sizes[-1][0] == 2:
            assert torch.equal(recent.chunks[1].latents, chunk.frames)
    # A rebuild leaves what it has absorbed, and the chunk after it is held beside that.
    assert sizes[3:] == [sizes[3]] * 6 and sizes[0][0] == 1


def test_changes_that_a_stream_cannot_make(loaded: LongSanaVideoPipeline) -> None:
    (chunk,) = loaded.stream(PROMPT, 9, generator=seed(), **LATENTS)
    for arguments, message in [
        ({"prompt": PROMPT, "prompt_change": "recache"}, "prompt_change: 'recache' is no change of the past"),
        ({"prompt": f"[cut] {PROMPT}"}, r"prompt: \[cut\]: the first has no past that could change"),
        (
            {"prompt": OTHER, "state": chunk, "prompt_change": "rebuild=1"},
            "rebuild=1: .* the state holds 0 and 0 come after it; go on",
        ),
        (
            {"prompt": f"[rebuild=1] {OTHER}", "state": chunk},
            r"does not hold; begin a stream with prompt_change=rebuild=1",
        ),
        ({"prompt": f"[rebild=1] {OTHER}", "state": chunk}, "prompt: 'rebild=1' is no change of the past"),
        ({"prompt": "[cut]", "state": chunk}, r"prompt: \[cut\]: a change of the past without words"),
        # What a list or a story says later is known at once, too.
        (
            {"prompt": [PROMPT, OTHER], "state": chunk, "num_frames": 16, "prompt_change": "rebuild=2"},
            "holds 0 and 1 come",
        ),
        ({"prompt": [PROMPT, f"[recache=1] {OTHER}"]}, r"\[recache=1\] reaches back to what this stream does not hold"),
        ({"prompt": f"{PROMPT} | [rebuild=2] {OTHER}", "state": chunk, "num_frames": 16}, "holds 0 and 1 come after"),
        ({"prompt": PROMPT, "transition": "linear"}, "transition: .*without transition_chunks"),
        ({"prompt": f"{PROMPT} | [cut] {OTHER}"}, "a story in a stream without an end"),
        ({"prompt": f"{PROMPT} | [cut] {OTHER}", "num_frames": 5}, "2 parts between .* for a video of 1 chunk"),
    ]:
        generator = seed()
        before = generator.get_state()
        with pytest.raises(InputError, match=message):
            loaded.stream(generator=generator, **LATENTS | arguments)
        assert torch.equal(generator.get_state(), before)
    asked = iter([PROMPT, f"[recache=2] {OTHER}"])
    late = loaded.stream(asked, generator=seed(), prompt_change="rebuild=2", **LATENTS)
    next(late)
    with pytest.raises(InputError, match=r"\[recache=2\] reaches back to what this stream does not hold"):
        next(late)
    # A chunk after a state that holds none there is one.
    assert len(list(loaded.stream([PROMPT, OTHER], 16, state=chunk, prompt_change="rebuild=1", **LATENTS))) == 2
    late = loaded.stream(iter([PROMPT, OTHER]), 16, state=chunk, prompt_change="rebuild=2", **LATENTS)
    next(late)
    with pytest.raises(InputError, match="rebuild=2: reaches back to chunks that are not held; 1 of this video are"):
        next(late)


def test_prompts_are_asked_for_as_chunks_begin(loaded: LongSanaVideoPipeline) -> None:
    asked = count()

    def prompts() -> Any:
        while True:
            yield f"{PROMPT} {next(asked)}"

    stream = loaded.stream(prompts(), generator=seed(), **SIZE, **CHUNKS)
    for _ in range(2):
        next(stream)
    assert next(asked) == 2


def test_memory_is_constant(loaded: LongSanaVideoPipeline) -> None:
    sizes = []
    for chunk in islice(loaded.stream(PROMPT, generator=seed(), **SIZE, **CHUNKS), 5):
        network, decoder, *_ = chunk.state
        assert decoder is not None
        sizes.append((network.nbytes, decoder.nbytes))
    assert len(set(sizes)) == 1


def test_it_can_be_interrupted(loaded: LongSanaVideoPipeline) -> None:
    frames = []
    for chunk in loaded.stream(PROMPT, generator=seed(), **SIZE, **CHUNKS):
        frames.append(chunk.frames)
        loaded._interrupt = len(frames) == 2
    assert len(frames) == 2


def test_pictures(loaded: LongSanaVideoPipeline) -> None:
    call = CHUNKS | {"output_type": "pil"}
    (video,) = loaded(PROMPT, num_frames=17, generator=seed(), **SIZE, **call).frames
    streamed = [p for c in loaded.stream(PROMPT, 17, generator=seed(), **SIZE, **call) for p in c.frames[0]]
    assert all(np.array_equal(a, b) for a, b in zip(video, streamed, strict=True))


def test_bad_input(loaded: LongSanaVideoPipeline, loaded_base: LongSanaVideoPipeline) -> None:
    (chunk,) = loaded.stream(PROMPT, 5, generator=seed(), **SIZE, **CHUNKS | {"output_type": "latent"})
    for arguments, message in [
        ({"num_frames": 5}, "prompt: missing"),
        ({"prompt": PROMPT, "num_frames": 6}, "num_frames=6"),
        ({"state": chunk.state, "num_frames": 5, "output_type": "latent"}, "grows by multiples of 4"),
        ({"state": chunk.state._replace(latents=None)}, "latents that were not decoded"),
        ({"state": chunk.state, "height": 64, "output_type": "latent"}, "the video that goes on has 32 and 48"),
        ({"prompt": PROMPT, "height": 30}, "height=30"),
        ({"state": chunk.state, "num_frames": 0, "output_type": "latent"}, "grows by multiples of 4"),
        ({"prompt": 3}, "prompt: a int"),
        ({"prompt": [PROMPT, None]}, "prompt: a NoneType"),
        ({"prompt": []}, "there was none"),
        ({"prompt": {PROMPT: OTHER}}, "prompt: a dict; must be a text"),
        ({"prompt": b"text"}, "prompt: a bytes; must be a text"),
        ({"prompt": torch.zeros(2)}, "prompt: a Tensor; must be a text"),
        ({"prompt": [f"{PROMPT}<split>{OTHER}"]}, "a stream takes several prompts as they are"),
        ({"prompt": f"{PROMPT}<split>{OTHER}"}, "a story in a stream without an end; say num_frames"),
    ]:
        generator = seed()
        before = generator.get_state()
        with pytest.raises(InputError, match=message):
            loaded.stream(generator=generator, **arguments)  # at once, not with the first chunk
        assert torch.equal(generator.get_state(), before)
    with pytest.raises(InputError, match=r"generator: a list; a torch\.Generator is needed"):
        loaded.stream(PROMPT, generator=[seed()])
    with pytest.raises(InputError, match="the base model makes whole clips"):
        loaded_base.stream(PROMPT)
    with pytest.raises(InputError, match="there was none"):
        next(loaded.stream(iter([]), **SIZE))


AHEAD: dict[str, Any] = {"height": 64, "width": 96, "chunk_frames": 2, "output_type": "pt"}


def test_a_stream_whose_decoder_looks_ahead(looking_ahead: LongSanaVideoPipeline) -> None:
    """Frames come later, and are the call's to the bit wherever a stream is cut; and diffusers' within rounding."""
    expected = looking_ahead(PROMPT, num_frames=113, generator=seed(), **AHEAD).frames
    chunks = list(islice(looking_ahead.stream(PROMPT, generator=seed(), **AHEAD), 5))
    chunks += looking_ahead.stream(num_frames=113 - 81, state=chunks[-1], **AHEAD)
    assert [chunk.frames.shape[1] for chunk in chunks] == [0, 0, 0, 8, 16, 16, 73]
    assert torch.equal(joined(chunks), expected)
    sizes = {chunk.state.decoder.nbytes for chunk in chunks[3:-1] if chunk.state.decoder is not None}
    assert len(sizes) == 1, "what it remembers does not grow"
    latents = looking_ahead(PROMPT, num_frames=113, generator=seed(), **AHEAD | {"output_type": "latent"}).frames
    whole = LTX2VAE.around(looking_ahead.vae, 1).decode(latents).transpose(1, 2) / 2 + 0.5
    torch.testing.assert_close(expected, whole, atol=2e-5, rtol=0)


@pytest.mark.parametrize("chunk_frames", [1, 3])
@pytest.mark.parametrize("num_frames", [1, 17, 89])
@pytest.mark.parametrize("output_type", ["pt", "np", "pil"])
def test_short_streams(
    looking_ahead: LongSanaVideoPipeline, num_frames: int, chunk_frames: int, output_type: str
) -> None:
    call = AHEAD | {"chunk_frames": chunk_frames, "num_frames": num_frames, "output_type": output_type}
    expected = looking_ahead(PROMPT, generator=seed(), **call).frames
    given = pictures.joined([chunk.frames for chunk in looking_ahead.stream(PROMPT, generator=seed(), **call)])
    assert len(given[0]) == num_frames
    assert all(np.array_equal(a, b) for a, b in zip(given[0], expected[0], strict=True))


def test_a_stream_ends_when_told(looking_ahead: LongSanaVideoPipeline) -> None:
    """After an interrupt, too: what waits in the decoder comes without sampling, and that is the end."""
    chunks = []
    for chunk in looking_ahead.stream(PROMPT, generator=seed(), **AHEAD):
        chunks.append(chunk)
        looking_ahead._interrupt = len(chunks) == 4
    for name, value in (("prompt", OTHER), ("generator", seed())):
        with pytest.raises(InputError, match=f"^{name}: has no meaning with num_frames=0, which samples nothing"):
            looking_ahead.stream(num_frames=0, state=chunks[-1], **AHEAD | {name: value})
    (end,) = looking_ahead.stream(num_frames=0, state=chunks[-1], **AHEAD)
    shown = joined([*chunks, end])
    expected = looking_ahead(PROMPT, num_frames=65, generator=seed(), **AHEAD).frames
    torch.testing.assert_close(shown, expected, atol=2e-5, rtol=0)
    for num_frames in (0, 8, None):
        with pytest.raises(InputError, match="its video has ended"):
            looking_ahead.stream(num_frames=num_frames, state=end, **AHEAD)
    with pytest.raises(InputError, match="grows by multiples of 8"):
        looking_ahead.stream(num_frames=0, state=chunks[-1], **AHEAD | {"output_type": "latent"})
    latents = next(looking_ahead.stream(state=end, **AHEAD | {"output_type": "latent"})).frames
    assert latents.isfinite().all(), "only its decoder has ended"
    other = chunks[0].state.decoder
    assert other is not None
    half = other._replace(features=tuple(feature.bfloat16() for feature in other.features))
    with pytest.raises(InputError, match=r"of a VAE in torch\.bfloat16, this one is in torch\.float32"):
        looking_ahead.stream(state=chunks[0].state._replace(decoder=half), **AHEAD)
