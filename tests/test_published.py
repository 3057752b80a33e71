"""YAMLs of the published code run as they are: keys and values as published, the files our own (docs/published.md)."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import logging
from pathlib import Path
from typing import Any

import diffusers
import pytest
import yaml

from longsana.config import InferenceConfig, leaf_keys, load_config
from longsana.encoders.geometry import GEOMETRIES
from longsana.encoders.text import complex_human_instruction, published_negative_prompt
from longsana.published import DISTILLED, INFERENCE, STRIDES, Context, Refused
from longsana.runtime.errors import InputError
from longsana.sampling.checks import check_config
from longsana.training.checks import check_training, flat
from longsana.training.config import TrainingConfig
from longsana.training.published import DISTILLING, TRAINING

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "configs/sana_video_config"
HUB = "hf://Efficient-Large-Model"
BASE_480 = f"{HUB}/SANA-Video_2B_480p/checkpoints/SANA_Video_2B_480p.pth"
BASE_720 = f"{HUB}/SANA-Video_2B_720p/checkpoints/SANA_Video_2B_720p.pth"
LONGLIVE = f"{HUB}/SANA-Video_2B_480p_LongLive/checkpoints/SANA_Video_2B_480p_LongLive.pth"
ODE = f"{HUB}/LongSANA_2B_480p_ode/checkpoints/LongSANA_2B_480p_ode.pt"
SELF_FORCING = f"{HUB}/LongSANA_2B_480p_self_forcing/checkpoints/LongSANA_2B_480p_self_forcing.pt"
NAMES = {
    "base": "Sana_2000M_480px_AdamW_fsdp.yaml",
    "longsana": "Sana_2000M_480px_adamW_fsdp_longsana.yaml",
    "720p": "Sana_2000M_720px_ltx2vae_AdamW_fsdp.yaml",
    "chunk": "Sana_2000M_480px_AdamW_fsdp_chunk.yaml",
}
PARTS = inspect.signature(diffusers.SanaPipeline.__call__).parameters["complex_human_instruction"].default


def model_yaml(kind: str) -> dict[str, Any]:
    """One of the published model YAMLs."""
    size, table = (720, "ASPECT_RATIO_VIDEO_720_MS_DIV32") if kind == "720p" else (480, "ASPECT_RATIO_VIDEO_480_MS")
    attention, feed_forward, positions = {
        "longsana": ("cachedcausal", "CachedGLUMBConvTemp", "casual_wan_rope"),
        "chunk": ("chunkcausal", "ChunkGLUMBConvTemp", "wan_rope"),
    }.get(kind, ("LiteLAReLURope", "GLUMBConvTemp", "wan_rope"))
    content: dict[str, Any] = {
        "task": "t2v",
        "data": {
            "type": "SanaZipDataset",
            "data_dir": {"video_toy_data": "data/video_toy_data"},
            "external_caption_suffixes": ["_Qwen2.5-VL"],
            "caption_proportion": {"prompt": 5, "_Qwen2_5-VL": 95},
            "external_data_filter": {"video_toy_data": {"_unimatch": {"min": 1.0, "max": 30}}},
            "motion_score_cal_type": "average",
            "motion_score_file_thres": {"_unimatch": None},
            "image_size": size,
            "aspect_ratio_type": table,
            "num_frames": 40 if kind == "longsana" else 81,
            "transform": "default_train_video",
            **dict.fromkeys(("load_text_feat", "load_vae_feat", "resample_fps", "shuffle_dataset"), False),
        },
        "image_data": {"type": "SanaWebDatasetMS", "data_dir": ["data/toy_data"], "clip_thr": 25.0, "image_size": size},
        "model": {
            "model": f"SanaMSVideo_2000M_P{1 if kind == '720p' else 2}_D20",
            "image_size": size,
            "aspect_ratio_type": table,
            "mixed_precision": "bf16",
            "fp32_attention": True,
            "load_from": {"longsana": LONGLIVE, "720p": BASE_720}.get(kind, BASE_480),
            "attn_type": attention,
            "ffn_type": feed_forward,
            "pos_embed_type": positions,
            "mlp_acts": ["silu", "silu", None],
            "mlp_ratio": 3,
            "linear_head_dim": 112,
            "t_kernel_size": 3,
            "class_dropout_prob": 0.1,
            **dict.fromkeys(("use_pe", "qk_norm", "cross_norm", "multi_scale"), True),
        },
        "vae": {
            "vae_type": "LTX2VAE_diffusers" if kind == "720p" else "WanVAE",
            "vae_pretrained": "Lightricks/LTX-2" if kind == "720p" else f"{HUB}/SANA-Video_2B_480p/vae/Wan2.1_VAE.pth",
            "weight_dtype": "bfloat16" if kind == "720p" else "float32",
            "vae_latent_dim": 128 if kind == "720p" else 16,
            "vae_downsample_rate": 32 if kind == "720p" else 8,
            "vae_stride": [8, 32, 32] if kind == "720p" else [4, 8, 8],
            "if_cache": False,
        },
        "text_encoder": {
            "text_encoder_name": "gemma-2-2b-it",
            "y_norm": True,
            "y_norm_scale_factor": 0.01,
            "model_max_length": 300,
            "chi_prompt": [part.replace("'", '"') for part in PARTS],
        },
        "scheduler": {
            "predict_flow_v": True,
            "noise_schedule": "linear_flow",
            "pred_sigma": False,
            "flow_shift": 3.0,
            "inference_flow_shift": 8.0 if kind == "720p" else 7.0,
            "weighting_scheme": "logit_normal",
            "logit_mean": 0.0,
            "logit_std": 1.0,
            "vis_sampler": {"longsana": "longlive_flow_euler", "chunk": "chunk_flow_euler"}.get(
                kind, "flow_dpm-solver"
            ),
        },
        "train": {
            "use_fsdp": True,
            "num_workers": 10,
            "seed": 1,
            "train_batch_size": 1,
            "train_batch_size_image": 4,
            "num_epochs": 10,
            "save_model_epochs": 5,
            "save_model_steps": 500,
            "gradient_accumulation_steps": 1,
            "grad_checkpointing": True,
            "gradient_clip": 0.1,
            "optimizer": {"type": "AdamW", "lr": 5e-5, "betas": [0.9, 0.999], "eps": 1e-10, "weight_decay": 0.0},
            "lr_schedule": "constant",
            "lr_schedule_args": {"num_warmup_steps": 500},
            "validation_prompts": ["a", "b"],
            "work_dir": "output/debug",
            "joint_training_interval": 10,
            "visualize": True,
        },
    }
    if kind == "longsana":
        content |= {"sampling_algo": "longlive_flow_euler", "cfg_scale": 1.0}
    if kind == "chunk":
        content["model"]["chunk_index"] = [0, 11]
    return content


def stage_yaml(trainer: str) -> dict[str, Any]:
    """One of the published stage YAMLs."""
    folder = "configs/sana_video_config"
    content: dict[str, Any] = {
        "trainer": trainer,
        "distribution_loss": "ode" if trainer == "ode" else "dmd_sana",
        "sana_config": f"{folder}/{NAMES['chunk' if trainer == 'ode' else 'longsana']}",
        "generator_ckpt": {"ode": BASE_480, "self_forcing": ODE, "longsana": SELF_FORCING}[trainer],
        **{f"{name}_fsdp_wrap_strategy": "size" for name in ("generator", "real_score", "fake_score", "text_encoder")},
        "denoising_step_list": [1000, 960, 889, 727, 0],
        "warp_denoising_step": False,
        "ts_schedule": False,
        "num_train_timestep": 1000,
        "timestep_shift": 7.0 if trainer == "ode" else 5.0,
        "mixed_precision": True,
        "seed": 0,
        "wandb_key": None,
        "wandb_entity": None,
        "wandb_project": "self-forcing-sana",
        "sharding_strategy": "full",
        "lr": 2e-5 if trainer == "ode" else 1e-5,
        "beta1": 0.9 if trainer == "ode" else 0.0,
        "beta2": 0.999,
        "data_path": "output/LongSANA" if trainer == "ode" else "data/longsana/vidprom_filtered_extended.txt",
        "val_data_path": "data/longsana/vidprom_filtered_extended.txt",
        "batch_size": 1,
        "val_batch_size": 1,
        "total_batch_size": None if trainer == "ode" else 64,
        "log_iters": 100 if trainer == "self_forcing" else 200,
        "motion_score": 10,
        "negative_prompt": published_negative_prompt(),
        "image_or_video_shape": [1, 261 if trainer == "longsana" else 21, 16, 60, 104],
        "gradient_checkpointing": True,
        "load_raw_video": False,
        "model_kwargs": {"timestep_shift": 7.0, "local_attn_size": 21},
        "vis_interval": 100 if trainer == "self_forcing" else 200,
        "vis_video_lengths": [261] if trainer == "longsana" else [21],
        "num_training_frames": 21,
        "num_frame_per_block": 10,
    }
    if trainer == "ode":
        return content | {
            "model_name": "SANA",
            "sana_inference_config": f"{folder}/{NAMES['longsana']}",
            "gradient_accumulation_steps": 1,
            "max_checkpoints": 50,
            "max_iters": 10000,
            "slice_last_frames": 21,
            "independent_first_frame": False,
        }
    content |= {
        "sana_fake_config": f"{folder}/{NAMES['base']}",
        "real_name": "SANA",
        "fake_name": "SANA",
        "fake_ckpt": BASE_480,
        "guidance_scale": 3.0,
        "denoising_loss_type": "flow",
        "lr_critic": 2e-6,
        "beta1_critic": 0.0,
        "beta2_critic": 0.999,
        "ema_weight": 0.99,
        "ema_start_step": 200,
        "negative_prompt_real": published_negative_prompt(),
        "dfake_gen_update_ratio": 5,
        "vis_ema": False,
        "min_num_training_frames": 21,
        "num_chunks_per_clip": 2,
        "student_max_frame": 261 if trainer == "longsana" else 21,
    }
    if trainer == "self_forcing":
        return content
    return content | {
        "sana_inference_config": f"{folder}/{NAMES['longsana']}",
        "real_ckpt": BASE_480,
        "max_checkpoints": 300,
        "max_iters": 30000,
        "slice_last_frames": 21,
        "streaming_training": True,
        "streaming_chunk_size": 21,
        "streaming_max_length": 261,
        "streaming_min_new_frame": 20,
        "train_first_chunk": True,
        "last_step_only": False,
        "update_kv_cache_by_end": False,
        "train_vis_interval": 100,
        "train_vis_rank": 1,
    }


@pytest.fixture
def theirs(tmp_path: Path) -> Path:
    """A folder laid out as their repository, with its model YAMLs."""
    folder = tmp_path / "theirs/configs/sana_video_config"
    folder.mkdir(parents=True)
    for kind, name in NAMES.items():
        (folder / name).write_text(yaml.safe_dump(model_yaml(kind)))
    return folder


def write(path: Path, content: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(content))
    return path


def differences(ours: Any, theirs: Any) -> dict[str, tuple[Any, Any]]:
    """Settings that differ, as (ours, theirs)."""
    mine, other = flat(dataclasses.asdict(ours)), flat(dataclasses.asdict(theirs))
    return {key: (mine[key], other[key]) for key in mine if mine[key] != other[key]}


# The published commands -----------------------------------------------------------------------------------------------

WEIGHTS = {"model.dtype": ("auto", "bfloat16"), "vae.weight_dtype": ("auto", "float32")}
"""Ours follow the device; theirs say it."""
DECODED = {"vae.latents_per_call": (2, 1)}
"""A setting of speed that the published code does not have."""
BASE_FLAGS = ["scheduler.inference_flow_shift=8", "sampling.motion_score=30", "sampling.cfg_scale=6"]


@pytest.mark.parametrize(
    ("kind", "flags", "stated"),
    [
        ("base", BASE_FLAGS, WEIGHTS),
        ("longsana", ["sampling.cfg_scale=1.0", "sampling.num_frames=961"], WEIGHTS | DECODED),
        ("720p", BASE_FLAGS, {"model.dtype": ("auto", "bfloat16"), "vae.weight_dtype": ("auto", "bfloat16")}),
        ("chunk", BASE_FLAGS, WEIGHTS),
    ],
)
def test_inference_from_their_model_yaml_is_that_from_ours(
    kind: str, flags: list[str], stated: dict[str, Any], theirs: Path
) -> None:
    ours = load_config(CONFIGS / NAMES[kind], flags)
    loaded = load_config(theirs / NAMES[kind], flags)
    assert differences(ours, loaded) == stated
    check_config(loaded)


SCORES = {f"{score}.dtype": ("auto", "bfloat16") for score in ("real_score", "fake_score")}
TRAINED = {
    **WEIGHTS,
    **DECODED,
    "wandb.project": ("longsana", "self-forcing-sana"),
    "validation.val_data_path": (
        "asset/samples/longsana_val.txt",
        "data/longsana/vidprom_filtered_extended.txt",
    ),
}


@pytest.mark.parametrize(
    ("trainer", "stated"),
    [
        ("ode", {**TRAINED, "train.gradient_accumulation_steps": (None, 1)}),
        ("self_forcing", {**TRAINED, **SCORES, "train.max_checkpoints": (10, 3)}),
        ("longsana", {**TRAINED, **SCORES, "train.max_checkpoints": (10, 300)}),
    ],
)
@pytest.mark.parametrize("where", ["beside", "repository"])
def test_training_from_their_stage_yaml_is_that_from_ours(
    trainer: str, stated: dict[str, Any], where: str, theirs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Model YAMLs are theirs, found from the working directory, or, in an empty one, ours of the same name."""
    monkeypatch.chdir(theirs.parents[1] if where == "beside" else tmp_path)
    loaded = load_config(write(tmp_path / "stage.yaml", stage_yaml(trainer)), (), TrainingConfig)
    ours = load_config(CONFIGS / f"longsana/480ms/{trainer}.yaml", (), TrainingConfig)
    if where == "repository":
        stated = {key: values for key, values in stated.items() if key not in WEIGHTS | SCORES | DECODED}
        if trainer == "ode":  # the block-causal YAML decodes latent by latent
            stated |= DECODED
    assert differences(ours, loaded) == stated
    check_training(loaded)


def test_their_commands_run(theirs: Path, tmp_path: Path) -> None:
    from tests.scripts import load_script

    inference = load_script(ROOT / "inference_video_scripts/inference_sana_video.py")
    request = inference.prepare(
        f"--config={theirs / NAMES['longsana']} --model_path=seeded:0 --cfg_scale=1.0 --num_frames 81 "
        "--dataset=samples --txt_file=asset/samples/video_prompts_samples.txt".split()
    )
    assert request.config.sampling.chunk_frames == 10
    training = load_script(ROOT / "train_video_scripts/train_longsana.py")
    stage = write(tmp_path / "stage.yaml", stage_yaml("self_forcing"))
    assert training.main(["--config_path", str(stage), "--dry_run", "--max_iters=10", "--disable-wandb"]) == 0


# Single keys ----------------------------------------------------------------------------------------------------------


def changed(kind: str, **changes: Any) -> dict[str, Any]:
    """A model YAML with other values, given as section__key."""
    content = copy.deepcopy(model_yaml(kind))
    for name, value in changes.items():
        section, _, key = name.rpartition("__")
        place = content.setdefault(section, {}) if section else content
        if value is ...:
            place.pop(key, None)
        else:
            place[key] = value
    return content


@pytest.mark.parametrize(
    ("kind", "changes", "expected"),
    [
        ("longsana", {"data__num_frames": 20}, {"sampling.chunk_frames": 5, "sampling.num_frames": 81}),
        ("base", {"data__num_frames": 41}, {"sampling.chunk_frames": 10, "sampling.num_frames": 41}),
        ("chunk", {"data__num_frames": 40}, {"sampling.chunk_frames": 10, "sampling.num_frames": 81}),
        ("chunk", {"model__chunk_index": [0, 6, 11, 16]}, {"sampling.chunk_frames": 5}),
        ("chunk", {"model__chunk_index": None, "data__num_frames": 20}, {"sampling.chunk_frames": 5}),
        ("base", {"data__image_size": 720, "data__aspect_ratio_type": "none"}, {"sampling.height": 704}),
        ("base", {"scheduler__inference_flow_shift": ...}, {"scheduler.inference_flow_shift": 3.0}),
        ("base", {"flow_shift": 5.0, "scheduler__inference_flow_shift": ...}, {"scheduler.inference_flow_shift": 5.0}),
        ("base", {"sampling_algo": "flow_euler"}, {"scheduler.sampling_algo": "flow_euler"}),
        ("base", {"sampling_algo": "flow_euler_ltx"}, {"scheduler.sampling_algo": "flow_euler"}),
        ("base", {"task": "ltx"}, {"scheduler.sampling_algo": "flow_euler"}),
        ("longsana", {"sampling_algo": "self_forcing_flow_euler"}, {"scheduler.sampling_algo": "longlive_flow_euler"}),
        ("base", {"model__mixed_precision": "fp16"}, {"model.dtype": "float16"}),
        ("base", {"text_encoder__chi_prompt": []}, {"text_encoder.chi_prompt": "none"}),
        ("base", {"text_encoder__chi_prompt": None}, {"text_encoder.chi_prompt": "none"}),
        ("base", {"text_encoder__chi_prompt": ["Say more:", "x "]}, {"text_encoder.chi_prompt": "Say more:\nx "}),
        ("base", {"text_encoder__model_max_length": 120}, {"model.caption_length": 120}),
        ("base", {}, {"sampling.cfg_scale": 6.0, "text_encoder.chi_prompt": "sana"}),
        ("base", {"cfg_scale": 4.5}, {"sampling.cfg_scale": 4.5}),
        ("base", {"sampling": {"cfg_scale": 2.5}}, {"sampling.cfg_scale": 2.5}),
    ],
)
def test_a_key_that_has_a_home_is_taken_over(
    kind: str, changes: dict[str, Any], expected: dict[str, Any], tmp_path: Path
) -> None:
    config = load_config(write(tmp_path / "theirs.yaml", changed(kind, **changes)))
    found = flat(dataclasses.asdict(config))
    assert {key: found[key] for key in expected} == expected


def test_the_command_line_takes_their_keys(theirs: Path) -> None:
    config = load_config(theirs / NAMES["longsana"], ["data.num_frames=20", "vae.weight_dtype=bfloat16"])
    assert (config.sampling.chunk_frames, config.vae.weight_dtype) == (5, "bfloat16")
    stage = ["lr=3e-6", "negative_prompt=a: dull, grey [picture]", "denoising_step_list=[1000,500]"]
    trained = load_config(CONFIGS / "longsana/480ms/self_forcing.yaml", stage, TrainingConfig)
    assert trained.optimizer.generator.lr == 3e-6
    assert trained.sampling.negative_prompt == "a: dull, grey [picture]"
    assert trained.scheduler.denoising_step_list == (1000, 500)


def test_their_yaml_as_a_base_of_ours(theirs: Path, tmp_path: Path) -> None:
    """For the base model's training: its section train is taken over too."""
    own = {"base": f"theirs/configs/sana_video_config/{NAMES['base']}", "trainer": "flow_matching"}
    path = write(tmp_path / "own.yaml", own | {"data": {"data_path": "clips"}, "sampling": {"num_frames": 161}})
    config = load_config(path, (), TrainingConfig)
    generator = config.optimizer.generator
    assert (generator.lr, generator.beta1, generator.beta2, generator.eps) == (5e-5, 0.9, 0.999, 1e-10)
    assert (generator.max_grad_norm, generator.num_warmup_steps, generator.weight_decay) == (0.1, 500, 0.0)
    assert (config.flow_matching.flow_shift, config.scheduler.inference_flow_shift) == (3.0, 7.0)
    assert (config.train.seed, config.train.log_iters, config.rollout.num_training_frames) == (1, 500, 21)
    assert config.sampling.num_frames == 161, "the own file goes over its base"
    check_training(config)


@pytest.mark.parametrize("place", ["beside", "working directory", "repository"])
def test_where_a_base_is_looked_up(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "yamls").mkdir()
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setattr("longsana.config.SHIPPED", tmp_path / "repository")
    places = {"repository": 3, "working directory": 2, "beside": 1}
    folders = {"repository": "repository", "working directory": "work", "beside": "yamls"}
    for name, folder in folders.items():
        if places[name] >= places[place]:
            (tmp_path / folder / "more").mkdir(parents=True, exist_ok=True)
            write(tmp_path / folder / "more/base.yaml", {"sampling": {"seed": places[name]}})
    path = write(tmp_path / "yamls/own.yaml", {"base": "more/base.yaml"})
    assert load_config(path).sampling.seed == places[place]


def test_files_beside_a_yaml_are_found(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a red ball\n")
    (tmp_path / "model.pth").write_bytes(b"")
    config = load_config(
        write(tmp_path / "own.yaml", {"sampling": {"txt_file": "prompts.txt"}, "vae": {"vae_pretrained": "no.pth"}})
    )
    assert (config.sampling.txt_file, config.vae.vae_pretrained) == (str(tmp_path / "prompts.txt"), "no.pth")
    stage = {"trainer": "ode", "generator_ckpt": "model.pth"}
    trained = load_config(write(tmp_path / "stage.yaml", stage), (), TrainingConfig)
    assert trained.model.load_from == str(tmp_path / "model.pth")


def test_what_changes_nothing_is_said_in_one_line(theirs: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        load_config(theirs / NAMES["base"])
    (said,) = [record.getMessage() for record in caplog.records]
    assert "\n" not in said
    for name in ("image_data.*", "train.*", "data.data_dir", "data.external_data_filter", "model.fp32_attention"):
        assert f" {name}," in said or said.endswith(name), name
    assert said.count("data.external_data_filter") == 1
    for name in ("data.image_size", "model.mixed_precision", "scheduler.vis_sampler", "vae.vae_latent_dim"):
        assert name not in said.replace("image_data", ""), "it has a home"
    caplog.clear()
    with caplog.at_level(logging.INFO):
        load_config(CONFIGS / NAMES["base"])
    assert not caplog.records


def test_what_cannot_be_honoured_is_said_all_at_once(tmp_path: Path) -> None:
    wrong = changed(
        "base",
        task="ti2v",
        model__attn_type="flash",
        model__mlp_acts=["relu", "silu", None],
        model__t_kernel_size=5,
        model__qk_norm=False,
        scheduler__vis_sampler="flow_heun",
        scheduler__pred_sigma=True,
        vae__vae_stride=[4, 16, 16],
        data__image_size=256,
    )
    with pytest.raises(InputError) as caught:
        load_config(write(tmp_path / "theirs.yaml", wrong))
    message = str(caught.value)
    assert "\n" not in message
    for part in (
        "task=ti2v: t2v, or ltx for prompts that name a picture",
        "model.attn_type=flash: ",
        "model.mlp_acts=['relu', 'silu', None]: ",
        "model.t_kernel_size=5: ",
        "model.qk_norm=False: ",
        "scheduler.vis_sampler=flow_heun: the samplers here are ",
        "scheduler.pred_sigma=True: ",
        "vae.vae_stride=[4, 16, 16]: for this vae.vae_type it is [4, 8, 8]",
        "data.image_size=256: write sampling.height and sampling.width",
    ):
        assert part in message, part


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"warp_denoising_step": True}, "write the timesteps themselves"),
        ({"wandb_key": "secret"}, "wandb login"),
        ({"distribution_loss": "ode"}, "trainer=longsana has the loss dmd_sana"),
        ({"streaming_chunk_size": 31}, "it is num_training_frames, 21"),
        ({"image_or_video_shape": [1, 99, 16, 60, 104]}, "streaming_max_length is 261, and the shape says 99"),
        ({"context_noise": 10}, "rollout.noisy_absorb=true"),
        ({"fake_name": "Wan"}, "one network serves every role"),
        ({"generator_ckpt": None}, "there are no weights; give model.load_from"),
        ({"update_kv_cache_by_end": True}, "what the exit step gives is absorbed"),
    ],
)
def test_a_stage_that_cannot_be_honoured(changes: dict[str, Any], says: str, tmp_path: Path) -> None:
    path = write(tmp_path / "stage.yaml", stage_yaml("longsana") | changes)
    with pytest.raises(InputError) as caught:
        load_config(path, (), TrainingConfig)
    message = str(caught.value)
    assert says in message and next(iter(changes)) in message and "\n" not in message


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"switch_prompt_path": "b.txt"}, {"switch_prompt_path": "b.txt", "prompt_change": "recache=1"}),
        (
            {
                "switch_prompt_path": "b.txt",
                "switch_mode": "fixed",
                "fixed_switch_index": 41,
                "switch_choices": [21, 41],
            },
            {"switch_prompt_path": "b.txt", "fixed_switch_index": 41, "prompt_change": "recache=1"},
        ),
        (
            {"switch_prompt_path": "b.txt", "switch_mode": "random", "fixed_switch_index": 41},
            {"switch_prompt_path": "b.txt", "switch_mode": "random", "prompt_change": "recache=1"},
        ),
        (
            {"switch_prompt_path": "b.txt", "switch_mode": "random_choice", "switch_choices": [21, 101]},
            {
                "switch_prompt_path": "b.txt",
                "switch_mode": "random_choice",
                "switch_choices": (21, 101),
                "prompt_change": "recache=1",
            },
        ),
        (
            {"switch_prompt_path": "b.txt", "streaming": {"prompt_change": "rebuild=2"}},
            {"switch_prompt_path": "b.txt", "prompt_change": "rebuild=2"},
        ),
        ({"switch_prompt_path": None, "switch_mode": "random", "fixed_switch_index": 21, "switch_choices": []}, {}),
        ({"switch_mode": "random", "switch_choices": [21]}, {}),
    ],
)
def test_the_switch_file(keys: dict[str, Any], expected: dict[str, Any], tmp_path: Path) -> None:
    """Without a file the keys change nothing; those of another mode neither."""
    path = write(tmp_path / "stage.yaml", stage_yaml("longsana") | keys)
    config = load_config(path, (), TrainingConfig)
    check_training(config)
    plain = load_config(write(tmp_path / "plain.yaml", stage_yaml("longsana")), (), TrainingConfig)
    assert config.streaming == dataclasses.replace(plain.streaming, **expected)
    without = load_config(path, ["streaming.switch_prompt_path=null"], TrainingConfig)
    check_training(without)
    change = keys.get("streaming", {}).get("prompt_change", "keep")
    assert without.streaming == dataclasses.replace(plain.streaming, prompt_change=change)


def test_a_switch_file_may_lie_beside_its_yaml(tmp_path: Path) -> None:
    path = write(tmp_path / "stage.yaml", stage_yaml("longsana") | {"switch_prompt_path": "b.txt"})
    (tmp_path / "b.txt").write_text("a\n")
    assert load_config(path, (), TrainingConfig).streaming.switch_prompt_path == str(tmp_path / "b.txt")
    command = load_config(path, ["switch_mode=random_choice", "switch_choices=[41]"], TrainingConfig).streaming
    assert (command.switch_mode, command.switch_choices) == ("random_choice", (41,))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("switch_prompt_path", "b.txt"),
        ("switch_mode", "random"),
        ("fixed_switch_index", 21),
        ("switch_choices", [21]),
    ],
)
@pytest.mark.parametrize("trainer", ["ode", "self_forcing"])
def test_prompts_switch_in_one_stage_alone(trainer: str, key: str, value: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        load_config(write(tmp_path / "stage.yaml", stage_yaml(trainer) | {key: value}), (), TrainingConfig)
    assert f"{key}={value}: prompts switch in LongSANA's stage alone" in str(caught.value)
    assert "\n" not in str(caught.value)
    nothing = write(tmp_path / "nothing.yaml", stage_yaml(trainer) | {key: [] if key == "switch_choices" else None})
    load_config(nothing, (), TrainingConfig)


def test_no_weights_are_filled_on_the_command_line(tmp_path: Path) -> None:
    path = write(tmp_path / "theirs.yaml", changed("base", model__load_from=None))
    with pytest.raises(InputError, match=r"model\.load_from=None: there are no weights; .*--model_path"):
        load_config(path)
    assert load_config(path, ["model.load_from=mine.pth"]).model.load_from == "mine.pth"


@pytest.mark.parametrize("first", [True, False])
def test_the_order_of_keys_decides_nothing(first: bool, tmp_path: Path) -> None:
    content = model_yaml("base")
    content = {"flow_shift": 5.0, **content} if first else {**content, "flow_shift": 5.0}
    path = tmp_path / "theirs.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    assert load_config(path).scheduler.inference_flow_shift == 5.0
    assert load_config(path, ["scheduler.inference_flow_shift=6"]).scheduler.inference_flow_shift == 6.0
    stage = stage_yaml("self_forcing")
    stage = {"real_guidance_scale": 5.0, **stage} if first else {**stage, "real_guidance_scale": 5.0}
    path.write_text(yaml.safe_dump(stage, sort_keys=False))
    assert load_config(path, (), TrainingConfig).distillation.guidance_scale == 5.0


def test_two_keys_that_say_one_setting_are_refused(theirs: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"data\.num_frames and sampling\.num_frames both say sampling\.num_frames"):
        load_config(theirs / NAMES["base"], ["sampling.num_frames=41", "data.num_frames=81"])
    config = load_config(theirs / NAMES["base"], ["sampling.num_frames=41", "data.num_frames=41"])
    assert config.sampling.num_frames == 41
    twice = changed("chunk", model__chunk_index=[0, 21], data__num_frames=40)
    with pytest.raises(InputError, match=r"both say sampling\.chunk_frames"):
        load_config(write(tmp_path / "twice.yaml", twice))


def test_their_stage_yaml_as_a_base_of_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "stage.yaml", stage_yaml("longsana"))
    alone = load_config(tmp_path / "stage.yaml", (), TrainingConfig)
    based = load_config(write(tmp_path / "own.yaml", {"base": "stage.yaml", "max_iters": 5}), (), TrainingConfig)
    assert differences(alone, based) == {"train.max_iters": (30000, 5)}


def test_model_yamls_of_a_stage_may_be_given_on_the_command_line(theirs: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "stage.yaml", stage_yaml("self_forcing") | {"sana_config": "nowhere.yaml"})
    with pytest.raises(InputError, match=r"stage\.yaml: sana_config=nowhere\.yaml: no such config file \(.*, .*, .*\)"):
        load_config(path, (), TrainingConfig)
    own = changed("longsana", vae__weight_dtype="float16")
    config = load_config(path, [f"sana_config={write(tmp_path / 'mine.yaml', own)}"], TrainingConfig)
    assert config.vae.weight_dtype == "float16"
    for name in (5, ["a"]):
        with pytest.raises(InputError, match="expected the name of a config file"):
            load_config(write(path, stage_yaml("self_forcing") | {"sana_config": name}), (), TrainingConfig)


def test_which_model_yamls_are_taken_is_said(theirs: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write(theirs.parents[1] / "stage.yaml", stage_yaml("longsana"))
    with caplog.at_level(logging.INFO):
        load_config(path, (), TrainingConfig)
    *named, nothing = caplog.messages
    assert named == [
        f"{key}: {theirs / NAMES[kind]}"
        for key, kind in (
            ("sana_config", "longsana"),
            ("sana_inference_config", "longsana"),
            ("sana_fake_config", "base"),
        )
    ]
    assert nothing.startswith(f"{path}: these published settings change nothing here: ")
    assert nothing.count("model.fp32_attention") == nothing.count("image_data.*") == 1


def test_sizes_of_another_vae(theirs: Path, tmp_path: Path) -> None:
    stage = stage_yaml("self_forcing") | {
        "sana_config": str(theirs / NAMES["720p"]),
        "sana_fake_config": str(theirs / NAMES["720p"]),
        "image_or_video_shape": [1, 21, 128, 22, 40],
    }
    config = load_config(write(tmp_path / "stage.yaml", stage), (), TrainingConfig)
    assert (config.sampling.height, config.sampling.width, config.real_score.in_channels) == (704, 1280, 128)


@pytest.mark.parametrize(
    ("attention", "causal"), [("chunkcausal", True), ("cachedcausal", True), ("LiteLAReLURope", False)]
)
def test_a_causal_base_trains_causally(attention: str, causal: bool, tmp_path: Path) -> None:
    theirs = changed("chunk", model__attn_type=attention, train__chunk_sampling_strategy="uniform")
    write(tmp_path / "theirs.yaml", theirs)
    own = {"base": "theirs.yaml", "trainer": "flow_matching", "data": {"data_path": "clips"}}
    flow = load_config(write(tmp_path / "own.yaml", own), (), TrainingConfig).flow_matching
    assert (flow.causal, flow.chunk_sampling_strategy) == (causal, "uniform")


def test_a_base_trains_with_a_picture_first(tmp_path: Path) -> None:
    """A key of its training alone: it changes nothing elsewhere, and noise on the picture is refused by name."""
    theirs = write(tmp_path / "theirs.yaml", changed("chunk", train__ltx_image_condition_prob=0.9))
    own = write(tmp_path / "own.yaml", {"base": "theirs.yaml", "trainer": "flow_matching", "data": {"data_path": "a"}})
    config = load_config(own, (), TrainingConfig)
    check_training(config)
    assert config.train.image_probability == 0.9
    half = load_config(own, ["train.ltx_image_condition_prob=0.5"], TrainingConfig)
    assert half.train == dataclasses.replace(config.train, image_probability=0.5)
    load_config(theirs)
    for noise in ("0", "0.0", "null"):
        load_config(own, [f"train.noise_multiplier={noise}"], TrainingConfig)
    with pytest.raises(InputError, match=r"train\.noise_multiplier=0\.1: a picture first is clean"):
        load_config(own, ["train.noise_multiplier=0.1"], TrainingConfig)


def test_float32_in_a_base_yaml_is_float32_in_training(tmp_path: Path) -> None:
    write(tmp_path / "theirs.yaml", changed("base", model__mixed_precision="fp32"))
    own = {"base": "theirs.yaml", "trainer": "flow_matching", "data": {"data_path": "clips"}}
    config = load_config(write(tmp_path / "own.yaml", own), (), TrainingConfig)
    assert (config.model.dtype, config.train.mixed_precision) == ("float32", False)


def test_weights_of_a_stage_stand_in_for_those_of_its_model_yamls(tmp_path: Path) -> None:
    write(tmp_path / "model.yaml", changed("longsana", model__load_from=None))
    stage = stage_yaml("longsana") | dict.fromkeys(("sana_config", "sana_fake_config"), "model.yaml")
    config = load_config(write(tmp_path / "stage.yaml", stage), (), TrainingConfig)
    assert (config.model.load_from, config.real_score.load_from) == (SELF_FORCING, BASE_480)
    with pytest.raises(InputError, match=r"model\.yaml: model\.load_from=None: there are no weights"):
        load_config(write(tmp_path / "stage.yaml", stage | {"generator_ckpt": None}), (), TrainingConfig)


def test_a_stage_and_its_model_yamls_are_refused_together(tmp_path: Path) -> None:
    write(tmp_path / "model.yaml", changed("longsana", model__attn_type="flash", model__foo=1, vae__vae_type="DCAE"))
    stage = stage_yaml("longsana") | {"sana_config": "model.yaml", "warp_denoising_step": True}
    with pytest.raises(InputError) as caught:
        load_config(write(tmp_path / "stage.yaml", stage), (), TrainingConfig)
    for part in (
        "model.attn_type=flash: ",
        "unknown key model.foo",
        "vae.vae_type=DCAE: WanVAE or LTX2VAE_diffusers",
        "stage.yaml: warp_denoising_step=True: ",
    ):
        assert part in str(caught.value)


@pytest.mark.parametrize("override", [True, False])
def test_a_secret_is_never_shown(override: bool, tmp_path: Path) -> None:
    stage = stage_yaml("longsana") | ({} if override else {"wandb_key": "SECRET"})
    with pytest.raises(InputError, match=r"wandb_key=\.\.\.: log in") as caught:
        load_config(write(tmp_path / "stage.yaml", stage), ["wandb_key=SECRET"] if override else [], TrainingConfig)
    assert "SECRET" not in str(caught.value)


def test_the_section_train_of_a_model_yaml_is_its_trainers(tmp_path: Path) -> None:
    write(tmp_path / "theirs.yaml", changed("longsana"))
    own = {"base": "theirs.yaml", "trainer": "longsana", "data": {"data_path": "prompts.txt"}}
    config = load_config(write(tmp_path / "own.yaml", own), (), TrainingConfig)
    assert (config.train.seed, config.train.gradient_accumulation_steps) == (0, None)
    alone = write(tmp_path / "ours.yaml", {"trainer": "longsana", "train": {"seed": 3}})
    assert load_config(alone, (), TrainingConfig).train.seed == 3


def test_null_is_left_out(tmp_path: Path) -> None:
    nulls = changed(
        "base",
        scheduler__inference_flow_shift=None,
        vae__weight_dtype=None,
        model__mixed_precision=None,
        cfg_scale=None,
        flow_shift=None,
    )
    config = load_config(write(tmp_path / "theirs.yaml", nulls | {"image_data": {}, "sampling": {}}))
    assert (config.scheduler.inference_flow_shift, config.vae.weight_dtype, config.model.dtype) == (3.0, "auto", "auto")
    assert config.sampling.cfg_scale == 6.0
    stage = stage_yaml("longsana") | {"image_or_video_shape": None, "model_kwargs": None, "vis_interval": None}
    load_config(write(tmp_path / "stage.yaml", stage), (), TrainingConfig)
    load_config(write(tmp_path / "stage.yaml", stage | {"model_kwargs": {}}), (), TrainingConfig)


@pytest.mark.parametrize(
    ("kind", "expected"), [("base", "flow_dpm-solver"), ("chunk", "chunk_flow_euler"), ("longsana", DISTILLED)]
)
def test_a_yaml_that_names_no_sampler_has_its_attentions(kind: str, expected: str, tmp_path: Path) -> None:
    theirs = changed(kind, scheduler__vis_sampler=None, sampling_algo=None)
    config = load_config(write(tmp_path / "theirs.yaml", theirs))
    assert (config.scheduler.sampling_algo, config.sampling.cfg_scale) == (expected, 1.0 if kind == "longsana" else 6.0)


def test_another_sampler_on_the_command_line_has_its_guidance(theirs: Path) -> None:
    config = load_config(theirs / NAMES["base"], ["scheduler.vis_sampler=longlive_flow_euler"])
    assert (config.scheduler.sampling_algo, config.sampling.cfg_scale) == (DISTILLED, 1.0)


@pytest.mark.parametrize(("kind", "chunk", "frames"), [("longsana", 5, 81), ("chunk", 5, 81), ("base", 10, 21)])
def test_their_number_of_frames_on_our_yamls(kind: str, chunk: int, frames: int) -> None:
    """Ours say no attn_type; their samplers tell what it means."""
    config = load_config(CONFIGS / NAMES[kind], [f"data.num_frames={21 if kind == 'base' else 20}"])
    assert (config.sampling.chunk_frames, config.sampling.num_frames) == (chunk, frames)


def test_a_list_of_parts_on_the_command_line(theirs: Path) -> None:
    config = load_config(theirs / NAMES["base"], ['text_encoder.chi_prompt=["Say more:", "x "]'])
    assert config.text_encoder.chi_prompt == "Say more:\nx "


@pytest.mark.parametrize(
    ("trainer", "says"),
    [(None, "trainer=None: a config of training must say which stage"), ("wm_ode", "trainer=wm_ode: a config of")],
)
def test_a_stage_says_which_it_is(trainer: str | None, says: str, tmp_path: Path) -> None:
    path = write(tmp_path / "stage.yaml", stage_yaml("longsana") | {"trainer": trainer})
    with pytest.raises(InputError, match=says):
        load_config(path, (), TrainingConfig)


def test_a_stage_given_to_inference_is_told_where_it_belongs(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"a config of training \(trainer: ode\); it goes to .*--config_path"):
        load_config(write(tmp_path / "stage.yaml", stage_yaml("ode")))


def test_a_run_is_the_same_by_whatever_path_its_yaml_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "w.pth").write_bytes(b"")
    path = write(tmp_path / "own.yaml", {"model": {"load_from": "w.pth"}})
    monkeypatch.chdir(tmp_path)
    assert load_config("own.yaml") == load_config(path)


# Typing errors --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schema", "text", "offered"),
    [
        (InferenceConfig, "scheduler.flow_shif=3", "scheduler.flow_shift"),
        (InferenceConfig, "scheduler.infrence_flow_shift=3", "scheduler.inference_flow_shift"),
        (InferenceConfig, "model.class_dropout_prop=3", "model.class_dropout_prob"),
        (TrainingConfig, "train.max_iter=3", "train.max_iters"),
        (TrainingConfig, "data.data_pat=x", "data.data_path"),
        (InferenceConfig, "scheduler.shift=3", None),
        (InferenceConfig, "model.dropout=0.1", None),
        (InferenceConfig, "sampling.steps=20", None),
        (InferenceConfig, "data.num_fram=41", None),
        (InferenceConfig, "data.num_frmaes=41", "data.num_frames"),
        (InferenceConfig, "data.image_siz=41", "data.image_size"),
        (InferenceConfig, "modle.depth=2", "model.depth"),
        (InferenceConfig, "vae.vae_dtype=float32", None),
        (TrainingConfig, "max_score_timestep=3", None),
        (TrainingConfig, "generator_lr=3", None),
        (TrainingConfig, "save_interval=3", None),
        (TrainingConfig, "timesteps=3", None),
        (TrainingConfig, "data.path=x", None),
    ],
)
def test_no_setting_of_another_meaning_is_offered(schema: type, text: str, offered: str | None, tmp_path: Path) -> None:
    path = write(tmp_path / "own.yaml", {"trainer": "ode"} if schema is TrainingConfig else {})
    with pytest.raises(InputError) as caught:
        load_config(path, [text], schema)
    hint = f" (did you mean '{offered}'?)" if offered else f"unknown key {text.partition('=')[0]}"
    assert str(caught.value).endswith(hint)


@pytest.mark.parametrize("key", ["scheduler.flow_shift", "data.type", "model.class_dropout_prob"])
def test_their_keys_are_no_misspelt_ones_of_ours(key: str, tmp_path: Path) -> None:
    load_config(write(tmp_path / "own.yaml", {}), [f"{key}=0.5"])


# The tables -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schema", "published", "trainers"),
    [(InferenceConfig, INFERENCE, [None]), (TrainingConfig, TRAINING, ["ode", *DISTILLING, "flow_matching"])],
)
def test_every_home_exists(schema: type, published: Any, trainers: list[str | None]) -> None:
    known, reached = set(leaf_keys(schema)), set()
    values: list[Any] = [1, 81, True, 0.5, "bf16", "flow_euler", [0.9, 0.99], [1, 21, 16, 60, 104], [0, 11]]
    for key, rule in published.rules.items():
        for trainer in trainers:
            for value in values:
                try:
                    settings = rule(key, value, Context({"trainer": trainer}))
                except Refused:
                    continue
                assert set(settings) <= known, key
                reached |= set(settings)
    assert len(reached) > 10


def test_strides_are_those_of_the_vaes() -> None:
    assert {name: (vae.time_stride, vae.space_stride) for name, vae in GEOMETRIES.items()} == STRIDES


def test_their_instruction_is_ours() -> None:
    assert "\n".join(model_yaml("base")["text_encoder"]["chi_prompt"]) == complex_human_instruction()
