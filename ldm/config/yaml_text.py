"""YAML text as plain values with line numbers; the only importer of yaml."""

from __future__ import annotations

import re
from typing import Any

import yaml

from ldm.errors import InputError, shown

COMMAND_LINE = "command line"
NAME = re.compile(r"[\w-]+")  # of a key: no dots, which join keys
DEPTH = 16  # levels of nesting; a configuration has about 4
RESOLVER = re.compile(r"\$\{(?!\w+(\.\w+)*\})")  # ${...} around anything but a key
HINTS = {"\t": "spaces, not tabs", "${": 'quotes: "${KEY}"'}  # frequent reasons of broken YAML
FLOAT = r"[-+]?((\d[\d_]*\.[\d_]*|\.\d[\d_]*)([eE][-+]?\d+)?|\d[\d_]*[eE][-+]?\d+|\.inf)$|\.nan$"
INT = r"[-+]?(0|[1-9][\d_]{0,30})$"


class Loader(yaml.SafeLoader):
    """YAML without surprises: 3e-4 is a number; `on`, `007`, `12:30` and `2024-01-01` are strings."""


Loader.yaml_implicit_resolvers = {}
for kind, rule in {"null": "(~|null|)$", "bool": "(true|false)$", "int": INT, "float": FLOAT}.items():
    Loader.add_implicit_resolver(f"tag:yaml.org,2002:{kind}", re.compile(rule), None)


def parse(text: str, file: str, origin: dict[str, str], key: str = "") -> Any:
    """The plain values of a YAML text; the line of each dotted key is added to `origin`."""
    try:
        _refuse(text, file)
        node = yaml.compose(text, Loader)
    except yaml.reader.ReaderError as error:
        raise InputError(f"not valid YAML: {error.reason}", file, got=f"character 0x{error.character:02x}") from None
    except yaml.MarkedYAMLError as error:
        raise _invalid(error, text, file) from None
    return None if node is None else _plain(node, file, origin, key)


def _refuse(text: str, file: str) -> None:
    """Refuse aliases, tags, deep nesting and ${oc.env:HOME}: attacks use them, configurations do not."""
    depth = 0
    for event in yaml.parse(text, Loader):
        where, tag = _place(file, event.start_mark), getattr(event, "tag", None)
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if isinstance(event, yaml.AliasEvent):
            raise InputError("YAML aliases are refused", where, got=f"*{event.anchor}", hint="${KEY}")
        if tag:
            raise InputError("YAML tags are refused", where, got=tag.replace("tag:yaml.org,2002:", "!!"))
        if isinstance(event, yaml.ScalarEvent) and RESOLVER.search(event.value):
            raise InputError("only ${KEY} references are allowed", where, got=shown(event.value))
        if depth > DEPTH:
            raise InputError(f"YAML is nested deeper than {DEPTH} levels", where)


def _invalid(error: yaml.MarkedYAMLError, text: str, file: str) -> InputError:
    """The parser's error, and the line it is about."""
    mark: Any = error.problem_mark
    written = text[text.rfind("\n", 0, mark.index) + 1 :].partition("\n")[0]
    begun = f" begun in line {error.context_mark.line + 1}" if error.context_mark else ""
    said = f"{error.context}{begun}, {error.problem}" if error.context else error.problem
    got = shown(written.strip()) if written.strip() else ""
    hint = next((hint for sign, hint in HINTS.items() if sign in written), "")
    return InputError(f"not valid YAML: {said}", _place(file, mark), got, hint=hint)


def _place(file: str, mark: Any) -> str:
    return file if file == COMMAND_LINE else f"{file}:{mark.line + 1}"


def _plain(node: yaml.Node, file: str, origin: dict[str, str], key: str) -> Any:
    origin.setdefault(key, _place(file, node.start_mark))
    if isinstance(node, yaml.ScalarNode):
        return Loader("").construct_object(node)
    if isinstance(node, yaml.SequenceNode):
        return [_plain(item, file, origin, f"{key}.{i}") for i, item in enumerate(node.value)]
    values: dict[str, Any] = {}
    for name, value in node.value:
        where = _place(file, name.start_mark)
        if not isinstance(name, yaml.ScalarNode) or not NAME.fullmatch(name.value):
            raise InputError("keys must be plain names", where, got=shown(_plain(name, file, {}, "")))
        full = f"{key}.{name.value}".lstrip(".")
        if name.value in values:
            raise InputError(f"{full}: written twice", where, got=f"the first at {origin[full]}")
        origin[full] = where
        values[name.value] = _plain(value, file, origin, full)
    return values
