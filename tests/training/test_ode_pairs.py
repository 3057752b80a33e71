"""The trajectories' command: what it writes, on any number of processes, stopped and started, and what it refuses."""

from __future__ import annotations

import gc
import json
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

from longsana.config import load_config
from longsana.data.prompts import Prompt
from longsana.data.trajectories import PUBLISHED_SIGMAS, Trajectories
from longsana.encoders.text import GemmaTextEncoder
from longsana.flow.noise import PromptNoise
from longsana.flow.schedule import uniform_sigmas
from longsana.models.dit import LongSanaDiT
from longsana.runtime.errors import InputError
from longsana.sampling.captions import caption_encoder
from longsana.sampling.engine import Engine, guided_texts
from longsana.sampling.sampler import sample_chunks
from longsana.training.config import OdePairsConfig
from longsana.training.pairs import kept_steps, teacher_config
from tests.forks import Forks
from tests.scripts import load_script

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "train_video_scripts" / "generate_ode_pairs.py"
CONFIGS = ROOT / "configs" / "sana_video_config" / "longsana"
SMALL = [
    *("--threads", "1", "--sampling.num_frames", "17", "--sampling.height", "32", "--sampling.width", "48"),
    *("--pairs.num_steps", "4", "--pairs.dtype", "float32", "--pairs.shard_size", "2"),
    *("--sampling.bs", "1", "--model.load_from", "seeded:2"),
]
LINES = ["a red circle", "a blue square", "a red circle", "a green star", "a cyan ring", "a blue square", "a white dot"]
DISTINCT = ["a red circle", "a blue square", "a green star", "a cyan ring", "a white dot"]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load_script(SCRIPT)


@pytest.fixture
def prompts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(LINES) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def command(script: ModuleType, prompts: Path, tmp_path: Path) -> Callable[..., int]:
    """Run the small command in this process; its exit status. Trajectories go to tmp_path/out."""

    def run(*arguments: str | Path) -> int:
        given = [*SMALL, "--txt_file", prompts, "--out", tmp_path / "out", *arguments]
        status: int = script.main([str(argument) for argument in given])
        return status

    return run


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.startswith(".")}


def pairs_config(*settings: str, name: str = "shapes/ode_pairs.yaml") -> OdePairsConfig:
    return load_config(CONFIGS / name, settings, OdePairsConfig)


def test_states_lead_from_the_prompts_noise_to_what_inference_samples(
    command: Callable[..., int], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    causal = ["sampling.chunk_frames=2", "pairs.causal=true", "sampling.null_caption=learned"]
    with caplog.at_level("INFO"):
        assert command(*causal) == 0
    assert "2 of 7 prompts came before and are left out" in caplog.text
    trajectories = Trajectories.open(tmp_path / "out")
    assert trajectories.prompts() == DISTINCT
    assert trajectories.sigmas == pytest.approx(PUBLISHED_SIGMAS, abs=1e-12)
    assert trajectories.shape == (5, 16, 5, 4, 6)

    small = [f"{name[2:]}={value}" for name, value in zip(SMALL[2::2], SMALL[3::2], strict=True)]
    config = pairs_config(*small, *causal)
    engine = Engine(teacher_config(config), "cpu")
    assert engine.plan.lengths == (3, 2)
    prompt = Prompt(1, DISTINCT[1], (DISTINCT[1],), 0, 32, 48)
    with caption_encoder(engine.config, engine.device) as encode:
        caption = encode(prompt)
    assert caption.negative is None
    network = engine.load_network()
    noise = PromptNoise(0, [(DISTINCT[1], 0)])
    chunks = sample_chunks(
        network,
        guided_texts(network, [caption], engine.videos([prompt])),
        engine.plan,
        sigmas=uniform_sigmas(8.0, config.pairs.num_steps).tolist(),
        interval=1.0,
        cfg_scale=config.pairs.cfg_scale,
        shape=(16, 4, 6),
        rng=noise,
        device="cpu",
    )
    states = trajectories[1].states
    assert torch.equal(states[-1], torch.cat([chunk.latents for chunk in chunks], dim=2)[0])
    assert torch.equal(states[0, :, :3], noise.draw(0, 0, (16, 3, 4, 6), "cpu")[0])
    assert torch.equal(states[0, :, 3:], noise.draw(3, 0, (16, 2, 4, 6), "cpu")[0])


def test_killed_and_gone_on_by_two_processes_is_the_same(
    command: Callable[..., int], forks: Forks, prompts: Path, tmp_path: Path
) -> None:
    arguments = [*SMALL, "--txt_file", str(prompts), "--out", str(tmp_path / "killed"), "--pairs.shard_size", "1"]
    process = forks.start("ode-pairs", arguments)
    deadline = time.monotonic() + 120
    while not list((tmp_path / "killed").glob("shard-*")) and time.monotonic() < deadline:
        assert process.returncode is None
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    there = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "killed").glob("shard-*")}
    assert 1 <= len(there) < len(DISTINCT)
    with pytest.raises(InputError, match="unfinished"):
        Trajectories.open(tmp_path / "killed")

    both = forks.launch(2, "ode-pairs", arguments)
    told = "".join(process.finish() for process in both)
    assert [process.returncode for process in both] == [0, 0], told
    assert f"{len(there)} of 5 shards are there already" in told
    assert told.count("5 trajectories in 5 shards") == 1
    assert there.items() <= {path.name: path.stat().st_mtime_ns for path in (tmp_path / "killed").iterdir()}.items()
    assert command("--pairs.shard_size", "1") == 0
    assert content(tmp_path / "killed") == content(tmp_path / "out")


def test_the_same_again_samples_nothing(
    command: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    alive: list[bool] = []
    load_network = Engine.load_network

    def watched(engine: Engine) -> LongSanaDiT:
        alive.append(any(type(thing) is GemmaTextEncoder for thing in gc.get_objects()))
        return load_network(engine)

    monkeypatch.setattr(Engine, "load_network", watched)
    assert command("--end_index", "2") == 0
    assert alive == [False], "the text encoder is gone before the network comes"
    before = content(tmp_path / "out")
    assert command("--end_index", "3", "--sampling.bs", "3") == 0, "the third line came before"
    assert alive == [False]
    assert content(tmp_path / "out") == before

    (tmp_path / "out" / "shard-00000.safetensors").write_bytes(b"x")
    assert command("--end_index", "2") == 0
    assert content(tmp_path / "out") == before

    capsys.readouterr()
    for arguments, says in (
        (["--sampling.seed", "1"], "sampling.seed=1 (there: 0)"),
        (["--pairs.cfg_scale", "2"], "pairs.cfg_scale=2.0 (there: 3.0)"),
        (["--model.load_from", "seeded:1"], "model.load_from=seeded:1 (there: seeded:2)"),
        (["--sampling.null_caption", "negative_prompt", "--sampling.negative_prompt", "dull"], "(there: learned)"),
        (["--sampling.motion_score", "3"], "sampling.motion_score=3 (there: 10)"),
        (["--end_index", "1"], "count=1 (there: 2)"),
        (["--pairs.causal", "true", "--sampling.chunk_frames", "2"], "chunks=[3, 2] (there: [5])"),
    ):
        assert command("--end_index", "2", *arguments) == 2
        (line,) = capsys.readouterr().err.splitlines()[-1:]
        assert line.startswith(f"error: {tmp_path / 'out'}: was made with other settings: ")
        assert says in line
    assert content(tmp_path / "out") == before


BAD = {
    "another grid": (["--pairs.shift", "7"], "the trajectories' noise levels are (1, 0.954545, 0.875, 0.7, 0)"),
    "too few steps": (["--pairs.num_steps", "3"], "noise levels"),
    "the student's list": (["--scheduler.denoising_step_list", "[1000, 900]"], "(1, 0.900"),
    "two for one": (
        ["--scheduler.denoising_step_list", "[1000, 8, 7]", "--pairs.shift", "7", "--pairs.num_steps", "1000"],
        "two of them are one step",
    ),
    "no steps": (["--pairs.num_steps", "0"], "pairs.num_steps=0: must be at least 1"),
    "no shards": (["--pairs.shard_size", "0"], "pairs.shard_size=0: must be at least 1"),
    "guidance nan": (["--pairs.cfg_scale", "nan"], "cfg_scale=nan"),
    "shift": (["--pairs.shift", "0"], "pairs.shift=0.0: must be above 0"),
    "another's guidance": (["--sampling.cfg_scale", "2"], "--sampling.cfg_scale: has no meaning"),
    "another's steps": (["scheduler.num_inference_steps=5"], "instead: pairs.num_steps"),
    "a decoder": (["--vae.latents_per_call", "2"], "nothing: no video is decoded"),
    "a chunk of the clip": (["--sampling.chunk_frames", "2"], "without pairs.causal=true"),
    "a first chunk": (["--sampling.first_chunk_frames", "1"], "first_chunk_frames=1: has no meaning for training"),
    "negative of nothing": (["--pairs.cfg_scale=1", "--sampling.negative_prompt", "x"], "pairs.cfg_scale=1"),
    "two negatives": (["sampling.null_caption=learned", "--sampling.negative_prompt", "x"], "null_caption=learned"),
    "parts": (["--txt_file", "{tmp}/parts.txt"], "line 1: parts between '<split>'"),
    "another size": (
        ["--txt_file", "{tmp}/sizes.txt", "sampling.aspect_ratio_type=ASPECT_RATIO_VIDEO_480_MS"],
        "line 2: asks for 624x624; all trajectories are of one size, 32x48",
    ),
    "no prompts": (["--txt_file", "no/such.txt"], "no/such.txt"),
    "empty prompts": (["--txt_file", "{tmp}/empty.txt"], "no prompts in this file"),
    "range": (["--start_index", "9"], "selects none of the 7 prompts"),
    "unknown flag": (["--outt", "x"], "did you mean '--out'?"),
    "unknown key": (["--pairs.causl", "true"], "did you mean 'pairs.causal'?"),
    "wrong type": (["--pairs.dtype", "int8"], "expected one of"),
    "config": (["--config_path", "no.yaml"], "no.yaml"),
    "threads": (["--threads", "0"], "--threads: 0: must be from 1 to 1024"),
    "missing weights": (["--model.load_from", "no/such.pth"], "no/such.pth"),
    "a file for a folder": (["--out", "{tmp}/parts.txt"], "choose another --out"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str, command: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "parts.txt").write_text("one<split>two\n")
    (tmp_path / "sizes.txt").write_text("one\ntwo --ar 1:1\n")
    (tmp_path / "empty.txt").write_text("\n")
    arguments, expected = BAD[case]
    status = command(*(word.format(tmp=tmp_path) for word in arguments))
    (line,) = capsys.readouterr().err.splitlines()
    assert status == 2
    assert line.startswith("error: ")
    assert expected in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["shapes/ode_pairs.yaml", "480ms/ode_pairs.yaml"])
def test_published_settings_keep_the_published_states(name: str) -> None:
    config = pairs_config(name=name)
    quarter = config.pairs.num_steps // 4
    assert kept_steps(config) == (0, quarter, 2 * quarter, 3 * quarter, 4 * quarter)


def test_the_manifest_tells_what_made_it(command: Callable[..., int], tmp_path: Path) -> None:
    assert command("--end_index", "1", "--pairs.dtype", "bfloat16") == 0
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    made_by = manifest["made_by"]
    assert (made_by["pairs.shift"], made_by["pairs.num_steps"], made_by["pairs.cfg_scale"]) == (8, 4, 3)
    assert (made_by["pairs.causal"], made_by["chunks"], made_by["steps"]) == (False, [5], [0, 1, 2, 3, 4])
    assert (made_by["model.load_from"], made_by["sampling.seed"]) == ("seeded:2", 0)
    assert len(made_by["prompts_sha256"]) == 64
    assert (manifest["dtype"], manifest["count"], manifest["shape"]) == ("bfloat16", 1, [5, 16, 5, 4, 6])


def test_states_that_are_not_finite_stop_it(
    command: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    load_network = Engine.load_network

    def broken(engine: Engine) -> LongSanaDiT:
        network = load_network(engine)
        with torch.no_grad():
            network.final.linear.bias.fill_(float("inf"))
        return network

    monkeypatch.setattr(Engine, "load_network", broken)
    assert command() == 1
    assert re.search(r"^failed: line 1: states in \w+ are not finite", capsys.readouterr().err, re.MULTILINE)
    assert not list((tmp_path / "out").glob("shard-*"))


def test_a_checkpoint_without_a_null_caption_is_refused(
    command: Callable[..., int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from longsana.models.dit import LongSanaDiT

    init_weights = LongSanaDiT.init_weights

    def without(model: LongSanaDiT, seed: int) -> None:
        init_weights(model, seed)
        model.text_embed.null_tokens.zero_()

    monkeypatch.setattr(LongSanaDiT, "init_weights", without)
    assert command("sampling.null_caption=learned") == 2
    assert (
        "error: sampling.null_caption=learned: seeded:2: the checkpoint has no null caption" in capsys.readouterr().err
    )
