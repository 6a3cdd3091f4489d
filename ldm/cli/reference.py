"""Print every setting, or every command's options, as Markdown; with a NAME, one axis or part alone."""

from __future__ import annotations

import argparse
import inspect
import json
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from ldm.cli import COMMANDS, command, plugin_option
from ldm.config import parts
from ldm.errors import InputError, nearest

SETTINGS = """# Settings

Written by `ldm reference --out docs/reference.md`, from the code that reads the settings. The first tables list the
keys of each kind of configuration. A key with its own section takes a node, `{type: NAME, ...}`, that names one of that
section's parts. A section with a single part needs no `type`. A node inside a part names a part of the same section.
Any other key is refused."""
COMMENT = re.compile(r"^\s+(\w+): [^#\n]*(?:  # type: ignore\S*)?  # (?!type: )(.+)$", re.MULTILINE)
OPTIONS = """# Commands

Written by `ldm reference --commands --out docs/commands.md`. With `--debug` an error shows its traceback, and
`ldm --version` prints the version. `train_autoencoder.py`, `train_ldm.py` and `sample.py` are the commands
`train-autoencoder`, `train-ldm` and `sample`."""
USAGE = {"*": "[{} ...]", "?": "[{}]", None: "{}"}  # by how often an argument is given


def options(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("name", nargs="?", metavar="NAME", help="an axis or a part: path, unet, path.cosine")
    parser.add_argument("--commands", action="store_true", help="print the commands and their options")
    parser.add_argument("--out", metavar="FILE", help="write to this file")
    plugin_option(parser)


def run(arguments: argparse.Namespace) -> int:
    """Print or write a page."""
    if arguments.commands and arguments.name:
        raise InputError("--commands: cannot be combined with NAME", "NAME", arguments.name, hint="one of the two")
    page = commands() if arguments.commands else named(arguments.name) if arguments.name else everything()
    text = "\n\n".join(page)
    if not arguments.out:
        print(text)
        return 0
    try:
        Path(arguments.out).write_text(f"{text}\n", encoding="utf-8")
    except OSError as error:
        raise InputError("--out: cannot be written to", arguments.out, error.strerror or "") from None
    print(f"wrote {arguments.out}")
    return 0


def everything() -> Iterator[str]:
    """The page of settings: each kind of configuration, then every axis with its parts."""
    from ldm.cli import evaluate
    from ldm.cli.demo import DEMOS
    from ldm.training.recipes import autoencoder, diffusion

    yield SETTINGS
    for title, reader, schema in (
        ("Training a first stage", "`ldm train-autoencoder` with `configs/autoencoder/`", autoencoder.Schema),
        ("Training a second stage", "`ldm train-ldm` with `configs/ldm/`", diffusion.Schema),
        ("An evaluation", "`ldm evaluate` with `configs/evaluate/`", evaluate.Schema),
        ("The swiss roll", "`ldm demo` with `configs/demo/swiss_roll.yaml`", DEMOS["swiss_roll"].schema),
        ("The sheet of scenes", "`ldm demo scenes` with `configs/demo/scenes.yaml`", DEMOS["scenes"].schema),
        ("The gallery", "`ldm demo gallery` with `configs/demo/gallery.yaml`", DEMOS["gallery"].schema),
    ):
        yield f"## {title}\n\n{reader}."
        yield from settings("", schema)
    for axis in parts.TABLES:
        yield from section(axis)


def named(name: str) -> Iterator[str]:
    """The axis of this name, or each part of this name."""
    if name in parts.TABLES:
        return section(name)
    places = [(axis, each) for axis in parts.TABLES for each in types(axis) if each and not twin(axis)]
    found = [(axis, each) for axis, each in places if name in (each, f"{axis}.{each}")]
    if not found:
        known = [*parts.TABLES, *(each for _, each in places), *(f"{axis}.{each}" for axis, each in places)]
        expected = f"a part, or one of {', '.join(parts.TABLES)}"
        raise InputError("no such part", "NAME", name, expected, nearest(name, known))
    return (block for place in found for block in part(*place))


def types(axis: str) -> list[str]:
    """The names of an axis's parts; an axis with a single part has none."""
    table = parts.TABLES[axis]
    return [""] if isinstance(table, str) else list(table)


def twin(axis: str) -> str:
    """The earlier axis that has the same parts, if there is one."""
    first = next(other for other, known in parts.TABLES.items() if known is parts.TABLES[axis])
    return "" if first == axis else first


def section(axis: str) -> Iterator[str]:
    """An axis and its parts."""
    yield f"## {axis}"
    if first := twin(axis):
        yield f"The parts of [{first}](#{first})."
        return
    for name in types(axis):
        yield from part(axis, name)


def part(axis: str, name: str) -> Iterator[str]:
    """A part's description and settings."""
    target = parts.find(axis, name)
    of, fixed = (target.func, target.keywords) if isinstance(target, partial) else (target, {})
    if name:
        yield f"### {axis}.{name}"
    if text := " ".join((inspect.getdoc(of) or "").split()):
        yield " ".join([text, *(f"Here `{key}` is {json.dumps(value)}." for key, value in fixed.items())])
    yield from settings(axis, target)


def settings(axis: str, target: Any) -> Iterator[str]:
    """A table of a target's keyword arguments, and the ones that the assembly sets."""
    from ldm.config.schema import describe, keywords

    parameters, owners, meanings, rows = keywords(target), parts.GIVEN.get(axis, {}), comments(target), []
    for key, parameter in parameters.items():
        name = f"[`{key}`](#{key})" if not axis and key in parts.TABLES else f"`{key}`"
        default = "required" if parameter.default is parameter.empty else f"`{json.dumps(parameter.default)}`"
        if key not in owners:
            rows.append([name, describe(parameter.annotation), default, meanings.get(key, "")])
    yield table(["key", "type", "default", "meaning"], rows) if rows else "No settings."
    if given := [f"`{key}` by {owner}" for key, owner in owners.items() if key in parameters]:
        yield f"Set by the program: {', '.join(given)}."


def comments(target: Any) -> dict[str, str]:
    """The comment beside each argument in the source."""
    of: Any = target.func if isinstance(target, partial) else target
    fields = [each for each in reversed(getattr(of, "__mro__", ())) if "__dataclass_fields__" in vars(each)]
    made: list[Any] = fields or [getattr(of, "__init__", of) if isinstance(of, type) else of]
    sources = [inspect.getsource(each) for each in made if fields or inspect.isfunction(each)]
    return {key: meaning for source in sources for key, meaning in COMMENT.findall(source)}


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table without its empty columns."""
    used = [i for i in range(len(head)) if any(row[i] for row in rows)]
    lines = [[head[i] for i in used], ["---"] * len(used), *([row[i] for i in used] for row in rows)]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def commands() -> Iterator[str]:
    """The page of commands, each with its options."""
    yield OPTIONS
    yield table(["command", "what it does"], [[f"[{name}](#{name})", each.help] for name, each in COMMANDS.items()])
    for name in COMMANDS:
        module, parser = command(name)
        actions = [action for action in parser._actions if action.dest != "help"]
        words = [USAGE[a.nargs].format(value(a)) for a in actions if not a.option_strings]  # type: ignore[index]
        yield f"## {name}\n\n{module.__doc__}"
        yield f"```console\n$ {' '.join(['ldm', name, '[OPTIONS]', *words])}\n```"
        yield table(["option", "meaning"], [[f"`{shape(action)}`", meaning(action)] for action in actions])
        if parser.epilog:
            yield f"```\n{parser.epilog}\n```"


def shape(action: argparse.Action) -> str:
    """The names of an option and its value."""
    names = ", ".join(action.option_strings)
    return " ".join(filter(None, [names, "" if action.nargs == 0 else value(action)]))


def value(action: argparse.Action) -> str:
    """The placeholder of an option's value."""
    if isinstance(action.metavar, str):
        return action.metavar
    return f"{{{','.join(map(str, action.choices))}}}" if action.choices else action.dest.upper()


def meaning(action: argparse.Action) -> str:
    """The help of an option, with its default."""
    text = action.help or ""
    if action.default in (None, False, "") or action.default == [] or "default" in text:
        return text
    return f"{text} (default {action.default})".strip()
