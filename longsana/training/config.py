"""Every setting of training: those of inference (the generator, its parts and its sampler), and the sections below.

Names are the published ones, grouped; flat keys of published YAMLs are understood (docs/published.md).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from omegaconf import MISSING

from longsana.config import InferenceConfig, ModelConfig
from longsana.published import Published
from longsana.runtime.settings import bounded
from longsana.training.published import DISTILLING, TAUGHT, TRAINING


@dataclass(frozen=True)
class DataConfig:
    # flow_matching and consistency: a folder of latent clips, or generated:shapes, :turning_shapes, :mixed_shapes,
    # :bars, :remembered_shapes, :turning_remembered_shapes or :blobs; ode: a folder of trajectories or a published
    # LMDB; self_forcing and longsana: a text file, one prompt a line
    data_path: str = "data/longsana/vidprom_filtered_extended.txt"
    num_clips: int = bounded(8192, 1, 10**9)  # generated: so many clips, made before training and kept in memory


@dataclass(frozen=True)
class FlowMatchingConfig:
    """Training of the base model, and of the block-causal one."""

    flow_shift: float = bounded(
        3.0, above=0, most=1000
    )  # of the training timesteps; sampling has scheduler.inference_flow_shift
    logit_mean: float = bounded(0.0, -100, 100)
    logit_std: float = bounded(1.0, 0, 100)
    # Errors count (1 - sigma) to this power: at 0 alike, though they are thirty times as large at sigma 0.995 as at 0.8
    weight_power: float = bounded(0.0, 0, 10)
    causal: bool = False  # chunks of sampling.chunk_frames that do not see later ones, a timestep each
    # causal: chunks take timesteps independently of each other, or later ones are never less noisy
    chunk_sampling_strategy: Literal["uniform", "incremental"] = "incremental"
    same_timestep_prob: float = bounded(0.0, 0, 1)  # causal: share of clips with one timestep for all chunks
    class_dropout_prob: float = bounded(0.1, 0, 1)  # share of captions that are dropped
    # What a dropped caption becomes: the checkpoint's null tokens under the caption's own mask, as published, or what
    # sampling.null_caption names, with its mask
    dropped_caption: Literal["masked_null", "null_caption"] = "masked_null"


@dataclass(frozen=True)
class ConsistencyConfig:
    """Causal consistency: one small step of the teacher (real_score) ties the student's answers before and after it."""

    num_steps: int = bounded(40, 2, 1000)  # of the teacher's way from noise, one of which is drawn
    shift: float = bounded(8.0, above=0, most=1000)
    guidance_scale: float = bounded(3.0, -1000, 1000)  # g in cond + g (cond - uncond) of the teacher
    causal_teacher: bool = True  # it sees chunks as the student does; false: the bidirectional base model, the clip


@dataclass(frozen=True)
class RolloutConfig:
    """The rollout: what the student generates in training, and the window of it that a loss sees."""

    num_training_frames: int = bounded(21, 1, 10**6)  # latent frames of a rollout, and of LongSANA's first stretch
    min_num_training_frames: int = bounded(
        21, 1, 10**6
    )  # self_forcing: lengths from here to num_training_frames are drawn
    slice_last_frames: int = bounded(21, 2, 10**6)  # latent frames of the loss window
    same_step_across_blocks: bool = True  # one exit step for all chunks of a rollout
    last_step_only: bool = False  # the exit step is always the last
    noisy_absorb: bool = False  # absorb chunks with noise of the least sigma, as published training did
    # What is decoded for the overlap latent, which begins a later window: 0 is each latent once, with the decoder's
    # cache carried along (exact; 2 GB a micro-batch at 480p); N > 0 the last N alone, from a cold cache (an error that
    # depends on the VAE)
    overlap_latents: int = bounded(0, 0, 10**6)


@dataclass(frozen=True)
class StreamingConfig:
    """LongSANA: videos that live across iterations."""

    streaming_max_length: int = bounded(261, 1, 10**9)  # latent frames of a stream
    streaming_min_new_frame: int = bounded(20, 1, 10**6)  # latent frames of a stretch after the first
    train_first_chunk: bool = True  # a loss on the first stretch too
    prompt_change_prob: float = bounded(0.0, 0, 1)  # of another caption from a later stretch on
    # Or once in each stream: a file with a prompt for each of data.data_path, line by line, that it goes on with
    switch_prompt_path: str | None = None
    # Where: at fixed_switch_index, at the beginning of any stretch, or at one of switch_choices, drawn for each stream
    switch_mode: Literal["fixed", "random", "random_choice"] = "fixed"
    fixed_switch_index: int = bounded(21, 1, 10**9)  # latent frames, rounded up to the beginning of a stretch
    switch_choices: tuple[int, ...] = bounded((), 1, 10**9)  # as above
    # What becomes of the past where a prompt changes: keep, recache=K or rebuild=W; see data/story.py
    prompt_change: str = "keep"


@dataclass(frozen=True)
class DistillationConfig:
    """Distribution matching: generator against the frozen real score and the trained fake score."""

    timestep_shift: float = bounded(5.0, above=0, most=1000)  # of the timesteps at which scores are compared
    guidance_scale: float = bounded(3.0, -1000, 1000)  # g in real = cond + g (cond - uncond)
    min_timestep: int = bounded(20, 1, 1000)
    max_timestep: int = bounded(980, 1, 1000)
    ts_schedule: bool = False  # timesteps no lower than where the exit step leads
    ts_schedule_max: bool = False  # timesteps no higher than the exit step's own
    dfake_gen_update_ratio: int = bounded(5, 1, 10**6)  # critic updates for one of the generator


@dataclass(frozen=True)
class AdamWConfig:
    lr: float = bounded(1e-5, above=0, most=1000)
    # The matrices of the blocks' linear layers learn by Muon at this rate (its steps as large as AdamW's), all else by
    # AdamW; None: all of it by AdamW
    muon_lr: float | None = bounded(None, above=0, most=1000)
    beta1: float = bounded(0.0, 0, below=1)
    beta2: float = bounded(0.999, 0, below=1)
    eps: float = bounded(1e-8, 0, 1)
    weight_decay: float = bounded(0.01, 0, 1000)
    max_grad_norm: float = bounded(10.0, above=0, most=1e9)
    num_warmup_steps: int = bounded(0, 0, 10**9)
    decay_after: int | None = bounded(None, 1, 10**9)  # updates after which rates fall as 1 / sqrt(update); None: never


@dataclass(frozen=True)
class OptimizerConfig:
    generator: AdamWConfig = field(default_factory=AdamWConfig)
    critic: AdamWConfig = field(default_factory=lambda: AdamWConfig(lr=2e-6))


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank factors that learn in place of the weights, which stay as they are."""

    rank: int | None = bounded(None, 1, 4096)  # of the change of each targeted layer; None: the weights learn
    alpha: float | None = bounded(None, above=0, most=1e6)  # the change is alpha / rank times lora_B lora_A; None: rank
    # Linear layers by diffusers' names, or by the ends of these from a dot on
    targets: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0", "conv_inverted", "conv_point")

    @property
    def scale(self) -> float:
        """The number that the product of the factors is multiplied by."""
        assert self.rank is not None, "no LoRA"
        return 1.0 if self.alpha is None else self.alpha / self.rank


@dataclass(frozen=True)
class TrainConfig:
    max_iters: int = bounded(10000, 1, 10**9)
    seed: int = bounded(0, 0, 2**63 - 2**32)
    batch_size: int = bounded(1, 1, 10**6)  # samples a micro-batch; a micro-batch is a process and an accumulation step
    total_batch_size: int | None = bounded(
        None, 1, 10**9
    )  # of all processes; decides the accumulation if that is not given
    gradient_accumulation_steps: int | None = bounded(None, 1, 10**6)  # None: 1, or what total_batch_size needs
    log_iters: int = bounded(200, 1, 10**9)  # iterations from checkpoint to checkpoint
    max_checkpoints: int = bounded(3, 1, 10**6)
    async_checkpoint: bool = False  # write while training goes on, from a copy on the host
    ema_weight: float = bounded(0.99, 0, below=1)  # 0: no average
    ema_start_step: int = bounded(200, 0, 10**9)
    # Width of the average over the updates since its start, as a share of them, instead of ema_weight; None: ema_weight
    ema_relative_width: float | None = bounded(None, 0.001, 0.28)
    mixed_precision: bool = True  # compute in bfloat16, reduce and keep weights in float32
    gradient_checkpointing: bool = True
    sharding_strategy: Literal["full", "hybrid_full", "hybrid_zero2", "no_shard"] = "full"
    compile: bool = False  # each block under torch.compile
    cuda_graphs: bool = False  # one process on a GPU: record passes and replay them; faster for small networks
    device_noise: bool = False  # draw noise on the GPU: faster for small networks, and other noise than a CPU's
    # Share of updates, or of videos, that begin with a picture, which has no loss: latent 0 of a clip or a trajectory,
    # or what data.data_path names for each prompt; base models pin it, other stages do as sampling.image_first says
    image_probability: float = bounded(0.0, 0, 1)
    # Share of updates, or of streams, whose first chunk has sampling.first_chunk_frames; self_forcing and longsana
    first_chunk_probability: float = bounded(0.0, 0, 1)
    text_encoder: Literal["keep", "offload", "free"] = "keep"  # on the GPU; on the host between uses; encode all first
    # Captions encoded at a time; more are faster with a small encoder, and round differently
    captions_together: int = bounded(1, 1, 100_000)
    lora: LoraConfig = field(default_factory=LoraConfig)


@dataclass(frozen=True)
class ValidationConfig:
    val_data_path: str = "asset/samples/longsana_val.txt"
    val_samples: int = bounded(2, 1, 10**6)  # prompts, from the top of the file
    vis_interval: int = bounded(200, 0, 10**9)  # iterations from validation to validation; 0: never
    vis_video_lengths: tuple[int, ...] = bounded((21,), 1, 10**9)  # latent frames
    vis_ema: bool = False  # sample with the average instead of the weights
    gpus_per_video: int = bounded(1, 1, 10**4)  # processes that make each of its videos together


@dataclass(frozen=True)
class WandbConfig:
    project: str = "longsana"
    entity: str | None = None


@dataclass(frozen=True)
class TrainingConfig(InferenceConfig):
    """`model` is the generator; validation samples it with the settings of inference."""

    # A config must say it
    trainer: Literal["flow_matching", "ode", "consistency", "self_forcing", "longsana"] = MISSING
    real_score: ModelConfig = field(default_factory=ModelConfig)  # the frozen teacher
    fake_score: ModelConfig = field(default_factory=ModelConfig)  # the critic, where it starts from
    data: DataConfig = field(default_factory=DataConfig)
    flow_matching: FlowMatchingConfig = field(default_factory=FlowMatchingConfig)
    consistency: ConsistencyConfig = field(default_factory=ConsistencyConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    streaming: StreamingConfig = field(default_factory=StreamingConfig)
    distillation: DistillationConfig = field(default_factory=DistillationConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    wandb: WandbConfig = field(default_factory=WandbConfig)

    PUBLISHED: ClassVar[Published] = TRAINING

    @property
    def networks(self) -> dict[str, ModelConfig]:
        """Settings of the networks that the trainer has, by their roles."""
        found = {"generator": self.model}
        if self.trainer in DISTILLING:
            found["critic"] = self.fake_score
        if self.trainer in TAUGHT:
            found["teacher"] = self.real_score
        return found


@dataclass(frozen=True)
class PairsConfig:
    """ODE trajectories: what of the base model's way from noise to video the student will start from."""

    num_steps: int = bounded(48, 1, 100_000)
    shift: float = bounded(8.0, above=0, most=1000)
    cfg_scale: float = bounded(6.0, -1000, 1000)
    causal: bool = False  # chunk after chunk with the block-causal teacher, instead of the clip at once
    shard_size: int = bounded(16, 1, 10**6)  # trajectories a file
    dtype: Literal["bfloat16", "float16", "float32"] = "float16"
    out: str = "output/LongSANA"


@dataclass(frozen=True)
class OdePairsConfig(InferenceConfig):
    """`model` is the teacher; `scheduler` (its steps and shift) is the student's, `sampling` the prompts and size."""

    pairs: PairsConfig = field(default_factory=PairsConfig)
