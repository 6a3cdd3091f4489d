"""Parquet and Hugging Face datasets: the same rows, however they are stored."""

import io
import pickle

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from ldm.data.images import source_of
from ldm.data.tables import Parquet, Rows, saved_dataset
from ldm.errors import DataError, InputError
from tests.data.photographs import encoded, photograph

PICTURES = [encoded(photograph(20, 30, seed=i)) for i in range(10)]
CAPTIONS = [f"picture {i}" for i in range(10)]


def table(**columns) -> pa.Table:
    return pa.table({"image": [{"bytes": data, "path": None} for data in PICTURES], "caption": CAPTIONS, **columns})


def check_rows(source, groups=None):
    entries = list(source.entries())
    assert [source.read(entry) for entry in entries] == PICTURES
    assert [entry.captions for entry in entries] == [[caption] for caption in CAPTIONS]
    assert [entry.label for entry in entries] == list(range(10))
    assert [entry.group for entry in entries] == (groups or [0] * 10)
    again = pickle.loads(pickle.dumps(source))
    assert again.read(entries[7]) == PICTURES[7]
    assert again.read(entries[2]) == PICTURES[2]


@pytest.mark.parametrize("stored", ["structs", "bytes", "large"])
def test_rows_are_read_in_place(stored, tmp_path):
    rows = table(label=list(range(10)))
    if stored != "structs":
        rows = rows.set_column(0, "image", pa.array(PICTURES, pa.large_binary() if stored == "large" else pa.binary()))
    pq.write_table(rows.slice(0, 7), tmp_path / "0.parquet", row_group_size=3)
    pq.write_table(rows.slice(7), tmp_path / "1.parquet", row_group_size=10)
    check_rows(source_of(str(tmp_path), None, None), [0, 0, 0, 1, 1, 1, 2, 3, 3, 3])


def test_a_row_needs_its_row_group_alone(tmp_path, monkeypatch):
    pq.write_table(table(), tmp_path / "0.parquet", row_group_size=2)
    source, reads = Parquet([tmp_path / "0.parquet"]), []
    entries, part = list(source.entries()), source.part
    monkeypatch.setattr(source, "part", lambda *asked: reads.append(asked) or part(*asked))
    for i in (5, 4, 9, 5, 8):
        assert source.read(entries[i]) == PICTURES[i]
    assert reads == [("0.parquet", 2, ["image"]), ("0.parquet", 4, ["image"])]


def made() -> datasets.Dataset:
    names = [str(i) for i in range(10)]
    features = datasets.Features(
        {"image": datasets.Image(), "caption": datasets.Value("string"), "label": datasets.ClassLabel(names=names)}
    )
    images = [{"bytes": data, "path": None} for data in PICTURES]
    return datasets.Dataset.from_dict({"image": images, "caption": CAPTIONS, "label": list(range(10))}, features)


@pytest.mark.parametrize("stored", ["object", "saved", "parquet"])
def test_a_dataset_is_the_same_as_an_object_and_on_the_disk(stored, tmp_path):
    root = made()
    if stored == "saved":
        root.save_to_disk(str(tmp_path / "set"))
    elif stored == "parquet":
        (tmp_path / "set" / "data").mkdir(parents=True)
        root.to_parquet(str(tmp_path / "set" / "data" / "train-00000-of-00001.parquet"))
    source = source_of(root if stored == "object" else str(tmp_path / "set"), None, None)
    check_rows(source)
    if stored != "parquet":
        assert source.classes == [str(i) for i in range(10)]


def test_a_dataset_with_a_transform_or_a_view_is_read_raw():
    rows = made().with_transform(lambda batch: {"image": [None for _ in batch["image"]]}).select([3, 1])
    source = Rows(rows)
    assert [source.read(entry) for entry in source.entries()] == [PICTURES[3], PICTURES[1]]
    assert source.identity() != Rows(made()).identity()


def test_other_kinds_of_dataset_are_refused(tmp_path):
    for other in (datasets.DatasetDict({"train": made()}), made().to_iterable_dataset(), [1, 2]):
        with pytest.raises(InputError, match=r"data.root.*expected a map-style datasets.Dataset"):
            source_of(other, None, None)
    datasets.DatasetDict({"train": made()}).save_to_disk(str(tmp_path / "set"))
    check_label = saved_dataset(tmp_path / "set" / "train")
    assert len(check_label) == 10


def test_captions_may_be_lists_absent_or_damaged(tmp_path):
    texts = pa.array([["one", "uno"], [], None, ["", "four"], *[["x"]] * 6])
    pq.write_table(table().set_column(1, "captions", texts), tmp_path / "0.parquet")
    entries = list(Parquet([tmp_path / "0.parquet"]).entries())
    assert [entry.captions for entry in entries[:4]] == [["one", "uno"], [], [], ["", "four"]]

    latin = pa.array([b"caf\xe9", *[b"plain"] * 9]).view(pa.string())
    pq.write_table(table().set_column(1, "text", latin), tmp_path / "1.parquet")
    entries = list(Parquet([tmp_path / "1.parquet"]).entries())
    assert entries[0].problem == "a caption that is not UTF-8"
    assert entries[1].captions == ["plain"]


def test_pictures_in_files_beside_the_table(tmp_path):
    """A path may lead below the table's folder, and nowhere else."""
    (tmp_path / "set" / "files").mkdir(parents=True)
    Image.open(io.BytesIO(PICTURES[0])).save(tmp_path / "set" / "files" / "a.png")
    (tmp_path / "secret.png").write_bytes(b"no")
    paths = ["files/a.png", "../secret.png", str(tmp_path / "secret.png"), "https://example.org/a.png", None]
    images = pa.array([{"bytes": None, "path": path} for path in paths])
    pq.write_table(pa.table({"image": images}), tmp_path / "set" / "0.parquet")
    source = Parquet([tmp_path / "set" / "0.parquet"])
    entries = list(source.entries())
    assert source.read(entries[0]) == (tmp_path / "set" / "files" / "a.png").read_bytes()
    for entry in entries[1:4]:
        with pytest.raises(OSError, match="no such file in the folder"):
            source.read(entry)
    with pytest.raises(OSError, match="no picture in the row"):
        source.read(entries[4])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"image": "photo"}, r"no such column \(data.image, .*0.parquet\); got photo; expected one of url, words"),
        ({"caption": "text"}, r"no such column \(data.caption, .*0.parquet\); got text; expected one of url, words"),
        ({}, r"no column of pictures \(.*0.parquet\); got url, words; expected image or .*; try data.image=NAME"),
    ],
)
def test_a_table_without_the_column(options, said, tmp_path):
    pq.write_table(pa.table({"url": ["a"], "words": ["b"]}), tmp_path / "0.parquet")
    with pytest.raises(InputError, match=said):
        source_of(str(tmp_path), options.get("image"), options.get("caption"))


@pytest.mark.parametrize("package", ["pyarrow", "datasets"])
def test_a_package_that_is_not_installed_is_named(package, tmp_path, monkeypatch):
    pq.write_table(table(), tmp_path / "0.parquet")
    datasets.Dataset(table()).save_to_disk(tmp_path / "rows")
    monkeypatch.setattr("ldm.data.source.find_spec", lambda name: None)
    root = tmp_path / {"pyarrow": "0.parquet", "datasets": "rows"}[package]
    said = rf"needs another package \({root}\); got no {package}; try pip install -e '.\[data\]'"
    with pytest.raises(InputError, match=said):
        source_of(str(root), None, None)


@pytest.mark.parametrize("keep", [0, 3, 100, -20])
def test_a_table_that_cannot_be_read(keep, tmp_path):
    pq.write_table(table(), tmp_path / "0.parquet")
    (tmp_path / "0.parquet").write_bytes((tmp_path / "0.parquet").read_bytes()[:keep])
    with pytest.raises(DataError, match=r"cannot read the table \(.*0.parquet\).*expected a parquet file"):
        source_of(str(tmp_path), None, None)
