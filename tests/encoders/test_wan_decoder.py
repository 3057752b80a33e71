"""The fast decoder against diffusers' own loop, in several shapes; `gpu`: the published one at its own size."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from longsana.config import VAEConfig
from longsana.encoders import convolution, wan_decoder
from longsana.encoders.convolution import pair
from longsana.encoders.vae import WanVAE
from longsana.ops import FUSED
from longsana.ops.dispatch import fused_twin
from tests.encoders.streaming import assert_nothing_is_transposed, draw, psnr, stream

TRAINED = Path(__file__).resolve().parents[2] / "asset/shapes/vae"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = {
    "narrow": {"base_dim": 8},  # as published but for its width
    "mirrored": {"base_dim": 6, "num_res_blocks": 1, "temperal_downsample": [True, True, False]},
    "published": {},
}
Load = Callable[..., WanVAE]


@pytest.fixture
def load(tmp_path: Path) -> Load:
    """`load(name, latents_per_call, device, dtype)`: the trained VAE, or one of random weights."""

    def vae(name: str, latents_per_call: int = 1, device: str = "cpu", dtype: torch.dtype = torch.float32) -> WanVAE:
        source = str(TRAINED)
        if name in SHAPES:
            (tmp_path / "config.json").write_text(json.dumps({"_class_name": "AutoencoderKLWan"} | SHAPES[name]))
            source = f"seeded:{tmp_path}"
        return WanVAE.load(VAEConfig(vae_pretrained=source, latents_per_call=latents_per_call), device, dtype)

    return vae


@pytest.mark.parametrize("name", ["trained", "narrow", "mirrored"])
@pytest.mark.parametrize("size", [(2, 5, 3), (1, 1, 1)])
def test_frames_are_those_of_diffusers(load: Load, name: str, size: tuple[int, int, int]) -> None:
    batch, height, width = size
    latents = draw(batch, 16, 5, height, width)
    expected = load(name).decode(latents)
    for latents_per_call in (1, 3):
        frames, _ = load(name, latents_per_call).decode_stream(latents)
        assert frames.shape == expected.shape and frames.dtype == torch.float32
        assert psnr(frames, expected) >= 80


@pytest.mark.parametrize("name", ["trained", "narrow"])
def test_frames_in_bfloat16(load: Load, name: str) -> None:
    latents = draw(1, 16, 3, 4, 3)
    frames, _ = load(name, 2, dtype=torch.bfloat16).decode_stream(latents)
    assert frames.dtype == torch.float32
    assert psnr(frames, load(name).decode(latents)) >= 40


@pytest.mark.slow
def test_frames_of_a_larger_picture(load: Load) -> None:
    latents = draw(1, 16, 2, 24, 40)
    frames, _ = load("trained").decode_stream(latents)
    assert psnr(frames, load("trained").decode(latents)) >= 80


@pytest.mark.parametrize("name", ["trained", "narrow"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_pairs_of_pixels_as_one(load: Load, name: str, dtype: torch.dtype) -> None:
    """The same convolutions, as a GPU runs those of the widest pictures, here all of them."""
    latents = draw(1, 16, 3, 3, 4)
    expected, _ = load(name, 2, dtype=dtype).decode_stream(latents)
    vae = load(name, 2, dtype=dtype)
    paired = [layer for layer in vae.model.decoder.modules() if getattr(layer, "kernel_size", None) == (3, 3, 3)]
    for layer in paired:
        pair(layer)
        layer.weight.data.fill_(float("nan"))  # only odd widths need it
    frames, _ = vae.decode_stream(latents)
    assert len(paired) > 10
    assert psnr(frames, expected) >= (110 if dtype == torch.float32 else 130)


def test_frames_as_a_gpu_makes_them(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    """With all kernels, late biases and pairs, which pictures of an odd width do without."""
    monkeypatch.setattr(wan_decoder, "biases_come_late", lambda x: True)
    for name in ("norm_silu_into", "add_shortcut", "copy_into"):
        monkeypatch.setattr(wan_decoder, name, fused_twin(name, FUSED))
    monkeypatch.setattr(convolution, "copy_into", fused_twin("copy_into", FUSED))
    latents = draw(2, 16, 3, 2, 3).to(DEVICE)
    expected = load("trained", device=DEVICE).decode(latents)
    vae = load("trained", 2, DEVICE)
    for layer in vae.model.decoder.modules():
        if getattr(layer, "kernel_size", None) == (3, 3, 3):
            pair(layer)
    frames, cache = vae.decode_stream(latents[:, :, :2])
    later, _ = vae.decode_stream(latents[:, :, 2:], cache)
    assert psnr(torch.cat([frames, later], dim=2), expected) >= 80


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("trained", torch.float32),
        ("trained", torch.bfloat16),
        ("narrow", torch.float32),
        ("mirrored", torch.float32),
    ],
)
def test_cuts_between_groups_change_nothing(load: Load, name: str, dtype: torch.dtype) -> None:
    vae = load(name, 2, dtype=dtype)
    latents = draw(2, 16, 6, 2, 3)
    whole, last = stream(vae, latents, (6,))
    for lengths in ((1, 5), (1, 2, 2, 1), (5, 1)):
        frames, cache = stream(vae, latents, lengths)
        assert torch.equal(frames, whole)
        assert all(torch.equal(a, b) for a, b in zip(cache.features, last.features, strict=True))
    inside, _ = stream(vae, latents, (2, 2, 2))  # decoded one at a time
    assert psnr(inside, whole) >= (80 if dtype == torch.float32 else 40)


@pytest.mark.parametrize("name", ["trained", "narrow"])
def test_the_cache_is_a_value(load: Load, name: str) -> None:
    vae = load(name, 3)
    latents = draw(1, 16, 7, 2, 3)
    _, cache = vae.decode_stream(latents[:, :, :4])
    kept = [feature.clone() for feature in cache.features]
    first, _ = vae.decode_stream(latents[:, :, 4:], cache)
    vae.decode_stream(draw(1, 16, 2, 2, 3, seed=1), cache)
    again, _ = vae.decode_stream(latents[:, :, 4:], cache)
    assert torch.equal(first, again)
    assert all(torch.equal(a, b) for a, b in zip(cache.features, kept, strict=True))


@pytest.mark.parametrize("name", ["trained", "mirrored"])
def test_the_cache_is_two_frames_of_each_convolution_at_any_length(load: Load, name: str) -> None:
    sizes = set()
    for latents_per_call in (1, 3, 5):
        vae = load(name, latents_per_call)
        for count in (1, 2, 6):
            _, cache = vae.decode_stream(draw(1, 16, count, 2, 1))
            sizes.add(cache.nbytes)
            assert cache.nbytes == sum(feature.nbytes for feature in cache.features), "a view keeps more alive"
            assert {feature.shape[2] for feature in cache.features} == {2}
    assert len(sizes) == 1


def test_a_cache_that_was_made_contiguous_is_the_same(load: Load) -> None:
    """As streams of training keep it, and checkpoints."""
    vae = load("trained", 2)
    latents = draw(1, 16, 5, 3, 4)
    _, cache = vae.decode_stream(latents[:, :, :3])
    other = cache._replace(features=tuple(feature.contiguous() for feature in cache.features))
    assert torch.equal(vae.decode_stream(latents[:, :, 3:], other)[0], vae.decode_stream(latents[:, :, 3:], cache)[0])


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "size"), [("published", (60, 104)), ("trained", (12, 20))])
def test_at_its_own_size_on_a_gpu(
    load: Load, name: str, size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In bfloat16, with the kernels; and nothing is transposed for a convolution."""
    for operation in ("norm_silu_into", "add_shortcut", "copy_into"):
        monkeypatch.setattr(wan_decoder, operation, fused_twin(operation, FUSED))
    monkeypatch.setattr(convolution, "copy_into", fused_twin("copy_into", FUSED))
    latents = draw(1, 16, 7, *size).cuda()
    expected = load(name, device="cuda").decode(latents)
    vae = load(name, 3, "cuda", torch.bfloat16)
    frames, last = stream(vae, latents, (7,))
    assert psnr(frames, expected) >= 40
    in_parts, cache = stream(vae, latents, (4, 3))
    again, _ = stream(vae, latents, (4, 3))
    assert torch.equal(in_parts, again)
    assert torch.equal(in_parts, frames)
    assert cache.nbytes == last.nbytes == sum(feature.nbytes for feature in cache.features)
    assert_nothing_is_transposed(vae, latents[:, :, :3], cache)


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (5, 4)])
def test_a_convolution_of_an_enlarged_picture_is_a_transposed_one_of_the_picture(size: tuple[int, int]) -> None:
    layer = torch.nn.Conv2d(6, 5, 3, padding=1, dtype=torch.float64)
    convolution.enlarge(layer)
    x = draw(2, 6, *size).double()
    expected = layer(F.interpolate(x, scale_factor=2, mode="nearest-exact"))
    own = convolution.enlarged(layer, x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    torch.testing.assert_close(own, expected, rtol=0, atol=1e-13)
