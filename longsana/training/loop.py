"""The one loop of all stages: for each learner that is due, accumulate its loss, clip, step, average."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from longsana.runtime.distributed import World
from longsana.runtime.errors import InputError
from longsana.runtime.logging import RunLog
from longsana.runtime.stop import Stopped, check, deferred, heed
from longsana.training.checkpoint import Checkpointer
from longsana.training.config import TrainConfig
from longsana.training.learner import Learner
from longsana.training.lora import TARGETS, plain_name
from longsana.training.stages.stage import MicroBatch, MicroBatches, Stage
from longsana.weights.checkpoint_folder import PROGRESS, own_names, read_own, read_progress

log = logging.getLogger(__name__)

SKIPS = 10
"""Updates in a row that may change nothing, for numbers that are not finite or a gradient of zero."""


class TrainingFailed(Exception):
    """The run cannot go on; the message says why."""


@dataclass
class Progress:
    """The progress of a run.

    step: the next iteration. samples: of each learner, samples taken so far. skipped: updates that changed nothing
    because their loss or gradient was not finite; in_a_row: the same, since each learner's last good update.
    validated: iterations before the last validation.
    """

    step: int = 0
    samples: dict[str, int] = field(default_factory=dict)
    skipped: int = 0
    in_a_row: dict[str, int] = field(default_factory=dict)
    validated: int = 0

    @classmethod
    def read(cls, path: Path) -> Progress:
        """The progress that a checkpoint holds.

        Raises:
            InputError: it cannot be read, or says what this version does not know.
        """
        values = read_progress(path)
        if unknown := sorted(values.keys() - {known.name for known in dataclasses.fields(cls)}):
            raise InputError(f"{path / PROGRESS}: unknown {', '.join(unknown)}; written by another version of the code")
        try:
            progress = cls(**values)
            counts = [progress.step, progress.skipped, progress.validated]
            counts += [*progress.samples.values(), *progress.in_a_row.values()]
            whole = "step" in values and all(isinstance(count, int) and count >= 0 for count in counts)
        except AttributeError:
            whole = False
        if not whole:
            raise InputError(f"{path / PROGRESS}: damaged; use another checkpoint")
        return progress

    def owes_validation(self, interval: int) -> bool:
        """Tell whether one is due now and was not made; interval: iterations between them, 0 for none."""
        return interval > 0 and self.step % interval == 0 and self.step > self.validated


Stop = Callable[[], bool]
"""Whether some process was asked to stop; called by all of them together."""
Validate = Callable[[int, Stop], Mapping[str, float] | None]
"""Samples the fixed probe set after so many iterations, writes its videos, returns what they look like.

None: it was asked to stop before it had come to its end.
"""


class Loop:
    """A stage, run from wherever its newest checkpoint is to `max_iters`.

    saves: whether it writes checkpoints; it reads one in any case. validate: None samples nothing. texts: kept in every
    checkpoint, by file name.
    """

    def __init__(
        self,
        stage: Stage,
        settings: TrainConfig,
        *,
        micro_batches: MicroBatches,
        world: World,
        device: torch.device,
        run_log: RunLog,
        checkpointer: Checkpointer,
        saves: bool,
        validate: Validate | None,
        vis_interval: int,
        texts: Mapping[str, str],
    ) -> None:
        self.stage, self.settings, self.micro_batches, self.world, self.device = (
            stage,
            settings,
            micro_batches,
            world,
            device,
        )
        self.run_log, self.checkpointer, self.saves, self.texts = run_log, checkpointer, saves, texts
        self.validate, self.vis_interval = validate, vis_interval
        self.progress = Progress()
        self._saved = 0  # before the first iteration there is nothing to save
        self._due = False  # a checkpoint
        self._unproven = {learner.name for learner in stage.learners} if settings.lora.rank is not None else set()
        """Learners of which nobody has seen yet that every factor gets a gradient."""
        self._still: dict[str, int] = {}
        """Updates of each learner, up to the last, whose gradient was zero."""
        self._open = ExitStack()
        self._asked: Callable[[], int] | None = None

    def resume(self, path: Path, *, streams: bool = True) -> None:
        """Go on from a checkpoint, of any number of processes.

        streams: whether what lives across iterations goes on too; else it begins anew.

        Raises:
            InputError: it is not one of these networks.
        """
        self.checkpointer.load(path, self._tensors())
        names = own_names(path)
        read = partial(read_own, path)
        live = [name for name in names if not name.startswith("rng_")]
        if self.stage.state_tensors():
            self.stage.restore(live, read, anew=not streams)
        elif live:
            log.warning("%s: the streams of its %d micro-batches end; this stage has none", path, len(live))
        if (name := f"rng_{self.world.rank:05d}") in names:
            _set_rng(read(name), self.device)
        self.progress = Progress.read(path)
        self._saved = self.progress.step

    def run(self) -> int:
        """Train; returns the exit status: 0, or 128 + the signal that asked to stop, after what it has is saved.

        Raises:
            Stopped: it was asked to stop before there was anything to save.
            TrainingFailed: the numbers are not finite any more.
            SaveFailed: a checkpoint could not be written.
        """
        check()
        with self._open:
            try:
                stop = self._train()
            finally:
                self.checkpointer.wait()  # what is being written is finished, whatever ended the run
            if not stop:
                return 0
            heed(stop)
            saved = "the same command goes on" if self.saves else "nothing was saved (--no_save)"
            log.info("%s after iteration %d; %s", Stopped(stop), self.progress.step, saved)
            return 128 + stop

    def _train(self) -> int:
        """Train and save; returns the signal that some process was sent, or 0."""
        stop = self._validate_if_due()  # a run that was asked to stop did not stay for it
        while not stop and self.progress.step < self.settings.max_iters:
            self._iteration()
            # Before saving: a run that is killed while it samples does so again.
            stop = self._signal() or self._validate_if_due()
            if not stop and self._save_if_due() and self.progress.step < self.settings.max_iters:
                stop = self._signal()  # it may have taken minutes
        if self._skipping and not stop:
            row = {name: count for name, count in self.progress.in_a_row.items() if count}
            raise TrainingFailed(
                f"the last updates were not finite ({', '.join(f'{n} of the {name}' for name, n in row.items())}), and "
                f"what they left is not saved{self._newest()}; look for the fault in the weights, the data or the "
                "learning rate"
            )
        self._save()
        return stop

    def _iteration(self) -> None:
        started, step = time.perf_counter(), self.progress.step
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        values: dict[str, float] = {}
        for learner in self.stage.learners:
            if learner.learns_in(step):
                values |= self._update(learner, step)
        values["skipped_updates"] = self.progress.skipped
        values["per iteration time"] = time.perf_counter() - started  # ends in a read: the GPU is done
        if self.device.type == "cuda":
            values["gpu_peak_allocated"] = torch.cuda.max_memory_allocated(self.device)
        self.run_log.metrics(step, values)
        self.progress.step += 1

    def _update(self, learner: Learner, step: int) -> dict[str, float]:
        """One update of one learner; its metrics, averaged over all micro-batches."""
        progress, settings = self.progress, self.settings
        mine = self.micro_batches.mine
        sums: dict[str, Tensor] = defaultdict(lambda: torch.zeros((), device=self.device))
        learning = 0.0
        for index, following in zip(mine, [*mine[1:], None], strict=True):
            loss = self.stage.loss(self._micro_batch(learner, step, index))
            (loss.value / self.micro_batches.accumulation).backward()
            for name, value in loss.metrics.items():
                sums[name] += value / self.micro_batches.accumulation
            learning += loss.learns
            self._prepare(learner, step, following)  # nobody has waited for the GPU yet
        progress.samples[learner.name] = self._samples(learner) + self.micro_batches.count * settings.batch_size
        if learning and learner.name in self._unproven:
            _prove(learner)
            self._unproven.remove(learner.name)
        self._defer()
        told = torch.stack([*(value.float() for value in sums.values()), torch.tensor(learning, device=self.device)])
        *means, learners = (self._reduced(told) / self.world.size).tolist()
        values = dict(zip(sums, means, strict=True))
        # The same numbers on all processes: all of them take this step, or none.
        if learners:
            norm = learner.update(step) if all(map(_finite, means)) else learner.skip()
            values[f"{learner.name}_grad_norm"] = float(norm)
            self._count(learner, values)
            self._check_moves(learner, float(norm))
        else:
            learner.skip()
        return values

    def _prepare(self, learner: Learner, step: int, following: int | None) -> None:
        """Have what the next micro-batch needs made: that of this update, or the first of the next one."""
        inputs, later = self.stage.inputs, step + learner.every
        if inputs is None:
            return
        if following is not None:
            inputs.begin(self._micro_batch(learner, step, following))
        elif later < self.settings.max_iters:
            first = self.micro_batches.mine[0]
            inputs.begin(self._micro_batch(learner, later, first, later=self.micro_batches.count))

    def _samples(self, learner: Learner) -> int:
        """Samples that its updates so far have had."""
        return self.progress.samples.get(learner.name, 0)

    def _micro_batch(self, learner: Learner, step: int, index: int, later: int = 0) -> MicroBatch:
        """later: micro-batches of updates that are not counted yet."""
        settings = self.settings
        start = self._samples(learner) + (later + index) * settings.batch_size
        samples = range(start, start + settings.batch_size)
        return MicroBatch(
            settings.seed, step, learner.name, index, samples, self.device, device_noise=settings.device_noise
        )

    def _count(self, learner: Learner, values: Mapping[str, float]) -> None:
        progress = self.progress
        if all(map(_finite, values.values())):
            progress.in_a_row[learner.name] = 0
            return
        progress.skipped += 1
        progress.in_a_row[learner.name] = progress.in_a_row.get(learner.name, 0) + 1
        log.warning(
            "iteration %d: the %s is not updated, numbers are not finite: %s", progress.step, learner.name, values
        )
        if progress.in_a_row[learner.name] >= SKIPS:
            raise TrainingFailed(
                f"{SKIPS} updates of the {learner.name} in a row were not finite (iteration {progress.step}); go back "
                f"to a checkpoint before them{self._newest()} with a lower learning rate, or look for the fault in the "
                "data"
            )

    def _check_moves(self, learner: Learner, norm: float) -> None:
        """Tell of a gradient that is zero everywhere, as a LoRA's with an alpha of next to nothing is.

        One may be so for a reason: a critic that is still the teacher has nothing to tell the generator. So may those
        of some layers for ever: attention to a caption of one token does not depend on its q and k.
        """
        still = self._still[learner.name] = self._still.get(learner.name, 0) + 1 if norm == 0 else 0
        step = self.progress.step
        if still == 1:
            log.warning("iteration %d: the gradient of the %s is zero everywhere", step, learner.name)
        if still >= SKIPS:
            raise TrainingFailed(
                f"{SKIPS} updates of the {learner.name} in a row had a gradient of zero (iteration {step}): it learns "
                f"nothing{self._newest()}; look for the fault in train.lora.alpha, the weights or the loss"
            )

    def _newest(self) -> str:
        return f" (the newest is of step {self._saved})" if self._saved > 0 else " (there is none)"

    def _reduced(self, values: Tensor, op: Any = dist.ReduceOp.SUM) -> Tensor:
        values = values.to(self.device)
        if self.world.size > 1:
            dist.all_reduce(values, op)
        return values

    def _defer(self) -> None:
        """Obey requests to stop between iterations alone, from now to the end.

        Not before the first update since the start, whose compilation may take minutes, and which nothing is lost
        without. But before the processes meet in it: then none ends in an iteration that another has finished.
        """
        if self._asked is None:
            self._asked = self._open.enter_context(deferred())

    def _signal(self) -> int:
        """The signal that some process was sent, or 0; called by all processes together.

        Raises:
            SaveFailed: writing in the background has failed.
        """
        own = self._asked() if self._asked is not None else 0
        asked = torch.tensor([own, self.checkpointer.failed], dtype=torch.int64, device="cpu")
        signal, failed = self._reduced(asked, dist.ReduceOp.MAX).tolist()
        if failed:
            self.checkpointer.wait()
        return int(signal)

    def _validate_if_due(self) -> int:
        """The signal that cut the validation off, or 0."""
        if not self.validate or not self.progress.owes_validation(self.vis_interval):
            return 0
        seen = [0]

        def stop() -> bool:
            seen[0] = self._signal()
            return seen[0] > 0

        step = self.progress.step
        values = self.validate(step, stop)
        if values is not None:
            self.run_log.metrics(step - 1, values)
            self.progress.validated = step
        return seen[0]

    def _save_if_due(self) -> bool:
        """Save, unless updates are being skipped: what made their numbers so may be in the weights already, and newer
        checkpoints would take the place of the last good ones. Returns whether one was due now."""
        self._due = self._due or self.progress.step % self.settings.log_iters == 0
        saves = self._due and not self._skipping
        if saves:
            self._save()
        return saves

    @property
    def _skipping(self) -> bool:
        """True if the last update of some learner was skipped."""
        return any(self.progress.in_a_row.values())

    def _save(self) -> None:
        self._due = False
        if not self.saves or self._saved == self.progress.step:
            return
        own = {f"rng_{self.world.rank:05d}": _rng(self.device)} | dict(self.stage.state_tensors())
        self.checkpointer.save(
            self.progress.step,
            self._tensors(),
            own=own,
            progress=dataclasses.asdict(self.progress),
            texts=self.texts,
            retire=not self._skipping,
        )
        self._saved = self.progress.step

    def _tensors(self) -> dict[str, dict[str, Tensor]]:
        return {name: group for learner in self.stage.learners for name, group in learner.tensors().items()}


def weights_for_sampling(learner: Learner, ema: bool) -> Any:
    """A context in which the learner's network samples: with its average, or as it is."""
    return learner.averaged() if ema and learner.average else nullcontext()


def _prove(learner: Learner) -> None:
    """
    Raises:
        InputError: some factors of a LoRA got no gradient: their layers are never called, as the weights of fused
            operations are not, and would stay as they are in silence.
    """
    if without := learner.without_gradient():
        raise InputError(
            f"{TARGETS}: no gradient of the {learner.name} has come to {len(without)} factors after the first backward "
            f"pass ({', '.join(map(plain_name, without[:3]))}): their layers are not computed with; leave them out"
        )


def _rng(device: torch.device) -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def _set_rng(states: Mapping[str, Tensor], device: torch.device) -> None:
    torch.set_rng_state(states["cpu"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)


def _finite(value: float) -> bool:
    return value - value == 0
