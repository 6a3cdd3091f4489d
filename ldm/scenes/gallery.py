"""The documentation's pictures, sampled from the shipped model, and the tables and plots of its evaluation."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ldm import pictures, pipeline
from ldm.config.schema import Config
from ldm.errors import InputError
from ldm.metrics.plot import plot
from ldm.metrics.report import TITLES
from ldm.metrics.tables import plots, tables
from ldm.scenes.contact_sheet import WIDTH, row, stacked

COLUMNS = 4  # of the grid of prompts
ABOUT = (
    "Made by `ldm demo gallery --out docs/ report=docs/evaluation.json`; "
    "of `{file}`, sha256 `{sha256}`, sampled with `{sampling}`."
)


def run(config: Config, out: Path) -> None:
    """Write everything into a folder."""
    evaluation = read(config["report"]) if config["report"] else None
    losses = dict(map(validation_losses, config["metrics"]))
    pipe = pipeline.load()
    for name, make in {"samples": prompts, "guidance": guidance, "samplers": samplers}.items():
        pictures.write(make(pipe, config), out / f"{name}.png")
        print(f"wrote {out / name}.png", flush=True)
    if evaluation is not None:
        page = results(evaluation, out)
        (out / "results.md").write_text(page, encoding="utf-8")
        print(f"wrote {out / 'results.md'} and its plots")
    if losses:
        svg = plot("Loss on unseen scenes", "steps", "", losses, zero=False)
        (out / "training.svg").write_text(svg + "\n", encoding="utf-8")
        print(f"wrote {out / 'training.svg'}")


def prompts(pipe: pipeline.Pipeline, config: Config) -> Image.Image:
    """One picture for each prompt, with consecutive seeds."""
    texts = config["prompts"]
    made = tensors(pipe(texts, seed=config["seed"]), COLUMNS)
    parts = [slice(start, start + COLUMNS) for start in range(0, len(texts), COLUMNS)]
    return stacked([row(made[part], texts[part]) for part in parts])


def guidance(pipe: pipeline.Pipeline, config: Config) -> Image.Image:
    """The first prompts, a row each, from the same noise with increasing guidance."""
    rows = []
    for text in config["prompts"][:3]:
        made = [pipe(text, cfg=cfg, seed=config["seed"])[0] for cfg in config["cfg"]]
        rows.append(row(tensors(made), [f"{text}, cfg {cfg:g}" for cfg in config["cfg"]]))
    return stacked(rows)


def samplers(pipe: pipeline.Pipeline, config: Config) -> Image.Image:
    """The first prompt from the same noise, a row for each solver and a column for each number of steps."""
    rows = []
    for solver in config["solvers"]:
        made = [pipe(config["prompts"][0], solver=solver, steps=n, seed=config["seed"])[0] for n in config["steps"]]
        rows.append(row(tensors(made), [f"{solver}, {n} steps" for n in config["steps"]]))
    return stacked(rows)


def tensors(images: Sequence[Image.Image], columns: int | None = None) -> Tensor:
    """Pictures (N, 3, S, S) uint8, as wide as a column."""
    side = WIDTH // (columns or len(images))
    large = [pictures.to_tensor(image, (side, side)) for image in images]
    return ((torch.cat(large) + 1) * 127.5).round().to(torch.uint8)


def read(file: str) -> dict[str, Any]:
    """The evaluation.json of `ldm evaluate`."""
    try:
        found = json.loads(Path(file).read_text(encoding="utf-8"))
        return {**found, "about": dict(found["about"])}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError("report: cannot read it", file, str(error), "evaluation.json of `ldm evaluate`") from None


def validation_losses(file: str) -> tuple[str, list[tuple[int, float]]]:
    """A run's name, and (step, loss) at each of its validations."""
    try:
        with open(file, newline="", encoding="utf-8") as lines:
            found = [(int(row["step"]), float(row["val/loss"])) for row in csv.DictReader(lines) if row["val/loss"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError("metrics: cannot read them", file, str(error), "metrics.csv of a run folder") from None
    if not found:
        raise InputError("metrics: no validation losses", file, expected="a run with trainer.validate_every")
    path = Path(file).absolute()
    return path.parent.name if path.stem == "metrics" else path.stem, found


def results(found: dict[str, Any], out: Path) -> str:
    """A page of Markdown with all tables; its plots are written beside it."""
    about = found["about"]
    sampling = json.dumps(about.get("sampling", {}))
    parts = ["# Results", ABOUT.format(**about["checkpoint"], sampling=sampling)]
    for name in (name for name in TITLES if name in found):
        blocks = [table.markdown() for table in tables(found, name)]
        for title, svg in plots(found, name).items():
            (out / f"{title}.svg").write_text(svg + "\n", encoding="utf-8")
            blocks.append(f"![{title.replace('_', ' ')}]({title}.svg)")
        parts += [f"## {TITLES[name]}", *blocks] if blocks else []
    return "\n\n".join(parts) + "\n"
