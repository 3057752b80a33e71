"""Settings: one file, one base, overrides on top; what is wrong is said in one line."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from longsana.config import ARCHITECTURES, InferenceConfig, ModelConfig, leaf_keys, load_config, save_config
from longsana.runtime.errors import InputError

# Those of inference; training, its data and the parts of the small world have keys of their own.
PUBLISHED = [
    path
    for path in sorted((Path(__file__).parents[1] / "configs").rglob("*.yaml"))
    if not {"trainer", "pairs", "steps"} & yaml.safe_load(path.read_text()).keys()
]


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """`write(text, "name.yaml")`: the path of a file with this text."""

    def build(text: str | bytes, name: str = "config.yaml") -> Path:
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return build


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: path.stem)
def test_published_configs_load(path):
    config = load_config(path)
    assert isinstance(config, InferenceConfig)
    assert config.model.architecture().hidden_size % config.model.linear_head_dim == 0


# Layers ---------------------------------------------------------------------------------------------------------------


def test_an_empty_file_is_the_defaults(write):
    assert load_config(write("")) == InferenceConfig()


def test_a_file_goes_over_its_base_and_the_command_line_over_both(write):
    write("model: {depth: 1, hidden_size: 112}\nvideo: {crf: 1}\nsampling: {seed: 1}", "base.yaml")
    config = load_config(
        write("base: base.yaml\nvideo: {crf: 2}\nsampling: {seed: 2}"), ["sampling.seed=3", "sampling.seed=4"]
    )
    assert (config.model.depth, config.model.hidden_size) == (1, 112)
    assert (config.video.crf, config.sampling.seed) == (2, 4)
    assert config == dataclasses.replace(
        InferenceConfig(),
        model=ModelConfig(depth=1, hidden_size=112),
        video=dataclasses.replace(InferenceConfig().video, crf=2),
        sampling=dataclasses.replace(InferenceConfig().sampling, seed=4),
    )


def test_a_base_is_found_beside_the_file_that_names_it(write, tmp_path: Path, monkeypatch):
    write("video: {crf: 7}", "base.yaml")
    (tmp_path / "inner").mkdir()
    path = write("base: ../base.yaml", "inner/config.yaml")
    monkeypatch.chdir("/")
    assert load_config(path).video.crf == 7


@pytest.mark.parametrize(
    ("override", "section", "name", "value"),
    [
        ("model.depth=3", "model", "depth", 3),
        ("model.depth=null", "model", "depth", None),
        ("model.patch_size=[1,2,2]", "model", "patch_size", (1, 2, 2)),
        ("scheduler.denoising_step_list=[1000, 500]", "scheduler", "denoising_step_list", (1000, 500)),
        ("model.state_decay=0.9", "model", "state_decay", 0.9),
        ("model.state_decay=1", "model", "state_decay", 1.0),
        ("model.state_decay=[0.5, 1e-3]", "model", "state_decay", (0.5, 0.001)),
        ("model.state_decay=learned", "model", "state_decay", "learned"),
        ("scheduler.bf16_timesteps=true", "scheduler", "bf16_timesteps", True),
        ("sampling.cfg_scale=2", "sampling", "cfg_scale", 2.0),
        ("sampling.negative_prompt=a: b = [c], 5", "sampling", "negative_prompt", "a: b = [c], 5"),
        ("sampling.negative_prompt=5", "sampling", "negative_prompt", "5"),
        ("sampling.negative_prompt=", "sampling", "negative_prompt", ""),
        ("sampling.negative_prompt=null", "sampling", "negative_prompt", None),
        ("sampling.negative_prompt=None", "sampling", "negative_prompt", "None"),
    ],
)
def test_overrides_are_typed(write, override, section, name, value):
    found = getattr(getattr(load_config(write("model: {depth: 9}"), [override]), section), name)
    assert found == value
    assert type(found) is type(value)


def test_save_and_load_round_trip(write, tmp_path: Path):
    config = load_config(
        write("model: {patch_size: [1, 1, 1], load_from: 'a: b'}"),
        [
            "scheduler.denoising_step_list=[900, 1]",
            "model.state_decay=[0.5, 0.9]",
            "sampling.negative_prompt=null",
            "sampling.cfg_scale=1e-7",
        ],
    )
    save_config(config, tmp_path / "saved.yaml")
    assert load_config(tmp_path / "saved.yaml") == config != InferenceConfig()
    for key in leaf_keys(InferenceConfig):
        assert f"{key.split('.')[1]}:" in (tmp_path / "saved.yaml").read_text(), "every setting is written"


def test_a_config_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        InferenceConfig().model.depth = 3


# What is wrong, in one line -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "overrides", "says"),
    [
        ("model: {dept: 3}", [], ["config.yaml", "model.dept", "did you mean 'model.depth'?"]),
        ("sampling: {fsp: 3}", [], ["sampling.fsp", "did you mean 'sampling.fps'?"]),
        ("", ["model.dept=3"], ["the command line", "model.dept", "did you mean 'model.depth'?"]),
        ("", ["depth=3"], ["unknown key depth", "did you mean 'model.depth'?"]),
        ("quux: 3", [], ["unknown key quux"]),
        ("1: 2", [], ["unknown key 1"]),
        ("model: 3", [], ["model is a section", "model.depth"]),
        ("model:", [], ["model is a section", "model.depth"]),
        ("", ["model=3"], ["the command line", "model is a section"]),
        ("sampling: {fps: {a: 1}}", [], ["sampling.fps.a"]),
        ("model: {depth: many}", [], ["config.yaml", "model.depth=many", "Integer"]),
        ("model: {depth: 2.5}", [], ["model.depth=2.5"]),
        ("sampling: {seed: true}", [], ["sampling.seed=True"]),
        ("sampling: {num_frames: null}", [], ["sampling.num_frames=None"]),
        ("sampling: {negative_prompt: [a]}", [], ["sampling.negative_prompt=['a']"]),
        ("model: {patch_size: [1, 2]}", [], ["model.patch_size=[1, 2]", "length 3"]),
        ("scheduler: {denoising_step_list: [1000, x]}", [], ["scheduler.denoising_step_list=[1000, 'x']", "list"]),
        ("scheduler: {denoising_step_list: 5}", [], ["scheduler.denoising_step_list=5"]),
        (
            "scheduler: {sampling_algo: euler}",
            [],
            ["'euler'", "'longlive_flow_euler', 'flow_dpm-solver', 'flow_euler'"],
        ),
        ("model: {state_decay: {first: 1}}", [], ["unknown key model.state_decay.first"]),
        ("", ["model.depth=x"], ["the command line", "model.depth=x"]),
        ("", ["model.depth=[1"], ["the command line", "model.depth=[1"]),
        ("", ["model.depth"], ["'model.depth'", "section.key=value"]),
        ("", ["--model.depth=1"], ["'--model.depth=1'", "section.key=value"]),
        ("", ["base=other.yaml"], ["unknown key base"]),
        ("[1, 2]", [], ["config.yaml", "mapping", "list"]),
        ("a: [\n b: }", [], ["config.yaml", "not valid YAML"]),
        ("video: {crf: 1}\nvideo: {crf: 2}", [], ["not valid YAML", "duplicate key video"]),
        (b"\xff\xfe\x00", [], ["config.yaml", "not valid YAML"]),
        ("base: 3", [], ["config.yaml", "base=3"]),
        ("base: none.yaml", [], ["none.yaml", "no such config file"]),
        ("base: config.yaml", [], ["one level"]),
        ("model: {model: '${nothing}'}", [], ["config.yaml", "model.model", "'nothing'"]),
    ],
)
def test_what_is_wrong_is_one_line(write, text, overrides, says):
    with pytest.raises(InputError) as caught:
        load_config(write(text), overrides)
    message = str(caught.value)
    assert "\n" not in message
    assert "$VALUE" not in message
    for part in says:
        assert part in message


def test_an_error_in_the_base_names_the_base(write):
    write("model: {depth: many}", "base.yaml")
    with pytest.raises(InputError, match=r"base\.yaml: model\.depth=many"):
        load_config(write("base: base.yaml"))


def test_a_base_of_a_base_is_refused(write):
    write("", "first.yaml")
    write("base: first.yaml", "second.yaml")
    with pytest.raises(InputError, match=r"second\.yaml.*only one level") as caught:
        load_config(write("base: second.yaml"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["missing.yaml", "."])
def test_a_file_that_is_not_there(tmp_path: Path, name):
    with pytest.raises(InputError, match="no such config file"):
        load_config(tmp_path / name)


# Architectures --------------------------------------------------------------------------------------------------------


def test_own_sizes_go_over_the_named_architecture():
    assert ModelConfig().architecture() == ARCHITECTURES["SanaMSVideo_2000M_P2_D20"]
    own = ModelConfig(depth=3, patch_size=(1, 1, 1)).architecture()
    assert (own.depth, own.hidden_size, own.num_heads, own.patch_size) == (3, 2240, 20, (1, 1, 1))


def test_an_unknown_architecture_names_the_nearest():
    with pytest.raises(InputError, match="did you mean 'SanaMSVideo_2000M_P2_D20'") as caught:
        ModelConfig(model="SanaMSVideo_2000M_P2_D2O").architecture()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_names_tell_the_patch_and_the_depth(name):
    size = ARCHITECTURES[name]
    assert name.endswith(f"_P{size.patch_size[1]}_D{size.depth}")
    assert size.patch_size[0] == 1
    assert size.patch_size[1] == size.patch_size[2]
    assert size.hidden_size % size.num_heads == 0
