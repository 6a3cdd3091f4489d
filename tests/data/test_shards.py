"""Tar shards against webdataset's own reading of them."""

import os
import pickle
import tarfile
from concurrent.futures import ThreadPoolExecutor

import pytest
import webdataset

from ldm.data import shards
from ldm.data.shards import Shards
from ldm.errors import DataError
from tests.data.photographs import encoded, photograph


@pytest.fixture
def files(tmp_path):
    """Five shards of four samples, as webdataset writes them."""
    paths = [tmp_path / f"{number}.tar" for number in range(5)]
    for number, path in enumerate(paths):
        with webdataset.TarWriter(str(path)) as writer:
            for i in range(4):
                picture = encoded(photograph(20, 30, seed=10 * number + i))
                fields = {"caption": f"from JSON {i}", "label": i}
                texts = [{"txt": f"{number} {i}", "cls": i + 10}, {"json": fields}][i % 2]
                writer.write({"__key__": f"folder.with.dots/{number}{i}", "jpg": picture, **texts})
    return paths


def test_the_samples_are_webdatasets(files):
    source = Shards(files)
    expected = list(webdataset.WebDataset([str(file) for file in files], shardshuffle=False, empty_check=False))
    found = list(source.entries())
    assert len(found) == len(expected) == 20
    for entry, sample in zip(found, expected):
        assert entry.key.split("/", 1)[1] == sample["__key__"] + ".jpg"
        assert source.read(entry) == sample["jpg"]
        assert entry.captions == (
            [sample["txt"].decode()] if "txt" in sample else ["from JSON " + sample["__key__"][-1]]
        )
        assert entry.label == (int(sample["cls"]) if "cls" in sample else int(sample["__key__"][-1]))
    assert [entry.group for entry in found] == [n for n in range(5) for _ in range(4)]


def test_few_shards_are_open_at_once(files, monkeypatch):
    monkeypatch.setattr(shards, "OPEN", 2)
    source = Shards(files)
    entries = list(source.entries())
    expected = [source.read(entry) for entry in entries]
    begin = len(os.listdir("/proc/self/fd"))
    with ThreadPoolExecutor(8) as pool:  # a shard that falls out is closed only when it has been read
        for _ in range(20):
            assert list(pool.map(source.read, entries[::3] + entries[::-1])) == expected[::3] + expected[::-1]
    assert len(os.listdir("/proc/self/fd")) <= begin + 2


def test_a_shard_that_lost_its_end_after_the_scan_says_so(files):
    source = Shards(files)
    last = list(source.entries())[3]
    os.truncate(files[0], last.offset + last.size - 1)
    with pytest.raises(DataError, match="the shard changed after the scan"):
        source.read(last)


def test_a_copy_in_another_process_opens_its_own(files):
    source = Shards(files)
    entries = list(source.entries())
    data = source.read(entries[7])
    copy = pickle.loads(pickle.dumps(source))
    assert "opened" not in copy.__dict__
    assert copy.read(entries[7]) == data


def test_after_a_fork_parent_and_child_read_at_once(files):
    source = Shards(files)
    entries = list(source.entries())
    expected = [source.read(entry) for entry in entries]
    child = os.fork()
    same = all(source.read(entry) == data for _ in range(20) for entry, data in zip(entries, expected))
    if child == 0:
        os._exit(0 if same else 1)
    assert same
    assert os.waitpid(child, 0)[1] == 0


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_every_form_of_tar_is_read(form, tmp_path):
    picture = tmp_path / "picture"
    picture.write_bytes(encoded(photograph(9, 9)))
    key = "a/" * 40 + "long" * 8
    with tarfile.open(tmp_path / "x.tar", "w", format=form) as archive:
        archive.add(picture, f"{key}.jpg")
    (entry,) = Shards([tmp_path / "x.tar"]).entries()
    assert entry.key == f"x.tar/{key}.jpg"
    assert Shards([tmp_path / "x.tar"]).read(entry) == picture.read_bytes()


def test_the_picture_and_the_caption_may_be_named(tmp_path):
    with webdataset.TarWriter(str(tmp_path / "x.tar")) as writer:
        fields = b'{"caption": "short", "long": "the long one"}'
        writer.write({"__key__": "a", "jpg": b"first", "edited.png": b"second", "json": fields})
    entry, named = (next(Shards([tmp_path / "x.tar"], *names).entries()) for names in ((), ("edited.png", "long")))
    assert (entry.captions, Shards([tmp_path / "x.tar"]).read(entry)) == (["short"], b"first")
    assert (named.captions, Shards([tmp_path / "x.tar"]).read(named)) == (["the long one"], b"second")
