"""The arithmetic of a forward pass: what an ideal machine could not leave out."""

from __future__ import annotations

import math

from longsana.config import ModelConfig
from longsana.models.embeddings import TimeEmbedding


def forward_flops(
    config: ModelConfig, frames: int, height: int, width: int, *, caption_length: int | None = None
) -> int:
    """Operations of one forward of latents (1, C, frames, height, width), a multiplication and an addition being two.

    Everything that is a matrix product or a convolution is counted: linear layers, patches, depthwise and temporal
    convolutions, the sums, numerators and denominators of linear attention, and attention over caption_length tokens
    (None: the config's), masked ones included. Norms, activations, rotations and gates are not. How the frames are cut
    into chunks changes nothing: a token meets one sum, whatever is in it.
    """
    size = config.architecture()
    hidden, patch = size.hidden_size, math.prod(size.patch_size)
    inner = int(config.mlp_ratio * hidden)
    caption = config.caption_length if caption_length is None else caption_length
    tokens = frames * (height // size.patch_size[1]) * (width // size.patch_size[2])

    # Multiplications for a token of video, for a token of the caption, and for a timestep.
    linear_attention = 4 * hidden**2 + 2 * hidden * config.linear_head_dim + hidden
    cross_attention = 2 * hidden**2 + 2 * caption * hidden
    feed_forward = 2 * hidden * inner + 9 * 2 * inner + inner * hidden + 3 * hidden**2
    ends = 2 * patch * config.in_channels * hidden
    video = ends + size.depth * (linear_attention + cross_attention + feed_forward)
    text = config.caption_channels * hidden + hidden**2 + size.depth * 2 * hidden**2
    time = TimeEmbedding.FREQUENCIES * hidden + hidden**2 + 6 * hidden**2
    return 2 * (tokens * video + caption * text + time)
