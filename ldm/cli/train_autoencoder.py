"""Train a first stage from a configuration; the same command in the same run directory goes on where it stopped."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from ldm.cli import config_file, config_options, own_parts


def options(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    config_options(parser, default="scenes")
    run_options(parser, "runs/NAME")


def run_options(parser: argparse.ArgumentParser, default: str) -> None:
    """What every training command understands."""
    where = f"the run directory (default {default}, after the configuration); behind torchrun, --run-dir"
    parser.add_argument("--run", "--run-dir", metavar="DIR", help=where)
    parser.add_argument("--init-from", metavar="CKPT", help="begin with the weights of this checkpoint")
    parser.add_argument("--dry-run", action="store_true", help="build and check everything, then stop")


def run(arguments: argparse.Namespace) -> int:
    """Check everything that costs nothing, then build and train."""
    own_parts(arguments)
    from ldm.assemble import AutoencoderSchema
    from ldm.config import schema as configuration

    file = config_file(arguments.config, "autoencoder")
    config = configuration.load(file, arguments.overrides, AutoencoderSchema)
    if arguments.print_config:
        print(json.dumps(config.values, indent=2))
        return 0
    folder = Path(arguments.run or f"runs/{file.stem}").expanduser()
    from ldm.training import checkpointing, run, setup  # Lightning is paid for late
    from ldm.training.recipes import autoencoder

    if not arguments.dry_run:
        setup.check_launcher(config)
    begun = checkpointing.newest(folder)
    stage = autoencoder.build(config, arguments.init_from, begun is not None)
    if run.is_main():
        run.check(stage, config.values, folder, begun)
        print(run.summary(stage, folder, begun), flush=True)
    return 0 if arguments.dry_run else run.train(stage, config.values, folder, begun)
