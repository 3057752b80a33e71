"""The published command at full size on a GPU, with random weights in the published layouts: about ten minutes."""

from __future__ import annotations

import os
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.scripts import load_script

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(3600)]


def load(name: str) -> ModuleType:
    return load_script(Path(__file__).parent / f"{name}.py")


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if given := os.environ.get("LONGSANA_FULL_SIZE_CACHE"):
        return Path(given)
    path = tmp_path_factory.mktemp("hub")
    load("hub_cache").build(path)
    return path


@pytest.fixture(scope="session")
def records(cache: Path) -> dict[int, dict[str, Any]]:
    measure = load("measure")
    return {n: measure.run(measure.DISTILLED, cache, "--num_frames", str(n)) for n in (81, 321, 961)}


def test_gpu_memory_does_not_depend_on_length(records: dict[int, dict[str, Any]]) -> None:
    peaks = {n: record["memory"]["gpu_peak_allocated"] for n, record in records.items()}
    assert max(peaks.values()) <= 1.01 * min(peaks.values()), peaks


def test_host_memory_does_not_depend_on_length(records: dict[int, dict[str, Any]]) -> None:
    rss = {n: record["memory"]["host_rss"] for n, record in records.items()}
    assert rss[961] <= 1.03 * rss[321], rss


def test_parts_add_up_to_the_wall_time(records: dict[int, dict[str, Any]]) -> None:
    timings = records[961]["timings"]
    parts = sum(timings[part] for part in ("denoise", "absorb", "decode", "write"))
    assert parts == pytest.approx(timings["wall"], rel=0.05), timings


def test_base_model_command(cache: Path) -> None:
    measure = load("measure")
    record = measure.run(measure.BASE, cache)
    assert record["frames"] == 81
    assert record["config"]["scheduler"]["sampling_algo"] == "flow_dpm-solver"
