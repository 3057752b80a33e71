"""A file of prompts to a folder of videos, on any number of processes, however often it is stopped."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections import deque
from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias, cast

import numpy as np
import psutil
import torch
from tqdm import tqdm

from longsana.chunks import ChunkPlan
from longsana.config import InferenceConfig
from longsana.data.films import fitted, read_film
from longsana.data.prompts import Prompt
from longsana.encoders.vae import VideoVAE
from longsana.inference.beginnings import NONE, Beginning, state_path, states_of
from longsana.inference.sidecar import (
    fingerprint,
    finished_videos,
    is_finished,
    resolved_settings,
    source_digests,
    told_parts,
    versions,
    video_name,
)
from longsana.models.dit import LongSanaDiT
from longsana.runtime import stop
from longsana.runtime.clock import Clock
from longsana.runtime.distributed import PeerLost, World, losing_peers
from longsana.runtime.errors import InputError
from longsana.runtime.files import atomic_write_text, disk_failure, partial_name
from longsana.runtime.hub import file_sha256
from longsana.runtime.teams import Team
from longsana.runtime.video import VideoWriter
from longsana.sampling.captions import Caption, CaptionEncoder, caption_encoder
from longsana.sampling.checks import check_weights, meaningless
from longsana.sampling.continuation import Memory, Moment, mark_of, restored, vae_mark_of
from longsana.sampling.engine import Engine, Frames
from longsana.sampling.films import absorb_film, film_latents
from longsana.sampling.following import follow, led
from longsana.sampling.memory import fit_memory, work_of

log = logging.getLogger(__name__)

WAITING = "waiting"
"""The word of a leader that waits for videos of other commands."""
PAUSE = 1.0
"""Seconds between two looks at videos that other commands are making."""


@dataclass(frozen=True)
class Job:
    """One video to make, at `path`, with what its sidecar says of it.

    pictured: the chunks that a picture begins, also after its last one, for whoever goes on.
    """

    prompt: Prompt
    path: Path
    record: dict[str, Any]
    pictured: tuple[int, ...] = ()


class Failure(NamedTuple):
    line: int
    text: str
    reason: str


class Outcome(NamedTuple):
    """The outcome of all videos. skipped: those that were there. disk: what a disk failed at, after which no more were
    made, or None."""

    written: int
    skipped: int
    failures: list[Failure]
    disk: str | None


def run_batch(
    config: InferenceConfig,
    prompts: Sequence[Prompt],
    folder: Path,
    *,
    world: World,
    device: torch.device,
    beginning: Beginning | None = None,
    gpus_per_video: int = 1,
) -> Outcome:
    """Make every video that is not there yet. What fails is listed and does not stop the rest; a full disk does.

    Other commands may write to the folder at the same time: each video is made by the first that comes to it.
    Every process returns the outcome of all of them. folder: is there, and can be written to. gpus_per_video: processes
    that make each video together; they divide the number of all.

    Raises:
        InputError: weights are missing or do not fit.
    """
    team, beginning = Team.of(world, gpus_per_video, device), beginning or Beginning()
    asked, config = config, _held(config, prompts, world, device, beginning)
    engine = Engine(config, device, team.peers)

    def plan() -> list[Job]:
        encodes = beginning.encodes(prompts)
        check_weights(config, fetch=True, encodes=encodes)
        digests = source_digests(config, encodes=encodes)
        return _plan_jobs(config, asked, prompts, folder, digests, device, beginning)

    # Decided once: a peer may finish a video before this process looks.
    jobs = world.broadcast(world.on_main(plan) or [])
    skipped = len(prompts) - len(jobs)
    if world.is_main and skipped:
        log.info("%d of %d videos are in %s already", skipped, len(prompts), folder)

    share = _Share(engine, jobs, world, team, beginning)
    with team.watched():
        share.run()
    results = world.gather((share.written, share.skipped, share.failures, share.disk))
    return Outcome(
        written=sum(result[0] for result in results),
        skipped=skipped + sum(result[1] for result in results),
        failures=sorted(failure for result in results for failure in result[2]),
        disk=next((result[3] for result in results if result[3] is not None), None),
    )


def _held(
    config: InferenceConfig, prompts: Sequence[Prompt], world: World, device: torch.device, beginning: Beginning
) -> InferenceConfig:
    """Hold this process to `sampling.memory`, if that is set; see `fit_memory`."""
    if config.sampling.memory is None:
        return config
    encodes, film = beginning.encodes(prompts), beginning.path is not None and beginning.state is None
    world.on_main(lambda: check_weights(config, fetch=True, encodes=encodes))
    known = {"encodes": encodes, "films": film, "saves": beginning.saves != NONE}
    return fit_memory(config, device, work_of(config, prompts, goes_on=beginning.goes_on, **known))


def _plan_jobs(
    config: InferenceConfig,
    asked: InferenceConfig,
    prompts: Sequence[Prompt],
    folder: Path,
    digests: dict[str, str],
    device: torch.device,
    beginning: Beginning,
) -> list[Job]:
    """The videos that are not in the folder yet, whatever their name there.

    asked: the config without what `sampling.memory` chose, which makes no other video of it.
    """
    jobs = []
    for prompt in prompts:
        settings, parts = resolved_settings(config, prompt, device), told_parts(config, prompt, beginning)
        picture = None if prompt.image is None else file_sha256(prompt.image)
        record = {
            "prompt": prompt.text,
            "parts": parts,
            "line": prompt.line,
            "repetition": prompt.repetition,
            "seed": settings["sampling"]["seed"],
            # A video that goes on has no opening picture of its own.
            "frames": beginning.given_frames + settings["sampling"]["num_frames"] - beginning.goes_on,
            "height": prompt.height,
            "width": prompt.width,
            "fps": config.sampling.fps,
            "fingerprint": fingerprint(
                resolved_settings(asked, prompt, device),
                prompt,
                digests,
                meaningless(config),
                parts,
                beginning.record,
                picture,
                encodes=beginning.encodes([prompt]),
            ),
            "sha256": digests,
            "config": settings,
        }
        if picture is not None:
            record |= {"image": str(prompt.image), "image_sha256": picture}
        if beginning.goes_on:
            record["began"] = {"from": str(beginning.path), "given_frames": beginning.given_frames, **beginning.record}
        if beginning.saves != NONE:
            record["saved"] = beginning.saved
        places, pictures = beginning.outline(prompt, config).parts, beginning.pictures_of(prompt)
        pictured = tuple(part.chunk for number, part in enumerate(places) if number in pictures and part.chunk >= 0)
        jobs.append(Job(prompt, folder / video_name(prompt), record, pictured))
    wanted = {job.path.name: job.record["fingerprint"] for job in jobs}
    finished = finished_videos(folder, beginning.saved)
    # A finished video whose name another one is about to take will not be there in the end.
    kept = {mark: name for name, mark in finished.items() if wanted.get(name, mark) == mark}
    for job in jobs:
        name = job.path.name
        if job.record["fingerprint"] not in kept and name in finished:
            log.warning("%s: made with another prompt, seed, config or checkpoint; it will be replaced", job.path)
        elif kept.get(job.record["fingerprint"], name) != name:
            log.info("line %d is there as %s", job.prompt.line, kept[job.record["fingerprint"]])
    return [job for job in jobs if job.record["fingerprint"] not in kept]


Captions: TypeAlias = dict[Path, tuple[Caption, float]]
"""Captions of videos by their paths, and the seconds that each took."""


class _Elsewhere(Exception):
    """Another command is making the video of `job`, or has just made it."""

    def __init__(self, job: Job) -> None:
        super().__init__(str(job.path))
        self.job = job


def batches_of(jobs: Sequence[Job], size: int) -> list[list[Job]]:
    """Jobs of one video size, length, history of changes and places of pictures, at most `size` at a time."""

    def extent(job: Job) -> tuple[Any, ...]:
        changes = [(part["chunk"], part["change"]) for part in job.record["parts"] if part["change"] != "keep"]
        return job.prompt.height, job.prompt.width, job.record["frames"], job.pictured, changes

    batches = []
    for _, group in groupby(sorted(jobs, key=extent), key=extent):
        same = list(group)
        batches += [same[i : i + size] for i in range(0, len(same), size)]
    return batches


class _Share:
    """Makes this process's share of `jobs`, the videos of all processes.

    After `run`, `written` and `skipped` count the videos that it made and that another command made meanwhile,
    `failures` lists those that failed, and `disk` says what a disk failed at, if that ended the work.
    """

    def __init__(self, engine: Engine, jobs: Sequence[Job], world: World, team: Team, beginning: Beginning) -> None:
        self.engine = engine
        self.team = team
        self.beginning = beginning
        self.jobs = jobs
        self.world = world
        self.failures: list[Failure] = []
        self.written = self.skipped = 0
        self.disk: str | None = None
        self._waited = False
        self._busy: set[Path] = set()  # seen in another command's hands
        # tqdm's None: no bar where there is no terminal.
        self.no_bar = None if world.is_main else True

    def run(self) -> None:
        """Make them, `sampling.bs` of one size at a time.

        Those that another command is making come last: most are there by then, and the rest is waited for.
        """
        batches = batches_of(self.jobs, self.engine.config.sampling.bs)[self.team.index :: self.team.count]
        if not batches:
            return
        captions = self._encode([job for batch in batches for job in batch])
        if not self.team.leads:
            self.failures.clear()  # which the leader tells
            self._follow({str(job.path): job for batch in batches for job in batch}, captions)
            return
        if captions:
            models = self.engine.load()
            self._marks = self._checked_marks(*models)
            self._lead(batches, captions, *models)
        self.team.tell(None)

    def _follow(self, jobs: Mapping[str, Job], captions: Captions) -> None:
        """Make passes along with the leader of the team, who says of which videos, and keeps what comes of them."""
        models = self.engine.load() if captions else None
        if models is not None:
            self._marks = self._checked_marks(*models)
        while (paths := self.team.told()) is not None:
            stop.check()
            if paths == WAITING:
                continue
            if models is None or not all(jobs[path].path in captions for path in paths):
                raise InputError("a caption failed on one process of a video alone; start the same command again")
            samples = self._samples([jobs[path] for path in paths], captions, *models, Clock())
            try:
                with losing_peers():
                    follow(samples, self.team)
            except PeerLost:
                raise
            except Exception as error:  # as on the leader, who tells
                log.debug("%s: %s", ", ".join(paths), error)

    def _lead(
        self, batches: Sequence[Sequence[Job]], captions: Captions, network: LongSanaDiT, decoder: VideoVAE
    ) -> None:
        models = network, decoder
        encoded = ([job for job in batch if job.path in captions] for batch in batches)
        left = deque(batch for batch in encoded if batch)
        elsewhere: list[Job] = []
        with tqdm(total=len(captions), desc="prompts", unit="video", disable=self.no_bar) as bar:
            while self.disk is None and (left or elsewhere):
                stop.check()
                if not left:
                    self._wait(elsewhere)
                    left.extend([job] for job in elsewhere)
                    elsewhere.clear()
                batch = [job for job in left.popleft() if not self._is_there(job, bar)]
                if not batch:
                    continue
                try:
                    with losing_peers():
                        self._make(batch, captions, *models)
                except PeerLost:
                    raise
                except _Elsewhere as found:
                    elsewhere.append(found.job)
                    left.appendleft([job for job in batch if job is not found.job])
                    continue
                except Exception as error:
                    _stop_if_out_of_memory(error, batch)
                    if isinstance(error, OSError) and (disk := disk_failure(error)):
                        self.disk = disk  # the next video would fail as this one did, when all of it has been made
                        continue
                    if len(batch) > 1:  # the fault of one is not the others': each on its own, with the same noise
                        left.extendleft([job] for job in reversed(batch))
                        continue
                    self._fail(batch[0], error)
                bar.update(len(batch))

    def _checked_marks(self, network: LongSanaDiT, decoder: VideoVAE) -> tuple[str, str]:
        """Fingerprints of the models, where states need them; the state that is begun from becomes theirs.

        Raises:
            InputError: it is of others.
        """
        beginning = self.beginning
        if beginning.state is None and beginning.saves == NONE:
            return "", ""
        marks = mark_of(network), vae_mark_of(decoder)
        if beginning.state is not None:
            fitted = beginning.state.fitted(*marks, str(beginning.path))
            self.beginning = beginning = replace(beginning, state=fitted)
            assert beginning.state is not None
            if beginning.state.network.tail.dtype != network.dtype:
                raise InputError(
                    f"{beginning.path}: of a network in {beginning.state.network.tail.dtype}, this one is in "
                    f"{network.dtype}; set model.dtype"
                )
        return marks

    def _wait(self, jobs: Sequence[Job]) -> None:
        if not self._waited:
            first = jobs[0].path
            # Not info, which other processes than the main one keep to themselves.
            log.error(
                "waiting for %d videos that other commands are making, %s first; if there is no such command (a lock "
                "may outlive its host), delete %s",
                *(len(jobs), first, partial_name(first)),
            )
        self._waited = True
        self.team.tell(WAITING)  # so that they hear signals meanwhile
        time.sleep(PAUSE)

    def _is_finished(self, job: Job) -> bool:
        return is_finished(job.path, job.record["fingerprint"], self.beginning.saved)

    def _is_there(self, job: Job, bar: Any) -> bool:
        """Tell whether another command has made the video since the jobs were planned."""
        if not self._is_finished(job):
            return False
        self.skipped += 1
        bar.update()
        return True

    def _encode(self, jobs: Sequence[Job]) -> Captions:
        captions = {}
        with caption_encoder(self.engine.config, self.engine.device) as encode:
            if self.world.is_main:
                self._warn_of_long_prompts(encode)
            for job in tqdm(jobs, desc="captions", unit="prompt", disable=self.no_bar, leave=False):
                stop.check()
                clock = Clock()
                try:
                    with clock.part("text"):
                        caption = encode(job.prompt)
                    captions[job.path] = (caption, clock.seconds()["text"])
                except Exception as error:
                    _stop_if_out_of_memory(error, [job])
                    self._fail(job, error)
        return captions

    def _warn_of_long_prompts(self, encode: CaptionEncoder) -> None:
        for job in self.jobs:
            for surplus in encode.overflow(job.prompt):
                if surplus:
                    log.warning("line %d: too long by %d tokens; its end is cut off", job.prompt.line, surplus)

    def _writer(self, job: Job) -> VideoWriter:
        """
        Raises:
            _Elsewhere: another command is making this video.
        """
        config, prompt = self.engine.config, job.prompt
        try:
            return VideoWriter(
                job.path, fps=config.sampling.fps, height=prompt.height, width=prompt.width, **asdict(config.video)
            )
        except BlockingIOError as error:
            self._busy.add(job.path)
            raise _Elsewhere(job) from error

    def _make(
        self,
        batch: Sequence[Job],
        captions: Captions,
        network: LongSanaDiT,
        decoder: VideoVAE,
    ) -> None:
        engine = self.engine
        device_clock, host_clock = Clock(engine.device), Clock()
        digests = [hashlib.sha256() for _ in batch]
        _reset_peak_memory(engine.device)
        started = time.perf_counter()
        with ExitStack() as stack:
            writers = [stack.enter_context(self._writer(job)) for job in batch]
            for job in batch:
                _await_sidecar(job.path)
                if self._is_finished(job) or job.path in self._busy:
                    self._busy.discard(job.path)
                    raise _Elsewhere(job)
            plan = engine.plan_of(batch[0].prompt, goes_on=self.beginning.goes_on)
            samples = self._samples(batch, captions, network, decoder, device_clock)
            if self.team.size > 1:
                paths = [str(job.path) for job in batch]
                samples = stack.enter_context(closing(led(samples, self.team, paths)))
            thread = stack.enter_context(ThreadPoolExecutor(1, thread_name_prefix="digests"))
            states: set[Path] = set()
            for frames in self._progress(samples, len(plan), digests, thread):
                with host_clock.part("write"):
                    for writer, video in zip(writers, frames.pixels, strict=True):
                        if len(video):  # a decoder that looks ahead may have none yet
                            writer.append(video)
                after = frames.after  # by an absorbing pass, which the frames do not wait for
                if after is not None:
                    with host_clock.part("write"):
                        states |= self._save(batch, frames.chunk, after, plan)
                del after
            for job in batch:
                # An older video's: beside the new one it would lie, were this process killed in between.
                job.path.with_suffix(".json").unlink(missing_ok=True)
                for older in set(states_of(job.path)) - states:
                    older.unlink()
            # All that takes time, before: who finds a video without its sidecar makes it again.
            told: dict[str, Any] = {
                "batch": len(batch),
                "memory": _memory(engine.device),
                "machine": _machine(engine.device, self.world) | {"gpus_per_video": self.team.size},
                "versions": versions(),
            }
            spent = device_clock.seconds()
            with host_clock.part("write"):
                stack.close()  # finishes the files
        wall = time.perf_counter() - started
        timings = {
            "text": sum(captions[job.path][1] for job in batch),
            **spent,
            **host_clock.seconds(),
            "wall": wall,
            "fps": sum(writer.frames for writer in writers) / wall,
        }
        told["timings"] = {name: round(seconds, 4) for name, seconds in timings.items()}
        for job, writer, digest in zip(batch, writers, digests, strict=True):
            self._tell(job, told | {"bytes": writer.size, "latents_sha256": digest.hexdigest()})
            log.info("%s: %d frames in %.1f s, %.1f FPS", job.path, writer.frames, wall, timings["fps"])

    def _samples(
        self, batch: Sequence[Job], captions: Captions, network: LongSanaDiT, decoder: VideoVAE, clock: Clock
    ) -> Generator[Frames]:
        prompts, own = [job.prompt for job in batch], [captions[job.path][0] for job in batch]
        plan = self.engine.plan_of(batch[0].prompt, goes_on=self.beginning.goes_on)
        return sample_from(self.beginning, self.engine, network, decoder, prompts, own, plan, clock)

    def _tell(self, job: Job, told: dict[str, Any]) -> None:
        """Write the sidecar of a finished video."""
        if self.beginning.saves != NONE:
            told["states"] = [path.name for path in states_of(job.path)]
        text = json.dumps(job.record | told, indent=2, ensure_ascii=False)
        atomic_write_text(job.path.with_suffix(".json"), text + "\n")
        self.written += 1

    def _save(self, batch: Sequence[Job], chunk: int, after: Moment, plan: ChunkPlan) -> set[Path]:
        """Write the states after a chunk, from 0, of the plan; returns their files."""
        files, last = set(), chunk + 1 == len(plan)
        for index, job in enumerate(batch):
            state = self.beginning.continuation(
                after.of(index),
                job.prompt,
                job.record["seed"],
                chunk,
                plan.lengths,
                self._marks,
                self.engine.config,
            )
            file = state_path(job.path, None if last else state.chunk)
            state.save(file, cast(Memory, self.beginning.saves))
            files.add(file)
        return files

    def _progress(
        self, samples: Iterator[Frames], chunks: int, digests: Sequence[Any], thread: Executor
    ) -> Iterator[Frames]:
        """Frames, with a bar over the chunks and a digest of the latents kept on the way, in another thread."""
        digested = None
        with tqdm(total=chunks, desc="chunks", unit="chunk", disable=self.no_bar, leave=False) as bar:
            started, count = time.perf_counter(), 0
            for frames in samples:
                stop.check()
                host = frames.latents.cpu()
                if digested is not None:
                    digested.result()
                digested = thread.submit(_digest, host.numpy(), digests)
                yield frames
                count += frames.pixels.shape[0] * frames.pixels.shape[1]
                bar.update(frames.chunk + 1 - bar.n)
                bar.set_postfix_str(f"{count / (time.perf_counter() - started):.1f} FPS")
                del frames  # with a state it may be large
            if digested is not None:
                digested.result()

    def _fail(self, job: Job, error: Exception) -> None:
        told = isinstance(error, FloatingPointError | InputError | OSError)
        log.error("line %d failed: %s", job.prompt.line, error, exc_info=None if told else error)
        self.failures.append(Failure(job.prompt.line, job.prompt.text, f"{type(error).__name__}: {error}"))


def sample_from(
    beginning: Beginning,
    engine: Engine,
    network: LongSanaDiT,
    decoder: VideoVAE,
    prompts: Sequence[Prompt],
    captions: Sequence[Caption],
    plan: ChunkPlan,
    clock: Clock,
) -> Generator[Frames]:
    """Frames of a batch of videos of this plan that begin from nothing, a film or a state; see `Engine.sample`."""
    outlines = [beginning.outline(prompt, engine.config) for prompt in prompts]
    begun: Moment | None = None
    if beginning.state is not None:
        moment = beginning.state.moment._replace(pictures=beginning.pictures_held(prompts, outlines)).to(engine.device)
        begun = restored(moment, decoder).copies(len(prompts))
    elif beginning.path is not None:
        height, width = prompts[0].height, prompts[0].width
        sampling = engine.config.sampling
        pictures = (fitted(picture, height, width) for picture in read_film(beginning.path, sampling.fps))
        latents = film_latents(decoder, pictures, chunk_frames=sampling.chunk_frames, clock=clock)
        recent = engine.videos(prompts, outlines=outlines).recent(sampling.chunk_frames + 1)
        begun = yield from absorb_film(network, decoder, captions, latents, recent, shown=beginning.shown, clock=clock)
    wanted = partial(beginning.wants, count=len(plan))
    yield from engine.sample(network, decoder, prompts, captions, clock, begun=begun, outlines=outlines, wanted=wanted)


def _await_sidecar(video: Path) -> None:
    """Wait a moment for the sidecar of a video that is there without it: who has just made it writes that last."""
    until = time.monotonic() + PAUSE
    while video.exists() and not video.with_suffix(".json").exists() and time.monotonic() < until:
        time.sleep(PAUSE / 50)


def _digest(batch: np.ndarray, digests: Sequence[Any]) -> None:
    """Add latents (B, ...) to the digests of their videos.

    Not by PyTorch, whose operations in another thread start as many threads again: a third more time on two cores.
    """
    for digest, latents in zip(digests, batch, strict=True):
        digest.update(np.ascontiguousarray(latents))


def _stop_if_out_of_memory(error: Exception, batch: Sequence[Job]) -> None:
    # The CPU's allocator raises a plain RuntimeError.
    if not isinstance(error, torch.OutOfMemoryError | MemoryError) and "can't allocate memory" not in str(error):
        return
    prompt, held = batch[0].prompt, batch[0].record["config"]["sampling"]["memory"]
    raise InputError(
        f"line {prompt.line}: {len(batch)} video{'s' if len(batch) > 1 else ''} of {prompt.height}x{prompt.width} "
        "at a time do not fit in memory; lower --bs, --height and --width, or vae.latents_per_call"
        + ("" if held is None else f", or raise sampling.memory={held:g}")
    ) from error


def _reset_peak_memory(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def _memory(device: torch.device) -> dict[str, int]:
    """Bytes: this process's memory now, and the most that tensors took on the GPU during this video."""
    memory = {"host_rss": psutil.Process().memory_info().rss}
    if device.type == "cuda":
        memory["gpu_peak_allocated"] = torch.cuda.max_memory_allocated(device)
        memory["gpu_peak_reserved"] = torch.cuda.max_memory_reserved(device)
    return memory


def _machine(device: torch.device, world: World) -> dict[str, Any]:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return {"device": name, "threads": torch.get_num_threads(), "processes": world.size}
