"""A film is absorbed as its latents would be at once, in memory that does not grow, and the video goes on from it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from longsana.chunks import ChunkPlan
from longsana.data.films import frames_used
from longsana.data.prompts import Prompt
from longsana.encoders.geometry import GEOMETRIES
from longsana.flow.noise import PromptNoise
from longsana.flow.schedule import FlowSchedule
from longsana.sampling.captions import Caption, caption_encoder, stacked
from longsana.sampling.continuation import Moment
from longsana.sampling.engine import Engine, Frames
from longsana.sampling.films import absorb_film, film_latents, pieces
from longsana.sampling.sampler import absorb, generate

from .test_continuation import PROMPT, engine, parts

__all__ = ["engine", "parts"]  # fixtures
CHUNK = 4


@pytest.fixture(scope="module")
def captions(engine: Engine) -> list[Caption]:
    texts = (PROMPT, Prompt(2, "a blue square", ("a blue square",), 0, 32, 48))
    with caption_encoder(engine.config, engine.device) as encode:
        return [encode(prompt) for prompt in texts]


def film(frames: int) -> np.ndarray:
    """(F, 32, 48, 3): a ramp that moves."""
    rows, columns = np.mgrid[:32, :48]
    return np.stack([np.stack([5 * columns + 3 * n, 7 * rows, rows + 4 * n], -1) for n in range(frames)]).astype(
        np.uint8
    )


def absorbed(network: Any, vae: Any, captions: list[Caption], pictures: Any, **options: Any) -> tuple[Any, Moment]:
    latents = film_latents(vae, pictures, chunk_frames=CHUNK)
    found: list[Frames] = []
    generator = absorb_film(network, vae, captions, latents, **options)
    try:
        while True:
            found.append(next(generator))
    except StopIteration as end:
        return found, end.value


@pytest.mark.parametrize("frames", [1, 17, 33, 36])
def test_a_film_is_absorbed_chunk_by_chunk(engine: Engine, parts: Any, captions: list[Caption], frames: int) -> None:
    network, vae = parts
    pictures = film(frames)
    found, moment = absorbed(network, vae, captions, pictures)
    used = frames_used(frames, vae.geometry.time_stride)
    whole = torch.from_numpy(pictures[:used]).float().permute(3, 0, 1, 2)[None] / 127.5 - 1
    latents = vae.encode(whole)
    given = torch.cat([part.latents for part in found], dim=2)
    torch.testing.assert_close(given, latents.expand(2, -1, -1, -1, -1), atol=2e-5, rtol=1e-4)
    # The naive run: all of the film's chunks, absorbed under each caption alone.
    for index, caption in enumerate(captions):
        state, text = None, stacked([caption.parts[0]], "cpu")
        for piece in chunks(given):
            state = absorb(network, piece, text, state)
        assert state is not None and moment.network.frames == state.frames == latents.shape[2]
        own = moment.of(index).network
        for one, other in zip(own[:3], state[:3], strict=True):
            torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-3)
    shown = torch.cat([part.pixels for part in found], dim=1)
    assert shown.shape == (2, used, 32, 48, 3) and {part.chunk for part in found} == {-1}
    expected = vae.to_uint8(vae.decode(latents)).int()
    assert (shown[:1].int() - expected).abs().max() <= 1


def chunks(latents: Tensor) -> Iterator[Tensor]:
    start = 0
    while start < latents.shape[2]:
        stop = start + CHUNK + (start == 0)
        yield latents[:1, :, start:stop]
        start = stop


def test_what_is_left_out_of_the_mp4_changes_nothing_else(parts: Any, captions: list[Caption]) -> None:
    (shown, one), (hidden, other) = (absorbed(*parts, captions, film(33), shown=shown) for shown in (True, False))
    assert len(shown) == 2 and not hidden
    assert all(torch.equal(a, b) for a, b in zip(one.network[:3], other.network[:3], strict=True))


def test_its_memory_does_not_grow(parts: Any, captions: list[Caption]) -> None:
    """Pictures are asked for as they are encoded, a chunk at a time; what is kept of them has one size."""
    network, vae = parts
    asked = 0

    def pictures() -> Iterator[np.ndarray]:
        nonlocal asked
        for picture in film(97):
            asked += 1
            yield picture

    waiting = film_latents(vae, pictures(), chunk_frames=CHUNK)
    for index, _ in enumerate(waiting):
        assert asked == min(4 * (CHUNK * (index + 1) + 1) - 3, 97)
    sizes = set()
    for frames in (49, 65, 97):
        _, moment = absorbed(network, vae, captions[:1], film(frames))
        assert moment.decoder is not None and moment.latents is not None
        sizes.add((moment.network.nbytes, moment.decoder.nbytes, moment.latents.untyped_storage().nbytes()))
    assert len(sizes) == 1


def test_the_video_goes_on_from_it(engine: Engine, parts: Any, captions: list[Caption]) -> None:
    """As the one chunk loop does from that state; its chunks begin where the film ends."""
    network, vae = parts
    _, moment = absorbed(network, vae, captions[:1], film(33))
    found = torch.cat([part.latents for part in engine.sample(*parts, [PROMPT], captions[:1], begun=moment)], dim=2)
    schedule = FlowSchedule.from_config(engine.config.scheduler)
    text = network.cache_caption(stacked([captions[0].parts[0]], "cpu"))
    plan = ChunkPlan.split(16, CHUNK)
    naive = generate(
        network,
        schedule,
        [text] * len(plan),
        plan,
        shape=(16, 4, 6),
        rng=PromptNoise([0], [(PROMPT.text, 0)]),
        device="cpu",
        state=moment.network,
    )
    assert torch.equal(found, torch.cat([chunk.latents for chunk in naive], dim=2))


@pytest.mark.parametrize("vae", GEOMETRIES.values(), ids=GEOMETRIES)
@pytest.mark.parametrize("count", [1, 2, 8, 9, 40, 41, 42, 100])
def test_pieces_are_whole_latents(vae: Any, count: int) -> None:
    lengths = [len(piece) for piece in pieces(iter(np.zeros((count, 2, 2, 3), np.uint8)), vae, 3)]
    used = frames_used(count, vae.time_stride)
    assert sum(lengths) == used == vae.pixel_frames(vae.latent_frames(used)) and 0 <= count - used < vae.time_stride
    assert lengths[0] == min(vae.pixel_frames(4), used)
    assert all(length == 3 * vae.time_stride for length in lengths[1:-1])
