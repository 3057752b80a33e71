"""A training run: its folder, its stage, and the loop."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from longsana.config import render_config, save_config
from longsana.runtime.distributed import World
from longsana.runtime.errors import InputError
from longsana.runtime.files import check_writable
from longsana.runtime.logging import RunLog, WandbRun
from longsana.training.build import CAPTIONS, StageBuilder
from longsana.training.checkpoint import Checkpointer, read_progress
from longsana.training.checks import check_device, check_same_run, flat, slots_of
from longsana.training.config import TrainingConfig
from longsana.training.loop import Loop, Validate, weights_for_sampling
from longsana.training.parallel import connect
from longsana.training.player import Player
from longsana.training.validation import Validation

log = logging.getLogger(__name__)

CONFIG = "config.yaml"


@dataclass(frozen=True)
class RunOptions:
    """What a launch decides and a config does not.

    name: of the run in wandb. auto_resume: go on from the newest checkpoint in logdir. allow_config_change: also with
    settings other than those it was made with.
    """

    logdir: Path
    name: str
    save: bool = True
    visualize: bool = True
    wandb: bool = True
    wandb_dir: Path = Path("wandb")
    auto_resume: bool = True
    allow_config_change: bool = False


def train(config: TrainingConfig, options: RunOptions, world: World) -> int:
    """Train as a checked config says; returns the exit status.

    Raises:
        InputError: the folder, a checkpoint or the data do not fit.
        TrainingFailed: the numbers do not.
    """
    device = world.device()
    connect(world, device)
    world.on_main(lambda: check_device(config, world, device))
    torch.manual_seed(config.train.seed + world.rank)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    slots = slots_of(config, world)
    world.on_main(lambda: _prepare_folder(config, options))
    checkpointer = Checkpointer(
        options.logdir, world, keep=config.train.max_checkpoints, asynchronous=config.train.async_checkpoint
    )
    found = checkpointer.latest()
    log.info(
        "%s to %s on %s: %d slots of %d samples, %s",
        config.trainer,
        options.logdir,
        device,
        slots.count,
        config.train.batch_size,
        "from the start" if found is None else f"going on from {found.name}",
    )
    with _open_log(config, options, world, 0 if found is None else read_progress(found)["step"]) as run_log:
        validation = None  # first, so that its text encoder is gone before anything large comes
        if options.visualize and config.validation.vis_interval > 0:
            validation = Validation(config, options.logdir, device, world)
        builder = StageBuilder(config, slots=slots, world=world, device=device, folder=options.logdir)
        stage = builder.stage()
        loop = Loop(
            stage,
            config.train,
            slots=slots,
            world=world,
            device=device,
            run_log=run_log,
            checkpointer=checkpointer,
            saves=options.save,
            validate=_validate(config, validation, builder, stage.players[0], run_log) if validation else None,
            vis_interval=config.validation.vis_interval,
            texts={CONFIG: render_config(config)},
        )
        if found is not None:
            loop.resume(found)
        if world.is_main:
            # Not before: a start that fails must not claim the folder for its config.
            save_config(config, options.logdir / CONFIG)
        try:
            return loop.run()
        finally:
            checkpointer.wait()  # what is being written is finished, whatever ended the run


def _open_log(config: TrainingConfig, options: RunOptions, world: World, step: int) -> RunLog:
    """Early: wandb that is wanted and not there is found before anything is loaded."""

    def of_main() -> RunLog:
        wandb = _wandb(config, options) if options.wandb else None
        return RunLog(options.logdir, step=step, total=config.train.max_iters, main=True, wandb=wandb)

    opened = world.on_main(of_main)
    return opened or RunLog(options.logdir, step=step, total=config.train.max_iters, main=False, wandb=None)


def _prepare_folder(config: TrainingConfig, options: RunOptions) -> None:
    """The run's folder; what another run left there is refused, or moved aside if asked."""
    logdir = options.logdir
    check_writable(logdir, "--logdir")
    if not options.auto_resume:
        _move_aside(logdir)
    saved = logdir / CONFIG
    changed = check_same_run(config, saved) if saved.exists() and not options.allow_config_change else []
    if changed:
        raise InputError(
            f"{logdir}: belongs to a run with another config ({'; '.join(changed)}); choose another --logdir, or go on "
            "with the new settings: --allow-config-change"
        )


def _move_aside(logdir: Path) -> None:
    """What lies in the folder goes to superseded_N inside it, but for encoded captions, which any run can use."""
    found = [path for path in logdir.iterdir() if not path.name.startswith(("superseded_", CAPTIONS))]
    if not found:
        return
    number = len(list(logdir.glob("superseded_*")))
    target = logdir / f"superseded_{number:03d}"
    target.mkdir()
    for path in found:
        path.rename(target / path.name)
    log.info("--no-auto-resume: what was in %s is in %s now", logdir, target)


def _wandb(config: TrainingConfig, options: RunOptions) -> WandbRun:
    return WandbRun(
        project=config.wandb.project,
        entity=config.wandb.entity,
        name=options.name,
        folder=options.wandb_dir,
        config=flat(dataclasses.asdict(config)),
    )


def _validate(
    config: TrainingConfig, validation: Validation, builder: StageBuilder, generator: Player, run_log: RunLog
) -> Validate:
    def validate(step: int) -> Mapping[str, float]:
        with weights_for_sampling(generator, config.validation.vis_ema):
            report = validation.run(step, generator.model, builder.vae)
        for video in report.videos:
            run_log.video(step - 1, video.stem.partition("_rank_")[2], video)
        return report.metrics

    return validate
