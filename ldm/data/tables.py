"""Pictures in parquet tables, and in Hugging Face `datasets`: an object in Python or a folder by save_to_disk."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from threading import Lock
from typing import Any

from ldm.data import source
from ldm.data.sampler import WINDOW
from ldm.data.source import Entry, Files
from ldm.errors import DataError, InputError


class Parquet(Files):
    """Pictures in the rows of parquet files, as bytes or as Hugging Face's {bytes, path}."""

    local = ("pictures", "lock")

    def __init__(self, files: list[Path], image: str | None = None, caption: str | None = None):
        super().__init__(files, caption)
        self.image, _ = self.columns(files[0], image)

    @cached_property
    def lock(self) -> Lock:
        return Lock()

    @cached_property
    def pictures(self) -> Callable[[str, int], Any]:
        """The column of pictures of a row group; the last few row groups stay in memory."""
        return lru_cache(maxsize=WINDOW)(lambda name, part: self.part(name, part, [self.image]).column(self.image))

    def columns(self, file: Path, image: str | None) -> tuple[str, list[str]]:
        return choose_columns(open_parquet(file).schema_arrow.names, str(file), image, self.caption)

    def part(self, name: str, part: int, columns: Sequence[str]) -> Any:
        """Some columns of a row group."""
        try:
            return open_parquet(self.files[name]).read_row_group(part, columns=list(columns), use_threads=False)
        except (OSError, ValueError) as error:
            raise DataError("cannot read the table", str(self.files[name]), str(error)) from error

    def entries(self) -> Iterator[Entry]:
        """Row by row; the key names file, row group and row."""
        group = 0
        for name, file in self.files.items():
            _, others = self.columns(file, self.image)
            metadata = open_parquet(file).metadata
            for part in range(metadata.num_row_groups):
                table = self.part(name, part, others)
                for row in range(metadata.row_group(part).num_rows):
                    entry = Entry(f"{name}/{part}/{row}", group=group, offset=row)
                    yield source.captioned(entry, self.notes, table, others, row)
                group += 1

    def notes(self, table: Any, names: Sequence[str], row: int) -> tuple[list[str], int]:
        """Captions and label of a row."""
        fields = {name: table.column(name)[row].as_py() for name in names}
        return source.captions_and_label(fields, self.caption)

    def read(self, entry: Entry) -> bytes:
        name, part, _ = entry.key.rsplit("/", 2)
        with self.lock:
            pictures = self.pictures(name, int(part))
        return picture_bytes(pictures[entry.offset].as_py(), self.files[name].parent)


class Rows:
    """The rows of a map-style dataset, whose pictures stay encoded."""

    grouped = False

    def __init__(self, dataset: Any, image: str | None = None, caption: str | None = None):
        import datasets

        if not isinstance(dataset, datasets.Dataset):
            kinds = "a map-style datasets.Dataset"
            raise InputError("cannot read these rows", "data.root", type(dataset).__name__, kinds, "one of its splits")
        self.image, names = choose_columns(dataset.column_names, "data.root", image, caption)
        if isinstance(dataset.features[self.image], datasets.Image):
            dataset = dataset.cast_column(self.image, datasets.Image(decode=False))
        dataset = dataset.with_format(None)
        self.pictures, self.names, self.caption = dataset.select_columns([self.image]), names, caption
        self.others = dataset.select_columns(names)
        label = dataset.features.get("label")
        self.classes: list[str] = list(label.names) if isinstance(label, datasets.ClassLabel) else []
        self.fingerprint = dataset._fingerprint

    def identity(self) -> str:
        return f"datasets:{self.fingerprint}"

    def stamps(self, skipped: Iterable[str] = ()) -> dict[str, str]:
        return {"fingerprint": self.fingerprint}

    def entries(self) -> Iterator[Entry]:
        for row in range(len(self.pictures)):
            yield source.captioned(Entry(f"{row}", offset=row), self.notes, row)

    def notes(self, row: int) -> tuple[list[str], int]:
        """Captions and label of a row."""
        return source.captions_and_label(self.others[row] if self.names else {}, self.caption)

    def read(self, entry: Entry) -> bytes:
        return picture_bytes(self.pictures[entry.offset][self.image], Path("/"))


def saved_dataset(root: Path) -> Any:
    """The dataset in a folder written by save_to_disk."""
    source.require("datasets", str(root))
    import datasets

    try:
        return datasets.load_from_disk(str(root))
    except (OSError, ValueError) as error:
        raise DataError("cannot read the dataset", str(root), str(error)) from error


def open_parquet(file: Path) -> Any:
    """A parquet file; only its footer is read."""
    source.require("pyarrow", str(file))
    import pyarrow.parquet as pq

    try:
        return pq.ParquetFile(file, memory_map=True)
    except (OSError, ValueError) as error:
        raise DataError("cannot read the table", str(file), str(error), "a parquet file") from error


def choose_columns(names: Sequence[str], path: str, image: str | None, caption: str | None) -> tuple[str, list[str]]:
    """The column of pictures, and the columns of captions and labels."""
    for option, name in (("data.image", image), ("data.caption", caption)):
        if name is not None and name not in names:
            raise InputError("no such column", f"{option}, {path}", name, f"one of {', '.join(names)}")
    picture = image or next((name for name in source.IMAGES if name in names), None)
    if picture is None:
        raise InputError("no column of pictures", path, ", ".join(names), " or ".join(source.IMAGES), "data.image=NAME")
    usual = [name for name in source.CAPTIONS if name in names][:1]
    return picture, [name for name in ([caption] if caption else usual) + ["label"] if name in names]


def picture_bytes(value: Any, root: Path) -> bytes:
    """A picture's bytes from its cell, or from the file that the cell names inside the source's folder."""
    fields = value if isinstance(value, dict) else {"bytes": value}
    if isinstance(fields.get("bytes"), bytes):
        return fields["bytes"]
    if not isinstance(fields.get("path"), str):
        raise OSError(0, "no picture in the row")
    file = (root / fields["path"]).resolve()
    if not file.is_relative_to(root.resolve()) or not file.is_file():
        raise OSError(0, f"no such file in the folder: {fields['path']}")
    return file.read_bytes()
