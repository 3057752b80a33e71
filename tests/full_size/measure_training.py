"""Run the published training commands at full size on one GPU and print what an iteration costs, as a table and JSON.

python tests/full_size/hub_cache.py /tmp/hub
python tests/full_size/measure_training.py --cache /tmp/hub --out /tmp/training.json self_forcing=6 longsana=24

and for 720p `hub_cache.py --size 720`, `measure_training.py --size 720`, which starts every stage from the base model.

A checkpoint of two networks takes 58 GB, so none is written unless --save is given: then the run is stopped after its
iterations, and the same command goes on for two more. With --hold GB the allocator refuses what a GPU of so many 10^9
bytes would not have; CUDA's own context comes on top. A stage that then ends without memory is recorded as that.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

if __name__ == "__main__":
    from longsana.runtime.process import share_cores

    share_cores()  # before torch is imported

import torch

from longsana.config import load_config
from longsana.flow.schedule import FlowSchedule
from longsana.training.checks import DISTILLING
from longsana.training.config import TrainingConfig
from longsana.training.estimate import estimate, model_flops
from longsana.training.stages.stage import MicroBatch

ROOT = Path(__file__).resolve().parents[2]

DENSE_BF16 = 989e12  # FLOP/s of an H100 or H200 by the vendor's datasheet
GIB = 2**30
BASE_720P = "hf://Efficient-Large-Model/SANA-Video_2B_720p/checkpoints/SANA_Video_2B_720p.pth"


def run(
    path: str, iterations: int, cache: Path, logdir: Path, settings: list[str], hold: float | None
) -> list[dict[str, Any]] | None:
    """The lines of a run's log; None if it needs more than the `hold` GB that it may take of a GPU."""
    command = [
        *("torchrun", "--standalone", f"--nproc_per_node={torch.cuda.device_count()}"),
        "train_video_scripts/train_longsana.py",
        *("--config_path", path, "--logdir", str(logdir)),
        *("--disable-wandb", "--no_visualize", "--max_iters", str(iterations)),
        *settings,
    ]
    print(" ".join(command), flush=True)
    environment = os.environ | {"HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": "1"}
    if hold is not None:
        share = hold * 1e9 / torch.cuda.get_device_properties(0).total_memory
        environment |= {"PYTORCH_CUDA_ALLOC_CONF": f"per_process_memory_fraction:{share:.6f}"}
    done = subprocess.run(command, cwd=ROOT, env=environment, check=False, stderr=subprocess.PIPE, text=True)
    sys.stderr.write(done.stderr)
    if hold is not None and "out of memory" in done.stderr:
        return None
    done.check_returncode()
    return [json.loads(line) for line in (logdir / "metrics.jsonl").read_text().splitlines()]


def summary(stage: str, path: str, lines: list[dict[str, Any]], settings: list[str]) -> dict[str, Any]:
    """What iterations cost after the first two, which allocate and choose algorithms."""
    overrides = [item for item in settings if "=" in item]
    config: TrainingConfig = load_config(ROOT / path, overrides, TrainingConfig)
    processes = torch.cuda.device_count()
    peaks = [line["gpu_peak_allocated"] / GIB for line in lines]
    result: dict[str, Any] = {
        "stage": stage,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "gpus": processes,
        "torch": torch.__version__,
        "iterations": len(lines),
        "estimated GiB": round(estimate(config, processes).total / GIB, 1),
        "peak GiB": round(max(peaks), 1),
    }
    kinds: dict[str, list[dict[str, Any]]] = {}
    for line in lines[2:]:
        roles = [role for role in ("generator", "critic") if f"{role}_loss" in line]
        kinds.setdefault(" and ".join(roles), []).append(line | {"roles": roles})
    for kind, chosen in kinds.items():
        seconds = [line["per iteration time"] for line in chosen]
        flops = [
            config.train.batch_size
            * sum(model_flops(config, role, exit_step=drawn(config, line, role)) for role in line["roles"])
            for line in chosen
        ]
        result[kind] = {
            "iterations": len(chosen),
            "s": round(sum(seconds) / len(seconds), 2),
            "s, least and most": [round(min(seconds), 2), round(max(seconds), 2)],
            "model TFLOP": round(sum(flops) / len(flops) / 1e12),
            "MFU": round(sum(flops) / sum(seconds) / DENSE_BF16, 3),
        }
    return result


def drawn(config: TrainingConfig, line: dict[str, Any], role: str) -> int | None:
    """The exit step of an update, which decides how often the network ran; as `SelfForcing` draws it."""
    if config.trainer not in DISTILLING:
        return None
    rng = MicroBatch(config.train.seed, line["step"], role, 0, range(1), torch.device("cpu")).shared_rng("exit")
    steps = FlowSchedule.from_config(config.scheduler).steps
    return int(torch.randint(len(steps), (2,), generator=rng)[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stages", nargs="+", help="STAGE=ITERATIONS")
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True, help="JSON; runs already in it are kept")
    parser.add_argument("--save", action="store_true", help="write a checkpoint at the end, and go on from it")
    parser.add_argument("--scratch", help="folder for the runs' folders")
    parser.add_argument("--size", type=int, choices=(480, 720), default=480)
    parser.add_argument("--hold", type=float, metavar="GB", help="of each GPU's memory, so many 10^9 bytes alone")
    parser.add_argument("--set", nargs="*", default=[], help="settings, as section.key=value")
    options = parser.parse_args()
    records = json.loads(options.out.read_text()) if options.out.exists() else {}
    for item in options.stages:
        stage, _, iterations = item.partition("=")
        path = f"configs/sana_video_config/longsana/{options.size}ms/{stage}.yaml"
        settings = ["train.total_batch_size=null", *options.set]
        if options.size == 720:
            settings.append(f"model.load_from={BASE_720P}")
        if stage != "ode":
            settings.append("data.data_path=asset/samples/video_prompts_samples.txt")
        with tempfile.TemporaryDirectory(dir=options.scratch) as folder:
            started = time.perf_counter()
            given = settings + ([] if options.save else ["--no_save"])
            lines = run(path, int(iterations), options.cache, Path(folder), given, options.hold)
            if lines is None:
                records[item] = {"held to GB": options.hold, "fits": False, "settings": settings}
                options.out.write_text(json.dumps(records, indent=1))
                print(json.dumps(records[item]), flush=True)
                continue
            seconds = round(time.perf_counter() - started, 1)
            record = {"summary": summary(stage, path, lines, settings), "launch s": seconds}
            record |= {"held to GB": options.hold, "fits": True} if options.hold else {}
            if options.save:
                (saved,) = Path(folder).glob("checkpoint_model_*")
                record["checkpoint GB"] = round(sum(file.stat().st_size for file in saved.iterdir()) / 1e9, 1)
                started = time.perf_counter()
                lines = run(
                    path, int(iterations) + 2, options.cache, Path(folder), [*settings, "--no_save"], options.hold
                )
                assert lines is not None, "it ran before in the same memory"
                record["resumed launch s"] = round(time.perf_counter() - started, 1)
            records[item] = record | {"lines": lines}
        options.out.write_text(json.dumps(records, indent=1))
        print(json.dumps({name: value for name, value in records[item].items() if name != "lines"}), flush=True)


if __name__ == "__main__":
    main()
