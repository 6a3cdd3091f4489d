"""Tar shards as webdataset writes them: members of one basename are one sample, read in place."""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Callable, Iterator
from functools import cached_property, lru_cache
from itertools import filterfalse
from pathlib import Path

from ldm.data import source
from ldm.data.source import BadCaption, Entry, Files
from ldm.errors import DataError

PICTURES = ("jpg", "jpeg", "png", "webp", "gif")
NOTES = ("txt", "caption", "json", "cls")
LARGEST_NOTE = 2**24  # bytes of a caption
OPEN = 32  # shards that a process keeps open


class Shards(Files):
    """Pictures in tar files; nothing is extracted, so members' names are never paths."""

    local = ("open_file",)

    def __init__(self, files: list[Path], image: str | None = None, caption: str | None = None):
        super().__init__(files, caption)
        self.names = list(self.files)
        self.pictures = (image,) if image else PICTURES

    @cached_property
    def open_file(self) -> Callable[[int], io.FileIO]:
        """The last few shards stay open; one that is dropped is closed once its last reader is done."""
        return lru_cache(maxsize=OPEN)(lambda group: io.FileIO(self.files[self.names[group]]))

    def read(self, entry: Entry) -> bytes:
        """A member's bytes, read at its offset, so that threads and forked processes may share a descriptor."""
        file = self.open_file(entry.group)  # held, because another thread may drop it from the cache
        data = os.pread(file.fileno(), entry.size, entry.offset)
        if len(data) < entry.size:
            raise DataError("the shard changed after the scan", str(self.files[self.names[entry.group]]))
        return data

    def entries(self) -> Iterator[Entry]:
        for group, (name, file) in enumerate(self.files.items()):
            samples: dict[str, dict[str, tarfile.TarInfo]] = {}
            for member in filterfalse(tarfile.TarInfo.isdir, members(file)):
                key, suffix = split(member.name)
                if problem := unusable(member) or ("a duplicate key" if suffix in samples.get(key, {}) else ""):
                    yield Entry(f"{name}/{member.name}", problem=problem)
                elif suffix:
                    samples.setdefault(key, {})[suffix] = member
            yield from (self.entry(group, sample) for sample in samples.values())

    def entry(self, group: int, sample: dict[str, tarfile.TarInfo]) -> Entry:
        """A sample's picture, with captions and label from its other members."""
        name = self.names[group]
        picture = next((sample[suffix] for suffix in self.pictures if suffix in sample), None)
        if picture is None:
            first, problem = next(iter(sample.values())), f"a sample without {' or '.join(self.pictures)}"
            return Entry(f"{name}/{first.name}", problem=problem)
        entry = Entry(f"{name}/{picture.name}", (), -1, group, picture.offset_data, picture.size)
        notes = {suffix: sample[suffix] for suffix in NOTES if suffix in sample}
        return source.captioned(entry, self.notes, group, notes)

    def notes(self, group: int, notes: dict[str, tarfile.TarInfo]) -> tuple[list[str], int]:
        """Captions and label of a sample; .txt comes before .json, and .cls before the label in .json."""
        captions: list[str] = []
        label = -1
        for suffix, member in notes.items():
            if member.size > LARGEST_NOTE:
                raise BadCaption(f"a caption file of {member.size} bytes")
            data = self.read(Entry(member.name, (), -1, group, member.offset_data, member.size))
            if suffix == "json":
                found, label = source.captions_and_label(source.parse_json(data), self.caption)
                captions = captions or found
            elif suffix == "cls":
                label = source.as_label(source.decoded(data))
            elif not captions:
                captions = source.as_captions(source.decoded(data))
        return captions, label


def members(file: Path) -> Iterator[tarfile.TarInfo]:
    """The members of a complete shard."""
    try:
        with tarfile.open(file, "r:") as archive:
            yield from archive
            check_end(archive, file)
    except (tarfile.TarError, OSError, ValueError, EOFError) as error:
        hint = "decompressing it to .tar first" if file.suffix in (".gz", ".tgz", ".zst") else ""
        raise DataError("cannot read the shard", str(file), str(error), "a complete tar file", hint) from error


def check_end(archive: tarfile.TarFile, file: Path) -> None:
    """Refuse data after the end: tarfile takes any damaged header but the first for the end of the archive."""
    with open(file, "rb") as raw:
        raw.seek(archive.offset)
        while block := raw.read(2**20):
            if block.strip(b"\0"):
                raise tarfile.ReadError(f"damaged header, or data after the end, at byte {archive.offset}")


def split(name: str) -> tuple[str, str]:
    """A member's key and its suffix, from the first dot of the basename on; hidden files have no suffix."""
    folder, _, base = name.rpartition("/")
    stem, _, suffix = base.partition(".")
    return f"{folder}/{stem}", suffix.lower() if stem else ""


def unusable(member: tarfile.TarInfo) -> str:
    """Why a member cannot be read, or an empty text."""
    if member.isreg() and not member.issparse():
        return ""
    kinds = {"a symbolic link": member.issym(), "a hard link": member.islnk(), "a FIFO": member.isfifo()}
    kinds |= {"a device": member.ischr() or member.isblk(), "a sparse file": member.issparse()}
    return f"{next((kind for kind, found in kinds.items() if found), 'no plain file')} in a shard"
