"""The base model's trajectories from noise to video, which the ODE stage learns from.

A name for `longsana ode-pairs`; its text is `longsana/commands/ode_pairs.py`.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the scripts also run from a checkout not installed

from longsana.commands import run

if __name__ == "__main__":
    sys.exit(run("ode-pairs", sys.argv[1:]))
