"""A folder of mp4s to a table, a plot and JSON."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import wave
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path
from urllib.parse import unquote

import av
import numpy as np
import pytest
import torch
from PIL import Image

from longsana.commands import evaluate
from longsana.encoders.closeness import psnr, ssim
from longsana.evaluation import report
from longsana.evaluation.measures import end_drift, measure_pieces, seam_index
from longsana.evaluation.page import page
from longsana.evaluation.report import plot, table
from longsana.evaluation.videos import describe, find_videos, read_pieces
from longsana.runtime.files import hold_folder
from longsana.runtime.video import VideoWriter
from longsana.shapes import scenes as shapes
from tests.runtime.test_logging import history, records
from tests.scripts import load_script
from tests.shapes.films import pictures

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def command():
    return load_script(ROOT / "inference_video_scripts/evaluate.py")


def write(
    path: Path, clip: torch.Tensor, prompt: str | None, algorithm: str = "longlive_flow_euler", vae: str = "WanVAE"
) -> None:
    with VideoWriter(path, shapes.FPS, *clip.shape[1:3], crf=18, preset="veryfast") as video:
        video.append(clip)
    if prompt is not None:
        config = {
            "sampling": {"chunk_frames": 10},
            "scheduler": {"sampling_algo": algorithm},
            "vae": {"vae_type": vae},
        }
        path.with_suffix(".json").write_text(json.dumps({"prompt": prompt, "frames": len(clip), "config": config}))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    made = tmp_path_factory.mktemp("videos")
    for index in range(6):
        scene = shapes.draw_scene(31, index, held_out=index % 2 == 1)
        write(made / f"{index:05d}-a.mp4", pictures([scene], 97)[0], scene.caption)
    clip = pictures([shapes.draw_scene(31, 9)], 41)[0]
    write(made / "00006-a.mp4", clip, "A cat in the snow", algorithm="flow_euler")
    write(made / "00007-a.mp4", clip, None)
    return made


def test_the_truth_as_mp4(folder, command, tmp_path, capsys):
    assert command.main([str(folder), "--out", str(tmp_path / "out"), "--device", "cpu"]) == 0
    record = json.loads((tmp_path / "out/evaluation.json").read_text())
    rows = [video["row"] for video in record["videos"]]
    assert [row["video"] for row in rows] == [f"{index:05d}-a.mp4" for index in range(8)]
    for name in ("colour", "kind", "background", "motion", "persistence", "adherence"):
        assert record["mean"]["row"][name] >= 0.99, name
        assert record["mean"]["scores"]["5 s"][name] >= 0.99, name
        assert [row[name] for row in rows[6:]] == ["not scored"] * 2
    assert "30 s" not in record["mean"]["scores"]
    assert all(abs(row["saturation drift"]) < 0.05 for row in rows[:6])
    assert rows[6]["saturation drift"] is None
    assert rows[0]["seam index"] == pytest.approx(1, abs=0.3)
    assert rows[6]["seam index"] is None and rows[7]["seam index"] is None
    assert all(row["movement"] > 0 for row in rows)
    assert all(record["videos"][index]["velocity"] for index in range(6)), "every shape that is seen has one"
    assert not record["videos"][6]["velocity"]
    assert record["mean"]["curves"]["persistence"] == [1.0] * 6
    text = (tmp_path / "out/evaluation.md").read_text()
    assert text in capsys.readouterr().out
    assert len({len(line) for line in text.split("\n\n")[0].splitlines()}) == 1
    assert (tmp_path / "out/evaluation.png").read_bytes().startswith(b"\x89PNG")


def test_a_video_is_read_in_pieces(folder):
    pieces = list(read_pieces(folder / "00000-a.mp4", 40))
    assert [tuple(piece.shape) for piece in pieces] == [(1, n, 96, 160, 3) for n in (40, 40, 17)]
    error = torch.cat(pieces, 1).float() - pictures([shapes.draw_scene(31, 0)], 97).float()
    assert error.abs().mean() < 3


def test_seams_of_another_vae(command, tmp_path):
    """A jump in the middle of a chunk of LTX-2's 8-frame latents, where Wan's would begin another chunk."""
    clip = pictures([shapes.draw_scene(31, 9)], 161)[0]
    clip[41:] = clip[41:].flip(2)
    for vae in ("WanVAE", "LTX2VAE_diffusers"):
        write(tmp_path / f"{vae}.mp4", clip, "A cat in the snow", vae=vae)
    seams = {}
    videos = [describe(path) for path in find_videos(tmp_path)]
    for video in videos:
        change = measure_pieces([clip[None]], torch.device("cpu")).change
        seams[video.path.stem] = float(seam_index(change, video.boundaries, video.time_stride))
    assert [video.boundaries for video in videos] == [(81,), (41, 81, 121)]
    assert seams["LTX2VAE_diffusers"] < 1 < 1.3 < seams["WanVAE"]


def test_bad_input_is_told(folder, command, tmp_path, capsys, monkeypatch):
    def complaint(*arguments: str) -> str:
        assert command.main(list(arguments)) == 2
        return capsys.readouterr().err

    assert "no such folder" in complaint(str(tmp_path / "missing"))
    assert "no .mp4, .webm or .mov in it" in complaint(str(tmp_path))
    assert "--device tpu9" in complaint(str(folder), "--device", "tpu9")
    assert "cuda:77" in complaint(str(folder), "--device", "cuda:77")
    assert "--ouput" in complaint(str(folder), "--ouput", "x")
    assert "folder" in complaint()
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "matplotlib", None)
        assert "pip install -e '.[plot]'" in complaint(str(folder))
    with hold_folder(tmp_path, "--out"):
        assert f"{tmp_path}: in use by another command" in complaint(str(folder), "--out", str(tmp_path))


def spoil(folder: Path, whole: bytes) -> dict[str, str]:
    """Write bad videos to a folder; of each, by its name, what is said of it."""
    said = {
        "boundary": "cut short",
        "brace": "sidecar",
        "cut": "cannot be read as a video",
        "empty": "cannot be read as a video",
        "frames": "sidecar",
        "latin": "sidecar",
        "list": "sidecar",
        "nothing": "sidecar",
        "sizes": "pictures are of several sizes",
        "sound": "there is no video in it",
        "text": "cannot be read as a video",
    }
    paths = {name: folder / f"{name}.mp4" for name in said}
    for path in paths.values():
        path.write_bytes(whole)
    with av.open(str(paths["cut"])) as container:
        middle = list(container.demux(video=0))[20].pos
    paths["boundary"].write_bytes(whole[:middle])
    paths["cut"].write_bytes(whole[: middle + 9])
    paths["empty"].write_bytes(b"")
    paths["text"].write_bytes(b"not a video" * 100)
    with wave.open(str(paths["sound"]), "wb") as sound:
        sound.setparams((1, 2, 16000, 0, "NONE", ""))
        sound.writeframes(bytes(2000))
    paths["sizes"].write_bytes(transport_stream(64) + transport_stream(96))
    sidecars = {
        "brace": b"{",
        "list": b"[]",
        "nothing": b"{}",
        "frames": b'{"prompt": "a", "frames": 82, "config": {}}',
        "latin": b'{"prompt": "\xfc"}',
    }
    for name, content in sidecars.items():
        paths[name].with_suffix(".json").write_bytes(content)
    return {path.name: said[name] for name, path in paths.items()}


def transport_stream(size: int) -> bytes:
    """A video in a format in which one can follow the other."""
    content = BytesIO()
    with av.open(content, "w", format="mpegts") as container:
        stream = container.add_stream("mpeg2video", rate=25)
        stream.width = stream.height = size
        for _ in range(3):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((size, size, 3), np.uint8))))
        container.mux(stream.encode(None))
    return content.getvalue()


def test_bad_videos_are_skipped_and_listed(folder, command, tmp_path, capsys, caplog):
    whole = (folder / "00007-a.mp4").read_bytes()
    said = {**spoil(tmp_path, whole), "z\\xe9.mp4": "its name is not UTF-8; rename it"}
    (tmp_path / os.fsdecode(b"z\xe9.mp4")).write_bytes(whole)
    (tmp_path / "good.mp4").write_bytes(whole)
    assert command.main([str(tmp_path), "--device", "cpu"]) == 1
    record = json.loads((tmp_path / "evaluation.json").read_text())
    assert [video["row"]["video"] for video in record["videos"]] == ["good.mp4"]
    assert record["mean"]["row"]["movement"] == record["videos"][0]["row"]["movement"] > 0
    assert list(record["skipped"]) == list(said)
    warnings = [message for message in caplog.messages if message.startswith("skipped: ")]
    for (name, words), warning in zip(said.items(), warnings, strict=True):
        assert words in record["skipped"][name], name
        assert str(tmp_path / name.partition(".")[0]) in warning and "\n" not in warning
        assert f"* {name}: {record['skipped'][name]}\n" in (tmp_path / "evaluation.md").read_text()
    assert "Traceback" not in capsys.readouterr().err

    (tmp_path / "good.mp4").unlink()
    (tmp_path / "evaluation.json").unlink()
    assert command.main([str(tmp_path), "--device", "cpu"]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert "boundary.mp4: cut short: 20 of 41 frames" in line and f"(and {len(said) - 1} more" in line
    assert not (tmp_path / "evaluation.json").exists()


def test_results_that_cannot_be_written_leave_those_that_were_there(folder, command, tmp_path, capsys, limited):
    shutil.copy(folder / "00007-a.mp4", tmp_path)
    (tmp_path / "evaluation.json").write_text("before")
    with limited(1000):
        assert command.main([str(tmp_path), "--device", "cpu"]) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("failed: ")]
    assert f"{tmp_path / 'evaluation.json'}: File too large; " in line
    assert sorted(path.name for path in tmp_path.iterdir()) == ["00007-a.mp4", "evaluation.json"]
    assert (tmp_path / "evaluation.json").read_text() == "before"
    with limited(12000):  # enough for all but the plot
        assert command.main([str(tmp_path), "--device", "cpu"]) == 1
    assert f"{tmp_path / 'evaluation.png'}: File too large; " in capsys.readouterr().err
    assert not [path for path in tmp_path.iterdir() if "partial" in path.name or path.suffix == ".png"]


def main(arguments):
    """The command, which a signal meets while it writes each of its results."""
    write = report.atomic_write_text

    def signalled(path, text):
        signal.raise_signal(signal.SIGTERM)
        write(path, text)

    report.atomic_write_text = signalled
    return evaluate.main(arguments)


def test_a_signal_while_results_are_written_leaves_all_of_them(folder, forks, tmp_path):
    shutil.copy(folder / "00007-a.mp4", tmp_path)
    process = forks.start("tests.evaluation.test_report", [tmp_path, "--device", "cpu"])
    told = process.finish()
    assert process.returncode == 0, told
    names = ["00007-a.mp4", *(f"evaluation{end}" for end in (".html", ".json", ".md", ".png", "_frames.png"))]
    assert sorted(path.name for path in tmp_path.iterdir()) == names


class Links(HTMLParser):
    """The files that a page shows, and its words."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.shown: list[str] = []
        self.words = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.shown += [unquote(value) for name, value in attrs if name == "src"]

    def handle_data(self, data):
        self.words += data


def test_folders_of_folders_and_a_page_of_them(folder, command, tmp_path):
    for place in ("a", "b & c/d"):
        (tmp_path / "videos" / place).mkdir(parents=True)
        shutil.copy(folder / "00000-a.mp4", tmp_path / "videos" / place / "one.mp4")
        shutil.copy(folder / "00000-a.json", tmp_path / "videos" / place / "one.json")
    (tmp_path / "videos/a/two.mp4").write_bytes(b"no video")
    out = tmp_path / "out"
    assert command.main([str(tmp_path / "videos"), "--out", str(out), "--device", "cpu"]) == 1
    record = json.loads((out / "evaluation.json").read_text())
    assert [video["row"]["video"] for video in record["videos"]] == ["a/one.mp4", "b & c/d/one.mp4"]
    assert list(record["skipped"]) == ["a/two.mp4"]
    assert {"saturation", "sharpness", "movement"} <= record["videos"][0]["curves"].keys()
    found = Links((out / "evaluation.html").read_text())
    assert len(found.shown) == 4 and all((out / name).is_file() for name in found.shown)
    assert (out / found.shown[-1]).resolve() == tmp_path / "videos/b & c/d/one.mp4"
    assert shapes.draw_scene(31, 0).caption in found.words and "a/two.mp4: " in found.words


def test_a_page_links_to_files_in_folders_whose_names_are_not_utf8(tmp_path):
    paths = [tmp_path / os.fsdecode(b"videos of \xe9") / name for name in ("one.mp4", "two.mp4")]
    record = {"row": {"video": "one.mp4"}, "paths": paths, "prompt": None}
    text = page("title", [["video"]], [(record, {})], [], {}, tmp_path)
    assert text.encode().count(b'"videos%20of%20%E9/one.mp4"') == 2 and "videos of \\xe9/two.mp4<" in text


UNEQUAL = {
    "longer.mp4": "ends after 40 frames, and the video of its name goes on",
    "shorter.mp4": "goes on, and the video of its name ends after 9 frames",
    "larger.mp4": "pictures of 32x48, and the video of its name has 96x160",
}


def test_two_folders_are_compared_by_name(folder, command, tmp_path, capsys):
    """Frame by frame; what has no other one is listed, and what is of another length is skipped."""
    one, two = tmp_path / "one", tmp_path / "two"
    for place in (one, two):
        place.mkdir()
        shutil.copy(folder / "00000-a.mp4", place / "same.mp4")
    clip = pictures([shapes.draw_scene(31, 9)], 41)[0]
    write(one / "noisy.mp4", clip, None)
    noise = torch.randint(-20, 21, clip.shape, generator=torch.Generator().manual_seed(0))
    write(two / "noisy.mp4", (clip + noise).clamp(0, 255).to(torch.uint8), None)
    write(one / "longer.mp4", clip, None)
    write(two / "longer.mp4", clip[:-1], None)
    write(one / "shorter.mp4", clip[:9], None)
    write(two / "shorter.mp4", clip, None)
    write(one / "larger.mp4", clip[:3], None)
    write(two / "larger.mp4", clip[:3, :32, :48], None)
    write(one / "alone.mp4", clip, None)
    write(two / "other.mp4", clip, None)
    assert command.main([str(one), "--against", str(two), "--device", "cpu"]) == 1
    record = json.loads((one / "evaluation.json").read_text())
    rows = {video["row"]["video"]: video["row"] for video in record["videos"]}
    assert rows["same.mp4"]["PSNR"] == 100 and rows["same.mp4"]["SSIM"] == pytest.approx(1)
    read = [torch.cat(list(read_pieces(place / "noisy.mp4")), 1) for place in (one, two)]
    assert rows["noisy.mp4"]["PSNR"] == pytest.approx(float(psnr(*read).mean()))
    assert rows["noisy.mp4"]["SSIM"] == pytest.approx(float(ssim(*read).mean()))
    assert rows["noisy.mp4"][f"PSNR {report.ENDS}"] == pytest.approx(float(end_drift(psnr(*read))))
    found = Links((one / "evaluation.html").read_text())
    assert found.shown[2:] == ["alone.mp4", "noisy.mp4", "../two/noisy.mp4", "same.mp4", "../two/same.mp4"]
    assert 10 < rows["noisy.mp4"]["PSNR"] < 40 and "PSNR" not in rows["alone.mp4"]
    assert set(record["skipped"]) == {str(one / "alone.mp4"), str(two / "other.mp4"), *UNEQUAL}
    for name, words in UNEQUAL.items():
        assert record["skipped"][name] == f"{two / name}: {words}; cut both to the same"
    assert command.main([str(one), "--against", str(folder), "--device", "cpu"]) == 2
    assert f"{folder}: no video of a name that is in {one}" in capsys.readouterr().err


def test_wandb_is_shown_what_is_written(folder, command, tmp_path, monkeypatch, capsys, caplog):
    pytest.importorskip("wandb")
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    (tmp_path / "mine/more").mkdir(parents=True)
    for name in ("00000-a.mp4", "00000-a.json", "00007-a.mp4"):
        shutil.copy(folder / name, tmp_path / "mine/more")
    shutil.copy(folder / "00007-a.mp4", tmp_path / "mine/other.mov")
    out, saved = tmp_path / "out", tmp_path / "saved"
    given = [str(tmp_path / "mine"), "--out", str(out), "--device", "cpu", "--wandb", "--wandb-save-dir", str(saved)]
    monkeypatch.setattr(evaluate, "SHEET", 2)
    assert command.main([*given, "--wandb_project", "own"]) == 0
    own = [record.getMessage() for record in caplog.records if record.name.startswith("longsana")]
    assert not [message for message in own if "wandb" in message]
    record = json.loads((out / "evaluation.json").read_text())
    (run,) = [item.run for item in records(saved) if item.HasField("run")]
    assert (run.project, run.display_name) == ("own", "mine")
    shown = history(saved)
    numbers = {(row["step"], name): value for row in shown for name, value in row.items()}
    for name, values in record["mean"]["curves"].items():
        for second, value in enumerate(values):
            assert numbers.get((second, f"by second/{name}")) == value
    last = max(step for step, _ in numbers)
    assert last == len(record["mean"]["curves"]["movement"]) - 1 == 5
    for name, value in record["mean"]["row"].items():
        assert numbers.get((last, f"mean/{name}")) == (value if isinstance(value, float) else None)
    kept = {path.name: path.read_bytes() for path in saved.rglob("media/**/*") if path.is_file()}
    files = {name: kept[Path(value).name] for row in shown for name, value in row.items() if name.endswith("/path")}
    assert files.pop("evaluation/path") == (out / "evaluation.png").read_bytes()
    assert files.pop("evaluation_frames/path") == (out / "evaluation_frames.png").read_bytes()
    told = json.loads(files.pop("videos/path"))
    assert [dict(zip(told["columns"], row, strict=True)) for row in told["data"]] == [
        {name: None if value == "not scored" else value for name, value in video["row"].items()}
        for video in record["videos"]
    ]
    # Of the two on the sheet, the first and the last, wandb does not take the mov.
    assert files == {"video/more/00000-a/path": (folder / "00000-a.mp4").read_bytes()}

    monkeypatch.setitem(sys.modules, "wandb", None)
    given[2] = str(tmp_path / "none")
    assert command.main(given) == 2
    assert "pip install -e '.[wandb]'`, or go without: leave out --wandb" in capsys.readouterr().err
    assert not list((tmp_path / "none").iterdir())


def test_flow_is_motion_and_not_light(folder, command, tmp_path, capsys, monkeypatch):
    """A texture that moves by known pixels, and one that flickers."""
    noise = torch.rand(1, 3, 24, 40, generator=torch.Generator().manual_seed(0))
    still = (255 * torch.nn.functional.interpolate(noise, (96, 160), mode="bicubic")).clamp(0, 255)[0].permute(1, 2, 0)
    moving = torch.stack([still.roll(2 * frame, 1) for frame in range(33)]).to(torch.uint8)
    light = torch.stack([still * (1 - 0.2 * (frame % 2)) for frame in range(33)]).to(torch.uint8)
    write(tmp_path / "moving.mp4", moving, None)
    write(tmp_path / "light.mp4", light, None)
    assert command.main([str(tmp_path), "--flow", "--device", "cpu"]) == 0
    record = json.loads((tmp_path / "evaluation.json").read_text())
    rows = {video["row"]["video"]: video["row"] for video in record["videos"]}
    assert rows["moving.mp4"]["flow"] == pytest.approx(shapes.FPS * 2 / 96, rel=0.15)
    assert rows["light.mp4"]["flow"] < 0.2 * rows["moving.mp4"]["flow"]
    assert rows["light.mp4"]["movement"] > 0.5 * rows["moving.mp4"]["movement"]
    assert abs(rows["moving.mp4"]["flow drift, 15 % ends"]) < 0.1
    monkeypatch.setitem(sys.modules, "cv2", None)
    assert command.main([str(tmp_path), "--flow", "--device", "cpu"]) == 2
    assert "pip install -e '.[flow]'" in capsys.readouterr().err


def test_table():
    rows = [
        {"video": "a", "colour": 0.5, "seam index": 1.234},
        {"video": "bbb", "colour": None, "saturation drift": -0.05},
    ]
    assert table(rows).splitlines() == [
        "| video | colour | seam index | saturation drift |",
        "| ----- | -----: | ---------: | ---------------: |",
        "| a     |  50.0% |       1.23 |                - |",
        "| bbb   |      - |          - |            -5.0% |",
    ]


def test_figures_that_no_video_has_are_no_columns():
    rows = [{"video": "a", "colour": "not scored", "seam index": None, "movement": 0.5}]
    assert table(rows).splitlines()[0] == "| video | movement |"


def test_one_second_is_seen_and_so_is_what_hardly_changes(tmp_path):
    def plotted(*values: float, figure: str = "adherence", behind: float | None = None) -> np.ndarray:
        others = [] if behind is None else [{figure: [behind] * len(values)}]
        plot({"one": {figure: values}}, tmp_path / "a.png", behind=others)
        with Image.open(tmp_path / "a.png") as picture:
            return np.asarray(picture.convert("RGB")).astype(int)

    assert np.abs(plotted(0.2) - plotted(0.8)).max() > 100
    panel = plotted(0.157, 0.156, 0.157, figure="saturation")
    frame = np.flatnonzero((panel.max(2) < 100).mean(1) > 0.5)  # rows of its frame
    curve = np.flatnonzero((panel[: frame[-1], :, 2] - panel[: frame[-1], :, 0] > 80).any(1))
    assert frame[0] + 5 < curve.min(), "the line runs along the frame"
    assert not np.array_equal(plotted(0.5, 0.5), plotted(0.5, 0.5, behind=0.2))


def test_plot_compares_models(tmp_path):
    few, many = tmp_path / "few.png", tmp_path / "many.png"
    one = {"adherence": [1.0, 0.9, None], "saturation drift": [0.0, 0.1]}
    plot({"one": one}, few)
    plot({"one": one, "two": {"adherence": [0.5], "persistence": [0.2, 0.1]}}, many)
    assert few.read_bytes() != many.read_bytes()


@pytest.mark.parametrize("panels", [3, 4])
def test_many_models_have_lines_of_their_own_and_all_names_are_in_the_picture(tmp_path, monkeypatch, panels):
    from matplotlib import pyplot

    drawn = []
    monkeypatch.setattr(pyplot, "close", drawn.append)
    curves = {f"panel {number}": [0.5, 0.6] for number in range(panels)}
    plot({f"this is a model that has a long name, {number}": curves for number in range(12)}, tmp_path / "a.png")
    (figure,) = drawn
    lines = {(line.get_color(), line.get_linestyle()) for line in figure.axes[0].get_lines()}
    (legend,) = [*figure.legends, *(axis.get_legend() for axis in figure.axes if axis.get_legend())]
    place = legend.get_window_extent()
    monkeypatch.undo()
    pyplot.close(figure)
    assert len(lines) == 12
    assert figure.bbox.contains(*place.min) and figure.bbox.contains(*place.max)


def test_a_name_may_have_what_ends_a_cell():
    lines = table([{"video": "a|b\nc.mp4", "seam index": 1.0}]).splitlines()
    assert len(lines) == 3 and "a\\|b c.mp4" in lines[2]
