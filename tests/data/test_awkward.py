"""Every awkward file has its outcome, nothing hangs or is written elsewhere, and the totals add up."""

import io
import json
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest

from ldm.data.images import Images
from ldm.data.sampler import SampleId
from ldm.errors import DataError
from tests.data import awkward
from tests.data.awkward import CAPTIONS, GRAY, PICTURES, QUADRANTS, WHITE

GOOD = awkward.encoded(awkward.upright())
USED = {None, GRAY, WHITE, "any", "gray and white", "green is white"}


class Scanned:
    """A source after its scan: what became of each picture, by name."""

    def __init__(self, root: Path, cache: Path, **options):
        self.images = Images(
            root=str(root), resolution=32, batch_size=1, bad=1.0, aspect=2.0, multiple=8, manifest=str(cache), **options
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
        batch = self.images.batch([SampleId(0, index, int(self.images.buckets[index]))], 0)
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
    before = everything(base)
    scanned = Scanned(root, base / "cache", captions="optional")
    new = {os.path.relpath(path, base) for path in everything(base) - before}
    assert new == {"cache", "cache/manifest.safetensors", "cache/skipped.jsonl", "cache/manifest.lock"}
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
        return np.full(3, 255.0) if column else np.array(colour, float)
    return np.array(colour, float)


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


# ---------------------------------------------------------------------------------------------- folders and shards


def test_a_folder_of_links_pipes_and_odd_names(tmp_path):
    root = tmp_path / "pictures"
    (root / "below" / "deeper").mkdir(parents=True)
    outside = tmp_path / "outside"
    outside.mkdir()
    odd = [
        "żółw 🐢.jpg",
        "line\nbreak.jpg",
        " blank .jpg",
        "quote\"'.jpg",
        "dots.in.name.jpg",
        os.fsdecode(b"caf\xe9.jpg"),
    ]
    for file in [
        *(root / name for name in odd),
        outside / "there.jpg",
        root / ".hidden.jpg",
        root / "below/deeper/in.jpg",
    ]:
        file.write_bytes(GOOD)
    for name, target in {
        "loop": root,
        "below/deeper/up": "../..",
        "linked": outside,
        "itself.jpg": "itself.jpg",
        "dangling.jpg": "nowhere.jpg",
        "also.jpg": outside / "there.jpg",
    }.items():
        (root / name).symlink_to(target)
    os.mkfifo(root / "pipe.jpg")
    (root / "folder.jpg").mkdir()
    (root / "__MACOSX").mkdir()
    (root / "__MACOSX" / "x.jpg").write_bytes(GOOD)
    (root / "notes.md").write_text("not a picture")
    scanned = Scanned(root, tmp_path / "cache", captions="optional")
    assert scanned.used.keys() == {*odd, "linked/there.jpg", "also.jpg", "below/deeper/in.jpg"}
    assert scanned.skipped == {
        "itself.jpg": "cannot be read: Too many levels of symbolic links",
        "dangling.jpg": "cannot be read: No such file or directory",
        "pipe.jpg": "cannot be read: not a plain file",
    }
    for name in scanned.used:
        assert scanned.pixels(name).shape == (24, 40, 3)


def member(
    name: str, data: bytes = b"", kind: bytes = tarfile.REGTYPE, link: str = ""
) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size, info.type, info.linkname = len(data), kind, link
    return info, data


def tar(path: Path, *members: tuple[tarfile.TarInfo, bytes], mode: str = "w", form: int = tarfile.PAX_FORMAT) -> Path:
    with tarfile.open(path, mode, format=form) as archive:
        for info, data in members:
            archive.addfile(info, io.BytesIO(data))
    return path


def sample(key: str, caption: str = "a caption") -> list[tuple[tarfile.TarInfo, bytes]]:
    return [member(f"{key}.jpg", GOOD), member(f"{key}.txt", caption.encode())]


def test_a_shard_of_awkward_members(tmp_path):
    base = tmp_path / "safe"
    base.mkdir()
    names = ["../../escape", "/absolute/path", "żółw", "a" * 150 + "/long", "plain"]
    special = {
        "device.jpg": tarfile.CHRTYPE,
        "block.jpg": tarfile.BLKTYPE,
        "pipe.jpg": tarfile.FIFOTYPE,
        "link.jpg": tarfile.SYMTYPE,
        "hard.jpg": tarfile.LNKTYPE,
        "nameless_device": tarfile.CHRTYPE,
    }
    tar(
        base / "00.tar",
        *(one for name in names for one in sample(name)),
        *(member(name, kind=kind, link="/etc/passwd") for name, kind in special.items()),
        member("folder", kind=tarfile.DIRTYPE),
        member("README", b"no suffix, no sample"),
        member("._plain.jpg", b"a resource fork"),
        *sample("twice", "the first"),
        *sample("twice", "the second"),
        *[member("blank.jpg"), member("blank.txt", b"words")],
        member("lonely.txt", b"words without a picture"),
        *[member("class.jpg", GOOD), member("class.cls", b"7\n"), member("class.json", b'{"caption": ["one", "two"]}')],
        *[member("dotted.orig.jpg", GOOD), member("dotted.txt", b"words")],
    )
    before = everything(tmp_path)
    scanned = Scanned(base, tmp_path / "cache")
    assert {os.path.relpath(path, tmp_path).split("/")[0] for path in everything(tmp_path) - before} == {"cache"}
    assert scanned.used.keys() == {f"00.tar/{name}.jpg" for name in [*names, "twice", "class"]}
    kinds = {
        "device": "a device",
        "block": "a device",
        "pipe": "a FIFO",
        "link": "a symbolic link",
        "hard": "a hard link",
    }
    assert scanned.skipped == {
        **{f"00.tar/{name}.jpg": f"{kind} in a shard" for name, kind in kinds.items()},
        "00.tar/nameless_device": "a device in a shard",
        "00.tar/twice.jpg": "a duplicate key",
        "00.tar/twice.txt": "a duplicate key",
        "00.tar/blank.jpg": "an empty file",
        "00.tar/lonely.txt": "a sample without jpg or jpeg or png or webp or gif",
        "00.tar/dotted.orig.jpg": "a sample without jpg or jpeg or png or webp or gif",
    }
    assert scanned.captions("00.tar/twice.jpg") == ["the first"]
    assert scanned.captions("00.tar/class.jpg") == ["one", "two"]
    for name in scanned.used:
        assert np.abs(scanned.pixels(name)[6, 10] - np.array(QUADRANTS[0, 0], float)).max() <= 14


def cut(path: Path, keep: int) -> None:
    path.write_bytes(path.read_bytes()[:keep])


def damage(path: Path) -> None:
    """Overwrite the second member's header."""
    data = bytearray(path.read_bytes())
    start = 512 + -(-len(GOOD) // 512) * 512
    data[start : start + 512] = b"\xaa" * 512
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (lambda path: cut(path, 0), "empty file"),
        (lambda path: cut(path, 300), "truncated header"),
        (lambda path: cut(path, 512 + 200), "unexpected end of data"),
        (damage, "damaged header, or data after the end"),
        (lambda path: path.write_bytes(np.random.default_rng(0).bytes(5000)), "invalid header"),
        (lambda path: path.write_bytes(path.read_bytes() * 2), "data after the end, at byte"),
        (lambda path: tar(path, *sample("x"), mode="w:gz"), ""),
    ],
    ids=["empty", "header", "data", "damaged", "noise", "joined", "gzip"],
)
def test_an_unreadable_shard_stops(harm, said, tmp_path):
    path = tar(tmp_path / "00.tar", *sample("a"), *sample("b"))
    harm(path)
    with pytest.raises(DataError, match=f"cannot read the shard.*00.tar.*{said}") as caught:
        Scanned(tmp_path, tmp_path / "cache")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "cache" / "manifest.safetensors").exists()
