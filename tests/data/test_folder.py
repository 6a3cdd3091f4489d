"""Folders of pictures: what their tables, notes and subfolders say."""

import json
import os

import pytest

from ldm.data.folder import Folder
from ldm.errors import DataError
from tests.data import awkward

GOOD = awkward.encoded(awkward.upright())


def fill(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(GOOD)


def listed(root, **options) -> dict:
    """Of each picture its captions and label, or its problem."""
    entries = Folder(root, **options).entries()
    return {entry.key: entry.problem or (entry.captions, entry.label) for entry in entries}


def test_a_table_in_json_lines(tmp_path):
    fill(tmp_path, "a.jpg", "b.jpg", "sub/c.png", "d.jpg")
    rows = [
        {"file_name": "a.jpg", "text": "one", "label": 3},
        {"file_name": "./b.jpg", "text": ["two", "zwei"]},
        {"file_name": "sub/c.png", "text": "three"},
        {"file_name": "sub/../a.jpg", "text": "another", "label": 3},
        {"file_name": "gone.jpg", "text": "four"},
        {"file_name": "../outside.jpg", "text": "five"},
    ]
    (tmp_path / "metadata.jsonl").write_text("\n\n".join(map(json.dumps, rows)) + "\n")
    fill(tmp_path.parent, "outside.jpg")
    assert listed(tmp_path) == {
        "a.jpg": (["one", "another"], 3),
        "b.jpg": (["two", "zwei"], -1),
        "sub/c.png": (["three"], -1),
        "d.jpg": ([], -1),
        "gone.jpg": "named in a table, but missing: metadata.jsonl:9",
        "../outside.jpg": "named in a table, but missing: metadata.jsonl:11",
    }


def test_a_table_in_csv_with_all_that_csv_allows(tmp_path):
    fill(tmp_path, "train/a.jpg", "train/b.jpg", "train/c.jpg", "train/d.jpg")
    text = 'file_name,caption,label\na.jpg,"one, ""quoted""\nover lines",2\nb.jpg,"' + "x" * 1_000_000 + '",0\n'
    (tmp_path / "train" / "metadata.csv").write_bytes("\ufeff".encode() + text.encode() + b"c.jpg,caf\xe9,1\nd.jpg\n")
    assert listed(tmp_path) == {
        "train/a.jpg": (['one, "quoted"\nover lines'], 2),
        "train/b.jpg": (["x" * 1_000_000], 0),
        "train/c.jpg": "a caption that is not UTF-8",
        "train/d.jpg": ([], -1),
    }


def test_the_caption_column_may_be_named(tmp_path):
    fill(tmp_path, "a.jpg")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.jpg", "text": "one", "long": "the longer one"}')
    assert listed(tmp_path) == {"a.jpg": (["one"], -1)}
    assert listed(tmp_path, caption="long") == {"a.jpg": (["the longer one"], -1)}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"file_name": "a.jpg"}\n{"text": "x"}', r"a row names no picture \(.*metadata.jsonl:2\)"),
        ('{"file_name": "a.jpg"}\n{"file_name": ', r"a row is not JSON \(.*metadata.jsonl:2\)"),
        ('["a.jpg"]', r"a row names no picture \(.*metadata.jsonl:1\)"),
        (r'{"file_name": "a\u0000.jpg"}', r"a row names no picture \(.*metadata.jsonl:1\)"),
        (r'{"file_name": "\ud800.jpg"}', r"a row names no picture \(.*metadata.jsonl:1\)"),
        ('{"file_name": 3}', r"a row names no picture \(.*metadata.jsonl:1\)"),
    ],
)
def test_a_wrong_row_stops(text, said, tmp_path):
    fill(tmp_path, "a.jpg")
    (tmp_path / "metadata.jsonl").write_text(text)
    with pytest.raises(DataError, match=said):
        listed(tmp_path)


def test_subfolders_are_classes(tmp_path):
    fill(tmp_path, "dog/1.jpg", "cat/2.jpg", "cat/deep/3.jpg", "żaba/4.jpg", "5.jpg")
    folder = Folder(tmp_path)
    found = {entry.key: (entry.captions, entry.label) for entry in folder.entries()}
    assert folder.classes == ["cat", "dog", "żaba"]
    assert found == {
        "cat/2.jpg": (["cat"], 0),
        "cat/deep/3.jpg": (["cat"], 0),
        "dog/1.jpg": (["dog"], 1),
        "żaba/4.jpg": (["żaba"], 2),
        "5.jpg": ([], -1),
    }


def test_subfolders_are_no_classes_where_captions_are_written(tmp_path):
    fill(tmp_path, "dog/1.jpg", "cat/2.jpg")
    (tmp_path / "dog" / "1.txt").write_text("a good dog")
    assert listed(tmp_path) == {"cat/2.jpg": ([], -1), "dog/1.jpg": (["a good dog"], -1)}


def test_the_order_is_of_the_names_alone(tmp_path):
    names = [f"{folder}{i}.jpg" for folder in ("", "b/", "a/", "a/c/") for i in (10, 9, 1)]
    for root, order in (("one", names), ("two", names[::-1])):
        fill(tmp_path / root, *order)
    keys = [[entry.key for entry in Folder(tmp_path / root).entries()] for root in ("one", "two")]
    assert keys[0] == keys[1] == sorted(names, key=os.fsencode)


def test_a_folder_is_walked_once_however_it_is_linked(tmp_path):
    fill(tmp_path, "a/1.jpg", "a/b/2.jpg")
    for i in range(5):  # without care, 2^5 ways round
        (tmp_path / "a" / f"x{i}").symlink_to(tmp_path / "a")
        (tmp_path / "a" / "b" / f"y{i}").symlink_to(tmp_path)
    assert list(listed(tmp_path)) == ["a/1.jpg", "a/b/2.jpg"]
