"""A source of small pictures made of numbers, and the encoders that its cache is made with."""

import hashlib

import numpy as np
import torch

from ldm.conditioning.text import Text
from ldm.conditioning.tokenizer import BPE
from ldm.models.transformer import TextTransformer
from tests.models.first_stages import fill, small

WORDS = ["a", "red", "ball", "blue", "cube", "stands", "left", "of", "small", "shiny", "the", "green"]


class TinySource:
    """Sample i is a picture of random pixels drawn by i, with one to three captions, in one of one or more sizes."""

    groups = None
    workers = 0

    def __init__(self, count: int = 20, sizes=((16, 16),), most_captions: int = 1, batch_size: int = 4):
        self.count, self.sizes, self.most_captions, self.batch_size = count, list(sizes), most_captions, batch_size
        self.buckets = np.arange(count) * 7 % len(sizes) if len(sizes) > 1 else None
        self.digest = hashlib.sha256(repr([self.captions(i) for i in range(count)]).encode()).hexdigest()

    def __len__(self):
        return self.count

    def captions(self, index: int) -> list[str]:
        """Of different lengths."""
        number = 1 + index % self.most_captions
        return [
            " ".join(WORDS[(index * 5 + j * 3 + k) % len(WORDS)] for k in range(index % 4 + j)) for j in range(number)
        ]

    def batch(self, sample_ids, seed):
        height, width = self.sizes[sample_ids[0].bucket]
        return {
            "image": torch.stack([self.picture(sample_id.index, height, width) for sample_id in sample_ids]),
            "caption": [self.captions(sample_id.index)[0] for sample_id in sample_ids],
            "label": torch.tensor([sample_id.index % 5 for sample_id in sample_ids]),
            "number": torch.tensor([sample_id.number for sample_id in sample_ids]),
            "index": torch.tensor([sample_id.index for sample_id in sample_ids]),
            "original_size": torch.tensor([[height + sample_id.index, width] for sample_id in sample_ids]),
            "crop": torch.tensor([[0, sample_id.index] for sample_id in sample_ids]),
        }

    def picture(self, index: int, height: int, width: int) -> torch.Tensor:
        """Noise of a seed of its own."""
        generator = torch.Generator().manual_seed(index)
        return torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=generator)


def first_stage(seed: int = 1):
    """A factor of 4, four channels."""
    autoencoder = fill(small(), seed)
    autoencoder.set_statistics(0.1, 0.7)
    return autoencoder.eval().requires_grad_(False)


def text(masked: bool, seed: int = 2, frozen: bool = True, chunks: int = 1, projection: int | None = None) -> Text:
    """A small text encoder; the tokenizer is learned from the source's words."""
    numbers = {"vocabulary": 600, "length": 12, "width": 16, "layers": 1, "heads": 2, "projection": projection}
    tokenizer = BPE.train([" ".join(WORDS)] * 2, 600)
    encoder = Text(fill(TextTransformer(**numbers), seed), tokenizer, chunks=chunks, masked=masked)
    if frozen:
        encoder.freeze()
    return encoder
