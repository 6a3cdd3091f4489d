"""Weights of text encoders from a folder, a file, or the Hub."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import TypeGuard

from torch import Tensor, nn

from ldm.checkpoint import hub
from ldm.checkpoint.files import raw
from ldm.checkpoint.hub import on_hub
from ldm.checkpoint.text_keys import find_text, read_text
from ldm.errors import CheckpointError
from ldm.models.transformer import TextTransformer

FILES = ("model.safetensors", "open_clip_model.safetensors", "text_encoder/model.safetensors")


def is_named(weights: str | None) -> TypeGuard[str]:
    """True if `weights` names something to load."""
    return weights not in (None, "random")


def digest(encoder: nn.Module) -> str:
    """The sha256 of an encoder's tensors as float32."""
    total = hashlib.sha256()
    for name, tensor in encoder.state_dict().items():
        total.update(f"{name} {tuple(tensor.shape)}".encode())
        total.update(raw(tensor.float()))
    return total.hexdigest()


def load_text(transformer: TextTransformer, weights: str) -> None:
    """Load a text encoder's weights, also into one on the meta device."""
    layout, state = find_text(read(find(weights)))
    state = read_text(state, transformer, layout)
    for name, parameter in transformer.state_dict().items():
        if state[name].shape != parameter.shape:
            got, expected = f"{name} of shape {tuple(state[name].shape)}", str(tuple(parameter.shape))
            raise CheckpointError(
                "the weights do not fit this text encoder",
                weights,
                got,
                expected,
                "the width, length and vocabulary of the weights",
            )
    transformer.load_state_dict(state, assign=any(x.is_meta for x in transformer.parameters()))


def find(weights: str) -> Path:
    """The file with the weights; a name that is neither a file nor a folder may be a Hub id."""
    path = Path(weights).expanduser()
    if not path.exists() and on_hub(weights):
        path = download(weights, lambda names: [name for name in FILES if name in names][:1])
    if path.is_dir():
        found = next((path / name for name in FILES if (path / name).is_file()), None)
        if found is None:
            raise ValueError(f"weights: none in the folder; got {path}; expected {FILES[0]}; try another folder")
        return found
    if not path.is_file():
        expected = "a folder, a file, a Hub id or random"
        raise ValueError(f"weights: no such folder or file; got {weights}; expected {expected}; try random")
    return path


def download(identity: str, choose: Callable[[list[str]], list[str]]) -> Path:
    """The local folder of a model on the Hub, with the files that `choose` picks from the names of all."""
    try:
        return hub.download(identity, choose)
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
