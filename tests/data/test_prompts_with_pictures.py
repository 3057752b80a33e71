"""Prompts that name a picture to begin with, in every kind of file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from longsana.data.prompts import Prompt, read_prompts
from longsana.data.story import Change, Mark
from longsana.runtime.errors import InputError

TABLE = "ASPECT_RATIO_VIDEO_480_MS"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with cat.png and my dog.png, beside the working directory with cat.png and cow.png."""
    here, beside = tmp_path / "here", tmp_path / "beside"
    for path in (here / "cat.png", here / "cow.png", beside / "cat.png", beside / "my dog.png"):
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", (4, 4)).save(path)
    monkeypatch.chdir(here)
    monkeypatch.setenv("HOME", str(here))
    return beside


def read(path: Path, content: str, image: Path | None = None) -> list[Prompt]:
    path.write_text(content)
    return read_prompts(
        path, height=32, width=48, aspect_ratio_type=TABLE, seed=0, frames=81, pictures=True, image=image
    )


@pytest.mark.parametrize(
    ("line", "text", "picture", "size"),
    [
        ("a cat<image>cat.png", "a cat", "cat.png", (32, 48)),
        ("  a cat  <image>  cat.png  ", "a cat", "cat.png", (32, 48)),
        ("a cat --ar 1:1<image>cat.png", "a cat", "cat.png", (624, 624)),
        ("a cat --aspect_ratio=1:1 <image> cat.png", "a cat", "cat.png", (624, 624)),
        ("--hw 1:1 a cat<image>cat.png", "a cat", "cat.png", (624, 624)),
        ("a cat<image>cat.png --ar 1:1", "a cat", "cat.png", (624, 624)),
        ("a dog<image>my dog.png --hw 1:1", "a dog", "my dog.png", (624, 624)),
        ("a dog<image>my dog.png", "a dog", "my dog.png", (32, 48)),
    ],
)
def test_a_line_names_a_picture(folder: Path, line: str, text: str, picture: str, size: tuple[int, int]) -> None:
    (prompt,) = read(folder / "a.txt", line)
    assert prompt == Prompt(1, text, (text,), 0, *size, 0, 81, (), folder / picture)
    (prompt,) = read(folder / "a.json", json.dumps({line: None}))
    assert (prompt.text, prompt.image, prompt.height) == (text, folder / picture, size[0])


def test_a_field_names_a_picture(folder: Path) -> None:
    rows = [{"prompt": "a cat --ar 1:1", "image": "cat.png"}, {"prompt": "a dog", "image": None}]
    first, second = read(folder / "a.jsonl", "\n".join(map(json.dumps, rows)))
    assert (first.text, first.image, first.height, second.image) == ("a cat", folder / "cat.png", 624, None)
    (prompt,) = read(folder / "a.json", '{"a dog": {"image": "my dog.png"}}')
    assert prompt.image == folder / "my dog.png"


def test_a_picture_is_beside_the_file_or_in_the_working_directory_or_at_home(folder: Path) -> None:
    here = Path.cwd()
    lines = f"a<image>cat.png\nb<image>cow.png\nc<image>~/cow.png\nd<image>{here / 'cat.png'}\ne<image>../here/cow.png"
    assert [prompt.image for prompt in read(folder / "a.txt", lines)] == [
        *(folder / "cat.png", Path("cow.png"), here / "cow.png", here / "cat.png", folder / "../here/cow.png"),
    ]


def test_a_picture_for_all_is_that_of_prompts_without_one(folder: Path) -> None:
    prompts = read(folder / "a.txt", "a\nb<image>cat.png\na", Path("cow.png"))
    assert [prompt.image for prompt in prompts] == [Path("cow.png"), folder / "cat.png", Path("cow.png")]


def test_a_text_with_another_picture_is_another_prompt(folder: Path) -> None:
    """Repetitions are counted by picture, so that a line with one changes no other line's noise."""
    prompts = read(folder / "a.txt", "a\na<image>cat.png\na\na<image>my dog.png\na<image>cat.png")
    assert [prompt.repetition for prompt in prompts] == [0, 0, 1, 0, 1]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("a<image>no.png", "no.png: no such picture, neither in {folder} nor in the working directory"),
        ("a<image>/no.png", "/no.png: no such picture"),
        ("a<image>~nobody_at_all/a.png", "~nobody_at_all/a.png: not found: there is no such user"),
        ("a<image>cat.png<image>cat.png", "'<image>' stands 2 times in it"),
        ("a<image>", "no path after '<image>'"),
        ("a<image> --ar 1:1", "no path after '<image>'"),
        ("<image>cat.png", "a picture without a prompt"),
        ("--ar 1:1 <image>cat.png", "a picture without a prompt"),
        ("a --ar 1:1<image>cat.png --ar 1:1", "more than one size flag"),
    ],
)
def test_a_wrong_line_is_refused_by_its_number(folder: Path, line: str, says: str) -> None:
    with pytest.raises(InputError) as caught:
        read(folder / "a.txt", f"fine\n{line}")
    message = str(caught.value)
    assert message.startswith(f"{folder / 'a.txt'}, line 2: {says.format(folder=folder)}") and "\n" not in message


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"prompt": "a<image>cat.png", "image": "cat.png"}, "both '<image>' and the field image; keep one of them"),
        ({"prompt": " ", "image": "cat.png"}, "a picture without a prompt"),
        ({"prompt": "a", "image": 3}, "image=3: must be the path of a picture"),
    ],
)
def test_a_wrong_field_is_refused_by_its_line(folder: Path, row: dict[str, object], says: str) -> None:
    with pytest.raises(InputError) as caught:
        read(folder / "a.jsonl", json.dumps(row))
    assert str(caught.value) == f"{folder / 'a.jsonl'}, line 1: {says}"


def test_each_part_of_a_story_names_its_picture(folder: Path) -> None:
    """A flag stands where it may; what a line says with pictures and without has one text, and so one noise."""
    lines = [
        "a[5s] | [cut] b | c --ar 1:1",
        "a<image>cat.png[5s] --ar 1:1 | [cut] b<image>my dog.png | c",
        "a[5s] | [cut] b<image>my dog.png --ar 1:1 | c",
        "a[5s] | [cut] b | c<image>cow.png --ar 1:1",
    ]
    plain, both, later, last = read(folder / "a.txt", "\n".join(lines), None)
    cat, dog = folder / "cat.png", folder / "my dog.png"
    assert {(one.text, one.parts, one.marks, one.height) for one in (plain, both, later, last)} == {
        ("a[5s] | [cut] b | c", ("a", "b", "c"), (Mark(5), Mark(None, Change("cut")), Mark()), 624)
    }
    assert [one.pictures for one in (plain, both, later, last)] == [
        {},
        {0: cat, 1: dog},
        {1: dog},
        {2: Path("cow.png")},
    ]
    assert (both.image, dict(both.cuts), later.image) == (cat, {1: dog}, None)
    assert [one.repetition for one in (plain, both, later, last)] == [0, 0, 0, 0]


def test_a_field_or_the_flag_is_the_first_parts(folder: Path) -> None:
    rows = [
        {"prompt": "a[5s] | [cut] b<image>my dog.png", "image": "cat.png"},
        {"prompt": "a[5s] | [cut] b<image>my dog.png"},
        {"prompt": "a<image>my dog.png[5s] | [cut] b"},
    ]
    both, later, own = read(folder / "a.jsonl", "\n".join(map(json.dumps, rows)), Path("cow.png"))
    dog = folder / "my dog.png"
    assert both.pictures == {0: folder / "cat.png", 1: dog} and later.pictures == {0: Path("cow.png"), 1: dog}
    assert own.pictures == {0: dog}
    rows[0]["prompt"] = "a<image>cat.png[5s] | [cut] b"
    with pytest.raises(InputError, match="line 1: both '<image>' and the field image; keep one of them"):
        read(folder / "a.jsonl", json.dumps(rows[0]))
