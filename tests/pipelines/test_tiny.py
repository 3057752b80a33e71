"""Tiny decoders in the pipeline: a part beside the VAE, or in its place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan
from safetensors.torch import load_file, save_file

from longsana.encoders.vae import WanVAE
from longsana.pipelines.tiny import TinyVideoAutoencoder
from longsana.pipelines.video import LongSanaVideoPipeline
from longsana.runtime.errors import InputError
from longsana.sampling.continuation import Continuation
from tests.pipelines.repository import PROMPT, SIZE, quiet
from tests.pipelines.test_stream import CHUNKS, joined, seed

CALL: dict[str, Any] = {"num_frames": 25, **CHUNKS, **SIZE}
FILM = np.full((9, 32, 48, 3), 90, np.uint8)


@pytest.fixture(scope="module")
def decoder() -> TinyVideoAutoencoder:
    return TinyVideoAutoencoder.from_file("taew2_1", "seeded:3")


@pytest.fixture(scope="module")
def tiny(distilled_folder: Path, decoder: TinyVideoAutoencoder) -> LongSanaVideoPipeline:
    """Beside the VAE."""
    return quiet(distilled_folder, decoder=decoder)


@pytest.fixture(scope="module")
def alone(distilled_folder: Path, decoder: TinyVideoAutoencoder) -> LongSanaVideoPipeline:
    """In the VAE's place."""
    return quiet(distilled_folder, decoder=decoder, vae=None)


def test_latents_are_the_same_and_pictures_are_its_own(
    tiny: LongSanaVideoPipeline,
    alone: LongSanaVideoPipeline,
    loaded: LongSanaVideoPipeline,
    decoder: TinyVideoAutoencoder,
) -> None:
    latents = loaded(PROMPT, generator=seed(), **CALL | {"output_type": "latent"}).frames
    assert torch.equal(tiny(PROMPT, generator=seed(), **CALL | {"output_type": "latent"}).frames, latents)
    expected = decoder(latents).transpose(1, 2)
    for pipe in (tiny, alone):
        frames = pipe(PROMPT, generator=seed(), **CALL).frames
        assert frames.shape == (1, 25, 3, 32, 48)
        torch.testing.assert_close(frames, expected, rtol=0, atol=1e-4)
    assert alone.vae is None


def test_a_stream_is_one_call(alone: LongSanaVideoPipeline) -> None:
    whole = alone(PROMPT, generator=seed(), **CALL).frames
    chunks = list(alone.stream(PROMPT, 25, generator=seed(), **SIZE, **CHUNKS))
    torch.testing.assert_close(joined(chunks), whole, rtol=0, atol=1e-5)
    assert chunks[-1].state.decoder is not None and len(chunks[-1].state.decoder.features) == 9


def test_states(alone: LongSanaVideoPipeline, loaded: LongSanaVideoPipeline, tmp_path: Path, caplog: Any) -> None:
    """By all that the decoder remembers to the bit, by the latents within rounding, with another decoder from them."""
    chunks = list(alone.stream(PROMPT, 25, generator=seed(), **SIZE, **CHUNKS))
    for memory in ("full", "latents"):
        path = tmp_path / f"{memory}.safetensors"
        alone.save_state(chunks[0], path, memory)  # type: ignore[arg-type]
        rest = joined(list(alone.stream(num_frames=16, state=path, **CHUNKS)))
        torch.testing.assert_close(rest, joined(chunks[1:]), rtol=0, atol=0 if memory == "full" else 1e-5)
    saved = Continuation.load(tmp_path / "full.safetensors")
    assert saved.marks[1].startswith("taew2_1:")
    caplog.set_level("INFO")
    full = list(loaded.stream(PROMPT, 25, generator=seed(), **SIZE, **CHUNKS))
    there = joined(list(loaded.stream(num_frames=16, state=tmp_path / "full.safetensors", **CHUNKS)))
    torch.testing.assert_close(there, joined(full[1:]), rtol=0, atol=1e-5)  # of a short video nothing is lost
    assert "of the decoder taew2_1" in caplog.text and "its memory is rebuilt from the last 3 latents" in caplog.text
    loaded.save_state(full[0], tmp_path / "other.safetensors", "full")
    back = joined(list(alone.stream(num_frames=16, state=tmp_path / "other.safetensors", **CHUNKS)))
    torch.testing.assert_close(back, joined(chunks[1:]), rtol=0, atol=1e-5)
    saved._replace(latents=None).save(tmp_path / "bare.safetensors")
    with pytest.raises(InputError, match="no latents to rebuild its memory from; go on with the decoder that made it"):
        loaded.stream(num_frames=16, state=tmp_path / "bare.safetensors", **CHUNKS)


def test_what_is_encoded(
    tiny: LongSanaVideoPipeline, alone: LongSanaVideoPipeline, loaded: LongSanaVideoPipeline, distilled_folder: Path
) -> None:
    """By the VAE where it is, or by the tiny network's own encoder if that is asked for."""
    call = CALL | {"num_frames": 8, "output_type": "latent", "video": FILM}
    given, expected = (pipe(PROMPT, generator=seed(), **call).frames for pipe in (tiny, loaded))
    assert torch.equal(given, expected)
    picture = CALL | {"num_frames": 9, "output_type": "latent", "image": FILM[0]}
    assert torch.equal(
        tiny(PROMPT, generator=seed(), **picture).frames, loaded(PROMPT, generator=seed(), **picture).frames
    )
    for name, wanted in (("video", call), ("image", picture)):
        with pytest.raises(InputError, match=f"^{name}: there is no VAE here to encode it"):
            alone(PROMPT, generator=seed(), **wanted)
    own = quiet(distilled_folder, decoder=tiny.decoder, vae=None, tiny_encoder=True)
    frames = own(PROMPT, generator=seed(), **call).frames
    assert frames.shape == expected.shape and not torch.equal(frames, expected)
    assert own(PROMPT, generator=seed(), **picture).frames.isfinite().all()
    streamed = list(own.stream(PROMPT, 8, generator=seed(), video=FILM, **SIZE, **CHUNKS))
    assert sum(chunk.frames.shape[1] for chunk in streamed) == 17


def test_saved_and_loaded_again(alone: LongSanaVideoPipeline, tmp_path: Path) -> None:
    alone.save_pretrained(tmp_path)
    again = quiet(tmp_path)
    assert again.vae is None and isinstance(again.decoder, TinyVideoAutoencoder)
    assert again.decoder.network.kind.name == "taew2_1"
    call = CALL | {"num_frames": 9}
    first, second = (pipe(PROMPT, generator=seed(), **call).frames for pipe in (alone, again))
    assert torch.equal(first, second)


def test_what_does_not_belong_together_is_refused(
    distilled_folder: Path, loaded: LongSanaVideoPipeline, looking_ahead: LongSanaVideoPipeline
) -> None:
    ltx2 = TinyVideoAutoencoder.from_file("taeltx_2", "seeded:0")
    with pytest.raises(InputError, match="a taeltx_2 decodes latents of LTX2VAE_diffusers, and the VAE is a WanVAE"):
        LongSanaVideoPipeline(loaded.vae, loaded.transformer, decoder=ltx2)
    with pytest.raises(InputError, match="in_channels is 16; latents of a AutoencoderKLLTX2Video have 128"):
        LongSanaVideoPipeline(None, loaded.transformer, decoder=ltx2)
    with pytest.raises(InputError, match="decoder: a Linear; must be a TinyVideoAutoencoder"):
        LongSanaVideoPipeline(loaded.vae, loaded.transformer, decoder=torch.nn.Linear(1, 1))  # type: ignore[arg-type]
    with pytest.raises(InputError, match="tiny_encoder: has no meaning without decoder"):
        LongSanaVideoPipeline(loaded.vae, loaded.transformer, tiny_encoder=True)
    shapes = TinyVideoAutoencoder.from_file("tae_shapes", "seeded:0")
    with pytest.raises(InputError, match=r"^tiny_encoder=True: a tae_shapes has no encoder of its own; leave"):
        LongSanaVideoPipeline(loaded.vae, loaded.transformer, decoder=shapes, tiny_encoder=True)
    with pytest.raises(InputError, match="vae: a NoneType; needed is"):
        LongSanaVideoPipeline(None, loaded.transformer)
    with pytest.raises(InputError, match="kind=taew2_2: must be one of taew2_1"):
        TinyVideoAutoencoder.from_file("taew2_2", "seeded:0")
    ahead = LongSanaVideoPipeline(None, looking_ahead.transformer, decoder=ltx2)
    assert ahead.geometry.time_stride == 8 and ahead._vae(1).ahead == 0


def test_a_decoder_of_another_vaes_latents_is_refused(
    distilled_folder: Path, loaded: LongSanaVideoPipeline, tmp_path: Path
) -> None:
    """Also when it was saved with a pipeline; one that does not say of which they are is taken as it is."""
    shipped = "asset/shapes/vae/tae_shapes.safetensors"
    own = TinyVideoAutoencoder.from_file("tae_shapes", shipped)
    quiet(distilled_folder, decoder=own).save_pretrained(tmp_path)
    again = quiet(tmp_path)
    assert again.decoder.config["latents"] == own.config["latents"] is not None
    other = AutoencoderKLWan.from_config({**loaded.vae.config, "latents_mean": [0.5] * 16})
    published = AutoencoderKLWan(base_dim=8, num_res_blocks=1)
    told = r"^decoder: was trained on latents of another VAE than vae; give its own, or none$"
    for vae in (other, published):
        for decoder in (own, again.decoder):
            with pytest.raises(InputError, match=told):
                LongSanaVideoPipeline(vae, loaded.transformer, decoder=decoder)
        with pytest.raises(InputError, match=told):
            quiet(tmp_path, vae=vae)
    save_file(load_file(shipped), plain := tmp_path / "plain.safetensors")
    for decoder in (TinyVideoAutoencoder.from_file("tae_shapes", str(plain)), TinyVideoAutoencoder("tae_shapes")):
        assert decoder.config["latents"] is None
        LongSanaVideoPipeline(other, loaded.transformer, decoder=decoder)
    LongSanaVideoPipeline(None, loaded.transformer, decoder=own)


def test_a_decoder_with_numbers_that_are_none_is_said(alone: LongSanaVideoPipeline) -> None:
    broken = TinyVideoAutoencoder.from_file("taew2_1", "seeded:3")
    broken.network.decoder[22].bias.data.fill_(torch.inf)  # type: ignore[operator, union-attr]
    pipe = LongSanaVideoPipeline(**{**alone.components, "decoder": broken}, caption_length=48, chi_prompt="none")
    with pytest.raises(FloatingPointError, match="decoded frames are not finite"):
        pipe(PROMPT, generator=seed(), **CALL | {"num_frames": 9})


def test_the_whole_vae_is_still_whole(tiny: LongSanaVideoPipeline) -> None:
    assert isinstance(tiny._vae(1)._whole, WanVAE)  # type: ignore[attr-defined]
