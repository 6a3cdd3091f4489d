"""Folders that diffusers writes: a whole pipeline with its index, or one model alone."""

from __future__ import annotations

import json
import os
import shutil
from collections import ChainMap
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.checkpoint.files import flush_folder, open_file, replacing, write_file
from ldm.errors import CheckpointError

Node = dict[str, Any]

INDEX = "model_index.json"
VERSION = "0.42.0"  # of diffusers, as we write it
NOT_NEEDED = ("safety_checker", "feature_extractor", "image_encoder")
STEMS = ("diffusion_pytorch_model", "model")
ONLY: dict[str, tuple[Any, ...]] = {  # settings that would need another network than ours, and what they may be
    **dict.fromkeys(("only_cross_attention", "dual_cross_attention", "center_input_sample"), (False,)),
    **dict.fromkeys(("addition_embed_type", "encoder_hid_dim"), (None,)),
    **dict.fromkeys(("mid_block_scale_factor", "downsample_padding", "resnet_out_scale_factor"), (1,)),
    **{"act_fn": ("silu", "gelu-approximate"), "hidden_act": ("quick_gelu", "gelu"), "norm_num_groups": (32,)},
    **{"flip_sin_to_cos": (True,), "freq_shift": (0,), "time_embedding_type": ("positional",)},
    **{"norm_type": ("ada_norm_zero", "group"), "layer_norm_eps": (1e-5,), "resnet_skip_time_act": (False,)},
}
UNETS = {"norm_eps": (1e-5,)}  # a Transformer2DModel's is not that of its blocks


class Folder:
    """A folder of diffusers: its index, and each part's settings and tensors; a model alone has no index."""

    def __init__(self, path: Path):
        self.path = path
        self.index = read_json(path / INDEX) if (path / INDEX).is_file() else {}
        listed = [name for name, value in self.index.items() if isinstance(value, list) and value[:1] != [None]]
        self.parts = [name for name in listed if name not in NOT_NEEDED]
        self.notes = [f"left out: {name}" for name in NOT_NEEDED if name in listed]

    def settings(self, part: str = "") -> Node:
        """A part's settings, unchecked; of one without a config.json none."""
        path = self.path / part / "config.json"
        return read_json(path) if path.is_file() else {}

    def open(self, part: str = "", **legal: tuple[Any, ...]) -> tuple[Node, Mapping[str, Tensor]]:
        """A part's settings, refused where our networks cannot follow them, and its tensors; `legal` replaces ONLY."""
        settings = read_json(self.path / part / "config.json")
        only = ONLY | (UNETS if str(settings.get("_class_name", "")).startswith("UNet") else {}) | legal
        for name, values in only.items():
            if settings.get(name, values[0]) not in values:
                what, expected = f"{name}: not supported", " or ".join(map(str, values))
                raise CheckpointError(what, str(self.path / part), str(settings[name]), expected)
        return settings, ChainMap(*(open_file(file) for file in self.files(part)))  # type: ignore[arg-type]

    def files(self, part: str = "") -> list[Path]:
        """A part's weights."""
        return weights_of(self.path / part if part else self.path)


def weights_of(folder: Path) -> list[Path]:
    """A part's files: one, the shards that an index lists, or the only variant (fp16)."""
    for stem in STEMS:
        for ending in ("safetensors", "safetensors.index.json", "safetensors.index.*.json", "*.safetensors"):
            found = sorted(folder.glob(f"{stem}.{ending}"))
            if len(found) > 1:
                got = ", ".join(path.name for path in found)
                raise CheckpointError("several variants of the weights", str(folder), got, "one", "without the others")
            if found and ending.endswith(".json"):
                names = sorted(set(read_json(found[0])["weight_map"].values()))
                return [folder / Path(name).name for name in names]
            if found:
                return found
    pickles = ", ".join(path.name for path in sorted(folder.glob("*.bin"))) or "none"
    hint = "diffusers' save_pretrained(..., safe_serialization=True)"
    raise CheckpointError("no weights in safetensors", str(folder), pickles, f"{STEMS[0]}.safetensors", hint)


def read_json(path: Path) -> Node:
    """The object in a JSON file."""
    expected = "a JSON file as diffusers writes it"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError("cannot be read", str(path), str(error), expected) from error
    if not isinstance(content, dict):
        raise CheckpointError("not an object", str(path), type(content).__name__, expected)
    return content


@dataclass
class Model:
    """A part to write: its class in diffusers or transformers, its settings, and its tensors."""

    kind: str
    settings: Node
    tensors: Mapping[str, Tensor]
    library: str = "diffusers"


@dataclass
class Written:
    """What a folder is written from: models by part, other JSON and text files, and the rest of its index."""

    models: dict[str, Model]  # "" is a model alone
    index: Node = field(default_factory=dict)
    files: dict[str, Node | str] = field(default_factory=dict)


def write(folder: Path, written: Written, dtype: torch.dtype | None) -> None:
    """Write a folder, all or nothing."""
    with new_folder(folder) as target:
        index = {"_diffusers_version": VERSION, **written.index}
        for part, model in written.models.items():
            ours = model.library == "diffusers"
            version = {"_class_name": model.kind, "_diffusers_version": VERSION} if ours else {}
            write_text(target / part / "config.json", {**model.settings, **version})
            write_file(target / part / f"{STEMS[not ours]}.safetensors", model.tensors, {}, dtype)
            index[part] = [model.library, model.kind]
        for name, content in written.files.items():
            write_text(target / name, content)
        if written.index:
            write_text(target / INDEX, index)


def write_text(path: Path, content: Node | str) -> None:
    """Write text, or an object as JSON, into a folder that is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = content if isinstance(content, str) else json.dumps(content, indent=2, ensure_ascii=False)
    with replacing(path) as file:
        file.write(text.encode())


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A folder that appears under its name when all is written, and leaves nothing behind otherwise."""
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise CheckpointError("exists already", str(folder), hint="another name")
    unfinished = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    try:
        unfinished.mkdir()
        yield unfinished
        os.replace(unfinished, folder)
        flush_folder(folder.parent)
    except OSError as error:
        raise CheckpointError("cannot be written", str(folder), error.strerror or str(error)) from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
