from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

from longsana.chunks import ChunkPlan
from longsana.config import ModelConfig
from longsana.models.dit import LongSanaDiT
from longsana.models.embeddings import TextEmbedding
from longsana.training.config import TrainingConfig
from longsana.training.estimate import Update, estimate, measure_update, model_flops
from longsana.training.flops import forward_flops
from longsana.training.learner import learns_by_muon
from longsana.training.lora import put_on
from longsana.training.memory import LiveBytes, as_on_gpu
from longsana.training.meta import PUBLISHED, Role
from longsana.weights.build import build_model, empty_model

DEEP = ("model.depth=4", "real_score.depth=4", "fake_score.depth=4", "train.gradient_checkpointing=true")


def large(trainer: Any, **changes: Any) -> TrainingConfig:
    """The 2B network at 480p with every published size."""
    config = TrainingConfig(trainer=trainer)
    return replace(config, train=replace(config.train, **changes))


def inputs(
    config: ModelConfig, device: str, frames: int, height: int, width: int
) -> tuple[Tensor, Tensor, TextEmbedding]:
    tokens = torch.zeros(1, config.caption_length, config.caption_channels, device=device)
    text = TextEmbedding(tokens, torch.ones(1, config.caption_length, dtype=torch.bool, device=device))
    return torch.zeros(1, config.in_channels, frames, height, width, device=device), torch.zeros(1, device=device), text


def everything(model: LongSanaDiT) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]


def test_parameters_of_the_published_networks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("longsana.training.estimate.measure_update", lambda *args, **options: Update(0, 0, 0, 0))
    found = estimate(large("self_forcing"), 64)
    # Tables of six rows on 64 processes: the fullest has a row of each, hence not to the last digit.
    assert found.parameters == dict.fromkeys(("generator", "critic", "teacher"), 2_056_862_144)
    assert found.teacher * 64 == pytest.approx(2 * 2_056_862_144, rel=2e-3)
    assert found.weights * 64 == pytest.approx(2 * 4 * 2_056_862_144, rel=2e-3)


@pytest.mark.parametrize(
    "past", [(), ("model.state_decay=0.9",), ("model.num_cached_blocks=2", "model.num_sink_blocks=3")], ids=str
)
def test_state_is_what_a_network_keeps(
    training_config: Any, past: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    def of_the_generator(config: TrainingConfig, role: Role, **options: Any) -> Update:
        """Streams are those of its updates; the critic's take as long to measure."""
        return measure_update(config, role, **options) if role == "generator" else Update(0, 0, 0, 0)

    monkeypatch.setattr("longsana.training.estimate.measure_update", of_the_generator)
    config = training_config("longsana", "train.batch_size=3", "train.gradient_accumulation_steps=2", *past)
    model = build_model(config.model, device="cpu", dtype=torch.float32)
    found = estimate(config, 1)
    assert found.state == model.empty_state(3, 4, 6).nbytes
    overlap, caption = 3 * 16 * 4 * 6 * 4, 3 * 48 * (64 * 2 + 1)
    assert found.streams == 2 * (found.state + overlap + caption + int(2 * 2364.5 * 3 * 32 * 48))
    cold = estimate(replace(config, rollout=replace(config.rollout, overlap_latents=1)), 1)
    assert cold.streams == 2 * (cold.state + overlap + caption)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("chunks", "past"),
    [
        (1, {}),
        (3, {}),
        (1, {"state_decay": "learned"}),
        (3, {"state_decay": "learned", "num_sink_blocks": 1}),
        (3, {"state_decay": 0.9, "num_cached_blocks": 2}),
    ],
)
def test_kept_is_what_a_forward_pass_saves(
    small_config: Any, dtype: torch.dtype, chunks: int, past: dict[str, Any]
) -> None:
    """Counted on meta tensors; measured by torch's hooks around what a real network saves for its backward pass."""
    config = small_config(depth=3, **past)
    plan = ChunkPlan.split(7, 7 // chunks)
    saved: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    model = build_model(config, device="cpu", dtype=dtype)
    x, t, text = inputs(config, "cpu", 7, 8, 12)
    with saved_tensors_hooks(keep, lambda tensor: tensor), sdpa_kernel(SDPBackend.MATH):
        velocity, state = model(x, t, text, plan=plan)
    outside = {
        tensor.untyped_storage().data_ptr() for tensor in [*everything(model), x, t, *text, velocity, *state[:3]]
    }
    measured = sum(tensor.untyped_storage().nbytes() for key, tensor in saved.items() if key not in outside)

    counted = empty_model(config).to(dtype)
    with LiveBytes(ignore=everything(counted)) as live:
        x, t, text = inputs(config, "meta", 7, 8, 12)
        velocity, state = counted(x, t, text, plan=plan)
        rest = [x, t, *text, velocity, *state[:3]]
    assert live.now - sum(tensor.untyped_storage().nbytes() for tensor in rest) == pytest.approx(measured, rel=0.02)


@contextmanager
def allocations() -> Iterator[Callable[[], int]]:
    """The largest sum of CPU memory that was held above that at the start, as torch's profiler saw it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        yield lambda: peak
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    sizes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    held, peak = 0, 0
    for size in sizes:
        held += size
        peak = max(peak, held)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_peak_is_that_of_a_step(small_config: Any, checkpointing: bool) -> None:
    """Peak of a forward and backward pass; measured by the profiler, which knows what kernels allocate inside."""
    config = small_config(depth=3)

    def step(model: LongSanaDiT, device: str) -> None:
        if checkpointing:
            for block in model.blocks:
                block.forward = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)
        x, t, text = inputs(config, device, 7, 16, 24)
        model(x, t, text)[0].square().mean().backward()

    model = build_model(config, device="cpu", dtype=torch.float32)
    with sdpa_kernel(SDPBackend.MATH), allocations() as measured:
        step(model, "cpu")
    counted = empty_model(config)
    with LiveBytes(ignore=everything(counted)) as live:
        step(counted, "meta")
    assert live.peak == pytest.approx(measured(), rel=0.02)


def test_a_block_keeps_these(small_config: Any) -> None:
    """The list of what a block saves on a GPU, for a token and a channel, in bytes: bfloat16 but for the attention."""
    half, full, ratio = 2, 4, 3
    frames, chunks = 12, 3
    listed = sum(
        [
            half + half + half,  # the block's input, its norm, what q, k and v are made of
            3 * half + 2 * half,  # q, k and v in one; q and k after their norm and ReLU
            4 * full,  # q, q rotated, k rotated, v
            full,  # numerator
            half + half,  # attention's output in and out of its last layer
            half + half + half + half,  # the same four of the cross-attention: x, q, q after its norm, output
            half + half + half,  # x, its norm, what the expansion is made of
            3 * 2 * ratio * half,  # the expansion, after SiLU, after the depthwise convolution
            2 * ratio * half,  # SiLU of the gate, the product
            half * (frames + 2 * chunks) / frames,  # the projection, with a frame more on both sides of each chunk
            half,  # the feed-forward's output
        ]
    )
    kept = {}
    for depth in (2, 3):
        config = small_config(depth=depth, hidden_size=448, mlp_ratio=3.0, linear_head_dim=112, caption_length=2)
        model = empty_model(config).to(torch.bfloat16)
        for block in model.blocks:
            block.forward = as_on_gpu(block.forward)
        with LiveBytes(ignore=everything(model)) as live:
            x, t, text = inputs(config, "meta", frames, 16, 24)
            output = model(x, t, text, plan=ChunkPlan.split(frames, frames // chunks))
            kept[depth] = live.now - sum(part.nbytes for part in output[1][:3])
    sums = chunks * 448 * 112 * full  # what each chunk may see
    assert (kept[3] - kept[2] - sums) / (frames * 8 * 12 * 448) == pytest.approx(listed, rel=0.03)


@pytest.mark.parametrize("role", ["generator", pytest.param("critic", marks=pytest.mark.slow)])
def test_blocks_are_alike(training_config: Any, role: Any) -> None:
    """Of a deep network two and three blocks are counted: it is as if all had been."""
    config = training_config("self_forcing", *DEEP)
    # Networks of unlike depths are counted whole; here the one that is unlike has no part in the fullest moment.
    other = "real_score" if role == "critic" else "fake_score"
    assert measure_update(config, role) == measure_update(
        training_config("self_forcing", *DEEP, f"{other}.depth=2"), role
    )


def test_parts_by_the_number_of_processes(training_config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    config = training_config("self_forcing", *DEEP)
    alone, shared = (measure_update(config, "critic", processes=processes) for processes in (1, 4))
    assert shared.gradients < alone.gradients / 2
    assert shared.kept == alone.kept

    monkeypatch.setattr("longsana.training.estimate.measure_update", lambda *args, **options: alone)
    one, four = estimate(config, 1), estimate(config, 4)
    for part in ("weights", "moments", "average", "teacher"):
        whole, quarter = one._asdict()[part], four._asdict()[part]
        assert whole / 4 <= quarter < 1.1 * whole / 4, part
    assert four.reduced == one.reduced
    assert four.gathered > one.gathered
    assert one.moments == 2 * one.weights

    def sharded(strategy: Any) -> Any:
        return estimate(replace(config, train=replace(config.train, sharding_strategy=strategy)), 8, local_size=4)

    assert sharded("hybrid_full").weights == four.weights
    assert sharded("no_shard").weights == one.weights
    assert sharded("full").weights < four.weights
    assert sharded("hybrid_zero2").gathered == 4 * sum(one.parameters.values())  # float32: nothing is given back


def test_what_settings_cost(training_config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    config = training_config("self_forcing")

    def changed(**changes: Any) -> TrainingConfig:
        return replace(config, train=replace(config.train, **changes))

    plain = measure_update(config, "critic")
    assert measure_update(changed(gradient_checkpointing=True, mixed_precision=True), "critic").kept < plain.kept / 4
    assert 1.8 < measure_update(changed(batch_size=2), "critic").kept / plain.kept < 2.2
    accumulated = measure_update(config, "critic", accumulates=True)
    assert accumulated.gradients == estimate(config, 1).parameters["critic"] * 4
    assert accumulated.activations >= plain.activations

    monkeypatch.setattr("longsana.training.estimate.measure_update", lambda *args, **options: plain)
    found = estimate(config, 1)
    assert found.text_encoder == 2 * PUBLISHED["WanVAE"].text_parameters
    assert estimate(changed(text_encoder="free"), 1).text_encoder == 0
    assert found.average > estimate(changed(ema_weight=0.0), 1).average == 0
    muon = replace(config.optimizer, critic=replace(config.optimizer.critic, muon_lr=1e-3))
    critic = empty_model(config.fake_score).named_parameters()
    matrices = sum(4 * weight.numel() for name, weight in critic if learns_by_muon(muon.critic, name, weight))
    assert found.moments - estimate(replace(config, optimizer=muon), 1).moments == matrices > 0
    assert found.total == sum(found.parts.values()) > plain.activations + found.text_encoder
    assert f"{found.total / 2**30:.2f} GiB" in found.table()


def test_every_stage_has_an_estimate(training_config: Any) -> None:
    """Losses of all run without values. Where a video goes on, the decoder is needed for a moment."""
    encoders = PUBLISHED["WanVAE"]._replace(decode_values=10**6)
    decoding = 2 * 10**6 * 32 * 48
    found = {
        trainer: estimate(training_config(trainer), 1, encoders=encoders)
        for trainer in ("flow_matching", "ode", "consistency", "longsana")
    }
    flow, ode, consistency, longsana = found.values()
    assert list(flow.updates) == list(ode.updates) == list(consistency.updates) == ["generator"]
    assert 0 < consistency.teacher < consistency.weights == ode.weights and consistency.vae == 0
    assert ode.updates["generator"].kept == pytest.approx(flow.updates["generator"].kept, rel=0.1)
    assert max(flow.updates["generator"].activations, ode.updates["generator"].activations) < decoding
    for role in ("generator", "critic"):
        assert longsana.updates[role].activations == pytest.approx(decoding, rel=0.01)
    assert flow.streams == ode.teacher == 0 < longsana.streams


def test_a_picture_first_is_in_the_estimate(training_config: Any) -> None:
    """The fuller of both kinds of updates where both are drawn, whatever the first one of the run is."""
    found = {
        share: measure_update(training_config("flow_matching", f"train.image_probability={share}"), "generator")
        for share in (0.0, 0.001, 0.999, 1.0)
    }
    without, few, many, all_of_them = found.values()
    assert few == many == max(without, all_of_them, key=lambda update: update.activations + update.gradients)
    assert all_of_them.activations == pytest.approx(without.activations, rel=0.1)


def test_a_short_first_chunk_in_the_estimate(training_config: Any) -> None:
    """The update without one where both are drawn, which is the fuller."""

    def measured(share: float) -> Update:
        own = (f"train.first_chunk_probability={share}", "sampling.first_chunk_frames=1")
        return measure_update(training_config("self_forcing", *own), "generator")

    without, few, many, all_of_them = map(measured, (0.0, 0.001, 0.999, 1.0))
    assert without == few == many
    assert all_of_them.activations + all_of_them.gradients < without.activations + without.gradients


@pytest.mark.slow
def test_learned_factors_are_in_the_estimate(training_config: Any) -> None:
    """A number for each block and head of the generator, and what chunks keep for the gradients of these."""
    found = {
        decay: estimate(training_config("longsana", f"model.state_decay={decay}", "train.mixed_precision=true"), 1)
        for decay in (1.0, 0.9, "learned")
    }
    plain, fixed, learned = found.values()
    assert plain.parameters == fixed.parameters
    assert learned.parameters == plain.parameters | {"generator": plain.parameters["generator"] + 2 * 2}
    assert learned.weights == plain.weights + 4 * 2 * 2
    kept = [each.updates["generator"].kept for each in found.values()]
    sums = 2 * 2 * 28 * 29 * 4  # of a chunk in two blocks: what was there before is wanted for the factor's gradient
    assert kept[0] <= kept[1] <= kept[2] < kept[0] + 4 * sums


def test_of_a_lora_its_factors_and_each_base_once(training_config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Teacher and critic come from one file here or from two; parts are those of the networks that are trained."""
    one, two = (
        training_config(
            "self_forcing", "train.lora.rank=2", "train.mixed_precision=true", f"fake_score.load_from={seed}"
        )
        for seed in ("seeded:2", "seeded:3")
    )
    update = measure_update(one, "critic", accumulates=True)
    sizes = {role: sum(w.numel() for w in empty_model(one.networks[role]).parameters()) for role in one.networks}
    factors = {
        role: sum(w.numel() for w in put_on(empty_model(one.networks[role]), one.train.lora).parameters()) - sizes[role]
        for role in ("generator", "critic")
    }
    assert update.gradients == 4 * factors["critic"]
    monkeypatch.setattr("longsana.training.estimate.measure_update", lambda *args, **options: update)
    shared, apart = estimate(one, 1), estimate(two, 1)
    half = 2  # bytes
    assert shared.frozen == half * (sizes["generator"] + sizes["critic"])
    assert apart.frozen == half * sum(sizes.values())
    assert shared.weights == 4 * sum(factors.values()) and shared.moments == 2 * shared.weights
    assert (shared.average, shared.teacher) == (4 * factors["generator"], 0)
    assert shared.parameters == {**sizes, **{f"{role} LoRA": count for role, count in factors.items()}}
    assert estimate(one, 4).frozen == shared.frozen, "whole on each process"
    assert "frozen weights" in shared.table()


@pytest.mark.parametrize("kind", PUBLISHED)
def test_sizes_of_the_encoders(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The constants are those of the libraries' networks, and of a decoder that runs on meta tensors."""
    from diffusers import AutoencoderKLLTX2Video, AutoencoderKLWan
    from transformers import Gemma2Config, Gemma2Model

    from longsana.config import VAEConfig
    from longsana.encoders.geometry import geometry
    from longsana.encoders.vae import VAES

    with torch.device("meta"):
        gemma = Gemma2Model(Gemma2Config())
        model: Any = {"WanVAE": AutoencoderKLWan, "LTX2VAE_diffusers": AutoencoderKLLTX2Video}[kind]()
    model = model.eval().requires_grad_(False).bfloat16()
    published = PUBLISHED[kind]
    assert sum(weight.numel() for weight in gemma.parameters()) == published.text_parameters
    assert sum(weight.numel() for weight in model.parameters()) == published.vae_parameters
    shape = geometry(VAEConfig(vae_type=kind))
    vae = VAES[kind](model, shape, 1)
    # The kernel of a GPU takes no memory; its plain twin does.
    for decoder in ("wan_decoder", "ltx2_decoder"):
        monkeypatch.setattr(f"longsana.encoders.{decoder}.norm_silu_into", lambda *inputs, **settings: None)
    height, width = 96 // shape.space_stride, 160 // shape.space_stride
    _, cache = vae.decode_stream(torch.empty(1, shape.channels, 2, height, width, device="meta"))
    assert sum(feature.nbytes for feature in cache.features) == 2 * 96 * 160 * published.cache_values
    with LiveBytes(ignore=[*model.parameters(), *cache.features]) as live:
        vae.overlap_latent(torch.empty(1, shape.channels, 20, height, width, device="meta"), cache)
    assert live.peak / (2 * 96 * 160) == pytest.approx(published.decode_values, rel=0.02)


def test_flops_of_an_update_counted_by_hand() -> None:
    config = large("self_forcing")
    forward = partial(forward_flops, config.model, height=60, width=104)
    chunks, whole = forward(11) + forward(10), forward(21)
    assert chunks == pytest.approx(whole, rel=2e-3)  # only captions and timesteps are counted once a chunk
    critic = [model_flops(config, "critic", exit_step=step) for step in range(4)]
    for exit_step in range(4):
        rollout = (exit_step + 1) * chunks + forward(11)  # the last chunk is not absorbed: nothing follows it
        assert critic[exit_step] == rollout + 3 * whole
        assert model_flops(config, "generator", exit_step=exit_step) == rollout + 2 * chunks + 3 * whole
    assert model_flops(config, "critic") == pytest.approx(sum(critic) / 4)
    last = replace(config, rollout=replace(config.rollout, last_step_only=True))
    assert model_flops(last, "critic") == critic[3]

    assert model_flops(large("ode"), "generator") == model_flops(large("flow_matching"), "generator") == 3 * whole
    stretch = 3 * 2 * forward(10) + 2 * forward(10) + 3 * whole
    assert model_flops(large("longsana"), "critic", exit_step=2) == stretch


def test_flops_of_first_chunks_that_are_drawn() -> None:
    """The mean of 21 latents and of 13, by their shares."""
    config = large("self_forcing")
    config = replace(config, sampling=replace(config.sampling, first_chunk_frames=3))
    forward = partial(forward_flops, config.model, height=60, width=104)
    usual, short = (2 * forward(first) + forward(10) + 3 * forward(first + 10) for first in (11, 3))
    for share in (0, 0.25, 1):
        drawn = replace(config, train=replace(config.train, first_chunk_probability=share))
        assert model_flops(drawn, "critic", exit_step=0) == pytest.approx((1 - share) * usual + share * short)


def test_flops_of_lengths_that_are_drawn() -> None:
    """The mean of 21, 31 and 41 latents: all are generated, and the loss sees the last 21."""
    config = large("self_forcing")
    config = replace(config, rollout=replace(config.rollout, num_training_frames=41))
    forward = partial(forward_flops, config.model, height=60, width=104)
    rollouts = [2 * (forward(11) + chunks * forward(10)) - forward(10) for chunks in (1, 2, 3)]
    critic = [rollout + 3 * forward(21) for rollout in rollouts]
    assert model_flops(config, "critic", exit_step=0) == sum(critic) // 3
    generator = [
        total + 2 * (forward(length) + forward(10)) for total, length in zip(critic, (11, 10, 10), strict=True)
    ]
    assert model_flops(config, "generator", exit_step=0) == sum(generator) // 3


@pytest.mark.slow
def test_decoding_is_not_taken_for_blocks(training_config: Any) -> None:
    """The fullest moment of few blocks, when the overlap latent is decoded, is not that of many."""
    config = training_config("self_forcing", "sampling.height=16", "sampling.width=16", "rollout.num_training_frames=9")
    encoders = PUBLISHED["WanVAE"]._replace(decode_values=240_000)

    def measured(depth: int, others: int) -> Update:
        model = replace(config.model, depth=depth, hidden_size=448)
        critic = replace(model, depth=others)
        changed = replace(config, model=model, real_score=model, fake_score=critic)
        return measure_update(changed, "generator", encoders=encoders)

    assert measured(3, 3).gradients == 0 < measured(9, 9).gradients
    assert measured(9, 9) == measured(9, 8), "networks of unlike depths are counted whole"


@pytest.mark.gpu
@pytest.mark.parametrize("role", ["generator", "critic"])
def test_an_update_on_a_gpu_is_as_full_as_estimated(role: Any) -> None:
    sizes = ModelConfig(depth=4, hidden_size=1120, num_heads=10)
    config = replace(large("self_forcing", ema_weight=0.0), model=sizes, real_score=sizes, fake_score=sizes)
    config = replace(config, sampling=replace(config.sampling, height=240, width=416))
    measured, estimated = on_a_gpu(config, role)
    assert estimated == pytest.approx(measured, rel=0.1)


def on_a_gpu(config: TrainingConfig, role: Any) -> tuple[int, int]:
    """Bytes at the peak of two updates of Self-Forcing, measured and estimated; without the encoders."""
    from longsana.encoders.geometry import geometry
    from longsana.runtime.distributed import World
    from longsana.training.learner import Learner
    from longsana.training.parallel import connect, device_mesh, parallelise
    from longsana.training.stages.self_forcing import SelfForcing
    from longsana.training.stages.stage import MicroBatch

    world = World.from_environment()
    device = world.device()
    connect(world, device)
    try:
        mesh = device_mesh("full", world, device)
        gc.collect()  # networks of an earlier test, which would go away in the middle of this one
        before = torch.cuda.memory_allocated()

        def trained(network: ModelConfig) -> LongSanaDiT:
            model = build_model(network, device=device, dtype=torch.float32)
            checkpointing = config.train.gradient_checkpointing
            return parallelise(model, mesh, compute=torch.bfloat16, checkpointing=checkpointing)

        teacher = build_model(config.real_score, device=device, dtype=torch.bfloat16).requires_grad_(False)
        teacher = parallelise(teacher, mesh, compute=torch.bfloat16)
        text = TextEmbedding(*(part.cuda() for part in inputs(config.model, "cpu", 1, 2, 2)[2]))
        learners = [
            Learner("generator", trained(config.model), config.optimizer.generator, ema_weight=config.train.ema_weight),
            Learner("critic", trained(config.fake_score), config.optimizer.critic),
        ]
        stage = SelfForcing(
            config,
            *learners,
            teacher,
            embed=lambda prompts: text,
            negative=text,
            prompts=["a"],
            vae=None,  # type: ignore[arg-type]  # nothing is decoded for a window that is the whole clip
            latent_shape=(
                config.model.in_channels,
                *geometry(config.vae).latent_size(config.sampling.height, config.sampling.width),
            ),
        )
        learner = learners[role == "critic"]
        for step in range(2):
            torch.cuda.reset_peak_memory_stats()
            stage.loss(MicroBatch(0, step, role, 0, range(1), device)).value.backward()
            measured = torch.cuda.max_memory_allocated() - before
            learner.update(step)
    finally:
        world.disconnect()
    found = estimate(config, world.size)
    peak = found.updates[role]
    resident = found.weights + found.moments + found.average + found.teacher + found.gathered + found.reduced
    return measured, resident + peak.gradients + peak.activations
