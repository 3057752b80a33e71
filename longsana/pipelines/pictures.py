"""Latents to pictures, as diffusers' users want them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from longsana.encoders.vae import VideoVAE


def as_output(frames: Tensor, output_type: str) -> Any:
    """Frames (B, 3, F, H, W) in [-1, 1] as `LongSanaVideoOutput` describes: pil, pt, or else np."""
    if output_type == "pil":
        return [[Image.fromarray(picture) for picture in video.numpy()] for video in VideoVAE.to_uint8(frames)]
    halved = (frames / 2 + 0.5).clamp(0, 1)
    if output_type == "pt":
        return halved.transpose(1, 2).contiguous()
    return halved.permute(0, 2, 3, 4, 1).contiguous().numpy()


def joined(stretches: Sequence[Any]) -> Any:
    """One stretch of several, each with all videos."""
    if isinstance(stretches[0], Tensor):
        return torch.cat(list(stretches), dim=1)
    if isinstance(stretches[0], np.ndarray):
        return np.concatenate(stretches, axis=1)
    return [list(chain.from_iterable(videos)) for videos in zip(*stretches, strict=True)]
