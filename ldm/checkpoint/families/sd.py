"""Stable Diffusion 1 and 2 (Rombach et al. 2022), their inpainting models, and InstructPix2Pix."""

from __future__ import annotations

import torch

from ldm.checkpoint.files import Tensors
from ldm.checkpoint.formats.compvis import CONDITION, stored_prediction
from ldm.checkpoint.formats.diffusers import Folder
from ldm.checkpoint.latent_diffusion import LatentDiffusion, Node, TextEncoder
from ldm.checkpoint.rename import State

NOISE = {"type": "scaled_linear", "start": 0.00085, "end": 0.012}
CLIP = TextEncoder("clip", "clip", f"{CONDITION}transformer.", null="empty")
OPEN_CLIP = TextEncoder("open_clip", "open_clip", f"{CONDITION}model.", null="empty")
PIPELINES = {  # diffusers' classes by the use of the extra channels
    "": "StableDiffusionPipeline",
    "inpainting": "StableDiffusionInpaintPipeline",
    "edit": "StableDiffusionInstructPix2PixPipeline",
}
V_DEVIATION = 0.09  # of a norm's bias in the last block: above it in the models that predict v, below in the others


class StableDiffusion1(LatentDiffusion):
    """CLIP-L reads the text."""

    def recognises_folder(self, folder: Folder) -> bool:
        return super().recognises_folder(folder) and folder.settings(CLIP.folder).get("hidden_act") != "gelu"


class StableDiffusion2(LatentDiffusion):
    """OpenCLIP-H reads the text; some of the models predict v."""

    def recognises_folder(self, folder: Folder) -> bool:
        return super().recognises_folder(folder) and folder.settings(OPEN_CLIP.folder).get("hidden_act") == "gelu"

    def prediction(self, tensors: Tensors, state: State, use: str, notes: list[str]) -> str:
        """By the metadata, else guessed from the spread of a norm's bias in the last block."""
        if stored_prediction(tensors) or use:
            return stored_prediction(tensors) or "eps"
        biases = [
            name for name in state if name.startswith("backbone.decoder.") and name.endswith(".blocks.0.norm1.bias")
        ]
        last = max(biases, key=lambda name: int(name.split(".")[2]))
        deviation = state[last].float().std(correction=0).item()
        kind = "v" if deviation > V_DEVIATION else "eps"
        guess = f"{kind}-prediction is guessed from {last} (deviation {deviation:.3f})"
        notes.append(f"{guess}; prediction.type overrides it")
        return kind

    def write_condition(self, nodes: list[Node], states: list[State]) -> State:
        """With the published encoder's last block, which is never read and which every file has: zeros."""
        file, number = super().write_condition(nodes, states), nodes[0]["layers"] - 1
        last, unread = (f"{OPEN_CLIP.prefix}transformer.resblocks.{n}." for n in (number - 1, number))
        return file | {k.replace(last, unread): torch.zeros_like(x) for k, x in file.items() if k.startswith(last)}


SD1 = StableDiffusion1(
    name="Stable Diffusion 1",
    marks=(f"{CLIP.prefix}text_model.final_layer_norm.bias", f"{CLIP.prefix}final_layer_norm.bias"),
    prefixes=(CLIP.prefix,),
    encoders=(CLIP,),
    heads={"heads": 8},
    path=NOISE,
    cfg=7.5,
    size=512,
    pipelines=PIPELINES,
)
SD2 = StableDiffusion2(
    name="Stable Diffusion 2",
    marks=(f"{OPEN_CLIP.prefix}ln_final.bias",),
    prefixes=(OPEN_CLIP.prefix,),
    encoders=(OPEN_CLIP,),
    heads={"head_width": 64},
    path=NOISE,
    cfg=7.5,
    size=512,
    v_size=768,
    pipelines=PIPELINES,
)
