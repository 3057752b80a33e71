"""A process of several whose pipelines make videos together; see test_parallelism.py."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from longsana.pipelines.video import LongSanaVideoPipeline
from longsana.runtime.distributed import World
from tests.pipelines.repository import OTHER, PROMPT, SIZE, quiet


def seed() -> torch.Generator:
    return torch.Generator().manual_seed(42)


def videos(pipe: LongSanaVideoPipeline) -> list[torch.Tensor]:
    """Latents and pictures of a call with a story, of a stream, and of one that goes on from its state."""
    pt: dict[str, Any] = {"output_type": "pt", **SIZE}
    story = f"{PROMPT}[1s] | [cut] {OTHER}"
    found = [pipe(story, num_frames=33, chunk_frames=3, generator=seed(), output_type="latent", **SIZE).frames]
    chunks = list(pipe.stream(PROMPT, num_frames=33, chunk_frames=3, generator=seed(), **pt))
    found += [chunk.frames for chunk in chunks]
    found += [chunk.frames for chunk in pipe.stream(OTHER, num_frames=12, state=chunks[1].state, output_type="pt")]
    return found


def main(arguments: Sequence[str]) -> int:
    torch.set_num_threads(1)
    world = World.from_environment()
    pipe = quiet(Path(arguments[0]))
    alone = videos(pipe)
    world.connect()
    pipe.enable_parallelism()
    together = videos(pipe)
    assert len(alone) == len(together) > 4
    for one, other in zip(alone, together, strict=True):
        torch.testing.assert_close(other, one, rtol=0, atol=2e-3)
        for theirs in world.gather(other):
            assert torch.equal(theirs, other)
    world.disconnect()
    return 0
