"""The commands. Each is a module with `options(parser)` and `run(arguments)`, imported when it is called."""

from __future__ import annotations

import argparse
import importlib
import os
import re
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from ldm import __version__
from ldm.config import parts
from ldm.errors import InputError, LdmError, nearest


class Command(NamedTuple):
    """A module, what the help says about it, and for `train` the recipe that it trains."""

    module: str
    help: str
    recipe: str = ""


COMMANDS = {
    "train-autoencoder": Command(
        "ldm.cli.train", "train a first stage: an autoencoder (VAE) of pictures", "autoencoder"
    ),
    "train-ldm": Command("ldm.cli.train", "train a second stage: a latent diffusion model", "diffusion"),
    "train": Command("ldm.cli.train", "run any training YAML"),
    "doctor": Command("ldm.cli.doctor", "check a training before it runs: data, cost, and whether it can learn"),
    "sample": Command("ldm.cli.sample", "make pictures from prompts, with any checkpoint"),
    "replay": Command("ldm.cli.replay", "make a picture again from what its PNG stores"),
    "convert": Command("ldm.cli.convert", "convert a checkpoint to another format"),
    "cache": Command("ldm.cli.cache", "encode a dataset once, so that training reads latents"),
    "fetch": Command("ldm.cli.fetch", "list, check and download the weights that metrics need"),
    "evaluate": Command("ldm.cli.evaluate", "measure a checkpoint and write a report as HTML and JSON"),
    "reference": Command("ldm.cli.reference", "print all settings, or all commands with their options"),
    "judge": Command("ldm.scenes.judge_command", "train, evaluate or use the classifier of the built-in scenes"),
    "demo": Command("ldm.cli.demo", "learn a swiss roll in a minute, show the scenes, or remake the docs' pictures"),
}
MEMORY = "the device has too little memory"
SMALLER = "a smaller data.batch_size or larger trainer.accumulate; when sampling, --batch-size 1 or --offload"
CHOICE = re.compile(r"argument (\S+): invalid choice: (.+) \(choose from (.+)\)")


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line like all others."""

    def error(self, message: str) -> NoReturn:
        """Raise an error instead of printing the usage; name the option or the choice that was probably meant."""
        if choice := CHOICE.fullmatch(message):
            option, got, names = (text.replace("'", "") for text in choice.groups())
            raise InputError(
                f"{option}: unknown", "command line", got, f"one of {names}", nearest(got, names.split(", "))
            )
        unknown = re.match(r"unrecognized arguments: (-\S+?)(?:=|\s|$)", message)
        meant = nearest(unknown[1], self._option_string_actions, 0.7) if unknown else ""
        raise InputError(message, "command line", hint=meant or f"{self.prog} --help")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; the exit status says what kind of error it was."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    try:
        return _dispatch([argument for argument in arguments if argument != "--debug"])
    except LdmError as error:
        return _report("\n".join([*error.table, f"error: {error}"]), error.code, debug)
    except KeyboardInterrupt:
        return _report("error: interrupted", 130, debug)
    except BrokenPipeError:  # the reader has gone, as in `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        if type(error).__name__ == "OutOfMemoryError":  # torch's; torch may not be imported
            return _report(f"error: {MEMORY}; got {str(error).splitlines()[0]}; try {SMALLER}", 2, debug)
        text = f"{type(error).__name__}: {error}".replace("\n", " ")
        return _report(f"error: internal, please report it: {text}; try --debug for the traceback", 1, debug)


def _report(text: str, code: int, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    print(text, file=sys.stderr)
    return code


def _dispatch(arguments: list[str]) -> int:
    listing = "\n".join(f"  {name:17} {each.help}" for name, each in COMMANDS.items())
    parser = Parser(
        prog="ldm",
        description="Latent diffusion: train, sample, evaluate and convert both stages.",
        epilog=f"commands:\n{listing}\n\n`ldm COMMAND --help` lists the options; --debug shows tracebacks.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="ldm COMMAND ...",
    )
    parser.add_argument("command", metavar="COMMAND", help="one of the commands below")
    parser.add_argument("--version", action="version", version=__version__)
    name = parser.parse_args(arguments[:1]).command
    if name not in COMMANDS:
        meant = nearest(name, COMMANDS)
        raise InputError("no such command", "command line", name, f"one of {', '.join(COMMANDS)}", meant)
    module, own = command(name)
    options = own.parse_intermixed_args(arguments[1:])
    if "plugin" in options:
        parts.plug_installed()
        for plugin in options.plugin:
            parts.plug(plugin)
    return module.run(options) or 0


def command(name: str) -> tuple[Any, Parser]:
    """A command's module, and the parser of its options."""
    module = importlib.import_module(COMMANDS[name].module)
    parser = Parser(prog=f"ldm {name}", description=module.__doc__)
    module.options(parser)
    if recipe := COMMANDS[name].recipe:
        parser.set_defaults(recipe=recipe, config="scenes")
    return module, parser


def config_options(parser: argparse.ArgumentParser, default: str | None = None, words: str = "key=value") -> None:
    """The options of every command that reads a configuration; `words` is what stands without an option."""
    parser.add_argument("--config", default=default, help="a YAML file, or the name of a shipped configuration")
    parser.add_argument("--print-config", action="store_true", help="print the checked configuration and stop")
    plugin_option(parser)
    parser.add_argument("overrides", nargs="*", metavar=words, help="a setting: path.type=cosine")


def plugin_option(parser: argparse.ArgumentParser) -> None:
    """The option for the user's own parts."""
    parser.add_argument(
        "--plugin", action="append", default=[], metavar="MODULE", help="a Python module with your own parts"
    )


def config_file(name: str, *folders: str) -> Path:
    """The file itself, or the shipped configuration of that name, from the first of these folders that has it.

    Shipped configurations lie in the package, or beside it in a clone.
    """
    if Path(name).suffix in (".yaml", ".yml", ".json") or Path(name).name != name:
        return Path(name)
    package = Path(__file__).parent.parent
    places = [root / "configs" / folder for folder in reversed(folders) for root in (package, package.parent)]
    shipped = {file.stem: file for place in places for file in place.glob("*.yaml")}
    if name not in shipped:
        expected = f"a .yaml file, or one of {', '.join(sorted(shipped))}"
        raise InputError("no such configuration", name, expected=expected, hint=nearest(name, shipped))
    return shipped[name]
