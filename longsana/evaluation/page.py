"""One HTML page of an evaluation: its table, its plot, and every video with its figures, to be opened in a browser."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

STYLE = """body{font:14px/1.4 system-ui,sans-serif;margin:2em;color:#222}table{border-collapse:collapse;margin:1em 0}
td,th{padding:.2em .7em;border-bottom:1px solid #ddd;text-align:right}td:first-child,th:first-child{text-align:left}
.videos{display:grid;grid-template-columns:repeat(auto-fill,minmax(20em,1fr));gap:1.5em}video,img{max-width:100%}
figure{margin:0}figcaption{overflow-wrap:anywhere}
dl{display:grid;grid-template-columns:auto 1fr;gap:0 .7em;margin:.3em 0}
dd{margin:0;text-align:right}"""


def page(
    title: str,
    rows: Sequence[Sequence[str]],
    videos: Sequence[tuple[Mapping[str, Any], Mapping[str, str]]],
    pictures: Sequence[str],
    skipped: Mapping[str, str],
    folder: Path,
) -> str:
    """Write the page that lies in a folder, which needs nothing but the videos, where they are, and the pictures.

    rows: the table's, as text, the head first. videos: of each its record ("path", "prompt") and its figures as text.
    pictures: names of those in the folder. skipped: why a video is not among them, by its name.
    """
    body = [f"<h1>{escape(title)}</h1>", _table(rows)]
    body += [f'<p><img src="{quote(name)}" alt="{escape(name)}"></p>' for name in pictures]
    if skipped:
        body.append("<h2>Skipped</h2><ul>")
        body += [f"<li>{escape(name)}: {escape(reason)}</li>" for name, reason in skipped.items()]
        body.append("</ul>")
    body.append('<h2>Videos</h2><div class="videos">')
    for record, figures in videos:
        source = quote(Path(os.path.relpath(record["path"], folder)).as_posix())
        terms = "".join(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in figures.items())
        said = f"<br>{escape(record['prompt'])}" if record["prompt"] else ""
        body.append(
            f'<figure><video controls loop muted preload="metadata" src="{source}"></video>'
            f"<figcaption><b>{escape(record['row']['video'])}</b>{said}</figcaption><dl>{terms}</dl></figure>"
        )
    body.append("</div>")
    head = f'<meta charset="utf-8"><title>{escape(title)}</title><style>{STYLE}</style>'
    return f'<!doctype html>\n<html lang="en"><head>{head}</head><body>\n' + "\n".join(body) + "\n</body></html>\n"


def _table(rows: Sequence[Sequence[str]]) -> str:
    head, *lines = rows
    cells = ["<tr>" + "".join(f"<th>{escape(text)}</th>" for text in head) + "</tr>"]
    cells += ["<tr>" + "".join(f"<td>{escape(text)}</td>" for text in line) + "</tr>" for line in lines]
    return f"<table>{''.join(cells)}</table>"
