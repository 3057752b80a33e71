"""A folder of videos in, figures out.

A name for `longsana evaluate`; its text is `longsana/commands/evaluate.py`.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the scripts also run from a checkout not installed

from longsana.commands import run

if __name__ == "__main__":
    sys.exit(run("evaluate", sys.argv[1:]))
