from __future__ import annotations

from pathlib import Path

import pytest

from longsana.pipelines.video import LongSanaVideoPipeline
from longsana.sampling.captions import caption_encoder
from longsana.sampling.engine import Engine
from tests.pipelines.repository import BASE, around, quiet, shapes_repository
from tests.sampling.test_ltx2 import small_720p


@pytest.fixture(scope="session")
def distilled_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shapes_repository(tmp_path_factory.mktemp("distilled"))


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shapes_repository(tmp_path_factory.mktemp("base"), BASE)


@pytest.fixture(scope="session")
def loaded(distilled_folder: Path) -> LongSanaVideoPipeline:
    """The distilled model, for tests that leave it as it is."""
    return quiet(distilled_folder)


@pytest.fixture(scope="session")
def loaded_base(base_folder: Path) -> LongSanaVideoPipeline:
    return quiet(base_folder)


@pytest.fixture
def pipe(distilled_folder: Path) -> LongSanaVideoPipeline:
    """The distilled model, of the test's own."""
    return quiet(distilled_folder)


@pytest.fixture(scope="session")
def looking_ahead(tmp_path_factory: pytest.TempPathFactory) -> LongSanaVideoPipeline:
    """A decoder that looks 8 latents ahead."""
    folder = tmp_path_factory.mktemp("ahead")
    engine = Engine(small_720p(folder, decoder_causal=False), "cpu")
    with caption_encoder(engine.config, engine.device) as encode:
        text = encode.encoder.tokenizer, encode.encoder.model
    return around(*engine.load(), *text, folder)
