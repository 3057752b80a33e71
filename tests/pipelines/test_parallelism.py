"""Pipelines of several processes make one video."""

from __future__ import annotations

from pathlib import Path

import pytest

from longsana.runtime.errors import InputError
from tests.forks import Forks
from tests.pipelines.repository import quiet, shapes_repository


def test_two_processes_make_the_videos_of_one(forks: Forks, tmp_path: Path) -> None:
    """To rounding, and the same on both to the bit; see tests/pipelines/together.py."""
    peers = forks.launch(2, "tests.pipelines.together", [shapes_repository(tmp_path)])
    said = [peer.finish() for peer in peers]
    assert [peer.returncode for peer in peers] == [0, 0], said


def test_without_other_processes_it_says_how_to_start(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="enable_parallelism: there are no other processes; start with torchrun"):
        quiet(shapes_repository(tmp_path)).enable_parallelism()
