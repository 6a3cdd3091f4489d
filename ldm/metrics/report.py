"""An evaluation as JSON and as one page of HTML that needs nothing beside it."""

from __future__ import annotations

import base64
import io
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from ldm import pictures
from ldm.metrics.tables import NAMES, Table, few, number, plots, tables, whole

STYLE = """body{font:15px/1.5 sans-serif;max-width:960px;margin:2em auto;padding:0 1em;color:#222}
table{border-collapse:collapse;margin:1em 0}td,th{padding:.2em .8em;border-bottom:1px solid #ddd;text-align:right}
td:first-child,th:first-child{text-align:left}img{image-rendering:pixelated;max-width:100%}
figure{display:inline-block;margin:.4em;vertical-align:top;width:min-content}figure img{max-width:none}
figcaption{font-size:12px}
pre{background:#f4f4f4;padding:1em;overflow:auto}"""
TITLES = {
    "first_stage": "The first stage",
    "samples": "Samples",
    "nearest": "Are they copies?",
    "prompts": "What is right of prompts",
    "steps": "Quality against steps",
    "bound": "Likelihood",
}
SHORT = ("psnr", "frechet", "clip_score")  # of a part, what the command prints


def write(found: Mapping[str, Any], out: Path) -> None:
    """Both files, each whole or as it was."""
    for name, content in (("evaluation.json", json.dumps(plain(found), indent=1)), ("index.html", page(found))):
        unfinished = out / f".{name}.{os.getpid()}.tmp"
        unfinished.write_text(content, encoding="utf-8")
        unfinished.replace(out / name)


def plain(value: Any) -> Any:
    """Without pictures and features: numbers, texts, lists and tables."""
    if isinstance(value, Mapping):
        return {key: plain(each) for key, each in value.items() if key != "pictures" and not isinstance(each, Tensor)}
    if isinstance(value, list | tuple):
        return [plain(each) for each in value if not isinstance(each, Image.Image)]
    return value


def line(name: str, part: Any) -> str:
    """What a part found, in short."""
    if name in ("prompts", "steps"):
        rows = [f"{setting(row)} {whole(row):.1%}" for row in part]
        return f"{name}: all right at {'; '.join(rows)}"
    if name == "nearest":
        return f"nearest: {', '.join(f'{apart:.3g}' for apart, _ in part)}"
    if name == "bound":
        return f"bound: {number(part)} bits per dimension"
    if name == "yardsticks":
        return f"yardsticks: {', '.join(f'{key} {value:.4g}' for key, value in part.items())}"
    return f"{name}: {', '.join(f'{NAMES[key]} {number(part[key])}' for key in SHORT if key in part)}{few([part])}"


def setting(row: Mapping[str, Any]) -> str:
    """What a row of a curve was made with."""
    return f"cfg {row['cfg']:g}" if "cfg" in row else f"{row['solver']}, {row['steps']} steps"


def page(found: Mapping[str, Any]) -> str:
    """The whole page."""
    title = f"{found['about']['checkpoint']['file']}, measured"
    parts = [f"<h1>{escape(title)}</h1>"]
    for name in (name for name in TITLES if name in found):
        parts += [f"<h2>{TITLES[name]}</h2>", *(html(table) for table in tables(found, name))]
        parts += [*plots(found, name).values(), *shown(name, found)]
    parts.append("<h2>How it was measured</h2>")
    parts.append(f"<pre>{escape(json.dumps({'about': found['about'], 'settings': found['settings']}, indent=1))}</pre>")
    head = f'<meta charset="utf-8"><title>{escape(title)}</title><style>{STYLE}</style>'
    return f"<!doctype html><html><head>{head}</head><body>{''.join(parts)}</body></html>"


def shown(name: str, found: Mapping[str, Any]) -> Iterator[str]:
    """What is to be seen of a part: the first pictures, among which nobody chose."""
    part = found[name]
    if name == "first_stage":
        yield "<p>True, and reconstructed below.</p>" + picture(pictures.grid(part["pictures"], len(part["pictures"])))
    elif name == "samples" and "prompts" in part:
        yield from (figure([image], words) for image, words in zip(part["pictures"], part["prompts"]))
    elif name == "samples":
        yield picture(pictures.grid(part["pictures"]))
    elif name == "nearest":
        yield "<p>Samples, and below each the nearest picture of the training data, with the distance of features.</p>"
        pairs = zip(found["samples"]["pictures"], part)
        yield from (figure([image, other], f"{apart:.3g}") for image, (apart, other) in pairs)
    elif name == "bound":
        yield f"<p>At most {number(part)} bits per dimension.</p>"


def figure(images: Sequence[Image.Image], words: str) -> str:
    """Pictures one below the other, and words."""
    return f"<figure>{''.join(picture(image) for image in images)}<figcaption>{escape(words)}</figcaption></figure>"


def picture(image: Image.Image) -> str:
    """Inside the page, small ones twice their size."""
    data = io.BytesIO()
    image.save(data, "PNG")
    side = f' width="{2 * image.width}"' if image.width <= 128 else ""
    return f'<img{side} src="data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}">'


def html(table: Table) -> str:
    """A table of texts."""
    body = ["".join(f"<td>{escape(str(cell))}</td>" for cell in row) for row in table.rows]
    cells = "".join(f"<th>{escape(cell)}</th>" for cell in table.head)
    return f"<table><tr>{cells}</tr>{''.join(f'<tr>{row}</tr>' for row in body)}</table>"
