"""Viewers of a live server on this machine: how many watch without a stall, at 480p and 720p.

    python tests/full_size/hub_cache.py /tmp/hub --no_base
    python tests/full_size/hub_cache.py /tmp/hub --size 720
    python tests/full_size/measure_load.py --cache /tmp/hub --out load.json     # about 2.7 minutes a row
    python tests/full_size/measure_load.py --out load.json --only small --seconds 60           # on a laptop

Each row is `longsana serve` in a process of its own, with random weights or the small default, and `longsana load` in
another one: viewers paced to media time, each with two changes of prompt a minute. The row has what `longsana load`
reports for all, the times of a chunk and of its coding, the peak of the GPU's memory by nvidia-smi, and how busy this
process's CPUs were. Rows that are in OUT already are kept. A row whose viewers stall is measured again with one less,
at most twice.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # it also runs from a checkout not installed

if __name__ == "__main__":
    from longsana.runtime.process import share_cores

    share_cores()  # before torch is imported

from tests.full_size.measure_memory import ROOT, asking

CONFIGS = {
    480: "configs/sana_video_config/Sana_2000M_480px_adamW_fsdp_longsana.yaml",
    720: "configs/sana_video_config/Sana_2000M_720px_longsana.yaml",
}
TINY = ("vae.decoder=taew2_1", "vae.decoder_pretrained=seeded:0")
REPLAYED, FLOAT8 = "sampling.cuda_graphs=true", "model.float8=true"
WHOLE_CHUNKS = "vae.latents_per_call=10"
"""A call of the LTX-2 decoder is as many launches however many latents it has, beside the server's other threads."""
LESS = 2
"""Times that a row is measured again with a viewer less."""


class Row(NamedTuple):
    """A measurement. size: 0: the small default. most: viewers to begin with."""

    name: str
    size: int
    most: int
    settings: tuple[str, ...] = ()


ROWS = (
    Row("480p, taew2_1, float8", 480, 6, (*TINY, FLOAT8, REPLAYED)),
    Row("480p, full", 480, 2, (REPLAYED,)),
    Row("480p, full, float8", 480, 3, (FLOAT8, REPLAYED)),
    Row("720p, full", 720, 8, (REPLAYED, WHOLE_CHUNKS)),
    Row("small", 0, 2),
)


def measure(row: Row, viewers: int, cache: Path | None, seconds: int, folder: Path) -> dict[str, Any]:
    """Serve so many viewers for so many seconds."""
    environment, model = os.environ | {"LONGSANA_API_KEY": ""}, []
    if row.size:
        assert cache is not None, "rows of full size need --cache"
        environment |= {"HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": "1"}
        model = ["--config", CONFIGS[row.size]]
    serve = ["inference_video_scripts/serve.py", "--port", "0", "--work_dir", str(folder / "work"), "--load", "100"]
    threads = [] if row.size else ["--threads", "1"]
    command = [sys.executable, *serve, *threads, *model, *row.settings]
    with (folder / "serve.log").open("w") as log:
        server = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)
        assert server.stderr is not None
        for line in server.stderr:
            log.write(line)
            if found := re.search(r"http://\S+", line):
                break
        else:
            raise SystemExit(f"{row.name}: the server did not start\n{(folder / 'serve.log').read_text()}")
        threading.Thread(target=lambda: log.writelines(server.stderr or ()), daemon=True).start()
        try:
            report = folder / "report.json"
            psutil.cpu_percent(percpu=True)
            watch = ["inference_video_scripts/load.py", found[0], "--viewers", str(viewers), "--seconds", str(seconds)]
            subprocess.run([sys.executable, *watch, "--out", str(report)], cwd=ROOT, env=environment, check=True)
            cpus = sorted(os.sched_getaffinity(0))
            each, used = psutil.cpu_percent(percpu=True), _used()
        finally:
            server.terminate()
            server.wait(60)
    said = json.loads(report.read_text())
    metrics = said["server"]["metrics"]
    return {
        "name": row.name,
        "device": _device(),
        "viewers": viewers,
        "seconds": seconds,
        "settings": list(row.settings),
        "all": said["all"],
        "own_lag_seconds": said["own_lag_seconds"],
        "chunk_seconds": {name: value for name, value in metrics.items() if name.startswith("longsana_chunk_seconds")},
        "real_time_factor": metrics.get("longsana_real_time_factor"),
        "load": metrics.get("longsana_load"),
        "gpu_used_mib": used,
        "cpus": len(cpus),
        "cpu_busy_percent": round(sum(each[cpu] for cpu in cpus) / len(cpus), 1),
    }


def _smi(what: str) -> list[str]:
    try:
        return subprocess.run(asking(what), capture_output=True, text=True, check=True).stdout.split("\n")
    except (OSError, subprocess.CalledProcessError):
        return []


def _used() -> int | None:
    return int(said[0]) if (said := _smi("memory.used")) else None


def _device() -> str:
    return said[0] if (said := _smi("name")) else "CPU"


def main(arguments: Sequence[str]) -> None:
    """Measure all rows, or those whose names have one of the words."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, help="a hub cache of random weights, see hub_cache.py")
    parser.add_argument("--out", type=Path, required=True, help="JSON, a row a name")
    parser.add_argument("--only", nargs="*", default=[], help="parts of names (default: all but the small one)")
    parser.add_argument("--seconds", type=int, default=120)
    options = parser.parse_args(arguments)
    done: dict[str, Any] = json.loads(options.out.read_text()) if options.out.is_file() else {}
    for row in ROWS:
        if not (any(word in row.name for word in options.only) if options.only else row.size):
            continue
        for viewers in range(row.most, max(0, row.most - LESS - 1), -1):
            name = f"{row.name}, {viewers} viewers"
            if name not in done:
                with tempfile.TemporaryDirectory() as folder:
                    done[name] = measure(row, viewers, options.cache, options.seconds, Path(folder))
                options.out.write_text(json.dumps(done, indent=1) + "\n")
            found = done[name]["all"]
            print(f"{name}: {found['watched']} watched, {found['underruns']} stalls of {found['stall_seconds']:.2f} s")
            if found["watched"] == viewers and not found["underruns"]:
                break


if __name__ == "__main__":
    main(sys.argv[1:])
