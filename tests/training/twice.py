"""The training command, again and again, in two processes each time: python twice.py CONFIG LOGDIR...

As torchrun starts it, but what takes seconds is imported once. The statuses of main processes are printed, a line each.
"""

from __future__ import annotations

import os
import socket
import sys
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from longsana.training import build, validation  # noqa: E402, F401
from tests.scripts import load_script  # noqa: E402


def train(rank: int, port: int, arguments: list[str]) -> int:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    try:
        return int(script.main([*arguments, "--disable-wandb", "--threads", "1"]))
    except BaseException:
        traceback.print_exc()
        return 1


script = load_script(ROOT / "train_video_scripts" / "train_longsana.py")
config, *logdirs = sys.argv[1:]
for logdir in logdirs:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(2):
        children.append(os.fork())
        if children[-1] == 0:
            os._exit(train(rank, port, ["--config_path", config, "--logdir", logdir]))
    print(*(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children), flush=True)
