"""A member of a team whose main thread waits for something that never comes; see test_teams.py."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from longsana.runtime import teams
from longsana.runtime.commandline import run_command
from longsana.runtime.distributed import World
from longsana.runtime.teams import Team


def main(arguments: Sequence[str]) -> int:
    teams.GRACE = 0.5  # nobody here can end by himself, however long he has

    def run(seconds: float, world: World) -> int:
        team = Team.of(world, world.size, torch.device("cpu"))
        with team.watched():
            print("in", flush=True)
            time.sleep(seconds)
        world.gather(None)
        print("out", flush=True)
        return 0

    return run_command(lambda world: float(arguments[0]), run)
