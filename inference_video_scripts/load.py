"""Viewers that measure a live server.

A name for `longsana load`; its text is `longsana/commands/load.py`.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the scripts also run from a checkout not installed

from longsana.commands import run

if __name__ == "__main__":
    sys.exit(run("load", sys.argv[1:]))
