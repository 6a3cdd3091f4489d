"""Tar shards as webdataset writes them: members of one basename are one sample, read in place and never extracted."""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property, lru_cache
from itertools import filterfalse
from pathlib import Path

from ldm.data import source
from ldm.data.source import BadCaption, Entry, distinct, mark
from ldm.errors import DataError

PICTURES = ("jpg", "jpeg", "png", "webp", "gif")
NOTES = ("txt", "caption", "json", "cls")
LARGEST_NOTE = 2**24  # bytes of a caption
OPEN = 32  # shards that a process holds open


class Shards:
    """Pictures in tar files, whose members' names are only names."""

    grouped = True

    def __init__(self, files: list[Path], image: str | None = None, caption: str | None = None):
        self.files, self.names, self.caption = files, distinct(files), caption
        self.pictures = (image,) if image else PICTURES
        self.classes: list[str] = []

    @cached_property
    def opened(self) -> Callable[[int], io.FileIO]:
        """The last few shards that were read; one that falls out is closed when its last reader is done."""
        return lru_cache(maxsize=OPEN)(lambda group: io.FileIO(self.files[group]))

    def __getstate__(self) -> dict:
        return {name: value for name, value in self.__dict__.items() if name != "opened"}

    def identity(self) -> str:
        return "\n".join(str(file.resolve()) for file in self.files)

    def stamps(self, skipped: Iterable[str] = ()) -> dict[str, str]:
        return {name: mark(file) for name, file in zip(self.names, self.files)}

    def read(self, entry: Entry) -> bytes:
        """A member's bytes, read at their offset, so that threads and forked processes may share a descriptor."""
        file = self.opened(entry.group)  # held, as another thread may push it out
        data = os.pread(file.fileno(), entry.size, entry.offset)
        if len(data) < entry.size:
            raise DataError("the shard changed after the scan", str(self.files[entry.group]))
        return data

    def entries(self) -> Iterator[Entry]:
        for group, (name, file) in enumerate(zip(self.names, self.files)):
            samples: dict[str, dict[str, tarfile.TarInfo]] = {}
            for member in filterfalse(tarfile.TarInfo.isdir, members(file)):
                key, suffix = split(member.name)
                if problem := unusable(member) or ("a duplicate key" if suffix in samples.get(key, {}) else ""):
                    yield Entry(f"{name}/{member.name}", problem=problem)
                elif suffix:
                    samples.setdefault(key, {})[suffix] = member
            for sample in samples.values():
                yield self.entry(group, sample)

    def entry(self, group: int, sample: dict[str, tarfile.TarInfo]) -> Entry:
        """The picture of a sample with what its other members say of it."""
        name = self.names[group]
        picture = next((sample[suffix] for suffix in self.pictures if suffix in sample), None)
        if picture is None:
            return Entry(
                f"{name}/{next(iter(sample.values())).name}", problem=f"a sample without {' or '.join(self.pictures)}"
            )
        entry = Entry(f"{name}/{picture.name}", (), -1, group, picture.offset_data, picture.size)
        try:
            captions, label = self.notes(group, {suffix: sample[suffix] for suffix in NOTES if suffix in sample})
        except BadCaption as error:
            return entry._replace(problem=str(error))
        return entry._replace(captions=captions, label=label)

    def notes(self, group: int, members: dict[str, tarfile.TarInfo]) -> tuple[list[str], int]:
        """Captions and label of a sample: a text before a JSON object, a class number before the object's label."""
        captions: list[str] = []
        label = -1
        for suffix, member in members.items():
            if member.size > LARGEST_NOTE:
                raise BadCaption(f"a caption file of {member.size} bytes")
            data = self.read(Entry(member.name, (), -1, group, member.offset_data, member.size))
            if suffix == "json":
                described = source.described(source.parsed(data), self.caption)
                captions, label = captions or described[0], described[1]
            elif suffix == "cls":
                label = source.label_of(source.text(data))
            elif not captions:
                captions = source.captions_of(source.text(data))
        return captions, label


def members(file: Path) -> Iterator[tarfile.TarInfo]:
    """The members of a shard that is whole."""
    try:
        with tarfile.open(file, "r:") as archive:
            yield from archive
            check_end(archive, file)
    except (tarfile.TarError, OSError, ValueError, EOFError) as error:
        hint = "uncompressing it, as members are read in place" if file.suffix in (".gz", ".tgz", ".zst") else ""
        raise DataError("the shard cannot be read", str(file), str(error), "a whole tar file", hint) from error


def check_end(archive: tarfile.TarFile, file: Path) -> None:
    """tarfile takes any damaged header but the first for the end of the archive."""
    with open(file, "rb") as raw:
        raw.seek(archive.offset)
        while block := raw.read(2**20):
            if block.strip(b"\0"):
                raise tarfile.ReadError(f"a damaged header at byte {archive.offset}, or more behind the archive's end")


def split(name: str) -> tuple[str, str]:
    """A member's key and its suffix, which begins at the first dot of the basename; no suffix where it is hidden."""
    folder, _, base = name.rpartition("/")
    stem, _, suffix = base.partition(".")
    return f"{folder}/{stem}", suffix.lower() if stem else ""


def unusable(member: tarfile.TarInfo) -> str:
    """Why a member is not read, though it is in the shard."""
    if member.isreg() and not member.issparse():
        return ""
    kinds = {"a symbolic link": member.issym(), "a hard link": member.islnk(), "a FIFO": member.isfifo()}
    kinds |= {"a device": member.ischr() or member.isblk(), "a sparse file": member.issparse()}
    return f"{next((kind for kind, found in kinds.items() if found), 'no plain file')} in a shard"
