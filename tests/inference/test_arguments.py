"""What the command line accepts, and what it says of what it does not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import yaml

from longsana.config import load_config
from longsana.sampling.checks import check_config, chunk_plan

ROOT = Path(__file__).resolve().parents[2]
# Those of inference; training and its data have sections of their own.
CONFIGS = [
    path
    for path in sorted((ROOT / "configs").rglob("*.yaml"))
    if not {"trainer", "pairs", "steps"} & yaml.safe_load(path.read_text()).keys()
]
BASE = "configs/sana_video_config/Sana_2000M_480px_AdamW_fsdp.yaml"
DISTILLED = "configs/sana_video_config/Sana_2000M_480px_adamW_fsdp_longsana.yaml"
PUBLISHED = (
    "--config=configs/sana_video_config/Sana_2000M_480px_adamW_fsdp_longsana.yaml "
    "--model_path=hf://Efficient-Large-Model/SANA-Video_2B_480p_LongLive/checkpoints/SANA_Video_2B_480p_LongLive.pth "
    "--work_dir=output/inference/longsana_480p --txt_file=asset/samples/video_prompts_samples.txt --dataset=samples "
    "--cfg_scale=1.0 --num_frames 961"
)


def test_published_command(script: ModuleType) -> None:
    request = script.prepare(PUBLISHED.split())
    assert request.folder == Path("output/inference/longsana_480p/samples")
    assert request.config.sampling.num_frames == 961
    assert (request.prompts[0].height, request.prompts[0].width) == (480, 832)
    assert request.config.scheduler.denoising_step_list == (1000, 960, 889, 727)
    assert request.config.model.architecture().depth == 20


def test_published_base_command(script: ModuleType) -> None:
    request = script.prepare(
        f"--config={BASE} "
        "--model_path=hf://Efficient-Large-Model/SANA-Video_2B_480p/checkpoints/SANA_Video_2B_480p.pth "
        "--txt_file=asset/samples/video_prompts_samples.txt --cfg_scale 6 --motion_score 30 --flow_shift 8 "
        "--work_dir output/x".split()
    )
    assert request.config.scheduler.sampling_algo == "flow_dpm-solver"
    assert request.config.scheduler.num_inference_steps == 50
    assert request.config.sampling.negative_prompt is None  # the published one
    assert request.config.scheduler.inference_flow_shift == 8
    assert request.config.sampling.motion_score == 30


def test_no_arguments_is_the_embedded_default(script: ModuleType) -> None:
    request = script.prepare([])
    assert request.folder == Path("output/inference/longsana/shapes_prompts")
    assert (request.config.sampling.height, request.config.sampling.width) == (96, 160)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_loads_and_names_its_prompts(path: Path) -> None:
    config = load_config(path)
    check_config(config)
    assert (ROOT / config.sampling.txt_file).is_file()


@pytest.mark.parametrize(
    "setting",
    [("--vae.weight_dtype", "bfloat16"), ("--vae.weight_dtype=bfloat16",), ("vae.weight_dtype=bfloat16",)],
)
def test_any_setting_can_be_given(script: ModuleType, setting: tuple[str, ...]) -> None:
    assert script.prepare(setting).config.vae.weight_dtype == "bfloat16"


def test_text_settings_stay_as_typed(script: ModuleType) -> None:
    request = script.prepare(["--config", BASE, "--negative_prompt", "blur: yes, {curly} [x] = 1"])
    assert request.config.sampling.negative_prompt == "blur: yes, {curly} [x] = 1"


def test_the_block_causal_base_model_is_guided_chunk_by_chunk(script: ModuleType) -> None:
    given = ["--sampling_algo", "chunk_flow_euler", "--step", "20", "--cfg_scale", "4", "--num_cached_blocks", "2"]
    config = script.prepare([*given, "--negative_prompt", "dull"]).config
    assert chunk_plan(config).lengths == (11, 10)
    learned = script.prepare(["--config", BASE, "--sampling.null_caption", "learned", "--negative_prompt", ""]).config
    assert (learned.sampling.null_caption, learned.sampling.negative_prompt) == ("learned", "")
    assert chunk_plan(learned).lengths == (21,)


def test_indices_count_prompts_and_lines_count_lines(script: ModuleType, prompts: Callable[..., Path]) -> None:
    path = prompts("a red circle", "", "a blue square", "", "a green star")
    chosen = script.prepare(["--txt_file", str(path), "--start_index", "1", "--end_index", "3"]).prompts
    assert [(prompt.line, prompt.text) for prompt in chosen] == [(3, "a blue square"), (5, "a green star")]


BAD = {
    "seed of random weights": (
        ["--model_path", "seeded:x"],
        "model.load_from=seeded:x: the seed must be a whole number",
    ),
    "dataset outside": (["--dataset", "../x"], "--dataset ../x: must be a folder below --work_dir"),
    "dataset elsewhere": (["--dataset", "/tmp/x"], "--dataset /tmp/x: must be a folder below --work_dir"),
    "dataset at home": (["--dataset", "~/x"], "--dataset ~/x: must be a folder below --work_dir"),
    "octal size": (["--custom_height_width", "[0140,0240]"], "[0140,0240]: write decimal numbers"),
    "octal published flag": (["--stg_applied_layers", "[010]"], "[010]: write decimal numbers"),
    "NUL in the negative prompt": (["--config", BASE, "--negative_prompt", "a\0b"], "negative_prompt: a NUL character"),
    "half a character": (["--config", BASE, "--negative_prompt", "\udcff"], "negative_prompt: half a character"),
    "no motion score": (["--motion_score", ""], "sampling.motion_score=: no value"),
    "missing prompts": (["--txt_file", "no/such.txt"], "no/such.txt"),
    "empty prompts": (["--txt_file", "{tmp}/empty.txt"], "no prompts in this file"),
    "undecodable prompts": (["--txt_file", "{tmp}/latin.txt"], "line 2: not UTF-8"),
    "frames not 4n+1": (["--num_frames", "82"], "num_frames=82: must be 4n+1 for this VAE; nearest are 81 and 85"),
    "no frames": (["--num_frames", "0"], "num_frames=0"),
    "size": (["--height", "100"], "height=100: must be a multiple of 16; nearest are 96 and 112"),
    "unknown key": (["--vae.weight_dtyp", "x"], "did you mean 'vae.weight_dtype'?"),
    "wrong type": (["--sampling.bs", "two"], "sampling.bs=two"),
    "wrong choice": (["--vae.weight_dtype", "int8"], "vae.weight_dtype=int8: auto, bfloat16, float16 or float32"),
    "unknown flag": (["--num_framse", "5"], "did you mean '--num_frames'?"),
    "value missing": (["--sampling.bs"], "a value is missing"),
    "guided distilled model": (["--cfg_scale", "4"], "cfg_scale=4: the distilled model"),
    "steps of the distilled model": (["--step", "20"], "--step: has no meaning for the sampler longlive_flow_euler"),
    "window of the base model": (
        ["--config", BASE, "--num_cached_blocks", "2"],
        "--num_cached_blocks: has no meaning for the sampler flow_dpm-solver",
    ),
    "negative prompt unguided": (["--config", BASE, "--cfg_scale", "1", "--negative_prompt", "x"], "--negative_prompt"),
    "null caption unguided": (
        ["--config", BASE, "--cfg_scale", "1", "--sampling.null_caption", "learned"],
        "cfg_scale 1",
    ),
    "null caption of the distilled model": (["sampling.null_caption=learned"], "it has no guidance"),
    "two negatives": (
        ["--config", BASE, "--sampling.null_caption", "learned", "--negative_prompt", "x"],
        "--negative_prompt: has no meaning for the sampler flow_dpm-solver as it is set: sampling.null_caption=learned",
    ),
    "step list of many steps": (
        ["--sampling_algo", "chunk_flow_euler", "scheduler.denoising_step_list=[1000]"],
        "has no meaning for the sampler chunk_flow_euler",
    ),
    "parts of the block-causal model": (
        ["--sampling_algo", "chunk_flow_euler", "--txt_file", "{tmp}/parts.txt"],
        "need the streaming sampler",
    ),
    "dotted steps": (["--scheduler.num_inference_steps=3"], "--step: has no meaning"),
    "dotted step list": (["--config", BASE, "scheduler.denoising_step_list=[1000]"], "has no meaning for the sampler"),
    "shift nan": (["--flow_shift", "nan"], "scheduler.inference_flow_shift=nan: must be a finite number"),
    "guidance nan": (["--config", BASE, "--cfg_scale", "nan"], "cfg_scale=nan"),
    "no depth": (["--model.depth", "0"], "model.depth=0: must be at least 1"),
    "no width": (["--model.hidden_size", "0"], "model.hidden_size=0"),
    "patch": (["--model.patch_size", "[1,2,0]"], "model.patch_size=0"),
    "no feed-forward": (["--model.mlp_ratio=-1"], "model.mlp_ratio"),
    "heads": (["--model.num_heads", "3"], "num_heads 3"),
    "decay of the base model": (
        ["--config", BASE, "--model.state_decay", "0.9"],
        "--model.state_decay: has no meaning for the sampler flow_dpm-solver",
    ),
    "decay that grows": (["--model.state_decay", "1.5"], "state_decay=1.5: must be from 0"),
    "range": (["--start_index", "9"], "selects none of the 4 prompts"),
    "threads": (["--threads", "0"], "--threads: 0: must be from 1 to 1024"),
    "batch": (["--bs", "0"], "sampling.bs=0"),
    "parts": (["--txt_file", "{tmp}/parts.txt"], "line 1: 3 parts between '<split>' for a video of 2 chunks"),
    "parts of the base model": (["--config", BASE, "--txt_file", "{tmp}/parts.txt"], "need the streaming sampler"),
    "config": (["--config", "no.yaml"], "no.yaml"),
    "preset": (["--video.preset", "veryfat"], "did you mean 'veryfast'?"),
    "steps": (["--scheduler.denoising_step_list", "[5, 10]"], "denoising steps (5, 10)"),
    "architecture": (["--model.model", "SanaMSVideo_2000M_P2"], "no architecture"),
    "retired": (["--model.attn_type", "flash"], "model.attn_type=flash: one network serves every role"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str, script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty.txt").write_text("\n  \n")
    (tmp_path / "latin.txt").write_bytes(b"a red circle\na caf\xe9\n")
    (tmp_path / "parts.txt").write_text("one<split>two<split>three\n")
    arguments, expected = BAD[case]
    work_dir = tmp_path / "out"
    status = script.main(["--work_dir", str(work_dir), *(word.format(tmp=tmp_path) for word in arguments)])
    (line,) = capsys.readouterr().err.splitlines()
    assert status == 2
    assert line.startswith("error: ")
    assert expected in line
    assert not work_dir.exists()
