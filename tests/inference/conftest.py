"""The inference command, run inside this process or as a user would."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import imageio.v3 as iio
import pytest

from tests.pipelines.repository import DEPTH, few_blocks
from tests.scripts import load_script

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "inference_video_scripts" / "inference_sana_video.py"
# Five latents in chunks of 3 and 2, a picture of 6 x 4 latents, a quarter of the blocks: seconds become tenths.
SMALL = [
    *("--num_frames", "17", "--height", "32", "--width", "48", "--sampling.chunk_frames", "2"),
    *("--threads", "1", "--fps", "8"),
    *("--model.depth", str(DEPTH), "--model_path", str(few_blocks("longsana"))),
]
SHIPPED = ("--model.depth", "12", "--model_path", str(ROOT / "asset/shapes/longsana.safetensors"))
"""After SMALL: the whole network, whose calm pictures x264 keeps."""


@pytest.fixture(scope="session")
def script() -> ModuleType:
    return load_script(SCRIPT)


@pytest.fixture
def prompts(tmp_path: Path) -> Callable[..., Path]:
    def write(*lines: str, name: str = "prompts.txt") -> Path:
        path = tmp_path / name
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return path

    return write


@pytest.fixture
def command(script: ModuleType, tmp_path: Path) -> Callable[..., int]:
    """Run the small command in this process; its exit status. Videos go to tmp_path/out/videos."""

    def run(*arguments: str | Path) -> int:
        where = ["--work_dir", str(tmp_path / "out"), "--dataset", "videos"]
        status: int = script.main([*SMALL, *where, *map(str, arguments)])
        return status

    return run


def launch(*arguments: str | Path, launcher: tuple[str, ...] = (), **options: Any) -> subprocess.CompletedProcess[str]:
    """Run the small command as a process of its own."""
    start = [sys.executable, *(("-m", *launcher) if launcher else ())]
    return subprocess.run(
        [*start, str(SCRIPT), *SMALL, *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        **options,
    )


def sidecars(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) | {"name": path.stem} for path in sorted(folder.glob("[!.]*.json"))]


def latents(folder: Path) -> dict[tuple[str, int], str]:
    """Digest of the latents of each prompt, by its identity."""
    return {(record["prompt"], record["repetition"]): record["latents_sha256"] for record in sidecars(folder)}


def frames_of(video: Path) -> tuple[int, ...]:
    """(frames, height, width, 3) of a video that decodes to its end."""
    return tuple(iio.imread(video, plugin="pyav").shape)


def assert_whole(folder: Path, count: int, frames: int = 17) -> None:
    """`count` videos, each complete and with its sidecar, and nothing else."""
    videos = sorted(folder.glob("*.mp4"))
    assert len(videos) == count
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        [video.name for video in videos] + [video.with_suffix(".json").name for video in videos]
    )
    for video in videos:
        record = json.loads(video.with_suffix(".json").read_text())
        assert record["bytes"] == video.stat().st_size
        assert frames_of(video) == (frames, record["height"], record["width"], 3)
