"""Clips of one's own with captions in, shards of latents out, which flow matching trains on.

A name for `longsana encode`; its text is `longsana/commands/encode.py`.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the scripts also run from a checkout not installed

from longsana.commands import run

if __name__ == "__main__":
    sys.exit(run("encode", sys.argv[1:]))
