"""The training command in a process that kills itself without warning: python killed.py UPDATES ARGUMENTS...

The process is gone (SIGKILL) just before update number UPDATES + 1 of any learner, in the middle of an iteration.
"""

from __future__ import annotations

import os
import runpy
import signal
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from longsana.training.learner import Learner  # noqa: E402

left = int(sys.argv[1])
update = Learner.update


def update_or_die(self: Learner, step: int) -> Any:
    global left
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    left -= 1
    return update(self, step)


Learner.update = update_or_die  # type: ignore[method-assign]
sys.argv = ["train_longsana.py", *sys.argv[2:]]
runpy.run_path(str(ROOT / "train_video_scripts" / "train_longsana.py"), run_name="__main__")
