"""Train a second stage from a YAML; the same command in the same run folder resumes where it stopped."""

from __future__ import annotations

import argparse

from ldm.cli import config_options, train


def options(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    config_options(parser, default="scenes")
    train.run_options(parser, "runs/NAME_ldm")


def run(arguments: argparse.Namespace) -> int:
    """Train the diffusion recipe, unless the YAML names another."""
    return train.run(arguments, "diffusion")
