"""Small U-Nets and DiTs, and diffusers' with the same weights."""

import torch
from diffusers import DiTTransformer2DModel, UNet2DConditionModel, UNet2DModel

from ldm.checkpoint.families.dit import dit_keys
from ldm.checkpoint.unet_keys import unet_keys
from ldm.models.dit import DiT
from ldm.models.unet import UNet

TINY = {"channels": 32, "multipliers": (1, 2), "blocks": 1, "attend": (2,)}
SD1 = {"channels": 32, "multipliers": (1, 2, 4, 4), "attend": (1, 2, 4), "heads": 8, "context": 24}
SD2 = {"channels": 32, "multipliers": (1, 2, 4, 4), "head_width": 16, "context": 40, "linear": True}
LDM4 = {"in_channels": 3, "channels": 32, "multipliers": (1, 2, 3, 5), "attend": (2, 4, 8), "heads": 1, "context": 16}
ADM = {**TINY, "in_channels": 3, "learned_sigma": True, "multipliers": (1, 2, 2), "attend": (2, 4), "head_width": 16}
ADM |= {"scale_shift": True, "resample": "residual", "classes": 7}
DIT = {"width": 48, "depth": 2, "heads": 4, "classes": 11}


def diffusers_unet(ours: UNet, **options):
    """diffusers' UNet2DConditionModel, or UNet2DModel where ours is ADM's, of the same shape and weights."""
    encoder = ours.plan[: len(ours.encoder)]
    ends = [row for row, after in zip(encoder, [*encoder[1:], None]) if after is None or after.kind == "down"]
    attend = [row.attend > 0 for row in ends]
    numbers = {
        "in_channels": ours.in_channels,
        "out_channels": ours.out.out_channels,
        "block_out_channels": tuple(row.out_channels for row in ends),
        "layers_per_block": sum(row.kind == "res" for row in encoder) // len(ends),
        "resnet_time_scale_shift": "scale_shift" if ours.scale_shift else "default",
        "num_class_embeds": None if ours.time.label is None else ours.time.label.num_embeddings,
    } | options
    if ours.context is None:
        plain = ("ResnetDown", "ResnetUp") if ours.resample == "residual" else ("Down", "Up")
        names = [("AttnDown", "AttnUp") if a else plain for a in attend]
        numbers |= {"attention_head_dim": ours.head_width, "attn_norm_num_groups": 32}  # or no norm in the middle
        numbers["down_block_types"] = tuple(f"{down}{'sample' * (down == 'ResnetDown')}Block2D" for down, _ in names)
        numbers["up_block_types"] = tuple(f"{up}{'sample' * (up == 'ResnetUp')}Block2D" for _, up in reversed(names))
        kind = {"residual": "resnet", "conv": "conv"}[ours.resample]
        theirs = UNet2DModel(**numbers, downsample_type=kind, upsample_type=kind)
    else:
        prefix = ["CrossAttn" * a for a in attend]
        numbers["down_block_types"] = tuple(f"{name}DownBlock2D" for name in prefix)
        numbers["up_block_types"] = tuple(f"{name}UpBlock2D" for name in reversed(prefix))
        heads = tuple(ours.heads_of(row.out_channels) for row in ends)  # which diffusers calls head dims
        numbers |= {"attention_head_dim": heads, "cross_attention_dim": ours.context}
        theirs = UNet2DConditionModel(**numbers, use_linear_projection=ours.linear)
    theirs.load_state_dict(unet_keys(ours, "diffusers").write(ours.state_dict()))
    return theirs.eval()


def diffusers_dit(ours: DiT, size: int):
    """diffusers' DiT of the same shape and weights, with two constants of the published DiT that it ships otherwise."""
    theirs = DiTTransformer2DModel(
        num_attention_heads=ours.blocks[0].attention.heads,
        attention_head_dim=ours.width // ours.blocks[0].attention.heads,
        in_channels=ours.in_channels,
        out_channels=ours.out_channels,
        num_layers=len(ours.blocks),
        sample_size=size,
        patch_size=ours.patch,
        num_embeds_ada_norm=ours.time.classes - 1,
        norm_eps=1e-6,
    )
    theirs.load_state_dict(dit_keys(ours, "diffusers").write(ours.state_dict()))
    for block in theirs.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = 0
    return theirs.eval()


def difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """The largest difference as a part of the largest number; infinite if the oracle says nothing."""
    assert ours.shape == theirs.shape
    largest = theirs.detach().abs().max()
    return float((ours.detach() - theirs.detach()).abs().max() / largest) if largest > 0 else float("inf")


def differences(ours, theirs, x: torch.Tensor) -> tuple[float, float]:
    """The differences of two functions of x and of their gradients along one random direction."""
    x = x.requires_grad_()
    a, b = ours(x), theirs(x)
    direction = torch.randn(b.shape, generator=torch.Generator().manual_seed(1))
    gradients = [torch.autograd.grad(y, x, direction)[0] for y in (a, b)]
    return difference(a, b), difference(*gradients)
