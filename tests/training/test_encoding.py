"""Clips in, shards out: what is made of films, on any number of processes, stopped and started, and what is refused."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import shutil
import signal
import sys
import tarfile
import time
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

from longsana.commands import encode, train
from longsana.config import VAEConfig
from longsana.data import survey
from longsana.data.clips import ClipFolder, write_clips
from longsana.data.films import film_frames, fitted
from longsana.data.shards import read_manifest
from longsana.data.sources import find_sources
from longsana.encoders.vae import WanVAE
from longsana.runtime.errors import InputError
from tests.data.test_films import note_turn, shot
from tests.encoders.test_ltx2 import SMALL as LTX2
from tests.forks import Forks

FPS, FRAMES, HEIGHT, WIDTH = 16, 9, 32, 48
SMALL = [
    *("--threads", "1", "--dtype", "float32", "--shard_size", "2"),
    *(f"sampling.height={HEIGHT}", f"sampling.width={WIDTH}", "rollout.num_training_frames=3"),
]


@pytest.fixture(autouse=True)
def own_digests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def films(tmp_path: Path) -> Path:
    """An even film, one with uneven times, one held upright, a webm in a folder; of 3, 2, 1 and 1 clips."""
    folder = tmp_path / "films"
    (folder / "more").mkdir(parents=True)
    uneven = [Fraction(int(t), 100) for t in np.cumsum([0, *np.random.default_rng(0).integers(2, 8, 24)])]
    shot(folder / "even.mp4", [Fraction(n, 30) for n in range(54)])
    shot(folder / "uneven.mov", uneven)
    note_turn(shot(folder / "turned.mp4", [Fraction(n, 16) for n in range(12)]), (0, 1, -1, 0))
    webm(folder / "more/a_red_circle.webm", 20)
    for name in ("even", "uneven", "turned", "more/a_red_circle"):
        (folder / f"{name}.txt").write_text(f"the  film\n{name}\n")
    return folder


def webm(path: Path, count: int) -> None:
    with av.open(str(path), "w") as file:
        stream = file.add_stream("libvpx", rate=30)
        stream.width, stream.height, stream.pix_fmt = 64, 32, "yuv420p"
        for number in range(count):
            frame = av.VideoFrame.from_ndarray(np.full((32, 64, 3), 9 * number, np.uint8), format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, 30)
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))


def main(arguments: Sequence[str]) -> int:
    """Run the command with an output that says that it is a terminal."""
    sys.stderr.isatty = lambda: True  # type: ignore[method-assign]
    return encode.main(arguments)


def content(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*.*"))}


def test_later_frames_are_those_of_the_whole_film(films: Path) -> None:
    """From anywhere, of every kind of file, also of one in memory."""
    for source in find_sources(films):
        whole = list(film_frames(source.place.path, 24.0))
        for first in (1, len(whole) // 2, len(whole) - 1):
            for opened in (source.place.path, io.BytesIO(source.place.path.read_bytes())):
                later = list(film_frames(opened, 24.0, first))
                assert [*map(bytes, later)] == [*map(bytes, whole[first:])], (source.name, first)


def test_a_clip_that_cannot_be_sought_is_read_from_the_beginning(films: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = max(find_sources(films), key=lambda source: source.stamp)
    span = survey.Span(source, 7, 5, 8, source.place.sha256())
    sought = span.read(48, 80)

    def lost(*_: object) -> Iterator[av.VideoFrame]:
        raise ValueError("it cannot be found")

    monkeypatch.setattr("longsana.data.films._decoded", lost)
    assert np.array_equal(span.read(48, 80), sought)


def test_shards_hold_the_films_and_flow_matching_trains_on_them(films: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert encode.main([str(films), "--out", str(out), *SMALL]) == 0
    with pytest.raises(InputError, match=r"out: no manifest.json here; did you mean .*/out/32x48\?$"):
        ClipFolder(out)
    clips = ClipFolder(out / "32x48")
    listed = [json.loads(line) for line in (out / "clips.jsonl").read_text().splitlines()]
    assert [(one["file"], one["second"]) for one in listed] == [
        *(("even.mp4", second) for second in (0.0, 0.562, 1.125)),
        *(("more/a_red_circle.webm", 0.0), ("turned.mp4", 0.0)),
        *(("uneven.mov", second) for second in (0.0, 0.562)),
    ]
    assert (
        list(clips.prompts()) == [one["caption"] for one in listed] and clips[3].prompt == "the film more/a_red_circle"
    )
    vae = WanVAE.load(VAEConfig(vae_pretrained="asset/shapes/vae"), "cpu", torch.float32)
    for item, one in enumerate(listed):
        frames = [*film_frames(films / one["file"], FPS)][round(one["second"] * FPS) :][:FRAMES]
        pixels = torch.from_numpy(np.stack([fitted(frame, HEIGHT, WIDTH) for frame in frames]))
        expected = vae.encode(pixels.permute(3, 0, 1, 2)[None].float() / 127.5 - 1)[0]
        torch.testing.assert_close(clips[item].latents, expected, atol=1e-4, rtol=0, msg=str(one))
    made_by = read_manifest(out / "32x48")[0].made_by
    assert made_by["sampling.fps"] == FPS and made_by["pixel_frames"] == FRAMES and "bicubic" in made_by["fit"]
    summary = json.loads((out / "summary.json").read_text())
    assert (summary["films"], summary["clips"], summary["broken"]) == (4, 7, {})
    assert summary["sizes of films"] == {"16x32": 2, "32x16": 1, "32x64": 1}
    assert summary["seconds"]["most"] == pytest.approx(1.8, abs=0.1) and summary["motion a second"]["least"] > 0
    with Image.open(out / "contact_sheet.png") as sheet:
        assert sheet.height > 7 * 90

    arguments = ["--config_path", encode.DEFAULT_CONFIG, "--logdir", str(tmp_path / "run"), "--disable-wandb"]
    arguments += ["--no_visualize", "--no_save", *SMALL[:2], *SMALL[6:], f"data.data_path={out / '32x48'}"]
    small = ["train.max_iters=1", "train.batch_size=2", "train.compile=false", "train.mixed_precision=false"]
    assert train.main([*arguments, *small]) == 0
    assert "generator_loss" in (tmp_path / "run/metrics.jsonl").read_text()


@pytest.mark.parametrize("trainer", ["flow_matching", "consistency"])
def test_training_refuses_clips_that_were_made_otherwise(
    trainer: str,
    small_training: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    films, shards, other = tmp_path / "films", tmp_path / "out/32x48", tmp_path / "ltx2"
    films.mkdir()
    shot(films / "one.mp4", [Fraction(n, 30) for n in range(40)])
    path = str(small_training(trainer, f"data.data_path={shards}", "train.max_iters=1", "train.total_batch_size=1"))
    options = [*("--config_path", path, "--threads", "1")]
    assert encode.main([str(films), "--out", str(shards.parent), "--captions", "names", *options]) == 0
    write_clips(tmp_path / "old", ClipFolder(shards), {"vae.vae_type": "WanVAE"})

    def trained(name: str, *settings: str) -> tuple[int, str]:
        capsys.readouterr()
        run = [*options, "--logdir", str(tmp_path / name), "--disable-wandb", "--no_visualize", "--no_save", *settings]
        return train.main(run), capsys.readouterr().err.strip()

    # The same VAE from elsewhere is the same.
    shutil.copytree("asset/shapes/vae", tmp_path / "vae")
    status, said = trained("run", f"vae.vae_pretrained=seeded:{tmp_path / 'vae'}")
    assert status == 0, said
    assert "not compared" not in caplog.text

    other.mkdir()
    (other / "config.json").write_text(json.dumps({"_class_name": "AutoencoderKLLTX2Video"} | LTX2))
    networks = [
        f"{role}.{size}" for role in ("model", "real_score") for size in ("in_channels=128", "patch_size=[1,1,1]")
    ]
    ltx2 = ["vae.vae_type=LTX2VAE_diffusers", f"vae.vae_pretrained=seeded:{other}"]
    ltx2 += [*networks[: 4 if trainer == "consistency" else 2], "sampling.height=64", "sampling.width=96"]
    digest = r"vae.vae_pretrained=[0-9a-f]{8}\.\.\. \(there: seeded:[0-9a-f]{8}\.\.\.\)"
    told = "was made with other settings: "
    for settings, words in {
        ("sampling.fps=24",): rf"{told}sampling.fps=24.0 \(there: 16.0\)",
        ("vae.vae_pretrained=asset/shapes/vae",): told + digest,
        (*ltx2, "sampling.num_frames=33"): rf"{told}vae.vae_type=LTX2VAE_diffusers \(there: WanVAE\)",
    }.items():
        status, said = trained("refused", *settings)
        assert status == 2 and "\n" not in said, said
        assert re.fullmatch(rf"error: {shards}: {words}; set them as there .*: longsana encode", said), said
    for setting in ("sampling.height=64", "sampling.width=64", "rollout.num_training_frames=4"):
        status, said = trained("refused", setting)
        assert status == 2 and re.fullmatch(rf"error: {shards}: clips of .* latents, the config asks for .*", said), (
            said
        )
    assert not (tmp_path / "refused").exists()

    # A VAE that has nothing to do need not be there.
    tiny = ["vae.decoder=tae_shapes", "vae.decoder_pretrained=seeded:0", "vae.vae_pretrained=nowhere"]
    assert trained("tiny", *tiny)[0] == 0
    assert f"{shards}: vae.vae_pretrained is not compared: vae.decoder=tae_shapes is used alone" in caplog.messages

    # What a manifest does not say is not compared, and that is said.
    caplog.clear()
    assert trained("unknown", f"data.data_path={tmp_path / 'old'}", "sampling.fps=24")[0] == 0
    for setting in ("sampling.fps", "vae.vae_pretrained"):
        assert f"{tmp_path / 'old'}: manifest.json does not say {setting}: not compared" in caplog.messages


def test_a_tar_gives_what_its_files_give(films: Path, tmp_path: Path) -> None:
    """A WebDataset, with a caption as JSON; and captions from a CSV, from JSON Lines and from names."""
    tars = tmp_path / "tars"
    tars.mkdir()
    with tarfile.open(tars / "0.tar", "w") as tar:
        for path in sorted(films.rglob("*.*")):
            name, data = path.relative_to(films).as_posix(), path.read_bytes()
            if name == "even.txt":
                name, data = "even.json", json.dumps({"caption": "the film even"}).encode()
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    for folder in (films, tars):
        assert encode.main([str(folder), "--out", str(tmp_path / folder.name / "out"), *SMALL]) == 0
    for source in find_sources(tars):
        film = films / source.name.removeprefix("0.tar/")
        assert source.place.sha256() == hashlib.sha256(film.read_bytes()).hexdigest()
    one, two = (ClipFolder(folder / "out/32x48") for folder in (films, tars))
    assert list(one.prompts()) == list(two.prompts())
    assert all(torch.equal(one[item].latents, two[item].latents) for item in range(7))

    rows = [(source.name, f"caption, {place}") for place, source in enumerate(find_sources(films))]
    table = tmp_path / "table.csv"
    table.write_text("video,caption\n" + "".join(f'{name},"{caption}"\n' for name, caption in rows))
    lines = tmp_path / "lines.jsonl"
    lines.write_text("".join(json.dumps({"file_name": f"./{name}", "text": caption}) + "\n" for name, caption in rows))
    for captions in (table, lines):
        assert [(source.name, source.caption) for source in find_sources(films, captions)] == rows
    assert [source.caption for source in find_sources(films, "names")] == ["even", "a red circle", "turned", "uneven"]


def test_each_film_goes_to_the_size_of_its_shape(films: Path, tmp_path: Path) -> None:
    out, table = tmp_path / "out", "sampling.aspect_ratio_type=ASPECT_RATIO_VIDEO_480_MS"
    assert encode.main([str(films), "--out", str(out), "--summary_only", *SMALL, table]) == 0
    summary = json.loads((out / "summary.json").read_text())
    assert summary["sizes of clips"] == {"448x896": 6, "896x448": 1}
    assert not (out / "448x896").exists()


def test_two_processes_go_on_where_one_was_killed(films: Path, tmp_path: Path, forks: Forks) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    (films / "broken.mp4").write_bytes(b"no film")
    (films / "broken.txt").write_text("broken")
    arguments = [*SMALL, "--shard_size", "1"]
    assert encode.main([str(films), "--out", str(one), *arguments]) == 1
    process = forks.start("encode", [films, "--out", two, *arguments])
    deadline = time.monotonic() + 120
    while not list(two.glob("32x48/shard-*")) and time.monotonic() < deadline:
        assert process.returncode is None
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    there = {path: path.stat().st_mtime_ns for path in two.glob("32x48/shard-*")}
    assert 1 <= len(there) < 7
    both = forks.launch(2, "tests.training.test_encoding", [films, "--out", two, *arguments])
    said = [process.finish() for process in both]
    assert [process.returncode for process in both] == [1, 1], said
    share = -(-(7 - len(there)) // 2)  # of the main process, which has a bar, and a line a shard where there is none
    assert re.findall(r"\n32x48: +(\d+)%.* (\d+)/(\d+) ", said[0])[-1] == ("100", f"{share}", f"{share}")
    lines = re.findall(r"two/32x48: shard \d, 1 clips \((\d) of this process's (\d) shards\)", said[0])
    assert lines == [(f"{done + 1}", f"{share}") for done in range(share)]
    assert "32x48" not in said[1]
    assert content(one) == content(two)
    assert there == {path: path.stat().st_mtime_ns for path in there}


def test_what_is_broken_is_skipped_and_counted(
    films: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = (films / "even.mp4").read_bytes()
    bad = {
        "cut": (whole[: len(whole) // 2], ""),
        "empty": (b"", ""),
        "codec": (whole.replace(b"avc1", b"zzzz"), "no decoder for its codec"),
        "pointer": (b"version https://git-lfs.github.com/spec/v1\n", "a git-lfs pointer"),
    }
    for name, (data, _) in bad.items():
        (films / f"{name}.mp4").write_bytes(data)
        (films / f"{name}.txt").write_text(name)
    shot(films / "short.mp4", [Fraction(n, 16) for n in range(5)])
    (films / "short.txt").write_text("short")
    out = tmp_path / "out"
    assert encode.main([str(films), "--out", str(out), *SMALL]) == 1
    summary = json.loads((out / "summary.json").read_text())
    assert list(summary["broken"]) == [f"{name}.mp4" for name in sorted(bad)] and summary["too short"] == ["short.mp4"]
    assert len(ClipFolder(out / "32x48")) == 7
    warnings = [message for message in caplog.messages if message.startswith("skipped: ")]
    for name, warning in zip(sorted(bad), warnings, strict=True):
        assert warning.startswith(f"skipped: {films / name}.mp4: ") and bad[name][1] in warning and "\n" not in warning
    assert "; broken: 4; shorter than a clip: 1. " in capsys.readouterr().out

    # The same again looks at no film but the one that was written again.
    looked: list[str] = []
    look_at = survey.look_at
    monkeypatch.setattr(survey, "look_at", lambda source, fps: looked.append(source.name) or look_at(source, fps))
    (films / "cut.mp4").write_bytes(b"no film either")
    before = content(out / "32x48")
    assert encode.main([str(films), "--out", str(out), *SMALL]) == 1
    assert looked == ["cut.mp4"] and content(out / "32x48") == before
    capsys.readouterr()
    settings = [*SMALL[:-1], "rollout.num_training_frames=300"]
    assert encode.main([str(films), "--out", str(tmp_path / "long"), *settings]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert "no clip of 1197 frames (74.8 s) in it; 4 of 9 films are broken, the first: " in line
    assert line.endswith("the longest other film has 1.8 s: lower rollout.num_training_frames, or give longer films")
    for path in films.rglob("*.*"):
        if path.stem not in bad:
            path.unlink()
    out = tmp_path / "new"
    assert encode.main([str(films), "--out", str(out), "--summary_only", *SMALL]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert "4 of 4 films are broken" in line and "longest" not in line and not (out / "contact_sheet.png").exists()


def test_films_that_are_gone_are_broken_ones(films: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (films / "link.mp4").symlink_to(tmp_path / "nowhere.mp4")
    (films / "link.txt").write_text("link")
    out = tmp_path / "out"
    assert encode.main([str(films), "--out", str(out), "--summary_only", *SMALL]) == 1
    assert list(json.loads((out / "summary.json").read_text())["broken"]) == ["link.mp4"]
    (warning,) = [message for message in caplog.messages if message.startswith("skipped: ")]
    assert warning.startswith(f"skipped: {films / 'link.mp4'}: ") and "No such file" in warning
    # What is not there has no stamp; once it is there, it is looked at.
    shot(tmp_path / "nowhere.mp4", [Fraction(n, 16) for n in range(12)])
    assert encode.main([str(films), "--out", str(out), "--summary_only", *SMALL]) == 0
    source = find_sources(films)[0]  # and is deleted before its turn
    source.place.path.unlink()
    assert "No such file" in (survey.look_at(source, FPS).problem or "")


def test_films_whose_names_are_not_utf8_are_broken_ones(
    films: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """In folders and in tars, with a caption beside them and without."""
    out, place = tmp_path / "out", films / os.fsdecode(b"b\xe9d.mp4")
    with tarfile.open(films / "more.tar", "w") as tar:
        tar.add(films / "even.mp4", os.fsdecode(b"\xe9.mp4"))
    (films / "even.mp4").rename(place)
    (films / "even.txt").rename(place.with_suffix(".txt"))
    for captions in ("beside", "names"):
        caplog.clear()
        assert encode.main([str(films), "--out", str(out), "--captions", captions, "--summary_only", *SMALL]) == 1
        warnings = [message for message in caplog.messages if message.startswith("skipped: ")]
        assert warnings == [
            f"skipped: {films}/b\\xe9d.mp4: its name is not UTF-8; rename it",
            f"skipped: {films}/more.tar (more.tar/\\xe9.mp4): its name is not UTF-8; rename it",
        ]
        summary = json.loads((out / "summary.json").read_text())
        assert list(summary["broken"]) == ["b\\xe9d.mp4", "more.tar/\\xe9.mp4"] and summary["clips"] == 4


def test_what_describes_shards_stays_as_it_is_where_other_clips_are_refused(
    films: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, other = tmp_path / "out", tmp_path / "other"
    for name in ("even.mp4", "even.txt", "uneven.mov", "uneven.txt"):
        (films / name).unlink()
    other.mkdir()
    shot(other / "other.mp4", [Fraction(n, 30) for n in range(54)])
    (other / "other.txt").write_text("other")
    assert encode.main([str(films), "--out", str(out), *SMALL]) == 0
    before = content(out)

    def refused_with(folder: Path, *arguments: str) -> str:
        capsys.readouterr()
        assert encode.main([str(folder), "--out", str(out), *SMALL, *arguments]) == 2
        assert content(out) == before
        return capsys.readouterr().err.splitlines()[-1]

    faster = refused_with(films, "sampling.fps=24")
    assert f"{out / '32x48'}: was made with other settings: sampling.fps=24.0 (there: 16.0); choose" in faster
    assert refused_with(films, "sampling.fps=24", "--summary_only") == faster
    assert "clips_sha256" in refused_with(other)
    shot(other / "other.mp4", [Fraction(n, 30) for n in range(5)])
    assert "no clip of 9 frames" in refused_with(other)
    assert f"{out / '32x48'}: holds clips of a size that none of these has" in refused_with(films, "sampling.width=64")
    assert "shard_size=1 (there: 2)" in refused_with(films, "--shard_size", "1")
    whole = (films / "turned.mp4").read_bytes()
    (films / "turned.mp4").write_bytes(whole.replace(b"Lavf", b"Lavg"))  # as many bytes
    assert whole != (films / "turned.mp4").read_bytes() and "clips_sha256=" in refused_with(films)
    (films / "turned.mp4").write_bytes(whole)
    os.utime(films / "turned.mp4", (1, 1))  # as a copy may have it
    shot(films / "added.mp4", [Fraction(n, 30) for n in range(54)])
    (films / "added.txt").write_text("added")
    assert "was made with other settings: count=" in refused_with(films)
    (films / "added.mp4").unlink()
    (films / "added.txt").unlink()
    assert encode.main([str(films), "--out", str(out), "--summary_only", *SMALL]) == 0
    assert {name for name, data in content(out).items() if data != before.get(name)} == {"files.jsonl"}


def test_a_sidecar_says_the_caption_too(films: Path) -> None:
    """As beside a video that was made here; what lies in NAME.txt comes first, and other JSON is nobody's."""

    def caption() -> str:
        (even,) = (source for source in find_sources(films) if source.name == "even.mp4")
        return even.caption

    said = caption()
    (films / "even.json").write_text("{")
    assert caption() == said
    (films / "even.txt").rename(films / "even.TXT")
    assert caption() == said
    (films / "even.TXT").unlink()
    assert "even.json: cannot be read as JSON" in refused(films)
    (films / "even.json").write_text(json.dumps({"seed": 0}))
    assert "even.mp4: a clip without a caption" in refused(films)
    (films / "even.json").write_text(json.dumps({"prompt": "a[5s] | b", "parts": [{"text": "a"}, {"text": "b"}]}))
    assert "even.json: a story of 2 parts, of which a clip shows some" in refused(films)
    (films / "even.json").write_text(json.dumps({"prompt": "a ring\nthat rises", "parts": [{"text": "a ring"}]}))
    (films / "other.json").write_text("[1")
    assert caption() == "a ring that rises"


def refused(folder: Path, captions: str | Path = "beside") -> str:
    with pytest.raises(InputError) as caught:
        find_sources(folder, captions)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_folders_that_cannot_be_used_are_refused_in_one_line(
    films: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "no such folder" in refused(tmp_path / "missing")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/a.txt").write_text("a")
    assert "no clips in it" in refused(tmp_path / "empty")
    assert encode.main([str(tmp_path / "empty"), "--out", str(tmp_path / "out"), *SMALL]) == 2
    assert capsys.readouterr().err.startswith(f"error: {tmp_path / 'empty'}: no clips in it")
    assert not (tmp_path / "out").exists()
    assert encode.main([str(films), "--out", str(films / "even.txt"), *SMALL]) == 2
    assert "even.txt: cannot be a folder" in capsys.readouterr().err
    assert encode.main([str(films), "--out", str(tmp_path / "none"), *SMALL, f"vae.vae_pretrained={tmp_path}"]) == 2
    assert "vae.vae_pretrained" in capsys.readouterr().err and not (tmp_path / "none").exists()
    (films / "alone.txt").write_text("alone")
    assert "alone.txt: a caption without a clip" in refused(films)
    (films / "alone.txt").unlink()
    (films / "even.txt").rename(tmp_path / "kept.txt")
    assert "even.mp4: a clip without a caption; write even.txt" in refused(films)
    (tmp_path / "kept.txt").rename(films / "even.txt")
    (films / "even.webm").write_bytes(b"")
    assert "two clips of one name, even.mp4 and even.webm" in refused(films)
    (films / "even.webm").unlink()
    table = tmp_path / "table.csv"
    for text, words in {
        "file,caption\nnone.mp4,x\n": "line 2: a caption without a clip, none.mp4",
        "file,caption\neven.mp4,x\neven,y\n": "line 3: a second caption of even",
        "file,caption\neven.mp4,x\n": "more/a_red_circle.webm: a clip without a caption (and 2 more); add it to ",
        "film,words\neven.mp4,x\n": "needs a film and a caption",
    }.items():
        table.write_text(text)
        assert words in refused(films, table)
    (tmp_path / "lines.jsonl").write_text("{")
    assert "line 1: cannot be read as JSON" in refused(films, tmp_path / "lines.jsonl")
    assert "must be beside, names, or a .csv or .jsonl file" in refused(films, "here")
    (tmp_path / "empty/x.tar").write_bytes(b"no tar" * 200)
    assert "cannot be read as a WebDataset's tar" in refused(tmp_path / "empty")

    def closed(path: str) -> Iterator[object]:
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(os, "scandir", closed)
    assert f"{films}: cannot be read (Permission denied); see to its rights" in refused(films)
