"""The pieces that every network here is made of: attention, norms, residual blocks, resampling, time embedding."""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

Rope = tuple[Tensor, Tensor]  # cos and sin, each (L, D/2)
NormPair = tuple[nn.Module, nn.Module]  # one norm for the queries, one for the keys, over a head's width
SHORT = 128  # keys over which attention is written out on a CPU in bfloat16; of 256 torch's kernel is the faster one


def check_multiple(argument: str, value: int, of: int, reason: str) -> None:
    """Refuse a size that is no positive multiple, and name the nearest one that is."""
    if value < 1 or value % of:
        nearest = max(of, (value + of // 2) // of * of)
        raise ValueError(f"{argument}: {reason}; got {value}; expected a multiple of {of}; try {nearest}")


def check_positive(**numbers: int) -> None:
    """Refuse numbers of things that are not there."""
    for argument, value in numbers.items():
        if value < 1:
            raise ValueError(f"{argument}: too small; got {value}; expected 1 or more; try 1")


def check_width(argument: str, x: Tensor, dim: int, width: int, owner: str) -> None:
    """Refuse a tensor whose size along `dim` is not what the network was built for."""
    if x.shape[dim] != width:
        got = f"shape {tuple(x.shape)}"
        raise ValueError(
            f"{argument}: wrong size along dimension {dim}; got {got}; expected {width} there; try {owner}"
        )


def check_images(x: Tensor, t: Tensor, channels: int, factor: int) -> None:
    """Refuse images that a backbone of so many input channels, which divides their sides by `factor`, cannot take."""
    if x.dim() != 4:
        raise ValueError(f"x: not images; got shape {tuple(x.shape)}; expected (B, {channels}, H, W); try x[None]")
    check_width("x", x, 1, channels, f"in_channels={x.shape[1]} at construction")
    for argument, side in (("x height", x.shape[2]), ("x width", x.shape[3])):
        check_multiple(argument, side, factor, "cannot be divided by the network")
    if t.shape != x.shape[:1]:
        got, expected = tuple(t.shape), tuple(x.shape[:1])
        raise ValueError(f"t: not one time per image; got shape {got}; expected {expected}; try t.expand({x.shape[0]})")


def run(module: nn.Module, checkpointing: bool, *inputs: Tensor | None) -> Tensor:
    """A module's output; with gradient checkpointing its insides are computed again in the backward pass."""
    if checkpointing and torch.is_grad_enabled():
        return checkpoint(module, *inputs, use_reentrant=False)
    return module(*inputs)


def zero(module: nn.Module) -> nn.Module:
    """Set a module's parameters to zero, so that the branch it ends starts as nothing."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


def group_norm(channels: int, eps: float, groups: int = 32) -> nn.GroupNorm:
    """GroupNorm (Wu & He, 2018) with the channel count checked."""
    check_multiple("channels", channels, groups, f"cannot be split into {groups} norm groups")
    return nn.GroupNorm(groups, channels, eps=eps)


def rotate(x: Tensor, rope: Rope) -> Tensor:
    """Turn neighbouring pairs of features by angles that grow with position (RoPE, Su et al., 2021)."""
    cos, sin = rope
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)  # (B, H, L, D/2) twice
    return torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2).to(x.dtype)  # (B, H, L, D)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    heads: int,
    mask: Tensor | None = None,
    causal: bool = False,
    rope: Rope | None = None,
    qk_norm: NormPair | None = None,
) -> Tensor:
    """Attention (Vaswani et al., 2017, eq. 1) of q (B, L, C) over k, v (B, M, C); mask (B, M), True where it counts."""
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))  # (B, H, L or M, D)
    if qk_norm is not None:
        q, k = qk_norm[0](q), qk_norm[1](k)  # (B, H, L or M, D)
    if rope is not None:
        q, k = rotate(q, rope), rotate(k, rope)  # (B, H, L or M, D)
    seen = None if mask is None else mask.bool()[:, None, None, :]  # (B, 1, 1, M)
    written = q.device.type == "cpu" and q.dtype == torch.bfloat16 and k.shape[2] <= SHORT
    if causal and (written or seen is not None):  # SDPA takes either a mask or the flag
        before = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()  # (L, M)
        seen = before if seen is None else seen & before  # (L, M) or (B, 1, L, M)
    if written:
        out = softmax_average(q, k, v, seen)  # (B, H, L, D)
    else:
        out = F.scaled_dot_product_attention(q, k, v, seen, is_causal=causal and seen is None)  # (B, H, L, D)
    return out.transpose(1, 2).flatten(2)  # (B, L, C)


def softmax_average(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None) -> Tensor:
    """The same, written out: on a CPU in bfloat16 torch's kernel takes six times as long to go back over few keys."""
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)  # (B, H, L, M)
    if seen is None:
        return scores.softmax(-1) @ v  # (B, H, L, D)
    shares = scores.masked_fill(~seen, torch.finfo(q.dtype).min).softmax(-1)  # (B, H, L, M)
    return (shares * seen) @ v  # (B, H, L, D), zero where nothing is seen, as torch's kernel has it


class Attention(nn.Module):
    """Multi-head attention with separate q, k, v: over x itself, or over a `context` of its own width."""

    def __init__(
        self,
        width: int,
        heads: int,
        context: int | None = None,
        inner: int | None = None,
        bias: bool = False,
        out_bias: bool = True,
    ):
        super().__init__()
        inner = inner or width
        check_multiple("width", inner, heads, f"cannot be split into {heads} heads")
        self.heads, self.context = heads, context
        self.q = nn.Linear(width, inner, bias=bias)
        self.k = nn.Linear(context or width, inner, bias=bias)
        self.v = nn.Linear(context or width, inner, bias=bias)
        self.out = nn.Linear(inner, width, bias=out_bias)

    def forward(
        self, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None, causal: bool = False
    ) -> Tensor:
        context = x if context is None else context  # (B, M, C')
        q, k, v = self.q(x), self.k(context), self.v(context)  # (B, L, C), (B, M, C), (B, M, C)
        return self.out(attention(q, k, v, self.heads, mask, causal))  # (B, L, C)


class Downsample(nn.Module):
    """Halve height and width: a strided convolution, padded on the far side only in LDM's autoencoder, or a mean."""

    def __init__(self, channels: int, conv: bool = True, asymmetric: bool = False):
        super().__init__()
        self.asymmetric = asymmetric
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=0 if asymmetric else 1) if conv else None

    def forward(self, x: Tensor) -> Tensor:
        if self.conv is None:
            return F.avg_pool2d(x, 2)  # (B, C, H/2, W/2)
        if self.asymmetric:
            x = F.pad(x, (0, 1, 0, 1))  # (B, C, H+1, W+1)
        return self.conv(x)  # (B, C, H/2, W/2)


class Upsample(nn.Module):
    """Double height and width by repetition, then convolve."""

    def __init__(self, channels: int, conv: bool = True):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1) if conv else None

    def forward(self, x: Tensor) -> Tensor:
        x = F.interpolate(x, scale_factor=2.0, mode="nearest")  # (B, C, 2H, 2W)
        return x if self.conv is None else self.conv(x)  # (B, C, 2H, 2W)


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
        resamplers = {None: nn.Identity, "up": Upsample, "down": Downsample}
        self.resample = resamplers[resample](in_channels, conv=False)  # Identity ignores its arguments

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
    """An MLP on the sinusoids of t, plus what else a network is told by a vector: an integer label or a pooled text."""

    def __init__(self, width: int, out: int, classes: int | None = None, pooled: int | None = None):
        super().__init__()
        if classes and pooled:
            raise ValueError(
                f"classes: cannot be joined with pooled; got {classes} and {pooled}; expected one; try None"
            )
        check_multiple("width", width, 2, "needs a cosine for each sine")
        self.width, self.classes, self.pooled_width = width, classes, pooled
        self.time = nn.Sequential(nn.Linear(width, out), nn.SiLU(), nn.Linear(out, out))
        self.label = nn.Embedding(classes, out) if classes else None
        self.pooled = nn.Sequential(nn.Linear(pooled, out), nn.SiLU(), nn.Linear(out, out)) if pooled else None

    def forward(self, t: Tensor, pooled: Tensor | None = None) -> Tensor:
        self.check(t, pooled)
        dtype = next(self.time.parameters()).dtype
        emb = self.time(timestep_embedding(t, self.width).to(dtype))  # (B, E)
        if self.label is not None:
            emb = emb + self.label(pooled)  # (B, E)
        if self.pooled is not None:
            emb = emb + self.pooled(pooled)  # (B, E)
        return emb

    def check(self, t: Tensor, pooled: Tensor | None) -> None:
        """Refuse vectors that do not fit, before a matrix product does so in its own words."""
        batch = t.shape[0]
        if self.label is not None:
            expected, hint = f"integer labels of shape ({batch},)", "one label per image"
            fits = pooled is not None and pooled.shape == (batch,) and not pooled.is_floating_point()
        elif self.pooled is not None:
            expected, hint = (
                f"vectors of shape ({batch}, {self.pooled_width})",
                f"a pooled width of {self.pooled_width}",
            )
            fits = pooled is not None and pooled.shape == (batch, self.pooled_width) and pooled.is_floating_point()
        else:
            expected, hint, fits = "None", "classes or pooled at construction", pooled is None
        if not fits:
            got = (
                "None"
                if pooled is None
                else f"{str(pooled.dtype).removeprefix('torch.')} of shape {tuple(pooled.shape)}"
            )
            raise ValueError(f"pooled: does not fit this network; got {got}; expected {expected}; try {hint}")
