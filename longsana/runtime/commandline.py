"""The frame of all commands: they read settings from the command line, and end with a status and one line."""

from __future__ import annotations

import argparse
import logging
import re
import sys
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from longsana.runtime import stop
from longsana.runtime.errors import InputError, did_you_mistype
from longsana.runtime.files import disk_failure, expanded, remove_unfinished
from longsana.runtime.output import until_unread
from longsana.runtime.settings import decimal

if TYPE_CHECKING:  # it brings torch, which not every command needs
    from longsana.runtime.distributed import World


def typed_path(text: str) -> Path:
    """The path that an option says, for `type=`: `~` is the home folder."""
    if not text:  # as of a variable that is not set
        raise argparse.ArgumentTypeError("an empty path; the current folder is .")
    try:
        return expanded(text)
    except InputError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def whole(text: str) -> int:
    """The number that an option says, for `type=`: whole, and decimal as in settings."""
    number = decimal(text)
    if not isinstance(number, int):
        raise argparse.ArgumentTypeError(f"{text}: must be a whole number")
    return number


def number(text: str) -> float:
    """The number that an option says, for `type=`: decimal as in settings."""
    found = decimal(text)
    if found is None:
        raise argparse.ArgumentTypeError(f"{text}: must be a number")
    return float(found)


T = TypeVar("T")
MOST_THREADS = 1024
SWITCH: dict[str, Any] = {"nargs": "?", "const": "true"}
"""How an option is declared that means true where no value follows."""
_SETTING = re.compile(r"\w+(\.\w+)*=")


def _threads(text: str) -> int:
    number = whole(text)
    if not 1 <= number <= MOST_THREADS:
        raise argparse.ArgumentTypeError(f"{text}: must be from 1 to {MOST_THREADS}")
    return number


class Parser(argparse.ArgumentParser):
    """Whose errors are InputErrors."""

    def __init__(self, description: str | None) -> None:
        super().__init__(
            description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
        )

    def add_threads(self) -> None:
        """Declare `--threads`, for `longsana.runtime.distributed.set_threads`."""
        self.add_argument("--threads", type=_threads, help="CPU threads (default: usable cores / processes here)")

    def print_help(self, file: Any = None) -> None:
        """Print it as anything else is: argparse would pass over a pipe that nobody reads."""
        print(self.format_help(), end="", file=file)

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; see --help")

    def parse_command(
        self,
        arguments: Sequence[str],
        flags: Mapping[str, str],
        settings: Iterable[str],
        switches: Collection[str] = (),
    ) -> tuple[argparse.Namespace, list[str]]:
        """The options, and every setting given on the command line as `section.key=value`.

        flags: options that are short for a setting. settings: names of all there are or were. switches: flags that mean
        true where no value follows.
        """
        for flag, setting in flags.items():
            optional: dict[str, Any] = SWITCH if flag in switches else {}
            self.add_argument(f"--{flag}", metavar="VALUE", help=f"the setting {setting}", **optional)
        options, rest = self.parse_known_args(self._filled(arguments))
        values = {setting: getattr(options, flag) for flag, setting in flags.items()}
        given = [f"{setting}={value}" for setting, value in values.items() if value is not None]
        own = [name for action in self._actions for name in action.option_strings]
        return options, given + parse_settings(rest, [*own, *(f"--{setting}" for setting in settings)])

    def _filled(self, arguments: Sequence[str]) -> list[str]:
        """The arguments, with the value of each switch that has none: argparse would take a setting for it."""
        switches = {name for action in self._actions if action.nargs == "?" for name in action.option_strings}
        filled = list(arguments)
        for position, word in enumerate(filled):
            after = arguments[position + 1] if position + 1 < len(arguments) else "--"
            if word in switches and (after.startswith("--") or _SETTING.match(after)):
                filled[position] = f"{word}={SWITCH['const']}"
        return filled


def parse_settings(rest: Sequence[str], known: Sequence[str]) -> list[str]:
    """`--a.b value`, `--a.b=value` and `a.b=value`, all as `a.b=value`; whether there is such a setting, others judge.

    known: options and settings of the command, as `--name`; the nearest is offered for one that is not known.

    Raises:
        InputError: an option that is neither, or one without its value.
    """
    settings = []
    words = iter(rest)
    for word in words:
        flag = word.partition("=")[0]
        if _SETTING.match(word):
            settings.append(word)
        elif flag not in known and not re.match(r"--\w+\.", word):
            names = [name.removeprefix("--") for name in known]
            hint = did_you_mistype(flag.removeprefix("--"), names).replace("'", "'--", 1)
            raise InputError(f"unknown option {flag}{hint}; see --help")
        elif "=" in word:
            settings.append(word[2:])
        else:
            value = next(words, None)
            if value is None:
                raise InputError(f"{word}: a value is missing")
            settings.append(f"{word[2:]}={value}")
    return settings


def set_up_logging(is_main: bool = True) -> None:
    """Progress is one process's to tell; an error of its own may come from any."""
    logging.basicConfig(level=logging.INFO if is_main else logging.ERROR, format="%(message)s")
    for library in ("httpx", "huggingface_hub", "transformers", "diffusers"):
        logging.getLogger(library).setLevel(logging.ERROR)


def run_command(
    prepare: Callable[[World], T],
    run: Callable[[T, World], int],
    *,
    connect: Callable[[World], None] = lambda world: world.connect(),
    after_stop: str = "the same command goes on from here",
) -> int:
    """`run(prepare(world), world)` of this process's world, and the command's exit status.

    That is the status of `run`; 2 for bad input; 1 if another process of the launch has gone, a disk is full or
    broken, or numbers are not finite; 128 + n after signal n, and 141 (SIGPIPE's) when nobody reads any more what it
    prints.

    prepare: checks the input before the processes meet; what is wrong with it is wrong for all, and said once.
    connect: how they meet. after_stop: what is said of a command that was stopped.
    """
    from longsana.runtime.distributed import PeerError, PeerLost, World

    def in_launch(process: _Process) -> int:
        world = World.from_environment()
        process.rank = world.rank
        set_up_logging(world.is_main)
        try:
            return _run_in(world, prepare, run, connect)
        except PeerError:  # told by the main process
            return 2
        except PeerLost as error:
            stop.check()  # of a stop that all were asked for
            if world.is_main:
                print(f"failed: {error}", file=sys.stderr)
            return 1

    return _framed(in_launch, after_stop)


def run_alone(command: Callable[[], int], *, after_stop: str) -> int:
    """Run a command that is no launch of processes and needs no torch; the exit status is as in `run_command`."""
    set_up_logging()
    return _framed(lambda process: command(), after_stop)


@dataclass
class _Process:
    """This process among those of its launch. rank: 0 for the main one; None before it is known."""

    rank: int | None = None

    def __str__(self) -> str:
        return f" (process {self.rank})" if self.rank else ""


def _framed(body: Callable[[_Process], int], after_stop: str) -> int:
    process = _Process()
    with stop.caught(remove_unfinished):
        try:
            try:
                return until_unread(lambda: body(process))
            except InputError as error:
                print(f"error{process}: {error}", file=sys.stderr)
                return 2
            except FloatingPointError as error:
                print(f"failed{process}: {error}", file=sys.stderr)
                return 1
            except OSError as error:
                if (reason := disk_failure(error)) is None:
                    raise
                print(f"failed{process}: {reason}", file=sys.stderr)
                return 1
        except (stop.Stopped, SystemError) as error:  # also while something else was told, or the processes parted
            # A second signal may come while C code has the first one's exception in hand: Python then says so of it.
            stopped = error.__cause__ if isinstance(error, SystemError) else error
            if not isinstance(stopped, stop.Stopped):
                raise
            if not process.rank:
                print(f"{stopped}; {after_stop}", file=sys.stderr)
            return stopped.status


def _run_in(
    world: World, prepare: Callable[[World], T], run: Callable[[T, World], int], connect: Callable[[World], None]
) -> int:
    from longsana.runtime.distributed import PeerError

    ended = False
    try:
        try:
            request = prepare(world)
        except InputError as error:  # all processes find it
            raise error if world.is_main else PeerError(str(error)) from error
        connect(world)
        status, ended = run(request, world), True
        return status
    finally:
        # Not after an error: the others may be in a collective that this process will never enter.
        if ended or world.size == 1:
            world.disconnect()
