"""What diffusers' text-to-image example does in a training step, written from its published steps, without Accelerate.

What it is compared with stands in benchmarks/stage_two.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, UNet2DConditionModel
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch import Tensor, nn

CLIP = 1.0
ADAMW: dict[str, Any] = {"lr": 1e-4, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 1e-2}


class Example:
    """Their U-Net and what it is trained with: its defaults, and the average that it offers."""

    def __init__(self, network: UNet2DConditionModel, batches: Iterator[dict[str, Any]], dtype: torch.dtype):
        self.network, self.batches, self.dtype = network, batches, dtype
        self.noises = DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
        self.optimizer = torch.optim.AdamW(network.parameters(), **ADAMW)
        self.schedule = get_scheduler("constant", self.optimizer)
        self.ema = EMAModel(network.parameters())

    def loss(self, x0: Tensor, tokens: Tensor, steps: Tensor, noise: Tensor) -> Tensor:
        """The squared error of the noise; only the network runs in their precision."""
        x = self.noises.add_noise(x0, noise, steps)  # (B, 4, h, w)
        with torch.autocast(x.device.type, self.dtype) if self.dtype != torch.float32 else nullcontext():
            eps = self.network(x, steps, tokens).sample  # (B, 4, h, w)
        return F.mse_loss(eps.float(), noise.float())

    def step(self) -> None:
        """In the example's order; the loss is read twice, as it is there."""
        batch, device = next(self.batches), self.network.device
        x0 = batch["latents"].to(device, non_blocking=True)  # (B, 4, h, w)
        tokens = batch["states"]["caption"]["tokens"].to(device, non_blocking=True)  # (B, L, C)
        noise = torch.randn_like(x0)
        loss = self.loss(x0, tokens, torch.randint(0, 1000, (len(x0),), device=device), noise)
        loss.repeat(len(x0)).mean().item()
        loss.backward()
        nn.utils.clip_grad_norm_(self.network.parameters(), CLIP)
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()
        self.ema.step(self.network.parameters())
        loss.detach().item()
