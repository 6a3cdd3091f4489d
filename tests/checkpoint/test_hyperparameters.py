"""The published models' numbers, read off the names and shapes that their files have."""

import pytest
import torch

from ldm.checkpoint.autoencoder_keys import write_autoencoder
from ldm.checkpoint.families.dit import dit_given, dit_keys, dit_numbers
from ldm.checkpoint.hyperparameters import autoencoder_numbers, text_numbers, unet_given, unet_numbers
from ldm.checkpoint.networks import build_autoencoder, build_backbone, build_text
from ldm.checkpoint.text_keys import write_text
from ldm.checkpoint.unet_keys import unet_keys
from ldm.models.dit import SIZES

SD = {"channels": 320, "multipliers": [1, 2, 4, 4], "blocks": 2, "attend": [1, 2, 4]}
CIN = {"channels": 192, "multipliers": [1, 2, 3, 5], "blocks": 2, "attend": [2, 4, 8]}
CHURCHES = {"channels": 192, "multipliers": [1, 2, 2, 4, 4], "blocks": 2, "attend": [1, 2, 4, 8]}
UNETS = {
    "sd1": (SD, {"heads": 8}, {"context": 768}, 859_520_964),
    "sd1_inpainting": (SD, {"heads": 8}, {"context": 768, "extra_channels": 5}, 859_535_364),
    "sd1_edit": (SD, {"heads": 8}, {"context": 768, "extra_channels": 4}, 859_532_484),
    "sd2": (SD | {"linear": True}, {"head_width": 64}, {"context": 1024}, 865_910_724),
    "ldm_text": (SD, {"heads": 8}, {"context": 1280}, 872_300_484),
    "ldm_class": (CIN, {"heads": 1}, {"context": 512, "in_channels": 3}, 400_920_579),
    "celeba": (CIN | {"channels": 224, "multipliers": [1, 2, 3, 4]}, {"head_width": 32}, {"in_channels": 3}, None),
    "churches": (CHURCHES | {"scale_shift": True, "resample": "residual"}, {"heads": 8}, {}, None),
}
KL = {"type": "kl", "latent": 4, "channels": 128, "blocks": 2, "mid_attention": True}
VQ = KL | {"type": "vq", "codes": 8192}
STAGES = {
    "kl_f4": (KL | {"latent": 3, "multipliers": [1, 2, 4], "attend": []}, 55_312_063),
    "kl_f8": (KL | {"multipliers": [1, 2, 4, 4], "attend": []}, 83_653_863),
    "kl_f16": (KL | {"latent": 16, "multipliers": [1, 1, 2, 2, 4], "attend": [16]}, 69_610_963),
    "kl_f32": (KL | {"latent": 64, "multipliers": [1, 1, 2, 2, 4, 4], "attend": [16, 32]}, 103_880_131),
    "vq_f4": (VQ | {"latent": 3, "multipliers": [1, 2, 4], "attend": []}, 55_322_782),
    "vq_f8": (VQ | {"codes": 16384, "multipliers": [1, 2, 2, 4], "attend": [8]}, 67_717_295),
    "vq_f16": (VQ | {"codes": 16384, "latent": 8, "multipliers": [1, 1, 2, 2, 4], "attend": [16]}, 69_593_371),
}


def shapes(state) -> dict[str, tuple[int, ...]]:
    return {name: tuple(x.shape) for name, x in state.items()}


def size(network) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


@pytest.mark.parametrize("name", UNETS)
def test_unets(name):
    node, heads, supplied, count = UNETS[name]
    expected = {"in_channels": 4, "extra_channels": 0, "learned_sigma": False, "context": None, "classes": None}
    expected |= {"pooled": None} | supplied
    unet = build_backbone({"type": "unet", **node, **heads}, supplied)
    assert count is None or size(unet) == count
    for layout in ("compvis", "diffusers"):
        with torch.device("meta"):
            theirs = shapes(unet_keys(unet, layout).write(unet.state_dict()))
        assert unet_numbers(theirs, layout) == node
        assert unet_given(theirs, layout) == expected
    assert unet_given(shapes(unet.state_dict()), "ours") == expected


@pytest.mark.parametrize("name", SIZES)
def test_dits(name):
    node = {**SIZES[name], "patch": 2}
    dit = build_backbone({"type": "dit", **node}, {"classes": 1001})
    given = {"in_channels": 4, "extra_channels": 0, "learned_sigma": True, "context": None, "classes": 1001}
    for layout in ("dit", "diffusers"):
        theirs = shapes(dit_keys(dit, layout).write(dit.state_dict()))
        assert dit_numbers(theirs, layout) == node
        assert dit_given(theirs, layout) == given | {"pooled": None}
    assert dit_given(shapes(dit.state_dict()), "ours") == given | {"pooled": None}


@pytest.mark.parametrize("name", STAGES)
def test_first_stages(name):
    node, count = STAGES[name]
    network = build_autoencoder(node)
    assert size(network) == count
    for layout in ("compvis", "diffusers", "diffusers_old"):
        theirs = shapes(write_autoencoder(network.state_dict(), network, layout))
        assert autoencoder_numbers(theirs, layout.removesuffix("_old")) == node


@pytest.mark.parametrize(
    ("layout", "node"),
    [
        ("clip", {"type": "clip", "width": 768, "layers": 12, "heads": 12}),
        ("open_clip", {"type": "open_clip", "width": 1024, "layers": 24, "heads": 16}),
        ("ldm", {"type": "joint_text", "width": 1280, "layers": 32, "heads": 8, "head_width": 64, "masked": False}),
    ],
)
def test_text_encoders(layout, node):
    node = node | {"length": 77, "vocabulary": 30522 if layout == "ldm" else 49408}
    with torch.device("meta"):
        tower = build_text(node)
        theirs = shapes(write_text(tower.state_dict(), tower, layout))
    if layout == "open_clip":  # the published file has the last block too
        theirs |= {name.replace(".22.", ".23."): shape for name, shape in theirs.items() if ".resblocks.22." in name}
    assert text_numbers(theirs, layout) | {"type": node["type"]} == node
