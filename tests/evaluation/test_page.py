"""The page of an evaluation in a real browser: what it shows is there, plays, and has room in any window."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np

from longsana.commands import evaluate
from longsana.runtime.video import VideoWriter

PLACES = ("mine", "theirs")

PLAYED = """async () => {
  const found = [];
  for (const video of document.querySelectorAll("video")) {
    await video.play();
    while (!video.currentTime) await new Promise((done) => setTimeout(done, 20));
    found.push([video.videoWidth, video.videoHeight, video.clientWidth]);
    video.pause();
  }
  return found;
}"""
SIZES = "[...document.images].map((image) => [image.naturalWidth, image.getBoundingClientRect().width])"


def write(path: Path, seed: int, height: int, width: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pictures = np.random.default_rng(seed).integers(0, 256, (33, height, width, 3), dtype=np.uint8)
    with VideoWriter(path, 16, height, width, crf=30, preset="ultrafast") as video:
        video.append(pictures)


def test_the_page_in_a_wide_and_a_narrow_window(browser: Any, tmp_path: Path) -> None:
    """Names of files are what they may be, also in a comparison."""
    names = ("b & c/one #1? 50%.mp4", "b & c/ünï <b>.mp4", f"{'long-' * 40}.mp4")
    for side, name in enumerate(names):
        for seed, place in enumerate(PLACES):
            write(tmp_path / place / name, seed, 32 + 32 * side, 64)
    (tmp_path / "mine/broken.mp4").write_bytes(b"no video")
    given = [str(tmp_path / "mine"), "--against", str(tmp_path / "theirs"), "--out", str(tmp_path / "out")]
    assert evaluate.main([*given, "--device", "cpu"]) == 1
    for width in (1440, 390):
        page = browser.new_page(viewport={"width": width, "height": 900})
        said: list[str] = []
        page.on("console", lambda message, said=said: said.append(message.text))
        page.on("pageerror", lambda error, said=said: said.append(str(error)))
        page.goto((tmp_path / "out/evaluation.html").as_uri())
        assert page.evaluate("document.documentElement.scrollWidth") == width, "the page is wider than its window"
        played = page.evaluate(PLAYED)
        assert sorted(size[:2] for size in played) == sorted([64, 32 + 32 * side] for side in (0, 0, 1, 1, 2, 2))
        assert min(size[2] for size in played) >= (300 if width > 1000 else 150)
        (plot, shown), (strips, _) = page.evaluate(SIZES)
        assert plot > 1000 and strips > 400, "both pictures are there"
        assert shown >= 0.8 * plot, "and large enough to be read"
        links = page.evaluate("[...document.links].map((link) => link.getAttribute('href'))")
        assert sorted(map(unquote, links)) == sorted(f"../{place}/{name}" for place in PLACES for name in names)
        assert "broken.mp4: " in page.inner_text("ul") and not said
        page.close()
