"""A source whose samples are their numbers."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from numpy.typing import NDArray

from ldm.data.sampler import SampleId
from ldm.errors import DataError


class Numbered:
    """Batches that say who was asked for, by whom they were made, and on how many threads."""

    sizes: Sequence[tuple[int, int]] = ()

    def __init__(
        self,
        length: int = 40,
        batch_size: int = 8,
        workers: int = 0,
        buckets: NDArray | None = None,
        groups: NDArray | None = None,
        bad: int = -1,
    ):
        self.length, self.batch_size, self.workers = length, batch_size, workers
        self.buckets, self.groups, self.bad = buckets, groups, bad

    def __len__(self) -> int:
        return self.length

    def batch(self, sample_ids: Sequence[SampleId], seed: int) -> dict[str, Any]:
        indices = [sample_id.index for sample_id in sample_ids]
        if self.bad in indices:
            raise DataError("the picture changed since it was listed", f"{self.bad}.jpg")
        numbers, places = [sample_id.number for sample_id in sample_ids], [sample_id.bucket for sample_id in sample_ids]
        return {
            "number": torch.tensor(numbers),
            "index": torch.tensor(indices),
            "bucket": torch.tensor(places),
            "caption": [f"{seed}: {index}" for index in indices],
            "process": os.getpid(),
            "threads": torch.get_num_threads(),
        }
