"""Products in float8 against their exact twins."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from longsana.chunks import ChunkPlan
from longsana.models.feed_forward import TemporalConv
from longsana.models.float8 import PRODUCTS, Float8Linear, Float8TemporalConv, in_float8, to_float8
from longsana.ops.reference import FLOAT8_MAX, quantise_rows


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_rows_keep_three_bits_of_mantissa_and_their_own_size():
    x = random(6, 80) * torch.tensor([1e-3, 1.0, 1e4, 0.0, 1.0, 50.0])[:, None]
    rows, scale = quantise_rows(x)
    assert rows.dtype == torch.float8_e4m3fn
    assert scale.shape == (6, 1)
    back = rows.float() * scale
    # Half a step of the mantissa, or of the smallest numbers: 2^-9 of scale 1.
    assert ((back - x).abs() <= x.abs() / 16 + scale * 2**-10).all()
    assert (rows[:3].float().abs().amax(1) == FLOAT8_MAX).all()
    assert not back[3].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
def test_a_product_is_that_of_the_rounded_factors(dtype, bias):
    linear = nn.Linear(48, 32, bias=bias).to(dtype).requires_grad_(False)
    x = random(2, 5, 48).to(dtype)
    (rows, row_scale), (weight, weight_scale) = quantise_rows(x.flatten(0, 1)), quantise_rows(linear.weight)
    expected = (rows.double() * row_scale) @ (weight.double() * weight_scale).t()
    if bias:
        expected += linear.bias
    layer = in_float8(linear)
    given = layer(x)
    assert given.dtype == dtype
    assert torch.equal(layer(quantise_rows(x)), given), "rows that were made before are taken as they are"
    torch.testing.assert_close(given.flatten(0, 1).double(), expected, rtol=1e-2, atol=1e-2)
    exact = x.double() @ linear.weight.double().t() + (linear.bias.double() if bias else 0)
    error = (given.double() - exact).norm() / exact.norm()
    assert 0.005 < error < 0.05  # two factors of three bits


@pytest.mark.parametrize("lengths", [(1,), (4,), (3, 1, 2)])
def test_the_temporal_convolution_stays_near_itself(lengths):
    conv = TemporalConv(48).requires_grad_(False)
    conv.weight.copy_(random(48, 48, 3, 1, seed=1) / 12)
    x, tail = random(2, sum(lengths), 5, 48), random(2, 5, 48, seed=2)
    exact, given = conv(x, tail, lengths), in_float8(conv)(x, tail, lengths)
    assert given.shape == exact.shape
    assert 0.005 < (given - exact).norm() / exact.norm() < 0.05
    # One frame at a time it sees what it saw, but for what came after within its chunk.
    pieces = zip(x.split(lengths, 1), [tail, *(part[:, -1] for part in x.split(lengths, 1))], lengths, strict=False)
    streamed = [in_float8(conv)(part, before, [length]) for part, before, length in pieces]
    assert torch.equal(torch.cat(streamed, 1), given)


def test_a_network_stays_near_itself(small_config, random_model, random_text, random_latents):
    model = random_model(small_config(hidden_size=112, mlp_ratio=1.0), torch.float32)
    rounded = copy.deepcopy(model)
    to_float8(rounded)
    x, text, t = random_latents(1, 3).float(), random_text(1), torch.tensor([700.0])
    (expected, state), (given, rounded_state) = model(x, t, text), rounded(x, t, text)
    assert 0.005 < (given - expected).norm() / expected.norm() < 0.15
    assert 0.005 < (rounded_state.kv - state.kv).norm() / state.kv.norm() < 0.15
    layers = rounded.blocks[0].named_modules()
    names = {name for name, module in layers if isinstance(module, Float8Linear | Float8TemporalConv)}
    assert names == {*PRODUCTS, "feed_forward.temporal.taps"}


@pytest.mark.parametrize("lengths", [(1, 1, 1), (3, 1, 2)])
@torch.no_grad()
def test_a_stream_is_the_whole(small_config, random_model, random_text, random_latents, lengths):
    """Chunk by chunk with the state, or all chunks at once; rounding to float8 makes more of the sums' rounding."""
    model = random_model(small_config(hidden_size=112, mlp_ratio=1.0), torch.float32)
    to_float8(model)
    x, text, t = random_latents(2, sum(lengths)).float(), random_text(2), torch.tensor([700.0, 20.0])
    expected, after = model(x, t, text, plan=ChunkPlan(lengths))
    state, pieces = None, []
    for part in x.split(lengths, dim=2):
        velocity, state = model(part, t, text, state=state)
        pieces.append(velocity)
    assert (torch.cat(pieces, 2) - expected).norm() < 1e-3 * expected.norm()
    assert (state.kv - after.kv).norm() < 1e-3 * after.kv.norm()


@torch.no_grad()
def test_its_weights_may_be_laid_out_before_or_after(small_config, random_model, random_text, random_latents):
    before, after = (random_model(small_config(hidden_size=112, mlp_ratio=1.0), torch.float32) for _ in range(2))
    before.optimize_layout()
    to_float8(before)
    to_float8(after)
    after.optimize_layout()
    x, text, t = random_latents(1, 3).float(), random_text(1), torch.tensor([700.0])
    assert torch.equal(before(x, t, text)[0], after(x, t, text)[0])


@pytest.mark.parametrize(
    "settings", [{"state_decay": "learned"}, {"state_decay": [0.8, 0.95], "num_sink_blocks": 1, "num_cached_blocks": 1}]
)
@torch.no_grad()
def test_its_past_is_that_of_the_network(small_config, random_model, random_text, random_latents, settings):
    """The sums of three chunks stay near; those of the whole past are others."""
    model = random_model(small_config(hidden_size=112, mlp_ratio=1.0, **settings), torch.float32)
    rounded, text, t = copy.deepcopy(model), random_text(1), torch.zeros(1)
    to_float8(rounded)
    whole = random_model(small_config(hidden_size=112, mlp_ratio=1.0), torch.float32)
    state = rounded_state = sums = None
    for seed in range(3):
        x = random_latents(1, 3, seed=seed).float()
        (_, state), (_, rounded_state) = (
            network(x, t, text, state=past) for network, past in ((model, state), (rounded, rounded_state))
        )
        _, sums = whole(x, t, text, state=sums)
    assert rounded_state.sinks == state.sinks == settings.get("num_sink_blocks", 0)
    assert (rounded_state.k_sum - state.k_sum).norm() / state.k_sum.norm() < 0.05
    assert (sums.k_sum[:, :, 0] - state.k_sum.sum(2)).norm() / sums.k_sum.norm() > 0.1


def test_widths_that_the_hardware_cannot_take_are_refused(small_config, random_model):
    with pytest.raises(ValueError, match="multiples of 16"):
        to_float8(random_model(small_config()))  # 56 wide
