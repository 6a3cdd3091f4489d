"""Learn a swiss roll with a small network, sample it with four solvers, and draw both in one picture."""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

from ldm import config as configuration
from ldm.cli import config_file, config_options, own_parts
from ldm.config import Part
from ldm.errors import InputError


@dataclass(kw_only=True)
class Schema:
    """What a configuration of the demo may say."""

    seed: int = 0
    path: Part
    prediction: Part
    draw: Part
    weight: Part
    backbone: Part
    spacing: Part
    steps: int
    batch_size: int
    lr: float


def options(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    config_options(parser, default="swiss_roll")
    parser.add_argument("--out", default="swiss_roll.png", help="where the picture goes")


def run(arguments: argparse.Namespace) -> int:
    """Train, sample, draw."""
    own_parts(arguments)
    config = configuration.load(config_file(arguments.config, "demo"), arguments.overrides, Schema)
    for name, least in {"seed": 0, "steps": 1, "batch_size": 1, "lr": 0}.items():
        if config[name] < least:
            raise config.source.error(f"{name}: must be at least {least}", name, got=str(config[name]))
    if config["seed"] >= 2**32:
        raise config.source.error("seed: must be below 2**32", "seed", got=str(config["seed"]))
    if arguments.print_config:
        print(json.dumps(config.values, indent=2))
        return 0
    out = Path(arguments.out)
    if out.suffix.lower() != ".png" or out.is_dir() or not out.parent.is_dir():
        raise InputError("cannot write the picture", str(out), expected="a .png file in a folder that exists")
    from ldm.cli import swiss_roll  # torch is only paid for once all options are right

    swiss_roll.draw_picture(swiss_roll.learn(config), config, out)
    print(f"wrote {out}")
    return 0
