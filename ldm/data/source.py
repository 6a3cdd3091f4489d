"""A source of pictures: it lists entries with captions and labels, and reads the picture of one of them."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from ldm.errors import InputError

CAPTIONS = ("caption", "captions", "text", "prompt")  # the usual names of columns, the first that exists
IMAGES = ("image", "jpg", "jpeg", "png", "webp", "img")
LOCK = "manifest.lock"  # a folder with this file holds a manifest and is not part of the source


class Entry(NamedTuple):
    """One picture as its source lists it; `problem` says why it cannot be used, if that is known."""

    key: str
    captions: Sequence[str] = ()
    label: int = -1
    group: int = 0  # shard or row group
    offset: int = 0  # byte or row in it
    size: int = -1  # in bytes, if it is known before reading
    modified: int = 0  # nanoseconds since 1970, if each picture is a file
    problem: str = ""


class Source(Protocol):
    """Pictures in a folder, in shards or in tables."""

    grouped: bool  # True if pictures of one group should be read together
    classes: list[str]  # names of the labels, if known

    def entries(self) -> Iterator[Entry]:
        """All pictures, in an order that depends on their names alone."""

    def read(self, entry: Entry) -> bytes: ...

    def identity(self) -> str:
        """A text that no other source has."""

    def stamps(self, skipped: Iterable[str] = ()) -> dict[str, str]:
        """A stamp of each file or folder that changes when it does; also of skipped pictures, which may be repaired."""


class Files:
    """What sources of packed files share: the files by their paths below their common folder."""

    grouped = True
    local: tuple[str, ...] = ()  # attributes that each process makes for itself

    def __init__(self, files: Sequence[Path], caption: str | None):
        common = os.path.commonpath([file.parent for file in files])
        self.files, self.caption = {os.path.relpath(file, common): file for file in files}, caption
        self.classes: list[str] = []

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in self.local}

    def identity(self) -> str:
        return "\n".join(str(file.resolve()) for file in self.files.values())

    def stamps(self, skipped: Iterable[str] = ()) -> dict[str, str]:
        return {name: stamp(file) for name, file in self.files.items()}


class BadCaption(ValueError):
    """Why a caption cannot be used."""


def require(package: str, path: str) -> None:
    """Refuse a source that needs a package which is not installed."""
    if find_spec(package) is None:
        hint = "pip install -e '.[data]'"
        raise InputError("data.root: needs another package", path, f"no {package}", hint=hint)


def captioned(entry: Entry, read: Callable[..., tuple[list[str], int]], *arguments: Any) -> Entry:
    """The entry with the captions and the label that `read(*arguments)` gives, or why they cannot be used."""
    if entry.problem:
        return entry
    try:
        captions, label = read(*arguments)
    except BadCaption as error:
        return entry._replace(problem=str(error))
    except UnicodeDecodeError:
        return entry._replace(problem="a caption that is not UTF-8")
    return entry._replace(captions=captions, label=label)


def decoded(data: bytes) -> str:
    """A file's text; bytes that are not UTF-8 stay marked, so that `as_captions` finds them."""
    return data.decode("utf-8-sig", "surrogateescape")


def as_captions(value: Any) -> list[str]:
    """The captions in a text, a list of texts or None."""
    values = value if isinstance(value, list | tuple) else [] if value is None else [value]
    if not all(isinstance(one, str) for one in values):
        raise BadCaption("a caption that is not a text")
    if any(re.search("[\ud800-\udfff]", one) for one in values):
        raise BadCaption("a caption that is not UTF-8")
    return [one.replace("\0", "").strip() for one in values]


def as_label(value: Any) -> int:
    """A class number, or -1."""
    if isinstance(value, str) and re.fullmatch(r"\s*\d{1,9}\s*", value):
        return int(value)
    return value if type(value) is int and 0 <= value < 2**31 else -1


def captions_and_label(fields: Any, caption: str | None) -> tuple[list[str], int]:
    """Captions and label of a row or a JSON object, by the given column name or the usual ones."""
    if not isinstance(fields, Mapping):
        raise BadCaption("a caption file that is not a JSON object")
    name = caption or next((name for name in CAPTIONS if name in fields), "")
    return as_captions(fields.get(name)), as_label(fields.get("label"))


def parse_json(data: bytes) -> Any:
    """The JSON in a caption file."""
    try:
        return json.loads(decoded(data))
    except (ValueError, RecursionError) as error:
        raise BadCaption("a caption file that is not JSON") from error


def stamp(path: Path) -> str:
    """Size and time of a file, or why it cannot be found: this changes when the file does."""
    try:
        status = path.stat()
    except OSError as error:
        return error.strerror or "missing"
    return f"{status.st_size}:{status.st_mtime_ns}"
