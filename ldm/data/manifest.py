"""The manifest of a source: each picture with its size and captions, scanned once, then mapped into memory."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import sys
from array import array
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from ldm.checkpoint import files
from ldm.data import decode
from ldm.data.source import LOCK, Entry, Source
from ldm.errors import CheckpointError, DataError

FORMAT = 1
USED, SKIPPED = 0, 1
BLOCK = 1024  # pictures that are checked together
NAME, SKIPS = "manifest.safetensors", "skipped.jsonl"
COLUMNS = {  # one number per picture; in `key` and `captions`, the end of its part of a blob
    "key": np.int64,
    "captions": np.int64,
    "label": np.int64,
    "group": np.int32,
    "offset": np.int64,
    "size": np.int64,
    "modified": np.int64,
    "height": np.int32,
    "width": np.int32,
    "verdict": np.uint8,  # USED or SKIPPED
}
BLOBS = {"key_text": np.uint8, "caption": np.int64, "caption_text": np.uint8}  # `caption`: the end of each one's text


class Manifest:
    """The columns of a scanned source, mapped from a folder; only the folder's name is pickled."""

    def __init__(self, folder: Path):
        tensors = files.open_file(folder / NAME)
        self.folder = folder
        self.about: dict[str, Any] = json.loads(tensors.metadata["manifest"])
        self.digest: str = self.about["digest"]  # sha256 of all columns but the times
        self.reasons: dict[str, int] = self.about["reasons"]  # why pictures are skipped, the most frequent first
        self.columns: dict[str, NDArray] = {name: tensors[name].numpy() for name in COLUMNS | BLOBS}

    def __reduce__(self) -> tuple[type[Manifest], tuple[Path]]:
        return Manifest, (self.folder,)

    def __len__(self) -> int:
        return len(self.columns["key"])

    @property
    def usable(self) -> NDArray:
        """True for each picture that can be used (N,)."""
        return self.columns["verdict"] == USED

    def skipped(self) -> list[str]:
        """The names of the pictures that cannot be used."""
        return [self.key(row) for row in np.flatnonzero(~self.usable).tolist()]

    def entry(self, row: int) -> Entry:
        """A picture as its source listed it."""
        label, group, offset, size, modified = (int(self.columns[name][row]) for name in Entry._fields[2:7])
        return Entry(self.key(row), self.captions(row), label, group, offset, size, modified)

    def key(self, row: int) -> str:
        return os.fsdecode(self.columns["key_text"][part(self.columns["key"], row)].tobytes())

    def captions(self, row: int) -> list[str]:
        text, ends = self.columns["caption_text"], self.columns["caption"]
        span = part(self.columns["captions"], row)
        return [text[part(ends, i)].tobytes().decode() for i in range(span.start, span.stop)]


def part(ends: NDArray, i: int) -> slice:
    """The i-th of the parts that lie one after the other and end at `ends`."""
    return slice(int(ends[i - 1]) if i else 0, int(ends[i]))


class Scan:
    """The columns and blobs of a manifest while it is made."""

    def __init__(self) -> None:
        self.numbers = {name: array(np.dtype(kind).char) for name, kind in COLUMNS.items()}
        self.key_text, self.caption_text, self.caption = bytearray(), bytearray(), array("q")
        self.reasons: Counter[str] = Counter()
        self.skipped: list[dict[str, str]] = []

    def add(self, entry: Entry, height: int, width: int) -> None:
        """Append one picture."""
        self.key_text += os.fsencode(entry.key)
        for caption in [] if entry.problem else entry.captions:
            self.caption_text += caption.encode()
            self.caption.append(len(self.caption_text))
        if entry.problem:
            self.skipped.append({"key": entry.key, "reason": entry.problem})
            self.reasons[entry.problem.partition(":")[0]] += 1
        row = entry._asdict() | {"key": len(self.key_text), "captions": len(self.caption)}
        row |= {"height": height, "width": width, "verdict": SKIPPED if entry.problem else USED}
        for name, column in self.numbers.items():
            column.append(row[name])


def manifest_of(source: Source, folder: Path, options: dict[str, Any]) -> Manifest:
    """The manifest of a source in this folder; scanned if it is missing or out of date."""
    manifest, _ = current(source, folder, options)
    if manifest is None:
        with locked(folder):
            manifest, why = current(source, folder, options)  # another process may have made it meanwhile
            if why:
                note(f"{folder / NAME}: {why}; scanning again")
            manifest = manifest or scan_and_write(source, folder, options)
    return manifest


def current(source: Source, folder: Path, options: dict[str, Any]) -> tuple[Manifest | None, str]:
    """The manifest in the folder, or why it cannot be used."""
    if not (folder / NAME).exists():
        return None, ""
    try:
        manifest = Manifest(folder)
    except (CheckpointError, KeyError, ValueError) as error:
        return None, f"cannot be used: {error}"
    for name, value in {"format": FORMAT, "options": options}.items():
        if manifest.about.get(name) != value:
            return None, f"the {name} changed"
    before, now = manifest.about["stamps"], source.stamps(manifest.skipped())
    changed = [path for path in now | before if now.get(path) != before.get(path)]
    return (None, f"{', '.join(changed[:3])}{', ...' * (len(changed) > 3)} changed") if changed else (manifest, "")


def scan_and_write(source: Source, folder: Path, options: dict[str, Any]) -> Manifest:
    """Scan the source; if it changes meanwhile, the manifest will be out of date."""
    stamps = source.stamps()
    scan = scanned(source, required=options["captions"] == "required")
    skipped = [line["key"] for line in scan.skipped]
    stamps = source.stamps(skipped) | stamps
    write(folder, scan, {"format": FORMAT, "options": options, "stamps": stamps, "classes": source.classes})
    words = f"; {len(skipped)} skipped, the first {skipped[0]}: see {folder / SKIPS}" if skipped else ""
    note(f"scanned {len(scan.numbers['key'])} pictures{words}")
    return Manifest(folder)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """One process scans; others that need the same manifest wait for it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / LOCK, "w")  # noqa: SIM115
    except OSError as error:
        hint = "data.manifest=FOLDER for another place"
        raise DataError("cannot write the manifest", str(folder), error.strerror or "", hint=hint) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            note(f"waiting for another process that scans into {folder}")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def scanned(source: Source, required: bool) -> Scan:
    """Decode each picture once, several at a time: PIL releases Python's lock."""
    scan, entries = Scan(), source.entries()
    progress = tqdm(desc="scanning", unit=" pictures", disable=None, leave=False)
    with ThreadPoolExecutor(os.cpu_count()) as pool, progress:
        while block := list(islice(entries, BLOCK)):
            for found in pool.map(partial(examined, source, required), block):
                scan.add(*found)
            progress.update(len(block))
    return scan


def examined(source: Source, required: bool, entry: Entry) -> tuple[Entry, int, int]:
    """The entry with its non-empty captions, and its height and width; zeros if something is wrong with it."""
    try:
        if entry.problem or entry.size > decode.LARGEST:
            raise decode.BadPicture(entry.problem or f"too large: {entry.size} bytes")
        data = source.read(entry)
        entry = entry._replace(size=len(data))
        height, width = decode.check(data)
        captions = [caption for caption in entry.captions if caption]
        if required and not captions:
            raise decode.BadPicture("an empty caption" if entry.captions else "no caption")
        return entry._replace(captions=captions), height, width
    except OSError as error:
        problem = f"cannot be read: {error.strerror or error}"
    except decode.BadPicture as error:
        problem = str(error)
    return entry._replace(problem=problem), 0, 0


def write(folder: Path, scan: Scan, about: dict[str, Any]) -> None:
    """Write the list of skipped pictures, then the columns, which make the manifest exist."""
    lines = "".join(json.dumps(line) + "\n" for line in scan.skipped).encode()
    arrays = {name: np.frombuffer(column, COLUMNS[name]) for name, column in scan.numbers.items()}
    arrays |= {name: np.frombuffer(getattr(scan, name), kind) for name, kind in BLOBS.items()}
    about |= {"digest": digest(arrays), "reasons": dict(scan.reasons.most_common())}
    try:
        with files.replacing(folder / SKIPS) as file:
            file.write(lines)
        tensors = {name: torch.from_numpy(column) for name, column in arrays.items()}
        files.write_file(folder / NAME, tensors, {"manifest": json.dumps(about)})
    except CheckpointError as error:
        raise DataError(f"the manifest {error}") from error


def digest(arrays: dict[str, NDArray]) -> str:
    """The sha256 of all columns but the times, which differ in a copy of the same data."""
    total = hashlib.sha256()
    for name in sorted(arrays.keys() - {"modified"}):
        total.update(f"{name} {len(arrays[name])}\n".encode())
        total.update(np.ascontiguousarray(arrays[name]).data)
    return total.hexdigest()


def cache_folder(source: Source, options: dict[str, Any]) -> Path:
    """The folder of a source's manifest in the user's cache."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    name = json.dumps([FORMAT, source.identity(), options], sort_keys=True)
    return cache / "ldm" / "manifests" / hashlib.sha256(name.encode("utf-8", "surrogateescape")).hexdigest()[:16]


def note(text: str) -> None:
    print(f"note: {text}", file=sys.stderr)
