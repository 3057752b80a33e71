"""Videos that begin from a saved state, a film or a picture, by the command."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import imageio.v3 as iio
import numpy as np
import pytest
from PIL import Image

from longsana.evaluation.videos import describe
from longsana.runtime.video import VideoWriter
from longsana.sampling.continuation import Continuation
from tests.pipelines.repository import few_blocks

from .conftest import SHIPPED, assert_whole, frames_of, latents, sidecars

Command = Callable[..., int]
Prompts = Callable[..., Path]
# Chunks of 2 latents, 8 frames: 3, 2, 2, 2 of them make 33 frames, of which lossless files keep every bit but colours'.
LONG, FULL = ("--num_frames", "33"), ("--save_state", "full")


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


def pixels(folder: Path) -> np.ndarray:
    (video,) = folder.glob("*.mp4")
    return np.asarray(iio.imread(video, plugin="pyav"))


def state_in(folder: Path, name: str = "*.safetensors") -> Path:
    (state,) = folder.glob(name)
    return state


def shot(path: Path, frames: int, size: tuple[int, int] = (60, 80), fps: float = 8.0) -> Path:
    """A film of a bright square that moves to the right on grey."""
    pictures = np.full((frames, *size, 3), 90, np.uint8)
    for index in range(frames):
        pictures[index, 20:36, 2 * index : 2 * index + 16] = (200, 60, 40)
    with VideoWriter(path, fps, *size, crf=0, preset="ultrafast", threads=1) as video:
        video.append(pictures)
    return path


def test_a_video_in_two_commands_is_the_uncut_one(command: Command, prompts: Prompts, out: Path) -> None:
    """Its latents by the decoder's whole memory and by the last latents; nothing needs to be said again but weights."""
    path = prompts("a red circle<split>a blue square")
    assert (
        command("--txt_file", path, *LONG, *SHIPPED, "--dataset", "uncut", "--seed", "3", "--save_every", "1", *FULL)
        == 0
    )
    assert len(list((out / "uncut").glob("*.safetensors"))) == 4
    (whole,) = sidecars(out / "uncut")
    assert whole["states"] == sorted(whole["states"]) and whole["saved"] == ["full", 1]
    after = state_in(out / "uncut", "*.chunk00002.safetensors")
    assert command("--from_state", after, "--num_frames", "17", *SHIPPED, "--dataset", "rest") == 0
    (rest,) = sidecars(out / "rest")
    assert (rest["frames"], rest["seed"], rest["prompt"]) == (16, 3, "a red circle<split>a blue square")
    assert rest["began"]["given_frames"] == 0 and len(rest["began"]["sha256"]) == 64
    # x264 sees other frames before them; what it is given is compared in tests/sampling/test_continuation.py.
    difference = pixels(out / "uncut")[17:].astype(int) - pixels(out / "rest")
    assert np.abs(difference).mean() < 1
    assert describe(state_in(out / "rest", "*.mp4")).boundaries == (8,)
    assert describe(state_in(out / "uncut", "*.mp4")).boundaries == (9, 17, 25)


def test_states_after_a_first_chunk_of_its_own(command: Command, prompts: Prompts, out: Path) -> None:
    """9 latents are chunks of 1, 2, 2, 2, 2; a story is placed by them, and each state goes on with what is left."""
    path = prompts("a red circle[1s] | [recache=1] a blue square")
    first = ("--sampling.first_chunk_frames", "1")
    call = ("--txt_file", path, *LONG, *first, "--seed", "3", "--save_every", "1", *FULL)
    assert command(*call, "--dataset", "uncut") == 0
    (whole,) = sidecars(out / "uncut")
    assert [(part["chunk"], part["frame"]) for part in whole["parts"]] == [(0, 0), (2, 9)]
    assert describe(state_in(out / "uncut", "*.mp4")).boundaries == (1, 9, 17, 25)
    end = Continuation.load(state_in(out / "uncut", "*-square.safetensors"))
    assert end.plan == (1, 2, 2, 2, 2) and end.chunk == 5
    for done, left in enumerate((32, 24, 16, 8), 1):
        state = state_in(out / "uncut", f"*.chunk{done:05d}.safetensors")
        assert command("--from_state", state, "--num_frames", left + 1, "--dataset", f"rest{done}", *FULL) == 0
        (rest,) = sidecars(out / f"rest{done}")
        assert rest["config"]["sampling"]["first_chunk_frames"] == 1, "which the state says"
        again = Continuation.load(state_in(out / f"rest{done}"))
        assert all((one == other).all() for one, other in zip(end.network[:3], again.network[:3], strict=True))
    assert command(*call[:2], *LONG, *first, "--sampling_algo", "flow_euler") == 2


def test_a_chain_of_states_is_the_uncut_video(command: Command, prompts: Prompts, out: Path) -> None:
    path = prompts("a red circle")
    assert command("--txt_file", path, *LONG, "--dataset", "uncut", *FULL) == 0
    assert command("--txt_file", path, "--num_frames", "17", "--dataset", "a", *FULL) == 0
    assert command("--from_state", state_in(out / "a"), "--num_frames", "9", "--dataset", "b", *FULL) == 0
    assert command("--from_state", state_in(out / "b"), "--num_frames", "9", "--dataset", "c", *FULL) == 0
    uncut, chained = (Continuation.load(state_in(out / name)) for name in ("uncut", "c"))
    assert all((one == other).all() for one, other in zip(uncut.network[:3], chained.network[:3], strict=True))
    assert uncut.decoder is not None and chained.decoder is not None
    assert all(
        (one == other).all() for one, other in zip(uncut.decoder.features, chained.decoder.features, strict=True)
    )
    assert uncut.network.frames == chained.network.frames == 9


@pytest.mark.parametrize("change", ["cut", "keep", "recache=2", "rebuild=1"])
def test_a_story_goes_on_where_it_was(command: Command, prompts: Prompts, out: Path, change: str) -> None:
    """Before its change, at it, and after it: the state in the end is the uncut video's."""
    path, blended = prompts(f"a red circle[2s] | [{change}] a blue square"), ("--sampling.transition_chunks", "1")
    assert command("--txt_file", path, *LONG, "--dataset", "uncut", "--save_every", "1", *FULL, *blended) == 0
    (whole,) = sidecars(out / "uncut")
    assert [part["chunk"] for part in whole["parts"]] == [0, 2]
    uncut = Continuation.load(state_in(out / "uncut", "*[!0-9].safetensors"))
    for done, parts in {
        1: [("a red circle", 0, 0), ("a blue square", 1, 8)],
        2: [("a blue square", 0, 0)],
        3: [("a blue square", 0, 0)],
    }.items():
        after, own = state_in(out / "uncut", f"*.chunk0000{done}.safetensors"), out / f"rest{done}"
        left = str(8 * (4 - done) + 1)
        assert command("--from_state", after, "--num_frames", left, "--dataset", own.name, *FULL) == 0, "the state says"
        (rest,) = sidecars(own)
        assert [(part["text"], part["chunk"], part["frame"]) for part in rest["parts"]] == parts
        gone_on = Continuation.load(state_in(own, "*[!0-9].safetensors"))
        assert uncut.network.frames == gone_on.network.frames == 9
        assert all((one == other).all() for one, other in zip(uncut.network[:3], gone_on.network[:3], strict=True))


def test_forks_by_seed_and_caption(command: Command, prompts: Prompts, out: Path, tmp_path: Path) -> None:
    assert command("--txt_file", prompts("a red circle"), "--dataset", "a", "--save_state", "latents") == 0
    state = state_in(out / "a")
    forks = tmp_path / "forks.jsonl"
    lines = [{"prompt": "a red circle"}, {"prompt": "a red circle", "seed": 5}, {"prompt": "a blue square"}]
    forks.write_text("\n".join(map(json.dumps, lines)))
    assert command("--from_state", state, "--txt_file", forks, "--dataset", "forks", "--bs", "3") == 0
    assert_whole(out / "forks", 3, 16)
    assert len({record["latents_sha256"] for record in sidecars(out / "forks")}) == 3
    assert command("--from_state", state, "--dataset", "own") == command("--from_state", state, "--seed", "5") == 0
    own, other = latents(out / "own"), latents(out / "videos")
    assert own != other


def test_states_are_made_where_they_are_missing(command: Command, prompts: Prompts, out: Path) -> None:
    path = prompts("a red circle")
    common = ("--txt_file", path)
    assert command(*common) == 0
    (first,) = sidecars(out / "videos")
    assert command(*common, "--save_state", "latents") == 0
    state = state_in(out / "videos")
    moment = state.stat().st_mtime_ns
    assert command(*common, "--save_state", "latents") == command(*common) == 0, "both are there"
    assert state.stat().st_mtime_ns == moment
    (second,) = sidecars(out / "videos")
    assert second["latents_sha256"] == first["latents_sha256"] and second["fingerprint"] == first["fingerprint"]
    state.unlink()
    assert command(*common, "--save_state", "latents") == 0 and state.is_file()
    # Of another video by that name nothing stays.
    assert command(*common, "--seed", "9") == 0
    assert_whole(out / "videos", 1)


@pytest.mark.parametrize("chunk_frames", [2, 20])
def test_a_film_first(command: Command, prompts: Prompts, out: Path, tmp_path: Path, chunk_frames: int) -> None:
    film = shot(tmp_path / "film.mp4", 23)
    call = ("--txt_file", prompts("a red square"), "--video", film, *SHIPPED, "--sampling.chunk_frames", chunk_frames)
    assert command(*call) == 0
    (record,) = sidecars(out / "videos")
    assert record["frames"] == 21 + 16 and record["began"]["given_frames"] == 21
    assert record["began"]["film_frames"] == 21, "two more fill no latent"
    shown = pixels(out / "videos")
    assert shown.shape == (37, 32, 48, 3)
    assert 21 in describe(state_in(out / "videos", "*.mp4")).boundaries
    assert command(*call, "--new_frames_only", "--dataset", "new") == 0
    new = pixels(out / "new")
    assert new.shape == (16, 32, 48, 3) and np.abs(shown[21:].astype(int) - new).mean() < 2
    assert command("--txt_file", prompts("a red square"), *SHIPPED, "--dataset", "plain") == 0
    assert latents(out / "plain") != latents(out / "new")
    # Another film is another video, this one elsewhere is the same.
    moved = film.rename(tmp_path / "moved.mp4")
    before = state_in(out / "videos", "*.mp4").stat().st_mtime_ns
    assert command(*(moved if word == film else word for word in call)) == 0
    assert state_in(out / "videos", "*.mp4").stat().st_mtime_ns == before
    assert command(*(shot(film, 22) if word == film else word for word in call)) == 0
    assert state_in(out / "videos", "*.mp4").stat().st_mtime_ns != before


def test_a_state_after_a_film(command: Command, prompts: Prompts, out: Path, tmp_path: Path) -> None:
    film = shot(tmp_path / "film.mp4", 21)
    call = ("--txt_file", prompts("a red square"), "--video", film)
    assert command(*call, *LONG, "--dataset", "uncut", *FULL) == 0
    assert command(*call, "--dataset", "a", *FULL) == 0
    assert command("--from_state", state_in(out / "a"), "--dataset", "b", *FULL) == 0
    uncut, gone_on = (Continuation.load(state_in(out / name)) for name in ("uncut", "b"))
    assert uncut.network.frames == gone_on.network.frames == 6 + 8
    assert all((one == other).all() for one, other in zip(uncut.network[:3], gone_on.network[:3], strict=True))


def test_a_picture_first(command: Command, prompts: Prompts, out: Path, tmp_path: Path) -> None:
    Image.new("RGB", (300, 200), (200, 30, 30)).save(tmp_path / "red.png")
    assert command("--txt_file", prompts("a red picture", "another"), "--video", tmp_path / "red.png", "--bs", "2") == 0
    assert_whole(out / "videos", 2, 17)
    assert [frames_of(path)[0] for path in (out / "videos").glob("*.mp4")] == [17, 17]


def test_a_story_that_does_not_fit_its_state_is_one_line(
    command: Command, prompts: Prompts, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    story = prompts("a red circle[1s] | [rebuild=1] a blue square[2s] | a red ring")
    assert command("--txt_file", story, *LONG, "--dataset", "a", "--save_every", "1", "--save_state", "latents") == 0
    state = state_in(out / "a", "*.chunk00001.safetensors")
    fork = prompts("a red circle[1s] | [rebuild=3] a blue square", name="fork.txt")
    cases: list[tuple[tuple[Any, ...], str]] = [
        (("--txt_file", fork, *LONG), "rebuild=3: reaches back 3 chunks, where the state holds 1 and 1 come after it"),
        (("--sampling.chunk_frames", "3", "--num_frames", "25"), "chunks of 3, 3 latents, where the state's story was"),
    ]
    for arguments, message in cases:
        capsys.readouterr()
        assert command("--from_state", state, *arguments, "--dataset", "refused") == 2, arguments
        told = capsys.readouterr().err.strip().splitlines()
        assert message in told[-1] and told[-1].startswith("error: "), (arguments, told)
    assert not list((out / "refused").glob("*.mp4"))


def test_what_cannot_be_gone_on_from_is_one_line(
    command: Command, prompts: Prompts, out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = prompts("a red circle")
    assert command("--txt_file", path, "--dataset", "a", "--save_state", "latents") == 0
    state, film = state_in(out / "a"), shot(tmp_path / "film.mp4", 40)
    damaged, cut, sound = tmp_path / "damaged.safetensors", tmp_path / "cut.mp4", tmp_path / "sound.mp4"
    damaged.write_bytes(state.read_bytes()[:-9])
    cut.write_bytes(film.read_bytes()[: len(film.read_bytes()) * 2 // 3])
    sound.write_bytes(b"no film at all" * 9)
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"0" * 50)
    base = few_blocks("base")
    wide = prompts('{"prompt": "a", "size": [32, 64]}', name="wide.jsonl")
    cases: list[tuple[tuple[Any, ...], str]] = [
        (("--from_state", damaged), f"error: {damaged}: not a saved state of a video, or damaged"),
        (("--from_state", tmp_path / "none"), "cannot be read (No such file"),
        (("--from_state", state, "--model_path", base), f"error: {state}: of another network (fingerprint "),
        (("--from_state", state, "--num_cached_blocks", "2"), "of another network or num_cached_blocks"),
        (("--from_state", state, "--model.state_decay", "0.9"), f"error: {state}: of another network (fingerprint "),
        (("--from_state", state, "--height", "64"), f"--height 64: the video of the state {state} has 32"),
        (("--from_state", state, "--txt_file", wide), "line 1: 32x64, and the state"),
        (("--from_state", state, "--num_frames", "1"), "num_frames=1: adds no frame"),
        (("--from_state", state, "--video", film), "--video and --from_state: a video begins from one of them"),
        (("--from_state", state, "--sampling_algo", "flow_euler"), "--from_state: has no meaning for the sampler"),
        (("--video", cut), f"error: {cut}: c"),
        (("--video", sound), f"error: {sound}: cannot be read as a film or a picture"),
        (("--video", tmp_path / "broken.png"), "broken.png: cannot be read as a film or a picture"),
        (("--video", tmp_path / "none.mp4"), "none.mp4: cannot be read as a film or a picture (No such file"),
        (("--video", tmp_path), "cannot be read as a film or a picture (Is a directory"),
        (("--new_frames_only",), "--new_frames_only: has no meaning without --video"),
        (("--save_every", "2"), "--save_every: has no meaning without --save_state"),
        (("--save_every", "-2", "--save_state", "full"), "--save_every -2: must be 0"),
        (("--save_state", "some"), "--save_state some: must be one of none, latents, full"),
    ]
    for arguments, message in cases:
        capsys.readouterr()
        text = () if "--txt_file" in arguments else ("--txt_file", path)
        assert command(*arguments, *text, "--dataset", "refused") == 2, arguments
        told = capsys.readouterr().err.strip().splitlines()
        assert message in told[-1] and told[-1].startswith("error: "), (arguments, told)
    assert not list((out / "refused").glob("*.mp4"))


@pytest.mark.parametrize("first", ["absorb", "pin"])
def test_a_story_with_a_picture_goes_on_where_it_was(
    command: Command, prompts: Prompts, out: Path, tmp_path: Path, first: str
) -> None:
    """The state holds the picture that is to come, and says how it begins its chunk: its file may be gone."""
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8)).save(tmp_path / "p.png")
    path = prompts("a red circle[2s] | [cut] a blue square<image>p.png[1s] | [recache=2] a red ring")
    saving = ("--save_every", "1", *FULL, "--sampling.image_first", first)
    assert command("--txt_file", path, *LONG, "--dataset", "uncut", *saving) == 0
    (tmp_path / "p.png").unlink()
    (whole,) = sidecars(out / "uncut")
    assert [part["chunk"] for part in whole["parts"]] == [0, 2, 3]
    uncut = Continuation.load(state_in(out / "uncut", "*[!0-9].safetensors"))
    for done in (1, 2, 3):
        step = state_in(out / "uncut", f"*.chunk0000{done}.safetensors")
        assert list(Continuation.load(step).pictures) == ([1] if done < 3 else [])
        for number in range(done, 4):  # a chunk at a time, each from the state before
            name = f"from{done}step{number}"
            assert command("--from_state", step, "--num_frames", "9", "--dataset", name, *FULL) == 0
            step = state_in(out / name)
        (rest,) = sidecars(out / f"from{done}step{2 if done < 3 else 3}")
        pictured = [part for part in rest["parts"] if "image" in part]
        assert [part["text"] for part in pictured] == (["a blue square"] if done < 3 else [])
        assert all(part["image_sha256"] == rest["began"]["sha256"] for part in pictured)
        gone_on = Continuation.load(step)
        assert uncut.network.frames == gone_on.network.frames == 9
        assert all((one == other).all() for one, other in zip(uncut.network[:3], gone_on.network[:3], strict=True))
        assert uncut.latents is not None and (uncut.latents == gone_on.latents).all()


def test_a_continuation_is_cut_to_a_picture(
    command: Command, prompts: Prompts, out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """From a state by another story and by its own with another picture, and from a film; not at the very beginning."""
    for seed, name in enumerate(("p.png", "q.png")):
        Image.fromarray(np.random.default_rng(seed).integers(0, 256, (40, 50, 3), np.uint8)).save(tmp_path / name)
    own = "a red circle[1s] | [cut] a blue square<image>p.png"
    saving = ("--save_every", "1", *FULL)
    assert command("--txt_file", prompts(own), "--num_frames", "25", "--dataset", "a", *saving) == 0
    state = state_in(out / "a", "*.chunk00001.safetensors")
    lines = prompts("a ring[1s] | [cut] a square<image>q.png", own, own.replace("p.png", "q.png"), name="more.txt")
    begins = ("--from_state", state, "--txt_file", lines, "--num_frames", "17", "--unified_noise", "--bs", "3")
    assert command(*begins, "--dataset", "forks", *FULL) == 0
    fork, same, other = sidecars(out / "forks")
    assert [record["batch"] for record in (fork, same, other)] == [1, 2, 2]
    assert [[part["chunk"] for part in record["parts"] if "image" in part] for record in (fork, same, other)] == [
        *([1], [0], [0]),
    ]
    assert len({record["latents_sha256"] for record in (fork, same, other)}) == 3
    assert command("--video", tmp_path / "p.png", "--txt_file", lines, "--num_frames", "17", "--dataset", "film") == 0
    assert [part["frame"] for part in sidecars(out / "film")[0]["parts"]] == [1, 9]
    first = prompts("a ring<image>p.png[1s] | [cut] a square<image>q.png", name="first.txt")
    picture = ("--image", tmp_path / "p.png")
    for begins in (("--from_state", state), ("--video", tmp_path / "p.png")):
        capsys.readouterr()
        assert command(*begins, *picture, "--dataset", "refused") == 2
        assert "--image: a picture to begin with, and what the video goes on from" in capsys.readouterr().err
        capsys.readouterr()
        assert command(*begins, "--txt_file", first, "--num_frames", "17", "--dataset", "refused") == 2
        assert "line 1: a picture to begin with, and what the video goes on from" in capsys.readouterr().err


def test_the_line_of_a_story_goes_on_from_its_states_as_it_is(
    command: Command, prompts: Prompts, out: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Parts that were before the state have had their pictures, and need no room in what follows."""
    for seed, name in enumerate(("p.png", "q.png")):
        Image.fromarray(np.random.default_rng(seed).integers(0, 256, (40, 50, 3), np.uint8)).save(tmp_path / name)
    story = prompts(
        "a ring<image>p.png[1s] | [cut] a red circle<image>q.png[1s] | [cut] a square<image>p.png | a cross"
    )
    caplog.set_level("INFO")
    assert command("--txt_file", story, *LONG, "--dataset", "whole", "--save_every", "1", *FULL) == 0
    assert "change nothing here" not in caplog.text
    (whole,) = sidecars(out / "whole")
    state = state_in(out / "whole", "*.chunk00003.safetensors")
    assert command("--from_state", state, "--txt_file", story, "--num_frames", "9", "--dataset", "rest", *FULL) == 0
    assert "line 1: pictures of parts that began before the state change nothing here" in caplog.text
    ends = [Continuation.load(state_in(out / name, "*[!0-9].safetensors")) for name in ("whole", "rest")]
    assert whole["frames"] == 33 and ends[0].latents is not None and (ends[0].latents == ends[1].latents).all()
