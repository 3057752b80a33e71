"""A chunk whose frames are divided among processes is the chunk of one process, to rounding."""

from __future__ import annotations

import pytest

from tests.forks import Forks


@pytest.mark.parametrize("processes", [2, 3, 5])
def test_a_video_of_several_processes_is_that_of_one(forks: Forks, processes: int) -> None:
    """Within 1e-10 in float64; what each process has is the same to the bit. See tests/models/together.py."""
    peers = forks.launch(processes, "tests.models.together", ["passes", "videos", "decoders"])
    said = [peer.finish() for peer in peers]
    assert [peer.returncode for peer in peers] == [0] * processes, said
