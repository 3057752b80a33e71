"""A run's folder: who has it, whose run it is, and whether that run can go on with what it is given now.

Everything here is told before anything is loaded.
"""

from __future__ import annotations

import json
import logging
import secrets
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from longsana.config import ModelConfig
from longsana.data.clips import GENERATED
from longsana.data.shards import MANIFEST
from longsana.encoders.tiny_layouts import BESIDE
from longsana.models.dit import LongSanaDiT
from longsana.runtime.distributed import PeerError, World
from longsana.runtime.errors import InputError
from longsana.runtime.files import LINGERING, LOCK, check_writable, hold_folder, remove
from longsana.runtime.hub import SEEDED, file_sha256, locate
from longsana.runtime.logging import METRICS, WANDB_ID
from longsana.training.checkpoint import checkpoints_of
from longsana.training.checks import DISTILLING, TAUGHT, check_same_run
from longsana.training.config import TrainingConfig
from longsana.training.learner import Learner
from longsana.training.lora import put_on
from longsana.training.parts import check_match, flatten
from longsana.training.stages.stage import MicroBatches
from longsana.weights.build import empty_model
from longsana.weights.checkpoint_folder import CHECKPOINTS, open_tensors, refuse_old
from longsana.weights.files import holds_factors

log = logging.getLogger(__name__)

CONFIG = "config.yaml"
RECORD = "run.json"
CAPTIONS = "captions"
VIDEOS = "vis"
ASIDE = "superseded_"
PROBE = ".probe-"
LMDB = "data.mdb"
PATIENCE = 30.0  # seconds until a file of one host must be seen by the others
MEANING = ("vae.", "model.num_cached_blocks", "model.num_sink_blocks")
"""Settings, or prefixes of them, that decide what the numbers of a stream mean, whatever their shapes."""
LORA = ("train.lora.rank", "train.lora.targets")
ANEW = ", choose another --logdir, or start anew: --no-auto-resume"


class Record(NamedTuple):
    """The record of what a run was made with beside its config.

    processes: of the launch. samples: of an update. sha256: of what it reads as it goes on, by the setting that names
    it.
    """

    processes: int
    samples: int
    sha256: dict[str, str]

    @classmethod
    def of(cls, config: TrainingConfig, micro_batches: MicroBatches) -> Record:
        """Read all that `sources` names; digests are remembered, so that gigabytes are read once.

        Raises:
            InputError: something is not there.
        """
        named = sources(config)
        log.info("digests of %s", ", ".join(named))
        digests = {setting: _digest(setting, uri) for setting, uri in named.items()}
        return cls(micro_batches.processes, micro_batches.count * config.train.batch_size, digests)

    @classmethod
    def read(cls, folder: Path) -> Record | None:
        """Read a folder's record; None if it is of a version that kept none, or damaged, which is said."""
        path = folder / RECORD
        try:
            record = cls(**json.loads(path.read_text(encoding="utf-8")))
            whole = isinstance(record.samples, int) and all(isinstance(part, str) for part in record.sha256.values())
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError, AttributeError):
            whole = False
        if not whole:
            log.warning("%s: damaged; whether data and networks are those of before is not known", path)
            return None
        return record

    def text(self) -> str:
        """Return the value as a file has it."""
        return json.dumps(self._asdict(), indent=2) + "\n"


class Opened(NamedTuple):
    """A folder that this run has. streams: whether those of its checkpoints mean to it what they did."""

    record: Record
    streams: bool


@contextmanager
def open_folder(
    config: TrainingConfig, logdir: Path, micro_batches: MicroBatches, *, auto_resume: bool, allow_config_change: bool
) -> Iterator[Opened]:
    """Have the folder inside the block, on the main process; another run's is refused, or moved aside if asked.

    Raises:
        InputError: another command has it, it cannot be a run's folder, or its run cannot go on as this one.
    """
    check_writable(logdir, "--logdir")
    with hold_folder(logdir, "--logdir"):
        if not auto_resume:
            _move_aside(logdir)
        _check_kinds(logdir)
        for left in logdir.glob(f"{PROBE}*"):
            with suppress(OSError):
                remove(left)
        yield _check_run(config, logdir, micro_batches, allow_config_change)


def check_shared(logdir: Path, world: World, *, patience: float = PATIENCE) -> None:
    """Make sure that all processes write to one folder; all of them call this.

    Raises:
        InputError: some do not see what the main one writes there, or it does not see what they write.
    """
    if world.size == 1:
        return
    mark = world.broadcast(secrets.token_hex(8))
    probes = [logdir / f"{PROBE}{mark}-{rank}" for rank in range(world.size)]
    own = probes[world.rank]
    try:
        problem = _write_probe(own) if world.is_main else ""
        world.gather(None)  # the main one's is there
        if not world.is_main:
            seen = _wait_for(probes[:1], patience)
            problem = _write_probe(own) if seen else "does not see what the main process writes"
        problems = world.gather(problem)
        if world.is_main and not any(problems) and not _wait_for(probes, patience):
            problems = ["" if probe.exists() else "writes to another one" for probe in probes]
        hosts, problems = world.gather(socket.gethostname()), world.broadcast(problems)
    finally:
        with suppress(OSError):
            remove(own)
    if blamed := [f"process {rank} on {hosts[rank]} {problem}" for rank, problem in enumerate(problems) if problem]:
        message = f"{logdir}: --logdir must be in a file system that all hosts share: {'; '.join(blamed[:4])}"
        raise (InputError if world.is_main else PeerError)(f"{message}{'; ...' if len(blamed) > 4 else ''}")


def sources(config: TrainingConfig) -> dict[str, str]:
    """List what a run goes on reading once it has a checkpoint, by setting: data and frozen networks."""
    distilled, data = config.trainer in DISTILLING, config.data.data_path
    generated = data.startswith(GENERATED) and not distilled
    named = {"text_encoder.text_encoder_name": config.text_encoder.text_encoder_name}
    if config.trainer in TAUGHT:
        named["real_score.load_from"] = config.real_score.load_from
    if config.train.lora.rank is not None:  # whose checkpoints hold no weights
        named["model.load_from"] = config.model.load_from
        named |= {"fake_score.load_from": config.fake_score.load_from} if distilled else {}
    if distilled or generated:
        named["vae.vae_pretrained"] = config.vae.vae_pretrained
    if not generated:
        named["data.data_path"] = data
    if config.streaming.switch_prompt_path is not None:
        named["streaming.switch_prompt_path"] = config.streaming.switch_prompt_path
    return named


def check_fits(config: TrainingConfig, checkpoint: Path) -> None:
    """Compare names, shapes and dtypes of all that a checkpoint holds with those of the networks of a config.

    Raises:
        InputError: it is of other networks, or of others that are averaged.
    """
    optimizers, lora = config.optimizer, config.train.lora

    def network(settings: ModelConfig) -> LongSanaDiT:
        model = empty_model(settings).float()
        return model if lora.rank is None else put_on(model, lora)

    learners = [Learner("generator", network(config.model), optimizers.generator, ema_weight=config.train.ema_weight)]
    if config.trainer in DISTILLING:
        learners.append(Learner("critic", network(config.fake_score), optimizers.critic))
    tensors = {name: group for learner in learners for name, group in learner.tensors().items()}
    check_match(checkpoint, open_tensors(checkpoint), flatten(tensors))


def _check_run(config: TrainingConfig, logdir: Path, micro_batches: MicroBatches, allowed: bool) -> Opened:
    """Find what changes from the run that the folder holds to this one; the quickest checks come first."""
    newest = next((path for path in checkpoints_of(logdir) if _is_readable(path)), None)
    places = [place for place in (logdir, newest) if place is not None]
    saved = next((place / CONFIG for place in places if (place / CONFIG).is_file()), None)
    before = next((record for place in places if (record := Record.read(place))), None)
    known = {} if before is None else before.sha256
    changes = {} if saved is None else _changes(config, saved)
    if newest is not None:
        _check_factors(config, newest, {name: change for name, change in changes.items() if name in LORA})
        try:
            check_fits(config, newest)
        except InputError as error:
            told = f" ({'; '.join(changes.values())})" if changes else ""
            raise InputError(f"{error}{told}{ANEW}") from error
    _refuse(logdir, [change for setting, change in changes.items() if setting not in known], allowed)
    record = Record.of(config, micro_batches)
    for setting, digest in record.sha256.items():
        if known.get(setting, digest) != digest:
            told = f"{setting}: another content than before (SHA-256 {known[setting][-64:][:8]} -> {digest[-64:][:8]})"
            changes.setdefault(setting, told)
        elif setting in known:
            changes.pop(setting, None)  # elsewhere, and the same
    _refuse(logdir, list(changes.values()), allowed)
    if changes:
        log.warning("--allow-config-change: going on with other settings: %s", "; ".join(changes.values()))
    if before is None and saved is not None:
        log.info("%s: no record of data and networks from before, to compare with; one is kept from now on", logdir)
    if before is not None and before.samples != record.samples:
        log.warning(
            "an update takes %d samples now, and took %d before (%d processes now, %d before): the run will not be the "
            "one that it was; train.total_batch_size=%d keeps it",
            *(record.samples, before.samples, record.processes, before.processes, before.samples),
        )
    return Opened(record, not any(setting.startswith(MEANING) for setting in changes))


def _check_factors(config: TrainingConfig, checkpoint: Path, changes: Mapping[str, str]) -> None:
    """Refuse (InputError) a checkpoint that is another LoRA's, or one of whole weights where a LoRA learns.

    Factors of another rank have other shapes, but those of other layers may not.
    """
    logdir, rank = checkpoint.parent, config.train.lora.rank
    if holds_factors(open_tensors(checkpoint)) == (rank is not None):
        if changes:
            raise InputError(f"{logdir}: its factors are those of another LoRA ({'; '.join(changes.values())}){ANEW}")
    elif rank is not None:
        raise InputError(
            f"{logdir}: its whole weights have learned, and with train.lora.rank={rank} factors would; leave that out"
            f"{ANEW}"
        )
    else:
        raise InputError(
            f"{logdir}: factors of a LoRA have learned, and without train.lora.rank whole weights would; set it as in "
            f"{checkpoint / CONFIG}{ANEW}"
        )


def _refuse(logdir: Path, changes: list[str], allowed: bool) -> None:
    if changes and not allowed:
        raise InputError(
            f"{logdir}: belongs to a run with another config ({'; '.join(changes)}); choose another --logdir, or go on "
            "with the new settings: --allow-config-change"
        )


def _changes(config: TrainingConfig, saved: Path) -> dict[str, str]:
    """List changes by setting; all of them as one if the saved config cannot be read by this version."""
    try:
        return {change.partition(": ")[0]: change for change in check_same_run(config, saved)}
    except InputError as error:
        return {"": str(error)}


def _is_readable(checkpoint: Path) -> bool:
    refuse_old(checkpoint)
    try:
        open_tensors(checkpoint)
    except InputError:
        return False
    return True


def _digest(setting: str, uri: str) -> str:
    """SHA-256 of what a setting names, or the seed that weights are drawn from.

    Raises:
        InputError: it is not there, or cannot be read.
    """
    if uri.startswith(SEEDED) and setting.endswith("load_from"):
        return uri
    seeded = uri.startswith(SEEDED)
    path = locate(uri.removeprefix(SEEDED), setting, part="transformer")
    is_lmdb = (path / LMDB).is_file() and not (path / MANIFEST).exists()
    try:
        without = BESIDE if setting == "vae.vae_pretrained" else ()
        return (SEEDED if seeded else "") + file_sha256(path / LMDB if is_lmdb else path, without)
    except OSError as error:
        raise InputError(f"{setting}: {error.filename or path}: cannot be read ({error.strerror})") from error


def _check_kinds(logdir: Path) -> None:
    """Refuse a file where a folder goes, and the other way round, which would end the run hours later."""
    folders = [logdir / CAPTIONS, logdir / VIDEOS]
    folders += [path for path in logdir.glob(CHECKPOINTS) if path.name.rpartition("_")[2].isdecimal()]
    for path in folders:
        if path.is_file() or (path.is_symlink() and not path.exists() and path.name in (CAPTIONS, VIDEOS)):
            raise InputError(f"{path}: a file, where a run has a folder; move it away, or choose another --logdir")
    for path in (logdir / name for name in (CONFIG, RECORD, METRICS, WANDB_ID)):
        if path.is_dir():
            raise InputError(f"{path}: a folder, where a run has a file; move it away, or choose another --logdir")


def _move_aside(logdir: Path) -> None:
    """Move what lies in the folder to superseded_N inside it, but for encoded captions, which any run can use."""
    found = [path for path in logdir.iterdir() if not path.name.startswith((ASIDE, CAPTIONS, LOCK, LINGERING))]
    if not found:
        return
    numbers = [int(path.name[len(ASIDE) :]) for path in logdir.glob(f"{ASIDE}*") if path.name[len(ASIDE) :].isdecimal()]
    target = logdir / f"{ASIDE}{max(numbers, default=-1) + 1:03d}"
    moved: list[Path] = []
    try:
        target.mkdir()
        for path in found:
            path.rename(target / path.name)
            moved.append(path)
    except OSError as error:
        with suppress(OSError):
            for path in moved:
                (target / path.name).rename(path)
            target.rmdir()
        raise InputError(
            f"{error.filename}: cannot be moved aside ({error.strerror}); choose another --logdir"
        ) from error
    log.info("--no-auto-resume: what was in %s is in %s now", logdir, target)


def _write_probe(path: Path) -> str:
    """Find what is wrong with writing there, or nothing."""
    try:
        path.write_text("", encoding="utf-8")
    except OSError as error:
        return f"cannot write there ({error.strerror})"
    return ""


def _wait_for(paths: list[Path], patience: float) -> bool:
    """Wait for files of other hosts to appear: a client of NFS may know a folder as it was a moment ago."""
    deadline = time.monotonic() + patience
    while not all(path.exists() for path in paths):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True
