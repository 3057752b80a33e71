"""Captions for training: the same in every mode, encoded once, and nothing lost by a kill."""

from __future__ import annotations

import gc
import os
import shutil
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from longsana.config import InferenceConfig, load_config
from longsana.encoders.text import GemmaTextEncoder, published_negative_prompt
from longsana.models.embeddings import TextEmbedding
from longsana.runtime.distributed import World
from longsana.training.captions import Captions
from tests.forks import Forks

ROOT = Path(__file__).parents[2]
CONFIG = "configs/sana_video_config/longsana/shapes/longsana.yaml"
OVERRIDES = ("sampling.negative_prompt=grey, still, blurred",)
PROMPTS = [f"{count} small red circles fall on a blue background" for count in range(11)]


@pytest.fixture(scope="module")
def config() -> InferenceConfig:
    return load_config(ROOT / CONFIG, OVERRIDES)


@pytest.fixture(scope="module")
def encoder(config: InferenceConfig) -> GemmaTextEncoder:
    return load(config)


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, bool]]:
    """Every text that any encoder is given from now on, and whether with the instruction."""
    seen: list[tuple[str, bool]] = []
    real = GemmaTextEncoder.encode_together

    def spy(self: GemmaTextEncoder, prompts: Sequence[str], *, instruction: bool = True) -> TextEmbedding:
        seen.extend((prompt, instruction) for prompt in prompts)
        return real(self, prompts, instruction=instruction)

    monkeypatch.setattr(GemmaTextEncoder, "encode_together", spy)
    return seen


def load(config: InferenceConfig) -> GemmaTextEncoder:
    return GemmaTextEncoder.load(
        config.text_encoder, caption_length=48, caption_channels=64, device="cpu", dtype=torch.float32
    )


def captions(config: InferenceConfig, folder: Path, mode: Any = "free", **options: Any) -> Captions:
    return Captions(config, "cpu", World(), mode, folder, **options)


def expected(encoder: GemmaTextEncoder, prompts: Sequence[str], score: str = " motion score: 10.") -> TextEmbedding:
    """What the network may look at, straight from the encoder; zeros elsewhere."""
    each = [encoder.encode(prompt + score) for prompt in prompts]
    tokens, mask = (torch.cat(parts) for parts in zip(*each, strict=True))
    return TextEmbedding(tokens * mask[..., None], mask)


def same(one: TextEmbedding, other: TextEmbedding) -> bool:
    return torch.equal(one.tokens, other.tokens) and torch.equal(one.mask, other.mask)


@pytest.mark.parametrize("mode", ["keep", "offload", "free"])
def test_every_mode_gives_what_the_encoder_gives(
    mode: str, config: InferenceConfig, encoder: GemmaTextEncoder, tmp_path: Path
) -> None:
    made = captions(config, tmp_path, mode, prompts_per_file=4)
    made.prepare([*PROMPTS, PROMPTS[0]])
    for batch in ([PROMPTS[3]], PROMPTS, PROMPTS[::-1], [PROMPTS[5], PROMPTS[0], PROMPTS[5]]):
        assert same(made.embed(batch), expected(encoder, batch))
        assert same(made.embed(batch), expected(encoder, batch))
    negative = made.negative()
    plain = encoder.encode(config.sampling.negative_prompt, instruction=False)
    assert negative.tokens.shape == (1, 48, 64)
    assert same(negative, TextEmbedding(plain.tokens * plain.mask[..., None], plain.mask))
    assert len(list(tmp_path.iterdir())) == (4 if mode == "free" else 0)  # 11 prompts by 4, and the negative one


def test_the_negative_prompt_goes_without_instruction(tmp_path: Path, encoded: list[tuple[str, bool]]) -> None:
    config = load_config(ROOT / CONFIG, [*OVERRIDES, "text_encoder.chi_prompt=sana", "sampling.motion_score=null"])
    for mode in ("keep", "free"):
        made = captions(config, tmp_path, mode)
        made.prepare(["a red circle"])
        made.embed(["a red circle"])
        made.negative()
        assert sorted(encoded) == [("a red circle", True), (config.sampling.negative_prompt, False)]
        encoded.clear()


@pytest.mark.parametrize("mode", ["keep", "offload", "free"])
def test_a_prompt_is_encoded_once(
    mode: str, config: InferenceConfig, tmp_path: Path, encoded: list[tuple[str, bool]]
) -> None:
    made = captions(config, tmp_path, mode)
    made.prepare([*PROMPTS, *PROMPTS])
    made.embed([PROMPTS[1], PROMPTS[1], PROMPTS[2]])
    for _ in range(2):
        made.embed([*PROMPTS, PROMPTS[0]])
        made.negative()
    assert sorted(encoded) == sorted([(f"{p} motion score: 10.", True) for p in PROMPTS] + [(NEGATIVE, False)])


NEGATIVE = OVERRIDES[0].partition("=")[2]


def test_memory_is_bounded_and_what_was_wanted_last_stays(
    config: InferenceConfig, encoder: GemmaTextEncoder, tmp_path: Path, encoded: list[tuple[str, bool]]
) -> None:
    # All of one length: room for three.
    prompts = PROMPTS[:5]
    tokens = int(encoder.encode(prompts[0] + " motion score: 10.").mask.sum())
    room = 3 * (tokens * 64 * 4 + 48)
    made = captions(config, tmp_path, "keep", cache_bytes=room)
    encoded.clear()
    for prompt in (0, 1, 2, 0, 3, 0, 1):  # 1 was pushed out by 3: it was wanted longest ago
        made.embed([prompts[prompt]])
    assert [int(text[0][0]) for text in encoded] == [0, 1, 2, 3, 1]
    assert made._source._bytes == room  # type: ignore[attr-defined]
    # A batch larger than the room is still right.
    assert same(made.embed(prompts), expected(encoder, prompts))
    nothing = captions(config, tmp_path, "keep", cache_bytes=0)
    assert same(nothing.embed(prompts), expected(encoder, prompts))
    assert nothing._source._bytes == 0  # type: ignore[attr-defined]


def test_offloaded_encoder_travels_once_a_batch(config: InferenceConfig, tmp_path: Path) -> None:
    made = captions(config, tmp_path, "offload")
    model: Any = made._source._encoder.model  # type: ignore[attr-defined]
    journeys: list[str] = []
    model.to = lambda device: journeys.append(str(device))
    made.embed(PROMPTS[:4])
    made.embed(PROMPTS[1:3])
    made.embed(PROMPTS[:4])
    assert len(journeys) == 2
    made.embed(PROMPTS[3:5])
    assert len(journeys) == 4


@pytest.mark.gpu
def test_where_the_encoder_is(config: InferenceConfig, tmp_path: Path) -> None:
    batch, embeddings = PROMPTS[:3], {}
    for mode in ("keep", "offload", "free"):
        gc.collect()  # what an earlier test left
        before = torch.cuda.memory_allocated()
        made = Captions(config, "cuda", World(), mode, tmp_path)  # type: ignore[arg-type]
        made.prepare(PROMPTS)
        made.embed(batch)
        resident = torch.cuda.memory_allocated() - before
        assert (resident > 0) == (mode == "keep"), (mode, resident)
        embeddings[mode] = made.embed(batch)
        assert embeddings[mode].tokens.is_cuda and embeddings[mode].mask.is_cuda
        assert embeddings[mode].tokens.dtype == torch.bfloat16
        assert same(embeddings[mode], embeddings["keep"])
        del made


def test_files_are_kept_for_what_they_hold(
    config: InferenceConfig, tmp_path: Path, encoded: list[tuple[str, bool]]
) -> None:
    def count(prompts: Sequence[str], *changes: str) -> int:
        encoded.clear()
        changed = load_config(ROOT / CONFIG, [*OVERRIDES, *changes])
        captions(changed, tmp_path, prompts_per_file=2).prepare(prompts)
        return len(encoded)

    some = PROMPTS[:5]
    assert count(some) == 6
    assert count(some) == 0
    assert count([*some[:4], "another one"]) == 1  # the last file alone
    assert count([*some[2:4], *some[:2]]) == 0  # files change places
    assert count(some, "sampling.negative_prompt=bad") == 1
    assert count(some, "sampling.motion_score=3") == 5
    assert count(some, "text_encoder.dtype=bfloat16") == 6
    assert count(some, "model.caption_length=40") == 6
    assert count(some, "text_encoder.chi_prompt=sana") == 6
    assert count(some, "text_encoder.chi_prompt=Describe it: ") == 6
    assert count(some, "text_encoder.softcap=false") == 6
    assert count(some) == 0


def test_another_instruction_under_the_same_name_is_another_file(
    tmp_path: Path, encoded: list[tuple[str, bool]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not the setting is what counts, but the words that it stood for."""
    config = load_config(ROOT / CONFIG, [*OVERRIDES, "text_encoder.chi_prompt=sana"])
    captions(config, tmp_path).prepare(PROMPTS)
    captions(config, tmp_path).prepare(PROMPTS)
    assert len(encoded) == len(PROMPTS) + 1
    monkeypatch.setattr("longsana.encoders.text.complex_human_instruction", lambda: "Other words: ")
    captions(config, tmp_path).prepare(PROMPTS)
    assert len(encoded) == 2 * (len(PROMPTS) + 1)


def test_the_published_negative_prompt(tmp_path: Path, encoded: list[tuple[str, bool]]) -> None:
    for given, text in (("null", published_negative_prompt()), ("", ""), ("dull", "dull")):
        captions(load_config(ROOT / CONFIG, [f"sampling.negative_prompt={given}"]), tmp_path).prepare([])
        assert encoded.pop() == (text, False)


def test_another_encoder_is_another_file(tmp_path: Path, encoded: list[tuple[str, bool]]) -> None:
    folder = Path(shutil.copytree(ROOT / "asset/shapes/text_encoder", tmp_path / "encoder"))
    config = load_config(ROOT / CONFIG, [f"text_encoder.text_encoder_name=seeded:{folder}"])
    captions(config, tmp_path / "files").prepare(PROMPTS)
    settings = (folder / "config.json").read_text()
    (folder / "config.json").write_text(settings.rstrip() + "\n\n")
    captions(config, tmp_path / "files").prepare(PROMPTS)
    assert len(encoded) == 24


@pytest.mark.parametrize("damage", ["cut", "empty", "text", "bit", "another's"])
def test_a_damaged_file_is_made_again(
    damage: str,
    config: InferenceConfig,
    encoder: GemmaTextEncoder,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    encoded: list[tuple[str, bool]],
) -> None:
    captions(config, tmp_path, prompts_per_file=4).prepare(PROMPTS)
    smaller, *_, victim = sorted(tmp_path.iterdir(), key=lambda path: path.stat().st_size)
    whole = victim.read_bytes()
    flipped = whole[:-9] + bytes([whole[-9] ^ 64]) + whole[-8:]  # of an embedding: any reader takes it
    damaged = {
        "cut": whole[:-1],
        "empty": b"",
        "text": b"a text file",
        "bit": flipped,
        "another's": smaller.read_bytes(),
    }
    captions(config, tmp_path, prompts_per_file=4).prepare(PROMPTS)  # its digest is remembered
    victim.write_bytes(damaged[damage])
    made = captions(config, tmp_path, prompts_per_file=4)
    encoded.clear()
    with caplog.at_level("INFO"):
        made.prepare(PROMPTS)
    assert victim.read_bytes() == whole
    assert [record.getMessage() for record in caplog.records if record.levelname == "WARNING"] == [
        f"{victim}: damaged: it has changed since it was written (SHA-256); it is encoded again"
    ]
    assert "captions: comparing 4 files (0.0 GB) with their digests" in caplog.text
    assert "captions: 1 of 4 files to encode" in caplog.text and len(encoded) == 4
    assert same(made.embed(PROMPTS), expected(encoder, PROMPTS))


def test_a_full_disk_leaves_nothing_half(
    config: InferenceConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, encoded: list[tuple[str, bool]]
) -> None:
    real, left = os.fsync, [2]

    def fsync(descriptor: int) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise OSError("disk full")
        real(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        with pytest.raises(OSError, match="disk full"):
            captions(config, tmp_path, prompts_per_file=4).prepare(PROMPTS)
    assert len(list(tmp_path.iterdir())) < 4
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
    done = len(list(tmp_path.iterdir()))
    encoded.clear()
    captions(config, tmp_path, prompts_per_file=4).prepare(PROMPTS)
    assert done > 0 and len(encoded) < 12


def main(arguments: list[str]) -> int:
    """What the processes do: encode so many prompts, and keep the captions in a folder."""
    folder, count = Path(arguments[0]), int(arguments[1])
    encode, encoded = GemmaTextEncoder.encode_together, []

    def noted(self: GemmaTextEncoder, texts: list[str], **rest: Any) -> Any:
        encoded.extend(texts)
        return encode(self, texts, **rest)

    GemmaTextEncoder.encode_together = noted  # type: ignore[method-assign]
    torch.set_num_threads(1)
    world = World.from_environment()
    world.connect()
    made = Captions(load_config(CONFIG, OVERRIDES), "cpu", world, "free", folder, prompts_per_file=4)
    prompts = [f"{n} small red circles fall on a blue background" for n in range(count)]
    made.prepare(prompts)
    torch.save((*made.embed(prompts), encoded), folder.parent / f"rank{world.rank}.pt")
    world.disconnect()
    return 0


@pytest.fixture(scope="module")
def processes(forks: Forks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes, and one that was killed, have left."""
    folder = tmp_path_factory.mktemp("processes")
    here = "tests.training.test_captions"
    for process in forks.launch(2, here, [folder / "two", 11]):
        told = process.finish()
        assert process.returncode == 0, told
    process, deadline = forks.start(here, [folder / "killed", 2000]), time.monotonic() + 60
    while len(list((folder / "killed").glob("[!.]*"))) < 5 and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    return folder


def test_two_processes_share_the_work(
    processes: Path, config: InferenceConfig, encoder: GemmaTextEncoder, encoded: list[tuple[str, bool]]
) -> None:
    # Each has all of it, also what the other encoded.
    wanted, shares = expected(encoder, PROMPTS), []
    for rank in range(2):
        tokens, mask, share = torch.load(processes / f"rank{rank}.pt")
        assert same(TextEmbedding(tokens, mask), wanted)
        shares.append(share)
    assert all(shares) and len({*shares[0], *shares[1]}) == len(shares[0]) + len(shares[1]) == 12
    encoded.clear()
    made = captions(config, processes / "two", prompts_per_file=4)
    made.prepare(PROMPTS)
    assert encoded == []
    assert same(made.embed(PROMPTS), wanted)


def test_killed_and_started_again(
    processes: Path, config: InferenceConfig, encoder: GemmaTextEncoder, encoded: list[tuple[str, bool]]
) -> None:
    folder = processes / "killed"
    done = {path: path.stat().st_mtime_ns for path in folder.glob("[!.]*")}
    assert 5 <= len(done) < 400  # of 501

    prompts = [f"{n} small red circles fall on a blue background" for n in range(4 * len(done) + 8)]
    made = captions(config, folder, prompts_per_file=4)
    made.prepare(prompts)
    # The negative prompt's file and all but one of the others were there; three more are asked for.
    assert len(encoded) == len(prompts) - 4 * (len(done) - 1) == 12
    assert {path: path.stat().st_mtime_ns for path in done} == done
    assert not list(folder.glob(".*"))
    assert same(made.embed(prompts[-16:]), expected(encoder, prompts[-16:]))
