"""A training run: its folder, its stage, and the loop."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from longsana.config import render_config, save_config
from longsana.runtime.distributed import World, losing_peers
from longsana.runtime.files import atomic_write_text, disk_failure
from longsana.runtime.logging import RunLog, WandbRun
from longsana.runtime.stop import check as check_stop
from longsana.training.checkpoint import Checkpointer, SaveFailed
from longsana.training.checks import check_device, check_vae_of_clips, flat, micro_batches_of
from longsana.training.config import TrainingConfig
from longsana.training.learner import Learner
from longsana.training.loop import Loop, Progress, Stop, TrainingFailed, Validate, weights_for_sampling
from longsana.training.parallel import connect
from longsana.training.run_folder import CONFIG, RECORD, check_shared, open_folder

if TYPE_CHECKING:
    from longsana.training.build import StageBuilder
    from longsana.training.validation import Validation

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunOptions:
    """Options that a launch decides and a config does not.

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
        TrainingFailed: the numbers do not, or the disk takes no more.
        PeerLost: another process of the launch has ended.
        Stopped: the run was asked to stop before there was anything to save.
    """
    try:
        with losing_peers(), ExitStack() as stack:
            return _train(config, options, world, stack)
    except SaveFailed as error:
        if not world.is_main:  # which knows it too
            return 1
        told = disk_failure(error) or str(error)
        raise TrainingFailed(f"no checkpoint could be written: {told}; the run is as its last one has it") from error
    except OSError as error:
        if (reason := disk_failure(error)) is None:
            raise
        raise TrainingFailed(f"{reason}; the run is as its last checkpoint has it") from error


def _train(config: TrainingConfig, options: RunOptions, world: World, stack: ExitStack) -> int:
    device = world.device()
    connect(world, device)
    world.on_main(lambda: check_device(config, world, device))
    world.on_main(lambda: check_vae_of_clips(config))
    torch.manual_seed(config.train.seed + world.rank)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    micro_batches = micro_batches_of(config, world)
    folder = open_folder(
        config,
        options.logdir,
        micro_batches,
        auto_resume=options.auto_resume,
        allow_config_change=options.allow_config_change,
    )
    opened = world.broadcast(world.on_main(lambda: stack.enter_context(folder)))
    assert opened is not None
    check_shared(options.logdir, world)
    checkpointer = Checkpointer(
        options.logdir, world, keep=config.train.max_checkpoints, asynchronous=config.train.async_checkpoint
    )
    found = checkpointer.latest()
    progress = Progress() if found is None else Progress.read(found)
    if found is not None and _nothing_left(config, options, progress):
        log.info(
            "%s has nothing left to do: %s is of iteration %d, and train.max_iters is %d",
            *(options.logdir, found.name, progress.step, config.train.max_iters),
        )
        return 0
    log.info(
        "%s to %s on %s: %d micro-batches of %d samples, %s",
        config.trainer,
        options.logdir,
        device,
        micro_batches.count,
        config.train.batch_size,
        "from the start" if found is None else f"going on from {found.name}",
    )
    run_log = stack.enter_context(_open_log(config, options, world, progress.step))
    loop = _loop(config, options, world, device, checkpointer, run_log, opened.record.text())
    if found is not None:
        loop.resume(found, streams=opened.streams)
    if world.is_main:
        # Not before: a start that fails must not claim the folder for its config.
        save_config(config, options.logdir / CONFIG)
        atomic_write_text(options.logdir / RECORD, opened.record.text())
    return loop.run()


def _loop(
    config: TrainingConfig,
    options: RunOptions,
    world: World,
    device: torch.device,
    checkpointer: Checkpointer,
    run_log: RunLog,
    record: str,
) -> Loop:
    """Load all that the loop runs. record: what is kept of the run's data and networks."""
    # Only now: they bring libraries that take seconds.
    from longsana.training.build import StageBuilder
    from longsana.training.validation import Validation

    check_stop()  # imports may swallow a request
    validation = None  # first, so that its text encoder is gone before anything large comes
    if options.visualize and config.validation.vis_interval > 0:
        validation = Validation(config, options.logdir, device, world)
    micro_batches = micro_batches_of(config, world)
    builder = StageBuilder(config, micro_batches=micro_batches, world=world, device=device, folder=options.logdir)
    stage = builder.stage()
    return Loop(
        stage,
        config.train,
        micro_batches=micro_batches,
        world=world,
        device=device,
        run_log=run_log,
        checkpointer=checkpointer,
        saves=options.save,
        validate=_validate(config, validation, builder, stage.learners[0], run_log) if validation else None,
        vis_interval=config.validation.vis_interval,
        texts={CONFIG: render_config(config), RECORD: record},
    )


def _nothing_left(config: TrainingConfig, options: RunOptions, progress: Progress) -> bool:
    """Tell whether all iterations are done, and the validation after the last one too."""
    if options.visualize and progress.owes_validation(config.validation.vis_interval):
        return False
    return progress.step >= config.train.max_iters


def _open_log(config: TrainingConfig, options: RunOptions, world: World, step: int) -> RunLog:
    """Early: wandb that is wanted and not there is found before anything is loaded."""

    def of_main() -> RunLog:
        wandb = _wandb(config, options) if options.wandb else None
        return RunLog(options.logdir, step=step, total=config.train.max_iters, main=True, wandb=wandb)

    opened = world.on_main(of_main)
    return opened or RunLog(options.logdir, step=step, total=config.train.max_iters, main=False, wandb=None)


def _wandb(config: TrainingConfig, options: RunOptions) -> WandbRun:
    return WandbRun(
        project=config.wandb.project,
        entity=config.wandb.entity,
        name=options.name,
        folder=options.wandb_dir,
        config=flat(dataclasses.asdict(config)),
    )


def _validate(
    config: TrainingConfig, validation: Validation, builder: StageBuilder, generator: Learner, run_log: RunLog
) -> Validate:
    def validate(step: int, stop: Stop) -> Mapping[str, float] | None:
        with weights_for_sampling(generator, config.validation.vis_ema):
            report = validation.run(step, generator.model, builder.decoder, stop)
        if report is None:
            return None
        for video in report.videos:
            run_log.video(step - 1, video.stem.partition("_rank_")[2], video)
        if report.sheet is not None:
            run_log.picture(step - 1, "validation", report.sheet)
        return report.metrics

    return validate
