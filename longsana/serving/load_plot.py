"""A picture of a load: how much video each viewer had ahead of him, and when he stood still."""

from __future__ import annotations

from html import escape
from itertools import pairwise
from typing import Any

from longsana.serving.pace import SLACK

WIDTH, LEFT, RIGHT, TOP, ROW, GAP, BOTTOM = 960, 112, 24, 44, 44, 16, 64
STEPS = (1, 2, 5, 10, 20, 30, 60, 120, 300, 600, 1800, 3600, 7200, 21600)
"""Seconds between two marks of the axis of time."""
TEXT = 'font-family="sans-serif" font-size="12" fill="#444"'
BUFFER, STALL, CHANGE, WAIT = "#1769aa", "#d62728", "#2a8f2a", "#dddddd"
LEGEND = {BUFFER: "seconds of video ahead", STALL: "stall", CHANGE: "change of prompt", WAIT: "no chunk yet"}


def draw(report: dict[str, Any]) -> str:
    """Draw what `longsana.serving.load.measure` gave, as SVG: a row a viewer, over the time of the load."""
    viewers, everyone = report["viewers"], report["all"]
    most_seconds = max(report["seconds"], 1e-3)
    most_ahead = max((one["ahead"] for viewer in viewers for one in viewer["shown"]), default=1.0)
    height = TOP + len(viewers) * (ROW + GAP) + BOTTOM

    def across(seconds: float) -> float:
        return round(LEFT + seconds / most_seconds * (WIDTH - LEFT - RIGHT), 1)

    title = f"{report['settings']['url']}: {everyone['watched']} of {everyone['viewers']} viewers watched; "
    title += f"{everyone['underruns']} underruns, {everyone['stall_seconds']:.1f} s stalled"
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}">',
        f'<rect width="{WIDTH}" height="{height}" fill="white"/>',
        f'<text x="20" y="24" {TEXT} font-weight="bold">{escape(title)}</text>',
    ]
    for number, viewer in enumerate(viewers):
        top = TOP + number * (ROW + GAP)
        parts += _row(viewer, top, across, most_ahead)
    foot = TOP + len(viewers) * (ROW + GAP)
    step = next((step for step in STEPS if most_seconds / step <= 12), STEPS[-1])
    for mark in range(0, int(most_seconds) + 1, step):
        parts.append(f'<text x="{across(mark)}" y="{foot + 4}" text-anchor="middle" {TEXT}>{mark} s</text>')
    for place, (colour, meaning) in enumerate(LEGEND.items()):
        x = LEFT + 190 * place
        parts.append(f'<rect x="{x}" y="{foot + 24}" width="12" height="12" fill="{colour}"/>')
        parts.append(f'<text x="{x + 18}" y="{foot + 34}" {TEXT}>{meaning}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def _row(viewer: dict[str, Any], top: float, across: Any, most_ahead: float) -> list[str]:
    bottom = top + ROW

    def up(ahead: float) -> float:
        return round(bottom - ahead / most_ahead * ROW, 1)

    def block(start: float, end: float, colour: str) -> str:
        width = max(across(end) - across(start), 1.0)
        return f'<rect x="{across(start)}" y="{top}" width="{width:.1f}" height="{ROW}" fill="{colour}"/>'

    came, ended, shown = viewer["came_at"], viewer["ended_at"], viewer["shown"]
    parts = [
        f'<text x="{LEFT - 44}" y="{top + ROW / 2 + 4}" text-anchor="end" {TEXT}>viewer {viewer["viewer"]}</text>',
        f'<text x="{LEFT - 6}" y="{top + 10}" text-anchor="end" {TEXT}>{most_ahead:.1f} s</text>',
        f'<text x="{LEFT - 6}" y="{bottom}" text-anchor="end" {TEXT}>0</text>',
    ]
    if came is not None:
        parts.append(block(came, shown[0]["at"] if shown else ended, WAIT))
    parts += [block(start, end, STALL) for start, end in stalls(viewer)]
    if line := " ".join(f"{across(at)},{up(ahead)}" for at, ahead in buffer(viewer)):
        parts.append(f'<polyline fill="none" stroke="{BUFFER}" stroke-width="1.5" points="{line}"/>')
    for one in viewer["asked"]:
        x = across(one["at"])
        parts.append(f'<path d="M{x},{bottom} l-4,7 h8 z" fill="{CHANGE}"/>')
    parts.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{bottom}" y2="{bottom}" stroke="#999"/>')
    if viewer["error"]:
        said = escape(f"{viewer['outcome']}: {viewer['error'][:100]}")
        parts.append(f'<text x="{across(ended) + 6}" y="{top + ROW / 2 + 4}" {TEXT}>{said}</text>')
    return parts


def stalls(viewer: dict[str, Any]) -> list[tuple[float, float]]:
    """The times, from and to, for which a viewer stood still; one for each underrun."""
    found = [(one["at"] - one["late"], one["at"]) for one in viewer["shown"] if one["late"] > SLACK]
    left, ended = viewer["open_stall_seconds"], viewer["ended_at"]
    return [*found, (ended - left, ended)] if left else found


def buffer(viewer: dict[str, Any]) -> list[tuple[float, float]]:
    """The points, seconds of the load and seconds of video ahead, between which a viewer's buffer grows or falls."""
    points = []
    shown, ended = viewer["shown"], viewer["ended_at"]
    for one, after in pairwise([*shown, {"at": ended, "ahead": 0.0, "duration": 0.0}] if shown else []):
        points += [(one["at"], one["ahead"] - one["duration"]), (one["at"], one["ahead"])]
        empty = one["at"] + one["ahead"]
        if empty < after["at"]:
            points += [(empty, 0.0), (after["at"], 0.0)]
        elif after["at"] == ended:
            points.append((ended, empty - ended))
    return points
