"""Rules of arguments, and configs that were built without `load_config`."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from longsana.config import (
    InferenceConfig,
    ModelConfig,
    SamplingConfig,
    SchedulerConfig,
    TextEncoderConfig,
    VAEConfig,
    load_config,
)
from longsana.encoders.loading import load_vae
from longsana.encoders.text import GemmaTextEncoder
from longsana.runtime.arguments import TEXT, Callback, Flag, Number, OneOf, Rule, Several, Whole, checked, settled
from longsana.runtime.errors import InputError
from longsana.sampling.engine import Engine
from longsana.training.config import TrainingConfig
from longsana.weights.build import build_model

CONFIGS = Path(__file__).parents[2] / "configs/sana_video_config"


@pytest.mark.parametrize(
    ("rule", "given", "meant"),
    [
        (Whole(1, 9), 9.0, 9),
        (Whole(), np.int8(-3), -3),
        (Whole(), 2**60 + 1, 2**60 + 1),
        (Number(0), 0, 0.0),
        (Number(), np.float32(0.5), 0.5),
        (Number(above=0), torch.tensor(2), 2.0),
        (Flag(), np.bool_(False), False),
        (OneOf(("a", "b")), "b", "b"),
        (Several(Whole()), np.array([1.0, 2.0]), (1, 2)),
        (Several(TEXT), ["a"], ("a",)),
    ],
)
def test_what_is_meant(rule: Rule, given: Any, meant: Any) -> None:
    found = rule.settle("it", given)
    assert found == meant and type(found) is type(meant)


@pytest.mark.parametrize(
    ("rule", "given", "message"),
    [
        (Whole(1), 0, "it=0: must be at least 1"),
        (Whole(most=9), 10**400, "it=2^1328...: must be at most 9"),
        (Whole(), -(2.0**53), "it=-9007199254740992.0: is rounded, as large floats are; write a whole number's digits"),
        (Whole(most=9), 1e20, "it=100000000000000000000: must be at most 9"),
        (Whole(), 9.5, "it=9.5: must be a whole number"),
        (Whole(), True, "it=True: must be a whole number"),
        (Whole(), np.arange(3), "it=a ndarray of shape (3,): must be a whole number"),
        (Whole(), "x" * 100, f"it='{'x' * 59}...: must be a whole number"),
        (Number(), math.nan, "it=nan: must be a finite number"),
        (Number(), 10**400, "it=2^1328...: must be a finite number"),
        (Number(above=0), -1.5, "it=-1.5: must be positive"),
        (Number(above=1), 1, "it=1: must be above 1"),
        (Number(0, 1), 2, "it=2.0: must be at most 1"),
        (Flag(), 1, "it=1: must be True or False"),
        (Flag("yes or no"), 1, "it=1: must be yes or no"),
        (OneOf(("latent", "pil")), "latents", "it=latents: must be one of latent, pil (did you mean 'latent'?)"),
        (TEXT, 3, "it=3: must be a text"),
        (Callback(), 3, "it=3: must be a function"),
        (Several(Whole()), "123", "it='123': must be a list"),
        (Several(Whole()), [1, 2.5], "it[1]=2.5: must be a whole number"),
        (Several(Whole(), 2), [1], "it=[1]: must be 2 values"),
    ],
)
def test_what_is_refused(rule: Rule, given: Any, message: str) -> None:
    with pytest.raises(InputError) as refusal:
        rule.settle("it", given)
    assert str(refusal.value) == message


def test_a_function_gets_what_is_meant() -> None:
    @checked({"count": Whole(1), "name": TEXT, "absent": TEXT})
    def function(count: int, *, name: str | None = None, other: object = 3) -> tuple[Any, ...]:
        """Words."""
        return count, name, other

    assert function.__doc__ == "Words."
    assert function(2.0) == (2, None, 3)  # type: ignore[arg-type]
    assert function(count=1, name="a", other=None) == (1, "a", None)
    with pytest.raises(InputError, match=r"^count=None: must be a whole number"):
        function(None)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="unexpected keyword argument 'nme'"):
        function(1, nme="a")  # type: ignore[call-arg]


def test_configs_that_were_loaded_are_as_they_should_be() -> None:
    for name, schema in (
        ("Sana_2000M_480px_adamW_fsdp_longsana.yaml", InferenceConfig),
        ("longsana/480ms/longsana.yaml", TrainingConfig),
    ):
        config = load_config(CONFIGS / name, [], schema)
        assert repr(settled(config)) == repr(config)


def test_what_a_setting_is_taken_for() -> None:
    config = SamplingConfig(num_frames=9.0, cfg_scale=np.float64(2), bs=np.int64(3))  # type: ignore[arg-type]
    assert repr(settled(config)) == repr(SamplingConfig(num_frames=9, cfg_scale=2.0, bs=3))
    steps = SchedulerConfig(denoising_step_list=[1000.0, 727])  # type: ignore[arg-type]
    assert settled(steps).denoising_step_list == (1000, 727)


SMALL = ModelConfig(model="SanaMSVideo_4M_P2_D12", depth=8, linear_head_dim=32, caption_channels=64, caption_length=48)
Changes = dict[str, Any]


@pytest.mark.parametrize(
    ("section", "changes", "message"),
    [
        ("sampling", {"num_frames": "81"}, "sampling.num_frames='81': must be a whole number"),
        ("sampling", {"num_frames": 82}, "num_frames=82: must be 4n+1"),
        ("sampling", {"seed": None}, "sampling.seed=None: must be a whole number"),
        ("sampling", {"cfg_scale": math.nan}, "sampling.cfg_scale=nan: must be a finite number"),
        ("sampling", {"negative_prompt": 3}, "sampling.negative_prompt=3: must be a text"),
        ("sampling", {"unified_noise": "no"}, "sampling.unified_noise='no': must be True or False"),
        ("scheduler", {"sampling_algo": "euler"}, "scheduler.sampling_algo=euler: must be one of"),
        ("scheduler", {"denoising_step_list": (1000, 0.5)}, "scheduler.denoising_step_list[1]=0.5: must be a whole"),
        ("scheduler", {"denoising_step_list": None}, "scheduler.denoising_step_list=None: must be a list"),
        ("model", {"patch_size": (1, 2)}, "model.patch_size=(1, 2): must be 3 values"),
        ("model", {"dtype": torch.float32}, "model.dtype=torch.float32: must be one of auto, bfloat16"),
        ("vae", {"latents_per_call": 0}, "vae.latents_per_call=0: must be at least 1"),
        ("text_encoder", {"softcap": None}, "text_encoder.softcap=None: must be True or False"),
    ],
)
def test_a_pipeline_of_nonsense(section: str, changes: Changes, message: str) -> None:
    config = dataclasses.replace(InferenceConfig(), **{section: dataclasses.replace(SECTIONS[section], **changes)})
    with pytest.raises(InputError) as refusal:
        Engine(config, "cpu")
    assert message in str(refusal.value)


SECTIONS: dict[str, Any] = {name: getattr(InferenceConfig(), name) for name in InferenceConfig.__dataclass_fields__}


def test_a_pipeline_of_no_config() -> None:
    for nonsense in (None, {}, InferenceConfig, "config.yaml"):
        with pytest.raises(InputError, match=r"^config=.*: must be a config"):
            Engine(nonsense, "cpu")  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"^sampling=.*: must be a SamplingConfig"):
        Engine(InferenceConfig(sampling=VAEConfig()), "cpu")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 0}, "model.hidden_size=0: must be at least 1"),
        ({"hidden_size": "wide"}, "model.hidden_size='wide': must be a whole number"),
        ({"num_heads": 0}, "model.num_heads=0: must be at least 1"),
        ({"depth": -1}, "model.depth=-1: must be at least 1"),
        ({"depth": 10**9}, "model.depth=1000000000: must be at most"),
        ({"linear_head_dim": 0}, "model.linear_head_dim=0: must be at least 2"),
        ({"patch_size": (1, 0, 2)}, "model.patch_size=0: must be at least 1"),
        ({"mlp_ratio": math.nan}, "model.mlp_ratio=nan: must be a finite number"),
        ({"mlp_ratio": -1.0}, "model.mlp_ratio=-1.0: must be above 0"),
        ({"num_cached_blocks": 0}, "num_cached_blocks=0"),
        ({"num_cached_blocks": "all"}, "model.num_cached_blocks='all': must be a whole number"),
        ({"num_sink_blocks": -1}, "num_sink_blocks=-1"),
        ({"state_decay": object()}, "state_decay="),
        ({"model": None}, "model.model=None: must be a text"),
        ({"load_from": Path("x")}, "model.load_from="),
        ({"load_from": "seeded:x"}, "model.load_from=seeded:x: the seed must be a whole number"),
        ({"checkpoint_key": "student"}, "model.checkpoint_key=student: must be one of generator"),
    ],
)
def test_a_network_of_nonsense(changes: Changes, message: str) -> None:
    with pytest.raises(InputError) as refusal:
        build_model(dataclasses.replace(SMALL, **changes), device="cpu", dtype=torch.float32)
    assert message in str(refusal.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vae_type": "Wan"}, "vae.vae_type=Wan: must be one of WanVAE"),
        ({"vae_pretrained": None}, "vae.vae_pretrained=None: must be a text"),
        ({"latents_per_call": 0}, "vae.latents_per_call=0: must be at least 1"),
        ({"latents_per_call": 1.5}, "vae.latents_per_call=1.5: must be a whole number"),
        ({"weight_dtype": "float8"}, "vae.weight_dtype=float8: must be one of"),
    ],
)
def test_a_vae_of_nonsense(changes: Changes, message: str) -> None:
    config = dataclasses.replace(VAEConfig(vae_pretrained="seeded:asset/shapes/vae"), **changes)
    with pytest.raises(InputError) as refusal:
        load_vae(config, "cpu", torch.float32)
    assert message in str(refusal.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text_encoder_name": 3}, "text_encoder.text_encoder_name=3: must be a text"),
        ({"chi_prompt": None}, "text_encoder.chi_prompt=None: must be a text"),
        ({"softcap": "yes"}, "text_encoder.softcap='yes': must be True or False"),
    ],
)
def test_a_text_encoder_of_nonsense(changes: Changes, message: str) -> None:
    config = dataclasses.replace(TextEncoderConfig(text_encoder_name="asset/shapes/text_encoder"), **changes)
    with pytest.raises(InputError) as refusal:
        GemmaTextEncoder.load(config, caption_length=48, caption_channels=64, device="cpu", dtype=torch.float32)
    assert message in str(refusal.value)
