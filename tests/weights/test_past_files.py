"""What is kept of the past, in files: learned factors stay in every layout, and settings in a diffusers folder."""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor

from longsana import convert
from longsana.config import ModelConfig
from longsana.runtime.errors import InputError
from longsana.weights.build import build_model
from longsana.weights.files import open_checkpoint
from longsana.weights.names import DECAY_LOGIT, NULL_TOKENS, diffusers_config, from_diffusers_config
from longsana.weights.network import LAYOUTS, Layout, load_weights, read_weights, save_checkpoint
from tests.weights.checkpoints import PATHS, TINY, assert_same, meta, weights

LEARNED = dataclasses.replace(TINY, state_decay="learned")
SIZES = ("depth", "hidden_size", "num_heads", "linear_head_dim", "caption_channels", "caption_length")


def expected_in(layout: Layout, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """diffusers has no place for null tokens."""
    return {name: tensor for name, tensor in state.items() if layout != "diffusers" or name != NULL_TOKENS}


@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_learned_factors_round_trip(layout: Layout, tmp_path: Path) -> None:
    expected, path = weights(config=LEARNED), tmp_path / PATHS[layout]
    assert expected[DECAY_LOGIT].shape == (2, 6)
    save_checkpoint(expected, path, layout, LEARNED)
    assert_same(read_weights(path, LEARNED), expected_in(layout, expected))
    model = meta(LEARNED)
    load_weights(model, path)
    assert torch.equal(model.decay_logit, expected[DECAY_LOGIT])
    assert model.decay_logit.requires_grad


@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_without_them_a_checkpoint_starts_from_the_start(
    layout: Layout, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    expected, path = weights(), tmp_path / PATHS[layout]
    save_checkpoint(expected, path, layout, TINY)
    model = meta(LEARNED)
    with caplog.at_level(logging.INFO, "longsana"):
        load_weights(model, path)
    assert "no learned state_decay; it starts from its default" in caplog.text
    assert model.decay_logit is not None and not model.decay_logit.any()
    loaded = {name: tensor for name, tensor in model.state_dict().items() if name not in (DECAY_LOGIT, NULL_TOKENS)}
    assert_same(loaded, {name: tensor for name, tensor in expected.items() if name != NULL_TOKENS})


@pytest.mark.parametrize("layout", list(LAYOUTS))
@pytest.mark.parametrize("decay", [None, 0.9])
def test_they_are_not_passed_over(layout: Layout, decay: Any, tmp_path: Path) -> None:
    path = tmp_path / PATHS[layout]
    save_checkpoint(weights(config=LEARNED), path, layout, LEARNED)
    with pytest.raises(InputError, match=rf"learned factors .* state_decay is {decay}; set it to learned") as caught:
        load_weights(meta(dataclasses.replace(TINY, state_decay=decay)), path)
    assert "\n" not in str(caught.value)


def test_of_another_number_of_heads_they_are_refused(tmp_path: Path) -> None:
    state = weights(config=LEARNED)
    save_checkpoint(state, tmp_path / "a.pth", "upstream", LEARNED)
    content = torch.load(tmp_path / "a.pth", weights_only=True)
    content["state_dict"][DECAY_LOGIT] = torch.zeros(2, 5)
    torch.save(content, tmp_path / "a.pth")
    with pytest.raises(InputError, match=r"wrong shape or dtype 1: decay_logit \[2, 5\] \(needed: \[2, 6\]\)"):
        load_weights(meta(LEARNED), tmp_path / "a.pth")


# Conversion -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A YAML of the small network's sizes, which does not mention its past."""
    path = tmp_path / "config.yaml"
    OmegaConf.save({"model": {name: getattr(TINY, name) for name in SIZES}}, path)
    return path


@pytest.mark.parametrize("there", list(LAYOUTS))
@pytest.mark.parametrize("back", list(LAYOUTS))
def test_conversions_keep_them(there: Layout, back: Layout, config: Path, tmp_path: Path) -> None:
    """There and back, asked or not."""
    expected = {name: tensor.bfloat16() if "norm" in name else tensor for name, tensor in weights(1, LEARNED).items()}
    source, between, end = (tmp_path / part for part in ("a", "b", "c"))
    for folder in (source, between, end):
        folder.mkdir()
    save_checkpoint(expected, source / PATHS[back], back, LEARNED)
    for at, to, layout in ((source / PATHS[back], between, there), (between / PATHS[there], end, back)):
        assert convert.main([str(at), str(to / PATHS[layout]), "--to", layout, "--config", str(config)]) == 0
        assert DECAY_LOGIT in open_checkpoint(to / PATHS[layout], "generator")
    if "diffusers" in (there, back):
        del expected[NULL_TOKENS]
    assert_same(read_weights(end / PATHS[back], LEARNED), expected)
    for folder in (between, end):
        for path in folder.rglob("config.json"):
            assert json.loads(path.read_text())["state_decay"] == "learned"


def test_a_diffusers_folder_needs_no_yaml(tmp_path: Path) -> None:
    """Its config is enough; and a card says what the network keeps."""
    own = dataclasses.replace(LEARNED, num_cached_blocks=2, num_sink_blocks=1)
    save_checkpoint(weights(config=own), tmp_path / "a", "diffusers", own)
    assert convert.main([str(tmp_path / "a"), str(tmp_path / "b.safetensors"), "--to", "safetensors"]) == 0
    assert_same(read_weights(tmp_path / "b.safetensors", own), expected_in("diffusers", weights(config=own)))
    card = (tmp_path / "b.safetensors.md").read_text()
    assert "num_cached_blocks 2, state_decay learned, num_sink_blocks 1" in card


def test_a_config_may_ask_for_what_the_source_lacks(tmp_path: Path) -> None:
    """It is no conversion's to invent them."""
    save_checkpoint(weights(), tmp_path / "a.pth", "upstream", TINY)
    OmegaConf.save({"model": {name: getattr(LEARNED, name) for name in (*SIZES, "state_decay")}}, tmp_path / "c.yaml")
    given = [str(tmp_path / "a.pth"), str(tmp_path / "b.pth"), "--to", "upstream", "--config", str(tmp_path / "c.yaml")]
    assert convert.main(given) == 0
    assert_same(read_weights(tmp_path / "b.pth", TINY), weights())


# Settings in a diffusers folder ---------------------------------------------------------------------------------------

PASTS: list[dict[str, Any]] = [
    {"num_cached_blocks": 2},
    {"state_decay": 0.9},
    {"state_decay": (0.5, 0.9), "num_sink_blocks": 3},
    {"state_decay": "learned", "num_cached_blocks": 4, "num_sink_blocks": 1},
]


@pytest.mark.parametrize("settings", PASTS)
def test_settings_are_in_its_config(settings: dict[str, Any], tmp_path: Path) -> None:
    own = dataclasses.replace(TINY, **settings)
    save_checkpoint(weights(config=own), tmp_path, "diffusers", own)
    written = json.loads((tmp_path / "config.json").read_text())
    read = from_diffusers_config(written)
    assert {name: getattr(read, name) for name in settings} == settings
    assert written.items() >= diffusers_config(TINY).items()


def test_a_published_config_is_as_published() -> None:
    """Keys that diffusers does not know would make it warn."""
    assert not {"num_cached_blocks", "state_decay", "num_sink_blocks"} & diffusers_config(ModelConfig()).keys()
    nothing = diffusers_config(ModelConfig()) | {"num_cached_blocks": None, "state_decay": None}
    assert from_diffusers_config(nothing) == from_diffusers_config(diffusers_config(ModelConfig()))


def test_another_past_than_the_written_one_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The settings of a run are taken, as a user chooses what is kept; but not in silence."""
    own = dataclasses.replace(TINY, state_decay=0.9)
    save_checkpoint(weights(), tmp_path, "diffusers", own)
    with caplog.at_level(logging.WARNING, "longsana"):
        build_model(dataclasses.replace(own, load_from=str(tmp_path)), device="cpu", dtype=torch.float32)
        assert not caplog.records
        other = dataclasses.replace(TINY, load_from=str(tmp_path))
        assert build_model(other, device="cpu", dtype=torch.float32).past.decay is None
    assert "was written with state_decay=0.9; the settings here are those of the whole past" in caplog.text
