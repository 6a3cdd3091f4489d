"""Learn a swiss roll with a small network, sample it with four solvers, and draw both in one picture."""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

from ldm import config as configuration
from ldm import parts
from ldm.cli import config_file, config_options
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
    for module in arguments.plugin:
        parts.plug(module)
    config = configuration.load(config_file(arguments.config, "demo"), arguments.overrides, Schema)
    if arguments.print_config:
        print(json.dumps(config.values, indent=2))
        return 0
    for name in ("steps", "batch_size"):
        if config[name] < 1:
            raise config.source.error(f"{name}: must be at least 1", name, got=str(config[name]))
    out = Path(arguments.out)
    if not out.parent.is_dir():
        raise InputError("no such folder", str(out.parent), hint="another --out")
    from ldm.cli import swiss_roll  # torch is only paid for once all options are right

    swiss_roll.draw_picture(*swiss_roll.learn(config), out)
    print(f"wrote {out}")
    return 0
