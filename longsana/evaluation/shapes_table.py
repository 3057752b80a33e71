"""The small world's table: its rows, which are networks and settings, how commands share them, and its text.

Their scores are of `score_model`; `longsana shapes` (`longsana/commands/shapes.py`) has the tools.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from longsana.config import InferenceConfig, load_config
from longsana.encoders.tiny_layouts import FULL, SHAPES
from longsana.runtime.files import atomic_write_text, open_exclusive
from longsana.runtime.hub import locate

log = logging.getLogger("longsana")

CONFIGS = "configs/sana_video_config/longsana/shapes"
HELD_OUT_PROMPTS = 64
DECODER = f"decoder/{SHAPES}.safetensors"
"""A part that ships in the folder of the VAE, whose latents it decodes."""
TRUTH = "ground truth through the VAE"


@dataclass(frozen=True)
class Row:
    """A line of the table.

    weights: the part with the network; empty for the truth. settings: of the sampler. lengths: seconds from the start,
    scored apart. prompts, seeds: at most so many. steps: what the table says of the sampler.
    full_decoder: shows the VAE's pictures instead of the tiny decoder's, which are the default's.
    """

    name: str
    weights: str
    settings: tuple[str, ...] = ()
    lengths: tuple[int, ...] = (5, 30, 60)
    prompts: int = HELD_OUT_PROMPTS
    seeds: int = 3
    steps: int = 4
    full_decoder: bool = False


BASE_SETTINGS = (
    "scheduler.sampling_algo=flow_euler",
    "scheduler.inference_flow_shift=8.0",
    "scheduler.num_inference_steps=30",
    "sampling.cfg_scale=1.5",
    "sampling.null_caption=learned",
)
WHOLE_PAST = ("model.state_decay=1",)
"""The published sum of everything; the default config forgets half of the past a chunk."""
AS_ON_A_CPU = ("model.dtype=float32", "vae.weight_dtype=float32", "text_encoder.dtype=float32")
"""Where the default is at home: in bfloat16 the base model has half a point less of everything."""
TWO_STEPS = ("scheduler.denoising_step_list=[1000,800]", "scheduler.absorb=last_step")
MINUTE, LONG = (5, 60), (5, 60, 600)
TEN = ", ten minutes"


def _ablations(name: str, weights: str, settings: tuple[str, ...], steps: int = 4) -> tuple[Row, Row]:
    """Rows of a network and settings that others are compared with: a minute, and ten of half as many prompts."""
    return (
        Row(name, weights, settings, MINUTE, prompts=32, seeds=1, steps=steps),
        Row(f"{name}{TEN}", weights, settings, (600,), prompts=16, seeds=1, steps=steps),
    )


ROWS = (
    Row(TRUTH, "", lengths=MINUTE, seeds=1, steps=0, full_decoder=True),
    Row("ground truth through the tiny decoder", "", lengths=MINUTE, seeds=1, steps=0),
    Row("base model", "base", BASE_SETTINGS, lengths=(5,), steps=30),
    Row("ODE-initialised", "ode", lengths=MINUTE),
    Row("Self-Forcing", "self_forcing", lengths=MINUTE),
    Row("LongSANA", "longsana", lengths=MINUTE),
    Row(f"LongSANA{TEN}", "longsana", lengths=LONG, prompts=32, seeds=1),
    Row("LongSANA, full decoder", "longsana", lengths=MINUTE, prompts=32, seeds=1, full_decoder=True),
    Row("two passes", "two_step", TWO_STEPS, lengths=MINUTE, steps=2),
    Row(f"two passes{TEN}", "two_step", TWO_STEPS, lengths=LONG, prompts=32, seeds=1, steps=2),
    *_ablations("two passes by consistency", "two_step_consistency", TWO_STEPS, 2),
    *_ablations("two passes, untrained", "longsana", TWO_STEPS, 2),
    *_ablations("no clean absorbing pass", "longsana", ("scheduler.absorb=last_step",)),
    *_ablations("the whole past, trained", "whole_longsana", WHOLE_PAST),
    *_ablations("the whole past, untrained", "longsana", WHOLE_PAST),
    *_ablations("num_cached_blocks 1, untrained", "longsana", (*WHOLE_PAST, "model.num_cached_blocks=1")),
)
PLOTTED = (
    *("LongSANA", "two passes", "no clean absorbing pass", "the whole past, trained", "the whole past, untrained"),
    *("two passes by consistency", "Self-Forcing", "ODE-initialised", "ground truth through the tiny decoder"),
)
"""Rows whose curves are plotted, in the order of their colours."""


def sampler(parts: Path, row: Row, *, tiny: bool = False) -> InferenceConfig:
    """The default config with a row's parts and settings."""
    settings = [*AS_ON_A_CPU, f"vae.vae_pretrained={parts / 'vae'}"]
    settings += [f"text_encoder.text_encoder_name={parts / 'text_encoder'}", *row.settings]
    if row.full_decoder:
        settings += [f"vae.decoder={FULL}"]
    else:
        # What ships has it beside the VAE.
        places = (parts / DECODER, parts / "vae" / Path(DECODER).name)
        decoder = next((place for place in places if place.exists()), places[0])
        settings += [f"vae.decoder={SHAPES}", f"vae.decoder_pretrained={decoder}"]
    if row.weights:
        settings += [f"model.load_from={parts / row.weights}.safetensors"]
    if tiny and row.name == "base model":
        settings += ["scheduler.num_inference_steps=2"]
    return load_config(locate(f"{CONFIGS}/longsana.yaml", "the config"), settings, InferenceConfig)


def score_each(path: Path, rows: Mapping[str, Callable[[], dict[str, Any]]]) -> dict[str, Any]:
    """Score each row that has not been, in a file of its own beside `path`; that has them all, once they are there.

    Commands that do so at the same time share the rows.
    """
    own = {row: path.with_name(f"{path.stem}_{row.replace(' ', '_').replace(',', '')}.json") for row in rows}

    def score(row: str) -> None:
        if own[row].exists():
            return
        started = time.perf_counter()
        result = rows[row]()
        result["seconds"] = round(time.perf_counter() - started, 1)
        atomic_write_text(own[row], json.dumps(result) + "\n")
        log.info("%s: %.0f s", row, result["seconds"])

    while sum(_alone(own[row], partial(score, row)) for row in rows) < len(rows):
        time.sleep(1)  # for others; what they do not end is scored here
    scores = {row: json.loads(own[row].read_text(encoding="utf-8")) for row in rows}
    while not _alone(path, lambda: atomic_write_text(path, json.dumps(scores) + "\n")):
        time.sleep(0.1)
    return scores


def _alone(product: Path, make: Callable[[], None]) -> bool:
    """Call `make`, unless another command is making this file; whether it was called."""
    claim = product.with_name(f".{product.stem}.lock")
    try:
        file = open_exclusive(claim)
    except BlockingIOError:
        return False
    with file:
        make()
        claim.unlink(missing_ok=True)
    return True


def render_table(scores: dict[str, Any], speeds: dict[str, float]) -> str:
    """Markdown: a line a model and length."""
    from longsana.evaluation.report import table
    from longsana.evaluation.score_model import DRIFT, FIGURES, RIGHT

    lines = []
    steps = {row.name: row.steps for row in ROWS}
    for name, score in scores.items():
        for seconds, figures in score["figures"].items():
            lines.append(
                {
                    "model": name,
                    "seconds": int(seconds),
                    **{figure: percent(figures[figure]) for figure in (*FIGURES, RIGHT) if figure in figures},
                    "seam index": _number(figures["seam index"]),
                    DRIFT: percent(figures[DRIFT]),
                    "steps": steps[name] or "",
                    "FPS on two cores": f"{speeds[name]:.1f}" if name in speeds else "",
                    "videos": f"{score['videos']} x {score['seeds']}",
                }
            )
    return table(lines)


def percent(value: Sequence[float | None]) -> str:
    mean, spread = value
    if mean is None:
        return ""
    return f"{100 * mean:.1f} %" if spread is None else f"{100 * mean:.1f} ± {100 * spread:.1f} %"


def _number(value: Sequence[float | None]) -> str:
    mean, spread = value
    if mean is None:
        return ""
    return f"{mean:.3f}" if spread is None else f"{mean:.3f} ± {spread:.3f}"
