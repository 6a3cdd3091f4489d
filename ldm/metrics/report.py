"""What an evaluation found, as JSON and as one page of HTML that needs nothing beside it."""

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
from ldm.metrics.plot import plot

STYLE = """body{font:15px/1.5 sans-serif;max-width:960px;margin:2em auto;padding:0 1em;color:#222}
table{border-collapse:collapse;margin:1em 0}td,th{padding:.2em .8em;border-bottom:1px solid #ddd;text-align:right}
td:first-child,th:first-child{text-align:left}img{image-rendering:pixelated;max-width:100%}
figure{display:inline-block;margin:.4em;vertical-align:top;width:min-content}figcaption{font-size:12px}
pre{background:#f4f4f4;padding:1em;overflow:auto}.few{color:#b9770e}"""
NAMES = {
    "psnr": "PSNR, dB",
    "ssim": "SSIM",
    "lpips": "LPIPS",
    "frechet": "Frechet distance",
    "sfrechet": "Frechet distance of maps (sFID)",
    "kernel": "kernel distance (KID)",
    "inception_score": "Inception score",
    "precision": "precision",
    "recall": "recall",
    "density": "density",
    "coverage": "coverage",
    "clip_score": "CLIP score",
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
        dropped = ("pictures", "features") if not isinstance(value.get("features"), Mapping) else ("pictures",)
        return {key: plain(each) for key, each in value.items() if key not in dropped}
    if isinstance(value, list | tuple):
        return [plain(each) for each in value if not isinstance(each, Image.Image | Tensor)]
    return value


def line(name: str, part: Any) -> str:
    """What a part found, in short."""
    if name in ("prompts", "steps"):
        rows = [f"{setting(row)} {whole(row):.1%}" for row in part]
        return f"{name}: all right at {'; '.join(rows)}"
    if name == "nearest":
        return f"nearest: {', '.join(f'{apart:.3g}' for apart, _ in part)}"
    if name == "yardsticks":
        return f"{name}: {', '.join(f'{key} {value:.4g}' for key, value in part.items())}"
    shown = part if name != "bound" else {"bits per dimension": part}
    return f"{name}: {', '.join(f'{NAMES[key]} {number(part[key])}' for key in SHORT if key in part) or shown}"


def setting(row: Mapping[str, Any]) -> str:
    """What a row of a curve was made with."""
    return f"cfg {row['cfg']:g}" if "cfg" in row else f"{row['solver']}, {row['steps']} steps"


def whole(row: Mapping[str, Any]) -> float:
    """The share of pictures that are right in everything."""
    found = row["alignment"]
    counts = [kind["whole"] for kind in found.values()] if "whole" not in found else [found["whole"]]
    return sum(right for right, _ in counts) / sum(of for _, of in counts)


def number(value: Any) -> str:
    """A number, or a mean and what it may be off by."""
    if isinstance(value, Mapping):
        mean, off = value["mean"], value.get("error", value.get("std"))
        return f"{mean:.4g} ± {off:.2g}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


# ------------------------------------------------------------------------------------------------ the page


def page(found: Mapping[str, Any]) -> str:
    """The whole page."""
    about = found["about"]
    title = f"{about['checkpoint']['file']}, measured"
    parts = [f"<h1>{escape(title)}</h1>", *(section for name in found for section in sections(name, found))]
    parts.append("<h2>How it was measured</h2>")
    parts.append(f"<pre>{escape(json.dumps({'about': about, 'settings': found['settings']}, indent=1))}</pre>")
    head = f'<meta charset="utf-8"><title>{escape(title)}</title><style>{STYLE}</style>'
    return f"<!doctype html><html><head>{head}</head><body>{''.join(parts)}</body></html>"


def sections(name: str, found: Mapping[str, Any]) -> Iterator[str]:
    """What the page says of one part."""
    part = found[name]
    if name == "first_stage":
        yield "<h2>The first stage</h2>"
        yield distances(part)
        yield "<p>True, and reconstructed below.</p>" + picture(pictures.grid(part["pictures"], len(part["pictures"])))
    elif name == "samples":
        yield "<h2>Samples</h2>"
        yield distances(part) + yardstick_table(found.get("yardsticks", {}), part["frechet"])
        yield captioned(part)
    elif name == "nearest":
        yield "<h2>Are they copies?</h2><p>Samples, and below each the nearest picture of the training data.</p>"
        samples = found["samples"]["pictures"][: len(part)]
        pairs = [figure([a, b], f"{apart:.3g}") for a, (apart, b) in zip(samples, part)]
        yield "".join(pairs)
    elif name == "prompts":
        yield "<h2>What is right of prompts</h2>" + kinds_table(part) + "".join(cfg_plots(part))
    elif name == "steps":
        yield "<h2>Quality against steps</h2>" + steps_table(part) + "".join(step_plots(part))
    elif name == "bound":
        yield f"<h2>Likelihood</h2><p>At most {number(part)} bits per dimension.</p>"


def distances(part: Mapping[str, Any]) -> str:
    """A table of all distances of a part."""
    rows = [(NAMES[name], number(part[name])) for name in NAMES if name in part]
    counts = f"{part['made']} pictures against {part['true']}"
    few = '; <span class="few">too few for more than an indication</span>' if part["indicative"] else ""
    return table(["", ""], rows) + f"<p>{counts}{few}.</p>"


def yardstick_table(yardsticks: Mapping[str, float], own: float) -> str:
    """The Frechet distances that a model's is to be held against."""
    rows = [(name, number(value), f"{own / value:.1%}" if value else "") for name, value in yardsticks.items()]
    return table(["Frechet distance of", "", "the samples', of that"], rows) if rows else ""


def kinds_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The share of whole pictures by kind of prompt and guidance."""
    kinds = list(rows[0]["alignment"])
    head = ["all attributes and relations right", *(f"cfg {row['cfg']:g}" for row in rows)]
    body = [[kind, *(share(row["alignment"][kind]["whole"]) for row in rows)] for kind in kinds]
    parts = list(dict.fromkeys(name for row in rows for kind in kinds for name in row["alignment"][kind]))
    detail = [[name, *(share(summed(row["alignment"], name)) for row in rows)] for name in parts if name != "whole"]
    return table(head, body) + table(["of all kinds, part by part", *head[1:]], detail)


def summed(alignment: Mapping[str, Mapping[str, tuple[int, int]]], name: str) -> tuple[int, int]:
    """(right, of how many) over all kinds of prompts."""
    found = [kind.get(name, (0, 0)) for kind in alignment.values()]
    return sum(right for right, _ in found), sum(of for _, of in found)


def share(counts: Sequence[int]) -> str:
    """A percentage and what it is of."""
    return f"{100 * counts[0] / counts[1]:.1f}% of {counts[1]}" if counts[1] else ""


def steps_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Right pictures and distance of every solver at every number of steps."""
    body = [(row["solver"], row["steps"], share(row["alignment"]["whole"]), number(row["frechet"])) for row in rows]
    return table(["solver", "steps", "all right", NAMES["frechet"]], body)


def cfg_plots(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Alignment, distance, and what is gained and lost with guidance."""
    right = {"": [(row["cfg"], 100 * whole(row)) for row in rows]}
    yield plot("Right in everything, by guidance", "cfg", "%", right)
    yield plot("Frechet distance, by guidance", "cfg", "", {"": [(row["cfg"], row["frechet"]) for row in rows]})
    if all("recall" in row for row in rows):
        lines = {name: [(row["cfg"], row[name]) for row in rows] for name in ("precision", "recall", "coverage")}
        yield plot("What guidance gains and loses", "cfg", "", lines)


def step_plots(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Alignment and distance by the number of steps, a line for each solver."""
    measures = {"Right in everything, %": lambda row: 100 * whole(row), NAMES["frechet"]: lambda row: row["frechet"]}
    for name, measure in measures.items():
        lines: dict[str, list[tuple[float, float]]] = {}
        for row in rows:
            lines.setdefault(row["solver"], []).append((row["steps"], measure(row)))
        yield plot(f"{name}, by steps", "steps", "", lines, log=True)


def captioned(part: Mapping[str, Any]) -> str:
    """The first samples, with their prompts where they have any: nobody chose among them."""
    if "prompts" not in part:
        return picture(pictures.grid(part["pictures"]))
    return "".join(figure([image], words) for image, words in zip(part["pictures"], part["prompts"]))


def figure(images: Sequence[Image.Image], words: str) -> str:
    """Pictures one below the other, and words."""
    return f"<figure>{''.join(picture(image) for image in images)}<figcaption>{escape(words)}</figcaption></figure>"


def picture(image: Image.Image) -> str:
    """Inside the page, small ones twice their size."""
    data = io.BytesIO()
    image.save(data, "PNG")
    side = f' width="{2 * image.width}"' if image.width <= 128 else ""
    return f'<img{side} src="data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}">'


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A table of texts."""
    body = ["".join(f"<td>{escape(str(cell))}</td>" for cell in row) for row in rows]
    cells = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    return f"<table><tr>{cells}</tr>{''.join(f'<tr>{row}</tr>' for row in body)}</table>"
