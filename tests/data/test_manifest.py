"""The manifest: made once, made again when it must be, and adding up."""

import json
import os
import pickle
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from benchmarks import start_up
from ldm.data import manifest
from ldm.data.folder import Folder
from ldm.data.images import Images
from ldm.data.manifest import manifest_of
from ldm.errors import DataError
from tests.data import awkward
from tests.data.photographs import encoded, photograph

GOOD = awkward.encoded(awkward.upright())
OPTIONS = {"image": None, "caption": None, "captions": "required"}


@pytest.fixture
def root(tmp_path, monkeypatch):
    """Eight pictures with captions, two of them bad; and a cache of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "set").mkdir()
    for i in range(8):
        (tmp_path / "set" / f"{i}.png").write_bytes(encoded(photograph(30 + i, 50 - i, i), "PNG"))
        (tmp_path / "set" / f"{i}.txt").write_text(f"picture {i}")
    (tmp_path / "set" / "3.png").write_bytes(b"")
    (tmp_path / "set" / "5.txt").write_text("")
    return tmp_path / "set"


def images(root, **options) -> Images:
    return Images(**{"root": str(root), "resolution": 16, "batch_size": 2, "bad": 0.5} | options)


def scans(capsys) -> str:
    """What was said about scanning again."""
    return capsys.readouterr().err


def test_it_holds_what_was_found(root):
    found = images(root)
    assert found.counts == {"seen": 8, "used": 6, "skipped": 2, "filtered": 0}
    entries = [found.manifest.entry(row) for row in range(8)]
    assert [entry.key for entry in entries] == [f"{i}.png" for i in range(8)]
    assert [entry.captions for entry in entries] == [[f"picture {i}"] if i not in (3, 5) else [] for i in range(8)]
    assert [entry.size for entry in entries] == [(root / f"{i}.png").stat().st_size for i in range(8)]
    sizes = [found.manifest.columns[side].tolist() for side in ("height", "width")]
    used = [i not in (3, 5) for i in range(8)]
    assert sizes == [[(30 + i) * u for i, u in enumerate(used)], [(50 - i) * u for i, u in enumerate(used)]]
    lines = (found.manifest.folder / manifest.SKIPS).read_text().splitlines()
    assert list(map(json.loads, lines)) == [
        {"key": "3.png", "reason": "an empty file"},
        {"key": "5.png", "reason": "an empty caption"},
    ]


def test_it_is_made_once(root, capsys, monkeypatch):
    first = images(root)
    assert (
        scans(capsys)
        == f"note: scanned 8 pictures; 2 skipped, the first 3.png: see {first.manifest.folder}/skipped.jsonl\n"
    )
    folders = list((root.parent / "cache" / "ldm" / "manifests").iterdir())
    assert [first.manifest.folder] == folders
    monkeypatch.setattr(manifest, "scanned", None)  # cannot be called
    again = images(root, resolution=32, batch_size=1, crop="random")
    assert again.manifest.digest == first.manifest.digest
    assert scans(capsys) == ""


def rewrite(path: Path, data: bytes) -> None:
    """Change a file in its place, a moment later."""
    before = path.stat().st_mtime_ns if path.exists() else time.time_ns()
    path.write_bytes(data)
    os.utime(path, ns=(before + 10**9, before + 10**9))


@pytest.mark.parametrize(
    ("change", "said", "used"),
    [
        (lambda root: rewrite(root / "2.txt", b"another caption"), "./ changed", 6),
        (lambda root: rewrite(root / "2.txt", b"picture 9"), "./ changed", 6),
        (lambda root: rewrite(root / "5.txt", b"at last"), "./ changed", 7),
        (lambda root: rewrite(root / "3.png", GOOD), "3.png changed", 7),
        (lambda root: (root / "0.png").unlink(), "./ changed", 5),
        (lambda root: (root / "8.png").write_bytes(GOOD), "./ changed", 6),
        (lambda root: (root / "new").mkdir(), "new/ changed", 6),
    ],
    ids=["caption", "caption of the same size", "mended caption", "mended picture", "removed", "added", "folder"],
)
def test_a_change_is_noticed(change, said, used, root, capsys):
    first = images(root)
    scans(capsys)
    time.sleep(0.02)  # so that the folder's own time moves
    change(root)
    again = images(root, bad=1.0)
    output = scans(capsys)
    assert f"{said}; scanning again\n" in output
    assert output.count("\n") == 2
    assert again.counts["used"] == used
    images(root, bad=1.0)
    assert scans(capsys) == ""
    if not said.startswith("new"):
        assert again.manifest.digest != first.manifest.digest


def test_a_changed_picture_is_not_trained_on(root):
    from ldm.data.sampler import SampleId

    found = images(root)
    rewrite(root / "2.png", GOOD)
    sample_ids = [SampleId(i, i, 0) for i in range(2)]
    assert len(found.batch(sample_ids, 0)["image"]) == 2
    with pytest.raises(DataError, match=r"the picture changed after the scan \(.*2.png\)"):
        found.batch([SampleId(2, 2, 0)], 0)
    (root / "4.png").unlink()
    with pytest.raises(DataError, match=r"the picture changed after the scan \(4.png\); got .*No such file"):
        found.batch([SampleId(3, 3, 0)], 0)


def test_the_digest_is_of_the_data_not_of_the_place(root):
    first = images(root)
    shutil.copytree(root, root.parent / "copy", copy_function=shutil.copy)
    assert images(root.parent / "copy").manifest.digest == first.manifest.digest
    assert images(root.parent / "copy").manifest.folder != first.manifest.folder


def test_a_manifest_may_live_beside_its_data_and_move_with_it(root, capsys):
    images(root, manifest=str(root.parent / "kept"))
    scans(capsys)
    os.rename(root, root.parent / "moved")
    assert images(root.parent / "moved", manifest=str(root.parent / "kept")).counts["used"] == 6
    assert scans(capsys) == ""
    assert not (root.parent / "cache").exists()


def test_a_manifest_inside_its_source_is_no_part_of_it(root, capsys):
    first = images(root, manifest=str(root / "index"))
    scans(capsys)
    assert images(root, manifest=str(root / "index")).manifest.digest == first.manifest.digest
    assert scans(capsys) == ""


def test_a_true_manifest_is_only_read(root, monkeypatch):
    images(root)
    monkeypatch.setattr(manifest, "locked", None)  # its folder may be read-only
    assert images(root).counts["used"] == 6


def test_other_options_are_another_manifest(root):
    assert images(root).manifest.folder != images(root, captions="optional").manifest.folder
    assert images(root, captions="optional").counts["used"] == 7


@pytest.mark.parametrize(
    "harm", [lambda data: b"", lambda data: data[:200], lambda data: data[:-99], lambda data: b"x" * 99]
)
def test_a_damaged_manifest_is_made_again(harm, root, capsys):
    first = images(root)
    file = first.manifest.folder / manifest.NAME
    file.write_bytes(harm(file.read_bytes()))
    assert images(root).manifest.digest == first.manifest.digest
    assert "manifest.safetensors: cannot be used: " in scans(capsys)


def test_too_many_bad_ones_stop_with_a_summary(root):
    with pytest.raises(DataError) as caught:
        images(root, bad=0.01)
    said = str(caught.value)
    assert (
        "got 2 of 8: 1 an empty file, 1 an empty caption, the first 3.png; expected at most 0 (data.bad=0.01)" in said
    )
    assert said.endswith(
        "manifests/"
        + next((root.parent / "cache/ldm/manifests").iterdir()).name
        + "/skipped.jsonl, which lists them all"
    )
    assert "\n" not in said
    assert images(root, bad=0.25).counts["skipped"] == 2  # and the scan was not for nothing


def test_small_pictures_are_filtered(root):
    found = images(root, min_side=34)
    assert found.counts == {"seen": 8, "used": 3, "skipped": 2, "filtered": 3}
    assert [found.manifest.key(int(row)) for row in found.rows] == ["4.png", "6.png", "7.png"]


def test_a_cache_that_cannot_be_written(root, monkeypatch):
    (root.parent / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(root.parent / "file"))
    with pytest.raises(DataError, match=r"cannot write the manifest \(.*file.*try data.manifest=FOLDER"):
        images(root)


def test_several_processes_scan_once(root, monkeypatch):
    calls, scanned = [], manifest.scanned

    def slow(*arguments, **options):
        calls.append(1)
        time.sleep(0.2)
        return scanned(*arguments, **options)

    monkeypatch.setattr(manifest, "scanned", slow)
    found = []
    threads = [threading.Thread(target=lambda: found.append(images(root).manifest.digest)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert len(calls) == 1
    assert len(found) == 4
    assert len(set(found)) == 1


def test_a_scan_that_is_killed_leaves_nothing_half_made(root):
    """Only the lock and the list of the skipped: the next scan begins afresh."""
    code = f"""
import os
from ldm.data import manifest
manifest.files.write_file = lambda *a: os._exit(9)
from ldm.data.images import Images
Images(root={str(root)!r}, resolution=16, batch_size=2, bad=0.5)
"""
    assert subprocess.run([sys.executable, "-c", code], env=os.environ).returncode == 9
    assert images(root).counts["used"] == 6


def test_only_its_name_travels_to_workers(root):
    found = images(root)
    assert len(pickle.dumps(found.manifest)) < 300
    assert len(pickle.dumps(found)) < 5000
    copy = pickle.loads(pickle.dumps(found))
    assert copy.manifest.entry(2) == found.manifest.entry(2)


def test_many_pictures_cost_little_to_begin_with():
    """A fifth of a million: the whole is measured by benchmarks/start_up.py."""
    seconds, megabytes = start_up.measure(200_000)
    assert seconds < 1.0
    assert megabytes < 60


def test_the_blobs_hold_every_text(tmp_path):
    (tmp_path / "set").mkdir()
    texts = ["", "a", "żółw 🐢", "x" * 100_000, "last"]
    (tmp_path / "set" / "a.jpg").write_bytes(GOOD)
    rows = [{"file_name": "a.jpg", "text": text} for text in texts]
    (tmp_path / "set" / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = manifest_of(Folder(tmp_path / "set"), tmp_path / "cache", OPTIONS)
    assert found.captions(0) == texts[1:]
    assert np.array_equal(found.columns["captions"], [4])
