"""Live videos in a browser, and videos by HTTP.

A name for `longsana serve`; its text is `longsana/commands/serve.py`.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the scripts also run from a checkout not installed

from longsana.commands import run

if __name__ == "__main__":
    sys.exit(run("serve", sys.argv[1:]))
