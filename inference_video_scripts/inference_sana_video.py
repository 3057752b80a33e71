"""A file of prompts in, a folder of videos out.

A name for `longsana generate`; its text is `longsana/commands/generate.py`.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the scripts also run from a checkout not installed

from longsana.commands import run

if __name__ == "__main__":
    sys.exit(run("generate", sys.argv[1:]))
