"""Videos that several processes make together are those of one, and a process that ends takes the others with it."""

from __future__ import annotations

import json
import re
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from longsana.sampling.continuation import Continuation
from tests.forks import Fork, Forks
from tests.pipelines.repository import shallow

SMALL = (
    *shallow(),
    *("--height", "32", "--width", "48", "--num_frames", "57", "--threads", "1"),
    *("sampling.chunk_frames=5", "model.dtype=float32", "vae.decoder=full", "vae.weight_dtype=float32"),
)
PROMPTS = (
    "a small red circle moves slowly to the right on a black background<split>[cut] a big blue square stays still\n"
)


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text(PROMPTS + "a green ring\n")
    return path


def arguments(folder: Path, prompts: Path, *more: Any) -> list[Any]:
    return [*SMALL, "--work_dir", folder, "--txt_file", prompts, "--save_state", "full", *more]


def made(folder: Path) -> list[tuple[dict[str, Any], Continuation]]:
    """Sidecars and states of the videos."""
    found = sorted(folder.rglob("*.json"))
    return [
        (json.loads(path.read_text()), Continuation.load(path.with_suffix(".safetensors"), torch.device("cpu")))
        for path in found
    ]


def finished(forks: list[Fork]) -> str:
    said = "".join(fork.finish() for fork in forks)
    assert [fork.returncode for fork in forks] == [0] * len(forks), said
    return said


def test_videos_of_two_processes_are_those_of_one(forks: Forks, prompts: Path, tmp_path: Path) -> None:
    """A story too; and a state goes on on any number of processes, with the decoder's memory."""
    alone, together = tmp_path / "alone", tmp_path / "together"
    finished([forks.start("generate", arguments(alone, prompts))])
    finished(forks.launch(2, "generate", arguments(together, prompts, "--gpus_per_video", 2)))
    pairs = list(zip(made(alone), made(together), strict=True))
    assert len(pairs) == 2
    for (one, state), (other, theirs) in pairs:
        assert one["fingerprint"] == other["fingerprint"]
        assert (one["machine"]["gpus_per_video"], other["machine"]["gpus_per_video"]) == (1, 2)
        for part in ("kv", "k_sum", "tail"):
            torch.testing.assert_close(
                getattr(theirs.network, part), getattr(state.network, part), rtol=1e-3, atol=0.02
            )
        assert state.decoder is not None and theirs.decoder is not None
        for a, b in zip(theirs.decoder.features, state.decoder.features, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=0.02)
    (first, *_) = sorted(together.rglob("*.safetensors"))
    went_on = []
    for size, folder in ((1, tmp_path / "on1"), (2, tmp_path / "on2")):
        begin = ["--from_state", first, "--gpus_per_video", size, "--work_dir", folder, "--save_state", "latents"]
        finished(forks.launch(size, "generate", [*SMALL, *begin, "--num_frames", "41"]))
        went_on += made(folder)
    (_, one), (_, two) = went_on
    assert one.latents is not None and two.latents is not None
    torch.testing.assert_close(two.latents, one.latents, rtol=0, atol=2e-3)


def test_two_teams_share_the_prompts(forks: Forks, prompts: Path, tmp_path: Path) -> None:
    finished(forks.launch(4, "generate", arguments(tmp_path / "out", prompts, "--gpus_per_video", 2)))
    assert len(made(tmp_path / "out")) == 2


@pytest.mark.parametrize("killed", [0, 1])
def test_a_process_that_dies_takes_the_others_with_it(forks: Forks, prompts: Path, tmp_path: Path, killed: int) -> None:
    """Within seconds, with one message, and nothing half-written; the same command goes on."""
    folder = tmp_path / "out"
    command = arguments(folder, prompts, "--gpus_per_video", 3, "--num_frames", "4001")
    peers = forks.launch(3, "generate", command)
    until = time.monotonic() + 100
    while not list(folder.rglob("*.partial*")) and not list(folder.rglob(".*")):
        assert time.monotonic() < until, "nothing was begun"
        time.sleep(0.05)
    time.sleep(0.5)
    peers[killed].send_signal(signal.SIGKILL)
    began = time.monotonic()
    others = [peer for number, peer in enumerate(peers) if number != killed]
    said = "".join(peer.finish(20) for peer in others)
    assert time.monotonic() - began < 10
    assert [peer.returncode for peer in others] == [1, 1], said
    assert said.count("another process of this launch has ended") == 1, said
    if killed:
        assert not list(folder.rglob("*.mp4")) and not list(folder.rglob("*.partial*"))


@pytest.mark.parametrize(("processes", "size"), [(1, 2), (3, 2), (2, 0)])
def test_sizes_that_do_not_come_out(forks: Forks, prompts: Path, tmp_path: Path, processes: int, size: int) -> None:
    peers = forks.launch(processes, "generate", arguments(tmp_path / "out", prompts, "--gpus_per_video", size))
    said = "".join(peer.finish() for peer in peers)
    assert [peer.returncode for peer in peers] == [2] * processes
    assert len(re.findall(rf"--gpus_per_video {size}: does not divide", said)) == 1


def test_a_full_disk_ends_a_team(forks: Forks, prompts: Path, tmp_path: Path) -> None:
    command = arguments(tmp_path / "out", prompts, "--gpus_per_video", 2)
    peers = forks.launch(2, "generate", command, file_size=2000)
    said = "".join(peer.finish() for peer in peers)
    assert {peer.returncode for peer in peers} == {1}, said
    assert "videos are not made" in said


def test_a_tiny_decoder_is_whole_on_each(forks: Forks, prompts: Path, tmp_path: Path) -> None:
    """Its memory too, on any number: rows that come out and rows that do not."""
    tiny = [*SMALL[:-2], "--height", "64", "--sample_nums", "1", "vae.decoder=tae_shapes"]
    found = []
    for processes in (1, 2, 3):
        folder = tmp_path / str(processes)
        more = ["--work_dir", folder, "--txt_file", prompts, "--save_state", "full", "--gpus_per_video", processes]
        finished(forks.launch(processes, "generate", [*tiny, *more]))
        ((_, state),) = made(folder)
        assert state.decoder is not None
        found.append(state.decoder.features)
    for features in found[1:]:
        for one, other in zip(found[0], features, strict=True):
            torch.testing.assert_close(other, one, rtol=1e-2, atol=0.05)
    (path,) = (tmp_path / "1").rglob("*.safetensors")
    begin = ["--from_state", path, "--gpus_per_video", 2, "--work_dir", tmp_path / "on", "--num_frames", "41"]
    finished(forks.launch(2, "generate", [*tiny[:-3], "vae.decoder=tae_shapes", *begin]))


@pytest.mark.parametrize("who", [(0,), pytest.param((1,), marks=pytest.mark.slow), (0, 1)])
@pytest.mark.parametrize("moment", [0.7, *(pytest.param(moment, marks=pytest.mark.slow) for moment in (0.3, 1.1, 1.6))])
def test_signals_end_a_team_at_any_moment(
    forks: Forks, prompts: Path, tmp_path: Path, who: tuple[int, ...], moment: float
) -> None:
    """With states after every chunk; who was asked to stop says so, and nobody waits for ever."""
    command = arguments(tmp_path / "out", prompts, "--gpus_per_video", 2, "--num_frames", "2001", "--save_every", "1")
    peers = forks.launch(2, "generate", command)
    until = time.monotonic() + 100
    while not list((tmp_path / "out").rglob(".*")):
        assert time.monotonic() < until
        time.sleep(0.02)
    time.sleep(moment)
    for number in who:
        peers[number].send_signal(signal.SIGTERM)
    began = time.monotonic()
    said = [peer.finish(25) for peer in peers]
    assert time.monotonic() - began < 10, said
    assert all(
        peer.returncode == (143 if number in who else 1) or peer.returncode == 143 for number, peer in enumerate(peers)
    ), (said, [peer.returncode for peer in peers])
    assert peers[0].returncode == (143 if 0 in who else 1), said
    assert not list((tmp_path / "out").rglob("*.partial*")) and not list((tmp_path / "out").rglob("*.whole*"))


@pytest.mark.parametrize("alone", [0, 1])
def test_what_fails_on_one_process_ends_all(forks: Forks, prompts: Path, tmp_path: Path, alone: int) -> None:
    """Before its first pass, while the other waits for it in one."""
    command = ["tests.inference.one_sided", alone, *arguments(tmp_path / "out", prompts, "--gpus_per_video", 2)]
    peers = forks.launch(2, str(command[0]), command[1:])
    began = time.monotonic()
    said = "".join(peer.finish(60) for peer in peers)
    assert time.monotonic() - began < 40
    assert all(peer.returncode != 0 for peer in peers), said
    assert said.count("another process of this launch has ended") == 1, said


def test_a_benchmark_of_two_processes(forks: Forks, tmp_path: Path) -> None:
    """All of its films and passes are made by both, so that neither waits for ever."""
    out = tmp_path / "report.json"
    given = [*SMALL, "--num_frames", 41, "--gpus_per_video", 2, "--out", out]
    finished(forks.launch(2, "benchmark", given))
    report = json.loads(out.read_text())
    assert report["video"]["GPUs"] == 2 and report["video"]["frames"] == 41
    assert min(report["FPS"].values()) > 0
