"""A film that videos go on from: encoded, absorbed and decoded chunk by chunk, whatever its length."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Sequence
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from longsana.encoders.geometry import VAEGeometry
from longsana.encoders.vae import VideoVAE
from longsana.models.embeddings import Text
from longsana.runtime.clock import Clock
from longsana.runtime.finite import require_finite
from longsana.sampling.captions import Caption, stacked
from longsana.sampling.continuation import Moment
from longsana.sampling.engine import CaptionedNetwork, Decoding, Frames
from longsana.sampling.recent import Holds, Recent
from longsana.sampling.sampler import Network, absorb
from longsana.state import CausalState


def film_latents(
    vae: VideoVAE, pictures: Iterable[np.ndarray], *, chunk_frames: int, clock: Clock | None = None
) -> Iterator[Tensor]:
    """Latents (1, C, T, h, w), float32, of a film's pictures (H, W, 3), uint8: those of a chunk at a time.

    The first chunk has one latent more, the last as many as there are; frames at the end that fill no latent, fewer
    than a latent's, are left out.
    """
    clock, cache = clock or Clock(vae.device), None
    cut = whole_pieces if vae.looks_on else pieces
    for piece in cut(pictures, vae.geometry, chunk_frames):
        with clock.part("encode"):
            frames = piece.to(vae.device, torch.float32).permute(3, 0, 1, 2)[None] / 127.5 - 1
            latents, cache = vae.encode_stream(frames, cache)
        require_finite("the film", {"latents": latents})
        yield latents


def pieces(pictures: Iterable[np.ndarray], shape: VAEGeometry, chunk_frames: int) -> Iterator[Tensor]:
    """Cut a film's pictures (H, W, 3) into the frames (F, H, W, 3) of whole chunks; see `film_latents`."""
    waiting = iter(pictures)
    first, stride = True, shape.time_stride
    while found := list(islice(waiting, shape.pixel_frames(chunk_frames + first, first=first))):
        used = len(found) - (len(found) - first) % stride
        if used:
            yield torch.from_numpy(np.stack(found[:used]))
        first = False


def whole_pieces(pictures: Iterable[np.ndarray], shape: VAEGeometry, chunk_frames: int) -> Iterator[Tensor]:
    """Cut a film's pictures (H, W, 3) into frames (F, H, W, 3) as `pieces` does, for an encoder that `looks_on`.

    Of as many latents each, but those of whole latents' frames, except the film's last, which is one frame's.
    """
    waiting, stride = iter(pictures), shape.time_stride
    found = list(islice(waiting, stride * (chunk_frames + 1)))
    while found:
        following = list(islice(waiting, stride * chunk_frames))
        used = len(found) if following else len(found) - (len(found) - 1) % stride
        yield torch.from_numpy(np.stack(found[:used]))
        found = following


@torch.no_grad()
def absorbed(
    network: Network,
    text: Text,
    count: int,
    latents: Iterable[Tensor],
    recent: Holds,
    *,
    state: CausalState | None = None,
    clock: Clock | None = None,
) -> Iterator[tuple[Tensor, CausalState]]:
    """Absorb a film's latents (1, C, T, h, w), chunk by chunk, for `count` videos with a caption each.

    Yields the chunk for each video, (B, C, T, h, w), and the state after it. recent: is given every chunk to hold.
    """
    for own in latents:
        clock = clock or Clock(own.device)
        given = own.expand(count, -1, -1, -1, -1).contiguous()
        with clock.part("absorb"):
            state = recent.keep(given, state, absorb(network, given, text, state))
        yield given, state


@torch.no_grad()
def absorb_film(
    network: CaptionedNetwork,
    decoder: VideoVAE,
    captions: Sequence[Caption],
    latents: Iterable[Tensor],
    recent: Holds | None = None,
    *,
    shown: bool = True,
    clock: Clock | None = None,
) -> Generator[Frames, None, Moment]:
    """Absorb a film's latents (1, C, T, h, w) under the first part of each video's caption, and decode them.

    Yields the film's frames as the decoder gives them back, for each video, with chunk -1, if they are `shown`; returns
    the moment that the videos go on from. recent: is given every chunk to hold; None: no change will reach back to it.

    Raises:
        FloatingPointError: latents or decoded frames are not finite.
    """
    clock, decoding = clock or Clock(decoder.device), Decoding(decoder)
    state: CausalState | None = None
    recent = recent or Recent((), 0)
    with clock.part("denoise"):
        text: Text = network.cache_caption(stacked([caption.parts[0] for caption in captions], decoder.device))
    for given, after in absorbed(network, text, len(captions), latents, recent, clock=clock):
        state = after
        with clock.part("decode"):
            pixels = decoding(given, "the film", more=True)
        if shown:
            yield Frames(-1, given, pixels)
    assert state is not None, "a film without a frame"
    moment = decoding.moment(state, recent.copy())
    # What a decoder that looks ahead keeps back of the film comes with the first new frames, or not at all.
    return moment._replace(waiting=0) if shown else moment
