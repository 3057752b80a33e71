"""Measure what x264's macroblock tree and crf make of this project's videos: sizes, PSNR, and how files repeat.

    python tests/full_size/measure_mp4.py                 # samples four videos of the small default first
    python tests/full_size/measure_mp4.py FOLDER_OF_MP4S  # any others
    python tests/full_size/measure_mp4.py --against 4feb99d [FOLDER_OF_MP4S]
    python tests/full_size/measure_mp4.py --drafts

Prints two tables in Markdown: for each video size and PSNR, relative to crf 18 with the tree; and how many different
files 60 encodes of the first video give, all with the default threads, and five with each of 1 to 12 threads.

With --against it prints one: for each of these videos, and for 961 frames of noise and of smooth pictures at 480p and
720p, what the writer of another commit makes of them and what this one does: bytes, PSNR, seconds, CPU seconds.

With --drafts: what presets make of the pictures that are coded for who watches.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import itertools
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from types import ModuleType

import av
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

if __name__ == "__main__":
    from longsana.runtime.process import share_cores

    share_cores()  # before torch is imported

from longsana.config import InferenceConfig
from longsana.evaluation.videos import read_pieces
from longsana.runtime import h264, video

ROOT = Path(__file__).resolve().parents[2]
PRESET = InferenceConfig().video.preset
REFERENCE = (18, 1)  # crf, macroblock tree
OTHERS = [(18, 0), (20, 0), (22, 0)]
CRF = InferenceConfig().video.crf
LONG, CHUNK = 961, 40
REPEATS = 3


def read(path: Path) -> np.ndarray:
    return np.concatenate([piece[0].numpy() for piece in read_pieces(path)])


def encode(frames: np.ndarray, path: Path, crf: int, tree: int, threads: int = video.THREADS) -> tuple[int, float]:
    """Bytes of the file, and PSNR in dB."""
    video.X264 = f"mbtree={tree}"
    height, width = frames.shape[1:3]
    with video.VideoWriter(path, 16, height, width, crf, PRESET, threads) as writer:
        writer.append(frames)
    error = read(path).astype(np.float64) - frames
    return writer.size, float(10 * np.log10(255**2 / np.square(error).mean()))


def sample(folder: Path) -> None:
    """Four videos of the default, without loss."""
    script = ROOT / "inference_video_scripts/inference_sana_video.py"
    command = [sys.executable, script, "--work_dir", folder, "--dataset", "v", "--end_index", "4", "--video.crf", "0"]
    subprocess.run(command, check=True, cwd=ROOT)


def writer_of(commit: str, folder: Path) -> ModuleType:
    """The file of another commit, which still finds what it imports here."""
    source = subprocess.check_output(["git", "show", f"{commit}:longsana/runtime/video.py"], cwd=ROOT)
    (folder / "other_video.py").write_bytes(source)
    spec = importlib.util.spec_from_file_location("other_video", folder / "other_video.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def pictures(kind: str, height: int, width: int) -> np.ndarray:
    """Two chunks (F, H, W, 3): a texture of noise, or slow waves of colour, that moves by a few pixels a frame."""
    if kind == "noise":
        texture = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    else:
        y, x = np.mgrid[:height, :width] * (2 * np.pi / 160)
        waves = [np.sin(x + phase) + np.cos(y - phase) for phase in range(3)]
        texture = np.stack([127.5 + 60 * wave for wave in waves], axis=-1).astype(np.uint8)
    return np.stack([np.roll(texture, (shift, 3 * shift), axis=(0, 1)) for shift in range(2 * CHUNK)])


def forth_and_back(frames: np.ndarray) -> Iterator[np.ndarray]:
    """LONG frames in chunks, from a few."""
    halves = [frames[:CHUNK], frames[CHUNK:], frames[::-1][:CHUNK], frames[::-1][CHUNK:]]
    left = LONG
    for half in itertools.cycle(halves):
        yield half[:left]
        left -= len(half[:left])
        if not left:
            return


def written(module: ModuleType, chunks: Sequence[np.ndarray], path: Path, preset: str) -> tuple[float, ...]:
    """Bytes, PSNR in dB, seconds, CPU seconds; of REPEATS files the least of either."""
    height, width = chunks[0].shape[1:3]
    walls, busy = [], []
    for _ in range(REPEATS):
        before = time.perf_counter(), time.process_time()
        with module.VideoWriter(path, 16, height, width, CRF, preset) as writer:
            for chunk in chunks:
                writer.append(chunk)
        walls.append(time.perf_counter() - before[0])
        busy.append(time.process_time() - before[1])
    squares: list[float] = []
    with av.open(path) as container:
        for frame, pixels in zip(container.decode(video=0), itertools.chain(*chunks), strict=True):
            squares.append(float(np.square(frame.to_ndarray(format="rgb24").astype(np.float32) - pixels).mean()))
    return writer.size, float(10 * np.log10(255**2 / np.mean(squares))), min(walls), min(busy)


def compare(commit: str, paths: Sequence[Path], scratch: Path) -> None:
    other, out = writer_of(commit, scratch), scratch / "out.mp4"
    print("| video | frames | before | now | PSNR | seconds (CPU) before | now |\n|---|---|---|---|---|---|---|")
    cases: list[tuple[str, str, list[np.ndarray]]] = [(path.stem[:24], PRESET, [read(path)]) for path in paths]
    for (name, height, width, preset), kind in itertools.product(
        (("480p", 480, 832, PRESET), ("720p", 704, 1280, "superfast")), ("noise", "smooth")
    ):
        cases.append((f"{kind}, {name}, {preset}", preset, list(forth_and_back(pictures(kind, height, width)))))
    for name, preset, chunks in cases:
        before, now = (written(module, chunks, out, preset) for module in (other, video))
        times = " | ".join(f"{row[2]:.2f} ({row[3]:.2f})" for row in (before, now))
        sizes = f"{before[0] / 1e3:,.1f} kB | {now[0] / before[0]:.4f} x"
        print(
            f"| {name} | {sum(map(len, chunks))} | {sizes} | {before[1]:.2f} dB, {now[1] - before[1]:+.3f} | {times} |",
            flush=True,
        )


def drafts() -> None:
    print("| video | preset | first 5 pictures, ms | all 49 (CPU) | kB | PSNR |\n|---|---|---|---|---|---|")
    sizes = (("480p", 480, 832), ("720p", 704, 1280))
    for (name, height, width), kind in itertools.product(sizes, ("noise", "smooth")):
        frames = pictures(kind, height, width)[: video.DRAFTED]
        for preset in ("ultrafast", "superfast", "veryfast"):
            video.DRAFT["preset"] = preset
            first, wall, busy = [], [], []
            for _ in range(REPEATS):
                encoder = h264.zerolatency_encoder(width, height, Fraction(16), CRF, video.THREADS)
                packets, began = [], (time.perf_counter(), time.process_time())
                for place, pixels in enumerate(frames):
                    packets += encoder.encode(video._frame(pixels, place))
                    if place == 4:
                        first.append(1e3 * (time.perf_counter() - began[0]))
                wall.append(1e3 * (time.perf_counter() - began[0]))
                busy.append(1e3 * (time.process_time() - began[1]))
            decoder = av.CodecContext.create("h264", "r")
            decoder.extradata = encoder.extradata
            shown = [picture.to_ndarray(format="rgb24") for packet in packets for picture in decoder.decode(packet)]
            errors = [
                np.square(one.astype(np.float32) - other).mean() for one, other in zip(shown, frames, strict=True)
            ]
            psnr = 10 * np.log10(255**2 / np.mean(errors))
            kilobytes = sum(packet.size for packet in packets) / 1e3
            print(
                f"| {kind}, {name} | {preset} | {min(first):.0f} | {min(wall):.0f} ({min(busy):.0f}) | "
                f"{kilobytes:,.0f} | {psnr:.2f} dB |",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--against", metavar="COMMIT")
    parser.add_argument("--drafts", action="store_true")
    given = parser.parse_args()
    if given.drafts:
        drafts()
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = given.folder or Path(scratch) / "v"
        if given.folder is None:
            sample(Path(scratch))
        paths = sorted(folder.glob("*.mp4"))
        if given.against:
            compare(given.against, paths, Path(scratch))
            return
        out = Path(scratch) / "out.mp4"
        names = [f"crf {crf}, {'with' if tree else 'without'}" for crf, tree in (REFERENCE, *OTHERS)]
        print(f"| video | {' | '.join(names)} |\n|---|{'---|' * len(names)}")
        for path in paths:
            frames = read(path)
            size, psnr = encode(frames, out, *REFERENCE)
            cells = [f"{size / 1e3:.1f} kB, {psnr:.1f} dB"]
            for crf, tree in OTHERS:
                other, quality = encode(frames, out, crf, tree)
                cells.append(f"{other / size:.2f} x, {quality - psnr:+.2f} dB")
            print(f"| {path.stem[:24]} | {' | '.join(cells)} |", flush=True)
        frames = read(paths[0])
        print(f"\n| macroblock tree | 60 files, {video.THREADS} threads | 60 files, 1 to 12 threads |\n|---|---|---|")
        for tree in (1, 0):
            counts = []
            for threads in ([video.THREADS] * 60, [number % 12 + 1 for number in range(60)]):
                digests = set()
                for count in threads:
                    encode(frames, out, 18, tree, count)
                    digests.add(hashlib.sha256(out.read_bytes()).hexdigest())
                counts.append(f"{len(digests)} different")
            print(f"| {'with' if tree else 'without'} | {' | '.join(counts)} |", flush=True)


if __name__ == "__main__":
    main()
