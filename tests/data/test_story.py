"""Stories: what divides a prompt, what a part may say, and where it begins in a video."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from longsana.chunks import ChunkPlan
from longsana.data.prompts import read_prompts
from longsana.data.story import Change, Mark, Outline, Placed, place_parts, read_parts, shared_changes, take_pictures
from longsana.encoders.geometry import GEOMETRIES
from longsana.runtime.errors import InputError

SAMPLES = sorted((Path(__file__).parents[2] / "asset" / "samples").glob("*.txt"))
WAN = GEOMETRIES["WanVAE"]
KEEP, CUT = Change(), Change("cut")
MINUTE = ChunkPlan.split(241, 10)  # 961 pictures in 24 chunks, the first of 41, the others of 40


def marked(*marks: tuple[float | None, str | None]) -> tuple[Mark, ...]:
    return tuple(Mark(seconds, None if change is None else Change.parse(change)) for seconds, change in marks)


def placed(*seconds: float | None, plan: ChunkPlan = MINUTE, fps: float = 16.0) -> list[int]:
    marks = tuple(Mark(one) for one in seconds)
    return [part.chunk for part in place_parts(len(marks), marks, plan, WAN, fps, KEEP)]


# The notation ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "words", "marks"),
    [
        (
            "a harbour at dawn[5s] | the same harbour in a storm[10s] | [cut] a lighthouse at night",
            ("a harbour at dawn", "the same harbour in a storm", "a lighthouse at night"),
            marked((5, None), (10, None), (None, "cut")),
        ),
        ("a | [recache=2] b [2.5s]", ("a", "b"), marked((None, None), (2.5, "recache=2"))),
        ("a | [rebuild=3]b | c", ("a", "b", "c"), marked((None, None), (None, "rebuild=3"), (None, None))),
        ("a | [keep] b", ("a", "b"), marked((None, None), (None, "keep"))),
        ("a [1] b[2s] | [x] c", ("a [1] b", "[x] c"), marked((2, None), (None, None))),
        (r"a[5s] | b \| c \[x] | d\[3s]", ("a", "b | c [x]", "d[3s]"), marked((5, None), (None, None), (None, None))),
        (r"a[5s] | \[cut] b", ("a", "[cut] b"), marked((5, None), (None, None))),
        ("a\t|\tb[5s]", ("a", "b"), marked((None, None), (5, None))),
    ],
)
def test_a_story_is_divided(text: str, words: tuple[str, ...], marks: tuple[Mark, ...]) -> None:
    assert read_parts(text) == (words, marks)


@pytest.mark.parametrize(
    "text",
    [
        "a | b", "a[5s]", "[cut] a", "a | b | c", "a|b[5s]", "a |b[5s]", "a | b[5s] c", "a | b[s]", "a [5s] b | c",
        "a | [x] b", "| a", "a |", r"a \| b", r"a \[5] b", r"\[", "a | [cutting] b",
    ],
)  # fmt: skip
def test_any_other_text_is_one_part_as_it_is(text: str) -> None:
    assert read_parts(text) == ((text,), ())


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        (r"a \| b[5s]", "a | b[5s]"),
        (r"a | b\[5s]", "a | b[5s]"),
        (r"a | \[cut] b", "a | [cut] b"),
        (r"a \| \[cut] b \\ c", r"a | [cut] b \\ c"),
    ],
)
def test_an_escaped_story_is_none(text: str, plain: str) -> None:
    assert read_parts(text) == ((plain,), ())


def test_the_other_notation_has_no_marks() -> None:
    assert read_parts("a[5s] <split> [cut] b") == (("a[5s]", "[cut] b"), ())
    assert read_parts("a | b<split>c") == (("a | b", "c"), ())


@pytest.mark.parametrize("path", SAMPLES, ids=lambda path: path.name)
def test_every_shipped_line_is_what_it_was(path: Path) -> None:
    prompts = read_prompts(path, height=480, width=832, aspect_ratio_type="none")
    lines = [line.strip() for line in path.read_text().splitlines() if line.strip()]
    assert [prompt.text for prompt in prompts] == lines
    assert all(prompt.parts == (prompt.text,) and prompt.marks == () for prompt in prompts)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a[5s] | ", "a part beside ' | ' has no words"),
        ("a[5s] | | b", "a part beside ' | ' has no words"),
        ("a | [cut]", "has no words"),
        ("a | [cut][5s]", "has no words"),
        ("a[0s] | b", "[0s]: no length; write seconds above 0, as in [5s]"),
        ("a[5s] | b[5 s]", "[5 s]: no length"),
        ("a[5s] | b[10s#]", "[10s#]: no length"),
        ("a[5s] | [5s] b", "a length stands at the end of its part"),
        ("a | [recache] b", "'recache' is no change of the past; write keep, recache=K, rebuild=W or cut"),
        ("a | [recache=0] b", "recache=0: must reach back from 1 to 1000 chunks"),
        ("a | [rebuild=1001] b", "rebuild=1001: must reach back from 1 to 1000 chunks"),
        ("a | [rebuild=x] b", "'rebuild=x' is no change of the past"),
        ("a | [cut=2] b", "'cut=2' is no change of the past"),
        ("a | [Cut] b", "did you mean 'cut'?"),
        ("a[5s] | [recahce=2] b", "did you mean 'recache'?"),
        ("[cut] a | b", "[cut] a: the first part has no past that could change"),
        ("a[5s] | b <split> c", "parts between '<split>' and parts between ' | ' in one prompt"),
        ("a<split>", "a part beside '<split>' is empty"),
    ],
)
def test_what_is_nearly_a_mark_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        read_parts(text.strip() if text != "a[5s] | " else text)
    path = tmp_path / "prompts.txt"
    path.write_text(text)
    with pytest.raises(InputError, match=re.escape(f"{path}, line 1: ")):
        read_prompts(path, height=480, width=832, aspect_ratio_type="none")


def test_all_kinds_of_files_have_stories(tmp_path: Path) -> None:
    story = "a[5s] | [recache=2] b --ar 1:1"
    for name, content in {
        "a.txt": story,
        "b.jsonl": '{"prompt": "a[5s] | [recache=2] b --ar 1:1"}',
        "c.json": '{"a[5s] | [recache=2] b --ar 1:1": null}',
    }.items():
        (tmp_path / name).write_text(content)
        (prompt,) = read_prompts(tmp_path / name, height=480, width=832, aspect_ratio_type="ASPECT_RATIO_VIDEO_480_MS")
        assert (prompt.text, prompt.parts) == ("a[5s] | [recache=2] b", ("a", "b"))
        assert prompt.marks == marked((5, None), (None, "recache=2"))
        assert prompt.slug == "a-b"


@pytest.mark.parametrize("text", ["keep", "recache=1", "rebuild=1000", "cut"])
def test_a_change_is_written_as_it_is_read(text: str) -> None:
    assert str(Change.parse(text)) == text


# Places ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("parts", "chunks", "firsts"),
    [(1, 3, [0]), (2, 4, [0, 2]), (3, 3, [0, 1, 2]), (3, 7, [0, 3, 5]), (2, 5, [0, 3])],
)
@pytest.mark.parametrize("story", [False, True])
def test_without_lengths_stretches_are_even(parts: int, chunks: int, firsts: list[int], story: bool) -> None:
    marks = (Mark(),) * parts if story else ()
    found = place_parts(parts, marks, ChunkPlan((10,) * chunks), WAN, 16, KEEP)
    assert [part.chunk for part in found] == firsts


def test_every_part_gets_an_even_stretch() -> None:
    """As chunk c showed part c * parts // chunks before there were stories."""
    for chunks in range(1, 30):
        for parts in range(1, chunks + 1):
            firsts = [part.chunk for part in place_parts(parts, (), ChunkPlan((1,) * chunks), WAN, 16, KEEP)]
            shown = [chunk * parts // chunks for chunk in range(chunks)]
            assert firsts == [shown.index(part) for part in range(parts)]


@pytest.mark.parametrize("marks", [(), (Mark(),) * 4, (Mark(1),) * 4])
def test_more_parts_than_chunks(marks: tuple[Mark, ...]) -> None:
    between = re.escape(" | " if marks else "<split>")
    with pytest.raises(InputError, match=f"4 parts between '{between}' for a video of 3 chunks"):
        place_parts(4, marks, ChunkPlan((10,) * 3), WAN, 16, KEEP)


@pytest.mark.parametrize(
    ("seconds", "firsts"),
    [
        ((5, 10, None), [0, 2, 6]),  # at 5.06 and 15.06 s
        ((20, None, None), [0, 8, 16]),  # 20.06 and 40.06 s
        ((None, 10, None), [0, 10, 14]),  # 25.03 s: 25.06; 35.03 s: 35.06
        ((0.1, 0.1, 0.1, None), [0, 1, 2, 3]),  # a chunk each
        ((None, 0.1, 0.1), [0, 22, 23]),
        ((50, None, 10), [0, 20, 21]),
        ((3.8, None), [0, 1]),  # 3.81 s lies between 2.56 and 5.06 s
        ((3.82, None), [0, 2]),
        ((1, 2), [0, 1]),  # the last goes on to the end
        ((30, 31), [0, 12]),  # half a chunk more than there is
    ],
)
def test_a_part_begins_with_the_nearest_chunk(seconds: tuple[float | None, ...], firsts: list[int]) -> None:
    assert placed(*seconds) == firsts


def test_lengths_are_counted_by_the_frame_rate() -> None:
    assert placed(5, None, fps=32) == [0, 4]
    assert placed(5, None, fps=8) == [0, 1]


def test_no_part_begins_farther_than_half_a_chunk_from_its_time() -> None:
    """Where there is room for it."""
    for tenths in range(20, 560, 7):
        (first,) = placed(tenths / 10, None)[1:]
        start = WAN.pixel_frames(MINUTE.starts[first]) / 16
        assert abs(start - tenths / 10) <= 1.25 + 1e-9


@pytest.mark.parametrize(
    ("seconds", "message"),
    [
        ((60, 60), "its parts last 120 s; the video has 60.06 s: make it longer, or the parts shorter"),
        ((30, 32), "its parts last 62 s; the video has 60.06 s"),
        ((60, 1, None), "its parts last 61 s and leave nothing to the parts without a length"),
    ],
)
def test_lengths_that_do_not_fit(seconds: tuple[float | None, ...], message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        placed(*seconds)


def test_a_part_says_its_change_itself_or_the_setting_does() -> None:
    marks = marked((None, None), (None, "cut"), (None, None), (None, "keep"))
    found = place_parts(4, marks, ChunkPlan((10,) * 4), WAN, 16, Change("recache", 2))
    assert found == (Placed(0, KEEP), Placed(1, CUT), Placed(2, Change("recache", 2)), Placed(3, KEEP))
    assert Outline(found, 4).changes == {1: CUT, 2: Change("recache", 2)}
    even = place_parts(2, (), ChunkPlan((10,) * 4), WAN, 16, CUT)
    assert Outline(even, 4).changes == {2: CUT}


def test_videos_that_are_sampled_together_have_one_history() -> None:
    first, second = (Outline(own, 4) for own in ((Placed(0), Placed(2, CUT)), (Placed(0), Placed(1), Placed(2, CUT))))
    assert shared_changes([first, second]) == {2: CUT}
    with pytest.raises(InputError, match="cannot be sampled together"):
        shared_changes([first, Outline((Placed(0),), 4)])


@pytest.mark.parametrize(
    ("text", "plain", "pictures"),
    [
        ("a | b", "a | b", {}),
        ("a<image>p.png", "a", {0: "p.png"}),
        ("a<image>p | q.png", "a", {0: "p | q.png"}),
        ("a<image>p[5s]", "a", {0: "p[5s]"}),
        ("a<image>a.jpg[5s] | [cut] b<image>b.jpg[5s]", "a[5s] | [cut] b[5s]", {0: "a.jpg", 1: "b.jpg"}),
        ("a  |  [cut] b  <image>  my b.jpg  [5s]  |  c", "a  |  [cut] b[5s]  |  c", {1: "my b.jpg"}),
        ("a[5s] | b | [cut] c<image>c.jpg", "a[5s] | b | [cut] c", {2: "c.jpg"}),
        (r"a \| b[5s] | [cut] \[c] d<image>p\[5s]", r"a \| b[5s] | [cut] \[c] d", {1: "p[5s]"}),
        ("a<split>b<image>p", "a<split>b", {0: "p"}),
    ],
)
def test_a_picture_belongs_to_its_part(text: str, plain: str, pictures: dict[int, str]) -> None:
    """What is left is the story without pictures, whose noise it has."""
    assert take_pictures(text) == (plain, pictures)
    words, marks = read_parts(plain)
    assert max(pictures, default=0) < len(words) and (len(marks) in (0, len(words)))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a<image>p<image>q", "'<image>' stands 2 times in it"),
        ("a[5s] | [cut] b<image>p<image>q", "'<image>' stands 2 times in part 2"),
        ("a[5s] | [cut] b<image>", "no path after '<image>'"),
        ("a[5s] | [cut] b<image>[2s]", "no path after '<image>'"),
        ("a[5s]<image>p | b", "a[5s]<image>p: a length stands at the end of its part, behind its picture"),
    ],
)
def test_a_picture_in_the_wrong_place(text: str, says: str) -> None:
    with pytest.raises(InputError, match=re.escape(says)):
        take_pictures(text)
