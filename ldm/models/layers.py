"""Layers shared by all networks: attention, norms, residual blocks, resampling, time embedding."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ldm.condition import Vector

SHORT = 128  # up to so many keys, attention on a CPU in bfloat16 is faster written out than by torch's kernel
SINUSOIDS = 256  # of each number among a condition's vectors, as in SDXL


def check_multiple(argument: str, value: int, of: int, reason: str) -> None:
    """Refuse a size that is not a positive multiple, and suggest the nearest one."""
    if value < 1 or value % of:
        nearest = max(of, (value + of // 2) // of * of)
        raise ValueError(f"{argument}: {reason}; got {value}; expected a multiple of {of}; try {nearest}")


def check_positive(**numbers: int) -> None:
    """Refuse counts below 1."""
    for argument, value in numbers.items():
        if value < 1:
            raise ValueError(f"{argument}: too small; got {value}; expected 1 or more; try 1")


def check_not_negative(**numbers: float) -> None:
    """Refuse negative numbers."""
    for argument, value in numbers.items():
        if value < 0:
            raise ValueError(f"{argument}: must not be negative; got {value}; expected 0 or more; try 0")


def check_map(name: str, x: Tensor, channels: int, factor: int) -> None:
    """Refuse images or latents that a network of so many channels and this downsampling factor cannot take."""
    if x.ndim != 4 or x.shape[1] != channels:
        got, expected = tuple(x.shape), f"(B, {channels}, H, W)"
        raise ValueError(f"{name}: wrong shape; got {got}; expected {expected}; try {channels} channels")
    check_sides(name, x, factor)


def check_sides(name: str, x: Tensor, factor: int) -> None:
    """Refuse a map (..., H, W) whose sides a downsampling factor does not divide."""
    height, width = x.shape[-2:]
    if height % factor or width % factor or not height or not width:
        near = [max(factor, round(size / factor) * factor) for size in (height, width)]
        raise ValueError(
            f"{name}: size not divisible by the network's factor; got {height}x{width}; "
            f"expected multiples of {factor}; try {near[0]}x{near[1]}"
        )


def run(module: nn.Module, checkpointing: bool, *inputs: Tensor | None) -> Tensor:
    """A module's output; with gradient checkpointing, its activations are computed again in the backward pass."""
    if checkpointing and torch.is_grad_enabled():
        return checkpoint(module, *inputs, use_reentrant=False)
    return module(*inputs)


def zero(module: nn.Module) -> nn.Module:
    """Set a module's parameters to zero, so that its branch adds nothing at first."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


def group_norm(channels: int, eps: float, groups: int = 32) -> nn.GroupNorm:
    """GroupNorm (Wu & He, 2018) with a check of the channels."""
    check_multiple("channels", channels, groups, f"cannot be split into {groups} norm groups")
    return nn.GroupNorm(groups, channels, eps=eps)


def attention(q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None, causal: bool = False) -> Tensor:
    """Attention (Vaswani et al., 2017, eq. 1) of q (B, L, C) over k, v (B, M, C); mask (B, M), True where it counts."""
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))  # (B, H, L or M, D)
    seen = None if mask is None else mask.bool()[:, None, None, :]  # (B, 1, 1, M)
    written = q.device.type == "cpu" and q.dtype == torch.bfloat16 and k.shape[2] <= SHORT
    if causal and (written or seen is not None):  # SDPA takes a mask or the flag, not both
        before = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()  # (L, M)
        seen = before if seen is None else seen & before  # (L, M) or (B, 1, L, M)
    if written:
        out = softmax_average(q, k, v, seen)  # (B, H, L, D)
    else:
        out = F.scaled_dot_product_attention(q, k, v, seen, is_causal=causal and seen is None)  # (B, H, L, D)
    return out.transpose(1, 2).flatten(2)  # (B, L, C)


def softmax_average(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None) -> Tensor:
    """The same, written out: on a CPU in bfloat16 torch's backward kernel takes six times as long for few keys."""
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)  # (B, H, L, M)
    if seen is None:
        return scores.softmax(-1) @ v  # (B, H, L, D)
    shares = scores.masked_fill(~seen, torch.finfo(q.dtype).min).softmax(-1)  # (B, H, L, M)
    return (shares * seen) @ v  # (B, H, L, D), zero where nothing is seen, as in torch's kernel


class Attention(nn.Module):
    """Multi-head attention with separate q, k, v, over x itself or over a `context` of width `context`."""

    def __init__(
        self, width: int, heads: int, context: int | None = None, inner: int | None = None, bias: bool = False
    ):
        super().__init__()
        inner = inner or width
        check_multiple("width", inner, heads, f"cannot be split into {heads} heads")
        self.heads, self.context = heads, context
        self.q = nn.Linear(width, inner, bias=bias)
        self.k = nn.Linear(context or width, inner, bias=bias)
        self.v = nn.Linear(context or width, inner, bias=bias)
        self.out = nn.Linear(inner, width)

    def forward(
        self, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None, causal: bool = False
    ) -> Tensor:
        context = x if context is None else context  # (B, M, C')
        q, k, v = self.q(x), self.k(context), self.v(context)  # (B, L, C), (B, M, C), (B, M, C)
        return self.out(attention(q, k, v, self.heads, mask, causal))  # (B, L, C)


class Downsample(nn.Module):
    """Halve height and width by a strided convolution, padded on the far side in LDM's autoencoder."""

    def __init__(self, channels: int, asymmetric: bool = False):
        super().__init__()
        self.asymmetric = asymmetric
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=0 if asymmetric else 1)

    def forward(self, x: Tensor) -> Tensor:
        if self.asymmetric:
            x = F.pad(x, (0, 1, 0, 1))  # (B, C, H+1, W+1)
        return self.conv(x)  # (B, C, H/2, W/2)


class Upsample(nn.Module):
    """Double height and width by repetition, then convolve."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))  # (B, C, 2H, 2W)


class ResBlock(nn.Module):
    """Residual block of DDPM and LDM; `scale_shift` is ADM's AdaGN, `resample` BigGAN's resampling inside the block."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        embed: int | None = None,
        scale_shift: bool = False,
        resample: Literal["up", "down"] | None = None,
        dropout: float = 0.0,
        eps: float = 1e-5,
    ):
        super().__init__()
        self.scale_shift = scale_shift
        self.norm1 = group_norm(in_channels, eps)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.embed = nn.Linear(embed, out_channels * (2 if scale_shift else 1)) if embed else None
        self.norm2 = group_norm(out_channels, eps)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.skip = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()
        self.resample = {None: nn.Identity(), "up": nn.Upsample(scale_factor=2.0), "down": nn.AvgPool2d(2)}[resample]

    def forward(self, x: Tensor, emb: Tensor | None = None) -> Tensor:
        h = self.resample(F.silu(self.norm1(x)))  # (B, C, H', W')
        h = self.conv1(h)  # (B, C', H', W')
        if self.embed is None or emb is None:
            h = self.norm2(h)  # (B, C', H', W')
        elif self.scale_shift:
            scale, shift = self.embed(F.silu(emb))[:, :, None, None].chunk(2, 1)  # (B, C', 1, 1) twice
            h = self.norm2(h) * (1 + scale) + shift  # (B, C', H', W')
        else:
            h = self.norm2(h + self.embed(F.silu(emb))[:, :, None, None])  # (B, C', H', W')
        h = self.conv2(self.dropout(F.silu(h)))  # (B, C', H', W')
        return self.skip(self.resample(x)) + h  # (B, C', H', W')


def timestep_embedding(t: Tensor, width: int) -> Tensor:
    """Sinusoids of t (B,), cosines before sines, with periods from 2 pi to 10000 * 2 pi (ADM's convention)."""
    half = width // 2
    frequency = torch.exp(-math.log(10000) / half * torch.arange(half, dtype=torch.float32, device=t.device))  # (W/2,)
    angle = t.float()[:, None] * frequency  # (B, W/2)
    return torch.cat((angle.cos(), angle.sin()), -1)  # (B, W)


class TimestepEmbedding(nn.Module):
    """An MLP on the sinusoids of t, plus a table of labels, plus a second MLP on pooled and named vectors.

    The second MLP reads `pooled`, then each of `vectors` in order: as it is, or 256 sinusoids per number (SDXL's
    `label_emb`: 1280 pooled and 6 * 256). The table reads the classes in `pooled`, or the one vector that is an index.
    """

    def __init__(
        self,
        width: int,
        out: int,
        classes: int | None = None,
        pooled: int | None = None,
        vectors: Mapping[str, Vector] | None = None,
    ):
        super().__init__()
        if classes and pooled:
            raise ValueError(f"classes: cannot be combined with pooled; got {classes} and {pooled}; try one of them")
        check_multiple("width", width, 2, "needs a cosine for each sine")
        first = Vector("index", classes) if classes else Vector("vector", pooled) if pooled else None
        self.inputs = {**({"pooled": first} if first else {}), **(vectors or {})}
        tables = [name for name, vector in self.inputs.items() if vector.kind == "index"]
        if len(tables) > 1:
            raise ValueError(f"vectors: only one can be an index; got {' and '.join(tables)}; try numbers")
        self.width, self.table = width, tables[0] if tables else None
        self.classes = self.inputs[tables[0]].size if tables else None
        sizes = {"index": 0, "vector": 1, "numbers": SINUSOIDS}
        joined = sum(sizes[vector.kind] * vector.size for vector in self.inputs.values())
        self.time = nn.Sequential(nn.Linear(width, out), nn.SiLU(), nn.Linear(out, out))
        self.label = nn.Embedding(self.classes, out) if self.classes else None
        self.pooled = nn.Sequential(nn.Linear(joined, out), nn.SiLU(), nn.Linear(out, out)) if joined else None

    def forward(self, t: Tensor, pooled: Tensor | None = None, vectors: Mapping[str, Tensor] | None = None) -> Tensor:
        given = {**({} if pooled is None else {"pooled": pooled}), **(vectors or {})}
        self.check(given, len(t))
        dtype = next(self.time.parameters()).dtype
        emb = self.time(timestep_embedding(t, self.width).to(dtype))  # (B, E)
        if self.label is not None and self.table is not None:
            emb = emb + self.label(given[self.table])  # (B, E)
        if self.pooled is not None:
            joined = [self.embed(name, given[name], dtype) for name in self.inputs if name != self.table]
            emb = emb + self.pooled(torch.cat(joined, 1))  # (B, E)
        return emb

    def embed(self, name: str, x: Tensor, dtype: torch.dtype) -> Tensor:
        """A vector as it is, or the sinusoids of numbers (B,) or (B, n) one after the other."""
        if self.inputs[name].kind == "vector":
            return x  # (B, P)
        return timestep_embedding(x.flatten(), SINUSOIDS).to(dtype).unflatten(0, (len(x), -1)).flatten(1)  # (B, n * W)

    def check(self, given: Mapping[str, Tensor], batch: int) -> None:
        """Refuse vectors that do not fit, before a matrix product fails with a message of its own."""
        for name in {**self.inputs, **given}:
            shapes: list[tuple[int, ...]] = []
            if name in self.inputs:
                kind, size = self.inputs[name]
                shapes = [(batch,)] * (kind == "index" or (kind, size) == ("numbers", 1))
                shapes += [(batch, size)] * (kind != "index")
            x = given.get(name)
            index = name == self.table
            if x is None or tuple(x.shape) not in shapes or index == x.is_floating_point():
                got = "None" if x is None else f"{str(x.dtype).removeprefix('torch.')} of shape {tuple(x.shape)}"
                expected = f"{'integers' if index else 'floats'} of shape {shapes[0]}" if shapes else "None"
                raise ValueError(f"{name}: does not fit this network; got {got}; expected {expected}")
