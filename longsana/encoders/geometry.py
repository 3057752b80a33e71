"""Counts and sizes of a VAE's latents, for code that does not need its weights."""

from __future__ import annotations

from dataclasses import dataclass

from longsana.config import VAEConfig
from longsana.runtime.errors import InputError


@dataclass(frozen=True)
class VAEGeometry:
    """The shape of a causal video VAE's latents.

    The first latent frame is one pixel frame, each later one is `time_stride` pixel frames.
    """

    channels: int
    time_stride: int
    space_stride: int
    smallest: int = 1  # latents of a side

    def latent_frames(self, num_frames: int) -> int:
        """Latent frames of a video of `num_frames` pixel frames.

        Raises:
            InputError: no whole number of latents has that many frames; the message names the nearest counts.
        """
        if num_frames < 1 or (num_frames - 1) % self.time_stride:
            below = num_frames - (num_frames - 1) % self.time_stride
            raise InputError(
                f"num_frames={num_frames}: must be {self.time_stride}n+1 for this VAE; "
                f"{_nearest(below, self.time_stride, smallest=1)}"
            )
        return 1 + (num_frames - 1) // self.time_stride

    def pixel_frames(self, latent_frames: int, *, first: bool = True) -> int:
        """Pixel frames of a stretch of latents; `first` says that it opens the video."""
        return latent_frames * self.time_stride - ((self.time_stride - 1) if first and latent_frames else 0)

    def latent_size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of the latents of a video of `height` by `width` pixels.

        Raises:
            InputError: a side is not a multiple of `space_stride`, or has fewer than `smallest` latents.
        """
        self.check_size(height, width, (1, 1))
        return height // self.space_stride, width // self.space_stride

    def check_size(self, height: int, width: int, patch: tuple[int, int]) -> None:
        """Make sure that the VAE and then patches of (height, width) `patch` latents cut the picture evenly.

        Raises:
            InputError: they do not; the message names the nearest valid sides.
        """
        complaints = []
        for name, side, cells in (("height", height, patch[0]), ("width", width, patch[1])):
            step = self.space_stride * cells
            smallest = max(step, self.space_stride * self.smallest)
            if side < smallest or side % step:
                nearest = _nearest(side - side % step, step, smallest)
                least = f" and at least {smallest}" if smallest > step else ""
                complaints.append(f"{name}={side}: must be a multiple of {step}{least}; {nearest}")
        if complaints:
            raise InputError("; ".join(complaints))


GEOMETRIES = {
    "WanVAE": VAEGeometry(channels=16, time_stride=4, space_stride=8),
    "LTX2VAE_diffusers": VAEGeometry(channels=128, time_stride=8, space_stride=32, smallest=2),
}


def geometry(config: VAEConfig) -> VAEGeometry:
    """The geometry of the configured VAE."""
    return GEOMETRIES[config.vae_type]


def _nearest(below: int, step: int, smallest: int) -> str:
    if below < smallest:
        return f"the nearest is {smallest}"
    return f"nearest are {below} and {below + step}"
