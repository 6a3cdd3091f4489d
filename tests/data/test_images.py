"""The data axis for pictures: what a batch holds, and what is refused before anything is built."""

import math
from collections import Counter

import numpy as np
import pytest
import torch

from ldm.config import schema
from ldm.config.schema import Part
from ldm.data import decode
from ldm.data.images import Images, bucket_sizes, nearest, tolerated
from ldm.data.loader import check_same_kind, loader
from ldm.data.sampler import SampleId
from ldm.errors import DataError, InputError
from tests.data import awkward
from tests.data.photographs import encoded, photograph


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Twelve pictures of several shapes in two classes, with one to three captions each."""
    root = tmp_path_factory.mktemp("images") / "set"
    root.mkdir()
    shapes = [(60, 60), (50, 90), (90, 50)]
    rows = []
    for i in range(12):
        (root / f"{i:02}.jpg").write_bytes(encoded(photograph(*shapes[i % 3], seed=i)))
        texts = ", ".join(f'"{i} {n}"' for n in range(1 + i % 3))
        rows.append(f'{{"file_name": "{i:02}.jpg", "text": [{texts}], "label": {i % 2}}}')
    (root / "metadata.jsonl").write_text("\n".join(rows))
    return root


def images(root, **options) -> Images:
    given = {"resolution": 32, "batch_size": 4, "manifest": str(root.parent / "manifest")} | options
    return Images(root=str(root), **given)


def sample_ids(*numbers: int, length: int = 12, bucket: int = 0) -> list[SampleId]:
    return [SampleId(number, number % length, bucket) for number in numbers]


def test_a_batch_holds_what_was_agreed(root):
    batch = images(root).batch(sample_ids(3, 7, 24), 0)
    assert batch["image"].shape == (3, 3, 32, 32)
    assert batch["image"].dtype == torch.uint8
    assert batch["caption"] == ["3 0", batch["caption"][1], "0 0"]
    assert batch["caption"][1] in ("7 0", "7 1")
    assert batch["label"].tolist() == [1, 1, 0]
    assert batch["number"].tolist() == [3, 7, 24]
    assert batch["index"].tolist() == [3, 7, 0]
    assert batch["original_size"].tolist() == [[60, 60], [50, 90], [60, 60]]
    assert batch["crop"].tolist() == [[0, 0], [0, 12], [0, 0]]  # (50, 90) becomes (32, 57)
    assert {key: value.dtype for key, value in batch.items() if key not in ("image", "caption")} == dict.fromkeys(
        ("label", "number", "index", "original_size", "crop"), torch.int64
    )
    expected = decode.picture((root / "07.jpg").read_bytes(), (32, 32)).pixels
    assert torch.equal(batch["image"][1], expected)


def test_random_choices_belong_to_the_sample_and_its_number(root):
    data = images(root, crop="random", flip=True)
    together = data.batch(sample_ids(*range(24)), 5)
    for number in (1, 10, 23):
        alone = data.batch(sample_ids(number), 5)
        assert torch.equal(alone["image"][0], together["image"][number])
        assert alone["caption"] == together["caption"][number : number + 1]
        assert alone["crop"].tolist() == together["crop"][number : number + 1].tolist()
    other = data.batch(sample_ids(*range(24)), 6)
    assert not torch.equal(other["image"], together["image"])
    assert any((together["image"][n] != together["image"][n + 12]).any() for n in range(12))  # another epoch


def test_captions_flips_and_crops_are_drawn_evenly(root):
    data = images(root, crop="random", flip=True)
    numbers = range(5, 5 + 12 * 300, 12)  # one picture of (90, 50) with three captions, in 300 epochs
    batch = data.batch(sample_ids(*numbers), 0)
    captions = Counter(batch["caption"])
    assert captions.keys() == {"5 0", "5 1", "5 2"}
    assert min(captions.values()) > 70
    tops = Counter(batch["crop"][:, 0].tolist())
    assert tops.keys() == set(range(57 - 32 + 1))
    assert batch["crop"][:, 1].unique().tolist() == [0]
    still = decode.picture((root / "05.jpg").read_bytes(), (57, 32)).pixels.int()
    for mirrored, share in ((False, 0.5), (True, 0.5)):
        whole = still.flip(2) if mirrored else still
        same = [
            (image.int() - whole[:, top : top + 32]).abs().float().mean() < 3
            for image, (top, _) in zip(batch["image"], batch["crop"].tolist())
        ]
        assert abs(np.mean(same) - share) < 0.1


def test_buckets_keep_the_shapes(root):
    data = images(root, aspect=2.0, multiple=8)
    assert data.sizes == [(24, 40), (32, 32), (40, 24)]
    assert data.buckets.tolist() == [1, 0, 2] * 4
    batch = data.batch([SampleId(n, n, 2) for n in (2, 5)], 0)
    assert batch["image"].shape == (2, 3, 40, 24)
    assert batch["original_size"].tolist() == [[90, 50]] * 2


@pytest.mark.parametrize(
    ("resolution", "aspect", "multiple"), [(1024, 2.5, 64), (512, 2.0, 64), (256, 2.0, 32), (96, 4, 8)]
)
def test_bucket_sizes(resolution, aspect, multiple):
    sizes = bucket_sizes(resolution, aspect, multiple)
    assert (resolution, resolution) in sizes
    assert {(w, h) for h, w in sizes} == set(sizes)
    for h, w in sizes:
        assert h % multiple == w % multiple == 0
        assert h * w <= resolution**2
        assert max(h, w) / min(h, w) <= aspect
        assert h * w > resolution**2 - multiple * max(h, w)  # no longer side would fit
    if resolution == 1024:  # those that SDXL was trained on
        assert {(832, 1216), (896, 1152), (768, 1344), (1216, 832), (1152, 896), (1344, 768)} <= set(sizes)
    assert bucket_sizes(resolution, 1.0, multiple) == [(resolution, resolution)]


def test_the_nearest_bucket_is_nearest():
    sizes = bucket_sizes(512, 3.0, 64)
    random = np.random.default_rng(0)
    height, width = random.integers(20, 2000, (2, 500))
    found = nearest(height, width, sizes)
    for h, w, bucket in zip(height, width, found):
        distance = [abs(math.log(w / h) - math.log(b / a)) for a, b in sizes]
        assert distance[bucket] == min(distance)


def test_batches_are_the_same_whatever_the_workers(root):
    data = images(root, crop="random", flip=True, aspect=2.0, multiple=8)
    batches = []
    for workers in (0, 2):
        data.workers = workers
        batches.append([batch for batch, _ in zip(loader(data, seed=3), range(5))])
    for one, other in zip(*batches):
        assert torch.equal(one["image"], other["image"])
        assert one["caption"] == other["caption"]
        assert torch.equal(one["number"], other["number"])


class Schema:
    def __init__(self, *, data: Part):
        pass


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("resolution: 0", "data.resolution: too small"),
        ("batch_size: 0", "data.batch_size: too small"),
        ("aspect: 0.5", "data.aspect: below 1"),
        ("workers: -1", "data.workers: must not be negative.*got -1"),
        ("min_side: -1", "data.min_side: must not be negative.*got -1"),
        ("bad: 2", "data.bad: not a share of the pictures"),
        ("split: 1", "data.split: not a share of the pictures.*try 0.05"),
        ("crop: left", "data.crop: wrong value"),
        ("multiple: 0", "data.multiple: too small"),
        ("captions: maybe", "data.captions: wrong value"),
    ],
)
def test_a_wrong_value_names_its_line(line, said, root, tmp_path):
    given = {"root": str(root), "resolution": "32", "batch_size": "4", "manifest": str(root.parent / "manifest")}
    name, value = line.split(": ")
    text = "".join(f"  {key}: {value}\n" for key, value in (given | {name: value}).items())
    (tmp_path / "c.yaml").write_text("format: 1\ndata:\n  type: images\n" + text)
    with pytest.raises(InputError, match=said) as caught:
        schema.load(tmp_path / "c.yaml", [], Schema).build("data")
    assert "c.yaml:" in str(caught.value)


def test_a_yaml_builds_it(root, tmp_path):
    (tmp_path / "c.yaml").write_text("format: 1\ndata: {type: images, root: x, resolution: 32, batch_size: 4}\n")
    overrides = [f"data.root={root}", f"data.manifest={root.parent / 'manifest'}", "data.aspect=2"]
    data = schema.load(tmp_path / "c.yaml", overrides, Schema).build("data")
    assert len(data) == 12


def test_a_few_bad_pictures_are_tolerated():
    """A share of many, up to five of a middling set, one in ten of a small one; none if `bad` is 0."""
    assert [tolerated(count, 0.01) for count in (1, 9, 10, 49, 50, 300, 600, 10_000)] == [0, 0, 1, 4, 5, 5, 6, 100]
    assert tolerated(10, 0.5) == 5
    assert tolerated(300, 0) == 0


# ------------------------------------------------------------------------------------- pictures kept apart


@pytest.fixture(scope="module")
def forty(tmp_path_factory):
    """Forty pictures with captions, three quarters of them in folders."""
    root = tmp_path_factory.mktemp("split") / "set"
    for i in range(40):
        add(root, i)
    return root


def add(root, i: int) -> None:
    folder = root / ("", "a", "b", "c")[i % 4]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{i:02}.png").write_bytes(encoded(photograph(20, 30, seed=i), "PNG"))
    (folder / f"{i:02}.txt").write_text(f"picture {i}")


def keys(data: Images) -> set[str]:
    return {data.manifest.key(int(row)) for row in data.rows}


def test_a_split_keeps_pictures_apart(forty):
    whole, data = images(forty), images(forty, split=0.25, crop="random", flip=True)
    validation = data.validation()
    assert whole.validation() is None
    assert keys(data) | keys(validation) == keys(whole)
    assert not keys(data) & keys(validation)
    assert 4 <= len(validation) <= 16
    assert data.counts == {"seen": 40, "used": len(data), "skipped": 0, "filtered": 0, "validation": len(validation)}
    assert len({whole.digest, data.digest, validation.digest}) == 3
    assert whole.digest == whole.manifest.digest
    one = validation.batch([SampleId(3, 2, 0)], 0)
    expected = decode.picture((forty / validation.manifest.key(int(validation.rows[2]))).read_bytes(), (32, 32))
    assert torch.equal(one["image"][0], expected.pixels)  # at the centre and not mirrored
    assert one["caption"] == validation.captions(2)
    assert (data.crop, data.flip) == ("random", True)


def test_added_pictures_move_no_others(forty, tmp_path):
    before = images(forty, split=0.25)
    root = tmp_path / "set"
    for i in range(60):
        add(root, i)
    after = images(root, split=0.25)
    assert keys(before) < keys(after)
    assert keys(before.validation()) <= keys(after.validation())
    assert keys(after) & keys(before.validation()) == set()
    smaller = images(forty, split=0.1).validation()
    assert keys(smaller) < keys(before.validation())  # a larger share keeps what a smaller one did


def test_a_small_split_keeps_one_picture(forty):
    data = images(forty, split=1e-9)
    assert (len(data), len(data.validation())) == (39, 1)
    assert next(iter(loader(data.validation(), 0)))["image"].shape == (1, 3, 32, 32)


class Scenes:
    """Another type of data, without a `kind`."""


class Cached:
    kind = "images"


def test_validation_on_another_kind_of_data_is_noted(forty):
    data = images(forty)
    assert check_same_kind(data, data) == check_same_kind(data, None) == check_same_kind(Cached(), data) == ""
    said = check_same_kind(data, Scenes())
    assert said == "validation: made of scenes, but training uses images; try data.split=0.05 and validation=null"
    assert (
        check_same_kind(Scenes(), data)
        == "validation: made of images, but training uses scenes; try validation.type=scenes"
    )


def test_a_split_leaves_a_batch(forty):
    with pytest.raises(DataError, match=r"smaller than one batch.*got 40 seen, .* validation"):
        images(forty, split=0.5, batch_size=39)


def test_buckets_and_tables_are_split(forty, tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    files = [file.read_bytes() for file in sorted(forty.rglob("*.png"))]
    root = tmp_path / "set"
    root.mkdir()
    pq.write_table(pa.table({"image": files, "text": ["one"] * 40}), root / "0.parquet", row_group_size=10)
    data = images(root, split=0.25, aspect=2.0, multiple=8)
    validation = data.validation()
    assert len(data.groups) == len(data.buckets) == len(data)
    assert len(validation.groups) == len(validation.buckets) == len(validation) == 40 - len(data)
    bucket = int(validation.buckets[0])
    assert validation.batch([SampleId(0, 0, bucket)], 0)["image"].shape[2:] == validation.sizes[bucket]


def place(path, *names):
    path.mkdir()
    for name in names:
        (path / name).write_bytes(awkward.encoded(awkward.upright()))
    return path


@pytest.mark.parametrize(
    ("make", "options", "error", "said"),
    [
        (lambda p: p / "nowhere", {}, InputError, r"no such folder or file \(data.root\)"),
        (lambda p: p / "*.tar", {}, InputError, "unsupported data source"),
        (lambda p: place(p / "set"), {}, DataError, "no pictures"),
        (lambda p: place(p / "set", "a.txt"), {}, DataError, "no pictures"),
        (lambda p: place(p / "set", "a.jpg") / "a.jpg", {}, InputError, "unsupported data source"),
        (lambda p: place(p / "set", "a.jpg"), {}, DataError, "1 of 1: 1 no caption.*try data.captions=optional"),
        (lambda p: place(p / "set", "a.jpg"), {"captions": "optional", "batch_size": 2}, DataError, "smaller than one"),
        (lambda p: place(p / "set", "a.jpg"), {"image": "photo"}, InputError, r"no columns \(data.image\)"),
        (
            lambda p: place(p / "set", "a.jpg", "x.tar"),
            {},
            InputError,
            r"pictures and packed files together.*pictures and x.tar",
        ),
        (lambda p: place(p / "set", "x.tar.gz"), {}, DataError, "cannot read the shard.*try decompressing it"),
    ],
)
def test_what_cannot_be_trained_on_is_said_in_one_line(make, options, error, said, tmp_path):
    with pytest.raises(error, match=said) as caught:
        Images(
            **{"root": str(make(tmp_path)), "resolution": 16, "batch_size": 1, "manifest": str(tmp_path / "m")}
            | options
        )
    assert "\n" not in str(caught.value)


def test_a_table_that_names_missing_pictures_stops(tmp_path):
    root = place(tmp_path / "set", "a.jpg")
    (root / "metadata.csv").write_text("file_name,text\na.jpg,one\nb.jpg,two\n")
    with pytest.raises(DataError, match="1 of 2: 1 named in a table, but missing"):
        Images(root=str(root), resolution=16, batch_size=1, manifest=str(tmp_path / "m"))
    assert '"key": "b.jpg"' in (tmp_path / "m" / "skipped.jsonl").read_text()


def test_a_pattern_chooses_files(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    good = awkward.encoded(awkward.upright())
    for split, count in (("train", 3), ("validation", 2)):
        (tmp_path / "deep" / split).mkdir(parents=True)
        rows = pa.table({"image": [good] * count, "text": [split] * count})
        pq.write_table(rows, tmp_path / "deep" / split / "0.parquet")
    data = Images(root=f"{tmp_path}/**/train/*.parquet", resolution=16, batch_size=1, manifest=str(tmp_path / "m"))
    assert len(data) == 3
    assert data.groups.tolist() == [0, 0, 0]
