"""CompVis's latent diffusion models (Rombach et al. 2022): text-to-image, class-conditional, unconditional."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ldm.checkpoint.files import Tensors
from ldm.checkpoint.formats.compvis import CONDITION, FIRST_STAGE, UNET
from ldm.checkpoint.formats.diffusers import Folder
from ldm.checkpoint.latent_diffusion import LatentDiffusion, Node, Part, TextEncoder, split
from ldm.checkpoint.rename import State
from ldm.errors import CheckpointError

NOISE: Node = {"type": "scaled_linear", "start": 0.0015, "end": 0.0195}
BERT = TextEncoder("joint_text", "ldm", CONDITION)  # x-transformers' encoder of BERT's tokens
TABLE = "embedding.weight"  # of labels


class ClassConditional(LatentDiffusion):
    """A table of labels, the last of which is the null, read as tokens."""

    def condition_in_file(self, tensors: Tensors, stored: list[Node]) -> list[Part]:
        table = tensors[f"{CONDITION}{TABLE}"]
        rows, width = table.shape
        node: Node = {"type": "label", "classes": rows, "null": rows - 1, "width": width}
        return [(stored[0] if stored else node, {"table.weight": table})]

    def describes(self, config: Mapping[str, Any]) -> bool:
        nodes, _ = split(config.get("conditioner"))
        tokens = [node.get("type") for node in nodes] == ["label"] and bool(nodes[0].get("width"))
        return tokens and (config.get("backbone") or {}).get("type") == self.backbone.type

    def write_condition(self, nodes: list[Node], states: list[State]) -> State:
        return {f"{CONDITION}{TABLE}": states[0]["table.weight"]}


class Unconditional(LatentDiffusion):
    """No condition in single files; in folders of diffusers' UNet2DModel perhaps labels."""

    def condition_in_folder(self, folder: Folder, given: Node) -> list[Part]:
        if given["context"]:
            what = "a U-Net that reads text, without its encoder"
            raise CheckpointError(what, str(folder.path), expected="text_encoder")
        labels = {"type": "label", "classes": given["classes"], "null": (given["classes"] or 0) - 1}
        return [(labels, {})] if given["classes"] else []


TEXT = LatentDiffusion(
    name="LDM text-to-image",
    marks=(f"{CONDITION}transformer.token_emb.weight",),
    prefixes=(CONDITION,),
    encoders=(BERT,),
    heads={"heads": 8},
    path={"type": "scaled_linear", "start": 0.00085, "end": 0.012},
    cfg=7.5,
    averaged=True,
)
CLASS = ClassConditional(
    name="LDM class-conditional",
    marks=(f"{CONDITION}{TABLE}",),
    prefixes=(CONDITION,),
    heads={"heads": 1},
    path=NOISE,
    cfg=3.0,
    averaged=True,
)
VQ = Unconditional(
    name="LDM unconditional, VQ",
    marks=(f"{FIRST_STAGE}quantize.embedding.weight",),
    heads={"head_width": 32},
    path=NOISE,
    averaged=True,
    pipelines={"": "LDMPipeline"},
    stage="vqvae",
    folder_name="LDM unconditional",
)
KL = replace(  # LSUN-Churches is the only published one
    VQ, name="LDM unconditional, KL", marks=(f"{UNET}out.2.bias",), heads={"heads": 8}, path=NOISE | {"end": 0.0155}
)
