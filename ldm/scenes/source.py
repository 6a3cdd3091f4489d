"""Scenes as a source of training data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

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
    """An endless source of scenes, drawn on demand; an epoch has `size` of them.

    A share `bare` of them is an empty floor, which a decoder cannot reconstruct if it never sees one. A share
    `complete` of the captions names every attribute, so that rare words are learned sooner. A scene has at most
    `objects` objects, and a share `full` of scenes has exactly as many.
    """

    hints: ClassVar = {"root": "--config small data.root=DIR, which trains on your own pictures"}  # for wrong keys

    def __init__(
        self,
        *,
        resolution: int,  # side of the pictures in pixels
        batch_size: int,  # of a step, over all processes
        size: int = 1_000_000,  # scenes per epoch
        split: Literal["train", "validation", "held_out"] = "train",  # held_out has combinations that train never shows
        adds: Sequence[Addition] = (),  # conditions made beside the picture
        objects: int = OBJECTS,  # most objects of a scene
        full: float = 0.0,  # share of scenes with as many objects as that
        bare: float = 0.0,  # share of scenes without objects
        complete: float = 0.0,  # share of captions that name every attribute
        workers: int = 2,  # loader processes for each training process
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
            raise ValueError(f"adds: `source` excludes `bare` and `complete`; got {got}; expected 0 for both")
        if not 1 <= objects <= OBJECTS or (objects < OBJECTS and split == "held_out"):
            expected = f"1 to {OBJECTS}, and {OBJECTS} for split held_out"
            raise ValueError(f"objects: out of range; got {objects}; expected {expected}")
        self.resolution, self.batch_size, self.size, self.workers = resolution, batch_size, size, workers
        self.split, self.adds, self.objects = split, tuple(adds), objects
        self.bare, self.complete, self.full = bare, complete, full
        self.buckets, self.groups, self.sizes = None, None, [(resolution, resolution)]

    def __len__(self) -> int:
        return self.size

    def batch(self, sample_ids: Sequence[tuple[int, int, int]], seed: int) -> dict[str, Any]:
        """The samples with these (number in the stream, index, bucket)."""
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
        sizes = {"original_size": square, "crop": torch.zeros_like(square)}
        return {**made, "number": torch.tensor(numbers), "index": torch.tensor(indices), **sizes}

    def _rendered(self, scenes: Sequence[Scene] | Table) -> dict[str, Tensor]:
        wanted: list[str] = [name for name in self.adds if name != "source"]
        wanted += ["box_labels"] * ("boxes" in wanted)
        made = render(scenes, self.resolution, want=("image", *wanted))
        if "mask" in made:  # inpainting repaints the objects
            made["mask"] = (made["mask"] > 0)[:, None].float()  # (B, 1, H, W)
        return made

    def _edited(self, scenes: list[Scene], seed: int, indices: Sequence[int]) -> dict[str, Any]:
        """Edited twins with their instructions, and the pictures before the edit."""
        twins, instructions = zip(*(edit(scene, seed, index) for scene, index in zip(scenes, indices)))
        source = render(scenes, self.resolution)["image"] / 127.5 - 1  # (B, 3, H, W)
        return {**self._rendered(twins), "source": source, "caption": list(instructions)}
