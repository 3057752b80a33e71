"""Bad input: one line, status 2, before anything is loaded."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from longsana.config import load_config
from longsana.runtime.distributed import World
from longsana.runtime.errors import InputError
from longsana.training.checks import check_device, check_same_run, check_sources, check_training, micro_batches_of
from longsana.training.config import TrainingConfig
from tests.training.conftest import ROOT

CONFIGS = sorted(
    path
    for path in (ROOT / "configs/sana_video_config/longsana").glob("*/*.yaml")
    if "trainer:" in path.read_text(encoding="utf-8")
)


SCORES = ("real_score", "fake_score")


def load(path: Path, *overrides: str) -> TrainingConfig:
    config: TrainingConfig = load_config(path, overrides, TrainingConfig)
    return config


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_config_that_ships_can_be_trained(path):
    check_training(load(path))


def test_the_published_stages_are_as_published():
    """Facts 9.2."""
    ode, forcing, stream = (
        load(ROOT / f"configs/sana_video_config/longsana/480ms/{name}.yaml")
        for name in ("ode", "self_forcing", "longsana")
    )
    assert [config.trainer for config in (ode, forcing, stream)] == ["ode", "self_forcing", "longsana"]
    for config in (ode, forcing, stream):
        assert config.scheduler.denoising_step_list[:4] == (1000, 960, 889, 727)
        assert config.scheduler.inference_flow_shift == 7.0
        assert config.sampling.chunk_frames == 10
        assert config.sampling.motion_score == 10
        assert config.rollout.num_training_frames == 21
        assert config.train.batch_size == 1
    assert (ode.optimizer.generator.lr, ode.optimizer.generator.beta1) == (2e-5, 0.9)
    for config in (forcing, stream):
        assert (config.optimizer.generator.lr, config.optimizer.critic.lr) == (1e-5, 2e-6)
        assert config.optimizer.generator.beta1 == config.optimizer.critic.beta1 == 0
        assert (config.distillation.timestep_shift, config.distillation.guidance_scale) == (5.0, 3.0)
        assert config.distillation.dfake_gen_update_ratio == 5
        assert (config.train.ema_weight, config.train.ema_start_step) == (0.99, 200)
        assert micro_batches_of(config, World(size=64)).accumulation == 1
    assert (stream.streaming.streaming_max_length, stream.streaming.streaming_min_new_frame) == (261, 20)
    assert [config.train.log_iters for config in (ode, forcing, stream)] == [200, 100, 200]


@pytest.mark.parametrize(
    ("trainer", "override", "words"),
    [
        ("longsana", "trainer=longsama", "longsama"),
        ("ode", "streaming.streaming_max_length=41", "belongs to longsana"),
        (
            "self_forcing",
            "streaming.switch_prompt_path=a.txt",
            "streaming.switch_prompt_path=a.txt: this is a config of",
        ),
        ("ode", "streaming.switch_mode=random", "streaming.switch_mode=random: this is a config of"),
        ("ode", "optimizer.critic.lr=3e-6", "belongs to self_forcing and longsana"),
        ("self_forcing", "flow_matching.causal=true", "belongs to flow_matching"),
        ("consistency", "real_score.caption_channels=32", "must be that of the generator"),
        (
            "consistency",
            "real_score.state_decay=0.9 consistency.causal_teacher=false",
            "real_score.state_decay=0.9: has no meaning",
        ),
        ("consistency", "fake_score.depth=3", "fake_score belongs to self_forcing and longsana"),
        ("ode", "consistency.num_steps=20", "consistency belongs to consistency"),
        (
            "consistency",
            "consistency.num_steps=900",
            "consistency.num_steps=900: with consistency.shift=8 some",
        ),
        ("flow_matching", "model.num_cached_blocks=2", "model.num_cached_blocks=2: has no meaning with flow_matching"),
        ("self_forcing", "real_score.caption_channels=32", "must be that of the generator"),
        ("self_forcing", "real_score.hidden_size=57", "must be a multiple"),
        ("self_forcing", "real_score.state_decay=0.9", "real_score.state_decay=0.9: has no meaning; a score sees"),
        ("longsana", "fake_score.num_cached_blocks=2", "fake_score.num_cached_blocks=2: has no meaning"),
        ("longsana", "model.state_decay=1.5", "state_decay=1.5: must be from 0"),
        ("longsana", "model.num_sink_blocks=1", "num_sink_blocks=1: has no meaning beside the whole past"),
        ("self_forcing", "rollout.num_training_frames=6", "by a multiple of sampling.chunk_frames=2"),
        ("self_forcing", "rollout.slice_last_frames=1", "must be at least 2"),
        ("self_forcing", "rollout.overlap_latents=3", "must be 0 to sampling.chunk_frames=2"),
        ("self_forcing", "distillation.min_timestep=0", "distillation.min_timestep=0: must be at least 1"),
        ("self_forcing", "distillation.dfake_gen_update_ratio=0", "must be at least 1"),
        ("longsana", "streaming.streaming_min_new_frame=2", "for example 4"),
        ("longsana", "streaming.streaming_max_length=4", "shorter than the first stretch, 5"),
        ("longsana", "train.ema_weight=1", "train.ema_weight=1.0: must be below 1"),
        ("longsana", "train.batch_size=0", "train.batch_size=0: must be at least 1"),
        ("ode", "train.log_iters=0", "must be at least 1"),
        ("ode", "train.gradient_accumulation_steps=0", "must be at least 1"),
        ("ode", "optimizer.generator.lr=0", "optimizer.generator.lr=0.0: must be above 0"),
        ("ode", "train.ema_weight=0 validation.vis_ema=true", "no average"),
        ("ode", "train.ema_weight=0 train.ema_relative_width=0.1", "train.ema_relative_width=0.1: train.ema_weight=0"),
        ("ode", "train.ema_relative_width=0.3", "train.ema_relative_width=0.3: must be"),
        ("ode", "optimizer.generator.decay_after=0", "optimizer.generator.decay_after=0: must be at least 1"),
        ("ode", "optimizer.generator.muon_lr=0", "optimizer.generator.muon_lr=0.0: must be above 0"),
        ("ode", "sampling.height=33", "multiple of 16"),
        (
            "flow_matching",
            "flow_matching.dropped_caption=null_caption sampling.null_caption=negative_prompt",
            "null_caption=learned",
        ),
        ("flow_matching", "train.image_probability=1.5", "image_probability=1.5: must be"),
        (
            "flow_matching",
            "train.image_probability=0.5 rollout.num_training_frames=1",
            "image_probability=0.5: a clip of one latent is its picture",
        ),
        ("flow_matching", "lr=0", "optimizer.generator.lr=0.0: must be above 0"),
        ("ode", "train.max_iter=3", "train.max_iters"),
        ("ode", "sampling.first_chunk_frames=1", "sampling.first_chunk_frames=1: has no meaning for training"),
        ("ode", "sampling.first_chunk_frames=4", "must be at most 3, sampling.chunk_frames + 1"),
    ],
)
def test_a_setting_that_cannot_be_is_named(small_training, trainer, override, words):
    with pytest.raises(InputError) as caught:
        check_training(load(small_training(trainer), *override.split()))
    message = str(caught.value)
    assert words in message, message
    assert "\n" not in message


@pytest.mark.parametrize("size", ["480ms", "720ms"])
def test_two_steps_are_trained_as_four_are(size):
    """But for the sampler, and the weights that they start from."""
    four, two = (
        load_config(ROOT / f"configs/sana_video_config/longsana/{size}/longsana{name}.yaml", (), TrainingConfig)
        for name in ("", "_2step")
    )
    assert (two.scheduler.denoising_step_list, two.scheduler.absorb) == ((1000, 800), "last_step")
    assert two.model.load_from != four.model.load_from
    model = replace(two.model, load_from=four.model.load_from)
    assert replace(two, scheduler=four.scheduler, model=model) == four


def test_a_causal_teacher_has_a_past(small_training):
    check_training(load(small_training("consistency"), "real_score.state_decay=0.9"))


def test_scores_may_start_from_weights_with_learned_factors(small_training):
    check_training(load(small_training("longsana"), *(f"{name}.state_decay=learned" for name in SCORES)))


def test_a_config_of_inference_is_no_config_of_training():
    with pytest.raises(InputError, match="trainer"):
        load(ROOT / "configs/sana_video_config/longsana/shapes/longsana.yaml")


@pytest.mark.parametrize(
    ("size", "settings", "expected"),
    [
        (1, [], 1),
        (4, ["train.gradient_accumulation_steps=3"], 3),
        (4, ["train.batch_size=2", "train.total_batch_size=64"], 8),
        (4, ["train.total_batch_size=8", "train.gradient_accumulation_steps=2"], 2),
        (3, ["train.total_batch_size=64"], "63 and 66"),
        (128, ["train.total_batch_size=64"], "nearest that they can: 128"),
        (4, ["train.total_batch_size=9", "train.gradient_accumulation_steps=2"], "nearest that they can: 8"),
    ],
)
def test_the_total_batch_is_honoured_or_refused(small_training, size, settings, expected):
    config, world = load(small_training("ode"), *settings), World(size=size)
    if isinstance(expected, int):
        micro_batches = micro_batches_of(config, world)
        assert micro_batches.accumulation == expected
        total = config.train.total_batch_size or size * expected * config.train.batch_size
        assert micro_batches.count * config.train.batch_size == total
    else:
        with pytest.raises(InputError, match=expected):
            micro_batches_of(config, world)


@pytest.mark.parametrize(
    ("trainer", "setting"),
    [
        ("ode", "model.load_from"),
        ("self_forcing", "real_score.load_from"),
        ("longsana", "fake_score.load_from"),
        ("longsana", "vae.vae_pretrained"),
        ("ode", "text_encoder.text_encoder_name"),
    ],
)
def test_a_missing_checkpoint_is_found_first_and_by_its_setting(small_training, trainer, setting):
    with pytest.raises(InputError, match=f"{setting}: 'nowhere.pth' not found"):
        check_sources(load(small_training(trainer), f"{setting}=nowhere.pth"))
    check_sources(load(small_training(trainer)))


def test_what_a_resumed_run_may_change(small_training, tmp_path):
    from longsana.config import save_config

    path = small_training("longsana")
    save_config(load(path), tmp_path / "config.yaml")
    free = load(path, "train.max_iters=99", "validation.vis_interval=3", "wandb.project=x", "train.log_iters=7")
    assert check_same_run(free, tmp_path / "config.yaml") == []
    bound = load(path, "optimizer.generator.lr=0.5", "streaming.streaming_max_length=13")
    assert check_same_run(bound, tmp_path / "config.yaml") == [
        "streaming.streaming_max_length: 9 -> 13",
        "optimizer.generator.lr: 0.001 -> 0.5",
    ]


def test_float8_is_not_trained():
    with pytest.raises(InputError, match=r"model.float8=true: .* for inference"):
        check_training(load(ROOT / "configs/sana_video_config/longsana/480ms/ode.yaml", "model.float8=true"))


def test_what_a_gpu_cannot_do_is_refused_before_anything_is_loaded():
    config = load(ROOT / "configs/sana_video_config/longsana/480ms/ode.yaml", "train.cuda_graphs=true")
    check_device(config, World(size=2), torch.device("cpu"))
    check_device(config, World(size=1), torch.device("cuda"))
    with pytest.raises(InputError, match="cuda_graphs"):
        check_device(config, World(size=2), torch.device("cuda"))


def test_teams_of_validation_come_out(small_training):
    config = load(small_training("self_forcing", "validation.gpus_per_video=2"))
    check_device(config, World(size=4), torch.device("cpu"))
    with pytest.raises(InputError, match=r"^validation\.gpus_per_video=2: does not divide .*, 3; set it to 1"):
        check_device(config, World(size=3), torch.device("cpu"))
    compiled = load(small_training("self_forcing", "validation.gpus_per_video=2", "train.compile=true"))
    with pytest.raises(InputError, match=r"^validation\.gpus_per_video=2: .* train\.compile=false"):
        check_device(compiled, World(size=2), torch.device("cpu"))


@pytest.mark.parametrize("role", ["generator", "critic"])
def test_muon_is_for_one_process(small_training, role):
    config = load(small_training("self_forcing", f"optimizer.{role}.muon_lr=1e-3"))
    check_device(config, World(size=1), torch.device("cpu"))
    with pytest.raises(
        InputError, match=rf"^optimizer\.{role}\.muon_lr=0\.001: Muon .* the 2 processes .*; leave it out"
    ):
        check_device(config, World(size=2), torch.device("cpu"))
    with pytest.MonkeyPatch.context() as patch:
        patch.delattr(torch.optim, "Muon")
        with pytest.raises(InputError, match=r"Muon is in torch 2\.9 and later"):
            check_device(config, World(size=1), torch.device("cpu"))
