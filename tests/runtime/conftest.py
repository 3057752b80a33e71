from __future__ import annotations

from tests.training.conftest import small_training, trajectories

__all__ = ["small_training", "trajectories"]
