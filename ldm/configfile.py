"""A configuration file as plain values that know where they were written; the only importer of omegaconf."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ldm.errors import InputError

FORMAT = 1
RENAMES: dict[int, dict[str, str]] = {}  # format n -> {dotted key in it: the same in format n + 1}
COMMAND_LINE = "command line"
PLAIN_TAGS = {f"tag:yaml.org,2002:{name}" for name in ("map", "seq", "str", "int", "float", "bool", "null")}


class Loader(yaml.SafeLoader):
    """YAML as people mean it: 3e-4 is a number; `on` and `2024-01-01` are strings."""


Loader.yaml_implicit_resolvers = {
    first: [(tag, regex) for tag, regex in rules if not tag.endswith((":bool", ":float", ":timestamp"))]
    for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile("^(true|false)$"), list("tf"))
FLOAT = r"^[-+]?(\d[\d_]*\.[\d_]*|\.\d[\d_]*|\d[\d_]*(?=[eE]))([eE][-+]?\d+)?$|^[-+]?\.inf$|^\.nan$"
Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(FLOAT), list("-+.0123456789"))


@dataclass
class Source:
    """Plain values and, for each dotted key, the place that wrote it."""

    values: dict[str, Any]
    origin: dict[str, str]

    def where(self, key: str) -> str:
        """file:line of the key, or of the nearest node above it."""
        while key not in self.origin:
            key = key.rpartition(".")[0]
        return self.origin[key]

    def error(self, what: str, key: str, **words: str) -> InputError:
        """The one-line error about a key."""
        return InputError(what, self.where(key), **words)


def read(file: str | Path, overrides: list[str]) -> Source:
    """The file, then the key=value overrides, with ${interpolations} resolved and old key names renewed."""
    origin = {"": str(file)}
    source = Source(parse(_text(Path(file)), str(file), origin), origin)
    if not isinstance(source.values, dict):
        raise source.error(
            "configuration is not a mapping", "", got=repr(source.values), expected="lines of key: value"
        )
    for override in sorted(overrides, key=lambda text: ".type=" not in text):  # types first: they drop arguments
        _override(source, override)
    source.values = _resolved(source)
    _upgrade(source, RENAMES)
    return source


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError("configuration is not UTF-8 text", str(file), got=f"a bad byte at {error.start}") from None
    except OSError as error:
        raise InputError("cannot read the configuration", str(file), got=str(error.strerror)) from None


def parse(text: str, file: str, origin: dict[str, str], key: str = "") -> Any:
    """The plain values of a YAML text; `origin` learns the line of each key."""
    try:
        for event in yaml.parse(text, Loader):
            if isinstance(event, yaml.AliasEvent):
                raise InputError("YAML aliases are refused", _place(file, event), got=f"*{event.anchor}")
        node = yaml.compose(text, Loader)
        if node is None:
            raise InputError("configuration is empty", file)
        return _plain(node, file, origin, key)
    except yaml.YAMLError as error:
        line = getattr(getattr(error, "problem_mark", None), "line", None)
        where = file if line is None or file == COMMAND_LINE else f"{file}:{line + 1}"
        raise InputError("not valid YAML", where, got=getattr(error, "problem", None) or str(error)) from None
    except RecursionError:
        raise InputError("YAML is nested too deeply", file) from None


def _place(file: str, node: yaml.Node | yaml.Event) -> str:
    return file if file == COMMAND_LINE else f"{file}:{node.start_mark.line + 1}"


def _plain(node: yaml.Node, file: str, origin: dict[str, str], key: str) -> Any:
    origin.setdefault(key, _place(file, node))
    if node.tag not in PLAIN_TAGS:
        raise InputError(f"{key}: YAML tags are refused".removeprefix(": "), _place(file, node), got=node.tag)
    if isinstance(node, yaml.SequenceNode):
        return [_plain(item, file, origin, f"{key}.{i}") for i, item in enumerate(node.value)]
    if not isinstance(node, yaml.MappingNode):
        try:
            return Loader("").construct_object(node)
        except ValueError:
            raise InputError(f"{key}: not a value of its tag", _place(file, node), got=repr(node.value)) from None
    values: dict[str, Any] = {}
    for name, value in node.value:
        full = f"{key}.{name.value}".lstrip(".")
        if str(name.value) in values:
            raise InputError(f"{full}: written twice", _place(file, name), got=f"the first at {origin[full]}")
        origin[full] = _place(file, name)
        values[str(name.value)] = _plain(value, file, origin, full)
    return values


def _override(source: Source, text: str) -> None:
    """Set one key=value; a new `type` drops the arguments of the old one."""
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise InputError("override is not key=value", COMMAND_LINE, got=repr(text), hint=f"{key or 'key'}=VALUE")
    *above, name = key.split(".")
    node: Any = source.values
    for part in above:
        if isinstance(node, list) and part.isdecimal() and int(part) < len(node):
            node = node[int(part)]
        elif isinstance(node, dict):
            node = node.setdefault(part, {})
    if not isinstance(node, dict):
        raise InputError(f"{key}: nothing to override there", COMMAND_LINE, got=f"{'.'.join(above)}={node!r}")
    for known in [k for k in source.origin if f"{k}.".startswith(f"{key}.")]:
        del source.origin[known]
    source.origin[key] = COMMAND_LINE
    if name == "type" and node.get("type") != value:
        node.clear()
    node[name] = parse(value, COMMAND_LINE, source.origin, key) if value.strip() else None


def _resolved(source: Source) -> dict[str, Any]:
    """Interpolations such as ${seed} by their values; a resolver such as ${oc.env:HOME} would read the machine."""
    for key, value in _leaves(source.values):
        if isinstance(value, str) and re.search(r"\$\{[^}]*:", value):
            raise source.error(f"{key}: resolvers are refused", key, got=value)
    try:
        return OmegaConf.to_container(OmegaConf.create(source.values), resolve=True)  # type: ignore[return-value]
    except OmegaConfBaseException as error:
        key = (getattr(error, "full_key", None) or "").replace("[", ".").replace("]", "")
        raise source.error(f"{key}: cannot be resolved", key, got=str(error).splitlines()[0]) from None


def _leaves(node: Any, key: str = ""):
    if not isinstance(node, dict | list):
        yield key, node
        return
    for name, value in node.items() if isinstance(node, dict) else enumerate(node):
        yield from _leaves(value, f"{key}.{name}".lstrip("."))


def _upgrade(source: Source, renames: dict[int, dict[str, str]]) -> None:
    """Carry the values of an older format to this one; the number itself is not a setting."""
    written = source.values.pop("format", FORMAT)
    newest = max([FORMAT, *(number + 1 for number in renames)])
    if type(written) is not int or not 1 <= written <= newest:
        raise source.error(
            "format: unknown", "format", got=repr(written), expected=f"at most {newest}", hint="a newer ldm"
        )
    for number in range(written, newest):
        for old, new in renames.get(number, {}).items():
            _move(source, old.split("."), new.split("."))


def _move(source: Source, old: list[str], new: list[str]) -> None:
    """Carry one value to its new key, if it is there."""
    node = source.values
    for part in old[:-1]:
        node = node.get(part, {})
    if old[-1] not in node:
        return
    value, origin = node.pop(old[-1]), source.where(".".join(old))
    node = source.values
    for part in new[:-1]:
        node = node.setdefault(part, {})
    node[new[-1]] = value
    source.origin[".".join(new)] = origin
