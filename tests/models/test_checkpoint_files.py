from __future__ import annotations

import os
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from longsana.models.weights import save_checkpoint
from longsana.runtime.errors import InputError
from tests.models.checkpoints import TINY, assert_same, load, upstream, weights


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
