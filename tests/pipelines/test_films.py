"""Films and saved states in the pipeline: those of the batch command, and streams that go on from them."""

from __future__ import annotations

import dataclasses
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from longsana.data.prompts import Prompt
from longsana.data.story import Change
from longsana.inference.beginnings import Beginning, prompt_of
from longsana.pipelines.video import LongSanaVideoPipeline
from longsana.runtime.errors import InputError
from longsana.runtime.video import VideoWriter
from longsana.sampling.captions import caption_encoder
from longsana.sampling.continuation import Continuation, mark_of, vae_mark_of
from longsana.sampling.engine import Engine
from longsana.sampling.films import absorb_film, film_latents
from tests.pipelines.repository import OTHER, PROMPT, SIZE, quiet, shapes_config, shapes_repository
from tests.pipelines.test_stream import AHEAD, CHUNKS, joined, seed
from tests.sampling.pieces import by_chunk


@pytest.fixture(scope="module")
def film() -> np.ndarray:
    pictures = np.full((23, 32, 48, 3), 90, np.uint8)
    for index in range(23):
        pictures[index, 8:20, index : index + 12] = (200, 60, 40)
    return pictures


def test_a_file_is_the_state(loaded: LongSanaVideoPipeline, tmp_path: Path) -> None:
    """Full: frames to the bit; by latents of a short video too."""
    whole = list(loaded.stream(PROMPT, 25, generator=seed(), **SIZE, **CHUNKS))
    for memory in ("full", "latents"):
        loaded.save_state(whole[0], tmp_path / f"{memory}.safetensors", memory)  # type: ignore[arg-type]
        rest = list(loaded.stream(num_frames=16, state=tmp_path / f"{memory}.safetensors", **CHUNKS))
        assert torch.equal(joined(rest), joined(whole[1:]))
        assert all(
            torch.equal(one, other)
            for one, other in zip(rest[-1].state.network[:3], whole[-1].state.network[:3], strict=True)
        )
    assert (tmp_path / "latents.safetensors").stat().st_size < (tmp_path / "full.safetensors").stat().st_size
    fork = next(loaded.stream(OTHER, state=str(tmp_path / "full.safetensors"), **CHUNKS))
    assert not torch.equal(fork.frames, whole[1].frames)


def test_a_state_of_the_batch_command(loaded: LongSanaVideoPipeline, tmp_path: Path) -> None:
    """Sampled by the engine, gone on from here, to the bit: network and fingerprints are the same."""
    config = shapes_config(**{"sampling.num_frames": 25, "sampling.chunk_frames": 2})
    engine, prompt = Engine(config, "cpu"), Prompt(1, PROMPT, (PROMPT,), 3, 32, 48)
    with caption_encoder(config, engine.device) as encode:
        caption = encode(prompt)
    network, vae = engine.load()
    found = by_chunk(engine.sample(network, vae, [prompt], [caption], wanted=lambda chunk: chunk == 0))
    after = found[0].after
    assert after is not None
    marks = mark_of(network), vae_mark_of(vae)
    state = Continuation(after.network, after.decoder, 0, PROMPT, (32, 48), after.latents, 3, 1, (3, 2, 2), 0, marks)
    state.save(tmp_path / "state.safetensors")
    call = CHUNKS | {"num_inference_steps": None, "output_type": "latent"}
    rest = loaded.stream(num_frames=16, state=tmp_path / "state.safetensors", **call)
    expected = torch.cat([part.latents for part in found[1:]], dim=2)
    assert torch.equal(torch.cat([chunk.frames for chunk in rest], dim=2), expected)


def test_a_film_is_that_of_the_engine(loaded: LongSanaVideoPipeline, film: np.ndarray) -> None:
    config = shapes_config(**{"sampling.chunk_frames": 2})
    engine = Engine(config, "cpu")
    with caption_encoder(config, engine.device) as encode:
        caption = encode(Prompt(1, PROMPT, (PROMPT,), 0, 32, 48))
    network, vae = engine.load()
    absorbing = absorb_film(network, vae, [caption], film_latents(vae, film, chunk_frames=2))
    while True:
        try:
            next(absorbing)
        except StopIteration as end:
            expected = end.value
            break
    chunks = list(islice(loaded.stream(PROMPT, video=film, generator=seed(), **SIZE, **CHUNKS), 4))
    assert [chunk.frames.shape[1] for chunk in chunks] == [9, 8, 4, 8], "21 frames of 23 fill latents"
    own = chunks[2].state.network
    assert own.frames == 6 and all(torch.equal(a, b) for a, b in zip(own[:3], expected.network[:3], strict=True))


def test_a_film_in_all_its_forms(loaded: LongSanaVideoPipeline, film: np.ndarray, tmp_path: Path) -> None:
    """Pictures of PIL are the array; a file differs by its compression; a call is the stream."""
    call = {**SIZE, **CHUNKS}
    chunks = list(loaded.stream(PROMPT, 16, video=film, generator=seed(), **call))
    whole = joined(chunks)
    assert whole.shape[1] == 21 + 16
    pictures = [Image.fromarray(picture) for picture in film]
    assert torch.equal(joined(list(loaded.stream(PROMPT, 16, video=pictures, generator=seed(), **call))), whole)
    at_once = loaded(PROMPT, num_frames=16, video=film, generator=seed(), **call).frames
    assert torch.equal(at_once, whole)
    new = loaded(PROMPT, num_frames=16, video=film, generator=seed(), new_frames_only=True, **call).frames
    assert torch.equal(new, whole[:, 21:])
    streamed = list(loaded.stream(PROMPT, 16, video=film, generator=seed(), new_frames_only=True, **call))
    assert torch.equal(joined(streamed), new)
    rest = list(loaded.stream(num_frames=16, state=chunks[2], **call))
    assert torch.equal(joined(rest), new), "a film's state is one to go on from"
    with VideoWriter(tmp_path / "film.mp4", 16.0, 32, 48, crf=0, preset="ultrafast", threads=1) as writer:
        writer.append(film)
    read = loaded(PROMPT, num_frames=16, video=tmp_path / "film.mp4", generator=seed(), **call).frames
    assert read.shape == whole.shape and (read[:, :21] - whole[:, :21]).abs().mean() < 0.02
    picture = next(loaded.stream(PROMPT, video=pictures[0], generator=seed(), **call))
    assert picture.frames.shape[1] == 1
    latent = call | {"output_type": "latent"}
    given = torch.cat([c.frames for c in loaded.stream(PROMPT, 16, video=film, generator=seed(), **latent)], dim=2)
    assert torch.equal(loaded(PROMPT, num_frames=16, video=film, generator=seed(), **latent).frames, given)
    assert given.shape[2] == 6 + 4


def test_the_command_does_not_go_on_within_a_transition(loaded: LongSanaVideoPipeline) -> None:
    """Which it would leave out; and a story that begins after a film is placed as in the stream."""
    options: dict[str, Any] = SIZE | CHUNKS | {"output_type": "latent"}
    *_, chunk = loaded.stream([PROMPT, OTHER], 17, transition_chunks=2, generator=seed(), **options)
    config = shapes_config(**{"sampling.transition_chunks": 2})
    prompt, beginning = prompt_of(chunk.state, config), Beginning(Path("its.state"), state=chunk.state)
    assert (prompt.text, prompt.parts) == (OTHER, (OTHER,))
    with pytest.raises(InputError, match=r"^its\.state: of a stream, in the middle of a transition; go on"):
        beginning.outline(prompt, config)
    assert beginning.outline(dataclasses.replace(prompt, text=PROMPT), config).changes == {}
    film = np.zeros((9, 32, 48, 3), np.uint8)
    story = f"{PROMPT}[1s] | [rebuild=2] {OTHER}"
    first = next(loaded.stream(story, 32, video=film, generator=seed(), **options))
    placed = Beginning(Path("film"), state=first.state).outline(
        prompt_of(first.state, config), shapes_config(**{"sampling.num_frames": 33, "sampling.chunk_frames": 2})
    )
    assert placed.changes == {2: Change("rebuild", 2)} and first.state.plan == (2, 2, 2, 2)


def test_a_picture_first_in_all_its_forms(loaded_base: LongSanaVideoPipeline, tmp_path: Path) -> None:
    """Of the base model; one for all, or one for each, whatever stands beside it."""
    pixels = np.random.default_rng(0).integers(0, 256, (32, 60, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    call: dict[str, Any] = {"num_frames": 9, "num_inference_steps": 2, "output_type": "latent", **SIZE}

    def made(image: Any, prompt: Any = PROMPT, **more: Any) -> torch.Tensor:
        frames: torch.Tensor = loaded_base(prompt, image=image, generator=seed(), **call, **more).frames
        return frames

    one = made(pixels)
    assert torch.equal(made(tmp_path / "a.png"), one) and torch.equal(made(str(tmp_path / "a.png")), one)
    assert torch.equal(made(Image.fromarray(pixels)), one)
    stretched = made(pixels, image_fit="stretch")
    assert not torch.equal(stretched[:, :, :1], one[:, :, :1])
    both = made([pixels, 255 - pixels], [PROMPT, OTHER])
    assert torch.equal(both[:1, :, :1], one[:, :, :1]) and not torch.equal(both[1:, :, :1], one[:, :, :1])
    assert torch.equal(made(pixels, [PROMPT, OTHER])[1:, :, :1], one[:, :, :1])


def test_longsana_absorbs_a_picture_as_a_film_of_one_frame(loaded: LongSanaVideoPipeline) -> None:
    """To the bit, a story after it too; pinned, the video begins with it as well."""
    pixels = np.random.default_rng(0).integers(0, 256, (32, 48, 3), np.uint8)
    story = f"{PROMPT}[1s] | [rebuild=2] {OTHER}"
    call: dict[str, Any] = SIZE | CHUNKS | {"output_type": "latent"}
    for prompt in (PROMPT, story):
        own = loaded(prompt, image=pixels, image_first="absorb", num_frames=33, generator=seed(), **call).frames
        assert torch.equal(own[:, :, :1], loaded._vae(1).encode_pictures([pixels]))
        if prompt == PROMPT:
            film = loaded(prompt, video=pixels[None], num_frames=32, generator=seed(), **call).frames
            assert torch.equal(own, film)
    pinned = loaded(PROMPT, image=pixels, num_frames=33, generator=seed(), **call).frames  # as the default is
    without = loaded(PROMPT, num_frames=33, generator=seed(), **call).frames
    assert torch.equal(pinned[:, :, :1], own[:, :, :1]) and not torch.equal(pinned[:, :, 1:], without[:, :, 1:])
    frames = loaded(PROMPT, image=pixels, num_frames=33, generator=seed(), **call | {"output_type": "pt"}).frames
    assert frames.shape[1] == 33 and loaded.num_timesteps == 2 * 4


def test_pictures_that_nothing_can_begin_with(
    loaded: LongSanaVideoPipeline, loaded_base: LongSanaVideoPipeline, tmp_path: Path
) -> None:
    grey = np.zeros((8, 8), np.uint8)
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8))
    noise.save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:2000])
    noise.save(tmp_path / "film.gif", save_all=True, append_images=[Image.new("RGB", (60, 40))])
    lazy, film = Image.open(tmp_path / "cut.png"), Image.open(tmp_path / "film.gif")  # no pixel has been read yet
    cases: list[tuple[Any, dict[str, Any], str]] = [
        (loaded, {"image": grey, "video": np.zeros((9, 8, 8, 3), np.uint8)}, "video: has no meaning with image"),
        (
            loaded,
            {"image": Image.new("RGB", (8, 8)), "num_frames": 1},
            "num_frames=1: shows the picture that it begins",
        ),
        (loaded_base, {"image": Image.new("RGB", (8, 8)), "image_first": "pin"}, "image_first: has no meaning for the"),
        (loaded_base, {"image": grey}, r"image: an array of uint8 and shape \(8, 8\); must be uint8 \(H, W, 3\)"),
        (loaded_base, {"image": 3}, "image: a int; must be the path of a picture"),
        (loaded_base, {"image": [tmp_path / "a", tmp_path / "b"]}, "image: 2 for 1 prompts; give one for all"),
        (loaded_base, {"image": tmp_path / "none.png"}, "image: .*none.png: no such picture"),
        (loaded_base, {"image": Image.new("RGB", (0, 8))}, "image: a picture of 8x0, which shows nothing"),
        (loaded_base, {"image": lazy}, "image: cannot be read as a picture"),
        (loaded_base, {"image": film}, "image: a film or a file of 2 pictures"),
        (loaded_base, {"image_fit": "cover"}, "image_fit: has no meaning without image"),
        (loaded_base, {"image": grey, "image_fit": "crop"}, "image_fit=crop: must be one of cover, stretch"),
    ]
    for pipe, arguments, message in cases:
        generator = seed()
        before = generator.get_state()
        with pytest.raises(InputError, match=message) as caught:
            pipe(PROMPT, generator=generator, **SIZE, **arguments)
        assert "\n" not in str(caught.value) and torch.equal(generator.get_state(), before)


def test_a_picture_in_memory_lies_as_its_file_does(loaded: LongSanaVideoPipeline, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)
    picture, exif = Image.fromarray(pixels), Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    picture.save(tmp_path / "turned.png", exif=exif)
    options = {"num_frames": 8, "generator": None, "output_type": "latent", **SIZE}
    with Image.open(tmp_path / "turned.png") as opened:
        found = [
            loaded(PROMPT, video=video, **options | {"generator": torch.Generator().manual_seed(1)}).frames
            for video in (tmp_path / "turned.png", opened, picture)
        ]
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


def test_two_prompts_go_on_from_one_film(loaded: LongSanaVideoPipeline, film: np.ndarray) -> None:
    frames = loaded([PROMPT, OTHER], num_frames=8, video=film, generator=seed(), **SIZE, **CHUNKS).frames
    assert frames.shape[:2] == (2, 29)
    torch.testing.assert_close(frames[0, :21], frames[1, :21], atol=1e-5, rtol=0)
    assert not torch.allclose(frames[0, 21:], frames[1, 21:], atol=0.05)


def test_a_decoder_that_looks_ahead(looking_ahead: LongSanaVideoPipeline) -> None:
    """The film's last frames come with the first new ones; or are left out with the rest of it."""
    film = np.random.default_rng(0).integers(0, 256, (33, 64, 96, 3), dtype=np.uint8)
    call = {**AHEAD, "video": film, "num_frames": 64}
    whole = looking_ahead(PROMPT, generator=seed(), **call).frames
    assert whole.shape[1] == 33 + 64
    assert torch.equal(joined(list(looking_ahead.stream(PROMPT, generator=seed(), **call))), whole)
    new = joined(list(looking_ahead.stream(PROMPT, generator=seed(), new_frames_only=True, **call)))
    assert torch.equal(new, whole[:, 33:])


def test_what_cannot_be_gone_on_from(
    loaded: LongSanaVideoPipeline, loaded_base: LongSanaVideoPipeline, film: np.ndarray, tmp_path: Path
) -> None:
    (chunk,) = loaded.stream(PROMPT, 5, generator=seed(), **SIZE, **CHUNKS)
    with pytest.raises(InputError, match=r"^video: beside a state"):
        loaded.stream(PROMPT, state=chunk, video=film)
    with pytest.raises(InputError, match=r"^video: the base model"):
        loaded_base(PROMPT, video=film, **SIZE)
    with pytest.raises(InputError, match=r"^new_frames_only: has no meaning without video"):
        loaded.stream(PROMPT, new_frames_only=True)
    with pytest.raises(InputError, match="num_frames=9: a video that goes on grows by multiples of 4"):
        loaded(PROMPT, video=film, num_frames=9, **SIZE)
    (tmp_path / "film.mp4").write_bytes(b"none")
    with pytest.raises(InputError, match=r"^video: .*film\.mp4: cannot be read as a film or a picture"):
        loaded(PROMPT, video=tmp_path / "film.mp4", **SIZE)
    with pytest.raises(InputError, match=r"^latents: has no meaning with video"):
        loaded(PROMPT, video=film, num_frames=8, latents=torch.zeros(1, 16, 2, 4, 6), **SIZE)
    with pytest.raises(InputError, match=r"^memory=some: must be one of latents, full"):
        loaded.save_state(chunk, tmp_path / "a.safetensors", "some")  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"^state: a int"):
        loaded.save_state(3, tmp_path / "a.safetensors")  # type: ignore[arg-type]


def test_a_state_of_another_transformer(loaded: LongSanaVideoPipeline, tmp_path: Path) -> None:
    (chunk,) = loaded.stream(PROMPT, 5, generator=seed(), **SIZE, **CHUNKS)
    loaded.save_state(chunk, tmp_path / "a.safetensors")
    other: Any = quiet(shapes_repository(tmp_path / "repository"))
    next(other.stream(state=tmp_path / "a.safetensors", **CHUNKS))  # the same one
    with torch.no_grad():
        other.transformer.network.blocks[0].attn.qkv.weight.mul_(1.1)
    with pytest.raises(InputError, match=r"^state: of another network"):
        other.stream(state=tmp_path / "a.safetensors", **CHUNKS)
    (tmp_path / "b.safetensors").write_bytes((tmp_path / "a.safetensors").read_bytes()[:-4])
    with pytest.raises(InputError, match=r"b\.safetensors: not a saved state of a video, or damaged"):
        loaded.stream(state=tmp_path / "b.safetensors", **CHUNKS)


def test_the_length_of_a_chunk_is_the_pipelines(tmp_path: Path) -> None:
    """As the published documentation loads it."""
    repository = shapes_repository(tmp_path / "repository")
    pipe = quiet(repository, base_chunk_frames=2, num_cached_blocks=2)
    assert pipe.transformer.network.past.window == 2
    call = {"num_inference_steps": 2, "output_type": "pt", **SIZE}
    chunks = list(pipe.stream(PROMPT, 25, generator=seed(), **call))
    assert [chunk.frames.shape[1] for chunk in chunks] == [9, 8, 8]
    assert torch.equal(joined(chunks), pipe(PROMPT, num_frames=25, generator=seed(), **call).frames)
    whole = pipe(PROMPT, num_frames=25, generator=seed(), chunk_frames=7, **call).frames
    assert not torch.equal(joined(chunks), whole), "a call may say another"
    pipe.save_pretrained(tmp_path / "saved")
    assert quiet(tmp_path / "saved").config["base_chunk_frames"] == 2
    with pytest.raises(InputError, match=r"^base_chunk_frames=0"):
        quiet(repository, base_chunk_frames=0)
