"""The 40 flags of the published command: honoured, refused with the reason, or said to change nothing."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from longsana.inference.flags import OTHER_FLAGS, SETTING_FLAGS
from longsana.runtime.errors import InputError
from tests.inference.conftest import latents

ROOT = Path(__file__).resolve().parents[2]
BASE = "configs/sana_video_config/Sana_2000M_480px_AdamW_fsdp.yaml"
CHUNK = "configs/sana_video_config/Sana_2000M_480px_AdamW_fsdp_chunk.yaml"
Prompts = Callable[..., Path]

# Every flag with the default that the published code gives it, on the command line.
PUBLISHED = {
    "config": BASE,
    "model_path": "hf://Efficient-Large-Model/SANA-Video_2B_480p/checkpoints/SANA_Video_2B_480p.pth",
    "work_dir": "output/x",
    "txt_file": "asset/samples/video_prompts_samples.txt",
    "json_file": "None",
    "fps": "16",
    "sample_nums": "100000",
    "bs": "1",
    "num_frames": "-1",
    "cfg_scale": "6.0",
    "flow_shift": "None",
    "sampling_algo": "None",
    "skip_type": "time_uniform_flow",
    "guidance_type": "classifier-free",
    "seed": "0",
    "dataset": "samples",
    "step": "-1",
    "add_label": "",
    "tar_and_del": "False",
    "exist_time_prefix": "",
    "gpu_id": "0",
    "custom_height_width": "None",
    "use_resolution_binning": "True",
    "start_index": "0",
    "end_index": "30000",
    "ablation_selections": "None",
    "ablation_key": "None",
    "debug": "False",
    "if_save_dirname": "False",
    "image_split_token": "<image>",
    "prompt_split_token": "<split>",
    "high_motion": "False",
    "motion_score": "10",
    "negative_prompt": "dull",
    "interval_k": "0.0",
    "unified_noise": "False",
    "stg_applied_layers": "[]",
    "stg_scale": "0.0",
    "apg_mode": "hw",
    "num_cached_blocks": "-1",
}


def test_all_defaults_of_the_published_command_are_taken(script: ModuleType, caplog: pytest.LogCaptureFixture) -> None:
    assert len(PUBLISHED) == 40
    with caplog.at_level("INFO"):
        request = script.prepare([f"--{name}={value}" for name, value in PUBLISHED.items()])
    config = request.config
    assert (config.sampling.num_frames, config.scheduler.num_inference_steps) == (81, 50)
    assert (config.scheduler.sampling_algo, config.scheduler.inference_flow_shift) == ("flow_dpm-solver", 7.0)
    assert (config.sampling.height, config.sampling.width) == (480, 832)
    assert request.folder == Path("output/x/samples")
    (nothing,) = [line for line in caplog.messages if line.startswith("these flags change nothing here: ")]
    for flag in ("apg_mode", "debug", "gpu_id", "use_resolution_binning", "skip_type"):
        assert f"--{flag} (" in nothing
    assert "--interval_k changes nothing here: only chunk_flow_euler's chunks are staggered" in caplog.text
    assert "--high_motion changes nothing here: it counts with a motion_score of 0 or less, not 10" in caplog.text


@pytest.mark.parametrize("flag", PUBLISHED)
def test_every_flag_is_in_the_documentation(flag: str) -> None:
    table = (ROOT / "docs/published.md").read_text(encoding="utf-8")
    assert len(re.findall(rf"^\| [^|]*`--{flag}`", table, flags=re.MULTILINE)) == 1


@pytest.mark.parametrize("flag", PUBLISHED)
def test_no_flag_is_answered_by_a_guess(flag: str, script: ModuleType) -> None:
    said = ""
    try:
        script.prepare(["--config", BASE, f"--{flag}", "77"])
    except InputError as error:
        said = str(error)
    assert "did you mean" not in said and "unknown" not in said


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--tar_and_del"], "--tar_and_del true: cannot be honoured here: finished videos are what"),
        (["--stg_scale", "1.5"], "there is no spatio-temporal guidance"),
        (["--stg_applied_layers", "[3]"], "there is no spatio-temporal guidance"),
        (["--skip_type", "logSNR"], "flow_dpm-solver has one grid"),
        (["--guidance_type", "classifier-free_STG"], "guidance is classifier-free"),
        (["--ablation_key", "step", "--ablation_selections", "[1,2]"], "start the command once for each value"),
        (["--prompt_split_token", "|"], "write <split> between the parts"),
        (["--image_split_token", "|"], "write <image> between prompt and picture"),
        (["--if_save_dirname=true"], "the results are in WORK_DIR/DATASET"),
        (["--custom_height_width", "480"], "--custom_height_width 480: two whole numbers"),
        (["--sample_nums", "0"], "--sample_nums 0: must be at least 1"),
        (["--add_label", "a/b"], "without slashes"),
        (["--interval_k", "1.5"], "scheduler.interval_k=1.5: must be at most 1"),
    ],
)
def test_what_cannot_be_honoured_is_refused(arguments: list[str], says: str, script: ModuleType) -> None:
    with pytest.raises(InputError, match=re.escape(says)):
        script.prepare(["--config", BASE, *arguments])


@pytest.mark.parametrize("form", [["--num_frames", "-1"], ["--num_frames=-1"], ["--step", "-1"], ["--step=-1"]])
def test_minus_one_is_the_configs_own_value(form: list[str], script: ModuleType) -> None:
    config = script.prepare(["--config", BASE, "sampling.num_frames=41", "scheduler.num_inference_steps=7", *form])
    assert (config.config.sampling.num_frames, config.config.scheduler.num_inference_steps) == (41, 7)


@pytest.mark.parametrize(
    "word",
    [
        *("--low_motion", "--prompt", "--guidance_scale", "--scale", "--cfg", "--batch_size", "--vae_path", "--end"),
        *("--sampler", "--ckpt", "--device", "--fp16", "--nonsense"),
    ],
)
def test_an_unknown_flag_of_another_meaning_is_no_typing_error(word: str, script: ModuleType) -> None:
    with pytest.raises(InputError) as caught:
        script.prepare([word, "x"])
    assert str(caught.value) == f"unknown option {word}; see --help"


@pytest.mark.parametrize(("word", "meant"), [("--num_framse", "--num_frames"), ("--num-frames", "--num_frames")])
def test_a_typing_error_of_a_flag(word: str, meant: str, script: ModuleType) -> None:
    with pytest.raises(InputError, match=rf"unknown option {word} \(did you mean '{meant}'\?\)"):
        script.prepare([word, "x"])


@pytest.mark.parametrize("switch", ["--debug", "--exist_time_prefix", "--use_resolution_binning", "--high_motion"])
@pytest.mark.parametrize("after", ["sampling.seed=3", "--seed=3"])
def test_a_switch_takes_no_setting_for_its_value(switch: str, after: str, script: ModuleType) -> None:
    assert script.prepare([switch, after]).config.sampling.seed == 3


def test_all_flags_that_cannot_be_honoured_are_named_at_once(script: ModuleType) -> None:
    with pytest.raises(InputError) as caught:
        script.prepare(["--tar_and_del", "--stg_scale", "3", "--ablation_key", "x"])
    assert all(f"--{name}" in str(caught.value) for name in ("tar_and_del", "stg_scale", "ablation_key"))


@pytest.mark.parametrize("window", ["0", "-1"])
def test_no_window(window: str, script: ModuleType) -> None:
    assert script.prepare(["--num_cached_blocks", window]).config.model.num_cached_blocks == -1


def test_what_changes_nothing_makes_no_video_again(
    command: Callable[..., int], prompts: Prompts, tmp_path: Path
) -> None:
    path = prompts("a red ball")
    assert command("--txt_file", path) == 0
    stamps = {file: file.stat().st_mtime_ns for file in (tmp_path / "out/videos").iterdir()}
    for more in (["--interval_k", "0.3"], ["--high_motion"], ["sampling.cuda_graphs=true"]):
        assert command("--txt_file", path, *more) == 0
    assert stamps == {file: file.stat().st_mtime_ns for file in (tmp_path / "out/videos").iterdir()}


def test_sizes_labels_and_numbers_of_prompts(script: ModuleType, prompts: Prompts) -> None:
    path = prompts(*(f"a ball {number}" for number in range(6)))
    request = script.prepare(
        f"--config {BASE} --txt_file {path} --custom_height_width [720,560] --sample_nums 4 --start_index 1 "
        "--end_index 30000 --add_label _mine --interval_k 0.25".split()
    )
    assert [prompt.line for prompt in request.prompts] == [2, 3, 4]
    assert {(prompt.height, prompt.width) for prompt in request.prompts} == {(720, 560)}
    assert request.folder.name == "prompts_mine"
    assert script.prepare(["--config", CHUNK, "--interval_k", "0.25"]).config.scheduler.interval_k == 0.25


def test_a_json_file_is_an_object_whose_keys_are_prompts(script: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "prompts.json"
    path.write_text(json.dumps({"a red ball --ar 9:16": {"x": 1}, " ": 3, "first<split>then": None}))
    request = script.prepare(["--json_file", str(path), "--txt_file", "ignored.txt", *SMALL_480])
    assert [(prompt.line, prompt.text) for prompt in request.prompts] == [(1, "a red ball"), (3, "first<split>then")]
    for content, says in (("[1]", "a JSON list; expected an object"), ("{", "not JSON"), ("{}", "no prompts in this")):
        path.write_text(content)
        with pytest.raises(InputError, match=says):
            script.prepare(["--json_file", str(path)])


SMALL_480 = ["sampling.aspect_ratio_type=ASPECT_RATIO_VIDEO_480_MS", "--num_frames", "81"]


def test_unified_noise_is_the_same_for_every_prompt(
    command: Callable[..., int], prompts: Prompts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from longsana.flow.noise import PromptNoise

    drawn = []
    draw = PromptNoise.draw

    def spy(self: PromptNoise, *arguments: object) -> object:
        drawn.append(self.prompts)
        return draw(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(PromptNoise, "draw", spy)
    path = prompts("a red ball", "a blue ball")
    assert command("--txt_file", path, "--unified_noise") == 0
    assert {tuple(keys) for keys in drawn} == {(("", 0),)}
    unified = latents(tmp_path / "out/videos")
    drawn.clear()
    assert command("--txt_file", path) == 0
    assert {tuple(keys) for keys in drawn} == {(("a red ball", 0),), (("a blue ball", 0),)}
    assert not unified.items() & latents(tmp_path / "out/videos").items()


def test_motion_at_a_score_of_zero(
    command: Callable[..., int], prompts: Prompts, monkeypatch: pytest.MonkeyPatch
) -> None:
    from longsana.encoders.text import GemmaTextEncoder

    seen: list[str] = []
    encode = GemmaTextEncoder.encode_together

    def spy(self: GemmaTextEncoder, texts: list[str], *, instruction: bool = True) -> object:
        seen.extend(texts)
        return encode(self, texts, instruction=instruction)

    monkeypatch.setattr(GemmaTextEncoder, "encode_together", spy)
    path = prompts("a ball")
    for arguments, text in (
        (["--motion_score", "0"], "a ball low motion"),
        (["--motion_score=-1", "--high_motion"], "a ball high motion"),
        (["--motion_score", "7", "--high_motion"], "a ball motion score: 7."),
        (["--motion_score", "null"], "a ball"),
    ):
        assert command("--txt_file", path, *arguments) == 0
        assert seen.pop() == text


def test_the_flags_are_the_published_ones() -> None:
    own = {"config", "work_dir", "dataset", "start_index", "end_index", "sample_nums", "add_label"}
    combined = {"json_file", "custom_height_width"}
    assert set(PUBLISHED) - own - combined == (set(SETTING_FLAGS) | set(OTHER_FLAGS)) - {
        "height",
        "width",
        "image_fit",
        "decoder",
        "decoder_path",
    }
