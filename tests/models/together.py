"""A process of several that make a video together, and compare it with what each makes alone; see test_peers.py."""

from __future__ import annotations

import dataclasses
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

if __name__ == "__main__":
    from longsana.runtime.process import share_cores

    share_cores()  # before torch is imported

import torch
from diffusers import AutoencoderKLLTX2Video, AutoencoderKLWan
from torch import Tensor

from longsana.chunks import ChunkPlan
from longsana.config import ModelConfig
from longsana.data.story import Change
from longsana.encoders.vae import LTX2VAE, WanVAE
from longsana.flow.noise import PromptNoise
from longsana.flow.schedule import FlowSchedule
from longsana.models.dit import LongSanaDiT
from longsana.models.embeddings import TextEmbedding, TextMemory
from longsana.models.float8 import to_float8
from longsana.runtime.distributed import World
from longsana.runtime.peers import Peers
from longsana.runtime.teams import Team
from longsana.sampling.graphs import PLAIN_PASSES, ReplayedNetwork
from longsana.sampling.sampler import generate
from longsana.state import CausalState
from longsana.weights.build import build_model
from tests.encoders.test_ltx2 import SMALL as LTX2
from tests.training.test_graphs import PASTS

SHAPES = ModelConfig(model="SanaMSVideo_4M_P2_D12", depth=8, linear_head_dim=32, caption_channels=64, caption_length=48)
EXACT = 1e-10
WAN: dict[str, Any] = {"base_dim": 8, "num_res_blocks": 1}


def network(seed: int, **settings: Any) -> LongSanaDiT:
    """A small network in float64 whose convolutions over time and decays do something."""
    model = build_model(dataclasses.replace(SHAPES, depth=2, **settings), device="cpu", dtype=torch.float64)
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for block in model.blocks:
            weight = block.feed_forward.temporal.weight
            weight.copy_(0.02 * torch.randn(weight.shape, generator=rng, dtype=torch.float64))
        if model.decay_logit is not None:
            model.decay_logit.copy_(torch.linspace(-2, 2, model.decay_logit.numel()).view_as(model.decay_logit))
    return model


def caption(model: LongSanaDiT, seed: int) -> TextMemory:
    tokens = torch.randn(1, 48, 64, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return model.cache_caption(TextEmbedding(tokens, torch.arange(48)[None] < 30 + seed))


def same(one: Tensor, other: Tensor, tolerance: float = EXACT) -> None:
    assert one.shape == other.shape
    largest = float((one - other).abs().max()) if one.numel() else 0.0
    assert largest <= tolerance, largest


def same_states(one: CausalState, other: CausalState) -> None:
    assert one[3:] == other[3:]
    for a, b in zip(one[:3], other[:3], strict=True):
        same(a, b)


def check_passes(peers: Peers, world: World) -> None:
    """Single passes and those that follow, of several batches, lengths, timesteps and pasts."""
    rng = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=rng, dtype=torch.float64)

    for number, settings in enumerate(PASTS):
        model = network(number, **settings)
        text = TextEmbedding(drawn(2, 48, 64), torch.ones(2, 48, dtype=torch.bool))
        states: list[CausalState | None] = [None, None]
        for frames in (3, 7, 1, 5):
            x, t = drawn(2, 16, frames, 4, 6), 1000 * torch.rand(2, frames, generator=rng, dtype=torch.float64)
            times = t if frames == 7 else t[:, 0]
            alone, states[0] = model(x, times, text, state=states[0])
            together, states[1] = model(x, times, text, state=states[1], peers=peers)
            same(together, alone)
            assert states[0] is not None and states[1] is not None
            same_states(states[1], states[0])
            for theirs in world.gather(together):
                assert torch.equal(theirs, together)


def check_videos(peers: Peers, world: World) -> None:
    """Videos whose prompt changes in every way, and that begin with a picture, which may be absorbed alone."""
    model = network(9, num_cached_blocks=2, num_sink_blocks=1)
    texts = [caption(model, seed) for seed in (0, 0, 1, 1, 2)]
    plan = ChunkPlan((3, 5, 4, 4, 2))

    def video(model: Any, change: str, first: Tensor | None, apart: bool) -> Iterator[Any]:
        changes = {2: Change.parse(change), 4: Change.parse("cut")}
        noise, where = PromptNoise(0, [("a red circle", 0)]), {"shape": (16, 4, 6), "device": "cpu"}
        more: dict[str, Any] = {"first": first, "apart": apart, "changes": changes}
        return generate(model, FlowSchedule(7.0), texts, plan, rng=noise, **more, **where)

    picture = torch.randn(1, 16, 1, 4, 6, generator=torch.Generator().manual_seed(1))
    for change, first, apart in (("keep", None, False), ("recache=2", picture, False), ("rebuild=2", picture, True)):
        made = zip(
            video(model, change, first, apart), video(partial(model, peers=peers), change, first, apart), strict=True
        )
        for alone, together in made:
            same(together.latents, alone.latents)
            assert alone.state is not None and together.state is not None
            same_states(together.state, alone.state)
            for theirs in world.gather(together.latents):
                assert torch.equal(theirs, together.latents)


def check_decoders(
    peers: Peers,
    world: World,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float64,
    tolerance: float = EXACT,
) -> None:
    """Pictures of rows that come out even or not, latents in calls of any length, and memory that changes hands."""
    torch.manual_seed(0)
    for kind, model in ((WanVAE, AutoencoderKLWan(**WAN)), (LTX2VAE, AutoencoderKLLTX2Video(**LTX2))):
        model = model.to(device, dtype).eval()
        alone, together = kind.around(model, 2), kind.around(model, 2)
        together.divide(peers)
        rng = torch.Generator().manual_seed(2)
        channels = alone.geometry.channels
        for height in (2 * peers.size + 1, 3):
            caches: list[Any] = [None, None]
            for frames in (1, 2, 3, 1):
                latents = torch.randn(1, channels, frames, height, 3, generator=rng).to(device)
                expected, caches[0] = alone.decode_stream(latents, caches[0], more=True)
                own, caches[1] = together.decode_stream(latents, caches[1], more=True)
                same(own, expected, max(tolerance, 1e-6))  # frames are in float32
                whole = together.whole(caches[1])
                for a, b in zip(whole.features, caches[0].features, strict=True):
                    same(a, b, tolerance)
                assert whole._replace(features=()) == caches[0]._replace(features=())
                caches[1] = together.own(caches[0] if frames == 3 else whole)
                assert bool(caches[1].rows) == (height >= 2 * peers.size)


def check_fused_decoders(peers: Peers, world: World) -> None:
    """On GPUs: decoders' fused operations over rows."""
    torch.backends.cudnn.allow_tf32 = False
    check_decoders(peers, world, device=world.device(), dtype=torch.float32, tolerance=1e-3)


def check_graphs(peers: Peers, world: World) -> None:
    """On GPUs: passes that are replayed are the passes to the bit, and near those of one process, in float8 too."""
    device = world.device()
    for dtype, in8, tolerance in (
        (torch.float32, False, 1e-4),
        (torch.bfloat16, False, 0.05),
        (torch.bfloat16, True, 0.1),
    ):
        model = network(1, state_decay=0.9).to(device, dtype)
        if in8:
            to_float8(model)
        tokens = torch.randn(1, 48, 64, generator=torch.Generator().manual_seed(3)).to(device, dtype)
        text = model.cache_caption(TextEmbedding(tokens, torch.ones(1, 48, dtype=torch.bool, device=device)))
        replayed = ReplayedNetwork(model, peers=peers)
        rng = torch.Generator().manual_seed(4)
        states: list[Any] = [None, None, None]
        for number in range(PLAIN_PASSES + 4):
            x = torch.randn(1, 16, 5, 4, 6, generator=rng).to(device, dtype)
            t = torch.full((1,), 100.0 * number, device=device)
            alone, states[0] = model(x, t, text, state=states[0])
            plain, states[1] = model(x, t, text, state=states[1], peers=peers)
            own, states[2] = replayed(x, t, text, state=states[2])
            assert torch.equal(own, plain)
            assert all(torch.equal(a, b) for a, b in zip(states[1][:3], states[2][:3], strict=True))
            assert float((plain - alone).norm() / alone.norm()) < tolerance
            for theirs in world.gather(own.float().cpu()):
                assert torch.equal(theirs, own.float().cpu())
        assert any(known.recording is not None for known in replayed._known)


def check_stuck(peers: Peers, world: World) -> None:
    """On GPUs: the last process ends without a word while the others wait for it in a sum."""
    team = Team.of(world, world.size, world.device())
    assert team.peers is not None
    x = torch.ones(1 << 20, device=world.device())
    team.peers.total([x])
    torch.cuda.synchronize()
    with team.watched():
        if world.rank == world.size - 1:
            os.kill(os.getpid(), signal.SIGKILL)
        team.peers.total([x])
        torch.cuda.synchronize()
    raise AssertionError("nobody was waited for")


CHECKS: dict[str, Callable[[Peers, World], None]] = {
    "passes": check_passes,
    "videos": check_videos,
    "decoders": check_decoders,
    "fused decoders": check_fused_decoders,
    "graphs": check_graphs,
    "stuck": check_stuck,
}


ON_GPUS = {"fused decoders", "graphs"}


@torch.no_grad()
def main(arguments: Sequence[str]) -> int:
    torch.set_num_threads(1)
    world = World.from_environment()
    world.connect()
    team = Team.of(world, world.size, world.device() if ON_GPUS & {*arguments} else torch.device("cpu"))
    assert team.peers is not None
    for check in arguments:
        CHECKS[check](team.peers, world)
    world.disconnect()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
