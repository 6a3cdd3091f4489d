"""Checked configurations, and the objects that they describe. A part's schema is its constructor's keywords."""

from __future__ import annotations

import inspect
import math
import re
import types
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from ldm.config import files, parts
from ldm.errors import nearest, shown

PLAIN = {int: "an integer", float: "a finite number", bool: "true or false", str: "a string", types.NoneType: "null"}
LISTS = (list, tuple, Sequence)


class Part:
    """In a command's schema: a node built from the table with the name of its key."""


class Config:
    """Values checked against a schema, with defaults filled in; `build` makes the objects."""

    def __init__(self, source: files.Source, schema: type, pending: Collection[str] = ()):
        self.source, self.schema, self.pending = source, schema, pending
        self.values = {"format": files.FORMAT, **self._fields(source.values, schema, "", "")}

    def __getitem__(self, key: str) -> Any:
        return self.values[key]

    def build(self, key: str, **given: Any) -> Any:
        """The object that a top-level node describes; `given` has the arguments in parts.GIVEN."""
        return self._construct(self.values[key], key, key, given)

    def amended(self, overrides: Sequence[str]) -> Config:
        """A copy with overrides."""
        return Config(files.amend(files.Source(self.values, self.source.origin), overrides), self.schema)

    @contextmanager
    def blame(self, key: str) -> Iterator[None]:
        """Add key, file and line to a constructor's ValueError("argument: what; got X; try Y")."""
        try:
            yield
        except ValueError as error:
            what, *rest = re.split("[,;] (?=(?:got|expected|try) )", f"{key}.{error}")
            if not re.match(r"[\w.]+: ", what):
                raise
            words = dict(words.split(" ", 1) for words in rest)
            words["hint"] = words.pop("try", "")
            raise self.source.error(what, what.partition(":")[0], **words) from error

    def _construct(self, node: dict[str, Any], table: str, key: str, given: dict[str, Any]) -> Any:
        target = parts.find(table, node.get("type", ""))
        schema = keywords(target)
        arguments = {name: given[name] for name in schema if name in given and name in parts.GIVEN.get(table, {})}
        for name, value in node.items():
            if name in schema:
                arguments[name] = self._argument(value, schema[name].annotation, table, f"{key}.{name}", given)
        with self.blame(key):
            return _call(target, arguments)

    def _argument(self, value: Any, kind: Any, table: str, key: str, given: dict[str, Any]) -> Any:
        """The object of a node, or the objects of a list of nodes; plain values unchanged."""
        kind = _variant(kind, value)
        if get_origin(kind) in LISTS and _is_part(get_args(kind)[0]):
            return [self._construct(node, table, f"{key}.{i}", given) for i, node in enumerate(value)]
        return self._construct(value, table, key, given) if _is_part(kind) else value

    def _fields(self, node: dict[str, Any], target: Any, key: str, table: str) -> dict[str, Any]:
        """Check each key of a node against the target's keyword arguments, and fill in defaults."""
        owners, checked = parts.GIVEN.get(table, {}), {}
        schema = keywords(target)
        settable = [name for name in schema if name not in owners]
        for name in node:
            full = f"{key}.{name}".lstrip(".")
            if name in owners:
                raise self.source.error(f"{full}: is set by {owners[name]}, not here", full, hint="leaving it out")
            if name not in settable:
                hint = getattr(target, "hints", {}).get(name)
                words = _one_of(settable, name) | ({"hint": hint} if hint else {})
                raise self.source.error(f"{full}: unknown key", full, **words)
        for name in settable:
            full, default = f"{key}.{name}".lstrip("."), schema[name].default
            if schema[name].annotation is Part and isinstance(default, str):  # the name of a part
                own = node.get(name, {})
                node = {**node, name: {"type": default, **own} if isinstance(own, dict) else own}
            own = node.get(name)
            typeless = isinstance(own, dict) and "type" not in own and isinstance(parts.TABLES.get(name), dict)
            if not key and name in self.pending and (typeless or not isinstance(own, dict)):
                continue  # it is completed later
            if name in node:
                checked[name] = self._value(node[name], schema[name].annotation, full, table or name)
            elif default is inspect.Parameter.empty:
                raise self.source.error(f"{full}: missing", full, expected=describe(schema[name].annotation))
            else:
                checked[name] = list(default) if isinstance(default, tuple) else default
        return checked

    def _value(self, value: Any, kind: Any, key: str, table: str) -> Any:
        """The value, converted to its annotation."""
        variant, choices = _variant(kind, value), get_args(_variant(kind, value))
        if _is_part(variant):
            return self._node(value, key, table)
        if get_origin(variant) is Literal and value in choices:
            return value
        if get_origin(variant) in LISTS and isinstance(value, list):
            kinds = choices if get_origin(variant) is tuple else choices * len(value)
            if len(kinds) == len(value):
                return [self._value(v, k, f"{key}.{i}", table) for i, (v, k) in enumerate(zip(value, kinds))]
        if variant is float and type(value) in (int, float) and math.isfinite(value):
            return float(value)
        if variant is int and type(value) is float and value.is_integer():
            return int(value)
        if variant in PLAIN and variant is not float and type(value) is variant:
            return value
        raise self.source.error(f"{key}: wrong value", key, got=shown(value), expected=describe(kind))

    def _node(self, node: Any, key: str, table: str) -> dict[str, Any]:
        choices = parts.TABLES[table]
        if not isinstance(node, dict):
            hint = f"{{type: {node}}}" if isinstance(node, str) and node in choices else ""
            raise self.source.error(f"{key}: wrong value", key, got=shown(node), expected=describe(Part), hint=hint)
        if isinstance(choices, str):
            return self._fields(node, parts.find(table), key, table)
        if "type" not in node:
            raise self.source.error(f"{key}.type: missing", f"{key}.type", got=shown(node), **_one_of(choices))
        name = node["type"]
        if not isinstance(name, str) or name not in choices:
            words = {"got": shown(name), **_one_of(choices, name)}
            if isinstance(name, str) and name.isidentifier():
                words["hint"] = words["hint"] or "--plugin MODULE, if it is your own"
            raise self.source.error(f"{key}.type: unknown name", f"{key}.type", **words)
        arguments = {k: v for k, v in node.items() if k != "type"}
        return {"type": name, **self._fields(arguments, parts.find(table, name), key, table)}


def stored(values: dict[str, Any], origin: str, overrides: Sequence[str], schema: type) -> Config:
    """The checked configuration of a checkpoint."""
    return Config(files.amend(files.Source(values, {"": origin}), overrides), schema)


def load(
    file: str | Path,
    overrides: Sequence[str],
    schema: type,
    pending: Collection[str] = (),
    complete: Callable[[files.Source], None] = lambda source: None,
) -> Config:
    """A file and its overrides, checked against a command's schema.

    Nodes that are `pending` may be incomplete; `complete` fills them in, once every other key has been checked.
    """
    source = files.read(file, overrides)
    if pending:
        Config(source, schema, pending)
        complete(source)
    return Config(source, schema)


def keywords(target: Any) -> dict[str, inspect.Parameter]:
    """The schema: the keyword-only parameters that a partial has not fixed."""
    fixed = target.keywords if isinstance(target, partial) else {}
    parameters = inspect.signature(target, eval_str=True).parameters
    return {k: p for k, p in parameters.items() if p.kind is p.KEYWORD_ONLY and k not in fixed}


def _call(target: Any, arguments: dict[str, Any]) -> Any:
    """Call a constructor; a function that also has positional arguments, such as a solver, becomes a partial."""
    parameters = inspect.signature(target).parameters.values()
    later = any(p.kind is p.POSITIONAL_OR_KEYWORD and p.default is p.empty for p in parameters)
    return partial(target, **arguments) if later else target(**arguments)


def _variant(kind: Any, value: Any) -> Any:
    """The member of X | Literal[...] | list[X] | None that fits the value."""
    if get_origin(kind) not in (Union, types.UnionType):
        return kind
    lists = [v for v in get_args(kind) if get_origin(v) in LISTS]
    plain = [v for v in get_args(kind) if v not in (types.NoneType, *lists)]
    if value is None:
        return types.NoneType
    words = [v for v in plain if get_origin(v) is Literal and value in get_args(v)]
    return (lists + plain)[0] if isinstance(value, list) else (words + plain + lists)[0]


def _is_part(kind: Any) -> bool:
    """True for a class: such a value is a node."""
    return isinstance(kind, type) and kind not in PLAIN and get_origin(kind) is None


def describe(kind: Any) -> str:
    """An annotation in words."""
    if get_origin(kind) in (Union, types.UnionType):
        return " or ".join(describe(variant) for variant in get_args(kind))
    if get_origin(kind) is Literal:
        return " or ".join(str(choice) for choice in get_args(kind))
    if get_origin(kind) in LISTS:
        items = get_args(kind)
        return f"a list, each {describe(items[0])}" if len(items) == 1 else f"[{', '.join(map(describe, items))}]"
    return PLAIN.get(kind, "a node {type: NAME, ...}")


def _one_of(names: Collection[str], name: Any = "") -> dict[str, str]:
    """The words of an error about an unknown name."""
    return {"expected": f"one of {', '.join(names)}" if names else "no arguments", "hint": nearest(name, names)}
