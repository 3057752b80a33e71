"""What makes a video another one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from longsana.config import InferenceConfig, load_config
from longsana.data.prompts import Prompt
from longsana.inference.sidecar import fingerprint, finished_videos, resolved_settings
from longsana.sampling.checks import meaningless

FULL = "vae.decoder=full"
CONFIG = "configs/sana_video_config/longsana/shapes/longsana.yaml"
PROMPT = Prompt(1, "a red circle", ("a red circle",), 0, 32, 48)
DIGESTS = {"model": "a", "vae": "b", "text_encoder": "c"}
KNOWN = "ef106e76a612f03d5bf8928fbbaebfda699c6f5fb52978f8cd2fe82c87b0a43a"
"""Fingerprint of the small default with these and the full decoder, as the default was, from before there were
sampling.first_chunk_frames and other decoders."""


def identity(*settings: str) -> str:
    config = load_config(CONFIG, [FULL, *settings], InferenceConfig)
    return fingerprint(resolved_settings(config, PROMPT, torch.device("cpu")), PROMPT, DIGESTS)


@pytest.mark.parametrize(
    "settings",
    [
        ["model.num_cached_blocks=2"],
        ["model.state_decay=0.9"],
        ["model.state_decay=[0.5, 0.9]"],
        ["model.state_decay=learned"],
        ["model.state_decay=0.9", "model.num_sink_blocks=1"],
    ],
)
def test_with_another_past_it_is_another_video(settings: list[str]) -> None:
    others = [[], ["model.state_decay=0.91"], ["model.state_decay=[0.9, 0.5]"], ["model.num_cached_blocks=1"]]
    assert identity(*settings) not in [identity(*other) for other in others]
    assert identity(*settings) == identity(*settings)


def test_a_first_chunk_of_its_own_makes_another_video_and_none_the_same_as_ever() -> None:
    """Where it is 0, and of a clip that is one chunk, it is no part of the fingerprint."""
    settings = resolved_settings(load_config(CONFIG, [FULL], InferenceConfig), PROMPT, torch.device("cpu"))
    assert settings["sampling"]["first_chunk_frames"] == 0
    assert len({identity(f"sampling.first_chunk_frames={first}") for first in (0, 1, 2)}) == 3
    clip = [FULL, "scheduler.sampling_algo=flow_euler", "sampling.cfg_scale=2", "sampling.first_chunk_frames=0"]
    config = load_config(CONFIG, clip, InferenceConfig)
    settings = resolved_settings(config, PROMPT, torch.device("cpu"))
    assert "sampling.first_chunk_frames" in meaningless(config)
    assert fingerprint(settings, PROMPT, DIGESTS, meaningless(config))


def test_the_fingerprint_is_the_one_from_before_there_were_first_chunks() -> None:
    """But for the name of the network, which is another one now."""
    settings = resolved_settings(load_config(CONFIG, [FULL], InferenceConfig), PROMPT, torch.device("cpu"))
    settings["model"]["model"] = "SanaMSVideo_3M_P2_D8"
    assert fingerprint(settings, PROMPT, DIGESTS) == KNOWN


@pytest.mark.parametrize("given", ["0.9", "[0.5, 0.9]", "learned", "null"])
def test_it_reads_back_from_a_sidecar(given: str) -> None:
    config = load_config(CONFIG, [f"model.state_decay={given}"], InferenceConfig)
    record: dict[str, Any] = json.loads(json.dumps(resolved_settings(config, PROMPT, torch.device("cpu"))))
    again = load_config(CONFIG, [f"model.state_decay={json.dumps(record['model']['state_decay'])}"], InferenceConfig)
    assert again.model == config.model


def test_only_sidecars_that_do_not_fit_their_video_are_spoken_of(tmp_path: Path, caplog) -> None:
    caplog.set_level("INFO")
    for name in ("whole", "longer", "torn", "other", "list", "alone"):
        (tmp_path / f"{name}.mp4").write_bytes(b"123")
    record = {"fingerprint": "mark", "bytes": 3}
    contents = {
        "whole": json.dumps(record),
        "longer": json.dumps(record | {"bytes": 4}),
        "torn": '{"fingerprint": "mark", "by',
        "other": '{"title": "of another program"}',
        "list": "[]",
        "gone": json.dumps(record),  # its video is deleted
        "evaluation": '{"mean": {}}',
        "broken": "{",
        ".whole.partial": "{",
    }
    for name, text in contents.items():
        (tmp_path / f"{name}.json").write_text(text)
    (tmp_path / ".whole.partial.mp4").write_bytes(b"1")
    assert finished_videos(tmp_path) == {"whole.mp4": "mark"}
    longer, torn = caplog.messages
    assert longer.startswith(f"{tmp_path / 'longer.mp4'}: has 3 bytes, and 4 in its sidecar")
    assert torn.startswith(f"{tmp_path / 'torn.json'}: cannot be read (") and "torn.mp4" in torn
