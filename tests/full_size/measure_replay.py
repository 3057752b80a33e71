"""Time of one update of the small world's network on a GPU: sharded, replayed, replayed with compiled blocks.

    python tests/full_size/measure_replay.py

Forward and backward pass over noise in place of 64 clips of 21 latents, clipping, and AdamW, in bfloat16.
"""

from __future__ import annotations

import time

if __name__ == "__main__":
    from longsana.runtime.process import share_cores

    share_cores()  # before torch is imported

import torch

from longsana.config import InferenceConfig, load_config
from longsana.models.dit import LongSanaDiT
from longsana.models.embeddings import TextEmbedding
from longsana.runtime.distributed import World
from longsana.training.graphs import replay_passes
from longsana.training.parallel import connect, device_mesh, parallelise
from longsana.weights.build import build_model

SHAPES = load_config("configs/sana_video_config/longsana/shapes/longsana.yaml", [], InferenceConfig).model
BATCH, UPDATES = 64, 20


def measure(name: str, model: LongSanaDiT) -> None:
    x = torch.randn(BATCH, 16, 21, 12, 20, device="cuda")
    t = torch.full((BATCH,), 500.0, device="cuda")
    text = TextEmbedding(torch.randn(BATCH, 48, 64).cuda(), torch.ones(BATCH, 48, dtype=torch.bool).cuda())
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)

    def update() -> None:
        model(x, t, text)[0].float().square().mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(4):
        update()
    torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(UPDATES):
        update()
    torch.cuda.synchronize()
    print(f"{name}: {1000 * (time.perf_counter() - started) / UPDATES:.1f} ms an update", flush=True)


def main() -> None:
    device, world = torch.device("cuda"), World.from_environment()
    connect(world, device)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True

    def network() -> LongSanaDiT:
        return build_model(SHAPES, device=device, dtype=torch.float32)

    mesh = device_mesh("full", world, device)
    measure("sharded (FSDP2)", parallelise(network(), mesh, compute=torch.bfloat16))
    measure("replayed", replay_passes(network(), torch.bfloat16))
    measure("replayed, blocks compiled", replay_passes(network(), torch.bfloat16, compile_blocks=True))


if __name__ == "__main__":
    main()
