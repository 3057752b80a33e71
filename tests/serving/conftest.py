from __future__ import annotations

from collections.abc import Iterator

import pytest

from longsana.config import InferenceConfig
from longsana.pipelines.video import LongSanaVideoPipeline
from longsana.serving.studio import Studio
from tests.pipelines.repository import quiet, shapes_config, shapes_repository
from tests.serving.server import running

__all__ = ["running"]


@pytest.fixture(scope="session")
def config() -> InferenceConfig:
    """The small default at 48x32 with the VAE's own decoder, as the pipeline has it."""
    return shapes_config(**{"vae.decoder": "full", "vae.latents_per_call": 2, "sampling.chunk_frames": 2})


@pytest.fixture(scope="module")
def studio(config: InferenceConfig, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Studio]:
    with Studio(config, snapshots=tmp_path_factory.mktemp("snapshots")) as studio:
        yield studio


@pytest.fixture(scope="module")
def pipe(tmp_path_factory: pytest.TempPathFactory) -> LongSanaVideoPipeline:
    return quiet(shapes_repository(tmp_path_factory.mktemp("distilled")))
