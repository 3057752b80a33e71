"""A stream's frames leave before the pass that absorbs them, and its states are what they would be."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch

from longsana.pipelines.video import LongSanaVideoChunk, LongSanaVideoPipeline
from longsana.sampling.continuation import Continuation
from tests.pipelines.repository import OTHER, PROMPT, SIZE
from tests.pipelines.test_stream import CHUNKS, same_state, seed


@pytest.fixture
def passes(loaded: LongSanaVideoPipeline) -> Any:
    """Timesteps of the passes that are made, 0 of those that absorb."""
    found: list[float] = []
    hook = loaded.transformer.register_forward_pre_hook(lambda module, inputs: found.append(float(inputs[2].max())))
    yield found
    hook.remove()


def test_frames_leave_before_the_absorbing_pass(loaded: LongSanaVideoPipeline, passes: list[float]) -> None:
    stream = loaded.stream(PROMPT, 25, generator=seed(), **SIZE, **CHUNKS)
    first = next(stream)
    assert len(passes) == 2 and 0 not in passes and first.frames.shape[1] == 9
    assert first.state.network.frames == 3 and passes[2:] == [0], "asked for"
    second = next(stream)
    assert len(passes) == 5 and passes.count(0) == 1
    next(stream)
    assert passes.count(0) == 2 and second.state.network.frames == 5 and passes.count(0) == 2, "not asked for"
    assert next(stream, None) is None and passes.count(0) == 3


@pytest.mark.parametrize("change", ["keep", "recache=1", "rebuild=1"])
def test_a_state_that_is_asked_for_after_its_stream_was_closed(loaded: LongSanaVideoPipeline, change: str) -> None:
    options = SIZE | CHUNKS | {"prompt_change": change}
    whole = list(loaded.stream([PROMPT, OTHER, OTHER], 25, generator=seed(), **options))
    stream = loaded.stream([PROMPT, OTHER, OTHER], 25, generator=seed(), **options)
    next(stream)
    second = next(stream)
    stream.close()  # type: ignore[attr-defined]
    assert same_state(second.state, whole[1].state)
    (rest,) = loaded.stream(OTHER, 8, state=second, **options)
    assert torch.equal(rest.frames, whole[2].frames)


def test_interrupted_before_the_absorbing_pass(loaded: LongSanaVideoPipeline, passes: list[float]) -> None:
    stream = loaded.stream(PROMPT, generator=seed(), **SIZE, **CHUNKS)
    first = next(stream)
    loaded.interrupt = True
    assert next(stream, None) is None and passes.count(0) == 1
    assert first.state.network.frames == 3


def test_a_chunk_is_an_output_of_diffusers(loaded: LongSanaVideoPipeline) -> None:
    """By attributes, keys and places; copied, pickled, mapped over; its state is made once."""
    chunk = next(loaded.stream(f"{PROMPT} | [cut] {OTHER}", 25, generator=seed(), **SIZE, **CHUNKS))
    assert list(chunk) == list(chunk.keys()) == ["frames", "state"] and isinstance(chunk["state"], Continuation)
    assert chunk.state is chunk["state"] is chunk[1] is chunk.to_tuple()[1] is dict(chunk)["state"]
    assert [value is chunk[key] for key, value in chunk.items()] == [True, True] and list(chunk.values())[1] is chunk[1]
    for other in (copy.copy(chunk), copy.deepcopy(chunk), pickle.loads(pickle.dumps(chunk))):
        assert isinstance(other, LongSanaVideoChunk) and same_state(other.state, chunk.state)
        assert torch.equal(other.frames, chunk.frames)
    mapped = torch.utils._pytree.tree_map_only(torch.Tensor, torch.zeros_like, chunk)
    assert not mapped.frames.any() and not mapped.state.network.kv.any() and chunk.state.network.kv.any()
    with pytest.raises(KeyError):
        chunk["latents"]
    chunk.state = changed = chunk.state._replace(seed=5)
    assert chunk.state is changed
