"""Every awkward file has its outcome, nothing hangs or is written elsewhere, and the totals add up."""

import io
import json
import os
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest

from ldm.data.images import Images
from ldm.data.sampler import Ask
from tests.data import awkward
from tests.data.awkward import CAPTIONS, GRAY, PICTURES, QUADRANTS, SIZE, WHITE

GOOD = awkward.encoded(awkward.upright())
USED = {None, GRAY, WHITE, "any", "gray and white", "green is white"}


class Scanned:
    """A source after its scan: what became of each picture, by name."""

    def __init__(self, root: Path, cache: Path, **options):
        self.images = Images(
            root=str(root), resolution=32, batch_size=1, bad=1.0, aspect=1.5, multiple=16, manifest=str(cache), **options
        )
        lines = (cache / "skipped.jsonl").read_text().splitlines()
        self.skipped = {line["key"]: line["reason"] for line in map(json.loads, lines)}
        manifest = self.images.manifest
        self.used = {manifest.key(int(row)): i for i, row in enumerate(self.images.rows)}
        assert len(lines) == len(self.skipped) == self.images.counts["skipped"]
        assert self.images.counts["seen"] == len(self.used) + len(self.skipped) + self.images.counts["filtered"]

    def pixels(self, name: str) -> np.ndarray:
        """A used picture as training sees it, (H, W, 3)."""
        index = self.used[name]
        batch = self.images.batch([Ask(0, index, int(self.images.buckets[index]))], 0)
        return batch["image"][0].permute(1, 2, 0).numpy()

    def captions(self, name: str) -> list[str]:
        return self.images.manifest.captions(int(self.images.rows[self.used[name]]))


def everything(root: Path) -> set[str]:
    return {os.path.join(folder, name) for folder, folders, files in os.walk(root) for name in folders + files}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    base = tmp_path_factory.mktemp("awkward")
    root = base / "pictures"
    root.mkdir()
    for name, (make, _) in PICTURES.items():
        (root / name).write_bytes(make())
    before, begin = everything(base), time.monotonic()
    scanned = Scanned(root, base / "cache", captions="optional")
    assert time.monotonic() - begin < 60
    new = {os.path.relpath(path, base) for path in everything(base) - before}
    assert new == {"cache", "cache/manifest.safetensors", "cache/skipped.jsonl", "cache/.lock"}
    return scanned


def test_there_are_enough_of_them(pictures):
    assert len(PICTURES) >= 60
    assert pictures.images.counts["seen"] == len(PICTURES)


@pytest.mark.parametrize("name", PICTURES)
def test_a_picture_has_its_outcome(name, pictures):
    expected = PICTURES[name][1]
    if expected not in USED:
        assert pictures.skipped[name].startswith(expected)
        return
    assert name in pictures.used, pictures.skipped.get(name)
    pixels = pictures.pixels(name)
    height, width, _ = pixels.shape
    for (row, column), colour in QUADRANTS.items():
        found = pixels[height * (1 + 2 * row) // 4, width * (1 + 2 * column) // 4].astype(float)
        assert np.abs(found - shown(colour, expected, row, column, found)).max() <= 14, (row, column)


def shown(colour, expected, row, column, found):
    """The colour that a quadrant should have."""
    gray = np.full(3, np.dot(colour, (0.299, 0.587, 0.114)))
    if expected == "any":
        return found
    if expected == GRAY:
        return gray
    if expected == "gray and white":
        return np.full(3, 255.0) if column else gray
    if expected == "green is white":
        return np.full(3, 255.0) if (row, column) == (0, 1) else np.array(colour, float)
    if expected == WHITE:
        return np.full(3, 255.0) if column else np.array(colour if row == 0 else found, float)
    return np.array(colour, float)


def test_the_left_of_what_is_transparent_keeps_its_colour(pictures):
    for name in ("rgba.png", "alpha.webp"):
        pixels = pictures.pixels(name)
        assert np.abs(pixels[24, 8].astype(float) - QUADRANTS[1, 0]).max() <= 14


@pytest.fixture(scope="module")
def captioned(tmp_path_factory):
    base = tmp_path_factory.mktemp("captions")
    (base / "pictures").mkdir()
    for name, (data, _) in CAPTIONS.items():
        (base / "pictures" / name).write_bytes(data)
        (base / "pictures" / name).with_suffix(".jpg").write_bytes(GOOD)
    for name in ("both", "alone"):
        (base / "pictures" / f"{name}.jpg").write_bytes(GOOD)
    (base / "pictures" / "both.txt").write_text("the text")
    (base / "pictures" / "both.json").write_text('{"caption": "the object"}')
    os.mkfifo(base / "pictures" / "pipe.txt")
    (base / "pictures" / "pipe.jpg").write_bytes(GOOD)
    return Scanned(base / "pictures", base / "cache")


@pytest.mark.parametrize("name", CAPTIONS)
def test_a_caption_has_its_outcome(name, captioned):
    expected, key = CAPTIONS[name][1], str(Path(name).with_suffix(".jpg"))
    if isinstance(expected, str):
        assert captioned.skipped[key] == expected
    else:
        assert captioned.captions(key) == expected


def test_other_captions(captioned):
    assert captioned.captions("both.jpg") == ["the text"]
    assert captioned.skipped["alone.jpg"] == "no caption"
    assert captioned.skipped["pipe.jpg"] == "a caption file that cannot be read: not a plain file"
