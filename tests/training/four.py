"""Four pictures, over and over, each with everything that may be said of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from ldm.config import parts
from ldm.data.sampler import SampleId

CAPTIONS = ["a red cube", "a green cone", "a blue ball on a box", "two gray cubes"]


class Four:
    """Pictures of sixteen coloured tiles; masks, maps and boxes that have nothing to do with what they show."""

    buckets = groups = None

    def __init__(self, *, batch_size: int = 16, resolution: int = 16, length: int = 4, workers: int = 0):
        self.batch_size, self.workers, self.length = batch_size, workers, length
        self.sizes = [(resolution, resolution)]
        g = torch.Generator().manual_seed(0)
        tiles = 255 * torch.randint(0, 2, (4, 3, 4, 4), generator=g).float()
        maps = torch.randint(0, 5, (4, 1, 4, 4), generator=g).float()
        corners = torch.rand(4, 2, 2, generator=g) * 0.5  # left and top of two boxes each
        mask = torch.zeros(4, 1, resolution, resolution)
        mask[:, :, :, resolution // 2 :] = 1
        self.samples = {
            "image": F.interpolate(tiles, resolution).to(torch.uint8),
            "label": torch.tensor([3, 1, 4, 2]),
            "mask": mask,
            "segmentation": F.interpolate(maps, resolution)[:, 0].long(),
            "boxes": torch.cat((corners, corners + 0.4), 2),
            "box_labels": torch.tensor([[0, 1], [2, 3], [1, -1], [3, 0]]),
        }

    def __len__(self) -> int:
        return self.length

    def batch(self, sample_ids: Sequence[SampleId], seed: int) -> dict[str, Any]:
        which = [sample_id.index % 4 for sample_id in sample_ids]
        told = {name: x[which] for name, x in self.samples.items()} | {"caption": [CAPTIONS[i] for i in which]}
        return told | {
            name: torch.tensor([getattr(sample_id, name) for sample_id in sample_ids]) for name in ("number", "index")
        }


def plug() -> None:
    """Make the source known, once."""
    parts.TABLES["data"].setdefault("four", f"{__name__}:Four")  # type: ignore[union-attr]
