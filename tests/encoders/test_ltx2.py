"""The LTX-2 VAE: a stream is the clip, and its files come whole or not at all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLLTX2Video
from torch import Tensor, nn

from longsana.chunks import ChunkPlan
from longsana.config import VAEConfig
from longsana.encoders import convolution, ltx2_decoder
from longsana.encoders.geometry import GEOMETRIES
from longsana.encoders.loading import load_vae
from longsana.encoders.vae import LTX2VAE
from longsana.evaluation.measures import boundaries, measure, seam_index
from longsana.ops import FUSED
from longsana.ops.dispatch import fused_twin
from longsana.runtime.errors import InputError
from longsana.training.memory import LiveBytes
from tests.encoders.streaming import (
    assert_memory_is_taken_over,
    assert_nothing_is_transposed,
    draw,
    encoded_in_pieces,
    psnr,
    stream,
)

SMALL: dict[str, Any] = {
    "block_out_channels": (8, 8, 16, 16),
    "layers_per_block": (1, 1, 1, 1, 1),
    "decoder_block_out_channels": (8, 16, 32),
    "decoder_layers_per_block": (1, 2, 1, 1),
    "scaling_factor": 0.8,
}
"""A narrow VAE with the published strides and latents."""
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROUNDING = {"atol": 2e-5, "rtol": 0}  # of float32, between two orders of summing


def write(folder: Path, **changes: Any) -> str:
    """A diffusers folder with random weights, under which activations keep their size."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoencoderKLLTX2Video(**SMALL | changes)
        for name, weight in model.named_parameters():
            fan_in = weight[0].numel() if weight.dim() > 1 else 100
            weight.data.normal_(1.0 if "norm" in name and weight.dim() == 1 else 0.0, fan_in**-0.5)
        model.latents_mean.normal_()
        model.latents_std.uniform_(0.5, 2)
    model.save_pretrained(folder)
    return str(folder)


def load(source: str, latents_per_call: int = 1, dtype: torch.dtype = torch.float32) -> LTX2VAE:
    config = VAEConfig(vae_type="LTX2VAE_diffusers", vae_pretrained=source, latents_per_call=latents_per_call)
    vae = load_vae(config, torch.device("cpu"), dtype)
    assert isinstance(vae, LTX2VAE)
    return vae


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write(tmp_path_factory.mktemp("ltx2"))


@pytest.fixture(scope="module")
def vae(source: str) -> LTX2VAE:
    return load(source)


def clip(frames: int, height: int = 64, width: int = 96) -> Tensor:
    return draw(1, 3, frames, height, width).clamp(-1, 1)


@pytest.mark.parametrize("lengths", [(3, 2), (1, 1, 1), (4,), (2, 1, 2)])
def test_streaming_equals_one_shot_to_the_bit(vae: LTX2VAE, lengths: tuple[int, ...]) -> None:
    latents = draw(1, 128, sum(lengths), 2, 3)
    frames, cache = stream(vae, latents, lengths)
    assert torch.equal(frames, vae.decode_stream(latents)[0])
    # Channels-last convolutions sum in another order than diffusers': the largest of 300,000 numbers is 2.5e-5 off.
    torch.testing.assert_close(frames, vae.decode(latents), atol=3e-5, rtol=0)
    assert frames.shape == (1, 3, 8 * sum(lengths) - 7, 64, 96)
    assert cache.latents == sum(lengths)
    assert frames.std() > 0.1 and (frames.abs() < 1).float().mean() > 0.5, "not all of it is clamped"


@pytest.mark.parametrize("latents_per_call", [2, 3])
def test_groups_differ_by_rounding_alone(source: str, latents_per_call: int) -> None:
    latents = draw(2, 128, 6, 2, 2)
    vae = load(source, latents_per_call)
    frames, _ = stream(vae, latents, (4, 2))
    torch.testing.assert_close(frames, vae.decode(latents), **ROUNDING)


def test_memory_is_a_value_of_one_size(vae: LTX2VAE) -> None:
    latents = draw(1, 128, 5, 2, 2)
    _, cache = vae.decode_stream(latents[:, :, :2])
    before = [feature.clone() for feature in cache.features]
    first, after = vae.decode_stream(latents[:, :, 2:], cache)
    again, _ = vae.decode_stream(latents[:, :, 2:], cache)
    assert torch.equal(first, again)
    assert all(torch.equal(a, b) for a, b in zip(before, cache.features, strict=True))
    assert after.nbytes == cache.nbytes


def test_latents_are_normalised_with_the_weights_own_statistics(vae: LTX2VAE) -> None:
    model, frames = vae.model, clip(17)
    raw = model.encode(frames).latent_dist.mean
    latents = vae.encode(frames)
    mean, std = (part.view(1, -1, 1, 1, 1) for part in (model.latents_mean, model.latents_std))
    torch.testing.assert_close(latents, (raw - mean) * 0.8 / std)
    assert latents.shape == (1, 128, 3, 2, 3)
    torch.testing.assert_close(vae.decode(latents), model.decode(raw).sample.clamp(-1, 1), **ROUNDING)


def test_encoding_is_causal_and_refuses_what_would_be_cut_off(vae: LTX2VAE) -> None:
    frames = clip(17)
    torch.testing.assert_close(vae.encode(frames)[:, :, :2], vae.encode(frames[:, :, :9]), **ROUNDING)
    with pytest.raises(InputError, match="8n\\+1 for this VAE; nearest are 9 and 17"):
        vae.encode(clip(12))
    with pytest.raises(InputError, match="height=48: must be a multiple of 32 and at least 64; the nearest is 64"):
        vae.encode(clip(9, height=48))


@pytest.mark.parametrize("lengths", [(25, 1, 2), (1, 1, 1, 3, 18, 2), pytest.param((1,) * 26, marks=pytest.mark.slow)])
def test_a_film_is_encoded_as_a_stream(vae: LTX2VAE, lengths: tuple[int, ...]) -> None:
    """Latents after 23 others, too, which is as far as this encoder looks back."""
    film = clip(8 * sum(lengths) - 7, width=64)
    latents, cache = encoded_in_pieces(vae, film, lengths)
    torch.testing.assert_close(latents, vae.encode(film), **ROUNDING)
    reach = ltx2_decoder.encoder_reach(vae.model)
    assert reach < sum(lengths) - lengths[-1] and cache.features[0].shape[2] == 8 * reach + 1


def test_as_far_as_the_encoder_looks_back(vae: LTX2VAE) -> None:
    reach = ltx2_decoder.encoder_reach(vae.model)
    film = clip(8 * (reach + 1) + 1)
    film.requires_grad_(True)
    vae._posterior_mean(film)[:, :, -1].sum().backward()
    assert film.grad is not None
    touched = film.grad.abs().amax(dim=(0, 1, 3, 4)).nonzero().min()
    assert 8 < touched <= 24, "all frames that count, and few more than those"


def test_the_frame_that_leads_a_stretch(vae: LTX2VAE) -> None:
    latents = draw(1, 128, 3, 2, 2)
    lead, cache = vae.overlap_latent(latents)
    assert torch.equal(lead, vae.encode(vae.decode_stream(latents)[0][:, :, -1:]))
    assert cache.latents == 3


def test_low_precision_keeps_the_statistics(source: str, vae: LTX2VAE) -> None:
    low = load(source, dtype=torch.bfloat16)
    assert all(weight.dtype == torch.bfloat16 for weight in low.model.parameters())
    assert torch.equal(low.model.latents_std, vae.model.latents_std)
    latents = draw(1, 128, 3, 2, 2)
    assert psnr(low.decode_stream(latents)[0], vae.decode_stream(latents)[0]) > 30


def test_a_pipelines_folder(source: str, tmp_path: Path, vae: LTX2VAE) -> None:
    """As published: the VAE is one part of a repository."""
    (tmp_path / "vae").symlink_to(source)
    (tmp_path / "model_index.json").write_text("{}")
    latents = draw(1, 128, 2, 2, 2)
    assert torch.equal(load(str(tmp_path)).decode(latents), vae.decode(latents))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"encoder_causal": False}, "depend on the frames after it"),
        ({"decoder_inject_noise": (False, True, False, False)}, "a timestep or noise"),
        ({"latent_channels": 64}, "needed is VAEGeometry"),
        ({"patch_size": 2}, "space_stride=16"),
    ],
)
def test_what_cannot_be_used_is_refused(source: str, tmp_path: Path, changes: dict[str, Any], says: str) -> None:
    values = json.loads((Path(source) / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(values | changes))
    with pytest.raises(InputError, match=says):
        load(f"seeded:{tmp_path}")


@pytest.fixture(scope="module")
def looking_ahead(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write(tmp_path_factory.mktemp("ahead"), decoder_causal=False, decoder_spatial_padding_mode="zeros")


@pytest.mark.parametrize("latents_per_call", [1, 3])
@pytest.mark.parametrize("lengths", [(20,), (1,), (2, 1, 9, 8), (1, 19)])
def test_a_decoder_that_looks_ahead_is_exact(
    looking_ahead: str, latents_per_call: int, lengths: tuple[int, ...]
) -> None:
    """Frames come later, as many as the receptive field says, and are those of the whole clip: no seam, 100 dB."""
    vae, count = load(looking_ahead, latents_per_call), sum(lengths)
    latents = draw(2, 128, count, 2, 3)
    expected, pieces, cache, done = vae.decode(latents), [], None, 0
    for piece in latents.split(list(lengths), dim=2):
        done += piece.shape[2]
        frames, cache = vae.decode_stream(piece, cache, more=done < count)
        pieces.append(frames)
        given = sum(frames.shape[2] for frames in pieces)
        settled = done if done == count else max(done - vae.ahead, 0)
        assert given >= (vae.geometry.pixel_frames(settled) if settled else 0)
        assert done == count or given < vae.geometry.pixel_frames(settled + 1)
    streamed = torch.cat(pieces, dim=2)
    torch.testing.assert_close(streamed, expected, **ROUNDING)
    assert psnr(streamed, expected) > 100
    if 1 < latents_per_call < count:
        given, wanted = (
            seam_index(measure(vae.to_uint8(frames)).change, boundaries(ChunkPlan.split(count, latents_per_call), 8), 8)
            for frames in (streamed, expected)
        )
        torch.testing.assert_close(given, wanted, atol=1e-3, rtol=0)


def test_the_future_changes_what_is_kept_back_alone(looking_ahead: str) -> None:
    """The last latent of a clip reaches back exactly as far as is waited for."""
    vae = load(looking_ahead)
    latents = draw(1, 128, vae.ahead + 3, 2, 2)
    frames, other = (
        vae.decode(torch.cat([latents[:, :, :-1], last], dim=2)) for last in (latents[:, :, -1:], -latents[:, :, -1:])
    )
    first = int((frames - other).abs().amax((0, 1, 3, 4)).gt(1e-6).nonzero()[0])
    settled = vae.decode_stream(latents[:, :, :-1], more=True)[0].shape[2]
    assert settled == first


def test_memory_that_looks_ahead(looking_ahead: str) -> None:
    vae = load(looking_ahead)
    latents = draw(1, 128, 30, 2, 2)
    cache, sizes = None, []
    for latent in latents.split(1, dim=2):
        _, cache = vae.decode_stream(latent, cache, more=True)
        sizes.append(cache.nbytes)
    assert len(set(sizes[vae.ahead + 1 :])) == 1
    lead, after = vae.overlap_latent(latents[:, :, -1:], cache)
    assert lead.isfinite().all() and not after.ended
    _, ended = vae.decode_stream(latents[:, :, -1:], cache)
    with pytest.raises(ValueError, match="ended after 31 latents: decode those with more=True"):
        vae.decode_stream(latents[:, :, -1:], ended)


def test_a_picture_without_another_side_is_refused(vae: LTX2VAE) -> None:
    """A border that mirrors needs two rows; diffusers' decoder refuses one, too."""
    for size in ((1, 3), (3, 1)):
        with pytest.raises(AssertionError, match="has no other side"):
            vae.decode_stream(draw(1, 128, 1, *size))
        with pytest.raises(RuntimeError, match="Padding size"):
            vae.decode(draw(1, 128, 1, *size))


def test_looking_ahead_in_low_precision(looking_ahead: str) -> None:
    vae, latents = load(looking_ahead, dtype=torch.bfloat16), draw(1, 128, 6, 2, 3)
    expected, frames = load(looking_ahead).decode(latents), vae.decode_stream(latents)[0]
    own, theirs = ((given - expected).square().mean() for given in (frames, vae.decode(latents)))
    assert own < 2 * theirs


@pytest.mark.parametrize("latents_per_call", [1, 3])
@pytest.mark.parametrize("count", [1, 2, 12])
def test_an_end_that_comes_later(looking_ahead: str, count: int, latents_per_call: int) -> None:
    """Without more latents, what waits comes as if the end had been told with the last of them."""
    vae, latents = load(looking_ahead, latents_per_call), draw(1, 128, count, 2, 3)
    frames, cache = vae.decode_stream(latents, more=True)
    rest, after = vae.decode_end(cache)
    torch.testing.assert_close(torch.cat([frames, rest], dim=2), vae.decode(latents), **ROUNDING)
    assert after.ended and after.latents == count and not cache.ended
    for ended in (after, vae.decode_stream(latents)[1]):
        with pytest.raises(ValueError, match="nothing waits"):
            vae.decode_end(ended)


def test_a_cache_that_is_given_away_is_there_once(vae: LTX2VAE, looking_ahead: str) -> None:
    """All of a causal decoder's; of one that looks ahead most: what waits in it grows at the start."""
    latents = draw(1, 128, 9, 3, 4)
    assert assert_memory_is_taken_over(vae, latents) == 1
    assert assert_memory_is_taken_over(load(looking_ahead), latents) > 0.5


def test_a_causal_decoder_keeps_nothing_back(vae: LTX2VAE) -> None:
    with pytest.raises(ValueError, match="nothing waits"):
        vae.decode_end(vae.decode_stream(draw(1, 128, 2, 2, 2))[1])


@pytest.mark.parametrize(("causal", "count", "gigabytes"), [(True, 16, 1.5), (False, 189, 11.4)])
def test_activations_of_the_published_decoder(
    causal: bool, count: int, gigabytes: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The README's, at 1280x704 in bfloat16, two latents a call: of the last, with all that has waited."""
    with torch.device("meta"):
        model: Any = AutoencoderKLLTX2Video(decoder_causal=causal).eval().requires_grad_(False).bfloat16()
    assert ltx2_decoder.ahead(model) == (0 if causal else 22)
    vae = LTX2VAE(model, GEOMETRIES["LTX2VAE_diffusers"], 2)
    # The kernel of a GPU takes no memory; its plain twin does.
    monkeypatch.setattr(ltx2_decoder, "norm_silu_into", lambda *inputs, **settings: None)
    latents = torch.empty(1, 128, 2, 22, 40, device="meta")
    _, cache = vae.decode_stream(torch.empty(1, 128, 41, 22, 40, device="meta"), more=True)
    with LiveBytes(ignore=[*model.parameters(), *cache.features]) as live:
        frames, _ = vae.decode_stream(latents, cache)
    assert frames.shape[2] == count
    assert live.peak / 1e9 == pytest.approx(gigabytes, abs=0.06)


@pytest.mark.parametrize(
    "changes",
    [
        {"upsample_factor": (1, 1, 1)},
        {"upsample_residual": (False, True, False)},
        {"decoder_spatial_padding_mode": "zeros"},
    ],
)
def test_other_layers(tmp_path: Path, changes: dict[str, Any]) -> None:
    vae = load(write(tmp_path, **changes))
    latents = draw(1, 128, 3, 2, 2)
    torch.testing.assert_close(stream(vae, latents, (2, 1))[0], vae.decode(latents), **ROUNDING)


def test_frames_as_a_gpu_makes_them(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With all kernels and late biases."""
    monkeypatch.setattr(ltx2_decoder, "biases_come_late", lambda x: True)
    for name in ("norm_silu_into", "add_shortcut", "copy_into"):
        monkeypatch.setattr(ltx2_decoder, name, fused_twin(name, FUSED))
    monkeypatch.setattr(convolution, "copy_into", fused_twin("copy_into", FUSED))
    config = VAEConfig(vae_type="LTX2VAE_diffusers", vae_pretrained=source, latents_per_call=2)
    vae = load_vae(config, torch.device(DEVICE), torch.float32)
    latents = draw(2, 128, 3, 2, 3)
    torch.testing.assert_close(stream(vae, latents, (2, 1))[0], vae.decode(latents), **ROUNDING)


@pytest.mark.gpu
def test_at_its_own_size_on_a_gpu(tmp_path: Path) -> None:
    """In bfloat16, with the kernels; and nothing is transposed for a convolution."""
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "AutoencoderKLLTX2Video"}))
    latents = draw(1, 128, 5, 22, 40).cuda()
    config = VAEConfig(vae_type="LTX2VAE_diffusers", vae_pretrained=f"seeded:{tmp_path}", latents_per_call=2)
    expected = load_vae(config, "cuda", torch.float32).decode(latents)
    vae = load_vae(config, "cuda", torch.bfloat16)
    frames, last = vae.decode_stream(latents)
    in_parts, cache = stream(vae, latents, (3, 2))
    assert torch.equal(in_parts, frames)
    assert cache.nbytes == last.nbytes == sum(feature.nbytes for feature in cache.features)
    assert psnr(frames, expected) > 40
    assert_nothing_is_transposed(vae, latents[:, :, :2], cache)


def test_another_kind_of_vae_is_refused(source: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not the config of an AutoencoderKLLTX2Video"):
        load(str(Path(__file__).resolve().parents[2] / "asset/shapes/vae"))
    with pytest.raises(InputError, match="not the config of an AutoencoderKLWan"):
        load_vae(VAEConfig(vae_pretrained=source), torch.device("cpu"), torch.float32)
    (tmp_path / "vae.pth").write_bytes(b"")
    with pytest.raises(InputError, match="is a diffusers folder"):
        load(str(tmp_path / "vae.pth"))


def test_convolutions_of_the_decoder_all_remember(vae: LTX2VAE) -> None:
    """A layer that were left out would start anew in every call."""
    _, cache = vae.decode_stream(draw(1, 128, 1, 2, 2))
    looking_back = [
        layer for layer in vae.model.decoder.modules() if isinstance(layer, nn.Conv3d) and layer.kernel_size[0] == 3
    ]
    assert len(cache.features) == len(looking_back)
