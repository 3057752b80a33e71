"""What people type is what they get: texts, decimal numbers, paths; and no number outside of its bounds."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

from longsana.config import FILES, InferenceConfig, leaf_keys, load_config
from longsana.runtime.errors import InputError
from longsana.runtime.files import expanded
from longsana.runtime.hub import locate
from longsana.runtime.settings import TEXT, Bounds, bounded, calls_a_resolver, check_bounds, decimal
from longsana.shapes.train_vae import VAETrainingConfig
from longsana.training.config import OdePairsConfig, TrainingConfig
from tests.scripts import load_script

ROOT = Path(__file__).resolve().parents[2]
SHAPES = ROOT / "configs/sana_video_config/longsana/shapes/longsana.yaml"


def written(folder: Path, text: str) -> Path:
    path = folder / "config.yaml"
    path.write_text(text)
    return path


# Numbers --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("sampling.seed=010", 10),
        ("sampling.seed=-7", -7),
        ("sampling.num_frames=0121", 121),
        ("sampling.cfg_scale=1e-3", 1e-3),
        ("sampling.cfg_scale=007.50", 7.5),
        ("sampling.fps=24000/1001", 24000 / 1001),
        ("sampling.fps=23.976", 23.976),
        ("model.depth=08", 8),
        ("scheduler.denoising_step_list=[1000, 500]", (1000, 500)),
        ("model.depth=null", None),
    ],
)
def test_numbers_of_a_command_line_are_decimal(override: str, expected: Any, tmp_path: Path) -> None:
    section, _, name = override.partition("=")[0].partition(".")
    assert getattr(getattr(load_config(written(tmp_path, ""), [override]), section), name) == expected


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("sampling.cfg_scale=1:30", "sampling.cfg_scale=1:30"),
        ("sampling.seed=1:30", "sampling.seed=1:30"),
        ("sampling.seed=0x10", "sampling.seed=0x10: write a decimal number"),
        ("sampling.seed=1_000", "sampling.seed=1_000: write a decimal number"),
        ("scheduler.denoising_step_list=[1000, 010]", "without leading zeros"),
        ("sampling.fps=24000/0", "sampling.fps=24000/0"),
        ("sampling.fps=3000000000", "sampling.fps=3000000000.0: must be at most 1000"),
        ("sampling.height=1000000", "sampling.height=1000000: must be at most 16384"),
        ("model.mlp_ratio=.nan", "model.mlp_ratio=nan: must be a finite number"),
        ("model.mlp_ratio=nan", "model.mlp_ratio=nan: must be a finite number"),
        ("sampling.cfg_scale=inf", "sampling.cfg_scale=inf: must be at most 1000"),
        ("sampling.seed=99999999999999999999", "sampling.seed=99999999999999999999: must be at most"),
        ("scheduler.denoising_step_list=[]", "denoising"),
    ],
)
def test_other_numbers_are_refused_before_anything_is_loaded(override: str, says: str, tmp_path: Path) -> None:
    from longsana.sampling.checks import check_config

    with pytest.raises(InputError) as caught:
        check_config(load_config(written(tmp_path, ""), [override]))
    assert says in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("value", ["010", "1:30", "-012", "1:30:00", "0_7", "[1000, 010]"])
def test_numbers_of_a_yaml_that_are_not_decimal_are_refused_with_their_path(value: str, tmp_path: Path) -> None:
    path = written(tmp_path, f"scheduler:\n  denoising_step_list: {value}\n")
    with pytest.raises(InputError, match=r"config\.yaml: scheduler\.denoising_step_list: .*: write a decimal number"):
        load_config(path)


def test_decimals() -> None:
    assert [decimal(text) for text in ("0", "-0010", "1.", ".5", "1e3", "3/4")] == [0, -10, 1.0, 0.5, 1000.0, 0.75]
    assert [decimal(text) for text in ("", "0x1", "1_000", "1/0", "a", "1:2", "\u0661", "inf")] == [None] * 8


# Texts ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text", ["${oc.env:HOME}", "costs ${PRICE}", "???", "010", "no", "1:30", "{a: b}", "${sampling.txt_file}"]
)
def test_texts_of_a_command_line_are_as_typed(text: str, tmp_path: Path) -> None:
    settings = [f"sampling.negative_prompt={text}", f"sampling.txt_file={text}", f"model.load_from={text}"]
    config = load_config(written(tmp_path, ""), settings)
    assert config.sampling.negative_prompt == config.sampling.txt_file == config.model.load_from == text


@pytest.mark.parametrize("text", ["010", "no", "1:30", "2026-11-28", "0x10", "1e5", "true"])
def test_texts_of_a_yaml_are_as_written(text: str, tmp_path: Path) -> None:
    config = load_config(written(tmp_path, f"sampling: {{negative_prompt: {text}}}\nmodel: {{load_from: {text}}}\n"))
    assert config.sampling.negative_prompt == config.model.load_from == text


def test_what_must_be_set(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"config\.yaml: model\.load_from: \?\?\?: must be set"):
        load_config(written(tmp_path, "model:\n  load_from: ???\n"))


@pytest.mark.parametrize("value", ["${oc.env:HOME}", "'a ${oc.env:HOME,x}'", "${oc.decode:1}"])
@pytest.mark.parametrize("schema", [InferenceConfig, TrainingConfig])
def test_the_environment_is_in_no_config(value: str, schema: type, tmp_path: Path) -> None:
    path = written(tmp_path, f"trainer: ode\nsampling:\n  txt_file: {value}\n")
    with pytest.raises(InputError, match=r"sampling\.txt_file: .*: configs take nothing from the environment"):
        load_config(path, (), schema)


def test_a_value_of_the_same_config_may_be_named(tmp_path: Path) -> None:
    config = load_config(written(tmp_path, "sampling: {height: 64, width: '${sampling.height}'}\n"))
    assert config.sampling.width == 64


# Paths ----------------------------------------------------------------------------------------------------------------


def test_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "x").mkdir()
    assert expanded("~/x") == locate("~/x", "a file") == tmp_path / "x"
    inference = load_script(ROOT / "inference_video_scripts/inference_sana_video.py")
    assert inference.prepare(["--work_dir=~/x"]).folder.parent == tmp_path / "x"
    evaluate = load_script(ROOT / "inference_video_scripts/evaluate.py")
    with pytest.raises(InputError) as caught:
        evaluate.prepare(["~/x"])
    assert str(tmp_path / "x") in str(caught.value)


@pytest.mark.parametrize(
    ("schema", "keys"),
    [
        (InferenceConfig, FILES[:1] + FILES[3:6]),
        (TrainingConfig, FILES),
        (OdePairsConfig, ("pairs.out", "model.load_from", "sampling.txt_file")),
        (VAETrainingConfig, ("shape",)),
    ],
)
def test_the_home_folder_in_configs(
    schema: type, keys: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the command line and in a YAML, whatever reads the path later."""
    monkeypatch.setenv("HOME", str(tmp_path))
    trainer = "trainer: ode\n" if schema is TrainingConfig else ""
    for key in keys:
        for path, settings in (
            (written(tmp_path, trainer), [f"{key}=~/x"]),
            (written(tmp_path, f"{trainer}{yaml.safe_dump(nested(key, '~/x'))}"), []),
        ):
            config = load_config(path, settings, schema)
            assert functools.reduce(getattr, key.split("."), config) == f"{tmp_path}/x"
        with pytest.raises(InputError) as caught:
            load_config(written(tmp_path, trainer), [f"{key}=~nosuchuser/x"], schema)
        assert str(caught.value) == f"{key}: ~nosuchuser/x: not found: there is no such user"
    if "model.load_from" in keys:
        assert load_config(path, ["vae.vae_pretrained=seeded:~/x"], schema).vae.vae_pretrained == f"seeded:{tmp_path}/x"


def nested(key: str, value: str) -> dict[str, Any]:
    section, _, rest = key.partition(".")
    return {section: nested(rest, value) if rest else value}


@pytest.mark.parametrize(
    ("script", "arguments"),
    [
        ("inference_video_scripts/inference_sana_video.py", ["--model_path=~nosuchuser/x"]),
        ("inference_video_scripts/inference_sana_video.py", ["--work_dir=~nosuchuser/x"]),
        ("inference_video_scripts/inference_sana_video.py", ["--txt_file=~nosuchuser/x"]),
        ("inference_video_scripts/inference_sana_video.py", ["--config=~nosuchuser/x"]),
        ("inference_video_scripts/evaluate.py", ["~nosuchuser/x"]),
        ("inference_video_scripts/benchmark.py", ["--out=~nosuchuser/x"]),
        ("train_video_scripts/train_longsana.py", ["--config_path=~nosuchuser/x"]),
        ("train_video_scripts/generate_ode_pairs.py", ["--txt_file=~nosuchuser/x"]),
        ("train_video_scripts/export.py", ["~nosuchuser/x", "--out", "y", "--layout", "upstream"]),
        ("train_video_scripts/shapes_recipe.py", ["--out=~nosuchuser/x"]),
        ("longsana/convert.py", ["~nosuchuser/x", "y", "--to", "upstream"]),
        ("longsana/convert.py", [str(ROOT / "asset/shapes/base.safetensors"), "~nosuchuser/y", "--to", "upstream"]),
    ],
)
def test_no_such_user(script: str, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert load_script(ROOT / script).main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and "~nosuchuser/" in line and "there is no such user" in line


@pytest.mark.parametrize(
    ("script", "arguments"),
    [
        ("inference_video_scripts/inference_sana_video.py", ["--work_dir="]),
        ("inference_video_scripts/inference_sana_video.py", ["--model_path="]),
        ("inference_video_scripts/inference_sana_video.py", ["--txt_file="]),
        ("inference_video_scripts/evaluate.py", [""]),
        ("train_video_scripts/train_longsana.py", ["--config_path", "x", "--logdir="]),
        ("train_video_scripts/export.py", ["", "--out", "y", "--layout", "upstream"]),
        ("train_video_scripts/shapes_recipe.py", ["--out="]),
    ],
)
def test_an_empty_path_is_none(script: str, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """As of a variable that is not set, which would be the folder one is in."""
    assert load_script(ROOT / script).main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "an empty path" in line or "and it is empty" in line


# Bounds ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Inner:
    share: float = bounded(0.5, 0, 1)
    steps: tuple[int, ...] = bounded((3, 4), 1)
    free: float = 1.0


@dataclass(frozen=True)
class Outer:
    inner: Inner = field(default_factory=Inner)
    rate: float | None = bounded(None, above=0, below=1)
    flag: bool = True


def test_bounds() -> None:
    check_bounds(Outer())
    check_bounds(Outer(Inner(1.0), rate=0.5))
    for outer, says in (
        (Outer(Inner(share=1.5)), "inner.share=1.5: must be at most 1"),
        (Outer(Inner(share=-1)), "inner.share=-1: must be at least 0"),
        (Outer(Inner(share=math.nan)), "inner.share=nan: must be a finite number"),
        (Outer(Inner(steps=(1, 0))), "inner.steps=0: must be at least 1"),
        (Outer(Inner(free=math.inf)), "inner.free=inf: must be a finite number"),
        (Outer(rate=0), "rate=0: must be above 0"),
        (Outer(rate=1), "rate=1: must be below 1"),
    ):
        with pytest.raises(InputError) as caught:
            check_bounds(outer)
        assert str(caught.value) == says


NUMBERS = ("int", "float", "int | None", "float | None", "tuple[int, ...]", "tuple[int, int, int] | None")


def unbounded(schema: type, prefix: str = "") -> list[str]:
    from typing import get_type_hints

    found = []
    for item in dataclasses.fields(schema):
        kind = get_type_hints(schema)[item.name]
        if dataclasses.is_dataclass(kind):
            found += unbounded(kind, f"{prefix}{item.name}.")  # type: ignore[arg-type]
        elif str(item.type) in NUMBERS and item.metadata.get("bounds", Bounds()) == Bounds():
            found.append(f"{prefix}{item.name}")
    return found


@pytest.mark.parametrize("schema", [TrainingConfig, OdePairsConfig])
def test_every_number_has_bounds_beside_its_default(schema: type) -> None:
    """Or a check of its own: the state's settings, and steps that a schedule checks."""
    own = {"num_cached_blocks", "num_sink_blocks", "denoising_step_list"}
    assert {name for name in unbounded(schema) if name.rpartition(".")[2] not in own} == set()


@pytest.mark.parametrize(
    "setting",
    [
        *("optimizer.generator.beta1=1.5", "optimizer.critic.eps=-1", "optimizer.generator.weight_decay=-1"),
        *("train.seed=99999999999999999999", "distillation.timestep_shift=0", "distillation.guidance_scale=nan"),
        *("optimizer.generator.num_warmup_steps=-1", "optimizer.generator.lr=inf", "train.ema_weight=1"),
        *("flow_matching.class_dropout_prob=2", "rollout.overlap_latents=-1", "video.threads=0", "video.crf=52"),
    ],
)
def test_numbers_of_training_are_refused_at_once(setting: str) -> None:
    path = ROOT / "configs/sana_video_config/longsana/480ms/longsana.yaml"
    with pytest.raises(InputError, match=rf"{setting.partition('=')[0]}=.*: must be "):
        load_config(path, [setting], TrainingConfig)


@pytest.mark.parametrize("threads", ["0", "100000"])
def test_threads_of_a_command(threads: str) -> None:
    inference = load_script(ROOT / "inference_video_scripts/inference_sana_video.py")
    with pytest.raises(InputError, match=rf"--threads: {threads}: must be from 1 to 1024"):
        inference.prepare(["--threads", threads])


# What else was typed --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        *("${oc.env:HOME}", "${ oc.env:HOME}", "a ${oc.decode:1} b", "${${sampling.txt_file}.env:HOME}", "${x:${y}}"),
        *("\\\\${oc.env:HOME}", "${.a}${oc.env:A}", "${a:}"),
    ],
)
def test_a_function_in_a_text_is_seen(text: str) -> None:
    assert calls_a_resolver(text)


@pytest.mark.parametrize("text", ["${a.b}", "a: ${b}: c", "\\${oc.env:HOME}", "$x:y}", "{a:b}", "${a}:b}"])
def test_other_texts_call_none(text: str) -> None:
    assert not calls_a_resolver(text)


def in_yaml(tmp_path: Path, text: str) -> InferenceConfig:
    path = tmp_path / "a.yaml"
    path.write_text(text)
    return load_config(path)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("sampling: {negative_prompt: '${ oc.env:HOME}'}", "configs take nothing from the environment"),
        ("sampling: {seed: !!int '010'}", "write a decimal number"),
        ("sampling: {seed: 0x10}", "write a decimal number"),
        ("sampling: {seed: 1_000}", "write a decimal number"),
        ("sampling: {unified_noise: 7}", "sampling.unified_noise=7: must be true or false"),
        ("scheduler: {denoising_step_list: {a: 1}}", "unknown key scheduler.denoising_step_list.a"),
        ("scheduler: {denoising_step_list: {}}", "must be a value, not a mapping"),
    ],
)
def test_what_yaml_would_read_as_something_else(text: str, says: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=re.escape(says)) as caught:
        in_yaml(tmp_path, text)
    assert "\n" not in str(caught.value)


def test_what_a_yaml_may_say(tmp_path: Path) -> None:
    config = in_yaml(tmp_path, "sampling: {negative_prompt: '\\${oc.env:HOME}', fps: 24000/1001, unified_noise: 1}")
    assert config.sampling.negative_prompt == "${oc.env:HOME}"
    assert config.sampling.fps == 24000 / 1001
    assert config.sampling.unified_noise is True


@pytest.mark.parametrize(
    "value",
    ["???", "${oc.env:HOME}", "{a: 1}", *(pytest.param(value, marks=pytest.mark.slow) for value in ("${x}", "{}"))],
)
def test_only_texts_may_look_special_on_a_command_line(value: str) -> None:
    """A setting of every type that is no text: it is refused at once, in one line."""
    for schema, path in ((InferenceConfig, SHAPES), (TrainingConfig, SHAPES.with_name("ode.yaml"))):
        others = {kind: key for key, kind in leaf_keys(schema).items() if kind not in TEXT and "chi_prompt" not in key}
        for key in others.values():
            with pytest.raises(InputError) as caught:
                load_config(path, [f"{key}={value}"], schema)
            assert key in str(caught.value) and "\n" not in str(caught.value), caught.value


def test_no_value_is_not_null() -> None:
    for key, kind in leaf_keys(InferenceConfig).items():
        if kind in TEXT or key == "text_encoder.chi_prompt":
            continue
        with pytest.raises(InputError, match=rf"^the command line: {key}=: no value"):
            load_config(SHAPES, [f"{key}="])


@pytest.mark.parametrize("value", ["7", "-1", "0.5", "99999999999999999999999"])
def test_a_switch_is_true_or_false(value: str) -> None:
    for key in ("sampling.unified_noise", "model.float8", "text_encoder.softcap"):
        with pytest.raises(InputError, match=f"{key}=.* must be true or false"):
            load_config(SHAPES, [f"{key}={value}"])


def test_a_base_may_lie_at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "base.yaml").write_text("sampling: {seed: 7}")
    assert in_yaml(tmp_path, "base: ~/base.yaml").sampling.seed == 7
