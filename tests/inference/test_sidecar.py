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

CONFIG = "configs/sana_video_config/longsana/shapes/longsana.yaml"
PROMPT = Prompt(1, "a red circle", ("a red circle",), 0, 32, 48)
DIGESTS = {"model": "a", "vae": "b", "text_encoder": "c"}


def identity(*settings: str) -> str:
    config = load_config(CONFIG, settings, InferenceConfig)
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
