"""Train a model from a YAML; the same command in the same run folder resumes where it stopped."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ldm.cli import config_file, config_options
from ldm.errors import InputError, nearest, shown

if TYPE_CHECKING:
    from ldm.checkpoint import Checkpoint
    from ldm.config.schema import Config

FOLDERS = {"autoencoder": "autoencoder", "diffusion": "ldm"}  # of the shipped configurations, by recipe
ENDINGS = {"diffusion": "_ldm"}  # of the run folder's name


class Plan(NamedTuple):
    """A YAML with its overrides, and the recipe that it trains."""

    file: Path
    overrides: list[str]
    init_from: str | None
    recipe: str

    def load(self) -> tuple[Config, Mapping[str, Checkpoint]]:
        """The checked configuration, and the checkpoints that it names."""
        from ldm import assemble
        from ldm.config import parts

        schema = parts.find("recipe", self.recipe).Schema
        return assemble.load(self.file, self.overrides, schema, self.init_from)

    def run_folder(self, given: str | None) -> Path:
        """The run folder: runs/NAME, after the configuration."""
        return Path(given or f"runs/{self.file.stem}{ENDINGS.get(self.recipe, '')}").expanduser()


def options(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    config_options(parser)
    default = "default runs/NAME, or runs/NAME_ldm for a second stage, where NAME is the configuration's name"
    help = f"the run folder ({default}); with torchrun, write --run-dir"
    parser.add_argument("--run", "--run-dir", metavar="DIR", help=help)
    parser.add_argument("--init-from", metavar="CKPT", help="start from the weights of this checkpoint")
    parser.add_argument("--dry-run", action="store_true", help="build and check everything, then stop")
    parser.set_defaults(recipe=None)  # unless the YAML names another, which the command trains


def run(arguments: argparse.Namespace) -> int:
    """Check everything that costs nothing, then build and train."""
    plan = read_plan(arguments, arguments.recipe)
    config, loaded = plan.load()
    if arguments.print_config:
        print(json.dumps(config.values, indent=2))
        return 0
    folder = plan.run_folder(arguments.run)
    from ldm.training import checkpointing, run, setup  # Lightning is slow to import
    from ldm.training.recipe import Start

    if not arguments.dry_run:
        setup.check_launcher(config)
    found = checkpointing.newest(folder)
    start = Start(arguments.init_from, checkpointing.exported(folder, found), found is not None)
    loop = run.build(config, loaded, start)
    if run.is_main():
        run.check(loop, config.values, folder, found)
        print("\n".join([run.summary(loop, folder, found), *loop.recipe.notes()]), flush=True)
    if arguments.dry_run:
        return 0
    code = run.train(loop, config.values, folder, found)
    if run.is_main() and code == 0:
        following = loop.recipe.next_command(folder / checkpointing.MODEL)
        print(f"wrote {folder / checkpointing.MODEL}" + f"; next: {following}" * bool(following), flush=True)
    return code


def read_plan(arguments: argparse.Namespace, recipe: str | None) -> Plan:
    """The YAML of a command line; without a given recipe, the YAML names it, or it has a backbone or not."""
    if arguments.config is None:
        expected = "a YAML file, or the name of a shipped one"
        raise InputError("--config: missing", "command line", expected=expected, hint="--config small")
    file = config_file(arguments.config, *([FOLDERS[recipe]] if recipe in FOLDERS else FOLDERS.values()))
    return Plan(
        file, arguments.overrides, getattr(arguments, "init_from", None), recipe_of(file, recipe, arguments.overrides)
    )


def recipe_of(file: Path, default: str | None, overrides: Sequence[str] = ()) -> str:
    """The recipe that a YAML names, else the default, else the one that its axes imply."""
    from ldm.config import files, parts

    source = files.read(file, overrides)
    values, known = source.values, parts.TABLES["recipe"]
    node = values.get("recipe")
    if isinstance(node, dict) and isinstance(name := node.get("type"), str):
        if name not in known:
            what, expected = "recipe.type: unknown name", f"one of {', '.join(known)}"
            hint = nearest(name, known) or "--plugin MODULE"
            raise source.error(what, "recipe.type", got=shown(name), expected=expected, hint=hint)
        return name
    return default or ("diffusion" if "backbone" in values or "conditioner" in values else "autoencoder")
