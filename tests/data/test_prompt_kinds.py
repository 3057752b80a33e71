"""Prompt files that are no plain text: read with their fields, or refused in one line."""

from __future__ import annotations

import codecs
import dataclasses
import json
import logging
from pathlib import Path

import pytest

from longsana.config import load_config
from longsana.data.prompts import Prompt, read_prompts, training_prompts
from longsana.pipelines.prompts import in_turn, one_for_each, whole
from longsana.runtime.errors import InputError
from longsana.sampling.checks import select_prompts
from longsana.training.checks import check_sources
from longsana.training.config import OdePairsConfig, TrainingConfig
from longsana.training.pairs import distinct_prompts

ROOT = Path(__file__).parents[2]
SHAPES = ROOT / "configs/sana_video_config/longsana/shapes"
TEXT = "a small red circle"


def read(path: Path, content: str | bytes) -> list[Prompt]:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return read_prompts(path, height=480, width=832, aspect_ratio_type="ASPECT_RATIO_VIDEO_480_MS", seed=7, frames=81)


def refusal(path: Path, content: str | bytes) -> str:
    with pytest.raises(InputError) as caught:
        read(path, content)
    message = str(caught.value)
    assert message.startswith(str(path)) and "\n" not in message
    return message


LINES = [
    {"prompt": f"  {TEXT} ", "seed": 3, "size": [96, 160], "frames": 17},
    {"prompt": "first<split>then --ar 1:1", "seed": None},
    {"prompt": TEXT},
    {"prompt": TEXT, "seed": 7.0},
    {"prompt": TEXT, "seed": 3},
]


def test_both_kinds_of_json_go_through_one_reader(tmp_path: Path) -> None:
    expected = [
        Prompt(1, TEXT, (TEXT,), 0, 96, 160, 3, 17),
        Prompt(2, "first<split>then", ("first", "then"), 0, 624, 624, 7, 81),
        Prompt(3, TEXT, (TEXT,), 0, 480, 832, 7, 81),
        Prompt(4, TEXT, (TEXT,), 1, 480, 832, 7, 81),  # the config's seed, however it is said
        Prompt(5, TEXT, (TEXT,), 1, 480, 832, 3, 81),
    ]
    lines = "\n".join(json.dumps(line) for line in LINES)
    for name in ("a.jsonl", "a.ndjson", "A.JSONL"):
        assert read(tmp_path / name, lines) == expected
    assert read(tmp_path / "b.jsonl", codecs.BOM_UTF8 + f"\r\n{lines}\r\n\r\n".encode()) == [
        dataclasses.replace(prompt, line=prompt.line + 1) for prompt in expected
    ]
    # Keys that come twice are two prompts, of which a plain reader would keep the last.
    entries = [f"{json.dumps(line.pop('prompt'))}: {json.dumps(line)}" for line in map(dict, LINES)]
    assert read(tmp_path / "a.json", f"{{{', '.join(entries)}}}") == expected


def test_blank_prompts_are_counted_and_left_out(tmp_path: Path) -> None:
    assert [p.line for p in read(tmp_path / "a.jsonl", '{"prompt": " "}\n\n{"prompt": "a cat"}')] == [3]
    assert [p.line for p in read(tmp_path / "a.json", '{" ": null, "a cat": null}')] == [2]


def test_fields_without_meaning_are_one_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        rows = [{"prompt": TEXT, "id": 1, "prompt_en": "x", "source": {"a": 1}}, {"prompt": TEXT, "id": 2}]
        read(tmp_path / "a.jsonl", "\n".join(map(json.dumps, rows)))
    (record,) = caplog.records
    assert record.getMessage().endswith("a.jsonl: these fields change nothing here: id, prompt_en, source")
    caplog.clear()
    with caplog.at_level(logging.INFO):
        read(tmp_path / "a.json", '{"a cat": ["x"], "a dog": {"id": 3}}')
    (record,) = caplog.records
    assert record.getMessage().endswith("change nothing here: id, values that are no objects")


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('{"prompt": "a", "sead": 3}', "unknown field sead (did you mean 'seed'?)"),
        ('{"prompt": "a", "Seed": 3}', "unknown field Seed (did you mean 'seed'?)"),
        ('{"prompt": "a", "height": 96}', "unknown field height (did you mean 'size'?)"),
        ('{"prompt": "a", "num_frames": 9}', "unknown field num_frames (did you mean 'frames'?)"),
        ('{"promt": "a"}', "unknown field promt (did you mean 'prompt'?)"),
        ('{"text": "a"}', "unknown field text (did you mean 'prompt'?)"),
        ('{"prompt": "a", "negative_prompt": "b"}', "negative_prompt cannot be honoured for one prompt"),
        ('{"prompt": "a", "cfg_scale": 3}', "cfg_scale cannot be honoured for one prompt"),
        ('{"prompt": "a", "image": "x.png"}', "begins with a picture, which has no meaning here; remove it"),
        ('{"prompt": "a", "image": ""}', "image='': must be the path of a picture"),
        ('{"prompt": "a", "image": ["x.png"]}', "image=['x.png']: must be the path of a picture"),
        ('{"prompt": "a", "image": "x\\u0000.png"}', "must be the path of a picture"),
        ('{"prompt": "a", "image_path": "x.png"}', "unknown field image_path (did you mean 'image'?)"),
        ('{"prompt": "a", "image_fit": "stretch"}', "image_fit cannot be honoured for one prompt"),
        ('{"prompt": "a", "prompt": "b"}', "the field prompt is given twice"),
        ('{"id": 1}', "needs a text in the field prompt; it has id"),
        ('{"prompt": 3}', "needs a text in the field prompt; it is 3"),
        (
            '{"prompt": "a", "seed": -9223372036854775809}',
            "seed=-9223372036854775809: must be a whole number, -9223372",
        ),
        ('{"prompt": "a", "seed": 9223372036854775808}', "seed=9223372036854775808"),
        ('{"prompt": "a", "seed": "3"}', "seed='3'"),
        ('{"prompt": "a", "seed": true}', "seed=True"),
        ('{"prompt": "a", "seed": 1.5}', "seed=1.5"),
        ('{"prompt": "a", "seed": NaN}', "seed=nan"),
        ('{"prompt": "a", "seed": 1e400}', "seed=inf"),
        ('{"prompt": "a", "frames": 0}', "frames=0: must be a whole number, 1 or more"),
        ('{"prompt": "a", "size": "832x480"}', "size='832x480': must be [height, width]"),
        ('{"prompt": "a", "size": [480]}', "size=[480]: must be [height, width]"),
        ('{"prompt": "a", "size": {"x": 1, "y": 2}}', "must be [height, width]"),
        ('{"prompt": "a", "size": [480, null]}', "must be [height, width]"),
        ('{"prompt": "a", "size": [480, -832]}', "size=-832"),
        ('{"prompt": "a --ar 1:1", "size": [480, 832]}', "both a size flag and the field size"),
        ('{"prompt": "a<image>b.png"}', "begins with a picture"),
        ('{"prompt": "a\\u0000"}', "a NUL character"),
        ('{"prompt": "a\\ud800"}', "a lone surrogate"),
        ('"a cat"', "a JSON str; expected an object"),
        ("a cat", "not JSON"),
        ("[" * 100_000, "not JSON: nested too deeply"),
        ('{"prompt": "a", "seed": ' + "1" * 5000 + "}", "not JSON"),
    ],
)
def test_wrong_lines_are_refused_by_their_number(tmp_path: Path, line: str, says: str) -> None:
    message = refusal(tmp_path / "a.jsonl", '{"prompt": "fine"}\n\n' + line)
    assert f"a.jsonl, line 3: {says}" in message or (says in message and "line 3" in message)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.json", '{"fine": null, "a cat": {"sead": 1}}', ", key 2: unknown field sead"),
        ("a.json", '{"a cat": {"prompt": "a dog"}}', ", key 1: the field prompt is given twice"),
        ("a.json", "[" * 100_000, "not JSON: nested too deeply"),
        ("a.json", b'{"a \xff": 1}', "not JSON: not UTF-8: byte 0xff at 4"),
        ("a.json", '[{"prompt": "a cat"}]', "a JSON list; expected an object whose keys are the prompts; for a list"),
        ("a.jsonl", "", "no prompts in this file; write an object"),
        ("a.csv", "id,prompt\n1,a cat", ".csv files are not read; write the prompts one a line into a .txt"),
        ("A.CSV", "id,prompt\n1,a cat", ".csv files are not read"),
        ("a.tsv", "a\tb", ".tsv files are not read"),
        ("a.yaml", "sampling:\n  seed: 1", ".yaml files are not read"),
        (
            "a.txt",
            '{"prompt": "a cat"}\n{"prompt": "a dog"}',
            "holds JSON, not a prompt a line; name such a file .jsonl",
        ),
        ("a.txt", '{\n"a cat": {}\n}', "name such a file .json"),
        ("a.txt", "a cat\0 runs", ", line 1: not UTF-8: a NUL byte in it (UTF-16?); save the file as UTF-8"),
        ("a.txt", "fine\n\na cat\0 runs", ", line 3: not UTF-8: a NUL byte"),
        ("a.txt", "fine\n\0", ", line 2: not UTF-8: a NUL byte"),
        ("a.txt", "a cat\na dog\n".encode("utf-16-le"), ", line 1: not UTF-8: a NUL byte in it (UTF-16?)"),
        ("a.txt", "a cat\na dog\n".encode("utf-16-be"), "(UTF-16?)"),
        ("a.txt", "a cat\na dog\n".encode("utf-16"), "(UTF-16?)"),
        ("a.txt", "a cat".encode("utf-32"), "(UTF-16?)"),
        ("a.jsonl", '{"prompt": "a cat"}'.encode("utf-16-le"), "(UTF-16?)"),
        ("a.json", '{"a cat": {}}'.encode("utf-16-le"), "(UTF-16?)"),
        ("a.txt", b"\x1f\x8b\x08 rest", "compressed (gzip), not the file itself; unpack it first"),
        ("a.txt", b"version https://git-lfs.github.com/spec/v1\noid", "a git-lfs pointer"),
        ("a.txt", b"<!DOCTYPE html><html>", "a web page"),
        ("a.txt", "fine\na cat<image>cat.png", ", line 2: begins with a picture, which has no meaning "),
    ],
)
def test_other_kinds_of_files_are_refused(tmp_path: Path, name: str, content: str | bytes, says: str) -> None:
    assert says in refusal(tmp_path / name, content)
    with pytest.raises(InputError) as caught:  # as prompts of training
        training_prompts(tmp_path / name)
    assert says in str(caught.value)


def test_training_takes_the_prompts_and_no_fields(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": " a <split> b --ar 1:1", "id": 1}\n{"prompt": "c", "seed": null}')
    assert training_prompts(path) == ["a <split> b --ar 1:1", "c"]
    for field in ('"seed": 1', '"size": [96, 160]', '"frames": 81'):
        path.write_text(f'{{"prompt": "c"}}\n{{"prompt": "c", {field}}}')
        with pytest.raises(InputError, match=r"a\.jsonl, line 2: the field .* has no meaning in training"):
            training_prompts(path)
    path.write_text('{"prompt": "c"}\n{"prompt": "c", "image": "c.png"}')
    with pytest.raises(InputError, match=r"a\.jsonl, line 2: begins with a picture, which has no meaning in training"):
        training_prompts(path)


def test_the_command_checks_sizes_and_lengths_of_fields(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    config = load_config(SHAPES / "longsana.yaml", [f"sampling.txt_file={path}", "sampling.seed=7"])
    path.write_text('{"prompt": "a"}\n{"prompt": "a", "seed": 1, "size": [64, 32], "frames": 41}')
    first, second = select_prompts(config, 0, None)
    assert (first.seed, first.frames, first.height, first.width, first.repetition) == (7, 81, 96, 160, 0)
    assert (second.seed, second.frames, second.height, second.width, second.repetition) == (1, 41, 64, 32, 0)
    for fields, says in (
        ('"frames": 82', "line 2: num_frames=82: must be 4n+1 for this VAE; nearest are 81 and 85"),
        ('"size": [100, 160]', "line 2: height=100: must be a multiple of 16"),
        ('"frames": 5, "prompt": "a<split>b"', "line 2: 2 parts between '<split>' for a video of 1 chunk"),
    ):
        prompt = "" if "prompt" in fields else '"prompt": "a", '
        path.write_text(f'{{"prompt": "a"}}\n{{{prompt}{fields}}}')
        with pytest.raises(InputError) as caught:
            select_prompts(config, 0, None)
        assert says in str(caught.value)


def test_trajectories_have_one_seed_size_and_length(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    config = load_config(SHAPES / "ode_pairs.yaml", [f"sampling.txt_file={path}"], OdePairsConfig)
    sampling = config.sampling
    same = {"seed": sampling.seed, "size": [sampling.height, sampling.width], "frames": sampling.num_frames}
    path.write_text(json.dumps({"prompt": "a", **same}))
    assert len(distinct_prompts(config, select_prompts(config, 0, None))) == 1
    for field, says in (('"seed": 5', "seed 5"), ('"frames": 5', "frames 5"), ('"size": [32, 32]', "32x32")):
        path.write_text(f'{{"prompt": "a", {field}}}')
        with pytest.raises(InputError, match=f"line 1: asks for {says}"):
            distinct_prompts(config, select_prompts(config, 0, None))
    path.write_text('{"prompt": "a", "image": "a.png"}')
    with pytest.raises(InputError, match="line 1: begins with a picture, which has no meaning here"):
        select_prompts(config, 0, None)


def test_validation_has_its_own_lengths_and_the_trained_size(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    overrides = [f"validation.val_data_path={path}", "validation.vis_interval=1", "validation.val_samples=2"]
    config = load_config(SHAPES / "base.yaml", overrides, TrainingConfig)
    for field, says in (
        ('"frames": 5', "frames has no meaning in validation"),
        ('"size": [32, 32]', "32x32"),
        ('"image": "a.png"', "a.png: no such picture"),
    ):
        path.write_text(f'{{"prompt": "a", "seed": 3}}\n{{"prompt": "a", {field}}}')
        with pytest.raises(InputError, match=rf"a\.jsonl, line 2: .*{says}"):
            check_sources(config)


@pytest.mark.parametrize("text", ["a cat<image>cat.png", "a \0 cat", "a \ud800"])
def test_prompts_in_python_are_refused_alike(text: str) -> None:
    for take in (whole, in_turn, lambda text: one_for_each(text, None, 1), lambda text: one_for_each([text], None, 1)):
        with pytest.raises(InputError, match=r"^prompt: "):
            take(text)
