"""The reports of a training run: metrics in a file, a bar on a terminal or lines without one, wandb if it is wanted.

`Wandb` stands on its own, for commands that have other files.
"""

from __future__ import annotations

import json
import logging
import math
import os
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import psutil
import torch
from tqdm import tqdm

from longsana.runtime.errors import InputError
from longsana.runtime.files import atomic_write_text, check_writable, naming, write_all

if TYPE_CHECKING:
    import wandb

log = logging.getLogger(__name__)

METRICS = "metrics.jsonl"
WANDB_ID = "wandb_id"
LINE_SECONDS = 60.0  # from log line to log line where there is no bar
# tqdm's own rate turns over to iterations a second below one second.
_BAR = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_inv_fmt}{postfix}]"


@dataclass(frozen=True)
class WandbRun:
    """Name the run on wandb.

    folder: where wandb keeps its files; a subfolder "wandb" is made in it.
    config: what the run's page shows as its settings.
    without: what a command line says to go without wandb, for messages.
    """

    project: str
    entity: str | None
    name: str | None
    folder: Path
    config: Mapping[str, Any]
    without: str = "--disable-wandb"


class Wandb:
    """A run on wandb, where one is wanted; without, everything here does nothing.

    What fails in wandb is warned of once and ends nothing; only what wandb itself says to a new run is an error.

    run: None for no wandb.
    numbers: the file that has all of them, for that warning.
    id_file: where the run's id is kept, with which a run that is `resumed` goes on in the same one.

    Raises:
        InputError: of a new run, wandb is wanted, but not installed or not to be reached.
    """

    def __init__(
        self, run: WandbRun | None, numbers: Path, id_file: Path | None = None, *, resumed: bool = False
    ) -> None:
        self._run = None if run is None else _start_wandb(run, id_file, resumed=resumed)
        self._numbers, self._failed = numbers, False

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Show numbers of a step."""
        self._tell(lambda run: run.log({"step": step, **values}))

    def video(self, step: int, name: str, path: Path) -> None:
        """Show the video at `path`."""
        self._show(step, name, lambda wandb: wandb.Video(str(path)))

    def picture(self, step: int, name: str, path: Path) -> None:
        """Show the picture at `path`."""
        self._show(step, name, lambda wandb: wandb.Image(str(path)))

    def table(self, step: int, name: str, rows: Sequence[Sequence[Any]]) -> None:
        """Show a table, whose first row is its head."""
        self._show(step, name, lambda wandb: wandb.Table(columns=list(rows[0]), data=[list(row) for row in rows[1:]]))

    def close(self, *, failed: bool = False) -> None:
        """Finish the run; `failed` marks it as crashed."""
        self._tell(lambda run: run.finish(exit_code=int(failed)))
        if self._failed:
            import wandb

            # Else wandb tries again when Python ends, and shows a traceback.
            with suppress(Exception):
                wandb.teardown()

    def __enter__(self) -> Wandb:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close(failed=error is not None)

    def _show(self, step: int, name: str, make: Callable[[Any], object]) -> None:
        if self._run is None:
            return
        import wandb

        self._tell(lambda run: run.log({"step": step, name: make(wandb)}))

    def _tell(self, action: Callable[[wandb.Run], object]) -> None:
        """Let wandb do something; if it cannot, the command goes on, and it is asked again the next time."""
        if self._run is None:
            return
        try:
            action(self._run)
        except Exception as error:  # its process was killed, its disk is full, its server is down ...
            if not self._failed:
                log.warning(
                    "wandb fails (%s: %s); the command goes on, and all numbers are in %s",
                    *(type(error).__name__, " ".join(str(error).split()), self._numbers),
                )
            self._failed = True


class RunLog:
    """The log of a run in `folder`; on other processes than the main one everything here does nothing.

    `{folder}/metrics.jsonl` has a JSON object a line: {"step": 7, "time": seconds since 1970, name: number, ...}; a
    number that is not finite is null.

    step: the iteration that comes next, counted from 0; 0 for a new run. Lines of this and later steps, written by
        a run that was killed after its last checkpoint, are dropped, and so is a line that it did not finish.
    total: iterations of the whole run.
    wandb: None for no wandb. A run that is resumed (step > 0) goes on in the wandb run of `{folder}/wandb_id`.

    Raises:
        InputError: the folder cannot be written to; or of a new run, wandb is wanted, but not installed or not to be
            reached.
    """

    def __init__(self, folder: Path, *, step: int, total: int, main: bool, wandb: WandbRun | None) -> None:
        self._main = main
        if not main:
            return
        check_writable(folder, "--logdir")
        self._path = folder / METRICS
        self._wandb = Wandb(wandb, self._path, folder / WANDB_ID, resumed=step > 0)
        try:
            _cut(self._path, step)
            self._file = self._path.open("ab", buffering=0)
        except (IsADirectoryError, PermissionError, FileNotFoundError) as error:
            raise InputError(f"{self._path}: cannot be written ({error.strerror}); choose another --logdir") from error
        self._next, self._total = step, total
        # None: no bar where there is no terminal.
        self._bar = tqdm(total=total, initial=step, desc="train", bar_format=_BAR, disable=None)
        self._told, self._told_at = step, time.perf_counter()

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Note the numbers of iteration `step`, which is over; a second call for one step adds a second line.

        Raises:
            OSError: the line could not be written, as on a full disk; nothing of it is in the file.
        """
        if not self._main:
            return
        assert step + 1 >= self._next, f"step {step} after step {self._next - 1}"
        assert not {"step", "time"} & values.keys(), sorted(values)
        assert all(isinstance(value, int | float) for value in values.values()), values
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        line = {"step": step, "time": round(time.time(), 3), **finite}
        self._append(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n")
        self._wandb.log(step, values)
        self._next = step + 1
        self._bar.set_postfix_str(_memory(), refresh=False)
        self._bar.update(self._next - self._bar.n)
        if self._bar.disable:
            self._tell(values)

    def video(self, step: int, name: str, path: Path) -> None:
        """Show the video at `path` on wandb; without wandb its file is all there is."""
        if self._main:
            self._wandb.video(step, name, path)

    def picture(self, step: int, name: str, path: Path) -> None:
        """Show the picture at `path` on wandb; without wandb its file is all there is."""
        if self._main:
            self._wandb.picture(step, name, path)

    def close(self, *, failed: bool = False) -> None:
        """Finish the files and the bar; `failed` marks the run on wandb as crashed."""
        if not self._main:
            return
        self._bar.close()
        self._file.close()
        self._wandb.close(failed=failed)

    def __enter__(self) -> RunLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close(failed=error is not None)

    def _append(self, line: str) -> None:
        handle = self._file.fileno()
        end = os.fstat(handle).st_size
        with naming(self._path):
            try:
                write_all(handle, line.encode())
            except OSError:
                with suppress(OSError):
                    os.ftruncate(handle, end)
                raise

    def _tell(self, values: Mapping[str, float]) -> None:
        """A line about the iterations since the last line, now and then."""
        steps, seconds = self._next - self._told, time.perf_counter() - self._told_at
        if not steps or (seconds < LINE_SECONDS and self._next < self._total):
            return
        left = timedelta(seconds=round(seconds / steps * (self._total - self._next)))
        numbers = "".join(f", {name} {value:.4g}" for name, value in values.items())
        log.info(
            "step %d of %d: %.2f s an iteration, %s left, %s%s",
            *(self._next, self._total, seconds / steps, left, _memory(), numbers),
        )
        self._told, self._told_at = self._next, time.perf_counter()


def _memory() -> str:
    if torch.cuda.is_initialized():
        return f"{torch.cuda.max_memory_allocated() / 2**30:.1f} GiB GPU peak"
    return f"{psutil.Process().memory_info().rss / 2**30:.1f} GiB host"


def _cut(path: Path, step: int) -> None:
    """Leave the whole lines of steps before `step`, byte for byte; the file is as it was or cut, never in between."""
    if not path.is_file():
        return
    lines = path.read_bytes().splitlines(keepends=True)
    kept = []
    for number, raw in enumerate(lines, start=1):
        try:
            line = raw.decode()
            written = json.loads(line)["step"]
            keep = written < step
        except (ValueError, KeyError, TypeError):
            log.warning("%s, line %d: not a whole line of metrics; dropped", path, number)
            continue
        if keep:
            # Killed just before the newline.
            kept.append(line if line.endswith("\n") else line + "\n")
    text = "".join(kept)
    if text.encode() != b"".join(lines):
        log.info(
            "%s: %d of %d lines are from before step %d; the others are dropped", path, len(kept), len(lines), step
        )
        atomic_write_text(path, text)


def _start_wandb(run: WandbRun, id_file: Path | None, *, resumed: bool) -> wandb.Run | None:
    """The run on wandb; None, with a warning, where it cannot be and the command is not to end for that."""
    try:
        return _open_wandb(run, id_file, resumed=resumed)
    except InputError as error:
        if not resumed:  # nothing is lost yet, and somebody may be looking
            raise
        log.warning("%s; the run goes on without wandb", error)
    except Exception as error:  # such as pydantic's, of an environment variable
        reason = " ".join(str(error).split())
        log.warning("wandb did not start (%s: %s); the run goes on without it", type(error).__name__, reason)
    return None


def _open_wandb(run: WandbRun, id_file: Path | None, *, resumed: bool) -> wandb.Run:
    """
    Raises:
        InputError: wandb is not installed, its folder cannot be written to, or it says that it cannot start.
    """
    try:
        import wandb
    except ModuleNotFoundError as error:
        if error.name != "wandb":
            raise
        raise InputError(
            f"wandb is not installed; install it with `pip install -e '.[wandb]'`, or go without: {run.without}"
        ) from error
    name = secrets.token_hex(4)
    if id_file is not None and resumed and id_file.is_file():
        name = id_file.read_text(encoding="utf-8").strip()
    elif id_file is not None:
        atomic_write_text(id_file, f"{name}\n")
    # wandb takes another folder, with a warning that nobody reads, where this one is missing.
    check_writable(run.folder, "--wandb-save-dir")
    try:
        started = wandb.init(
            project=run.project,
            entity=run.entity,
            name=run.name,
            dir=str(run.folder),
            config=dict(run.config),
            id=name,
            resume="allow",
        )
    except wandb.Error as error:
        reason = " ".join(str(error).split())
        raise InputError(
            f"wandb did not start ({reason}); run `wandb login`, set WANDB_MODE=offline, or go without: {run.without}"
        ) from error
    # wandb's own step never goes back: it would throw away what a resumed run does again after its checkpoint.
    started.define_metric("step")
    started.define_metric("*", step_metric="step")
    return started
