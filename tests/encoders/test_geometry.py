"""Frame counts and sizes."""

from __future__ import annotations

import pytest

from longsana.config import VAEConfig
from longsana.encoders.geometry import VAEGeometry, geometry
from longsana.runtime.errors import InputError

WAN = geometry(VAEConfig())
LTX = VAEGeometry(channels=128, time_stride=8, space_stride=32)


def test_the_wan_vae_has_16_channels_and_strides_of_4_and_8() -> None:
    assert VAEGeometry(channels=16, time_stride=4, space_stride=8) == WAN


@pytest.mark.parametrize(("frames", "latents"), [(1, 1), (5, 2), (81, 21), (961, 241)])
def test_published_lengths(frames: int, latents: int) -> None:
    assert WAN.latent_frames(frames) == latents


@pytest.mark.parametrize("vae", [WAN, LTX])
def test_counting_there_and_back(vae: VAEGeometry) -> None:
    for latents in range(1, 40):
        assert vae.latent_frames(vae.pixel_frames(latents)) == latents


@pytest.mark.parametrize("vae", [WAN, LTX])
def test_stretches_add_up_to_the_whole(vae: VAEGeometry) -> None:
    for cut in range(1, 21):
        assert vae.pixel_frames(cut) + vae.pixel_frames(21 - cut, first=False) == vae.pixel_frames(21)


def test_no_latents_are_no_frames() -> None:
    assert WAN.pixel_frames(0) == WAN.pixel_frames(0, first=False) == 0


@pytest.mark.parametrize(
    ("vae", "frames", "message"),
    [
        (WAN, 82, "num_frames=82: must be 4n+1 for this VAE; nearest are 81 and 85"),
        (WAN, 80, "num_frames=80: must be 4n+1 for this VAE; nearest are 77 and 81"),
        (WAN, 2, "num_frames=2: must be 4n+1 for this VAE; nearest are 1 and 5"),
        (WAN, 0, "num_frames=0: must be 4n+1 for this VAE; the nearest is 1"),
        (WAN, -3, "num_frames=-3: must be 4n+1 for this VAE; the nearest is 1"),
        (LTX, 81 + 3, "num_frames=84: must be 8n+1 for this VAE; nearest are 81 and 89"),
    ],
)
def test_lengths_that_cannot_be(vae: VAEGeometry, frames: int, message: str) -> None:
    with pytest.raises(InputError) as caught:
        vae.latent_frames(frames)
    assert str(caught.value) == message


def test_latent_size() -> None:
    assert WAN.latent_size(480, 832) == (60, 104)
    assert WAN.latent_size(8, 24) == (1, 3)
    with pytest.raises(InputError, match=r"^width=835: must be a multiple of 8; nearest are 832 and 840$"):
        WAN.latent_size(480, 835)


def test_sizes_for_patches() -> None:
    WAN.check_size(480, 832, (2, 2))
    WAN.check_size(488, 832, (1, 2))
    with pytest.raises(InputError, match=r"^height=488: must be a multiple of 16; nearest are 480 and 496$"):
        WAN.check_size(488, 832, (2, 2))
    with pytest.raises(InputError, match=r"^height=0: .* the nearest is 16; width=-1: .* the nearest is 8$"):
        WAN.check_size(0, -1, (2, 1))
