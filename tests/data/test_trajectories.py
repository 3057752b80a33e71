"""Trajectories on disk: what is written is read, and what is not whole is not read."""

from __future__ import annotations

import dataclasses
import json
import os
import resource
import shutil
import struct
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from longsana.data.shards import MANIFEST, Contents, ShardWriter, shard_name
from longsana.data.trajectories import PUBLISHED_SIGMAS, Trajectories, check_grid, open_trajectories
from longsana.runtime.distributed import World
from longsana.runtime.errors import InputError
from longsana.runtime.files import open_exclusive, partial_name

SHAPE = (5, 4, 3, 2, 6)
PROMPTS = ["a red circle", "Ein grünes Dreieck", 'quotes " and \n', "d", "e"]
CONTENTS = Contents(
    "trajectories", {"sigmas": [1.0, 0.96, 0.89, 0.73, 0.0], "seed": 3}, SHAPE, "float16", len(PROMPTS), 2
)


@pytest.fixture(autouse=True)
def own_digests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def values(index: int) -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(index))


def write(folder: Path, contents: Contents = CONTENTS, *, shards: int | None = None, finish: bool = True) -> list[int]:
    """The shards that were missing, of which the first `shards` are written."""
    writer = ShardWriter(folder, contents, World(), "--out")
    for number in writer.mine[:shards]:
        rows = contents.rows(number)
        writer.write(number, torch.stack([values(row) for row in rows]).half(), [PROMPTS[row] for row in rows])
    if finish:
        writer.finish()
    return writer.mine


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(tmp_path / "whole")
    return tmp_path / "whole"


def test_what_is_written_is_read(folder: Path) -> None:
    trajectories = Trajectories.open(folder)
    assert len(trajectories) == len(PROMPTS)
    assert trajectories.sigmas == (1.0, 0.96, 0.89, 0.73, 0.0)
    assert trajectories.shape == SHAPE
    assert trajectories.prompts() == PROMPTS
    for index, prompt in enumerate(PROMPTS):
        states, read = trajectories[index]
        assert read == prompt
        assert states.dtype == torch.float16
        assert torch.equal(states, values(index).half().float())
    for index in (-1, len(PROMPTS)):
        with pytest.raises(IndexError):
            trajectories[index]
    assert open_trajectories(folder, shape=(4, 3, 2, 6)).shape == SHAPE
    with pytest.raises(InputError, match=r"\(4, 3, 2, 6\) latents, the config asks for \(4, 4, 2, 6\)"):
        open_trajectories(folder, shape=(4, 4, 2, 6))


def test_an_item_is_a_copy(folder: Path) -> None:
    trajectories = Trajectories.open(folder)
    trajectories[0].states.zero_()
    assert torch.equal(trajectories[0].states, values(0).half())


def test_only_the_item_is_read(tmp_path: Path) -> None:
    """A shard of 4 GiB, all of it a hole in the file but its second item."""
    items, shape = 1024, (4, 1 << 10, 1 << 9)
    made_by = {"sigmas": [1.0, 0.9, 0.8, 0.0]}
    contents = dataclasses.replace(CONTENTS, made_by=made_by, shape=shape, count=items, shard_size=items)
    size = 2 * 4 << 19
    header = {
        "__metadata__": {"shard": json.dumps({"made_by": contents.identity, "prompts": ["x"] * items})},
        "values": {"dtype": "F16", "shape": [items, *shape], "data_offsets": [0, items * size]},
    }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path = tmp_path / shard_name(0)
    with path.open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        stream.seek(size, os.SEEK_CUR)
        stream.write(torch.arange(8).half().numpy().tobytes())
        stream.truncate(8 + len(text) + items * size)
    shards = [{"name": path.name, "items": items, "bytes": path.stat().st_size, "sha256": ""}]
    (tmp_path / MANIFEST).write_text(json.dumps({"format": 1, **contents.as_json(), "shards": shards}))

    trajectories = Trajectories.open(tmp_path, digests=False)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    states = trajectories[1].states
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before  # KiB
    assert states.flatten()[:8].tolist() == list(range(8))
    assert grown < 100 << 10, "4 GiB would be 4 << 20"


# Going on -------------------------------------------------------------------------------------------------------------


def test_stopped_anywhere_and_gone_on_is_the_same(tmp_path: Path, folder: Path) -> None:
    for stop in range(4):
        again = tmp_path / f"stopped-{stop}"
        assert write(again, shards=stop, finish=False) == [0, 1, 2]
        with pytest.raises(InputError, match=f"unfinished, {stop} of 3 shards are there; run train_video_scripts"):
            Trajectories.open(again)
        times = {path.name: path.stat().st_mtime_ns for path in again.glob("*.safetensors")}
        partial_name(again / shard_name(2)).write_bytes(b"half a shard")
        assert write(again) == [0, 1, 2][stop:]
        partial_name(again / shard_name(2)).unlink(missing_ok=True)
        assert content(again) == content(folder)
        assert times.items() <= {path.name: path.stat().st_mtime_ns for path in again.iterdir()}.items()
    assert write(folder) == []


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"made_by": {**CONTENTS.made_by, "seed": 4}}, "seed=4 (there: 3)"),
        ({"made_by": {"sigmas": CONTENTS.made_by["sigmas"]}}, "seed=None (there: 3)"),
        ({"count": 4}, "count=4 (there: 5)"),
        ({"dtype": "bfloat16"}, "dtype=bfloat16 (there: float16)"),
        ({"shard_size": 3}, "shard_size=3 (there: 2)"),
        ({"kind": "clips"}, "kind=clips (there: trajectories)"),
    ],
)
@pytest.mark.parametrize("finished", [True, False])
def test_a_folder_of_other_settings_is_refused(tmp_path: Path, change: dict, says: str, finished: bool) -> None:
    write(tmp_path / "x", shards=1, finish=False)
    if finished:
        write(tmp_path / "x")
    before = content(tmp_path / "x")
    with pytest.raises(InputError) as caught:
        write(tmp_path / "x", dataclasses.replace(CONTENTS, **change))
    assert "made with other settings" in str(caught.value)
    assert says in str(caught.value)
    assert "choose another --out" in str(caught.value)
    assert content(tmp_path / "x") == before
    (tmp_path / "x" / MANIFEST).unlink()  # the shards know as well
    with pytest.raises(InputError, match=r"shard-00000\.safetensors: was made with other settings"):
        write(tmp_path / "x", dataclasses.replace(CONTENTS, **change))


def test_a_shard_that_another_command_writes(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, CONTENTS, World(), "--out")
    with open_exclusive(partial_name(tmp_path / shard_name(0))):
        with pytest.raises(InputError, match="another command is writing here"):
            writer.write(0, torch.zeros(2, *SHAPE).half(), PROMPTS[:2])
    assert not (tmp_path / shard_name(0)).exists()


# What is not whole ----------------------------------------------------------------------------------------------------


def _replace(path: Path, change: Callable[[bytes], bytes]) -> None:
    changed = change(path.read_bytes())
    path.unlink()
    path.write_bytes(changed)


def _edit(name: str, change: Callable[[dict], object]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        manifest = json.loads((folder / MANIFEST).read_text())
        change(manifest)
        (folder / MANIFEST).write_text(json.dumps(manifest))

    edit.__name__ = name
    return edit


FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no folder": (shutil.rmtree, "no manifest.json here"),
    "no manifest": (lambda folder: (folder / MANIFEST).unlink(), "no manifest.json here"),
    "half a manifest": (lambda folder: _replace(folder / MANIFEST, lambda b: b[:100]), "manifest.json: damaged"),
    "a list": (lambda folder: _replace(folder / MANIFEST, lambda _: b"[]"), "manifest.json: damaged"),
    "an entry missing": (_edit("x", lambda m: m.pop("count")), "manifest.json: damaged"),
    "a shard unlisted": (_edit("x", lambda m: m["shards"].pop()), "contradict each other"),
    "another count": (_edit("x", lambda m: m.update(count=7)), "contradict each other"),
    "made by a list": (_edit("x", lambda m: m.update(made_by=[])), "contradict each other"),
    "a later format": (_edit("x", lambda m: m.update(format=2)), "format 2; this version reads 1"),
    "clips": (_edit("x", lambda m: m.update(kind="clips")), "holds clips, not trajectories"),
    "unfinished": (_edit("x", lambda m: m.update(shards=None)), "unfinished, 3 of 3 shards"),
    "a shard missing": (lambda folder: (folder / shard_name(1)).unlink(), "shard-00001.safetensors: missing"),
    "a shard cut short": (
        lambda folder: _replace(folder / shard_name(1), lambda b: b[:-1]),
        "bytes, the manifest says",
    ),
    "a bit": (
        lambda folder: _replace(folder / shard_name(2), lambda b: b[:-5] + bytes([b[-5] ^ 1]) + b[-4:]),
        "shard-00002.safetensors: not the file of the manifest",
    ),
    "two swapped": (
        lambda folder: [
            (folder / shard_name(0)).rename(folder / "x"),
            (folder / shard_name(1)).rename(folder / shard_name(0)),
            (folder / "x").rename(folder / shard_name(1)),
        ],
        "shard-00000.safetensors:",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_not_whole_is_refused(folder: Path, fault: str) -> None:
    Trajectories.open(folder)
    plant, says = FAULTS[fault]
    plant(folder)
    with pytest.raises(InputError) as caught:
        Trajectories.open(folder)
    message = str(caught.value)
    assert says in message
    assert "\n" not in message
    assert message.endswith(f"run train_video_scripts/generate_ode_pairs.py --out {folder}")


@pytest.mark.parametrize("fault", ["no manifest", "unfinished", "a shard missing", "a shard cut short", "a bit"])
def test_what_is_not_whole_is_mended(folder: Path, fault: str) -> None:
    before = content(folder)
    FAULTS[fault][0](folder)
    write(folder)
    assert content(folder) == before
    Trajectories.open(folder)


# The grid -------------------------------------------------------------------------------------------------------------

WANTED = (1.0, 0.959957, 0.889153, 0.727410, 0.0)  # method.md 3.2, shift 7


def test_the_published_recipe_fits_the_published_steps() -> None:
    check_grid(PUBLISHED_SIGMAS, WANTED)
    check_grid([sigma + 4.9e-4 for sigma in WANTED], WANTED)


@pytest.mark.parametrize(
    "sigmas",
    [
        (1.0, 0.959957, 0.889153, 0.726905, 0.0),
        (1.0, 0.954545, 0.875, 0.7, 0.0),
        (1.0, 0.959957, 0.889153, 0.727410),
        (1.0, 0.959957, 0.889153, 0.727410, 0.006958),
        (0.0, 0.727410, 0.889153, 0.959957, 1.0),
        (1.0, 0.959957, 0.889153, float("nan"), 0.0),
    ],
)
def test_another_grid_is_refused(sigmas: tuple[float, ...]) -> None:
    with pytest.raises(InputError) as caught:
        check_grid(sigmas, WANTED)
    assert f"({', '.join(f'{sigma:.6g}' for sigma in sigmas)})" in str(caught.value)
    assert "(1, 0.959957, 0.889153, 0.72741, 0)" in str(caught.value)


# The published LMDB ---------------------------------------------------------------------------------------------------


def write_lmdb(folder: Path, change: Callable[[dict[bytes, bytes]], object] = lambda entries: None) -> Path:
    lmdb = pytest.importorskip("lmdb")
    states, channels, frames, height, width = SHAPE
    entries = {b"latents_shape": f"3 {states} {frames} {channels} {height} {width}".encode()}
    for index in range(3):
        # The layout spelt out: frames before channels.
        numbers = [
            float(values(index)[s, c, t, y, x])
            for s in range(states)
            for t in range(frames)
            for c in range(channels)
            for y in range(height)
            for x in range(width)
        ]
        entries[f"latents_{index}_data".encode()] = struct.pack(f"<{len(numbers)}e", *numbers)
        entries[f"prompts_{index}_data".encode()] = PROMPTS[index].encode()
    change(entries)
    with lmdb.open(str(folder), map_size=1 << 20) as environment, environment.begin(write=True) as transaction:
        for key, value in entries.items():
            transaction.put(key, value)
    return folder


def test_the_published_lmdb_is_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        trajectories = Trajectories.open(write_lmdb(tmp_path / "lmdb"))
    assert len(trajectories) == 3
    assert trajectories.shape == SHAPE
    assert trajectories.sigmas == PUBLISHED_SIGMAS
    assert "taken to be the published ones" in caplog.text
    assert trajectories.prompts() == PROMPTS[:3]
    for index in range(3):
        assert trajectories[index].prompt == PROMPTS[index]
        assert torch.equal(trajectories[index].states, values(index).half())
    with pytest.raises(IndexError):
        trajectories[3]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda entries: entries.pop(b"latents_shape"), "no entry latents_shape"),
        (lambda entries: entries.update({b"latents_shape": b"3 5 3 4 2"}), "six numbers"),
        (lambda entries: entries.update({b"latents_shape": b"3 5 3 4 2 x"}), "six numbers"),
        (lambda entries: entries.update({b"latents_shape": b"3 5 3 4 2 7"}), "latents_shape says 1680"),
        (lambda entries: entries.update({b"latents_shape": b"4 5 3 4 2 6"}), "no entry latents_3_data"),
        (lambda entries: entries.update({b"latents_shape": b"3 4 3 5 2 6"}), "4 states an item"),
        (lambda entries: entries.pop(b"prompts_2_data"), "no entry prompts_2_data"),
        (lambda entries: entries.update({b"prompts_0_data": b"\xff"}), "prompts_0_data is not UTF-8"),
    ],
)
def test_another_lmdb_is_refused(tmp_path: Path, change: Callable[[dict[bytes, bytes]], object], says: str) -> None:
    with pytest.raises(InputError) as caught:
        Trajectories.open(write_lmdb(tmp_path / "lmdb", change))
    assert says in str(caught.value)


def test_an_lmdb_without_its_package_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_lmdb(tmp_path / "lmdb")
    monkeypatch.setitem(sys.modules, "lmdb", None)
    with pytest.raises(InputError, match=r"pip install -e '\.\[lmdb\]'"):
        Trajectories.open(path)


def test_no_lmdb_at_all(tmp_path: Path) -> None:
    pytest.importorskip("lmdb")
    (tmp_path / "data.mdb").write_bytes(b"x" * 10000)
    with pytest.raises(InputError, match="not an LMDB that can be read"):
        Trajectories.open(tmp_path)


@pytest.mark.parametrize("keep", [0.97, 0.8, 0.5, 8193, 8192])
def test_a_cut_lmdb_ends_no_process_but_its_reader(tmp_path: Path, keep: float) -> None:
    """Mapped memory behind the end of a file is a bus error, and zeros until its page ends."""
    file = write_lmdb(tmp_path / "lmdb") / "data.mdb"
    size = file.stat().st_size
    left = int(keep * size) if keep < 1 else int(keep)
    os.truncate(file, left)
    with pytest.raises(InputError) as caught:
        Trajectories.open(tmp_path / "lmdb")
    message = str(caught.value)
    assert "\n" not in message and message.startswith(f"{tmp_path / 'lmdb'}: ")
    assert f"an LMDB that is cut short: {left} bytes of {size}" in message


def test_every_entry_is_looked_at(tmp_path: Path) -> None:
    def spoil(entries: dict[bytes, bytes]) -> None:
        del entries[b"latents_1_data"]
        entries[b"prompts_1_data"] = b"\xff"

    with pytest.raises(InputError, match=r"no entry latents_1_data, and 1 more are wrong$"):
        Trajectories.open(write_lmdb(tmp_path / "missing", spoil))
    short = write_lmdb(tmp_path / "short", lambda entries: entries.update({b"latents_1_data": b"12"}))
    with pytest.raises(InputError, match=r"latents_1_data is 2 bytes, latents_shape says 1440"):
        Trajectories.open(short)
    many = write_lmdb(tmp_path / "many", lambda entries: entries.update({b"latents_shape": b"999999999 5 3 4 2 6"}))
    with pytest.raises(InputError, match=r"no entry latents_3_data, and many more are wrong"):
        Trajectories.open(many)


def test_damage_inside_an_lmdb_is_one_line(tmp_path: Path) -> None:
    file = write_lmdb(tmp_path / "lmdb") / "data.mdb"
    whole = file.read_bytes()
    for filling in (b"\xff", b"\0", b"\x11"):
        file.write_bytes(whole[:8192] + filling * (len(whole) - 8192))
        with pytest.raises(InputError, match=r"lmdb: (not )?an LMDB that ") as caught:
            Trajectories.open(tmp_path / "lmdb")
        assert "\n" not in str(caught.value)
