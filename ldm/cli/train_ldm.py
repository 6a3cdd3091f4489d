"""Train a second stage from a configuration; the same command in the same run directory goes on where it stopped."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from ldm.cli import config_file, config_options, own_parts
from ldm.cli.train_autoencoder import run_options


def options(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    config_options(parser, default="scenes")
    run_options(parser, "runs/NAME_ldm")


def run(arguments: argparse.Namespace) -> int:
    """Check everything that costs nothing, then build and train."""
    own_parts(arguments)
    from ldm import assemble

    file = config_file(arguments.config, "ldm")
    config, loaded = assemble.load(file, arguments.overrides, assemble.DiffusionSchema)
    if arguments.print_config:
        print(json.dumps(config.values, indent=2))
        return 0
    folder = Path(arguments.run or f"runs/{file.stem}_ldm").expanduser()
    from ldm.training import checkpointing, run, setup  # Lightning is paid for late
    from ldm.training.recipes import diffusion

    if not arguments.dry_run:
        setup.check_launcher(config)
    begun = checkpointing.newest(folder)
    stage = diffusion.build(config, loaded, arguments.init_from, checkpointing.exported(folder, begun))
    if run.is_main():
        run.check(stage, config.values, folder, begun)
        print("\n".join([run.summary(stage, folder, begun), *diffusion.notices(stage)]), flush=True)
    return 0 if arguments.dry_run else run.train(stage, config.values, folder, begun)
