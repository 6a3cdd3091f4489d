"""Hugging Face `datasets`: an object in Python, or a folder that its save_to_disk wrote."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from ldm.data.parquet import chosen, entry, stored
from ldm.data.source import Entry, need
from ldm.errors import DataError, InputError


class Rows:
    """The rows of a map-style dataset, whose pictures stay encoded."""

    grouped = False

    def __init__(self, dataset: Any, image: str | None = None, caption: str | None = None):
        import datasets

        if not isinstance(dataset, datasets.Dataset):
            kinds = "a map-style datasets.Dataset"
            raise InputError("cannot read these rows", "data.root", type(dataset).__name__, kinds, "one of its splits")
        self.image, names = chosen(dataset.column_names, "data.root", image, caption)
        if isinstance(dataset.features[self.image], datasets.Image):
            dataset = dataset.cast_column(self.image, datasets.Image(decode=False))
        dataset = dataset.with_format(None)
        self.pictures, self.names, self.caption = dataset.select_columns([self.image]), names, caption
        self.described = dataset.select_columns(names)
        label = dataset.features.get("label")
        self.classes: list[str] = list(label.names) if isinstance(label, datasets.ClassLabel) else []
        self.fingerprint = dataset._fingerprint

    def identity(self) -> str:
        return f"datasets:{self.fingerprint}"

    def stamps(self, skipped: Iterable[str] = ()) -> dict[str, str]:
        return {"fingerprint": self.fingerprint}

    def entries(self) -> Iterator[Entry]:
        for row in range(len(self.pictures)):
            yield entry(
                f"{row}", 0, row, partial(self.described.__getitem__, row) if self.names else dict, self.caption
            )

    def read(self, entry: Entry) -> bytes:
        return stored(self.pictures[entry.offset][self.image], Path("/"))


def saved(root: Path) -> Any:
    """The dataset in a folder written by save_to_disk."""
    need("datasets", str(root))
    import datasets

    try:
        return datasets.load_from_disk(str(root))
    except (OSError, ValueError) as error:
        raise DataError("the dataset cannot be read", str(root), str(error)) from error
