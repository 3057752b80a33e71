"""What makes a video another one."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from longsana.config import InferenceConfig, load_config
from longsana.data.prompts import Prompt
from longsana.sampling.records import fingerprint, resolved_settings

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
