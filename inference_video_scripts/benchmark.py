"""What a video costs on this machine.

A name for `longsana benchmark`; its text is `longsana/commands/benchmark.py`.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the scripts also run from a checkout not installed

from longsana.commands import run

if __name__ == "__main__":
    sys.exit(run("benchmark", sys.argv[1:]))
