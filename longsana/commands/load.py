"""Put viewers on a live server, and measure what they get: `longsana serve` elsewhere, this on any machine.

    longsana load http://127.0.0.1:8000 --viewers 4 --seconds 120 --changes_per_minute 2 --out output/load.json

Each viewer shows its chunks in media time and changes the prompt at random moments. A table is printed; --out has all
figures, and a plot of the same name with .svg beside it; docs/live.md says what each figure means. The API key is in
LONGSANA_API_KEY, where the server asks for one. No torch is needed, but the extra: pip install -e '.[serve]'.
Exit status: 0 somebody watched to the end, however it stalled; 1 nobody did, or the disk is full or broken; 2 bad
input; 128 + n stopped by signal n, and then nothing is written.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlsplit

from longsana.data.prompts import place, read_prompts
from longsana.runtime import stop
from longsana.runtime.commandline import Parser, number, run_alone, typed_path, whole
from longsana.runtime.errors import InputError
from longsana.runtime.files import atomic_write_text, check_writable
from longsana.serving.guard import read_key

log = logging.getLogger("longsana")


def load(arguments: Sequence[str]) -> int:
    """Read the command line, check it, and measure; returns the exit status."""
    parser = Parser(__doc__)
    parser.add_argument("url", help="of the server: http://HOST:PORT")
    parser.add_argument("--viewers", type=whole, default=4, help="(default: %(default)s)")
    parser.add_argument("--seconds", type=number, default=120.0, help="for which all are there (default: %(default)s)")
    parser.add_argument(
        "--changes_per_minute", type=number, default=2.0, help="of prompt, of each viewer (default: %(default)s)"
    )
    parser.add_argument(
        "--spacing", type=number, default=1.0, help="seconds between two viewers' coming (default: %(default)s)"
    )
    parser.add_argument("--txt_file", type=typed_path, help="prompts, one a line (default: two that are built in)")
    parser.add_argument("--seed", type=whole, default=0, help="of moments and prompts of changes, and of the videos")
    parser.add_argument("--size", help="WIDTHxHEIGHT of the videos (default: the server's)")
    parser.add_argument("--chunk_frames", type=whole, help="latent frames of a chunk (default: the server's)")
    parser.add_argument("--lead", type=number, help="seconds that chunks come ahead of time (default: the server's)")
    parser.add_argument("--out", type=typed_path, default=Path("output/load.json"), help="(default: %(default)s)")
    options = parser.parse_args(arguments)
    if not _is_server(options.url):
        raise InputError(f"{options.url}: must be http://HOST:PORT or https://HOST, as the server says when it starts")
    bounds = {"viewers": (1, 1000), "seconds": (1, 86_400), "changes_per_minute": (0, 600), "spacing": (0, 3600)}
    bounds |= {"seed": (-(2**62), 2**62), "chunk_frames": (1, 1000), "lead": (0, 3600)}
    for name, (least, most) in bounds.items():
        value = getattr(options, name)
        if value is not None and not least <= value <= most:
            raise InputError(f"--{name} {value}: must be from {least} to {most}")
    if options.size is not None and not re.fullmatch(r"\d{1,5}x\d{1,5}", options.size):
        raise InputError(f"--size {options.size}: must be WIDTHxHEIGHT, such as 832x480")
    if options.out.suffix != ".json":
        raise InputError(f"--out {options.out}: must end in .json; the plot beside it ends in .svg")
    if importlib.util.find_spec("websockets") is None:
        raise InputError("viewers need websockets: pip install -e '.[serve]'")
    from longsana.serving.load import PROMPTS, Load, measure, table
    from longsana.serving.load_plot import draw

    asked = Load(
        options.url,
        options.viewers,
        options.seconds,
        options.changes_per_minute,
        options.spacing,
        PROMPTS if options.txt_file is None else _prompts(options.txt_file),
        options.seed,
        options.size,
        options.chunk_frames,
        options.lead,
    )
    key = read_key()
    check_writable(options.out.parent, "--out")
    for path in (options.out, options.out.with_suffix(".svg")):
        if path.is_dir():
            raise InputError(f"--out {options.out}: {path} is a folder; choose another name")
    log.info("%d viewers of %s for %.0f s", asked.viewers, asked.url, asked.stay(0))
    with stop.deferred() as stopped:
        report = measure(asked, key, stopped)
    stop.check()
    atomic_write_text(options.out, json.dumps(report, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    atomic_write_text(options.out.with_suffix(".svg"), draw(report))
    print(table(report))
    for one in report["viewers"]:
        if one["error"]:
            log.info("viewer %d %s: %s", one["viewer"], one["outcome"], one["error"])
    if report["server"]["error"]:
        log.warning("the server's own figures are missing: %s", report["server"]["error"])
    log.info("%s, and %s", options.out, options.out.with_suffix(".svg").name)
    if not report["all"]["watched"]:
        print(f"failed: nobody watched {asked.url} to the end", file=sys.stderr)
        return 1
    return 0


def _is_server(url: str) -> bool:
    """Tell whether a URL names a server and nothing else; a report, where it stands, has no password."""
    try:
        parts = urlsplit(url)
        named = parts.hostname is not None and parts.port != 0 and "@" not in parts.netloc
    except ValueError:  # half an IPv6 address, or a port that is none
        return False
    return named and parts.scheme in ("http", "https") and not (parts.query or parts.fragment)


def _prompts(path: Path) -> tuple[str, ...]:
    """Read a file of prompts, none of which is a story: a live session is told one prompt at a time."""
    prompts = read_prompts(path, height=0, width=0, aspect_ratio_type="none")
    for prompt in prompts:
        if len(prompt.parts) > 1:
            raise InputError(f"{place(path, prompt.line)}: a story; write its prompts on lines of their own")
        if prompt.seed is not None or prompt.frames is not None or prompt.height:
            raise InputError(f"{place(path, prompt.line)}: seed, length and size have no meaning here; remove them")
    return tuple(prompt.text for prompt in prompts)


def main(arguments: Sequence[str]) -> int:
    return run_alone(lambda: load(arguments), after_stop="nothing is written")
