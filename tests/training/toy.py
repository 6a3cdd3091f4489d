"""A source of small pictures that are a function of their index, and configurations of tiny first stages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ldm.config import parts
from ldm.data.sampler import SampleId
from ldm.draws import draw, stream

PARTS = {"data": {"toy": "tests.training.toy:Toy"}, "optimizer": {"counting": "tests.training.toy:Counting"}}


class Counting(torch.optim.Optimizer):
    """Steps along the signs of gradients that fall with counts kept outside tensors, of each weight and of all."""

    def __init__(self, params: Any, *, lr: float):
        super().__init__(params, {"lr": lr, "rounds": 0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            group["rounds"] += 1
            for p in group["params"]:
                if p.grad is not None:
                    self.state[p]["count"] = self.state[p].get("count", 0) + 1
                    p -= group["lr"] * p.grad.sign() / (self.state[p]["count"] + group["rounds"])


class Toy:
    """Two coloured squares on a coloured ground."""

    buckets = groups = None

    def __init__(self, *, batch_size: int = 8, length: int = 40, workers: int = 0, resolution: int = 16):
        self.batch_size, self.length, self.workers = batch_size, length, workers
        self.sizes = [(resolution, resolution)]

    def __len__(self) -> int:
        return self.length

    def batch(self, sample_ids: Sequence[SampleId], seed: int) -> dict[str, Any]:
        (side, _), image = self.sizes[0], []
        u, _ = draw(stream(0, "toy"), [sample_id.index for sample_id in sample_ids], 13, ())
        flip, _ = draw(stream(seed, "flip"), [sample_id.number for sample_id in sample_ids], 1, ())
        for row, mirror in zip(u.tolist(), flip.tolist()):
            picture = torch.tensor(row[:3])[:, None, None].expand(3, side, side).clone()
            for k in (3, 8):
                top, left = (int(x * (side - 5)) for x in row[k : k + 2])
                picture[:, top : top + 5, left : left + 5] = torch.tensor(row[k + 2 : k + 5])[:, None, None]
            image.append(picture.flip(2) if mirror[0] < 0.5 else picture)
        numbers = {
            name: torch.tensor([getattr(sample_id, name) for sample_id in sample_ids]) for name in ("number", "index")
        }
        return {"image": (torch.stack(image) * 255).to(torch.uint8), **numbers}


def plug() -> None:
    """Make the source known, once."""
    if "toy" not in parts.TABLES["data"]:
        parts.plug(__name__)


KL = """
seed: 3
autoencoder: {type: kl, channels: 32, multipliers: [1, 1], blocks: 1, mid_attention: false}
recipe: {type: autoencoder, sample_from: 2}
loss: {penalty_weight: 1e-6, perceptual_weight: 0, adversarial_weight: 0.5, start: 4}
discriminator: {channels: 16, layers: 1}
optimizer: {type: adamw, lr: 1e-3, betas: [0.5, 0.9]}
schedule: {type: cosine, warmup: 2}
ema: {decay: 0.9}
data: {type: toy}
trainer: {steps: 10, log_every: 1, save_every: 5, validate_every: 5, validate_images: 8}
"""
