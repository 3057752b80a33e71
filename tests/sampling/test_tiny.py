"""Tiny decoders in the engine: at 720p, after a decoder that looks ahead, and films for their encoder."""

from __future__ import annotations

from dataclasses import replace
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch

from longsana.data.prompts import Prompt
from longsana.encoders.geometry import GEOMETRIES
from longsana.runtime.errors import InputError
from longsana.sampling.captions import caption_encoder
from longsana.sampling.checks import check_config, check_weights
from longsana.sampling.continuation import Continuation, restored, vae_mark_of
from longsana.sampling.engine import Engine
from longsana.sampling.films import pieces, whole_pieces
from tests.sampling.pieces import by_chunk
from tests.sampling.test_ltx2 import TEXT, small_720p

PROMPT = Prompt(1, TEXT, (TEXT,), 0, 64, 96)


def test_720p_chunk_by_chunk_and_from_a_state_of_a_decoder_that_looks_ahead(tmp_path: Path) -> None:
    full = small_720p(tmp_path, decoder_causal=False)
    vae = replace(full.vae, decoder="taeltx_2", decoder_pretrained="seeded:1")
    tiny = replace(full, vae=replace(vae, vae_pretrained=str(tmp_path / "none")))
    check_config(tiny)
    check_weights(tiny, sections=("vae",), encodes=False)
    engine = Engine(tiny, "cpu")
    with caption_encoder(engine.config, engine.device) as encode:
        caption = encode(PROMPT)
    network, decoder = engine.load()
    parts = by_chunk(engine.sample(network, decoder, [PROMPT], [caption], wanted=lambda chunk: chunk == 1))
    assert [part.pixels.shape[1] for part in parts] == [9, 16, 16]
    pixels = torch.cat([part.pixels for part in parts], dim=1)
    whole = decoder.to_uint8(decoder.decode(torch.cat([part.latents for part in parts], dim=2)))
    assert (pixels.int() - whole.int()).abs().max() <= 1
    looking = Engine(full, "cpu").load()[1]
    other = by_chunk(engine.sample(network, looking, [PROMPT], [caption], wanted=lambda chunk: chunk == 1))
    after = other[1].after
    assert looking.ahead and after is not None and after.waiting
    state = Continuation(
        *after[:2], 0, TEXT, (64, 96), *after[2:3], waiting=after.waiting, marks=("", vae_mark_of(looking))
    )
    fitted = state.fitted("", vae_mark_of(decoder), "here")
    assert state.decoder is not None and fitted.decoder is None
    assert state.fitted("", vae_mark_of(looking), "here") is state
    moment = restored(fitted.moment, decoder)
    assert moment.waiting == 0, "a causal decoder gives all frames of its latents"
    frames, _ = decoder.decode_stream(parts[2].latents, moment.decoder)
    assert (decoder.to_uint8(frames).int() - parts[2].pixels.int()).abs().max() <= 1


def test_a_missing_vae_is_told_where_something_is_encoded(tmp_path: Path) -> None:
    full = small_720p(tmp_path)
    vae = replace(full.vae, decoder="taeltx_2", decoder_pretrained="seeded:1", vae_pretrained=str(tmp_path / "none"))
    with pytest.raises(InputError, match=r"vae\.vae_pretrained"):
        check_weights(replace(full, vae=vae), sections=("vae",), encodes=True)
    check_weights(replace(full, vae=replace(vae, encoder="tiny")), sections=("vae",), encodes=True)


@pytest.mark.parametrize("name", GEOMETRIES)
@pytest.mark.parametrize("chunk_frames", [1, 3])
def test_films_of_any_length_are_as_many_latents_for_either_encoder(name: str, chunk_frames: int) -> None:
    """Chunk by chunk; the frames that are left out at the end are the same."""
    shape = GEOMETRIES[name]
    stride = shape.time_stride
    for count in range(1, 9 * stride):
        film = [np.full((1, 1, 3), index, np.uint8) for index in range(count)]
        usual = [piece.flatten(1)[:, 0].tolist() for piece in pieces(film, shape, chunk_frames)]
        whole = [piece.flatten(1)[:, 0].tolist() for piece in whole_pieces(film, shape, chunk_frames)]
        assert list(chain(*usual)) == list(chain(*whole))
        given = [len(piece) + (stride - 1) * (not index) for index, piece in enumerate(usual)]
        assert [length // stride for length in given] == [-(-len(piece) // stride) for piece in whole]
