"""Parquet tables with a column of pictures, whose row groups are read as few at a time as the order mixes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property, lru_cache, partial
from pathlib import Path
from threading import Lock
from typing import Any

from ldm.data import source
from ldm.data.sampler import WINDOW
from ldm.data.source import BadCaption, Entry, distinct, mark
from ldm.errors import DataError, InputError


class Parquet:
    """Pictures in the rows of parquet files, as bytes or as Hugging Face's {bytes, path}."""

    grouped = True

    def __init__(self, files: list[Path], image: str | None = None, caption: str | None = None):
        self.files, self.caption = dict(zip(distinct(files), files)), caption
        self.classes: list[str] = []
        self.image, _ = columns(files[0], image, caption)

    def __getstate__(self) -> dict:
        return {name: value for name, value in self.__dict__.items() if name not in ("pictures", "lock")}

    @cached_property
    def lock(self) -> Lock:
        return Lock()

    @cached_property
    def pictures(self) -> Callable[[str, int], Any]:
        """The pictures of a file's row group, of the last few that were asked for."""
        return lru_cache(maxsize=WINDOW)(lambda name, part: self.part(name, part, [self.image]).column(self.image))

    def part(self, name: str, part: int, columns: Sequence[str]) -> Any:
        """Some columns of a row group."""
        try:
            return opened(self.files[name]).read_row_group(part, columns=list(columns), use_threads=False)
        except (OSError, ValueError) as error:
            raise DataError("the table cannot be read", str(self.files[name]), str(error)) from error

    def identity(self) -> str:
        return "\n".join(str(file.resolve()) for file in self.files.values())

    def stamps(self, skipped: Iterable[str] = ()) -> dict[str, str]:
        return {name: mark(file) for name, file in self.files.items()}

    def entries(self) -> Iterator[Entry]:
        """Row by row; the key says which file, row group and row."""
        group = 0
        for name, file in self.files.items():
            _, others = columns(file, self.image, self.caption)
            rows = opened(file).metadata
            for part in range(rows.num_row_groups):
                table = self.part(name, part, others)
                for row in range(rows.row_group(part).num_rows):
                    fields = partial(cells, table, others, row)
                    yield entry(f"{name}/{part}/{row}", group, row, fields, self.caption)
                group += 1

    def read(self, entry: Entry) -> bytes:
        name, part, _ = entry.key.rsplit("/", 2)
        with self.lock:
            pictures = self.pictures(name, int(part))
        return stored(pictures[entry.offset].as_py(), self.files[name].parent)


def opened(file: Path) -> Any:
    """A parquet file, of which only the footer is read."""
    source.need("pyarrow", str(file))
    import pyarrow.parquet as pq

    try:
        return pq.ParquetFile(file, memory_map=True)
    except (OSError, ValueError) as error:
        raise DataError("the table cannot be read", str(file), str(error), "a parquet file") from error


def columns(file: Path, image: str | None, caption: str | None) -> tuple[str, list[str]]:
    return chosen(opened(file).schema_arrow.names, str(file), image, caption)


def chosen(names: Sequence[str], where: str, image: str | None, caption: str | None) -> tuple[str, list[str]]:
    """The column of pictures and those of captions and labels."""
    for option, name in (("data.image", image), ("data.caption", caption)):
        if name is not None and name not in names:
            raise InputError("no such column", f"{option}, {where}", name, f"one of {', '.join(names)}")
    picture = image or next((name for name in source.IMAGES if name in names), None)
    if picture is None:
        have = ", ".join(names)
        raise InputError("no column of pictures", where, have, " or ".join(source.IMAGES), "data.image=NAME")
    usual = [name for name in source.CAPTIONS if name in names][:1]
    return picture, [name for name in ([caption] if caption else usual) + ["label"] if name in names]


def cells(table: Any, names: Sequence[str], row: int) -> dict[str, Any]:
    """One row of a table."""
    return {name: table.column(name)[row].as_py() for name in names}


def entry(key: str, group: int, row: int, fields: Callable[[], dict[str, Any]], caption: str | None) -> Entry:
    """A row with what its other columns say of the picture."""
    try:
        captions, label = source.described(fields(), caption)
    except BadCaption as error:
        return Entry(key, (), -1, group, row, problem=str(error))
    except UnicodeDecodeError:
        return Entry(key, (), -1, group, row, problem="a caption that is not UTF-8")
    return Entry(key, captions, label, group, row)


def stored(value: Any, root: Path) -> bytes:
    """A picture's bytes, which may lie in a file that the table names, inside the source's own folder."""
    fields = value if isinstance(value, dict) else {"bytes": value}
    if isinstance(fields.get("bytes"), bytes):
        return fields["bytes"]
    if not isinstance(fields.get("path"), str):
        raise OSError(0, "no picture in the row")
    file = (root / fields["path"]).resolve()
    if not file.is_relative_to(root.resolve()) or not file.is_file():
        raise OSError(0, f"no such file in the folder: {fields['path']}")
    return file.read_bytes()
