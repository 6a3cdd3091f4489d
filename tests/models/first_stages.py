"""Small autoencoders filled with random weights, and diffusers' with the same ones."""

import torch
from diffusers import AutoencoderKL, VQModel

from ldm.checkpoint.autoencoder_keys import write_autoencoder
from ldm.models.autoencoder import Autoencoder
from ldm.models.quantize import Gaussian, VectorQuantizer

KL = {"bottleneck": lambda: Gaussian(channels=4), "attend": [2]}
VQ = {"bottleneck": lambda: VectorQuantizer(codes=16, channels=4), "attend": [4], "mid_attention": False}


def small(*, bottleneck=Gaussian, **options) -> Autoencoder:
    """Widths 32, 32, 64: a factor of 4, one block a level."""
    return Autoencoder(bottleneck=bottleneck(), **{"channels": 32, "multipliers": [1, 1, 2], "blocks": 1, **options})


def fill(module, seed: int = 0):
    """Random numbers in every parameter, the weights of norms near one, so that no equality is 0 == 0."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        fan_in = parameter[0].numel() if parameter.ndim > 1 else 100
        norm = "norm" in name and name.endswith("weight")
        gain = 1.0 if name.endswith("codebook") else fan_in**-0.5
        parameter.data.copy_(1 + 0.1 * noise if norm else gain * noise)
    return module


def diffusers_autoencoder(ours: Autoencoder):
    """diffusers' AutoencoderKL or VQModel of the same shape and weights."""
    encoder = ours.encoder.plan
    widths = {row.level: row.width_out for row in encoder if row.level is not None}
    attend = {row.level for row in encoder if row.kind == "attention"}
    numbers = {
        "block_out_channels": tuple(widths.values()),
        "down_block_types": tuple(f"{'Attn' * (i in attend)}DownEncoderBlock2D" for i in widths),
        "up_block_types": tuple(f"{'Attn' * (i in attend)}UpDecoderBlock2D" for i in reversed(widths)),
        "layers_per_block": sum(row.kind == "res" and row.level == 0 for row in encoder),
        "latent_channels": ours.latent_channels,
        "mid_block_add_attention": "mid_attention0" in ours.encoder.layers,
    }
    if isinstance(ours.bottleneck, VectorQuantizer):
        theirs = VQModel(**numbers, num_vq_embeddings=len(ours.bottleneck.codebook))
    else:
        theirs = AutoencoderKL(**numbers)
    theirs.load_state_dict(write_autoencoder(ours.state_dict(), ours, "diffusers"))
    return theirs
