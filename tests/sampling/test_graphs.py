"""Which passes of inference are recorded, with a recording that is the network itself; `gpu`: real ones."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from longsana.chunks import ChunkPlan
from longsana.config import ModelConfig
from longsana.data.story import Change
from longsana.flow.noise import PromptNoise
from longsana.flow.schedule import FlowSchedule
from longsana.models.dit import LongSanaDiT
from longsana.models.embeddings import TextEmbedding, TextMemory
from longsana.sampling import graphs as replay
from longsana.sampling.graphs import ReplayedNetwork
from longsana.sampling.sampler import generate
from longsana.weights.build import build_model
from tests.training.test_graphs import PASTS, graphs

SHAPES = ModelConfig(model="SanaMSVideo_4M_P2_D12", depth=8, linear_head_dim=32, caption_channels=64, caption_length=48)
PLAN = ChunkPlan((3, 2, 2, 2, 2))
__all__ = ["graphs"]  # a fixture


class Counted:
    """In place of a recording."""

    made: list[Any]
    replayed: int

    pool = None

    def __init__(self, model: LongSanaDiT, x: Tensor, t: Tensor, text: TextMemory, state: Any, *more: None) -> None:
        self._model, self._text = model, text
        Counted.made.append(text)

    def replay(self, x: Tensor, t: Tensor, state: Any) -> tuple[Tensor, Any]:
        Counted.replayed += 1
        return self._model(x, t, self._text, state=state)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> type[Counted]:
    Counted.made, Counted.replayed = [], 0
    monkeypatch.setattr(replay, "RecordedPass", Counted)
    return Counted


def caption(model: LongSanaDiT, seed: int, length: int = 48) -> TextMemory:
    device = model.patch_embed.weight.device
    tokens = torch.randn(1, 48, 64, generator=torch.Generator().manual_seed(seed)).to(device, model.dtype)
    return model.cache_caption(TextEmbedding(tokens, torch.arange(48, device=device)[None] < length))


def video(
    network: Any,
    texts: list[TextMemory],
    device: str = "cpu",
    plan: ChunkPlan = PLAN,
    changes: dict[int, Change] | None = None,
) -> Tensor:
    noise, where = PromptNoise(0, [("a red circle", 0)]), {"shape": (16, 4, 6), "device": device}
    chunks = generate(network, FlowSchedule(7.0), texts, plan, rng=noise, changes=changes, **where)  # type: ignore[arg-type]
    return torch.cat([chunk.latents for chunk in chunks], dim=2)


def same(one: Tensor, other: Tensor) -> bool:
    """Tell whether videos are equal; on a CPU to rounding, where plain operations leave out what they could not see."""
    return torch.equal(one, other) if one.is_cuda else torch.allclose(one, other, rtol=0, atol=1e-5)


@torch.no_grad()
def test_a_video_is_recorded_from_its_third_chunk_on(counted: type[Counted]) -> None:
    model = build_model(SHAPES, device="cpu", dtype=torch.float32)
    network, text = ReplayedNetwork(model), caption(model, 0)
    assert same(video(network, [text] * 5), video(model, [text] * 5))
    assert (len(counted.made), counted.replayed) == (1, 15)
    # The next one is replayed from its first chunk on, with whatever caption.
    other = caption(model, 1, 20)
    assert same(video(network, [other] * 5), video(model, [other] * 5))
    assert (len(counted.made), counted.replayed) == (2, 40)


@torch.no_grad()
def test_a_longer_chunk_or_a_batch_is_a_recording_of_its_own(counted: type[Counted]) -> None:
    model = build_model(SHAPES, device="cpu", dtype=torch.float32)
    network, text = ReplayedNetwork(model), caption(model, 0)
    plan = ChunkPlan((2, 2, 2, 3, 3))
    assert same(video(network, [text] * 5, plan=plan), video(model, [text] * 5, plan=plan))
    assert (len(counted.made), counted.replayed) == (2, 15)
    x, t = torch.randn(2, 16, 2, 4, 6), torch.zeros(2)
    for seed in range(2):  # captions of a batch, which have a mask
        tokens, lengths = torch.randn(2, 48, 64), torch.tensor([[7 + seed], [48]])
        masked = model.cache_caption(TextEmbedding(tokens, torch.arange(48)[None] < lengths))
        _, state = model(x, t, masked)
        for _ in range(replay.PLAIN_PASSES + 2):
            assert torch.equal(network(x, t, masked, state=state)[0], model(x, t, masked, state=state)[0])
    assert (len(counted.made), counted.replayed) == (3, 15 + 2 + replay.PLAIN_PASSES + 2)


@torch.no_grad()
def test_captions_of_any_length_share_a_recording(counted: type[Counted]) -> None:
    """A later, shorter one sees nothing of the one before it."""
    model = build_model(SHAPES, device="cpu", dtype=torch.float32)
    network = ReplayedNetwork(model)
    texts = [caption(model, seed, length) for seed, length in ((0, 48), (1, 20), (2, 33), (1, 20), (3, 1))]
    assert same(video(network, texts), video(model, texts))
    assert (len(counted.made), counted.replayed) == (1, 15)
    assert network._place is not None and network._place.text.layers[0][0].shape[2] == 48


@torch.no_grad()
def test_as_many_recordings_are_kept_as_there_is_room_for(counted: type[Counted]) -> None:
    """Two lengths of chunks in turns; a third one takes the place of the one used longest ago."""
    model = build_model(SHAPES, device="cpu", dtype=torch.float32)
    network, text, t = ReplayedNetwork(model, most=2), caption(model, 0), torch.zeros(1)
    xs = [torch.randn(1, 16, frames, 4, 6) for frames in (2, 3, 4)]
    _, state = model(xs[0], t, text)
    for _ in range(replay.PLAIN_PASSES + 2):
        for x in xs[:2]:
            assert same(network(x, t, text, state=state)[0], model(x, t, text, state=state)[0])
    assert (len(counted.made), counted.replayed) == (2, 4)
    network(xs[2], t, text, state=state)
    network(xs[1], t, text, state=state)
    assert counted.replayed == 5
    network(xs[0], t, text, state=state)
    assert counted.replayed == 5


@pytest.mark.parametrize("change", ["recache=2", "rebuild=2", "cut"])
@torch.no_grad()
def test_a_past_that_changes_is_replayed_too(counted: type[Counted], change: str) -> None:
    """Its passes are the new caption's, beside those of the chunk."""
    model = build_model(SHAPES, device="cpu", dtype=torch.float32)
    network, first, second = ReplayedNetwork(model), caption(model, 0), caption(model, 1, 30)
    texts, changes = [first, first, second, second, second], {2: Change.parse(change)}
    assert same(video(network, texts, changes=changes), video(model, texts, changes=changes))
    # The first chunk, absorbed again, is longer than others.
    assert len(counted.made) == (1 if change == "cut" else 2) and counted.replayed >= 15


def recorded(network: ReplayedNetwork) -> bool:
    return any(known.recording is not None for known in network._known)


def past_of(settings: dict[str, Any], device: str, dtype: torch.dtype) -> LongSanaDiT:
    """The network with this past; learned factors are those of half a chunk and others."""
    model = build_model(dataclasses.replace(SHAPES, depth=2, **settings), device=device, dtype=dtype)
    if model.decay_logit is not None:
        model.decay_logit.copy_(torch.linspace(-2, 2, model.decay_logit.numel()).view_as(model.decay_logit))
    return model


@pytest.mark.parametrize("settings", PASTS)
@torch.no_grad()
def test_recorded_passes_of_every_past(graphs: None, settings: dict[str, Any]) -> None:
    """To the bit; chunks that join the sinks are not taken for later ones."""
    model = past_of(settings, "cpu", torch.float32)
    network, text = ReplayedNetwork(model), caption(model, 0)
    assert same(video(network, [text] * 5), video(model, [text] * 5))
    assert recorded(network)
    x, t = torch.randn(1, 16, 2, 4, 6), torch.zeros(1)
    states: list[Any] = [None, None]
    for _ in range(replay.PLAIN_PASSES + 4):
        states = [part(x, t, text, state=state)[1] for part, state in zip((model, network), states, strict=True)]
        assert states[0][3:] == states[1][3:]
        assert all(torch.equal(a, b) for a, b in zip(states[0][:3], states[1][:3], strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("settings", PASTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_replayed_passes_of_every_past(dtype: torch.dtype, settings: dict[str, Any]) -> None:
    model = past_of(settings, "cuda", dtype)
    network, text = ReplayedNetwork(model), caption(model, 0)
    assert torch.equal(video(network, [text] * 5, "cuda"), video(model, [text] * 5, "cuda"))
    assert recorded(network)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_replayed_passes_are_the_passes_themselves(dtype: torch.dtype) -> None:
    """To the bit, video after video; and a state that was kept stays what it was."""
    model = build_model(SHAPES, device="cuda", dtype=dtype)
    network = ReplayedNetwork(model)
    for seed in (0, 1):
        text = caption(model, seed)
        assert torch.equal(video(network, [text] * 5, "cuda"), video(model, [text] * 5, "cuda"))
        assert recorded(network)
    x, t, text = torch.randn(1, 16, 2, 4, 6, device="cuda"), torch.zeros(1, device="cuda"), caption(model, 2)
    _, state = model(x, t, text)
    for _ in range(replay.PLAIN_PASSES):
        network(x, t, text, state=state)
    velocity, after = network(x, t, text, state=state)
    kept = [part.clone() for part in (velocity, *after[:3])]
    network(2 * x, t, text, state=after)
    assert all(torch.equal(a, b) for a, b in zip((velocity, *after[:3]), kept, strict=True))
    assert after.frames == 4


@pytest.mark.gpu
@torch.no_grad()
def test_recordings_that_share_memory_take_turns() -> None:
    """To the bit, of several captions and lengths, each going on from its own state."""
    model = build_model(SHAPES, device="cuda", dtype=torch.bfloat16)
    network, t = ReplayedNetwork(model, most=3), torch.full((1,), 500.0, device="cuda")
    kinds = [(caption(model, seed), torch.randn(1, 16, n, 4, 6, device="cuda")) for seed, n in enumerate((2, 3, 4))]
    plain = [model(x, t, text)[1] for text, x in kinds]
    own = list(plain)
    for _ in range(replay.PLAIN_PASSES + 3):
        for number, (text, x) in enumerate(kinds):
            expected, plain[number] = model(x, t, text, state=plain[number])
            velocity, own[number] = network(x, t, text, state=own[number])
            assert torch.equal(velocity, expected)
    assert all(known.recording is not None for known in network._known) and len(network._known) == 3
    for one, other in zip(own, plain, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one[:3], other[:3], strict=True))
