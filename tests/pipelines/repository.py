"""Small repositories in exactly the published layout, made of the parts of the shapes world, with few blocks."""

from __future__ import annotations

import json
import shutil
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from longsana.config import InferenceConfig, ModelConfig, load_config
from longsana.encoders.vae import VideoVAE
from longsana.models.dit import LongSanaDiT
from longsana.pipelines.transformer import SanaVideoCausalTransformer3DModel
from longsana.pipelines.video import LongSanaVideoPipeline
from longsana.weights.network import read_weights, save_checkpoint

ROOT = Path(__file__).parents[2]
ASSET = ROOT / "asset/shapes"
PROMPT = "A big red circle moves slowly to the left on a black background."
OTHER = "A small blue square stays still on a white background."
DISTILLED, BASE = "SanaVideoCausalTransformer3DModel", "SanaVideoTransformer3DModel"
SIZE = {"height": 32, "width": 48}
DEPTH = 2
"""Blocks of the eight that ship: more of them are longer passes, and nothing else that a test could see."""


@cache
def few_blocks(name: str) -> Path:
    """Write a file of the first blocks of a shipped network, once in a process; its pictures are noisier."""
    weights = load_file(ASSET / f"{name}.safetensors")
    path = Path(_folder().name) / f"{name}.safetensors"
    save_file({key: value for key, value in weights.items() if not _is_deeper(key)}, path)
    return path


@cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory()


def shallow(name: str = "longsana") -> list[str]:
    """Settings of a config that loads them."""
    return [f"model.depth={DEPTH}", f"model.load_from={few_blocks(name)}"]


def _is_deeper(name: str) -> bool:
    part, _, rest = name.partition(".")
    return part == "blocks" and int(rest.split(".")[0]) >= DEPTH


def shapes_config(name: str = "longsana", **overrides: Any) -> InferenceConfig:
    """The batch command's, at the small size, with few blocks and the VAE's own decoder; of the past all is kept, as in
    the published repositories."""
    base = {
        "scheduler.sampling_algo": "flow_dpm-solver",
        "scheduler.inference_flow_shift": 8.0,
    }
    settings = (
        {"model.depth": DEPTH, "model.load_from": few_blocks(name)}
        | {"sampling.height": 32, "sampling.width": 48, "model.state_decay": 1, "sampling.prompt_change": "keep"}
        | {"vae.decoder": "full"}
        | (base if name == "base" else {})
        | overrides
    )
    path = ROOT / "configs/sana_video_config/longsana/shapes/longsana.yaml"
    return load_config(path, [f"{key}={value}" for key, value in settings.items()], InferenceConfig)


def shapes_repository(folder: Path, transformer: str = DISTILLED, pipeline: str = "SanaVideoPipeline") -> Path:
    """The shapes model in the published layout; what the 2B model has otherwise is in model_index.json."""
    network = "longsana" if transformer == DISTILLED else "base"
    config = shapes_config(network).model
    write_transformer(folder / "transformer", few_blocks(network), config, transformer)
    shutil.copytree(ASSET / "vae", folder / "vae")
    (folder / "text_encoder").mkdir()
    (folder / "tokenizer").mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(ASSET / "text_encoder" / name, folder / "text_encoder")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(ASSET / "text_encoder" / name, folder / "tokenizer")
    (folder / "scheduler").mkdir()
    scheduler = {
        "_class_name": "DPMSolverMultistepScheduler",
        "_diffusers_version": "0.36.0",
        "flow_shift": 8.0,
        "prediction_type": "flow_prediction",
        "use_flow_sigmas": True,
    }
    (folder / "scheduler/scheduler_config.json").write_text(json.dumps(scheduler))
    index = {
        "_class_name": pipeline,
        "_diffusers_version": "0.36.0",
        "scheduler": ["diffusers", "DPMSolverMultistepScheduler"],
        "text_encoder": ["transformers", "Gemma2Model"],
        "tokenizer": ["transformers", "PreTrainedTokenizerFast"],
        "transformer": ["diffusers", transformer],
        "vae": ["diffusers", "AutoencoderKLWan"],
        "caption_length": 48,
        "chi_prompt": "none",
        "softcap": True,
    }
    (folder / "model_index.json").write_text(json.dumps(index, indent=2))
    return folder


def write_transformer(folder: Path, source: Path, config: ModelConfig, name: str, shard_bytes: int = 10**10) -> None:
    save_checkpoint(read_weights(source, config), folder, "diffusers", config, shard_bytes=shard_bytes)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"_class_name": name}, indent=2))


def quiet(folder: Path, **options: Any) -> LongSanaVideoPipeline:
    """The pipeline in a folder, without a progress bar."""
    pipe = LongSanaVideoPipeline.from_pretrained(folder, **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def around(
    network: LongSanaDiT, decoder: VideoVAE, tokenizer: object, text_encoder: Any, folder: Path
) -> LongSanaVideoPipeline:
    """A pipeline of the batch command's parts."""
    save_checkpoint(network.state_dict(), folder / "transformer", "diffusers", network.config)
    transformer = SanaVideoCausalTransformer3DModel.from_pretrained(folder / "transformer")
    pipe = LongSanaVideoPipeline(
        decoder.model,
        transformer,
        tokenizer,
        text_encoder,
        caption_length=48,
        chi_prompt="none",
        softcap=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe
