"""A training checkpoint in a layout that others read.

A name for `longsana export`; its text is `longsana/commands/export.py`.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the scripts also run from a checkout not installed

from longsana.commands import run

if __name__ == "__main__":
    sys.exit(run("export", sys.argv[1:]))
