"""Settings of the published trainers, and what becomes of them here (docs/published.md). See `longsana.published`."""

from __future__ import annotations

from typing import Any

from longsana import published
from longsana.published import (
    CAUSAL,
    MODEL_YAML,
    OF_TRAINING,
    Context,
    Published,
    Reference,
    Refused,
    Rule,
    Settings,
    agreeing,
    attention,
    clip_frames,
    negative_prompt,
    one_of,
    only,
    strides,
    unless,
    unused,
    weights,
)
from longsana.runtime.errors import InputError

TRAINERS = ("flow_matching", "ode", "consistency", "self_forcing", "longsana")
DISTILLING = ("self_forcing", "longsana")
TAUGHT = ("consistency", *DISTILLING)
BASE = ("flow_matching",)
STREAMS = ("longsana",)
SECTIONS = {
    "flow_matching": BASE,
    "consistency": ("consistency",),
    "rollout": DISTILLING,
    "streaming": STREAMS,
    "distillation": DISTILLING,
    "real_score": TAUGHT,
    "fake_score": DISTILLING,
    "optimizer.critic": DISTILLING,
}
"""Sections of our settings that mean something to some trainers only."""
FOR_ALL = ("rollout.num_training_frames",)
"""Settings in them that mean something to all: a clip's length."""


def section_of(setting: str) -> str:
    """The section of `SECTIONS` that a setting is in; empty where it is in none."""
    return next((section for section in SECTIONS if setting.startswith(f"{section}.")), "")


def means_something(setting: str, trainer: str | None) -> bool:
    """Tell whether a setting changes anything with this trainer."""
    return setting in FOR_ALL or trainer in SECTIONS.get(section_of(setting), (trainer,))


def home(*settings: str, null: bool = False) -> Rule:
    """The key's value is that of those of these settings that mean something to the trainer; see `published.home`."""

    def rule(key: str, value: Any, context: Context) -> Settings:
        given = published.home(*settings, null=null)(key, value, context)
        return {name: own for name, own in given.items() if means_something(name, context.get("trainer"))}

    return rule


def of(trainers: tuple[str, ...], rule: Rule, others: Rule = unused) -> Rule:
    """A rule for these trainers; for others the key changes nothing, in the published code too, or has another rule."""

    def conditional(key: str, value: Any, context: Context) -> Settings:
        return (rule if context.get("trainer") in trainers else others)(key, value, context)

    return conditional


def both(*rules: Rule) -> Rule:
    """Settings that rules give."""

    def rule(key: str, value: Any, context: Context) -> Settings:
        return {name: setting for one in rules for name, setting in one(key, value, context).items()}

    return rule


def clip_and_rollout(key: str, value: Any, context: Context) -> Settings:
    """The key data.num_frames: the base model trains on clips of that length."""
    settings = clip_frames(key, value, context)
    if context.get("trainer") in BASE and "sampling.num_frames" in settings:
        settings["rollout.num_training_frames"] = 1 + (value - 1) // strides(context)[0]
    return settings


def denoising_steps(key: str, value: Any, context: Context) -> Settings:
    """The key denoising_step_list: a trailing 0 is no denoising step."""
    if isinstance(value, list) and value[-1:] == [0]:
        value = value[:-1]
    return {"scheduler.denoising_step_list": value}


def latent_shape(key: str, value: Any, context: Context) -> Settings:
    """The key image_or_video_shape, (B, T, C, H, W) of latents: the picture's size; the rest must agree."""
    if value is None:
        return {}
    if not isinstance(value, list) or len(value) != 5 or not all(isinstance(side, int) for side in value):
        raise Refused("five whole numbers, B, T, C, H and W of latents")
    batch, frames, channels, height, width = value
    length, usual = ("streaming_max_length", 261) if context.get("trainer") in STREAMS else ("num_training_frames", 21)
    for name, own, right in (
        ("batch_size", batch, context.get("batch_size", 1)),
        (length, frames, context.get(length, usual)),
        ("model.in_channels", channels, context.get("vae.vae_latent_dim", context.get("model.in_channels", 16))),
    ):
        if own != right:
            raise Refused(f"{name} is {right}, and the shape says {own}")
    side = strides(context)[1]
    return {"sampling.height": side * height, "sampling.width": side * width}


def switch(setting: str, *modes: str) -> Rule:
    """A key of the switch to other prompts, which LongSANA's stage makes. modes: in which the key means something."""

    def rule(key: str, value: Any, context: Context) -> Settings:
        if context.get("trainer") not in STREAMS:
            if value is not None and value != []:
                raise Refused("prompts switch in LongSANA's stage alone; leave it out, or trainer: longsana")
            return {}
        path, mode = (
            context.given.get(f"streaming.{name}", context.given.get(name))
            for name in ("switch_prompt_path", "switch_mode")
        )
        means_nothing = path is None or (modes and (mode or "fixed") not in modes)
        return {} if value is None or means_nothing else {setting: value}

    return rule


def switch_prompt_path(key: str, value: Any, context: Context) -> Settings:
    """The key switch_prompt_path: the last chunk's past is made again there, unless it is said otherwise."""
    settings = switch("streaming.switch_prompt_path")(key, value, context)
    if settings and context.get("streaming.prompt_change") is None:
        settings["streaming.prompt_change"] = "recache=1"
    return settings


def pair(*settings: str) -> Rule:
    """A list of two, one for each setting."""

    def rule(key: str, value: Any, context: Context) -> Settings:
        if not isinstance(value, list) or len(value) != 2:
            raise Refused("a list of two numbers")
        return dict(zip(settings, value, strict=True))

    return rule


def scores(*names: str) -> Rule:
    """A score's checkpoint. Without real_ckpt the teacher is the critic's."""

    def rule(key: str, value: Any, context: Context) -> Settings:
        return {} if value is None else dict.fromkeys((f"{name}.load_from" for name in names), value)

    return rule


def fake_ckpt(key: str, value: Any, context: Context) -> Settings:
    """The key fake_ckpt: the critic, and the teacher where real_ckpt is not given."""
    return scores(*(("fake_score",) if context.get("real_ckpt") else ("fake_score", "real_score")))(key, value, context)


def loss_of_trainer(key: str, value: Any, context: Context) -> Settings:
    """The key distribution_loss, which has to be the trainer's; the published ODE stage keeps no average."""
    right = {"ode": "ode", **dict.fromkeys(DISTILLING, "dmd_sana")}.get(str(context.get("trainer")))
    if value is not None and value != right:
        raise Refused(f"trainer={context.get('trainer')} has the loss {right}")
    return {"train.ema_weight": 0} if right == "ode" and context.get("ema_weight") is None else {}


def causal_attention(key: str, value: Any, context: Context) -> Settings:
    """The key model.attn_type, which says what the base model's training trains."""
    settings = attention(key, value, context)
    return settings if value is None else settings | {"flow_matching.causal": value in CAUSAL}


def compute_dtype(key: str, value: Any, context: Context) -> Settings:
    """The key model.mixed_precision of the base model's training."""
    settings = MODEL_YAML["model.mixed_precision"](key, value, context)
    return settings | ({"train.mixed_precision": settings["model.dtype"] != "float32"} if settings else {})


def of_its_trainer(setting: str) -> Rule:
    """A key of a model YAML's section train that is a setting of ours too.

    In a file that has more of that section it belongs to the base model's training, else it is ours.
    """

    def rule(key: str, value: Any, context: Context) -> Settings:
        theirs = any(f"train.{name}" in context.layer for name in OF_TRAINING if f"train.{name}" not in SHARED)
        return {} if theirs and context.get("trainer") not in BASE else {setting: value}

    return rule


SHARED = ("train.seed", "train.gradient_accumulation_steps")


_SAME_SIZES = "one network serves every role; its sizes are those of model, real_score and fake_score"

STAGE_YAML: dict[str, Rule] = {
    **MODEL_YAML,
    "data.num_frames": clip_and_rollout,
    "distribution_loss": loss_of_trainer,
    "generator_ckpt": weights("model.load_from"),
    "fake_ckpt": of(DISTILLING, fake_ckpt),
    "real_ckpt": of(DISTILLING, scores("real_score")),
    **dict.fromkeys(
        (
            "generator_fsdp_wrap_strategy",
            "real_score_fsdp_wrap_strategy",
            "fake_score_fsdp_wrap_strategy",
            "text_encoder_fsdp_wrap_strategy",
            "num_chunks_per_clip",
            "student_max_frame",
            "train_vis_interval",
            "train_vis_rank",
            "val_batch_size",
            "gc_interval",
            "model_kwargs.local_attn_size",
            "ckpt_step",
            "eval_first_n",
            "num_samples",
            "prompt_name",
            "prompt_path",
            "num_frames",
        ),
        unused,
    ),
    "text_encoder_cpu_offload": one_of("train.text_encoder", {True: "offload", False: "keep"}, instead="true or false"),
    **dict.fromkeys(("real_name", "fake_name", "model_name"), only("SANA", instead=_SAME_SIZES)),
    "denoising_step_list": denoising_steps,
    "warp_denoising_step": only(False, instead="write the timesteps themselves into denoising_step_list"),
    "ts_schedule": home("distillation.ts_schedule"),
    "ts_schedule_max": home("distillation.ts_schedule_max"),
    "num_train_timestep": only(1000, instead="there are always 1000"),
    "timestep_shift": home("distillation.timestep_shift"),
    "model_kwargs.timestep_shift": home("scheduler.inference_flow_shift"),
    "guidance_scale": unless("real_guidance_scale", rule=home("distillation.guidance_scale")),
    "real_guidance_scale": home("distillation.guidance_scale"),
    "fake_guidance_scale": only(0, instead="the critic is never guided"),
    "min_score_timestep": of(DISTILLING, only(0, instead="distillation.min_timestep")),
    "dfake_gen_update_ratio": home("distillation.dfake_gen_update_ratio"),
    "denoising_loss_type": only("flow", instead="the critic learns the flow"),
    "discriminator_lr_multiplier": only(1, 1.0, instead="there is no discriminator"),
    "causal": only(True, instead="for the bidirectional model trainer: flow_matching"),
    "mixed_precision": home("train.mixed_precision"),
    "gradient_checkpointing": home("train.gradient_checkpointing"),
    "sharding_strategy": home("train.sharding_strategy"),
    "seed": home("train.seed"),
    "wandb_key": only(instead="log in with `wandb login` or WANDB_API_KEY; a key in a config is copied to every run"),
    "wandb_entity": home("wandb.entity", null=True),
    "wandb_project": home("wandb.project"),
    "lr": home("optimizer.generator.lr"),
    "beta1": home("optimizer.generator.beta1"),
    "beta2": home("optimizer.generator.beta2"),
    "lr_critic": home("optimizer.critic.lr"),
    "beta1_critic": home("optimizer.critic.beta1"),
    "beta2_critic": home("optimizer.critic.beta2"),
    "weight_decay": home("optimizer.generator.weight_decay", "optimizer.critic.weight_decay"),
    "max_grad_norm_generator": home("optimizer.generator.max_grad_norm"),
    "max_grad_norm_critic": home("optimizer.critic.max_grad_norm"),
    "data_path": home("data.data_path"),
    "val_data_path": home("validation.val_data_path"),
    "batch_size": home("train.batch_size"),
    "total_batch_size": home("train.total_batch_size", null=True),
    "gradient_accumulation_steps": home("train.gradient_accumulation_steps", null=True),
    "ema_weight": home("train.ema_weight"),
    "ema_start_step": home("train.ema_start_step"),
    "log_iters": home("train.log_iters"),
    "max_checkpoints": home("train.max_checkpoints"),
    "max_iters": home("train.max_iters"),
    "motion_score": home("sampling.motion_score"),
    "negative_prompt": negative_prompt,
    "negative_prompt_real": unused,  # read only where real_name is another than SANA
    "height": home("sampling.height"),
    "width": home("sampling.width"),
    "image_or_video_shape": latent_shape,
    "load_raw_video": only(False, instead="training data are prompts, latents or trajectories"),
    "vis_interval": home("validation.vis_interval"),
    "vis_video_lengths": home("validation.vis_video_lengths"),
    "vis_ema": home("validation.vis_ema"),
    "num_training_frames": home("rollout.num_training_frames"),
    "min_num_training_frames": home("rollout.min_num_training_frames"),
    "num_frame_per_block": home("sampling.chunk_frames"),
    "slice_last_frames": home("rollout.slice_last_frames"),
    "same_step_across_blocks": home("rollout.same_step_across_blocks"),
    "last_step_only": home("rollout.last_step_only"),
    "update_kv_cache_by_end": of(DISTILLING, only(False, instead="what the exit step gives is absorbed")),
    "context_noise": only(0, 0.0, instead="rollout.noisy_absorb=true absorbs with noise of the least sigma"),
    "streaming_training": of(STREAMS, only(True, instead="trainer: self_forcing")),
    "streaming_chunk_size": of(
        STREAMS, agreeing("it is num_training_frames,", lambda context: context.get("num_training_frames", 21))
    ),
    "streaming_max_length": home("streaming.streaming_max_length"),
    "streaming_min_new_frame": home("streaming.streaming_min_new_frame"),
    "train_first_chunk": home("streaming.train_first_chunk"),
    "independent_first_frame": only(False, instead="the remainder of a clip goes to its first chunk"),
    "i2v": only(False, instead="text to video only"),
    "switch_prompt_path": switch_prompt_path,
    "switch_mode": switch("streaming.switch_mode"),
    "fixed_switch_index": switch("streaming.fixed_switch_index", "fixed"),
    "switch_choices": switch("streaming.switch_choices", "random_choice"),
    # A model YAML as the base of trainer: flow_matching; the section train is its trainer's.
    "scheduler.flow_shift": both(MODEL_YAML["scheduler.flow_shift"], home("flow_matching.flow_shift")),
    "scheduler.logit_mean": home("flow_matching.logit_mean"),
    "scheduler.logit_std": home("flow_matching.logit_std"),
    "scheduler.weighting_scheme": of(BASE, only("logit_normal", instead="timesteps are logit-normal")),
    "model.attn_type": of(BASE, causal_attention, others=attention),
    "model.mixed_precision": of(BASE, compute_dtype, others=MODEL_YAML["model.mixed_precision"]),
    "model_kwargs": only({}, instead="its keys are timestep_shift and local_attn_size"),
    "train.seed": of_its_trainer("train.seed"),
    "train.gradient_accumulation_steps": of_its_trainer("train.gradient_accumulation_steps"),
    "model.class_dropout_prob": home("flow_matching.class_dropout_prob"),
    "train.chunk_sampling_strategy": home("flow_matching.chunk_sampling_strategy"),
    "train.same_timestep_prob": home("flow_matching.same_timestep_prob"),
    "train.noise_multiplier": of(BASE, only(0, 0.0, instead="a picture first is clean, without noise")),
    "train.ltx_image_condition_prob": of(BASE, home("train.image_probability")),
    "train.use_fsdp": of(
        BASE, one_of("train.sharding_strategy", {True: "full", False: "no_shard"}, instead="true or false")
    ),
    "train.train_batch_size": of(BASE, home("train.batch_size")),
    "train.optimizer.type": of(BASE, only("AdamW", instead="the optimizer is AdamW")),
    "train.optimizer.lr": of(BASE, home("optimizer.generator.lr")),
    "train.optimizer.betas": of(BASE, pair("optimizer.generator.beta1", "optimizer.generator.beta2")),
    "train.optimizer.eps": of(BASE, home("optimizer.generator.eps")),
    "train.optimizer.weight_decay": of(BASE, home("optimizer.generator.weight_decay")),
    "train.gradient_clip": of(BASE, home("optimizer.generator.max_grad_norm")),
    "train.lr_schedule": of(
        BASE, only("constant", instead="the rate is constant; optimizer.generator.decay_after lets it fall")
    ),
    "train.lr_schedule_args.num_warmup_steps": of(BASE, home("optimizer.generator.num_warmup_steps")),
    "train.num_warmup_steps": of(BASE, home("optimizer.generator.num_warmup_steps")),
    "train.grad_checkpointing": of(BASE, home("train.gradient_checkpointing")),
    "train.save_model_steps": of(BASE, home("train.log_iters")),
    "train.ema_rate": of(BASE, home("train.ema_weight")),
}
"""What becomes of a stage YAML's keys, and of a model YAML's in training."""


def _of_sampling(settings: Settings) -> Settings:
    chosen = ("sampling.", "scheduler.sampling_algo", "scheduler.num_inference_steps")
    return {key: value for key, value in settings.items() if key.startswith(chosen)}


def _of_networks(settings: Settings) -> Settings:
    kept = ("model.", "vae.", "text_encoder.", "scheduler.", "sampling.")
    return {key: value for key, value in settings.items() if key.startswith(kept)}


def _of_scores(settings: Settings) -> Settings:
    model = {key.partition(".")[2]: value for key, value in settings.items() if key.startswith("model.")}
    return {f"{score}.{key}": value for score in ("real_score", "fake_score") for key, value in model.items()}


def _is_a_stage(context: Context) -> None:
    if (trainer := context.get("trainer")) not in TRAINERS:
        raise InputError(f"trainer={trainer}: a config of training must say which stage it is: {', '.join(TRAINERS)}")


TRAINING = Published(
    STAGE_YAML,
    sections=("data", "image_data"),
    references={
        "sana_config": Reference(_of_networks, "generator_ckpt"),
        "sana_inference_config": Reference(_of_sampling, "generator_ckpt"),
        "sana_fake_config": Reference(_of_scores, "fake_ckpt"),
    },
    check=_is_a_stage,
)
