"""The commands. Each is a module with `options(parser)` and `run(arguments)`, imported when it is called."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ldm import __version__
from ldm.config import parts
from ldm.errors import InputError, LdmError

COMMANDS = {
    "train-autoencoder": "train a first stage: images to latents and back",
    "train-ldm": "train a second stage: pictures from captions, labels, maps, or nothing",
    "train": "train any recipe that a YAML names, such as one of a plugin",
    "doctor": "say before a training what it will cost and whether it can work",
    "sample": "make pictures from prompts, with any checkpoint",
    "replay": "make a picture again from what its PNG remembers",
    "convert": "carry a checkpoint from one format to another",
    "cache": "encode a data set once, for stage two to train on",
    "fetch": "say which weights files metrics need, and check or get them",
    "evaluate": "measure a checkpoint: distances, prompts, curves; as JSON and a page",
    "reference": "every setting, with its type, default and meaning; or every command's options",
    "judge": "train, measure or ask the judge that reads pictures of scenes",
    "demo": "learn a swiss roll in a minute, look at the built-in scenes, or remake the docs' pictures",
}


MEMORY = "the device has too little memory"
SMALLER = "less at a time: data.batch_size or trainer.accumulate, backbone.checkpointing=true; --batch-size, --offload"


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line like all others."""

    def error(self, message: str):
        """Raise rather than print the usage and exit."""
        raise InputError(message, "command line", hint=f"{self.prog} --help")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; the exit status says whose fault an error is."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    try:
        return _dispatch([argument for argument in arguments if argument != "--debug"])
    except LdmError as error:
        return _report("\n".join([*error.table, f"error: {error}"]), error.code, debug)
    except KeyboardInterrupt:
        return _report("error: interrupted", 130, debug)
    except BrokenPipeError:  # who read this has heard enough, as `| head` has
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        if type(error).__name__ == "OutOfMemoryError":  # torch's, which need not be here
            return _report(f"error: {MEMORY}; got {str(error).splitlines()[0]}; try {SMALLER}", 2, debug)
        text = f"{type(error).__name__}: {error}".replace("\n", " ")
        return _report(f"error: internal, please report it: {text}; try --debug for the traceback", 1, debug)


def _report(text: str, code: int, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    print(text, file=sys.stderr)
    return code


def _dispatch(arguments: list[str]) -> int:
    listing = "\n".join(f"  {name:17} {line}" for name, line in COMMANDS.items())
    parser = Parser(
        prog="ldm",
        description="Latent diffusion, both stages.",
        epilog=f"commands:\n{listing}\n\n`ldm COMMAND --help` tells more; --debug shows tracebacks.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="ldm COMMAND ...",
    )
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help="one of the commands below")
    parser.add_argument("--version", action="version", version=__version__)
    module, own = command(parser.parse_args(arguments[:1]).command)
    return module.run(own.parse_intermixed_args(arguments[1:])) or 0


def command(name: str) -> tuple[Any, Parser]:
    """A command's module, and the parser of its options."""
    place = "ldm.scenes.judge_command" if name == "judge" else f"ldm.cli.{name.replace('-', '_')}"
    module = importlib.import_module(place)
    parser = Parser(prog=f"ldm {name}", description=module.__doc__)
    module.options(parser)
    return module, parser


def config_options(parser: argparse.ArgumentParser, default: str | None = None) -> None:
    """What every command with a configuration understands."""
    parser.add_argument("--config", default=default, help="a YAML file, or the name of a shipped one")
    parser.add_argument("--print-config", action="store_true", help="print the checked configuration and stop")
    plugin_option(parser)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="a setting: path.type=cosine")


def plugin_option(parser: argparse.ArgumentParser) -> None:
    """Parts of a user's own."""
    parser.add_argument("--plugin", action="append", default=[], metavar="MODULE", help="a module with your own parts")


def own_parts(arguments: argparse.Namespace) -> None:
    """Add the parts of installed packages and of --plugin modules."""
    parts.plug_installed()
    for module in arguments.plugin:
        parts.plug(module)


def config_file(name: str, *folders: str) -> Path:
    """The file itself, or the shipped configuration of that name: in the package, or beside it in a checkout.

    A name that is in several folders means what is in the first of them.
    """
    if Path(name).suffix in (".yaml", ".yml", ".json") or Path(name).name != name:
        return Path(name)
    package = Path(__file__).parent.parent
    places = [root / "configs" / folder for folder in reversed(folders) for root in (package, package.parent)]
    shipped = {file.stem: file for place in places for file in place.glob("*.yaml")}
    if name not in shipped:
        names = ", ".join(sorted(shipped))
        raise InputError("no such configuration", name, expected=f"a .yaml file, or one of {names}")
    return shipped[name]
