"""Draw what reports of benchmark.py hold: `python asset/full_size/plot.py`.

memory.svg is of h100.json, minute.svg of h200.json.
"""

from __future__ import annotations

import json
from pathlib import Path

HERE = Path(__file__).parent
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 760, 300, 60, 30, 46, 48
MOST_FRAMES, MOST_GIB = 10_000, 60
ENTRY = 152.53 / 1024  # GiB a chunk where each keeps an entry of its own, as published (480p)
TEXT = 'font-family="sans-serif" font-size="13" fill="#444"'


PARTS = {"denoise": "#1769aa", "absorb": "#7fb2dc", "decode": "#d98032", "write": "#8a8a8a", "text": "#444"}
ROWS = {
    "480p": "832x480, full decoder",
    "480p, taew2_1": "832x480, taew2_1",
    "480p, taew2_1, float8": "832x480, taew2_1, float8",
    "720p": "1280x704, full decoder",
    "720p, taeltx_2": "1280x704, taeltx_2",
}


def at(frames: float, gib: float) -> tuple[float, float]:
    x = LEFT + frames / MOST_FRAMES * (WIDTH - LEFT - RIGHT)
    return round(x, 1), round(HEIGHT - BOTTOM - gib / MOST_GIB * (HEIGHT - TOP - BOTTOM), 1)


def line(points: list[tuple[float, float]], style: str) -> str:
    return f'<polyline fill="none" {style} points="{" ".join(f"{x},{y}" for x, y in points)}"/>'


def minute() -> list[str]:
    """Draw the seconds of each part of a minute, a row a report."""
    reports = json.loads((HERE / "h200.json").read_text())
    left, row, scale = 200, 34, 16
    height = 64 + row * len(ROWS) + 40
    device = reports["480p"]["machine"]["device"]
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}">',
        f'<rect width="{WIDTH}" height="{height}" fill="white"/>',
        f'<text x="20" y="24" {TEXT} font-weight="bold">961 frames (one minute), prompt to mp4, 2B, {device}: seconds'
        "</text>",
    ]
    for number, (name, title) in enumerate(ROWS.items()):
        report, x, y = reports[name], float(left), 44 + row * number
        parts.append(f'<text x="{left - 10}" y="{y + 16}" text-anchor="end" {TEXT}>{title}</text>')
        for part, colour in PARTS.items():
            width = scale * report["seconds"][part]
            parts.append(f'<rect x="{x:.1f}" y="{y}" width="{width:.1f}" height="22" fill="{colour}"/>')
            x += width
        told = f"{report['seconds']['wall']:.1f} s, {report['FPS']['end to end']:.0f} frames a second"
        parts.append(f'<text x="{x + 8:.1f}" y="{y + 16}" {TEXT}>{told}</text>')
    for number, (part, colour) in enumerate(PARTS.items()):
        x = left + 100 * number
        parts.append(f'<rect x="{x}" y="{height - 36}" width="14" height="14" fill="{colour}"/>')
        parts.append(f'<text x="{x + 20}" y="{height - 24}" {TEXT}>{part}</text>')
    return [*parts, "</svg>"]


def main() -> None:
    (HERE / "minute.svg").write_text("\n".join(minute()) + "\n")
    reports = json.loads((HERE / "h100.json").read_text())
    records = [report for name, report in reports.items() if name.isdigit()]
    peaks = [(record["video"]["frames"], record["memory"]["GPU peak"] / 2**30) for record in records]
    first = peaks[0][1]
    chunks = [(frames, first + ENTRY * max((frames - 1) / 40 - 1, 0)) for frames, _ in peaks]
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        f'<text x="{LEFT}" y="24" {TEXT} font-weight="bold">Peak GPU memory, prompt to mp4, 2B at 832x480, '
        f"{records[0]['machine']['device']}</text>",
    ]
    for gib in range(0, MOST_GIB + 1, 20):
        (x0, y), (x1, _) = at(0, gib), at(MOST_FRAMES, gib)
        parts.append(line([(x0, y), (x1, y)], 'stroke="#ddd"'))
        parts.append(f'<text x="{x0 - 8}" y="{y + 4}" text-anchor="end" {TEXT}>{gib} GiB</text>')
    for minutes in range(0, 11, 2):
        x, y = at(minutes * 960, 0)
        parts.append(f'<text x="{x}" y="{y + 20}" text-anchor="middle" {TEXT}>{minutes} min</text>')
    parts.append(line([at(*point) for point in chunks], 'stroke="#bbb" stroke-width="2" stroke-dasharray="6 5"'))
    parts.append(line([at(*point) for point in peaks], 'stroke="#1769aa" stroke-width="3"'))
    for point in peaks:
        x, y = at(*point)
        parts.append(f'<circle cx="{x}" cy="{y}" r="5" fill="#1769aa"/>')
    x, y = at(3700, 16)
    parts.append(
        f'<text x="{x}" y="{y + 6}" {TEXT}>measured: {first:.2f} GiB at 81 frames, '
        f"{peaks[-1][1]:.2f} at {peaks[-1][0]:,}</text>"
    )
    x, y = at(300, 44)
    parts.append(f'<text x="{x}" y="{y}" {TEXT}>computed: the same with a cache entry a chunk</text>')
    (HERE / "memory.svg").write_text("\n".join([*parts, "</svg>"]) + "\n")


if __name__ == "__main__":
    main()
