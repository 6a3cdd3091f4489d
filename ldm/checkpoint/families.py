"""The kinds of models that others published, one row each: how a file gives one away, and what no file says."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

UNET = "model.diffusion_model."
CONDITION = "cond_stage_model."
TEXT = f"{CONDITION}transformer."
OPEN_CLIP = f"{CONDITION}model."
FIRST_STAGE = "first_stage_model."

SD_NOISE = {"type": "scaled_linear", "start": 0.00085, "end": 0.012}
LDM_NOISE: dict[str, Any] = {"type": "scaled_linear", "start": 0.0015, "end": 0.0195}


class Family(NamedTuple):
    """A row: its name, the tensor that marks it in a single file, and what was published beside the weights."""

    name: str
    mark: str
    conditioner: str | None  # our type of conditioner
    layout: str | None  # the names of its text encoder
    prefix: str  # of the conditioner's tensors
    heads: Mapping[str, int]  # the U-Net's, which no shape tells
    path: Mapping[str, Any]
    cfg: float
    size: int  # of its pictures, in pixels
    averaged: bool = False  # published to be sampled from the moving average of its weights
    tells_v: bool = False  # some of its models predict v


SD1: dict[str, Any] = {
    **{"conditioner": "clip", "layout": "clip", "prefix": TEXT, "heads": {"heads": 8}},
    **{"path": SD_NOISE, "cfg": 7.5, "size": 512},
}
SD2 = SD1 | {"conditioner": "open_clip", "layout": "open_clip", "prefix": OPEN_CLIP, "heads": {"head_width": 64}}
LDM: dict[str, Any] = {
    **{"conditioner": None, "layout": None, "prefix": "", "heads": {"head_width": 32}},
    **{"path": LDM_NOISE, "cfg": 1.0, "size": 256, "averaged": True},
}
BERT = LDM | {
    **{"conditioner": "joint_text", "layout": "ldm", "prefix": CONDITION, "heads": {"heads": 8}},
    **{"path": SD_NOISE, "cfg": 7.5},
}
LABEL = LDM | {"conditioner": "label", "prefix": CONDITION, "heads": {"heads": 1}, "cfg": 3.0}
CHURCHES = LDM | {"heads": {"heads": 8}, "path": LDM_NOISE | {"end": 0.0155}}  # the only published one with KL

FAMILIES = (  # of a file, the first row whose mark is in it
    Family("Stable Diffusion 1", f"{TEXT}text_model.final_layer_norm.bias", **SD1),
    Family("Stable Diffusion 1", f"{TEXT}final_layer_norm.bias", **SD1),
    Family("Stable Diffusion 2", f"{OPEN_CLIP}ln_final.bias", **SD2, tells_v=True),
    Family("LDM text-to-image", f"{TEXT}token_emb.weight", **BERT),
    Family("LDM class-conditional", f"{CONDITION}embedding.weight", **LABEL),
    Family("LDM unconditional, VQ", f"{FIRST_STAGE}quantize.embedding.weight", **LDM),
    Family("LDM unconditional, KL", f"{UNET}out.2.bias", **CHURCHES),
)

IGNORED = {  # what files carry beside weights, by the beginnings of names, and what to tell of it
    "model_ema.": "moving averages of the weights",
    "first_stage_model.loss.": "the first stage's losses",
    "loss.": "the first stage's losses",
    "cond_stage_model.logit_scale": "what CLIP compares texts and pictures by",
    "cond_stage_model.text_projection": "what CLIP compares texts and pictures by",
    "embedding_manager.": "what textual inversion learned or left behind",
    "lvlb_weights": "tables of the noise",
    "logvar": "tables of the noise",
    "posterior_": "tables of the noise",
    "alphas_cumprod": "tables of the noise",
    "sqrt_": "tables of the noise",
    "log_one_minus_": "tables of the noise",
    "betas": "tables of the noise",
}
STRANGERS = {  # what people may take for one of these, by the beginnings of names
    "conditioner.embedders.": "Stable Diffusion XL",
    "model.diffusion_model.joint_blocks.": "Stable Diffusion 3",
    "model.diffusion_model.double_blocks.": "Flux",
    "control_model.": "a ControlNet",
    "lora_": "a LoRA",
}
V_DEVIATION = 0.09  # a norm's bias in the last block: above it in SD 2's v-models, below in its eps-models
