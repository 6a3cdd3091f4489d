"""What the families of latent diffusion share: a backbone, text encoders, a first stage, and published settings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ldm.checkpoint.autoencoder_keys import write_autoencoder
from ldm.checkpoint.checkpoint import Checkpoint
from ldm.checkpoint.components import (
    NO_STAGE,
    infer,
    open_backbone,
    open_text,
    stage_in_file,
    stage_in_folder,
    stage_to_write,
    stored_backbone,
    write_encoder,
)
from ldm.checkpoint.diffusers_settings import (
    autoencoder_settings,
    text_settings,
    tokenizer_files,
    unet_heads,
    unet_settings,
)
from ldm.checkpoint.family import Backbone, Family
from ldm.checkpoint.files import Tensors
from ldm.checkpoint.formats.compvis import FIRST_STAGE, SCALE, UNET, averaged, ignore, stored_config, stored_prediction
from ldm.checkpoint.formats.diffusers import Folder, Model, Written, read_json
from ldm.checkpoint.hyperparameters import text_numbers, unet_given, unet_numbers
from ldm.checkpoint.networks import LARGEST, build_autoencoder, check_size
from ldm.checkpoint.rename import State, above, under
from ldm.checkpoint.schedules import path_of_betas, read_scheduler, write_scheduler
from ldm.checkpoint.unet_keys import unet_keys
from ldm.errors import CheckpointError

Node = dict[str, Any]
Part = tuple[Node, State]  # a node of a conditioner and its weights

UNET_BACKBONE = Backbone("unet", "U-Net", "unet", unet_numbers, unet_given, unet_keys, unet_heads, unet_settings)
EXTRAS = {"inpainting": "masked_image", "edit": "edit"}  # what extra channels are for, and our conditioner for them


@dataclass(frozen=True)
class TextEncoder:
    """One of a family's text encoders: our part, its names in single files, its folder, and its null."""

    type: str
    layout: str
    prefix: str
    folder: str = "text_encoder"
    tokenizer: str = "tokenizer"
    null: str = "empty"  # or "zeros"; the empty text is our default

    @property
    def policy(self) -> Node:
        """What a node says of the null."""
        return {} if self.null == "empty" else {"null": self.null}

    def in_file(self, tensors: Tensors, stored: Node | None) -> Part:
        """Its node and weights in a single file."""
        return open_text(under(tensors, self.prefix), self.layout, self.type, stored, **self.policy)

    def in_folder(self, folder: Folder) -> Part:
        """Its node and weights in a diffusers folder."""
        settings, weights = folder.open(self.folder)
        where, numbers = str(folder.path / self.folder), infer(text_numbers, weights, "clip", "text encoder")
        width, layers = numbers["width"], int(settings.get("num_hidden_layers") or numbers["layers"])
        hidden = settings.get("intermediate_size", 4 * width)
        if hidden != 4 * width:
            expected = "an MLP four times as wide"
            raise CheckpointError("unsupported text encoder", where, f"{hidden} for {width}", expected)
        if layers > numbers["layers"]:
            raise CheckpointError("more layers than weights", where, str(layers), f"at most {numbers['layers']}")
        others = {"heads": settings.get("num_attention_heads", numbers["heads"]), **self.policy}
        others["layers"] = layers + (self.type == "open_clip")  # counted as published, with the last one unread
        return open_text(weights, "clip", self.type, **others)


@dataclass(frozen=True, kw_only=True)
class LatentDiffusion(Family):
    """A family whose single files have CompVis's prefixes and whose folders are diffusers' pipelines."""

    name: str
    marks: tuple[str, ...] = ()  # tensors of which a single file has one
    prefixes: tuple[str, ...] = ()  # of the condition's tensors in a single file
    backbone: Backbone = UNET_BACKBONE
    encoders: tuple[TextEncoder, ...] = ()
    heads: Mapping[str, int] = field(default_factory=dict)  # of the backbone; no shape tells them
    path: Mapping[str, Any] = field(default_factory=dict)
    cfg: float = 1.0
    size: int = 256  # of the pictures, in pixels
    v_size: int | None = None  # likewise for models that predict v
    averaged: bool = False  # sampled from the moving average of the weights
    pipelines: Mapping[str, str] = field(default_factory=dict)  # diffusers' classes by use of the extra channels
    stage: str = "vae"  # the first stage's folder
    folder_name: str = ""  # the family's name in folders, if it has another
    factor: int = 1  # pixels to a latent where a folder has no first stage

    def parts(self) -> tuple[str, ...]:
        texts = [name for encoder in self.encoders for name in (encoder.folder, encoder.tokenizer)]
        return (self.backbone.folder, "vae", "vqvae", *texts, "scheduler") if self.pipelines else ()

    # ------------------------------------------------------------------------------------------------- single files

    def recognises(self, tensors: Tensors) -> bool:
        return f"{UNET}input_blocks.0.0.weight" in tensors and any(mark in tensors for mark in self.marks)

    def read(self, tensors: Tensors) -> Checkpoint:
        stored, where = self.stored(tensors), str(tensors.path)
        notes = ignore(tensors, UNET, FIRST_STAGE, *self.prefixes)
        weights = averaged(tensors, notes) if self.averaged else under(tensors, UNET)
        node, given, state = open_backbone(self.backbone, weights, "compvis", self.heads, stored.get("backbone"))
        parts = self.condition_in_file(tensors, split(stored.get("conditioner"))[0])
        if (given["context"] is None) != (not parts):
            got, hint = f"a context of {given['context']}", "the file of the whole model"
            raise CheckpointError("a U-Net without the encoder of its condition", where, got, hint=hint)
        use = use_of_extra(given, where)
        conditioner, condition = join(parts, use)
        autoencoder, stage = stage_in_file(tensors, FIRST_STAGE, stored.get("autoencoder"), notes)
        kind = stored["prediction"]["type"] if stored else self.prediction(tensors, state, use, notes)
        config = stored or {
            "format": 1,
            "path": path_of_betas(tensors["betas"]) if "betas" in tensors else dict(self.path),
            "prediction": {"type": kind},
            "backbone": node,
            "conditioner": conditioner,
            "guidance": {"cfg": self.cfg},
            "spacing": {"type": "leading", "steps": 50},
            "solver": {"type": "dpmpp_2m"},
            "autoencoder": autoencoder,
            "size": self.v_size if kind == "v" and self.v_size else self.size,
        }
        name = ", ".join(word for word in (self.name, use, "v-prediction" if kind == "v" else "") if word)
        return Checkpoint(config, state | condition | stage, name, [tensors.path], notes=notes)

    def stored(self, tensors: Tensors) -> Node:
        """The configuration that we wrote into the file, if it is one of this family."""
        config = stored_config(tensors)
        return config if self.describes(config) else {}

    def prediction(self, tensors: Tensors, state: State, use: str, notes: list[str]) -> str:
        """What the network predicts, by the file's metadata."""
        return stored_prediction(tensors) or "eps"

    def condition_in_file(self, tensors: Tensors, stored: list[Node]) -> list[Part]:
        """The parts of the condition, with the nodes that a stored configuration has for them."""
        nodes: list[Node | None] = [*stored] if len(stored) == len(self.encoders) else [None] * len(self.encoders)
        return [encoder.in_file(tensors, node) for encoder, node in zip(self.encoders, nodes)]

    def describes(self, config: Mapping[str, Any]) -> bool:
        backbone = config.get("backbone") or {}
        types = [node.get("type") for node in split(config.get("conditioner"))[0]]
        return backbone.get("type") == self.backbone.type and types == [encoder.type for encoder in self.encoders]

    def write(self, config: Node, state: Mapping[str, Tensor], notes: list[str]) -> State:
        network, weights = stored_backbone(self.backbone, config["backbone"], state)
        nodes, use = split(config.get("conditioner"))
        file = above(self.backbone.keys(network, "compvis").write(weights), UNET)
        file |= self.write_condition(nodes, [under(state, prefix) for prefix in prefixes(nodes, use)])
        if config.get("autoencoder"):
            config["autoencoder"], stage, scale = stage_to_write(config["autoencoder"], state, notes, use == "edit")
            theirs = write_autoencoder(stage, build_autoencoder(config["autoencoder"]), "compvis")
            file |= above(theirs, FIRST_STAGE) | {SCALE: scale}
        return file

    def write_condition(self, nodes: list[Node], states: list[State]) -> State:
        """The tensors of the condition in a single file."""
        file: State = {}
        for encoder, node, state in zip(self.encoders, nodes, states):
            file |= above(write_encoder(node, state, encoder.layout), encoder.prefix)
        return file

    # ----------------------------------------------------------------------------------------------------- folders

    def recognises_folder(self, folder: Folder) -> bool:
        own = self.backbone.folder in folder.parts and set(folder.parts) <= set(self.parts())
        return own and all(encoder.folder in folder.parts for encoder in self.encoders)

    def read_folder(self, folder: Folder) -> Checkpoint:
        part, notes = self.backbone.folder, list(folder.notes)
        settings, weights = folder.open(part)
        node, given, state = open_backbone(self.backbone, weights, "diffusers", self.backbone.heads(settings))
        parts = self.condition_in_folder(folder, given)
        use = use_of_extra(given, str(folder.path))
        conditioner, condition = join(parts, use)
        stages = [name for name in ("vae", "vqvae") if name in folder.parts]
        autoencoder, stage = stage_in_folder(folder, stages[0]) if stages else (None, {})
        notes += [] if stages else [NO_STAGE]
        if "scheduler" not in folder.parts:
            what, got = "a pipeline without its scheduler, which defines its noise", ", ".join(folder.parts)
            raise CheckpointError(what, str(folder.path), got)
        scheduler = read_json(folder.path / "scheduler" / "scheduler_config.json")
        config: Node = {"format": 1, **read_scheduler(scheduler, notes), "backbone": node, "conditioner": conditioner}
        if given["learned_sigma"] and config["prediction"]["type"] != "learned_range":
            config["prediction"] = {"type": "learned_range", "of": config["prediction"]}
        config |= {"guidance": {"cfg": self.cfg}, "autoencoder": autoencoder}
        side = settings.get("sample_size") or 64
        side = side if isinstance(side, int) else side[0]
        check_size("sample_size: too large", side, LARGEST, str(folder.path / part))
        factor = build_autoencoder(autoencoder).factor if autoencoder else self.factor
        config["size"] = side * factor
        tokenizers = [encoder.tokenizer for encoder in self.encoders if encoder.tokenizer in folder.parts]
        tokenizer = str(folder.path / tokenizers[0]) if tokenizers else None
        name = ", ".join(word for word in (self.folder_name or self.name, use, "diffusers folder") if word)
        weighted = sorted({part, *stages, *(encoder.folder for encoder in self.encoders)})
        files = [file for part in weighted for file in folder.files(part)]
        return Checkpoint(config, state | condition | stage, name, files, tokenizer, notes)

    def condition_in_folder(self, folder: Folder, given: Node) -> list[Part]:
        """The parts of the condition."""
        return [encoder.in_folder(folder) for encoder in self.encoders]

    def write_folder(self, config: Node, state: Mapping[str, Tensor], tokenizer: Any, notes: list[str]) -> Written:
        network, weights = stored_backbone(self.backbone, config["backbone"], state)
        nodes, use = split(config.get("conditioner"))
        if use not in self.pipelines:
            got = " and ".join([f"{config['backbone']['type']} with {node['type']}" for node in nodes])
            raise CheckpointError("diffusers has no such pipeline", got=got, expected=PIPELINES)
        if not config.get("autoencoder"):
            raise CheckpointError("no first stage to write", hint="--vae")
        stage = stage_model(config["autoencoder"], state, notes, use == "edit")
        factor = build_autoencoder(config["autoencoder"]).factor
        settings = self.backbone.settings(network, config["size"] // factor)
        kind, tensors = settings.pop("_class_name"), self.backbone.keys(network, "diffusers").write(weights)
        models = {self.backbone.folder: Model(kind, settings, tensors), self.stage: stage}
        written = Written(models, {"_class_name": self.pipelines[use]})
        for encoder, node, prefix in zip(self.encoders, nodes, prefixes(nodes, use)):
            tensors = write_encoder(node, under(state, prefix), "clip")
            models[encoder.folder] = Model("CLIPTextModel", text_settings(node), tensors, "transformers")
            written.files |= tokenizer_files(tokenizer, node["length"], encoder.tokenizer)
            written.index[encoder.tokenizer] = ["transformers", "CLIPTokenizer"]
            written.index |= {"safety_checker": [None, None], "feature_extractor": [None, None]}
            written.index |= {"image_encoder": [None, None], "requires_safety_checker": False}
        scheduler = write_scheduler(config, notes)
        written.files["scheduler/scheduler_config.json"] = scheduler
        written.index["scheduler"] = ["diffusers", scheduler["_class_name"]]
        return written


PIPELINES = "Stable Diffusion, LDM or DiT"  # that diffusers has and we write


def stage_model(node: Node, state: Mapping[str, Tensor], notes: list[str], keep_latents: bool = False) -> Model:
    """A first stage as diffusers' AutoencoderKL or VQModel."""
    node, weights, scale = stage_to_write(node, state, notes, keep_latents)
    network = build_autoencoder(node)
    kind = {"kl": "AutoencoderKL", "vq": "VQModel"}[node["type"]]
    settings = autoencoder_settings(network, node, float(scale))
    return Model(kind, settings, write_autoencoder(weights, network, "diffusers"))


def use_of_extra(given: Node, where: str) -> str:
    """What a backbone's extra channels hold: a mask and an image's latents, an image's latents, or nothing."""
    latent, extra = given["in_channels"], given["extra_channels"]
    uses = {0: "", latent: "edit", latent + 1: "inpainting"}
    if extra not in uses:
        expected = f"{latent}, {2 * latent} (edit) or {2 * latent + 1} (inpainting)"
        raise CheckpointError("unknown input channels", where, str(latent + extra), expected)
    return uses[extra]


def join(parts: list[Part], use: str) -> tuple[Node | None, State]:
    """A conditioner of several parts, and of the images that extra channels hold."""
    nodes = [node for node, _ in parts]
    if parts and use:
        nodes.append({"type": EXTRAS[use]})
    if not nodes:
        return None, {}
    state: State = {}
    for prefix, (_, weights) in zip(prefixes(nodes, ""), parts):
        state |= above(weights, prefix)
    return nodes[0] if len(nodes) == 1 else {"type": "compose", "parts": nodes}, state


def split(conditioner: Node | None) -> tuple[list[Node], str]:
    """A conditioner's parts, and what its extra channels hold."""
    if not conditioner or conditioner.get("type") != "compose":
        return [conditioner] if conditioner else [], ""
    *nodes, last = conditioner["parts"]
    for use, kind in EXTRAS.items():
        if last["type"] == kind:
            return nodes, use
    return [*nodes, last], ""


def prefixes(nodes: list[Node], use: str) -> list[str]:
    """Where the weights of a conditioner's parts are."""
    alone = len(nodes) == 1 and not use
    return ["conditioner."] if alone else [f"conditioner.members.{number}." for number in range(len(nodes))]
