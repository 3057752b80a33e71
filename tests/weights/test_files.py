from __future__ import annotations

import json
import os
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from longsana.runtime.errors import InputError
from longsana.runtime.hub import file_sha256
from longsana.training.parts import Part, write_parts
from longsana.weights.checkpoint_folder import MANIFEST, Stored, digests
from longsana.weights.files import open_checkpoint, write_safetensors
from longsana.weights.network import save_checkpoint
from tests.weights.checkpoints import TINY, assert_same, load, upstream, weights


class Payload:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("ran",)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_files_with_code_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": upstream(), "extra": Payload()}, "code.pth")
    torch.save({"state_dict": upstream(), "extra": Payload()}, "old.pth", _use_new_zipfile_serialization=False)
    Path("bare.pkl").write_bytes(pickle.dumps(Payload()))
    for name in ("code.pth", "old.pth", "bare.pkl"):
        with pytest.raises(InputError, match=f"^{name}: refused: .*code"):
            load(Path(name))
    assert not Path("ran").exists()
    with pytest.raises(InputError, match=r"mkdir"):
        load(Path("code.pth"))


@pytest.mark.parametrize("kind", ["pth", "old.pth", "safetensors"])
@pytest.mark.parametrize("keep", [0, 5, 0.01, 0.5, 0.999])
def test_files_cut_short(kind: str, keep: float, tmp_path: Path) -> None:
    path = tmp_path / f"a.{kind}"
    if kind == "safetensors":
        save_file(upstream(), path)
    else:
        torch.save({"state_dict": upstream()}, path, _use_new_zipfile_serialization=kind == "pth")
    content = path.read_bytes()
    path.write_bytes(content[: int(keep if keep >= 1 else keep * len(content))])
    with pytest.raises(InputError, match=rf"{re.escape(str(path))}: .*download or copy it again"):
        load(path)


@pytest.mark.parametrize("kind", ["pth", "old.pth", "safetensors"])
def test_garbled_headers(kind: str, tmp_path: Path) -> None:
    path = tmp_path / f"a.{kind}"
    if kind == "safetensors":
        save_file(upstream(), path)
    else:
        torch.save({"state_dict": upstream()}, path, _use_new_zipfile_serialization=kind == "pth")
    content = bytearray(path.read_bytes())
    start = content.index(b"blocks.0.attn.qkv") - 20
    content[start : start + 40] = b"\xff" * 40
    path.write_bytes(content)
    with pytest.raises(InputError, match=re.escape(str(path))):
        load(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "git lfs pull"),
        (b"<!DOCTYPE html><html><head>", "neither a PyTorch nor a safetensors file"),
        (b"PK\x03\x04 any other archive", "damaged"),
    ],
)
def test_files_of_another_kind(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.pth").write_bytes(content)
    with pytest.raises(InputError, match=message):
        load(tmp_path / "a.pth")


@pytest.mark.parametrize("content", [{"a": torch.ones(1)}, {}, [torch.ones(1)], {"state_dict": {}}, {"step": 3}])
def test_files_without_this_network(content: object, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "a.pth")
    with pytest.raises(InputError, match=r"a\.pth: (no network in this file|not a LongSANA or SANA-Video network)"):
        load(tmp_path / "a.pth")


def test_a_header_length_that_begins_like_a_pickle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch, "load")  # newer ones read safetensors too, older ones refuse them
    path = tmp_path / "a.safetensors"
    for padding in range(0, 264, 8):  # lengths are multiples of 8: one of these ends in 0x80
        save_file(weights(), path, metadata={"padding": "x" * padding})
        if path.read_bytes().startswith(b"\x80"):
            assert_same(load(path), weights())
            return
    pytest.fail("no header of such a length")


def test_incomplete_shards(tmp_path: Path) -> None:
    save_checkpoint(weights(), tmp_path / "m.safetensors", "safetensors", TINY, shard_bytes=60_000)
    first, second = sorted(tmp_path.glob("*.safetensors"))[:2]
    held = load_file(second)
    second.unlink()
    with pytest.raises(InputError, match=rf"{second.name}: no such file, but m\.safetensors\.index\.json lists it"):
        load(tmp_path)
    save_file(held | dict([next(iter(load_file(first).items()))]), second)
    with pytest.raises(InputError, match="is in another shard"):
        load(tmp_path)


def test_folders(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no weights here"):
        load(tmp_path)
    save_checkpoint(weights(), tmp_path / "a.pt", "trainer", TINY)
    assert_same(load(tmp_path), weights())
    (tmp_path / ".b.partial.safetensors").write_bytes(b"half")  # left by a killed save
    assert_same(load(tmp_path), weights())
    save_checkpoint(weights(), tmp_path / "b.pth", "upstream", TINY)
    with pytest.raises(InputError, match=r"several weights files \(a\.pt, b\.pth\) here; name the file"):
        load(tmp_path)
    with pytest.raises(InputError, match="no such file"):
        load(tmp_path / "c.pth")


def checkpoint_folder(path: Path, networks: dict[str, dict[str, torch.Tensor]], processes: int = 1) -> Path:
    """What training writes, without a process group; of several processes, each has some rows of every matrix."""
    path.mkdir(parents=True)
    flat = {f"{group}/{name}": value for group, named in networks.items() for name, value in named.items()}
    for rank in range(processes):
        own = {}
        for name, value in flat.items():
            rows = -(-len(value) // processes) if value.dim() > 1 else 0
            part = value[rank * rows :][:rows] if rows else value
            if part.numel() and (rows or rank == 0):
                own[name] = Part(part, (rank * rows, *(0,) * value.dim())[: value.dim()])
        write_parts(own, path, rank, copied=False)
    write_manifest(path)
    return path


def write_manifest(path: Path) -> None:
    names = [file.name for file in path.iterdir() if file.name != MANIFEST]
    files = {name: {"size": (path / name).stat().st_size, "sha256": digests(path, [name])[name]} for name in names}
    (path / MANIFEST).write_text(json.dumps({"files": files}))


def test_checkpoint_folders(tmp_path: Path) -> None:
    networks = {name: weights(seed) for seed, name in enumerate(("generator", "critic"))}
    moments = {"optimizer.generator": {"final.linear.bias.step": torch.zeros(())}}
    path = checkpoint_folder(tmp_path / "run" / "checkpoint_model_000020", networks | moments)
    assert not torch.distributed.is_initialized()
    for key, expected in networks.items():
        assert_same(load(path, key=key), expected)
    with pytest.raises(
        InputError,
        match=r"'generator_ema' in this .* set checkpoint_key, or --key of longsana convert, to generator or critic",
    ):
        load(path, key="generator_ema")
    checkpoint_folder(tmp_path / "moments", moments)
    with pytest.raises(InputError, match=r"no network 'generator'.*none at all"):
        load(tmp_path / "moments")


def test_a_run_names_its_newest_whole_checkpoint(tmp_path: Path) -> None:
    for step in (999_980, 1_000_000, 20):
        checkpoint_folder(tmp_path / f"checkpoint_model_{step:06d}", {"generator": weights()}, processes=2)
    with pytest.raises(
        InputError, match=r"a run; name one of its checkpoints .*, such as .*checkpoint_model_1000000, the newest"
    ):
        load(tmp_path)
    next((tmp_path / "checkpoint_model_1000000").glob("shard-00002-*")).unlink()
    with pytest.raises(InputError, match=r"checkpoint_model_999980, the newest"):
        load(tmp_path)
    with pytest.raises(InputError, match=r"shard-00002-\S+ is missing"):
        load(tmp_path / "checkpoint_model_1000000")


@pytest.mark.parametrize("processes", [1, 3])
def test_reading_holds_one_tensor_at_a_time(processes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = checkpoint_folder(tmp_path / "c", {"generator": weights()}, processes)
    read = []
    genuine = Stored.read
    monkeypatch.setattr(Stored, "read", lambda self: read.append(genuine(self)) or read[-1])
    entries = open_checkpoint(path, "generator")
    assert not read
    for name, expected in weights().items():
        read.clear()
        assert torch.equal(entries[name].read(), expected)
        assert len(read) == 1


def test_damaged_checkpoint_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = checkpoint_folder(Path("c"), {"generator": weights()}, processes=2)
    file = path / "shard-00001-model-00001-of-00001.safetensors"
    content = file.read_bytes()
    assert_same(load(path), weights())
    file.write_bytes(content[:-1])
    with pytest.raises(InputError, match=r"c: shard-\S+ has \d+ bytes instead of"):
        load(path)
    file.write_bytes(b"\0" * len(content))
    with pytest.raises(InputError, match=r"c/shard-\S+: has changed since it was written \(SHA-256\)"):
        load(path)
    header = len(content) - content.index(b"}}", content.index(b"__metadata__"))
    for changed in (
        b"\0" * len(content),
        content[:-1],
        content[: len(content) - header],
        content.replace(b"saved_offsets", b"other_offsets"),
        content.replace(b"DCP_SHARDING_INFO", b"DCP_SHARDING_NONE"),
        content.replace(b"[0, 0]}", b"[0, x]}"),
        content.replace(b"[0, 0]}", b"[0,-1]}"),
        content.replace(b"[0, 0]}", b"[0]   }"),
    ):
        assert changed != content
        file.write_bytes(changed)
        write_manifest(path)
        with pytest.raises(InputError, match=r"^c/shard-00001\S+: damaged \(.*copy it again") as caught:
            load(path)
        assert "\n" not in str(caught.value)
    file.write_bytes(content)
    other = path / "shard-00002-model-00001-of-00001.safetensors"
    held = other.read_bytes()
    other.write_bytes(content)
    write_manifest(path)
    with pytest.raises(InputError, match=r"c: parts of generator/.* are missing, or are there twice"):
        load(path)
    other.write_bytes(held)
    write_manifest(path)
    assert_same(load(path), weights())
    (path / MANIFEST).unlink()
    with pytest.raises(InputError, match=r"no manifest\.json, so not a whole checkpoint"):
        load(path)


@pytest.mark.parametrize("names", [("__0_0.distcp", ".metadata", MANIFEST), ("__0_0.distcp",), (".metadata",)])
def test_a_checkpoint_of_the_old_format_is_refused(names: tuple[str, ...], tmp_path: Path) -> None:
    """By its files' names: nothing in it is opened."""
    for name in names:
        (tmp_path / name).write_bytes(pickle.dumps(Payload()))
    with pytest.raises(InputError) as caught:
        load(tmp_path)
    message = str(caught.value)
    assert message.startswith(f"{tmp_path}: a checkpoint with .distcp files, which this version does not read")
    assert "`git worktree add ../longsana-3377696 3377696`" in message and "\n" not in message


def test_digest_of_a_checkpoint_folder_tells_its_weights(tmp_path: Path) -> None:
    first, same, other = (
        file_sha256(checkpoint_folder(tmp_path / name, {"generator": weights(seed)}))
        for name, seed in (("a", 0), ("b", 0), ("c", 1))
    )
    assert first == same != other


def test_words_of_a_header_have_an_order(tmp_path: Path) -> None:
    """The same tensors and words are the same file, to the bit."""
    given, words = {"b": torch.ones(3), "a": torch.zeros(2, 2)}, {name: f"{name}, größer" for name in "zyxwv"}
    files = set()
    for number in range(6):
        write_safetensors(given, path := tmp_path / f"{number}.safetensors", 1 << 40, words)
        files.add(path.read_bytes())
    assert len(files) == 1
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"format": "pt", **words}
        assert all(torch.equal(file.get_tensor(name), tensor) for name, tensor in given.items())
