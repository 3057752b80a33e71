"""What a user sets PyTorch's default dtype and device to changes no bit of a video."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from longsana.config import InferenceConfig
from longsana.data.prompts import Prompt
from longsana.pipelines.video import LongSanaVideoPipeline
from longsana.runtime.defaults import plain_defaults
from longsana.sampling.captions import caption_encoder
from longsana.sampling.engine import Engine
from longsana.training.validation import Meter
from tests.pipelines.repository import PROMPT, SIZE, quiet, shapes_config
from tests.pipelines.test_lora import lora

CALL: dict[str, Any] = {"num_frames": 13, "num_inference_steps": 2, "chunk_frames": 2, "output_type": "pt", **SIZE}


@contextmanager
def default(what: torch.dtype | str) -> Iterator[None]:
    """A default dtype, or a default device."""
    try:
        if isinstance(what, torch.dtype):
            torch.set_default_dtype(what)
        else:
            torch.set_default_device(what)
        yield
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)


# Tensors on the meta device have no numbers: whatever takes one of them fails.
both = pytest.mark.parametrize("what", [torch.float64, "meta"], ids=str)


def seed() -> torch.Generator:
    return torch.Generator().manual_seed(4)


@both
@pytest.mark.parametrize("fixture", ["loaded", "loaded_base"])
def test_the_pipelines(fixture: str, what: torch.dtype | str, request: pytest.FixtureRequest) -> None:
    pipe: LongSanaVideoPipeline = request.getfixturevalue(fixture)
    expected = pipe(PROMPT, generator=seed(), **CALL).frames
    with default(what):
        assert torch.equal(pipe(PROMPT, generator=seed(), **CALL).frames, expected)
        torch.manual_seed(5)
        unseeded = pipe(PROMPT, **CALL).frames
        if pipe.distilled:
            streamed = [chunk.frames for chunk in pipe.stream(PROMPT, generator=seed(), **CALL)]
            assert torch.equal(torch.cat(streamed, dim=1), expected)
    torch.manual_seed(5)
    assert torch.equal(pipe(PROMPT, **CALL).frames, unseeded)


@both
def test_a_pipeline_that_is_loaded(
    distilled_folder: Path, loaded: LongSanaVideoPipeline, what: torch.dtype | str
) -> None:
    """In bfloat16, whose text encoder computes its rotations anew."""
    with default(what):
        pipe, low = quiet(distilled_folder), quiet(distilled_folder, torch_dtype=torch.bfloat16)
        frames, lower = (one(PROMPT, generator=seed(), **CALL).frames for one in (pipe, low))
    assert {pipe.vae.dtype, pipe.transformer.dtype, pipe.text_encoder.dtype} == {torch.float32}
    assert torch.equal(frames, loaded(PROMPT, generator=seed(), **CALL).frames)
    expected = quiet(distilled_folder, torch_dtype=torch.bfloat16)(PROMPT, generator=seed(), **CALL).frames
    assert torch.equal(lower, expected)


@both
def test_a_lora(distilled_folder: Path, what: torch.dtype | str) -> None:
    videos = []
    for under in (torch.float32, what):
        pipe = quiet(distilled_folder)
        change = lora(pipe.transformer.network)
        with default(under):
            pipe.load_lora_weights(dict(change))
            videos.append(pipe(PROMPT, generator=seed(), **CALL).frames)
    assert torch.equal(*videos)


def made(config: InferenceConfig) -> list[Tensor]:
    """Latents and pixels, as the batch command makes them, and what validation measures on them."""
    engine, prompt, meter = Engine(config, "cpu"), Prompt(1, PROMPT, (PROMPT,), 0, 32, 48), Meter(16.0)
    with caption_encoder(engine.config, engine.device) as encode:
        caption = encode(prompt)
    results: list[Tensor] = []
    for frames in engine.sample(*engine.load(), [prompt], [caption]):
        results += [frames.latents, frames.pixels]
        meter.add(frames.pixels)
    return [*results, torch.tensor(meter.result(), dtype=torch.float64, device="cpu")]


@both
@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("longsana", {"scheduler.bf16_timesteps": "true", "text_encoder.dtype": "bfloat16"}),
        ("longsana", {"vae.decoder": "tae_shapes"}),
        (
            "longsana",
            {
                "scheduler.sampling_algo": "chunk_flow_euler",
                "sampling.cfg_scale": "2",
                "model.load_from": "seeded:1",
                "vae.vae_pretrained": "seeded:asset/shapes/vae",
                "model.state_decay": "[0.9, 0.99]",
            },
        ),
        ("base", {"sampling.cfg_scale": "2"}),
    ],
)
def test_the_batch_command(name: str, settings: dict[str, str], what: torch.dtype | str) -> None:
    few = {"sampling.num_frames": "13", "sampling.chunk_frames": "2", "scheduler.num_inference_steps": "2"}
    config = shapes_config(name, **few, **settings)
    expected = made(config)
    with default(what):
        found = made(config)
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):  # of so short a video some figures are nan
        torch.testing.assert_close(one, other, rtol=0.0, atol=0.0, equal_nan=True)


def test_plain_defaults_are_put_back() -> None:
    @plain_defaults()
    def made_in() -> Tensor:
        return torch.zeros(1)

    with default(torch.float64):
        assert made_in().dtype == torch.float32 and torch.zeros(1).dtype == torch.float64
        with pytest.raises(KeyError), plain_defaults():
            raise KeyError
        assert torch.get_default_dtype() == torch.float64
    with default("meta"):
        assert made_in().device.type == "cpu" and torch.zeros(1).device.type == "meta"
        with torch.device("cpu"):
            assert made_in().device.type == "cpu"
