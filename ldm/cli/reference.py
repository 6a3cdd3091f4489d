"""Print every setting, or every command's options, as Markdown; with a NAME, one axis or part alone."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

from ldm.cli import COMMANDS, command, own_parts, settings_page
from ldm.errors import InputError

HEAD = """# Commands

Written by `ldm reference --commands --out docs/commands.md`. With `--debug` an error shows its traceback, and
`ldm --version` says the version. `train_autoencoder.py`, `train_ldm.py` and `sample.py` are the commands
`train-autoencoder`, `train-ldm` and `sample`."""
AS_OFTEN = {"*": "[{} ...]", "?": "[{}]", None: "{}"}


def options(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("name", nargs="?", metavar="NAME", help="an axis or a part: path, unet, path.cosine")
    parser.add_argument("--commands", action="store_true", help="tell of the commands and their options")
    parser.add_argument("--out", metavar="FILE", help="write to this file")
    parser.add_argument("--plugin", action="append", default=[], metavar="MODULE", help="a module with your own parts")


def run(arguments: argparse.Namespace) -> int:
    """Print or write what was asked for."""
    own_parts(arguments)
    text = "\n\n".join(blocks(arguments.name, arguments.commands))
    if not arguments.out:
        print(text)
        return 0
    try:
        Path(arguments.out).write_text(f"{text}\n", encoding="utf-8")
    except OSError as error:
        raise InputError("--out: cannot be written to", arguments.out, error.strerror or "") from None
    print(f"wrote {arguments.out}")
    return 0


def blocks(name: str | None, of_commands: bool) -> Iterator[str]:
    """The paragraphs, tables and headings of a page."""
    if of_commands and name:
        raise InputError("--commands: tells of all of them", "NAME", name, hint="either")
    return commands() if of_commands else settings_page.named(name) if name else settings_page.everything()


def commands() -> Iterator[str]:
    """Every command with its options."""
    yield HEAD
    yield settings_page.table(
        ["command", "what it does"], [[f"[{name}](#{name})", what] for name, what in COMMANDS.items()]
    )
    for name in COMMANDS:
        module, parser = command(name)
        actions = [action for action in parser._actions if action.dest != "help"]
        words = [AS_OFTEN[a.nargs].format(value(a)) for a in actions if not a.option_strings]  # type: ignore[index]
        yield f"## {name}\n\n{module.__doc__}"
        yield f"```console\n$ {' '.join(['ldm', name, '[OPTIONS]', *words])}\n```"
        yield settings_page.table(
            ["option", "meaning"], [[f"`{shape(action)}`", meaning(action)] for action in actions]
        )
        if parser.epilog:
            yield f"```\n{parser.epilog}\n```"


def shape(action: argparse.Action) -> str:
    """Its names with what they take."""
    names = ", ".join(action.option_strings)
    return " ".join(filter(None, [names, "" if action.nargs == 0 else value(action)]))


def value(action: argparse.Action) -> str:
    """What stands for its value."""
    if isinstance(action.metavar, str):
        return action.metavar
    return f"{{{','.join(map(str, action.choices))}}}" if action.choices else action.dest.upper()


def meaning(action: argparse.Action) -> str:
    """Its help, and its default where that does not say it."""
    said = action.help or ""
    unsaid = action.default not in (None, False, "") and action.default != [] and "default" not in said
    return " ".join([*filter(None, [said]), *[f"(default {action.default})"] * unsaid])
