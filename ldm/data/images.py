"""Captioned pictures from a folder, tar shards, parquet tables or a Hugging Face dataset."""

from __future__ import annotations

import copy
import glob
import hashlib
import os
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from ldm import draws
from ldm.data import decode
from ldm.data.folder import SUFFIXES, Folder
from ldm.data.manifest import SKIPS, Manifest, cache_folder, manifest_of
from ldm.data.sampler import SampleId, hashed
from ldm.data.shards import Shards
from ldm.data.source import Source
from ldm.data.tables import Parquet, Rows, saved_dataset
from ldm.errors import DataError, InputError
from ldm.models.layers import check_not_negative, check_positive

TARS = (".tar", ".tar.gz", ".tgz", ".tar.zst")  # compressed ones cannot be read in place: Shards refuses them
TABLES = (".parquet",)
UNIFORMS = 4  # per sample: which caption, flip, top, left
FEW, ONE_IN = 5, 10  # unusable pictures that are tolerated whatever data.bad says: up to 5, at most one in ten


class Images:
    """The data axis for pictures; `root` is a folder, a file or a glob pattern, or in Python a datasets.Dataset.

    With `aspect` above 1, pictures keep their shapes: each goes to the bucket nearest to its own aspect ratio.
    """

    kind = "images"

    def __init__(
        self,
        *,
        root: str,  # folder, tar files or tables; glob patterns work too
        resolution: int,  # side of the square that pictures are scaled and cropped to
        batch_size: int,  # per step, over all processes
        workers: int = 4,  # loader processes for each training process
        crop: Literal["center", "random"] = "center",  # position of the crop along the longer side
        flip: bool = False,  # mirror half of the samples
        aspect: float = 1.0,  # above 1: buckets of shapes up to this ratio of the longer to the shorter side
        multiple: int = 64,  # sides of buckets are multiples of this
        min_side: int = 0,  # pictures with a shorter side are filtered out
        captions: Literal["required", "optional"] = "required",  # required: pictures without one are unusable
        caption: str | None = None,  # column or key of the captions; null: the usual names
        image: str | None = None,  # column or key of the pictures; null: the usual names
        split: float | None = None,  # share of the pictures kept apart for validation; null: none
        bad: float = 0.01,  # share of unusable pictures that is tolerated; up to 5 (one in ten) always are, unless 0
        manifest: str | None = None,  # folder of the scan's result; null: a folder in your cache
    ):
        check_positive(resolution=resolution, batch_size=batch_size, multiple=multiple)
        check_not_negative(workers=workers, min_side=min_side)
        if aspect < 1:
            raise ValueError(f"aspect: below 1; got {aspect}; expected the longest side over the shortest, such as 2")
        if not 0 <= bad <= 1:
            raise ValueError(f"bad: not a share of the pictures; got {bad}; expected 0 to 1")
        if split is not None and not 0 <= split < 1:
            raise ValueError(f"split: not a share of the pictures; got {split}; expected 0 to below 1; try 0.05")
        self.batch_size, self.workers, self.crop, self.flip = batch_size, workers, crop, flip
        self.sizes = bucket_sizes(resolution, aspect, multiple)
        self.source = source_of(root, image, caption)
        options = {"image": image, "caption": caption, "captions": captions}
        folder = Path(manifest).expanduser() if manifest else cache_folder(self.source, options)
        self.manifest = manifest_of(self.source, folder, options)
        path = str(root) if isinstance(root, str | Path) else "data.root"
        refuse_bad(self.manifest, bad, path)
        columns = self.manifest.columns
        rows = np.flatnonzero(self.manifest.usable & (np.minimum(columns["height"], columns["width"]) >= min_side))
        self.labels = np.unique(columns["label"][rows])  # the different labels, -1 for none
        self.labelled = bool((self.labels >= 0).all())
        self.classes: list[str] = self.manifest.about["classes"]
        apart = validation_part([self.manifest.key(row) for row in rows.tolist()], split) if split else np.zeros(0, int)
        self.validation_rows = rows[apart]
        self.select(np.delete(rows, apart), f" without {split} for validation" if split else "")
        seen, usable = len(self.manifest), int(self.manifest.usable.sum())
        self.counts = {"seen": seen, "used": len(self), "skipped": seen - usable, "filtered": usable - len(rows)}
        self.counts |= {"validation": len(apart)} if split else {}
        if len(self) < batch_size:
            counts = ", ".join(f"{count} {what}" for what, count in self.counts.items())
            raise DataError("the set is smaller than one batch", path, counts, f"at least {batch_size} used")

    def select(self, rows: NDArray, part: str) -> None:
        """Make these rows of the manifest the samples; `part` tells their digest from the whole set's."""
        columns = self.manifest.columns
        self.rows, digest = rows, self.manifest.digest
        self.buckets = nearest(columns["height"][rows], columns["width"][rows], self.sizes)
        self.groups = columns["group"][rows] if self.source.grouped else None
        self.digest = hashlib.sha256(f"{digest}{part}".encode()).hexdigest() if part else digest

    def validation(self) -> Images | None:
        """The pictures that `split` keeps apart, cropped at the centre and not mirrored."""
        if not len(self.validation_rows):
            return None
        data = copy.copy(self)
        data.crop, data.flip, data.batch_size = "center", False, min(self.batch_size, len(self.validation_rows))
        data.select(self.validation_rows, f" for validation, apart from {self.digest}")
        return data

    def __len__(self) -> int:
        return len(self.rows)

    def captions(self, index: int) -> list[str]:
        """All captions of a sample, one of which is drawn each time: a cache keeps them all."""
        return self.manifest.captions(int(self.rows[index])) or [""]

    def batch(self, sample_ids: Sequence[SampleId], seed: int) -> dict[str, Any]:
        """Pictures of one bucket with their captions, sizes and labels; random choices are keyed by sample number."""
        height, width = self.sizes[sample_ids[0].bucket]
        image = torch.empty(len(sample_ids), 3, height, width, dtype=torch.uint8)
        captions, sizes, crops, labels = [], [], [], []
        for i, (sample_id, (which, mirror, top, left)) in enumerate(zip(sample_ids, uniforms(sample_ids, seed))):
            entry = self.manifest.entry(int(self.rows[sample_id.index]))
            corner = (top, left) if self.crop == "random" else None
            try:
                data, flip = self.source.read(entry), self.flip and mirror < 0.5
                picture = decode.picture(data, (height, width), corner=corner, flip=flip)
            except (decode.BadPicture, OSError) as error:  # the scan could decode it
                raise DataError("the picture changed after the scan", entry.key, str(error)) from error
            image[i] = picture.pixels
            captions.append(entry.captions[int(which * len(entry.captions))] if entry.captions else "")
            sizes.append(picture.original_size)
            crops.append(picture.crop)
            labels.append(entry.label)
        batch = {"image": image, "caption": captions, "original_size": torch.tensor(sizes), "crop": torch.tensor(crops)}
        batch |= {name: torch.tensor([getattr(one, name) for one in sample_ids]) for name in ("number", "index")}
        return batch | ({"label": torch.tensor(labels)} if self.labelled else {})


def uniforms(sample_ids: Sequence[SampleId], seed: int) -> list[list[float]]:
    """All that is random about each sample: its caption, whether it is mirrored, top and left of its crop."""
    u, _ = draws.draw(draws.stream(seed, "data"), [sample_id.number for sample_id in sample_ids], UNIFORMS, (0,))
    return u.tolist()


def validation_part(keys: Sequence[str], split: float) -> NDArray:
    """The pictures kept apart: those whose hashed key is below `split`, or the one with the lowest hash.

    A picture's side does not depend on the other pictures, so adding some moves none between training and validation.
    """
    if not keys:
        return np.zeros(0, int)
    values = hashed(0, 0, np.array([zlib.crc32(os.fsencode(key)) for key in keys]))
    apart = np.flatnonzero(values < np.uint64(split * 2**64))
    return apart if len(apart) else np.array([values.argmin()])


def source_of(root: Any, image: str | None, caption: str | None) -> Source:
    """The kind of source that `root` holds."""
    if not isinstance(root, str | Path):
        return Rows(root, image, caption)
    path = Path(root).expanduser()
    pattern = not path.exists() and glob.has_magic(str(path))
    if not path.exists() and not pattern:
        raise InputError("no such folder or file", "data.root", str(root))
    if (path / "dataset_info.json").is_file() and (path / "state.json").is_file():
        return Rows(saved_dataset(path), image, caption)
    found = glob.glob(str(path), recursive=True) if pattern else packed(path) if path.is_dir() else [str(path)]
    for kind, suffixes in ((Shards, TARS), (Parquet, TABLES)):
        if files := sorted(Path(file) for file in found if file.endswith(suffixes)):
            return kind(files, image, caption)
    if not path.is_dir():
        raise InputError("unsupported data source", "data.root", str(root), "a folder, .tar or .parquet files")
    if image is not None:
        raise InputError("data.image: a folder of pictures has no columns", "data.image", image, hint="leaving it out")
    return Folder(path, caption)


def packed(root: Path) -> list[str]:
    """Shards and tables in a folder and in `data` below it, as on the Hub; pictures beside them are refused."""
    found = []
    for folder in (root, root / "data"):
        names = os.listdir(folder) if folder.is_dir() else []
        archives = [name for name in names if name.endswith(TARS + TABLES) and not name.startswith(".")]
        if archives and any(os.path.splitext(name)[1].lower() in SUFFIXES for name in names):
            hint = f"data.root={folder / archives[0]}, or moving it away"
            got = f"pictures and {archives[0]}"
            raise InputError("pictures and packed files together", str(root), got, "one kind", hint)
        found += [str(folder / name) for name in archives]
    return found


def tolerated(count: int, share: float) -> int:
    """How many of `count` pictures may be unusable: a share or a few, whichever is more; none if the share is 0."""
    return max(int(share * count), min(FEW, count // ONE_IN)) if share else 0


def refuse_bad(manifest: Manifest, share: float, root: str) -> None:
    """Stop if there are no pictures, or if too many cannot be used."""
    if len(manifest) == 0:
        raise DataError("no pictures", root, expected="JPEG, PNG, WebP or GIF files, .tar or .parquet files")
    skipped, most = sum(manifest.reasons.values()), tolerated(len(manifest), share)
    if skipped > most:
        reasons = ", ".join(f"{count} {reason}" for reason, count in manifest.reasons.items())
        got = f"{skipped} of {len(manifest)}: {reasons}, the first {manifest.skipped()[0]}"
        hint = "data.captions=optional, or " if "no caption" in manifest.reasons else ""
        hint += f"reading {manifest.folder / SKIPS}, which lists them all"
        raise DataError("too many pictures cannot be used", root, got, f"at most {most} (data.bad={share})", hint)


def bucket_sizes(resolution: int, aspect: float, multiple: int) -> list[tuple[int, int]]:
    """(H, W) of each bucket: sides that are multiples, no more pixels than the square, up to an aspect ratio."""
    sizes = {(resolution, resolution)}
    for short in range(resolution - resolution % multiple, 0, -multiple):
        long = resolution**2 // short // multiple * multiple
        if short <= long <= aspect * short and aspect > 1:
            sizes |= {(short, long), (long, short)}
    return sorted(sizes)


def nearest(height: NDArray, width: NDArray, sizes: list[tuple[int, int]]) -> NDArray | None:
    """The bucket of each picture (N,), nearest in the logarithm of its aspect ratio; None if there is only one."""
    if len(sizes) == 1:
        return None
    ratios = np.log([w / h for h, w in sizes])  # falls from the widest to the tallest: sizes ascend by height
    edges = (ratios[1:] + ratios[:-1]) / 2
    return len(edges) - np.searchsorted(edges[::-1], np.log(width / height))
