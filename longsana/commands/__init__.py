"""The commands by name: `longsana generate`, and the published scripts, which are thin names for the same.

Nothing heavy is imported before a signal can be caught, nor for a list of the commands.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from longsana.runtime.output import until_unread
from longsana.runtime.process import begin

COMMANDS = {
    "generate": ("longsana.commands.generate", "a file of prompts to a folder of videos"),
    "serve": ("longsana.commands.serve", "live videos in a browser, and videos by HTTP"),
    "load": ("longsana.commands.load", "viewers that measure a live server"),
    "evaluate": ("longsana.commands.evaluate", "figures of a folder of videos"),
    "export-vbench": ("longsana.commands.export_vbench", "videos in the names that VBench and VBench-Long read"),
    "benchmark": ("longsana.commands.benchmark", "what a video costs on this machine, part by part"),
    "train": ("longsana.commands.train", "train a stage, or go on where it was stopped"),
    "encode": ("longsana.commands.encode", "clips of one's own to shards of latents, which a base model trains on"),
    "ode-pairs": ("longsana.commands.ode_pairs", "a teacher's trajectories, which the ODE stage learns from"),
    "export": ("longsana.commands.export", "a training checkpoint in a layout that others read"),
    "shapes": ("longsana.commands.shapes", "tools of the small world: its parts, and scores of its models"),
    "convert": ("longsana.convert", "weights from one layout to another"),
}
"""Module and purpose of each."""


def run(name: str, arguments: Sequence[str]) -> int:
    """Run a command in this process; returns its exit status. Signals are caught from here on.

    A process of a launch ends here.
    """
    begin()
    status = run_here(name, *arguments)
    if os.environ.get("WORLD_SIZE", "1") != "1":
        _end(status)
    return status


def run_here(name: str, *arguments: str) -> int:
    """Run a command in a process that is another command's; returns its exit status."""
    status: int = importlib.import_module(COMMANDS[name][0]).main(arguments)
    return status


def _end(status: int) -> NoReturn:
    """End the process with this status, after what is registered for its exit, but without taking Python down.

    Two of some hundred launches of two processes aborted in that ("terminate called without an active exception", torch
    2.13, gloo), when all was done and written: torchrun then calls the run failed.
    """
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # a pipe that nobody reads any more
            stream.flush()
    os._exit(status)


def _say(text: str) -> int:
    def say() -> int:
        print(text)
        return 0

    return until_unread(say)


def main() -> int:
    """Run `longsana NAME ...`; returns the exit status: that of the command, or 2 if there is none of this name."""
    name, *arguments = sys.argv[1:] or ["--help"]
    if name in COMMANDS:
        sys.argv[0] = f"longsana {name}"  # for its --help
        return run(name, arguments)
    if name in ("-h", "--help"):
        listed = (f"  {command:<14}{purpose}" for command, (_, purpose) in COMMANDS.items())
        return _say("\n".join(("usage: longsana COMMAND ...; longsana COMMAND --help says more\n", *listed)))
    if name == "--version":
        from longsana import __version__

        return _say(__version__)
    from longsana.runtime.errors import did_you_mean

    print(f"error: no command {name}{did_you_mean(name, COMMANDS)}; see longsana --help", file=sys.stderr)
    return 2
