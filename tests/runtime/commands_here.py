"""Runs commands that it reads from stdin, each in a fork: with faults (faulty.c) and mounts of its own.

A line in: the JSON of {"script", "arguments", "environment", "mounts", "output"}. A line out: the exit status.
Libraries are imported once, which is most of a small command's time.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import json
import os
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]

NEW_MOUNTS = 0x00020000  # CLONE_NEWNS


def run(asked: dict[str, Any]) -> int:
    streams = os.open(asked["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(streams, 1)
    os.dup2(streams, 2)
    if asked["mounts"]:
        assert ctypes.CDLL(None).unshare(NEW_MOUNTS) == 0
        subprocess.run(["sh", "-ec", asked["mounts"]], check=True, stdin=subprocess.DEVNULL)
    for folder in ("TMPDIR", "HOME"):
        os.environ.pop(folder, None)
    os.environ |= asked["environment"]
    os.chdir(asked["environment"].get("PWD", ROOT))
    return load_script(Path(asked["script"])).main(asked["arguments"])


sys.path.insert(0, str(ROOT))
gc.disable()  # imports leave no garbage
for module in ("longsana.inference.batch", "longsana.training.run"):
    importlib.import_module(module)
load_script = importlib.import_module("tests.scripts").load_script
gc.freeze()  # or each command would go through what is imported, as often as it looks for garbage
gc.enable()
for line in sys.stdin:
    child = os.fork()
    if child == 0:
        status = 99
        try:
            status = run(json.loads(line))
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
