"""Run the published command at full size for several lengths and print what it cost, as a table and JSON.

python tests/full_size/hub_cache.py /tmp/hub
python tests/full_size/measure.py --cache /tmp/hub --frames 81 321 961 3841 --out /tmp/full_size.json
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = "inference_video_scripts/inference_sana_video.py"
# The published command, byte for byte, but for where it writes and how many frames and prompts.
DISTILLED = (
    f"accelerate launch --mixed_precision=bf16 {SCRIPT} "
    "--config=configs/sana_video_config/Sana_2000M_480px_adamW_fsdp_longsana.yaml "
    "--model_path=hf://Efficient-Large-Model/SANA-Video_2B_480p_LongLive/checkpoints/SANA_Video_2B_480p_LongLive.pth "
    "--txt_file=asset/samples/video_prompts_samples.txt --dataset=samples --cfg_scale=1.0"
)
BASE = (
    f"accelerate launch --mixed_precision=bf16 {SCRIPT} "
    "--config=configs/sana_video_config/Sana_2000M_480px_AdamW_fsdp.yaml "
    "--model_path=hf://Efficient-Large-Model/SANA-Video_2B_480p/checkpoints/SANA_Video_2B_480p.pth "
    "--txt_file=asset/samples/video_prompts_samples.txt --cfg_scale 6 --motion_score 30 --flow_shift 8"
)
GIB = 2**30


def run(command: str, cache: Path, *extra: str) -> dict[str, Any]:
    """One prompt through the command in a process of its own: its sidecar, with the launch's wall seconds."""
    with tempfile.TemporaryDirectory() as work_dir:
        started = time.perf_counter()
        subprocess.run(
            [*command.split(), "--work_dir", work_dir, "--end_index", "1", *extra],
            cwd=ROOT,
            env=os.environ | {"HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": "1"},
            check=True,
        )
        seconds = time.perf_counter() - started
        (sidecar,) = Path(work_dir).glob("*/*.json")
        record: dict[str, Any] = json.loads(sidecar.read_text())
    return record | {"launch_seconds": round(seconds, 1)}


def row(record: dict[str, Any]) -> dict[str, Any]:
    timings, memory, frames = record["timings"], record["memory"], record["frames"]
    latents = timings["denoise"] + timings.get("absorb", 0.0)
    parts = ("text", "denoise", "absorb", "decode", "write", "wall")
    return {
        "frames": frames,
        **{part: round(timings[part], 2) for part in parts if part in timings},
        "FPS end to end": round(frames / timings["wall"], 1),
        "FPS without decoder": round(frames / latents, 1),
        "peak GPU GiB": round(memory.get("gpu_peak_allocated", 0) / GIB, 3),
        "host RSS GiB": round(memory["host_rss"] / GIB, 3),
        "launch": record["launch_seconds"],
    }


def table(rows: list[dict[str, Any]]) -> str:
    lines = [list(rows[0]), ["---"] * len(rows[0])] + [[str(value) for value in row.values()] for row in rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--frames", type=int, nargs="*", default=[81, 321, 961, 3841])
    parser.add_argument("--base", action="store_true", help="also the bidirectional base model, 81 frames")
    parser.add_argument("--out", type=Path, required=True, help="JSON; runs already in it are kept")
    options = parser.parse_args()
    records = json.loads(options.out.read_text()) if options.out.exists() else {}
    wanted = {str(frames): (DISTILLED, ["--num_frames", str(frames)]) for frames in options.frames}
    if options.base:
        wanted["base"] = (BASE, [])
    for name, (command, extra) in wanted.items():
        records[name] = run(command, options.cache, *extra)
        options.out.write_text(json.dumps(records, indent=1))
        print(name, row(records[name]), flush=True)
    print(table([row(record) for name, record in records.items() if name != "base"]))


if __name__ == "__main__":
    main()
