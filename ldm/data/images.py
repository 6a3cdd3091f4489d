"""Captioned pictures from a folder, tar shards, parquet or a Hugging Face dataset, found out by looking."""

from __future__ import annotations

import glob
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from ldm import draws
from ldm.data import decode
from ldm.data.datasets import Rows, saved
from ldm.data.folder import SUFFIXES, Folder
from ldm.data.manifest import SKIPS, USED, Manifest, cache_folder, manifest_of
from ldm.data.parquet import Parquet
from ldm.data.sampler import SampleId
from ldm.data.shards import Shards
from ldm.data.source import Entry, Source
from ldm.errors import DataError, InputError

TARS = (".tar", ".tar.gz", ".tgz", ".tar.zst")  # packed ones cannot be read in place, which Shards says
TABLES = (".parquet",)
UNIFORMS = 4  # per sample: which caption, flip, top, left


class Images:
    """The data axis for pictures; `root` is a folder, a file or a pattern of files, or in Python a datasets.Dataset.

    With `aspect` above 1, pictures keep their shapes: each goes to the bucket nearest to its own aspect ratio.
    """

    def __init__(
        self,
        *,
        root: str,  # folder, tar files or tables, also by a pattern
        resolution: int,  # side of the square that pictures are scaled and cropped to
        batch_size: int,  # of a step, on all processes together
        workers: int = 4,  # processes that read, for each that trains
        crop: Literal["center", "random"] = "center",  # where the longer side is cut
        flip: bool = False,  # half of the samples are mirrored
        aspect: float = 1.0,  # above 1, buckets of shapes: the longest side over the shortest
        multiple: int = 64,  # of which a bucket's sides are multiples
        min_side: int = 0,  # pictures with a shorter one are left out
        captions: Literal["required", "optional"] = "required",  # whether each picture must have one
        caption: str | None = None,  # column or key of the captions; null finds it
        image: str | None = None,  # column or key of the pictures; null finds it
        bad: float = 0.01,  # share of unusable pictures that is put up with
        manifest: str | None = None,  # folder of what a first reading found; null is a cache folder of yours
    ):
        for name, value in {"resolution": resolution, "batch_size": batch_size, "multiple": multiple}.items():
            if value < 1:
                raise ValueError(f"{name}: too small; got {value}; expected at least 1")
        if workers < 0 or min_side < 0:
            raise ValueError(f"{'workers' if workers < 0 else 'min_side'}: negative; got {min(workers, min_side)}")
        if aspect < 1:
            raise ValueError(f"aspect: below 1; got {aspect}; expected the longest side over the shortest, such as 2")
        if not 0 <= bad <= 1:
            raise ValueError(f"bad: no share of the pictures; got {bad}; expected 0 to 1")
        self.batch_size, self.workers, self.crop, self.flip = batch_size, workers, crop, flip
        self.sizes = bucket_sizes(resolution, aspect, multiple)
        self.source = source_of(root, image, caption)
        options = {"image": image, "caption": caption, "captions": captions}
        folder = Path(manifest).expanduser() if manifest else cache_folder(self.source, options)
        self.manifest = manifest_of(self.source, folder, options)
        where = str(root) if isinstance(root, str | Path) else "data.root"
        refuse_bad(self.manifest, bad, where)
        columns = self.manifest.columns
        good = columns["verdict"] == USED
        self.rows = np.flatnonzero(good & (np.minimum(columns["height"], columns["width"]) >= min_side))
        seen, unfiltered, used = len(good), int(good.sum()), len(self.rows)
        self.counts = {"seen": seen, "used": used, "skipped": seen - unfiltered, "filtered": unfiltered - used}
        if len(self.rows) < batch_size:
            counts = ", ".join(f"{count} {what}" for what, count in self.counts.items())
            raise DataError("the set is smaller than one batch", where, counts, f"at least {batch_size} used")
        self.buckets = nearest(columns["height"][self.rows], columns["width"][self.rows], self.sizes)
        self.groups = columns["group"][self.rows] if self.source.grouped else None
        self.classes: list[str] = self.manifest.about["classes"]
        self.digest = self.manifest.digest
        self.labels = np.unique(columns["label"][self.rows])  # those that there are, -1 for none
        self.labelled = bool((self.labels >= 0).all())

    def __len__(self) -> int:
        return len(self.rows)

    def captions(self, index: int) -> list[str]:
        """All that may be drawn as a sample's caption: what a cache keeps."""
        return self.manifest.captions(int(self.rows[index])) or [""]

    def batch(self, sample_ids: Sequence[SampleId], seed: int) -> dict[str, Any]:
        """The pictures asked for, which share a bucket, with what belongs to each; random choices by sample number."""
        height, width = self.sizes[sample_ids[0].bucket]
        image = torch.empty(len(sample_ids), 3, height, width, dtype=torch.uint8)
        captions, sizes, crops, labels = [], [], [], []
        for i, (sample_id, (which, mirror, top, left)) in enumerate(zip(sample_ids, drawn(sample_ids, seed))):
            entry = self.manifest.entry(int(self.rows[sample_id.index]))
            place = (top, left) if self.crop == "random" else None
            picture = self.picture(entry, (height, width), place, self.flip and mirror < 0.5)
            image[i] = picture.pixels
            captions.append(entry.captions[int(which * len(entry.captions))] if entry.captions else "")
            sizes.append(picture.original_size)
            crops.append(picture.crop)
            labels.append(entry.label)
        batch = {"image": image, "caption": captions, "original_size": torch.tensor(sizes), "crop": torch.tensor(crops)}
        batch |= {
            name: torch.tensor([getattr(sample_id, name) for sample_id in sample_ids]) for name in ("number", "index")
        }
        return batch | ({"label": torch.tensor(labels)} if self.labelled else {})

    def picture(
        self, entry: Entry, size: tuple[int, int], place: tuple[float, float] | None, flip: bool
    ) -> decode.Picture:
        """One picture, which decoded when it was scanned."""
        try:
            return decode.picture(self.source.read(entry), size, place=place, flip=flip)
        except (decode.BadPicture, OSError) as error:
            raise DataError("the picture changed after the scan", entry.key, str(error)) from error


def drawn(sample_ids: Sequence[SampleId], seed: int) -> list[list[float]]:
    """All that is random about each sample: which caption, whether mirrored, and the top and left of its crop."""
    u, _ = draws.draw(draws.stream(seed, "data"), [sample_id.number for sample_id in sample_ids], UNIFORMS, (0,))
    return u.tolist()


def source_of(root: Any, image: str | None, caption: str | None) -> Source:
    """What kind of source this is, by what lies there."""
    if not isinstance(root, str | Path):
        return Rows(root, image, caption)
    path = Path(root).expanduser()
    pattern = not path.exists() and glob.has_magic(str(path))
    if not path.exists() and not pattern:
        raise InputError("no such folder or file", "data.root", str(root))
    if (path / "dataset_info.json").is_file() and (path / "state.json").is_file():
        return Rows(saved(path), image, caption)
    found = glob.glob(str(path), recursive=True) if pattern else listed(path) if path.is_dir() else [str(path)]
    for kind, suffixes in ((Shards, TARS), (Parquet, TABLES)):
        if files := sorted(Path(file) for file in found if file.endswith(suffixes)):
            return kind(files, image, caption)
    if not path.is_dir():
        raise InputError("no source of pictures", "data.root", str(root), "a folder, .tar or .parquet files")
    if image is not None:
        raise InputError("a folder of pictures has no columns", "data.image", image, hint="leaving it out")
    return Folder(path, caption)


def listed(root: Path) -> list[str]:
    """Shards and tables in a folder and in `data` below it, where Hugging Face keeps them; no pictures beside them."""
    found = []
    for folder in (root, root / "data"):
        names = os.listdir(folder) if folder.is_dir() else []
        here = [name for name in names if name.endswith(TARS + TABLES) and not name.startswith(".")]
        if here and any(os.path.splitext(name)[1].lower() in SUFFIXES for name in names):
            hint = f"data.root={folder / here[0]}, or moving it away"
            raise InputError("cannot tell which is meant", str(root), f"pictures and {here[0]}", "one kind", hint)
        found += [str(folder / name) for name in here]
    return found


def refuse_bad(manifest: Manifest, allowed: float, root: str) -> None:
    """Stop where there is nothing, or where too many pictures cannot be used."""
    if len(manifest) == 0:
        raise DataError("no pictures", root, expected="JPEG, PNG or WebP files, .tar or .parquet files")
    skipped = sum(manifest.reasons.values())
    if skipped > allowed * len(manifest):
        reasons = ", ".join(f"{count} {reason}" for reason, count in manifest.reasons.items())
        hint = "data.captions=optional, or " if "no caption" in manifest.reasons else ""
        hint += f"reading {manifest.folder / SKIPS}, which names each"
        got = f"{skipped} of {len(manifest)}: {reasons}"
        raise DataError("too many pictures cannot be used", root, got, f"at most data.bad={allowed}", hint)


def bucket_sizes(resolution: int, aspect: float, multiple: int) -> list[tuple[int, int]]:
    """(H, W) of each bucket: sides that are multiples, no more pixels than the square, up to an aspect ratio."""
    sizes = {(resolution, resolution)}
    for short in range(resolution - resolution % multiple, 0, -multiple):
        long = resolution**2 // short // multiple * multiple
        if short <= long <= aspect * short and aspect > 1:
            sizes |= {(short, long), (long, short)}
    return sorted(sizes)


def nearest(height: NDArray, width: NDArray, sizes: list[tuple[int, int]]) -> NDArray | None:
    """Of each picture the bucket whose aspect ratio is nearest in its logarithm."""
    if len(sizes) == 1:
        return None
    ratios = np.log([w / h for h, w in sizes])  # falls from the widest to the tallest: sizes ascend by height
    edges = (ratios[1:] + ratios[:-1]) / 2
    return len(edges) - np.searchsorted(edges[::-1], np.log(width / height))
