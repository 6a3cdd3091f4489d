"""The U-Net of latent diffusion (Rombach et al., 2022) and of ADM (Dhariwal & Nichol, 2021), built from one plan."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.condition import Vector
from ldm.models.layers import (
    Downsample,
    ResBlock,
    TimestepEmbedding,
    Upsample,
    check_map,
    check_multiple,
    check_positive,
    group_norm,
    run,
    zero,
)
from ldm.models.transformer import AttentionPool, SpatialAttention, SpatialTransformer, check_tokens


class Row(NamedTuple):
    """One line of the plan: a module's name in the network, its kind, its channels, and the attention after it."""

    name: str
    kind: Literal["conv", "res", "down", "up"]
    in_channels: int
    out_channels: int
    attend: int = 0  # how many transformer blocks follow; none if 0


def unet_plan(
    in_channels: int,
    channels: int,
    multipliers: Sequence[int],
    blocks: int,
    attend: Sequence[int],
    depth: Sequence[int],
    half: bool = False,  # no decoder
) -> Iterator[Row]:
    """The rows in the order of `forward`: each encoder row stores a skip, each decoder row of kind `res` reads one."""
    depths = [d if 2**level in attend else 0 for level, d in enumerate(depth)]
    encoder = [Row("encoder.0", "conv", in_channels, channels)]
    for level, multiplier in enumerate(multipliers):
        width = channels * multiplier
        for _ in range(blocks):
            before = encoder[-1].out_channels
            encoder.append(Row(f"encoder.{len(encoder)}", "res", before, width, depths[level]))
        if level < len(multipliers) - 1:
            encoder.append(Row(f"encoder.{len(encoder)}", "down", width, width))
    yield from encoder
    yield Row("middle.0", "res", width, width, depth[-1])
    yield Row("middle.1", "res", width, width)
    if half:
        return
    skips, number = [row.out_channels for row in encoder], 0
    for level, multiplier in reversed(list(enumerate(multipliers))):
        for _ in range(blocks + 1):
            yield Row(f"decoder.{number}", "res", width + skips.pop(), channels * multiplier, depths[level])
            width, number = channels * multiplier, number + 1
        if level > 0:
            yield Row(f"decoder.{number}", "up", width, width)
            number += 1


class UNetRow(nn.Module):
    """A convolution, residual block or resampling, and the attention after it, if any."""

    def __init__(self, main: nn.Module, attend: nn.Module | None = None):
        super().__init__()
        self.main, self.attend = main, attend

    def forward(self, x: Tensor, emb: Tensor, tokens: Tensor | None, mask: Tensor | None) -> Tensor:
        x = self.main(x, emb) if isinstance(self.main, ResBlock) else self.main(x)  # (B, C', H', W')
        return x if self.attend is None else self.attend(x, tokens, mask)  # (B, C', H', W')


class UNet(nn.Module):
    """U-Net that predicts (B, C, H, W), or (B, 2C, H, W) with `learned_sigma`, from noisy x and times t (B,).

    With `context`, cross-attention reads tokens (B, L, context) where the mask (B, L) is True; without it, attention is
    ADM's, which also uses scale_shift, resample="residual" and head_width. `extra_channels` are concatenated to x.
    `classes` counts the rows of the label table, read by integers (B,) in `pooled`; else `pooled` is a vector of that
    width, and `vectors` declares the named ones. `control` has one residual for each skip and one for the middle.
    `attend` lists factors of downsampling; the middle always attends. `logits` builds only encoder and middle: ADM's
    classifier of noisy images of side `size`, which returns (B, logits).
    """

    def __init__(
        self,
        *,
        in_channels: int = 4,
        extra_channels: int = 0,
        learned_sigma: bool = False,
        channels: int = 320,  # of the first level, a multiple of 32
        multipliers: Sequence[int] = (1, 2, 4, 4),  # channels of each level, in units of the first
        blocks: int = 2,  # residual blocks per level of the encoder; the decoder has one more
        attend: Sequence[int] = (1, 2, 4),  # factors of downsampling at which blocks attend
        heads: int | None = None,  # attention heads at every level; null uses head_width
        head_width: int | None = None,  # width of each head; null uses heads
        context: int | None = None,
        depth: int | Sequence[int] = 1,  # transformer blocks per attention, or one number per level
        linear: bool = False,  # linear layers before and after attention, as in Stable Diffusion 2
        scale_shift: bool = False,  # the time embedding scales and shifts each block's second norm, as in ADM
        resample: Literal["conv", "residual"] = "conv",  # by convolutions, or inside residual blocks as in ADM
        classes: int | None = None,
        pooled: int | None = None,
        vectors: Mapping[str, Vector] | None = None,
        dropout: float = 0.0,  # in residual blocks
        logits: int | None = None,  # classes of a classifier of noisy images; null builds a denoiser
        size: int | None = None,  # side of a classifier's images
        checkpointing: bool = False,  # recompute activations in the backward pass to save memory
    ):
        super().__init__()
        depth = [depth] * len(multipliers) if isinstance(depth, int) else list(depth)
        self.in_channels, self.context, self.checkpointing = in_channels + extra_channels, context, checkpointing
        self.heads, self.head_width, self.linear = heads, head_width, linear
        self.embed, self.scale_shift, self.resample, self.dropout = 4 * channels, scale_shift, resample, dropout
        self.factor, self.size = 2 ** (len(multipliers) - 1), size
        self.check_numbers(channels, multipliers, blocks, attend, depth)
        if logits is not None:
            check_multiple("size", size or 0, self.factor, "a classifier needs the side of its images")
        plan = unet_plan(self.in_channels, channels, multipliers, blocks, attend, depth, half=logits is not None)
        self.plan = list(plan)

        self.time = TimestepEmbedding(channels, self.embed, classes, pooled, vectors)
        self.encoder, self.middle, self.decoder = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        for row in self.plan:
            getattr(self, row.name.split(".")[0]).append(self.build(row))
        width = self.plan[-1].out_channels
        self.out_norm = group_norm(width, eps=1e-5)
        self.out: nn.Module
        if logits is not None and size is not None:
            self.out = AttentionPool(width, self.heads_of(width), size // self.factor, logits)
        else:
            self.out = nn.Conv2d(width, in_channels * (2 if learned_sigma else 1), 3, padding=1)
        self.initialise()

    def heads_of(self, width: int) -> int:
        """The number of attention heads at a level of this width."""
        return self.heads or width // (self.head_width or width)

    def build(self, row: Row) -> UNetRow:
        """The module for a row of the plan."""
        if row.kind == "conv":
            return UNetRow(nn.Conv2d(row.in_channels, row.out_channels, 3, padding=1))
        if row.kind != "res" and self.resample == "conv":
            return UNetRow({"down": Downsample, "up": Upsample}[row.kind](row.out_channels))
        resample = None if row.kind == "res" else row.kind
        width = row.out_channels
        main = ResBlock(row.in_channels, width, self.embed, self.scale_shift, resample, self.dropout)
        if not row.attend:
            return UNetRow(main)
        if self.context is None:
            return UNetRow(main, SpatialAttention(width, self.heads_of(width)))
        return UNetRow(main, SpatialTransformer(width, self.heads_of(width), self.context, row.attend, self.linear))

    def initialise(self) -> None:
        """Torch's defaults, with zeros at the end of each branch and of the network (as published)."""
        for module in self.modules():
            if isinstance(module, ResBlock):
                zero(module.conv2)
            elif isinstance(module, SpatialTransformer):
                zero(module.proj_out)
            elif isinstance(module, SpatialAttention):
                zero(module.attention.out)
        if isinstance(self.out, nn.Conv2d):
            zero(self.out)

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        tokens: Tensor | None = None,
        mask: Tensor | None = None,
        pooled: Tensor | None = None,
        vectors: Mapping[str, Tensor] | None = None,
        control: Sequence[Tensor] | None = None,
    ) -> Tensor:
        self.check_inputs(x, tokens, control)
        emb = self.time(t, pooled, vectors)  # (B, 4C)
        skips = []
        for module in self.encoder:
            x = run(module, self.checkpointing, x, emb, tokens, mask)  # (B, C', H', W')
            skips.append(x)
        for module in self.middle:
            x = run(module, self.checkpointing, x, emb, tokens, mask)  # (B, C', H/f, W/f)
        if control is not None:
            skips = [skip + residual for skip, residual in zip(skips, control)]
            x = x + control[-1]  # (B, C', H/f, W/f)
        for row, module in zip(self.plan[len(self.encoder) + len(self.middle) :], self.decoder):
            if row.kind == "res":
                x = torch.cat((x, skips.pop()), 1)  # (B, C' + C'', H', W')
            x = run(module, self.checkpointing, x, emb, tokens, mask)  # (B, C', H', W')
        return self.out(F.silu(self.out_norm(x)))  # (B, C, H, W), or (B, logits)

    def check_numbers(
        self, channels: int, multipliers: Sequence[int], blocks: int, attend: Sequence[int], depth: list[int]
    ) -> None:
        """Refuse invalid numbers before anything is built."""
        check_multiple("channels", channels, 32, "cannot be split into 32 norm groups")
        check_positive(in_channels=self.in_channels, blocks=blocks)
        check_positive(multipliers=min(multipliers, default=0), depth=min(depth, default=0))
        factors = [2**level for level in range(len(multipliers))]
        for factor in attend:
            if factor not in factors:
                nearest = min(factors, key=lambda legal: abs(legal - factor))
                raise ValueError(
                    f"attend: no level has this factor; got {factor}; expected some of {factors}; try {nearest}"
                )
        if len(depth) != len(multipliers):
            got, levels = f"{len(depth)} numbers", len(multipliers)
            raise ValueError(f"depth: not one number per level; got {got}; expected {levels}; try {[1] * levels}")
        if (self.heads is None) == (self.head_width is None):
            got = f"heads={self.heads}, head_width={self.head_width}"
            raise ValueError(f"heads: give either heads or head_width; got {got}; expected one of them; try heads=8")
        for multiplier in {m for m, f in zip(multipliers, factors) if f in attend} | {multipliers[-1]}:
            self.check_heads(channels * multiplier)
        if self.resample not in ("conv", "residual"):
            raise ValueError(f"resample: unknown; got {self.resample}; expected conv or residual; try conv")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout: out of range; got {self.dropout}; expected 0 <= dropout < 1; try 0.1")

    def check_heads(self, width: int) -> None:
        """Refuse heads that do not divide the width of a level with attention."""
        argument, value = ("heads", self.heads) if self.heads is not None else ("head_width", self.head_width)
        if not value or value < 1 or width % value:
            divisors = [n for n in range(1, width + 1) if width % n == 0]
            nearest = min(divisors, key=lambda legal: abs(legal - (value or 0)))
            expected = f"a divisor of {width}, the width of an attended level"
            raise ValueError(f"{argument}: does not divide the width; got {value}; expected {expected}; try {nearest}")

    def check_inputs(self, x: Tensor, tokens: Tensor | None, control: Sequence[Tensor] | None) -> None:
        """Refuse inputs that do not fit, before a convolution fails with a message of its own."""
        check_map("x", x, self.in_channels, self.factor)
        check_tokens(tokens, self.context)
        if len(self.decoder) == 0 and x.shape[2:] != (self.size, self.size):
            got, size = f"{x.shape[2]}x{x.shape[3]}", self.size
            raise ValueError(f"x: not the classifier's image size; got {got}; expected {size}x{size}; try that size")
        if control is not None and len(control) != len(self.encoder) + 1:
            expected = f"{len(self.encoder) + 1}, one per skip and one for the middle"
            raise ValueError(f"control: wrong number of residuals; got {len(control)}; expected {expected}")
