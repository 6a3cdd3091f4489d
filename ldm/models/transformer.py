"""Transformers: the block of LDM's U-Net, its wrapper for feature maps, ADM's attention, and CLIP's text encoder."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.models.layers import Attention, attention, check_multiple, check_positive, group_norm


class GEGLU(nn.Module):
    """Feed-forward layer that gates one half of its hidden features by GELU of the other (Shazeer, 2020)."""

    def __init__(self, width: int, ratio: int = 4):
        super().__init__()
        self.proj = nn.Linear(width, 2 * ratio * width)
        self.out = nn.Linear(ratio * width, width)

    def forward(self, x: Tensor) -> Tensor:
        hidden, gate = self.proj(x).chunk(2, -1)  # (B, L, 4C) twice
        return self.out(hidden * F.gelu(gate))  # (B, L, C)


class BasicBlock(nn.Module):
    """LDM's transformer block (Rombach et al., 2022): self-attention, cross-attention to the tokens, GEGLU."""

    def __init__(self, width: int, heads: int, context: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.self_attention = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.cross_attention = Attention(width, heads, context)
        self.norm3 = nn.LayerNorm(width)
        self.feed_forward = GEGLU(width)

    def forward(self, x: Tensor, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        x = x + self.self_attention(self.norm1(x))  # (B, L, C)
        x = x + self.cross_attention(self.norm2(x), tokens, mask)  # (B, L, C)
        return x + self.feed_forward(self.norm3(x))  # (B, L, C)


class SpatialTransformer(nn.Module):
    """Transformer blocks over the pixels of a feature map, with cross-attention; SD 2 projects by linear layers."""

    def __init__(self, channels: int, heads: int, context: int, depth: int = 1, linear: bool = False):
        super().__init__()
        self.linear = linear
        self.norm = group_norm(channels, eps=1e-6)
        self.proj_in = nn.Linear(channels, channels) if linear else nn.Conv2d(channels, channels, 1)
        self.blocks = nn.ModuleList(BasicBlock(channels, heads, context) for _ in range(depth))
        self.proj_out = nn.Linear(channels, channels) if linear else nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        height = x.shape[2]
        h = self.norm(x)  # (B, C, H, W)
        h = h if self.linear else self.proj_in(h)  # (B, C, H, W)
        h = h.flatten(2).transpose(1, 2).contiguous()  # (B, H*W, C), no copy if x is channels_last
        h = self.proj_in(h) if self.linear else h  # (B, H*W, C)
        for block in self.blocks:
            h = block(h, tokens, mask)  # (B, H*W, C)
        h = self.proj_out(h) if self.linear else h  # (B, H*W, C)
        h = h.transpose(1, 2).unflatten(2, (height, -1))  # (B, C, H, W), strided as channels_last
        h = h if self.linear else self.proj_out(h)  # (B, C, H, W)
        return x + h  # (B, C, H, W), x first to keep its memory format


class SpatialAttention(nn.Module):
    """Self-attention over pixels, in ADM (Dhariwal & Nichol, 2021) and in the autoencoder; ignores tokens."""

    def __init__(self, channels: int, heads: int, eps: float = 1e-5):
        super().__init__()
        self.norm = group_norm(channels, eps)
        self.attention = Attention(channels, heads, bias=True)

    def forward(self, x: Tensor, tokens: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        h = self.norm(x).flatten(2).transpose(1, 2).contiguous()  # (B, H*W, C)
        h = self.attention(h).transpose(1, 2).unflatten(2, x.shape[2:])  # (B, C, H, W)
        return x + h  # (B, C, H, W)


class AttentionPool(nn.Module):
    """Pool a feature map of fixed size to one vector by attention from its mean (CLIP; ADM's classifier)."""

    def __init__(self, channels: int, heads: int, size: int, out: int):
        super().__init__()
        check_multiple("heads", channels, heads, f"cannot share {channels} channels")
        self.heads = heads
        self.positions = nn.Parameter(torch.randn(size * size + 1, channels) / channels**0.5)
        self.q = nn.Linear(channels, channels)
        self.k = nn.Linear(channels, channels)
        self.v = nn.Linear(channels, channels)
        self.out = nn.Linear(channels, out)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(2).transpose(1, 2)  # (B, H*W, C)
        x = torch.cat((x.mean(1, keepdim=True), x), 1) + self.positions  # (B, 1 + H*W, C)
        x = attention(self.q(x[:, :1]), self.k(x), self.v(x), self.heads)  # (B, 1, C)
        return self.out(x[:, 0])  # (B, K)


def quick_gelu(x: Tensor) -> Tensor:
    """The approximation of GELU that CLIP-L was trained with."""
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"quick_gelu": quick_gelu, "gelu": F.gelu}


class TextBlock(nn.Module):
    """CLIP's pre-norm transformer block (Radford et al., 2021); `inner` is the width of its attention."""

    def __init__(self, width: int, heads: int, activation: Literal["quick_gelu", "gelu"], inner: int, bias: bool):
        super().__init__()
        self.activation = ACTIVATIONS[activation]
        self.norm1 = nn.LayerNorm(width)
        self.attention = Attention(width, heads, inner=inner, bias=bias)
        self.norm2 = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
        x = x + self.attention(self.norm1(x), mask=mask, causal=causal)  # (B, L, C)
        return x + self.fc2(self.activation(self.fc1(self.norm2(x))))  # (B, L, C)


class TextTransformer(nn.Module):
    """CLIP-L, OpenCLIP-H and the jointly trained text encoder: token ids to states and one pooled vector.

    LDM's encoder sets `head_width` and has no `bias` in queries, keys and values. The pooled vector is read at each
    row's highest id, which must be the end token's, as in CLIP's vocabulary.
    """

    def __init__(
        self,
        *,
        vocabulary: int = 49408,
        length: int = 77,
        width: int = 768,
        layers: int = 12,
        heads: int = 12,
        head_width: int | None = None,
        bias: bool = True,
        activation: Literal["quick_gelu", "gelu"] = "gelu",
        layer: Literal["last", "penultimate"] = "last",
        causal: bool = True,
        projection: int | None = None,
    ):
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation: unknown; got {activation}; expected quick_gelu or gelu; try gelu")
        if layer not in ("last", "penultimate"):
            raise ValueError(f"layer: unknown; got {layer}; expected last or penultimate; try last")
        least = 2 if layer == "penultimate" else 1
        if layers < least:
            raise ValueError(f"layers: too few for layer={layer}; got {layers}; expected {least} or more; try {least}")
        check_positive(vocabulary=vocabulary, length=length, width=width, heads=heads)
        if projection is not None:
            check_positive(projection=projection)
        if head_width is None:
            check_multiple("width", width, heads, f"cannot be split into {heads} heads")
        else:
            check_positive(head_width=head_width)
        inner = heads * head_width if head_width else width
        self.length, self.layer, self.causal = length, layer, causal
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Parameter(torch.empty(length, width))
        self.blocks = nn.ModuleList(TextBlock(width, heads, activation, inner, bias) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.projection = nn.Linear(width, projection, bias=False) if projection else nn.Identity()
        self.initialise()

    def initialise(self) -> None:
        """CLIP's initialisation: smaller residual branches in deeper networks."""
        width, depth = self.tokens.embedding_dim, len(self.blocks)
        nn.init.normal_(self.tokens.weight, std=0.02)
        nn.init.normal_(self.positions, std=0.01)
        for name, parameter in self.blocks.named_parameters():
            if name.endswith(("q.weight", "k.weight", "v.weight")):
                nn.init.normal_(parameter, std=width**-0.5)
            elif name.endswith(("attention.out.weight", "fc2.weight")):
                nn.init.normal_(parameter, std=(2 * width * depth) ** -0.5)
            elif name.endswith("fc1.weight"):
                nn.init.normal_(parameter, std=(2 * width) ** -0.5)
            elif "norm" not in name:
                nn.init.zeros_(parameter)
        if isinstance(self.projection, nn.Linear):
            nn.init.normal_(self.projection.weight, std=width**-0.5)

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if ids.shape[1] > self.length:
            got, limit = f"{ids.shape[1]} tokens", self.length
            raise ValueError(f"ids: longer than the position table; got {got}; expected at most {limit}; try {limit}")
        x = self.tokens(ids) + self.positions[: ids.shape[1]]  # (B, L, C)
        for block in self.blocks[:-1]:
            x = block(x, mask, self.causal)  # (B, L, C)
        last = self.norm(self.blocks[-1](x, mask, self.causal))  # (B, L, C)
        states = last if self.layer == "last" else self.norm(x)  # (B, L, C)
        end = ids.argmax(-1)  # (B,)
        pooled = self.projection(last[torch.arange(len(ids), device=ids.device), end])  # (B, C or P)
        return states, pooled


def check_tokens(tokens: Tensor | None, context: int | None) -> None:
    """Refuse tokens of another width than a network's cross-attention reads; None is none."""
    width = None if tokens is None else tokens.shape[-1]
    if width != context:
        raise ValueError(f"tokens: not the width of the cross-attention; got {width}; expected {context}")
