"""DiT (Peebles and Xie 2023): class-conditional transformers, published without a first stage."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ldm.checkpoint.checkpoint import Checkpoint
from ldm.checkpoint.components import open_backbone, stored_backbone
from ldm.checkpoint.family import Backbone
from ldm.checkpoint.files import Tensors
from ldm.checkpoint.formats.diffusers import Folder
from ldm.checkpoint.hyperparameters import Shapes, count, given
from ldm.checkpoint.latent_diffusion import LatentDiffusion, Node, Part
from ldm.checkpoint.rename import Joint, KeyMap, State, columns, expand
from ldm.errors import CheckpointError
from ldm.models.dit import SIZES, DiT, DiTBlock, sincos_positions

POSITIONS = "pos_embed"  # a fixed table, which diffusers calls pos_embed.pos_embed
NO_STAGE = "no first stage inside: give Stable Diffusion's with --vae"
FACTOR = 8  # pixels to a latent of the published first stage

ENDS = columns("""
    ours         dit                               diffusers
    embed        x_embedder.proj                   pos_embed.proj
    time.time.0  t_embedder.mlp.0                  -
    time.time.2  t_embedder.mlp.2                  -
    time.label   y_embedder.embedding_table        -
    modulation   final_layer.adaLN_modulation.1    proj_out_1
    out          final_layer.linear                proj_out_2
""")
BLOCK = columns("""
    ours           dit                 diffusers
    modulation     adaLN_modulation.1  norm1.linear
    fc1            mlp.fc1             ff.net.0.proj
    fc2            mlp.fc2             ff.net.2
    attention.q    attn.q              attn1.to_q
    attention.k    attn.k              attn1.to_k
    attention.v    attn.v              attn1.to_v
    attention.out  attn.proj           attn1.to_out.0
""")
EMBEDDER = {  # one here, one per block in diffusers
    "time.time.0": "norm1.emb.timestep_embedder.linear_1",
    "time.time.2": "norm1.emb.timestep_embedder.linear_2",
    "time.label": "norm1.emb.class_embedder.embedding_table",
}


def dit_keys(dit: DiT, layout: str) -> KeyMap:
    """A class-conditional DiT's names in its own repository ("dit"), or in diffusers' DiTTransformer2DModel."""
    if layout not in ("diffusers", "dit"):
        what = f"no {layout} layout for a DiT"
        raise CheckpointError(what, got=layout, expected="diffusers or dit", hint="diffusers")
    modules, joints = list(ENDS[layout].items()), []
    for number in range(len(dit.blocks)):
        theirs = f"{'transformer_' * (layout == 'diffusers')}blocks.{number}"
        modules += [(f"blocks.{number}.{a}", f"{theirs}.{b}") for a, b in BLOCK[layout].items()]
        modules += [(a, f"{theirs}.{b}") for a, b in EMBEDDER.items()] if layout == "diffusers" else []
        for leaf in ("weight", "bias") if layout == "dit" else ():
            joints.append(Joint(f"{theirs}.attn.qkv.{leaf}", [f"{theirs}.attn.{x}.{leaf}" for x in "qkv"]))
    return KeyMap(expand(dit, modules), joints)


def dit_numbers(shapes: Shapes, layout: str) -> Node:
    """A DiT's constructor arguments; its heads are the paper's, 64 wide in all but the largest."""
    width, _, patch, _ = shapes[f"{ENDS[layout]['embed']}.weight"]
    paper = {size["width"]: size["heads"] for size in SIZES.values()}
    depth = count(shapes, "(?:transformer_)?blocks.#.")
    return {"width": width, "depth": depth, "heads": paper.get(width, max(1, width // 64)), "patch": patch}


def dit_given(shapes: Shapes, layout: str) -> Node:
    """What the assembly gives a DiT."""
    first, last = (f"{ENDS[layout][name]}.weight" for name in ("embed", "out"))
    label = ENDS[layout].get("time.label", f"transformer_blocks.0.{EMBEDDER['time.label']}")
    return given(shapes, first, last, f"{label}.weight", "time.pooled.0.weight", patch=shapes[first][2])


def dit_heads(settings: Mapping[str, Any]) -> Node:
    """A DiT's heads by diffusers' settings."""
    return {"heads": settings["num_attention_heads"]} if "num_attention_heads" in settings else {}


def dit_settings(dit: DiT, size: int) -> Node:
    """The settings of DiTTransformer2DModel."""
    block = dit.blocks[0]
    assert isinstance(block, DiTBlock)
    heads = block.attention.heads
    return {
        "_class_name": "DiTTransformer2DModel",
        "num_attention_heads": heads,
        "attention_head_dim": dit.width // heads,
        "in_channels": dit.in_channels,
        "out_channels": dit.out_channels,
        "num_layers": len(dit.blocks),
        "sample_size": size,
        "patch_size": dit.patch,
        "num_embeds_ada_norm": (dit.time.classes or 1) - 1,
        "norm_eps": 1e-6,
    }


class DiTFamily(LatentDiffusion):
    """A file has only the transformer, under the names of DiT's repository; a folder is diffusers' DiTPipeline."""

    def recognises(self, tensors: Tensors) -> bool:
        return "x_embedder.proj.weight" in tensors

    def read(self, tensors: Tensors) -> Checkpoint:
        stored, table = self.stored(tensors), tensors.get(POSITIONS)
        node, supplied, state = open_backbone(self.backbone, tensors, "dit", {}, stored.get("backbone"))
        side = 16 if table is None else grid_side(table, f"{tensors.path}: {POSITIONS}")
        config = stored or self.published(node, supplied, FACTOR * node["patch"] * side)
        return Checkpoint({**config, "autoencoder": None}, state, self.name, [tensors.path], notes=[NO_STAGE])

    def published(self, node: Node, supplied: Node, size: int) -> Node:
        """The configuration with the published settings."""
        eps = {"type": "eps"}
        return {
            "format": 1,
            "path": {"type": "linear", "start": 1e-4, "end": 0.02},
            "prediction": {"type": "learned_range", "of": eps} if supplied["learned_sigma"] else eps,
            "backbone": node,
            "conditioner": label(supplied),
            "guidance": {"cfg": self.cfg},
            "spacing": {"type": "leading", "steps": 50, "offset": 0},
            "solver": {"type": "ddpm", "noise_var": "learned" if supplied["learned_sigma"] else "small"},
            "size": size,
        }

    def describes(self, config: Mapping[str, Any]) -> bool:
        return (config.get("backbone") or {}).get("type") == self.backbone.type

    def write(self, config: Node, state: Mapping[str, Tensor], notes: list[str]) -> State:
        network, weights = stored_backbone(self.backbone, config["backbone"], state)
        if config.get("autoencoder"):
            notes.append("a DiT file has no first stage: open it with --vae")
        config["autoencoder"] = None
        side = config.get("size", 256) // FACTOR // network.patch
        table = sincos_positions(network.width, side, side, torch.device("cpu"))
        return dit_keys(network, "dit").write(weights) | {POSITIONS: table}

    def condition_in_folder(self, folder: Folder, supplied: Node) -> list[Part]:
        if not supplied["classes"]:
            raise CheckpointError("a DiT without labels", str(folder.path), expected="diffusers' DiTPipeline")
        return [(label(supplied), {})]


def label(supplied: Node) -> Node:
    """The conditioner of labels, the last of which is the null; the backbone has their table."""
    return {"type": "label", "classes": supplied["classes"], "null": supplied["classes"] - 1}


def grid_side(positions: Tensor, where: str) -> int:
    """The side of a DiT's grid; its table of positions must be the fixed one, for ours is computed."""
    side, width = math.isqrt(positions.shape[-2]), positions.shape[-1]
    fixed = sincos_positions(width, side, side, positions.device)
    if fixed.shape != positions.shape or not torch.allclose(positions.float(), fixed, atol=1e-3):
        raise CheckpointError(
            "learned position embeddings are not supported",
            where,
            expected="fixed sine-cosine embeddings",
        )
    return side


COMPUTED = (POSITIONS, f"{POSITIONS}.pos_embed")
DIT_BACKBONE = Backbone(
    "dit", "DiT", "transformer", dit_numbers, dit_given, dit_keys, dit_heads, dit_settings, COMPUTED
)
DIT = DiTFamily(name="DiT", backbone=DIT_BACKBONE, cfg=4.0, factor=FACTOR, pipelines={"": "DiTPipeline"})
