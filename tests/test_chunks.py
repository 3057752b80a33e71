"""How a clip is cut: the published table, and what must hold for every clip."""

from __future__ import annotations

import dataclasses
from itertools import pairwise

import pytest

from longsana.chunks import ChunkPlan

EVERY = [(frames, size) for frames in range(1, 60) for size in (1, 2, 3, 7, 10)]


@pytest.mark.parametrize(("pixel_frames", "chunks"), [(81, 2), (161, 4), (321, 8), (961, 24), (1041, 26)])
def test_published_boundaries(pixel_frames, chunks):
    frames = (pixel_frames - 1) // 4 + 1
    plan = ChunkPlan.split(frames, 10)
    assert len(plan) == chunks
    assert plan.lengths == (11, *[10] * (chunks - 1))
    assert (*plan.starts, plan.frames) == (0, *range(11, frames + 1, 10))


@pytest.mark.parametrize(
    ("frames", "lengths"),
    [(20, (10, 10)), (29, (19, 10)), (19, (19,)), (10, (10,)), (9, (9,)), (1, (1,)), (30, (10, 10, 10))],
)
def test_the_remainder_goes_to_the_first_chunk(frames, lengths):
    assert ChunkPlan.split(frames, 10).lengths == lengths


def test_chunks_cover_the_clip_once_and_in_order():
    for frames, size in EVERY:
        plan = ChunkPlan.split(frames, size)
        covered = [frame for part in plan.slices() for frame in range(frames)[part]]
        assert covered == list(range(frames)), (frames, size)
        assert plan.frames == sum(plan.lengths) == frames
        assert plan.starts == tuple(part.start for part in plan.slices())
        assert all(a.stop == b.start for a, b in pairwise(plan.slices()))


def test_every_chunk_but_the_first_has_the_size():
    for frames, size in EVERY:
        first, *rest = ChunkPlan.split(frames, size).lengths
        assert set(rest) <= {size}
        assert first < 2 * size
        assert first >= min(size, frames)


@pytest.mark.parametrize("lengths", [(), (0,), (3, 0, 2), (3, -1)])
def test_empty_chunks_are_refused(lengths):
    with pytest.raises(ValueError, match="at least one"):
        ChunkPlan(lengths)


@pytest.mark.parametrize(("frames", "size"), [(0, 10), (-1, 10), (10, 0), (10, -2)])
def test_what_cannot_be_cut_is_refused(frames, size):
    with pytest.raises(ValueError, match=f"{frames} frames into chunks of {size}"):
        ChunkPlan.split(frames, size)


def test_a_plan_is_a_value():
    plan = ChunkPlan.split(21, 10)
    assert plan == ChunkPlan((11, 10))
    assert hash(plan) == hash(ChunkPlan((11, 10)))
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan.lengths = (21,)


@pytest.mark.parametrize(
    ("frames", "first", "lengths"),
    [
        (21, 3, (3, 10, 8)),
        (21, 1, (1, 10, 10)),
        (21, 10, (10, 10, 1)),
        (21, 11, (11, 10)),
        (3, 3, (3,)),
        (2, 3, (2,)),
        (4, 3, (3, 1)),
    ],
)
def test_after_a_first_chunk_of_its_own_the_remainder_is_last(frames, first, lengths):
    assert ChunkPlan.split(frames, 10, first).lengths == lengths


@pytest.mark.parametrize("first", [1, 3, 10, 11])
def test_what_goes_on_after_a_whole_chunk_has_the_chunks_of_the_uncut_video(first):
    for frames in range(12, 60):
        plan = ChunkPlan.split(frames, 10, first)
        assert plan.frames == frames and max(plan.lengths[1:]) <= 10 and set(plan.lengths[1:-1]) <= {10}
        for done in range(1, len(plan)):
            rest = ChunkPlan.going_on(sum(plan.lengths[done:]), 10, first)
            assert rest.lengths == plan.lengths[done:]


def test_a_picture_and_a_first_chunk():
    assert ChunkPlan.with_picture(21, 10, "absorb", 3).lengths == (1, 3, 10, 7)
    assert ChunkPlan.with_picture(21, 10, "pin", 3).lengths == (3, 10, 8)
    assert ChunkPlan.going_on(20, 10) == ChunkPlan.split(20, 10) and ChunkPlan.going_on(25, 10).lengths == (15, 10)
    with pytest.raises(ValueError, match="after -1: must be"):
        ChunkPlan.split(21, 10, -1)
