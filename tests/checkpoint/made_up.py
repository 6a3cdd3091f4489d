"""Made-up models of every family, small and random: configurations and states in our names."""

from functools import cache

import torch

from ldm.checkpoint.networks import build_autoencoder, build_backbone, build_text
from tests.models.first_stages import fill

UNET = {"type": "unet", "channels": 64, "multipliers": [1, 2], "blocks": 1, "attend": [1]}
CLIP = {"type": "clip", "width": 64, "layers": 2, "heads": 1, "length": 12, "vocabulary": 530}
OPEN_CLIP = CLIP | {"type": "open_clip", "layers": 3}
BERT = CLIP | {"type": "joint_text", "heads": 2, "head_width": 64, "masked": False}
LABEL = {"type": "label", "classes": 11, "null": 10}
KL = {
    "type": "kl",
    "latent": 4,
    "channels": 32,
    "multipliers": [1, 2],
    "blocks": 1,
    "attend": [],
    "mid_attention": True,
}
VQ = KL | {"type": "vq", "latent": 3, "codes": 16, "attend": [2], "mid_attention": False}
DIT = {"type": "dit", "width": 128, "depth": 2, "heads": 2, "patch": 2}
SD = {"type": "scaled_linear", "start": 0.00085, "end": 0.012}
LDM = {"type": "scaled_linear", "start": 0.0015, "end": 0.0195}
LEARNED = {"type": "learned_range", "of": {"type": "eps"}}


def model(backbone=None, conditioner=None, autoencoder=None, path=SD, prediction="eps", cfg=7.5, **others) -> dict:
    """A stored configuration."""
    return {
        "format": 1,
        "path": path,
        "prediction": {"type": prediction} if isinstance(prediction, str) else prediction,
        "backbone": backbone,
        "conditioner": conditioner,
        "guidance": {"cfg": cfg},
        "spacing": {"type": "leading", "steps": 50},
        "solver": {"type": "dpmpp_2m"},
        "autoencoder": autoencoder,
        "size": 512,
    } | others


def extra(conditioner: dict, kind: str) -> dict:
    return {"type": "compose", "parts": [conditioner, {"type": kind}]}


SD1 = UNET | {"heads": 8}
SD2 = UNET | {"head_width": 64, "linear": True}
ADM = UNET | {"attend": [2], "head_width": 32}
CONFIGS = {
    "sd1": model(SD1, CLIP, KL),
    "sd1_inpainting": model(SD1, extra(CLIP, "masked_image"), KL),
    "sd1_edit": model(SD1, extra(CLIP, "edit"), KL),
    "sd2": model(SD2, OPEN_CLIP, KL),
    "sd2_v": model(SD2, OPEN_CLIP, KL, prediction="v", size=768),
    "sd2_inpainting": model(SD2, extra(OPEN_CLIP, "masked_image"), KL),
    "ldm_text": model(SD1, BERT, KL, size=256),
    "ldm_class": model(UNET | {"heads": 1}, LABEL | {"width": 64}, VQ, LDM, cfg=3.0, size=256),
    "ldm_vq": model(ADM, None, VQ, LDM, cfg=1.0, size=256),
    "ldm_kl": model(
        UNET | {"attend": [1, 2], "heads": 8, "scale_shift": True, "resample": "residual"},
        None,
        KL,
        LDM | {"end": 0.0155},
        cfg=1.0,
        size=256,
    ),
    "dit": model(
        DIT,
        LABEL,
        KL,
        {"type": "linear", "start": 1e-4, "end": 0.02},
        LEARNED,
        4.0,
        spacing={"type": "leading", "steps": 50, "offset": 0},
        solver={"type": "ddpm", "noise_var": "learned"},
        size=256,
    ),
    "kl": {"format": 1, "autoencoder": KL},
    "vq": {"format": 1, "autoencoder": VQ},
}


def given(config: dict) -> dict:
    """What the assembly would give the backbone."""
    node, latent = config["conditioner"], config["autoencoder"]["latent"]
    parts = [] if node is None else node.get("parts", [node])
    extras = {"masked_image": latent + 1, "edit": latent}
    width = parts[0].get("width") if parts else None
    return {
        "in_channels": latent,
        "extra_channels": sum(extras.get(part["type"], 0) for part in parts),
        "learned_sigma": config["prediction"]["type"] == "learned_range",
        "context": width,
        "classes": parts[0]["classes"] if parts and parts[0]["type"] == "label" and not width else None,
    }


def random(network, seed: int, prefix: str) -> dict[str, torch.Tensor]:
    return {prefix + name: x for name, x in fill(network.to_empty(device="cpu"), seed).state_dict().items()}


@cache
def make(name: str) -> tuple[dict, dict[str, torch.Tensor]]:
    """A family's configuration and state."""
    config = CONFIGS[name]
    state = random(build_autoencoder(config["autoencoder"]), 1, "autoencoder.")
    state["autoencoder.shift"], state["autoencoder.scale"] = torch.zeros(()), torch.tensor(1.0)
    if config["autoencoder"]["type"] == "kl":
        state["autoencoder.scale"] = torch.tensor(0.18215)
    if "backbone" not in config:
        return config, state
    state |= random(build_backbone(config["backbone"], given(config)), 2, "backbone.")
    node = config["conditioner"]
    if node and node["type"] == "label" and "width" in node:
        table = torch.nn.Embedding(node["classes"], node["width"], device="meta")
        state |= random(table, 3, "conditioner.table.")
    elif node and node["type"] != "label":
        prefix = "conditioner.members.0." if node["type"] == "compose" else "conditioner."
        state |= random(build_text(node.get("parts", [node])[0]), 3, f"{prefix}transformer.")
    if name == "sd2_v":  # what tells the two kinds apart
        state["backbone.decoder.4.attend.blocks.0.norm1.bias"] *= 3
    return config, state
