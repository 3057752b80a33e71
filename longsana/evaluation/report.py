"""A folder of videos to figures, a table, a plot, strips of pictures and a page."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor

from longsana.encoders.closeness import psnr, ssim
from longsana.evaluation import measures
from longsana.evaluation.flow import FlowMeter
from longsana.evaluation.page import page
from longsana.evaluation.videos import Video, frame_rate, read_pieces
from longsana.runtime import stop, strips
from longsana.runtime.errors import InputError
from longsana.runtime.files import atomic_write_text, whole_file
from longsana.runtime.logging import Wandb
from longsana.shapes.scenes import COLOURS
from longsana.shapes.sight import Seen, observe
from longsana.shapes.verifier import Verdicts, all_in_view, judge, score

LENGTHS = (5, 30, 60)
"""Seconds of the stretches from the start that are scored apart from the whole."""
CURVES = ("adherence", "persistence", "identity")
LOOKS = ("saturation", "contrast", "sharpness")
FREE = (*LOOKS, "movement", "flow", "PSNR")
"""Figures whose axes are not those of shares that may be all."""
ENDS = "drift, 15 % ends"
NOT_SCORED = "not scored"
MOST_DECIBELS = 100.0
"""PSNR of equal pictures, and of what comes closer, in a mean."""
SHEET = 24
"""Videos whose pictures are shown together, and which are shown on wandb."""
NUMBERS, PICTURES = "evaluation.json", ("evaluation.png", "evaluation_frames.png")
"""Files of a report: all its numbers, its plot and its strips."""

Row = dict[str, Any]
"""One line of the table: a name, and numbers by column; None where a figure is undefined."""
Curves = Mapping[str, Sequence[float | None]]
"""Values a second, by what they are of; None where undefined."""


class Against:
    """Compares a video that comes in pieces with another one, frame by frame."""

    def __init__(self, path: Path) -> None:
        self._path, self._pieces = path, read_pieces(path)
        self._psnr: list[Tensor] = []
        self._ssim: list[Tensor] = []
        self._frames = 0

    def add(self, pictures: Tensor) -> None:
        """Compare the next piece, (1, F, H, W, 3), uint8.

        Raises:
            InputError: the other one is broken, shorter, or of another size.
        """
        other = next(self._pieces, pictures[:, :0])
        own, its = (f"{piece.shape[2]}x{piece.shape[3]}" for piece in (pictures, other))
        if own != its:
            raise self._refusal(f"pictures of {its}", f"has {own}")
        if other.shape[1] != pictures.shape[1]:
            shorter = self._frames + min(other.shape[1], pictures.shape[1])
            ends, goes_on = f"ends after {shorter} frames", "goes on"
            raise self._refusal(*((ends, goes_on) if other.shape[1] < pictures.shape[1] else (goes_on, ends)))
        self._frames += other.shape[1]
        try:
            self._ssim.append(ssim(pictures, other.to(pictures.device)))
        except ValueError as error:
            raise InputError(f"{self._path}: cannot be compared: {error}") from error
        self._psnr.append(psnr(pictures, other.to(pictures.device)).clamp(max=MOST_DECIBELS))

    def result(self) -> dict[str, Tensor]:
        """PSNR in dB, at most 100, and SSIM of each frame, (1, F).

        Raises:
            InputError: the other one is longer.
        """
        if next(self._pieces, None) is not None:
            raise self._refusal("goes on", f"ends after {self._frames} frames")
        return {"PSNR": torch.cat(self._psnr, 1), "SSIM": torch.cat(self._ssim, 1)}

    def _refusal(self, its: str, own: str) -> InputError:
        return InputError(f"{self._path}: {its}, and the video of its name {own}; cut both to the same")


def examine(
    video: Video, device: torch.device, *, name: str = "", against: Path | None = None, flow: bool = False
) -> dict[str, Any]:
    """Measure one video, read in pieces: "row" for the table, "scores" by length, and "curves" by second.

    "velocity": of each colour that is seen, x (to the right) and y (down) in pixels a frame, by second. "paths": its
    own and that of the other one. "strip": pictures (H, W, 3), uint8. name: in the table; else the file's. against: the
    video to compare it with. flow: whether its optical flow is measured.
    """
    promise, rate = video.promise, frame_rate(video.path)
    seen: list[Seen] = []
    strip, meter, other = strips.Strip(), FlowMeter() if flow else None, Against(against) if against else None

    def see(pictures: Tensor) -> None:
        strip.add(pictures[0].cpu().numpy())
        if promise:
            seen.append(observe(pictures))
        if meter is not None:
            meter.add(pictures)
        if other is not None:
            other.add(pictures)

    figures = measures.measure_pieces(read_pieces(video.path), device, see)
    frames = figures.change.shape[1]

    row: Row = {"video": name or video.path.name, "seconds": round((frames - 1) / rate, 2)}
    curves: dict[str, Tensor] = {}
    scores = {}
    velocity = {}
    compares = torch.ones_like(figures.change, dtype=torch.bool)
    if promise:
        whole = Seen.join(seen)
        for index, colour in enumerate(COLOURS):
            if whole.present[..., index].any():
                own = whole.velocity[..., index, :].unbind(-1)
                velocity[colour] = {axis: measures.per_second(part, rate) for axis, part in zip("xy", own, strict=True)}
        verdicts = judge(whole, [promise])
        row |= score(verdicts).as_dict()
        for seconds in LENGTHS:
            length = round(seconds * rate) + 1  # the first frame is at second 0
            if length <= frames:
                scores[f"{seconds} s"] = score(judge(whole.first(length), [promise])).as_dict()
        curves |= {name: measures.per_second(getattr(verdicts, name), rate) for name in CURVES}
        # Without what is away the picture looks otherwise, which is no drift.
        compares = all_in_view(whole, [promise])
    else:
        row |= dict.fromkeys((*Verdicts._fields, "adherence"), NOT_SCORED)
    series = {look: getattr(figures, look).where(compares, torch.nan) for look in LOOKS}
    for look, values in series.items():
        row[f"{look} drift"] = float(measures.drift(values, rate))
        curves[f"{look} drift"] = measures.drift_curve(values, rate)
    curves |= {look: measures.per_second(values, rate) for look, values in series.items()}
    row["seam index"] = float(measures.seam_index(figures.change, video.boundaries, video.time_stride))
    moves = {"movement": figures.change} | ({"flow": meter.result()} if meter is not None else {})
    for move, values in moves.items():
        row[move] = float(measures.motion(values, rate))
        curves[move] = measures.per_second(values * rate, rate)
    compared = other.result() if other is not None else {}
    for measure, values in compared.items():
        row[measure] = float(values.mean())
        curves[measure] = measures.per_second(values, rate)
    for measure, values in (series | moves | compared).items():
        row[f"{measure} {ENDS}"] = float(measures.end_drift(values))
    told = {"row": row, "prompt": video.prompt, "scores": scores, "curves": curves, "velocity": velocity}
    paths = [str(path) for path in (video.path, against) if path is not None]
    return {**_plain(told), "paths": paths, "strip": strip.pictures()}


def summarize(examined: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Average the figures of several videos: each number over those that have it."""
    curves = {}
    for name in dict.fromkeys(name for item in examined for name in item["curves"]):
        series = [item["curves"][name] for item in examined if name in item["curves"]]
        longest = max(map(len, series))
        curves[name] = [_mean(values[i] for values in series if i < len(values)) for i in range(longest)]
    scores = {
        length: _mean_row([item["scores"][length] for item in examined if length in item["scores"]])
        for length in dict.fromkeys(length for item in examined for length in item["scores"])
    }
    row = _mean_row([item["row"] for item in examined]) | {"video": f"mean of {len(examined)}"}
    return {"row": row, "scores": scores, "curves": curves}


def table(rows: Sequence[Row]) -> str:
    """Markdown, a line a row; the columns are those of all rows that have a value, in order of appearance."""
    cells = _cells(rows)
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
    aligned = [
        [
            text.ljust(width) if not i else text.rjust(width)
            for i, (text, width) in enumerate(zip(line, widths, strict=True))
        ]
        for line in cells
    ]
    rule = ["-" * width if not i else "-" * (width - 1) + ":" for i, width in enumerate(widths)]
    return "\n".join(f"| {' | '.join(line)} |" for line in (aligned[0], rule, *aligned[1:])) + "\n"


def _cells(rows: Sequence[Row]) -> list[list[str]]:
    """The table as text, its head first."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    columns = [column for column in columns if any(row.get(column) not in (None, "", NOT_SCORED) for row in rows)]
    lines = ([_cell(column, row.get(column)) for column in columns] for row in rows)
    # A name may have what ends a cell, or a line.
    return [columns, *([cell.replace("|", "\\|").replace("\n", " ") for cell in line] for line in lines)]


def load_matplotlib() -> None:
    """Import matplotlib, for pictures without a screen.

    Raises:
        InputError: it is not installed, or has no folder for its cache.
    """
    try:
        import matplotlib as mpl
    except ImportError as error:
        raise InputError("plots need the package matplotlib; pip install -e '.[plot]'") from error
    except OSError as error:
        reason = "matplotlib needs a folder for its cache, and neither the home nor the temporary one can be written to"
        raise InputError(f"{reason}; give it one: TMPDIR or MPLCONFIGDIR") from error
    mpl.use("Agg")


def plot(
    curves: Mapping[str, Curves], path: Path, *, behind: Sequence[Curves] = (), every: int = 1, least: float = 0.0
) -> None:
    """Write a PNG with a panel for each figure and a line for each name: of one model, or of several to compare.

    curves: by the name of the line, then of the figure; values a second. behind: those that are thin and have no names.
    every: seconds whose mean is a point. least: where the axes of shares begin.
    """
    load_matplotlib()
    from cycler import cycler
    from matplotlib import pyplot, ticker

    panels = list(dict.fromkeys(panel for figures in curves.values() for panel in figures))
    columns = min(len(panels), 3)
    colours = pyplot.rcParams["axes.prop_cycle"]
    lines = math.ceil(len(panels) / columns)
    figure, axes = pyplot.subplots(
        lines, columns, figsize=(4.2 * columns, 2.9 * lines), squeeze=False, layout="constrained"
    )
    for axis, panel in zip(axes.flat, panels, strict=False):
        axis.set_prop_cycle(cycler(linestyle=["-", "--", ":"]) * colours)  # no two lines alike
        thin: dict[str, Any] = {"color": "0.8", "linestyle": "-", "linewidth": 0.6, "zorder": 1}
        drawn = [(figures, thin) for figures in behind] + [(own, {"label": name}) for name, own in curves.items()]
        for figures, style in drawn:
            own = figures.get(panel, ())
            starts = range(0, len(own), every)
            means = [_mean(own[start : start + every]) for start in starts]
            values = [math.nan if value is None else value for value in means]
            marker = "." if len(values) == 1 else None  # which is no line
            axis.plot([start + every / 2 for start in starts], values, marker=marker, **style)
        if "drift" in panel:
            axis.axhline(0, color="0.7", linewidth=0.8, zorder=0)
            low, high = axis.get_ylim()  # what is less than a tenth shall not fill the panel
            axis.set_ylim(min(low, -0.1), max(high, 0.1))
            axis.yaxis.set_major_formatter(ticker.PercentFormatter(1))
        elif panel in FREE:
            low, high = axis.get_ylim()
            axis.set_ylim(*((low, high) if panel == "PSNR" else (0, 1.05 * high)))
        else:
            axis.set_ylim(least - 0.03 * (1 - least), 1 + 0.03 * (1 - least))
        axis.set_xlim(0, max(1, *(len(figures.get(panel, ())) for figures, _ in drawn)))
        axis.set_title(panel)
        axis.set_xlabel("seconds")
        axis.grid(alpha=0.3)
    spare, names = axes.flat[len(panels) :], axes.flat[0].get_legend_handles_labels()
    for axis in spare:
        axis.axis("off")
    if len(spare) and len(curves) > 4:
        spare[0].legend(*names, loc="center left", frameon=False)
    else:
        fit = int(11 * figure.get_figwidth()) // (8 + max(map(len, curves)))  # 11 characters take an inch
        figure.legend(*names, loc="outside lower center", ncols=min(max(fit, 1), 4))
    with whole_file(path) as partial:
        figure.savefig(partial, dpi=110)
    pyplot.close(figure)


def write_report(
    examined: Sequence[Mapping[str, Any]], summary: Mapping[str, Any], skipped: Mapping[str, str], folder: Path
) -> str:
    """Write evaluation.json, .md, .png, .html and evaluation_frames.png to the folder; returns the table.

    summary: see `summarize`. skipped: why a video is not among the examined ones, by its name.
    """
    rows = [item["row"] for item in examined] + [summary["row"]]
    text = table(rows)
    if summary["scores"]:
        text += "\n" + table([{"from the start": length} | row for length, row in summary["scores"].items()])
    if skipped:
        text += "\nSkipped:\n\n" + "".join(f"* {name}: {reason}\n" for name, reason in skipped.items())
    videos = [{key: value for key, value in item.items() if key not in ("paths", "strip")} for item in examined]
    record = {"mean": summary, "videos": videos, "skipped": dict(skipped)}
    head, *lines = _cells(rows)
    figures = [dict(zip(head[1:], line[1:], strict=True)) for line in lines]
    title = f"{len(examined)} videos"
    with stop.deferred():  # all are of one evaluation
        atomic_write_text(folder / NUMBERS, json.dumps(record, indent=1, ensure_ascii=False) + "\n")
        atomic_write_text(folder / "evaluation.md", text)
        several = [item["curves"] for item in examined] if len(examined) > 1 else []
        plot({summary["row"]["video"]: summary["curves"]}, folder / PICTURES[0], behind=several)
        strips.write_sheet([strips.Row(_words(item), item["strip"]) for item in examined], folder / PICTURES[1])
        html = page(title, [head, *lines], list(zip(examined, figures, strict=False)), PICTURES, skipped, folder)
        atomic_write_text(folder / "evaluation.html", html)
    return text


def show(examined: Sequence[Mapping[str, Any]], summary: Mapping[str, Any], folder: Path, wandb: Wandb) -> None:
    """Show on wandb what `write_report` has written to a folder.

    The means by second are in `by second/FIGURE`, with the second as step; those of the whole videos in `mean/FIGURE`;
    every video's in the table `videos`; the two pictures, and as many videos as there are strips.
    """
    last = max(map(len, summary["curves"].values())) - 1
    for second in range(last + 1):
        values = {name: own[second] for name, own in summary["curves"].items() if second < len(own)}
        wandb.log(second, {f"by second/{name}": value for name, value in values.items() if value is not None})
    wandb.log(last, {f"mean/{name}": value for name, value in summary["row"].items() if isinstance(value, int | float)})
    columns = list(dict.fromkeys(column for item in examined for column in item["row"]))
    cells = [[item["row"].get(column) for column in columns] for item in examined]
    # A column has one type.
    wandb.table(last, "videos", [columns, *([None if cell == NOT_SCORED else cell for cell in row] for row in cells)])
    for name in PICTURES:
        wandb.picture(last, PurePosixPath(name).stem, folder / name)
    for item in examined:
        # wandb takes the kinds of videos that browsers show.
        if item["strip"] and not item["paths"][0].lower().endswith(".mov"):
            wandb.video(last, f"video/{PurePosixPath(item['row']['video']).with_suffix('')}", Path(item["paths"][0]))


def _words(item: Mapping[str, Any]) -> str:
    """Words above a video's strip."""
    return f"{item['row']['video']}: {item['prompt']}" if item["prompt"] else str(item["row"]["video"])


def _cell(column: str, value: Any) -> str:
    if value is None:
        return "-"
    if not isinstance(value, float):
        return str(value)
    if "drift" in column:
        return f"{value:+.1%}"
    if column == "SSIM":
        return f"{value:.4f}"
    return f"{value:.1%}" if column in (*Verdicts._fields, "adherence") else f"{value:.2f}"


def _mean(values: Any) -> float | None:
    numbers = [value for value in values if isinstance(value, int | float)]
    return math.fsum(numbers) / len(numbers) if numbers else None


def _mean_row(rows: Sequence[Row]) -> Row:
    return {column: _mean(row.get(column) for row in rows) for column in dict.fromkeys(c for row in rows for c in row)}


def _plain(value: Any) -> Any:
    """Convert figures to what JSON has: lists, and None instead of nan; a tensor is that of one video."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, Tensor):
        return [_plain(item) for item in value[0].tolist()]
    return None if isinstance(value, float) and not math.isfinite(value) else value
