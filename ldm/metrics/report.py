"""The report of an evaluation: a JSON file, and an HTML page that contains all its pictures."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from ldm import pictures
from ldm.checkpoint.files import replacing
from ldm.metrics.tables import NAMES, correct, few, number, plots, tables

STYLE = """body{font:15px/1.5 sans-serif;max-width:960px;margin:2em auto;padding:0 1em;color:#222}
table{border-collapse:collapse;margin:1em 0}td,th{padding:.2em .8em;border-bottom:1px solid #ddd;text-align:right}
td:first-child,th:first-child{text-align:left}img{image-rendering:pixelated;max-width:100%}
figure{display:inline-block;margin:.4em;vertical-align:top;width:min-content}
figure img{display:block;max-width:none}figcaption{font-size:12px}
pre{background:#f4f4f4;padding:1em;overflow:auto}"""
TITLES = {
    "first_stage": "Autoencoder",
    "samples": "Samples",
    "nearest": "Nearest training pictures",
    "prompts": "Prompts",
    "steps": "Steps",
    "bound": "Likelihood",
}
SUMMARY = ("psnr", "frechet", "clip_score")  # the numbers that the command prints of a part


def write(evaluation: Mapping[str, Any], out: Path) -> None:
    """Write evaluation.json and index.html, each atomically."""
    files = {"evaluation.json": json.dumps(plain(evaluation), indent=1), "index.html": page(evaluation)}
    for name, content in files.items():
        with replacing(out / name) as file:
            file.write(content.encode())


def plain(value: Any) -> Any:
    """The value without pictures and features."""
    if isinstance(value, Mapping):
        return {key: plain(each) for key, each in value.items() if key != "pictures" and not isinstance(each, Tensor)}
    if isinstance(value, list | tuple):
        return [plain(each) for each in value if not isinstance(each, Image.Image)]
    return value


def summary(name: str, part: Any) -> str:
    """A part in one line."""
    if name in ("prompts", "steps"):
        return f"{name}: all correct: {'; '.join(f'{setting(row)} {correct(row):.1%}' for row in part)}"
    if name == "nearest":
        return f"nearest: {', '.join(f'{distance:.3g}' for distance, _ in part)}"
    if name == "bound":
        return f"bound: {number(part)} bits per dimension"
    if name == "yardsticks":
        return f"yardsticks: {', '.join(f'{key} {value:.4g}' for key, value in part.items())}"
    return f"{name}: {', '.join(f'{NAMES[key]} {number(part[key])}' for key in SUMMARY if key in part)}{few([part])}"


def setting(row: Mapping[str, Any]) -> str:
    """The settings of a row of `prompts` or `steps`."""
    return f"cfg {row['cfg']:g}" if "cfg" in row else f"{row['solver']}, {row['steps']} steps"


def page(evaluation: Mapping[str, Any]) -> str:
    """The HTML page."""
    title = escape(f"Evaluation of {evaluation['about']['checkpoint']['file']}")
    blocks = [f"<h1>{title}</h1>"]
    for name in (name for name in TITLES if name in evaluation):
        blocks += [f"<h2>{TITLES[name]}</h2>", *(table.html() for table in tables(evaluation, name))]
        blocks += [*plots(evaluation, name).values(), *figures(name, evaluation)]
    settings = json.dumps({key: evaluation[key] for key in ("about", "settings")}, indent=1)
    blocks.append(f"<h2>Settings</h2><pre>{escape(settings)}</pre>")
    head = f'<meta charset="utf-8"><title>{title}</title><style>{STYLE}</style>'
    return f"<!doctype html><html><head>{head}</head><body>{''.join(blocks)}</body></html>"


def figures(name: str, evaluation: Mapping[str, Any]) -> Iterator[str]:
    """The pictures of a part: the first ones, not cherry-picked."""
    part = evaluation[name]
    if name == "first_stage":
        yield "<p>Top: original pictures. Bottom: their reconstructions.</p>"
        yield img(pictures.grid(part["pictures"], len(part["pictures"])))
    elif name == "samples" and "prompts" in part:
        yield from (figure([image], prompt) for image, prompt in zip(part["pictures"], part["prompts"]))
    elif name == "samples":
        yield img(pictures.grid(part["pictures"]))
    elif name == "nearest":
        yield "<p>Top: samples. Bottom: the nearest training picture of each, with the distance of their features.</p>"
        pairs = zip(evaluation["samples"]["pictures"], part)
        yield from (figure([sample, nearest], f"{distance:.3g}") for sample, (distance, nearest) in pairs)
    elif name == "bound":
        yield f"<p>At most {number(part)} bits per dimension.</p>"


def figure(images: Sequence[Image.Image], caption: str) -> str:
    """Pictures below each other, and their caption."""
    return f"<figure>{''.join(map(img, images))}<figcaption>{escape(caption)}</figcaption></figure>"


def img(image: Image.Image) -> str:
    """A picture inside the page; small ones are shown at twice their size."""
    data = io.BytesIO()
    image.save(data, "PNG")
    width = f' width="{2 * image.width}"' if image.width <= 128 else ""
    return f'<img{width} src="data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}">'
