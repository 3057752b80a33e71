"""The videos of a folder and what their sidecars say of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from av.container import InputContainer
from torch import Tensor

from longsana.chunks import ChunkPlan
from longsana.data.films import LATE, display_matrix, promised_seconds, rgb_of, upright
from longsana.encoders.geometry import GEOMETRIES
from longsana.evaluation.measures import boundaries
from longsana.runtime.errors import InputError
from longsana.runtime.files import files_below
from longsana.runtime.foreign import read_json
from longsana.sampling.checks import WHOLE_CLIP
from longsana.shapes.scenes import Promise, parse_caption

VIDEOS = (".mp4", ".webm", ".mov")
REPAIR = "remove or repair this sidecar"


@dataclass(frozen=True)
class Video:
    """An mp4, its prompt (None: no sidecar says it), and how its frames came about.

    boundaries: the first pixel frame of each chunk but the first. time_stride: pixel frames of a latent.
    """

    path: Path
    prompt: str | None
    boundaries: tuple[int, ...] = ()
    time_stride: int = 1

    @property
    def promise(self) -> Promise | None:
        return None if self.prompt is None else parse_caption(self.prompt)


def find_videos(folder: Path) -> list[Path]:
    """Every video of the folder and of the folders in it, in order of their names.

    Raises:
        InputError: no such folder, one that cannot be read, or nothing in it.
    """
    paths = [path for path in files_below(folder) if path.suffix.lower() in VIDEOS]
    if not paths:
        kinds = f"{', '.join(VIDEOS[:-1])} or {VIDEOS[-1]}"
        raise InputError(f"{folder}: no {kinds} in it; give the folder that inference wrote its videos to")
    return paths


def pair(videos: Sequence[Path], folder: Path, against: Path) -> tuple[dict[Path, Path], list[Path]]:
    """The other folder's video of each of `videos`, by its path below the folder; and those of both that have none.

    Raises:
        InputError: none has one, or the other folder has no videos.
    """
    own = {path.relative_to(folder): path for path in videos}
    others = {path.relative_to(against): path for path in find_videos(against)}
    pairs = {own[name]: others[name] for name in own if name in others}
    if not pairs:
        raise InputError(f"{against}: no video of a name that is in {folder}; those that belong together share a name")
    alone = own.keys() ^ others.keys()
    return pairs, [own.get(name) or others[name] for name in sorted(alone)]


def describe(path: Path) -> Video:
    """Read what the sidecar beside an mp4 says of it.

    Raises:
        InputError: there is one, and it cannot be read.
    """
    sidecar = path.with_suffix(".json")
    if not sidecar.exists():
        return Video(path, None)
    record = read_json(sidecar, REPAIR)
    try:
        return Video(path, str(record["prompt"]), *_origin(record))
    except (ValueError, KeyError, TypeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise InputError(f"{sidecar}: not a sidecar that inference wrote ({reason}); {REPAIR}") from error


def _origin(record: dict[str, Any]) -> tuple[tuple[int, ...], int]:
    """Boundaries and time stride."""
    config = record["config"]
    vae = GEOMETRIES[config["vae"]["vae_type"]]
    if config["scheduler"]["sampling_algo"] in WHOLE_CLIP:
        return (), vae.time_stride
    # Sidecars from before there was such a setting do not have it.
    cut = config["sampling"]["chunk_frames"], config["sampling"].get("first_chunk_frames", 0)
    if "began" in record:
        given = int(record["began"]["given_frames"])
        starts = ChunkPlan.going_on((record["frames"] - given) // vae.time_stride, *cut).starts
        # The first chunk begins a seam where the film that it goes on from is shown.
        return tuple(given + vae.time_stride * start for start in starts if given or start), vae.time_stride
    plan = ChunkPlan.split(vae.latent_frames(record["frames"]), *cut)
    return tuple(boundaries(plan, vae.time_stride)), vae.time_stride


def frame_rate(path: Path) -> float:
    """Frames a second.

    Raises:
        InputError: the file is no video, or does not say it.
    """
    with _open(path) as container:
        rate = container.streams.video[0].average_rate
    if not rate:
        raise InputError(f"{path}: it does not say how many frames a second it has")
    return float(rate)


def read_pieces(path: Path, frames: int = 64) -> Iterator[Tensor]:
    """Pieces (1, F, H, W, 3) of at most `frames` uint8 pictures, one after the other, upright as players show them.

    Raises:
        InputError: the file is no video, broken, or shorter than its index says.
    """
    count, size = 0, None
    seconds: float | None = None
    end = 0.0
    with _open(path) as container:
        video = container.streams.video[0]
        promised = video.frames  # 0 where the format does not say

        def shown() -> Iterator[np.ndarray]:
            nonlocal seconds, end
            opening: av.VideoFrame | None = None
            matrix: np.ndarray | None = None
            for frame in container.decode(video):
                if opening is None:
                    opening, matrix = frame, display_matrix(frame)
                    seconds = None if promised else promised_seconds(container, video, frame)
                if frame.time is not None and opening.time is not None:
                    end = frame.time - opening.time + float((frame.duration or 0) * (frame.time_base or 0))
                picture = rgb_of(frame)
                yield picture if matrix is None else upright(picture, matrix)

        decoded = shown()
        while pictures := list(islice(decoded, frames)):
            sizes = {picture.shape for picture in pictures} | ({size} if size else set())
            if len(sizes) > 1:
                raise InputError(f"{path}: its pictures are of several sizes; make it again or remove it")
            (size,) = sizes
            count += len(pictures)
            yield torch.from_numpy(np.stack(pictures))[None]
    if count < max(promised, 1):
        raise InputError(f"{path}: cut short: {count} of {promised} frames can be read; make it again or remove it")
    if seconds is not None and end < seconds - LATE:
        raise InputError(
            f"{path}: cut short: {end:.1f} of {seconds:.1f} seconds can be read; make it again or remove it"
        )


@contextmanager
def _open(path: Path) -> Iterator[InputContainer]:
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise InputError(f"{path}: there is no video in it")
            yield container
    except (av.FFmpegError, OSError) as error:
        raise InputError(f"{path}: cannot be read as a video ({error}); make it again or remove it") from error
