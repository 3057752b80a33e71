"""A file of prompts to a folder of videos, on any number of processes, however often it is stopped."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from longsana.config import InferenceConfig
from longsana.data.prompts import Prompt
from longsana.inference.sidecar import fingerprint, finished_videos, resolved_settings, source_digests, video_name
from longsana.inference.worker import Failure, Job, Worker
from longsana.runtime.distributed import World
from longsana.sampling.checks import check_weights, meaningless
from longsana.sampling.engine import Engine

log = logging.getLogger(__name__)


class Outcome(NamedTuple):
    """The outcome of all videos. skipped: those that were there. disk: what a disk failed at, after which no more were
    made, or None."""

    written: int
    skipped: int
    failures: list[Failure]
    disk: str | None


def run_batch(
    config: InferenceConfig, prompts: Sequence[Prompt], folder: Path, *, world: World, device: torch.device
) -> Outcome:
    """Make every video that is not there yet. What fails is listed and does not stop the rest; a full disk does.

    Other commands may write to the folder at the same time: each video is made by the first that comes to it.
    Every process returns the outcome of all of them. folder: is there, and can be written to.

    Raises:
        InputError: weights are missing or do not fit.
    """
    engine = Engine(config, device)

    def plan() -> list[Job]:
        check_weights(config, fetch=True)
        return _plan_jobs(config, prompts, folder, source_digests(config), device)

    # Decided once: a peer may finish a video before this process looks.
    jobs = world.broadcast(world.on_main(plan) or [])
    skipped = len(prompts) - len(jobs)
    if world.is_main and skipped:
        log.info("%d of %d videos are in %s already", skipped, len(prompts), folder)

    worker = Worker(engine, jobs, world)
    worker.run()
    results = world.gather((worker.written, worker.skipped, worker.failures, worker.disk))
    return Outcome(
        written=sum(result[0] for result in results),
        skipped=skipped + sum(result[1] for result in results),
        failures=sorted(failure for result in results for failure in result[2]),
        disk=next((result[3] for result in results if result[3] is not None), None),
    )


def _plan_jobs(
    config: InferenceConfig, prompts: Sequence[Prompt], folder: Path, digests: dict[str, str], device: torch.device
) -> list[Job]:
    """The videos that are not in the folder yet, whatever their name there."""
    jobs = []
    for prompt in prompts:
        settings = resolved_settings(config, prompt, device)
        record = {
            "prompt": prompt.text,
            "line": prompt.line,
            "repetition": prompt.repetition,
            "seed": settings["sampling"]["seed"],
            "frames": settings["sampling"]["num_frames"],
            "height": prompt.height,
            "width": prompt.width,
            "fps": config.sampling.fps,
            "fingerprint": fingerprint(settings, prompt, digests, meaningless(config)),
            "sha256": digests,
            "config": settings,
        }
        jobs.append(Job(prompt, folder / video_name(prompt), record))
    wanted = {job.path.name: job.record["fingerprint"] for job in jobs}
    finished = finished_videos(folder)
    # A finished video whose name another one is about to take will not be there in the end.
    kept = {mark: name for name, mark in finished.items() if wanted.get(name, mark) == mark}
    for job in jobs:
        name = job.path.name
        if job.record["fingerprint"] not in kept and name in finished:
            log.warning("%s: made with another prompt, seed, config or checkpoint; it will be replaced", job.path)
        elif kept.get(job.record["fingerprint"], name) != name:
            log.info("line %d is there as %s", job.prompt.line, kept[job.record["fingerprint"]])
    return [job for job in jobs if job.record["fingerprint"] not in kept]
