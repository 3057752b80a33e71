"""Measure what x264's macroblock tree and crf make of this project's videos: sizes, PSNR, and how files repeat.

    python tests/full_size/measure_mp4.py                 # samples four videos of the small default first
    python tests/full_size/measure_mp4.py FOLDER_OF_MP4S  # any others

Prints two tables in Markdown: for each video size and PSNR, relative to crf 18 with the tree; and how many different
files 60 encodes of the first video give, all with the default threads, and five with each of 1 to 12 threads.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from longsana.config import InferenceConfig
from longsana.evaluation.videos import read_pieces
from longsana.runtime import video

ROOT = Path(__file__).resolve().parents[2]
PRESET = InferenceConfig().video.preset
REFERENCE = (18, 1)  # crf, macroblock tree
OTHERS = [(18, 0), (20, 0), (22, 0)]


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


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(scratch) / "v"
        if len(sys.argv) == 1:
            sample(Path(scratch))
        paths = sorted(folder.glob("*.mp4"))
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
