"""Laws of what is kept of the past: a window, sums that decay, sinks; and what of these means nothing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from longsana.chunks import ChunkPlan
from longsana.config import ModelConfig
from longsana.models.dit import LongSanaDiT
from longsana.models.past import START, Past
from longsana.runtime.errors import InputError
from longsana.state import CausalState
from longsana.weights.build import build_model, empty_model
from tests.models import naive
from tests.models.test_dit import assert_same_state, chunk_levels, own_bytes, relative, streamed

PLANS = [(11, 10), (4, 3, 2, 3), (1, 5, 1, 2)]
POLICIES: dict[str, dict[str, Any]] = {
    "whole": {},
    "window": {"num_cached_blocks": 2},
    "decay": {"state_decay": 0.9},
    "nothing": {"state_decay": 0.0},
    "by head": {"state_decay": [0.7, 0.99]},
    "learned": {"state_decay": "learned"},
    "window and decay": {"num_cached_blocks": 1, "state_decay": 0.9},
    "sink and window": {"num_sink_blocks": 1, "num_cached_blocks": 1},
    "sinks and decay": {"num_sink_blocks": 2, "state_decay": 0.8},
    "sink and learned": {"num_sink_blocks": 1, "state_decay": "learned"},
    "all": {"num_sink_blocks": 1, "num_cached_blocks": 2, "state_decay": [0.9, 0.8]},
}
ENTRIES = dict.fromkeys(POLICIES, 1) | {
    "window": 2, "sink and window": 2, "sinks and decay": 2, "sink and learned": 2, "all": 3,
}  # fmt: skip


@pytest.fixture(autouse=True)
def _no_grad(request: pytest.FixtureRequest):
    with torch.set_grad_enabled("gradient" in request.node.name):
        yield


@pytest.fixture(params=list(POLICIES))
def policy(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture
def model(policy: str, small_config: Any, random_model: Any) -> LongSanaDiT:
    network: LongSanaDiT = random_model(small_config(**POLICIES[policy]))
    return network


def rates(model: LongSanaDiT) -> Tensor:
    """(blocks, heads): g, from its definition."""
    decay, shape = model.config.state_decay, (len(model.blocks), model.heads)
    if decay == "learned":
        return torch.sigmoid(model.decay_logit + math.log(START / (1 - START)))
    if isinstance(decay, tuple):
        last = model.heads - 1
        own = [1 - (1 - decay[0]) * ((1 - decay[1]) / (1 - decay[0])) ** (head / last) for head in range(last + 1)]
        return torch.tensor(own, dtype=torch.float64).expand(shape)
    return torch.full(shape, 1.0 if decay is None else decay, dtype=torch.float64)


def weight(model: LongSanaDiT, lengths: Sequence[int], c: int, i: int) -> Tensor:
    """(blocks, heads): how much chunk c sees of an earlier chunk i."""
    config, own = model.config, rates(model)
    if i < config.num_sink_blocks:
        return torch.ones_like(own)
    if 0 < config.num_cached_blocks < c - i:
        return torch.zeros_like(own)
    return own ** sum(lengths[i + 1 : c + 1])


# Laws -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lengths", PLANS)
@pytest.mark.parametrize("start", [None, (6,), (2, 3, 1)])
def test_streaming_equals_parallel(policy, model, random_text, random_latents, lengths, start):
    text, plan = random_text(2), ChunkPlan(lengths)
    past = None
    if start is not None:
        frames = sum(start)
        past = streamed(model, random_latents(2, frames, seed=9), torch.zeros(2, frames), text, ChunkPlan(start))[1]
    x, t = random_latents(2, plan.frames), chunk_levels(lengths, 2)
    parallel, after_parallel = model(x, t, text, plan=plan, state=past)
    stream, after_stream = streamed(model, x, t, text, plan, past)
    assert relative(stream, parallel) < 1e-12
    assert_same_state(after_stream, after_parallel, 1e-12)
    chunks = len(lengths) + len(start or ())
    assert after_stream.sinks == after_parallel.sinks == min(model.config.num_sink_blocks, chunks)


@pytest.mark.parametrize("lengths", [(4, 3, 2, 3)])
def test_agrees_with_the_naive_network(policy, model, renamed, random_text, random_latents, lengths):
    """Whose chunks see each other by the closed form of the weights."""
    x, t, text = random_latents(2, sum(lengths)), chunk_levels(lengths, 2), random_text(2)
    expected, _ = naive.stream(
        renamed(model, "upstream"),
        x,
        t,
        text.tokens,
        text.mask,
        lengths=lengths,
        head_dim=28,
        cross_heads=4,
        weigh=lambda c, i: list(weight(model, lengths, c, i)),
    )
    given, _ = model(x, t, text, plan=ChunkPlan(lengths))
    assert (given - expected).abs().max() < 1e-9
    whole = random_whole(model)
    assert policy == "whole" or relative(whole(x, t, text, plan=ChunkPlan(lengths))[0], given) > 1e-3


def random_whole(model: LongSanaDiT) -> LongSanaDiT:
    """The network with the published past."""
    settings = {name: getattr(ModelConfig(), name) for name in ("num_cached_blocks", "state_decay", "num_sink_blocks")}
    whole = LongSanaDiT(ModelConfig(**{**vars(model.config), **settings})).to(model.dtype)
    whole.load_state_dict({name: value for name, value in model.state_dict().items() if name != "decay_logit"})
    return whole


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lengths", PLANS)
def test_a_factor_of_one_is_the_whole_past_to_the_bit(
    small_config, random_model, random_text, random_latents, dtype, lengths
):
    whole, model = (random_model(small_config(state_decay=decay), dtype) for decay in (None, 1.0))
    text, plan, x = random_text(1), ChunkPlan(lengths), random_latents(1, sum(lengths))
    t = chunk_levels(lengths, 1)
    for run in (streamed, lambda model, x, t, text, plan: model(x, t, text, plan=plan)):
        (out, state), (expected, expected_state) = (run(network, x, t, text, plan) for network in (model, whole))
        assert torch.equal(out, expected)
        assert all(torch.equal(a, b) for a, b in zip(state[:3], expected_state[:3], strict=True))


def test_a_factor_of_zero_leaves_the_chunk_itself_and_the_tail(small_config, random_model, random_text, random_latents):
    model, whole = random_model(small_config(state_decay=0)), random_model(small_config())
    text, plan, x = random_text(1), ChunkPlan((4, 3, 2)), random_latents(1, 9)
    t, state = chunk_levels(plan.lengths, 1), None
    out, _ = model(x, t, text, plan=plan)
    for frames in plan.slices():
        if state is not None:
            state = state._replace(kv=torch.zeros_like(state.kv), k_sum=torch.zeros_like(state.k_sum))
        own, state = whole(x[:, :, frames], t[:, frames], text, state=state)
        assert relative(out[:, :, frames], own) < 1e-12


def test_learned_factors_start_at_half_a_chunk_of_ten(small_config, random_text, random_latents):
    settings = {"load_from": "seeded:3"}
    learned, fixed = (
        build_model(small_config(state_decay=decay, **settings), device="cpu", dtype=torch.float64)
        for decay in ("learned", START)
    )
    assert abs(START**10 - 0.5) < 1e-12
    assert learned.decay_logit.shape == (2, 2) and not learned.decay_logit.any()
    assert all(torch.equal(value, learned.state_dict()[name]) for name, value in fixed.state_dict().items())
    x, t, text = random_latents(1, 9), torch.zeros(1, 9), random_text(1)
    plan = ChunkPlan((4, 3, 2))
    assert relative(learned(x, t, text, plan=plan)[0], fixed(x, t, text, plan=plan)[0]) < 1e-12


def test_a_tenth_of_a_percent_of_a_learned_factor_is_seen_in_bfloat16(small_config, random_model):
    """Near the start, as the logit is counted from there."""
    model = random_model(small_config(state_decay="learned"), torch.bfloat16)
    shape, options = (2, 2), {"dtype": torch.float32, "device": "cpu"}
    before, after = (
        model.past.factors([10], shape, torch.full(shape, logit, dtype=torch.bfloat16), **options)[0]
        for logit in (0.0, 1e-3)
    )
    assert before[0, 0] == pytest.approx(0.5, rel=1e-6)
    slope = 10 * 0.5 * (1 - START)  # of the factor of ten frames, by the logit
    assert (after - before)[0, 0] == pytest.approx(1e-3 * slope, rel=0.02)


def test_sinks_stay_and_a_window_begins_after_them(small_config, random_model, random_text, random_latents):
    """In one block without temporal convolution; deeper networks pass older news on from chunk to chunk."""
    model = random_model(small_config(depth=1, num_cached_blocks=1, num_sink_blocks=2))
    model.blocks[0].feed_forward.temporal.weight.zero_()
    text, plan = random_text(1), ChunkPlan((2, 1, 3, 2, 2))
    x, t = random_latents(1, plan.frames), torch.zeros(1, plan.frames)
    out, _ = streamed(model, x, t, text, plan)
    last, changed = plan.slices()[-1], []
    for frames in plan.slices()[:-1]:
        other = x.clone()
        other[:, :, frames] += 1
        changed.append(relative(streamed(model, other, t, text, plan)[0][:, :, last], out[:, :, last]) > 0)
    assert changed == [True, True, False, True]


# Gradients ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"num_cached_blocks": 2}, {"num_sink_blocks": 1}])
def test_gradients_of_learned_factors(small_config, random_model, random_text, random_latents, settings):
    """Differences give them; and chunks one after the other as all at once."""
    model, text = random_model(small_config(state_decay="learned", **settings)), random_text(1)
    model.requires_grad_(False)
    plan = ChunkPlan((2, 3, 1))
    x, t = random_latents(1, plan.frames), chunk_levels(plan.lengths, 1)
    probe = random_latents(1, plan.frames, seed=4)
    logit = model.decay_logit.detach().clone().requires_grad_()

    def loss(logit: Tensor, run: Any) -> Tensor:
        out, state = torch.func.functional_call(_Run(model, run), {"model.decay_logit": logit}, (x, t, text, plan))
        return (out * probe).sum() + state.kv.sum()

    for run in (streamed, parallel):
        assert torch.autograd.gradcheck(lambda logit, run=run: loss(logit, run), [logit])
    one, other = (torch.autograd.grad(loss(logit, run), logit)[0] for run in (streamed, parallel))
    assert (one != 0).all()
    assert relative(one, other) < 1e-10


def parallel(model: LongSanaDiT, x: Tensor, t: Tensor, text: Any, plan: ChunkPlan) -> tuple[Tensor, CausalState]:
    result: tuple[Tensor, CausalState] = model(x, t, text, plan=plan)
    return result


class _Run(torch.nn.Module):
    def __init__(self, model: LongSanaDiT, run: Any) -> None:
        super().__init__()
        self.model, self.run = model, run

    def forward(self, *inputs: Any) -> Any:
        return self.run(self.model, *inputs)


def test_gradients_reach_every_parameter(policy, model, random_text, random_latents):
    text, x = random_text(1), random_latents(1, 8)
    _, state = model(x[:, :, :3], torch.zeros(1), text)
    out, _ = model(x[:, :, 3:], torch.tensor([727.0]), text, plan=ChunkPlan((3, 2)), state=state.detach())
    out.square().mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.any(), name


# The state ------------------------------------------------------------------------------------------------------------


def test_its_size_does_not_grow(policy, small_config, random_model, random_text, random_latents):
    model = random_model(small_config(**POLICIES[policy]), torch.bfloat16)
    state, sizes = None, []
    for _ in range(6):
        _, state = model(random_latents(1, 3), torch.zeros(1), random_text(1), state=state)
        assert state.kv.shape[2] == state.k_sum.shape[2] == model.past.entries == ENTRIES[policy]
        assert state.kv.dtype == state.k_sum.dtype == torch.float32
        sizes.append(state.nbytes)
    assert set(sizes) == {own_bytes(state)} == {own_bytes(model.empty_state(1, 4, 6))}


def test_its_size_at_480p(policy):
    model = empty_model(ModelConfig(**POLICIES[policy])).bfloat16()
    tail, sums = 20 * 1560 * 2240 * 2, 20 * 4 * (20 * 112 * 112 + 2240)
    assert own_bytes(model.empty_state(1, 60, 104)) == tail + ENTRIES[policy] * sums
    learned = 20 * 20 if POLICIES[policy].get("state_decay") == "learned" else 0
    assert sum(weight.numel() for weight in model.parameters()) == 2_056_862_144 + learned


@pytest.mark.parametrize(
    ("there", "here", "message"),
    [
        ({"num_cached_blocks": 3}, {}, "entries of window and sinks"),
        ({"num_sink_blocks": 1, "num_cached_blocks": 1}, {"num_cached_blocks": 2}, "1 sinks, .* num_sink_blocks=0"),
        ({"num_sink_blocks": 2, "num_cached_blocks": 1}, {"num_sink_blocks": 1, "num_cached_blocks": 1}, "2 sinks"),
    ],
)
def test_that_of_another_past_is_refused(small_config, random_model, random_text, random_latents, there, here, message):
    x, t, text = random_latents(1, 3), torch.zeros(1), random_text(1)
    _, state = random_model(small_config(**there))(x, t, text)
    _, state = random_model(small_config(**there))(x, t, text, state=state)
    with pytest.raises(ValueError, match=message):
        random_model(small_config(**here))(x, t, text, state=state)


# Settings -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_cached_blocks": 0}, r"^num_cached_blocks=0: must be -1"),
        ({"num_sink_blocks": -1}, r"^num_sink_blocks=-1: must be 0"),
        ({"state_decay": 1.5}, r"^state_decay=1.5: must be from 0 .* to 1"),
        ({"state_decay": -0.1}, r"^state_decay=-0.1: must be from 0 .* to 1"),
        ({"state_decay": math.nan}, r"^(model\.)?state_decay=nan: must be a finite number"),
        ({"state_decay": True}, r"^state_decay=True: must be a number, \[first, last\] of the heads, or learned"),
        ({"state_decay": "lerned"}, r"^state_decay=lerned: must be .*, or learned \(did you mean 'learned'\?\)"),
        ({"state_decay": [0.9]}, r"^state_decay=\[0.9\]: must be a number, \[first, last\]"),
        ({"state_decay": [0.9, 0.9, 0.9]}, r"^state_decay=\[0.9, 0.9, 0.9\]: must be a number, \[first, last\]"),
        ({"state_decay": [0.9, "x"]}, r"^state_decay=\[0.9, 'x'\]: must be a number, \[first, last\]"),
        ({"state_decay": [0.9, 2]}, r"^state_decay=\[0.9, 2.0\]: must be from 0 .* to 1"),
        ({"state_decay": [0.9, 1]}, r"^state_decay=\[0.9, 1.0\]: heads are spread geometrically in 1 - g"),
        ({"state_decay": 0, "num_cached_blocks": 2}, r"^num_cached_blocks=2: has no meaning with state_decay=0"),
        ({"num_sink_blocks": 1}, r"^num_sink_blocks=1: has no meaning beside the whole past"),
        ({"num_sink_blocks": 1, "state_decay": 1}, r"^num_sink_blocks=1: has no meaning beside the whole past"),
    ],
)
def test_what_means_nothing_is_refused_by_name(settings, message):
    with pytest.raises(InputError, match=message) as caught:
        empty_model(ModelConfig(**settings))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("given", "kept", "past"),
    [
        (None, None, None),
        (1, 1.0, None),
        ("1e-3", 0.001, 0.001),
        ([0, 0.5], (0.0, 0.5), (0.0, 0.5)),
        ("learned", "learned", "learned"),
    ],
)
def test_numbers_are_taken_as_they_are_written(given, kept, past):
    config = ModelConfig(state_decay=given)
    assert config.state_decay == kept and type(config.state_decay) is type(kept)
    assert Past.of(config).decay == past
    assert config == ModelConfig(state_decay=kept) and hash(config)


@pytest.mark.parametrize(("heads", "first", "last"), [(1, 0.2, 0.9), (4, 0.3, 0.9), (20, 0.999, 0.0)])
def test_heads_are_spread_in_what_is_forgotten(heads, first, last):
    past = Past.of(ModelConfig(state_decay=[first, last]))
    (factors, again) = past.factors([1, 3], (2, heads), None, dtype=torch.float64, device="cpu")
    assert torch.equal(factors, again) and factors.shape == (2, heads)
    forgotten = 1 - factors[0]
    assert factors[0, 0] == pytest.approx(first, abs=1e-12)
    if heads > 1:
        assert factors[0, -1] == pytest.approx(last, abs=1e-12)
        ratios = forgotten[1:] / forgotten[:-1]
        torch.testing.assert_close(ratios, ratios[:1].expand(heads - 1), rtol=1e-9, atol=0)
    torch.testing.assert_close(factors[1], factors[0] ** 3)
