"""Frames leave before the pass that absorbs their chunk; nothing else changes, whenever that pass is made."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import repeat
from typing import Any

import pytest
import torch
from torch import Tensor

from longsana.chunks import ChunkPlan
from longsana.config import load_config
from longsana.data.prompts import Prompt
from longsana.flow.noise import PromptNoise
from longsana.flow.schedule import FlowSchedule
from longsana.runtime.clock import Clock
from longsana.runtime.later import Later
from longsana.sampling.captions import Caption, caption_encoder
from longsana.sampling.engine import Engine, Frames
from longsana.sampling.sampler import generate
from tests.pipelines.repository import shallow
from tests.sampling.pieces import by_chunk

CONFIG = "configs/sana_video_config/longsana/shapes/longsana.yaml"
PROMPT = Prompt(1, "a big red circle moves slowly to the left on black", ("a big red circle",), 0, 32, 48)
SCHEDULE, STEPS = FlowSchedule(7.0, (1000, 727)), 2


class Counting:
    """A network that counts its passes, and those that absorb."""

    def __init__(self, network: Any) -> None:
        self.network, self.passes, self.absorbing = network, 0, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.network, name)

    def __call__(self, x: Tensor, t: Tensor, text: Any, **options: Any) -> Any:
        self.passes += 1
        self.absorbing += int(not t.any())
        return self.network(x, t, text, **options)


# Chunks ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("asks", [True, False], ids=["asked for", "not asked for"])
def test_a_chunk_is_given_before_it_is_absorbed(
    small_config: Any, random_model: Any, random_text: Any, asks: bool
) -> None:
    """One pass more when its state is asked for, or the next chunk; states are the same, and one pass makes each."""
    network, lengths, states = Counting(random_model(small_config())), (3, 2, 2), []
    rng, texts = PromptNoise(3, [("a", 0)]), repeat(random_text(1))
    chunks = generate(
        network, SCHEDULE, (next(texts) for _ in lengths), ChunkPlan(lengths), shape=(4, 4, 6), rng=rng, device="cpu"
    )
    for number, chunk in enumerate(chunks):
        assert (network.passes, network.absorbing) == ((STEPS + 1) * number + STEPS, number)
        if asks:
            assert chunk.state is chunk.state and network.absorbing == number + 1
        states.append(chunk)
    assert network.passes == (STEPS + 1) * 3
    assert [chunk.state and chunk.state.frames for chunk in states] == [3, 5, 7]
    assert network.passes == (STEPS + 1) * 3, "each is made once"


def test_a_state_is_there_after_its_chunks_are_no_longer_asked_for(
    small_config: Any, random_model: Any, random_text: Any
) -> None:
    model, rng = random_model(small_config()), PromptNoise(3, [("a", 0)])
    options: dict[str, Any] = {"shape": (4, 4, 6), "rng": rng, "device": "cpu"}
    text, plan = random_text(1), ChunkPlan((3, 2))
    whole = list(generate(model, SCHEDULE, [text] * 2, plan, **options))
    chunks = generate(model, SCHEDULE, [text] * 2, plan, **options)
    first = next(chunks)
    chunks.close()
    with torch.enable_grad():
        state = first.state
    assert state is not None and whole[0].state is not None
    assert all(torch.equal(a, b) and not a.requires_grad for a, b in zip(state[:3], whole[0].state[:3], strict=True))


# Frames ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def engine() -> Engine:
    settings = ["num_frames=21", "chunk_frames=2", "first_chunk_frames=1", "height=32", "width=48"]
    steps = "scheduler.denoising_step_list=[1000, 727]"
    return Engine(load_config(CONFIG, [*shallow(), *(f"sampling.{one}" for one in settings), steps]), "cpu")


@pytest.fixture(scope="module")
def parts(engine: Engine) -> Any:
    return engine.load()


@pytest.fixture(scope="module")
def caption(engine: Engine) -> Caption:
    with caption_encoder(engine.config, engine.device) as encode:
        return encode(PROMPT)


def test_frames_leave_before_the_absorbing_pass(engine: Engine, parts: Any, caption: Caption) -> None:
    network, clock = Counting(parts[0]), Clock()
    frames = engine.sample(network, parts[1], [PROMPT], [caption], clock, wanted=lambda chunk: chunk == 1)
    for number, part in enumerate(frames):
        assert part.chunk == number and network.absorbing == number and part.pixels.shape[1] > 0
        if number == 1:
            assert "absorb" in clock.seconds()
            assert part.after is not None and part.after.network.frames == 3 and network.absorbing == 2
    assert (number, network.absorbing) == (3, 4), "chunks of 1, 2, 2, 1 latents"
    assert clock.seconds().keys() == {"denoise", "absorb", "decode"}


def test_who_stops_after_the_frames_pays_no_pass_for_the_state(engine: Engine, parts: Any, caption: Caption) -> None:
    network = Counting(parts[0])
    frames = engine.sample(network, parts[1], [PROMPT], [caption], wanted=lambda chunk: True)
    first = next(frames)
    assert isinstance(frames, Iterator) and first.pixels.shape[1] == 1
    frames.close()  # type: ignore[attr-defined]
    assert (network.passes, network.absorbing) == (STEPS, 0)
    assert first.after is not None and network.absorbing == 1, "and may still ask for it"


def test_a_state_is_the_same_whenever_it_is_asked_for(engine: Engine, parts: Any, caption: Caption) -> None:
    """With the frames, as the batch command does; after all of them; and of both the video goes on to the bit."""

    def sampled(ask: bool) -> list[Frames]:
        found = []
        for part in engine.sample(*parts, [PROMPT], [caption], wanted=lambda chunk: True):
            assert not ask or part.after is not None
            found.append(part)
        return found

    asked, not_asked = sampled(True), sampled(False)
    for one, other in zip(asked, not_asked, strict=True):
        assert torch.equal(one.pixels, other.pixels) and torch.equal(one.latents, other.latents)
        assert one.after is not None and other.after is not None
        assert all(torch.equal(a, b) for a, b in zip(one.after.network[:3], other.after.network[:3], strict=True))
        assert one.after.decoder is not None and other.after.decoder is not None
        pairs = zip(one.after.decoder.features, other.after.decoder.features, strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


def test_all_passes_are_made_to_the_end_where_others_take_part(engine: Engine, parts: Any, caption: Caption) -> None:
    class Broken:
        def __init__(self, decoder: Any) -> None:
            self.decoder = decoder

        def __getattr__(self, name: str) -> Any:
            return getattr(self.decoder, name)

        def decode_stream(self, *arguments: Any, **options: Any) -> Any:
            frames, cache = self.decoder.decode_stream(*arguments, **options)
            return frames * torch.nan, cache

    network: Any = Counting(parts[0])
    for to_the_end, passes in ((True, 4 * (STEPS + 1)), (False, STEPS)):
        network.passes = 0
        with pytest.raises(FloatingPointError):
            list(engine.sample(network, Broken(parts[1]), [PROMPT], [caption], to_the_end=to_the_end))  # type: ignore[arg-type]
        assert network.passes == passes


@pytest.mark.parametrize("decoder", ["tae_shapes", "full"])
@pytest.mark.parametrize("latents_per_call", [1, 2, 3])
def test_the_first_chunk_leaves_group_by_group(
    parts: Any, caption: Caption, latents_per_call: int, decoder: str
) -> None:
    """Frames of a chunk of 5 latents, latents 0 and 1 first; all are those of one call for each chunk, to the bit."""
    settings = ["num_frames=37", "chunk_frames=4", "first_chunk_frames=5", "height=32", "width=48"]
    changes = ["scheduler.denoising_step_list=[1000, 727]", f"vae.latents_per_call={latents_per_call}"]
    changes.append(f"vae.decoder={decoder}")
    engine = Engine(load_config(CONFIG, [*shallow(), *(f"sampling.{one}" for one in settings), *changes]), "cpu")
    network, vae = Counting(parts[0]), engine.load_decoder()
    found: list[Frames] = []
    for piece in engine.sample(network, vae, [PROMPT], [caption], wanted=lambda chunk: chunk == 0):  # type: ignore[arg-type]
        assert piece.chunk > 0 or network.passes == STEPS, "all of them before it is absorbed"
        found.append(piece)
    sizes = {1: [1, 4, 4, 4, 4], 2: [1, 4, 4, 8], 3: [1, 4, 8, 4]}[latents_per_call]
    assert [piece.pixels.shape[1] for piece in found] == [*sizes, 16, 4]
    assert [piece.latents.shape[2] for piece in found] == [*[0] * (len(sizes) - 1), 5, 4, 1]
    chunks, cache = by_chunk(found), None
    for number, chunk in enumerate(chunks):
        frames, cache = vae.decode_stream(chunk.latents, cache, more=number < 2)
        assert torch.equal(vae.to_uint8(frames), chunk.pixels)
        if number == 0:
            assert chunk.after is not None and chunk.after.decoder is not None
            assert all(torch.equal(a, b) for a, b in zip(chunk.after.decoder.features, cache.features, strict=True))


def test_a_value_that_is_made_later_is_made_once_and_what_it_is_made_of_is_gone() -> None:
    tries: list[int] = []

    def make(kept: object) -> int:
        tries.append(1)
        if len(tries) == 1:
            raise ValueError("not yet")
        return 7

    later = Later(lambda: make(object()))
    with pytest.raises(ValueError, match="not yet"):
        later()
    assert (later(), later(), len(tries), later._make) == (7, 7, 2, None)
