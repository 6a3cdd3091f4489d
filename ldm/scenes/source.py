"""Scenes as a source of training data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ldm.draws import stream
from ldm.scenes.captions import FLOORS, captions
from ldm.scenes.description import FLOORS as NAMES
from ldm.scenes.description import OBJECTS, Scene, Table
from ldm.scenes.drawing import SPLITS, draw, uniforms
from ldm.scenes.edits import edit
from ldm.scenes.render import render

Addition = Literal["mask", "segmentation", "boxes", "depth", "normals", "edges", "source"]


class Scenes:
    """An epoch of `size` scenes, drawn as they are asked for; `adds` are conditions that go with the pictures.

    A share `bare` of them is a floor with nothing on it: a decoder that never saw one cannot paint it. A share
    `complete` of the captions names every attribute: what is seldom said is read sooner. `objects` is the most that
    stand on a table, and as many do on a share `full` of them.
    """

    def __init__(
        self,
        *,
        resolution: int,  # sides of the pictures
        batch_size: int,  # of a step, on all processes together
        size: int = 1_000_000,  # scenes of an epoch
        split: Literal["train", "validation", "held_out"] = "train",  # held_out: what train never shows
        adds: Sequence[Addition] = (),  # what is made beside the picture
        objects: int = OBJECTS,  # that a table has at most
        full: float = 0.0,  # share of tables that have as many as that
        bare: float = 0.0,  # share of floors with nothing on them
        complete: float = 0.0,  # share of captions that name every attribute
        workers: int = 2,  # processes that draw, for each that trains
    ):
        for name, value in {"resolution": resolution, "batch_size": batch_size, "size": size}.items():
            if value < 1:
                raise ValueError(f"{name}: must be positive; got {value}")
        if workers < 0:
            raise ValueError(f"workers: must not be negative; got {workers}")
        if split not in SPLITS:
            raise ValueError(f"split: unknown name; got {split}; expected one of {', '.join(SPLITS)}")
        for name, share in {"bare": bare, "complete": complete, "full": full}.items():
            if not 0 <= share <= 1:
                raise ValueError(f"{name}: out of range; got {share}; expected 0 to 1")
        if "source" in adds and (bare or complete):
            got = f"bare={bare}, complete={complete}"
            raise ValueError(f"adds: `source` has no bare floors, and instructions for captions; got {got}; expected 0")
        if not 1 <= objects <= OBJECTS or (objects < OBJECTS and split == "held_out"):
            expected = f"1 to {OBJECTS}, and {OBJECTS} where the split is held_out"
            raise ValueError(f"objects: out of range; got {objects}; expected {expected}")
        self.resolution, self.batch_size, self.size, self.workers = resolution, batch_size, size, workers
        self.split, self.adds, self.objects = split, tuple(adds), objects
        self.bare, self.complete, self.full = bare, complete, full
        self.buckets, self.groups, self.sizes = None, None, [(resolution, resolution)]

    def __len__(self) -> int:
        return self.size

    def batch(self, sample_ids: Sequence[tuple[int, int, int]], seed: int) -> dict[str, Any]:
        """The samples asked for, each by its number in the stream, its index here, and its bucket."""
        numbers, indices, _ = zip(*sample_ids)
        table = draw(seed, indices, self.split, self.objects, self.full)
        if "source" in self.adds:
            made = self._edited(table.scenes(), seed, indices)
        else:
            texts = captions(table, seed, indices, self.complete)
            u = uniforms(stream(seed, "bare"), np.asarray(indices), 0, 1)[:, 0]  # (B,)
            for row in np.flatnonzero(u < self.bare).tolist():
                table.clear(row)
                texts[row] = FLOORS[NAMES[table.floor[row]]]
            made = {**self._rendered(table), "caption": texts}
        square = torch.full((len(sample_ids), 2), self.resolution)
        where = {"original_size": square, "crop": torch.zeros_like(square)}
        return {**made, "number": torch.tensor(numbers), "index": torch.tensor(indices), **where}

    def _rendered(self, scenes: Sequence[Scene] | Table) -> dict[str, Tensor]:
        wanted: list[str] = [name for name in self.adds if name != "source"]
        wanted += ["box_labels"] * ("boxes" in wanted)
        made = render(scenes, self.resolution, want=("image", *wanted))
        if "mask" in made:  # what is to be painted anew: the objects
            made["mask"] = (made["mask"] > 0)[:, None].float()  # (B, 1, H, W)
        return made

    def _edited(self, scenes: list[Scene], seed: int, indices: Sequence[int]) -> dict[str, Any]:
        """The edited twins with their instructions, and the pictures before."""
        twins, instructions = zip(*(edit(scene, seed, index) for scene, index in zip(scenes, indices)))
        source = render(scenes, self.resolution)["image"] / 127.5 - 1  # (B, 3, H, W)
        return {**self._rendered(twins), "source": source, "caption": list(instructions)}
