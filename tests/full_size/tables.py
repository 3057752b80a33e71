"""Tables that are measured row by row: a row is in a file as soon as it is there, and the same command goes on."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch

from longsana.inference.sidecar import commit
from longsana.runtime.errors import InputError
from longsana.runtime.files import atomic_write_text

log = logging.getLogger("longsana")

UNFINISHED = 3
"""Exit status where the time was up before all rows were there."""


class Row(Protocol):
    """A row of a table, with the file of its figures."""

    @property
    def name(self) -> str: ...
    @property
    def file(self) -> str: ...


AnyRow = TypeVar("AnyRow", bound=Row)


def chosen(rows: Sequence[AnyRow], names: Sequence[str] | None) -> list[AnyRow]:
    """Choose rows by name; None: all.

    Raises:
        InputError: there is none of that name.
    """
    known = {row.name: row for row in rows}
    if unknown := [name for name in names or () if name not in known]:
        raise InputError(f"--only '{unknown[0]}': no such policy; there are: {'; '.join(known)}")
    return [known[name] for name in names or known]


def check_options(options: Any, *counts: str) -> None:
    """Refuse (InputError) counts below 1, and make the folder `options.out`."""
    for name in counts:
        if getattr(options, name) < 1:
            raise InputError(f"--{name} {getattr(options, name)}: must be at least 1")
    options.out.mkdir(parents=True, exist_ok=True)


def measure_each(
    out: Path,
    rows: Iterable[AnyRow],
    asked: Callable[[AnyRow], dict[str, Any]],
    measured: Callable[[AnyRow], dict[str, Any]],
    device: torch.device,
    *,
    minutes: float | None,
    finish: Callable[[Path], None],
) -> int:
    """Write the figures of each row that has none yet; returns 0, or `UNFINISHED` where the time was up before.

    asked: what decides a row's figures. measured: makes them. finish: is called after each row.
    minutes: no row is begun that would take longer than is left of them; None: as long as it takes.

    Raises:
        InputError: a row is there with other settings.
    """
    started, longest = time.perf_counter(), 0.0
    for row in rows:
        path, wanted = out / row.file, asked(row)
        if path.exists():
            if (there := json.loads(path.read_text(encoding="utf-8"))["asked"]) != wanted:
                raise InputError(f"{path}: was made with {there}, asked is {wanted}; choose another --out")
            continue
        begun = time.perf_counter()
        past = begun - started
        if minutes is not None and past + longest > 60 * minutes:
            log.info("%s: not begun, %.0f s have gone by; the same command goes on from here", row.name, past)
            return UNFINISHED
        result = measured(row)
        spent = time.perf_counter() - begun
        longest = max(longest, spent)
        machine = torch.cuda.get_device_name() if device.type == "cuda" else f"{os.cpu_count()} CPU cores"
        made = {"machine": machine, "torch": torch.__version__, "commit": commit()}
        atomic_write_text(path, json.dumps(result | {"asked": wanted, "seconds": round(spent, 1), **made}) + "\n")
        log.info("%s: %.0f s", row.name, spent)
        finish(out)
    return 0


def scores_of(out: Path, rows: Iterable[Row]) -> dict[str, Any]:
    """Read the figures that are there, by the rows' names."""
    paths = {row.name: out / row.file for row in rows}
    return {name: json.loads(path.read_text(encoding="utf-8")) for name, path in paths.items() if path.exists()}
