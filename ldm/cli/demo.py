"""Small things to look at: `ldm demo` learns a swiss roll, `ldm demo scenes` shows the built-in scenes, and
`ldm demo gallery` makes the documentation's pictures and tables with the shipped model."""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ldm.cli import config_file, config_options, own_parts
from ldm.cli.sample import writable
from ldm.config import schema as configuration
from ldm.config.schema import Part
from ldm.errors import InputError


@dataclass(kw_only=True)
class Schema:
    """What a configuration of the swiss roll may say."""

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
    """What a configuration of the scenes may say."""

    seed: int = 0  # of the scenes
    split: Literal["train", "validation", "held_out"] = "train"  # which of them


@dataclass(kw_only=True)
class Gallery:
    """What a configuration of the gallery may say."""

    seed: int = 0  # that of the first picture
    prompts: list[str]  # a picture each
    cfg: list[float]  # a column each
    solvers: list[str]  # a row each
    steps: list[int]  # a column each
    report: str | None = None  # an evaluation.json, whose tables and plots go along
    demos: list[Literal["scenes", "swiss_roll"]] = ()  # type: ignore[assignment]  # whose pictures are made too
    metrics: list[str] = ()  # type: ignore[assignment]  # metrics.csv of runs, whose validation losses are drawn


SCHEMAS = {"swiss_roll": Schema, "scenes": Sheet, "gallery": Gallery}
LEAST = {"seed": 0, "steps": 1, "batch_size": 1, "lr": 0}


def options(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    config_options(parser)
    parser.add_argument(
        "--out", help="where the picture goes (default: the demo's name, .png); for the gallery, a folder"
    )


def run(arguments: argparse.Namespace) -> int:
    """Check everything, then make the picture."""
    own_parts(arguments)
    name = arguments.overrides.pop(0) if arguments.overrides[:1] in (["scenes"], ["gallery"]) else "swiss_roll"
    config = configuration.load(config_file(arguments.config or name, "demo"), arguments.overrides, SCHEMAS[name])
    for key, least in LEAST.items():
        values = config.values.get(key, least)
        if smaller := [x for x in (values if isinstance(values, list) else [values]) if x < least]:
            raise config.source.error(f"{key}: must be at least {least}", key, got=str(smaller[0]))
    if config["seed"] >= 2**32:
        raise config.source.error("seed: must be below 2**32", "seed", got=str(config["seed"]))
    if arguments.print_config:
        print(json.dumps(config.values, indent=2))
        return 0
    if name == "gallery":
        from ldm.scenes import gallery

        out = writable(Path(arguments.out or name))
        gallery.run(config, out)
        for other in config["demos"]:
            draw(other, configuration.load(config_file(other, "demo"), [], SCHEMAS[other]), out / f"{other}.png")
        return 0
    out = Path(f"{name}.png" if arguments.out is None else arguments.out)
    if out.suffix.lower() != ".png" or out.is_dir() or not out.parent.is_dir():
        raise InputError("cannot write the picture", str(out), expected="a .png file in a folder that exists")
    draw(name, config, out)
    return 0


def draw(name: str, config: configuration.Config, out: Path) -> None:
    """The picture of one demo; torch is only paid for here, where all options are right."""
    if name == "scenes":
        from ldm.scenes import contact_sheet

        contact_sheet.sheet(config["seed"], config["split"]).save(out)
    else:
        from ldm.cli import swiss_roll

        swiss_roll.draw_picture(swiss_roll.learn(config), config, out)
    print(f"wrote {out}", flush=True)
