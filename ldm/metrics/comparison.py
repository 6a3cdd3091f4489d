"""Distances between sets of pictures by their features; features of reference pictures are cached on disk."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ldm.checkpoint.files import check_digest, open_file, write_file
from ldm.data.loader import Data, Loader
from ldm.data.sampler import SampleId, by_bucket
from ldm.distributed import Rows, broadcast, map_batches, torchrun_rank
from ldm.errors import DataError, LdmError
from ldm.metrics.feature_metrics import NEIGHBOURS, PARTS, frechet, inception_score, kernel_distance, prdc
from ldm.metrics.features import Features, as_saved
from ldm.pictures import to_float

ENOUGH = 5  # samples per dimension; with fewer, a Frechet distance is mostly bias
FORMAT = 2  # of the cache; raised when the same names stand for other numbers


class Verifier(Protocol):
    """What the table `verifier` names for a type of data: whether a picture shows what its caption says."""

    kinds: Sequence[str]  # of prompts
    yardsticks: Mapping[str, tuple[str, str]]  # name -> two kinds, whose pictures are a known distance apart

    def prompts(self, kind: str, count: int, like: Data, seed: int) -> Data:
        """`count` true pictures of a kind with captions, of the size and batch size of `like`."""

    def scores(self, x: Tensor, prompts: Sequence[str]) -> list[Any]:
        """A score for each picture, x (B, 3, H, W) in [-1, 1], and its prompt."""

    def tally(self, scores: Sequence[Any]) -> dict[str, tuple[int, int]]:
        """(correct, total) by part of a prompt, and of all pictures under `whole`."""


@dataclass(frozen=True)
class ReferenceSet:
    """Pictures to compare with: samples of some data, and the settings that identify them."""

    data: Data
    about: Mapping[str, Any]
    indices: Sequence[int]
    seed: int
    verifier: Verifier | None = None  # of their captions

    def batches(self) -> list[list[SampleId]]:
        """The samples in batches; all have the same size."""
        if len(self.data.sizes) > 1:
            got = f"{len(self.data.sizes)} sizes"
            raise DataError("pictures of several sizes cannot be compared", "data.aspect", got, "one", "data.aspect=1")
        return list(by_bucket(self.indices, self.data.batch_size, self.data.buckets))

    def map(self, work: Callable[[Rows, list[SampleId]], Rows], title: str) -> Rows:
        """work(batch, sample ids) of all batches, which torchrun's processes share."""
        rank, batches = torchrun_rank(), self.batches()
        loaded = iter(Loader(self.data, self.seed, batches[rank.number :: rank.of]))
        return map_batches(batches, lambda sample_ids: work(next(loaded), sample_ids), rank, title)


def compute_features(features: Features, x: Tensor) -> Rows:
    """The features of pictures (B, 3, H, W) in [-1, 1], rounded as a file would store them, on the CPU."""
    device = next(features.network.parameters()).device
    with torch.inference_mode():
        found = features(as_saved(x).to(device))
    return {name: values.float().cpu() for name, values in found._asdict().items() if values is not None}


def reference_features(features: Features, reference: ReferenceSet) -> Rows:
    """The features of reference pictures, from the cache if they are in it."""
    digest, indices = getattr(reference.data, "digest", ""), [int(index) for index in reference.indices]
    key = [FORMAT, features.identity, features.resize, reference.about, digest, reference.seed, indices]
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ldm" / "features"
    file, rank = cache / f"{name}.safetensors", torchrun_rank()
    cached = broadcast(read_cache(file) if rank.number == 0 else None, rank)  # all processes take the same branch
    if cached is not None:
        return cached
    rows = reference.map(lambda batch, _: compute_features(features, to_float(batch["image"])), "reference pictures")
    if rank.number == 0:
        write_cache(file, rows, {"features": features.identity, "data": json.dumps(reference.about)})
    return rows


def read_cache(file: Path) -> Rows | None:
    """Cached features, unless there are none or they are damaged."""
    try:
        check_digest(file)
        return {name: x.clone() for name, x in open_file(file).items()}
    except (LdmError, OSError, KeyError):
        return None


def write_cache(file: Path, rows: Rows, about: dict[str, str]) -> None:
    """Cache features, or warn if that is impossible."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_file(file, rows, about)
    except (LdmError, OSError) as error:
        warnings.warn(f"features are not cached: {error}", stacklevel=2)


def compare(true: Rows, made: Rows, seed: int = 0) -> dict[str, Any]:
    """All distances that these features and sample counts allow, by name."""
    a, b = true["vectors"], made["vectors"]
    count, width = min(len(a), len(b)), a.shape[1]
    found: dict[str, Any] = {"true": len(a), "made": len(b), "frechet": frechet(a, b)}
    if "spatial" in made:
        found["sfrechet"] = frechet(true["spatial"], made["spatial"])
    if count >= 4:
        found["kernel"] = kernel_distance(a, b, seed=seed)
    if "logits" in made and len(made["logits"]) >= PARTS:
        found["inception_score"] = inception_score(made["logits"])
    if count > NEIGHBOURS:
        found |= prdc(a, b)
    return {**found, "indicative": count < ENOUGH * width}
