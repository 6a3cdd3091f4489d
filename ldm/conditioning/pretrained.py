"""Weights of text encoders: from a folder, a file, or a hub where its id was written out."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from ldm.checkpoint.files import raw
from ldm.checkpoint.hub import download, on_hub
from ldm.checkpoint.text_keys import find_text, read_text
from ldm.errors import CheckpointError
from ldm.models.transformer import TextTransformer

if TYPE_CHECKING:
    from torch import Tensor, nn

FILES = ("model.safetensors", "open_clip_model.safetensors", "text_encoder/model.safetensors")


def given(weights: str | None) -> bool:
    """Whether there is anything to read."""
    return weights not in (None, "random")


def digest(encoder: nn.Module) -> str:
    """The sha256 of an encoder's tensors, in float32 whatever they are stored in."""
    total = hashlib.sha256()
    for name, tensor in encoder.state_dict().items():
        total.update(f"{name} {tuple(tensor.shape)}".encode())
        total.update(raw(tensor.float()))
    return total.hexdigest()


def load_text(transformer: TextTransformer, weights: str) -> None:
    """Fill a text encoder, even one without memory, with the weights in a folder, in a file, or on a hub."""
    layout, state = find_text(read(find(weights)))
    state = read_text(state, transformer, layout)
    for name, parameter in transformer.state_dict().items():
        if state[name].shape != parameter.shape:
            got, expected = f"{name} of shape {tuple(state[name].shape)}", str(tuple(parameter.shape))
            raise CheckpointError("another encoder's weights", weights, got, expected, "its width, length, vocabulary")
    transformer.load_state_dict(state, assign=any(x.is_meta for x in transformer.parameters()))


def find(weights: str) -> Path:
    """The file with the weights; a hub is asked only for what looks like its id and is not here."""
    path = Path(weights).expanduser()
    if path.is_file():
        return path
    if path.is_dir():
        for name in FILES:
            if (path / name).is_file():
                return path / name
        raise ValueError(f"weights: nothing in the folder; got {weights}; expected {FILES[0]}; try another folder")
    if on_hub(weights):
        return fetch(weights)
    raise ValueError(
        f"weights: no such folder or file; got {weights}; expected a folder, a file, a hub's id or random; try random"
    )


def fetch(identity: str) -> Path:
    """The file of a model on a hub: transformers' kind, or open_clip's."""
    return find(str(hub_folder(identity, lambda names: [name for name in FILES if name in names][:1])))


def hub_folder(identity: str, chosen: Callable[[list[str]], list[str]]) -> Path:
    """The folder of a model on a hub, or an error about the setting that names it."""
    try:
        return download(identity, chosen)
    except CheckpointError as error:
        raise ValueError(f"weights: {error}; try a folder that has the weights") from error


def read(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except SafetensorError as error:
        hint = "ldm convert" if path.suffix in (".ckpt", ".pt", ".bin", ".pth") else "another file"
        raise CheckpointError("not a safetensors file", str(path), str(error), hint=hint) from error
