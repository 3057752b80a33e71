"""Laws of the network: who sees whom, what the state remembers, and agreement with two other implementations."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils import _pytree

from longsana.chunks import ChunkPlan
from longsana.config import ModelConfig
from longsana.models import attention, dit, embeddings, feed_forward
from longsana.models.dit import LongSanaDiT
from longsana.models.embeddings import TextEmbedding
from longsana.models.past import Reach
from longsana.models.rope import Rotary
from longsana.ops.reference import rotate
from longsana.state import CausalState
from longsana.weights.build import empty_model
from tests.models import naive

pytestmark = pytest.mark.usefixtures("_no_grad")

PLANS = [(11, 10), (10, 10, 10), (5,), (13, 7, 1)]
WINDOWS = [-1, 1, 2]
LEVELS = torch.tensor([1000.0, 0.0, 727.0, 31.0])  # of consecutive chunks


@pytest.fixture
def _no_grad(request: pytest.FixtureRequest):
    with torch.set_grad_enabled("gradient" in request.node.name):
        yield


def chunk_levels(lengths: Sequence[int], batch: int) -> Tensor:
    """(B, T): a timestep for each chunk, other ones for each sample."""
    rows = [LEVELS.roll(i)[: len(lengths)].repeat_interleave(torch.tensor(lengths)) for i in range(batch)]
    return torch.stack(rows)


def streamed(
    model: LongSanaDiT,
    x: Tensor,
    t: Tensor,
    text: TextEmbedding,
    plan: ChunkPlan,
    state: CausalState | None = None,
) -> tuple[Tensor, CausalState | None]:
    outputs = []
    for frames in plan.slices():
        out, state = model(x[:, :, frames], t[:, frames], text, state=state)
        outputs.append(out)
    return torch.cat(outputs, dim=2), state


def relative(ours: Tensor, reference: Tensor) -> float:
    """Largest difference, in units of the reference's root mean square."""
    assert ours.shape == reference.shape
    return float((ours.double() - reference.double()).abs().max() / reference.double().square().mean().sqrt())


def assert_same_state(a: CausalState, b: CausalState, tolerance: float) -> None:
    assert a.frames == b.frames
    for name in ("kv", "k_sum", "tail"):
        assert relative(getattr(a, name), getattr(b, name)) < tolerance, name


# One network, three uses ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("lengths", PLANS)
@pytest.mark.parametrize("start", [None, 6])
def test_streaming_equals_parallel(small_config, random_model, random_text, random_latents, window, lengths, start):
    model, text, plan = random_model(small_config(num_cached_blocks=window)), random_text(2), ChunkPlan(lengths)
    past = None
    if start is not None:
        _, past = model(random_latents(2, start, seed=9), torch.zeros(2), text)
    x, t = random_latents(2, plan.frames), chunk_levels(lengths, 2)

    parallel, after_parallel = model(x, t, text, plan=plan, state=past)
    stream, after_stream = streamed(model, x, t, text, plan, past)

    assert relative(stream, parallel) < 1e-12
    assert_same_state(after_stream, after_parallel, 1e-12)
    assert after_stream.frames == plan.frames + (start or 0)


@pytest.mark.parametrize("channels", [16, 32, 128])  # Wan; DCAE-V, which people bring; LTX-2
def test_latents_of_every_vae(channels: int) -> None:
    """The published sizes, with a patch of one latent where a latent is 32 pixels wide."""
    name = "SanaMSVideo_2000M_P2_D20" if channels == 16 else "SanaMSVideo_2000M_P1_D20"
    model = empty_model(ModelConfig(model=name, in_channels=channels))
    patch = 2 if channels == 16 else 1
    assert model.patch_embed.weight.shape == (2240, channels, 1, patch, patch)
    assert model.final.linear.weight.shape == (channels * patch**2, 2240)
    text = TextEmbedding(torch.empty(1, 300, 2304, device="meta"), torch.ones(1, 300, dtype=torch.bool, device="meta"))
    x = torch.empty(1, channels, 10, 22, 40, device="meta")
    velocity, state = model(x, torch.empty(1, device="meta"), text)
    assert velocity.shape == x.shape
    assert state.tail.shape == (20, 1, 22 * 40 // patch**2, 2240)


def test_past_matters(small_config, random_model, random_text, random_latents):
    """Without this, streaming could equal parallel because both forget."""
    model, text, x = random_model(small_config()), random_text(1), random_latents(1, 10)
    t = torch.zeros(1, 10)
    out, state = streamed(model, x, t, text, ChunkPlan((5, 5)))
    alone, _ = model(x[:, :, 5:], t[:, 5:], text)
    assert relative(out[:, :, 5:], alone) > 1e-2
    for name in ("kv", "k_sum", "tail"):
        forgetful = state._replace(**{name: torch.zeros_like(getattr(state, name))})
        with_all, _ = model(x[:, :, :5], t[:, :5], text, state=state)
        without, _ = model(x[:, :, :5], t[:, :5], text, state=forgetful)
        assert relative(without, with_all) > 1e-2, name


@pytest.mark.parametrize("window", WINDOWS)
def test_later_chunks_do_not_leak_and_own_chunk_is_bidirectional(
    small_config, random_model, random_text, random_latents, window
):
    model, text, plan = random_model(small_config(num_cached_blocks=window)), random_text(1), ChunkPlan((3, 4, 3))
    x, t = random_latents(1, 10), chunk_levels((3, 4, 3), 1)
    out, _ = model(x, t, text, plan=plan)

    later = x.clone()
    later[:, :, 7:] += 1
    assert torch.equal(model(later, t, text, plan=plan)[0][:, :, :7], out[:, :, :7])

    inside = x.clone()
    inside[:, :, 6] += 1
    changed = (model(inside, t, text, plan=plan)[0] - out).abs().amax((0, 1, 3, 4))
    assert (changed[:3] == 0).all()
    assert (changed[3:7] > 1e-3).all()


def test_batch_is_independent_samples(small_config, random_model, random_text, random_latents):
    model, text, plan = random_model(small_config()), random_text(2), ChunkPlan((4, 3))
    x, t = random_latents(2, 7), chunk_levels((4, 3), 2)
    both, state = model(x, t, text, plan=plan)
    for i in range(2):
        own = slice(i, i + 1)
        alone, own_state = model(x[own], t[own], TextEmbedding(text.tokens[own], text.mask[own]), plan=plan)
        assert relative(both[own], alone) < 1e-12
        part = CausalState(state.kv[:, own], state.k_sum[:, own], state.tail[:, own], state.frames)
        assert_same_state(part, own_state, 1e-12)


def test_padded_tokens_of_a_caption_are_not_seen(small_config, random_model, random_text, random_latents):
    model, text, x = random_model(small_config()), random_text(2), random_latents(2, 3)
    out, _ = model(x, torch.zeros(2), text)
    noisy = TextEmbedding(torch.where(text.mask[..., None], text.tokens, 7.0), text.mask)
    assert torch.equal(model(x, torch.zeros(2), noisy)[0], out)
    wide = TextEmbedding(noisy.tokens, torch.ones_like(text.mask))
    assert relative(model(x, torch.zeros(2), wide)[0][1:], out[1:]) > 1e-2


@pytest.mark.parametrize("batch", [1, 2])
def test_a_caption_that_was_read_is_the_caption(small_config, random_model, random_text, random_latents, batch):
    """And a single one has lost its padding."""
    model = random_model(small_config())
    x, text, t = random_latents(batch, 4), random_text(batch), torch.full((batch,), 500.0)
    text = TextEmbedding(text.tokens, text.mask.clone())
    text.mask[:, 5:] = False
    read = model.cache_caption(text)
    assert len(read.layers) == len(model.blocks)
    assert read.layers[0][0].shape[2] == (5 if batch == 1 else text.mask.shape[1])
    for expected, given in zip(model(x, t, text)[0], model(x, t, read)[0], strict=True):
        torch.testing.assert_close(given, expected)


def test_arranged_weights_are_the_same_weights(small_config, random_model, random_text, random_latents):
    """And the fused operations, which run on a GPU alone, take them as they lie."""
    from longsana.ops.gated_conv import _taps

    model, text = random_model(small_config()), random_text(1)
    x, t = random_latents(1, 4), torch.tensor([500.0])
    expected, _ = model(x, t, text)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    model.optimize_layout()
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    torch.testing.assert_close(model(x, t, text)[0], expected)
    for block in model.blocks:
        depthwise, temporal = block.feed_forward.depthwise.weight, block.feed_forward.temporal.weight
        assert _taps(depthwise).data_ptr() == depthwise.data_ptr()
        assert temporal[..., 0].permute(2, 1, 0).is_contiguous()


# Time -----------------------------------------------------------------------------------------------------------------


def test_timesteps_per_frame(small_config, random_model, random_text, random_latents):
    model, text, x = random_model(small_config()), random_text(2), random_latents(2, 4)
    t = torch.tensor([960.0, 31.0])
    out, _ = model(x, t, text)
    per_frame = t[:, None].repeat(1, 4)
    assert relative(model(x, per_frame, text)[0], out) < 1e-12
    per_frame[0, 2] = 500
    changed = (model(x, per_frame, text)[0] - out).abs().amax((1, 3, 4))
    assert (changed[0] > 1e-3).all(), "the other frames of the chunk see the changed frame"
    assert (changed[1] < 1e-12).all()


def test_timesteps_are_truncated(small_config, random_model, random_text, random_latents):
    model, text, x = random_model(small_config()), random_text(1), random_latents(1, 2)
    fed, whole, next_whole = (model(x, torch.tensor([t]), text)[0] for t in (959.96, 959.0, 960.0))
    assert torch.equal(fed, whole)
    assert relative(next_whole, whole) > 1e-3


# Positions ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_first_chunk_may_lie_anywhere(small_config, random_model, random_text, random_latents, dtype, tolerance):
    model, text, x = random_model(small_config(), dtype), random_text(1), random_latents(1, 5)
    t = torch.tensor([889.0])
    at_zero, _ = model(x, t, text)
    far, state = model(x, t, text, state=model.empty_state(1, 4, 6, frames=5000))
    assert relative(far, at_zero) < tolerance
    assert state.frames == 5005


@pytest.mark.parametrize("start", [1015, 16380])
def test_long_stream_in_float32_equals_its_float64_twin(small_config, random_model, random_text, random_latents, start):
    """Past the end of published rotary tables, and far enough for float32 angles to be wrong."""
    model, text, plan = random_model(small_config(), torch.float32), random_text(1), ChunkPlan((5, 4, 6, 5))
    twin = copy.deepcopy(model).double()
    x, t = random_latents(1, plan.frames), chunk_levels(plan.lengths, 1)
    out, state = streamed(model, x, t, text, plan, model.empty_state(1, 4, 6, frames=start))
    exact, exact_state = streamed(twin, x, t, text, plan, twin.empty_state(1, 4, 6, frames=start))
    assert relative(out, exact) < 3e-5
    assert_same_state(state, exact_state, 3e-5)
    at_zero, _ = streamed(twin, x, t, text, plan)
    assert relative(exact, at_zero) < 1e-9, "only distances matter"


def test_two_thousand_chunks_do_not_drift(small_config, random_model, random_text):
    config = small_config(depth=1, hidden_size=28, num_heads=1)
    model = random_model(config, torch.float32)
    twin = copy.deepcopy(model).double()
    text, exact_text = (network.cache_caption(random_text(1)) for network in (model, twin))
    rng, t = torch.Generator().manual_seed(3), torch.zeros(1)
    state, exact = model.empty_state(1, 2, 4), twin.empty_state(1, 2, 4)
    for _ in range(2000):
        x = torch.randn(1, 4, 1, 2, 4, generator=rng)
        _, state = model(x, t, text, state=state)
        _, exact = twin(x, t, exact_text, state=exact)
    assert_same_state(state, exact, 1e-4)
    assert relative(model(x, t, text, state=state)[0], twin(x, t, exact_text, state=exact)[0]) < 1e-4


# The window -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [1, 2, 3])
def test_window_forgets_what_lies_further_back(small_config, random_model, random_text, random_latents, window):
    """In one block without temporal convolution; deeper networks pass older news on from chunk to chunk."""
    model, text = random_model(small_config(depth=1, num_cached_blocks=window)), random_text(1)
    model.blocks[0].feed_forward.temporal.weight.zero_()
    plan = ChunkPlan((2, 1, 3, 2, 2))
    x, t = random_latents(1, plan.frames), torch.zeros(1, plan.frames)
    out, _ = streamed(model, x, t, text, plan)
    last = plan.slices()[-1]
    for index, frames in enumerate(plan.slices()[:-1]):
        changed = x.clone()
        changed[:, :, frames] += 1
        difference = relative(streamed(model, changed, t, text, plan)[0][:, :, last], out[:, :, last])
        if index < len(plan) - 1 - window:
            assert difference == 0, f"chunk {index} is outside the window"
        else:
            assert difference > 1e-3, f"chunk {index} is inside the window"


@pytest.mark.parametrize("window", [1, 2, 3])
def test_window_state_has_one_entry_for_each_chunk(small_config, random_model, random_text, random_latents, window):
    model, text = random_model(small_config(num_cached_blocks=window)), random_text(1)
    full = random_model(small_config())
    plan = ChunkPlan((2, 1, 3, 2))
    x, t = random_latents(1, plan.frames), torch.zeros(1, plan.frames)
    state, sums = None, []
    for frames in plan.slices():
        _, own = full(x[:, :, frames], t[:, frames], text)
        sums.append(own.k_sum[0, :, 0])  # in the first block the keys do not depend on the past
        _, state = model(x[:, :, frames], t[:, frames], text, state=state)
        assert state.kv.shape[2] == state.k_sum.shape[2] == window
    assert relative(state.k_sum[0], torch.stack(sums[-window:], dim=1)) < 1e-12


# Agreement with diffusers ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def diffusers_twin(small_config, random_model, renamed) -> tuple[LongSanaDiT, torch.nn.Module]:
    """The network and diffusers', with the same weights and with diffusers' eps, in float32."""
    diffusers = pytest.importorskip("diffusers")
    model = random_model(
        small_config(depth=3, hidden_size=112, linear_attn_eps=1e-15, cross_norm_eps=1e-5), torch.float32
    )
    twin = diffusers.SanaVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=4,
        attention_head_dim=28,
        num_layers=3,
        num_cross_attention_heads=4,
        cross_attention_head_dim=28,
        cross_attention_dim=112,
        caption_channels=32,
        mlp_ratio=model.config.mlp_ratio,
        patch_size=(1, 2, 2),
        qk_norm="rms_norm_across_heads",
    )
    twin.load_state_dict(renamed(model, "diffusers"), strict=True)
    return model, twin.eval()


def run_twin(twin: torch.nn.Module, x: Tensor, t: Tensor, text: TextEmbedding, dtype: torch.dtype) -> Tensor:
    mask = text.mask.to(dtype)
    return twin(x.to(dtype), text.tokens.to(dtype), t, encoder_attention_mask=mask, return_dict=False)[0]


def test_agrees_with_diffusers(diffusers_twin, random_text, random_latents):
    model, twin = diffusers_twin
    x, t, text = random_latents(3, 5).float(), torch.tensor([1000, 727, 3]), random_text(3)
    reference = run_twin(twin, x, t, text, torch.float32)
    assert relative(model(x, t, text)[0], reference) < 1e-5
    assert relative(model(x, t + 1, text)[0], reference) > 1e-3


def test_bf16_is_as_exact_as_diffusers(diffusers_twin, random_text, random_latents):
    model, twin = diffusers_twin
    x, t, text = random_latents(3, 5).float(), torch.tensor([1000, 727, 3]), random_text(3)
    reference = run_twin(copy.deepcopy(twin).double(), x, t, text, torch.float64)

    def rms_error(out: Tensor) -> float:
        return float((out.double() - reference).square().mean().sqrt())

    theirs = rms_error(run_twin(copy.deepcopy(twin).bfloat16(), x, t, text, torch.bfloat16))
    out, state = copy.deepcopy(model).bfloat16()(x, t, text)
    assert out.dtype == state.tail.dtype == torch.bfloat16
    assert state.kv.dtype == state.k_sum.dtype == torch.float32
    assert rms_error(out) < 1.5 * theirs


# The norms by themselves ----------------------------------------------------------------------------------------------


def test_q_and_k_are_normalised_over_the_full_width(small_config, random_model, monkeypatch):
    """Per-head norms change the output of random networks by 1e-8 only, so look at what the attention is given."""
    config = small_config()
    layer = random_model(config).blocks[0].attn
    uneven = torch.tensor([1.0, 50.0], dtype=torch.float64).repeat_interleave(28)  # magnitude of each head
    layer.qkv.weight[:112] *= uneven.repeat(2)[:, None]
    given: dict[str, Tensor] = {}

    def spy(q: Tensor, k: Tensor, v: Tensor, *args: object, **kwargs: object) -> tuple[Tensor, None, None]:
        given.update(q=q, k=k)
        return v, None, None

    monkeypatch.setattr(attention, "linear_attention", spy)
    x = torch.randn(1, 6, 56, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    layer(x, (None, None), None, None, [6], Reach())
    raw = dict(zip("qkv", (x @ layer.qkv.weight.T).split(56, dim=-1), strict=True))
    for name, weight in (("q", layer.q_norm.weight), ("k", layer.k_norm.weight)):
        full = naive.rms_norm(raw[name], weight, 1e-5).clamp(min=0).unflatten(-1, (2, 28))
        by_head = naive.rms_norm(raw[name].unflatten(-1, (2, 28)), weight.view(2, 28), 1e-5).clamp(min=0)
        assert relative(given[name], full) < 1e-12
        assert relative(given[name], by_head) > 1e-1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("norm", "eps"),
    [
        ("blocks.0.attn.q_norm", 1e-5),
        ("blocks.0.attn.k_norm", 1e-5),
        ("blocks.0.cross_attn.q_norm", 1e-6),
        ("blocks.0.cross_attn.k_norm", 1e-6),
        ("text_embed.norm", 1e-5),
    ],
)
def test_rms_norm_multiplies_by_the_weight_in_float32(small_config, random_model, dtype, norm, eps):
    module = random_model(small_config(), dtype).get_submodule(norm)
    x = torch.randn(512, 56, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3.5, 2, 512)[:, None]
    x, wide = x.to(dtype), x.to(dtype).float()
    formula = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * module.weight.float()
    if dtype == torch.float32:
        assert relative(module(x), formula) < 1e-6
        other_eps = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-8) * module.weight.float()
        assert relative(module(x), other_eps) > 1e-2
    else:
        rounded_twice = (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(dtype) * module.weight
        assert (module(x) != formula.to(dtype)).float().mean() < 1e-3
        assert (rounded_twice != formula.to(dtype)).float().mean() > 1e-1


# Faults that this file must see ---------------------------------------------------------------------------------------


Fault = Callable[[pytest.MonkeyPatch, LongSanaDiT], None]
FAULTS: dict[str, Fault] = {}


def fault(name: str) -> Callable[[Fault], Fault]:
    return lambda plant: FAULTS.setdefault(name, plant)


@fault("missing frame offset")
def _(patch: pytest.MonkeyPatch, model: LongSanaDiT) -> None:
    patch.setattr(dit, "rotary", lambda dim, start, *rest, _real=dit.rotary, **kwargs: _real(dim, 0, *rest, **kwargs))


@fault("roped k_sum")
def _(patch: pytest.MonkeyPatch, model: LongSanaDiT) -> None:
    def plant(q, k, v, cos, sin, *args, _real=attention.linear_attention, **kwargs):
        return _real(rotate(q, cos, sin), rotate(k, cos, sin), v, cos * 0 + 1, sin * 0, *args, **kwargs)

    patch.setattr(attention, "linear_attention", plant)


def signed_features(qkv: Tensor, q_weight: Tensor, k_weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """`qk_features` without the ReLU."""
    q, k, v = qkv.chunk(3, dim=-1)
    return F.rms_norm(q, q_weight.shape, q_weight, eps), F.rms_norm(k, k_weight.shape, k_weight, eps), v


@fault("RoPE before ReLU")
def _(patch: pytest.MonkeyPatch, model: LongSanaDiT) -> None:
    def plant(q, k, v, cos, sin, *args, _real=attention.linear_attention, **kwargs):
        q, k = F.relu(rotate(q, cos, sin)), F.relu(rotate(k, cos, sin))
        return _real(q, k, v, cos * 0 + 1, sin * 0, *args, **kwargs)

    patch.setattr(attention, "qk_features", signed_features)
    patch.setattr(attention, "linear_attention", plant)


@fault("no ReLU")
def _(patch: pytest.MonkeyPatch, model: LongSanaDiT) -> None:
    patch.setattr(attention, "qk_features", signed_features)


@fault("swapped h and w")
def _(patch: pytest.MonkeyPatch, model: LongSanaDiT) -> None:
    def plant(*args, _real=dit.rotary, **kwargs):
        # 6 pairs turn with the frame, 4 with the row, 4 with the column.
        return Rotary(*(part[:, [*range(6), *range(10, 14), *range(6, 10)]] for part in _real(*args, **kwargs)))

    patch.setattr(dit, "rotary", plant)


@fault("swapped GLU halves")
def _(patch: pytest.MonkeyPatch, model: LongSanaDiT) -> None:
    def plant(x, weight, bias, size, _real=feed_forward.gated_conv):
        half = len(bias) // 2
        return _real(x.roll(half, -1), weight.roll(half, 0), bias.roll(half), size)

    patch.setattr(feed_forward, "gated_conv", plant)


@fault("zero left neighbour")
def _(patch: pytest.MonkeyPatch, model: LongSanaDiT) -> None:
    def plant(x, tail, weight, *, lengths, ahead, _real=feed_forward.temporal_conv):
        chunks = x.split(list(lengths), dim=1)
        return torch.cat([_real(c, torch.zeros_like(tail), weight, lengths=[c.shape[1]]) for c in chunks], dim=1)

    patch.setattr(feed_forward, "temporal_conv", plant)


@fault("right neighbour in the next chunk")
def _(patch: pytest.MonkeyPatch, model: LongSanaDiT) -> None:
    def plant(x, tail, weight, *, lengths, ahead, _real=feed_forward.temporal_conv):
        return _real(x, tail, weight, lengths=[x.shape[1]])

    patch.setattr(feed_forward, "temporal_conv", plant)


@fault("no inner residual")
def _(patch: pytest.MonkeyPatch, model: LongSanaDiT) -> None:
    def plant(x, *args, _real=feed_forward.temporal_conv, **kwargs):
        return _real(x, *args, **kwargs) - x

    patch.setattr(feed_forward, "temporal_conv", plant)


@fault("tail after the temporal convolution")
def _(patch: pytest.MonkeyPatch, model: LongSanaDiT) -> None:
    for block in model.blocks:
        block.feed_forward.register_forward_hook(lambda _, __, out: (*out[:2], sum(out[:2])[:, -1].clone()))


@fault("sine first")
def _(patch: pytest.MonkeyPatch, model: LongSanaDiT) -> None:
    patch.setattr(embeddings, "sinusoid", lambda t, dim, _real=embeddings.sinusoid: _real(t, dim).roll(dim // 2, -1))


@fault("scale first")
def _(patch: pytest.MonkeyPatch, model: LongSanaDiT) -> None:
    patch.setattr(
        dit, "norm_modulate", lambda x, shift, scale, eps, _real=dit.norm_modulate: _real(x, scale, shift, eps)
    )


@fault("final layer modulated by the blocks' vector")
def _(patch: pytest.MonkeyPatch, model: LongSanaDiT) -> None:
    model.time_embed.register_forward_hook(lambda _, __, out: (out[1][..., 0, :], out[1]))


@fault("channel-slowest unpatchify")
def _(patch: pytest.MonkeyPatch, model: LongSanaDiT) -> None:
    def plant(x, size, _real=model._unpatchify):
        return _real(x.unflatten(-1, (4, 4)).transpose(-1, -2).flatten(-2), size)

    patch.setattr(model, "_unpatchify", plant)


@fault("a norm before cross-attention")
def _(patch: pytest.MonkeyPatch, model: LongSanaDiT) -> None:
    for block in model.blocks:
        block.cross_attn.register_forward_pre_hook(lambda _, args: (F.layer_norm(args[0], (56,)), *args[1:]))


@fault("no caption norm")
def _(patch: pytest.MonkeyPatch, model: LongSanaDiT) -> None:
    model.text_embed.norm = torch.nn.Identity()


@fault("caption mask ignored")
def _(patch: pytest.MonkeyPatch, model: LongSanaDiT) -> None:
    for block in model.blocks:
        block.cross_attn.register_forward_pre_hook(lambda _, args: (*args[:2], torch.ones_like(args[2])))


def against_naive(model: LongSanaDiT, weights: naive.Weights, window: int, latents, captions) -> tuple[float, float]:
    """Largest difference to the naive network in velocities and in the state: one absorbed chunk, then two at once."""
    lengths, x, text = (4, 3, 2), latents(2, 9), captions(2)
    t = chunk_levels(lengths, 2)
    sizes = {"head_dim": 28, "cross_heads": 4}
    expected, entries = naive.stream(
        weights, x, t, text.tokens, text.mask, lengths=lengths, window=window, start=7, **sizes
    )
    state = model.empty_state(2, 4, 6, frames=7)
    first, state = model(x[:, :, :4], t[:, :4], text, state=state)
    rest, state = model(x[:, :, 4:], t[:, 4:], text, plan=ChunkPlan(lengths[1:]), state=state)
    outputs = float((torch.cat([first, rest], dim=2) - expected).abs().max())

    seen = naive.accumulate(entries) if window < 0 else None
    kept = [seen] if seen else entries[-window:]
    differences = []
    for i in range(len(model.blocks)):
        for w, entry in enumerate(kept):
            vk, k_sum, _ = entry[i]
            differences += [state.kv[i, :, w] - vk.transpose(-1, -2), state.k_sum[i, :, w] - k_sum[:, :, 0]]
        differences.append(state.tail[i] - entries[-1][i][2][:, :, 0].transpose(1, 2))
    return outputs, max(float(difference.abs().max()) for difference in differences)


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize(("depth", "hidden_size"), [(3, 56), (2, 112)])
def test_agrees_with_the_naive_network(
    small_config, random_model, renamed, random_text, random_latents, window, depth, hidden_size
):
    model = random_model(small_config(depth=depth, hidden_size=hidden_size, num_cached_blocks=window))
    outputs, state = against_naive(model, renamed(model, "upstream"), window, random_latents, random_text)
    assert outputs < 1e-9
    assert state < 1e-9


@pytest.mark.parametrize("kind", FAULTS)
def test_a_planted_fault_is_seen(small_config, random_model, renamed, random_text, random_latents, monkeypatch, kind):
    model = random_model(small_config())
    weights = renamed(model, "upstream")
    FAULTS[kind](monkeypatch, model)
    outputs, _ = against_naive(model, weights, -1, random_latents, random_text)
    assert outputs > 1e-3


# Gradients ------------------------------------------------------------------------------------------------------------


def test_gradients_reach_every_parameter(small_config, random_model, random_text, random_latents):
    model, text, x = random_model(small_config()), random_text(1), random_latents(1, 8)
    _, state = model(x[:, :, :3], torch.zeros(1), text)
    out, state = model(x[:, :, 3:], torch.tensor([727.0]), text, plan=ChunkPlan((3, 2)), state=state.detach())
    (out.square().mean() + state.kv.square().mean()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().sum() > 0, name
    assert [name for name, _ in model.named_buffers()] == ["text_embed.null_tokens"]


def test_gradients_pass_through_a_state_unless_it_is_detached(small_config, random_model, random_text, random_latents):
    model, text = random_model(small_config()), random_text(1)
    past, now = random_latents(1, 3).requires_grad_(), random_latents(1, 2, seed=5)
    _, state = model(past, torch.zeros(1), text)
    attached, _ = model(now, torch.zeros(1), text, state=state)
    (grad,) = torch.autograd.grad(attached.sum(), past, retain_graph=True)
    assert grad.isfinite().all()
    assert grad.abs().sum() > 0
    detached, _ = model(now, torch.zeros(1), text, state=state.detach())
    assert torch.equal(attached, detached)
    assert torch.autograd.grad(detached.sum(), past, allow_unused=True) == (None,)


def test_gradients_of_streaming_equal_those_of_parallel(small_config, random_model, random_text, random_latents):
    model, text, plan = random_model(small_config()), random_text(1), ChunkPlan((3, 2, 2))
    x, t = random_latents(1, 7), chunk_levels((3, 2, 2), 1)
    weight = random_latents(1, 7, seed=4)
    grads = []
    for out, _ in (model(x, t, text, plan=plan), streamed(model, x, t, text, plan)):
        grads.append(torch.autograd.grad((out * weight).sum(), list(model.parameters())))
    for name, a, b in zip(dict(model.named_parameters()), *grads, strict=True):
        assert relative(a, b) < 1e-10, name


# The state as a value -------------------------------------------------------------------------------------------------


def own_bytes(state: CausalState) -> int:
    return sum(part.numel() * part.element_size() for part in state[:3])


@pytest.mark.parametrize("window", WINDOWS)
def test_state_bytes_do_not_grow(small_config, random_model, random_text, random_latents, window):
    model, text = random_model(small_config(num_cached_blocks=window), torch.bfloat16), random_text(1)
    state, sizes = None, []
    for _ in range(10):
        _, state = model(random_latents(1, 3), torch.zeros(1), text, state=state)
        sizes.append(state.nbytes)
    assert len(set(sizes)) == 1
    assert sizes[0] == own_bytes(state) == own_bytes(model.empty_state(1, 4, 6))


def test_nbytes_counts_what_a_view_keeps_alive(small_config, random_model):
    state = random_model(small_config()).empty_state(1, 4, 6)
    activation = torch.zeros(2, 1, 20, 6, 56, dtype=torch.float64)
    view = state._replace(tail=activation[:, :, -1])
    assert own_bytes(view) == own_bytes(state) == state.nbytes
    assert view.nbytes - state.nbytes == 19 * state.tail.nbytes
    assert state._replace(tail=activation[:, :, -1].clone()).nbytes == state.nbytes


def test_published_network_size_and_its_state_at_480p():
    sizes = {}
    for window in (-1, 1, 2, 3):
        with torch.device("meta"):
            model = LongSanaDiT(ModelConfig(num_cached_blocks=window)).bfloat16()
        sizes[window] = own_bytes(model.empty_state(1, 60, 104))
    assert sum(p.numel() for p in model.parameters()) == 2_056_862_144
    tail, sums = 20 * 1560 * 2240 * 2, 20 * 4 * (20 * 112 * 112 + 2240)
    assert sizes == {-1: tail + sums, 1: tail + sums, 2: tail + 2 * sums, 3: tail + 3 * sums}
    assert sizes[-1] / 2**20 <= 153
    # k_sum is float32, 0.09 MiB more for each entry than in the published accounting.
    assert all(abs(sizes[w] / 2**20 - (133.3 + 19.2 * w)) < 0.15 * w for w in (1, 2, 3))


def test_state_is_a_pytree(small_config, random_model):
    state = random_model(small_config()).empty_state(1, 4, 6, frames=3)
    leaves, spec = _pytree.tree_flatten((torch.zeros(1), state))
    assert [leaf is part for leaf, part in zip(leaves[1:], state, strict=True)] == [True] * 5
    rebuilt = _pytree.tree_unflatten(leaves, spec)[1]
    assert isinstance(rebuilt, CausalState)
    assert rebuilt.frames == 3


# Wrong input ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": (1, 4, 3, 5, 6)}, "5x6"),
        ({"t": (3,)}, "t has shape"),
        ({"plan": (2, 2)}, "hold 4 frames"),
        ({"state": (1, 4, 8)}, "the state is of"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(small_config, random_model, random_text, change, message):
    model = random_model(small_config())
    state = model.empty_state(*change["state"]) if "state" in change else None
    plan = ChunkPlan(change["plan"]) if "plan" in change else None
    with pytest.raises(ValueError, match=message):
        model(
            torch.zeros(change.get("x", (1, 4, 3, 4, 6))),
            torch.zeros(change.get("t", (1,))),
            random_text(1),
            plan=plan,
            state=state,
        )


@pytest.mark.parametrize(
    "changes",
    [{"linear_head_dim": 24}, {"num_heads": 5}, {"patch_size": (2, 2, 2)}, {"num_cached_blocks": 0}],
)
def test_sizes_that_make_no_network_are_refused(small_config, changes):
    with pytest.raises(ValueError, match=next(iter(changes))):
        LongSanaDiT(small_config(**changes))


def test_a_state_of_another_window_is_refused(small_config, random_model, random_text):
    state = random_model(small_config(num_cached_blocks=3)).empty_state(1, 4, 6)
    with pytest.raises(ValueError, match="window"):
        random_model(small_config())(torch.zeros(1, 4, 3, 4, 6), torch.zeros(1), random_text(1), state=state)
