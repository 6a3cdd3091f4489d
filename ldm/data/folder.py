"""A folder of pictures; captions come from a table, from files beside them, or from the subfolders' names."""

from __future__ import annotations

import csv
import errno
import io
import os
import stat
from collections.abc import Iterable, Iterator
from itertools import filterfalse
from pathlib import Path
from typing import Any, NoReturn

from ldm.data import source
from ldm.data.source import LOCK, BadCaption, Entry
from ldm.errors import DataError

SUFFIXES = {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif"}  # a file's content decides what it is
SUFFIXES |= {".bmp", ".tif", ".tiff", ".avif", ".heic", ".jp2", ".jxl"}  # not read: listed as skipped
TABLES = ("metadata.jsonl", "metadata.csv")
NOTES = (".txt", ".json")


class Folder:
    """All pictures below a folder, without hidden ones; links are followed."""

    grouped = False

    def __init__(self, root: Path, caption: str | None = None):
        self.root, self.caption = root, caption
        self.classes: list[str] = []

    def identity(self) -> str:
        return str(self.root.resolve())

    def read(self, entry: Entry) -> bytes:
        """The file, if it has not changed since the scan."""
        with open(self.root / entry.key, "rb") as file:
            now = os.fstat(file.fileno())
            if entry.modified and (now.st_size, now.st_mtime_ns) != (entry.size, entry.modified):
                raise DataError("the picture changed after the scan", str(self.root / entry.key))
            return file.read()

    def entries(self) -> Iterator[Entry]:
        """All pictures; tables come before caption files, caption files before classes."""
        names = [os.path.join(folder, file) for folder, files in self.walk() for file in files]
        names.sort(key=os.fsencode)
        pictures = [name for name in names if os.path.splitext(name)[1].lower() in SUFFIXES]
        tables = [name for name in names if os.path.basename(name) in TABLES]
        notes = {name for name in names if os.path.splitext(name)[1] in NOTES}
        if tables:
            yield from self.from_tables(pictures, tables)
        elif not notes.isdisjoint(os.path.splitext(name)[0] + suffix for name in pictures for suffix in NOTES):
            yield from (source.captioned(self.entry(name), self.from_note, name, notes) for name in pictures)
        else:
            self.classes = sorted({name.split(os.sep)[0] for name in pictures if os.sep in name}, key=os.fsencode)
            labels = {name: label for label, name in enumerate(self.classes)}
            yield from (source.captioned(self.entry(name), self.from_class, name, labels) for name in pictures)

    def walk(self) -> Iterator[tuple[str, list[str]]]:
        """(folder, its files) below the root; a folder that several links lead to comes once."""
        seen = set()
        for folder, below, files in os.walk(self.root, onerror=unreadable, followlinks=True):
            status = os.stat(folder)
            if (place := (status.st_dev, status.st_ino)) in seen or LOCK in files:
                below.clear()
                continue
            seen.add(place)
            below[:] = sorted(filterfalse(hidden, below), key=os.fsencode)
            yield folder[len(str(self.root)) :].lstrip(os.sep), [*filterfalse(hidden, files)]

    def stamps(self, skipped: Iterable[str] = ()) -> dict[str, str]:
        """When each folder and its caption files changed, and the skipped pictures, which may be repaired."""
        folders = {f"{folder or '.'}{os.sep}": self.stamp(self.root / folder, files) for folder, files in self.walk()}
        return folders | {name: source.stamp(self.root / name) for name in skipped}

    def stamp(self, folder: Path, files: list[str]) -> str:
        notes = (os.path.join(folder, name) for name in files if name.endswith(NOTES) or name in TABLES)
        changes = (os.stat(note, follow_symlinks=False) for note in notes)
        changed = sum(hash((change.st_size, change.st_mtime_ns)) for change in changes)
        return f"{os.stat(folder).st_mtime_ns}:{changed}"

    def entry(self, name: str) -> Entry:
        """The entry of a picture that exists, without captions."""
        try:
            status = stat_file(self.root / name)
        except OSError as error:
            return Entry(name, problem=f"cannot be read: {error.strerror}")
        return Entry(name, size=status.st_size, modified=status.st_mtime_ns)

    def from_class(self, name: str, labels: dict[str, int]) -> tuple[list[str], int]:
        """The caption and the label of a picture, from its subfolder."""
        folder = name.split(os.sep)[0]
        return source.as_captions([folder] if folder in labels else []), labels.get(folder, -1)

    def from_note(self, name: str, notes: set[str]) -> tuple[list[str], int]:
        """The captions and the label of a picture in NAME.txt or NAME.json."""
        stem = os.path.splitext(name)[0]
        try:
            if stem + ".txt" in notes:
                return source.as_captions(source.decoded(read(self.root / f"{stem}.txt"))), -1
            if stem + ".json" in notes:
                fields = source.parse_json(read(self.root / f"{stem}.json"))
                return source.captions_and_label(fields, self.caption)
        except OSError as error:
            raise BadCaption(f"a caption file that cannot be read: {error.strerror}") from error
        return [], -1

    def from_tables(self, pictures: list[str], tables: list[str]) -> Iterator[Entry]:
        """Pictures with their rows of the tables, then rows whose picture is missing."""
        rows: dict[str, tuple[str, Entry]] = {}  # the last line of each picture, and what the lines say of it
        for table in tables:
            for line, fields in self.lines(table):
                row = self.row(table, line, fields)
                if row.key in rows and not row.problem:
                    row = row._replace(captions=[*rows[row.key][1].captions, *row.captions])
                rows[row.key] = line, row
        for name in pictures:
            (_, row), entry = rows.pop(name, ("", Entry(name, []))), self.entry(name)
            yield entry if entry.problem else row._replace(size=entry.size, modified=entry.modified)
        for name, (line, _) in rows.items():
            yield Entry(name, problem=f"named in a table, but missing: {line}")

    def row(self, table: str, line: str, fields: Any) -> Entry:
        """What a row says of the picture that it names."""
        file = fields.get("file_name") if isinstance(fields, dict) else None
        if not isinstance(file, str) or not file or not is_valid_name(file):
            raise DataError("a row names no picture", str(self.root / line), expected="a column file_name")
        name = os.path.normpath(os.path.join(os.path.dirname(table), file))
        return source.captioned(Entry(name), source.captions_and_label, fields, self.caption)

    def lines(self, table: str) -> Iterator[tuple[str, Any]]:
        """(TABLE:LINE, fields) of each row of a table."""
        try:
            text = source.decoded(read(self.root / table))
        except OSError as error:
            unreadable(error)
        if table.endswith(".csv"):
            csv.field_size_limit(2**31 - 1)
            rows = csv.DictReader(io.StringIO(text, newline=""))
            yield from ((f"{table}:{rows.line_num}", fields) for fields in rows)
            return
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                try:
                    yield f"{table}:{number}", source.parse_json(line.encode("utf-8", "surrogateescape"))
                except BadCaption:
                    raise DataError("a row is not JSON", f"{self.root / table}:{number}") from None


def is_valid_name(name: str) -> bool:
    """True if the file system can have a file of this name."""
    try:
        return b"\0" not in os.fsencode(name)
    except UnicodeEncodeError:
        return False


def hidden(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"


def stat_file(path: Path) -> os.stat_result:
    """The status of a regular file; opening anything else, such as a FIFO, could wait for ever."""
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "not a plain file", str(path))
    return status


def read(path: Path) -> bytes:
    """The content of a regular file."""
    stat_file(path)
    return path.read_bytes()


def unreadable(error: OSError) -> NoReturn:
    raise DataError("cannot be read", str(error.filename), error.strerror or str(error)) from error
