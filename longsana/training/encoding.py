"""Films of one's own to shards of latents, which flow matching and consistency learn from.

A shard is a function of the films, the settings, the VAE and PyAV's version alone, on a CPU of its number of threads
too: any number of processes, stopped at any moment, write the same bytes.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from tqdm import tqdm

from longsana.data.clips import Batch, Clip, write_clips
from longsana.data.survey import Span
from longsana.encoders.geometry import geometry
from longsana.encoders.loading import load_vae
from longsana.encoders.vae import VideoVAE
from longsana.runtime.distributed import World
from longsana.runtime.errors import InputError
from longsana.runtime.files import atomic_write_text
from longsana.runtime.finite import require_finite
from longsana.runtime.later import Later, ahead
from longsana.sampling.checks import check_weights, source_digest
from longsana.training.checks import clip_shape
from longsana.training.clips import Size, Sized, by_folder, decides_pictures
from longsana.training.config import TrainingConfig
from longsana.weights.build import resolve_dtype

log = logging.getLogger(__name__)

CLIPS = "clips.jsonl"
READERS = 8
"""Threads that read clips while one is encoded, at most: each holds a clip's pictures."""


def encode_clips(
    config: TrainingConfig,
    clips: Sequence[Sized],
    out: Path,
    *,
    dtype: Literal["bfloat16", "float16", "float32"],
    shard_size: int,
    readers: int,
    world: World,
    device: torch.device,
) -> dict[Size, Path]:
    """Encode clips into one folder of shards for each size, `out`/HEIGHTxWIDTH; every process calls this.

    config: whose VAE is whole, see `with_whole_vae`.

    Raises:
        InputError: a folder holds something else, weights are missing or do not fit, or a film has changed.
        FloatingPointError: latents are not finite.
    """
    world.on_main(lambda: check_weights(config, fetch=True, sections=("vae",)))
    compute = resolve_dtype(config.vae.weight_dtype, device)
    vae = Later(lambda: load_vae(config.vae, device, compute))
    decides = world.broadcast(_decides(config, compute) if world.is_main else {})
    folders = by_folder(clips, out)
    if world.is_main:
        _list(out / CLIPS, folders)
    for folder, own in folders.items():
        size = own[0].size
        channels, frames, *_ = clip_shape(config)
        with tqdm(desc=folder.name, unit="clip", disable=None if world.is_main else True) as bar:
            write_clips(
                folder,
                _Encoded([span for span, _ in own], size, vae, min(readers, READERS), bar),
                {**decides, **decides_pictures(config, own)},
                dtype=dtype,
                shard_size=shard_size,
                shape=(channels, frames, *geometry(config.vae).latent_size(*size)),
                world=world,
                begin=bar.reset,
            )
    return {own[0].size: folder for folder, own in folders.items()}


class _Encoded:
    """Clips that are read and encoded when they are asked for.

    One by one: a batch may round otherwise, and a clip must not depend on those beside it.
    """

    def __init__(self, clips: Sequence[Span], size: Size, vae: Later[VideoVAE], readers: int, bar: tqdm[Any]) -> None:
        self._clips, self._size, self._vae, self._readers, self._bar = clips, size, vae, readers, bar

    def __len__(self) -> int:
        return len(self._clips)

    def __getitem__(self, index: int) -> Clip:
        latents, prompts = self.batch([index])
        return Clip(latents[0], prompts[0])

    def prompts(self) -> Sequence[str]:
        return [span.source.caption for span in self._clips]

    def batch(self, indices: Sequence[int]) -> Batch:
        spans, vae, encoded = [self._clips[index] for index in indices], self._vae(), []
        pictures = ahead(lambda span: span.read(*self._size), spans, self._readers)
        for span, film in zip(spans, pictures, strict=True):
            frames = torch.from_numpy(film).to(vae.device, torch.float32).permute(3, 0, 1, 2)[None] / 127.5 - 1
            try:
                latents = vae.encode(frames)
            except torch.OutOfMemoryError as error:
                raise InputError(
                    "a clip's pictures do not fit in memory; lower rollout.num_training_frames, or sampling.height and "
                    "width, or use a larger GPU"
                ) from error
            require_finite(f"{span.source.name}, second {span.first / span.fps:.1f}", {"latents": latents})
            encoded.append(latents.cpu())
            self._bar.update()
        return Batch(torch.cat(encoded), [span.source.caption for span in spans])


def _decides(config: TrainingConfig, compute: torch.dtype) -> dict[str, Any]:
    """List all that decides the latents of pictures, by the settings' names."""
    return {
        "vae.vae_type": config.vae.vae_type,
        "vae.vae_pretrained": source_digest(config, "vae"),
        "vae.weight_dtype": str(compute).removeprefix("torch."),
    }


def _list(path: Path, folders: dict[Path, list[Sized]]) -> None:
    """Write which clip of which film is where: a line for each."""
    lines = []
    for folder, clips in folders.items():
        for item, (span, _) in enumerate(clips):
            where = {"folder": folder.name, "item": item, "file": span.source.name}
            told = {**where, "second": round(span.first / span.fps, 3), "caption": span.source.caption}
            lines.append(json.dumps(told, ensure_ascii=False) + "\n")
    atomic_write_text(path, "".join(lines))
