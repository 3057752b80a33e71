"""A stream whose prompts bring pictures: to begin with, and where they cut."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from longsana.data.story import Change, Outline, Placed
from longsana.pipelines.images import places_of
from longsana.pipelines.video import LongSanaVideoChunk, LongSanaVideoPipeline
from longsana.runtime.errors import InputError
from tests.pipelines.repository import OTHER, PROMPT, SIZE

OPTIONS: dict[str, Any] = {"output_type": "latent", "chunk_frames": 2, **SIZE}
PIXELS = [np.random.default_rng(number).integers(0, 256, (32, 48, 3), np.uint8) for number in range(2)]


def seed() -> torch.Generator:
    return torch.Generator().manual_seed(3)


def streamed(
    pipe: LongSanaVideoPipeline, prompt: Any, num_frames: int = 33, **options: Any
) -> list[LongSanaVideoChunk]:
    return list(pipe.stream(prompt, num_frames, generator=seed(), **OPTIONS | options))


def joined(chunks: list[LongSanaVideoChunk]) -> Tensor:
    return torch.cat([chunk.frames for chunk in chunks], dim=2)


@pytest.mark.parametrize("first", ["absorb", "pin"])
def test_prompts_bring_pictures(loaded: LongSanaVideoPipeline, first: str) -> None:
    """From a list and one by one; chunks keep their lengths, and begin with the pictures' latents."""
    items: list[Any] = [
        {"prompt": PROMPT, "image": PIXELS[0]},
        PROMPT,
        {"prompt": f"[cut] {OTHER}", "image": Image.fromarray(PIXELS[1])},
        OTHER,
    ]
    chunks = streamed(loaded, items, image_first=first)
    whole = joined(chunks)
    assert [chunk.frames.shape[2] for chunk in chunks] == [3, 2, 2, 2]
    latents = loaded._vae(1).encode_pictures(PIXELS)
    for start, latent in zip((0, 5), latents, strict=True):
        assert torch.equal(whole[0, :, start : start + 1], latent)
    assert all(not chunk.state.pictures for chunk in chunks), "what is to come nobody knows"

    def one_by_one() -> Iterator[Any]:
        yield from items

    assert torch.equal(joined(streamed(loaded, one_by_one(), image_first=first)), whole)
    assert torch.equal(joined(streamed(loaded, [*items[:2], items[2]], image_first=first)), whole), "the last one stays"
    without = joined(streamed(loaded, [PROMPT, PROMPT, f"[cut] {OTHER}"]))
    assert not torch.equal(whole[:, :, 1:5], without[:, :, 1:5])
    rest = loaded.stream(items[2:], 16, state=chunks[1], output_type="latent", generator=seed())
    assert torch.equal(joined(list(rest)), whole[:, :, 5:]), "a state says how pictures begin their chunks"
    rest = loaded.stream(items[2:3], 8, state=chunks[2], output_type="latent", generator=seed())
    assert torch.equal(joined(list(rest)), whole[:, :, 7:]), "and what was cut to stays"


def test_a_picture_changes_a_prompt_as_words_do(loaded: LongSanaVideoPipeline) -> None:
    again = {"prompt": f"[cut] {PROMPT}", "image": PIXELS[1]}
    whole = joined(streamed(loaded, [PROMPT, again, again, {**again, "image": PIXELS[0]}]))
    latents = loaded._vae(1).encode_pictures(PIXELS)
    assert torch.equal(whole[0, :, 3:4], latents[1]) and torch.equal(whole[0, :, 7:8], latents[0])
    assert not torch.equal(whole[0, :, 5:6], latents[1])


def test_a_text_and_an_endless_stream_begin_with_one(loaded: LongSanaVideoPipeline) -> None:
    """The chunks of a call: the picture is one by itself where it is absorbed."""
    for first, lengths in (("absorb", [1, 2, 2]), ("pin", [3, 2, 2])):
        options = {"image": PIXELS[0], "image_first": first, **OPTIONS}
        made = loaded(PROMPT, num_frames=4 * sum(lengths) - 3, generator=seed(), **options).frames
        stream = loaded.stream(PROMPT, generator=seed(), **options)
        chunks = [next(stream) for _ in lengths]
        assert [chunk.frames.shape[2] for chunk in chunks] == lengths
        assert torch.equal(joined(chunks), made)
        limited = loaded.stream(PROMPT, 4 * sum(lengths) - 3, generator=seed(), **options)
        assert torch.equal(joined(list(limited)), made)


def test_another_story_and_another_picture_after_a_state(loaded: LongSanaVideoPipeline, tmp_path: Path) -> None:
    Image.fromarray(PIXELS[0]).save(tmp_path / "a.png")
    story = f"{PROMPT}[0.5s] | [cut] {OTHER}"
    chunks = streamed(loaded, story, 25, image={1: tmp_path / "a.png"})
    latents = loaded._vae(1).encode_pictures(PIXELS)
    own = joined(list(loaded.stream(num_frames=16, state=chunks[0], output_type="latent")))
    assert torch.equal(own, joined(chunks)[:, :, 3:]) and torch.equal(own[0, :, :1], latents[0])
    other = joined(list(loaded.stream(num_frames=16, state=chunks[0], output_type="latent", image={1: PIXELS[1]})))
    assert torch.equal(other[0, :, :1], latents[1])
    fork = f"{OTHER}[0.5s] | [cut] {PROMPT}"
    forked = list(loaded.stream(fork, 16, state=chunks[0], output_type="latent", image={1: PIXELS[1]}))
    assert torch.equal(joined(forked)[0, :, 2:3], latents[1]) and list(forked[0].state.pictures) == [1]
    film = np.zeros((9, 32, 48, 3), np.uint8)
    after = streamed(loaded, fork, 16, video=film, image={1: PIXELS[1]})
    assert torch.equal(joined(after)[0, :, 5:6], latents[1]) and list(after[0].state.pictures) == [1]
    made = loaded(fork, num_frames=16, video=film, image={1: PIXELS[1]}, generator=seed(), **OPTIONS).frames
    assert torch.equal(made, joined(after))


def test_pictures_that_no_stream_takes(loaded: LongSanaVideoPipeline) -> None:
    picture, film = PIXELS[0], np.zeros((9, 32, 48, 3), np.uint8)
    story = f"{PROMPT}[1s] | [cut] {OTHER}"
    (*_, state) = streamed(loaded, story, 25)
    item: Mapping[str, Any] = {"prompt": PROMPT, "image": picture}
    cases: list[tuple[Any, dict[str, Any], str]] = [
        ([PROMPT, {"prompt": OTHER, "image": picture}], {}, "prompt: brings a picture where the past goes on"),
        ([item], {"video": film}, "prompt: brings a picture where the past goes on"),
        ([{"prompt": "a", "image": picture}], {"state": state}, "prompt: brings a picture where the past goes on"),
        ([{"prompt": f"[cut] {PROMPT}", "image": picture}], {}, r"prompt: \[cut\]: the first has no past"),
        ([{"prompt": PROMPT, "image": 3}], {}, "prompt: its image: a int; must be the path of a picture"),
        ([{"prompt": PROMPT, "picture": picture}], {}, "prompt: a mapping with 'picture'; must be {'prompt': text"),
        ([{"image": picture}], {}, "prompt: a mapping without a prompt"),
        ([{"prompt": story, "image": picture}], {}, r"prompt: parts between ' \| '"),
        (item, {}, "prompt: a dict; must be a text"),
        ([PROMPT], {"image": picture}, "image: beside prompts one by one, which bring their own"),
        (PROMPT, {"image": {1: picture}}, "image: for part 1, where the prompt has 1"),
        (story, {"image": {2: picture}}, "image: for part 2, where a prompt has 2, counted from 0"),
        (story.replace("cut", "keep"), {"image": {1: picture}}, "image: part 2 has a picture and begins with keep"),
        (story, {"image": picture, "video": film}, "image: a picture to begin with, and what"),
        (None, {"image": {0: picture}, "state": state}, "image: a picture to begin with, and what"),
        (None, {"image": {1: picture}, "state": state}, "image: for part 1, which has begun before"),
        (PROMPT, {"image": picture, "num_frames": 1}, "num_frames=1: shows the picture that it begins with alone"),
        (PROMPT, {"image_first": "pin"}, "image_first: has no meaning without image"),
    ]
    for prompt, options, message in cases:
        generator = seed()
        frames = 16 if "state" in options or "video" in options else 25
        options = {"num_frames": frames, "generator": generator, **OPTIONS, **options}
        with pytest.raises(InputError, match=message) as caught:
            loaded.stream(prompt, **options)
        assert "\n" not in str(caught.value) and torch.equal(generator.get_state(), seed().get_state())
    both = [story, f"{PROMPT} | [cut] {OTHER}[1s] | [cut] {PROMPT}"]
    with pytest.raises(InputError, match="stories whose past changes at different places"):
        loaded(both, image={1: picture}, num_frames=33, **OPTIONS)


def test_a_part_begins_at_one_chunk_in_all_prompts() -> None:
    keep, cut = Placed(0), Change("cut")
    one, two = Outline((keep, Placed(2, cut), Placed(4, cut)), 6), Outline((keep, Placed(1), Placed(2, cut)), 6)
    assert places_of([0, 1, 2], [one, one]) == {0: 0, 1: 2, 2: 4}
    with pytest.raises(InputError, match=r"^image: for part 2, which begins at another chunk in another prompt"):
        places_of([2], [one, two])
