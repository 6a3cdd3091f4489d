"""A folder of pictures, with captions in files beside them, in a table, or by the names of subfolders."""

from __future__ import annotations

import csv
import errno
import io
import os
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from ldm.data import source
from ldm.data.source import LOCK, BadCaption, Entry, mark
from ldm.errors import DataError

SUFFIXES = {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif"}  # a file's content decides what it is
SUFFIXES |= {".bmp", ".tif", ".tiff", ".avif", ".heic", ".jp2", ".jxl"}  # not read: listed as skipped
TABLES = ("metadata.jsonl", "metadata.csv")
NOTES = (".txt", ".json")


class Named(NamedTuple):
    """What a table says of one picture."""

    captions: list[str]
    label: int
    line: str
    problem: str = ""


class Folder:
    """All pictures below a folder, links followed, hidden ones not; a table goes before notes, notes before classes."""

    grouped = False

    def __init__(self, root: Path, caption: str | None = None):
        self.root, self.caption = root, caption
        self.classes: list[str] = []

    def identity(self) -> str:
        return str(self.root.resolve())

    def read(self, entry: Entry) -> bytes:
        """The file, if it is still the one that was scanned."""
        with open(self.root / entry.key, "rb") as file:
            now = os.fstat(file.fileno())
            if entry.modified and (now.st_size, now.st_mtime_ns) != (entry.size, entry.modified):
                raise DataError("the picture changed after the scan", str(self.root / entry.key))
            return file.read()

    def entries(self) -> Iterator[Entry]:
        names = [os.path.join(folder, file.name) for folder, files in self.walk() for file in files]
        names.sort(key=os.fsencode)
        pictures = [name for name in names if os.path.splitext(name)[1].lower() in SUFFIXES]
        tables = [name for name in names if os.path.basename(name) in TABLES]
        notes = {name for name in names if os.path.splitext(name)[1] in NOTES}
        if tables:
            yield from self.tabled(pictures, tables)
        elif not notes.isdisjoint(os.path.splitext(name)[0] + suffix for name in pictures for suffix in NOTES):
            yield from (self.noted(name, notes) for name in pictures)
        else:
            self.classes = sorted({name.split(os.sep)[0] for name in pictures if os.sep in name}, key=os.fsencode)
            labels = {name: label for label, name in enumerate(self.classes)}
            yield from (self.classed(name, labels) for name in pictures)

    def walk(self) -> Iterator[tuple[str, list[os.DirEntry[str]]]]:
        """(folder, its files) below the root, each real folder once, whatever links to it."""
        seen, waiting = set(), [""]
        while waiting:
            folder = waiting.pop()
            try:
                status = os.stat(self.root / folder)
                listed = [one for one in os.scandir(self.root / folder) if not hidden(one.name)]
            except OSError as error:
                unreadable(error)
            if (status.st_dev, status.st_ino) not in seen and not any(one.name == LOCK for one in listed):
                seen.add((status.st_dev, status.st_ino))
                below = {one.name for one in listed if is_folder(one)}
                waiting += [os.path.join(folder, name) for name in sorted(below, key=os.fsencode, reverse=True)]
                yield folder, [one for one in listed if one.name not in below]

    def stamps(self, skipped: Iterable[str] = ()) -> dict[str, str]:
        """Of each folder when it was changed and what its caption files looked like; and the skipped, if mended."""
        folders = {f"{folder or '.'}{os.sep}": self.stamp(folder, files) for folder, files in self.walk()}
        return folders | {name: mark(self.root / name) for name in skipped}

    def stamp(self, folder: str, files: list[os.DirEntry[str]]) -> str:
        notes = (file.stat(follow_symlinks=False) for file in files if file.name.endswith(NOTES) or file.name in TABLES)
        changed = sum(hash((note.st_size, note.st_mtime_ns)) for note in notes)
        return f"{os.stat(self.root / folder).st_mtime_ns}:{changed}"

    def entry(self, name: str, captions: list[str], label: int = -1, problem: str = "") -> Entry:
        """The entry of a picture that is listed."""
        try:
            status = plain(self.root / name)
        except OSError as error:
            return Entry(name, problem=f"cannot be read: {error.strerror}")
        return Entry(name, captions, label, size=status.st_size, modified=status.st_mtime_ns, problem=problem)

    def classed(self, name: str, labels: dict[str, int]) -> Entry:
        """A picture whose subfolder, if it is in one, is its class and its caption."""
        folder = name.split(os.sep)[0]
        try:
            return self.entry(name, source.captions_of([folder] if folder in labels else []), labels.get(folder, -1))
        except BadCaption as error:
            return self.entry(name, [], problem=str(error))

    def noted(self, name: str, notes: set[str]) -> Entry:
        """A picture with NAME.txt, which is one caption, or NAME.json beside it."""
        stem = os.path.splitext(name)[0]
        try:
            if stem + ".txt" in notes:
                return self.entry(name, source.captions_of(source.text(read(self.root / f"{stem}.txt"))))
            if stem + ".json" in notes:
                fields = source.parsed(read(self.root / f"{stem}.json"))
                return self.entry(name, *source.described(fields, self.caption))
        except BadCaption as error:
            return self.entry(name, [], problem=str(error))
        except OSError as error:
            return self.entry(name, [], problem=f"a caption file that cannot be read: {error.strerror}")
        return self.entry(name, [])

    def tabled(self, pictures: list[str], tables: list[str]) -> Iterator[Entry]:
        """Pictures with what the tables say of them, and what the tables name but is not there."""
        named: dict[str, Named] = {}
        for table in tables:
            for line, fields in self.rows(table):
                name, row = self.row(table, line, fields)
                if name in named and not row.problem:
                    row = row._replace(captions=named[name].captions + row.captions)
                named[name] = row
        for name in pictures:
            row = named.pop(name, Named([], -1, ""))
            yield self.entry(name, row.captions, row.label, row.problem)
        for name, row in named.items():
            yield Entry(name, problem=f"named in a table, but not there: {row.line}")

    def row(self, table: str, line: int, fields: Any) -> tuple[str, Named]:
        """The picture that a row is about, and what it says."""
        where = f"{table}:{line}"
        file = fields.get("file_name") if isinstance(fields, dict) else None
        if not isinstance(file, str) or not file or not nameable(file):
            raise DataError("a row names no picture", str(self.root / where), expected="a column file_name")
        name = os.path.normpath(os.path.join(os.path.dirname(table), file))
        try:
            return name, Named(*source.described(fields, self.caption), where)
        except BadCaption as error:
            return name, Named([], -1, where, str(error))

    def rows(self, table: str) -> Iterator[tuple[int, Any]]:
        """(line, fields) of each row of a table."""
        try:
            lines = source.text(read(self.root / table))
        except OSError as error:
            unreadable(error)
        if table.endswith(".csv"):
            csv.field_size_limit(2**31 - 1)
            rows = csv.DictReader(io.StringIO(lines, newline=""))
            yield from ((rows.line_num, fields) for fields in rows)
            return
        for number, line in enumerate(lines.split("\n"), 1):
            if line.strip():
                try:
                    yield number, source.parsed(line.encode("utf-8", "surrogateescape"))
                except BadCaption:
                    raise DataError("a row is not JSON", f"{self.root / table}:{number}") from None


def nameable(name: str) -> bool:
    """Whether a file may be called so."""
    try:
        return b"\0" not in os.fsencode(name)
    except UnicodeEncodeError:
        return False


def hidden(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"


def is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def plain(path: Path) -> os.stat_result:
    """What is known of a plain file; opening anything else, such as a FIFO, could wait for ever."""
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "not a plain file", str(path))
    return status


def read(path: Path) -> bytes:
    """The content of a plain file."""
    plain(path)
    return path.read_bytes()


def unreadable(error: OSError) -> NoReturn:
    raise DataError("cannot be read", str(error.filename), error.strerror or str(error)) from error
