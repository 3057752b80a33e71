"""Checks of what may be trained that need no network, made before anything is loaded."""

from __future__ import annotations

import dataclasses
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from math import gcd
from pathlib import Path
from typing import Any, Literal

import torch
import yaml

from longsana.chunks import ChunkPlan
from longsana.config import ModelConfig, load_config
from longsana.data.clips import GENERATED, ClipFolder, open_clips
from longsana.data.lmdb_entries import DATA
from longsana.data.pictures import read_picture
from longsana.data.prompts import (
    Pictured,
    Prompt,
    aligned_prompts,
    place,
    read_prompts,
    training_pictures,
    training_prompts,
)
from longsana.data.trajectories import check_grid, open_trajectories
from longsana.encoders.geometry import geometry
from longsana.encoders.tiny_layouts import FULL
from longsana.flow.schedule import FlowSchedule
from longsana.models.past import LEARNED
from longsana.runtime.distributed import World
from longsana.runtime.errors import InputError
from longsana.runtime.hub import locate
from longsana.sampling.checks import (
    check_config,
    check_division,
    check_network,
    check_no_first_chunk,
    check_no_memory,
    check_picture_sampler,
    check_weights,
    source_digest,
    uses_vae,
)
from longsana.training.config import LoraConfig, TrainingConfig
from longsana.training.lora import TARGETS, check_peft
from longsana.training.published import DISTILLING, SECTIONS, TAUGHT, means_something, section_of
from longsana.training.stages.consistency import timesteps
from longsana.training.stages.prompt_changes import change_of, switch_places
from longsana.training.stages.stage import MicroBatches
from longsana.weights.build import empty_model
from longsana.weights.lora import targeted
from longsana.weights.names import chosen_past

log = logging.getLogger(__name__)

FREE = (
    *("train.max_iters", "train.log_iters", "train.max_checkpoints", "train.async_checkpoint", "train.text_encoder"),
    *("train.sharding_strategy", "train.gradient_checkpointing", "train.compile", "train.cuda_graphs"),
    *("validation.", "wandb.", "video.", "sampling.txt_file", "sampling.num_frames", "sampling.bs"),
    *("sampling.cuda_graphs", "vae.decoder", "vae.encoder"),
)
"""Settings, or prefixes of them, that a resumed run may change: they do not decide what is learned."""


def check_training(config: TrainingConfig) -> None:
    """Refuse settings that nothing can be trained with.

    Raises:
        InputError: the first one found, by name, with what would be right.
    """
    check_config(config)
    trainer = config.trainer
    for setting, value, default in _of_other_trainers(config):
        section = section_of(setting)
        raise InputError(
            f"{setting}={_written(value)}: this is a config of the trainer {trainer}, and {section} belongs to "
            f"{' and '.join(SECTIONS[section])}; leave it out (default {_written(default)})"
        )
    for name, network in (
        ("model", config.model),
        ("real_score", config.real_score),
        ("fake_score", config.fake_score),
    ):
        if network.float8:
            raise InputError(f"{name}.float8=true: weights in float8 cannot be trained; it is for inference")
    whole = trainer == "flow_matching" and not config.flow_matching.causal
    for key, value in chosen_past(config.model).items() if whole else ():
        raise InputError(f"model.{key}={value}: has no meaning with flow_matching.causal=false; a clip is one chunk")
    check_no_memory(config)
    if config.vae.encoder != FULL:
        raise InputError(
            f"vae.encoder={config.vae.encoder}: training encodes with the VAE itself, and a tiny decoder shows "
            "validation's videos alone; leave it out"
        )
    if config.validation.vis_ema and config.train.ema_weight == 0:
        raise InputError("validation.vis_ema=true: there is no average to sample with; set train.ema_weight above 0")
    if (width := config.train.ema_relative_width) is not None and config.train.ema_weight == 0:
        raise InputError(
            f"train.ema_relative_width={width}: train.ema_weight=0 keeps no average; leave one of them out"
        )
    if trainer in TAUGHT:
        _check_score(config, "real_score")
    if trainer in DISTILLING:
        _check_distillation(config)
    if trainer == "consistency":
        timesteps(config.consistency)
    _check_lora(config)
    flow, sampling = config.flow_matching, config.sampling
    replaces = flow.class_dropout_prob > 0 and flow.dropped_caption == "null_caption"
    if replaces and sampling.null_caption == "negative_prompt" and sampling.negative_prompt != "":
        raise InputError(
            "flow_matching.dropped_caption=null_caption: with sampling.null_caption=negative_prompt dropped captions "
            "become the empty prompt, so sampling must be guided away from that; set sampling.negative_prompt='' or "
            "sampling.null_caption=learned"
        )
    if config.train.image_probability > 0:
        _check_pictures(config)
    _check_first_chunk(config)
    if trainer == "longsana":
        _check_streams(config)


def _check_lora(config: TrainingConfig) -> None:
    lora, unset = config.train.lora, LoraConfig()
    if lora.rank is None:
        for name in ("alpha", "targets"):
            if (value := getattr(lora, name)) != getattr(unset, name):
                raise InputError(
                    f"train.lora.{name}={_written(value)}: without train.lora.rank there is no LoRA; set it too"
                )
        return
    check_peft()
    if not lora.targets:
        raise InputError(f"{TARGETS}=[]: there is nothing to put factors on; leave it out")
    for role, settings in (("generator", config.optimizer.generator), ("critic", config.optimizer.critic)):
        if settings.muon_lr is not None:
            raise InputError(
                f"optimizer.{role}.muon_lr={settings.muon_lr}: Muon is for whole matrices, and with train.lora.rank "
                "factors learn; leave one of them out"
            )
    for role, network in config.networks.items():
        if role == "teacher":
            continue
        for parts in targeted(empty_model(network), lora.targets, TARGETS).values():
            for layer, part in parts.items():
                if lora.rank > (most := min(part.rows, part.columns)):
                    raise InputError(
                        f"train.lora.rank={lora.rank}: above {most}, the smaller side of {layer} ({role}), and so more "
                        "than the layer holds"
                    )
    if config.model.state_decay == LEARNED:
        log.warning(
            "model.state_decay=learned: with train.lora.rank low-rank factors alone learn; those of the past stay as "
            "model.load_from has them"
        )


def check_device(config: TrainingConfig, world: World, device: torch.device) -> None:
    """Refuse what this device cannot do.

    Raises:
        InputError: the setting, and why.
    """
    train = config.train
    for role, settings in (("generator", config.optimizer.generator), ("critic", config.optimizer.critic)):
        if settings.muon_lr is not None and not hasattr(torch.optim, "Muon"):
            raise InputError(
                f"optimizer.{role}.muon_lr={settings.muon_lr}: Muon is in torch 2.9 and later, this is "
                f"{torch.__version__}; leave it out, or upgrade"
            )
        if settings.muon_lr is not None and world.size > 1:
            raise InputError(
                f"optimizer.{role}.muon_lr={settings.muon_lr}: Muon needs whole matrices, and the {world.size} "
                "processes of this run share them; leave it out, or train on one"
            )
    if (size := config.validation.gpus_per_video) > 1:
        if world.size % size:
            raise InputError(
                f"validation.gpus_per_video={size}: does not divide the number of processes of this run, {world.size}; "
                "set it to 1, or to a number that does"
            )
        if train.compile:
            raise InputError(
                f"validation.gpus_per_video={size}: processes give each other parts of a pass, which is not compiled; "
                "set it to 1, or train.compile=false"
            )
        check_division(config)
    if train.cuda_graphs and device.type == "cuda" and world.size > 1:
        raise InputError(
            f"train.cuda_graphs=true: graphs are for one process, and this run has {world.size}; set it to false"
        )
    if train.cuda_graphs and device.type != "cuda":
        log.info("train.cuda_graphs: there is no GPU, so passes are computed as usual")


def _check_streams(config: TrainingConfig) -> None:
    rollout, chunk = config.rollout, config.sampling.chunk_frames
    first, new = rollout.num_training_frames, config.streaming.streaming_min_new_frame
    longest, ratio = config.streaming.streaming_max_length, config.distillation.dfake_gen_update_ratio
    if len(ChunkPlan.split(new, chunk)) != len(ChunkPlan.split(first, chunk)):
        raise InputError(
            f"streaming.streaming_min_new_frame={new}: must be as many chunks of {chunk} as the first stretch, "
            f"rollout.num_training_frames={first}, so that all processes run the network equally often; "
            f"for example {first - first % chunk}"
        )
    for name, number, wanted in (
        ("slice_last_frames", rollout.slice_last_frames, new + 1),
        ("min_num_training_frames", rollout.min_num_training_frames, first),
    ):
        if number != wanted:
            raise InputError(
                f"rollout.{name}={number}: must be {wanted} with streams: a window is the picture that leads it "
                f"and the {new} new latents, and every first stretch has {first}"
            )
    change_of(config)
    if longest < first:
        raise InputError(f"streaming.streaming_max_length={longest}: shorter than the first stretch, {first}")
    switch_places(config)
    # In `ratio` iterations the learners take ratio + 1 stretches, one of them the generator.
    stretches = 1 + (longest - first) // new
    if gcd(stretches, ratio + 1) > 1:
        learned = sorted({call % stretches for call in range(0, stretches * (ratio + 1), ratio + 1)})
        right = next(n for n in count(stretches) if gcd(n, ratio + 1) == 1)
        raise InputError(
            f"streaming.streaming_max_length={longest}: of a stream's {stretches} stretches the generator would learn "
            f"number {', '.join(str(n) for n in learned)} alone, in every stream: with distillation."
            f"dfake_gen_update_ratio={ratio} it takes one in {ratio + 1}; for example {first + (right - 1) * new} "
            f"({right} stretches)"
        )


def _check_pictures(config: TrainingConfig) -> None:
    share, frames, sampling = config.train.image_probability, config.rollout.num_training_frames, config.sampling
    shortest = config.rollout.min_num_training_frames if config.trainer in DISTILLING else frames
    if shortest == 1:
        raise InputError(
            f"train.image_probability={share}: a clip of one latent is its picture, and nothing is left to learn; make "
            "rollout.num_training_frames, or min_num_training_frames, at least 2"
        )
    plan = ChunkPlan.with_picture(frames, sampling.chunk_frames, sampling.image_first)
    after = len(plan) - (sampling.image_first == "absorb")
    if config.trainer == "longsana" and after != len(ChunkPlan.split(frames, sampling.chunk_frames)):
        raise InputError(
            f"rollout.num_training_frames={frames}: after a picture that is absorbed it must be as many chunks of "
            f"{sampling.chunk_frames} as without one, so that all processes run the network equally often; for example "
            f"{frames + 1}, or sampling.image_first=pin"
        )


def _check_first_chunk(config: TrainingConfig) -> None:
    train, sampling = config.train, config.sampling
    share, first, name = train.first_chunk_probability, sampling.first_chunk_frames, "train.first_chunk_probability"
    if config.trainer not in DISTILLING:
        if share:
            raise InputError(
                f"{name}={share}: the trainer {config.trainer} learns clips that are cut as published; short first "
                f"chunks are for {' and '.join(DISTILLING)}; leave it out"
            )
        check_no_first_chunk(config)
    if not share:
        if first:
            raise InputError(
                f"sampling.first_chunk_frames={first}: has no meaning for training with {name}=0, where no video "
                "begins so; set that above 0, or leave this to inference"
            )
        return
    if not first:
        raise InputError(
            f"{name}={share}: does not say how short; set sampling.first_chunk_frames too, or leave it out"
        )
    shortest, pictured = config.rollout.min_num_training_frames, train.image_probability > 0
    apart = pictured and sampling.image_first == "absorb"
    usual = ChunkPlan.split(shortest - apart, sampling.chunk_frames).lengths[0]
    if first >= usual:
        raise InputError(
            f"sampling.first_chunk_frames={first}: with {name}={share} it must be below {usual}, the first chunk of a "
            f"rollout of {shortest} latents" + (" after its picture" if apart else "")
        )
    if pictured and not apart and first == 1:
        raise InputError(
            "sampling.first_chunk_frames=1: with train.image_probability above 0 a picture that is pinned is all of "
            "such a chunk; make it at least 2, or set sampling.image_first=absorb"
        )
    if config.trainer == "longsana" and not config.streaming.train_first_chunk:
        raise InputError(
            f"{name}={share}: with streaming.train_first_chunk=false first chunks have no loss; leave one of them out"
        )


def _check_distillation(config: TrainingConfig) -> None:
    rollout, settings = config.rollout, config.distillation
    shortest, longest, chunk = (
        rollout.min_num_training_frames,
        rollout.num_training_frames,
        config.sampling.chunk_frames,
    )
    if shortest > longest or (longest - shortest) % chunk:
        raise InputError(
            f"rollout.min_num_training_frames={shortest}: must be rollout.num_training_frames={longest} or less by a "
            f"multiple of sampling.chunk_frames={chunk}"
        )
    _check_score(config, "fake_score")
    if rollout.overlap_latents > chunk:
        raise InputError(
            f"rollout.overlap_latents={rollout.overlap_latents}: must be 0 to sampling.chunk_frames={chunk}"
        )
    if settings.min_timestep > settings.max_timestep:
        raise InputError(
            f"distillation.min_timestep={settings.min_timestep}: must be at most distillation.max_timestep="
            f"{settings.max_timestep}"
        )


def _check_score(config: TrainingConfig, name: Literal["real_score", "fake_score"]) -> None:
    score: ModelConfig = getattr(config, name)
    empty_model(score)
    causal = config.trainer == "consistency" and config.consistency.causal_teacher
    for key, value in chosen_past(score).items():
        if value != LEARNED and not causal:  # that says what is in the weights
            raise InputError(f"{name}.{key}={value}: has no meaning; a score sees a clip at once, without a past")
    for key in ("in_channels", "caption_channels", "caption_length"):
        if getattr(score, key) != getattr(config.model, key):
            raise InputError(
                f"{name}.{key}={getattr(score, key)}: must be that of the generator, model.{key}="
                f"{getattr(config.model, key)}: both see the same latents and captions"
            )


def _of_other_trainers(config: TrainingConfig) -> Iterator[tuple[str, Any, Any]]:
    """Settings of sections that this trainer has no use for, where they are not the default."""
    defaults = flat(dataclasses.asdict(TrainingConfig()))
    for setting, value in flat(dataclasses.asdict(config)).items():
        if not means_something(setting, config.trainer) and value != defaults[setting]:
            yield setting, value, defaults[setting]


def check_sources(config: TrainingConfig, *, visualize: bool = True) -> None:
    """Make sure that every file the run starts from is there and, as far as headers tell, whole and of its kind.

    Those on the hub are fetched now.

    visualize: validation is wanted, and so its prompts.

    Raises:
        InputError: one is not, by the setting that names it.
    """
    distilling, generated = config.trainer in DISTILLING, config.data.data_path.startswith(GENERATED)
    check_weights(config, fetch=True, encodes=distilling or generated)
    if config.trainer in TAUGHT:
        check_network(config.real_score, "real_score.load_from", fetch=True)
    if distilling:
        check_network(config.fake_score, "fake_score.load_from", fetch=True)
        pictures = config.train.image_probability > 0
        training_prompts(config.data.data_path, pictures=pictures)
        switch_prompts(config)
        if pictures:
            _read_pictures(config)
    elif not generated:
        locate(config.data.data_path, "data.data_path")
    if visualize and config.validation.vis_interval:
        validation_prompts(config)


def _read_pictures(config: TrainingConfig) -> None:
    """Decode every picture once, in threads: one that is broken would end the run when its prompt's turn comes."""
    sampling = config.sampling

    def fault(picture: Pictured) -> str | None:
        try:
            read_picture(picture.path, sampling.height, sampling.width, sampling.image_fit)
        except InputError as error:
            return f"{picture.where}: {error}"
        return None

    with warnings.catch_warnings(), ThreadPoolExecutor() as pool:  # the filters that threads leave are put back
        for told in pool.map(fault, training_pictures(config.data.data_path)):
            if told is not None:
                pool.shutdown(wait=False, cancel_futures=True)
                raise InputError(told)


def check_data(config: TrainingConfig) -> None:
    """Make sure that clips or trajectories are whole, and of the shape and noise levels that the config asks for.

    Clips must be of its kind of VAE and its frame rate too. Digests are compared later, by the main process: by the
    stage, and the VAE's by `check_vae_of_clips`. An LMDB has none, so all of its entries are looked at.

    Raises:
        InputError: they are not.
    """
    if config.trainer in DISTILLING or config.data.data_path.startswith(GENERATED):
        return
    path = locate(config.data.data_path, "data.data_path")
    if config.trainer == "ode":
        trajectories = open_trajectories(path, shape=clip_shape(config), digests=(path / DATA).is_file())
        check_grid(trajectories.sigmas, student_sigmas(config))
    else:
        open_clips(str(path), shape=clip_shape(config), made_by=clips_made_by(config), digests=False)


def check_vae_of_clips(config: TrainingConfig) -> None:
    """Make sure that a folder of clips was encoded with the VAE that the config names, whose SHA-256 is remembered.

    Where a tiny decoder shows the videos, the VAE is not read and need not be there: that it is not compared is said.

    Raises:
        InputError: it was encoded with another one.
    """
    path = config.data.data_path
    if config.trainer in ("ode", *DISTILLING) or path.startswith(GENERATED):
        return
    if not uses_vae(config.vae, encodes=False):
        log.warning("%s: vae.vae_pretrained is not compared: vae.decoder=%s is used alone", path, config.vae.decoder)
        return
    made_by = {"vae.vae_pretrained": source_digest(config, "vae")}
    ClipFolder(locate(path, "data.data_path"), made_by, digests=False)


def clips_made_by(config: TrainingConfig) -> dict[str, Any]:
    """List the settings that clips in a folder must have been made with, and that can be told without a file."""
    return {"vae.vae_type": config.vae.vae_type, "sampling.fps": config.sampling.fps}


def clip_shape(config: TrainingConfig) -> tuple[int, int, int, int]:
    """(C, T, H, W) of the latents that are trained on."""
    height, width = geometry(config.vae).latent_size(config.sampling.height, config.sampling.width)
    return config.model.in_channels, config.rollout.num_training_frames, height, width


def student_sigmas(config: TrainingConfig) -> list[float]:
    """The noise level of each of the student's steps, then 0."""
    schedule = FlowSchedule.from_config(config.scheduler)
    return [*schedule.sigma(torch.tensor(schedule.steps, dtype=torch.int64, device="cpu")).tolist(), 0.0]


def switch_prompts(config: TrainingConfig) -> list[str]:
    """The prompts that streams switch to, one for each of the run's; none without a switch file.

    Raises:
        InputError: the file cannot be read, or its lines are not those of the run's prompts.
    """
    path = config.streaming.switch_prompt_path
    if path is None:
        return []
    return aligned_prompts(path, "streaming.switch_prompt_path", config.data.data_path)


def validation_prompts(config: TrainingConfig) -> list[Prompt]:
    """The prompts that validation samples, from the top of their file.

    Raises:
        InputError: there are too few, or one asks for another size or length than its videos have, or a picture that
            cannot be had.
    """
    sampling, settings = config.sampling, config.validation
    path = locate(settings.val_data_path, "validation.val_data_path")
    # No table of sizes: all videos have the size that is trained.
    prompts = read_prompts(path, height=sampling.height, width=sampling.width, aspect_ratio_type="none", pictures=True)
    if settings.val_samples > len(prompts):
        raise InputError(
            f"validation.val_samples={settings.val_samples}: must be 1 to {len(prompts)}, the prompts in {path}; "
            "validation.vis_interval=0 turns validation off"
        )
    prompts = prompts[: settings.val_samples]
    for prompt in prompts:
        if prompt.frames is not None:
            raise InputError(
                f"{place(path, prompt.line)}: the field frames has no meaning in validation, whose videos have "
                "validation.vis_video_lengths; remove it"
            )
        if (prompt.height, prompt.width) != (sampling.height, sampling.width):
            raise InputError(
                f"{place(path, prompt.line)}: asks for {prompt.height}x{prompt.width}; validation samples the size "
                f"that is trained, {sampling.height}x{sampling.width}; remove the field"
            )
        try:
            for picture in prompt.pictures.values():
                check_picture_sampler(config)
                read_picture(picture, prompt.height, prompt.width, sampling.image_fit)
        except InputError as error:
            raise InputError(f"{place(path, prompt.line)}: {error}") from error
    return prompts


def micro_batches_of(config: TrainingConfig, world: World) -> MicroBatches:
    """The micro-batches of this run, from the batch sizes and the number of processes.

    Raises:
        InputError: train.total_batch_size cannot be made of them; the message names the nearest that can.
    """
    train = config.train
    once, total, given = train.batch_size * world.size, train.total_batch_size, train.gradient_accumulation_steps
    if total is None:
        return MicroBatches.of(world, given or 1)
    step = once * (given or 1)
    if total < step or total % step or (given is not None and total != step):
        if given is not None:
            valid = f"{step}"
        else:
            below = total - total % step
            valid = f"{below} and {below + step}" if below >= step else f"{step}"
        raise InputError(
            f"train.total_batch_size={total}: {world.size} processes of train.batch_size={train.batch_size}"
            + (f" with {given} accumulation steps" if given is not None else "")
            + f" cannot make it; the nearest that they can: {valid}"
        )
    return MicroBatches.of(world, total // once)


def same_layers(config: TrainingConfig, targets: Sequence[str]) -> bool:
    """Tell whether these targets of a LoRA mean the layers that the config's mean, in all networks that learn.

    Raises:
        InputError: one of them means no layer.
    """
    learning = [empty_model(network) for role, network in config.networks.items() if role != "teacher"]
    return all(
        targeted(model, targets, TARGETS) == targeted(model, config.train.lora.targets, TARGETS) for model in learning
    )


def check_same_run(config: TrainingConfig, saved: Path) -> list[str]:
    """List what this config changes of a logdir's run, as `setting: old -> new`; settings in FREE may.

    A setting that the saved file does not say is one that its version did not have. What it did then is not known, so
    it is listed too, unless this trainer has no use for it.

    Raises:
        InputError: the saved file is no config of this version.
    """
    old: TrainingConfig = load_config(saved, schema=TrainingConfig)
    said = flat(yaml.safe_load(saved.read_text(encoding="utf-8")))
    before, now = flat(dataclasses.asdict(old)), flat(dataclasses.asdict(config))
    changes = []
    for setting, value in now.items():
        if setting.startswith(FREE):
            continue
        if setting not in said and means_something(setting, config.trainer):
            changes.append(f"{setting}: not said -> {value}")
        elif before[setting] != value and not (setting == TARGETS and same_layers(config, before[setting])):
            changes.append(f"{setting}: {_written(before[setting])} -> {_written(value)}")
    return changes


def _written(value: Any) -> Any:
    """A value as a config has it."""
    return f"[{','.join(map(str, value))}]" if isinstance(value, list | tuple) else value


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by their dotted names."""
    leaves: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            leaves |= flat(value, f"{prefix}{key}.")
        else:
            leaves[prefix + key] = value
    return leaves
