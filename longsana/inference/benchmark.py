"""A benchmark, part by part: one prompt to one mp4 in this process, first cold and then warm."""

from __future__ import annotations

import math
import platform
import resource
import statistics
import subprocess
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch
from torch import Tensor

from longsana.config import InferenceConfig
from longsana.data.prompts import Prompt
from longsana.encoders.tiny_layouts import FULL, source_of
from longsana.flow.schedule import FlowSchedule
from longsana.inference.first_picture import Watcher
from longsana.inference.microbenchmark import (
    Loaded,
    compile_blocks,
    measure_float8,
    measure_operations,
    measure_passes,
    measure_peers,
    measure_profile,
)
from longsana.inference.sidecar import commit, versions
from longsana.ops import backend
from longsana.runtime.clock import Clock
from longsana.runtime.files import partial_name
from longsana.runtime.teams import Team
from longsana.runtime.video import VideoWriter
from longsana.sampling.captions import Caption, caption_encoder
from longsana.sampling.checks import check_weights
from longsana.sampling.engine import Engine
from longsana.sampling.graphs import PLAIN_PASSES
from longsana.sampling.memory import fit_memory, work_of

EXTRAS: dict[str, Callable[[Loaded, tuple[int, int]], dict[str, Any]]] = {
    "operations": measure_operations,
    "profile": measure_profile,
    "peers": measure_peers,
    "float8": measure_float8,  # the last one: it changes the network
}
"""What a report may also have, measured at a height and width."""
PARTS = ("text", "denoise", "absorb", "decode", "write", "other")
"""What the wall time of a video is made of. other: all that no clock was running for."""


ENCODED = 400
"""Frames that are enough to know an encoder's speed, of which the first few are coded twice."""


class Film(NamedTuple):
    """One video. Seconds, from its start.

    parts: seconds of each of PARTS but the text. first_picture: when a second process had decoded the pictures of the
    first two latents, or the only one, from the file that was being written.
    chunks: seconds of each chunk, with all that happens between it and the next. machine: see there, at the last chunk.
    last: (F, H, W, 3), the last frames.
    """

    frames: int
    wall: float
    parts: dict[str, float]
    first_picture: float
    chunks: list[float]
    machine: dict[str, Any]
    last: Tensor


def benchmark(
    config: InferenceConfig,
    prompt: Prompt,
    device: torch.device,
    folder: Path,
    *,
    compiled: bool = False,
    extras: Collection[str] = (),
    team: Team | None = None,
) -> dict[str, Any]:
    """The report on one video in `folder`, made after its first chunks have warmed everything up: one has no past.

    compiled: each block under torch.compile. extras: those of EXTRAS that are wanted. team: processes that make the
    video together, of which this is the leader; see `accompany`.
    """
    team = team or Team()
    started = {"process": time.time() - psutil.Process().create_time()}
    check_weights(config, fetch=True, encodes=bool(prompt.pictures))
    config = fit_memory(config, device, work_of(config, [prompt], encodes=bool(prompt.pictures)))
    engine = Engine(config, device, team.peers)
    (first_text, text), caption = _encode(engine, prompt, started)
    with _timed(started, "networks"):
        loaded = Loaded(engine, *engine.load())
        if compiled:
            compile_blocks(loaded.model.blocks)
    with Watcher() as watcher:
        cold, *_ = [
            make_film(loaded, prompt, caption, folder / f"cold_{number}.mp4", watcher, chunks=chunks)
            for number, chunks in enumerate(_warming(loaded))
        ]
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        warm = make_film(loaded, prompt, caption, folder / "warm.mp4", watcher)
    unwritten = show_nobody(loaded, prompt, caption)
    report = {
        "video": {
            "frames": warm.frames,
            "height": prompt.height,
            "width": prompt.width,
            "sampler": config.scheduler.sampling_algo,
            "chunks": list(engine.plan_of(prompt).lengths),
            "network": config.model.model,
            "backend": "compile" if compiled else backend(),
            "dtype": {"network": str(loaded.model.dtype), "vae": str(loaded.vae.dtype)},
            "decoder": config.vae.decoder,
            "decoder's file": None if config.vae.decoder == FULL else source_of(config.vae),
            "replayed": config.sampling.cuda_graphs,
            "GPUs": team.size,
            "float8": config.model.float8,
            "seed": config.sampling.seed if prompt.seed is None else prompt.seed,
        },
        **_speeds(warm, unwritten, text),
        "first picture": {"cold": first_text + cold.first_picture, "warm": text + warm.first_picture},
        "start-up": started,
        "encoder alone, FPS": {
            "these frames": encoder_speed(config, warm.last, folder),
            "noise": encoder_speed(
                config, torch.randint(256, warm.last.shape, dtype=torch.uint8, device="cpu"), folder
            ),
        },
        "memory": memory(device),
        "machine": warm.machine,
        "versions": versions(),
        "commit": commit(),
    }
    assert EXTRAS.keys() >= set(extras), extras
    size = prompt.height, prompt.width
    report["passes"] = measure_passes(loaded, size)
    return report | {name: measure(loaded, size) for name, measure in EXTRAS.items() if name in extras}


def accompany(config: InferenceConfig, prompt: Prompt, device: torch.device, team: Team) -> None:
    """Make the passes of `benchmark` along with the leader of a team, who alone writes and measures films."""
    config = fit_memory(config, device, work_of(config, [prompt], encodes=bool(prompt.pictures)))
    engine = Engine(config, device, team.peers)
    _, caption = _encode(engine, prompt, {})
    loaded = Loaded(engine, *engine.load())
    for chunks in (*_warming(loaded), None, None):
        show_nobody(loaded, prompt, caption, chunks=chunks)
    measure_passes(loaded, (prompt.height, prompt.width))


def _warming(loaded: Loaded) -> list[int]:
    """Count the chunks of the films that warm everything up.

    Where passes are replayed, as many films as record those of a first chunk, which are of a kind of their own.
    """
    config = loaded.engine.config
    chunks = 2 + math.ceil(loaded.vae.ahead / config.sampling.chunk_frames)
    passes = len(FlowSchedule.from_config(config.scheduler).steps)
    return [chunks] * (math.ceil((PLAIN_PASSES + 1) / passes) if loaded.engine.recorded else 1)


def _speeds(film: Film, unwritten: float, text: float) -> dict[str, Any]:
    """Seconds of the parts, frames a second, and seconds of a chunk.

    unwritten: seconds of `show_nobody`. text: those of the caption.
    """
    parts, wall = {"text": text, **film.parts}, text + film.wall
    latents = parts["denoise"] + parts["absorb"]
    later = film.chunks[1:] or film.chunks
    return {
        "seconds": {**parts, "wall": wall},
        "FPS": {
            "end to end": film.frames / wall,
            "before the mp4's encoder": film.frames / unwritten,
            "without decoder": film.frames / latents,
        },
        "chunk": {
            "p50": statistics.median(later),
            "p95": sorted(later)[math.ceil(0.95 * len(later)) - 1],
            "seconds": film.chunks,
        },
    }


def make_film(
    loaded: Loaded, prompt: Prompt, caption: Caption, path: Path, watcher: Watcher, *, chunks: int | None = None
) -> Film:
    """chunks: end after so many."""
    engine, network, decoder = loaded
    config, device_clock, host_clock = engine.config, Clock(engine.device), Clock()
    pictures = decoder.geometry.pixel_frames(min(2, engine.plan_of(prompt).frames), first=True)
    started = time.monotonic()
    ends: list[float] = []
    with VideoWriter(
        path,
        fps=config.sampling.fps,
        height=prompt.height,
        width=prompt.width,
        **asdict(config.video),
    ) as writer:
        watcher.watch(partial_name(path), pictures)
        for frames in engine.sample(network, decoder, [prompt], [caption], device_clock):
            with host_clock.part("write"):
                writer.append(frames.pixels[0])
            ends[frames.chunk :] = [time.monotonic() - started]
            if chunks is not None and len(ends) == chunks:
                break
        closing = time.monotonic()
        used = machine(engine.device)
        looked = time.monotonic()
    ended = time.monotonic()
    wall = ended - started - (looked - closing)
    parts = {"absorb": 0.0, **device_clock.seconds(), **host_clock.seconds()}
    parts["write"] += ended - looked
    parts["other"] = wall - sum(parts.values())
    return Film(
        frames=writer.frames,
        wall=wall,
        parts={name: parts[name] for name in PARTS if name in parts},
        first_picture=watcher.moment() - started,
        chunks=[end - begin for begin, end in zip([0.0, *ends], ends, strict=False)],
        machine=used,
        last=frames.pixels[0],
    )


def show_nobody(loaded: Loaded, prompt: Prompt, caption: Caption, *, chunks: int | None = None) -> float:
    """Seconds that a video's frames take until all have been on the host, where nobody codes them.

    The mp4's encoder takes CPUs from who launches kernels, and memory that a GPU can fill. chunks: end after so many.
    """
    started = time.perf_counter()
    for frames in loaded.engine.sample(loaded.model, loaded.vae, [prompt], [caption]):
        if frames.chunk + 1 == chunks:
            break
    return time.perf_counter() - started


def encoder_speed(config: InferenceConfig, frames: Tensor, folder: Path) -> float:
    """Frames a second that the mp4's encoder takes when nothing else runs, of frames (F, H, W, 3) over and over."""
    _, height, width, _ = frames.shape
    path = folder / "encoder.mp4"
    started = time.perf_counter()
    with VideoWriter(path, config.sampling.fps, height, width, **asdict(config.video)) as writer:
        while writer.frames < ENCODED:
            writer.append(frames)
    return writer.frames / (time.perf_counter() - started)


@contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    started = time.perf_counter()
    yield
    seconds[name] = time.perf_counter() - started


def _encode(engine: Engine, prompt: Prompt, started: dict[str, float]) -> tuple[list[float], Caption]:
    """Seconds of the first time and of the second. A function of its own: the encoder is gone when it returns."""
    taken = []
    with ExitStack() as loaded:
        with _timed(started, "text encoder"):
            encode = loaded.enter_context(caption_encoder(engine.config, engine.device))
        for _ in range(2):
            clock = Clock(engine.device)
            with clock.part("text"):
                caption = encode(prompt)
            taken.append(clock.seconds()["text"])
    return taken, caption


def memory(device: torch.device) -> dict[str, int]:
    """Bytes: this process's memory now and at its fullest; of a GPU the most that tensors and their allocator took."""
    resident = psutil.Process().memory_info().rss
    # Linux keeps the peak up to date only now and then.
    peak = max(resident, 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    kept = {"host RSS": resident, "host RSS peak": peak}
    if device.type == "cuda":
        kept["GPU peak"] = torch.cuda.max_memory_allocated(device)
        kept["GPU peak reserved"] = torch.cuda.max_memory_reserved(device)  # a CUDA graph's memory is only here
    return kept


def machine(device: torch.device) -> dict[str, Any]:
    """Describe the machine; a GPU also by its clocks (MHz), watts and driver, as they are at this moment."""
    found: dict[str, Any] = {"device": _processor(), "threads": torch.get_num_threads(), "cores": psutil.cpu_count()}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found["device"] = properties.name
        asked = "driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.draw"
        try:
            answer = subprocess.run(
                ["nvidia-smi", f"--query-gpu={asked}", "--format=csv,noheader,nounits", f"--id=GPU-{properties.uuid}"],
                capture_output=True,
                text=True,
                check=True,
            ).stdout
            found |= dict(zip(asked.split(","), (value.strip() for value in answer.split(",")), strict=True))
        except (OSError, subprocess.CalledProcessError) as error:
            found["clocks"] = f"unknown ({error})"
    return found


def _processor() -> str:
    """The name of the CPU, where Linux tells it."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()
