"""What is kept of the past, asked of a pipeline: as the batch command keeps it, and in what is saved."""

from __future__ import annotations

import json
import logging
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from longsana.pipelines.transformer import SanaVideoCausalTransformer3DModel
from longsana.pipelines.video import LongSanaVideoPipeline
from longsana.runtime.errors import InputError
from longsana.weights.network import read_weights, save_checkpoint
from tests.pipelines.repository import (
    DEPTH,
    DISTILLED,
    PROMPT,
    SIZE,
    few_blocks,
    quiet,
    shapes_config,
    shapes_repository,
)

# Chunks of 3, 2, 2, 2, 2 latents.
OPTIONS: dict[str, Any] = {
    "chunk_frames": 2,
    "num_inference_steps": 2,
    "output_type": "latent",
    "num_frames": 41,
} | SIZE
LOGITS = torch.linspace(-1, 2, DEPTH * 4).bfloat16().float().view(DEPTH, 4)
PASTS: list[dict[str, Any]] = [
    {"state_decay": 0.8},
    {"state_decay": [0.5, 0.95], "num_sink_blocks": 1},
    {"num_cached_blocks": 1},
    {"num_cached_blocks": 1, "num_sink_blocks": 2},
]


def video(pipe: LongSanaVideoPipeline) -> Tensor:
    latents: Tensor = pipe(PROMPT, generator=torch.Generator().manual_seed(11), **OPTIONS).frames
    return latents


@pytest.fixture(scope="module")
def whole(loaded: LongSanaVideoPipeline) -> Tensor:
    return video(loaded)


@pytest.mark.parametrize("settings", PASTS)
def test_it_is_asked_for_where_a_pipeline_is_loaded(
    settings: dict[str, Any], distilled_folder: Path, whole: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The network is the one that a config with these settings builds."""
    from longsana.weights.build import build_model

    pipe = quiet(distilled_folder, **settings)
    given = video(pipe)
    config = shapes_config(**{f"model.{name}": value for name, value in settings.items()}).model
    network = build_model(config, device="cpu", dtype=torch.float32)
    assert pipe.transformer.network.past == network.past
    monkeypatch.setattr(pipe.transformer, "network", network)
    assert torch.equal(video(pipe), given)
    assert given.shape == whole.shape and torch.equal(given[:, :, :3], whole[:, :, :3])
    assert (given[:, :, 7:] - whole[:, :, 7:]).abs().max() > 1e-2


@pytest.mark.parametrize("settings", PASTS)
def test_a_stream_goes_on_with_it(settings: dict[str, Any], distilled_folder: Path) -> None:
    pipe = quiet(distilled_folder, **settings)
    options = {key: value for key, value in OPTIONS.items() if key != "num_frames"}
    first = list(islice(pipe.stream(PROMPT, generator=torch.Generator().manual_seed(11), **options), 2))
    again = quiet(distilled_folder, **settings)
    rest_options = {key: value for key, value in options.items() if key not in SIZE}
    rest = list(again.stream(num_frames=24, state=first[-1].state, **rest_options))
    assert torch.equal(torch.cat([chunk.frames for chunk in first + rest], dim=2), video(pipe))


def test_a_state_in_memory_is_of_its_past(distilled_folder: Path) -> None:
    """A decayed sum, a plain one and a window of one chunk have one shape."""
    pipe = quiet(distilled_folder, state_decay=0.8)
    options = {key: value for key, value in OPTIONS.items() if key != "num_frames"}
    (chunk,) = islice(pipe.stream(PROMPT, generator=torch.Generator().manual_seed(11), **options), 1)
    for settings in ({"state_decay": 0.7}, {}, {"num_cached_blocks": 1}):
        with pytest.raises(InputError, match=r"state: its sums were made with Past\(window=-1, decay=0.8, sinks=0\)"):
            quiet(distilled_folder, **settings).stream(num_frames=8, state=chunk.state, output_type="latent")
    assert len(list(pipe.stream(num_frames=8, state=chunk.state, chunk_frames=2, output_type="latent"))) == 1


def test_all_of_it_may_be_asked_for(distilled_folder: Path, whole: Tensor) -> None:
    pipe = quiet(distilled_folder, num_cached_blocks=-1, state_decay=1.0, num_sink_blocks=0)
    assert torch.equal(video(pipe), whole)


@pytest.mark.parametrize("settings", PASTS)
def test_what_is_saved_keeps_it(
    settings: dict[str, Any], distilled_folder: Path, tmp_path: Path, whole: Tensor
) -> None:
    pipe = quiet(distilled_folder, **settings)
    pipe.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "transformer/config.json").read_text())
    named = {"num_cached_blocks", "state_decay", "num_sink_blocks"}
    assert {name: written[name] for name in named & written.keys()} == settings
    assert not named & json.loads((tmp_path / "model_index.json").read_text()).keys()
    again = quiet(tmp_path)
    assert again.transformer.network.past == pipe.transformer.network.past
    assert torch.equal(video(again), video(pipe))
    undone = quiet(tmp_path, num_cached_blocks=-1, state_decay=1.0, num_sink_blocks=0)
    assert torch.equal(video(undone), whole)


def test_what_is_published_is_saved_as_published(loaded: LongSanaVideoPipeline, tmp_path: Path) -> None:
    loaded.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "transformer/config.json").read_text())
    assert not {"num_cached_blocks", "state_decay", "num_sink_blocks"} & written.keys()
    assert "state_decay" in loaded.transformer.config, "the pipeline's own is as it was"


@pytest.fixture(scope="module")
def learned_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository whose transformer has learned factors."""
    import shutil

    folder = shapes_repository(tmp_path_factory.mktemp("learned"))
    shutil.rmtree(folder / "transformer")
    config = shapes_config(**{"model.state_decay": "learned"}).model
    state = read_weights(few_blocks("longsana"), config)
    state["decay_logit"] = LOGITS.bfloat16()
    save_checkpoint(state, folder / "transformer", "diffusers", config, causal=True)
    assert json.loads((folder / "transformer/config.json").read_text())["_class_name"] == DISTILLED
    return folder


def test_learned_factors_are_loaded_and_saved(
    learned_folder: Path, tmp_path: Path, whole: Tensor, caplog: pytest.LogCaptureFixture
) -> None:
    pipe = quiet(learned_folder)
    assert torch.equal(pipe.transformer.network.decay_logit, LOGITS)
    given = video(pipe)
    assert torch.equal(given[:, :, :3], whole[:, :, :3])
    assert (given[:, :, 7:] - whole[:, :, 7:]).abs().max() > 1e-2
    with caplog.at_level(logging.WARNING):
        pipe.save_pretrained(tmp_path)
        again = quiet(tmp_path, num_sink_blocks=1, state_decay="learned")
    assert again.transformer.network.past.sinks == 1
    assert torch.equal(video(quiet(tmp_path)), given)
    with pytest.raises(InputError, match=r"state_decay=0.9: this transformer was loaded with its own learned factors"):
        quiet(tmp_path, state_decay=0.9)


def test_a_transformer_by_itself(learned_folder: Path, distilled_folder: Path) -> None:
    """It may be loaded to learn; and changed while nothing but numbers change."""
    load = SanaVideoCausalTransformer3DModel.from_pretrained
    model = load(distilled_folder, subfolder="transformer", state_decay="learned")
    assert not model.network.decay_logit.any()
    assert load(learned_folder, subfolder="transformer").network.decay_logit.any()
    model = load(distilled_folder, subfolder="transformer", state_decay=[0.8, 0.9])
    assert model.network.past.decay == (0.8, 0.9)
    model.set_past(state_decay=0.7, num_cached_blocks=3)
    assert (model.network.past.decay, model.network.past.window) == (0.7, 3)
    assert (model.config.state_decay, model.config.num_cached_blocks) == (0.7, 3)
    with pytest.raises(InputError, match="state_decay=2"):
        model.set_past(state_decay=2, num_cached_blocks=1)
    assert (model.network.past.decay, model.config.num_cached_blocks) == (0.7, 3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"state_decay": 1.5}, "state_decay=1.5: must be from 0"),
        ({"state_decay": "learned"}, "state_decay=learned: this transformer was loaded with no learned factors"),
        ({"num_sink_blocks": 1}, "num_sink_blocks=1: has no meaning beside the whole past"),
        ({"num_cached_blocks": 0}, "num_cached_blocks=0: must be"),
    ],
)
def test_what_means_nothing_is_refused(settings: dict[str, Any], message: str, distilled_folder: Path) -> None:
    with pytest.raises(InputError, match=message):
        quiet(distilled_folder, **settings)


def test_a_clip_of_the_base_model_has_no_past(base_folder: Path) -> None:
    for name, value in (("state_decay", 0.9), ("absorb", "last_step")):
        with pytest.raises(InputError, match=f"{name}: has no meaning for the base model"):
            quiet(base_folder, **{name: value})


def test_a_state_of_another_past_is_refused(loaded: LongSanaVideoPipeline, distilled_folder: Path) -> None:
    options = {key: value for key, value in OPTIONS.items() if key not in (*SIZE, "num_frames")}
    chunk = next(quiet(distilled_folder, num_cached_blocks=2).stream(PROMPT, **options, **SIZE))
    with pytest.raises(InputError, match="state: of another num_cached_blocks or num_sink_blocks"):
        next(loaded.stream(state=chunk, **options))
