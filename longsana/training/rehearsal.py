"""An update on tensors without memory ("meta"): the networks' own code runs, and what it would allocate is added up.

Nothing is loaded and nothing computed. A stage's losses ask values of tensors, so their calls are repeated here.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from itertools import repeat
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from longsana.chunks import ChunkPlan
from longsana.config import Dtype, ModelConfig
from longsana.encoders.geometry import geometry
from longsana.flow.losses import dmd_gradient, dmd_loss, flow_loss, guided
from longsana.flow.schedule import FlowSchedule
from longsana.models.dit import LongSanaDiT
from longsana.models.embeddings import TextEmbedding
from longsana.sampling.sampler import generate, timestep
from longsana.training.checks import DISTILLED
from longsana.training.config import TrainingConfig
from longsana.weights.build import empty_model

Role = Literal["generator", "critic"]


class Rollout(NamedTuple):
    """What a learner of a distilled stage generates for one loss.

    learned_from: chunks that end before this frame have no graph. late: a picture that was encoded anew leads the
    window. streamed: the video goes on, so the last chunk is absorbed too.
    """

    plan: ChunkPlan
    learned_from: int = 0
    late: bool = False
    streamed: bool = False

    @property
    def window(self) -> int:
        """Latent frames that the scores see."""
        return self.plan.frames - max(self.learned_from - 1, 0) + (self.late and self.streamed)

    @property
    def learned(self) -> list[int]:
        """Lengths of the chunks that have a graph."""
        return [part.stop - part.start for part in self.plan.slices() if part.stop > self.learned_from]

    @property
    def absorbed(self) -> tuple[int, ...]:
        """Lengths of the chunks that the state takes up."""
        return self.plan.lengths if self.streamed else self.plan.lengths[:-1]


def rollouts(config: TrainingConfig) -> list[Rollout]:
    """Self-Forcing: of every length that is drawn, the longest last. LongSANA: a stream's first stretch and a later."""
    settings, chunk = config.rollout, config.sampling.chunk_frames
    if config.trainer == "longsana":
        first, later = settings.num_training_frames, config.streaming.streaming_min_new_frame
        return [
            Rollout(ChunkPlan.split(first, chunk), streamed=True),
            Rollout(ChunkPlan.split(later, chunk), late=True, streamed=True),
        ]
    found = []
    for frames in range(settings.min_num_training_frames, settings.num_training_frames + 1, chunk):
        surplus = max(frames - settings.slice_last_frames, 0)
        found.append(Rollout(ChunkPlan.split(frames, chunk), surplus + 1 if surplus else 0, late=surplus > 0))
    return found


class Update(NamedTuple):
    """An update of one learner, in bytes.

    activations, gradients: at the fullest moment. Gradients are those that are kept, reduced and in float32; those that
    backward passes still add up, whole and in the dtype that computes, are among the activations.
    kept: activations when the backward pass begins.
    """

    activations: int
    gradients: int
    kept: int


def rehearse(
    config: TrainingConfig, role: Role, *, processes: int = 1, accumulates: bool = False, decoding: int = 0
) -> Update:
    """The fullest update of a learner on a GPU.

    processes: that share a weight. accumulates: gradients of a micro-batch before are there from the start. decoding:
    bytes that the VAE needs for the overlap latent of a later window.
    """
    if config.trainer not in DISTILLED:
        losses: list[_Loss] = [partial(_clip_loss, config)]
    else:
        # Self-Forcing: the longest alone, the same for all.
        played = rollouts(config) if config.trainer == "longsana" else rollouts(config)[-1:]
        losses = [partial(_distilled_loss, config, role, rollout, decoding) for rollout in played]
    play = partial(_whole, config, role, processes, accumulates)
    return max((play(loss) for loss in losses), key=lambda update: update.activations + update.gradients)


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all storages that operations make inside the block, for as long as they live.

    On the meta device these are a GPU's, as far as an operation allocates what it returns and nothing else.

    now, peak: bytes. gradients: of these, what `hold` was told of; gradients_at_peak.
    """

    def __init__(self, *, ignore: Iterable[Tensor] = (), device: str = "meta") -> None:
        super().__init__()
        self.now = self.peak = self.gradients = self.gradients_at_peak = 0
        self._device = device
        self._known = {tensor.untyped_storage()._cdata for tensor in ignore}

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.device.type == self._device:
                self._meet(tensor.untyped_storage())
        return result

    def hold(self, size: int) -> None:
        """Count a gradient that stays."""
        self.gradients += size
        self._add(size)

    def _meet(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self._known:
            self._known.add(key)
            self._add(size)
            weakref.finalize(storage, self._lose, key, size)

    def _add(self, size: int) -> None:
        self.now += size
        if self.now > self.peak:
            self.peak, self.gradients_at_peak = self.now, self.gradients

    def _lose(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


class OnGPU(TorchFunctionMode):
    """What is one kernel on a GPU and several operations elsewhere allocates as that kernel does."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is F.scaled_dot_product_attention:
            return _attention(*args, **(kwargs or {}))
        if func is F.rms_norm:
            return _rms_norm(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _attention(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor) -> Tensor:
    bias = attn_mask.to(q.dtype).expand(*q.shape[:3], k.shape[2])
    learns = torch.is_grad_enabled()
    out: Tensor = torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, bias, learns, 0.0, False)[0]
    return out


def _rms_norm(x: Tensor, normalized_shape: Any, weight: Tensor, eps: float) -> Tensor:
    out: Tensor = _RMSNorm.apply(x, weight)
    return out


class _RMSNorm(torch.autograd.Function):
    """Keeps its input and a float32 number a row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, x.new_empty((*x.shape[:-1], 1), dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(x), torch.empty_like(weight)


class _Networks(NamedTuple):
    """The networks of a rehearsal; a stage of one learner has no use for the others."""

    generator: LongSanaDiT
    critic: LongSanaDiT
    teacher: LongSanaDiT


_Loss = Callable[[_Networks], Tensor]


def _whole(config: TrainingConfig, role: Role, processes: int, accumulates: bool, loss: _Loss) -> Update:
    """Extrapolate from two and three blocks to the networks' depth: what the third adds, every further one adds too."""
    configs = (config.model, config.fake_score, config.real_score)
    depths = {network.architecture().depth for network in configs}
    deepest = max(depths)
    if len(depths) > 1 or deepest <= 3:
        return _play(config, configs, role, processes, accumulates, loss)
    two, three = (
        _play(config, [replace(network, depth=depth) for network in configs], role, processes, accumulates, loss)
        for depth in (2, 3)
    )
    return Update(*(a + (deepest - 2) * (b - a) for a, b in zip(two, three, strict=True)))


def _play(
    config: TrainingConfig,
    configs: Iterable[ModelConfig],
    role: Role,
    processes: int,
    accumulates: bool,
    loss: _Loss,
) -> Update:
    generator, critic, teacher = configs
    train = config.train
    networks = _Networks(
        _network(generator, compute_dtype(config), train.gradient_checkpointing),
        _network(critic, compute_dtype(config), train.gradient_checkpointing),
        _network(teacher, on_gpu(config.real_score.dtype), False).requires_grad_(False),
    )
    live = LiveBytes(ignore=[tensor for network in networks for tensor in (*network.parameters(), *network.buffers())])

    def reduce(weight: Tensor) -> None:
        weight.grad = None  # what is whole of it is gone once it is reduced
        if not accumulates:
            live.hold(kept_bytes(weight, processes))

    for weight in (networks.generator if role == "generator" else networks.critic).parameters():
        weight.register_post_accumulate_grad_hook(reduce)
        if accumulates:
            live.hold(kept_bytes(weight, processes))
    with live:
        value = loss(networks)
        kept = live.now - live.gradients
        value.backward()
    return Update(live.peak - live.gradients_at_peak, live.gradients_at_peak, kept)


def _network(config: ModelConfig, dtype: torch.dtype, checkpointing: bool) -> LongSanaDiT:
    model = empty_model(config).to(dtype)
    for block in model.blocks:
        # Around a block's forward, where a backward pass that computes it again meets it too.
        block.forward = partial(_run_on_gpu, block.forward)
        if checkpointing:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)
    return model


def _run_on_gpu(forward: Callable[..., Any], *args: Any) -> Any:
    with OnGPU():
        return forward(*args)


def _clip_loss(config: TrainingConfig, networks: _Networks) -> Tensor:
    """The loss of flow matching, and of ODE regression, which holds as much."""
    frames = config.rollout.num_training_frames
    causal = config.trainer == "ode" or config.flow_matching.causal
    plan = ChunkPlan.split(frames, config.sampling.chunk_frames if causal else frames)
    x, noise = _latents(config, frames), _latents(config, frames)
    t = torch.empty(x.shape[0], frames, dtype=torch.float32, device="meta")
    velocity, _ = networks.generator(schedule(config).add_noise(x, noise, t), t, _text(config), plan=plan)
    return flow_loss(velocity, x, noise)


def _distilled_loss(config: TrainingConfig, role: Role, rollout: Rollout, decoding: int, networks: _Networks) -> Tensor:
    """The networks' calls of `SelfForcing.loss`, in its order. With the first exit step, as full as with any."""
    flow, text = schedule(config), _text(config)
    with torch.set_grad_enabled(role == "generator"):
        clip = _generate(config, rollout, text, networks.generator)
    if rollout.late:
        torch.empty(decoding, dtype=torch.uint8, device="meta")
        clip = torch.cat([_latents(config, 1), clip[:, :, 1 - rollout.window :]], dim=2)
    noise, t = torch.empty_like(clip), timestep(0, clip)
    if role == "critic":
        return flow_loss(networks.critic(flow.add_noise(clip, noise, t), t, text)[0], clip, noise)
    with torch.no_grad():
        noisy = flow.add_noise(clip, noise, t)
        fake, real, negative = (
            flow.to_x0(noisy, network(noisy, t, text)[0], t)
            for network in (networks.critic, networks.teacher, networks.teacher)
        )
        gradient = dmd_gradient(clip, fake, guided(real, negative, config.distillation.guidance_scale))
    return dmd_loss(clip, gradient)


def _generate(config: TrainingConfig, rollout: Rollout, text: TextEmbedding, model: LongSanaDiT) -> Tensor:
    plan = rollout.plan
    chunks = generate(
        model,
        schedule(config),
        repeat(text, len(plan)),
        plan,
        shape=(config.model.in_channels, *latent_size(config)),
        rng=_NoNoise(config.train.batch_size),
        device="meta",
        exits=[0] * len(plan),
        learned_from=rollout.learned_from if torch.is_grad_enabled() else None,
        absorb_last=rollout.streamed,
    )
    return torch.cat([chunk.latents for chunk in chunks], dim=2)


class _NoNoise(NamedTuple):
    """Noise of a batch, without memory."""

    batch: int

    def draw(self, start: int, step: int, shape: Sequence[int], device: torch.device | str) -> Tensor:
        """See `longsana.flow.noise.Noise`."""
        return torch.empty(self.batch, *shape, dtype=torch.float32, device=device)


def _latents(config: TrainingConfig, frames: int) -> Tensor:
    shape = (config.train.batch_size, config.model.in_channels, frames, *latent_size(config))
    return torch.empty(shape, dtype=torch.float32, device="meta")


def _text(config: TrainingConfig) -> TextEmbedding:
    shape = (config.train.batch_size, config.model.caption_length)
    tokens = torch.empty(*shape, config.model.caption_channels, dtype=on_gpu(config.text_encoder.dtype), device="meta")
    return TextEmbedding(tokens, torch.empty(shape, dtype=torch.bool, device="meta"))


def schedule(config: TrainingConfig) -> FlowSchedule:
    return FlowSchedule(config.scheduler.inference_flow_shift, config.scheduler.denoising_step_list)


def latent_size(config: TrainingConfig) -> tuple[int, int]:
    return geometry(config.vae).latent_size(config.sampling.height, config.sampling.width)


def compute_dtype(config: TrainingConfig) -> torch.dtype:
    return torch.bfloat16 if config.train.mixed_precision else torch.float32


def on_gpu(dtype: Dtype) -> torch.dtype:
    result: torch.dtype = torch.bfloat16 if dtype == "auto" else getattr(torch, dtype)
    return result


def kept_values(weight: Tensor, processes: int) -> int:
    """Numbers of a weight that the first of so many processes keeps: rows are dealt out whole."""
    return -(-weight.shape[0] // processes) * (weight.numel() // weight.shape[0])


def kept_bytes(weight: Tensor, processes: int) -> int:
    """Bytes of a weight in float32 that the first of so many processes keeps; see `kept_values`."""
    return kept_values(weight, processes) * torch.float32.itemsize
