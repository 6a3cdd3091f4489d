"""The first stage of latent diffusion (Rombach et al. 2022, section 3.1 and appendix E): images to latents and back."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.models.layers import Downsample, ResBlock, Upsample, check_map, check_multiple, check_positive, group_norm, run
from ldm.models.quantize import Bottled, Gaussian, VectorQuantizer
from ldm.models.transformer import SpatialAttention

EPS = 1e-6  # of every norm here; the U-Net's are 1e-5


class Row(NamedTuple):
    """One layer of a plan: its kind, level (0 is full resolution, None the middle), number in the level, and widths."""

    kind: Literal["res", "attention", "down", "up"]
    level: int | None
    number: int
    width_in: int
    width_out: int

    @property
    def name(self) -> str:
        """The layer's name in the state dict."""
        return f"{'mid' if self.level is None else f'level{self.level}'}_{self.kind}{self.number}"


def middle_plan(width: int, attention: bool) -> Iterator[Row]:
    """The layers at the lowest resolution, the same in encoder and decoder."""
    yield Row("res", None, 0, width, width)
    if attention:
        yield Row("attention", None, 0, width, width)
    yield Row("res", None, 1, width, width)


def level_plan(level: int, width: int, out: int, blocks: int, attend: bool) -> Iterator[Row]:
    """The layers of one resolution, the same in encoder and decoder."""
    for i in range(blocks):
        yield Row("res", level, i, width if i == 0 else out, out)
        if attend:
            yield Row("attention", level, i, out, out)


def encoder_plan(widths: list[int], blocks: int, attend: set[int], mid_attention: bool) -> Iterator[Row]:
    """From full resolution down; `attend` holds the levels with attention."""
    for level, width in enumerate(widths):
        yield from level_plan(level, widths[max(level - 1, 0)], width, blocks, level in attend)
        if level < len(widths) - 1:
            yield Row("down", level, 0, width, width)
    yield from middle_plan(widths[-1], mid_attention)


def decoder_plan(widths: list[int], blocks: int, attend: set[int], mid_attention: bool) -> Iterator[Row]:
    """From the lowest resolution up, with one residual block more per level than the encoder."""
    yield from middle_plan(widths[-1], mid_attention)
    for level in reversed(range(len(widths))):
        width = widths[level]
        yield from level_plan(level, widths[min(level + 1, len(widths) - 1)], width, blocks + 1, level in attend)
        if level > 0:
            yield Row("up", level, 0, width, width)


def build_layer(row: Row) -> nn.Module:
    """The module for a row of the plan."""
    if row.kind == "res":
        return ResBlock(row.width_in, row.width_out, eps=EPS)
    if row.kind == "attention":
        return SpatialAttention(row.width_in, heads=1, eps=EPS)
    return Downsample(row.width_in, asymmetric=True) if row.kind == "down" else Upsample(row.width_in)


class Tower(nn.Module):
    """The encoder or the decoder: a convolution, the plan's layers, then norm, SiLU and a convolution."""

    def __init__(self, in_channels: int, out_channels: int, plan: list[Row], checkpointing: bool):
        super().__init__()
        self.plan, self.checkpointing = plan, checkpointing
        self.conv_in = nn.Conv2d(in_channels, plan[0].width_in, 3, padding=1)
        self.layers = nn.ModuleDict({row.name: build_layer(row) for row in plan})
        self.norm_out = group_norm(plan[-1].width_out, EPS)
        self.conv_out = nn.Conv2d(plan[-1].width_out, out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv_in(x)  # (B, C, H, W)
        for layer in self.layers.values():
            h = run(layer, self.checkpointing, h)  # (B, C', H', W')
        return self.conv_out(F.silu(self.norm_out(h)))  # (B, out, H', W')


class Autoencoder(nn.Module):
    """The autoencoder of LDM: encoder, bottleneck (KL or VQ) and decoder, and the latents' shift and scale.

    `attend` lists the downsampling factors of the levels with attention (kl-f16: [16]); `stem` 2 starts with a
    pixel-unshuffle, which makes a small model cheap. Normalised latents are (z - shift) * scale. Initialisation is
    torch's default, as in LDM.
    """

    shift: Tensor
    scale: Tensor

    def __init__(
        self,
        *,
        bottleneck: Gaussian | VectorQuantizer,
        in_channels: int = 3,
        channels: int = 128,
        multipliers: Sequence[int] = (1, 2, 4, 4),
        blocks: int = 2,
        attend: Sequence[int] = (),
        mid_attention: bool = True,
        stem: Literal[1, 2] = 1,
        per_channel: bool = False,
        checkpointing: bool = False,
    ):
        super().__init__()
        check_positive(in_channels=in_channels, blocks=blocks)
        check_numbers(channels, multipliers, attend, stem)
        if per_channel and isinstance(bottleneck, VectorQuantizer):
            raise ValueError(
                "per_channel: not supported for VQ, which has one shift and scale; got True; expected False; try False"
            )
        self.in_channels, self.stem = in_channels, stem
        self.factor = stem * 2 ** (len(multipliers) - 1)
        self.latent_channels = bottleneck.channels
        widths = [channels * multiplier for multiplier in multipliers]
        levels = {(factor // stem).bit_length() - 1 for factor in attend}
        pixels, latents, moments = in_channels * stem**2, bottleneck.channels, bottleneck.moments
        encoder, decoder = (list(plan(widths, blocks, levels, mid_attention)) for plan in (encoder_plan, decoder_plan))
        self.encoder = Tower(pixels, moments, encoder, checkpointing)
        self.quant = nn.Conv2d(moments, moments, 1)
        self.bottleneck = bottleneck
        self.post_quant = nn.Conv2d(latents, latents, 1)
        self.decoder = Tower(latents, pixels, decoder, checkpointing)
        shape = (latents, 1, 1) if per_channel else ()
        self.register_buffer("shift", torch.zeros(shape))
        self.register_buffer("scale", torch.ones(shape))

    def encode(self, x: Tensor, noise: Tensor | None = None) -> Tensor:
        """Normalised latents of images: the posterior's mean, or a sample if noise is given."""
        z = self.bottleneck.sample(self.moments(x), noise)  # (B, Z, h, w)
        return (z - self.shift) * self.scale  # (B, Z, h, w)

    def decode(self, z: Tensor) -> Tensor:
        """Images of normalised latents; VQ quantises them first, as LDM's VQModelInterface does."""
        check_map("z", z, self.latent_channels, 1)
        z = self.bottleneck.snap(z / self.scale + self.shift)  # (B, Z, h, w)
        return self.reconstruct(z)  # (B, C, H, W)

    def posterior(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Mean and log-variance before normalisation; VQ's posterior is a point without variance."""
        return self.bottleneck.posterior(self.moments(x))  # (B, Z, h, w) each

    def forward(self, x: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Bottled]:
        """One training pass: reconstructions, and the bottleneck's output for the loss."""
        bottled = self.bottleneck(self.moments(x), noise)
        return self.reconstruct(bottled.z), bottled  # (B, C, H, W)

    def moments(self, x: Tensor) -> Tensor:
        """The encoder's output: mean and log-variance in one tensor (KL), or the point to quantise (VQ)."""
        check_map("x", x, self.in_channels, self.factor)
        x = x if self.stem == 1 else F.pixel_unshuffle(x, self.stem)  # (B, C*stem^2, H/stem, W/stem)
        return self.quant(self.encoder(x))  # (B, 2Z or Z, h, w)

    def reconstruct(self, z: Tensor) -> Tensor:
        """Images of unnormalised latents after the bottleneck."""
        h = self.decoder(self.post_quant(z))  # (B, C*stem^2, H/stem, W/stem)
        return h if self.stem == 1 else F.pixel_shuffle(h, self.stem)  # (B, C, H, W)

    def set_statistics(self, shift: float | Tensor, scale: float | Tensor) -> None:
        """Set what normalises latents: shift = their mean, scale = 1 / their standard deviation."""
        for name, value in (("shift", shift), ("scale", scale)):
            buffer = getattr(self, name)
            value = torch.as_tensor(value, dtype=buffer.dtype, device=buffer.device)
            if value.numel() != buffer.numel():
                got, expected = value.numel(), buffer.numel()
                raise ValueError(f"{name}: wrong count of numbers; got {got}; expected {expected}; try per_channel")
            if not value.isfinite().all() or (name == "scale" and (value <= 0).any()):
                legal = "finite numbers" + (" above 0" if name == "scale" else "")
                raise ValueError(f"{name}: out of range; got {value.flatten().tolist()}; expected {legal}; try 1.0")
            buffer.copy_(value.reshape(buffer.shape))

    def fingerprint(self) -> str:
        """A sha256 of what defines latents: encoder, quant convolution, shift and scale.

        Decoders may be swapped, and so may VQ's codebook, because latents are taken before quantisation. Values are
        hashed as float32, so the storage type does not matter, but rounding does.
        """
        digest = hashlib.sha256(f"stem {self.stem}".encode())
        tensors = {**self.encoder.state_dict(prefix="encoder."), **self.quant.state_dict(prefix="quant.")}
        for name, tensor in {**tensors, "shift": self.shift, "scale": self.scale}.items():
            digest.update(f"{name} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()


def check_numbers(channels: int, multipliers: Sequence[int], attend: Sequence[int], stem: int) -> None:
    """Refuse invalid numbers before anything is built."""
    check_multiple("channels", channels, 32, "cannot be split into 32 norm groups")
    if not multipliers or min(multipliers) < 1:
        got = list(multipliers)
        raise ValueError(
            f"multipliers: must be positive, one for each level; got {got}; expected integers >= 1; try [1, 2, 4, 4]"
        )
    if stem not in (1, 2):
        raise ValueError(f"stem: only a pixel unshuffle by 2 is supported; got {stem}; expected 1 or 2; try 2")
    factors = [stem * 2**level for level in range(len(multipliers))]
    for factor in attend:
        if factor not in factors:
            nearest = min(factors, key=lambda f: abs(f - factor))
            raise ValueError(
                f"attend: no level has this factor; got {factor}; expected any of {factors}; try {nearest}"
            )


def first_stage(
    *,
    quantised: bool,
    latent: int = 4,  # channels of the latents
    codes: int = 8192,  # vectors of the codebook
    channels: int = 128,  # of the first level, a multiple of 32
    multipliers: Sequence[int] = (1, 2, 4, 4),  # channels of each level, in units of the first
    blocks: int = 2,  # residual blocks per level of the encoder; the decoder has one more
    attend: Sequence[int] = (),  # downsampling factors of the levels with attention
    mid_attention: bool = True,  # attention at the lowest level
    stem: Literal[1, 2] = 1,  # 2 folds 2x2 pixels into channels before the first convolution
    per_channel: bool = False,  # a shift and scale per latent channel; false is one pair for all
    checkpointing: bool = False,  # recompute activations in the backward pass to save memory
) -> Autoencoder:
    """An autoencoder with a codebook (`quantised`) or a Gaussian posterior; the defaults are Stable Diffusion's."""
    return Autoencoder(
        bottleneck=VectorQuantizer(codes=codes, channels=latent) if quantised else Gaussian(channels=latent),
        channels=channels,
        multipliers=multipliers,
        blocks=blocks,
        attend=attend,
        mid_attention=mid_attention,
        stem=stem,
        per_channel=per_channel,
        checkpointing=checkpointing,
    )


kl = partial(first_stage, quantised=False, codes=0)
vq = partial(first_stage, quantised=True, per_channel=False)
