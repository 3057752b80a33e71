"""The README's snippets run, with the shapes model's folder in place of the hub's name, on a CPU, small and short."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import diffusers.utils
import imageio.v3 as iio
import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
INSTEAD = {
    r'"Efficient-Large-Model/[\w-]+"': "FOLDER",
    '"cuda"': '"cpu"',
    "height=480, width=832": "height=32, width=48",
    "num_frames=161": "num_frames=9",
    "num_frames=81": "num_frames=9",
    "num_frames=80": "num_frames=8",
}


def write(pictures: list[Any], path: str, fps: int) -> None:
    iio.imwrite(path, np.stack([np.asarray(picture) for picture in pictures]), plugin="pyav", codec="libx264", fps=fps)


def test_the_snippets(distilled_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    section = (ROOT / "README.md").read_text(encoding="utf-8").partition("## In Python\n")[2].partition("\n## ")[0]
    program = "\n".join(re.findall(r"```python\n(.*?)```", section, re.DOTALL))
    for text, replacement in INSTEAD.items():
        program, count = re.subn(text, replacement, program)
        assert count, text
    if importlib.util.find_spec("imageio_ffmpeg") is None:  # what diffusers writes files with
        monkeypatch.setattr(diffusers.utils, "export_to_video", write)
    shown: list[Any] = []
    monkeypatch.chdir(tmp_path)
    exec(program, {"FOLDER": distilled_folder, "show": shown.append})
    assert iio.imread(tmp_path / "longsana.mp4", plugin="pyav").shape[0] == 9
    assert [len(video) for video in shown] == [9, 8]
