"""A kind of shape that the world does not have: drawn, said, verified, and kept out of all else."""

from __future__ import annotations

import hashlib
import json
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from transformers import AutoTokenizer

from longsana.commands import shapes
from longsana.evaluation.shapes_table import score_each
from longsana.runtime.errors import InputError
from longsana.shapes.bars import draw_bars
from longsana.shapes.remembered import draw_remembered
from longsana.shapes.scenes import (
    HELD_OUT,
    KINDS,
    NEW_KIND,
    draw_scene,
    is_held_out,
    parse_caption,
    prompts,
)
from longsana.shapes.verifier import judge, score
from tests.shapes.films import pictures, watch

TOKENIZER = Path(__file__).resolve().parents[2] / "asset/shapes/text_encoder"
SPLIT = "561af61121d99f413da20f1633121c37a95cab936b383bc56160c226541aa619"
"""SHA-256 of the split as it was before there was a new kind."""


def drawn(count: int, seed: int = 3) -> list:
    return [draw_bars(seed, index // 2, held_out=index % 2 == 1) for index in range(count)]


def test_the_held_out_split_is_as_it_was():
    assert NEW_KIND not in KINDS and len(HELD_OUT) == 27
    assert hashlib.sha256(repr(HELD_OUT).encode()).hexdigest() == SPLIT
    for draw in (draw_scene, draw_remembered):
        actors = [actor for index in range(300) for actor in draw(1, index).promise.actors]
        assert {actor.kind for actor in actors} == set(KINDS)


def test_a_bar_comes_first_and_its_own_combinations_are_held_out():
    for held_out in (False, True):
        promises = [draw_bars(3, index, held_out=held_out).promise for index in range(200)]
        first = [promise.actors[0] for promise in promises]
        assert {actor.kind for actor in first} == {NEW_KIND}
        assert {is_held_out(actor.kind, actor.colour, actor.motion) for actor in first} == {held_out}
        others = [actor for promise in promises for actor in promise.actors[1:]]
        assert {actor.kind for actor in others} == set(KINDS)
        assert not any(is_held_out(actor.kind, actor.colour, actor.motion) for actor in others)


def test_prompts_to_try_are_not_among_the_clips():
    clips = {draw_bars(0, index).caption for index in range(200)}
    assert not clips & set(prompts(0, 64, held_out=True, draw=draw_bars))


def test_captions_parse_back_and_the_word_is_spelt_by_pieces_that_are_there():
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    for scene in drawn(100):
        assert parse_caption(scene.caption) == scene.promise
    pieces = tokenizer.tokenize(f"a big red {NEW_KIND}")
    assert pieces[-3:] == ["▁b", "a", "r"] and tokenizer.unk_token not in pieces


@pytest.mark.parametrize("vae", [False, True])
def test_the_verifier_is_right_of_the_truth(vae):
    """With the old kinds beside; blurred and noisy, as a VAE leaves it."""
    scenes = drawn(8)
    result = score(judge(watch(scenes, 24, vae=vae), [scene.promise for scene in scenes])).as_dict()
    del result["returns"]  # nothing leaves
    assert min(result.values()) >= 0.99, result


def test_no_other_kind_is_taken_for_it_nor_it_for_another():
    scenes = drawn(8)
    wrong = [parse_caption(scene.caption.replace(NEW_KIND, "square")) for scene in scenes]
    verdict = score(judge(watch(scenes, 20), wrong))
    assert verdict.kind < 0.5 and verdict.persistence == 0


def test_prompts_to_train_on_and_to_try(tmp_path, capsys):
    assert shapes.main(["bar-prompts", str(tmp_path)]) == 0
    names = ("prompts.txt", "bars.txt", "held_out.txt", "old.txt")
    train, bars, old, kept = ((tmp_path / name).read_text().splitlines() for name in names)
    promises = [[parse_caption(line) for line in lines] for lines in (train, bars, old)]
    with_bars = [[promise.actors[0].kind == NEW_KIND for promise in some] for some in promises]
    assert sum(with_bars[0]) == len(train) // 3 and all(with_bars[1]) and not any(with_bars[2])
    assert not {*train} & {*bars, *old}
    assert len(kept) == 1200 and {*kept} <= {*train[len(train) // 3 :]}
    assert old == prompts(0, 64, held_out=True), "of the old kinds those of the recipe's table"
    assert shapes.main(["bar-scores", str(tmp_path)]) == 2
    assert (
        "bars.safetensors: not found; train_video_scripts/shapes_recipe.py --lora makes it" in capsys.readouterr().err
    )


def test_films_show_bars_and_are_made_once(tmp_path):
    """As long as a clip, with the caption beside each."""
    folder = tmp_path / "films"
    assert shapes.main(["bar-films", str(folder), "--tiny"]) == 0
    films = sorted(folder.glob("*.mp4"))
    with av.open(str(films[1])) as film:
        frames = np.stack([frame.to_ndarray(format="rgb24") for frame in film.decode(video=0)])
    scene = draw_bars(0, 1)
    assert films[1].with_suffix(".txt").read_text() == f"{scene.caption}\n"
    error = frames.astype(float) - pictures([scene])[0].numpy()
    assert frames.shape == (81, 96, 160, 3) and np.sqrt(np.mean(error**2)) < 6, "colours have half of the pixels"
    films[0].unlink()
    films[1].write_bytes(b"kept")
    films[1].with_suffix(".txt").unlink()
    assert shapes.main(["bar-films", str(folder), "--tiny"]) == 0
    assert films[0].stat().st_size > 1000 and films[1].read_bytes() == b"kept"
    assert films[1].with_suffix(".txt").read_text() == f"{scene.caption}\n"


def test_a_file_in_the_place_of_the_folder(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    for tool in ("prompts", "pictures", "bar-prompts", "bar-films"):
        assert shapes.main([tool, str(tmp_path / "file")]) == 2
        assert "file: cannot be a folder (a file has this name)" in capsys.readouterr().err


def test_commands_that_score_at_the_same_time_share_the_rows(tmp_path):
    asked: list[str] = []
    both = threading.Barrier(2, timeout=20)

    def score(row: str) -> dict[str, Any]:
        asked.append(row)
        if len(asked) <= 2:
            both.wait()  # a row each
        return {"row": row}

    rows = {row: partial(score, row) for row in "abcde"}
    with ThreadPoolExecutor(2) as commands:
        tables = list(commands.map(lambda _: score_each(tmp_path / "scores.json", rows), range(2)))
    assert sorted(asked) == list(rows)
    assert tables[0] == tables[1] == json.loads((tmp_path / "scores.json").read_text())
    assert [scored["row"] for scored in tables[0].values()] == list(rows)
    assert not list(tmp_path.glob(".*"))


def test_scores_that_were_stopped_go_on_and_are_whole_or_not_there(tmp_path, monkeypatch):
    """The recipe passes over a step whose product is there."""
    assert shapes.main(["bar-prompts", str(tmp_path)]) == 0
    (tmp_path / "bars.safetensors").touch()
    asked: list[str] = []

    def score(config, trial, device):
        asked.append(config.model.load_from)
        if len(asked) == 3:
            raise InputError("stopped")
        return {"figures": {"30": {key: [len(asked) / 10, None] for key in ("colour", "kind", "motion")}}}

    monkeypatch.setattr("longsana.evaluation.score_model.try_model", score)
    assert shapes.main(["bar-scores", str(tmp_path)]) == 2
    assert not (tmp_path / "bar_scores.json").exists() and len(asked) == 3
    assert shapes.main(["bar-scores", str(tmp_path)]) == 0
    scores = json.loads((tmp_path / "bar_scores.json").read_text())
    assert [row["figures"]["30"]["kind"][0] for row in scores.values()] == [0.1, 0.2, 0.4, 0.5]
    assert asked[3:] == [asked[0], str(tmp_path / "bars.safetensors")]
    assert list(scores) == [
        "what ships, bars", "with the LoRA, bars", "what ships, held_out", "with the LoRA, held_out"
    ]  # fmt: skip
