"""Prompt files: what is read, what a prompt is, and how each wrong line is reported."""

from __future__ import annotations

import random
import re
from pathlib import Path

import pytest

from longsana.data.prompts import Prompt, read_prompts, training_prompts
from longsana.encoders.text import with_motion
from longsana.runtime.errors import InputError

TABLE = "ASPECT_RATIO_VIDEO_480_MS"
SAMPLES = Path(__file__).parents[2] / "asset" / "samples"


def read(tmp_path: Path, content: str | bytes, aspect_ratio_type: str = TABLE) -> list[Prompt]:
    path = tmp_path / "prompts.txt"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return read_prompts(path, height=480, width=832, aspect_ratio_type=aspect_ratio_type)


def prompt(text: str) -> Prompt:
    return Prompt(line=1, text=text, parts=(text,), repetition=0, height=480, width=832)


def test_lines_keep_their_numbers_over_blank_ones(tmp_path: Path) -> None:
    prompts = read(tmp_path, "\n  a cat \n\n \t\r\na dog\r\nlast, without a newline")
    assert [(p.line, p.text) for p in prompts] == [(2, "a cat"), (5, "a dog"), (6, "last, without a newline")]
    assert all((p.height, p.width, p.parts) == (480, 832, (p.text,)) for p in prompts)


def test_a_byte_order_mark_is_no_part_of_the_prompt(tmp_path: Path) -> None:
    assert [p.text for p in read(tmp_path, b"\xef\xbb\xbfa cat\nein K\xc3\xa4fer")] == ["a cat", "ein Käfer"]


def test_unusual_line_separators_inside_a_prompt_do_not_split_it(tmp_path: Path) -> None:
    assert [p.line for p in read(tmp_path, "one\u2028still one\x0bstill one\ntwo")] == [1, 2]


def test_repetitions_are_counted_by_text_and_survive_shuffling(tmp_path: Path) -> None:
    lines = ["a cat", "a dog", "a cat", "a cat --ar 1:1", "a cow", "a dog"]
    prompts = read(tmp_path, "\n".join(lines))
    assert [p.repetition for p in prompts] == [0, 0, 1, 2, 0, 1]
    identities = {(p.text, p.repetition) for p in prompts}
    assert len(identities) == len(lines)
    for seed in range(5):
        random.Random(seed).shuffle(lines)
        assert {(p.text, p.repetition) for p in read(tmp_path, "\n".join(lines))} == identities


@pytest.mark.parametrize(
    ("line", "text", "size"),
    [
        ("a cat --ar 9:16", "a cat", (480, 832)),
        ("a cat --ar 16:9", "a cat", (832, 480)),
        ("--aspect_ratio 1:1 a cat", "a cat", (624, 624)),
        ("a black --hw 480:832 cat", "a black cat", (480, 832)),
        ("a cat --ar=1.5:1", "a cat", (768, 528)),
        ("a cat <split> a dog --ar 1:1", "a cat <split> a dog", (624, 624)),
        ("a cat --ar 1:1<split>a dog", "a cat <split>a dog", (624, 624)),
    ],
)
def test_size_flags(tmp_path: Path, line: str, text: str, size: tuple[int, int]) -> None:
    (found,) = read(tmp_path, line)
    assert (found.text, (found.height, found.width)) == (text, size)


@pytest.mark.parametrize("text", ["a cat -- black, white -- walks", "wait--ar 1:1", "a --style raw cat", "-ar 1:1 cat"])
def test_dashes_that_are_no_flags_are_text(tmp_path: Path, text: str) -> None:
    assert read(tmp_path, text, "none")[0].text == text


def test_split(tmp_path: Path) -> None:
    (found,) = read(tmp_path, " a cat sits <split>it runs<split> it sleeps ")
    assert found.parts == ("a cat sits", "it runs", "it sleeps")
    assert found.text == "a cat sits <split>it runs<split> it sleeps"


@pytest.mark.parametrize(
    ("content", "table", "message"),
    [
        ("", TABLE, r"prompts\.txt: no prompts"),
        (b"\xef\xbb\xbf \n\t\n", TABLE, r"prompts\.txt: no prompts"),
        (b"fine\n\nbr\xfcllend\n", TABLE, r"prompts\.txt, line 3: not UTF-8 \(byte 0xfc at 2\)"),
        ("a cat".encode("utf-16"), TABLE, r"line 1: not UTF-8"),
        ("fine\na cat --ar", TABLE, r"line 2: --ar : expected height:width"),
        ("a cat --ar wide", TABLE, r"line 1: --ar wide: expected"),
        ("a cat --ar 16/9", TABLE, r"line 1: --ar 16/9: expected"),
        ("a cat --ar 0:9", TABLE, r"line 1: --ar 0:9: expected"),
        ("a cat --hw 9:-1", TABLE, r"line 1: --hw 9:-1: expected"),
        ("a cat --ar 1:1, black", TABLE, r"line 1: --ar 1:1,: expected"),
        ("a cat --ar 1:1 --hw 1:1", TABLE, r"line 1: more than one size flag \(--ar, --hw\)"),
        ("a cat --aspect-ratio 1:1", TABLE, r"line 1: .*did you mean --aspect_ratio\?"),
        ("a cat --AR 1:1", TABLE, r"line 1: .*did you mean --ar\?"),
        ("fine\n\na cat --ar 1:1", "none", r"line 3: .*sampling\.aspect_ratio_type"),
        ("a cat --ar 1:1", "ASPECT_RATIO_VIDEO_480_TEST", r"no aspect ratio table"),
        ("--ar 1:1", TABLE, r"line 1: a size flag without a prompt"),
        ("a cat <split> ", TABLE, r"line 1: a part beside '<split>' is empty"),
        ("a cat <split><split> b", TABLE, r"line 1: a part beside '<split>' is empty"),
        ("<split>", TABLE, r"line 1: a part beside '<split>' is empty"),
    ],
)
def test_each_mistake_is_one_line_that_says_where(
    tmp_path: Path, content: str | bytes, table: str, message: str
) -> None:
    with pytest.raises(InputError, match=message) as caught:
        read(tmp_path, content, table)
    assert "\n" not in str(caught.value)


def test_a_missing_file_and_a_directory(tmp_path: Path) -> None:
    for path, message in ((tmp_path / "none.txt", "none.txt: no such prompt file"), (tmp_path, "a directory")):
        with pytest.raises(InputError, match=message):
            read_prompts(path, height=480, width=832, aspect_ratio_type="none")


@pytest.mark.parametrize(
    ("text", "slug"),
    [
        ("A Cat, sleeping!", "a-cat-sleeping"),
        ("../../etc/passwd", "etc-passwd"),
        ("Käfer & Ölbäume", "kafer-olbaume"),
        (
            "one two three four five six seven eight nine tenth eleven",
            "one-two-three-four-five-six-seven-eight-nine-tenth",
        ),
        ("one two three four five six seven eight nine tenths", "one-two-three-four-five-six-seven-eight-nine"),
        ("x" * 300, "x" * 50),
    ],
)
def test_slug(text: str, slug: str) -> None:
    assert prompt(text).slug == slug


@pytest.mark.parametrize("text", ["猫が走る", "...", "CON", "lpt1", "nul."])
def test_slug_of_a_text_that_gives_no_file_name(text: str) -> None:
    slug = prompt(text).slug
    assert re.fullmatch(r"prompt-[0-9a-f]{10}", slug)
    assert slug == prompt(text).slug != prompt(text + "!").slug


def test_motion_score() -> None:
    assert with_motion(" a cat. ", 10) == with_motion(" a cat. ", 10, high=True) == "a cat. motion score: 10."
    assert with_motion("a cat.", 0) == with_motion("a cat.", -1) == "a cat. low motion"
    assert with_motion("a cat.", 0, high=True) == "a cat. high motion"
    assert with_motion(" a cat. ", None) == " a cat. "


@pytest.mark.parametrize(("name", "count"), [("video_prompts_samples.txt", 12), ("shapes_prompts.txt", 4)])
def test_the_samples(name: str, count: int) -> None:
    prompts = read_prompts(SAMPLES / name, height=480, width=832, aspect_ratio_type="none")
    assert len({p.text for p in prompts}) == len({p.slug for p in prompts}) == count
    if count == 12:
        assert all(60 <= len(p.text.split()) <= 110 for p in prompts)


def test_a_line_of_training_prompts_is_a_prompt(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes(
        "\ufeff  a red circle \r\n\n \t\na red circle\n--ar 9:16 flags are text <split> and so is this\n"
        "caf\u00e9 \u2028 one line".encode()
    )
    assert training_prompts(path) == [
        "a red circle",
        "a red circle",
        "--ar 9:16 flags are text <split> and so is this",
        "caf\u00e9 \u2028 one line",
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "no prompts"), (b" \n\n", "no prompts"), (b"good\n\nb\xe4d\n", "line 3: not UTF-8")],
)
def test_training_files_without_prompts(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        training_prompts(path)


def test_missing_training_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    download = "hf download gdhe17/Self-Forcing vidprom_filtered_extended.txt --local-dir data/longsana"
    with pytest.raises(InputError, match=r"data\.data_path.*not found") as published:
        training_prompts(tmp_path / "vidprom_filtered_extended.txt")
    assert download in str(published.value)
    with pytest.raises(InputError, match=r"data\.data_path.*not found") as other:
        training_prompts("mine.txt")
    assert "hf download" not in str(other.value)
    with pytest.raises(InputError, match="one prompt a line"):
        training_prompts(tmp_path)
