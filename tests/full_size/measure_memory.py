"""Videos on a GPU held to so many GiB: what is chosen, the peak of the whole process by nvidia-smi, and the speed.

    python tests/full_size/hub_cache.py /tmp/hub --no_base
    python tests/full_size/hub_cache.py /tmp/hub --size 720
    python tests/full_size/measure_memory.py --cache /tmp/hub --out memory.json

Each row is the batch command's own work in a process of its own: two videos of random weights, of which the second,
warm, is timed. nvidia-smi is asked every 50 ms; what the GPU had before counts as nothing, so nobody else may use it.
The last row is a change of prompt where a live server's text encoder waits on the host. `--only 480` or a row's name
measures a part; rows that are in OUT already are kept.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

if __name__ == "__main__":
    from longsana.runtime.process import share_cores

    share_cores()  # before torch is imported

CONFIGS = {
    480: ROOT / "configs/sana_video_config/Sana_2000M_480px_adamW_fsdp_longsana.yaml",
    720: ROOT / "configs/sana_video_config/Sana_2000M_720px_longsana.yaml",
}
TINY = {480: "taew2_1", 720: "taeltx_2"}
GIB = 2**30
EVERY = 50
"""Milliseconds between two looks at the GPU."""


class Row(NamedTuple):
    """A measurement: of videos of a size with settings, or of a change of prompt."""

    name: str
    size: int
    settings: tuple[str, ...]
    live: bool = False


def rows() -> list[Row]:
    """All rows, both sizes; the targets of 480p are 7.3 GiB and 10."""
    found = []
    for size, tiny in TINY.items():
        decoder = (f"vae.decoder={tiny}", "vae.decoder_pretrained=seeded:0")
        float8 = "model.float8=true"
        for gib in (24, 16, 12, 8):
            found.append(Row(f"{size}p, {gib}", size, (f"sampling.memory={gib}",)))
        if size == 480:
            found.append(Row("480p, 10", size, ("sampling.memory=10",)))
            found.append(Row("480p, 7.3, tiny, float8", size, ("sampling.memory=7.3", *decoder, float8)))
        found.append(Row(f"{size}p, 8, float8", size, ("sampling.memory=8", float8)))
        found.append(Row(f"{size}p, 8, tiny", size, ("sampling.memory=8", *decoder)))
        found.append(Row(f"{size}p, 8, tiny, float8", size, ("sampling.memory=8", *decoder, float8)))
    decoder = (f"vae.decoder={TINY[480]}", "vae.decoder_pretrained=seeded:0")
    found.append(Row("a change of prompt, 480p, 8, tiny", 480, ("sampling.memory=8", *decoder), live=True))
    return found


class Looks:
    """Looks at the GPU's memory while a process runs, and at the host's memory of that process.

    peak: MiB that the GPU had used at most. anonymous, resident: bytes of the host, at most, without and with what
    maps files.
    """

    def __init__(self, pid: int) -> None:
        self.peak = self.anonymous = self.resident = 0
        self._pid, self._ended = pid, threading.Event()
        self._asked = subprocess.Popen([*asking(), f"--loop-ms={EVERY}"], stdout=subprocess.PIPE, text=True)
        self._threads = [threading.Thread(target=work) for work in (self._look, self._look_at_host)]
        for thread in self._threads:
            thread.start()

    def end(self) -> None:
        self._ended.set()
        self._asked.terminate()
        self._asked.wait()
        for thread in self._threads:
            thread.join()

    def _look(self) -> None:
        assert self._asked.stdout is not None
        for line in self._asked.stdout:
            self.peak = max(self.peak, int(line))

    def _look_at_host(self) -> None:
        while not self._ended.wait(EVERY / 1000):
            try:
                status = Path(f"/proc/{self._pid}/status").read_text()
            except OSError:  # it has ended
                return
            sizes = dict(line.split(":", 1) for line in status.splitlines())
            if "RssAnon" in sizes:
                self.anonymous = max(self.anonymous, 1024 * int(sizes["RssAnon"].split()[0]))
                self.resident = max(self.resident, 1024 * int(sizes["VmRSS"].split()[0]))


def asking(what: str = "memory.used") -> list[str]:
    """The command that tells of this process's GPU, the first that it may see, such as the MiB that it has used."""
    gpu = (os.environ.get("CUDA_VISIBLE_DEVICES") or "0").split(",")[0]
    return ["nvidia-smi", "-i", gpu, f"--query-gpu={what}", "--format=csv,noheader,nounits"]


def used_now() -> int:
    """MiB that the GPU has used."""
    return int(subprocess.run(asking(), capture_output=True, text=True, check=True).stdout.split()[0])


def in_a_fork(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Do work in a fork, whose libraries are imported already; returns its figures, or what it failed with."""
    before = used_now()
    with tempfile.NamedTemporaryFile() as file:
        child = os.fork()
        if child == 0:
            try:
                result = work()
            except BaseException as error:
                traceback.print_exc()
                result = {"failed": f"{type(error).__name__}: {error}"}
            Path(file.name).write_text(json.dumps(result))
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(0)
        looks = Looks(child)
        os.waitpid(child, 0)
        looks.end()
        figures: dict[str, Any] = json.loads(Path(file.name).read_text() or '{"failed": "the process ended"}')
    figures["peak by nvidia-smi, GiB"] = (looks.peak - before) / 1024
    figures["host, GiB"] = {"anonymous": looks.anonymous / GIB, "resident": looks.resident / GIB}
    if "used at the end, MiB" in figures:
        beside = figures.pop("used at the end, MiB") - before - figures["torch reserved at the end, GiB"] * 1024
        figures["beside torch, GiB"] = beside / 1024
    return figures


def make_videos(row: Row, frames: int) -> dict[str, Any]:
    """Two videos by the batch command's own work; figures of the second."""
    import torch

    from longsana.config import load_config
    from longsana.inference.batch import run_batch
    from longsana.runtime.distributed import World
    from longsana.sampling.checks import select_prompts

    config = load_config(CONFIGS[row.size], [*row.settings, f"sampling.num_frames={frames}"])
    with tempfile.TemporaryDirectory() as folder:
        prompts = select_prompts(config, 0, 2)
        outcome = run_batch(config, prompts, Path(folder), world=World(), device=torch.device("cuda", 0))
        if outcome.failures:
            raise SystemExit(outcome.failures[0].reason)
        cold, warm = [json.loads(path.read_text()) for path in sorted(Path(folder).glob("[!.]*.json"))]
    chosen = warm["config"]
    return {
        "chosen": {
            "vae.latents_per_call": chosen["vae"]["latents_per_call"],
            "model.feed_forward_frames": chosen["model"]["feed_forward_frames"],
            "sampling.cuda_graphs": chosen["sampling"]["cuda_graphs"],
            "sampling.offload": chosen["sampling"]["offload"],
        },
        "FPS": warm["timings"]["fps"],
        "FPS of the first": cold["timings"]["fps"],
        "timings": warm["timings"],
        "torch allocated, GiB": max(one["memory"]["gpu_peak_allocated"] for one in (cold, warm)) / GIB,
        "torch reserved, GiB": max(one["memory"]["gpu_peak_reserved"] for one in (cold, warm)) / GIB,
        "retries": torch.cuda.memory_stats()["num_alloc_retries"],
        **ending(),
    }


def change_prompt(row: Row) -> dict[str, Any]:
    """Seconds of a caption, and of a chunk after it, with the text encoder and the network in turns on the GPU."""
    import torch

    from longsana.config import load_config
    from longsana.sampling.captions import caption_encoder
    from longsana.sampling.checks import select_prompts
    from longsana.sampling.engine import Engine
    from longsana.sampling.memory import fit_memory, told, work_of

    config = load_config(CONFIGS[row.size], [*row.settings, "sampling.num_frames=41"])
    device = torch.device("cuda", 0)
    config = fit_memory(config, device, work_of(config, live=True))
    engine, prompts = Engine(config, device), select_prompts(config, 0, 4)
    figures: dict[str, list[float]] = {"encode, s": [], "chunk, s": [], "chunk again, s": []}

    def timed(name: str, work: Callable[[], Any]) -> Any:
        torch.cuda.synchronize()
        started = time.perf_counter()
        result = work()
        torch.cuda.synchronize()
        figures[name].append(time.perf_counter() - started)
        return result

    with caption_encoder(engine.config, device, engine.turns) as encode:
        models = engine.load()
        for prompt in prompts:
            caption = timed("encode, s", lambda prompt=prompt: encode(prompt))
            for name in ("chunk, s", "chunk again, s"):
                timed(name, lambda prompt=prompt, own=caption: list(engine.sample(*models, [prompt], [own])))
        with encode.encoder.there():
            pass  # now both wait
        text = encode.encoder.model
        copies = {"text encoder, s": text, "network, s": models[0]}
        for name, module in copies.items():
            figures[name] = []
            for _ in range(3):
                weights = timed(name, lambda module=module: [one.to(device, copy=True) for one in module.parameters()])
                del weights
        waits = {name: next(module.parameters()).device.type for name, module in copies.items()}
    medians = {name: sorted(seconds)[len(seconds) // 2] for name, seconds in figures.items()}
    return {"chosen": told(config), "seconds": medians, "each": figures, "where they wait": waits, **ending()}


def ending() -> dict[str, Any]:
    import torch

    reserved = torch.cuda.memory_reserved() / GIB
    return {"torch reserved at the end, GiB": reserved, "used at the end, MiB": used_now()}


def table(results: dict[str, dict[str, Any]]) -> str:
    lines = [
        "| row | peak by nvidia-smi, GiB | torch reserved | allocated | beside torch | FPS | chosen |",
        "|" + "---|" * 7,
    ]
    for name, own in results.items():
        if "failed" in own:
            lines.append(f"| {name} | {own['peak by nvidia-smi, GiB']:.2f} | | | | | failed: {own['failed'][:200]} |")
        elif "FPS" in own:
            chosen = " ".join(f"{key.partition('.')[2]}={value}" for key, value in own["chosen"].items())
            numbers = ("torch reserved, GiB", "torch allocated, GiB", "beside torch, GiB")
            cells = [f"{own[key]:.2f}" for key in ("peak by nvidia-smi, GiB", *numbers)]
            lines.append(f"| {name} | {' | '.join(cells)} | {own['FPS']:.1f} | {chosen} |")
        else:
            told = ", ".join(f"{key[:-3]} {seconds:.3f} s" for key, seconds in own["seconds"].items())
            lines.append(f"| {name} | {own['peak by nvidia-smi, GiB']:.2f} | | | | | {told}; {own['chosen']} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, required=True, help="by hub_cache.py")
    parser.add_argument("--out", type=Path, required=True, help="JSON")
    parser.add_argument("--frames", type=int, default=161)
    parser.add_argument("--only", nargs="+", help="rows whose names begin so")
    options = parser.parse_args(arguments)
    os.environ |= {"HF_HUB_CACHE": str(options.cache.resolve()), "HF_HUB_OFFLINE": "1"}
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # whoever asks for a GPU now begins nothing that forks share
    os.chdir(ROOT)
    import logging

    import diffusers
    import torch
    import transformers

    import longsana.inference.batch
    from longsana.inference.sidecar import commit

    assert longsana.inference.batch and not torch.cuda.is_initialized(), "forks cannot use a GPU that is in use"
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    results: dict[str, Any] = {}
    if options.out.exists():
        results = json.loads(options.out.read_text())["rows"]
    for row in rows():
        if row.name in results or (options.only and not row.name.startswith(tuple(options.only))):
            continue
        started = time.perf_counter()
        own = in_a_fork(lambda row=row: change_prompt(row) if row.live else make_videos(row, options.frames))
        results[row.name] = own | {"settings": list(row.settings), "seconds of the row": time.perf_counter() - started}
        versions = {
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
            "transformers": transformers.__version__,
        }
        about = {"commit": commit(), "frames": options.frames, "versions": versions}
        options.out.write_text(json.dumps(about | {"rows": results}, indent=1) + "\n")
        print(f"{row.name}: {results[row.name]}", flush=True)
    print(table(results))


if __name__ == "__main__":
    main()
