"""Scenes as training data: one batch, the same from every worker, and what a YAML may get wrong."""

import math

import pytest
import torch

from ldm.cli import main
from ldm.config import parts
from ldm.scenes import FLOORS as DESCRIBED
from ldm.scenes import MATERIALS, SIZES, Scenes, captions, draw, edit, render
from ldm.scenes.captions import FLOORS, WORDS

ASKS = [(100 + i, index, 0) for i, index in enumerate((5, 0, 9, 5))]


def test_a_batch_is_pictures_captions_and_where_they_come_from():
    data = Scenes(resolution=32, batch_size=4, size=10)
    batch = data.batch(ASKS, 3)
    table = draw(3, [5, 0, 9, 5])
    assert torch.equal(batch["image"], render(table, 32)["image"])
    assert batch["caption"] == captions(table, 3, [5, 0, 9, 5])
    assert batch["number"].tolist() == [100, 101, 102, 103]
    assert batch["index"].tolist() == [5, 0, 9, 5]
    assert batch["original_size"].tolist() == [[32, 32]] * 4
    assert batch["crop"].tolist() == [[0, 0]] * 4
    assert batch.keys() == {"image", "caption", "number", "index", "original_size", "crop"}
    assert (len(data), data.batch_size, data.workers, data.buckets, data.groups) == (10, 4, 2, None, None)


def test_a_sample_does_not_depend_on_its_batch():
    data = Scenes(
        resolution=32,
        batch_size=4,
        split="held_out",
        adds=["boxes", "mask", "normals", "edges", "segmentation", "depth"],
    )
    batch = data.batch(ASKS, 1)
    for i, sample_id in enumerate(ASKS):
        for name, value in data.batch([sample_id], 1).items():
            assert (
                torch.equal(value[0], batch[name][i]) if isinstance(value, torch.Tensor) else value[0] == batch[name][i]
            )
    assert batch["mask"].shape == (4, 1, 32, 32)
    assert set(batch["mask"].unique().tolist()) == {0.0, 1.0}
    assert batch["box_labels"].shape == (4, 3)


def test_an_edit_comes_with_the_picture_before_it():
    batch = Scenes(resolution=32, batch_size=4, adds=["source", "mask"]).batch(ASKS, 3)
    scenes = draw(3, [5, 0, 9, 5]).scenes()
    twins, said = zip(*(edit(scene, 3, index) for scene, index in zip(scenes, (5, 0, 9, 5))))
    assert batch["caption"] == list(said)
    assert torch.equal(batch["image"], render(twins, 32)["image"])
    torch.testing.assert_close(batch["source"], render(scenes, 32)["image"].float() / 127.5 - 1)
    assert torch.equal(batch["mask"][:, 0] > 0, render(twins, 32, want=("mask",))["mask"] > 0)


def test_a_bare_floor_is_the_same_floor_with_nothing_on_it():
    numbers = {"resolution": 32, "batch_size": 4, "adds": ["mask", "boxes"]}
    full, empty = (Scenes(**numbers, bare=bare).batch(ASKS, 3) for bare in (0, 1))
    table = draw(3, [5, 0, 9, 5])
    assert empty["caption"] == [FLOORS[DESCRIBED[floor]] for floor in table.floor]
    assert full["mask"].any()
    assert not empty["mask"].any()
    assert (empty["box_labels"] == -1).all()
    sky = (..., slice(0, 2), slice(None))  # no object reaches so far up, and no shadow
    assert torch.equal(full["image"][sky], empty["image"][sky])
    assert not torch.equal(full["image"], empty["image"])


def test_some_floors_are_bare_whatever_the_batch():
    some = Scenes(resolution=8, batch_size=4, bare=0.25)
    said = some.batch([(i, i, 0) for i in range(400)], 0)["caption"]
    bare = [text in FLOORS.values() for text in said]
    assert 70 < sum(bare) < 130
    assert [some.batch([(0, i, 0)], 0)["caption"][0] for i in range(8)] == said[:8]


def test_a_table_has_no_more_objects_than_asked_for():
    sample_ids = [(i, i, 0) for i in range(60)]
    boxes = {
        most: Scenes(resolution=8, batch_size=4, adds=["boxes"], objects=most).batch(sample_ids, 0)
        for most in (1, 2, 3)
    }
    counts = {most: (batch["box_labels"] >= 0).sum(1) for most, batch in boxes.items()}
    for most in (1, 2):
        assert torch.equal(counts[most], counts[3].clamp(max=most))
    assert set(counts[3].tolist()) == {1, 2, 3}
    assert boxes[1]["caption"] == captions(draw(0, range(60), most=1), 0, range(60))


def test_a_share_of_tables_is_full_and_the_others_are_as_they_were():
    usual, some, whole = (draw(0, range(400), full=share) for share in (0, 0.25, 1))
    counts = [table.there.sum(1) for table in (usual, some, whole)]
    assert (counts[2] == 3).all()
    changed = counts[0] != counts[1]
    assert (counts[1][changed] == 3).all()
    assert 0.7 * 0.25 * 400 - 25 < changed.sum() < 0.7 * 0.25 * 400 + 25  # three in ten are full already
    same = [(a, b) for a, b, c in zip(usual.scenes(), some.scenes(), changed) if not c]
    assert all(a == b for a, b in same)
    sample_ids = [(i, i, 0) for i in range(8)]
    batch = Scenes(resolution=8, batch_size=4, objects=2, full=1, adds=["boxes"]).batch(sample_ids, 0)
    assert ((batch["box_labels"] >= 0).sum(1) == 2).all()


def test_complete_captions_name_every_attribute_of_every_object():
    def attributes(words):
        return sorted(name for name in (*SIZES, *MATERIALS) for word in words if word in (name, *WORDS.get(name, ())))

    sample_ids = [(i, i, 0) for i in range(400)]
    usual, some, whole = (
        Scenes(resolution=8, batch_size=4, complete=c).batch(sample_ids, 0)["caption"] for c in (0, 0.25, 1)
    )
    for scene, text in zip(draw(0, range(400)).scenes(), whole):
        assert attributes(text.split()) == attributes(
            [w for thing in scene.objects for w in (thing.size, thing.material)]
        )
    assert all(a in pair for a, *pair in zip(some, usual, whole))
    assert 60 < sum(a != b for a, b in zip(some, usual)) < 120


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"resolution": 0}, "resolution: must be positive; got 0"),
        ({"batch_size": 0}, "batch_size: must be positive; got 0"),
        ({"size": -1}, "size: must be positive; got -1"),
        ({"workers": -1}, "workers: must not be negative; got -1"),
        ({"bare": 1.5}, "bare: out of range; got 1.5; expected 0 to 1"),
        (
            {"bare": 0.1, "adds": ["source"]},
            "adds: `source` excludes `bare` and `complete`; got bare=0.1, complete=0.0; expected 0 for both",
        ),
        ({"complete": -0.1}, "complete: out of range; got -0.1; expected 0 to 1"),
        ({"full": 1.1}, "full: out of range; got 1.1; expected 0 to 1"),
        ({"objects": 0}, "objects: out of range; got 0; expected 1 to 3, and 3 for split held_out"),
        (
            {"objects": 2, "split": "held_out"},
            "objects: out of range; got 2; expected 1 to 3, and 3 for split held_out",
        ),
        ({"split": "test"}, "split: unknown name; got test; expected one of train, validation, held_out"),
    ],
)
def test_wrong_numbers_are_refused(arguments, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        parts.find("data", "scenes")(**{"resolution": 32, "batch_size": 4, **arguments})


def test_an_epoch_has_its_size():
    assert len(Scenes(resolution=8, batch_size=1)) == math.prod([1000, 1000])


def test_a_folder_of_pictures_is_pointed_to_the_configuration_for_it(capsys):
    assert main(["train-ldm", "--config", "scenes", "data.root=pictures"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: data.root: unknown key (command line); ")
    assert error.endswith("; try --config small data.root=DIR, which trains on your own pictures\n")
