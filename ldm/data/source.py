"""What a source of pictures is: entries, each with a place, captions and a label, and a way to read one of them."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from ldm.errors import InputError

CAPTIONS = ("caption", "captions", "text", "prompt")  # the usual names, the first that there is
LOCK = "manifest.lock"  # a folder with this file in it is a manifest's, not a part of the source
IMAGES = ("image", "jpg", "jpeg", "png", "webp", "img")


class Entry(NamedTuple):
    """One picture as its source lists it; `problem` says what is already known to be wrong with it."""

    key: str
    captions: Sequence[str] = ()
    label: int = -1
    group: int = 0  # the shard or row group
    offset: int = 0  # the byte or row in it
    size: int = -1  # in bytes, where it is known before reading
    modified: int = 0  # nanoseconds since 1970, where each picture is a file
    problem: str = ""


class Source(Protocol):
    """Pictures in a folder, in shards, in tables."""

    grouped: bool  # whether neighbours should be read together
    classes: list[str]  # names of the labels, where known

    def entries(self) -> Iterator[Entry]:
        """All there are, in an order that the names alone decide."""
        ...

    def read(self, entry: Entry) -> bytes: ...

    def identity(self) -> str:
        """What tells this source from every other one."""
        ...

    def stamps(self, skipped: Iterable[str] = ()) -> dict[str, str]:
        """Files and folders, each with what changes when it does, the skipped ones among them."""
        ...


def need(package: str, where: str) -> None:
    """Refuse what only another package can read, where that is not installed."""
    if find_spec(package) is None:
        hint = "pip install -e '.[data]'"
        raise InputError("data.root: takes another package to read", where, f"no {package}", hint=hint)


class BadCaption(ValueError):
    """Why a caption cannot be used."""


def text(data: bytes) -> str:
    """A file's text; what is not UTF-8 stays marked, for `captions_of` to see."""
    return data.decode("utf-8-sig", "surrogateescape")


def captions_of(value: Any) -> list[str]:
    """The captions in a text, a list of texts or nothing."""
    values = value if isinstance(value, list | tuple) else [] if value is None else [value]
    if not all(isinstance(one, str) for one in values):
        raise BadCaption("a caption that is not a text")
    if any(re.search("[\ud800-\udfff]", one) for one in values):
        raise BadCaption("a caption that is not UTF-8")
    return [one.replace("\0", "").strip() for one in values]


def described(fields: Any, caption: str | None) -> tuple[list[str], int]:
    """Captions and label of a row or a JSON object, by the given name or the usual ones."""
    if not isinstance(fields, Mapping):
        raise BadCaption("a caption file that is not a JSON object")
    name = caption or next((name for name in CAPTIONS if name in fields), "")
    return captions_of(fields.get(name)), label_of(fields.get("label"))


def label_of(value: Any) -> int:
    """A class number, or -1."""
    if isinstance(value, str) and re.fullmatch(r"\s*\d{1,9}\s*", value):
        return int(value)
    return value if type(value) is int and 0 <= value < 2**31 else -1


def parsed(data: bytes) -> Any:
    """The JSON in a caption file."""
    try:
        return json.loads(text(data))
    except (ValueError, RecursionError) as error:
        raise BadCaption("a caption file that is not JSON") from error


def mark(path: Path) -> str:
    """What changes when a file does."""
    try:
        status = path.stat()
    except OSError as error:
        return error.strerror or "missing"
    return f"{status.st_size}:{status.st_mtime_ns}"


def distinct(files: Sequence[Path]) -> list[str]:
    """Short names of files: their paths below what they have in common."""
    common = os.path.commonpath([file.parent for file in files]) if files else ""
    return [os.path.relpath(file, common) for file in files]
