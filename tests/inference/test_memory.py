"""The batch command with little memory: what is loaded when, and that no video becomes another by it."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from longsana.config import InferenceConfig
from longsana.encoders.text import GemmaTextEncoder
from longsana.inference import batch
from longsana.sampling.engine import Engine

from .conftest import sidecars

Command = Callable[..., int]
Prompts = Callable[..., Path]
TEXTS = ("a red circle moves left", "a blue square stays still")


def test_the_text_encoder_is_gone_before_the_network_loads(
    command: Command, prompts: Prompts, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    models: list[weakref.ref[Any]] = []
    load_text, load_network, load_decoder = GemmaTextEncoder.load, Engine.load_network, Engine.load_decoder

    def text(*arguments: Any, **options: Any) -> GemmaTextEncoder:
        encoder = load_text(*arguments, **options)
        models.append(weakref.ref(encoder.model))
        order.append("text encoder")
        return encoder

    def loads(name: str, load: Callable[[Engine], Any]) -> Callable[[Engine], Any]:
        def run(engine: Engine) -> Any:
            order.append(name)
            assert [model() for model in models] == [None]
            return load(engine)

        return run

    monkeypatch.setattr(GemmaTextEncoder, "load", text)
    monkeypatch.setattr(Engine, "load_network", loads("network", load_network))
    monkeypatch.setattr(Engine, "load_decoder", loads("decoder", load_decoder))
    assert command("--txt_file", prompts(*TEXTS)) == 0
    assert order == ["text encoder", "network", "decoder"]


def test_where_weights_wait_makes_no_other_video(
    command: Command, prompts: Prompts, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    videos, given = tmp_path / "out" / "videos", ("--txt_file", prompts(*TEXTS), "vae.decoder=full")
    assert command(*given, "--sampling.offload", "all") == 0
    made = sidecars(videos)
    assert {record["config"]["sampling"]["offload"] for record in made} == {"all"}
    caplog.set_level(logging.INFO)
    assert command(*given, "--sampling.memory", "8") == 0
    assert "2 of 2 videos are in" in caplog.text
    assert "sampling.memory=8 changes nothing on a CPU" in caplog.text
    for path in videos.iterdir():
        path.unlink()
    assert command(*given) == 0
    plain = sidecars(videos)
    for key in ("latents_sha256", "fingerprint", "bytes"):
        assert [record[key] for record in plain] == [record[key] for record in made]


def test_what_memory_chose_makes_no_other_video(
    command: Command,
    prompts: Prompts,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It depends on all prompts of a command, and on the GPU; the sidecar has it all the same."""

    def chosen(config: InferenceConfig, *more: Any) -> InferenceConfig:
        vae, model = config.vae, config.model
        return replace(config, vae=replace(vae, latents_per_call=1), model=replace(model, feed_forward_frames=1))

    given = ("--txt_file", prompts(*TEXTS), "vae.decoder=full")
    with monkeypatch.context() as patch:
        patch.setattr(batch, "fit_memory", chosen)
        assert command(*given, "--sampling.memory", "8") == 0
    made = sidecars(tmp_path / "out" / "videos")
    assert {record["config"]["vae"]["latents_per_call"] for record in made} == {1}
    caplog.set_level(logging.INFO)
    for more in ((), ("--sampling.memory", "24"), ("--model.feed_forward_frames", "100")):
        caplog.clear()
        assert command(*given, *more) == 0
        assert "2 of 2 videos are in" in caplog.text


def test_bad_values_are_told(command: Command, capsys: pytest.CaptureFixture[str]) -> None:
    for setting, says in (
        ("sampling.memory=0.5", "sampling.memory=0.5: must be at least 1"),
        ("sampling.memory=a lot", "sampling.memory=a lot"),
        ("sampling.offload=vae", "sampling.offload=vae"),
        ("model.feed_forward_frames=-1", "model.feed_forward_frames=-1: must be at least 0"),
    ):
        assert command(setting) == 2
        assert says in capsys.readouterr().err
