"""Estimates of a training run before it is started: memory of a process, and arithmetic of an update."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from longsana.config import ModelConfig
from longsana.flow.schedule import FlowSchedule
from longsana.models.dit import LongSanaDiT
from longsana.runtime.distributed import World
from longsana.training.checks import DISTILLING, clip_shape, micro_batches_of
from longsana.training.config import TrainingConfig
from longsana.training.flops import forward_flops
from longsana.training.learner import compute_dtype, learns_by_muon
from longsana.training.lora import base_of, put_on
from longsana.training.memory import LiveBytes
from longsana.training.meta import (
    GPU,
    PUBLISHED,
    Encoders,
    MetaBatch,
    MetaBuilder,
    Role,
    beginnings_of,
    exiting,
    first_chunks_of,
    lengths_of,
)
from longsana.training.stages.stage import Stage
from longsana.weights.build import empty_model, resolve_dtype

FLOAT = torch.float32.itemsize


class Update(NamedTuple):
    """An update of one learner, in bytes.

    activations, gradients: at the fullest moment. Gradients are those that are kept, reduced and in float32; those that
    backward passes still add up, whole and in the dtype that computes, are among the activations.
    kept: activations when the backward pass begins.
    stream: what lives on to the next update, of one micro-batch; not among the activations.
    """

    activations: int
    gradients: int
    kept: int
    stream: int


class Estimate(NamedTuple):
    """Memory of the fullest process, in bytes. See `estimate` for what each part is."""

    parameters: dict[str, int]  # of each network: numbers, not bytes
    state: int  # one recurrent state
    weights: int
    moments: int
    average: int
    teacher: int
    frozen: int
    text_encoder: int
    vae: int
    streams: int
    gathered: int
    reduced: int
    updates: dict[str, Update]

    @property
    def fullest(self) -> str:
        """The learner whose update needs most."""
        return max(self.updates, key=lambda name: self.updates[name].activations + self.updates[name].gradients)

    @property
    def parts(self) -> dict[str, int]:
        """The parts that `total` is the sum of."""
        peak = self.updates[self.fullest]
        return {
            "weights, float32": self.weights,
            "the optimizer's moments": self.moments,
            "running average": self.average,
            "teacher": self.teacher,
            "frozen weights": self.frozen,
            "text encoder, Gemma 2 2B": self.text_encoder,
            "VAE, as published": self.vae,
            "live streams": self.streams,
            "gathered weights": self.gathered,
            "a block's gradients, reduced": self.reduced,
            f"gradients ({self.fullest})": peak.gradients,
            f"activations ({self.fullest})": peak.activations,
        }

    @property
    def total(self) -> int:
        return sum(self.parts.values())

    def table(self) -> str:
        """Lines to print."""
        lines = [f"{name + ' parameters':32}{count:>16,}" for name, count in self.parameters.items()]
        lines += [f"{'recurrent state':32}{self.state / 2**20:>12.1f} MiB", "memory of a process, estimated:"]
        lines += [f"  {name:30}{size / 2**30:>12.2f} GiB" for name, size in self.parts.items() if size]
        lines += [f"  {'total':30}{self.total / 2**30:>12.2f} GiB"]
        lines += [
            f"{f'kept for the backward pass of the {name}':48}{update.kept / 2**30:.2f} GiB"
            for name, update in self.updates.items()
        ]
        return "\n".join(lines)


def estimate(
    config: TrainingConfig, world_size: int, *, local_size: int | None = None, encoders: Encoders | None = None
) -> Estimate:
    """Memory of a GPU that trains as a checked config says, as one of `world_size`; local_size: of those on its host.

    Counted from names and shapes: `parameters`, `state`, and what lies there all the time: `weights`, `moments` and
    `average` (float32 shards of the fullest process), `teacher`, encoders. Under a LoRA these are its factors', and
    `frozen` all else, the teacher too, in the dtypes that compute and whole; what networks share counts once.
    From the stage's own losses on the meta device: `updates`, and `streams` (of live videos, the states and the
    decoder's caches). Known from how FSDP works: `gathered` (whole weights in the dtype that computes: what lies
    outside blocks, and the blocks in flight) and `reduced` (a block's gradients, whole, before and in their reduction).

    Not in it: what the allocator reserves beyond what is in use (5 to 8 GiB below), CUDA's context, workspaces of
    convolutions, what torch.compile and train.cuda_graphs change (graphs hold a second copy of the weights, and the
    activations of every kind of pass, as reserved memory), a text encoder that is offloaded (there while it encodes,
    when little else is), and validation, which holds no gradients.

    The 2B network at 480p, 21 latents, on an H100 alone (torch 2.11), as `max_memory_allocated` without encoders and
    average: critic's update 66.4 GiB, estimated 66.0; generator's 62.8, estimated 62.4. Six blocks, no checkpointing,
    with average: 63.0, estimated 63.4. On several processes `gathered` is the least certain part.

    Raises:
        InputError: the config makes no network, or the batch does not divide.
    """
    encoders = encoders or PUBLISHED[config.vae.vae_type]
    train, distilled = config.train, config.trainer in DISTILLING
    world = World(size=world_size, local_size=local_size or world_size)
    sharers = {"full": world.size, "no_shard": 1}.get(train.sharding_strategy, world.local_size)
    accumulation = micro_batches_of(config, world).accumulation
    networks = {role: empty_model(settings) for role, settings in config.networks.items()}
    learners: tuple[Role, ...] = ("generator", "critic") if distilled else ("generator",)
    parameters = {name: _count(model) for name, model in networks.items()}
    state = networks["generator"].to(compute_dtype(config)).empty_state(train.batch_size, *clip_shape(config)[2:])
    lora, frozen = train.lora.rank is not None, 0
    if lora:
        frozen = _frozen_bytes(config, parameters)
        networks = {role: put_on(networks[role], train.lora) for role in learners}
        parameters |= {f"{role} LoRA": _count(model) for role, model in networks.items()}
    kept = {name: sum(kept_values(p, sharers) for p in _learning(model)) for name, model in networks.items()}
    trained = FLOAT * sum(kept[role] for role in learners)
    compute = compute_dtype(config).itemsize
    block = max(_count(model.blocks[0]) for model in networks.values())
    updates: dict[str, Update] = {
        role: measure_update(config, role, processes=sharers, accumulates=accumulation > 1, encoders=encoders)
        for role in learners
    }
    return Estimate(
        parameters=parameters,
        state=_bytes(state[:3]),  # its own nbytes asks where the storages lie
        weights=trained,
        moments=2 * trained - FLOAT * sum(_kept_by_muon(config, role, networks[role], sharers) for role in learners),
        average=FLOAT * kept["generator"] if train.ema_weight > 0 else 0,
        teacher=_dtype(config, "teacher").itemsize * kept["teacher"] if "teacher" in kept and not lora else 0,
        frozen=frozen,
        text_encoder=resolve_dtype(config.text_encoder.dtype, GPU).itemsize * encoders.text_parameters
        if train.text_encoder == "keep"
        else 0,
        vae=resolve_dtype(config.vae.weight_dtype, GPU).itemsize * encoders.vae_parameters if distilled else 0,
        streams=accumulation * updates["generator"].stream,
        gathered=compute * _gathered(networks.values(), sharers, train.sharding_strategy == "hybrid_zero2"),
        reduced=block * (compute + FLOAT),
        updates=updates,
    )


def _kept_by_muon(config: TrainingConfig, role: Role, network: LongSanaDiT, sharers: int) -> int:
    """Numbers of the fullest process in weights that Muon steps, which keeps one moment where AdamW keeps two."""
    settings = getattr(config.optimizer, role)
    own = (weight for name, weight in network.named_parameters() if learns_by_muon(settings, name, weight))
    return sum(kept_values(weight, sharers) for weight in own)


def measure_update(
    config: TrainingConfig,
    role: Role,
    *,
    processes: int = 1,
    accumulates: bool = False,
    encoders: Encoders | None = None,
) -> Update:
    """The fullest update of a learner on a GPU, by the stage's own loss on the meta device.

    processes: that share a weight. accumulates: gradients of a micro-batch before are there from the start.
    encoders: None are the published ones.
    """
    # The longest rollout is the fullest, and the first exit step as full as any: one pass of a chunk has a graph.
    config, encoders = exiting(lengths_of(config)[-1], 0), encoders or PUBLISHED[config.vae.vae_type]
    measure = partial(_measure, role=role, processes=processes, accumulates=accumulates, encoders=encoders)
    stretches = range(2 if config.trainer == "longsana" else 1)
    found = [
        phase
        for drawn in beginnings_of(config)
        for before in stretches
        for phase in _extrapolated(drawn, partial(measure, before=before))
    ]
    return max(found, key=lambda update: update.activations + update.gradients)


def _extrapolated(config: TrainingConfig, measure: Callable[[TrainingConfig], list[Update]]) -> list[Update]:
    """Extrapolate from two and three blocks to the networks' depth: what the third adds, every further one adds too."""
    depths = {network.architecture().depth for network in config.networks.values()}
    deepest = max(depths)
    if len(depths) > 1 or deepest <= 3:
        return measure(config)
    two, three = (measure(_with_depth(config, depth)) for depth in (2, 3))
    return [
        Update(*(a + (deepest - 2) * (b - a) for a, b in zip(*pair, strict=True)))
        for pair in zip(two, three, strict=True)
    ]


def _with_depth(config: TrainingConfig, depth: int) -> TrainingConfig:
    sections = ("model", "fake_score", "real_score")
    return replace(config, **{name: replace(getattr(config, name), depth=depth) for name in sections})


def _measure(
    config: TrainingConfig, *, role: Role, before: int, processes: int, accumulates: bool, encoders: Encoders
) -> list[Update]:
    """One update until its backward pass and from there on, after so many others of its stream.

    They are apart since one may be the fullest with few blocks, as decoding is, and the other with many.
    """
    builder, batch = MetaBuilder(config, encoders), MetaBatch.first(config, role)
    stage = builder.stage()
    with LiveBytes():
        for _ in range(before):
            stage.loss(batch)
    live = LiveBytes(
        count=_streams(stage),
        ignore=[tensor for model in builder.networks.values() for tensor in (*model.parameters(), *model.buffers())],
    )

    def reduce(weight: Tensor) -> None:
        weight.grad = None  # what is whole of it is gone once it is reduced
        if not accumulates:
            live.hold(FLOAT * kept_values(weight, processes))

    for weight in _learning(builder.networks[role]):
        weight.register_post_accumulate_grad_hook(reduce)
        if accumulates:
            live.hold(FLOAT * kept_values(weight, processes))
    earlier = _bytes(_streams(stage))
    with live:
        value = stage.loss(batch).value
        later = _bytes(_streams(stage))
        kept = live.now - live.gradients - later
        before_it = live.peak, live.gradients_at_peak
        live.restart()
        value.backward()
    stream = max(earlier, later)  # there is none after its end, and none before its start
    phases = before_it, (live.peak, live.gradients_at_peak)
    return [Update(peak - gradients - stream, gradients, kept, stream) for peak, gradients in phases]


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def _streams(stage: Stage) -> list[Tensor]:
    """List what lives from one update to the next on the GPU."""
    return [tensor for group in stage.state_tensors().values() for tensor in group.values() if tensor.is_meta]


def model_flops(config: TrainingConfig, role: Role, *, exit_step: int | None = None) -> int:
    """Operations of one update of a learner with batch 1: the networks' products, as `forward_flops` counts them.

    A forward pass counts once, one with its backward pass three times, or under a LoRA, which itself does not count,
    twice; what checkpointing computes again and the encoders do not count. exit_step: of every chunk of a rollout;
    None is the mean over the steps that training draws. Lengths of rollouts and of first chunks that are drawn enter by
    their mean, too. LongSANA: a stretch after the first.
    """
    steps = range(len(FlowSchedule.from_config(config.scheduler).steps))
    drawn = steps[-1:] if config.rollout.last_step_only else steps
    totals = [
        (share, _count_flops(exiting(drawn_length, step), role))
        for share, drawn_first in first_chunks_of(config)
        for drawn_length in lengths_of(drawn_first)
        for step in (drawn if exit_step is None else [exit_step])
    ]
    return round(sum(share * total for share, total in totals) / sum(share for share, _ in totals))


def _count_flops(config: TrainingConfig, role: Role) -> int:
    """Operations of the networks' calls in one loss with batch 1."""
    config = replace(config, train=replace(config.train, batch_size=1))
    builder = MetaBuilder(_with_depth(config, 1), PUBLISHED[config.vae.vae_type])
    stage, total, learns = builder.stage(), 0, 3 if config.train.lora.rank is None else 2

    def count(settings: ModelConfig, _: nn.Module, inputs: tuple[Any, ...]) -> None:
        nonlocal total
        total += (learns if torch.is_grad_enabled() else 1) * forward_flops(settings, *inputs[0].shape[2:])

    for name, settings in config.networks.items():
        builder.networks[name].register_forward_pre_hook(partial(count, settings))
    with LiveBytes():  # answers what has no value
        for _ in range(2 if config.trainer == "longsana" else 1):
            total = 0
            stage.loss(MetaBatch.first(config, role))
    return total


def _gathered(networks: Collection[LongSanaDiT], sharers: int, keeps: bool) -> int:
    """Numbers of whole weights that are there at a time. keeps: until a backward pass, which most never see."""
    if keeps:
        return sum(map(_count, networks))
    # What is outside blocks, and a block; of several processes', another on its way and one still in its buffer.
    outside = max(_count(model) - _count(model.blocks) for model in networks)
    return outside + max(_count(model.blocks[0]) for model in networks) * (1 if sharers == 1 else 3)


def _dtype(config: TrainingConfig, role: str) -> torch.dtype:
    """The dtype that a network computes in on a GPU."""
    return resolve_dtype(config.real_score.dtype, GPU) if role == "teacher" else compute_dtype(config)


def _frozen_bytes(config: TrainingConfig, parameters: Mapping[str, int]) -> int:
    """Bytes of the weights under LoRAs, those that networks share once. parameters: how many there are, by role."""
    dtypes = {role: _dtype(config, role) for role in config.networks}
    bases = {base_of(network, dtypes[role]): role for role, network in config.networks.items()}
    return sum(dtypes[role].itemsize * parameters[role] for role in bases.values())


def _learning(module: nn.Module) -> list[nn.Parameter]:
    return [weight for weight in module.parameters() if weight.requires_grad]


def _count(module: nn.Module) -> int:
    """Count the numbers that learn."""
    return sum(weight.numel() for weight in _learning(module))


def kept_values(weight: Tensor, processes: int) -> int:
    """Count numbers of a weight, of any shape, that the first of so many processes keeps: rows are dealt out whole."""
    return -(-weight.shape[0] // processes) * (weight.numel() // weight.shape[0])
