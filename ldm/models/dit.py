"""The diffusion transformer DiT (Peebles & Xie, 2023) for class labels, or with cross-attention for text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.condition import Vector
from ldm.models.layers import Attention, TimestepEmbedding, check_map, check_multiple, check_positive, run, zero
from ldm.models.transformer import check_tokens

SIZES = {  # the paper's table 1
    "S": {"width": 384, "depth": 12, "heads": 6},
    "B": {"width": 768, "depth": 12, "heads": 12},
    "L": {"width": 1024, "depth": 24, "heads": 16},
    "XL": {"width": 1152, "depth": 28, "heads": 16},
}


def sincos_positions(width: int, height: int, length: int, device: torch.device) -> Tensor:
    """Fixed embedding (1, height * length, width) of a grid: columns before rows, sines before cosines."""
    omega = 10000.0 ** -(torch.arange(width // 4, device=device) / (width // 4))  # (W/4,)
    rows, columns = (torch.arange(n, device=device)[:, None] * omega for n in (height, length))  # (h, W/4), (l, W/4)
    row = torch.cat((rows.sin(), rows.cos()), 1)[:, None].expand(-1, length, -1)  # (h, l, W/2)
    column = torch.cat((columns.sin(), columns.cos()), 1).expand(height, -1, -1)  # (h, l, W/2)
    return torch.cat((column, row), 2).flatten(0, 1)[None]  # (1, h * l, W)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Shift and scale every token of x (B, L, C) by vectors (B, C)."""
    return x * (1 + scale[:, None]) + shift[:, None]


class DiTBlock(nn.Module):
    """Transformer block with adaLN-Zero modulation of its two branches; cross-attention stands between them."""

    def __init__(self, width: int, heads: int, context: int | None = None):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.attention = Attention(width, heads, bias=True)
        self.cross_norm = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6) if context else None
        self.cross_attention = Attention(width, heads, context, bias=True) if context else None
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)
        self.modulation = nn.Linear(width, 6 * width)

    def forward(self, x: Tensor, emb: Tensor, tokens: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(emb).chunk(6, 1)  # (B, C) six times
        x = x + gate1[:, None] * self.attention(modulate(self.norm1(x), shift1, scale1))  # (B, L, C)
        if self.cross_attention is not None and self.cross_norm is not None:
            x = x + self.cross_attention(self.cross_norm(x), tokens, mask)  # (B, L, C)
        h = F.gelu(self.fc1(modulate(self.norm2(x), shift2, scale2)), approximate="tanh")  # (B, L, 4C)
        return x + gate2[:, None] * self.fc2(h)  # (B, L, C)


class DiT(nn.Module):
    """DiT that predicts (B, C, H, W), or (B, 2C, H, W) with `learned_sigma`, from noisy latents and t (B,).

    `classes` counts the rows of the label table with the null class for guidance (1001 for ImageNet), read by integers
    (B,) in `pooled`; else `pooled` is a vector of that width, and `vectors` declares the named ones. `context` adds
    cross-attention to tokens (B, L, context). `control` has one residual (B, L, width) per block, added to its output.
    """

    def __init__(
        self,
        *,
        in_channels: int = 4,
        extra_channels: int = 0,
        learned_sigma: bool = True,
        width: int = 1152,  # of its tokens
        depth: int = 28,  # blocks
        heads: int = 16,  # of attention
        patch: int = 2,  # side in latents of the square for one token
        classes: int | None = None,
        pooled: int | None = None,
        vectors: Mapping[str, Vector] | None = None,
        context: int | None = None,
        checkpointing: bool = False,  # recompute activations in the backward pass to save memory
    ):
        super().__init__()
        check_positive(in_channels=in_channels, depth=depth, patch=patch, heads=heads)
        check_multiple("width", width, heads, f"cannot be split into {heads} heads")
        check_multiple("width", width, 4, "sines and cosines of two axes must share it")
        self.in_channels, self.context, self.checkpointing = in_channels + extra_channels, context, checkpointing
        self.width, self.patch, self.factor = width, patch, patch
        self.out_channels = in_channels * (2 if learned_sigma else 1)
        self.embed = nn.Conv2d(self.in_channels, width, patch, stride=patch)
        self.time = TimestepEmbedding(256, width, classes, pooled, vectors)
        self.blocks = nn.ModuleList(DiTBlock(width, heads, context) for _ in range(depth))
        self.norm = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.modulation = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, patch * patch * self.out_channels)
        self.initialise()

    def initialise(self) -> None:
        """The paper's initialisation: each block starts as the identity, and the output as zero."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d) and module.bias is not None:
                nn.init.xavier_uniform_(module.weight.flatten(1))  # the patch embedding too, as a linear layer
                nn.init.zeros_(module.bias)
        for name, parameter in self.time.named_parameters():
            if name.endswith("weight"):
                nn.init.normal_(parameter, std=0.02)
        for module in (*self.blocks, self):
            zero(module.modulation)
            if getattr(module, "cross_attention", None) is not None:
                zero(module.cross_attention.out)
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
        check_map("x", x, self.in_channels, self.patch)
        check_tokens(tokens, self.context)
        if control is not None and len(control) != len(self.blocks):
            expected = f"{len(self.blocks)}, one per block"
            raise ValueError(f"control: wrong number of residuals; got {len(control)}; expected {expected}")
        emb = F.silu(self.time(t, pooled, vectors))  # (B, D)
        h = self.embed(x)  # (B, D, h, w)
        positions = sincos_positions(self.width, h.shape[2], h.shape[3], x.device).to(h.dtype)  # (1, h*w, D)
        h = h.flatten(2).transpose(1, 2).contiguous() + positions  # (B, h*w, D)
        for number, block in enumerate(self.blocks):
            h = run(block, self.checkpointing, h, emb, tokens, mask)  # (B, h*w, D)
            h = h if control is None else h + control[number]  # (B, h*w, D)
        shift, scale = self.modulation(emb).chunk(2, 1)  # (B, D) twice
        h = self.out(modulate(self.norm(h), shift, scale))  # (B, h*w, p*p*C)
        return self.unpatch(h, x)  # (B, C, H, W)

    def unpatch(self, h: Tensor, x: Tensor) -> Tensor:
        """Arrange the tokens' patches as an image with the sides and the memory format of x."""
        p = self.patch
        h = h.unflatten(2, (p, p, -1)).unflatten(1, (x.shape[2] // p, x.shape[3] // p))  # (B, h, w, p, p, C)
        h = h.transpose(2, 3).flatten(3, 4).flatten(1, 2).permute(0, 3, 1, 2)  # (B, C, H, W)
        last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
        return h.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)  # (B, C, H, W)
