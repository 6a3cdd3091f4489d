"""The page of all settings: of each part what it is, and its keyword arguments with types, defaults and comments."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Iterator
from functools import partial
from typing import Any

from ldm.config import parts
from ldm.errors import InputError, nearest

HEAD = """# Settings

Written by `ldm reference --out docs/reference.md`, from the code that reads them. The first tables say which keys a
configuration has. A key that has a section is a node, `{type: NAME, ...}`, of one of that section's parts, or without
`type` where it has none; a node among a part's own keys is of the same section. What no table lists is refused."""
COMMENT = re.compile(r"^\s+(\w+): [^#\n]*(?:  # type: ignore\S*)?  # (?!type: )(.+)$", re.MULTILINE)


def everything() -> Iterator[str]:
    """The kinds of configuration, then every axis with its parts."""
    from ldm.cli import evaluate
    from ldm.cli.demo import Gallery, Schema, Sheet
    from ldm.training.recipes import autoencoder, diffusion

    yield HEAD
    for title, who, schema in (
        ("Training a first stage", "`ldm train-autoencoder` with `configs/autoencoder/`", autoencoder.Schema),
        ("Training a second stage", "`ldm train-ldm` with `configs/ldm/`", diffusion.Schema),
        ("An evaluation", "`ldm evaluate` with `configs/evaluate/`", evaluate.Schema),
        ("The swiss roll", "`ldm demo` with `configs/demo/swiss_roll.yaml`", Schema),
        ("The sheet of scenes", "`ldm demo scenes` with `configs/demo/scenes.yaml`", Sheet),
        ("The gallery", "`ldm demo gallery` with `configs/demo/gallery.yaml`", Gallery),
    ):
        yield f"## {title}\n\n{who}."
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
    """The names of an axis's parts; of a single part none."""
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
    """What it is, and its settings."""
    target = parts.find(axis, name)
    of, fixed = (target.func, target.keywords) if isinstance(target, partial) else (target, {})
    if name:
        yield f"### {axis}.{name}"
    if text := " ".join((inspect.getdoc(of) or "").split()):
        yield " ".join([text, *(f"Here `{key}` is {json.dumps(value)}." for key, value in fixed.items())])
    yield from settings(axis, target)


def settings(axis: str, target: Any) -> Iterator[str]:
    """A table of a target's keyword arguments, and those that assembly gives."""
    from ldm.config.schema import describe, keywords

    parameters, owners, meanings, rows = keywords(target), parts.GIVEN.get(axis, {}), comments(target), []
    for key, parameter in parameters.items():
        name = f"[`{key}`](#{key})" if not axis and key in parts.TABLES else f"`{key}`"
        default = "required" if parameter.default is parameter.empty else f"`{json.dumps(parameter.default)}`"
        if key not in owners:
            rows.append([name, describe(parameter.annotation), default, meanings.get(key, "")])
    yield table(["key", "type", "default", "meaning"], rows) if rows else "No settings."
    if given := [f"`{key}` by {owner}" for key, owner in owners.items() if key in parameters]:
        yield f"Given, and no setting: {', '.join(given)}."


def comments(target: Any) -> dict[str, str]:
    """What stands beside the arguments in the source, one a line."""
    of: Any = target.func if isinstance(target, partial) else target
    fields = [each for each in reversed(getattr(of, "__mro__", ())) if "__dataclass_fields__" in vars(each)]
    made: list[Any] = fields or [getattr(of, "__init__", of) if isinstance(of, type) else of]
    sources = [inspect.getsource(each) for each in made if fields or inspect.isfunction(each)]
    return {key: meaning for source in sources for key, meaning in COMMENT.findall(source)}


def table(head: list[str], rows: list[list[str]]) -> str:
    """A table of Markdown, without the columns in which nothing stands."""
    used = [i for i in range(len(head)) if any(row[i] for row in rows)]
    lines = [[head[i] for i in used], ["---"] * len(used), *([row[i] for i in used] for row in rows)]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
