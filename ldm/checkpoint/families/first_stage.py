"""An autoencoder alone: KL or VQ, under CompVis's names or diffusers'."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ldm.checkpoint.autoencoder_keys import write_autoencoder
from ldm.checkpoint.checkpoint import Checkpoint
from ldm.checkpoint.components import stage_in_file, stage_in_folder, stage_to_write
from ldm.checkpoint.family import Family
from ldm.checkpoint.files import Tensors
from ldm.checkpoint.formats.compvis import FIRST_STAGE, SCALE, ignore, stored_config
from ldm.checkpoint.formats.diffusers import Folder, Written
from ldm.checkpoint.latent_diffusion import Node, stage_model
from ldm.checkpoint.networks import build_autoencoder
from ldm.checkpoint.rename import State

CLASSES = ("AutoencoderKL", "VQModel")  # of diffusers
NAMES = {"kl": "KL first stage", "vq": "VQ first stage"}


class FirstStage(Family):
    """A file with or without CompVis's prefix, or a folder of one of diffusers' classes."""

    name = "a first stage"

    def prefix(self, tensors: Tensors) -> str | None:
        """The prefix of an autoencoder's tensors, if there is one in the file."""
        ends = ("encoder.conv_in.weight", "decoder.conv_in.weight")
        return next((p for p in (FIRST_STAGE, "") if all(f"{p}{end}" in tensors for end in ends)), None)

    def recognises(self, tensors: Tensors) -> bool:
        return self.prefix(tensors) is not None

    def read(self, tensors: Tensors) -> Checkpoint:
        prefix = self.prefix(tensors) or ""
        notes = ignore(tensors, prefix)
        node, state = stage_in_file(tensors, prefix, stored_config(tensors).get("autoencoder"), notes)
        kind = NAMES[node["type"]] if node else ""
        return Checkpoint({"format": 1, "autoencoder": node}, state, kind, [tensors.path], notes=notes)

    def recognises_folder(self, folder: Folder) -> bool:
        return not folder.index and folder.settings().get("_class_name") in CLASSES

    def read_folder(self, folder: Folder) -> Checkpoint:
        node, state = stage_in_folder(folder, "")
        name = f"{NAMES[node['type']]}, diffusers folder"
        return Checkpoint({"format": 1, "autoencoder": node}, state, name, folder.files())

    def describes(self, config: Mapping[str, Any]) -> bool:
        return not config.get("backbone") and bool(config.get("autoencoder"))

    def write(self, config: Node, state: Mapping[str, Tensor], notes: list[str]) -> State:
        config["autoencoder"], stage, scale = stage_to_write(config["autoencoder"], state, notes)
        return write_autoencoder(stage, build_autoencoder(config["autoencoder"]), "compvis") | {SCALE: scale}

    def write_folder(self, config: Node, state: Mapping[str, Tensor], tokenizer: Any, notes: list[str]) -> Written:
        return Written({"": stage_model(config["autoencoder"], state, notes)})


FIRST_STAGES = FirstStage()
