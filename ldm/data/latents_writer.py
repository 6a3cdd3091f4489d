"""A cache in the making: whole shards, each by one process alone, and the manifest once all of them are there."""

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
SHARD_BYTES, SHARD_SAMPLES = 2**28, 1024  # a shard is whole or not there: what a killed process loses at most
KEEPS = ("label", "caption")  # what a conditioner that trains may read from a cache


@dataclass(frozen=True)
class Cache:
    """What is cached, with what, where, and everything that it depends on (`key`)."""

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
        """Of each shard the bucket and the samples."""
        most = self.shard_samples()
        members = enumerate(members_of(self.source.buckets, len(self.source)))
        return [(bucket, all[i : i + most]) for bucket, all in members for i in range(0, len(all), most)]

    def shard_samples(self) -> int:
        """How many samples of the largest size, with one caption as long as can be, make a shard."""
        pixels = max(height * width for height, width in self.source.sizes) // self.autoencoder.factor**2
        numbers = pixels * self.autoencoder.latent_channels * (1 + self.key["flip"])
        numbers += sum(text.chunks * text.length * (text.context or 0) for text in self.texts.values())
        return max(1, min(SHARD_SAMPLES, SHARD_BYTES // (numbers * self.dtype.itemsize)))

    def file(self, number: int) -> Path:
        return self.root / f"{number:05}.safetensors"

    def parts(self, number: int) -> list[list[SampleId]]:
        """The samples of a shard as batches of asks."""
        bucket, members = self.shards[number]
        sample_ids = [SampleId(index, index, bucket) for index in members.tolist()]
        return [sample_ids[i : i + self.batch_size] for i in range(0, len(sample_ids), self.batch_size)]


def write(cache: Cache, rank: int = 0, ranks: int = 1) -> list[int]:
    """Make this rank's shards that are not there yet; returns the shards that others have still to make."""
    check_stale(cache)
    mine = range(rank, len(cache.shards), ranks)
    todo = [number for number in mine if not stands(cache, number)]
    clear(cache, todo)
    total, left = (sum(len(cache.shards[number][1]) for number in numbers) for numbers in (mine, todo))
    with tqdm(total=total, initial=total - left, unit="sample", desc="caching", mininterval=0.5) as bar:
        batches = iter(
            Loader(cache.source, cache.seed, (sample_ids for number in todo for sample_ids in cache.parts(number)))
        )
        for number in todo:
            made = []
            for _ in cache.parts(number):
                made.append(encoded(cache, next(batches)))
                bar.update(len(made[-1]["index"]))
            write_file(cache.file(number), joined(made), {"cache": json.dumps(cache.key)})
    return finish(cache)


def check_stale(cache: Cache) -> None:
    """Refuse a folder whose shards depend on something else; what is unreadable will be made again."""
    for path in sorted(cache.root.glob("*.safetensors")):
        if (found := read_key(path)) is not None:
            compare(found, cache.key, cache.root)


def clear(cache: Cache, numbers: Sequence[int]) -> None:
    """Remove what a killed process left of these shards, which nobody else writes."""
    ours = {cache.file(number).name for number in numbers}
    for stray in cache.root.glob(".*.tmp"):
        if stray.name[1:].rsplit(".", 2)[0] in ours:
            stray.unlink()


def stands(cache: Cache, number: int) -> bool:
    """Whether a shard is there, with every byte and of these samples; a damaged one is made again."""
    path = cache.file(number)
    if not path.exists():
        return False
    try:
        check_digest(path)
    except CheckpointError as error:
        warnings.warn(f"made again: {error}", stacklevel=2)
        return False
    return np.array_equal(open_file(path)["index"], cache.shards[number][1])


def finish(cache: Cache) -> list[int]:
    """Write the manifest if all shards are there, whoever made them; else say which are not."""
    missing = [number for number in range(len(cache.shards)) if read_key(cache.file(number)) is None]
    if missing:
        return missing
    rows = [
        {
            "file": cache.file(number).name,
            "bucket": bucket,
            "samples": len(members),
            DIGEST: open_file(cache.file(number)).metadata[DIGEST],
        }
        for number, (bucket, members) in enumerate(cache.shards)
    ]
    with replacing(cache.root / MANIFEST) as file:
        file.write(json.dumps({"format": FORMAT, "key": cache.key, "shards": rows}, indent=1).encode())
    return []


@torch.inference_mode()
def encoded(cache: Cache, batch: Mapping[str, Any]) -> dict[str, Tensor]:
    """What a cache holds of a batch."""
    captions = captions_of(cache.source, batch)
    made = {name: batch[name] for name in ("index", "original_size", "crop")}
    made |= {"latents": latents(cache, batch["image"]), "captions": torch.tensor([len(texts) for texts in captions])}
    if "label" in cache.key["keeps"]:
        if "label" not in batch:
            raise DataError("the data has no label, which the conditioner reads", hint="another conditioner")
        made["label"] = batch["label"]
    flat = [text for texts in captions for text in texts]
    if "caption" in cache.key["keeps"]:
        made |= spelled(flat)
    for name, text in cache.texts.items():
        made |= text_states(cache, name, text, flat)
    return made


def captions_of(source: Data, batch: Mapping[str, Any]) -> list[list[str]]:
    """All captions of each sample; a source that knows of no others has given them."""
    if not hasattr(source, "captions"):
        return [[caption] for caption in batch["caption"]]
    return [source.captions(index) for index in batch["index"].tolist()]


def latents(cache: Cache, images: Tensor) -> Tensor:
    """Latents (B, V, Z, h, w) of pictures and, if they are flipped in training, of their mirror images."""
    x = to_float(images.to(cache.device))  # (B, 3, H, W)
    variants = [x, x.flip(3)] if cache.key["flip"] else [x]
    z = torch.stack([cache.autoencoder.encode(x) for x in variants], 1)  # (B, V, Z, h, w)
    return stored(cache, z, "latents")


def text_states(cache: Cache, name: str, text: Text, captions: Sequence[str]) -> dict[str, Tensor]:
    """The states of captions, without those tokens that a mask hides: (S, L, C), or with a mask (tokens, C)."""
    size = cache.batch_size
    found: dict[str, list[Tensor]] = {field: [] for field in FIELDS}
    for i in range(0, len(captions), size):
        condition = text({"caption": captions[i : i + size]})
        for field in FIELDS:
            if (value := getattr(condition, field)) is not None:
                hides = field == "tokens" and condition.mask is not None
                found[field].append(stored(cache, value[condition.mask] if hides else value, name))
    made = {f"{name}.{field}": torch.cat(values) for field, values in found.items() if values}
    if f"{name}.mask" in made:
        made[f"{name}.offsets"] = made[f"{name}.mask"].sum(1)
    return made


def stored(cache: Cache, x: Tensor, what: str) -> Tensor:
    """A tensor as it is written, if it has a place in that type."""
    if not x.is_floating_point():
        return x.cpu()
    x = x.to(cache.dtype).cpu()
    if not x.isfinite().all():
        hint = "--dtype bf16" if cache.dtype == torch.float16 else "other weights"
        raise DataError(f"{what}: not finite", got=f"NaN or infinity in {cache.key['dtype']}", hint=hint)
    return x


def spelled(captions: Sequence[str]) -> dict[str, Tensor]:
    """Captions as bytes one after the other, and how many each has."""
    texts = [text.encode() for text in captions]
    text = torch.from_numpy(np.frombuffer(b"".join(texts), np.uint8).copy())
    return {"text": text, "text.offsets": torch.tensor([len(text) for text in texts])}


def joined(made: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The batches of a shard as one, their counts as offsets."""
    shard = {name: torch.cat([part[name] for part in made]) for name in made[0]}
    counts = [name for name in shard if name == "captions" or name.endswith(".offsets")]
    return shard | {name: torch.cat((torch.zeros(1, dtype=torch.int64), shard[name].cumsum(0))) for name in counts}
