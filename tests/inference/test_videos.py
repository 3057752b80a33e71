"""What the command makes, in this process."""

from __future__ import annotations

import ctypes
import json
import shutil
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

from longsana.config import ModelConfig
from longsana.encoders.text import GemmaTextEncoder
from longsana.models.dit import LongSanaDiT
from longsana.runtime.hub import file_sha256
from longsana.sampling.captions import CaptionEncoder
from longsana.sampling.engine import Engine
from longsana.sampling.sampler import generate
from longsana.weights.network import save_checkpoint
from tests.pipelines.repository import DEPTH, few_blocks

from .conftest import ROOT, assert_whole, frames_of, latents, sidecars

Command = Callable[..., int]
Prompts = Callable[..., Path]
SHAPES = ModelConfig(
    model="SanaMSVideo_4M_P2_D12", depth=DEPTH, linear_head_dim=32, caption_channels=64, caption_length=48
)


@pytest.fixture
def videos(tmp_path: Path) -> Path:
    return tmp_path / "out" / "videos"


def test_videos_and_sidecars(command: Command, prompts: Prompts, videos: Path) -> None:
    assert command("--txt_file", prompts("", "a red circle", "a blue square, big")) == 0
    assert_whole(videos, 2)
    first, second = sidecars(videos)
    assert (first["name"], second["name"]) == ("00002-a-red-circle", "00003-a-blue-square-big")
    assert first["prompt"] == "a red circle"
    assert (first["seed"], first["frames"], first["height"], first["width"], first["fps"]) == (0, 17, 32, 48, 8)
    assert first["config"]["model"]["dtype"] == "float32"
    assert first["sha256"]["model"] == file_sha256(few_blocks("longsana"))
    assert {"torch", "diffusers", "transformers", "longsana"} <= set(first["versions"])
    assert {"text", "denoise", "absorb", "decode", "write", "wall"} <= set(first["timings"])
    assert first["machine"]["threads"] == 1


def test_duplicates_are_two_different_videos(command: Command, prompts: Prompts, videos: Path) -> None:
    assert command("--txt_file", prompts("a red circle", "a red circle")) == 0
    assert_whole(videos, 2)
    assert len(set(latents(videos).values())) == 2


def test_latents_depend_on_the_prompt_alone(command: Command, prompts: Prompts, videos: Path, tmp_path: Path) -> None:
    lines = ["a red circle", "a blue square", "a red circle", "a green star"]
    assert command("--txt_file", prompts(*lines)) == 0
    expected = latents(videos)
    shuffled = prompts("a green star", "a red circle", "a blue square", "a red circle", name="shuffled.txt")
    assert command("--txt_file", shuffled, "--dataset", "shuffled") == 0
    assert latents(tmp_path / "out" / "shuffled") == expected
    assert command("--txt_file", prompts(*lines), "--dataset", "later", "--start_index", "2") == 0
    later = latents(tmp_path / "out" / "later")
    assert later == {key: expected[key] for key in [("a red circle", 1), ("a green star", 0)]}


def test_another_seed_is_another_video(command: Command, prompts: Prompts, tmp_path: Path) -> None:
    path = prompts("a red circle")
    assert command("--txt_file", path, "--dataset", "0") == command("--txt_file", path, "--dataset", "1", "--seed", "1")
    assert latents(tmp_path / "out" / "0") != latents(tmp_path / "out" / "1")


def test_a_batch_makes_the_same_videos(
    command: Command, prompts: Prompts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Up to rounding: matrix products of another size add in another order."""
    kept: dict[str, list[torch.Tensor]] = {}

    def keep(name: str) -> Any:
        def spy(*args: Any, **options: Any) -> Any:
            for chunk in generate(*args, **options):
                kept.setdefault(name, []).append(chunk.latents)
                yield chunk

        return spy

    path = prompts("a red circle", "a blue square")
    monkeypatch.setattr("longsana.sampling.engine.generate", keep("alone"))
    assert command("--txt_file", path, "--dataset", "alone") == 0
    monkeypatch.setattr("longsana.sampling.engine.generate", keep("together"))
    assert command("--txt_file", path, "--dataset", "together", "--bs", "2") == 0
    alone = torch.cat([torch.cat(kept["alone"][:2], 2), torch.cat(kept["alone"][2:], 2)])
    torch.testing.assert_close(torch.cat(kept["together"], 2), alone, rtol=1e-3, atol=1e-4)
    assert_whole(tmp_path / "out" / "together", 2)


def test_finished_videos_are_skipped_by_what_they_are(
    command: Command, prompts: Prompts, videos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = prompts("a red circle", "a blue square")
    assert command("--txt_file", path) == 0
    before = {video.name: video.stat().st_mtime_ns for video in videos.iterdir()}

    def refuse(_: Engine) -> None:
        raise AssertionError("nothing is left to make")

    with monkeypatch.context() as patch:
        patch.setattr(Engine, "load", refuse)
        assert command("--txt_file", path) == 0
        # At another place in the file it is still the same video.
        assert command("--txt_file", prompts("", "a blue square", "a red circle", name="moved.txt")) == 0
    assert {video.name: video.stat().st_mtime_ns for video in videos.iterdir()} == before

    # The same names, but not the same videos.
    assert command("--txt_file", path, "--seed", "5") == 0
    assert_whole(videos, 2)
    assert {record["seed"] for record in sidecars(videos)} == {5}


@pytest.mark.parametrize(
    "damage", ["truncated video", pytest.param("no sidecar", marks=pytest.mark.slow), "broken sidecar"]
)
def test_what_is_damaged_is_made_again(damage: str, command: Command, prompts: Prompts, videos: Path) -> None:
    path = prompts("a red circle")
    assert command("--txt_file", path) == 0
    video = next(videos.glob("*.mp4"))
    if damage == "truncated video":
        video.write_bytes(video.read_bytes()[:-100])
    elif damage == "no sidecar":
        video.with_suffix(".json").unlink()
    else:
        video.with_suffix(".json").write_text('{"bytes": ')
    assert command("--txt_file", path) == 0
    assert_whole(videos, 1)


def test_a_failing_prompt_does_not_stop_the_others(
    command: Command, prompts: Prompts, videos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (videos / "00002-a-blue-square.mp4").mkdir(parents=True)
    path = prompts("a red circle", "a blue square", "a green star")
    assert command("--txt_file", path, "--bs", "3") == 1
    assert "failed: line 2: " in capsys.readouterr().err
    (videos / "00002-a-blue-square.mp4").rmdir()
    assert_whole(videos, 2)
    assert command("--txt_file", path) == 0
    assert_whole(videos, 3)


def test_a_prompt_that_cannot_be_encoded_does_not_stop_the_others(
    command: Command, prompts: Prompts, videos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode = CaptionEncoder.__call__

    def refuse_blue(self: CaptionEncoder, prompt: Any) -> Any:
        if "blue" in prompt.text:
            raise RuntimeError("no blue")
        return encode(self, prompt)

    monkeypatch.setattr(CaptionEncoder, "__call__", refuse_blue)
    assert command("--txt_file", prompts("a red circle", "a blue square", "a green star")) == 1
    assert_whole(videos, 2)


def test_numbers_that_are_none_fail_the_prompt(
    command: Command, prompts: Prompts, videos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = LongSanaDiT(SHAPES)
    model.init_weights(0)
    model.final.linear.bias.data[0] = float("nan")
    save_checkpoint(model.state_dict(), tmp_path / "nan.pth", layout="upstream", config=SHAPES)
    assert command("--txt_file", prompts("a red circle"), "--model_path", tmp_path / "nan.pth") == 1
    assert "latents are not finite" in capsys.readouterr().err
    assert not list(videos.iterdir())


@pytest.mark.parametrize(
    ("setting", "source", "file", "weight", "says"),
    [
        (
            *("--vae.vae_pretrained", "vae", "tae_shapes.safetensors", "decoder.1.bias"),
            "chunk 0: decoded frames are not finite",
        ),
        (
            *("--vae.vae_pretrained", "vae", "diffusion_pytorch_model.safetensors", "decoder.conv_out.bias"),
            "chunk 0: decoded frames are not finite",
        ),
        (
            *("--text_encoder.text_encoder_name", "text_encoder", "model.safetensors", "norm.weight"),
            "text encoder: hidden states are not finite",
        ),
    ],
)
def test_a_decoder_or_text_encoder_with_such_numbers_fails_it_too(
    command: Command,
    prompts: Prompts,
    videos: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    setting: str,
    source: str,
    file: str,
    weight: str,
    says: str,
) -> None:
    """No black video, which the next run would take for finished."""
    folder = shutil.copytree(ROOT / "asset/shapes" / source, tmp_path / source)
    weights = load_file(folder / file)
    weights[weight][0] = float("nan")
    save_file(weights, folder / file, metadata={"format": "pt"})
    path = ("--txt_file", prompts("a red circle"), *(["vae.decoder=full"] if file.startswith("diffusion") else []))
    assert command(*path, setting, folder) == 1
    assert says in capsys.readouterr().err
    assert not list(videos.iterdir())
    assert command(*path) == 0
    assert_whole(videos, 1)


def test_the_text_encoder_is_gone_before_the_network_comes(
    command: Command, prompts: Prompts, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoders: list[weakref.ref[torch.nn.Module]] = []
    load_encoder, load = GemmaTextEncoder.load, Engine.load

    def keep_track(*args: Any, **options: Any) -> GemmaTextEncoder:
        encoder = load_encoder(*args, **options)
        encoders.append(weakref.ref(encoder.model))
        return encoder

    def check(self: Engine) -> Any:
        assert [encoder() for encoder in encoders] == [None]
        return load(self)

    monkeypatch.setattr(GemmaTextEncoder, "load", keep_track)
    monkeypatch.setattr(Engine, "load", check)
    assert command("--txt_file", prompts("a red circle")) == 0


def test_split_changes_the_text_and_keeps_the_state(
    command: Command, prompts: Prompts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first half is the first prompt's own video; the second is neither prompt's."""
    chunks: list[torch.Tensor] = []

    def spy(*args: Any, **options: Any) -> Any:
        for chunk in generate(*args, **options):
            chunks.append(chunk.latents)
            assert chunk.state is not None
            assert chunk.state.frames == chunk.start + chunk.latents.shape[2]
            yield chunk

    monkeypatch.setattr("longsana.sampling.engine.generate", spy)
    # One noise for all: only the text differs.
    monkeypatch.setattr("longsana.flow.noise.PromptNoise.draw", _same_noise)
    for name, line in {"a": "a red circle", "b": "a blue square", "ab": "a red circle<split>a blue square"}.items():
        assert command("--txt_file", prompts(line), "--dataset", name) == 0
    a, b, ab = chunks[:2], chunks[2:4], chunks[4:]
    assert torch.equal(ab[0], a[0])
    assert not torch.equal(ab[1], a[1])
    assert not torch.equal(ab[1], b[1])
    assert frames_of(next((tmp_path / "out" / "ab").glob("*.mp4"))) == (17, 32, 48, 3)


def _same_noise(_: Any, start: int, step: int, shape: Any, device: Any) -> torch.Tensor:
    return torch.randn(1, *shape, generator=torch.Generator().manual_seed(100 * start + step))


@pytest.mark.parametrize(
    "sampler", ["flow_dpm-solver", pytest.param("flow_euler", marks=pytest.mark.slow), "chunk_flow_euler"]
)
def test_base_model(sampler: str, command: Command, prompts: Prompts, videos: Path) -> None:
    """The samplers of many steps with guidance; the picture depends on what is moved away from."""
    common = ["--txt_file", prompts("a red circle"), f"--sampling_algo={sampler}", "--step", "3", "--cfg_scale", "4"]
    assert command(*common, "--negative_prompt", "a blue square") == 0
    assert_whole(videos, 1)
    first = latents(videos)
    assert command(*common, "--negative_prompt", "a green star") == 0
    second = latents(videos)
    assert second != first
    assert command(*common, "--sampling.null_caption", "learned") == 0
    assert latents(videos) not in (first, second)


def test_other_words_or_another_attention_make_a_video_again(
    command: Command, prompts: Prompts, videos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The instruction and the cap decide what the network is told, and so they are part of a video's identity."""
    arguments = ["--txt_file", prompts("a red circle"), "--text_encoder.chi_prompt", "sana"]

    def made(*more: str) -> str:
        before = {record["fingerprint"] for record in sidecars(videos)} if videos.exists() else set()
        assert command(*arguments, *more) == 0
        (record,) = sidecars(videos)
        assert record["fingerprint"] not in before
        return str(record["latents_sha256"])

    seen = [made(), made("--text_encoder.softcap", "false")]
    monkeypatch.setattr("longsana.encoders.text.complex_human_instruction", lambda: "Describe a video of this: ")
    seen += [made(), made("--text_encoder.softcap", "false")]
    assert len(set(seen)) == 4
    stamps = {path: path.stat().st_mtime_ns for path in videos.iterdir()}
    assert command(*arguments, "--text_encoder.softcap", "false") == 0
    assert stamps == {path: path.stat().st_mtime_ns for path in videos.iterdir()}, "and then it is there"


def test_prompt_too_long_is_named(command: Command, prompts: Prompts, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    assert command("--txt_file", prompts("a red circle", "a red circle " * 60), "--start_index", "1") == 0
    (said,) = [record.getMessage() for record in caplog.records if "too long" in record.getMessage()]
    assert said.startswith("line 2: too long by")


def test_video_from_a_checkpoint(command: Command, prompts: Prompts, videos: Path, tmp_path: Path) -> None:
    model = LongSanaDiT(SHAPES)
    model.init_weights(7)
    save_checkpoint(model.state_dict(), tmp_path / "model.pth", layout="upstream", config=SHAPES)
    path = prompts("a red circle")
    assert command("--txt_file", path, "--model_path", tmp_path / "model.pth") == 0
    from_file = latents(videos)
    (record,) = sidecars(videos)
    assert len(record["sha256"]["model"]) == 64
    assert command("--txt_file", path, "--model_path", "seeded:7") == 0
    assert latents(videos) == from_file


@pytest.mark.parametrize("fault", ["other architecture", "truncated", "missing"])
def test_wrong_checkpoint(
    fault: str,
    command: Command,
    prompts: Prompts,
    videos: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "model.pth"
    if fault != "missing":
        other = replace(SHAPES, depth=DEPTH + 1)
        model = LongSanaDiT(other if fault == "other architecture" else SHAPES)
        model.init_weights(0)
        save_checkpoint(model.state_dict(), path, layout="upstream", config=model.config)
    if fault == "truncated":
        path.write_bytes(path.read_bytes()[:100_000])
    assert command("--txt_file", prompts("a red circle"), "--model_path", path) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert "model.pth" in line
    assert not list(videos.glob("*")) if videos.exists() else True


def test_work_dir_that_cannot_be_written(
    command: Command, prompts: Prompts, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").write_text("a file")
    assert command("--txt_file", prompts("a red circle")) == 2
    assert "choose another --work_dir" in capsys.readouterr().err


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes")],
)
def test_out_of_memory_says_what_to_lower(
    error: Exception,
    command: Command,
    prompts: Prompts,
    videos: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(LongSanaDiT, "forward", full)
    assert command("--txt_file", prompts("a red circle", "a blue square"), "--bs", "2") == 2
    assert "2 videos of 32x48 at a time do not fit in memory; lower --bs" in capsys.readouterr().err
    assert not list(videos.iterdir())


def test_host_memory_does_not_grow_with_length(
    command: Command, prompts: Prompts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pixels alone of the last 200 frames would be 3.7 MB, as floats four times that."""
    malloc_trim = ctypes.CDLL("libc.so.6").malloc_trim
    rss: list[int] = []
    sample = Engine.sample

    def spy(*args: Any, **options: Any) -> Any:
        for frames in sample(*args, **options):
            yield frames
            malloc_trim(0)  # or what was freed before would hide what is kept now
            rss.append(psutil.Process().memory_info().rss)

    monkeypatch.setattr(Engine, "sample", spy)
    long = ["--num_frames", "441", "--height", "64", "--width", "96", "--sampling.chunk_frames", "10"]
    assert command("--txt_file", prompts("a red circle"), *long) == 0
    assert len(rss) == 14, "of 11 chunks the first in four pieces"
    assert rss[-1] - rss[9] < 2e6, rss


def test_the_sidecar_of_a_video_reproduces_it(command: Command, prompts: Prompts, videos: Path, tmp_path: Path) -> None:
    """The resolved config in a sidecar, written as YAML, is the same request again."""
    path = prompts("a red circle")
    past = ["--model.num_cached_blocks", "1", "--model.state_decay", "[0.8, 0.95]", "--model.num_sink_blocks", "1"]
    assert command("--txt_file", path, "--seed", "3", *past) == 0
    (record,) = sidecars(videos)
    config = tmp_path / "again.yaml"
    config.write_text(json.dumps(record["config"]))  # JSON is YAML
    assert command("--config", config, "--txt_file", path, "--dataset", "again") == 0
    assert latents(tmp_path / "out" / "again") == latents(videos)
