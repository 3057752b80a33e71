"""The training command in a process that kills itself without warning: `main([UPDATES, *ARGUMENTS])`.

The process is gone (SIGKILL) just before update number UPDATES + 1 of any learner, in the middle of an iteration.
"""

from __future__ import annotations

import os
import signal
from typing import Any

from longsana import commands
from longsana.training.learner import Learner


def main(arguments: list[str]) -> int:
    left, update = int(arguments[0]), Learner.update

    def update_or_die(self: Learner, step: int) -> Any:
        nonlocal left
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        left -= 1
        return update(self, step)

    Learner.update = update_or_die  # type: ignore[method-assign]
    return commands.run("train", arguments[1:])
