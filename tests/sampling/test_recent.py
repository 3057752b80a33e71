"""A past that changes with the prompt, held to its definition: a history that is absorbed from scratch every time."""

from __future__ import annotations

import gc
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from longsana.chunks import ChunkPlan
from longsana.data.story import Change
from longsana.flow.noise import PromptNoise
from longsana.flow.schedule import FlowSchedule
from longsana.models.dit import LongSanaDiT
from longsana.models.embeddings import TextEmbedding
from longsana.sampling.recent import Held, Recent
from longsana.sampling.sampler import Chunk, absorb, denoise_chunk, generate
from longsana.state import CausalState
from tests.models import naive
from tests.models.test_past import POLICIES, weight

SHAPE = (4, 4, 6)
SCHEDULE = FlowSchedule(7.0, (1000, 889))
PROMPTS = (("a red ball", 0), ("a blue box", 0))
LENGTHS = (3, 2, 2, 2, 2, 2)
STORIES: dict[str, dict[int, str]] = {
    "keep": {2: "keep"},
    "recache": {3: "recache=1"},
    "recache two": {3: "recache=2"},
    "recache more than there is": {2: "recache=4"},
    "rebuild": {3: "rebuild=1"},
    "rebuild two": {4: "rebuild=2"},
    "rebuild all": {2: "rebuild=9"},
    "cut": {3: "cut"},
    "recache twice": {2: "recache=2", 3: "recache=2"},
    "recache after a cut": {2: "cut", 3: "recache=3"},
    "recache after a rebuild": {3: "rebuild=1", 4: "recache=3"},
    "rebuild after all": {1: "cut", 3: "recache=1", 5: "rebuild=3"},
    "recache after a longer rebuild": {4: "rebuild=3", 5: "recache=1"},
}


class Exact(PromptNoise):
    """Noise in float64, so that a float64 network is not rounded in between."""

    def draw(self, *arguments: Any, **options: Any) -> Tensor:
        return super().draw(*arguments, **options).double()


RNG = Exact(3, PROMPTS)


class Past(NamedTuple):
    """A chunk that a state has absorbed, and the caption that it heard."""

    x0: Tensor
    text: TextEmbedding
    start: int


def changed(history: Sequence[Past], change: Change, text: TextEmbedding) -> list[Past]:
    """The definition of each change."""
    heard = [past._replace(text=text) for past in history]
    return {
        "keep": lambda: list(history),
        "recache": lambda: [*history[: -change.chunks], *heard[-change.chunks :]],
        "rebuild": lambda: heard[-change.chunks :],
        "cut": list,
    }[change.kind]()


def by_definition(
    denoise: Callable[[Tensor, TextEmbedding, list[Past], int], Tensor],
    texts: Sequence[TextEmbedding],
    changes: Mapping[int, Change],
    lengths: Sequence[int] = LENGTHS,
) -> list[Tensor]:
    """Latents of each chunk; `denoise` absorbs the whole history for each of them."""
    history: list[Past] = []
    latents, start = [], 0
    for index, (text, length) in enumerate(zip(texts, lengths, strict=True)):
        if index in changes:
            history = changed(history, changes[index], text)
        noise = RNG.draw(start, 0, (SHAPE[0], length, *SHAPE[1:]), "cpu")
        latents.append(denoise(noise, text, history, start))
        history = [*history, Past(latents[-1], text, start)]
        start += length
    return latents


def fresh_noise(start: int, like: Tensor) -> Callable[[int], Tensor]:
    return lambda step: RNG.draw(start, step, like.shape[1:], "cpu")


def from_scratch(model: LongSanaDiT) -> Callable[[Tensor, TextEmbedding, list[Past], int], Tensor]:
    """The network itself: the same arithmetic, over and over."""

    def denoise(noise: Tensor, text: TextEmbedding, history: list[Past], start: int) -> Tensor:
        state = model.empty_state(2, *SHAPE[1:], frames=history[0].start if history else start)
        for past in history:
            state = absorb(model, past.x0, past.text, state)
        return denoise_chunk(model, SCHEDULE, noise, text, state, rng=fresh_noise(start, noise))[0]

    return denoise


def parts(random_text: Callable[..., TextEmbedding], changes: Mapping[int, Any]) -> list[TextEmbedding]:
    """A caption for each chunk, another one after every change."""
    return [random_text(2, seed=sum(first <= chunk for first in changes)) for chunk in range(len(LENGTHS))]


def sampled(model: Any, texts: Sequence[TextEmbedding], changes: Mapping[int, Change], **options: Any) -> list[Chunk]:
    plan = ChunkPlan(LENGTHS)
    return list(generate(model, SCHEDULE, texts, plan, shape=SHAPE, rng=RNG, device="cpu", changes=changes, **options))


def parsed(story: str) -> dict[int, Change]:
    return {chunk: Change.parse(text) for chunk, text in STORIES[story].items()}


NAIVE_POLICIES = ("whole", "window", "sinks and decay", "all")
NAIVE_STORIES = ("rebuild two", "cut", "recache after a rebuild")


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


@pytest.mark.parametrize("story", STORIES)
@pytest.mark.parametrize("policy", ["whole", "window", "sink and window", "sinks and decay", "all"])
def test_a_change_is_a_history_that_is_absorbed_again(
    small_config: Any, random_model: Any, random_text: Any, policy: str, story: str
) -> None:
    """To the bit."""
    model, changes = random_model(small_config(**POLICIES[policy])), parsed(story)
    texts = parts(random_text, changes)
    expected = by_definition(from_scratch(model), texts, changes)
    chunks = sampled(model, texts, changes)
    for chunk, latents in zip(chunks, expected, strict=True):
        assert torch.equal(chunk.latents, latents), chunk.index
    assert [chunk.start for chunk in chunks] == list(ChunkPlan(LENGTHS).starts)
    assert chunks[-1].state is not None and chunks[-1].state.frames == sum(LENGTHS)


@pytest.mark.parametrize(
    ("policy", "story"),
    [
        *((policy, "recache two") for policy in NAIVE_POLICIES),
        *(("all", story) for story in NAIVE_STORIES),
        *(
            pytest.param(policy, story, marks=pytest.mark.slow)
            for policy, story in itertools.product(NAIVE_POLICIES, NAIVE_STORIES)
            if policy != "all"
        ),
    ],
)
def test_it_is_that_of_the_naive_network(
    small_config: Any, random_model: Any, random_text: Any, renamed: Any, policy: str, story: str
) -> None:
    """In float64 to rounding, with a cache that is a list of entries and shares no code."""
    model, changes = random_model(small_config(**POLICIES[policy])), parsed(story)
    weights, texts = renamed(model, "upstream"), parts(random_text, changes)

    def denoise(noise: Tensor, text: TextEmbedding, history: list[Past], start: int) -> Tensor:
        lengths = [past.x0.shape[2] for past in history] + [noise.shape[2]]
        entries: list[naive.Entry] = []

        def run(x: Tensor, t: Tensor, text: TextEmbedding, start: int) -> tuple[Tensor, naive.Entry]:
            cache = naive.weighted(entries, lambda c, i: list(weight(model, lengths, c, i)))
            return naive.forward(
                weights, x, t, text.tokens, text.mask, head_dim=28, cross_heads=4, start=start, cache=cache
            )

        for past in history:
            entries.append(run(past.x0, torch.zeros(2), past.text, past.start)[1])
        return denoise_chunk(
            lambda x, t, text, *, state=None: (run(x, t, text, start)[0], state),  # type: ignore[arg-type, return-value]
            *(SCHEDULE, noise, text, None),
            rng=fresh_noise(start, noise),
        )[0]

    for chunk, latents in zip(sampled(model, texts, changes), by_definition(denoise, texts, changes), strict=True):
        assert float((chunk.latents - latents).abs().max()) < 1e-8, chunk.index


def test_a_cut_begins_a_video_of_its_own(small_config: Any, random_model: Any, random_text: Any) -> None:
    """At later positions, which are relative, with the noise that the chunks have anyway."""
    model = random_model(small_config())
    texts = parts(random_text, {3: None})
    film = sampled(model, texts, {3: Change("cut")})

    class Later(Exact):
        def draw(self, start: int, *arguments: Any, **options: Any) -> Tensor:
            return super().draw(start + 7, *arguments, **options)

    alone = generate(
        model, SCHEDULE, texts[3:], ChunkPlan(LENGTHS[3:]), shape=SHAPE, rng=Later(3, PROMPTS), device="cpu"
    )
    for chunk, own in zip(film[3:], alone, strict=True):
        assert float((chunk.latents - own.latents).abs().max()) < 1e-10


@pytest.mark.parametrize("change", ["recache=1", "recache=3", "rebuild=6", "keep"])
def test_under_the_same_caption_nothing_changes(
    small_config: Any, random_model: Any, random_text: Any, change: str
) -> None:
    model, texts = random_model(small_config(num_cached_blocks=2)), [random_text(2)] * len(LENGTHS)
    plain, own = sampled(model, texts, {}), sampled(model, texts, {3: Change.parse(change)})
    for a, b in zip(plain, own, strict=True):
        assert torch.equal(a.latents, b.latents)
        assert a.state is not None and b.state is not None and a.state.sinks == b.state.sinks
        assert all(torch.equal(x, y) for x, y in zip(a.state[:3], b.state[:3], strict=True))


@pytest.mark.parametrize("noisy", [False, True])
def test_what_is_absorbed_again_is_what_was_absorbed(
    small_config: Any, random_model: Any, random_text: Any, noisy: bool
) -> None:
    """Training's noise on it, too."""
    model, absorbed = random_model(small_config()), []

    def network(x: Tensor, t: Tensor, text: TextEmbedding, *, state: CausalState | None = None) -> Any:
        if int(t[0]) == 0:
            absorbed.append(x.clone())  # a place that is used again
        return model(x, t, text, state=state)

    changes = {3: Change("recache", 2)}
    sampled(network, parts(random_text, changes), changes, noisy_absorb=noisy)
    assert len(absorbed) == len(LENGTHS) + 2
    assert torch.equal(absorbed[3], absorbed[1]) and torch.equal(absorbed[4], absorbed[2])


# Memory ---------------------------------------------------------------------------------------------------------------


def states(model: LongSanaDiT, count: int) -> list[CausalState]:
    return [model.empty_state(2, *SHAPE[1:], frames=sum(LENGTHS[:chunk])) for chunk in range(count)]


@pytest.mark.parametrize(
    ("changes", "most", "latents", "with_states"),
    [
        ({}, None, 0, 0),
        ({2: Change("cut")}, None, 0, 0),
        ({2: Change("rebuild", 3)}, None, 3, 0),
        ({2: Change("recache", 2)}, None, 2, 2),
        ({2: Change("recache", 2), 4: Change("rebuild", 3)}, None, 3, 2),
        ({2: Change("recache", 999)}, 2, 2, 2),
    ],
)
def test_what_is_held_is_allocated_once(
    small_config: Any,
    random_model: Any,
    random_latents: Any,
    changes: Any,
    most: int | None,
    latents: int,
    with_states: int,
) -> None:
    """Latents as far as any change reaches back, states as far as one recaches, and never more than there can be."""
    model = random_model(small_config(num_cached_blocks=2))
    recent, before = Recent(changes.values(), max(LENGTHS), most), states(model, 7)
    assert recent.nbytes == 0
    places = set()
    for chunk, length in enumerate(LENGTHS):
        x0 = random_latents(2, length, seed=chunk)
        assert recent.keep(x0, before[chunk], before[chunk + 1]) is before[chunk + 1]
        assert recent.nbytes == latents * 2 * 4 * 3 * 24 * 8 + with_states * before[0].nbytes
        held = recent.held.chunks
        assert len(held) == min(chunk + 1, latents)
        places |= {kept.latents.data_ptr() for kept in held}
        for back, (kept, own) in enumerate(zip(reversed(held), range(chunk, -1, -1), strict=False)):
            assert torch.equal(kept.latents, random_latents(2, LENGTHS[own], seed=own))
            assert kept.latents.is_contiguous() and kept.start == before[own].frames
            assert (kept.before is not None) == (back < with_states)
            assert kept.before is None or kept.before.frames == before[own].frames
    assert len(places) == latents
    again, held = Recent(changes.values(), max(LENGTHS), most), recent.copy()
    again.take(held)
    for kept, other in zip(again.held.chunks, held.chunks, strict=True):
        assert torch.equal(kept.latents, other.latents) and (kept.before is None) == (other.before is None)
    named = Held.named(held.tensors())
    assert named.reach == held.reach and len(named.chunks) == len(held.chunks)
    for change in changes.values():
        assert named.reaches(change, 0)
        assert change.kind == "cut" or not Held().reaches(change, 0)


def has_numbers(tensor: Tensor) -> bool:
    try:
        return tensor.data_ptr() != 0
    except RuntimeError:
        return False


def test_generate_holds_no_more_in_a_long_video(small_config: Any, random_model: Any, random_text: Any) -> None:
    """Tensors that are alive between two chunks, by number and bytes, once the first chunks are there."""
    model, text = random_model(small_config(depth=1)), [random_text(2, seed=seed) for seed in (1, 2)]
    changes = {chunk: Change("recache", 2) if chunk % 4 else Change("rebuild", 2) for chunk in range(3, 24, 2)}
    texts, plan = [text[chunk // 2 % 2] for chunk in range(24)], ChunkPlan((2,) * 24)
    alive = []
    for chunk in generate(model, SCHEDULE, texts, plan, shape=SHAPE, rng=RNG, device="cpu", changes=changes):
        del chunk
        gc.collect()
        # Plain ones: what other tests left may be a tensor without numbers.
        tensors = [one for one in gc.get_objects() if type(one) is Tensor and has_numbers(one)]
        alive.append((len(tensors), sum({one.data_ptr(): one.nbytes for one in tensors}.values())))
        del tensors
    assert len(set(alive[2:-1])) == 1, alive


# A cut to a picture ---------------------------------------------------------------------------------------------------

PICTURE = torch.randn(2, SHAPE[0], 1, *SHAPE[1:], generator=torch.Generator().manual_seed(9), dtype=torch.float64)


class Later(Exact):
    """Noise of the latents from the cut on."""

    def draw(self, start: int, *arguments: Any, **options: Any) -> Tensor:
        return super().draw(start + 7, *arguments, **options)


@pytest.mark.parametrize("policy", ["whole", "sink and window", "all"])
@pytest.mark.parametrize("apart", [True, False])
@pytest.mark.parametrize("then", ["keep", "recache=1", "rebuild=2"])
def test_a_cut_to_a_picture_begins_a_video_of_its_own(
    small_config: Any, random_model: Any, random_text: Any, policy: str, apart: bool, then: str
) -> None:
    """Absorbed by itself as where it is the first chunk, pinned as where it is pinned in that."""
    model = random_model(small_config(**POLICIES[policy]))
    changes = {3: Change("cut"), 4: Change.parse(then)}
    texts = parts(random_text, changes)
    film = sampled(model, texts, changes, first={3: PICTURE}, apart=apart)
    lengths, captions = LENGTHS[3:], texts[3:]
    later = {1: Change.parse(then)}
    if apart:  # chunks are counted with the picture's
        lengths, captions = (1, LENGTHS[3] - 1, *LENGTHS[4:]), [texts[3], *captions]
        change = later.pop(1)
        later[2] = change._replace(chunks=change.chunks and change.chunks + 1)
    options: dict[str, Any] = {"shape": SHAPE, "rng": Later(3, PROMPTS), "device": "cpu", "changes": later}
    alone = list(generate(model, SCHEDULE, captions, ChunkPlan(lengths), first=PICTURE, **options))
    own = torch.cat([chunk.latents for chunk in film[3:]], dim=2)
    assert torch.equal(own[:, :, :1], PICTURE)
    assert float((own - torch.cat([chunk.latents for chunk in alone], dim=2)).abs().max()) < 1e-10
    assert [chunk.start for chunk in film] == list(ChunkPlan(LENGTHS).starts)
    before = sampled(model, texts, changes)
    assert all(torch.equal(one.latents, two.latents) for one, two in zip(film[:3], before[:3], strict=True))
    assert not torch.equal(film[3].latents[:, :, 1:], before[3].latents[:, :, 1:])


@pytest.mark.parametrize("change", ["recache=1", "recache=2", "rebuild=9"])
def test_a_chunk_with_a_picture_is_absorbed_again_as_it_was(
    small_config: Any, random_model: Any, random_text: Any, change: str
) -> None:
    """Under one caption nothing changes, from what is held and from what a file holds of it."""
    model, texts = random_model(small_config()), [random_text(2)] * len(LENGTHS)
    cut, again = {3: Change("cut")}, {3: Change("cut"), 4: Change.parse(change)}
    plain = sampled(model, texts, cut, first={3: PICTURE}, apart=True)
    own = sampled(model, texts, again, first={3: PICTURE}, apart=True)
    for a, b in zip(plain, own, strict=True):
        assert torch.equal(a.latents, b.latents)
    recent = Recent(again.values(), max(LENGTHS))
    start = ChunkPlan(LENGTHS[:4])
    for chunk in generate(
        model, SCHEDULE, texts[:4], start, shape=SHAPE, rng=RNG, device="cpu",
        changes=cut, first={3: PICTURE}, apart=True, recent=recent,
    ):  # fmt: skip
        state = chunk.state
    held, later = Held.named(recent.copy().tensors()), Recent(again.values(), max(LENGTHS))
    assert [kept.alone for kept in held.chunks][-1] == 1
    later.take(held)
    rest = ChunkPlan(LENGTHS[4:])
    gone_on = generate(
        model, SCHEDULE, texts[4:], rest, shape=SHAPE, rng=RNG, device="cpu",
        state=state, changes={0: again[4]}, recent=later,
    )  # fmt: skip
    for a, b in zip(plain[4:], gone_on, strict=True):
        assert torch.equal(a.latents, b.latents)


def test_steps_show_the_whole_chunk(small_config: Any, random_model: Any, random_text: Any) -> None:
    model, texts, shown = random_model(small_config()), [random_text(2)] * len(LENGTHS), list[Tensor]()

    def on_step(step: int, x: Tensor) -> Tensor:
        shown.append(x)
        return x

    film = sampled(model, texts, {3: Change("cut")}, first={3: PICTURE}, apart=True, on_step=on_step)
    assert [x.shape[2] for x in shown] == [length for length in LENGTHS for _ in SCHEDULE.steps]
    assert torch.equal(shown[2 * 3 + 1], film[3].latents)
