"""Videos under the names by which the package vbench looks for them."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest

from longsana.commands import export_vbench
from longsana.evaluation.vbench import CUSTOM


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """Two prompts, of one a second sample in a folder of its own."""
    folder = tmp_path / "made"
    (folder / "again").mkdir(parents=True)
    scheduler = {"sampling_algo": "flow_euler"}
    config = {"sampling": {"chunk_frames": 10}, "scheduler": scheduler, "vae": {"vae_type": "WanVAE"}}
    cat = "A cat, extended"
    for name, line, prompt in (("1-cat", 1, cat), ("2-dog", 2, "a dog-2"), ("again/1-cat", 1, cat)):
        (folder / f"{name}.mp4").write_bytes(name.encode())
        record = {"prompt": prompt, "line": line, "frames": 81, "config": config}
        (folder / f"{name}.json").write_text(json.dumps(record))
    return folder


def prompt_of(name: str) -> str:
    """The prompt that VBench reads out of a file's name."""
    return re.sub(r"-\d+$", "", Path(name).stem)


def test_prompts_are_read_back_from_names(made: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "two.txt").write_text("a cat\na dog-2\n")
    out = tmp_path / "out"
    assert export_vbench.main([str(made), "--out", str(out), "--prompts", str(tmp_path / "two.txt")]) == 0
    content = {path.name: path.read_bytes() for path in (out / "videos").iterdir()}
    assert content == {"a cat-0.mp4": b"1-cat", "a cat-1.mp4": b"again/1-cat", "a dog-2-0.mp4": b"2-dog"}
    told = json.loads((out / "prompts.json").read_text())
    assert told == {name: prompt_of(name) for name in content}
    assert (out / "prompts.txt").read_text().splitlines() == ["a cat", "a dog-2"]
    assert json.loads((out / "full_info.json").read_text())[0] == {"prompt_en": "a cat", "dimension": list(CUSTOM)}
    assert os.stat(out / "videos/a cat-0.mp4").st_ino == os.stat(made / "1-cat.mp4").st_ino

    info = tmp_path / "info.json"
    info.write_text(json.dumps([{"prompt_en": prompt, "dimension": []} for prompt in ("a cat", "a dog-2", "a cow")]))
    checked = [str(made), "--prompts", str(tmp_path / "two.txt"), "--full_info", str(info), "--samples", "2"]
    assert export_vbench.main([*checked, "--out", str(tmp_path / "checked")]) == 1
    lacking = [message for message in caplog.messages if message.startswith("missing: ")]
    assert lacking == [f"missing: {name}.mp4" for name in ("a dog-2-1", "a cow-0", "a cow-1")]


def test_own_videos_keep_their_names(made: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert export_vbench.main([str(made), "--out", str(out), "--layout", "custom"]) == 0
    prompts = json.loads((out / "prompts.json").read_text())
    assert prompts == {"1-cat.mp4": "A cat, extended", "2-dog.mp4": "a dog-2", "again-1-cat.mp4": "A cat, extended"}
    assert {path.name for path in (out / "videos").iterdir()} == set(prompts)
    named = [str(made), "--out", str(tmp_path / "named"), "--layout", "custom", "--names", "{line:03d}_{number}.mp4"]
    assert export_vbench.main(named) == 0
    content = {path.name: path.read_bytes() for path in (tmp_path / "named/videos").iterdir()}
    assert content == {"001_0.mp4": b"1-cat", "001_1.mp4": b"again/1-cat", "002_0.mp4": b"2-dog"}


def test_what_cannot_be_exported_is_one_line_and_writes_nothing(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"

    def complaint(*arguments: str) -> str:
        assert export_vbench.main([str(made), "--out", str(out), *arguments]) == 2
        assert not out.exists() and not list(tmp_path.glob(".*"))
        return capsys.readouterr().err

    (tmp_path / "one.txt").write_text("a cat\n")
    assert "was made of line 2, which" in complaint("--prompts", str(tmp_path / "one.txt"))
    (tmp_path / "info.json").write_text(json.dumps([{"prompt_en": "a dog-2"}]))
    assert "its prompt is not in" in complaint("--full_info", str(tmp_path / "info.json"))
    assert "has no meaning with --layout custom" in complaint("--full_info", "x", "--layout", "custom")
    assert "--names: has no meaning with --layout standard" in complaint("--names", "{line}.mp4")
    for names, words in (
        *(("{seed}.mp4", "unknown field 'seed'"), ("{prompt.x}.mp4", "unknown field 'prompt.x'")),
        *(("{line:{x}}.mp4", "'x'"), ("{.mp4", "expected '}'"), ("{prompt:d}.mp4", "format code 'd'")),
        *(("{line}", "not the name of an mp4"), ("a/{line}.mp4", "not the name of an mp4")),
        ("{line}.mp4", "two clips of one name, 1.mp4"),
    ):
        assert words in complaint("--layout", "custom", "--names", names)
    (tmp_path / "info.json").write_text("{}")
    assert "no list of prompts" in complaint("--full_info", str(tmp_path / "info.json"))
    (made / "again-1-cat.mp4").write_bytes(b"")
    (made / "again-1-cat.json").write_text((made / "1-cat.json").read_text())
    assert "two clips of one name" in complaint("--layout", "custom")
    record = json.loads((made / "2-dog.json").read_text())
    for prompt, words in (("a/b", "a / in it"), ("b" * 300, "too long")):
        (made / "2-dog.json").write_text(json.dumps(record | {"prompt": prompt}))
        assert words in complaint()
    (made / "2-dog.json").unlink()
    assert "no sidecar says its prompt" in complaint()
    (made / "2-dog.mp4").rename(made / "2-dog.webm")
    assert "VBench reads mp4" in complaint()
    (tmp_path / "there").mkdir()
    (made / "2-dog.webm").unlink()
    assert export_vbench.main([str(made), "--out", str(tmp_path / "there")]) == 2
    assert "is there already" in capsys.readouterr().err
