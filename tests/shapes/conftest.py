from __future__ import annotations

import pytest

from longsana.shapes.scenes import Scene
from longsana.shapes.sight import Seen
from tests.shapes.films import scenes, watch


@pytest.fixture(scope="session")
def truth() -> tuple[list[Scene], Seen]:
    """Scenes, and what is seen in clips of 81 frames as they should be."""
    drawn = scenes(40)
    return drawn, watch(drawn)
