"""Write a cache: shards, each by one process, and the manifest once all shards are complete."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from ldm.checkpoint.files import DIGEST, check_digest, open_file, replacing, write_file
from ldm.conditioning.text import Text
from ldm.data.latents import FIELDS, FORMAT, MANIFEST, compare, read_key
from ldm.data.loader import Data, Loader
from ldm.data.sampler import SampleId, members_of
from ldm.errors import CheckpointError, DataError
from ldm.models.autoencoder import Autoencoder
from ldm.pictures import to_float

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SHARD_BYTES, SHARD_SAMPLES = 2**28, 1024  # a killed process loses one shard at most
KEEPS = ("label", "caption")  # what a cache can keep for conditioners that train


@dataclass(frozen=True)
class Cache:
    """A source, its encoders, the folder, and `key`: everything that the cache depends on."""

    root: Path
    source: Data
    seed: int
    autoencoder: Autoencoder
    texts: Mapping[str, Text]
    key: dict[str, Any]
    batch_size: int
    device: torch.device

    @cached_property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.key["dtype"]]

    @cached_property
    def shards(self) -> list[tuple[int, NDArray]]:
        """The bucket and the samples (n,) of each shard."""
        size = self.shard_samples()
        buckets = enumerate(members_of(self.source.buckets, len(self.source)))
        return [(bucket, members[i : i + size]) for bucket, members in buckets for i in range(0, len(members), size)]

    def shard_samples(self) -> int:
        """Samples of a shard, counted for the largest size and one caption of full length."""
        pixels = max(height * width for height, width in self.source.sizes) // self.autoencoder.factor**2
        numbers = pixels * self.autoencoder.latent_channels * (1 + self.key["flip"])
        numbers += sum(text.chunks * text.length * (text.context or 0) for text in self.texts.values())
        return max(1, min(SHARD_SAMPLES, SHARD_BYTES // (numbers * self.dtype.itemsize)))

    def file(self, number: int) -> Path:
        return self.root / f"{number:05}.safetensors"

    def batches(self, number: int) -> list[list[SampleId]]:
        """The samples of a shard in batches."""
        bucket, members = self.shards[number]
        sample_ids = [SampleId(index, index, bucket) for index in members.tolist()]
        return [sample_ids[i : i + self.batch_size] for i in range(0, len(sample_ids), self.batch_size)]


def write(cache: Cache, rank: int = 0, ranks: int = 1) -> list[int]:
    """Write this rank's missing shards; returns the shards that other ranks have not written yet."""
    for path in sorted(cache.root.glob("*.safetensors")):  # refuses another cache; unreadable shards are written again
        if (key := read_key(path)) is not None:
            compare(key, cache.key, cache.root)
    mine = range(rank, len(cache.shards), ranks)
    todo = [number for number in mine if not is_complete(cache, number)]
    remove_leftovers(cache, todo)
    total, left = (sum(len(cache.shards[number][1]) for number in numbers) for numbers in (mine, todo))
    with tqdm(total=total, initial=total - left, unit="sample", desc="caching", mininterval=0.5) as bar:
        order = (sample_ids for number in todo for sample_ids in cache.batches(number))
        batches = iter(Loader(cache.source, cache.seed, order))
        for number in todo:
            parts = []
            for _ in cache.batches(number):
                parts.append(encode(cache, next(batches)))
                bar.update(len(parts[-1]["index"]))
            write_file(cache.file(number), joined(parts), {"cache": json.dumps(cache.key)})
    return finish(cache)


def remove_leftovers(cache: Cache, numbers: Sequence[int]) -> None:
    """Remove temporary files of these shards, which a killed process left."""
    ours = {cache.file(number).name for number in numbers}
    for stray in cache.root.glob(".*.tmp"):
        if stray.name[1:].rsplit(".", 2)[0] in ours:
            stray.unlink()


def is_complete(cache: Cache, number: int) -> bool:
    """True if a shard exists, is undamaged and has the right samples."""
    path = cache.file(number)
    if not path.exists():
        return False
    try:
        check_digest(path)
    except CheckpointError as error:
        warnings.warn(f"encoding a damaged shard again: {error}", stacklevel=2)
        return False
    return np.array_equal(open_file(path)["index"], cache.shards[number][1])


def finish(cache: Cache) -> list[int]:
    """Write the manifest if all shards are complete; returns those that are missing."""
    missing = [number for number in range(len(cache.shards)) if read_key(cache.file(number)) is None]
    if missing:
        return missing
    rows = []
    for number, (bucket, members) in enumerate(cache.shards):
        file, digest = cache.file(number), open_file(cache.file(number)).metadata[DIGEST]
        rows.append({"file": file.name, "bucket": bucket, "samples": len(members), DIGEST: digest})
    with replacing(cache.root / MANIFEST) as manifest:
        manifest.write(json.dumps({"format": FORMAT, "key": cache.key, "shards": rows}, indent=1).encode())
    return []


@torch.inference_mode()
def encode(cache: Cache, batch: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors that a cache holds of a batch."""
    captions = [[caption] for caption in batch["caption"]]
    if hasattr(cache.source, "captions"):  # all of a sample's, not only the one that was drawn
        captions = [cache.source.captions(index) for index in batch["index"].tolist()]
    made = {name: batch[name] for name in ("index", "original_size", "crop")}
    made |= {"latents": latents(cache, batch["image"]), "captions": torch.tensor([len(texts) for texts in captions])}
    if "label" in cache.key["keeps"]:
        if "label" not in batch:
            raise DataError("the data has no label, which the conditioner reads", hint="another conditioner")
        made["label"] = batch["label"]
    flat = [text for texts in captions for text in texts]
    if "caption" in cache.key["keeps"]:
        made |= caption_bytes(flat)
    for name, text in cache.texts.items():
        made |= text_states(cache, name, text, flat)
    return made


def latents(cache: Cache, images: Tensor) -> Tensor:
    """Latents (B, V, Z, h, w): V is 2 if training flips pictures, else 1."""
    x = to_float(images.to(cache.device))  # (B, 3, H, W)
    variants = [x, x.flip(3)] if cache.key["flip"] else [x]
    z = torch.stack([cache.autoencoder.encode(x) for x in variants], 1)  # (B, V, Z, h, w)
    return to_stored(cache, z, "latents")


def text_states(cache: Cache, name: str, text: Text, captions: Sequence[str]) -> dict[str, Tensor]:
    """The states of captions (S, L, C); with a mask, those of unmasked tokens only (n, C)."""
    size = cache.batch_size
    found: dict[str, list[Tensor]] = {field: [] for field in FIELDS}
    for i in range(0, len(captions), size):
        condition = text({"caption": captions[i : i + size]})
        for field in FIELDS:
            if (value := getattr(condition, field)) is not None:
                masked = field == "tokens" and condition.mask is not None
                found[field].append(to_stored(cache, value[condition.mask] if masked else value, name))
    made = {f"{name}.{field}": torch.cat(values) for field, values in found.items() if values}
    if f"{name}.mask" in made:
        made[f"{name}.offsets"] = made[f"{name}.mask"].sum(1)
    return made


def to_stored(cache: Cache, x: Tensor, what: str) -> Tensor:
    """A tensor on the CPU in the cache's type; values that overflow there are refused."""
    if not x.is_floating_point():
        return x.cpu()
    x = x.to(cache.dtype).cpu()
    if not x.isfinite().all():
        hint = "--dtype bf16" if cache.dtype == torch.float16 else "other weights"
        raise DataError(f"{what}: not finite", got=f"NaN or infinity in {cache.key['dtype']}", hint=hint)
    return x


def caption_bytes(captions: Sequence[str]) -> dict[str, Tensor]:
    """The bytes of all captions in one tensor, and each one's length."""
    texts = [text.encode() for text in captions]
    text = torch.from_numpy(np.frombuffer(b"".join(texts), np.uint8).copy())
    return {"text": text, "text.offsets": torch.tensor([len(text) for text in texts])}


def joined(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The batches of a shard as one; lengths become offsets."""
    shard = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    counts = [name for name in shard if name == "captions" or name.endswith(".offsets")]
    return shard | {name: torch.cat((torch.zeros(1, dtype=torch.int64), shard[name].cumsum(0))) for name in counts}
