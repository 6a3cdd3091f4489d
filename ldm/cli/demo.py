"""Small demonstrations: `ldm demo` learns a swiss roll, `ldm demo scenes` shows the built-in scenes, and
`ldm demo gallery` makes the documentation's pictures and tables with the shipped model."""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from ldm.cli import config_file, config_options
from ldm.cli.sample import png_file, writable
from ldm.config import parts
from ldm.config import schema as configuration
from ldm.config.schema import Part


@dataclass(kw_only=True)
class Schema:
    """The configuration of the swiss roll."""

    seed: int = 0  # of points, noise and weights
    path: Part
    prediction: Part
    draw: Part
    weight: Part
    backbone: Part
    spacing: Part
    steps: int  # of training
    batch_size: int  # points of a step
    lr: float  # of Adam


@dataclass(kw_only=True)
class Sheet:
    """The configuration of the sheet of scenes."""

    seed: int = 0  # of the scenes
    split: Literal["train", "validation", "held_out"] = "train"  # which of them


@dataclass(kw_only=True)
class Gallery:
    """The configuration of the gallery."""

    seed: int = 0  # of the first picture
    prompts: list[str]  # a picture each
    cfg: list[float]  # a column each
    solvers: list[str]  # a row each
    steps: list[int]  # a column each
    report: str | None = None  # an evaluation.json, whose tables and plots are added
    demos: list[Literal["scenes", "swiss_roll"]] = ()  # type: ignore[assignment]  # whose pictures are added
    metrics: list[str] = ()  # type: ignore[assignment]  # metrics.csv of runs, whose validation losses are plotted


class Demo(NamedTuple):
    """A demo's configuration, and its function of (config, out), imported when all options have been checked."""

    schema: type
    write: str


DEMOS = {
    "swiss_roll": Demo(Schema, "ldm.cli.swiss_roll:write"),
    "scenes": Demo(Sheet, "ldm.scenes.contact_sheet:write"),
    "gallery": Demo(Gallery, "ldm.scenes.gallery:run"),
}
LEAST = {"seed": 0, "steps": 1, "batch_size": 1, "lr": 0}


def options(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    config_options(parser)
    parser.add_argument("--out", help="the file of the picture (default: NAME.png); for the gallery, a folder")


def run(arguments: argparse.Namespace) -> int:
    """Check everything, then make the picture."""
    name = arguments.overrides.pop(0) if arguments.overrides and arguments.overrides[0] in DEMOS else "swiss_roll"
    config = load(name, arguments.config or name, arguments.overrides)
    if arguments.print_config:
        print(json.dumps(config.values, indent=2))
        return 0
    if name != "gallery":
        write(name, config, png_file(f"{name}.png" if arguments.out is None else arguments.out))
        return 0
    out = writable(Path(arguments.out or name))
    parts.load(DEMOS[name].write)(config, out)
    for other in config["demos"]:
        write(other, load(other, other), out / f"{other}.png")
    return 0


def load(name: str, file: str, overrides: list[str] | None = None) -> configuration.Config:
    """The checked configuration of a demo."""
    config = configuration.load(config_file(file, "demo"), overrides or [], DEMOS[name].schema)
    for key, least in LEAST.items():
        values = config.values.get(key, least)
        if smaller := [x for x in (values if isinstance(values, list) else [values]) if x < least]:
            raise config.source.error(f"{key}: must be at least {least}", key, got=str(smaller[0]))
    if config["seed"] >= 2**32:
        raise config.source.error("seed: must be below 2**32", "seed", got=str(config["seed"]))
    return config


def write(name: str, config: configuration.Config, out: Path) -> None:
    """Make the picture of a demo."""
    parts.load(DEMOS[name].write)(config, out)
    print(f"wrote {out}", flush=True)
