"""One HTML page of an evaluation: its table, its plot, and every video with its figures, to be opened in a browser."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

from longsana.runtime.foreign import printable

STYLE = """body{font:14px/1.4 system-ui,sans-serif;margin:1.5em;color:#222;background:#fff}
.wide{overflow-x:auto;margin:1em 0}.wide img{max-width:100%}@media(max-width:60em){.wide img{max-width:none}}
table{border-collapse:collapse}
td,th{padding:.2em .7em;border-bottom:1px solid #ddd;text-align:right;vertical-align:bottom}
td:first-child,th:first-child{text-align:left;position:sticky;left:0;background:#fff;min-width:min(22em,35vw);
overflow-wrap:anywhere}
.videos{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(20em,100%),1fr));gap:1.5em}
.pairs{grid-template-columns:repeat(auto-fill,minmax(min(40em,100%),1fr))}
figure{margin:0}figure,ul{overflow-wrap:anywhere}figure>div{display:flex;gap:.5em}figure>div>*{flex:1;min-width:0}
video{max-height:24em;background:#000}
dl{display:grid;grid-template-columns:auto 1fr;gap:0 .7em;margin:.3em 0}dd{margin:0;text-align:right}"""


def page(
    title: str,
    rows: Sequence[Sequence[str]],
    videos: Sequence[tuple[Mapping[str, Any], Mapping[str, str]]],
    pictures: Sequence[str],
    skipped: Mapping[str, str],
    folder: Path,
) -> str:
    """Write the page that lies in a folder, which needs nothing but the videos, where they are, and the pictures.

    rows: the table's, as text, the head first. videos: of each its record ("row", "prompt", and "paths": its own and
    that of the one it is compared with), and its figures as text. pictures: names of those in the folder. skipped: why
    a video is not among them, by its name.
    """
    body = [f"<h1>{escape(title)}</h1>", _table(rows)]
    body += [f'<div class="wide"><img src="{quote(name)}" alt="{escape(name)}"></div>' for name in pictures]
    if skipped:
        body.append("<h2>Skipped</h2><ul>")
        body += [f"<li>{escape(name)}: {escape(reason)}</li>" for name, reason in skipped.items()]
        body.append("</ul>")
    pairs = " pairs" if any(len(record["paths"]) > 1 for record, _ in videos) else ""
    body.append(f'<h2>Videos</h2><div class="videos{pairs}">')
    for record, figures in videos:
        files = [Path(os.path.relpath(path, folder)).as_posix() for path in record["paths"]]
        links = [quote(os.fsencode(file)) for file in files]
        players = "".join(f'<video controls loop muted preload="metadata" src="{link}"></video>' for link in links)
        # Links too: not every browser plays every file.
        words = [record["row"]["video"], *map(printable, files[1:])]
        name, *other = [f'<a href="{link}">{escape(text)}</a>' for link, text in zip(links, words, strict=True)]
        said = f"<br>right: {other[0]}" if other else ""
        said += f"<br>{escape(record['prompt'])}" if record["prompt"] else ""
        terms = "".join(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in figures.items())
        body.append(
            f"<figure><div>{players}</div><figcaption><b>{name}</b>{said}</figcaption>"
            f"<details><summary>figures</summary><dl>{terms}</dl></details></figure>"
        )
    body.append("</div>")
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width">'
    head += f"<title>{escape(title)}</title><style>{STYLE}</style>"
    return f'<!doctype html>\n<html lang="en"><head>{head}</head><body>\n' + "\n".join(body) + "\n</body></html>\n"


def _table(rows: Sequence[Sequence[str]]) -> str:
    head, *lines = rows
    cells = ["<tr>" + "".join(f"<th>{escape(text)}</th>" for text in head) + "</tr>"]
    cells += ["<tr>" + "".join(f"<td>{escape(text)}</td>" for text in line) + "</tr>" for line in lines]
    return f'<div class="wide"><table>{"".join(cells)}</table></div>'
