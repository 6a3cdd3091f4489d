"""A configuration file and its overrides as plain values, each with its origin; the only importer of omegaconf."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ldm.config.yaml_text import COMMAND_LINE, NAME, parse
from ldm.errors import InputError, nearest, shown

FORMAT = 1
MOVED = {  # keys of version 0.1 -> where they are now
    name: f"recipe.{name}" for name in ("train", "sample_from", "two_forwards", "revive")
}
RENAMES: dict[int, dict[str, str]] = {}  # format n -> {dotted key in it: the same in format n + 1}


@dataclass
class Source:
    """Plain values, and for each dotted key the file and line, or the command line, that set it."""

    values: dict[str, Any]
    origin: dict[str, str]

    def where(self, key: str) -> str:
        """file:line of the key, or of the nearest node above it."""
        while key not in self.origin:
            key = key.rpartition(".")[0]
        return self.origin[key]

    def rewrite(self, key: str, place: str) -> None:
        """Set the origin of a key and of everything below it."""
        self.origin = {k: v for k, v in self.origin.items() if not f"{k}.".startswith(f"{key}.")} | {key: place}

    def set(self, key: str, value: Any, place: str) -> None:
        """Set a top-level key."""
        self.values[key] = value
        self.rewrite(key, place)

    def error(self, what: str, key: str, **words: str) -> InputError:
        """The one-line error about a key."""
        return InputError(what, self.where(key), **words)


def read(file: str | Path, overrides: Sequence[str]) -> Source:
    """A file and its overrides."""
    origin = {"": str(file)}
    source = Source(parse(_text(Path(file)), str(file), origin), origin)
    if source.values is None:
        raise source.error("configuration is empty", "")
    if not isinstance(source.values, dict):
        got = shown(source.values)
        raise source.error("configuration is not a mapping", "", got=got, expected="lines of key: value")
    return amend(source, overrides)


def amend(source: Source, overrides: Sequence[str]) -> Source:
    """A copy with old keys renamed, overrides applied, and each ${KEY} replaced by its value."""
    source = Source(copy.deepcopy(source.values), dict(source.origin))
    _upgrade(source, RENAMES)
    for override in sorted(map(_moved, overrides), key=_rank):
        _override(source, override)
    source.values = _resolved(source)
    return source


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        got = f"byte 0x{error.object[error.start]:02x}"
        raise InputError("configuration is not UTF-8 text", f"{file}:{line}", got=got) from None
    except OSError as error:
        beside = {} if file.exists() else {path.stem: str(path) for path in file.parent.glob("*.yaml")}
        hint = beside.get(nearest(file.stem, beside), "")
        raise InputError(f"cannot read the configuration: {error.strerror}", str(file), hint=hint) from None


def _moved(override: str) -> str:
    """An override with the present name of its key."""
    key, equals, value = override.partition("=")
    return f"{MOVED.get(key, key)}{equals}{value}"


def _rank(override: str) -> tuple[int, bool]:
    """Sort key: nodes before their contents, types before their arguments; of equal keys, the last wins."""
    key = override.partition("=")[0]
    return key.count("."), not key.endswith(".type")


def _override(source: Source, text: str) -> None:
    """Set one key=value; a new `type` drops the arguments of the old one."""
    key, equals, value = text.partition("=")
    names = key.split(".")
    if not equals or not all(map(NAME.fullmatch, names)):
        hint = f"{'.'.join(NAME.findall(key)) or 'KEY'}=VALUE"
        raise InputError("override is not KEY=VALUE", COMMAND_LINE, got=shown(text), hint=hint)
    node, slot = _find(source, names)
    new = parse(value, COMMAND_LINE, {}, key)
    if len(names) > 1 and slot == "type" and node.get("type", new) != new:
        node.clear()
        source.rewrite(".".join(names[:-1]), f"{COMMAND_LINE}: {text} drops the other arguments")
    source.rewrite(key, COMMAND_LINE)
    node[slot] = new


def _find(source: Source, names: list[str]) -> tuple[Any, str | int]:
    """The node that contains a dotted name, created if missing, and the key or index in it."""
    node: Any = source.values
    for depth, name in enumerate(names, 1):
        if isinstance(node, list) and name.isdecimal() and int(name) < len(node):
            slot: str | int = int(name)
        elif isinstance(node, dict):
            slot = name
        else:
            got = f"{'.'.join(names[: depth - 1])}={shown(node)}"
            raise InputError(f"{'.'.join(names)}: does not exist, so it cannot be overridden", COMMAND_LINE, got=got)
        if depth < len(names):
            source.origin.setdefault(".".join(names[:depth]), COMMAND_LINE)
            node = node.setdefault(slot, {}) if isinstance(node, dict) else node[int(name)]
    return node, slot


def _resolved(source: Source) -> dict[str, Any]:
    """The values with each ${KEY} replaced."""
    try:
        return OmegaConf.to_container(OmegaConf.create(source.values), resolve=True)  # type: ignore[return-value]
    except OmegaConfBaseException as error:
        key = str(error.full_key).replace("[", ".").replace("]", "")
        node, slot = _find(source, key.split("."))
        if "Recursive" in str(error):
            raise source.error(f"{key}: circular reference", key, got=shown(node[slot])) from None
        meant = nearest(node[slot].strip("${}"), [name for name in source.origin if name != key])
        hint = f"${{{meant}}}" if meant else ""
        raise source.error(f"{key}: unknown reference", key, got=shown(node[slot]), hint=hint) from None


def _upgrade(source: Source, renames: dict[int, dict[str, str]]) -> None:
    """Rename the keys of an older format; the format number itself is not a setting."""
    written = source.values.pop("format", FORMAT)
    newest = max([FORMAT, *(number + 1 for number in renames)])
    if type(written) is not int or not 1 <= written <= newest:
        hint = "a newer ldm" if type(written) is int and written > newest else ""
        raise source.error("format: unknown", "format", got=shown(written), expected=f"at most {newest}", hint=hint)
    for table in (MOVED, *(renames.get(number, {}) for number in range(written, newest))):
        for old, new in table.items():
            place = source.where(old)
            try:
                value = _take(source.values, *old.split("."))
            except KeyError:
                continue
            node, slot = _find(source, new.split("."))
            node[slot] = value
            source.rewrite(new, place)


def _take(node: Any, name: str, *below: str) -> Any:
    """Remove and return the value at a dotted name, and remove every node that this leaves empty."""
    if not isinstance(node, dict):
        raise KeyError(name)
    if not below:
        return node.pop(name)
    value = _take(node[name], *below)
    if not node[name]:
        del node[name]
    return value
