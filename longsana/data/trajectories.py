"""Trajectories from noise to video, of which the ODE stage learns (method.md 7.5): on disk, and the published LMDB."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from longsana.data.lmdb_entries import DATA, SHAPE, latents, problem_of, prompt, stored_shape
from longsana.data.shards import MANIFEST, ShardFolder
from longsana.runtime.errors import InputError

if TYPE_CHECKING:
    import lmdb

log = logging.getLogger(__name__)

KIND = "trajectories"
SIGMAS = "sigmas"  # in a manifest's made_by
COMMAND = "train_video_scripts/generate_ode_pairs.py"
# The recipe of the published LMDB: states 0, 12, 24, 36 and the last of 48 steps at shift 8.
PUBLISHED_SIGMAS = (1.0, 0.96, 8 / 9, 8 / 11, 0.0)
TOLERANCE = 5e-4


class Trajectory(NamedTuple):
    """states: (S, C, T, H, W), of the dtype that they are stored in, from noise to clean latents."""

    states: Tensor
    prompt: str


class Source(Protocol):
    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[Tensor, str]: ...

    def prompts(self) -> list[str]: ...


class Trajectories:
    """sigmas: the noise level of each of the S states, the last 0. shape: (S, C, T, H, W) of every item."""

    def __init__(self, source: Source, sigmas: Sequence[float], shape: tuple[int, ...]) -> None:
        assert len(sigmas) == shape[0]
        self.sigmas, self.shape = tuple(sigmas), shape
        self._source = source

    @classmethod
    def open(cls, path: str | Path, *, digests: bool = True) -> Trajectories:
        """A folder that `generate_ode_pairs.py` has finished, or an LMDB in the published layout.

        digests: see `ShardFolder`; of an LMDB, which has none, every entry is looked at.

        Raises:
            InputError: it is neither, or not whole.
        """
        path = Path(path)
        if (path / DATA).is_file() and not (path / MANIFEST).exists():
            source = PublishedLmdb(path, whole=digests)
            if source.shape[0] != len(PUBLISHED_SIGMAS):
                raise InputError(
                    f"{path}: {source.shape[0]} states an item, and an LMDB does not say at which noise levels; only "
                    f"the published recipe of {len(PUBLISHED_SIGMAS)} is known"
                )
            log.info("%s: an LMDB has no noise levels; taken to be the published ones, %s", path, PUBLISHED_SIGMAS)
            return cls(source, PUBLISHED_SIGMAS, source.shape)
        folder = ShardFolder(path, KIND, f"run {COMMAND} --out {path}", digests=digests)
        return cls(folder, folder.contents.made_by[SIGMAS], folder.contents.shape)

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> Trajectory:
        return Trajectory(*self._source[index])

    def prompts(self) -> list[str]:
        """The prompts of all items, in order."""
        return self._source.prompts()


def open_trajectories(path: str | Path, *, shape: tuple[int, int, int, int], digests: bool = True) -> Trajectories:
    """`Trajectories.open`, of clips of this shape (C, T, H, W).

    Raises:
        InputError: as there, or the shape is another.
    """
    trajectories = Trajectories.open(path, digests=digests)
    if trajectories.shape[1:] != shape:
        raise InputError(
            f"{path}: trajectories of (channels, frames, height, width) {trajectories.shape[1:]} latents, the config "
            f"asks for {shape}; see sampling.height, sampling.width and rollout.num_training_frames"
        )
    return trajectories


def check_grid(sigmas: Sequence[float], wanted: Sequence[float]) -> None:
    """Refuse trajectories whose states lie at other noise levels than the student's steps.

    Args:
        sigmas: of the states, the last 0.
        wanted: the schedule's sigma of each of the student's steps, then 0.

    Raises:
        InputError: they differ by more than 5e-4, or in number.
    """
    same = len(sigmas) == len(wanted) and all(abs(a - b) <= TOLERANCE for a, b in zip(sigmas, wanted, strict=True))
    if not same:
        raise InputError(
            f"the trajectories' noise levels are {_grid(sigmas)}, those of scheduler.denoising_step_list are "
            f"{_grid(wanted)}; they may differ by {TOLERANCE:g}: change the list, scheduler.inference_flow_shift, or "
            "pairs.shift and pairs.num_steps of the trajectories"
        )


class PublishedLmdb:
    """Keys: latents_shape, "N S T C H W"; latents_{i}_data, float16 in that order; prompts_{i}_data, UTF-8.

    shape: (S, C, T, H, W) of an item.
    whole: look at all entries first. What is read later is trusted, and a file that was cut ends the process.

    Raises:
        InputError: the package lmdb is missing, or the file is not of this layout, or not whole.
    """

    def __init__(self, path: Path, *, whole: bool = True) -> None:
        self.path = path
        _check_lmdb(path)
        if whole:
            log.info("%s: looking at all entries", path)
            if (problem := problem_of(path)) is not None:
                raise InputError(f"{path}: {problem}")
        self._environment: lmdb.Environment = _open_lmdb(path)
        try:
            self._count, states, frames, channels, height, width = stored_shape(self._read(SHAPE))
        except InputError:
            raise
        except ValueError as error:
            raise self._wrong(str(error)) from error
        self._stored = (states, frames, channels, height, width)
        self.shape = (states, channels, frames, height, width)
        self[0], self[self._count - 1]  # of the right size, or refused now

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> tuple[Tensor, str]:
        if not 0 <= index < len(self):
            raise IndexError(f"item {index} of {len(self)}")
        key = latents(index)
        raw = self._read(key)
        expected = 2 * int(np.prod(self._stored))
        if len(raw) != expected:
            raise self._wrong(f"{key} is {len(raw)} bytes, latents_shape says {expected}")
        values = torch.from_numpy(np.frombuffer(raw, dtype="<f2").astype(np.float16)).view(self._stored)
        return values.transpose(1, 2).contiguous(), self._prompt(index)

    def prompts(self) -> list[str]:
        return [self._prompt(index) for index in range(len(self))]

    def _prompt(self, index: int) -> str:
        try:
            return self._read(prompt(index)).decode("utf-8")
        except UnicodeDecodeError as error:
            raise self._wrong(f"{prompt(index)} is not UTF-8") from error

    def _read(self, key: str) -> bytes:
        with self._environment.begin() as transaction:
            value: Any = transaction.get(key.encode())
        if value is None:
            raise self._wrong(f"no entry {key}")
        return bytes(value)

    def _wrong(self, what: str) -> InputError:
        return InputError(f"{self.path}: not an LMDB of trajectories: {what}")


def _check_lmdb(path: Path) -> None:
    try:
        import lmdb  # noqa: F401 (whether it is there)
    except ImportError as error:
        raise InputError(f"{path}: an LMDB needs the package lmdb; pip install -e '.[lmdb]'") from error


def _open_lmdb(path: Path) -> lmdb.Environment:
    import lmdb

    try:
        # Not locked: many processes read, from disks that may be read-only.
        return lmdb.open(str(path), readonly=True, lock=False, readahead=False)
    except lmdb.Error as error:
        raise InputError(f"{path}: not an LMDB that can be read ({error})") from error


def _grid(sigmas: Sequence[float]) -> str:
    return "(" + ", ".join(f"{sigma:.6g}" for sigma in sigmas) + ")"
