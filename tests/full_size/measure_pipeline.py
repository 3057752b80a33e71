"""What a video costs as a diffusers pipeline, at full size on one GPU: seconds and memory, as JSON.

python tests/full_size/hub_cache.py /tmp/hub --no_base
python tests/full_size/measure_pipeline.py --cache /tmp/hub --out /tmp/pipeline.json

The cache's random weights are first converted to a repository in the published diffusers layout, 10 GB beside them.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

if __name__ == "__main__":
    from longsana.runtime.process import share_cores

    share_cores()  # before torch is imported

import torch

from longsana.convert import main as convert
from longsana.pipelines.video import LongSanaVideoPipeline

ROOT = Path(__file__).resolve().parents[2]


def snapshot(cache: Path, repo: str) -> Path:
    (found,) = cache.glob(f"models--*--{repo}/snapshots/*")
    return found


def build(cache: Path, folder: Path) -> None:
    """A repository with the names and layouts of `SANA-Video_2B_480p_LongLive_diffusers`."""
    checkpoint = snapshot(cache, "SANA-Video_2B_480p_LongLive") / "checkpoints" / "SANA_Video_2B_480p_LongLive.pth"
    vae = snapshot(cache, "SANA-Video_2B_480p") / "vae" / "Wan2.1_VAE.pth"
    for source, part, flags in ((checkpoint, "transformer", ["--causal"]), (vae, "vae", [])):
        if convert([str(source), str(folder / part), "--to", "diffusers", "--force", *flags]):
            raise SystemExit(f"{source}: not converted")
    for part, patterns in (("text_encoder", ("config.json", "*.safetensors*")), ("tokenizer", ("tokenizer*.json",))):
        (folder / part).mkdir(exist_ok=True)
        for pattern in patterns:
            for file in snapshot(cache, "gemma-2-2b-it").glob(pattern):
                shutil.copy(file, folder / part)
    (folder / "scheduler").mkdir(exist_ok=True)
    scheduler = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 7.0}
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
    index = {
        "_class_name": "LongSanaVideoPipeline",
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", "Gemma2ForCausalLM"],
        "tokenizer": ["transformers", "PreTrainedTokenizerFast"],
        "transformer": ["diffusers", "SanaVideoCausalTransformer3DModel"],
        "vae": ["diffusers", "AutoencoderKLWan"],
    }
    (folder / "model_index.json").write_text(json.dumps(index))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True, help="JSON")
    parser.add_argument("--frames", type=int, default=161)
    options = parser.parse_args()
    folder = options.cache / "diffusers"
    if not (folder / "model_index.json").exists():
        build(options.cache, folder)
    report: dict[str, Any] = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "frames": options.frames}
    for name, offload in (("on the GPU", False), ("enable_model_cpu_offload", True)):
        started = time.perf_counter()
        pipe = LongSanaVideoPipeline.from_pretrained(folder, torch_dtype=torch.bfloat16)
        if offload:
            pipe.enable_model_cpu_offload()
        else:
            pipe.to("cuda")
        pipe.set_progress_bar_config(disable=True)
        loaded = time.perf_counter() - started
        taken = []
        for _ in range(2):  # the first one compiles kernels
            torch.cuda.reset_peak_memory_stats()
            started = time.perf_counter()
            video = pipe("a red ball rolls", num_frames=options.frames, generator=torch.Generator().manual_seed(42))
            taken.append(time.perf_counter() - started)
        assert len(video.frames[0]) == options.frames
        report[name] = {
            "load, s": loaded,
            "first call, s": taken[0],
            "second call, s": taken[1],
            "FPS": options.frames / taken[1],
            "GPU peak, GB": torch.cuda.max_memory_allocated() / 1e9,
        }
        if not offload:
            started = time.perf_counter()
            chunks = pipe.stream("a red ball rolls", num_frames=options.frames, output_type="np")
            next(chunks)
            report[name]["first chunk of a stream, s"] = time.perf_counter() - started
            chunks.close()
        del pipe, video
        torch.cuda.empty_cache()
        print(json.dumps({name: report[name]}), flush=True)
    options.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
