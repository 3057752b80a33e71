"""Clips of latents with captions, for flow matching: on disk, or made as they are asked for."""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from longsana.data.shards import DTYPES, MANIFEST, Contents, ShardFolder, ShardWriter
from longsana.flow.noise import to_device
from longsana.runtime.distributed import World
from longsana.runtime.errors import InputError, did_you_mean
from longsana.shapes.bars import draw_bars
from longsana.shapes.remembered import draw_remembered
from longsana.shapes.scenes import TURNS, Scene, Track, draw_scene, render

log = logging.getLogger(__name__)

KIND = "clips"
GENERATED = "generated:"
REMEDY = "set them as there (weights are told by their SHA-256), or encode the films again: longsana encode"
DRAWN_AT_ONCE = 1 << 30
"""Bytes of pictures that are drawn and encoded together at most; 64 clips of the small world have 0.96 GB."""
Shape = tuple[int, int, int, int]
"""(C, T, H, W) of a clip's latents."""


class Clip(NamedTuple):
    """latents: (C, T, H, W), float32."""

    latents: Tensor
    prompt: str


class Batch(NamedTuple):
    """latents: (B, C, T, H, W), on any device."""

    latents: Tensor
    prompts: list[str]


class ClipSource(Protocol):
    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Clip: ...

    def batch(self, indices: Sequence[int]) -> Batch: ...

    def prompts(self) -> Sequence[str]:
        """Every prompt that a clip may have, some perhaps more than once."""
        ...


class ClipFolder:
    """Clips that `write_clips` has written. shape: (C, T, H, W) of each.

    made_by: settings that they must have been made with; one that their manifest does not say is not compared.

    Raises:
        InputError: the folder is not whole, or its clips were made with other settings.
    """

    def __init__(self, path: str | Path, made_by: Mapping[str, Any] | None = None, *, digests: bool = True) -> None:
        self._folder = ShardFolder(Path(path), KIND, "write the clips again", digests=digests)
        self.shape = self._folder.contents.shape
        there, own = self._folder.contents, made_by or {}
        if unknown := own.keys() - there.made_by:
            log.warning("%s: %s does not say %s: not compared", path, MANIFEST, ", ".join(sorted(unknown)))
        known = {name: value for name, value in own.items() if name not in unknown}
        wanted = replace(there, made_by={**there.made_by, **known})
        wanted.refuse_other(there, Path(path), REMEDY)

    def __len__(self) -> int:
        return len(self._folder)

    def __getitem__(self, index: int) -> Clip:
        latents, prompt = self._folder[index]
        return Clip(latents.float(), prompt)

    def batch(self, indices: Sequence[int]) -> Batch:
        return _together([self[index] for index in indices])

    def prompts(self) -> Sequence[str]:
        return self._folder.prompts()


def write_clips(
    folder: str | Path,
    clips: ClipSource,
    made_by: Mapping[str, Any],
    *,
    dtype: Literal["bfloat16", "float16", "float32"] = "float16",
    shard_size: int = 16,
    shape: Shape | None = None,
    world: World | None = None,
    begin: Callable[[int], None] = lambda clips: None,
) -> None:
    """Write clips of one shape to a folder that `ClipFolder` reads. Stopped and called again, it goes on.

    Args:
        made_by: all that decides the latents, as JSON has it; a folder of other settings is refused.
        shape: of each, where the first one is not to be made for it.
        world: whose processes all call this; each writes its shards.
        begin: called before the first clip is made, with the number of those that this process makes.

    Raises:
        InputError: the folder cannot be written to, or holds something else.
    """
    contents = Contents(KIND, made_by, shape or tuple(clips[0].latents.shape), dtype, len(clips), shard_size)
    writer = ShardWriter(Path(folder), contents, world or World(), "folder")
    begin(sum(len(contents.rows(shard)) for shard in writer.mine))
    for shard in writer.mine:
        latents, prompts = clips.batch(contents.rows(shard))
        writer.write(shard, latents.to("cpu", DTYPES[dtype]), prompts)
    writer.finish()


@dataclass(frozen=True)
class GeneratedClips:
    """`length` clips that `make` makes from their index alone; `captions` are all the prompts they may have."""

    make: Callable[[int], Clip]
    length: int
    captions: tuple[str, ...]

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Clip:
        if not 0 <= index < self.length:
            raise IndexError(f"clip {index} of {self.length}")
        return self.make(index)

    def batch(self, indices: Sequence[int]) -> Batch:
        return _together([self[index] for index in indices])

    def prompts(self) -> Sequence[str]:
        return self.captions


def _together(clips: Sequence[Clip]) -> Batch:
    return Batch(torch.stack([clip.latents for clip in clips]), [clip.prompt for clip in clips])


class Strides(Protocol):
    """Return the pixels that a latent stands for."""

    @property
    def space_stride(self) -> int: ...

    def pixel_frames(self, latent_frames: int) -> int:
        """Frames of a clip of so many latents."""
        ...


class Encoder(Protocol):
    """A maker of latents from pictures."""

    device: torch.device

    @property
    def geometry(self) -> Strides: ...

    def encode(self, frames: Tensor) -> Tensor:
        """Latents (B, C, T, h, w) of frames (B, 3, F, H, W) in [-1, 1]."""
        ...


Draw = Callable[[int, int, tuple[int, int]], Scene]


def any_scene(seed: int, index: int, size: tuple[int, int]) -> Scene:
    """Draw a scene of the world whose captions say everything. size: (height, width) of the picture."""
    return draw_scene(seed, index, size=size)


def remembered_scene(seed: int, index: int, size: tuple[int, int]) -> Scene:
    """Draw a scene of the world in which the past matters. size: (height, width) of the picture."""
    return draw_remembered(seed, index, size=size)


def bars_scene(seed: int, index: int, size: tuple[int, int]) -> Scene:
    """Draw a scene with a kind of shape that the world does not have. size: (height, width) of the picture."""
    return draw_bars(seed, index, size=size)


def turning_scene(seed: int, index: int, size: tuple[int, int], draw: Draw = any_scene) -> Scene:
    """Choose a scene: in three of four a shape bounces or orbits, what a base model is slowest to learn; else any.

    More of these shapes begin near one point of their way than elsewhere. A network knows places from the edges of the
    picture alone, and of an unknown place the sense of an orbit says nothing: all orbits taken together look alike in
    both senses. From a known start it says at once where the shape goes, which is learned first. draw: of which world.
    """
    scene = draw(seed, index, size) if index % 4 == 0 else _drawn_with(_turns, draw, seed, index, size)
    return _near_starts(scene, seed, index)


def _near_starts(scene: Scene, seed: int, index: int) -> Scene:
    """Move the starts of shapes that bounce or orbit nearer to one point, by as much as the scene's number says."""
    # A last number that draw_scene does not have: zeros at a seed's end change nothing.
    spread = np.random.default_rng((seed, index, 2)).random() ** 2
    tracks = (_near_start(track, spread) if _turns(track) else track for track in scene.tracks)
    return replace(scene, tracks=tuple(tracks))


def _drawn_with(wanted: Callable[[Track], bool], draw: Draw, seed: int, index: int, size: tuple[int, int]) -> Scene:
    """Draw a scene with a track that is wanted: the first of its series."""
    scenes = (draw(seed + 1000 * again, index, size) for again in itertools.count())
    return next(scene for scene in scenes if any(map(wanted, scene.tracks)))


def mixed_scene(seed: int, index: int, size: tuple[int, int]) -> Scene:
    """Choose a scene: in four of five a shape does or is what a base model is slowest to learn (`HARD`); else any.

    What bounces or orbits begins as in `turning_scene`.
    """
    wanted = HARD[index % len(HARD)]
    scene = any_scene(seed, index, size) if wanted is None else _drawn_with(wanted, any_scene, seed, index, size)
    return _near_starts(scene, seed, index)


def _turns(track: Track) -> bool:
    return _bounces(track) or _orbits(track)


def _bounces(track: Track) -> bool:
    return track.actor.motion == "bounce"


def _orbits(track: Track) -> bool:
    return track.actor.motion in TURNS


def _crosses(track: Track) -> bool:
    return not _turns(track) and track.actor.speed == "quickly"


def _is_thin(track: Track) -> bool:
    return track.actor.size == "small" and track.actor.kind in ("ring", "cross")


HARD = (_bounces, _orbits, _crosses, _is_thin, None)
"""What a scene of `mixed_scene` must have, by its index; None: nothing. docs/shapes.md has why."""


START = (0.5, 0.5, 0.625, 0.5)
"""A track's draws: the middle of its box, or the upper left of its orbit."""


def _near_start(track: Track, spread: float) -> Track:
    """spread: of the draws about START; 0 begins there, 1 anywhere."""
    along, across, phase, slant = (
        start + spread * (draw - 0.5) for start, draw in zip(START, track.draws, strict=True)
    )
    return replace(track, draws=(along, across, phase % 1, slant))


class ShapeClips:
    """`count` clips of the shapes world, drawn and encoded here and kept, in float16, where the encoder is.

    In groups whose size the device and the clips' shape decide, so that a clip's latents do not depend on which clips
    are asked for together. draw: of a seed, an index and a picture's (height, width) the scene of a clip.
    """

    def __init__(
        self,
        shape: Shape,
        seed: int,
        count: int,
        encoder: Encoder,
        group: int | None = None,
        draw: Draw = any_scene,
    ) -> None:
        _, frames, height, width = shape
        stride, frames = encoder.geometry.space_stride, encoder.geometry.pixel_frames(frames)
        size = (stride * height, stride * width)
        most = max(1, DRAWN_AT_ONCE // (3 * frames * math.prod(size) * torch.float32.itemsize))
        group = group or min(most, 16 if encoder.device.type == "cpu" else 64)  # a GPU waits for launches
        self._scenes = [draw(seed, index, size) for index in range(-(-count // group) * group)]
        encoded = []
        for first in tqdm(range(0, count, group), desc="shapes", unit="group", disable=None, leave=False):
            scenes = self._scenes[first : first + group]
            pictures = render(scenes, range(frames), size=size, device=encoder.device)
            encoded.append(encoder.encode(pictures).to(torch.float16))
        self._latents = torch.cat(encoded)[:count]

    def __len__(self) -> int:
        return len(self._latents)

    def __getitem__(self, index: int) -> Clip:
        if not 0 <= index < len(self):
            raise IndexError(f"clip {index} of {len(self)}")
        return Clip(self._latents[index].float(), self._scenes[index].caption)

    def batch(self, indices: Sequence[int]) -> Batch:
        chosen = to_device(torch.tensor(indices, dtype=torch.int64, device="cpu"), self._latents.device)
        return Batch(self._latents[chosen].float(), [self._scenes[index].caption for index in indices])

    def prompts(self) -> Sequence[str]:
        return [scene.caption for scene in self._scenes[: len(self)]]


def open_clips(
    data_path: str,
    *,
    shape: Shape,
    seed: int = 0,
    count: int = 1 << 13,
    encoder: Callable[[], Encoder] | None = None,
    made_by: Mapping[str, Any] | None = None,
    digests: bool = True,
) -> ClipSource:
    """The clips that `data_path` names: a folder, or generated:NAME.

    seed, count: of generated clips. encoder: called for one if they are made of pictures. made_by: see `ClipFolder`.
    digests: see `ShardFolder`.

    Raises:
        InputError: no such generator, or the folder is not whole or holds clips of another shape or making.
    """
    if data_path.startswith(GENERATED):
        name = data_path.removeprefix(GENERATED)
        if name not in GENERATORS:
            raise InputError(
                f"{data_path}: no generator '{name}'{did_you_mean(name, GENERATORS)}; known: {', '.join(GENERATORS)}"
            )
        return GENERATORS[name](shape, seed, count, encoder)
    clips = ClipFolder(data_path, made_by, digests=digests)
    if clips.shape != shape:
        raise InputError(
            f"{data_path}: clips of (channels, frames, height, width) {clips.shape} latents, the config asks for "
            f"{shape}; see sampling.height, sampling.width and rollout.num_training_frames"
        )
    return clips


DIRECTIONS = ("right", "down right", "down", "down left", "left", "up left", "up", "up right")
SPEEDS = {"slowly": 0.25, "steadily": 0.5, "quickly": 1.0}
"""Latent cells a frame."""


def moving_blobs(shape: Shape, seed: int, count: int, encoder: Callable[[], Encoder] | None) -> GeneratedClips:
    """Three soft bumps that move together; what leaves the picture comes in on the other side."""

    def caption(direction: str, speed: str) -> str:
        return f"soft blobs drift {speed} {direction}"

    def make(index: int) -> Clip:
        rng = np.random.default_rng((seed, index))
        turn, (speed, step) = int(rng.integers(len(DIRECTIONS))), list(SPEEDS.items())[rng.integers(len(SPEEDS))]
        angle = 2 * math.pi * turn / len(DIRECTIONS)
        return Clip(
            _blobs(shape, step * math.sin(angle), step * math.cos(angle), rng), caption(DIRECTIONS[turn], speed)
        )

    captions = tuple(caption(direction, speed) for direction in DIRECTIONS for speed in SPEEDS)
    return GeneratedClips(make, count, captions)


def _blobs(shape: Shape, down: float, right: float, rng: np.random.Generator, count: int = 3) -> Tensor:
    """Bumps of random place, width and colour, moved by (down, right) cells a frame."""
    channels, frames, height, width = shape
    time = np.arange(frames)[:, None]
    latents = np.zeros(shape)
    for _ in range(count):
        y, x = rng.uniform(0, height), rng.uniform(0, width)
        spread = rng.uniform(0.1, 0.2) * min(height, width)
        rows = _bump(np.arange(height) - y - down * time, height, spread)
        columns = _bump(np.arange(width) - x - right * time, width, spread)
        colour = rng.normal(0, 2, channels)
        latents += np.einsum("c,th,tw->cthw", colour, rows, columns)
    return torch.from_numpy(latents).to(torch.float32)


def _bump(distance: np.ndarray, period: int, spread: float) -> np.ndarray:
    """A Gaussian of the distance around a circle of this period."""
    around = (distance + period / 2) % period - period / 2
    return np.exp(-0.5 * (around / spread) ** 2)


def moving_shapes(
    shape: Shape, seed: int, count: int, encoder: Callable[[], Encoder] | None, draw: Draw = any_scene
) -> ShapeClips:
    assert encoder is not None, "clips of pictures need an encoder"
    return ShapeClips(shape, seed, count, encoder(), draw=draw)


GENERATORS: dict[str, Callable[[Shape, int, int, Callable[[], Encoder] | None], ClipSource]] = {
    "blobs": moving_blobs,
    "shapes": moving_shapes,
    "turning_shapes": partial(moving_shapes, draw=turning_scene),
    "mixed_shapes": partial(moving_shapes, draw=mixed_scene),
    "bars": partial(moving_shapes, draw=bars_scene),
    "remembered_shapes": partial(moving_shapes, draw=remembered_scene),
    "turning_remembered_shapes": partial(moving_shapes, draw=partial(turning_scene, draw=remembered_scene)),
}
